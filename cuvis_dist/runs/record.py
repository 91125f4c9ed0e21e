"""What does a job leave behind? A record of itself and the saved pipeline, never half-written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from cuvis_ai_core.pipeline.pipeline import CuvisPipeline

from cuvis_dist.initialization.card import package_versions
from cuvis_dist.initialization.diagnosis import Finding
from cuvis_dist.initialization.passes import PassRecord
from cuvis_dist.runs.lock import writer_of
from cuvis_dist.storage import Location, OutputFolder, temporary_folder, writing_to

#: What every job leaves once it has ended.
RESULT = "result.json"


@dataclass(kw_only=True)
class JobRecord:
    """What every job leaves in its output folder: how it ended, and what it found out.

    ``result.json`` is there once the job has ended, and says what whoever submitted it asks first:
    the fields below, and those of the job's own record that are known. A record that has more to
    say writes it to a file of its own, from the beginning on.

    Attributes
    ----------
    job : str
        ``run``, ``init``, ``train``, ``evaluate``, ``score`` or ``measure``.
    output_dir : str
        Path or URI of the output folder.
    status : str
        ``running``, ``done``, ``failed`` or ``interrupted``.
    error : str or None
        The message that the job ended with.
    exit_code : int or None
        The command's exit code; None while it runs.
    started, finished : str
        UTC, to the second, as ISO 8601; ``finished`` is None while the job runs.
    """

    #: Name of the file that says most.
    file: ClassVar[str] = RESULT

    job: str
    output_dir: str
    status: str = "running"
    error: str | None = None
    exit_code: int | None = None
    started: str = field(default_factory=lambda: now())
    finished: str | None = None

    @property
    def output(self) -> OutputFolder:
        """The folder that the record lies in."""
        return OutputFolder(self.output_dir)

    def result(self) -> dict[str, Any]:
        """Return what ``result.json`` says."""
        shared = {item.name for item in fields(JobRecord)}
        own = {
            item.name: value
            for item in fields(self)
            if item.name not in shared and (value := getattr(self, item.name)) is not None
        }
        return self._ending() | own | {"started": self.started, "finished": self.finished}

    def _ending(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("job", "status", "exit_code", "error")}

    def write(self) -> None:
        """Write what is known to the output folder.

        While the job runs, the ``result.json`` of an earlier one goes away: where there is one,
        the last job has ended.

        Raises
        ------
        InputError, ClusterError
            If it cannot be written.
        """
        if self.file != RESULT:
            self._write(self.file, asdict(self))
        if self.finished is None:
            self.output.remove(RESULT)
        else:
            self._write(RESULT, self.result())

    def _write(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2, default=_as_json) + "\n"
        self.output.write(name, text.encode())


@dataclass(kw_only=True)
class RunRecord(JobRecord):
    """What ``run``, ``init`` and ``train`` leave in ``run.json``.

    Attributes
    ----------
    trainrun, name : str
        Path of the trainrun, and what it is called in it.
    initialization : dict or None
        What ``train`` began with: ``file``, ``sha256`` of the state and, as its card says, ``name``
        and ``made``.
    without : list of str
        The recordings that were left out of the train split, as they were named.
    pipeline : str
        Where the result was saved.
    scaling : dict
        The settings, by part.
    versions : dict of str to str
        Packages that the result depends on.
    passes : list of PassRecord
        Phase 1, pass by pass: nodes, statistics, pixels, frames and bytes read, seconds.
    initialized : str
        SHA-256 of all buffers and parameters after phase 1: the same for any cluster.
    skipped_frames : dict of str to str
        Frames that phase 1 left out, by uid, each with its reason.
    left_out : dict of str to str
        Frames that phase 1 left out since they are not of the bulk, by uid, each with how far it
        is from it: see the setting ``measuring.robust``.
    findings : list of Finding
        What looks bad about the fit of phase 1, node by node.
    nodes : dict of str to str
        How each node took part in a training step, by name: per frame, as a mean or jointly, and
        why; what is known of it where there was none.
    epochs : int
        Epochs that phase 2 completed.
    checkpoint, calibration : dict or None
        Upstream's records of the post-fit steps.
    metrics : dict
        Per stage (``val``, ``test``) the metrics, keyed ``<node>/<metric>``.
    seconds : dict
        Wall-clock time per phase.
    report : str or None
        Where the report for people was written.
    """

    file: ClassVar[str] = "run.json"

    trainrun: str
    name: str
    initialization: dict[str, str | None] | None = None
    without: list[str] = field(default_factory=list)
    pipeline: str = ""
    scaling: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=package_versions)
    passes: list[PassRecord] = field(default_factory=list)
    initialized: str = ""
    skipped_frames: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    nodes: dict[str, str] = field(default_factory=dict)
    epochs: int = 0
    checkpoint: Any = None
    calibration: Any = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    report: str | None = None

    def as_done(self) -> dict[str, Any]:
        """Return what ``run.json`` says if the run ends well now."""
        known = json.loads(json.dumps(asdict(self), default=_as_json))
        return known | {"status": "done", "exit_code": 0, "finished": now()}

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Note the wall-clock time of a phase, however it ends."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = round(time.perf_counter() - started, 3)

    @classmethod
    def load(cls, output_dir: Location) -> RunRecord:
        """Read ``<output_dir>/run.json``; calibration and checkpoint come back as mappings.

        A record that says ``running`` though nobody has the folder is one of a run that was cut
        off: its status is ``interrupted``.

        Raises
        ------
        OSError, ValueError, TypeError, KeyError
            If there is none, or it is another release's.
        ClusterError
            If the store does not answer.
        """
        values = json.loads(OutputFolder(output_dir).read(cls.file))
        values["passes"] = [PassRecord(**each) for each in values["passes"]]
        values["findings"] = [Finding(**finding) for finding in values["findings"]]
        record = cls(**values)
        if record.status == "running" and writer_of(record.output) == "":
            record.status = "interrupted"
            record.error = "its process ended without a word: it was killed, or its machine was"
        return record

    def sampled(self) -> list[str]:
        """Return a line for each thing that was estimated from a sample of pixels."""
        lines = []
        for name, fit in (item for done in self.passes for item in done.nodes.items()):
            if said := fit.get("sampled"):
                of = f"{fit['pixels']} of {said['of']} pixels"
                given = f", given {', '.join(said['given'])}" if said["given"] else ""
                for what, entry in said["standard_errors"].items():
                    value = f" {entry['value']:.6g}" if "value" in entry else ""
                    error = f"standard error {entry['standard_error']:.2g}"
                    lines.append(f"{name} {what}{value}, {error} ({of}{given})")
        return lines

    def outside(self) -> list[str]:
        """Return a line about the pixels that phase 1 left out since they are not of the bulk."""
        for said, nodes in (
            (done.inside, done.nodes) for done in self.passes if done.inside and done.nodes
        ):
            out = said["of"] - max(fit["pixels"] for fit in nodes.values())
            most = [f"{name} ({part:.1%})" for name, part in [*said["outside"].items()][:3]]
            return [
                f"{out:,} of {said['of']:,} pixels at {said['at']}, outside of the bulk of "
                f"{said['sample']:,} sampled ones"
                + (f"; most in {', '.join(most)}" if most else "")
            ]
        return []

    def result(self) -> dict[str, Any]:
        """Return the ending, the pipeline and its metrics; the rest is in ``run.json``."""
        return self._ending() | {
            "pipeline": self.pipeline or None,
            "metrics": self.metrics,
            "run": str(self.output.at(self.file)),
            "report": self.report,
        }


@dataclass(kw_only=True)
class EvaluateRecord(JobRecord):
    """What ``evaluate`` finds out; None where it did not come so far.

    Attributes
    ----------
    pipeline, split : str
        Which saved pipeline was evaluated on what.
    frames : int
        How many frames the split has.
    metrics : dict
        The metrics, keyed by split and ``<node>/<metric>``.
    seconds : float
        Wall-clock time of the job.
    """

    job: str = "evaluate"
    pipeline: str
    split: str
    frames: int | None = None
    metrics: dict[str, dict[str, float]] | None = None
    seconds: float | None = None


@dataclass(kw_only=True)
class ScoreRecord(JobRecord):
    """What ``score`` finds out; None where it did not come so far.

    Attributes
    ----------
    pipeline, split : str
        Which saved pipeline scored what.
    scores : str
        Path or URI of the folder of score maps.
    outputs : list of str
        What each file holds, as ``<node>.<port>``.
    frames, there, written : int
        Frames listed; those whose file was there before; those that were written.
    skipped : dict of str to str
        Frames that could not be used, by uid, each with its reason.
    seconds : float
        Wall-clock time of the job.
    """

    job: str = "score"
    pipeline: str
    split: str
    scores: str | None = None
    outputs: list[str] | None = None
    frames: int | None = None
    there: int | None = None
    written: int | None = None
    skipped: dict[str, str] | None = None
    seconds: float | None = None


def now() -> str:
    """Return the time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def save_pipeline(pipeline: CuvisPipeline, output: OutputFolder, name: str) -> Location:
    """Save ``<name>.yaml`` and ``.pt`` beside each other; return where the former lies.

    An earlier result stays in place until the new files are complete.

    Raises
    ------
    InputError, ClusterError
        If they cannot be written.
    """
    with _saved_aside(pipeline, output, name) as saved:
        for suffix in (".pt", ".yaml"):
            if output.local is None:
                output.upload(saved.with_suffix(suffix), f"{name}{suffix}")
            else:
                os.replace(saved.with_suffix(suffix), output.local / f"{name}{suffix}")
    return output.at(f"{name}.yaml")


@contextmanager
def _saved_aside(pipeline: CuvisPipeline, output: OutputFolder, name: str) -> Iterator[Path]:
    """Save under a temporary folder, beside the result where that is a local one."""
    parent = temporary_folder() if output.local is None else (output.local / name).parent
    with writing_to(parent):
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".saving-", dir=parent))
        try:
            path = folder / f"{name.rpartition('/')[2]}.yaml"
            pipeline.save_to_file(str(path))
            yield path
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _as_json(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)
