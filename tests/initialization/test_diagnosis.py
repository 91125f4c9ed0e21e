"""A fit that went wrong says so, in words and numbers; a sound one says nothing."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest
import torch
from archives import real_scene, statistical_trainrun

from cuvis_dist import Scaling, StatisticalTrainer
from cuvis_dist.initialization.diagnosis import Finding, diagnose

pytestmark = pytest.mark.usefixtures("ray_session")

BANDS = 12
WAVELENGTHS = 450 + 10 * np.arange(BANDS)
DATA = ("data", "data.LentilsAnomalyDataNode", {"normal_class_ids": [0]})
NORMALIZER = ("normalizer", "normalization.MinMaxNormalizer", {})
LOGIT = ("logit", "conversion.ScoreToLogit", {})


def rx(eps=1e-6):
    return ("rx", "anomaly.rx_detector.RXGlobal", {"num_channels": BANDS, "eps": eps})


def noise(frames=4, height=8, width=10, seed=0):
    """Frames of spectra whose bands are independent, around a mean that is no power of two."""
    rng = np.random.default_rng(seed)
    return rng.normal(0.3, 0.1, (frames, height, width, BANDS)).astype(np.float32)


def write_archive(folder, cubes):
    folder.mkdir(exist_ok=True)
    with open(folder / "universe.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["source", "index", "materialized_path"])
        for i, cube in enumerate(cubes):
            mask = np.zeros(cube.shape[:2], np.int32)
            arrays = {"cube": cube, "mask": mask, "class_mask": mask.astype(np.uint8)}
            np.savez(folder / f"{i}.npz", **arrays, wavelengths=WAVELENGTHS.astype(np.int32))
            rows.writerow(["noise.cu3s", i, f"{i}.npz"])
    return folder / "universe.csv"


def fitted(tmp_path, cubes, *nodes, chain=None):
    """Fit nodes, fed by the cube or one by another as ``chain`` says; return trainer and nodes."""
    universe = cubes if not isinstance(cubes, np.ndarray) else write_archive(tmp_path / "a", cubes)
    ports = {"ScoreToLogit": "scores", "UnitVarianceScaling": "cube"}
    outputs = {"normalizer": "normalized", "rx": "scores", "pca": "projected"}
    edges = []
    for name, class_name, _ in nodes:
        source = (chain or {}).get(name)
        start = f"{source}.outputs.{outputs[source]}" if source else "data.outputs.cube"
        edges.append((start, f"{name}.inputs.{ports.get(class_name.split('.')[-1], 'data')}"))
    run = statistical_trainrun(tmp_path, universe, [DATA, *nodes], edges)
    trainer = StatisticalTrainer(
        run.pipeline, run.datamodule(), scaling=Scaling(resources={"workers": 2})
    )
    trainer.fit()
    return trainer, {node.name: node for node in run.pipeline.nodes()}


GUIDE = {"rx": "normalizer", "logit": "rx"}


def messages(findings, node):
    return [finding.message for finding in findings if finding.node == node]


def only(findings, node):
    (message,) = messages(findings, node)
    return message


def test_a_sound_fit_has_no_findings(tmp_path):
    nodes = [
        NORMALIZER,
        rx(),
        LOGIT,
        ("selector", "channel_selector.SoftChannelSelector",
         {"n_select": 3, "input_channels": BANDS, "init_method": "variance"}),
        ("zscore", "anomaly.deep_svdd.ZScoreNormalizerGlobal", {"num_channels": BANDS}),
        ("unit", "pretreatments.scaling.UnitVarianceScaling", {}),
        ("lad", "anomaly.lad_detector.LADGlobal", {"num_channels": BANDS}),
        ("pca", "dimensionality_reduction.TrainablePCA",
         {"num_channels": BANDS, "n_components": BANDS}),
        ("percentile", "normalization.PercentileNormalizer",
         {"n_channels": BANDS, "norm_mode": "statistical"}),
    ]  # fmt: skip
    trainer, _ = fitted(tmp_path, noise(), *nodes, chain=GUIDE)
    assert {name for record in trainer.records for name in record.nodes} == {n[0] for n in nodes}
    assert trainer.diagnose() == []


@pytest.mark.parametrize("eps", [1e-6, 0.02])
def test_the_expected_mean_score_knows_of_eps(tmp_path, eps):
    """The mean is C (n - 1) / n without eps and far below with a large one: both are sound."""
    trainer, nodes = fitted(tmp_path, noise(), rx(eps), LOGIT, chain={"logit": "rx"})
    pixels = noise().reshape(-1, BANDS).astype(np.float64)
    S = np.cov(pixels.T)
    n = len(pixels)
    expected = np.trace(S @ np.linalg.inv(S + eps * np.eye(BANDS))) * (n - 1) / n
    assert float(nodes["logit"]._welford.mean) == pytest.approx(expected, rel=1e-4)
    assert (expected < 0.5 * BANDS) == (eps > 0.01)
    assert trainer.diagnose() == []


def test_scores_of_other_pixels_are_noticed(tmp_path):
    trainer, nodes = fitted(tmp_path, noise(), rx(), LOGIT, chain={"logit": "rx"})
    other = torch.as_tensor(1.5 * noise(seed=1))
    scores = nodes["rx"].forward(data=other)["scores"]
    nodes["logit"].statistical_initialization(iter([{"scores": scores}]))
    (finding,) = trainer.diagnose()
    assert finding.node == "logit"
    assert f"the mean score is {float(scores.mean()):.4g}, where 11.96 is" in finding.message
    assert "not the scores of the pixels that it was fitted on" in finding.message


def test_constant_bands_are_named_by_every_node_that_sees_them(tmp_path):
    cubes = noise()
    cubes[..., 3] = 0.3
    nodes = [
        rx(),
        ("selector", "channel_selector.SoftChannelSelector",
         {"n_select": 3, "input_channels": BANDS, "init_method": "variance"}),
        ("zscore", "anomaly.deep_svdd.ZScoreNormalizerGlobal", {"num_channels": BANDS}),
        ("unit", "pretreatments.scaling.UnitVarianceScaling", {}),
        ("percentile", "normalization.PercentileNormalizer",
         {"n_channels": BANDS, "norm_mode": "statistical"}),
    ]  # fmt: skip
    trainer, _ = fitted(tmp_path, cubes, *nodes)
    findings = trainer.diagnose()
    assert [finding.node for finding in findings] == [name for name, _, _ in nodes]
    for name in ("rx", "selector", "zscore", "unit"):
        assert only(findings, name).startswith("constant over the train split: band 3 (480 nm); ")
    assert "a range of zero width at band 3 (480 nm)" in only(findings, "percentile")
    assert "both 0.3," in only(findings, "percentile")


@pytest.mark.parametrize(("scale", "eps"), [(1, 1e-6), (-0.5, 1e-6), (4000, 1e-6), (1, 0.0)])
def test_duplicate_bands_are_named_in_pairs(tmp_path, scale, eps):
    """Also inverted or scaled copies, and beside a band that is only much alike."""
    cubes = noise()
    cubes[..., 7] = 0.1 + scale * cubes[..., 2]
    cubes[..., 9] = cubes[..., 4] + 0.005 * (cubes[..., 9] - 0.3)  # correlation 1 - 1.2e-5
    trainer, _ = fitted(tmp_path, cubes, rx(eps))
    named = [m for m in messages(trainer.diagnose(), "rx") if m.startswith("duplicate")]
    assert named == [
        "duplicate bands (|correlation| above 1 - 1e-6): band 2 (470 nm) = band 7 (520 nm). "
        "Keep one of each"
    ]


def test_a_band_is_named_by_its_wavelength_only_where_bands_are_kept(tmp_path):
    """Behind a projection, component 0 is not the band of the first wavelength."""
    cubes = noise()
    cubes[..., 7] = cubes[..., 2]
    pca = ("pca", "dimensionality_reduction.TrainablePCA",
           {"num_channels": BANDS, "n_components": BANDS})  # fmt: skip
    zscore = ("zscore", "anomaly.deep_svdd.ZScoreNormalizerGlobal", {"num_channels": BANDS})
    trainer, _ = fitted(tmp_path, cubes, pca, zscore, rx(), chain={"zscore": "pca"})
    findings = trainer.diagnose()
    assert "the last 1 of 12 components have no variance" in only(findings, "pca")
    assert "Use 11 components or fewer" in only(findings, "pca")
    assert "band 2 (470 nm) = band 7 (520 nm)" in messages(findings, "rx")[0]
    without = diagnose(trainer.pipeline, trainer.records)
    assert "band 2 = band 7" in messages(without, "rx")[0]


def test_a_constant_component_has_no_wavelength(tmp_path):
    cubes = noise()
    cubes[..., 3:] = 0  # components 3 to 11 are exactly zero
    pca = ("pca", "dimensionality_reduction.TrainablePCA",
           {"num_channels": BANDS, "n_components": BANDS})  # fmt: skip
    zscore = ("zscore", "anomaly.deep_svdd.ZScoreNormalizerGlobal", {"num_channels": BANDS})
    trainer, _ = fitted(tmp_path, cubes, pca, zscore, chain={"zscore": "pca"})
    message = only(trainer.diagnose(), "zscore")
    assert "band 3, band 4, band 5, band 6, band 7 and 4 more; they are divided by eps" in message


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (3, 4, "fitted on 12 pixels for 12 bands: the covariance of fewer pixels than bands + 1"),
        (2, 7, "fitted on 14 pixels for 12 bands: the inverse covariance, and so distances"),
        (4, 5, "fitted on 20 pixels for 12 bands: the inverse covariance, and so distances"),
        (8, 15, None),
    ],
)
def test_too_few_pixels(tmp_path, height, width, message):
    trainer, _ = fitted(tmp_path, noise(1, height, width), rx(1e-4))
    found = messages(trainer.diagnose(), "rx")
    assert [m for m in found if m.startswith("fitted on")] == found[: message is not None]
    if message:
        assert found[0].startswith(message)
        assert ("come out about 3.2 times too large" in found[0]) == (height * width == 20)
        assert "Use at least 120 pixels" in found[0]


def test_the_factor_for_few_pixels_is_what_new_pixels_show():
    """Mean distance of new Gaussian pixels over that of the fit's own, 20 pixels of 12 bands."""
    rng = np.random.default_rng(0)
    factors = []
    for _ in range(4000):
        x = rng.normal(size=(20, 12))
        S = np.cov(x.T)
        factors.append(np.trace(np.linalg.inv(S)) / 12)  # E of a new pixel, Σ = I, over C
    assert np.mean(factors) == pytest.approx(19 / 6, rel=0.05)


