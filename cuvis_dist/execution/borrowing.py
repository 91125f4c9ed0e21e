"""How does a process get a frame that another node keeps, instead of decoding it again?

An actor on each node hands over files (:mod:`cuvis_dist.lending`), and one beside the driver knows
which node keeps which. Nobody depends on an answer: who gets none decodes the frame.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from loguru import logger
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cuvis_dist.archive import FrameCache, Reader
from cuvis_dist.errors import one_line
from cuvis_dist.lending import Books, Lender

#: How many seconds an actor has to answer, the way of a large frame through the network included.
_ANSWERS = 10.0
#: How many seconds one that did not is not asked again by the same process.
_LEFT_ALONE = 60.0
#: How many files a node reads at a time for others.
_AT_A_TIME = 4

#: In the driver: the actors that it has started, by name. They end with these handles.
_started: dict[str, Any] = {}


def lend_frames(cache: FrameCache | None) -> None:
    """Have nodes lend each other the frames of a cache, where several nodes compute.

    To be called in the driver before it hands out work: a node may have joined, and an actor that
    was killed is replaced.
    """
    if cache is None or not ray.is_initialized():
        return
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if sum(node["Resources"].get("CPU", 0) > 0 for node in nodes) < 2:
        return
    context = ray.get_runtime_context()
    others = OtherNodes(context.get_job_id(), context.get_node_id())
    _start(others.books, Books, others.driver)
    for node in nodes:
        _start(others.lender(node["NodeID"]), Lender, node["NodeID"], _AT_A_TIME)
    cache.common.others = others
    others.tell([path.name for path in cache.folder.glob("*.frame")], cache.folder)


def _start(name: str, kind: type, node: str, at_a_time: int = 1) -> None:
    """Start an actor on a node, unless it is there."""
    with suppress(ValueError):
        ray.get_actor(name)
        return
    options: dict[str, Any] = {
        "name": name,
        "num_cpus": 0,
        "max_concurrency": at_a_time,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
    }
    _started[name] = ray.remote(**options)(kind).remote()


@dataclass(frozen=True)
class OtherNodes:
    """How processes of a run reach the actors, by their names: it can be pickled anywhere.

    In a process that Ray has not started, such as those of a ``DataLoader``, it does nothing.

    Attributes
    ----------
    job : str
        The Ray job of the run.
    driver : str
        The id of the driver's node.
    """

    job: str
    driver: str

    @property
    def books(self) -> str:
        """The name of the actor that knows which node keeps which frame."""
        return f"cuvis-dist-books-{self.job}-{self.driver}"

    def lender(self, node: str) -> str:
        """Return the name of the actor that hands over files of a node."""
        return f"cuvis-dist-lender-{self.job}-{node}"

    def tell(self, names: list[str], folder: Path) -> None:
        """Say that this node keeps frames, in files of these names in a folder."""
        if names and (asking := _asking()):
            asking.tell(self.books, names, _node(), str(folder))

    def get(self, name: str) -> memoryview | None:
        """Return the bytes of a frame's file that another node keeps, or None."""
        asking = _asking()
        return asking.reader.ask(lambda: self._get(asking, name)).result() if asking else None

    def _get(self, asking: _Asking, name: str) -> memoryview | None:
        for node, path in (asking.ask(self.books, "places", name) or {}).items():
            if node != _node():
                content = asking.ask(self.lender(node), "read", path)
                if content is not None:
                    return memoryview(content)
        return None


class _Asking:
    """What this process knows of the actors.

    Attributes
    ----------
    process : int
        Its id: a fork of it cannot use Ray.
    reader : Reader
        The thread that waits for answers. If the thread of a task did, Ray would give the task's
        CPU to another one meanwhile, and start a process for it.
    """

    def __init__(self) -> None:
        self.process, self.reader = os.getpid(), Reader()
        self._actors: dict[str, Any] = {}
        self._again: dict[str, float] = {}

    def ask(self, name: str, what: str, *args: Any) -> Any:
        """Return what an actor answers, or None; one that does not is then left alone a while."""
        try:
            return ray.get(getattr(self._actor(name), what).remote(*args), timeout=_ANSWERS)
        except (ray.exceptions.RayError, ValueError) as error:
            self._leave_alone(name, error)
            return None

    def tell(self, name: str, *args: Any) -> None:
        """Have an actor note something, without waiting for it."""
        try:
            self._actor(name).note.remote(*args)
        except (ray.exceptions.RayError, ValueError) as error:
            self._leave_alone(name, error)

    def _actor(self, name: str) -> Any:
        """Return an actor; raises ValueError if there is none, or it is left alone."""
        if time.monotonic() < self._again.get(name, 0):
            raise ValueError("it is left alone")
        if name not in self._actors:
            self._actors[name] = ray.get_actor(name)
        return self._actors[name]

    def _leave_alone(self, name: str, error: Exception) -> None:
        if time.monotonic() >= self._again.get(name, 0):
            logger.debug(f"{name} is not asked for {_LEFT_ALONE:g} s: {one_line(error)}")
            self._again[name] = time.monotonic() + _LEFT_ALONE
        self._actors.pop(name, None)


_here: list[_Asking] = []


def _asking() -> _Asking | None:
    """Return what this process asks with, or None if it cannot."""
    if not _here and ray.is_initialized():
        _here.append(_Asking())
    usable = _here and _here[0].process == os.getpid() and ray.is_initialized()
    return _here[0] if usable else None


def _node() -> str:
    return ray.get_runtime_context().get_node_id()
