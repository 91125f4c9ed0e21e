"""What do phase 1, a streamed pass and evaluations of the demo come to? Here, or on a cluster.

    python tests/elsewhere.py TRAINRUN ADDRESS

prints the same as JSON, with what was warned of.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.data import CU3SDataNode
from cuvis_ai.node.normalization import PercentileNormalizer
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.evaluation import default_metric_nodes
from cuvis_ai_schemas.enums import ExecutionStage
from labelled import scoring_pipeline
from loguru import logger

from cuvis_dist import StatisticalTrainer
from cuvis_dist.errors import CuvisDistError
from cuvis_dist.evaluation.steps import Evaluator
from cuvis_dist.nodes.state import hash_state
from cuvis_dist.runs.trainrun import load_trainrun
from cuvis_dist.scaling import Scaling


class OwnRX(RXGlobal):
    """A class that nobody has described: it is streamed."""

    def statistical_initialization(self, input_stream):
        super().statistical_initialization(input_stream)


def streamed(bands: int) -> CuvisPipeline:
    """Return a pipeline whose only node is streamed."""
    data, rx, pipeline = CU3SDataNode(), OwnRX(bands), CuvisPipeline("streamed")
    pipeline.connect((data.outputs.cube, rx.inputs.data))
    return pipeline


def results(trainrun: Path, scaling: Scaling, bands: int = 12) -> dict[str, Any]:
    """Fit and evaluate; states as hashes, and which shards were repeated."""
    run = load_trainrun(trainrun, ["data.batch_size=1"])  # a node must have all of a batch
    got: dict[str, Any] = {}

    def fitted(name: str, pipeline: CuvisPipeline) -> StatisticalTrainer:
        trainer = StatisticalTrainer(pipeline, run.datamodule(), scaling=scaling)
        trainer.fit()
        got[name] = hash_state(pipeline.nodes())
        got[f"{name} repeated"] = sorted({n for done in trainer.records for n in done.repeated})
        return trainer

    fitted("streamed", streamed(bands))
    trainer = fitted("measured", run.pipeline)
    got["evaluated"] = trainer.validate().metrics | trainer.test().metrics
    changing = scoring_pipeline(before=PercentileNormalizer(bands, name="normalizer"))
    evaluator = Evaluator(changing, run.datamodule(), scaling, lambda event: None)
    in_order = evaluator.evaluate(ExecutionStage.TEST, default_metric_nodes(changing))
    got["in order"] = in_order.metrics
    got["changed"] = hash_state(changing.nodes())
    return got


def main(trainrun: str, address: str) -> None:
    """Print the results, or the error."""
    said: list[str] = []
    logger.add(said.append, level="WARNING", format="{message}")
    scaling = Scaling(resources={"address": address}, measuring={"shard_frames": 1})
    got: dict[str, Any] = {"said": said}
    try:
        got |= results(Path(trainrun), scaling)
    except CuvisDistError as error:
        got["error"] = type(error).__name__, error.exit_code, str(error)
    print(json.dumps(got))


if __name__ == "__main__":
    main(*sys.argv[1:])
