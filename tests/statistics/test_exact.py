"""Moments of whole numbers: to the last bit, in any order, on any processor, taken out again."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import subprocess
import sys
from fractions import Fraction
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cuvis_dist.statistics import ExactMoments, Extrema, MergeTree, Moments, PixelSample, blocks
from cuvis_dist.statistics.blocks import LONGEST_WHOLE, NotWholeError
from cuvis_dist.statistics.wide import add, as_ints, subtract, wide

pytestmark = pytest.mark.kernels
TOP = 2**16 - 1


def frame(count: int, channels: int, lowest: int = 0, seed: int = 1) -> torch.Tensor:
    """Whole numbers of correlated channels, as a sensor gives them."""
    rng = np.random.default_rng(seed)
    common = rng.integers(lowest, TOP + 1, (count, 1))
    own = rng.integers(lowest, TOP + 1, (count, channels))
    return torch.from_numpy(((3 * common + own) // 4).astype(np.uint16))


def assert_nearest(found: Moments | ExactMoments, pixels: torch.Tensor, rows=None) -> None:
    """Each entry, or those of some rows, is the float64 next to the rational number."""
    n, channels = pixels.shape
    x = pixels.numpy().astype(np.int64)  # which holds the sums of fewer than 2³¹ pixels
    mean = [Fraction(total, n) for total in x.sum(axis=0).tolist()]
    assert found.exact
    assert (found.n, found.channels) == (n, channels)
    assert found.mean.tolist() == [float(m) for m in mean]
    M2, covariance = (m.diag() if found.diagonal else m for m in (found.M2, found.covariance))
    assert torch.equal(M2, M2.T)
    for i in range(channels) if rows is None else rows:
        products = (x[:, i] @ x).tolist()
        row = [xy - n * mean[i] * m for xy, m in zip(products, mean, strict=True)]
        if found.diagonal:
            row = [value * (i == j) for j, value in enumerate(row)]
        assert M2[i].tolist() == [float(value) for value in row]
        assert covariance[i].tolist() == [float(value / (n - 1)) for value in row]


# ---- at the limits -----------------------------------------------------------------------


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("count", [LONGEST_WHOLE + 1, 2 * LONGEST_WHOLE + 1])
@pytest.mark.parametrize("dtype", [torch.uint16, torch.float32])
def test_nothing_but_the_largest_value(dtype, count, diagonal):
    """The larger count has a sum of squares that is no float64: it is odd, and beyond 2⁵³."""
    pixels = torch.full((count, 2), TOP, dtype=torch.int32).to(dtype)
    found = Moments.measure(pixels, diagonal)
    assert as_ints(found.products)[0] == count * TOP**2
    assert (int(float(count * TOP**2)) == count * TOP**2) == (count == LONGEST_WHOLE + 1)
    assert found.mean.tolist() == [TOP, TOP]
    assert not found.M2.any()
    pixels[7, 0] = TOP - 1
    assert_nearest(Moments.measure(pixels, diagonal), pixels)


@pytest.mark.parametrize("diagonal", [True, False])
def test_one_pixel_more_than_fits_one_sum(diagonal):
    pixels = frame(LONGEST_WHOLE + 1, 3, lowest=60_000)
    assert_nearest(Moments.measure(pixels, diagonal), pixels)


@pytest.mark.parametrize("diagonal", [True, False])
def test_a_thousand_bands(diagonal):
    pixels = frame(40, 1000)
    assert_nearest(Moments.measure(pixels, diagonal), pixels, rows=[0, 1, 499, 998, 999])


def test_the_floating_lane_differs_in_the_last_bits():
    """The control: its entries are not those next to the rational numbers."""
    pixels = frame(20_000, 8, lowest=60_000)
    exact, found = Moments.measure(pixels), Moments.measure_rounded(pixels)
    assert_nearest(exact, pixels)
    assert not found.exact
    assert not torch.equal(found.M2, exact.M2)
    torch.testing.assert_close(found.M2, exact.M2, rtol=1e-12, atol=0)


# ---- which pixels ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool, torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64, torch.uint32,
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
    ],
)  # fmt: skip
@pytest.mark.parametrize("diagonal", [True, False])
def test_whole_numbers_of_any_type(dtype, diagonal):
    pixels = torch.as_tensor(np.random.default_rng(2).integers(0, 2, (900, 7))).to(dtype)
    found = Moments.measure(pixels, diagonal)
    assert_nearest(found, pixels.to(torch.int32))
    assert found.to_bytes() == Moments.measure(pixels.double(), diagonal).to_bytes()


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        *((torch.float32, v) for v in (0.5, -1, 2**16, 65_535.5, 2.0**40, np.nan, np.inf, -np.inf)),
        *((torch.float64, v) for v in (1 + 2.0**-52, -1e-300, 2.0**63, 2.0**64 + 2**12)),
        *((torch.int32, v) for v in (-1, 2**16, 2**31 - 1, -(2**31))),
        *((torch.int64, v) for v in (2**62, 2**62 + 1, -(2**63))),
        (torch.int8, -1),
    ],
)
@pytest.mark.parametrize("at", [0, 40_000, -1])
def test_one_value_that_is_none_is_noticed_wherever_it_is(dtype, value, at):
    pixels = torch.ones(60_000, 4, dtype=dtype)
    pixels[at, 2] = value
    with np.errstate(all="raise"), pytest.raises(NotWholeError):
        ExactMoments.measure(pixels)
    assert not Moments.measure(pixels).exact
    with pytest.raises(NotWholeError):
        blocks._whole_sums_in_torch(pixels, diagonal=False)


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("dtype", [torch.uint16, torch.float32, torch.int64])
def test_the_code_for_gpus_gives_the_same_sums(monkeypatch, dtype, diagonal):
    """Here on a CPU, in several blocks: float64 products are exact on either."""
    monkeypatch.setattr(blocks, "GPU_BLOCK", 1 << 12)
    pixels = frame(5_000, 5).to(dtype)
    there, here = (f(pixels, diagonal) for f in (blocks._whole_sums_in_torch, blocks.whole_sums))
    assert all(torch.equal(a, b) for a, b in zip(there, here, strict=True))


def test_each_statistic_says_whether_it_is_exact():
    pixels = frame(50, 3)
    assert [s.measure(pixels).exact for s in (Moments, Extrema, PixelSample)] == [True] * 3
    assert not Moments.measure(pixels + 0.5).exact


# ---- order, and pixels that are taken out ------------------------------------------------

PARTS = st.lists(
    arrays(np.uint16, st.tuples(st.integers(0, 6), st.just(3)), elements=st.integers(0, TOP)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(PARTS, st.booleans(), st.randoms())
def test_any_partition_in_any_order_has_the_same_bits(parts, diagonal, random):
    """Without a tree: one after the other, as they come."""
    whole = Moments.measure(torch.as_tensor(np.concatenate(parts)), diagonal)
    random.shuffle(parts)
    measured = [Moments.measure(torch.as_tensor(part), diagonal) for part in parts]
    assert reduce(lambda a, b: a.merge(b), measured).to_bytes() == whole.to_bytes()


@settings(max_examples=60, deadline=None)
@given(PARTS, st.booleans(), st.data())
def test_what_is_taken_out_leaves_no_trace(parts, diagonal, data):
    parts = [Moments.measure(torch.as_tensor(part), diagonal) for part in parts]
    out = data.draw(st.integers(0, len(parts) - 1))
    without = reduce(lambda a, b: a.merge(b), parts).without(parts[out])
    nothing = ExactMoments.measure(torch.zeros(0, 3), diagonal)
    never = reduce(lambda a, b: a.merge(b), parts[:out] + parts[out + 1 :], nothing)
    assert without.to_bytes() == never.to_bytes()


def test_what_was_never_there_cannot_be_taken_out():
    small, large = (Moments.measure(frame(n, 3, seed=n)) for n in (10, 20))
    alike = Moments.measure(frame(10, 3, lowest=TOP))
    for other in (large, alike):
        with pytest.raises(ValueError, match="cannot be taken out of 10"):
            small.without(other)
    with pytest.raises(ValueError, match="3 channels and 2 channels"):
        small.without(Moments.measure(frame(5, 2)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_one_rounded_partial_makes_all_of_it_rounded(data):
    """And the bits are those of the tree, whichever partial arrives first."""
    partials = [Moments.measure(frame(9, 3, seed=i)) for i in range(data.draw(st.integers(2, 9)))]
    for at in data.draw(st.sets(st.integers(0, len(partials) - 1), min_size=1)):
        partials[at] = Moments.measure(frame(9, 3, seed=at) + 0.5)

    def root(order):
        tree = MergeTree(len(partials), lambda a, b: a.merge(b))
        for ordinal in order:
            tree.add(ordinal, partials[ordinal])
        return tree.root()

    first, second = (
        root(range(len(partials))),
        root(data.draw(st.permutations(range(len(partials))))),
    )
    assert not first.exact
    assert first.to_bytes() == second.to_bytes()
    shifts = [0.0 if partial.exact else 0.5 for partial in partials]
    pixels = [frame(9, 3, seed=i).double() + shift for i, shift in enumerate(shifts)]
    expected = Moments.measure_rounded(torch.cat(pixels))
    torch.testing.assert_close(first.mean, expected.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(first.M2, expected.M2, rtol=1e-11, atol=0)


def test_variances_of_a_covariance_are_those_that_are_measured_alone():
    pixels = frame(300, 5)
    alone = Moments.measure(pixels, diagonal=True)
    assert Moments.measure(pixels).only_diagonal().to_bytes() == alone.to_bytes()
    assert alone.only_diagonal() is alone
    with pytest.raises(ValueError, match="variances alone"):
        alone.affine(torch.eye(5), torch.zeros(5))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**62 - 1), min_size=1), st.integers(0, 2**40))
def test_whole_numbers_beyond_64_bits(values, times):
    """As they are added in tensors, against Python's."""
    total, one = wide(torch.zeros(1)), wide(torch.tensor([times]))
    for value in values * 9:
        total = add(total, wide(torch.tensor([value])))
    assert as_ints(total) == [9 * sum(values)]
    assert as_ints(subtract(total, one)) == [9 * sum(values) - times]
    assert torch.equal(subtract(add(total, one), one), total)


