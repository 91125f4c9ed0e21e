"""How do a worker's events reach the driver as they happen?

Through an actor that passes them on unopened: it imports nothing but Ray, so that it is up in a
moment.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from loguru import logger
from ray import cloudpickle

from cuvis_dist.execution.session import beside_driver


class _Mailbox:
    """Keeps events until the driver takes them, in the order each worker sent them."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[bytes] = asyncio.Queue()

    async def put(self, event: bytes) -> None:
        await self._events.put(event)

    async def take(self) -> list[bytes]:
        events = [await self._events.get()]
        while not self._events.empty():
            events.append(self._events.get_nowait())
        return events


_END = b""


class RemoteEmit:
    """An ``emit`` that a worker can call."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def __call__(self, event: Any) -> None:
        """Send one event; returns when the mailbox has it."""
        ray.get(self._mailbox.put.remote(cloudpickle.dumps(event)))


@contextmanager
def relayed(emit: Callable[[Any], None]) -> Iterator[RemoteEmit]:
    """Give workers an ``emit`` whose events reach the driver's, in a thread of its own."""
    options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": beside_driver()}
    mailbox: Any = ray.remote(**options)(_Mailbox).remote()

    def deliver() -> None:
        while True:
            try:
                events = ray.get(mailbox.take.remote())
            except Exception as error:
                logger.warning(f"the events of the workers no longer arrive: {error}")
                return
            for event in events:
                if event == _END:
                    return
                try:
                    emit(cloudpickle.loads(event))
                except Exception as error:  # a sink that fails must not stop the run
                    logger.warning(f"an event could not be delivered: {error}")

    thread = threading.Thread(target=deliver, name="cuvis-dist-events", daemon=True)
    thread.start()
    try:
        yield RemoteEmit(mailbox)
    finally:
        try:
            ray.get(mailbox.put.remote(_END))
            thread.join()
            ray.kill(mailbox)
        except ray.exceptions.RayError as error:  # the run's own error matters more
            logger.debug(f"the event mailbox was lost: {error}")
