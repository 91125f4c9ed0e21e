"""Archives at URIs: upstream's data modules read them through the cache, with the same result."""

from __future__ import annotations

import csv
import io
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from archives import buffers_sha256, statistical_trainrun
from cuvis import write_session
from cuvis_ai_core.data.datamodule import create_data_module
from cuvis_ai_dataloader.data.datamodule_cu3s import Cu3sDataModule
from cuvis_ai_dataloader.data.datamodule_cu3s_multi import MultiCu3sDataModule
from cuvis_ai_dataloader.data.datamodule_npz_multi import MultiNpzDataModule
from cuvis_ai_dataloader.data.datamodule_tiff_paired import TiffPairedDataModule
from cuvis_ai_schemas.training.data import DataConfig
from pyarrow.fs import FileSystem, copy_files
from settings import nested

from cuvis_dist import Scaling, StatisticalTrainer
from cuvis_dist.archive import Contents, Shard, open_archive
from cuvis_dist.errors import DataError, InputError
from cuvis_dist.execution.engine import share_files
from cuvis_dist.runs.dependences import depends_on
from cuvis_dist.runs.trainrun import TrainRun, load_trainrun
from cuvis_dist.staging import fetched_when_opened, localize, portable
from cuvis_dist.staging.cache import staging_here

MODULES = (MultiNpzDataModule, Cu3sDataModule, MultiCu3sDataModule, TiffPairedDataModule)


class Store:
    """A folder at a URI."""

    def __init__(self, base: str, query: str = "") -> None:
        self.base, self.query = base, query

    def uri(self, key: str = "") -> str:
        return f"{self.base}/{key}{self.query}"

    def upload(self, folder: Path, key: str) -> None:
        filesystem, path = FileSystem.from_uri(self.uri(key))
        filesystem.create_dir(path)
        copy_files(str(folder), path, destination_filesystem=filesystem)

    def put(self, key: str, content: bytes) -> str:
        filesystem, path = FileSystem.from_uri(self.uri(key))
        with filesystem.open_output_stream(path) as stream:
            stream.write(content)
        return self.uri(key)

    def delete(self, key: str) -> None:
        filesystem, path = FileSystem.from_uri(self.uri(key))
        filesystem.delete_file(path)


@pytest.fixture
def bucket(s3, tmp_path):
    """On the S3 server, which the URIs name, as Ray's workers do not know it."""
    server = s3.removeprefix("http://").replace(":", "%3A")
    return Store(f"s3://bucket/{tmp_path.name}", f"?scheme=http&endpoint_override={server}")


@pytest.fixture
def store(tmp_path):
    """On this machine, for what does not depend on the kind of store."""
    (tmp_path / "store").mkdir()
    return Store((tmp_path / "store").as_uri())


@pytest.fixture
def scaling(tmp_path):
    return Scaling(
        resources={"workers": 3}, reading={"stage_dir": tmp_path / "cache", "stage_bytes": 10**8}
    )


def counters(scaling):
    return staging_here(str(scaling.reading.stage_dir), scaling.reading.stage_bytes).counters()


def with_data(demo: Path, folder: Path, **data) -> TrainRun:
    """The demo's trainrun with another ``data`` block; keys of ``params`` replace its params."""
    values = yaml.safe_load(demo.read_text())
    values["pipeline"] = str(demo.parent / "pipeline.yaml")
    values["data"] |= data
    values["output_dir"] = str(folder / "results")
    path = folder / "trainrun.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_trainrun(path)


def module_of(name: str, scaling: Scaling, folder: Path, splits: dict, **params):
    """A data module as a trainrun in ``folder`` would get it."""
    config = DataConfig(data_module=name, splits=splits, params=params)
    known = SimpleNamespace(data_modules={cls.DATA_MODULE_NAME: cls for cls in MODULES})
    local = localize(config, scaling, folder)
    with fetched_when_opened():
        module = create_data_module(known, local)
        module.setup("fit")
    return module


def same_items(ours, theirs) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[key]) if torch.is_tensor(value) else True
        for key, value in ours.items()
    )


