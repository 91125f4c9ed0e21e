"""A process gets a frame that another node keeps from an actor of that node, or decodes it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time

import numpy as np
import pytest
import ray
from faults import FragileCubes
from readings import counted

from cuvis_dist.archive import Frame, FrameCache, NamedFrames
from cuvis_dist.execution import borrowing
from cuvis_dist.execution.borrowing import OtherNodes, lend_frames
from cuvis_dist.lending import Books, Lender
from cuvis_dist.nodes.probing import random_states

FRAMES = [Frame(f"rec#{i}", "rec", "rec") for i in range(12)]


@pytest.fixture
def nodes(tmp_path, monkeypatch, ray_session):
    """Let this process go from one node to another: to its folder, its id, and its frames.

    The actors of both nodes run on this one.
    """
    context = ray.get_runtime_context()
    others = OtherNodes(context.get_job_id(), f"{context.get_node_id()}-{os.urandom(4).hex()}")
    monkeypatch.setattr(borrowing, "_here", [])
    monkeypatch.setattr(borrowing, "_started", {})
    monkeypatch.setattr(OtherNodes, "lender", lambda self, node: f"{self.driver}-{node}")
    borrowing._start(others.books, Books, context.get_node_id())
    borrowing._start(others.lender("one"), Lender, context.get_node_id())
    cache = FrameCache("disk", 10**9, f"test-{os.getpid()}", "train")
    cache.common.others = others

    def go_to(node: str) -> NamedFrames:
        (tmp_path / node).mkdir(exist_ok=True)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / node))
        monkeypatch.setattr(borrowing, "_node", lambda: node)
        return NamedFrames(FragileCubes(tmp_path, False), FRAMES, cache)

    return go_to


def pid_of(lender: str) -> int:
    actor = ray.get_actor(lender)
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))


def assert_same(item, other):
    assert item.keys() == other.keys()
    for name, array in item.items():
        assert array.dtype == other[name].dtype
        assert np.array_equal(array, other[name])


def test_a_frame_that_another_node_keeps_is_not_decoded_again(tmp_path, nodes):
    named = nodes("one")
    decoded = named[3]
    named = nodes("two")
    before = random_states()
    fetched = named[3]
    assert random_states() == before
    assert counted(tmp_path / "read.log") == {3: 1}
    assert_same(fetched, decoded)
    fetched["cube"] += 1  # it is whoever asked's own
    assert np.array_equal(named.kept(3)["cube"], decoded["cube"]), "the node keeps it, too"
    assert named.kept(4) is None
    named[4]
    assert counted(tmp_path / "read.log") == {3: 1, 4: 1}


def test_what_there_is_no_room_for_is_fetched_and_not_kept(tmp_path, nodes):
    decoded = nodes("one")[3]
    named = nodes("two")
    named.cache.limit = 100
    assert_same(named[3], decoded)
    assert named.kept(3) is None
    assert named.cache.held() == 0


def test_a_frame_whose_file_changed_is_not_fetched(tmp_path, nodes):
    file = tmp_path / "labels.json"
    file.write_text("one")
    frames = [Frame("rec#0", "rec", "rec", reads=(str(file),))]
    for node in ("one", "two"):
        named = nodes(node)
        named.frames = frames
        named[0]
        file.write_text("others")
    assert counted(tmp_path / "read.log") == {0: 2}


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_node_that_does_not_answer_is_left_alone(tmp_path, nodes, monkeypatch, end):
    """Its frames are decoded; nobody waits for it more than once."""
    named = nodes("one")
    decoded = [named[index] for index in range(6)]
    named = nodes("two")
    named[0]
    assert counted(tmp_path / "read.log") == dict.fromkeys(range(6), 1)
    monkeypatch.setattr(borrowing, "_ANSWERS", 0.5)
    pid = pid_of(named.cache.common.others.lender("one"))
    os.kill(pid, end)
    try:
        began = time.monotonic()
        for index in range(1, 6):
            assert_same(named[index], decoded[index])
        assert time.monotonic() - began < 1.5
        assert counted(tmp_path / "read.log") == {0: 1} | dict.fromkeys(range(1, 6), 2)
    finally:
        if end == signal.SIGSTOP:
            os.kill(pid, signal.SIGKILL)


def test_the_process_of_a_loader_asks_nobody(tmp_path, nodes):
    nodes("one")[3]
    named = nodes("two")
    named[4]
    fork = multiprocessing.get_context("fork").Process(target=named.__getitem__, args=(3,))
    fork.start()
    fork.join()
    assert fork.exitcode == 0
    assert counted(tmp_path / "read.log") == {3: 2, 4: 1}


def test_one_node_lends_nothing(ray_session):
    cache = FrameCache("disk", 10**9, "test")
    lend_frames(cache)
    lend_frames(None)
    assert cache.common.others is None
