"""An archive of whole numbers has the same moments however it is cut and wherever it runs."""

from __future__ import annotations

import hashlib

import pytest
from integers import serve_integers
from settings import scaling_of

from cuvis_dist import StatisticalTrainer
from cuvis_dist.initialization import passes
from cuvis_dist.initialization.preview import preview
from cuvis_dist.runs.trainrun import load_trainrun

pytestmark = pytest.mark.kernels
MOMENTS = "Moments(data.cube)"


@pytest.fixture
def merged(monkeypatch):
    """Collect what the passes have measured of the whole archive."""
    found = []

    def note(this_pass, statistics, probes):
        found.append(statistics)
        return freeze(this_pass, statistics, probes)

    freeze = passes.freeze_fits
    monkeypatch.setattr(passes, "freeze_fits", note)
    return found


def fit(trainrun, module, **settings):
    trainer = StatisticalTrainer(trainrun.pipeline, module, scaling=scaling_of(**settings))
    trainer.fit()
    return trainer


def sha256(statistic) -> str:
    return hashlib.sha256(statistic.to_bytes()).hexdigest()


def test_any_shards_and_any_engine_give_the_same_bits(demo_trainrun, merged, ray_session):
    for shard_frames, workers in ((1, 0), (2, 0), (3, 2), (100, 0)):
        trainrun = load_trainrun(demo_trainrun)
        module = serve_integers(trainrun.datamodule())
        trainer = fit(trainrun, module, shard_frames=shard_frames, workers=workers)
        first, second = trainer.records
        assert {how["exact"] for how in first.nodes.values()} == {True}
        assert {how["exact"] for how in second.nodes.values()} == {False}  # scores
    assert len({sha256(found[MOMENTS]) for found in merged[::2]}) == 1


def test_the_floating_lane_gives_other_bits_for_other_shards(demo_trainrun, merged):
    """The control: reflectances."""
    for shard_frames in (1, 3):
        trainrun = load_trainrun(demo_trainrun)
        trainer = fit(trainrun, trainrun.datamodule(), shard_frames=shard_frames, workers=0)
        exact = {name: how["exact"] for name, how in trainer.records[0].nodes.items()}
        assert exact == {"normalizer": True, "selector": False, "rx_detector": False}
    assert len({sha256(found[MOMENTS]) for found in merged[::2]}) == 2


def test_a_plan_says_what_the_first_frame_shows(demo_trainrun):
    trainrun = load_trainrun(demo_trainrun)
    integers = serve_integers(trainrun.datamodule())
    for module, word in ((trainrun.datamodule(), "rounded"), (integers, "exact")):
        first, second = preview(trainrun.pipeline, module, scaling_of(workers=1)).costs
        assert f"{word}: " in first.rounding
        assert first.exact == {"Extrema(data.cube)": True, MOMENTS: word == "exact"}
        assert second.exact == {}
        assert second.rounding.startswith("exact where values are whole numbers")