def rows_of(universe: Path) -> list[dict[str, str]]:
    with universe.open(newline="") as file:
        return list(csv.DictReader(file))


def as_csv(rows: list[dict[str, str]]) -> bytes:
    lines = io.StringIO()
    writer = csv.DictWriter(lines, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return lines.getvalue().encode()


@pytest.mark.usefixtures("ray_session")
def test_phase_1_from_a_bucket_through_a_small_cache(demo_trainrun, bucket, tmp_path):
    """Same buffers as from the local archive; each frame fetched once; never beyond the bound."""
    nodes = [
        ("data", "data.LentilsAnomalyDataNode", {"normal_class_ids": [0]}),
        ("rx", "anomaly.rx_detector.RXGlobal", {"num_channels": 12}),
    ]
    edges = [("data.outputs.cube", "rx.inputs.data")]
    archive = demo_trainrun.parent / "archive"
    bucket.upload(archive, "archive")
    largest = max(path.stat().st_size for path in archive.glob("*.npz"))
    hashes = []
    for universe, limit in (
        (archive / "universe.csv", 1),
        (bucket.uri("archive/universe.csv"), 5 * largest),
    ):
        scaling = Scaling(
            resources={"workers": 3},
            measuring={"shard_frames": 2},
            reading={"stage_dir": tmp_path / "cache", "stage_bytes": limit},
        )
        run = statistical_trainrun(tmp_path, universe, nodes, edges)
        module = run.datamodule(scaling)
        StatisticalTrainer(run.pipeline, module, scaling=scaling).fit()
        hashes.append(buffers_sha256(run.pipeline))
    assert len(set(hashes)) == 1
    done = counters(scaling)
    frames = len(open_archive(module, "train"))
    assert done.fetched == frames + 1  # the list; the first frame was fetched at setup
    kept = list((tmp_path / "cache/files").rglob("*.npz"))
    assert sum(path.stat().st_size for path in kept) == done.bytes <= scaling.reading.stage_bytes
    assert done.evicted == done.fetched - len(kept) > frames / 2


@pytest.mark.usefixtures("ray_session")
def test_phase_1_over_remote_recordings(store, tmp_path, scaling, sessions):
    """One recording after the other through a cache for one of them, each fetched once."""
    rows = [{"source": f"{name}.cu3s", "index": "0-3"} for name in ("day1", "day2/a", "day2/b c")]
    (sessions / "universe.csv").write_bytes(as_csv(rows))
    remote = store.put("sessions/universe.csv", as_csv(rows))
    size = (sessions / "day1.cu3s").stat().st_size
    nodes = [
        ("data", "data.CU3SDataNode", {}),
        ("rx", "anomaly.rx_detector.RXGlobal", {"num_channels": 6}),
    ]
    edges = [("data.outputs.cube", "rx.inputs.data")]

    def fitted(universe, **settings):
        run = statistical_trainrun(
            tmp_path, universe, nodes, edges,
            data_module="cu3s_multi", params={"universe_csv": str(universe)},
        )  # fmt: skip
        chosen = scaling.replace(**nested(workers=1, shard_frames=1, **settings))
        trainer = StatisticalTrainer(run.pipeline, run.datamodule(chosen), scaling=chosen)
        trainer.fit()
        return buffers_sha256(run.pipeline)

    here = fitted(sessions / "universe.csv")
    limit = int(1.5 * size)
    assert fitted(remote, stage_bytes=limit) == here
    done = staging_here(str(scaling.reading.stage_dir), limit).counters()
    assert done.fetched == 1 + 3
    assert done.bytes <= limit
    with pytest.raises(InputError, match=rf"day1\.cu3s has {size} bytes.*raise stage_bytes"):
        fitted(remote, stage_bytes=size - 1, stage_dir=tmp_path / "small")


def test_a_local_list_of_remote_frames(demo_trainrun, store, tmp_path, scaling):
    """Frames are named by their URIs; one that is gone ends the reading with its URI."""
    archive = demo_trainrun.parent / "archive"
    store.upload(archive, "archive")
    rows = rows_of(archive / "universe.csv")
    for row in rows[::2]:
        row["materialized_path"] = store.uri(f"archive/{row['materialized_path']}")
    for row in rows[1::2]:
        shutil.copy(archive / row["materialized_path"], tmp_path)
    (tmp_path / "universe.csv").write_bytes(as_csv(rows))
    universe = {"universe_csv": str(tmp_path / "universe.csv")}
    local = {"universe_csv": str(archive / "universe.csv")}
    theirs, ours = both_archives("npz_multi", scaling, tmp_path, EVERY, local, universe)
    assert [f.uid for f in ours.frames] == [f.uid for f in theirs.frames]
    assert {f.path.startswith("file://") for f in ours.frames} == {True, False}
    for i in range(len(ours)):
        assert same_items(ours.read(i), theirs.read(i)), ours.frames[i]
    gone = [i for i, frame in enumerate(ours.frames) if frame.files][-1]
    store.delete(ours.frames[gone].files[0].partition("?")[0].removeprefix(f"{store.base}/"))
    other = scaling.replace(reading={"stage_dir": tmp_path / "other"})
    module = module_of("npz_multi", other, tmp_path, EVERY, **universe)
    with pytest.raises(DataError, match=r"cannot read frame .*#\d+ \(file://.* does not exist"):
        open_archive(module, "train").read(gone)


def test_the_fingerprint_does_not_know_the_cache(demo_trainrun, store, tmp_path, scaling):
    store.upload(demo_trainrun.parent / "archive", "archive")
    params = {"universe_csv": store.uri("archive/universe.csv")}
    run, found = with_data(demo_trainrun, tmp_path, params=params), []
    for name in ("one", "two"):
        here = scaling.replace(reading={"stage_dir": tmp_path / name})
        found.append(depends_on(run, run.datamodule(here), here))
    assert found[0] == found[1]


@pytest.fixture
def sessions(tmp_path, store):
    """Three recordings of four frames, here and in the store, two of them with labels."""
    rng = np.random.default_rng(5)
    folder = tmp_path / "sessions"
    (folder / "day2").mkdir(parents=True)
    for name in ("day1", "day2/a", "day2/b c"):
        cubes = rng.integers(0, 4000, (4, 8, 8, 6)).astype(np.uint16)
        write_session(folder / f"{name}.cu3s", cubes, np.arange(400, 460, 10))
    labels = {
        "images": [{"id": i, "width": 8, "height": 8, "file_name": str(i)} for i in range(4)],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 3, 3], "area": 9,
             "segmentation": [[1, 1, 4, 1, 4, 4, 1, 4]], "iscrowd": 0}
        ],
        "categories": [{"id": 1, "name": "stone"}],
    }  # fmt: skip
    for name in ("day1", "day2/a"):
        (folder / f"{name}.json").write_text(json.dumps(labels))
    store.upload(folder, "sessions")
    return folder


