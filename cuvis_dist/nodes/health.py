"""Does the fitted state of a node look sound?

Each check is a pure function of what a node froze and of how many pixels it was fitted on, in
float64; the archive is not read again. Which class is looked at by which check says
:mod:`~cuvis_dist.nodes.catalogue`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai_core.node.node import Node
from torch import Tensor

from cuvis_dist.nodes.upstream import accumulated_mean

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


Band = Callable[[int, int], str]
"""Names the band of an index, given the number of bands: ``band 3 (462 nm)``."""


@dataclass(frozen=True)
class Fitted:
    """What a check may look at.

    Attributes
    ----------
    node : Node
        The fitted node.
    pixels : int or None
        How many pixels it was fitted on, None where it was streamed.
    band : callable
        Names a band, see :data:`Band`.
    sources : tuple of (Node, int or None)
        The nodes that feed it, one for each edge, and how many pixels phase 1 fitted them on.
    """

    node: Any
    pixels: int | None
    band: Band
    sources: tuple[tuple[Node, int | None], ...] = ()


Check = Callable[[Fitted], Iterator[str]]
"""Yields a message for each thing that looks bad about a fitted node."""


def bounds(fitted: Fitted) -> Iterator[str]:
    """Look for bounds of zero width: the check of every class that names no other."""
    node = fitted.node
    low, high = getattr(node, "running_min", None), getattr(node, "running_max", None)
    if not isinstance(low, Tensor) or not isinstance(high, Tensor):
        return
    empty = (_float64(high) - _float64(low)).flatten() == 0
    if bool(empty.any()):
        where = f" at {_bands(empty, fitted.band)}" if len(empty) > 1 else ""
        yield (
            f"a range of zero width{where}: "
            f"minimum and maximum are both {float(low.flatten()[empty][0]):.6g}, so normalized "
            "values carry nothing. Check the recordings and the train split"
        )


def rx_covariance(fitted: Fitted) -> Iterator[str]:
    """Check the covariance that was frozen, with ``eps`` on its diagonal."""
    node, band = fitted.node, fitted.band
    covariance, mean = _float64(node.cov), _float64(node.mu)
    yield from _few_pixels(fitted.pixels, len(mean))
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
    inverse = _float64(node.cov_inv) if node.cov_inv.numel() else None
    yield from _near_singular(covariance, float(node.eps), inverse)


def components(fitted: Fitted) -> Iterator[str]:
    """Look for components that are rounding."""
    node = fitted.node
    yield from _few_pixels(fitted.pixels, node._mean.numel())
    variances = _float64(node._explained_variance)
    if noise := int((variances <= _EPS32 * variances[0]).sum()):
        yield (
            f"the last {noise} of {len(variances)} components have no variance above rounding: "
            f"their directions are arbitrary. Use {len(variances) - noise} components or fewer"
        )


def channel_variances(fitted: Fitted) -> Iterator[str]:
    """Look for bands without variance, where the logits were made of variances."""
    node = fitted.node
    if node.init_method == "variance":  # logits are log(variance + eps)
        constant = _float64(node.channel_logits).exp() <= node.eps * (1 + _LOG_VARIANCE)
        yield from _constant(constant, fitted.band, "nothing is gained by selecting such bands")


def z_scores(fitted: Fitted) -> Iterator[str]:
    """Look for bands that are divided by ``eps`` instead of their deviation."""
    node = fitted.node
    deviation = _float64(node.zscore_std) - node.eps
    constant = deviation <= _EPS32 * (_float64(node.zscore_mean).abs() + node.eps)
    yield from _constant(constant, fitted.band, f"they are divided by eps ({node.eps:.2g})")


def deviations(fitted: Fitted) -> Iterator[str]:
    """Look for bands that are divided by the node's smallest deviation."""
    node = fitted.node
    yield from _constant(_float64(node.std_c) <= 1e-8, fitted.band, "they are divided by 1e-8")


def mean_score(fitted: Fitted) -> Iterator[str]:
    """Compare the mean score that a node saw with what its RX detector gives on its own pixels."""
    for source, pixels in fitted.sources:
        if isinstance(source, RXGlobal):
            yield from _mean_score_of(source, pixels, accumulated_mean(fitted.node))


