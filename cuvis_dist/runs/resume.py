"""What of an earlier run in this output folder can be used again?

``<output_dir>/resume`` says what the steps of its run depended on
(:mod:`cuvis_dist.runs.dependences`), and which files were read. It holds the passes of phase 1 as
far as they got (:mod:`cuvis_dist.initialization.kept_pass`), the nodes as phase 1 left them and,
from :mod:`cuvis_dist.training.checkpoint`, the state of phase 2. A step is used again if all that
it depended on is the same, and so are the steps before it; what differs is named.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from loguru import logger

from cuvis_dist.archive import Contents, in_words, read_contents, write_contents
from cuvis_dist.errors import CuvisDistError
from cuvis_dist.initialization.kept_pass import PASSES
from cuvis_dist.initialization.place import ENDINGS
from cuvis_dist.plain import NotPlainError, from_bytes, to_bytes
from cuvis_dist.runs.dependences import PHASE_1, STEPS, TRAINING, Dependences
from cuvis_dist.runs.record import RunRecord
from cuvis_dist.storage import Location, OutputFolder
from cuvis_dist.training.checkpoint import LAST

#: The name, in the output folder, of what phase 1 left.
INITIALIZED = "resume/initialized.state"
_STATE = {"nodes", "begun", "unfitted", "passes", "skipped_frames", "left_out", "findings"}
_FINGERPRINT, _FILES = "resume/fingerprint.json", "resume/files.json"


class Resume:
    """The resume folder of a run: opened, it holds nothing that the run cannot use.

    Parameters
    ----------
    output_dir : path or URI
        The run's output folder.
    depends_on : Dependences
        What the steps of the run depend on.
    restart : bool
        Forget what an earlier run left, whatever it depended on.
    """

    def __init__(
        self, output_dir: Location, depends_on: Dependences, restart: bool = False
    ) -> None:
        self.output = OutputFolder(output_dir)
        self._same = False
        earlier = self._earlier()
        if earlier is None:
            self.output.remove_folder("resume")
        elif restart:
            logger.info(f"starting anew, as asked: what an earlier run left in {self.folder} goes")
            self.output.remove_folder("resume")
        else:
            depends_on = _with_phase_1_of(earlier, depends_on)
            self._keep(earlier, depends_on)
        self.depends_on = depends_on
        if self._same and earlier is not None:
            self._note_checksums(earlier)

    @property
    def folder(self) -> Location:
        """Where it lies."""
        return self.output.at("resume")

    def _earlier(self) -> Dependences | None:
        """Return what the earlier run depended on; None if there was none, or nobody knows."""
        try:
            content = self.output.read(_FINGERPRINT)
        except FileNotFoundError:
            return None
        except OSError:
            content = b""
        try:
            parts = json.loads(content)
            if not all(isinstance(parts[step], dict) for step in STEPS):
                raise ValueError
        except (ValueError, TypeError, KeyError):
            logger.warning(
                f"starting anew: {self.output.at(_FINGERPRINT)} does not say of which run it is"
            )
            return None
        try:
            files = read_contents(self.output.read(_FILES))
        except OSError:
            files = {}
        nothing = Contents({})
        return Dependences(parts, {step: files.get(step, nothing) for step in STEPS})

    def _keep(self, earlier: Dependences, now: Dependences) -> None:
        """Remove what depended on something that differs, and say what that is."""
        for step in STEPS:
            if why := self._differences(earlier, now, step):
                break
        else:
            self._same = True
            return
        unfinished = self._has_passes() or self.output.exists(LAST)
        if step == PHASE_1:
            self.output.remove_folder("resume")
        elif step == TRAINING:
            self.output.remove(LAST)
        kept = [
            name
            for name, there in (
                ("phase 1", self.output.exists(INITIALIZED) or self._has_passes()),
                ("the training", self.output.exists(LAST)),
            )
            if there
        ]
        # Nothing is lost where a job that is done is followed by another, as init by train.
        job = earlier.parts[TRAINING].get("job")
        lost = unfinished or job == now.parts[TRAINING].get("job")
        rest = f"{' and '.join(kept)} of it is used, the rest is done anew" if kept else ""
        logger.log("WARNING" if lost else "INFO", f"{rest or 'starting anew'}: {why}")

    def _note_checksums(self, earlier: Dependences) -> None:
        """Keep checksums that an earlier run did not ask for, to compare them the next time."""
        files = self.depends_on.files
        if new := sum(files[step].without_checksum_in(earlier.files[step]) for step in STEPS):
            logger.warning(
                f"checksums are noted for the next time: the earlier run has read none of {new} "
                "files that have the size and time of change that they had"
            )
            self.output.write(_FILES, write_contents(files))

    def _differences(self, earlier: Dependences, now: Dependences, step: str) -> str:
        """Return in what a step differs from that of the earlier run, as a sentence."""
        before, after = earlier.parts[step], now.parts[step]
        names = sorted(n for n in {**before, **after} if before.get(n) != after.get(n))
        if "job" in names or (names and not before):  # it left phase 1 out
            names = ["job"]
        if names:
            return f"an earlier run in {self.output} had another {', another '.join(names)}"
        changed = now.files[step].changed_since(earlier.files[step])
        return in_words(changed) if changed else ""

    def _has_passes(self) -> bool:
        return bool(self.output.names(PASSES))

    def finished(self) -> RunRecord | None:
        """Return the record of the same run, if it is done and its result is there."""
        if not self._same:
            return None
        try:
            record = RunRecord.load(self.output.location)
            saved = self.output.name_of(record.pipeline)
        except CuvisDistError:
            raise
        except (OSError, ValueError, TypeError, KeyError):
            return None
        endings = ENDINGS if record.job == "init" else ("yaml", "pt")
        there = saved is not None and all(
            self.output.exists(f"{saved.removesuffix('yaml')}{ending}") for ending in endings
        )
        return record if record.status == "done" and there else None

    def begin(self) -> None:
        """Make the folder the run's own, before it leaves anything there."""
        content = json.dumps(self.depends_on.parts, indent=2) + "\n"
        self.output.write(_FILES, write_contents(self.depends_on.files))
        self.output.write(_FINGERPRINT, content.encode())

    def load_initialized(self) -> dict[str, Any] | None:
        """Return what :meth:`save_initialized` was given by an earlier run, if it got so far."""
        if not self.output.exists(INITIALIZED):
            return None
        try:
            state = from_bytes(self.output.read(INITIALIZED))
            if not isinstance(state, dict) or state.keys() != _STATE:
                raise NotPlainError("it is not what was written")
            return state
        except NotPlainError as error:
            self.reject_initialized(error)
            return None

    def reject_initialized(self, error: Exception) -> None:
        """Say that what :meth:`load_initialized` returned, or found, is not used."""
        logger.warning(f"phase 1 starts anew: {self.output.at(INITIALIZED)} is not used: {error}")

    def save_initialized(self, **state: Any) -> None:
        """Keep the states of nodes, and what the record says about phase 1, instead of its passes.

        Parameters
        ----------
        **state
            Plain values: ``nodes``; ``begun``, a hash of what the nodes were built from, and
            ``unfitted``, hashes of the tensors that the fit left as they were; ``passes``,
            ``skipped_frames``, ``left_out`` and ``findings``.
        """
        assert state.keys() == _STATE
        self.output.write(INITIALIZED, to_bytes(state))
        self.output.remove_folder(PASSES)

    def finish(self) -> None:
        """Keep phase 1 for runs that train otherwise: the result is saved."""
        self.output.remove(LAST)
        self.output.remove_folder(PASSES)


def _with_phase_1_of(earlier: Dependences, now: Dependences) -> Dependences:
    """Return what a run depends on, with what is known of an earlier one.

    That is the checksums of files, and phase 1 where this run leaves it out.
    """
    parts, files = dict(now.parts), dict(now.files)
    if not parts[PHASE_1]:
        parts[PHASE_1], files[PHASE_1] = earlier.parts[PHASE_1], earlier.files[PHASE_1]
    files = {step: files[step].with_checksums_of(earlier.files[step]) for step in STEPS}
    return replace(now, parts=parts, files=files)
