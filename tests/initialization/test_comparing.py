"""What changed between two states, and by how much? Pure: nothing is fitted or read."""

from __future__ import annotations

import math

import torch
from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.normalization import MinMaxNormalizer

from cuvis_dist.initialization.card import Initialization
from cuvis_dist.initialization.comparing import compare

NAN = math.nan


def state_of(**states):
    states = {
        node: {name: torch.as_tensor(value) for name, value in state.items()}
        for node, state in states.items()
    }
    return Initialization("a.pt", "", states, None, None)


def changes(before, after, *nodes):
    found = compare(state_of(**before), state_of(**after), nodes)
    return found, {change.name: change for change in found.buffers}


def test_changes_are_told_in_what_a_person_can_judge_and_the_most_first():
    detector, normalizer = RXGlobal(2, name="rx"), MinMaxNormalizer(name="norm")
    before = {
        "rx": {"mu": [1.0, 100.0], "cov": [[4.0, 0.0], [0.0, 100.0]]},
        "norm": {"running_min": 0.0, "running_max": 2.0},
    }
    after = {
        "rx": {"mu": [2.0, 102.0], "cov": [[4.0, 5.0], [5.0, 100.0]]},
        "norm": {"running_min": -1.5, "running_max": 2.0},
    }
    found, by_name = changes(before, after, detector, normalizer)
    assert [*by_name] == ["norm.running_min", "rx.mu", "rx.cov"]
    assert found.same == 1
    mean = by_name["rx.mu"]
    assert (mean.units, mean.unit, mean.entry) == (0.5, "standard deviations", (0,))
    assert (mean.largest, mean.relative) == (2.0, 0.02)
    assert mean.drift == 1.5 / 50.5  # that of the guide
    assert by_name["rx.cov"].units == 0.25, "as a correlation is"
    assert by_name["norm.running_min"].units == 0.75
    assert str(mean) == (
        "rx.mu: 0.5 standard deviations at [0]; by at most 2, 0.02 of the largest value; "
        "mean drift 0.03"
    )


def test_values_that_are_not_finite_and_units_of_nothing():
    _, by_name = changes(
        {"a": {"same": [NAN, math.inf], "lost": [1.0, 2.0], "none": []}},
        {"a": {"same": [NAN, math.inf], "lost": [1.0, NAN], "none": []}},
    )
    assert [*by_name] == ["a.lost"]
    assert by_name["a.lost"].largest == math.inf
    detector = RXGlobal(2, name="rx")
    flat = [[0.0, 0.0], [0.0, 1.0]]
    _, by_name = changes(
        {"rx": {"mu": [1.0, 1.0], "cov": flat}}, {"rx": {"mu": [1.0, 2.0], "cov": flat}}, detector
    )
    assert by_name["rx.mu"].units == 1.0, "a constant band that did not move does not count"
    _, by_name = changes(
        {"rx": {"mu": [1.0, 1.0], "cov": flat}}, {"rx": {"mu": [1.5, 1.0], "cov": flat}}, detector
    )
    assert by_name["rx.mu"].units == math.inf


def test_other_shapes_and_what_is_new_or_gone_come_first():
    found, by_name = changes(
        {"a": {"x": [1.0], "y": [1, 2]}, "b": {"z": [1.0]}},
        {"a": {"x": [1.0, 2.0], "y": [1, 3]}, "c": {"z": [1.0]}},
    )
    assert {name: change.other for name, change in by_name.items()} == {
        "a.x": "its shape was [1] and is [2]",
        "b.z": "it is gone",
        "c.z": "it is new",
        "a.y": "",
    }
    assert found.buffers[-1].name == "a.y"
    assert found.lines()[-4:-1] == [
        "  a.x: its shape was [1] and is [2]",
        "  b.z: it is gone",
        "  c.z: it is new",
    ]