def _mean_score_of(rx: RXGlobal, pixels: int | None, mean: float | None) -> Iterator[str]:
    """Compare a mean score with the one expected of ``rx``.

    Over the n pixels that a covariance S and their mean were computed from, the mean of
    ``(x - μ)ᵀ A (x - μ)`` is ``trace(A S) (n - 1) / n`` for any A. With ``A = (S + eps I)⁻¹`` and
    the eigenvalues λ of ``S + eps I`` that is ``Σ (λ - eps) / λ · (n - 1) / n``, which is
    ``C (n - 1) / n`` without ``eps`` (distance: P. C. Mahalanobis, "On the Generalized Distance
    in Statistics", 1936).
    """
    covariance = _float64(rx.cov)
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


def exact_mean(node: Node, port: str, moments: Any) -> tuple[float, float] | None:
    """Return the mean of what a fitted node puts out, where its input's moments give that.

    The mean of ``(x - μ)ᵀ A (x - μ)`` over the n pixels of some moments is
    ``trace(A M2) / n + (m - μ)ᵀ A (m - μ)`` with their mean m, for any A and μ: those that an
    RX detector froze, with ``eps`` in the inverse and rounded to float32.

    Parameters
    ----------
    node : Node
        The node.
    port : str
        The output.
    moments : Moments
        Those of the node's input, with the full matrix.

    Returns
    -------
    tuple of float, or None
        The mean, and by how much the rounding of float32 scores may move it: about one part in
        2²³ of the products that are added up to a score, ``Σ |A_ij| σ_i σ_j`` on average.
    """
    if not isinstance(node, RXGlobal) or port != "scores" or moments.diagonal or not moments.n:
        return None
    A = _float64(node.cov_inv) if node.cov_inv.numel() else _float64(node.cov).inverse()
    off, second = moments.mean - _float64(node.mu), moments.M2 / moments.n
    mean = float((A * second).sum() + off @ A @ off)
    size = second.diagonal().sqrt()
    return mean, _EPS32 * float(size @ A.abs() @ size)


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


def _near_singular(covariance: Tensor, eps: float, inverse: Tensor | None) -> Iterator[str]:
    """Compare the condition number with what float32 can invert, ``1 / (C · eps32)``.

    Beyond it ``torch.linalg.pinv`` drops directions (those whose eigenvalue is smaller than
    ``C · eps32`` times the largest), and a solution loses all digits but the last few (N. J.
    Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed. 2002, section 7.1). How far
    the ``inverse`` that the node holds is from one says ``‖I − Σ Σ⁻¹‖``, the largest relative
    error of a solution (section 14.1 there).
    """
    channels, eigenvalues = len(covariance), torch.linalg.eigvalsh(covariance)
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    limit = 1 / (channels * _EPS32)
    if smallest * limit > largest:
        return
    noise = largest * _EPS32 / 2  # smaller eigenvalues are the rounding of the largest
    condition = f"{largest / smallest:.1e}" if smallest > noise else f"above {2 / _EPS32:.1e}"
    held = (
        f" (its inverse {_off(covariance, inverse, largest / limit)})"
        if inverse is not None
        else ""
    )
    enough = 1.1 * (eps + (largest - limit * max(smallest, 0.0)) / (limit - 1))
    yield (
        f"the covariance is nearly singular: its condition number is {condition}, and float32 "
        f"can invert up to {limit:.1e} for {channels} bands"
        + held
        + ". Scores depend on the last float32 digits. Use fewer bands (a selection or a PCA "
        f"before it), more pixels, or a larger eps ({enough:.2g} instead of {eps:.2g} would do)"
    )


def _off(covariance: Tensor, inverse: Tensor, least: float) -> str:
    """Say how far ``inverse`` is from one; its eigenvalues below ``least`` were left out."""
    residual = torch.eye(len(covariance), dtype=torch.float64) - covariance @ inverse
    if not bool(residual.isfinite().all()):
        return "is not finite"
    error = float(torch.linalg.matrix_norm(residual, 2))
    dropped = int((torch.linalg.eigvalsh(covariance).abs() <= least).sum())
    return f"has a relative error of {error:.2g}" + (
        f" and leaves out about {dropped} directions" if dropped else ""
    )


def _float64(value: Tensor) -> Tensor:
    return value.detach().double().cpu()


def _bands(which: Tensor, band: Band) -> str:
    return _list([band(index, len(which)) for index in which.nonzero().flatten().tolist()])


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
