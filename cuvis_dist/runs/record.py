"""What does a run leave behind? The saved pipeline and the run's record, never half-written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from loguru import logger

from cuvis_dist.errors import INTERRUPTED, CuvisDistError, one_line
from cuvis_dist.execution.failures import out_of_space
from cuvis_dist.initialization import Finding, PassRecord
from cuvis_dist.storage import Location, OutputFolder, temporary_folder, writing_to

_PACKAGES = (
    "cuvis-dist",
    "cuvis-ai",
    "cuvis-ai-core",
    "cuvis-ai-dataloader",
    "ray",
    "torch",
    "pytorch-lightning",
    "numpy",
)


@dataclass
class RunRecord:
    """What ``run.json`` says.

    Attributes
    ----------
    job : str
        ``run``, ``init`` or ``train``.
    weights : str or None
        The saved state that ``train`` began with.
    status : str
        ``running``, ``done``, ``failed`` or ``interrupted``.
    error : str or None
        The message that the run ended with.
    passes : list of PassRecord
        Phase 1, pass by pass: nodes, statistics, pixels, frames and bytes read, seconds.
    initialized : str
        SHA-256 of all buffers and parameters after phase 1: the same for any cluster.
    skipped_frames : dict of str to str
        Frames that phase 1 left out, by uid, each with its reason.
    findings : list of Finding
        What looks bad about the fit of phase 1, node by node.
    epochs : int
        Epochs that phase 2 completed.
    checkpoint, calibration : dict or None
        Upstream's records of the post-fit steps.
    metrics : dict
        Per stage (``val``, ``test``; ``phase 1 test`` before training) the metrics, keyed
        ``<node>/<metric>``.
    seconds : dict
        Wall-clock time per phase.
    """

    trainrun: str
    name: str
    output_dir: str
    job: str = "run"
    weights: str | None = None
    pipeline: str = ""
    scaling: dict[str, Any] = field(default_factory=dict)
    status: str = "running"
    error: str | None = None
    exit_code: int | None = None
    started: str = ""
    finished: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    passes: list[PassRecord] = field(default_factory=list)
    initialized: str = ""
    skipped_frames: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    epochs: int = 0
    checkpoint: Any = None
    calibration: Any = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.started = self.started or now()
        self.versions = self.versions or {name: version(name) for name in _PACKAGES}

    @property
    def output(self) -> OutputFolder:
        """The folder that the record lies in."""
        return OutputFolder(self.output_dir)

    def write(self) -> Location:
        """Write ``<output_dir>/run.json`` and return its path or URI.

        Once the run has ended, :meth:`result` goes beside it as ``result.json``; before, that of
        an earlier run goes away: where there is one, this run has ended.
        """
        content = json.dumps(asdict(self), indent=2, default=_as_json) + "\n"
        path = self.output.write("run.json", content.encode())
        if self.finished is None:
            self.output.remove("result.json")
        else:
            content = json.dumps(self.result(), indent=2) + "\n"
            self.output.write("result.json", content.encode())
        return path

    @classmethod
    def load(cls, output_dir: Location) -> RunRecord:
        """Read ``<output_dir>/run.json``; what was nested comes back as mappings.

        Raises
        ------
        OSError, ValueError, TypeError, KeyError
            If there is none, or it is another release's.
        ClusterError
            If the store does not answer.
        """
        values = json.loads(OutputFolder(output_dir).read("run.json"))
        values["findings"] = [Finding(**finding) for finding in values["findings"]]
        return cls(**values)

    def result(self) -> dict[str, Any]:
        """Return what whoever submitted the run asks first; the rest is in ``run.json``."""
        return {
            "job": self.job,
            "status": self.status,
            "exit_code": self.exit_code,
            "error": self.error,
            "pipeline": self.pipeline or None,
            "metrics": self.metrics,
            "run": str(self.output.at("run.json")),
        }


@contextmanager
def recorded(record: RunRecord | JobRecord) -> Iterator[None]:
    """Write down how the job ended, if it did not end well."""
    try:
        yield
    except BaseException as error:
        if full := out_of_space(error):
            error = full
        # Ray ends a driver by SystemExit, both on SIGTERM and on Ctrl-C while it trains.
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        record.status = "interrupted" if stopped else "failed"
        record.exit_code = INTERRUPTED if stopped else getattr(error, "exit_code", 1)
        record.error = None if stopped else one_line(error)
        record.finished = now()
        try:
            record.write()
        except CuvisDistError as second:
            logger.warning(f"run.json could not be written: {second}")
        if stopped:
            logger.warning("interrupted; the same command goes on from here")
            raise KeyboardInterrupt from error
        raise error


@dataclass
class JobRecord:
    """What ``result.json`` says about a job that uses a saved pipeline.

    Attributes
    ----------
    job : str
        ``evaluate`` or ``score``.
    output : OutputFolder
        Where it goes.
    values : dict
        What the job found out, besides how it ended.
    status, error, exit_code, started, finished
        As in :class:`RunRecord`.
    """

    job: str
    output: OutputFolder
    values: dict[str, Any] = field(default_factory=dict)
    status: str = "running"
    error: str | None = None
    exit_code: int | None = None
    started: str = field(default_factory=lambda: now())
    finished: str | None = None

    def begin(self) -> None:
        """Remove an earlier ``result.json``: where there is one, the job has ended."""
        self.output.probe()
        self.output.remove("result.json")

    def write(self) -> None:
        """Write ``<output_dir>/result.json``."""
        ending = {name: getattr(self, name) for name in ("job", "status", "exit_code", "error")}
        times = {"started": self.started, "finished": self.finished}
        content = json.dumps(ending | self.values | times, indent=2, default=_as_json) + "\n"
        self.output.write("result.json", content.encode())


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
