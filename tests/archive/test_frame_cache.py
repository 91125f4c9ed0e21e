"""A node keeps frames as they were read, in bounds, and for nobody but the run that read them."""

from __future__ import annotations

import fcntl
import gc
import inspect
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import FragileCubes, FragileModule, die
from readings import counted

from cuvis_dist.archive import Frame, FrameCache, NamedFrames
from cuvis_dist.archive.frame_cache import _shelf, frame_cache
from cuvis_dist.archive.frame_file import PackedFrame, read_frame
from cuvis_dist.archive.shelf import Shelf

FRAMES = [Frame(f"rec#{i}", "rec", "rec") for i in range(12)]


@pytest.fixture(params=["memory", "disk"])
def cache(request, tmp_path, monkeypatch):
    """A cache of this test alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    one = FrameCache(request.param, 10**9, f"test-{os.getpid()}-{time.monotonic_ns()}", "train")
    yield one
    one.clear()


def files(cache: FrameCache) -> list[Path]:
    return sorted(cache.folder.glob("*.frame"))


def test_an_item_comes_back_as_it_was(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3)
    item = {
        "cube": np.arange(24, dtype=np.uint16).reshape(2, 3, 4),
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "tensor": tensor, "part": tensor[:, 1], "half": torch.ones(3, dtype=torch.bfloat16),
        "grown": torch.ones(2, requires_grad=True), "empty": np.zeros((0, 3)),
        "number": 3, "words": ["a", ("b", None)], "text": np.array(["x", "yz"]),
    }  # fmt: skip
    packed = PackedFrame(item)
    with open(tmp_path / "one.frame", "xb") as file:
        packed.write(file)
    assert (tmp_path / "one.frame").stat().st_size == packed.size
    back = read_frame(tmp_path / "one.frame")
    assert back.keys() == item.keys()
    assert (back["number"], back["words"]) == (3, ["a", ("b", None)])
    for name, value in item.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(back[name], value), name
            assert back[name].dtype is value.dtype
            assert back[name].requires_grad == value.requires_grad
        elif isinstance(value, np.ndarray):
            assert back[name].dtype == value.dtype
            assert (back[name] == value).all()


def test_who_writes_to_an_item_changes_it_for_nobody_else(tmp_path):
    with open(tmp_path / "one.frame", "xb") as file:
        PackedFrame({"cube": np.zeros(4), "mask": torch.zeros(4)}).write(file)
    mine, other = (read_frame(tmp_path / "one.frame") for _ in range(2))
    mine["cube"] += 1
    mine["mask"] += 1
    for item in (other, read_frame(tmp_path / "one.frame")):
        assert not item["cube"].any()
        assert not item["mask"].any()


def test_frames_are_read_once(tmp_path, cache):
    named = NamedFrames(FragileCubes(tmp_path, False), FRAMES, cache)
    plain = FragileCubes(tmp_path / "..", False)
    for _ in range(3):
        for index in (3, 1, 4, 1, 5):
            assert (named[index]["cube"] == plain[index]["cube"]).all()
            assert (named.in_time(index)["cube"] == plain[index]["cube"]).all()
    assert counted(tmp_path / "read.log") == Counter([3, 1, 4, 5])
    assert len(files(cache)) == 4
    assert sum(path.stat().st_size for path in files(cache)) == cache.held()
    other = NamedFrames(FragileCubes(tmp_path, False), FRAMES, cache.of("val"))
    assert other.kept(3) is None, "another split of the module can have other frames"


def test_a_frame_whose_file_changed_is_read_again(tmp_path, cache):
    file = tmp_path / "labels.json"
    file.write_text("one")
    frame = Frame("rec#0", "rec", "rec", reads=("s3://bucket/rec", str(file)))
    named = NamedFrames(FragileCubes(tmp_path, False), [frame], cache)
    assert named.kept(0) is None
    kept = [named[0], named.kept(0)]
    assert (kept[0]["cube"] == kept[1]["cube"]).all()
    file.write_text("others")
    assert named.kept(0) is None


def test_a_frame_that_is_drawn_at_random_is_not_kept(tmp_path, cache):
    class Drawn(FragileCubes):
        def __getitem__(self, index):
            return {"cube": super().__getitem__(index)["cube"] * np.float32(draw[index]())}

    draw = [lambda: torch.rand(1)[0], np.random.rand, lambda: 2.0]
    named = NamedFrames(Drawn(tmp_path, False), FRAMES, cache)
    for index in range(3):
        first, second = named[index]["cube"], named[index]["cube"]
        assert (first == second).all() == (index == 2)
    assert len(files(cache)) == 1


def _keep_all(cache: FrameCache, folder: Path) -> None:
    named = NamedFrames(FragileCubes(folder, False, bands=50), FRAMES, cache)
    for index in range(12):
        named[index]


def test_the_bound_is_that_of_all_processes(tmp_path, cache):
    """What came first stays."""
    cache.limit = 40_000  # a frame is 14,400 bytes and its wavelengths
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_keep_all, args=(cache, tmp_path)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    first = files(cache)
    assert len(first) == 2
    assert sum(path.stat().st_size for path in first) == cache.held() <= cache.limit
    _keep_all(cache, tmp_path)
    assert files(cache) == first


def _item(index: int) -> dict[str, np.ndarray]:
    return {name: np.full(2000, index) for name in ("cube", "mask", "more")}


def _killed_at(line: int, cache: FrameCache, index: int) -> None:
    """Keep a frame; be killed before some line of the code that does, if there are so many."""
    numbers, writes = itertools.count(1), PackedFrame.write.__code__

    def trace(frame, event, argument):
        if frame.f_code is not writes and frame.f_code.co_filename != inspect.getfile(Shelf):
            return None
        if event == "line" and next(numbers) == line:
            die()
        return trace

    _shelf.cache_clear()  # as in a new process
    sys.settrace(trace)
    cache.put(FRAMES[0], index, _item(index))


@pytest.mark.parametrize("cache", ["memory"], indirect=True)
def test_who_is_killed_while_a_frame_is_kept_loses_that_frame_alone(cache):
    """Wherever the process is: its frame can be kept by others, and its room is theirs again."""
    fork = multiprocessing.get_context("fork")
    for index in itertools.count(1):
        process = fork.Process(target=_killed_at, args=(index, cache, index))
        process.start()
        process.join(60)
        cache.put(FRAMES[0], index, _item(index))
        item = cache.get(FRAMES[0], index)
        assert all((item[name] == value).all() for name, value in _item(index).items())
        assert len(files(cache)) == index
        left = {path for path in cache.folder.rglob("*") if path.is_file()}
        assert {path.name for path in left - {*files(cache)}} == {".lock", ".bytes"}
        assert sum(path.stat().st_size for path in files(cache)) == cache.held()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert index > 40
    cache.clear()
    assert not [*cache.folder.parent.glob(f"{cache.name}*")]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KB; needs the right to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a disk here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_disk_that_runs_full_keeps_what_it_has(tmp_path, small_disk, monkeypatch, warnings):
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    cache = FrameCache("disk", 10**9, "run", "train")
    named = NamedFrames(FragileCubes(tmp_path, False, bands=50), FRAMES, cache)
    first, second = ([named[index]["cube"] for index in range(12)] for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    read = (tmp_path / "read.log").read_text().split()
    assert 12 < len(read) < 24, "some are kept, the others are read again"
    assert len(warnings) == 1
    assert re.search(r"no more frames are kept in .*No space left on device", warnings[0])
    left = {path.name for path in small_disk.rglob("*") if path.is_file()} - {".lock", ".bytes"}
    assert left
    assert all(name.endswith(".frame") for name in left), "nothing half written is left"
    assert sum((cache.folder / name).stat().st_size for name in left) == cache.held()


@pytest.mark.parametrize("planted", ["link", "file", "link to the run"])
def test_a_place_of_somebody_else_is_not_used(tmp_path, monkeypatch, warnings, planted):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache, other = FrameCache("disk", 10**9, "run", "train"), tmp_path / "other"
    other.mkdir()
    if planted == "link":
        cache.folder.parent.symlink_to(other)
    elif planted == "file":
        cache.folder.parent.touch()
    else:
        cache.folder.parent.mkdir()
        cache.folder.symlink_to(other)
    named = NamedFrames(FragileCubes(tmp_path, False), FRAMES, cache)
    for _ in range(2):
        assert named[3]["cube"].shape == (9, 8, 5)
    assert not list(other.iterdir())
    assert [re.sub("; .*", "", text)[:24] for text in warnings] == ["frames are decoded anew "]


def test_what_killed_drivers_left_is_removed(tmp_path, cache):
    """What is in use, or was a moment ago, stays."""
    parent = cache.folder.parent
    parent.mkdir(exist_ok=True)
    names = "left", "recent", "locked"
    others = {name: parent / f"{cache.name}-{name}" for name in names}
    for folder in others.values():
        folder.mkdir()
        (folder / ".lock").touch()
        (folder / "one.frame").touch()
    for name in ("left", "locked"):
        os.utime(others[name], (0, time.time() - 3600))
    with open(others["locked"] / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        _keep_all(cache, tmp_path)
        assert [name for name in names if others[name].exists()] == ["recent", "locked"]
    for folder in others.values():
        shutil.rmtree(folder, ignore_errors=True)


def test_frames_are_kept_as_long_as_somebody_has_the_module(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    class Module(FragileModule):
        __hash__ = None  # as of a dataclass

    module, other = Module(tmp_path), Module(tmp_path)
    assert frame_cache(module, "none", 10**9) is None
    cache = frame_cache(module, "disk", 10**9)
    assert frame_cache(module, "disk", 10**8) is cache
    assert cache.limit == 10**8
    assert frame_cache(other, "disk", 10**9).folder != cache.folder
    _keep_all(cache, tmp_path)
    assert len(files(cache)) == 12
    assert cache.folder.stat().st_mode & 0o077 == 0
    del module
    gc.collect()
    assert not cache.folder.exists()
