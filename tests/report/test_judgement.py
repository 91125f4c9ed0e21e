"""Do curves and counts say what the scores do? Against scikit-learn and SciPy, without any run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from cuvis_dist.archive import Frame
from cuvis_dist.evaluation.seen import Counts, Look, Seen, colour_bands
from cuvis_dist.nodes.shown import Judged
from cuvis_dist.report.judgement import Scored, after, before, chi_squared
from cuvis_dist.report.rates import areas, curves

JUDGED = Judged(("rx", "scores"), ("head", "logits"), ("decider", "decisions"), ("data", "mask"), 5)


def scored(number: int = 5000) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    marked = random.random(number) < 0.1
    return (random.normal(size=number) + 1.5 * marked).astype(np.float32), marked


def test_counted_scores_are_close_to_what_was_counted():
    values = np.array([-3e38, -61.5, -1e-3, 0.0, 1e-30, 0.5, 1.0, 61.5, 3e38], np.float32)
    counts = Counts.of(values, np.zeros(len(values), bool))
    assert (np.diff(counts.keys) > 0).all()
    np.testing.assert_allclose(counts.scores, values, rtol=1 / 400, atol=1e-30)
    assert Counts.of(np.array([np.nan, 1.0], np.float32), np.zeros(2, bool)).counts.sum() == 1


def test_counts_merge_to_those_of_all():
    values, marked = scored()
    whole = Counts.of(values, marked)
    parts = [Counts.of(values[i::3], marked[i::3]) for i in range(3)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    np.testing.assert_array_equal(merged.keys, whole.keys)
    np.testing.assert_array_equal(merged.counts, whole.counts)


def test_areas_are_those_of_scikit_learn():
    values, marked = scored()
    counts = Counts.of(values, marked)
    part = {"counts": {"logits": {"scores": counts.scores, "counts": counts.counts}}}
    roc, precision = areas(curves(after(part, "logits")))
    assert roc == pytest.approx(roc_auc_score(marked, values), abs=1e-3)
    assert precision == pytest.approx(average_precision_score(marked, values), abs=5e-3)


def test_weights_stand_for_pixels():
    values, marked = scored()
    weights = np.where(marked, 1.0, 7.0)
    part = {"before": {"logits": values, "anomalous": marked, "weights": weights}}
    roc, precision = areas(curves(before(part, "logits")))
    assert roc == pytest.approx(roc_auc_score(marked, values, sample_weight=weights), abs=1e-6)
    expected = average_precision_score(marked, values, sample_weight=weights)
    assert precision == pytest.approx(expected, abs=1e-6)
    assert before({}, "logits") is None
    assert after({}, "logits") is None


def test_chi_squared_is_that_of_scipy():
    x = np.geomspace(1, 300, 50)
    np.testing.assert_allclose(chi_squared(x, 61), stats.chi2(61).pdf(x), rtol=1e-9)


def test_one_score_for_all_makes_curves_too():
    rates = curves(Scored(np.array([1.0]), np.array([5.0]), np.array([2.0])))
    assert areas(rates)[0] == pytest.approx(0.5)


def frame_of(position: int, height: int = 20, width: int = 150) -> tuple[dict, dict]:
    """Return a batch of one frame, of which one pixel more is decided wrongly than before it."""
    cube = torch.rand(1, height, width, 5)
    mask = torch.zeros(1, height, width, 1, dtype=torch.int32)
    mask[0, :2, :2] = position % 2
    decisions = mask.bool().clone()
    decisions[0, -1, : position + 1] = True
    logits = decisions.float() * 4 - 2
    outputs = {
        ("rx", "scores"): cube.sum(-1, keepdim=True),
        ("head", "logits"): logits,
        ("decider", "decisions"): decisions,
        ("data", "mask"): mask,
    }
    return {"cube": cube, "wavelengths": torch.linspace(400, 900, 5)[None]}, outputs


def test_the_worst_the_median_and_those_with_anomalies_are_kept():
    look, seen = Look(JUDGED, 101), Seen()
    for position in range(101):
        batch, outputs = frame_of(position)
        frame = Frame(f"a#{position}", "a", "a")
        seen.merge(look.batch(batch, outputs, [frame], [position]))
    assert (seen.frames, seen.annotated, len(seen.wrong)) == (101, True, 101)
    assert [picture.uid for picture in seen.pictures[:4]] == [f"a#{i}" for i in (100, 99, 98, 97)]
    assert "a#50" in {picture.uid for picture in seen.pictures}
    assert len(seen.pictures) <= 56
    picture = seen.pictures[0]
    assert picture.scores.shape == picture.decided.shape == picture.colours.shape[:2] == (10, 75)
    assert seen.counts["logits"].counts.sum() == 101 * 20 * 150
    assert seen.counts["logits"].counts[:, 1].sum() == 50 * 4
    weights = sum(pixels.weights.sum() for pixels in seen.pixels)
    assert weights == pytest.approx(101 * 20 * 150)
    assert sum(len(pixels.weights) for pixels in seen.pixels) < 40_000


def test_what_is_not_there_is_not_seen():
    _, outputs = frame_of(1)
    little = {("head", "logits"): outputs[("head", "logits")]}
    seen = Look(JUDGED, 1).batch({}, little, [Frame("a#0", "a", "a")], [0])
    assert (seen.annotated, seen.pixels, seen.wavelengths) == (False, [], None)
    assert seen.pictures[0].colours is None
    assert seen.pictures[0].decided is None


def test_a_large_split_gives_no_larger_sample():
    look = Look(JUDGED, 1_000_000)
    number = 0
    for position in (0, 1, 500):
        batch, outputs = frame_of(position)
        seen = look.batch(batch, outputs, [Frame("a", "a", "a")], [position])
        number += sum(len(pixels.weights) for pixels in seen.pixels)
    assert number * 1_000_000 / 3 < 4_000_000


def test_colours_are_red_green_and_blue_where_wavelengths_are_known():
    assert colour_bands(61, np.linspace(430, 910, 61)) == (27, 15, 4)
    assert colour_bands(8, None) == (6, 3, 1)
    assert colour_bands(1, None) == (0, 0, 0)
