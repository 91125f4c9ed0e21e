"""Later levels on a sample of pixels: one reading, honest errors. No Ray, but for one test."""

from __future__ import annotations

import functools
from pathlib import Path

import cuvis_ai
import numpy as np
import pytest
import torch
from archives import assert_same_state, buffers_sha256, edit
from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.clustering.kmeans import KMeansClusterer
from cuvis_ai.node.conversion import ScoreToLogit
from cuvis_ai.node.data import CU3SDataNode
from cuvis_ai.node.dimensionality_reduction import TrainablePCA
from cuvis_ai.node.normalization import MinMaxNormalizer, PerPixelUnitNorm, SigmoidTransform
from cuvis_ai.node.preprocessors import BandpassByWavelength
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.factory import PipelineBuilder
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.post_fit import TrainHook
from cuvis_ai_schemas.enums import NodeCategory, NodeTag
from cuvis_ai_schemas.pipeline import PipelineConfig, PortSpec
from readings import CountedCubes, Wrapped, counted, wrap_train
from settings import scaling_of

from cuvis_dist import StatisticalTrainer
from cuvis_dist.archive import open_archive
from cuvis_dist.cli import main
from cuvis_dist.demo import DemoSettings, write_demo
from cuvis_dist.errors import DataError
from cuvis_dist.initialization.diagnosis import unlikely_mean
from cuvis_dist.initialization.kept_pass import PASSES
from cuvis_dist.initialization.levels import planned
from cuvis_dist.nodes.catalogue import NodeFacts
from cuvis_dist.runs.trainrun import load_trainrun

SAMPLED = scaling_of(later_levels="sampled").measuring


def fit(trainrun, pipeline=None, wrapper=None, folder=None, emit=None, **settings):
    """Fit in this process; return the pipeline, its trainer and the log of frames."""
    run = load_trainrun(trainrun)
    pipeline, module = pipeline or run.pipeline, run.datamodule()
    if wrapper:
        wrap_train(module, wrapper)
    settings = {"workers": 0, "later_levels": "sampled"} | settings
    options = {"output_dir": folder} if folder else {}
    trainer = StatisticalTrainer(
        pipeline, module, emit=emit, scaling=scaling_of(**settings), **options
    )
    trainer.fit(resume=folder is not None)
    return pipeline, trainer


def head(trainer):
    """What the record says of the score head."""
    return trainer.records[-1].nodes["logit_head"]


# ---- the plan --------------------------------------------------------------------------


def linked(*edges):
    pipeline = CuvisPipeline("p")
    pipeline.connect(*edges)
    return pipeline


def read_again(pipeline):
    """Per pass, what is fitted on a sample, and what is read again and why."""
    return [
        (
            [node.name for level in step.later for node in level.nodes],
            {fit.node.name: fit.again for fit in step.fits if fit.again},
        )
        for step in planned(pipeline, SAMPLED)
    ]


def scored(*between, name="head"):
    """RX, whatever comes between, and a head."""
    data, rx, last = CU3SDataNode(name="data"), RXGlobal(4, name="rx"), ScoreToLogit(name=name)
    edges, port = [(data.outputs.cube, rx.inputs.data)], rx.outputs.scores
    for node in between:
        edges.append((port, getattr(node.inputs, next(iter(node.INPUT_SPECS)))))
        port = getattr(node.outputs, next(iter(node.OUTPUT_SPECS)))
    return linked(*edges, (port, last.inputs.scores))


@pytest.mark.parametrize("fold", [True, False])
def test_the_guides_pipeline_needs_one_reading(demo_trainrun, fold):
    pipeline = load_trainrun(demo_trainrun).pipeline
    (only,) = planned(pipeline, SAMPLED.model_copy(update={"fold": fold}))
    assert [node.name for node in only.nodes] == [
        "normalizer", "selector", "rx_detector", "logit_head",
    ]  # fmt: skip
    assert [[n.name for n in level.nodes] for level in only.later][-1] == ["logit_head"]
    assert len(only.later) == (1 if fold else 3)


def test_what_a_sample_cannot_say_is_read_again():
    data, pca = CU3SDataNode(name="data"), TrainablePCA(num_channels=4, n_components=2, name="pca")
    unit = PerPixelUnitNorm(name="unit")
    low, clusters = MinMaxNormalizer(name="low"), KMeansClusterer(n_clusters=2, name="clusters")
    rx = RXGlobal(2, name="rx")
    pipeline = linked(
        (data.outputs.cube, pca.inputs.data),
        (pca.outputs.projected, unit.inputs.data),
        (unit.outputs.normalized, low.inputs.data),
        (unit.outputs.normalized, clusters.inputs.cube),
        (low.outputs.normalized, rx.inputs.data),
    )
    first, second = read_again(pipeline)
    assert first == ([], {})
    assert second == (
        [],
        {
            "low": "no standard error can be given for Extrema of a sample",
            "clusters": "no standard error can be given for PixelSample of a sample",
            "rx": "low is fitted by a later reading",
        },
    )


