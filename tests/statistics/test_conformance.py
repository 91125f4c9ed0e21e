"""Does every statistic keep what it promises? Each against its definition in exact arithmetic.

A new statistic is one row of :data:`CASES`; without a row the first test fails. Hypothesis draws
the pixels themselves, so that a failure shrinks to a few numbers.
"""

from __future__ import annotations

import importlib
import pickle
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
import torch
from exact import (
    SEED,
    SIZE,
    Bound,
    Piece,
    exact_extrema,
    exact_frame_quantiles,
    exact_moments,
    exact_sample,
    rounded_moments,
    whole,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cuvis_dist.statistics
from cuvis_dist.statistics import (
    ExactMoments,
    Extrema,
    FrameQuantiles,
    Moments,
    PixelSample,
    Statistic,
    from_arrow,
    from_bytes,
)
from cuvis_dist.statistics.statistic import _REGISTRY

pytestmark = pytest.mark.kernels


class Case(NamedTuple):
    """How a statistic is measured, what it is by definition, and which merges are no good."""

    statistic: type[Statistic]
    measure: Callable[[Piece], Statistic]
    exact: Callable[[list[Piece]], dict[str, Bound]]
    controls: dict[str, Callable[[list[Piece]], Any]]
    whole_numbers: bool = False


# ---- the table -------------------------------------------------------------------------


def in_float32(case: Case, pieces: list[Piece]) -> Statistic:
    """Merge partials that were rounded to float32."""

    def rounded(statistic: Statistic) -> Statistic:
        values = {
            name: value.float() if isinstance(value, Tensor) else value
            for name, value in vars(as_floats(statistic)).items()
        }
        return type(as_floats(statistic))(**values)

    return merged([rounded(case.measure(piece)) for piece in pieces])


def as_floats(statistic: Statistic) -> Statistic:
    return statistic.rounded() if isinstance(statistic, ExactMoments) else statistic


def around_a_mean(diagonal: bool) -> Callable[[list[Piece]], Statistic]:
    """The moments of pixels that are not known to be whole numbers: not exact in the last bits."""
    return lambda pieces: merged([Moments.measure_rounded(p.pixels, diagonal) for p in pieces])


def sums_of_squares(pieces: list[Piece]) -> dict[str, Tensor]:
    """Σ x xᵀ - (Σ x)(Σ x)ᵀ / n, in float64."""
    x = whole(pieces)
    M2 = x.T @ x - torch.outer(x.sum(0), x.sum(0)) / len(x)
    return {"mean": x.mean(0), "M2": M2}


def variances_by_sums_of_squares(pieces: list[Piece]) -> dict[str, Tensor]:
    found = sums_of_squares(pieces)
    return found | {"M2": found["M2"].diagonal()}


def pooled_quantiles(pieces: list[Piece]) -> dict[str, Tensor]:
    """Quantiles of all frames together."""
    x = whole(pieces)
    return {"minimum": x.quantile(0.005, dim=0), "maximum": x.quantile(0.995, dim=0)}


def first_of_each(pieces: list[Piece]) -> dict[str, Tensor]:
    """A sample that takes from each part as much as its share is, whatever the ranks."""
    taken = [p._replace(pixels=p.pixels[: SIZE // len(pieces)]) for p in pieces]
    return {name: bound.value for name, bound in exact_sample(taken).items()}


def sampled(piece: Piece) -> PixelSample:
    pixels, frame, start = piece
    index = torch.arange(start, start + len(pixels))
    return PixelSample.measure(
        pixels, SIZE, seed=SEED, uid=f"rec#{frame}", position=frame, index=index
    )


CASES = {
    "moments": Case(
        Moments,
        lambda piece: Moments.measure(piece.pixels),
        exact_moments,
        {"float32": in_float32, "sums of squares": sums_of_squares},
    ),
    "variances": Case(
        Moments,
        lambda piece: Moments.measure(piece.pixels, diagonal=True),
        lambda pieces: exact_moments(pieces, diagonal=True),
        {"float32": in_float32, "sums of squares": variances_by_sums_of_squares},
    ),
    "exact moments": Case(
        ExactMoments,
        lambda piece: ExactMoments.measure(piece.pixels),
        rounded_moments,
        {"float32": in_float32, "around a mean": around_a_mean(False)},
        whole_numbers=True,
    ),
    "exact variances": Case(
        ExactMoments,
        lambda piece: ExactMoments.measure(piece.pixels, diagonal=True),
        lambda pieces: rounded_moments(pieces, diagonal=True),
        {"float32": in_float32, "around a mean": around_a_mean(True)},
        whole_numbers=True,
    ),
    "extrema": Case(
        Extrema,
        lambda piece: Extrema.measure(piece.pixels),
        exact_extrema,
        {"float32": in_float32},
    ),
    "frame quantiles": Case(
        FrameQuantiles,
        lambda piece: FrameQuantiles.measure(piece.pixels),
        exact_frame_quantiles,
        {"quantiles of all frames": pooled_quantiles},
    ),
    "sample": Case(
        PixelSample, sampled, exact_sample, {"float32": in_float32, "by share": first_of_each}
    ),
}  # fmt: skip
everywhere = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def test_every_statistic_has_a_row():
    """Also one whose module nobody imports yet."""
    package = cuvis_dist.statistics
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    ours = {cls for cls in _REGISTRY.values() if cls.__module__.startswith("cuvis_dist.")}
    assert {case.statistic for case in CASES.values()} == ours


# ---- pixels ----------------------------------------------------------------------------

ELEMENTS = {
    "wide": {"min_value": -(2.0**100), "max_value": 2.0**100},
    "far from zero": {"min_value": 2.0**20 - 1, "max_value": 2.0**20 + 1},
}


@st.composite
def frames(draw, finite: bool = False, whole_numbers: bool = False) -> list[Tensor]:
    """One to four frames ``[N, C]``, some of them empty; NaN and infinities where allowed."""
    channels = draw(st.integers(1, 4))
    dtype = draw(st.sampled_from([np.float32, np.float64, np.int32]))
    if whole_numbers:
        dtype = draw(st.sampled_from([np.float32, np.float64, np.int32, np.uint16]))
        lowest = draw(st.sampled_from([0, 2**16 - 4]))
        elements = st.integers(lowest, 2**16 - 1)
    elif dtype is np.int32:
        elements = st.integers(-(2**31), 2**31 - 1)
    else:
        elements = st.floats(width=32, **ELEMENTS[draw(st.sampled_from(sorted(ELEMENTS)))])
        if not finite:
            elements |= st.sampled_from([np.nan, np.inf, -np.inf])
    frame = npst.arrays(dtype, st.tuples(st.integers(0, 12), st.just(channels)), elements=elements)
    return [torch.as_tensor(array) for array in draw(st.lists(frame, min_size=1, max_size=4))]


@st.composite
def partitions(draw, whole_frames: bool, whole_numbers: bool = False) -> list[Piece]:
    """The pixels of some frames in pieces, in any order."""
    pieces = []
    for number, pixels in enumerate(draw(frames(whole_numbers=whole_numbers))):
        cuts = draw(st.lists(st.integers(0, len(pixels)), max_size=0 if whole_frames else 3))
        bounds = [0, *sorted(cuts), len(pixels)]
        pieces += [Piece(pixels[a:b], number, a) for a, b in pairwise(bounds)]
    return draw(st.permutations(pieces))


def merged(statistics: list[Statistic], pairs: st.DataObject | None = None) -> Statistic:
    """Merge neighbours until one is left: any tree where ``pairs`` are drawn, else in order."""
    while len(statistics) > 1:
        at = pairs.draw(st.integers(0, len(statistics) - 2)) if pairs else 0
        statistics[at : at + 2] = [statistics[at].merge(statistics[at + 1])]
    return statistics[0]


def fields_of(found: Any) -> dict[str, Tensor]:
    """What is compared: a sample's pixels in the order of the archive, whatever the ties."""
    if isinstance(found, PixelSample):
        return {"rank": found.rank, "pixels": found.surrogate()}
    if isinstance(found, ExactMoments):
        found = found.rounded()
    return found if isinstance(found, dict) else tensors(found)


def tensors(statistic: Statistic) -> dict[str, Tensor]:
    return {k: v for k, v in vars(statistic).items() if isinstance(v, Tensor)}


def outside(exact: dict[str, Bound], found: Any) -> list[str]:
    """Names of the fields that are farther from the exact ones than they may be."""
    fields = fields_of(found)
    assert fields.keys() == exact.keys()
    return [name for name, bound in exact.items() if not bound.holds(fields[name])]


def assert_same_bits(ours: Statistic, theirs: Statistic) -> None:
    assert type(ours) is type(theirs)
    assert vars(ours).keys() == vars(theirs).keys()
    for name, value in vars(ours).items():
        other = vars(theirs)[name]
        if isinstance(value, Tensor):
            assert value.dtype == other.dtype
            assert value.dtype in (torch.float64, torch.int64)
            assert value.shape == other.shape
            bits = [v.where(~v.isnan(), torch.nan).numpy().tobytes() for v in (value, other)]
            assert bits[0] == bits[1], name  # but for the sign of a NaN, which says nothing
        else:
            assert (type(value), value) == (type(other), other)


# ---- what each promises ----------------------------------------------------------------


@everywhere
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_partition_merged_in_any_order_is_the_exact_one(case, data):
    pieces = data.draw(partitions(case.statistic.whole_frame, case.whole_numbers))
    found = merged([case.measure(piece) for piece in pieces], data)
    assert found.n == sum(len(piece.pixels) for piece in pieces)
    assert outside(case.exact(pieces), found) == []
    if found.n:  # an empty statistic may hold the infinities that min and max start from
        assert found.is_finite() == bool(torch.isfinite(whole(pieces)).all())


@everywhere
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_merging_with_no_pixels_changes_no_bit(case, data):
    some = case.measure(Piece(data.draw(frames(whole_numbers=case.whole_numbers))[0]))
    none = case.measure(Piece(torch.zeros(0, some.channels), frame=1))
    assert_same_bits(some.merge(none), some)
    assert_same_bits(none.merge(some), some)
    assert none.surrogate().shape == (0, some.channels)


@everywhere
@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=5))
def test_one_pixel_is_its_own_surrogate(case, pixel):
    if case.whole_numbers:
        pixel = [abs(value) // 1 % 2**16 for value in pixel]
    surrogate = case.measure(Piece(torch.tensor([pixel], dtype=torch.float32))).surrogate()
    assert surrogate.dtype == torch.float64
    assert len(surrogate)
    assert all(row == pixel for row in surrogate.tolist())


@everywhere
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_pickle_arrow_and_bytes_keep_every_bit(case, data):
    pieces = data.draw(partitions(case.statistic.whole_frame, case.whole_numbers))
    one = merged([case.measure(piece) for piece in pieces])
    assert_same_bits(pickle.loads(pickle.dumps(one)), one)
    assert_same_bits(from_arrow(one.to_arrow()), one)
    assert_same_bits(from_bytes(one.to_bytes()), one)
    assert from_bytes(one.to_bytes()).sha256() == one.sha256()
    assert replace(one, n=one.n + 1).sha256() != one.sha256()


@everywhere
def test_unlike_channels_are_refused(case):
    pixels = torch.ones if case.whole_numbers else torch.rand
    three, four = (case.measure(Piece(pixels(5, channels))) for channels in (3, 4))
    with pytest.raises(ValueError, match=r"3 .*4( channels)?"):
        three.merge(four)


@everywhere
@pytest.mark.parametrize("name", ["frames", "pieces"])
def test_a_naive_merge_is_noticed(case, name):
    """On frames whose mean is 10⁶ standard deviations ours is within bounds, the others are not."""
    generator = np.random.default_rng(5)
    frames = [generator.normal(1e6, 1, (40, 3)) * [1, 1e-2, 1e-4] for _ in range(4)]
    frames[2][7] += 100 * np.array([1, 1e-2, 1e-4])
    if case.whole_numbers:
        frames = [generator.integers(65_000, 65_536, (40, 3)) for _ in range(4)]
    pieces = [Piece(torch.as_tensor(frame), number) for number, frame in enumerate(frames)]
    if name == "pieces" and not case.statistic.whole_frame:
        pieces = [
            Piece(pixels[a : a + 8], number, a)
            for pixels, number, _ in pieces
            for a in range(0, 40, 8)
        ]
    exact = case.exact(pieces)
    assert outside(exact, merged([case.measure(piece) for piece in pieces])) == []
    assert case.controls
    for control, merge in case.controls.items():
        arguments = (case, pieces) if merge is in_float32 else (pieces,)
        assert outside(exact, merge(*arguments)), f"{control} passes: the bounds are too wide"


def test_arrow_of_something_else_is_refused():
    import pyarrow as pa

    with pytest.raises(ValueError, match="not a statistic"):
        from_arrow(pa.RecordBatch.from_pydict({"n": [1]}))


def test_a_bound_knows_what_is_outside():
    """The comparison that all of the above rests on."""
    bound = Bound(torch.tensor([1.0, torch.nan, torch.inf]).double(), 1e-9)
    assert bound.holds(torch.tensor([1.0 + 1e-10, torch.nan, torch.inf], dtype=torch.float64))
    for wrong in ([1.0 + 1e-8, torch.nan, torch.inf], [1.0, 0.0, torch.inf], [1.0, torch.nan, 1e9]):
        assert not bound.holds(torch.tensor(wrong, dtype=torch.float64))
    assert not bound.holds(torch.ones(2).double())
