"""Phase 2 under Ray Train: what one process computes, on any number of workers."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from archives import assert_same_state, buffers_sha256, edit
from cuvis_ai_core.training.evaluation import evaluate_split
from cuvis_ai_core.training.post_fit import TrainHook
from cuvis_ai_schemas.enums import ExecutionStage
from faults import TransferredModule
from gradients import initialized, train, train_upstream
from pytorch_lightning.callbacks import ModelCheckpoint
from readings import count_readings, counted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cuvis_dist import GradientTrainer
from cuvis_dist.errors import ClusterError, DataError
from cuvis_dist.nodes.probing import random_states

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.slow]


OPTIMIZERS = {
    "adamw": ("training.optimizer.name=adamw",),
    "sgd": ("training.optimizer.name=sgd", "training.optimizer.lr=1.0e-6"),
}
#: 10 train frames: batches of 3 leave one over, batches of 5 do not.
BATCHES = {"uneven": 3, "even": 5}
#: The learning rate falls and training ends after 3 of 6 epochs, by what callbacks monitor.
SCHEDULES = (
    "training.max_epochs=6",
    "training.scheduler={name: plateau, monitor: val_loss, patience: 0, threshold: 0.5}",
    "training.callbacks={checkpoint: {monitor: val_loss}, early_stopping: "
    "[{monitor: val_loss, min_delta: 1000, patience: 2}]}",
)


@pytest.fixture(scope="module")
def references(demo_trainrun, tmp_path_factory):
    """Upstream in one process, by optimizer and batches."""

    @functools.cache
    def run(optimizer, batches):
        trainrun = initialized(
            demo_trainrun, tmp_path_factory.mktemp("one"), *overrides(optimizer, batches)
        )
        return trainrun, train_upstream(trainrun)

    return run


def overrides(optimizer, batches):
    return (f"data.batch_size={BATCHES[batches]}", *OPTIMIZERS[optimizer], *SCHEDULES)


def state(trainrun):
    return {
        node.name: {name: value.clone() for name, value in node.state_dict().items()}
        for node in trainrun.pipeline.nodes()
    }


def assert_frozen_as_before(trainrun, before):
    """Frozen nodes have the same bits; unfrozen ones have parameters, and have learned."""
    for node in trainrun.pipeline.nodes():
        same = all(torch.equal(before[node.name][k], v) for k, v in node.state_dict().items())
        if node.name in trainrun.config.unfreeze_nodes:
            assert not same, node.name
            assert any(parameter.requires_grad for parameter in node.parameters())
        elif node.name not in ("metrics_anomaly", "decider"):
            assert same, node.name


def assert_same_values(trainer, expected):
    """Assert that callbacks could monitor the same values in every epoch."""
    ours, theirs = trainer.callbacks[0].values, expected.callbacks[0].values
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            tolerance = {"abs": 1e-6} if "metrics" in name else {"rel": 1e-5}
            assert mine[name] == pytest.approx(value, **tolerance), name


#: How frames are read makes no difference.
READING = {
    0: {"workers": 0},
    1: {"cache": "device", "read_ahead": 2},
    2: {"cache": "memory"},
    3: {"cache": "memory+device"},
}
#: In every test run; the others are marked long (two workers are in many tests below).
ALWAYS = {(0, "adamw", "uneven"), (3, "adamw", "uneven")}


@pytest.mark.parametrize(
    ("workers", "optimizer", "batches"),
    [
        pytest.param(*case, marks=pytest.mark.kernels if case in ALWAYS else pytest.mark.long)
        for case in itertools.product(READING, OPTIMIZERS, BATCHES)
    ],
)
def test_equals_one_process_of_upstream(
    demo_trainrun, tmp_path, references, workers, optimizer, batches
):
    expected_run, expected = references(optimizer, batches)
    assert len(expected_run.datamodule().train_ds) == 10
    trainrun = initialized(demo_trainrun, tmp_path, *overrides(optimizer, batches))
    before = state(trainrun)
    events = []
    trainer = train(trainrun, workers, scaling=READING[workers], emit=events.append)

    assert_same_state(trainrun.pipeline, expected_run.pipeline, 1e-5)
    assert_frozen_as_before(trainrun, before)
    assert_same_values(trainer, expected)
    ours = trainer.callbacks[0].values
    assert len(ours) == 3
    assert ours[-1]["val_loss"] < ours[0]["val_loss"]

    best = trainer.outcome.checkpoint
    (other,) = (c for c in expected.callbacks if isinstance(c, ModelCheckpoint))
    assert best.restored
    assert Path(best.path).name == Path(other.best_model_path).name, "another best epoch"
    assert Path(best.path).parent == tmp_path / "checkpoints"
    frames = len(trainrun.datamodule().train_ds)
    assert [e.progress.done for e in events if e.hook is TrainHook.EPOCH_END] == [frames] * 3

    # What the post-fit steps report is what upstream's evaluation finds in this process.
    module = trainrun.datamodule()
    module.setup("test")
    summary = evaluate_split(
        trainrun.pipeline,
        module.test_dataloader(),
        stage=ExecutionStage.TEST,
        metric_nodes=trainrun.metric_nodes,
    )
    assert trainer.outcome.evaluations["test"].frames == summary.frames
    assert trainer.outcome.evaluations["test"].metrics == pytest.approx(summary.metrics, abs=1e-6)
    if (workers, batches) == (2, "even"):
        (row,) = trainer.test()
        for name, value in summary.metrics.items():
            assert row[name] == pytest.approx(value, abs=1e-6)


def test_a_module_may_change_batches_on_the_device(demo_trainrun, tmp_path):
    """By Lightning's hooks of data modules, which ask its trainer what it is doing."""
    states = []
    for name, fit in (("one", train_upstream), ("ours", partial(train, workers=0))):
        trainrun = initialized(demo_trainrun, tmp_path / name, "training.max_epochs=2")
        fit(trainrun, module=TransferredModule(trainrun.datamodule()))
        states.append(buffers_sha256(trainrun.pipeline))
    assert states[0] == states[1]


