"""Writings are spaced by time, and by how long they take."""

from __future__ import annotations

import pytest

from cuvis_dist.pace import Pace


@pytest.mark.parametrize(("every", "takes", "pause"), [(5, 0.1, 5), (5, 2, 40), (0, 1, 20)])
def test_a_writing_is_not_repeated_too_soon(every, takes, pause):
    now = 100.0
    pace = Pace(every, clock=lambda: now)
    assert pace.due == (every == 0)
    now += every
    assert pace.due
    with pace.writing():
        now += takes
    now += pause - 0.01
    assert not pace.due
    now += 0.02
    assert pace.due


def test_a_writing_that_fails_counts():
    now = 0.0
    pace = Pace(1, clock=lambda: now)

    def fail():
        nonlocal now
        with pace.writing():
            now += 3
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        fail()
    now += 59
    assert not pace.due
