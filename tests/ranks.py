"""How do tests run a function on several ranks? In plain processes with gloo, and no Ray.

The processes are started once, import what tests need once, and serve any number of ranks up to
four: each number has a process group of its own.
"""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

MOST = 4


class Ranks:
    """Processes that form groups of 1 to 4 ranks."""

    def __init__(self, *preload: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(preload))
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        store = str(Path(self._folder.name) / "store")
        self._pipes, self._processes = [], []
        for rank in range(MOST):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what ``function(rank, world_size, group, *args)`` returns on each rank."""
        pipes = self._pipes[:world_size]
        for pipe in pipes:
            pipe.send_bytes(pickle.dumps((world_size, function, args)))
        answers = [
            pickle.loads(pipe.recv_bytes()) if pipe.poll(120) else (None, "no answer")
            for pipe in pipes
        ]
        problems = [problem for _, problem in answers if problem]
        if problems:
            raise RuntimeError("\n".join(problems))
        return [result for result, _ in answers]

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps(None))
        for process in self._processes:
            process.join(20)
            process.kill()
        self._folder.cleanup()


def _serve(rank: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, MOST), rank=rank, world_size=MOST)
    groups = {size: dist.new_group(list(range(size))) for size in range(1, MOST + 1)}
    while (asked := pickle.loads(pipe.recv_bytes())) is not None:
        world_size, function, args = asked
        try:
            answer = pickle.dumps((function(rank, world_size, groups[world_size], *args), None))
        except Exception:
            answer = pickle.dumps((None, f"rank {rank}: {traceback.format_exc()}"))
        pipe.send_bytes(answer)
    dist.destroy_process_group()
