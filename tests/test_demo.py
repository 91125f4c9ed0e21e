"""The demo: does phase 2 visibly help at its own size, and does it overwrite nothing?"""

from __future__ import annotations

from dataclasses import replace

import pytest
from cuvis_ai_core.training.post_fit import TrainHook

from cuvis_dist import GradientTrainer, Scaling, StatisticalTrainer
from cuvis_dist.cli import main
from cuvis_dist.demo import DemoSettings, write_demo
from cuvis_dist.errors import InputError
from cuvis_dist.runs.trainrun import load_trainrun


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
def test_phase_two_lowers_the_loss_and_finds_more(tmp_path):
    trainrun = load_trainrun(write_demo(tmp_path, DemoSettings()), output_dir=tmp_path / "results")
    pipeline, module = trainrun.pipeline, trainrun.datamodule()
    scaling = Scaling(resources={"workers": 2, "train_workers": 2})
    initialization = StatisticalTrainer(
        pipeline, module, metric_nodes=trainrun.metric_nodes, scaling=scaling
    )
    initialization.fit()
    before = initialization.test().metrics

    pipeline.unfreeze_nodes_by_name(trainrun.config.unfreeze_nodes)
    trainrun.config.training.callbacks.checkpoint.dirpath = str(tmp_path / "checkpoints")
    events = []
    training = GradientTrainer(
        pipeline,
        module,
        trainrun.loss_nodes,
        trainrun.metric_nodes,
        trainrun.config.training,
        emit=events.append,
        scaling=scaling,
        output_dir=trainrun.output_dir,
    )
    training.fit()
    epochs = [e.evaluation.metrics for e in events if e.hook is TrainHook.EPOCH_END]
    assert epochs[-1]["train_loss"] < 0.6 * epochs[0]["train_loss"]
    assert epochs[-1]["val_loss"] < epochs[0]["val_loss"]
    after = training.outcome.evaluations["test"].metrics
    for name in ("average_precision", "iou", "f1_score", "image_f1", "precision"):
        assert after[f"metrics_anomaly/{name}"] >= before[f"metrics_anomaly/{name}"], name
    assert after["metrics_anomaly/iou"] > before["metrics_anomaly/iou"] + 0.1


SMALL = DemoSettings(frames=4, height=4, width=4, bands=5, recordings=2)


def test_a_demo_that_is_there_stays_and_what_was_lost_of_it_comes_back(tmp_path):
    trainrun = write_demo(tmp_path, SMALL)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(files) == 4 + 3
    times = {path: path.stat().st_mtime_ns for path in files}
    lost = tmp_path / "archive" / "recording_01_001.npz"
    lost.unlink()
    assert write_demo(tmp_path, SMALL) == trainrun
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    assert all(path.stat().st_mtime_ns == times[path] for path in files if path != lost)


@pytest.mark.parametrize("name", ["trainrun.yaml", "pipeline.yaml", "archive/universe.csv"])
@pytest.mark.parametrize("option", [[], ["--restart"]])
def test_what_somebody_else_wrote_is_not_overwritten(name, option, tmp_path, capsys):
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("of somebody's own")
    assert main(["demo", "--folder", str(tmp_path), *option]) == 2
    assert f"{mine} is not what the demo would write" in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == "of somebody's own"


def test_a_demo_of_other_sizes_is_not_mixed_into_one_that_is_there(tmp_path):
    write_demo(tmp_path, SMALL)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    frame = tmp_path / "archive" / "recording_00_000.npz"
    for other, where in (
        (replace(SMALL, bands=6), "pipeline.yaml"),
        (replace(SMALL, seed=8), frame),
    ):
        with pytest.raises(InputError, match=f"{where} is not what the demo would write"):
            write_demo(tmp_path, other)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
