"""Every frame is read once per pass, also when a worker is killed in the middle of one."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import cuvis_ai
import pytest
from archives import buffers_sha256
from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.data import CU3SDataNode
from cuvis_ai.node.normalization import MinMaxNormalizer
from cuvis_ai_core.pipeline.factory import PipelineBuilder
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_schemas.pipeline import PipelineConfig
from faults import FragileCubes, FragileModule
from readings import CountedCubes, counted, wrap_train

from cuvis_dist import Scaling, StatisticalTrainer
from cuvis_dist.errors import CuvisDistError
from cuvis_dist.execution import engine
from cuvis_dist.runs.trainrun import load_trainrun

pytestmark = pytest.mark.usefixtures("ray_session")


def chain(normalizer, rx):
    """A pipeline of these two."""
    data, pipeline = CU3SDataNode(), CuvisPipeline("fragile")
    pipeline.connect(
        (data.outputs.cube, normalizer.inputs.data),
        (normalizer.outputs.normalized, rx.inputs.data),
    )
    return pipeline


def fit(folder, fragile, fold):
    pipeline = chain(MinMaxNormalizer(), RXGlobal(5))
    scaling = Scaling(resources={"workers": 2}, measuring={"shard_frames": 2, "fold": fold})
    trainer = StatisticalTrainer(pipeline, FragileModule(folder, fragile), scaling=scaling)
    trainer.fit()
    readings = counted(folder / "read.log")
    return pipeline, trainer, readings


@pytest.mark.parametrize("fold", [True, False])
def test_a_killed_worker_changes_no_bit(tmp_path, fold):
    for name in ("well", "killed"):
        (tmp_path / name).mkdir()
    well, trainer, readings = fit(tmp_path / "well", False, fold)
    passes = 1 if fold else 2
    assert readings == Counter(dict.fromkeys(range(12), passes)), "every frame once per pass"

    killed, trainer, readings = fit(tmp_path / "killed", True, fold)
    assert (tmp_path / "killed" / "died").exists()
    assert buffers_sha256(killed) == buffers_sha256(well)
    assert [record.frames for record in trainer.records] == [12] * passes
    pixels = {fitted["pixels"] for record in trainer.records for fitted in record.nodes.values()}
    assert pixels == {12 * 72}
    again = {index: n - passes for index, n in readings.items() if n > passes}
    assert set(again) <= {4, 5, 6, 7, 8, 9}, "only work in flight may be read again"
    assert 7 in again
    repeated = {shard for record in trainer.records for shard in record.repeated}
    assert repeated == {index // 2 for index in again}, "run.json says which shards ran again"


def test_several_shards_in_a_task_change_no_bit(tmp_path, monkeypatch):
    for name in ("one", "several"):
        (tmp_path / name).mkdir()
    one, _, _ = fit(tmp_path / "one", False, True)
    monkeypatch.setattr(engine, "_TASKS", 2)
    monkeypatch.setattr(engine, "_TASKS_PER_WORKER", 1)
    several, trainer, readings = fit(tmp_path / "several", True, True)
    assert (tmp_path / "several" / "died").exists()
    assert buffers_sha256(several) == buffers_sha256(one)
    (record,) = trainer.records
    assert (record.shards, record.frames) == (6, 12)
    again = {index // 2 for index, n in readings.items() if n > 1}
    assert 3 in again
    assert again <= set(record.repeated) == {3, 4, 5}, "the task of the worker that died"


class HereAlone(FragileCubes):
    """Frames that no other process can open."""

    def __setstate__(self, state):
        raise ImportError("no module named mine")


def test_an_error_that_nobody_foresaw_ends_the_run(tmp_path):
    module = FragileModule(tmp_path, cubes=HereAlone(tmp_path, False))
    trainer = StatisticalTrainer(chain(MinMaxNormalizer(), RXGlobal(5)), module)
    with pytest.raises(CuvisDistError, match=r"a worker failed: .*no module named mine"):
        trainer.fit()


DEEP_SVDD = "configs/pipeline/anomaly/deep_svdd/deep_svdd.yaml"


@pytest.mark.parametrize(
    ("pipeline", "passes"), [("guide", 2), ("normalizer and RX", 1), ("Deep SVDD", 2)]
)
def test_readings_of_well_known_pipelines(demo_trainrun, tmp_path, pipeline, passes):
    if pipeline == "guide":
        run = load_trainrun(demo_trainrun)
        module, built = run.datamodule(), run.pipeline
    else:
        module = FragileModule(tmp_path, cubes=FragileCubes(tmp_path, False, bands=54))
        built = chain(MinMaxNormalizer(), RXGlobal(54))
    if pipeline == "Deep SVDD":
        path = Path(cuvis_ai.__file__).parent / DEEP_SVDD
        config = PipelineConfig.load_from_file(path).to_dict()
        built = PipelineBuilder().build_from_config(config)
    log = tmp_path / "counted.log"
    wrap_train(module, functools.partial(CountedCubes, log=log))
    trainer = StatisticalTrainer(
        built, module, scaling=Scaling(resources={"workers": 2}, measuring={"shard_frames": 2})
    )
    trainer.fit()
    assert len(trainer.records) == passes
    readings = counted(log)
    frames = 10 if pipeline == "guide" else 12
    assert readings == Counter(dict.fromkeys(range(frames), passes))
    assert all(record.frames == frames for record in trainer.records)
