"""Evaluation and post-fit on all workers: upstream's results, every frame once."""

from __future__ import annotations

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import ray
import torch
from archives import assert_same_state
from cuvis_ai.node.monitor import TensorBoardMonitorNode
from cuvis_ai.node.normalization import PercentileNormalizer
from cuvis_ai_core.training.evaluation import TrainingCancelled, default_metric_nodes
from cuvis_ai_core.training.evaluation import evaluate_split as evaluate_upstream
from cuvis_ai_core.training.post_fit import EvaluationStatus, PostFitCallback, TrainHook
from cuvis_ai_schemas.enums import ExecutionStage
from cuvis_ai_schemas.execution import Context
from labelled import Count, LabelledModule, RunningMaximum, scoring_pipeline
from readings import counted
from torchmetrics import MaxMetric, MeanMetric, MinMaxMetric, PearsonCorrCoef, SumMetric
from torchmetrics.classification import (
    BinaryAUROC,
    BinaryAveragePrecision,
    BinaryF1Score,
    BinaryJaccardIndex,
)

from cuvis_dist import Scaling
from cuvis_dist.errors import DataError
from cuvis_dist.evaluation.cluster import MAX_PARTS, Split, cut_into_parts
from cuvis_dist.evaluation.merging import merge_pooled, mergeable
from cuvis_dist.evaluation.parts import EvaluatePart, Part
from cuvis_dist.evaluation.steps import Evaluator, failed_split
from cuvis_dist.execution.spread import Order

VAL = ExecutionStage.VAL


def in_one_process(pipeline, module, stage=VAL):
    """Upstream's own evaluation of the same pipeline, which it changes."""
    return evaluate_upstream(
        pipeline,
        module.val_dataloader(),
        stage=stage,
        metric_nodes=default_metric_nodes(pipeline),
    )


def on_workers(pipeline, module, workers=2, emit=lambda event: None, **options):
    evaluator = Evaluator(pipeline, module, Scaling(resources={"workers": workers}), emit)
    return evaluator.evaluate(VAL, default_metric_nodes(pipeline), **options)


def readings(folder):
    return counted(folder / "read.log")


def once():
    return Counter(dict.fromkeys(range(12), 1))


@pytest.mark.kernels
@pytest.mark.usefixtures("ray_session")
def test_any_number_of_workers_gives_what_one_process_does(tmp_path):
    """Pooled by sums, pooled by concatenation, and means over batches; the last one is small."""
    (tmp_path / "theirs").mkdir()
    pipeline = scoring_pipeline()
    expected = in_one_process(copy.deepcopy(pipeline), LabelledModule(tmp_path / "theirs"))
    assert expected.frames == 12
    assert {"anomaly/average_precision", "exact/exact_ap", "st/scores/std"} <= set(expected.metrics)
    assert expected.metrics["exact/batch_idx"] == 1, "batches 0, 1 and 2"

    results = []
    for workers in (0, 1, 2, 3, None):
        folder = tmp_path / str(workers)
        folder.mkdir()
        result = on_workers(copy.deepcopy(pipeline), LabelledModule(folder), workers)
        assert readings(folder) == once()
        results.append(result)
        assert result.frames == expected.frames
        assert result.metrics == pytest.approx(expected.metrics, abs=1e-6)
    assert all(result == results[0] for result in results), "not the same bits"

    # Batches cut otherwise are another evaluation: the split's own batches were kept.
    other = in_one_process(pipeline, LabelledModule(tmp_path / "theirs", batch_size=4))
    assert other.metrics["st/scores/max"] != pytest.approx(expected.metrics["st/scores/max"])
    assert other.metrics["exact/exact_ap"] == pytest.approx(expected.metrics["exact/exact_ap"])


@pytest.mark.usefixtures("ray_session")
def test_twice_and_with_another_sampler(tmp_path):
    """A second pass starts anew; the module's sampler decides who meets in a batch."""
    pipeline, module = scoring_pipeline(), LabelledModule(tmp_path)
    first = on_workers(pipeline, module)
    assert on_workers(pipeline, module) == first

    mixed = LabelledModule(tmp_path, sampler=[7, 0, 11, 4, 2, 9, 1, 10, 5, 3, 8, 6])
    expected = in_one_process(copy.deepcopy(pipeline), mixed)
    assert on_workers(pipeline, mixed).metrics == pytest.approx(expected.metrics, abs=1e-6)
    assert expected.metrics["st/scores/max"] != pytest.approx(first.metrics["st/scores/max"])


