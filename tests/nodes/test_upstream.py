"""Do the private names of cuvis.ai that we depend on still exist, and mean what they meant?"""

from __future__ import annotations

import importlib.util
import inspect

import pytest
import torch
from cuvis_ai.node.channel_selector import ChannelSelectorBase
from cuvis_ai.node.conversion import ScoreToLogit
from cuvis_ai.node.monitor import TensorBoardMonitorNode
from cuvis_ai_core.data import selectors
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training import GradientTrainer, StatisticalTrainer, evaluation
from cuvis_ai_core.training.config import TrainingConfig
from cuvis_ai_core.utils import restore
from cuvis_ai_dataloader.data import datamodule_cu3s, datamodule_cu3s_multi
from cuvis_ai_dataloader.data.readers.tiff_reader import TiffCubeReader
from cuvis_ai_schemas.training.data import SampleRef, Selector

from cuvis_dist.nodes.upstream import accumulated_mean, select_by_recording
from cuvis_dist.training.module import RankTrainer

PRIVATE = {
    (restore, "_create_datamodule_from_config"): ["trainrun_config", "candidate_dirs", "base_dir"],
    (restore, "_discover_plugins_dirs"): ["pipeline_path", "explicit_dirs"],
    (restore, "_build_catalog"): ["plugins_dirs"],
    (restore, "_build_data_module"): ["registry", "data_config", "candidate_dirs"],
    (restore, "_resolve_splits_path_in_config"): ["data_config", "base_dir"],
    (TensorBoardMonitorNode, "_resolve_log_dir"): ["self"],
    (evaluation, "_pooled_objects"): ["node"],
    (CuvisPipeline, "_gather_node_inputs"): ["self", "node", "port_data", "batch"],
    (StatisticalTrainer, "_require_predecessor_outputs"): ["self", "target_node", "outputs"],
    (StatisticalTrainer, "_raise_if_cancelled"): ["self"],
    (GradientTrainer, "_build_trainer"): ["self"],
    (datamodule_cu3s, "count_measurements"): ["cu3s_file_path"],
    (datamodule_cu3s_multi, "count_measurements"): ["cu3s_file_path"],
    (TiffCubeReader, "_to_hwc"): ["raw", "axes", "path"],
    (selectors, "_resolve_one"): ["sel", "refs", "name_to_id"],
    (selectors, "_norm_source"): ["path"],
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


@pytest.fixture
def theirs():
    """Upstream's module of selectors as it is without us."""
    found = importlib.util.find_spec(selectors.__name__)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def of_recordings(names, frames=3):
    return [SampleRef(source=n, index=i, uid=f"{n}#{i}") for n in names for i in range(frames)]


def test_selectors_select_what_they_do_upstream(theirs):
    select_by_recording()
    archives = [of_recordings(["a/b.cu3s", "a\\c.cu3s", "d.cu3s"]), of_recordings(["d.cu3s"], 2)]
    c, d = {"kind": "files", "paths": ["a/c.cu3s"]}, {"kind": "files", "paths": ["./d.cu3s"]}
    some = {"kind": "file_indices", "source": "a/./c.cu3s", "ids": ["1-2", 0]}
    for given in (
        [c], [d], [some], [d, some], [{"kind": "all"}, c], [{"kind": "union", "of": [d, c]}],
        [{"kind": "except", "of": [{"kind": "all"}, some]}], [{"kind": "glob", "pattern": "d*"}],
        [{"kind": "file_indices", "source": "d.cu3s", "ids": [0, 9]}], [{"kind": "files",
        "paths": ["d.cu3s", "x"]}], [{"kind": "files", "paths": ["x"]}],
        [{"kind": "dir_indices", "ids": [1, 0]}],
    ):  # fmt: skip
        chosen = [Selector.model_validate(each) for each in given]
        for refs in (*archives, archives[0]):
            results = []
            for module in (theirs, selectors):
                try:
                    results.append(module.resolve_selectors(chosen, refs))
                except ValueError as error:
                    results.append(str(error))
            assert results[0] == results[1], given


def test_a_recording_more_costs_no_look_at_the_others(monkeypatch):
    select_by_recording()

    def looks(recordings: int) -> int:
        """How many names of recordings are compared where each is selected by itself."""
        names = [f"{n}.cu3s" for n in range(recordings)]
        looked = []
        monkeypatch.setattr(selectors, "_norm_source", lambda path: looked.append(path) or path)
        each = [Selector(kind="file_indices", source=name, ids=["0-2"]) for name in names]
        assert len(selectors.resolve_selectors(each, of_recordings(names))) == 3 * recordings
        monkeypatch.undo()
        return len(looked)

    assert looks(40) <= 2 * looks(20)
