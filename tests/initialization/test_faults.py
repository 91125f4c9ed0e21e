"""A worker that is killed in the middle of a pass: same bits, and nothing counted twice."""

from __future__ import annotations

from collections import Counter

import pytest
from archives import buffers_sha256
from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.data import CU3SDataNode
from cuvis_ai.node.normalization import MinMaxNormalizer
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from fragile import FragileModule

from cuvis_dist import Scaling, StatisticalTrainer

pytestmark = pytest.mark.usefixtures("ray_session")


def fit(folder, fragile, fold):
    data, normalizer, rx = CU3SDataNode(), MinMaxNormalizer(), RXGlobal(5)
    pipeline = CuvisPipeline("fragile")
    pipeline.connect(
        (data.outputs.cube, normalizer.inputs.data),
        (normalizer.outputs.normalized, rx.inputs.data),
    )
    scaling = Scaling(workers=2, shard_frames=2, fold=fold)
    trainer = StatisticalTrainer(pipeline, FragileModule(folder, fragile), scaling=scaling)
    trainer.fit()
    readings = Counter(map(int, (folder / "read.log").read_text().split()))
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
