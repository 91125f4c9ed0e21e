"""Tensors of every type travel: in data modules, frames and rows, to workers and back."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import ray
import torch
from archives import assert_same_state
from gradients import initialized, train, train_upstream
from integers import serve_integers
from ray import cloudpickle
from settings import scaling_of

from cuvis_dist import StatisticalTrainer
from cuvis_dist.runs.trainrun import load_trainrun

YOUNG = [torch.uint16, torch.uint32, torch.uint64, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", [*YOUNG, torch.float32])
@pytest.mark.parametrize("protocol", [2, 5])
def test_a_tensor_comes_back_with_its_views(dtype, protocol):
    tensor = torch.arange(6).to(dtype).reshape(2, 3)
    for pickler in (pickle, cloudpickle):
        whole, part = pickler.loads(pickler.dumps((tensor, tensor[1:, ::2]), protocol=protocol))
        assert whole.dtype == part.dtype == dtype
        assert torch.equal(whole.double(), tensor.double())
        assert torch.equal(part.double(), tensor[1:, ::2].double())
        whole.zero_()
        assert dtype not in YOUNG or not part.double().any(), "a view shares its memory"
    assert pickle.loads(pickle.dumps(torch.empty(0, 3, dtype=dtype))).shape == (0, 3)


@pytest.mark.parametrize("dtype", YOUNG)
def test_what_torch_can_do_stays_as_it_is(dtype):
    tensor = torch.arange(6).to(dtype)
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    for other in (torch.load(file), copy.deepcopy(tensor)):
        assert other.dtype == dtype
        assert torch.equal(other.double(), tensor.double())


@pytest.mark.parametrize("dtype", YOUNG)
def test_a_worker_may_write_to_what_it_gets(ray_session, dtype):
    @ray.remote
    def changed(tensor):
        from cuvis_dist.execution.worker import prepare_worker

        prepare_worker(1)
        return tensor.zero_(), torch.full((3,), 7.0).to(dtype)

    tensor = torch.ones(400_000).to(dtype)  # large enough for Ray's shared memory
    zeros, sevens = ray.get(changed.remote(ray.put(tensor)))
    assert zeros.dtype == sevens.dtype == dtype
    assert not zeros.double().any()
    assert tensor.double().all()
    assert sevens.double().tolist() == [7.0] * 3


@pytest.mark.slow
def test_a_data_module_of_integers_is_fitted_on_workers(ray_session, demo_trainrun):
    from cuvis_ai_core.training import StatisticalTrainer as UpstreamStatisticalTrainer

    fitted = []
    for trainer in (
        UpstreamStatisticalTrainer,
        lambda *parts: StatisticalTrainer(*parts, scaling=scaling_of(workers=2, fold=False)),
    ):
        trainrun = load_trainrun(demo_trainrun)
        trainer(trainrun.pipeline, serve_integers(trainrun.datamodule())).fit()
        fitted.append(trainrun.pipeline)
    assert_same_state(*fitted, 1e-6)


@pytest.mark.slow
@pytest.mark.long
def test_a_data_module_of_integers_trains(ray_session, demo_trainrun, tmp_path):
    """Held in the data module, read ahead by Ray tasks and cached: as upstream has it."""
    one = initialized(demo_trainrun, tmp_path / "one", "training.optimizer.lr=1.0e-5")
    train_upstream(one, serve_integers(one.datamodule()))
    two = initialized(demo_trainrun, tmp_path / "two", "training.optimizer.lr=1.0e-5")
    module = serve_integers(two.datamodule())
    train(two, 2, module, scaling={"read_ahead": 2, "cache": "memory"})
    assert_same_state(two.pipeline, one.pipeline, 1e-5)
