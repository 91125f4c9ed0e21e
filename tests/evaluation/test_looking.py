"""Are frames looked at that one process evaluates in order? As those that workers evaluate are."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from labelled import LabelledModule, RunningMaximum, Trail, scoring_pipeline

from cuvis_dist import Scaling
from cuvis_dist.evaluation.seen import Look, Seen
from cuvis_dist.evaluation.steps import Evaluator

HERE = Scaling(resources={"workers": 0})


def looked(pipeline, folder, seen=None):
    """Return what is seen of val and test, and the result."""
    folder.mkdir()
    seen = {} if seen is None else seen
    module = LabelledModule(folder, batch_size=2)
    result = Evaluator(pipeline, module, HERE, lambda event: None, seen).post_fit()
    return seen, result


def test_in_order_is_seen_what_is_seen_side_by_side(tmp_path):
    """A metric that cannot be merged, and what is judged is the same."""
    seen, _ = looked(scoring_pipeline(exact=RunningMaximum), tmp_path / "in order")
    expected, _ = looked(scoring_pipeline(), tmp_path / "side by side")
    assert seen.keys() == expected.keys() == {"val", "test"}
    for split, theirs in expected.items():
        ours = seen[split]
        assert (ours.frames, ours.annotated, ours.wrong) == (12, True, theirs.wrong)
        for name, counts in theirs.counts.items():
            np.testing.assert_array_equal(ours.counts[name].keys, counts.keys)
            np.testing.assert_array_equal(ours.counts[name].counts, counts.counts)
        for mine, other in zip(ours.pixels, theirs.pixels, strict=True):
            np.testing.assert_array_equal(mine.spectra, other.spectra)
        first, worst = ours.pictures[0], theirs.pictures[0]
        assert first.uid == worst.uid
        np.testing.assert_array_equal(first.scores, worst.scores)


def test_a_frame_shows_what_the_frames_before_have_made_of_it(tmp_path):
    """A tracker that no tensor tells of: scores grow from frame to frame."""
    seen, _ = looked(scoring_pipeline(before=Trail(name="trail")), tmp_path / "trail")
    scores = {p.uid: float(p.scores.min()) for p in seen["val"].pictures}
    ordered = [scores[uid] for uid in sorted(scores, key=lambda u: int(u.rpartition("#")[2]))]
    assert len(ordered) == 12
    steps = np.diff(ordered[::2])  # a frame of each batch: half of what is between 0 and 1
    np.testing.assert_allclose(steps, 0.5, atol=0.1)


@pytest.mark.parametrize("broken", [("batch", Look), ("merge", Seen)])
def test_what_cannot_be_seen_changes_no_result(tmp_path, monkeypatch, broken):
    pipeline = scoring_pipeline(exact=RunningMaximum)
    _, expected = looked(copy.deepcopy(pipeline), tmp_path / "seen")

    def fail(*arguments):
        raise RuntimeError("nothing can be seen")

    monkeypatch.setattr(broken[1], broken[0], fail)
    seen, result = looked(pipeline, tmp_path / "unseen")
    assert seen == {}
    assert result.calibration == expected.calibration
    for split, outcome in expected.evaluations.items():
        assert result.evaluations[split].metrics == outcome.metrics