EVERY = {"train": [{"kind": "all"}], "val": [{"kind": "all"}], "test": [{"kind": "all"}]}


def both_archives(name, scaling, folder, splits, local, remote):
    """The train split of a data module with local params, and with URIs."""
    return [
        open_archive(module_of(name, scaling, folder, splits, **params), "train")
        for params in (local, remote)
    ]


def assert_same_frames(theirs, ours, folder, store):
    assert [f.uid.replace(str(folder), store.uri("sessions").partition("?")[0]) for f in
            theirs.frames] == [f.uid.replace(store.query, "").replace("%20", " ") for f in
                               ours.frames]  # fmt: skip
    for i in range(len(theirs)):
        assert same_items(ours.read(i), theirs.read(i)), ours.frames[i]


def test_cu3s_multi_from_a_bucket(bucket, tmp_path, scaling, sessions):
    """A list beside the recordings: nothing is fetched before a frame is read."""
    bucket.upload(sessions, "sessions")
    rows = [
        {"source": f"{name}.cu3s", "index": "0-3", "annotation": labels}
        for name, labels in (("day1", "day1.json"), ("day2/a", "day2/a.json"), ("day2/b c", ""))
    ]
    (sessions / "universe.csv").write_bytes(as_csv(rows))
    bucket.put("sessions/universe.csv", as_csv(rows))
    theirs, ours = both_archives(
        "cu3s_multi", scaling, tmp_path, EVERY,
        {"universe_csv": str(sessions / "universe.csv")},
        {"universe_csv": bucket.uri("sessions/universe.csv")},
    )  # fmt: skip
    assert counters(scaling).fetched == 2  # the list, and the labels for their categories
    assert [f.uid for f in ours.frames] == [f.uid for f in theirs.frames]
    for i in range(len(theirs)):
        assert same_items(ours.read(i), theirs.read(i)), ours.frames[i]
    assert counters(scaling).fetched == 2 + 3 + 1
    assert len({shard.staged for shard in ours.shards(2)}) == 3
    for archive in (theirs, ours):
        assert [len(frame.reads) for frame in archive.frames[::4]] == [2, 2, 1], "with labels"
        assert len(Contents.of(archive.frames).files) == 5


