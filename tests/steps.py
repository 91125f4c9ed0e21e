"""How do tests train a pipeline step by step: in one process, and on ranks?

No trainer and no Ray: global batches through ``pipeline.forward``, the losses added up as
upstream's trainer adds them, an optimizer of torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_schemas.enums import ExecutionStage
from cuvis_ai_schemas.execution import Context
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cuvis_dist.nodes.survey import training_survey
from cuvis_dist.training.gathering import Cut
from cuvis_dist.training.joint import JointStep, agreed

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}
#: Frames of each global batch, of one epoch.
BATCHES = {"divides": (6,), "does not divide": (4, 3), "fewer than workers": (2, 1, 4)}
FRAMES, HEIGHT, WIDTH, BANDS = 7, 6, 5, 8


@dataclass(frozen=True)
class Run:
    """What is trained, and how.

    Attributes
    ----------
    case : callable
        Makes the pipeline and its loss nodes.
    sizes : tuple of int
        Frames of each global batch of an epoch.
    reverse : bool
        Whether the frames of each batch come in the other order.
    """

    case: Callable[[], tuple[CuvisPipeline, list]]
    optimizer: str
    sizes: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    reverse: bool = False
    epochs: int = 2


@dataclass(frozen=True)
class Trained:
    """State of the nodes before and after, the loss of each global batch, and the plan."""

    before: dict[str, Any]
    after: dict[str, Any]
    losses: list[float]
    plan: dict[str, str] | None = None


def frames(count: int = FRAMES) -> dict[str, Any]:
    """Frames with masks of unlike sizes, two of them empty."""
    generator = torch.Generator().manual_seed(11)
    cube = torch.rand(count, HEIGHT, WIDTH, BANDS, generator=generator)
    cube *= torch.linspace(0.5, 2.0, count)[:, None, None, None]
    mask = torch.zeros(count, HEIGHT, WIDTH, dtype=torch.int32)
    for index in range(count):
        if index % 3 != 2:
            mask[index, : 1 + index % 4, : 2 + index % 3] = 1 + index % 2
    wavelengths = torch.linspace(400, 900, BANDS).int().repeat(count, 1)
    return {"cube": cube, "mask": mask, "wavelengths": wavelengths}


def chosen(batch: dict[str, Any], rows: Any) -> dict[str, Any]:
    return {name: value[rows] for name, value in batch.items()}


def steps(run: Run) -> Trained:
    """Train in one process."""
    pipeline, losses = _made(run)
    return _train(run, Steps(pipeline, losses, None), pipeline, None)


def steps_on_ranks(rank: int, world_size: int, group: Any, run: Run) -> Trained:
    """Train on this rank."""
    pipeline, losses = _made(run)
    cut = Cut.of(1, rank, world_size, group)
    two = frames(2)
    plans = agreed(lambda: training_survey(pipeline, two, chosen(two, slice(1)), losses), cut)
    if rank:  # what a rank drew otherwise does not matter
        torch.manual_seed(rank)
    step = Steps(pipeline, losses, JointStep(pipeline, plans))
    module = DistributedDataParallel(step, process_group=group, find_unused_parameters=True)
    trained = _train(run, module, pipeline, cut)
    plan = {name: str(plan) for name, plan in plans.items()}
    return Trained(trained.before, trained.after, trained.losses, plan)


class Steps(nn.Module):
    """A training step as a module, so that DDP can wrap it."""

    def __init__(self, pipeline: CuvisPipeline, losses: list, joint: JointStep | None) -> None:
        super().__init__()
        self.layers, self.joint = pipeline.torch_layers, joint
        self.pipeline, self.losses = pipeline, losses

    def forward(self, batch: dict[str, Any], context: Context, cut: Cut | None) -> torch.Tensor:
        if self.joint is None:
            return self._losses(batch, context)
        with self.joint.of(cut):
            return self._losses(batch, context)

    def _losses(self, batch: dict[str, Any], context: Context) -> torch.Tensor:
        outputs = self.pipeline.forward(batch=batch, context=context)
        names = {node.name for node in self.losses}
        return torch.stack([v for (node, _), v in outputs.items() if node in names]).sum()


def _made(run: Run) -> tuple[CuvisPipeline, list]:
    torch.manual_seed(3)
    pipeline, losses = run.case()
    if run.dtype is torch.float64:  # upstream's data node and its port checks know float32 only
        pipeline.strict_runtime_io_validation = False
        pipeline.torch_layers.double()
        (source,) = (node for node in pipeline.nodes() if node.name == "data")
        source.forward = partial(_widened, source.forward)
    torch.manual_seed(4)
    return pipeline, losses


def _widened(forward: Callable, **inputs: Any) -> dict[str, Any]:
    outputs = forward(**inputs)
    return outputs | {"cube": outputs["cube"].double()}


def _train(run: Run, module: nn.Module, pipeline: CuvisPipeline, cut: Cut | None) -> Trained:
    optimizer = OPTIMIZERS[run.optimizer]([p for p in module.parameters() if p.requires_grad])
    before, losses = state_of(pipeline), []
    for epoch in range(run.epochs):
        for index, batch in enumerate(_batches(run)):
            mine, now = batch, None
            if cut is not None:
                now = Cut.of(run.sizes[index], cut.rank, len(cut.sizes), cut.group)
                mine = chosen(batch, now.dealt)
            loss = module(mine, Context(ExecutionStage.TRAIN, epoch, index, len(losses)), now)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(_mean_over_ranks(loss.detach().double(), cut))
    return Trained(before, state_of(pipeline), losses)


def _batches(run: Run) -> list[dict[str, Any]]:
    everything, start, found = frames(), 0, []
    for size in run.sizes:
        batch = chosen(everything, slice(start, start + size))
        found.append({k: v.flip(0) for k, v in batch.items()} if run.reverse else batch)
        start += size
    return found


def _mean_over_ranks(value: torch.Tensor, cut: Cut | None) -> float:
    if cut is None:
        return float(value)
    torch.distributed.all_reduce(value, group=cut.group)
    return float(value) / len(cut.sizes)


# ---- states ----------------------------------------------------------------------------

#: Where a node is, and what its tensors are found in.
_OTHER = {"_input_ports", "_output_ports", "hparams", "_modules", "_parameters", "_buffers"}
_PLAIN = bool | int | float | str | list | dict | torch.Tensor


def state_of(pipeline: CuvisPipeline) -> dict[str, Any]:
    """Return every parameter, buffer and plain attribute of the nodes."""
    found: dict[str, Any] = {}
    for node in pipeline.nodes():
        tensors = {**dict(node.named_parameters()), **dict(node.named_buffers())}
        found |= {f"{node.name}.{k}": v.detach().clone() for k, v in tensors.items()}
        plain = {k: v for k, v in vars(node).items() if k not in _OTHER and isinstance(v, _PLAIN)}
        found |= {f"{node.name}.{k}": copy.deepcopy(v) for k, v in plain.items()}
    return found


def deviations(ours: Trained, theirs: Trained, least: float = 0.0) -> dict[str, float]:
    """Return by how much states differ, relative to how far they moved, or ``least``."""
    return {
        name: deviation(ours.after[name], expected, theirs.before.get(name, expected), least)
        for name, expected in theirs.after.items()
    }


def deviation(value: Any, expected: Any, before: Any, least: float) -> float:
    if isinstance(expected, list) and all(isinstance(each, float) for each in expected):
        value, expected, before = map(torch.tensor, (value, expected, before))
    if not isinstance(expected, torch.Tensor):
        return 0.0 if repr(value) == repr(expected) else float("inf")
    if value.shape != expected.shape or not torch.equal(value.isnan(), expected.isnan()):
        return float("inf")
    value, expected, before = value.double(), expected.double(), before.double()
    moved = expected - before.nan_to_num() if before.shape == expected.shape else expected
    difference = float((value - expected).nan_to_num().norm())
    return difference / max(float(moved.nan_to_num().norm()), least, 1e-300)