def test_the_catalogs_deep_svdd_pipeline_needs_one_reading():
    path = Path(cuvis_ai.__file__).parent / "configs/pipeline/anomaly/deep_svdd/deep_svdd.yaml"
    pipeline = PipelineBuilder().build_from_config(PipelineConfig.load_from_file(path).to_dict())
    assert read_again(pipeline) == [(["DeepSVDDCenterTracker"], {})]


def test_a_node_that_mixes_pixels_needs_another_reading():
    assert read_again(scored()) == [(["head"], {})]
    assert read_again(scored(SigmoidTransform(name="mixes"))) == [
        ([], {}),
        ([], {"head": "mixes does not map each pixel by itself"}),
    ]


# ---- what is fitted --------------------------------------------------------------------


def test_one_reading_and_a_head_within_its_errors(demo_trainrun, tmp_path):
    exact, _ = fit(demo_trainrun, later_levels="exact")
    pipeline, trainer = fit(
        demo_trainrun,
        wrapper=functools.partial(CountedCubes, log=tmp_path / "log"),
        sample_pixels=1024,
    )
    frames = len(load_trainrun(demo_trainrun).datamodule().train_ds)
    readings = counted(tmp_path / "log")
    assert set(readings) == set(range(frames))
    assert readings.total() == frames, "once each"
    (record,) = trainer.records
    assert (record.frames, head(trainer)["pixels"]) == (frames, 1024)
    said = head(trainer)["sampled"]
    assert (said["of"], said["given"]) == (frames * 320, [])
    assert_same_state_but("logit_head", pipeline, exact)
    assert trainer.diagnose() == []


def assert_same_state_but(name, ours, theirs):
    for mine, other in zip(ours.nodes(), theirs.nodes(), strict=True):
        if mine.name != name:
            for key, value in other.state_dict().items():
                assert torch.equal(mine.state_dict()[key], value), (mine.name, key)


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """An archive of 40,960 train pixels, of which few are anomalies."""
    settings = DemoSettings(frames=22, height=64, width=64, bands=12, recordings=3, max_epochs=1)
    return write_demo(tmp_path_factory.mktemp("larger"), settings)


def test_the_stated_errors_hold_for_90_of_100_seeds(larger):
    """And are not too large: of the errors in units of the stated ones, the square is about 1."""
    run = load_trainrun(larger)
    module, named = run.datamodule(), {node.name: node for node in run.pipeline.nodes()}

    def bias(**settings):
        scaling = scaling_of(workers=0, sample_pixels=8192, **settings)
        trainer = StatisticalTrainer(run.pipeline, module, scaling=scaling)
        trainer.fit()
        return float(named["logit_head"].bias), head(trainer).get("sampled")

    exact, _ = bias(later_levels="exact")
    off: dict[str, list[float]] = {"bias": [], "mean": []}
    for seed in range(100):
        value, said = bias(later_levels="sampled", sample_seed=seed)
        errors, known = said["standard_errors"], said["check"]
        assert errors["bias"]["value"] == pytest.approx(value)
        off["bias"].append((value - exact) / errors["bias"]["standard_error"])
        off["mean"].append((known["mean"] - known["exact"]) / errors["mean"]["standard_error"])
    for name, each in off.items():
        units = torch.tensor(each)
        assert int((units.abs() <= 2).sum()) >= 90, name
        assert 0.75 <= float(units.square().mean().sqrt()) <= 1.3, name


@pytest.mark.parametrize("pixels", ["all", "unlabelled", "finite"])
def test_a_sample_of_all_pixels_is_an_exact_fit(demo, pixels):
    """The same pixels count: a sample that holds all of them gives what a reading gives."""
    if pixels == "finite":
        spoil(demo)
    exact, first = fit(demo, later_levels="exact", pixels=pixels)
    pipeline, trainer = fit(demo, pixels=pixels)
    assert head(trainer)["pixels"] == head(first)["pixels"]
    said = head(trainer)["sampled"]
    assert all(entry["standard_error"] == 0 for entry in said["standard_errors"].values())
    assert_same_state(pipeline, exact, 1e-6)
    if pixels != "finite":
        assert said["check"]["mean"] == pytest.approx(said["check"]["exact"], rel=1e-5)
        assert unlikely_mean(said) == []
    frames = len(load_trainrun(demo).datamodule().train_ds)
    assert (head(trainer)["pixels"] < 320 * frames) == (pixels != "all")


