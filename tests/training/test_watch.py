"""Who is stuck? Decided from beats alone: no processes, a clock of our own."""

from __future__ import annotations

import pytest

from cuvis_dist.training.heartbeat import Heartbeat, _used
from cuvis_dist.training.watch import COMPUTING, READING, STARTING, STORING, Beat, Watch

WAITING = "[Strategy]RayDDPStrategy.backward"


def verdict(*histories, until=100, stall=10.0):
    """Play what each rank does as a function of the second, and ask each second."""
    watch = Watch(stall)
    watch.begin("", len(histories))
    for now in range(until):
        for rank, history in enumerate(histories):
            if said := watch.beat(Beat(rank, *history(now)), now):
                return said
    return watch.verdict(until)


def still(doing, steps=4):
    return lambda now: (doing, steps, 0.01 * now, 100 * now)


def busy(doing, cpu=0.0, moved=0):
    return lambda now: (doing, 4, cpu * now, moved * now)


def test_a_reader_that_does_nothing_is_named_and_not_those_that_wait_for_it():
    said = verdict(still(WAITING, 5), still(READING), still(WAITING, 5))
    assert said.startswith("stuck for 10 s")
    culprits, others = said.split("(meanwhile: ")
    assert "rank 1 reading frames after 4 training steps" in culprits
    assert "rank 0" not in culprits
    assert "rank 0" in others
    assert "rank 2" in others


def test_a_reader_is_named_though_others_wait_busily():
    """A rank that waits for NCCL spins."""
    assert "rank 1 reading" in verdict(busy(WAITING, cpu=1.0), still(READING))


@pytest.mark.parametrize("work", [{"cpu": 0.9}, {"moved": 10_000_000}])
@pytest.mark.parametrize("doing", [READING, COMPUTING])
def test_slow_work_is_not_stuck(doing, work):
    assert verdict(still(WAITING), busy(doing, **work)) is None


@pytest.mark.parametrize("doing", [STORING, STARTING])
def test_what_takes_as_long_as_it_takes_is_waited_for(doing):
    assert verdict(still(doing), still(WAITING, 5)) is None
    assert verdict(still(doing)) is None


def test_a_node_that_waits_is_named():
    assert "rank 0 computing a step" in verdict(still(COMPUTING), still(WAITING, 5))


def test_ranks_that_wait_for_each_other_with_unequal_steps():
    said = verdict(still(WAITING, 5), still("[Strategy]RayDDPStrategy.barrier", 4))
    assert "rank 1 [Strategy]RayDDPStrategy.barrier after 4 training steps" in said.split("(")[0]


def test_a_rank_that_waits_is_not_stuck_while_another_works():
    assert (
        verdict(still(WAITING), busy("[Callback]ModelCheckpoint.on_validation_end", cpu=1)) is None
    )


def test_a_silent_rank_is_stuck():
    """Nothing in its process runs any more, not even the thread that sends."""
    watch = Watch(10)
    watch.begin("", 2)
    watch.beat(Beat(1, READING, 4, 0.0, 0), 0)
    said = [watch.beat(Beat(0, WAITING, 5, 0.0, 0), now) for now in range(20)]
    assert said[9] is None
    assert "rank 1 reading" in said[-1]


def test_ranks_that_have_ended_are_not_stuck():
    assert verdict(still(""), still("")) is None
    assert verdict(still(""), busy(READING, cpu=1.0)) is None


def test_what_a_process_uses_is_seen(tmp_path):
    before = _used()
    (tmp_path / "file").write_bytes(bytes(3_000_000))
    (tmp_path / "file").read_bytes()
    sum(i * i for i in range(3_000_000))
    after = _used()
    assert after[0] > before[0]
    assert after[1] - before[1] >= 6_000_000


def test_nobody_is_stuck_before_there_is_anybody():
    assert Watch(10).verdict(100) is None


def test_another_group_of_workers_starts_anew():
    watch = Watch(10)
    for group, size in (("first", 3), ("first", 3), ("second", 2), ("second", 2)):
        watch.begin(group, size)
        assert watch.beat(Beat(0, WAITING, 4, 0.0, 0, group), 0) is None
    assert watch.sizes() == [3, 2]
    assert watch.beat(Beat(2, READING, 4, 0.0, 0, "first"), 1) is None  # its last word
    said = [watch.beat(Beat(1, READING, 1, now, 0, "second"), now) for now in range(2, 20)]
    assert said[-1] is None, "rank 0 waits for rank 1, which reads"


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_rank_on_a_gpu_that_waits_for_others_spins(on_gpu):
    heartbeat = Heartbeat(None, 0, "", 10, on_gpu)
    heartbeat.start(WAITING)
    assert (heartbeat.beat().cpu_seconds == 0) is on_gpu
    with heartbeat.doing(COMPUTING):
        assert heartbeat.beat().cpu_seconds > 0
