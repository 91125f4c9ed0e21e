"""The order of frames is upstream's on any number of workers, and where it is not, that is said."""

from __future__ import annotations

from collections import Counter

import pytest
from archives import assert_same_state
from faults import AugmentedModule, UnseededModule
from gradients import initialized, train, train_upstream

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.slow]


def test_one_worker_draws_what_upstream_draws(demo_trainrun, tmp_path, warnings):
    """Also for frames that draw random numbers when they are read."""
    theirs = initialized(demo_trainrun, tmp_path / "one")
    train_upstream(theirs, AugmentedModule(theirs.datamodule()))
    ours = initialized(demo_trainrun, tmp_path / "ours")
    train(ours, 0, AugmentedModule(ours.datamodule()))
    assert_same_state(ours.pipeline, theirs.pipeline, 1e-5)
    assert not [text for text in warnings if "random" in text]


@pytest.mark.long
def test_frames_that_draw_on_several_workers_are_said(demo_trainrun, tmp_path, warnings):
    trainrun = initialized(demo_trainrun, tmp_path)
    train(trainrun, 2, AugmentedModule(trainrun.datamodule()))
    (line,) = [text for text in warnings if "random" in text]
    assert "the frames of AugmentedModule, or nodes, draw random numbers for each frame" in line
    assert "the order of frames is rank 0's, and not upstream's" in line


@pytest.mark.long
def test_workers_follow_rank_zero_where_a_sampler_draws_elsewhere(
    demo_trainrun, tmp_path, warnings
):
    trainrun = initialized(demo_trainrun, tmp_path)
    module = UnseededModule(trainrun.datamodule(), tmp_path)
    train(trainrun, 2, module)
    (line,) = [text for text in warnings if "random" in text]
    assert "the train loader of UnseededModule keeps a random state of its own" in line
    readings = Counter(map(int, (tmp_path / "read.log").read_text().split()))
    assert readings == Counter(dict.fromkeys(range(10), 3)), "each frame once in each of 3 epochs"
