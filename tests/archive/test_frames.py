"""Archives from every kind of data module; shards; errors that name their frame."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from cuvis import write_session
from cuvis_ai_core.data.datamodule import BaseCuvisAIDataModule
from cuvis_ai_dataloader.data.datamodule_cu3s import Cu3sDataModule
from cuvis_ai_dataloader.data.datamodule_cu3s_multi import MultiCu3sDataModule
from cuvis_ai_dataloader.data.datamodule_tiff_paired import TiffPairedDataModule
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    TensorDataset,
    default_collate,
)

from cuvis_dist.archive import Archive, Frame, open_archive
from cuvis_dist.errors import DataError, InputError
from cuvis_dist.runs.trainrun import load_trainrun

EVERY = {"train": [{"kind": "all"}], "val": [{"kind": "all"}]}
WAVELENGTH = np.linspace(430, 910, 6)


def recordings(folder, lengths):
    """Write stand-in sessions; frame j of recording i holds the value 100 * i + j."""
    paths = []
    for i, n in enumerate(lengths):
        cubes = np.stack([np.full((3, 4, 6), 100 * i + j, dtype=np.uint16) for j in range(n)])
        paths.append(folder / f"rec_{i}.cu3s")
        write_session(paths[-1], cubes, WAVELENGTH)
    return paths


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 5))
def test_shards_cover_the_archive_and_never_cross_recordings(lengths, shard_frames):
    frames = [Frame(f"{r}#{i}", str(r), str(r)) for r, n in enumerate(lengths) for i in range(n)]
    archive = Archive(DataLoader(TensorDataset(torch.zeros(len(frames), 1))), frames)
    shards = archive.shards(shard_frames)
    assert [i for s in shards for i in range(s.start, s.stop)] == list(range(len(frames)))
    assert [s.ordinal for s in shards] == list(range(len(shards)))
    for shard in shards:
        assert 1 <= len(shard) <= shard_frames
        assert len({frames[i].recording for i in range(shard.start, shard.stop)}) == 1
    assert len(shards) == sum(-(-n // shard_frames) for n in lengths)


def test_npz(demo_trainrun):
    trainrun = load_trainrun(demo_trainrun)
    archive = open_archive(trainrun.datamodule(), "train")
    first = archive.frames[0]
    assert first.uid == "recording_00.cu3s#0"
    assert first.path.endswith("recording_00_000.npz")
    batch = archive.read(0)
    assert batch["cube"].shape == (1, 16, 20, 12)
    assert batch["wavelengths"].shape == (1, 12)


def test_cu3s_single_file(tmp_path):
    (path,) = recordings(tmp_path, [5])
    archive = open_archive(
        Cu3sDataModule(cu3s_file_path=str(path), splits=EVERY, sdk_cuda=False), "train"
    )
    assert [f.uid for f in archive.frames] == [f"{path}#{i}" for i in range(5)]
    assert archive.read(3)["cube"].shape == (1, 3, 4, 6)
    assert float(archive.read(4)["cube"].float().mean()) == 10  # reflectance of raw value 4


def test_cu3s_multi_with_selectors_and_with_splits_of_its_own(tmp_path):
    recordings(tmp_path, [3, 2])
    for split_column in (False, True):
        universe = tmp_path / f"universe_{split_column}.csv"
        with open(universe, "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["source", "index"] + ["split"] * split_column)
            table.writerow(["rec_0.cu3s", "0-2"] + ["train"] * split_column)
            table.writerow(["rec_1.cu3s", "0-1"] + ["val"] * split_column)
        module = MultiCu3sDataModule(
            universe_csv=str(universe), splits=None if split_column else EVERY, sdk_cuda=False
        )
        archive = open_archive(module, "train")
        assert len(archive) == (3 if split_column else 5)
        assert archive.frames[1].path == str(tmp_path / "rec_0.cu3s")
        assert [len(s) for s in archive.shards(2)] == ([2, 1] if split_column else [2, 1, 2])


def test_tiff(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    for i in range(3):
        tifffile.imwrite(
            tmp_path / f"frame_{i}.tif",
            np.full((6, 3, 4), i, dtype=np.float32),
            photometric="minisblack",
        )
    archive = open_archive(
        TiffPairedDataModule(
            images_dir=str(tmp_path), wavelengths="430,500,600,700,800,910", splits=EVERY
        ),
        "train",
    )
    assert [f.path for f in archive.frames] == [str(tmp_path / f"frame_{i}.tif") for i in range(3)]
    assert archive.read(2)["cube"].ndim == 4


class Cubes(Dataset):
    """A plain dataset: no refs, no sources."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"cube": np.full((2, 2, 3), index, dtype=np.float32)}


class OwnSplits(BaseCuvisAIDataModule):
    def build_stage_dataset(self, stage):
        return Cubes()


class Plain(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Cubes(), collate_fn=lambda items: {"cube": torch.full((1,), len(items))})


