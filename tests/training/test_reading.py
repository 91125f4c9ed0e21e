"""Frames reach the training workers in the same order, however they are read and kept."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from faults import FragileCubes
from readings import counted
from torch.utils.data import DataLoader

from cuvis_dist.archive import Frame, NamedFrames
from cuvis_dist.errors import DataError
from cuvis_dist.training.frame_cache import CachedFrames, FrameCache, make_cache
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


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_cache_gives_back_what_was_read_once(tmp_path, on_disk):
    cubes = FragileCubes(tmp_path, False)
    kept = CachedFrames(cubes, FrameCache(10**9, tmp_path if on_disk else None))
    for _ in range(3):
        assert_same_batches(loader(kept), loader(FragileCubes(tmp_path / "..", False)))
    readings = counted(tmp_path / "read.log")
    assert readings == Counter({index: 1 for batch in BATCHES for index in batch})
    assert not [p for p in tmp_path.iterdir() if p.suffix not in (".frame", ".log")]


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_cache_is_bounded_and_keeps_what_came_first(tmp_path, on_disk):
    cubes = FragileCubes(tmp_path, False)
    cache = FrameCache(4000, tmp_path if on_disk else None)
    kept = CachedFrames(cubes, cache)  # a frame is 1,440 bytes and its wavelengths
    for _ in range(2):
        for index in range(6):
            kept[index]
    held = [index for index in range(6) if cache.get(index) is not None]
    assert held == [0, 1]
    if on_disk:
        assert sum(p.stat().st_size for p in tmp_path.glob("*.frame")) <= 4000


def test_a_full_disk_is_no_error(tmp_path):
    gone = tmp_path / "gone"
    kept = CachedFrames(FragileCubes(tmp_path, False), FrameCache(10**9, gone))
    assert kept[3]["cube"].shape == (9, 8, 5)
    assert kept.cache.left == 0


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KB; needs the right to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a disk here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_runs_full_keeps_what_it_has(tmp_path, small_disk, monkeypatch, warnings):
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    kept = CachedFrames(FragileCubes(tmp_path, False, bands=50), make_cache("disk", 10**9, "run"))
    first, second = ([kept[index]["cube"] for index in range(12)] for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    read = (tmp_path / "read.log").read_text().split()
    assert 12 < len(read) < 24, "some are kept, the others are read again"
    assert len(warnings) == 1
    assert re.search(r"no more frames are kept in .*No space left on device", warnings[0])
    left = {path.suffix for path in small_disk.rglob("*") if path.is_file()}
    assert left == {".frame"}, "nothing half written is left"


@pytest.mark.parametrize("cached", [False, True])
def test_reading_ahead_keeps_the_order(tmp_path, ray_session, cached):
    plain = FragileCubes(tmp_path, False)
    dataset = CachedFrames(plain, FrameCache(10**9)) if cached else plain
    ahead = ReadAhead(loader(dataset), 2)
    for _ in range(2):
        assert_same_batches(ahead, loader(plain))
    assert len(ahead) == len(BATCHES)


def test_a_reader_is_waited_for_where_frames_are_to_be_read(tmp_path, ray_session):
    waited = []

    @contextmanager
    def starting():
        waited.append(True)
        yield

    kept = CachedFrames(FragileCubes(tmp_path, False), FrameCache(10**9))
    ahead = ReadAhead(loader(kept), 2, starting=starting)
    list(ahead)
    assert waited
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
