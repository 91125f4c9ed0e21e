"""Do the private names of cuvis.ai that we depend on still exist, and mean what they meant?"""

from __future__ import annotations

import inspect

import pytest
import torch
from cuvis_ai.node.channel_selector import ChannelSelectorBase
from cuvis_ai.node.conversion import ScoreToLogit
from cuvis_ai.node.monitor import TensorBoardMonitorNode
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training import GradientTrainer, StatisticalTrainer, evaluation
from cuvis_ai_core.training.config import TrainingConfig
from cuvis_ai_core.utils import restore
from cuvis_ai_dataloader.data import datamodule_cu3s, datamodule_cu3s_multi
from cuvis_ai_dataloader.data.readers.tiff_reader import TiffCubeReader

from cuvis_dist.nodes.upstream import accumulated_mean
from cuvis_dist.training.module import RankTrainer

PRIVATE = {
    (restore, "_create_datamodule_from_config"): ["trainrun_config", "candidate_dirs", "base_dir"],
    (restore, "_discover_plugins_dirs"): ["pipeline_path", "explicit_dirs"],
    (restore, "_build_catalog"): ["plugins_dirs"],
    (restore, "_build_data_module"): ["registry", "data_config", "candidate_dirs"],
    (restore, "_resolve_splits_path_in_config"): ["data_config", "base_dir"],
    (CuvisPipeline, "_restore_weights_from_checkpoint"): [
        "self", "weights_path", "strict_weight_loading", "device",
    ],
    (TensorBoardMonitorNode, "_resolve_log_dir"): ["self"],
    (evaluation, "_pooled_objects"): ["node"],
    (CuvisPipeline, "_gather_node_inputs"): ["self", "node", "port_data", "batch"],
    (StatisticalTrainer, "_require_predecessor_outputs"): ["self", "target_node", "outputs"],
    (StatisticalTrainer, "_raise_if_cancelled"): ["self"],
    (GradientTrainer, "_build_trainer"): ["self"],
    (datamodule_cu3s, "count_measurements"): ["cu3s_file_path"],
    (datamodule_cu3s_multi, "count_measurements"): ["cu3s_file_path"],
    (TiffCubeReader, "_to_hwc"): ["raw", "axes", "path"],
    (datamodule_cu3s, "Cu3sCubeReader"): [
        "cu3s_file_path", "processing_mode", "white_ref", "dark_ref", "cuda_cubes",
    ],
    (GradientTrainer, "_run_step"): [
        "self", "batch", "batch_idx", "stage", "collect_metrics", "monitor_key",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("home", "name"), PRIVATE)
def test_a_private_name_is_as_we_know_it(home, name):
    function = getattr(home, name, None)
    assert function is not None, f"{home.__name__}.{name} is gone"
    assert list(inspect.signature(function).parameters) == PRIVATE[home, name]


def test_the_pipeline_keeps_its_graph_and_order():
    assert hasattr(CuvisPipeline("p"), "_graph")
    assert "_sorted_nodes" in vars(CuvisPipeline)


def test_the_logit_head_keeps_the_mean_of_its_scores():
    head = ScoreToLogit()
    assert accumulated_mean(head) is None
    head.statistical_initialization([{"scores": torch.tensor([1.0, 2.0, 6.0])}])
    assert accumulated_mean(head) == 3.0


def test_band_selectors_fit_the_colours_that_they_compute():
    """The recipe of band selectors replaces ``_compute_raw_rgb`` for the length of a fit."""
    source = inspect.getsource(ChannelSelectorBase.statistical_initialization)
    assert 'self._compute_raw_rgb(batch_data["cube"], batch_data["wavelengths"])' in source
    assert ChannelSelectorBase._NORM_QUANTILE_LOW < 0.49
    assert ChannelSelectorBase._NORM_QUANTILE_HIGH > 0.51


def test_the_rank_trainer_overrides_methods_that_exist():
    for name in ("_build_trainer", "_run_step", "log"):
        assert name in vars(RankTrainer)
        assert hasattr(GradientTrainer, name)


def test_every_trainer_keyword_reaches_lightning():
    """``RankConfig`` relies on upstream building its trainer from these alone."""
    source = inspect.getsource(GradientTrainer._build_trainer)
    assert "self.training_config.to_lightning_kwargs()" in source
    assert "max_epochs" in TrainingConfig().to_lightning_kwargs()
