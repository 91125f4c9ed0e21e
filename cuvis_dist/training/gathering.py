"""How do the frames of all ranks come together, and how do gradients find their way back?

A training batch of N frames is cut over R ranks; rank r holds n_r of them, as few as none. What
must be computed from all N at once (a Dice loss, a batch norm) is computed by every rank from
gathered values, so that all ranks hold the same result.

Why the gradients are those of one process
------------------------------------------
Let L(θ) be the loss of one process on the whole batch. On rank r the parameters are a copy θ_r,
and the backward pass starts from the rank's own loss ℓ_r. DDP leaves on every rank the mean over
r of the gradients that the ranks come to. What is needed is therefore

1. losses with (1/R) Σ_r ℓ_r = L when all θ_r = θ. A loss that is a mean over frames is
   ``n_r R / N`` times the mean over the rank's own frames (a rank without frames computes
   something, and weighs it 0). A loss that is computed from gathered values is L on each rank,
   and so is one that no frame enters.
2. collectives whose backward pass gives each rank the derivative of Σ_s ℓ_s, of the losses of
   all ranks, with respect to what it put in. For the gather, where rank r's frames enter the
   result on every rank s, that is Σ_s ∂ℓ_s/∂x_r: the gradients of all copies are added, and each
   rank takes the rows of its own frames.

With both, rank r's backward pass ends with ∂(Σ_s ℓ_s)/∂θ_r, whatever lies between: parameters
before a gather (reached through the rank's own frames, from all ranks' losses), inside a node
that runs on gathered values, or behind it. DDP's mean of these is (1/R) Σ_r ∂(Σ_s ℓ_s)/∂θ_r,
which by the chain rule is d/dθ of (1/R) Σ_s ℓ_s(θ, …, θ) = L. Rows that are cut out of a gathered
result need nothing of their own: their gradient is that of indexing, zero elsewhere, and the sum
over ranks in the gather completes it. Where the gradients of all copies are known to be equal (a
loss that nothing else reads), R times the own one is their sum, and no message is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from cuvis_dist.errors import InputError

_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32,
    torch.uint64, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.complex64, torch.complex128,
)  # fmt: skip
#: Dimensions of a gathered tensor, at most.
_DIMENSIONS = 8


@dataclass(frozen=True)
class Cut:
    """How the frames of one global batch lie over the ranks.

    Attributes
    ----------
    sizes : tuple of int
        Frames of each rank; 0 for one that computes on a frame that only keeps it in step.
    rank : int
        Which rank this is.
    group : ProcessGroup or None
        Whose ranks these are; the default group if None.
    order : tuple of int or None
        Where in the batch each frame stands, those of the first rank first; None if they lie
        over the ranks in the batch's order.
    """

    sizes: tuple[int, ...]
    rank: int
    group: Any = None
    order: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls,
        frames: int,
        rank: int,
        world_size: int,
        group: Any = None,
        order: tuple[int, ...] | None = None,
    ) -> Cut:
        """Return how a batch of ``frames`` is dealt: in nearly equal parts."""
        ends = [frames * r // world_size for r in range(world_size + 1)]
        sizes = tuple(stop - start for start, stop in pairwise(ends))
        return cls(sizes, rank, group, order)

    @property
    def mine(self) -> int:
        """Frames of the global batch that this rank holds."""
        return self.sizes[self.rank]

    @property
    def weight(self) -> float:
        """Weight of the rank's mean over frames: the mean over ranks is then that of the batch."""
        return self.mine * len(self.sizes) / sum(self.sizes)

    @property
    def dealt(self) -> slice:
        """Which of the frames are the rank's, as they are dealt to the ranks in turn.

        A rank without frames gets the first one, which only keeps it in step.
        """
        start = sum(self.sizes[: self.rank]) if self.mine else 0
        return slice(start, start + max(1, self.mine))

    def own(self, whole: Any, each: int) -> Any:
        """Return the rank's rows of a value of the whole batch with ``each`` rows per frame.

        Parameters
        ----------
        whole : Tensor, array or list
            In the batch's order.
        """
        if self.order is None:
            return whole[self.dealt.start * each : self.dealt.stop * each]
        rows = _rows(self.order[self.dealt], each)
        return [whole[row] for row in rows] if isinstance(whole, list) else whole[rows]

    def in_order(self, whole: Any, each: int) -> Any:
        """Return a value of the whole batch, as its frames were dealt, in the batch's order."""
        if self.order is None:
            return whole
        rows = _rows(sorted(range(len(self.order)), key=self.order.__getitem__), each)
        return [whole[row] for row in rows] if isinstance(whole, list) else whole[rows]


