"""What does a run leave behind? The saved pipeline and the run's record, never half-written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, field, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cuvis_ai_core.pipeline.pipeline import CuvisPipeline

from cuvis_dist.initialization import Finding, PassRecord
from cuvis_dist.storage import remove_file, write_atomically

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

    def write(self) -> Path:
        """Write ``<output_dir>/run.json`` and return its path.

        Once the run has ended, :meth:`result` goes beside it as ``result.json``; before, that of
        an earlier run goes away: where there is one, this run has ended.
        """
        folder = Path(self.output_dir)
        content = json.dumps(asdict(self), indent=2, default=_as_json) + "\n"
        path = write_atomically(folder / "run.json", content.encode())
        if self.finished is None:
            (folder / "result.json").unlink(missing_ok=True)
        else:
            content = json.dumps(self.result(), indent=2) + "\n"
            write_atomically(folder / "result.json", content.encode())
        return path

    @classmethod
    def load(cls, output_dir: Path) -> RunRecord:
        """Read ``<output_dir>/run.json``; what was nested comes back as mappings.

        Raises
        ------
        OSError, ValueError, TypeError, KeyError
            If there is none, or it is another release's.
        """
        values = json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
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
            "run": str(Path(self.output_dir) / "run.json"),
        }


@dataclass
class JobRecord:
    """What ``result.json`` says about a job that uses a saved pipeline.

    Attributes
    ----------
    job : str
        ``evaluate`` or ``score``.
    output_dir : str
        Folder or URI.
    values : dict
        What the job found out, besides how it ended.
    status, error, exit_code, started, finished
        As in :class:`RunRecord`.
    """

    job: str
    output_dir: str
    values: dict[str, Any] = field(default_factory=dict)
    status: str = "running"
    error: str | None = None
    exit_code: int | None = None
    started: str = field(default_factory=lambda: now())
    finished: str | None = None

    def begin(self) -> None:
        """Remove an earlier ``result.json``: where there is one, the job has ended."""
        path = f"{self.output_dir}/result.json"
        with contextlib.suppress(OSError):
            remove_file(path)

    def write(self) -> None:
        """Write ``<output_dir>/result.json``."""
        ending = {name: getattr(self, name) for name in ("job", "status", "exit_code", "error")}
        times = {"started": self.started, "finished": self.finished}
        content = json.dumps(ending | self.values | times, indent=2, default=_as_json) + "\n"
        write_atomically(f"{self.output_dir}/result.json", content.encode())


def now() -> str:
    """Return the time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def save_pipeline(pipeline: CuvisPipeline, path: Path) -> Path:
    """Save ``.yaml`` and ``.pt`` beside each other, both whole or neither; return the former.

    An earlier result stays in place until the new files are complete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".saving-", dir=path.parent))
    try:
        pipeline.save_to_file(str(folder / path.name))
        for suffix in (".pt", ".yaml"):
            os.replace((folder / path.name).with_suffix(suffix), path.with_suffix(suffix))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return path


def _as_json(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)
