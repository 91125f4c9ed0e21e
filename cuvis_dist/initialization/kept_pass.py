"""What of phase 1 is kept, so that another driver goes on in the middle of a pass?

One small file per pass in ``<output_dir>/resume/passes``: what is merged so far, and which shards
are in it. It is replaced as a whole every few seconds, at the end of the pass, and when the run is
interrupted. Pixels that it keeps for later levels come into files beside it, each written once.
A driver that goes on makes the same plan again, takes from the files what was
measured, and reads what is missing. Since a pass keeps what is merged and not what each frame gave,
a file of frames that has changed costs what the passes have measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from loguru import logger

from cuvis_dist.archive import Archive, Contents, in_words, read_contents, write_contents
from cuvis_dist.errors import CuvisDistError, one_line
from cuvis_dist.hashing import hash_settings
from cuvis_dist.initialization.drawing import Frontier
from cuvis_dist.initialization.plan import Pass
from cuvis_dist.nodes.state import hash_state
from cuvis_dist.nodes.upstream import nodes_before
from cuvis_dist.pace import Pace
from cuvis_dist.plain import NotPlainError, from_bytes, to_bytes
from cuvis_dist.scaling import Scaling
from cuvis_dist.storage import OutputFolder

#: Folder in the output folder.
PASSES = "resume/passes"
#: In it: the files that the passes read, as they were.
_FILES = f"{PASSES}/files.json"

T = TypeVar("T")


def renew(output: OutputFolder, contents: Contents) -> None:
    """Remove the passes of an earlier run if the files that they read are others by now.

    Parameters
    ----------
    output : OutputFolder
        The output folder of the run.
    contents : Contents
        The files that this run's passes will read.
    """
    try:
        earlier = read_contents(output.read(_FILES)).get("train", Contents({}))
    except (OSError, CuvisDistError):
        earlier = Contents({})
    changed = contents.changed_since(earlier)
    if changed and any(name != _FILES for name in output.names(PASSES)):
        logger.warning(f"all passes are measured anew: {in_words(changed)}")
    if changed:
        output.remove_folder(PASSES)
    output.write(_FILES, write_contents({"train": contents.with_checksums_of(earlier)}))


class KeptPass:
    """The file of one pass, read when it is opened. It holds plain values and no code.

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
    earlier : dict or None
        The state that an earlier run left, with ``done``: how many frames it has dealt with.
    files : int
        How many files there are beside the state, which only ever come on top.
    """

    def __init__(self, output: OutputFolder, number: int, identity: str, every: float) -> None:
        self.output, self.name = output, f"{PASSES}/{number}.state"
        self.number, self.identity = number, identity
        self.earlier: dict[str, Any] | None = self._load()
        self._pace = Pace(every)
        self.files = 0

    def _load(self) -> dict[str, Any] | None:
        try:
            return self._content(from_bytes(self.output.read(self.name)))
        except FileNotFoundError:
            return None
        except NotPlainError as error:
            self._ignored(str(error))
        except (OSError, CuvisDistError) as error:
            self._ignored(one_line(error))
        return None

    def _content(self, written: Any) -> dict[str, Any]:
        if not isinstance(written, dict) or written.get("identity") != self.identity:
            raise NotPlainError("it belongs to another pipeline, archive or setting")
        state = written.get("state")
        if not isinstance(state, dict) or not isinstance(state.get("done"), int):
            raise NotPlainError("it is not what was written")
        return state

    def taken(self, take: Callable[[dict[str, Any]], T]) -> T | None:
        """Return what ``take`` makes of the earlier state; None where it cannot."""
        if self.earlier is None:
            return None
        try:
            return take(self.earlier)
        except Exception as error:
            self._ignored(f"it is not what was written: {one_line(error)}")
            self.files = 0
            return None

    def _ignored(self, why: str) -> None:
        """Say that the file is not used, and why."""
        logger.warning(
            f"pass {self.number} is measured anew: {self.output.at(self.name)} is not used: {why}"
        )

    def append(self, content: Any) -> bool:
        """Write what need not be written again to a file of its own; return whether it could be.

        It counts from the next :meth:`save` of a state that says how many files there are.
        """
        if self._write(self._file(self.files), {"identity": self.identity, "content": content}):
            self.files += 1
            return True
        return False

    def appended(self, files: int) -> list[Any]:
        """Return the contents of the first files, and go on behind them.

        Raises
        ------
        NotPlainError, OSError, CuvisDistError
            If they cannot be read, or belong to another pass.
        """
        contents = []
        for number in range(files):
            written = from_bytes(self.output.read(self._file(number)))
            if written["identity"] != self.identity:
                raise NotPlainError("a file beside it belongs to another pass")
            contents.append(written["content"])
        self.files = files
        return contents

    def _file(self, number: int) -> str:
        return f"{PASSES}/{self.number}.{number}.pixels"

    def _write(self, name: str, value: Any) -> bool:
        try:
            self.output.write(name, to_bytes(value))
        except (OSError, CuvisDistError) as error:
            logger.warning(
                f"what pass {self.number} has measured is not kept for another try: "
                f"{self.output.at(name)} cannot be written: {one_line(error)}"
            )
            return False
        return True

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file. A folder that cannot be written to is a warning: the run goes on."""
        with self._pace.writing():
            self._write(self.name, {"identity": self.identity, "state": state})

    def save_if_due(self, state: Callable[[], dict[str, Any]]) -> None:
        """:meth:`save` what ``state`` returns, unless the last one was a moment ago."""
        if self._pace.due:
            self.save(state())


def identify(pipeline: CuvisPipeline, archive: Archive, this_pass: Pass, scaling: Scaling) -> str:
    """Return a SHA-256 of what the partials of a pass depend on.

    The frames, the settings that say how they are cut and what counts, what is measured, and the
    state of the nodes before: one with random weights and no seed has others in the next run.
    """
    measured = {measurement.node for measurement in this_pass.measurements}
    before = nodes_before(pipeline, measured) | Frontier(pipeline, this_pass).known
    if this_pass.streamed is not None:  # what is kept of it is the fitted node
        before = {this_pass.streamed, *nodes_before(pipeline, [this_pass.streamed])}
    nodes = sorted(before | measured, key=lambda node: node.name)
    return hash_settings(
        {
            "pass": str(this_pass),
            "inside": this_pass.inside and this_pass.inside.described(),
            "settings": scaling.measuring.model_dump(mode="json", exclude={"store"}),
            "frames": [frame.uid for frame in archive.frames],
            "batches": archive.batch_size if this_pass.streamed is not None else None,
            "nodes": [
                (node.name, type(node).__qualname__, getattr(node, "hparams", None))
                for node in nodes
            ],
            "state": hash_state(node for node in nodes if node in before),
        }
    )
