"""Is a run one run of MLflow's? Against a tracking folder, by the package that the extra names."""

from __future__ import annotations

import os

import pytest
from settings import scaling_of

from cuvis_dist.report import tracking
from cuvis_dist.runs.trainrun import load_trainrun
from cuvis_dist.runs.two_phase import run_trainrun

HERE = scaling_of(workers=0, train_workers=0)


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Set a tracking folder, and return what reads it."""
    from mlflow import MlflowClient  # takes a second, and no other test needs it

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "tracking").as_uri())
    return MlflowClient((tmp_path / "tracking").as_uri())


def test_a_run_is_one_run_with_parameters_metrics_and_files(client, demo_trainrun, tmp_path):
    record = run_trainrun(load_trainrun(demo_trainrun, output_dir=tmp_path / "out"), HERE)
    experiment = client.get_experiment_by_name("cuvis_dist")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("demo", "FINISHED")
    assert run.data.params["resources.workers"] == "0"
    assert run.data.params["version.cuvis-ai"] == record.versions["cuvis-ai"]
    for name, value in record.metrics["test"].items():
        assert run.data.metrics[f"test/{name}"] == pytest.approx(value)
    losses = client.get_metric_history(run.info.run_id, "train_loss")
    assert [each.step for each in losses] == [0, 1, 2]
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    files = {each.path for each in client.list_artifacts(run.info.run_id)}
    assert files == {"report.html", "run.json", "pipeline"}
    saved = {each.path for each in client.list_artifacts(run.info.run_id, "pipeline")}
    name = record.pipeline.rpartition("/")[2].removesuffix(".yaml")
    assert saved == {f"pipeline/{name}.yaml", f"pipeline/{name}.pt"}


def test_what_cannot_be_tracked_is_a_warning(demo_trainrun, tmp_path, monkeypatch, warnings):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://at-all")
    run = load_trainrun(demo_trainrun, output_dir=tmp_path / "out").initialization_only()
    record = run_trainrun(run, HERE)
    assert record.status == "done"
    assert record.report is not None
    assert any("not tracked by MLflow" in message for message in warnings)


def test_mlflow_is_not_even_looked_for_without_a_tracking_uri(monkeypatch):
    """Its import takes longer than the report."""

    def looked(name):
        raise AssertionError(f"looked for {name}")

    monkeypatch.setattr(tracking, "find_spec", looked)
    for uri in (None, ""):
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        if uri is not None:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert not tracking.is_tracked()
