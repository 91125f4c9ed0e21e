"""Is a run tracked by MLflow? It is where that is installed and MLFLOW_TRACKING_URI is set."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from cuvis_dist.report.kept import PAGE, Kept
from cuvis_dist.storage import OutputFolder

#: The experiment where MLFLOW_EXPERIMENT_NAME names none.
_EXPERIMENT = "cuvis_dist"
#: So many parameters and metrics go into one request at most.
_PARAMETERS, _METRICS = 100, 1000


def is_tracked() -> bool:
    """Whether runs are tracked."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) and find_spec("mlflow") is not None


def track(output: OutputFolder, kept: Kept) -> str:
    """Make a run of MLflow's of one that has ended well; return its id.

    Settings become parameters, epochs and evaluations metrics; the report, ``run.json`` and the
    saved pipeline are its artefacts. Raises whatever MLflow does.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it tells its makers otherwise
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client, record = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]), kept.record
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _EXPERIMENT
    known = client.get_experiment_by_name(name)
    experiment = known.experiment_id if known else client.create_experiment(name)
    began = _milliseconds(record["started"])
    tags = {"output_dir": kept.place, "trainrun": str(record["trainrun"])}
    run = client.create_run(experiment, began, tags, record.get("name") or None).info.run_id
    try:
        parameters = [Param(key, str(value)[:500]) for key, value in _parameters(record)]
        for i in range(0, len(parameters), _PARAMETERS):
            client.log_batch(run, params=parameters[i : i + _PARAMETERS])
        now = _milliseconds(record["finished"])
        metrics = [Metric(key, value, now, step) for key, value, step in _metrics(kept)]
        for i in range(0, len(metrics), _METRICS):
            client.log_batch(run, metrics=metrics[i : i + _METRICS])
        _log_files(client, run, output, record)
    except BaseException:
        client.set_terminated(run, "FAILED")
        raise
    client.set_terminated(run, "FINISHED", now)
    return str(run)


def _milliseconds(time: str) -> int:
    return int(datetime.fromisoformat(time).timestamp() * 1000)


def _parameters(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "job", record["job"]
    for part, settings in record.get("scaling", {}).items():
        for name, value in settings.items():
            yield f"{part}.{name}", value
    for package, version in record.get("versions", {}).items():
        yield f"version.{package}", version


def _metrics(kept: Kept) -> Iterator[tuple[str, float, int]]:
    """Yield name, value and step: those of each epoch, then those of the saved pipeline."""
    for note in kept.diary:
        if note["hook"] == "epoch_end":
            for name, value in note.get("metrics", {}).items():
                if math.isfinite(value):
                    yield name, float(value), note["epoch"] - 1
    last = max(0, kept.record.get("epochs", 0) - 1)
    for split, values in kept.record.get("metrics", {}).items():
        for name, value in values.items():
            if math.isfinite(value):
                yield f"{split}/{name}", float(value), last
    for phase, seconds in kept.record.get("seconds", {}).items():
        yield f"seconds/{phase}", float(seconds), last


def _log_files(client: Any, run: str, output: OutputFolder, record: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "run.json"
        written.write_text(json.dumps(record, indent=2), encoding="utf-8")
        client.log_artifact(run, str(written))
        client.log_artifact(run, str(output.download(PAGE, Path(folder) / PAGE)))
        pipeline = output.name_of(record["pipeline"]) if record.get("pipeline") else None
        for suffix in (".yaml", ".pt") if pipeline else ():
            name = str(PurePosixPath(str(pipeline)).with_suffix(suffix))
            local = Path(folder) / PurePosixPath(name).name
            client.log_artifact(run, str(output.download(name, local)), "pipeline")
