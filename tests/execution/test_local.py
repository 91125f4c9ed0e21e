"""Work in the driver's process leaves that process as it was. No Ray runs here."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from faults import FragileModule
from shards import NOTHING, shards_of
from threadpoolctl import ThreadpoolController

from cuvis_dist.archive import open_archive
from cuvis_dist.errors import CuvisDistError, DataError
from cuvis_dist.execution import local
from cuvis_dist.execution.local import LocalEngine, call_here
from cuvis_dist.execution.spread import Order, Row, UnreadableError, spread
from cuvis_dist.execution.worker import fetch_once, fetch_pipeline, forget_pipeline
from cuvis_dist.nodes.probing import random_states


class Drawing:
    """Draws random numbers, and says how many threads there are."""

    order, ordered = NOTHING, True

    def __init__(self):
        self.seen = []

    def __call__(self, shard):
        self.seen.append(torch.rand(2).tolist() + np.random.rand(2).tolist())
        return [Row(shard.ordinal, payload=(self.seen, torch.get_num_threads()))]


def test_threads_and_random_numbers_are_put_back():
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 2)
    try:
        before, function = random_states(), Drawing()
        with torch.inference_mode():
            rows = list(spread(shards_of(4), function, LocalEngine(cpus=1)))
        assert random_states() == before
        assert torch.get_num_threads() == threads + 2
    finally:
        torch.set_num_threads(threads)
    assert [row.payload[1] for row in rows] == [1] * 4
    assert [len(row.payload[0]) for row in rows] == [1, 2, 3, 4], "rows share what they hold"
    drawn = rows[-1].payload[0]
    assert len({tuple(numbers) for numbers in drawn}) == 4, "every shard drew the same"
    assert function.seen == []


def test_an_order_has_copies_and_one_for_all_shards(tmp_path):
    pipeline, archive = CuvisPipeline("mine"), open_archive(FragileModule(tmp_path), "train")
    with LocalEngine(cpus=1) as engine:
        order = engine.make_order(pipeline, archive)
        _, first = order.open()
        assert first is not pipeline
        assert copy.deepcopy(order).open() == order.open()
        forget_pipeline()
        assert fetch_pipeline(order.pipeline) is not first
        files = engine.keep(["a", "b"])
        assert fetch_once(files) == ["a", "b"]
        assert fetch_once(files) is fetch_once(files)
    assert fetch_once(["plain"]) == ["plain"]


def test_an_interruption_comes_through_between_two_shards():
    rows = LocalEngine(cpus=1).rows(shards_of(3), Drawing())
    threads = torch.get_num_threads()
    assert next(rows).ordinal == 0
    with pytest.raises(KeyboardInterrupt):
        rows.throw(KeyboardInterrupt())
    assert torch.get_num_threads() == threads


def test_libraries_with_threads_are_looked_for_once_until_modules_come(monkeypatch):
    """It takes milliseconds, as much as a small frame."""
    looked = []

    class Controller(ThreadpoolController):
        def __init__(self):
            looked.append(self)
            super().__init__()

    monkeypatch.setattr(local, "ThreadpoolController", Controller)
    local._libraries.cache_clear()
    for _ in range(3):
        with local.as_worker(1):
            pass
    assert len(looked) == 1
    monkeypatch.setitem(sys.modules, "one_more", ModuleType("one_more"))
    with local.as_worker(1):
        pass
    assert len(looked) == 2


def _append(items, value, emit):
    items.append(value)
    emit(len(items))
    if value is None:
        raise DataError("nothing to append")
    return items


def test_a_function_is_called_on_copies(warnings):
    items, events = [1], []
    assert call_here(_append, items, 2, emit=events.append, threads=1) == [1, 2]
    assert (items, events) == ([1], [2])
    with pytest.raises(DataError, match=r"^nothing to append$"):
        call_here(_append, items, None, emit=events.append, threads=1)
    with pytest.raises(CuvisDistError, match=r"append failed: .*'int'.* has no attribute 'append'"):
        call_here(_append, 7, 2, emit=events.append, threads=1)

    def sink(event):
        raise ValueError("the sink is full")

    assert call_here(_append, items, 3, emit=sink, threads=1) == [1, 3]
    assert warnings == ["an event could not be delivered: the sink is full"]


def test_what_hangs_here_is_tried_elsewhere():
    order = Order(None, None, threads=1, skip=True, on_gpu=False, elsewhere=True)
    hung = DataError("cannot read frame a")
    hung.__cause__ = TimeoutError("it was not there after 300 s")
    with pytest.raises(UnreadableError):
        order.leave_out(hung)
    replace(order, elsewhere=False).leave_out(hung)