def test_an_evaluation_warns_where_this_trainer_trained_nothing(demo_trainrun, tmp_path, warnings):
    """Upstream's trainer, which each rank makes anew, would always warn."""
    trainrun = initialized(demo_trainrun, tmp_path, "training.max_epochs=1")
    trained = train(trainrun, 0)
    (row,) = trained.validate()
    assert not [line for line in warnings if "fit()" in line]
    fresh = GradientTrainer(
        trainrun.pipeline,
        trainrun.datamodule(),
        trainrun.loss_nodes,
        trainrun.metric_nodes,
        trained.training_config,
        scaling=trained.scaling,
        output_dir=tmp_path,
    )
    assert [*fresh.validate()] == [row]
    (said,) = (line for line in warnings if "fit()" in line)
    assert said.startswith("validate without a fit() of this trainer: the pipeline is evaluated as")
    # A checkpoint of Lightning's is evaluated whatever the pipeline holds.
    expected = [*trained.test()]
    with torch.no_grad():
        for parameter in trainrun.pipeline.parameters():
            parameter.zero_()
    assert [*fresh.test(ckpt_path=trained.outcome.checkpoint.path)] == expected


@pytest.mark.parametrize(("settings", "threads"), [({}, 3), ({"cpus_per_worker": 2}, 2)])
def test_this_process_trains_on_all_its_threads(demo_trainrun, tmp_path, settings, threads):
    """As upstream does; a setting limits them, and afterwards they are as before."""
    found = set()
    trainrun = initialized(demo_trainrun, tmp_path, "training.max_epochs=1")

    def note(event):
        found.add(torch.get_num_threads() if event.hook is PROGRESS else threads)

    torch.set_num_threads(3)
    train(trainrun, 0, scaling=settings, emit=note)
    assert found == {threads}
    assert torch.get_num_threads() == 3