@pytest.mark.parametrize(("part", "beyond"), [(1e-3, False), (1e-5, True)])
def test_a_near_singular_covariance_gives_its_condition_and_an_eps_that_would_do(
    tmp_path, part, beyond
):
    """The condition number is right, the scores show what is lost, and the advice works."""
    cubes = noise(frames=8)
    others = [i for i in range(BANDS) if i != 5]
    cubes[..., 5] = cubes[..., others].mean(axis=-1) + part * (cubes[..., 5] - 0.3)
    trainer, nodes = fitted(tmp_path, cubes, rx(1e-12), LOGIT, chain={"logit": "rx"})
    findings = trainer.diagnose()
    message = messages(findings, "rx")[0]
    exact = np.linalg.cond(np.cov(cubes.reshape(-1, BANDS).astype(np.float64).T))
    stated = re.search(r"condition number is (above )?(\S+),", message)
    assert bool(stated[1]) == beyond
    assert float(stated[2]) < exact if beyond else float(stated[2]) == pytest.approx(exact, rel=0.1)
    assert "float32 can invert up to 7.0e+05 for 12 bands" in message
    stated = re.search(r"its inverse has a relative error of (\S+) and leaves out about 1", message)
    held, inverse = (nodes["rx"].state_dict()[n].double() for n in ("cov", "cov_inv"))
    error = np.linalg.norm(np.eye(BANDS) - held.numpy() @ inverse.numpy(), 2)
    assert float(stated[1]) == pytest.approx(error, rel=0.05)
    assert error > 0.9, "of a direction that is left out, everything"
    assert float(nodes["logit"]._welford.mean) == pytest.approx(11 * 639 / 640, rel=1e-3)
    if not beyond:  # else the rounded covariance does not tell 11 from 12
        assert "the mean score is 10.98, where 11.98 is" in only(findings, "logit")
        assert "its float32 inverse leaves out the rest" in only(findings, "logit")

    enough = float(re.search(r"larger eps \((\S+) instead", message)[1])
    trainer, _ = fitted(tmp_path, cubes, rx(enough), LOGIT, chain={"logit": "rx"})
    assert trainer.diagnose() == []