def test_a_frame_that_the_recording_does_not_have(store, tmp_path, scaling, sessions):
    """A list is not checked against remote recordings; reading the frame names it."""
    universe = store.put("sessions/universe.csv", as_csv([{"source": "day1.cu3s", "index": "2-5"}]))
    module = module_of("cu3s_multi", scaling, tmp_path, EVERY, universe_csv=universe)
    archive = open_archive(module, "train")
    archive.read(1)
    with pytest.raises(
        DataError, match=r"frame day1\.cu3s#4 \(file://.*4 is out of range for file:"
    ):
        archive.read(2)


@pytest.mark.parametrize("kind", ["file", "files", "folder", "measurements"])
def test_cu3s_from_a_store(store, tmp_path, scaling, sessions, kind):
    if kind == "file":
        key = "cu3s_file_path"
        local, remote = {key: str(sessions / "day1.cu3s")}, {key: store.uri("sessions/day1.cu3s")}
    elif kind == "files":
        names = ["day2/a.cu3s", "day1.cu3s"]
        local = {"files": [str(sessions / name) for name in names]}
        remote = {"files": ",".join(store.uri(f"sessions/{name}") for name in names)}
    else:
        more = {"recursive": True, "frames": "measurements" if kind == "measurements" else "file"}
        local = {"data_dir": str(sessions), **more}
        remote = {"data_dir": store.uri("sessions"), **more}
    theirs, ours = both_archives("cu3s", scaling, tmp_path, EVERY, local, remote)
    assert len(ours) == {"file": 4, "files": 2, "folder": 3, "measurements": 12}[kind]
    assert_same_frames(theirs, ours, sessions, store)
    files = [f for f in ours.frames[0].files if f.startswith(store.base)]
    assert len(files) == 2, "the recording and its labels"
    assert [len(archive.frames[0].reads) for archive in (theirs, ours)] == [2, 2]


def test_selectors_name_uris(store, tmp_path, scaling, sessions):
    """In the trainrun, or in a list of splits which itself lies in the store."""

    def selecting(name):
        return [{"kind": "file_indices", "source": name, "ids": ["0-1"]}]

    splits = {s: selecting(store.uri("sessions/day1.cu3s")) for s in ("train", "val", "test")}
    uri = store.put("splits.json", json.dumps(splits).encode())
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    for given in (splits, {"splits_path": uri}, {"splits_path": "splits.json"}):
        recording = store.uri("sessions/day1.cu3s")
        module = module_of("cu3s", scaling, tmp_path, given, cu3s_file_path=recording)
        archive = open_archive(module, "val")
        assert [f.uid for f in archive.frames] == [
            f"{store.uri('sessions/day1.cu3s')}#{i}" for i in (0, 1)
        ]