@pytest.mark.kernels
def test_same_bits_in_this_process_and_on_one_worker(demo_trainrun, tmp_path):
    """Also of what callbacks could monitor, and of the metrics after the fit; on as many threads.

    This process keeps frames on its device, and reads each train frame once.
    """
    found, often = [], {}
    for workers, cache in ((0, "device"), (1, "none")):
        trainrun = initialized(demo_trainrun, tmp_path / str(workers), "data.batch_size=3")
        module, log = trainrun.datamodule(), tmp_path / f"{workers}.log"
        count_readings(module, "train", log)
        before, events = state(trainrun), []
        generators = random_states()
        scaling = {"workers": workers, "cache": cache, "cpus_per_worker": 1}
        trainer = train(trainrun, workers, module, scaling, emit=events.append)
        assert random_states() == generators, "the driver's random numbers are others now"
        often[cache] = counted(log)
        assert_frozen_as_before(trainrun, before)
        evaluations = trainer.outcome.evaluations
        found.append(
            (
                buffers_sha256(trainrun.pipeline),
                trainer.callbacks[0].values,
                {split: outcome.metrics for split, outcome in evaluations.items()},
                [(e.hook, e.epochs, e.split) for e in events if e.hook is not PROGRESS],
            )
        )
    assert found[0] == found[1]
    assert often == {"device": Counter(range(10)), "none": Counter([*range(10)] * 3)}


#: Sent a few times a second.
PROGRESS = TrainHook.TRAIN_PROGRESS


SETTINGS = {
    "accumulation, clipping, plateau, stops early": (
        "unfreeze_nodes=[selector]",
        "training.max_epochs=6",
        "training.optimizer={name: sgd, lr: 0.001, momentum: 0.9}",
        "training.accumulate_grad_batches=3",  # of 4 batches: the last step is of one
        "training.gradient_clip_val=0.001",
        "training.val_check_interval=2",
        "training.limit_val_batches=1",
        "training.scheduler={name: plateau, monitor: val_loss, patience: 0, threshold: 0.5}",
        "training.callbacks={checkpoint: {monitor: val_loss, save_top_k: 2}, early_stopping: "
        "[{monitor: val_loss, patience: 50}, "
        "{monitor: train_loss, min_delta: 1000, patience: 4, verbose: false}]}",
    ),
    "limits, warmup, validation every other epoch": (
        "unfreeze_nodes=[logit_head]",
        "training.max_epochs=4",
        "training.limit_train_batches=0.75",
        "training.check_val_every_n_epoch=2",
        "training.scheduler={name: cosine, warmup_epochs: 1}",
        "training.optimizer={name: adamw, lr: 0.01, betas: [0.8, 0.9], weight_decay: 0.1}",
        "training.callbacks={checkpoint: {monitor: val_loss, save_last: true}, "
        "learning_rate_monitor: {logging_interval: step}}",
    ),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.long) for case in SETTINGS],
)
def test_settings_mean_what_they_mean_in_one_process(demo_trainrun, tmp_path, case):
    overrides = ("data.batch_size=3", *SETTINGS[case])
    expected_run = initialized(demo_trainrun, tmp_path / "one", *overrides)
    expected = train_upstream(expected_run)
    trainrun = initialized(demo_trainrun, tmp_path / "two", *overrides)
    before = state(trainrun)
    trainer = train(trainrun, 2)

    assert_same_state(trainrun.pipeline, expected_run.pipeline, 1e-5)
    assert_frozen_as_before(trainrun, before)
    assert_same_values(trainer, expected)
    if "early" in case:
        assert 1 < trainer.epochs < 6, "no rule stopped the training"
    kept, others = (
        sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir())
        for name in ("two", "one")
    )
    assert kept == others


@pytest.mark.long
@pytest.mark.parametrize(
    "nodes", ["pca", "normalizer", "normalizer, selector, pca, rx_detector, logit_head"]
)
def test_unfreezing_alone_and_together(demo, tmp_path, nodes):
    """With a PCA in it; other tests unfreeze the demo's other nodes alone."""

    def insert(pipeline):
        hparams = {"num_channels": 12, "n_components": 4}
        cls = "cuvis_ai.node.dimensionality_reduction.TrainablePCA"
        pipeline["nodes"].append({"name": "pca", "class_name": cls, "hparams": hparams})
        (rx,) = (node for node in pipeline["nodes"] if node["name"] == "rx_detector")
        rx["hparams"]["num_channels"] = 4
        (edge,) = (e for e in pipeline["connections"] if e["target"] == "rx_detector.inputs.data")
        pipeline["connections"] += [
            {"source": edge["source"], "target": "pca.inputs.data"},
            {"source": "pca.outputs.projected", "target": edge["target"]},
        ]
        pipeline["connections"].remove(edge)

    edit(demo.parent / "pipeline.yaml", insert)
    overrides = "data.batch_size=3", f"unfreeze_nodes=[{nodes}]"
    expected = initialized(demo, tmp_path / "one", *overrides)
    train_upstream(expected)
    trainrun = initialized(demo, tmp_path / "two", *overrides)
    before = state(trainrun)
    train(trainrun, 2)
    assert_same_state(trainrun.pipeline, expected.pipeline, 1e-5)
    assert_frozen_as_before(trainrun, before)


