"""Frames on a rank's device: kept or read beside the step, in the batches of a loader without."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from cuvis_ai_core.training.config import TrainingConfig
from settings import scaling_of
from torch.utils.data import DataLoader, Dataset, default_collate

from cuvis_dist.archive import Frame, NamedFrames, NamingCollate, Numbered
from cuvis_dist.archive.frame_cache import frame_cache
from cuvis_dist.errors import DataError
from cuvis_dist.training.assignment import Assignment, Seat, TrainerParts
from cuvis_dist.training.dealing import DealtBatches, deal
from cuvis_dist.training.feeding import DeviceFrames, Drawn, Fed, as_tensors
from cuvis_dist.training.loaders import DealtDataModule
from cuvis_dist.training.places import Places

CPU = torch.device("cpu")
GPU = pytest.param(
    torch.device("cuda"),
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)
#: Of a frame of :class:`Frames`: a cube, a mask and a number as a tensor.
SIZE = 4 * 5 * 3 * 2 + 4 * 5 + 8


class Frames(Dataset):
    """Ten frames of integers, as data modules give them; those of ``drawing`` draw."""

    def __init__(self, drawing=(), damaged=None, seconds=0.0):
        self.read, self.drawing, self.damaged, self.seconds = [], set(drawing), damaged, seconds
        self.reading = self.at_once = 0

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.read.append(index)
        self.reading += 1
        self.at_once = max(self.at_once, self.reading)
        time.sleep(self.seconds)
        self.reading -= 1
        if index == self.damaged:
            raise OSError("it is damaged")
        rng = np.random.default_rng(index)
        cube = rng.integers(0, 2**16, (4, 5, 3), dtype=np.uint16)
        if index in self.drawing:
            cube[0, 0, 0] = int(torch.randint(2**16, ()))
        return {
            "cube": cube, "mask": torch.arange(20) % 3 == index % 3, "n": np.array([index]),
            "name": f"frame {index}", "number": index, "list": [1, np.float32(index)],
        }  # fmt: skip


def plain(frames, **options):
    loader = DataLoader(frames, 3, shuffle=True, **options)
    batches = DealtBatches(loader, 0, 1)
    return deal(loader, frames, batches), batches


def fed(frames, kept, rank=0, world=1, collate=default_collate, **options):
    """A loader as a rank's data module makes it."""
    loader = DataLoader(frames, 3, shuffle=True, collate_fn=collate, **options)
    batches = DealtBatches(loader, rank, world)
    names = [Frame(f"rec#{i}", "rec", "rec") for i in range(len(frames))]
    reader = deal(loader, Numbered(Drawn(NamedFrames(frames, names))), batches)
    reader.collate_fn = as_tensors
    elsewhere = loader.num_workers > 0
    return Fed(reader, NamingCollate(collate, names), kept, "train", elsewhere=elsewhere), batches


def epochs(loader, count=3):
    """All batches of some epochs, and what is drawn afterwards, with draws between steps."""
    torch.manual_seed(7)
    batches = []
    for _ in range(count):
        for batch in loader:
            torch.rand(3)
            if batch["cube"].is_cuda:  # the next batch is made late, its frames come early
                torch.cuda._sleep(10**7)
            batches.append(batch)
    return batches, torch.rand(4)


def assert_same(ours, theirs):
    assert torch.equal(ours[1], theirs[1]), "other numbers were drawn"
    assert len(ours[0]) == len(theirs[0])
    for mine, other in zip(ours[0], theirs[0], strict=True):
        assert mine.keys() == other.keys()
        for key, value in other.items():
            if isinstance(value, torch.Tensor):
                assert (mine[key].dtype, mine[key].shape) == (value.dtype, value.shape)
                assert torch.equal(mine[key].cpu(), value)
            else:
                assert str(mine[key]) == str(value)


@pytest.mark.parametrize("limit", [0, 4 * SIZE, 10**6])
@pytest.mark.parametrize("drawing", [(), range(10), range(0, 10, 2)])
@pytest.mark.parametrize("device", [CPU, GPU])
def test_batches_and_draws_are_those_of_a_loader_without(limit, drawing, device):
    """Also where frames draw, all of them or some, as the first ones that are read show."""
    kept = DeviceFrames(device, limit)
    ours = epochs(fed(Frames(drawing), kept)[0])
    assert all(batch["cube"].device.type == device.type for batch in ours[0])
    assert_same(ours, epochs(plain(Frames(drawing))[0]))
    assert ours[0][0]["cube"].dtype == torch.uint16
    assert not {*kept.kept("train")} & {*drawing}
    assert kept.held <= limit


@pytest.mark.parametrize("stay", [False, True])
def test_processes_of_a_loader_read(stay):
    options = {"num_workers": 2, "persistent_workers": stay}
    frames, kept = Frames(), DeviceFrames(CPU, 4 * SIZE)
    ours = epochs(fed(frames, kept, **options)[0])
    assert frames.read == [], "this process has read"
    assert len(kept.kept("train")) == 4
    assert_same(ours, epochs(plain(Frames(), **options)[0]))


