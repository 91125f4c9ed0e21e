"""A fit goes on where its store fails, with the bits of one that reads, and says so. No Ray."""

from __future__ import annotations

import os
import resource
import shutil
from collections import Counter
from contextlib import contextmanager

import pytest
from cuvis_ai_core.training.post_fit import TrainHook
from fits import Fits
from stores import s3_server

from cuvis_dist.errors import CuvisDistError
from cuvis_dist.storage import remote

#: Frames that are measured before the store fails.
HALF = 5


@pytest.fixture
def fits(demo, tmp_path):
    return Fits(demo, tmp_path)


def when_half_is_done(action, robust=False):
    """Return what is to be called with events: it carries out an action once.

    Before a ``robust`` fit, every frame is in the store.
    """
    left = [action]

    def emit(event):
        half = event.hook is TrainHook.STATISTICAL_PROGRESS and event.progress.done >= HALF
        if left and (half or (robust and event.hook is TrainHook.STATISTICAL_NODE_START)):
            left.pop()()

    return emit


def readings_of_first_pass(fits):
    """How often the first pass has read each frame."""
    every = Counter(map(int, fits.every))
    return Counter({n: count - fits.later for n, count in every.items()})


def lose(store):
    """Put a file where the store's folder was."""
    shutil.rmtree(store)
    store.write_text("not a folder")


def test_a_store_that_is_gone_costs_what_it_had(fits, tmp_path, warnings):
    read, store = fits(), tmp_path / "store"
    losing = when_half_is_done(lambda: lose(store))
    assert fits(store=str(store), emit=losing, once=False) == read
    assert any("the work goes on" in said and str(store) in said for said in warnings)
    assert fits.first.from_store == 0
    assert {*readings_of_first_pass(fits).values()} <= {1, 2}


@contextmanager
def full_disk():
    """No file of this process can have more than 2000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_runs_full_costs_nothing(fits, tmp_path, warnings):
    read, store = fits(), tmp_path / "store"
    with full_disk() as fill:
        assert fits(store=str(store), emit=when_half_is_done(fill)) == read
    assert {*readings_of_first_pass(fits).values()} == {1}
    assert len([said for said in warnings if "cannot be written to" in said]) == 1
    assert fits(store=str(store)) == read  # what was written before is sound
    assert 0 < fits.first.from_store < fits.first.frames


def test_a_store_that_can_only_be_read_serves_what_it_has(fits, tmp_path, warnings):
    read, store = fits(), tmp_path / "store"
    fits(store=str(store), sample_frames=4)
    before = sorted(store.rglob("*.parquet"))
    blocked = store / f".probe-{os.getpid()}"  # where a folder lies, no file can be written
    (blocked / "x").mkdir(parents=True)
    assert fits(store=str(store)) == read
    assert fits.first.from_store == 4
    assert sorted(store.rglob("*.parquet")) == before
    assert any("cannot be written to" in said for said in warnings)


def test_a_store_that_was_never_there_is_an_error_before_anything_is_read(fits, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CuvisDistError, match="file"):
        fits(store=str(tmp_path / "file" / "store"))
    assert fits.every == []


@pytest.mark.parametrize("settings", [pytest.param({}, marks=pytest.mark.slow), {"robust": 0.75}])
def test_a_bucket_that_does_not_answer_any_more_costs_what_it_had(
    fits, tmp_path, monkeypatch, warnings, settings
):
    monkeypatch.setattr(remote, "RETRY_S", ())
    read = fits(store=str(tmp_path / "store"), once=False, **settings)
    server = s3_server()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.__enter__()["AWS_ENDPOINT_URL"])
    stop = when_half_is_done(lambda: server.__exit__(None, None, None), robust=bool(settings))
    assert fits(store="s3://bucket/fits", emit=stop, once=False, **settings) == read
    assert any("cannot be" in said and "the work goes on" in said for said in warnings)