def spoil(trainrun):
    """Put a NaN into a few pixels of a train frame."""
    path = open_archive(load_trainrun(trainrun).datamodule(), "train").frames[2].path
    with np.load(path) as content:
        arrays = dict(content)
    arrays["cube"][3, 4:7, 1] = np.nan
    np.savez(path, **arrays)


def test_a_mean_that_cannot_be_is_told(demo_trainrun):
    _, trainer = fit(demo_trainrun, sample_pixels=1024)
    head(trainer)["sampled"]["check"]["exact"] *= 1.5
    (finding,) = trainer.diagnose()
    assert finding.node == "logit_head"
    assert "and that of all pixels is " in finding.message


@NodeFacts(pixelwise=True)
class Root(Node):
    """The square root of a score less something, which is NaN for small ones."""

    _category, _tags = NodeCategory.TRANSFORM, frozenset({NodeTag.TORCH})
    INPUT_SPECS = {"scores": PortSpec(dtype=torch.float32, shape=(-1, -1, -1, 1))}  # noqa: RUF012
    OUTPUT_SPECS = {"out": PortSpec(dtype=torch.float32, shape=(-1, -1, -1, 1))}  # noqa: RUF012

    def forward(self, scores, **_):
        return {"out": (scores - 8).sqrt()}


def rooted():
    return scored(Root(name="root"), name="logit_head")


def test_values_that_are_not_finite_are_found_and_named(demo_trainrun, warnings):
    with pytest.raises(DataError, match=r"frame .*npz.* not finite at logit_head\.scores"):
        fit(demo_trainrun, pipeline=rooted(), sample_pixels=1024)
    pipeline, trainer = fit(demo_trainrun, pipeline=rooted(), pixels="finite")
    exact, first = fit(demo_trainrun, pipeline=rooted(), pixels="finite", later_levels="exact")
    assert head(trainer)["pixels"] == head(first)["pixels"]
    assert_same_state(pipeline, exact, 1e-6)
    with pytest.raises(DataError, match="max_skipped"):  # all frames, in a reading of its own
        fit(demo_trainrun, pipeline=rooted(), on_error="skip", max_skipped=2)
    assert any("read again for logit_head: it may skip frames" in line for line in warnings)


def bandpassed():
    """A band selection by wavelengths, behind a node that is to be fitted."""
    data, low = CU3SDataNode(name="data"), MinMaxNormalizer(name="low")
    some = BandpassByWavelength(min_wavelength_nm=500, max_wavelength_nm=800, name="some")
    unit = PerPixelUnitNorm(name="unit")
    rx, last = RXGlobal(7, name="rx"), ScoreToLogit(name="logit_head")
    return linked(
        (data.outputs.cube, low.inputs.data),
        (low.outputs.normalized, some.inputs.data),
        (data.outputs.wavelengths, some.inputs.wavelengths),
        (some.outputs.filtered, unit.inputs.data),
        (unit.outputs.normalized, rx.inputs.data),
        (rx.outputs.scores, last.inputs.scores),
    )


def test_too_few_pixels_are_read_again(demo_trainrun, monkeypatch, warnings):
    monkeypatch.setattr("cuvis_dist.initialization.sampling.FEWEST", 2000)
    exact, _ = fit(demo_trainrun, later_levels="exact")
    pipeline, trainer = fit(demo_trainrun, sample_pixels=1024)
    assert [[*record.nodes][-1] for record in trainer.records] == ["rx_detector", "logit_head"]
    assert buffers_sha256(pipeline) == buffers_sha256(exact)
    assert "too few pixels of the sample count for standard errors" in warnings[-1]


class Shifted(Wrapped):
    """One frame has other wavelengths."""

    def __getitem__(self, index):
        item = dict(self.dataset[index])
        if index == 3:
            item["wavelengths"] = item["wavelengths"] + 1
        return item


class Thumbs(Wrapped):
    """Every frame has a small image beside the cube."""

    def __getitem__(self, index):
        return dict(self.dataset[index]) | {"thumb": torch.zeros(4, 5, 3)}


