"""Frames reach the training workers in the same order, however they are read and kept."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager

import pytest
import torch
from faults import FragileCubes
from torch.utils.data import DataLoader

from cuvis_dist.archive import Frame, FrameCache, NamedFrames
from cuvis_dist.errors import DataError
from cuvis_dist.training.read_ahead import ReadAhead

BATCHES = [[3, 1, 4], [1, 5], [9, 2, 6], [5]]


def loader(dataset):
    return DataLoader(dataset, batch_sampler=BATCHES)


def assert_same_batches(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs) == len(BATCHES)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in mine)


@pytest.fixture
def named(tmp_path, monkeypatch):
    """Frames that a cache of this test alone keeps."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    frames = [Frame(f"rec#{i}", "rec", "rec") for i in range(12)]
    return NamedFrames(
        FragileCubes(tmp_path, False), frames, FrameCache("disk", 10**9, "run", "train")
    )


@pytest.mark.parametrize("cached", [False, True])
def test_reading_ahead_keeps_the_order(tmp_path, ray_session, named, cached):
    plain = FragileCubes(tmp_path, False)
    options = {"kept": named.kept} if cached else {}
    ahead = ReadAhead(loader(named if cached else plain), 2, **options)
    for _ in range(2):
        assert_same_batches(ahead, loader(plain))
    assert len(ahead) == len(BATCHES)


def test_a_reader_is_waited_for_where_frames_are_to_be_read(tmp_path, ray_session, named):
    waited = []

    @contextmanager
    def starting():
        waited.append(True)
        yield

    ahead = ReadAhead(loader(named), 2, kept=named.kept, starting=starting)
    list(ahead)
    assert waited
    for index in range(12):  # the reader may have another folder for temporary files
        named[index]
    waited.clear()
    list(ahead)
    assert not waited, "all frames are kept"


def test_reading_ahead_is_bounded(tmp_path, ray_session):
    ahead = ReadAhead(loader(FragileCubes(tmp_path, False)), 2)
    first = iter(ahead)
    next(first)
    readings = (tmp_path / "read.log").read_text().split()
    assert set(map(int, readings)) <= {3, 1, 4, 5}, "read farther ahead than asked"


def test_a_frame_that_cannot_be_read_is_named(tmp_path, ray_session):
    class Damaged(FragileCubes):
        def __getitem__(self, index):
            raise OSError("it is damaged")

    frames = [Frame(f"rec#{i}", "rec", f"rec_{i}.npz") for i in range(12)]
    named = NamedFrames(Damaged(tmp_path, False), frames)
    with pytest.raises(DataError, match=r"rec#3 \(rec_3\.npz\).*it is damaged"):
        next(iter(ReadAhead(loader(named), 1)))


def test_a_killed_reader_is_replaced(tmp_path, ray_session):
    """Reading frame 7 for the first time kills the process that reads it."""
    fragile = FragileCubes(tmp_path, True)
    ahead = ReadAhead(DataLoader(fragile, batch_sampler=[[6, 7], [8]]), 1)
    batches = list(ahead)
    assert (tmp_path / "died").exists()
    whole = [fragile[index]["cube"] for index in (6, 7, 8)]
    got = torch.cat([batch["cube"] for batch in batches])
    assert torch.equal(got, torch.stack([torch.as_tensor(cube) for cube in whole]))