def test_a_range_of_zero_width(tmp_path):
    trainer, _ = fitted(tmp_path, np.full((3, 4, 5, BANDS), 7, np.float32), NORMALIZER)
    (finding,) = trainer.diagnose()
    assert str(finding).startswith(
        "normalizer: a range of zero width: minimum and maximum are both 7, so normalized values"
    )


def test_a_streamed_node_is_looked_at_as_well(tmp_path):
    settings = {"max_initialization_frames": 2}
    streamed = ("normalizer", "normalization.MinMaxNormalizer", settings)
    trainer, _ = fitted(tmp_path, np.ones((3, 4, 5, BANDS), np.float32), streamed)
    assert trainer.records[0].nodes["normalizer"]["pixels"] is None
    assert [finding.node for finding in trainer.diagnose()] == ["normalizer"]


@pytest.mark.slow
@pytest.mark.parametrize("scene", ["lhdata", "abu-beach-2", "salinas-a", "muufl"])
def test_what_real_scenes_say(tmp_path, scene):
    """All have more bands than a float32 covariance of them can carry."""
    universe = real_scene(scene, tmp_path / "scene")
    channels = np.load(next(universe.parent.glob("*.npz")))["cube"].shape[-1]
    node = ("rx", "anomaly.rx_detector.RXGlobal", {"num_channels": channels})
    trainer, nodes = fitted(tmp_path, universe, NORMALIZER, node, LOGIT, chain=GUIDE)
    findings = trainer.diagnose()
    assert [finding.node for finding in findings] == ["rx", "logit"]
    condition = np.linalg.cond(nodes["rx"].cov.double().numpy())
    assert f"its condition number is {condition:.1e}," in only(findings, "rx")
    dropped = int(re.search(r"about (\d+) directions", only(findings, "rx"))[1])
    rank = int(torch.linalg.matrix_rank(nodes["rx"].cov.float()))
    assert abs(channels - rank - dropped) <= 1
    assert "its float32 inverse leaves out the rest" in only(findings, "logit")


def test_a_finding_prints_as_one_line():
    assert str(Finding("rx", "is bad")) == "rx: is bad"
