"""The merge tree: same bits in any order of arrival, little kept, nothing counted twice."""

from __future__ import annotations

import math
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cuvis_dist.statistics import MergeTree, Moments


@given(st.integers(1, 70), st.randoms())
def test_order_of_arrival_does_not_matter_and_sides_are_kept(size, random):
    tree = MergeTree(size, lambda a, b: a + b)
    order = list(range(size))
    random.shuffle(order)
    for ordinal in order:
        assert tree.add(ordinal, (ordinal,))
    assert tree.root() == tuple(range(size))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_moments_have_the_same_bits_in_any_order(data):
    shape = st.tuples(st.integers(2, 20), st.just(3), st.just(2))
    frames = data.draw(arrays(np.float32, shape, elements=st.floats(-1e6, 1e6, width=32)))
    parts = [Moments.measure(torch.as_tensor(frame)) for frame in frames]

    def root(order):
        tree = MergeTree(len(parts), lambda a, b: a.merge(b))
        for ordinal in order:
            tree.add(ordinal, parts[ordinal])
        return tree.root()

    straight = root(range(len(parts)))
    shuffled = root(data.draw(st.permutations(range(len(parts)))))
    assert torch.equal(straight.M2, shuffled.M2)
    assert torch.equal(straight.mean, shuffled.mean)


def test_one_after_the_other_the_order_changes_bits():
    """The control: without the tree, moments that arrive otherwise are others."""
    parts = [Moments.measure(torch.randn(5, 3)) for _ in range(20)]
    straight, backwards = (reduce(Moments.merge, order) for order in (parts, parts[::-1]))
    assert not torch.equal(straight.M2, backwards.M2)


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