def test_modules_without_refs():
    archive = open_archive(OwnSplits(), "train")
    assert [f.uid for f in archive.frames] == [f"data#{i}" for i in range(4)]
    assert len(archive.shards(4)) == 1
    assert float(archive.read(2)["cube"].mean()) == 2


def test_a_loader_of_its_own_collates_as_it_says():
    assert open_archive(Plain(), "train").read(0)["cube"].tolist() == [1]


def test_samples_per_frame_repeats_frames_as_upstream_does():
    archive = open_archive(OwnSplits(samples_per_frame=3), "train")
    assert len(archive) == 12
    assert archive.frames[5].uid == "data#1"


def test_a_streaming_dataset_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            yield {}

    class Module(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(Stream())

    with pytest.raises(InputError, match="map-style"):
        open_archive(Module(), "train")


def test_a_missing_split_is_named(demo_trainrun):
    module = load_trainrun(demo_trainrun, ["data.splits.test=[]"]).datamodule()
    with pytest.raises(InputError, match="test split: it selects no frames"):
        open_archive(module, "test")


def test_a_frame_that_cannot_be_read_is_named(tmp_path):
    paths = recordings(tmp_path, [2, 2])
    universe = tmp_path / "universe.csv"
    universe.write_text("source,index\nrec_0.cu3s,0-1\nrec_1.cu3s,0-1\n")
    module = MultiCu3sDataModule(universe_csv=str(universe), splits=EVERY, sdk_cuda=False)
    archive = open_archive(module, "train")
    paths[1].write_text("damaged after it was listed")
    archive.read(1)
    with pytest.raises(DataError, match=r"rec_1\.cu3s#0 .*rec_1\.cu3s.*Session File"):
        archive.read(2)


def test_a_batch_of_one_is_what_collating_gives(demo_trainrun):
    archive = open_archive(load_trainrun(demo_trainrun).datamodule(), "train")
    ours, theirs = archive.read(3), default_collate([archive.dataset[3]])
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
        assert ours[key].dtype == value.dtype


UNUSABLE = {
    "complex": (lambda cube: cube * (1 + 1j), "values are of dtype complex64, and only real"),
    "words": (lambda cube: cube.astype("U12"), "values are of dtype <U12"),
    "dates": (lambda cube: (cube * 100).astype("M8[s]"), "values are of dtype datetime64"),
    "no rows": (lambda cube: cube[:0], r"shape \(0, 20, 12\), and so no pixels"),
    "no columns": (lambda cube: cube[:, :0], r"shape \(16, 0, 12\), and so no pixels"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_frame_without_pixels_or_real_numbers_is_named(demo, case):
    """By what both phases read: the archive, and the data set of training's loaders."""
    change, words = UNUSABLE[case]
    path = demo.parent / "archive" / "recording_00_001.npz"
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {"cube": change(arrays["cube"])})
    archive = open_archive(load_trainrun(demo).datamodule(), "train")
    archive.read(0)
    for read in (archive.read, archive.dataset.__getitem__):
        with pytest.raises(DataError, match=rf"frame recording_00.cu3s#1 .*npz\): its .*{words}"):
            read(1)


def test_other_numbers_are_read_as_before(demo):
    folder = demo.parent / "archive"
    for i, dtype in enumerate([np.uint16, np.float16, bool]):
        path = folder / f"recording_00_{i:03d}.npz"
        with np.load(path) as file:
            arrays = dict(file)
        cube = (arrays["cube"] * 100).astype(dtype)
        np.savez(path, **arrays | {"cube": cube, "note": np.array("some text")})
        archive = open_archive(load_trainrun(demo).datamodule(), "train")
        np.testing.assert_array_equal(archive.read(i)["cube"][0], cube.astype(np.float32))


def test_a_complex_tiff_is_named(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    for name, dtype in (("a", np.float32), ("b", np.complex64)):
        cube = np.ones((6, 3, 4), dtype=dtype)
        tifffile.imwrite(tmp_path / f"{name}.tif", cube, photometric="minisblack", metadata=None)
    module = TiffPairedDataModule(
        images_dir=str(tmp_path), splits=EVERY, wavelengths="1,2,3,4,5,6", batch_size=1
    )
    archive = open_archive(module, "train")
    assert archive.read(0)["cube"].shape == (1, 3, 4, 6)
    with pytest.raises(DataError, match=r"b.tif.*dtype complex64, and only real numbers"):
        archive.read(1)


def test_a_complex_cube_of_another_data_module_is_named():
    class Cubes(Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return {"cube": torch.ones(2, 2, 3, dtype=torch.complex64)}

    archive = Archive(DataLoader(Cubes()), [Frame("a#0", "a", "a")])
    with pytest.raises(DataError, match=r"frame a#0: its cube is of dtype torch.complex64"):
        archive.read(0)