@pytest.mark.usefixtures("ray_session")
def test_progress_counts_every_frame(tmp_path):
    events = []
    on_workers(scoring_pipeline(), LabelledModule(tmp_path), 3, events.append)
    assert {(e.hook, e.split, e.progress.total) for e in events} == {
        (TrainHook.EVALUATION_PROGRESS, VAL, 12)
    }
    assert [e.progress.done for e in events] == [5, 10, 12]


@pytest.mark.usefixtures("ray_session")
def test_a_stop_ends_the_pass(tmp_path):
    flags = iter([False, True])
    with pytest.raises(TrainingCancelled):
        on_workers(
            scoring_pipeline(),
            LabelledModule(tmp_path),
            1,
            stop_event=SimpleNamespace(is_set=lambda: next(flags)),
        )
    assert set(readings(tmp_path)) <= set(range(10)), "the last batch was read all the same"


@pytest.mark.usefixtures("ray_session")
def test_a_killed_worker_is_replaced_and_nothing_counted_twice(tmp_path):
    pipeline = scoring_pipeline()
    (tmp_path / "well").mkdir()
    expected = in_one_process(
        copy.deepcopy(pipeline), LabelledModule(tmp_path / "well", batch_size=2)
    )
    killed = on_workers(pipeline, LabelledModule(tmp_path, batch_size=2, fragile=True))
    assert (tmp_path / "died").exists()
    assert killed.frames == 12
    assert killed.metrics == pytest.approx(expected.metrics, abs=1e-6)
    again = readings(tmp_path) - once()
    assert set(again) <= {6, 7}, "only the part of the killed worker may be read again"
    assert again[7]


# ---- bad frames and loaders ------------------------------------------------------------


@pytest.mark.usefixtures("ray_session")
def test_a_damaged_frame_is_named(tmp_path):
    module = LabelledModule(tmp_path)
    module.val_ds.damaged = 8
    with pytest.raises(DataError, match=r"field\.cu3s#8 \(frames/8\.npz\).*not a zip file"):
        on_workers(scoring_pipeline(), module)


@pytest.mark.usefixtures("ray_session")
def test_a_batch_that_the_pipeline_cannot_use_is_named(tmp_path):
    normalizer = PercentileNormalizer(7, norm_mode="statistical", name="normalizer")
    with pytest.raises(DataError, match=r"field\.cu3s#0 .*cannot be used.*expected 7 channels"):
        on_workers(scoring_pipeline(before=normalizer), LabelledModule(tmp_path))


@pytest.mark.usefixtures("ray_session")
def test_a_loader_that_leaves_frames_out_is_refused(tmp_path):
    module = LabelledModule(tmp_path, drop_last=True)
    with pytest.raises(DataError, match=r"val loader serves 10 of 12 frames.*drop_last"):
        on_workers(scoring_pipeline(), module)


# ---- what needs order or one process ---------------------------------------------------


def running(**settings):
    return scoring_pipeline(before=PercentileNormalizer(5, name="normalizer", **settings))


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("warmup", [0, 3])
def test_a_running_node_makes_the_frames_go_in_order(tmp_path, said, warmup):
    """Its state goes from part to part, and comes back."""
    ours = running(running_warmup_frames=warmup, freeze_running_bounds_after_frames=7)
    theirs = copy.deepcopy(ours)
    (tmp_path / "theirs").mkdir()
    expected = in_one_process(theirs, LabelledModule(tmp_path / "theirs", batch_size=2))
    result = on_workers(ours, LabelledModule(tmp_path, batch_size=2), 3)
    assert [line for line in said if "normalizer changes with every frame: val" in line]
    assert result.frames == 12
    assert result.metrics == pytest.approx(expected.metrics, abs=1e-6)
    assert_same_state(ours, theirs, 0)
    frames = {node.name: node for node in ours.nodes()}["normalizer"]._norm_frame_count
    assert int(frames) == 12


