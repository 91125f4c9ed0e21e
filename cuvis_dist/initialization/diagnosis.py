"""Does a fitted pipeline look sound?

The answer comes from what the nodes froze and what phase 1 counted, in float64; the archive is
not read again. A finding advises and stops nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cuvis_ai.node.anomaly.deep_svdd import ZScoreNormalizerGlobal
from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.channel_selector import SoftChannelSelector
from cuvis_ai.node.conversion import ScoreToLogit
from cuvis_ai.node.data import CU3SDataNode
from cuvis_ai.node.dimensionality_reduction import TrainablePCA
from cuvis_ai.node.normalization import MinMaxNormalizer, PercentileNormalizer
from cuvis_ai.node.pretreatments.scaling import MeanCenter, UnitVarianceScaling
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from torch import Tensor

from cuvis_dist.initialization.passes import PassRecord
from cuvis_dist.nodes.upstream import accumulated_mean, edges_into, nodes_before, topological_order

#: Spacing of float32 at 1: nodes freeze in float32, with half of this as relative rounding.
_EPS32 = torch.finfo(torch.float32).eps
#: More correlated bands are one band. Rounding a covariance to float32 moves a correlation by 2e-7;
#: the closest distinct bands of an AVIRIS scene (abu-beach-2) have 1 - 7.5e-6.
_DUPLICATE = 1 - 1e-6
#: With fewer pixels per band, distances of new pixels come out 11 % too large or more (Anderson,
#: see :func:`_few_pixels`).
_PIXELS_PER_BAND = 10
#: Relative. Rounding moves the mean score by 1 / (2 C) at most (0.8 % for 61 bands) while float32
#: can invert the covariance; what it may move it by beyond that is allowed for separately.
_MEAN_SCORE = 0.05
#: In float32, log(variance + eps) shows a variance down to about this part of eps.
_LOG_VARIANCE = 1e-5
#: Bands, or pairs of bands, that one message lists.
_LISTED = 5
#: Nodes whose output bands are their input bands, so that a wavelength still names one.
_KEEPS_BANDS = (
    CU3SDataNode, MeanCenter, MinMaxNormalizer, PercentileNormalizer, SoftChannelSelector,
    UnitVarianceScaling, ZScoreNormalizerGlobal,
)  # fmt: skip

Band = Callable[[int, int], str]
"""Names the band of an index, given the number of bands: ``band 3 (462 nm)``."""


@dataclass(frozen=True)
class Finding:
    """What a person should look at: the name of a node, and what was found, means and helps."""

    node: str
    message: str

    def __str__(self) -> str:
        return f"{self.node}: {self.message}"


def diagnose(
    pipeline: CuvisPipeline,
    records: Sequence[PassRecord],
    wavelengths: Callable[[], Any] = lambda: None,
) -> list[Finding]:
    """Return what looks bad about the nodes that phase 1 fitted.

    Parameters
    ----------
    pipeline : CuvisPipeline
        As phase 1 left it.
    records : sequence of PassRecord
        Of its passes: which nodes it fitted, on how many pixels.
    wavelengths : callable, optional
        Returns the wavelengths in nm (``[C]`` or ``[1, C]``), or None. It is called at most
        once, and only when a band is to be named.

    Returns
    -------
    list of Finding
        In the order of the nodes; empty when the fit looks sound.
    """
    pixels = {name: fit["pixels"] for record in records for name, fit in record.nodes.items()}
    wavelengths = functools.cache(wavelengths)
    findings = []
    for node in topological_order(pipeline):
        if node.name not in pixels:
            continue
        band = functools.partial(_band, pipeline, node, wavelengths)
        messages = list(check(node, pixels[node.name], band))
        for source, _, _ in edges_into(pipeline, node):
            if isinstance(node, ScoreToLogit) and isinstance(source, RXGlobal):
                messages += check_scores(node, source, pixels.get(source.name))
        findings += [Finding(node.name, message) for message in messages]
    return findings


@functools.singledispatch
def check(node: Node, pixels: int | None, band: Band) -> Iterator[str]:
    """Yield a message for each thing that looks bad about a fitted node.

    Registered per node class; other nodes are looked at for bounds of zero width. ``pixels`` is
    how many the node was fitted on, None where it was streamed.
    """
    low, high = getattr(node, "running_min", None), getattr(node, "running_max", None)
    if not isinstance(low, Tensor) or not isinstance(high, Tensor):
        return
    empty = (_float64(high) - _float64(low)).flatten() == 0
    if bool(empty.any()):
        yield (
            f"a range of zero width{f' at {_bands(empty, band)}' if len(empty) > 1 else ''}: "
            f"minimum and maximum are both {float(low.flatten()[empty][0]):.6g}, so normalized "
            "values carry nothing. Check the recordings and the train split"
        )


@check.register
def _rx(node: RXGlobal, pixels: int | None, band: Band) -> Iterator[str]:
    """Check the covariance that was frozen, with ``eps`` on its diagonal."""
    covariance, mean = _float64(node.cov), _float64(node.mu)
    yield from _few_pixels(pixels, len(mean))
    if not bool(covariance.isfinite().all()):
        yield "the covariance is not finite: values overflow float32. Scale the bands"
        return
    variances = covariance.diagonal() - node.eps
    rounding = 2 * _EPS32 * covariance.diagonal()  # of adding eps and storing the sum
    # A standard deviation of one float32 step of the mean is no variation.
    constant = variances <= rounding + (_EPS32 * mean).square()
    yield from _constant(constant, band, "drop such bands")
    yield from _duplicates(
        covariance, variances, constant | (rounding > (1 - _DUPLICATE) * variances), band
    )
    yield from _near_singular(covariance, float(node.eps), cached=bool(node.cov_inv.numel()))


@check.register
def _pca(node: TrainablePCA, pixels: int | None, band: Band) -> Iterator[str]:
    yield from _few_pixels(pixels, node._mean.numel())
    variances = _float64(node._explained_variance)
    if noise := int((variances <= _EPS32 * variances[0]).sum()):
        yield (
            f"the last {noise} of {len(variances)} components have no variance above rounding: "
            f"their directions are arbitrary. Use {len(variances) - noise} components or fewer"
        )


@check.register
def _selector(node: SoftChannelSelector, pixels: int | None, band: Band) -> Iterator[str]:
    if node.init_method == "variance":  # logits are log(variance + eps)
        constant = _float64(node.channel_logits).exp() <= node.eps * (1 + _LOG_VARIANCE)
        yield from _constant(constant, band, "nothing is gained by selecting such bands")


@check.register
def _z_score(node: ZScoreNormalizerGlobal, pixels: int | None, band: Band) -> Iterator[str]:
    deviation = _float64(node.zscore_std) - node.eps
    constant = deviation <= _EPS32 * (_float64(node.zscore_mean).abs() + node.eps)
    yield from _constant(constant, band, f"they are divided by eps ({node.eps:.2g})")


@check.register
def _unit_variance(node: UnitVarianceScaling, pixels: int | None, band: Band) -> Iterator[str]:
    yield from _constant(_float64(node.std_c) <= 1e-8, band, "they are divided by 1e-8")


def check_scores(node: ScoreToLogit, rx: RXGlobal, pixels: int | None) -> Iterator[str]:
    """Compare the mean score that ``node`` saw with what ``rx`` gives on its own pixels.

    Over the n pixels that a covariance S and their mean were computed from, the mean of
    ``(x - μ)ᵀ A (x - μ)`` is ``trace(A S) (n - 1) / n`` for any A. With ``A = (S + eps I)⁻¹`` and
    the eigenvalues λ of ``S + eps I`` that is ``Σ (λ - eps) / λ · (n - 1) / n``, which is
    ``C (n - 1) / n`` without ``eps`` (distance: P. C. Mahalanobis, "On the Generalized Distance
    in Statistics", 1936).
    """
    covariance, mean = _float64(rx.cov), accumulated_mean(node)
    if mean is None or not bool(covariance.isfinite().all()):
        return
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=1e-300)
    share = (pixels - 1) / pixels if pixels else 1.0
    expected = share * float(((eigenvalues - rx.eps) / eigenvalues).clamp(0, 1).sum())
    # Storing the covariance in float32 moved an eigenvalue by no more than this (Weyl, 1912).
    moved = _EPS32 / 2 * covariance.norm()
    unknown = float((moved / eigenvalues).clamp(max=1).sum())
    if abs(mean - expected) <= _MEAN_SCORE * expected + unknown:
        return
    cause = (
        "these are not the scores of the pixels that it was fitted on, or rounding spoils them. "
        "Fit both nodes on the same frames"
    )
    if rx.cov_inv.numel():  # A = the inverse as it was frozen
        own = covariance - rx.eps * torch.eye(len(covariance))
        frozen = share * float((_float64(rx.cov_inv) * own).sum())
        if abs(mean - frozen) <= _MEAN_SCORE * abs(frozen):
            cause = "its float32 inverse leaves out the rest. See to its covariance"
    yield (
        f"the mean score is {mean:.4g}, where {expected:.4g} is expected of {rx.name} with "
        f"{len(covariance)} bands: {cause}"
    )


def _few_pixels(pixels: int | None, channels: int) -> Iterator[str]:
    """Compare the number of pixels n with that of bands C.

    The covariance has rank n - 1 at most. For Gaussian pixels its inverse is on average
    ``(n - 1) / (n - C - 2)`` times too large (T. W. Anderson, "An Introduction to Multivariate
    Statistical Analysis", 3rd ed. 2003, Lemma 7.7.1), and so are distances of new pixels.
    """
    if pixels is None or pixels >= _PIXELS_PER_BAND * channels:
        return
    if pixels < channels + 1:
        meaning = "the covariance of fewer pixels than bands + 1 is singular"
    elif pixels <= channels + 2:
        meaning = "the inverse covariance, and so distances of new pixels, have no finite mean"
    else:
        factor = (pixels - 1) / (pixels - channels - 2)
        meaning = (
            f"the inverse covariance, and so distances of new pixels, come out about {factor:.2g} "
            "times too large"
        )
    yield (
        f"fitted on {pixels} pixels for {channels} bands: {meaning}. Use at least "
        f"{_PIXELS_PER_BAND * channels} pixels, or fewer bands"
    )


def _constant(constant: Tensor, band: Band, advice: str) -> Iterator[str]:
    if bool(constant.any()):
        yield f"constant over the train split: {_bands(constant, band)}; {advice}"


def _duplicates(
    covariance: Tensor, variances: Tensor, unknown: Tensor, band: Band
) -> Iterator[str]:
    scale = variances.clamp(min=1e-300).sqrt()
    correlation = (covariance / torch.outer(scale, scale)).abs()
    correlation[unknown, :] = correlation[:, unknown] = 0
    if pairs := (correlation.triu(diagonal=1) > _DUPLICATE).nonzero().tolist():
        named = [" = ".join(band(index, len(scale)) for index in pair) for pair in pairs]
        yield f"duplicate bands (|correlation| above 1 - 1e-6): {_list(named)}. Keep one of each"


def _near_singular(covariance: Tensor, eps: float, cached: bool) -> Iterator[str]:
    """Compare the condition number with what float32 can invert, ``1 / (C · eps32)``.

    Beyond it ``torch.linalg.pinv`` drops directions (those whose eigenvalue is smaller than
    ``C · eps32`` times the largest), and a solution loses all digits but the last few (N. J.
    Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed. 2002, section 7.1).
    """
    channels, eigenvalues = len(covariance), torch.linalg.eigvalsh(covariance)
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    limit = 1 / (channels * _EPS32)
    if smallest * limit > largest:
        return
    noise = largest * _EPS32 / 2  # smaller eigenvalues are the rounding of the largest
    condition = f"{largest / smallest:.1e}" if smallest > noise else f"above {2 / _EPS32:.1e}"
    dropped = int((eigenvalues.abs() <= largest / limit).sum()) if cached else 0
    enough = 1.1 * (eps + (largest - limit * max(smallest, 0.0)) / (limit - 1))
    yield (
        f"the covariance is nearly singular: its condition number is {condition}, and float32 "
        f"can invert up to {limit:.1e} for {channels} bands"
        + (f" (the inverse leaves out about {dropped} directions)" if dropped else "")
        + ". Scores depend on the last float32 digits. Use fewer bands, a PCA first, more "
        f"pixels, or a larger eps ({enough:.2g} instead of {eps:.2g} would do)"
    )


def _float64(value: Tensor) -> Tensor:
    return value.detach().double().cpu()


def _bands(which: Tensor, band: Band) -> str:
    return _list([band(index, len(which)) for index in which.nonzero().flatten().tolist()])


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _band(
    pipeline: CuvisPipeline,
    node: Node,
    wavelengths: Callable[[], Any],
    index: int,
    channels: int,
) -> str:
    """Name a band, with its wavelength where all nodes before keep the bands of the batch."""
    kept = all(isinstance(n, _KEEPS_BANDS) for n in nodes_before(pipeline, [node]))
    known = wavelengths() if kept else None
    values = torch.as_tensor([] if known is None else known).flatten()
    return f"band {index}" + (f" ({float(values[index]):g} nm)" if len(values) == channels else "")