def test_what_belongs_to_a_frame_comes_along_where_it_is_the_same_for_all(demo_trainrun, warnings):
    exact, _ = fit(demo_trainrun, pipeline=bandpassed(), later_levels="exact")
    pipeline, trainer = fit(demo_trainrun, pipeline=bandpassed())
    assert len(trainer.records) == 1
    assert_same_state(pipeline, exact, 1e-4)  # of an inverse
    assert head(trainer)["sampled"]["given"] == ["rx"]
    assert "check" not in head(trainer)["sampled"], "RX itself was fitted on the sample"
    assert warnings == []
    for wrapper in (Shifted, Thumbs):
        _, trainer = fit(demo_trainrun, pipeline=bandpassed(), wrapper=wrapper)
        assert len(trainer.records) == 3, "a reading for each of the three levels"
        assert "the archive is read again for rx, logit_head" in warnings[-1]


# ---- the cluster, resume, the terminal -------------------------------------------------


@pytest.mark.usefixtures("ray_session")
def test_same_bits_for_any_number_of_workers(demo_trainrun):
    hashes = set()
    for workers, cpus in ((0, 1), (0, 3), (1, 1), (3, 1)):
        pipeline, trainer = fit(
            demo_trainrun, workers=workers, cpus_per_worker=cpus, sample_pixels=1024, shard_frames=1
        )
        hashes.add((buffers_sha256(pipeline), str(head(trainer))))
    assert len(hashes) == 1


def test_the_same_pixels_for_any_shards(demo_trainrun):
    """What is fitted differs by the last bits of the nodes before."""
    fitted = []
    for frames in (1, 3, 100):
        pipeline, trainer = fit(demo_trainrun, shard_frames=frames, sample_pixels=1024)
        fitted.append((pipeline, head(trainer)["sampled"]["standard_errors"]))
    for pipeline, errors in fitted[1:]:
        assert_same_state(pipeline, fitted[0][0], 1e-5)
        for name, entry in errors.items():
            assert entry == pytest.approx(fitted[0][1][name], rel=1e-4), name


@pytest.mark.parametrize("bytes_", [1 << 23, 1])
def test_a_pass_goes_on_with_what_it_has_kept(demo_trainrun, tmp_path, monkeypatch, bytes_):
    """In the state's own file, and in files beside it."""
    monkeypatch.setattr("cuvis_dist.initialization.measured._FILE_BYTES", bytes_)
    settings = {"sample_pixels": 1024, "shard_frames": 1, "save_seconds": 0}
    before = functools.partial(CountedCubes, log=tmp_path / "before")  # it has uids of its own
    undisturbed, first = fit(demo_trainrun, wrapper=before, **settings)

    def stop(event):
        if event.hook is TrainHook.STATISTICAL_PROGRESS and event.progress.done == 4:
            raise KeyboardInterrupt

    again = {"folder": tmp_path / "out"} | settings
    with pytest.raises(KeyboardInterrupt):
        fit(demo_trainrun, wrapper=before, emit=stop, **again)
    beside = [*(tmp_path / "out" / PASSES).glob("1.*.pixels")]
    assert (len(beside) > 1) == (bytes_ == 1)
    read = functools.partial(CountedCubes, log=tmp_path / "log")
    pipeline, trainer = fit(demo_trainrun, wrapper=read, **again)
    assert trainer.records[0].restored_frames == 4
    frames = len(load_trainrun(demo_trainrun).datamodule().train_ds)
    assert sorted(counted(tmp_path / "log")) == [*range(4, frames)]
    assert buffers_sha256(pipeline) == buffers_sha256(undisturbed)
    assert head(trainer) == head(first)
    _, trainer = fit(demo_trainrun, wrapper=read, **again)
    assert trainer.records[0].restored_frames == frames

    if beside:
        beside[0].write_bytes(b"something else")
        damaged, trainer = fit(demo_trainrun, wrapper=read, **again)
        assert trainer.records[0].restored_frames == 0
        assert buffers_sha256(damaged) == buffers_sha256(undisturbed)


def test_the_terminal_says_what_was_estimated(demo, capsys):
    edit(demo, lambda run: run.pop("training"))
    sampled = ["--set", "measuring.later_levels=sampled", "--set", "measuring.sample_pixels=1024"]
    assert main(["plan", str(demo), *sampled, "--calibrate"]) == 0
    plan = capsys.readouterr().out
    assert "pass 1: reads" in plan
    assert "pass 2" not in plan
    assert "logit_head: Moments(scores, diagonal=True), on a sample of at most 1024" in plan
    for _ in range(2):  # the second time it is done
        assert main(["init", str(demo), *sampled]) == 0
        said = capsys.readouterr().out
        assert "sampled  logit_head bias " in said
        assert "(1024 of 3200 pixels)" in said