# ---- processors and threads --------------------------------------------------------------


def hashes() -> dict[str, str]:
    """What one process makes of some pixels, by SHA-256."""
    pixels = frame(30_000, 61)
    exact = Moments.measure(pixels)
    mixing = (torch.arange(7 * 61).reshape(7, 61) - 99).double() / 49
    found = {
        "moments": exact,
        "variances": Moments.measure(pixels.float(), diagonal=True),
        "rounded": exact.rounded(),
        "scaled": exact.affine(mixing * torch.eye(7, 61), mixing[:, 0]),
        "projected": exact.affine(mixing, mixing[:, 0]),
        "floating": Moments.measure_rounded(pixels),
    }
    return {name: hashlib.sha256(one.to_bytes()).hexdigest() for name, one in found.items()}


def test_any_processor_and_any_threads_give_the_same_bits():
    """Kernels are chosen when a process starts. The floating lane is the control."""
    older = "Nehalem" if platform.machine() == "x86_64" else "ARMV8"
    generic = {
        "OPENBLAS_CORETYPE": older,
        "MKL_CBWR": "COMPATIBLE",
        "ATEN_CPU_CAPABILITY": "default",
    }
    clean = {name: value for name, value in os.environ.items() if name not in generic}
    tests = str(Path(__file__).parents[1])
    script = f"import json, sys; sys.path[:0] = [{tests!r}, {tests + '/statistics'!r}]\n"
    script += "import test_exact; print(json.dumps(test_exact.hashes()))"
    found = []
    for kernels, threads in itertools.product(({}, generic), "14"):
        counts = {f"{of}_NUM_THREADS": threads for of in ("OMP", "OPENBLAS", "MKL")}
        command, asked = [sys.executable, "-c", script], clean | kernels | counts
        done = subprocess.run(command, env=asked, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    for name in set(found[0]) - {"floating"}:
        assert len({each[name] for each in found}) == 1, name
    assert len({each["floating"] for each in found}) > 1, "the control: kernels differ"