@pytest.mark.usefixtures("ray_session")
def test_a_node_that_counts_in_a_plain_attribute_makes_the_frames_go_in_order(tmp_path, said):
    """Nobody described it, and no tensor of its own changes: it is tried on the first part."""
    ours = scoring_pipeline(before=Count(name="count"))
    theirs = copy.deepcopy(ours)
    (tmp_path / "theirs").mkdir()
    expected = in_one_process(theirs, LabelledModule(tmp_path / "theirs", batch_size=2))
    result = on_workers(ours, LabelledModule(tmp_path, batch_size=2), 3)
    assert [line for line in said if "count changes with every frame: val" in line]
    assert result.metrics == pytest.approx(expected.metrics, abs=1e-6)
    seen = [next(n for n in p.nodes() if n.name == "count").seen for p in (ours, theirs)]
    assert seen[0] == pytest.approx(seen[1]) != 0


@pytest.mark.usefixtures("ray_session")
def test_a_part_can_be_repeated(tmp_path):
    """Also in the process that ran it before, where nodes changed."""
    archive = Split(LabelledModule(tmp_path), "val").archive
    keep = frozenset({("score", "scores")})
    fitted = ray.put(running(running_warmup_frames=0))
    order = Order(ray.put(archive), fitted, 1, skip=False, on_gpu=False, elsewhere=False)
    compute = EvaluatePart(order, [[3], [0, 1], [2]], ("anomaly",), keep, Context(VAL))
    rows = [row for _ in range(2) for row in compute(Part(0, 1, 3))]
    assert [row.frames for row in rows] == [3, 3]
    first, again = (row.payload for row in rows)
    assert set(first.changed) == {"normalizer"}
    for mine, other in zip(first.outputs, again.outputs, strict=True):
        assert mine.keys() == keep
        assert torch.equal(mine["score", "scores"], other["score", "scores"])


@pytest.mark.usefixtures("ray_session")
def test_a_metric_that_cannot_be_merged_is_computed_on_one_worker(tmp_path, said):
    pipeline = scoring_pipeline(exact=RunningMaximum)
    (tmp_path / "theirs").mkdir()
    expected = in_one_process(copy.deepcopy(pipeline), LabelledModule(tmp_path / "theirs"))
    result = on_workers(pipeline, LabelledModule(tmp_path), 3)
    assert result.metrics == pytest.approx(expected.metrics, abs=1e-6)
    assert readings(tmp_path) == once()
    assert [line for line in said if "on one worker: the MaxMetric of exact" in line]


@pytest.mark.usefixtures("ray_session")
def test_a_sink_keeps_the_frames_on_one_worker(tmp_path, said):
    pipeline = scoring_pipeline()
    monitor = TensorBoardMonitorNode(output_dir=str(tmp_path / "runs"), name="monitor")
    statistics = next(n for n in pipeline.nodes() if n.name == "st")
    pipeline.connect((statistics.outputs.metrics, monitor.inputs.metrics))
    assert on_workers(pipeline, LabelledModule(tmp_path), 3).frames == 12
    assert [line for line in said if "on one worker: monitor writes" in line]
    assert len(list((tmp_path / "runs").rglob("events.out.*"))) == 1


# ---- post-fit --------------------------------------------------------------------------


def calibrated(pipeline, module, workers=2, **options):
    events = []
    scaling = Scaling(resources={"workers": workers})
    evaluator = Evaluator(pipeline, module, scaling, events.append)
    return evaluator.post_fit(**options), events


def what(events):
    """What an event says, without the reports that hold the same twice."""
    return [(e.hook, e.split, e.progress, e.evaluation and e.evaluation.status) for e in events]