@pytest.mark.long
def test_monitors_write_on_rank_zero_alone(demo, tmp_path):
    """Three workers, one TensorBoard node with metrics and pictures."""
    pipeline = yaml.safe_load((demo.parent / "pipeline.yaml").read_text())
    visualizer = "cuvis_ai.node.anomaly_visualization.ScoreHeatmapVisualizer"
    monitor = "cuvis_ai.node.monitor.TensorBoardMonitorNode"
    pipeline["nodes"] += [
        {"name": "heatmap", "class_name": visualizer, "hparams": {"up_to": 1}},
        {"name": "board", "class_name": monitor, "hparams": {"output_dir": str(tmp_path / "runs")}},
    ]
    pipeline["connections"] += [
        {"source": f"{source}", "target": f"{target}"}
        for source, target in (
            ("rx_detector.outputs.scores", "heatmap.inputs.scores"),
            ("heatmap.outputs.artifacts", "board.inputs.artifacts"),
            ("metrics_anomaly.outputs.metrics", "board.inputs.metrics"),
        )
    ]
    (demo.parent / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    overrides = "data.batch_size=3", "unfreeze_nodes=[rx_detector]", "training.max_epochs=2"
    trainrun = initialized(demo, tmp_path / "out", *overrides)
    (board,) = (node for node in trainrun.pipeline.nodes() if node.name == "board")
    before = state(trainrun)
    trainer = train(trainrun, 3, monitors=[board])
    assert_frozen_as_before(trainrun, before)

    written, losses = [], {}
    (run,) = (tmp_path / "runs").iterdir()  # one folder for all of it, as upstream's
    for file in sorted(run.iterdir()):  # event files are named by their time
        events = EventAccumulator(str(file)).Reload()
        tags = events.Tags()
        steps = {tag: [event.step for event in events.Scalars(tag)] for tag in tags["scalars"]}
        steps |= {tag: [event.step for event in events.Images(tag)] for tag in tags["images"]}
        written.append(steps)
        if "train/loss" in tags["scalars"]:
            losses = {event.step: event.value for event in events.Scalars("train/loss")}
    training, evaluation = written  # the second by the post-fit steps, in one process
    steps = 2 * 4
    assert training["train/loss"] == list(range(steps))
    # The loss of a step is that of all its frames.
    for epoch, values in enumerate(trainer.callbacks[0].values):
        assert losses[4 * epoch + 3] == pytest.approx(values["train_loss"], rel=1e-5)
    # Of the two validation batches of an epoch rank 0 has the first; also one before training.
    assert training["val/score_heatmap_img00"] == [0, 4, 8]
    assert training["val/iou"] == [0, 4, 8]
    assert evaluation["val/iou"] == evaluation["test/iou"] == [steps + 1] * 2


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_frame_that_cannot_be_read_is_named(demo, tmp_path, workers):
    """With what to do, where somebody may expect that it is skipped."""
    trainrun = initialized(demo, tmp_path)
    (demo.parent / "archive" / "recording_01_001.npz").write_bytes(b"not an npz")
    named = r"recording_01\.cu3s#1 .*recording_01_001\.npz"
    with pytest.raises(DataError, match=named) as caught:
        train(trainrun, workers)
    assert "skip" not in str(caught.value)
    with pytest.raises(DataError, match=f"{named}.*Training does not skip frames.*--without"):
        train(trainrun, workers, scaling={"on_error": "skip"})


def test_more_workers_than_the_cluster_has_are_refused(demo_trainrun, tmp_path):
    trainrun = initialized(demo_trainrun, tmp_path)
    with pytest.raises(ClusterError, match="40 training workers need 40 CPUs, the cluster has 3"):
        train(trainrun, 40)