def test_a_frame_is_read_once_if_there_is_room():
    frames, kept = Frames(), DeviceFrames(CPU, 10 * SIZE)
    epochs(fed(frames, kept)[0])
    assert Counter(frames.read) == Counter(range(10))
    assert kept.held == 10 * SIZE


def test_what_is_in_stays_in_and_the_others_are_read_in_each_epoch():
    frames, kept = Frames(), DeviceFrames(CPU, 5 * SIZE - 1)
    epochs(fed(frames, kept)[0])
    often = Counter(frames.read)
    assert {index for index, times in often.items() if times == 1} == {*kept.kept("train")}
    assert sorted(often.values()) == [1] * 4 + [3] * 6
    assert kept.held == 4 * SIZE


def test_splits_share_the_room():
    kept = DeviceFrames(CPU, 12 * SIZE)
    for split in ("train", "val"):
        loader, _ = fed(Frames(), kept)
        loader._split = split
        list(loader)
    assert (len(kept.kept("train")), len(kept.kept("val"))) == (10, 2)


def test_a_batch_is_read_while_the_step_before_computes():
    frames = Frames()
    for number, _ in enumerate(fed(frames, DeviceFrames(CPU, 0))[0]):
        until = time.monotonic() + 10
        while len(frames.read) < min(3 * (number + 2), 10):
            assert time.monotonic() < until, "nobody reads during the step"
            time.sleep(0.01)
        assert len(frames.read) == min(3 * (number + 2), 10), "one batch ahead, and no more"


def test_frames_that_draw_are_read_between_steps():
    frames = Frames(range(10))
    for number, _ in enumerate(fed(frames, DeviceFrames(CPU, 10**6))[0]):
        time.sleep(0.05)
        assert len(frames.read) == min(3 * (number + 1), 10)


def test_a_loop_that_is_left_early_does_not_read_beside_the_next():
    frames, kept = Frames(seconds=0.05), DeviceFrames(CPU, 10**6)
    loader, _ = fed(frames, kept)
    next(iter(loader))  # as in a sanity check
    epochs(loader)
    assert Counter(frames.read) == Counter(range(10))
    assert frames.at_once == 1, "two threads read at once"


def test_a_frame_that_cannot_be_read_is_named():
    with pytest.raises(DataError, match=r"rec#4.*it is damaged"):
        epochs(fed(Frames(damaged=4), DeviceFrames(CPU, 10**6))[0])


def test_frames_go_to_the_rank_that_keeps_them():
    """Two ranks with room for half of the frames each: later epochs find most of them."""
    frames = [Frames(), Frames()]
    kept = [DeviceFrames(CPU, 5 * SIZE) for _ in frames]
    ranks = [fed(frames[rank], kept[rank], rank, 2) for rank in (0, 1)]
    seen = []
    for _ in range(4):
        places = [Places.of_ranks([list(each.kept("train")) for each in kept]) for _ in ranks]
        state = torch.get_rng_state()
        numbers: list = []
        for (loader, batches), each in zip(ranks, places, strict=True):
            torch.set_rng_state(state)
            batches.arrange = each.arrange
            found = [batch["number"].tolist() for batch in loader]
            weighted = zip(found, batches.weights, strict=True)
            numbers += [number for part, weight in weighted if weight for number in part]
        assert sorted(numbers) == list(range(10)), "each frame counts once"
        seen.append(len(frames[0].read) + len(frames[1].read))
    first, *later = np.diff([0, *seen])
    assert first <= 11
    assert max(later) <= 5


# ---- as a rank's data module makes it ---------------------------------------------------


class Module(pl.LightningDataModule):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def train_dataloader(self):
        return DataLoader(Frames(), 3, shuffle=True, **self.options)


def rank(module, verb="fit", cache="device"):
    parts = TrainerParts(None, module, [], [], TrainingConfig(), [], [])
    assignment = Assignment(verb, None, parts, None, scaling_of(cache=cache))
    return DealtDataModule(assignment, Seat(0, 1, "", "", "", None, {}), None)


def test_a_collate_fn_of_the_modules_own_makes_batches_as_ever():
    """Of arrays and not of tensors, so that its frames are not put on the device."""

    def collate(items):
        return {"cube": np.stack([item["cube"] for item in items])}

    data = rank(Module(collate_fn=collate))
    for _ in range(2):
        loader = data.train_dataloader()
        assert isinstance(next(iter(loader))["cube"], np.ndarray)
    (note,) = data.notes
    assert "Module makes batches by a collate_fn of its own" in note


def test_a_fit_keeps_frames_and_an_evaluation_none():
    assert isinstance(rank(Module()).train_dataloader(), Fed)
    assert not isinstance(rank(Module(), "test").train_dataloader(), Fed)
    assert frame_cache(Module(), "device", 10**9) is None, "phase 1 asks this"


def test_nodes_and_devices_can_both_keep_frames():
    module = Module()
    assert isinstance(rank(module, cache="disk+device").train_dataloader(), Fed)
    assert frame_cache(module, "disk+device", 10**9) is frame_cache(module, "disk", 10**9)
    assert frame_cache(module, "memory+device", 10**9).kind == "memory"
