"""What of phase 1 is kept, so that another driver goes on in the middle of a pass?

One small file per pass in ``<output_dir>/resume/passes``: what is merged so far, and which shards
are in it. It is replaced as a whole every few seconds, at the end of the pass, and when the run is
interrupted. A driver that goes on makes the same plan again, takes from the files what was
measured, and reads what is missing.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any

from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from loguru import logger
from ray import cloudpickle

from cuvis_dist.archive import Archive
from cuvis_dist.errors import CuvisDistError, one_line
from cuvis_dist.hashing import hash_settings
from cuvis_dist.initialization.plan import Pass
from cuvis_dist.nodes.state import hash_state
from cuvis_dist.nodes.upstream import nodes_before
from cuvis_dist.scaling import Scaling
from cuvis_dist.storage import OutputFolder

#: Folder in the output folder.
PASSES = "resume/passes"
_DIGEST_BYTES = 32
#: A write that took t seconds is followed by none for this many times t: at most 5 % of a run.
_PAUSE = 20


class StoredPass:
    """The file of one pass, read when it is opened.

    Parameters
    ----------
    output : OutputFolder
        The output folder of the run.
    number : int
        The pass's number in its run, from 1.
    identity : str
        From :func:`identify`. A file of another pass is ignored, with a warning.
    every : float
        Seconds between two writes, at least.

    Attributes
    ----------
    earlier : object or None
        What an earlier run left.
    """

    def __init__(self, output: OutputFolder, number: int, identity: str, every: float) -> None:
        self.output, self.name = output, f"{PASSES}/{number}.pkl"
        self.number, self.identity, self.every = number, identity, every
        self.earlier: Any = self._load()
        self._next = time.monotonic() + every

    def _load(self) -> Any:
        try:
            data = self.output.read(self.name)
        except FileNotFoundError:
            return None
        except (OSError, CuvisDistError) as error:
            return self._ignored(one_line(error))
        digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            return self._ignored("it is damaged")
        try:
            identity, state = cloudpickle.loads(content)
        except Exception as error:  # a class that has moved since
            return self._ignored(one_line(error))
        if identity != self.identity:
            return self._ignored("it belongs to another pipeline, archive or setting")
        return state

    def _ignored(self, why: str) -> None:
        logger.warning(
            f"pass {self.number} is measured anew: {self.output.at(self.name)} is not used: {why}"
        )

    def save(self, state: Any) -> None:
        """Replace the file. A folder that cannot be written to is a warning: the run goes on."""
        started = time.monotonic()
        content = cloudpickle.dumps((self.identity, state))
        try:
            self.output.write(self.name, hashlib.sha256(content).digest() + content)
        except (OSError, CuvisDistError) as error:
            logger.warning(
                f"what pass {self.number} has measured is not kept for another try: "
                f"{self.output.at(self.name)} cannot be written: {one_line(error)}"
            )
        ended = time.monotonic()
        self._next = ended + max(self.every, _PAUSE * (ended - started))

    def save_if_due(self, state: Any) -> None:
        """:meth:`save`, unless the last one was a moment ago."""
        if time.monotonic() >= self._next:
            self.save(state)


def identify(pipeline: CuvisPipeline, archive: Archive, this_pass: Pass, scaling: Scaling) -> str:
    """Return a SHA-256 of what the partials of a pass depend on.

    The frames, the settings that say how they are cut and what counts, what is measured, and the
    state of the nodes before: one with random weights and no seed has others in the next run.
    """
    measured = {measurement.node for measurement in this_pass.measurements}
    before = nodes_before(pipeline, measured)
    if this_pass.streamed is not None:  # what is kept of it is the fitted node
        before = {this_pass.streamed, *nodes_before(pipeline, [this_pass.streamed])}
    nodes = sorted(before | measured, key=lambda node: node.name)
    return hash_settings(
        {
            "pass": str(this_pass),
            "settings": scaling.measuring.model_dump(mode="json"),
            "frames": [frame.uid for frame in archive.frames],
            "batches": archive.batch_size if this_pass.streamed is not None else None,
            "nodes": [
                (node.name, type(node).__qualname__, getattr(node, "hparams", None))
                for node in nodes
            ],
            "state": hash_state(node for node in nodes if node in before),
        }
    )
