"""How does a batch norm see the whole batch without anyone sending frames?

Ranks exchange the moments of their own frames, a few numbers per channel: in the forward pass
count, mean and sum of squared deviations, merged as Chan, Golub & LeVeque (1979) do; in the
backward pass the two sums over the batch that the derivative of the moments consists of. Outputs,
gradients and running statistics are those of one process. torch's ``SyncBatchNorm`` does the
same on GPUs only.

With x̂ = (x − μ)/σ and y = γ x̂ + β over all n values of a channel, the derivative with respect to
one of them is γ/σ · (g − mean(g) − x̂ · mean(g x̂)), where g is the gradient of y and the means
are over all ranks' values; γ and β collect what comes from the rank's own ones, which DDP puts
together. In the terms of :mod:`~cuvis_dist.training.gathering`, this is the derivative of the
sum of all ranks' losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from cuvis_dist.training.gathering import Cut


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms inside ``module``."""
    return [each for each in module.modules() if isinstance(each, _BatchNorm)]


@contextmanager
def synchronized(
    norms: Iterable[_BatchNorm],
    cut: Cut,
    waiting: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[None]:
    """Let batch norms that are training see the batch that ``cut`` describes.

    ``waiting`` returns a context in which the other ranks' moments are waited for.
    """
    norms = list(norms)
    for norm in norms:
        norm.forward = _forward_of(norm, cut, waiting)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _forward_of(
    norm: _BatchNorm, cut: Cut, waiting: Callable[[], AbstractContextManager]
) -> Callable[[Tensor], Tensor]:
    def forward(value: Tensor) -> Tensor:
        over_batch = norm.training or (norm.running_mean is None and norm.running_var is None)
        if not over_batch:
            return type(norm).forward(norm, value)
        norm._check_input_dim(value)
        # A rank without frames has a value that only keeps it in step.
        counted = value if cut.mine else value[:0]
        with waiting():
            moments = _merged_moments(counted.detach(), cut)
        return _normalize(norm, value, cut, moments)

    return forward


def _normalize(
    norm: _BatchNorm, value: Tensor, cut: Cut, moments: tuple[int, Tensor, Tensor]
) -> Tensor:
    n, mean, variance = moments
    if n == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got 1 for all workers' "
            f"{sum(cut.sizes)} frames together"
        )
    if norm.training and norm.track_running_stats:
        _track(norm, n, mean, variance)
    # As torch does, compute in float32 where values are shorter.
    wide = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    scaled = _Normalize.apply(
        wide, mean.to(wide.dtype), (variance + norm.eps).rsqrt().to(wide.dtype), n, cut
    )
    if norm.affine:
        shape = (1, -1, *[1] * (value.ndim - 2))
        scaled = scaled * norm.weight.view(shape) + norm.bias.view(shape)
    return scaled.to(value.dtype)


def _merged_moments(value: Tensor, cut: Cut) -> tuple[int, Tensor, Tensor]:
    """Return count, mean and population variance per channel, float64, over all ranks."""
    channels = value.shape[1]
    flat = value.transpose(0, 1).reshape(channels, -1)
    count = flat.shape[1]
    mine = torch.zeros(2 * channels + 1, dtype=torch.float64, device=value.device)
    if count:
        wide = flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat
        variance, mean = torch.var_mean(wide, dim=1, correction=0)
        mine[:channels], mine[channels:-1], mine[-1] = mean, variance * count, count
    parts = [torch.empty_like(mine) for _ in cut.sizes]
    dist.all_gather(parts, mine, group=cut.group)
    n = 0.0
    mean, squares = mine.new_zeros(channels), mine.new_zeros(channels)
    for part in parts:
        added = float(part[-1])
        if not added:
            continue
        delta = part[:channels] - mean
        squares = squares + part[channels:-1] + delta**2 * (n * added / (n + added))
        mean = mean + delta * (added / (n + added))
        n += added
    return int(n), mean, squares / max(n, 1.0)


@torch.no_grad()
def _track(norm: _BatchNorm, n: int, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics as ``_BatchNorm.forward`` does."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if norm.momentum is None:
        momentum = 1.0 / float(norm.num_batches_tracked or 1)
    else:
        momentum = norm.momentum
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    unbiased = (variance * (n / (n - 1))).to(norm.running_var.dtype)
    norm.running_var.lerp_(unbiased, momentum)


class _Normalize(torch.autograd.Function):
    """``(x - mean) / std`` of the whole batch, differentiated through the moments too."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, mean: Tensor, inverse_std: Tensor, n: int, cut: Cut
    ) -> Tensor:
        shape = (1, -1, *[1] * (value.ndim - 2))
        scaled = (value - mean.view(shape)) * inverse_std.view(shape)
        ctx.save_for_backward(scaled, inverse_std)
        ctx.n, ctx.cut = n, cut
        return scaled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled, inverse_std = ctx.saved_tensors
        shape = (1, -1, *[1] * (scaled.ndim - 2))
        dims = [0, *range(2, scaled.ndim)]
        # A frame that only keeps the rank in step hands its gradient on to the moments, like
        # any other; it is not among those that made them.
        sums = torch.stack([gradient.sum(dims), (gradient * scaled).sum(dims)])
        dist.all_reduce(sums, group=ctx.cut.group)
        if not ctx.cut.mine:
            return inverse_std.view(shape) * gradient, None, None, None, None
        means = sums / ctx.n
        moved = means[0].view(shape) + scaled * means[1].view(shape)
        return inverse_std.view(shape) * (gradient - moved), None, None, None, None
