"""Every shard's rows come back once, in order where that is wanted, whatever happens to workers."""

from __future__ import annotations

from collections import deque

import pytest
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from faults import FragileModule
from shards import WRONG, Dying, Failing, Frames, shards_of

from cuvis_dist.archive import FrameCache, open_archive
from cuvis_dist.errors import CuvisDistError, InputError, LostWorkerError
from cuvis_dist.execution.engine import _CachedFrames
from cuvis_dist.execution.failures import raise_cause
from cuvis_dist.execution.pool import Workers
from cuvis_dist.execution.spread import Engine, Order, Row, compute_shard, spread
from cuvis_dist.execution.where import engine_for
from cuvis_dist.initialization.shards import GatherShard

pytestmark = pytest.mark.usefixtures("ray_session")


def engine(most: int | None = 2, failures: int = 3) -> Engine:
    """Return an engine with so many workers; 0 computes in this process."""
    return engine_for(Workers(cpus=1, gpus=0, most=most, failures=failures))


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("most", [0, 1, 2, None])
@pytest.mark.parametrize("staged", [None, "s3://bucket/recording.cu3s"])
def test_every_row_comes_once(ordered, most, staged):
    rows = list(spread(shards_of(17, staged), Frames(ordered), engine(most)))
    got = [row.payload for row in rows]
    expected = [(ordinal, half) for ordinal in range(17) for half in (0, 1)]
    assert (got if ordered else sorted(got)) == expected
    assert all(bool(row.node) == (most != 0) for row in rows)
    assert all(row.peak and not row.again for row in rows)


@pytest.mark.parametrize("most", [0, 2])
def test_who_stops_listening_gets_every_row_the_next_time(most):
    """Tasks that nobody waits for any more disturb no later ones."""
    one = engine(most)
    for listened in range(12):
        rows = spread(shards_of(12), Frames(ordered=False, seconds=0.002), one)
        for _ in range(listened):
            next(rows)
        rows.close()
        assert len(list(spread(shards_of(12), Frames(True, 0.002), one))) == 24


@pytest.mark.parametrize("most", [0, 2])
@pytest.mark.parametrize(
    ("error", "raised", "text"),
    [
        (WRONG, InputError, r"^it cannot be so$"),
        (KeyError("mine"), CuvisDistError, r"^a worker failed: KeyError: 'mine'$"),
    ],
)
def test_an_error_ends_the_rows_and_takes_back_those_of_its_shard(error, raised, text, most):
    rows = spread(shards_of(5), Failing(error, at=3), engine(most))
    assert [next(rows).ordinal for _ in range(3)] == [0, 1, 2]
    with pytest.raises(raised, match=text):
        next(rows)


@pytest.mark.parametrize("failures", [1, 2])
def test_a_worker_may_be_lost_as_often_as_the_setting_says(tmp_path, failures):
    dying = Dying(tmp_path, times=failures)
    rows = list(spread(shards_of(3), dying, engine(failures=failures)))
    assert sorted(row.ordinal for row in rows) == [0, 1, 2]
    assert {row.ordinal for row in rows if row.again} >= {1}


@pytest.mark.parametrize("failures", [0, 1])
def test_and_no_more_often(tmp_path, failures):
    dying = Dying(tmp_path, times=failures + 1)
    with pytest.raises(LostWorkerError) as raised, raise_cause("the test"):
        list(spread(shards_of(3), dying, engine(failures=failures)))
    assert str(raised.value) == (
        "the test lost a worker, which was killed, crashed, or ran out of memory: then give it "
        "more, or run fewer workers per machine"
    )
    assert len(list(tmp_path.iterdir())) == failures + 1


def test_who_notices_a_lost_worker_by_its_connection_says_so():
    said = "... (Output truncated) ... c10d_logger.py, line 83\nConnection closed by peer [::1]:80"
    with pytest.raises(LostWorkerError) as raised, raise_cause("training"):
        raise RuntimeError(said)
    assert str(raised.value) == "training lost a worker: its connection to the others broke off"


@pytest.mark.parametrize("most", [0, 2])
def test_a_function_needs_no_engine(tmp_path, most):
    """Given the archive itself it computes the same rows in this process."""
    pipeline, archive = CuvisPipeline("empty"), open_archive(FragileModule(tmp_path), "train")
    one = engine(most)
    there = list(
        spread(archive.shards(5), GatherShard(one.make_order(pipeline, archive), None), one)
    )
    order = Order(archive, pipeline, threads=1, skip=False, on_gpu=False, elsewhere=False)
    function = GatherShard(order, None)
    here = [row for shard in archive.shards(5) for row in compute_shard(function, shard)]
    assert [row.ordinal for row in here] == [row.ordinal for row in there]
    for mine, other in zip(here, there, strict=True):
        (name, batch), (their_name, their_batch) = mine.payload, other.payload
        assert name == their_name
        assert batch["cube"].equal(their_batch["cube"])


def test_a_bundle_goes_to_the_node_that_keeps_its_frames():
    """Next comes one for the node with the least to do; in order, whatever is next."""
    bundles = [[shard] for shard in shards_of(6)]
    cache = FrameCache("disk", 10**9, "run", "train")
    cached = _CachedFrames(cache, bundles)
    for number, node in enumerate("aaabb"):
        cached.note(number, [Row(number, node=node)])
    assert [cached.node(number) for number in range(6)] == [*"aaabb", None]
    assert _CachedFrames(cache.of("val"), bundles).node(0) is None
    assert cache.of("train").decoded() == dict(enumerate("aaabb"))
    waiting = deque(range(6))
    assert cached.take(waiting, [], ordered=False) == 0
    assert cached.take(waiting, [0], ordered=False) == 3
    assert cached.take(waiting, [0, 3], ordered=False) == 5
    assert cached.take(waiting, [0, 0], ordered=True) == 1
    assert list(waiting) == [2, 4]
    assert _CachedFrames(None, bundles).take(waiting, [2], ordered=False) == 2