@pytest.mark.kernels
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("normalized", [False, True])
def test_post_fit_is_upstreams(tmp_path, normalized, workers):
    """Thresholds, metrics with them, statuses, events in order; also behind a running node."""
    (tmp_path / "theirs").mkdir()
    theirs = running() if normalized else scoring_pipeline()
    ours, expected_events = copy.deepcopy(theirs), []
    expected = PostFitCallback(emit=expected_events.append).run(
        theirs, LabelledModule(tmp_path / "theirs"), restore=False
    )
    assert expected.calibration.calibrated
    result, events = calibrated(ours, LabelledModule(tmp_path), workers)

    assert result.calibration == expected.calibration
    assert what(events) == what(expected_events)
    for split, outcome in expected.evaluations.items():
        assert outcome.status is EvaluationStatus.EVALUATED
        assert result.evaluations[split].frames == 12
        assert result.evaluations[split].metrics == pytest.approx(outcome.metrics, abs=1e-6)
    assert "anomaly/image_f1" in outcome.metrics, "the thresholds were not used"
    assert_same_state(ours, theirs, 0)
    deciders = [next(n for n in p.nodes() if n.name == "decider") for p in (ours, theirs)]
    assert deciders[0].hparams == deciders[1].hparams
    assert deciders[0].is_calibrated
    assert readings(tmp_path) == readings(tmp_path / "theirs")


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("workers", [0, 2])
def test_post_fit_records_what_fails_and_goes_on(tmp_path, workers):
    module = LabelledModule(tmp_path)
    module.val_ds = copy.copy(module.val_ds)
    module.val_ds.damaged = 3
    module.test_dataloader = lambda: LabelledModule(tmp_path).val_dataloader()
    result, events = calibrated(scoring_pipeline(), module, workers)
    assert not result.calibration.calibrated
    assert "field.cu3s#3 (frames/3.npz)" in result.calibration.phase_detail
    assert result.evaluations["val"].status is EvaluationStatus.FAILED
    assert "field.cu3s#3 (frames/3.npz)" in failed_split(result)
    assert result.evaluations["test"].frames == 12
    assert events[-1].hook is TrainHook.POST_FIT_END


@pytest.mark.usefixtures("ray_session")
def test_post_fit_without_splits(tmp_path):
    module = LabelledModule(tmp_path)
    module.val_ds = module.test_ds = None
    result, _ = calibrated(scoring_pipeline(), module)
    assert {o.status for o in result.evaluations.values()} == {EvaluationStatus.NO_SPLIT}
    assert result.calibration.reason == "no val split"
    assert failed_split(result) is None


# ---- merging, without Ray --------------------------------------------------------------


class Holder(torch.nn.Module):
    """As much of a metric node as merging looks at."""

    POOLED_METRIC_NAMES = frozenset({"metric"})

    def __init__(self, metric):
        super().__init__()
        self.metric = metric

    def pooled_metrics(self):
        return {"metric": self.metric} if self.metric.update_called else {}


@pytest.mark.parametrize(
    "metric",
    [
        BinaryAveragePrecision(thresholds=50),
        BinaryAveragePrecision(),
        BinaryAUROC(),
        BinaryF1Score(),
        BinaryJaccardIndex(),
        SumMetric(),
        MeanMetric(),
    ],
    ids=lambda metric: type(metric).__name__,
)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=["all used", "the last unused"])
def test_merged_metrics_are_those_of_one_pass(metric, order):
    assert mergeable(metric)
    rng = torch.Generator().manual_seed(1)
    batches = [
        (torch.rand(n, generator=rng), torch.randint(0, 2, (n,), generator=rng)) for n in (9, 30, 4)
    ]
    arguments = [b[:1] if isinstance(metric, SumMetric | MeanMetric) else b for b in batches]
    if order[0] == 2:
        arguments[2] = None
    one, parts = copy.deepcopy(metric), []
    for argument in arguments:
        part = copy.deepcopy(metric)
        if argument is not None:
            one.update(*argument)
            part(*argument)
            part.compute()  # as nodes do for their running value, which is remembered
        parts.append({"node": Holder(part)})
    merged = Holder(copy.deepcopy(metric))
    merge_pooled({"node": merged}, parts)
    assert merged.metric.update_count == one.update_count
    assert float(merged.metric.compute()) == pytest.approx(float(one.compute()), abs=1e-6)
    for name, state in one.metric_state.items():
        mine = merged.metric.metric_state[name]
        if isinstance(state, list):
            assert torch.equal(torch.cat(mine), torch.cat(state)), "not in the order of batches"


@pytest.mark.parametrize(
    "metric", [MaxMetric(), PearsonCorrCoef(), MinMaxMetric(SumMetric())], ids=str
)
def test_metrics_that_do_not_add_up_are_known(metric):
    assert not mergeable(metric)


@pytest.mark.parametrize("n", [0, 1, 7, MAX_PARTS, MAX_PARTS + 1, 10 * MAX_PARTS + 3])
def test_parts_are_few_even_and_in_order(n):
    cuts = cut_into_parts(n)
    assert [i for cut in cuts for i in range(cut.start, cut.stop)] == list(range(n))
    assert [cut.ordinal for cut in cuts] == list(range(min(n, MAX_PARTS)))
    lengths = {cut.stop - cut.start for cut in cuts}
    assert not cuts or max(lengths) - min(lengths) <= 1