def test_tiffs_with_labels_from_a_store(store, tmp_path, scaling):
    tifffile = pytest.importorskip("tifffile")
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(3)
    folder = tmp_path / "scrap"
    (folder / "labels").mkdir(parents=True)
    for name in ("a", "b", "c"):
        cube = rng.random((5, 8, 8), dtype=np.float32)
        tifffile.imwrite(folder / f"{name}.tif", cube, photometric="minisblack", metadata=None)
    for name in ("a", "c"):
        pixels = rng.integers(0, 2, (8, 8, 3)).astype(np.uint8)
        image.fromarray(pixels).save(folder / "labels" / f"{name}.png")
    store.upload(folder, "scrap")
    more = {"wavelengths": [400, 410, 420, 430, 440]}
    remote = {"images_dir": store.uri("scrap"), "labels_dir": store.uri("scrap/labels")}
    tagged = [{"kind": "tag", "any_of": ["anomalous"]}]
    theirs, ours = both_archives(
        "tiff_paired", scaling, tmp_path, EVERY | {"train": tagged},
        more | {"images_dir": str(folder), "labels_dir": str(folder / "labels")}, more | remote,
    )  # fmt: skip
    assert len(ours) == 2
    for i in range(2):
        assert same_items(ours.read(i), theirs.read(i))
        assert [len(archive.frames[i].reads) for archive in (theirs, ours)] == [2, 2]
    store.delete("scrap/a.tif")
    module = module_of("tiff_paired", scaling, tmp_path, EVERY, **more, **remote)
    names = [frame.uid for frame in open_archive(module, "train").frames]
    assert names == [f"{store.base}/scrap/{name}.tif" for name in "bc"]


def test_another_node_reads_from_its_own_cache(store, tmp_path, scaling, sessions, monkeypatch):
    """What arrives there has paths of that node, in the module's own objects, too."""
    params = {"data_dir": store.uri("sessions"), "recursive": True}
    module = module_of("cu3s", scaling, tmp_path, EVERY, **params)
    here = open_archive(module, "train")
    sent = pickle.dumps(here), pickle.dumps(portable(module))
    monkeypatch.setenv("CUVIS_DIST_STAGE_DIR", str(tmp_path / "there"))
    there, moved = pickle.loads(sent[0]), pickle.loads(sent[1])
    assert str(there.dataset.dataset.sources[0]).startswith(str(tmp_path / "there"))
    assert there.frames == here.frames
    shutil.rmtree(tmp_path / "cache")
    read = there.read(0)
    assert len(list((tmp_path / "there/files").rglob("*.cu3s"))) == 1
    assert not (tmp_path / "cache").exists()
    assert same_items(open_archive(moved, "train").read(0), read)


@pytest.mark.parametrize("path", ["../../etc/passwd", "s3://bucket/a/../../x", "a/../../b.npz"])
def test_a_list_cannot_lead_out_of_the_cache(store, tmp_path, scaling, path):
    content = as_csv([{"source": "x", "index": "0", "materialized_path": path}])
    universe = store.put("universe.csv", content)
    with pytest.raises(InputError, match=r"'\.\.'"):
        module_of("npz_multi", scaling, tmp_path, EVERY, universe_csv=universe)


def test_what_is_not_there_is_named(demo_trainrun, store, tmp_path, scaling):
    params = {"universe_csv": store.uri("nothing.csv")}
    with pytest.raises(DataError, match=r"nothing\.csv.* does not exist"):
        with_data(demo_trainrun, tmp_path, params=params).datamodule(scaling)
    recording = store.uri("nothing.cu3s")
    with pytest.raises(InputError, match=r"nothing\.cu3s.* does not exist"):
        module_of("cu3s", scaling, tmp_path, EVERY, cu3s_file_path=recording)


def test_shards_of_a_file_share_a_task():
    files = ["a"] * 6 + ["b"] * 2 + [None] * 3
    shards = [Shard(i, i, i + 1, file) for i, file in enumerate(files)]
    local = [range(8, 9), range(9, 10), range(10, 11)]
    assert share_files(shards, 1) == [range(0, 6), range(6, 8), *local]
    assert share_files(shards, 8) == [range(0, 3), range(3, 6), range(6, 7), range(7, 8), *local]
    assert [i for task in share_files(shards, 100) for i in task] == list(range(11))
