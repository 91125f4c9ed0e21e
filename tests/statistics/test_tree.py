"""The merge tree: same bits in any order of arrival, little kept, nothing counted twice."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuvis_dist.statistics import MergeTree, Moments


@given(st.integers(1, 70), st.randoms())
def test_order_of_arrival_does_not_matter_and_sides_are_kept(size, random):
    tree = MergeTree(size, lambda a, b: a + b)
    order = list(range(size))
    random.shuffle(order)
    for ordinal in order:
        assert tree.add(ordinal, (ordinal,))
    assert tree.root() == tuple(range(size))


@settings(max_examples=25)
@given(st.integers(2, 40), st.randoms())
def test_moments_have_the_same_bits_in_any_order(size, random):
    generator = torch.Generator().manual_seed(size)
    parts = [Moments.measure(torch.randn(5, 3, generator=generator)) for _ in range(size)]

    def root(order):
        tree = MergeTree(size, Moments.merge)
        for ordinal in order:
            tree.add(ordinal, parts[ordinal])
        return tree.root()

    order = list(range(size))
    straight = root(order)
    random.shuffle(order)
    shuffled = root(order)
    assert torch.equal(straight.M2, shuffled.M2)
    assert torch.equal(straight.mean, shuffled.mean)


def test_in_order_it_keeps_logarithmically_few():
    size, most = 1000, 0
    tree = MergeTree(size, lambda a, b: a + b)
    for ordinal in range(size):
        tree.add(ordinal, 1)
        most = max(most, tree.waiting)
    assert tree.root() == size
    assert most <= math.log2(size) + 1


def test_a_partial_counts_once():
    tree = MergeTree(2, lambda a, b: a + b)
    assert tree.add(0, 1)
    assert not tree.add(0, 1)
    tree.add(1, 10)
    assert not tree.add(1, 10)
    assert tree.root() == 11


def test_what_is_missing_is_said():
    tree = MergeTree(3, lambda a, b: a + b)
    tree.add(1, 1)
    with pytest.raises(RuntimeError, match="2 of 3"):
        tree.root()
    with pytest.raises(IndexError):
        tree.add(3, 1)
    with pytest.raises(ValueError, match="at least one"):
        MergeTree(0, lambda a, b: a)