def _rows(frames: Sequence[int], each: int) -> list[int]:
    return [frame * each + row for frame in frames for row in range(each)]


def gather(values: Sequence[Tensor], cut: Cut, each: Sequence[int], alike: bool) -> list[Tensor]:
    """Return the values of the whole batch, in the frames' order, on every rank.

    Parameters
    ----------
    values : sequence of Tensor
        What this rank holds, ``each[i]`` rows per frame in ``values[i]``. The rows of a rank
        without frames are left out.
    alike : bool
        Whether the gradients of the results will be the same on all ranks; see the module.

    Raises
    ------
    InputError
        If the frames of the ranks differ in shape or type.
    """
    requires_grad = _agree(values, cut)
    gathered = []
    for value, rows, differentiable in zip(values, each, requires_grad, strict=True):
        if differentiable and torch.is_grad_enabled():
            if not value.requires_grad:  # here it has none: the others' backward needs this rank
                value = value.detach().requires_grad_()
            gathered.append(_Gather.apply(value, cut, rows, alike))
        else:
            gathered.append(_all_rows(value.detach(), cut, rows))
    return gathered


def gather_list(values: Sequence[Any], cut: Cut, each: int) -> list[Any]:
    """Return the items of the whole batch, ``each`` per frame, in the frames' order."""
    parts: list[list[Any]] = [[] for _ in cut.sizes]
    dist.all_gather_object(parts, list(values[: cut.mine * each]), group=cut.group)
    return cut.in_order([item for part in parts for item in part], each)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, cut: Cut, each: int, alike: bool) -> Tensor:
        ctx.cut, ctx.each, ctx.alike, ctx.rows = cut, each, alike, value.shape[0]
        return _all_rows(value, cut, each)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        cut, each = ctx.cut, ctx.each
        if not ctx.alike:
            gradient = gradient.clone(memory_format=torch.contiguous_format)
            if gradient.numel():
                dist.all_reduce(gradient, group=cut.group)
        mine = gradient.new_zeros((ctx.rows, *gradient.shape[1:]))
        if cut.mine:
            mine[:] = cut.own(gradient, each)
        return (mine * len(cut.sizes) if ctx.alike else mine), None, None, None


def _all_rows(value: Tensor, cut: Cut, each: int) -> Tensor:
    """Gather rows as bytes: gloo knows few types, and messages of one length only."""
    rows = [size * each for size in cut.sizes]
    shape = value.shape[1:]
    if not shape.numel() or not max(rows):
        return value.new_zeros((sum(rows), *shape))
    own = value[: rows[cut.rank]].contiguous().reshape(-1).view(torch.uint8)
    row = shape.numel() * value.element_size()
    padded = own.new_zeros(max(rows) * row)
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(parts, padded, group=cut.group)
    whole = torch.cat([part[: n * row] for part, n in zip(parts, rows, strict=True)])
    return cut.in_order(whole.view(value.dtype).reshape(sum(rows), *shape), each)


def _agree(values: Sequence[Tensor], cut: Cut) -> list[bool]:
    """Return which values need a gradient on any rank, all ranks' frames being of one shape."""
    mine = torch.tensor([_header(value) for value in values], dtype=torch.int64)
    mine = mine.to(values[0].device) if values else mine
    parts = [torch.empty_like(mine) for _ in cut.sizes]
    dist.all_gather(parts, mine, group=cut.group)
    everyone = torch.stack(parts).cpu()
    differing = (everyone[..., 1:] != everyone[:1, :, 1:]).any(dim=2)
    if differing.any():
        rank, value = differing.nonzero()[0].tolist()
        here, there = _readable(everyone[0, value]), _readable(everyone[rank, value])
        raise InputError(
            f"the frames of a global batch must be alike: a frame of rank 0 has {here}, "
            f"one of rank {rank} {there}"
        )
    return everyone[..., 0].any(dim=0).tolist()


def _header(value: Tensor) -> list[int]:
    shape = list(value.shape[1:])
    padding = [-1] * (_DIMENSIONS - len(shape))
    return [int(value.requires_grad), _DTYPES.index(value.dtype), *shape, *padding]


def _readable(header: Tensor) -> str:
    dtype, *shape = header[1:].tolist()
    return f"{[n for n in shape if n >= 0]} of {str(_DTYPES[dtype]).removeprefix('torch.')}"
