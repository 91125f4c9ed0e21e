"""Are contaminated frames of real scenes left out, and those that matter kept? AUC says it."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from archives import SCENES
from scipy.stats import rankdata

from cuvis_dist.statistics.bulk import bulk_of_frames


def scene(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels ``[100, 100, C]`` of a scene, and which are anomalous."""
    path = SCENES / "to_archive.py"
    if not path.exists():
        pytest.skip("the real scenes are not here")
    spec = importlib.util.spec_from_file_location("to_archive", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cube, mask, _ = module.SCENES[name]()
    return cube.astype(float), mask > 0


def strips(index, rng):
    return np.split(index, 20)


def blocks(index, rng):
    return [index[i : i + 20, j : j + 20] for i in range(0, 100, 20) for j in range(0, 100, 20)]


def columns_of_blocks(index, rng):
    cut = [index[i : i + 10, j : j + 10] for i in range(0, 100, 10) for j in range(0, 100, 10)]
    return [np.stack([cut[i] for i in some]) for some in rng.permutation(100).reshape(20, 5)]


def exchanged(pixels):
    pixels = pixels.copy()
    a, b = pixels.shape[1] // 4, 3 * pixels.shape[1] // 4
    pixels[:, [a, b]] = pixels[:, [b, a]]
    return pixels


KINDS = {
    "none": (lambda pixels: pixels, 0.0),
    "mirrored": (lambda pixels: pixels[:, ::-1], 0.3),
    "gain": (lambda pixels: 1.5 * pixels, 0.3),
    "exchanged": (exchanged, 0.3),
    "offset": (lambda pixels: pixels + 0.5 * pixels.mean(), 0.3),
    "saturated": (lambda pixels: np.minimum(pixels, np.quantile(pixels, 0.6)), 1.0),
}


def auc(moments, pixels, anomalous) -> float:
    """Return the AUC of global RX with the moments of some frames."""
    n = sum(count for count, _, _ in moments)
    mean = sum(count * of for count, of, _ in moments) / n
    square = sum(M2 + count * np.outer(of - mean, of - mean) for count, of, M2 in moments)
    apart = pixels - mean
    ridge = 1e-9 * np.trace(square) / len(mean) * np.eye(len(mean))
    scores = np.einsum("nc,nc->n", apart, np.linalg.solve(square + ridge, apart.T).T)
    ranks, k = rankdata(scores), anomalous.sum()
    return float((ranks[anomalous].sum() - k * (k + 1) / 2) / (k * (len(scores) - k)))


def measured(pixels):
    apart = pixels - pixels.mean(axis=0)
    return len(pixels), pixels.mean(axis=0), apart.T @ apart


@pytest.mark.parametrize("name", ["lhdata", "abu-beach-2"])
@pytest.mark.parametrize(
    "cut",
    [
        pytest.param(strips, marks=pytest.mark.slow),
        blocks,
        pytest.param(columns_of_blocks, marks=pytest.mark.slow),
    ],
)
def test_the_auc_on_the_rest_is_that_of_the_clean_fit(name, cut):
    cube, mask = scene(name)
    flat, anomalous = cube.reshape(-1, cube.shape[2]), mask.ravel()
    lost = {}
    for kind, (change, part) in KINDS.items():
        rng = np.random.default_rng(0)
        frames = [some.ravel() for some in cut(np.arange(10_000).reshape(100, 100), rng)]
        bad = rng.permutation(len(frames))[: len(frames) // 10] if part else []
        moments = []
        for i, some in enumerate(frames):
            pixels = flat[some]
            if i in bad:
                these = rng.random(len(pixels)) < part
                pixels[these] = change(pixels[these])
            moments.append(measured(pixels))
        found = bulk_of_frames(*map(np.stack, zip(*moments, strict=True)), keep=0.9)
        good = [i for i in range(len(frames)) if i not in bad]
        rest = np.concatenate([frames[i] for i in good])
        clean = auc([moments[i] for i in good], flat[rest], anomalous[rest])
        kept = auc([moments[i] for i in np.flatnonzero(found.kept)], flat[rest], anomalous[rest])
        lost[kind] = clean - kept
        if kind == "none":
            assert found.kept.all()
    assert max(lost.values()) < 0.002, lost
