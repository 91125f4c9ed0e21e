"""Functions of shards that need no pipeline, in a module that workers can import.

    python tests/shards.py ADDRESS

spreads :class:`Lacking` over a cluster and prints what came back as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from cuvis_dist.archive import Shard
from cuvis_dist.errors import DataError, InputError
from cuvis_dist.execution.engine import RayEngine
from cuvis_dist.execution.pool import Workers
from cuvis_dist.execution.session import connect
from cuvis_dist.execution.spread import Order, Row, spread
from cuvis_dist.scaling import Scaling

NOTHING = Order(None, None, threads=1, skip=False, on_gpu=False, elsewhere=False)


def shards_of(number: int, staged: str | None = None) -> list[Shard]:
    """Return so many shards of one frame."""
    return [Shard(i, i, i + 1, staged) for i in range(number)]


class Frames:
    """Two rows a shard, after a moment that is longer for even ones."""

    order = NOTHING

    def __init__(self, ordered: bool, seconds: float = 0.01) -> None:
        self.ordered, self.seconds = ordered, seconds

    def __call__(self, shard: Shard) -> list[Row]:
        time.sleep(self.seconds * (1 - shard.ordinal % 2))
        return [Row(shard.ordinal, payload=(shard.start, half), frames=1) for half in (0, 1)]


class Failing:
    """Yields a row, and raises at one shard."""

    order, ordered = NOTHING, True

    def __init__(self, error: Exception, at: int) -> None:
        self.error, self.at = error, at

    def __call__(self, shard: Shard):
        yield Row(shard.ordinal, frames=1)
        if shard.ordinal == self.at:
            raise self.error


class Dying:
    """Kills its process the first few times that shard 1 is computed."""

    order, ordered = NOTHING, False

    def __init__(self, folder: Path, times: int) -> None:
        self.folder, self.times = folder, times

    def __call__(self, shard: Shard) -> list[Row]:
        if shard.ordinal == 1:
            number = len(list(self.folder.iterdir()))
            if number < self.times:
                (self.folder / str(number)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return [Row(shard.ordinal, frames=1)]


WRONG = InputError("it cannot be so")


class Lacking:
    """Yields a row, and then another unless the environment of its node lists the shard."""

    ordered = True

    def __init__(self, order: Order) -> None:
        self.order = order

    def __call__(self, shard: Shard):
        yield Row(shard.ordinal, payload="first", frames=1)
        try:
            if str(shard.ordinal) in os.environ.get("CUVIS_DIST_ABSENT", "").split(","):
                raise DataError(f"cannot read {shard.ordinal}") from FileNotFoundError()
        except DataError as error:
            self.order.leave_out(error)
            yield Row(shard.ordinal, skipped=((str(shard.ordinal), str(error)),))
        else:
            yield Row(shard.ordinal, payload="second", frames=1)


def main(address: str) -> None:
    """Spread over 8 shards, leaving frames out, then over one more without."""
    connect(Scaling(resources={"address": address}))
    engine = RayEngine(Workers(cpus=1, gpus=0, most=None, failures=3))
    order = replace(NOTHING, elsewhere=True)
    rows = list(spread(shards_of(8), Lacking(replace(order, skip=True)), engine))
    got = [[row.ordinal, row.payload, row.skipped, row.again] for row in rows]
    try:
        list(spread(shards_of(8)[7:], Lacking(order), engine))
        error = ""
    except DataError as raised:
        error = str(raised)
    print(json.dumps({"rows": got, "error": error}))


if __name__ == "__main__":
    main(*sys.argv[1:])
