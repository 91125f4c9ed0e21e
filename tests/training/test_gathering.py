"""Are gradients on many ranks those of the whole batch? In float64, against one process."""

from __future__ import annotations

import pytest
import torch
from ranks import Ranks
from torch import nn

from cuvis_dist.errors import InputError
from cuvis_dist.training.batchnorm import batch_norms, synchronized
from cuvis_dist.training.gathering import Cut, gather, gather_list


@pytest.fixture(scope="module")
def ranks():
    pool = Ranks("cuvis_dist.training.batchnorm")
    yield pool
    pool.close()


#: Batches that divide and that do not, and one with fewer frames than ranks.
CASES = [(ranks, frames) for ranks in (1, 2, 3, 4) for frames in (1, 2, 5, 8)]


def dealt(frames, cut):
    """The rank's frames; the first that is dealt where it has none."""
    return cut.own(frames, 1)


# ---- gathers ---------------------------------------------------------------------------


class Model(nn.Module):
    """Parameters before, inside and behind a joint node; losses of each kind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.inside, self.behind = (nn.Linear(4, 4) for _ in range(3))
        self.double()

    def middle(self, value):
        """A joint node: rows that depend on the whole batch, and a number of the whole batch."""
        mixed = self.inside(value)
        spread = (mixed - mixed.mean(0)).square().sum()
        weights = torch.arange(1, len(mixed) + 1, dtype=mixed.dtype)
        return torch.cumsum(mixed * weights[:, None], 0) / (1 + spread), (1 + spread).sqrt()

    def joint_loss(self, value, target):
        return (value * target).sum() / (1 + value.square().sum())

    def mean_loss(self, value, target, scale):
        return (value * scale - target).square().mean()

    def regularizer(self):
        return self.behind.weight.square().sum()


def whole_batch(model, frames, targets):
    hidden = model.before(frames)
    rows, number = model.middle(hidden)
    out = model.behind(rows)
    return (
        model.mean_loss(out, targets, number)
        + model.joint_loss(out, targets)
        + model.joint_loss(hidden, targets) * number
        + model.mean_loss(hidden, targets, 1.0)
        + model.regularizer()
    )


def part_of_batch(model, frames, targets, cut):
    hidden = model.before(dealt(frames, cut))
    (everything,) = gather([hidden], cut, [1], False)
    rows, number = model.middle(everything)
    target = dealt(targets, cut)
    out = model.behind(cut.own(rows, 1))
    all_out, all_targets = gather([out, target], cut, [1, 1], True)
    all_hidden, _ = gather([hidden, target], cut, [1, 1], False)
    return (
        cut.weight * model.mean_loss(out, target, number)
        + model.joint_loss(all_out, all_targets)
        + model.joint_loss(all_hidden, all_targets) * number
        + cut.weight * model.mean_loss(hidden, target, 1.0)
        + model.regularizer()
    )


def other_order(frames):
    """An order in which the frames of a batch may be dealt."""
    return tuple(torch.randperm(frames, generator=torch.Generator().manual_seed(1)).tolist())


def gradients_by_ddp(rank, world_size, group, arranged, frames, targets):
    """Loss and gradients as DDP leaves them: the mean over ranks."""
    order = other_order(len(frames)) if arranged else None
    cut = Cut.of(len(frames), rank, world_size, group, order)
    model = Model()
    loss = part_of_batch(model, frames, targets, cut)
    loss.backward()
    return averaged([loss.detach(), *(p.grad for p in model.parameters())], group, world_size)


def averaged(values, group, world_size):
    values = [value.clone() for value in values]
    for value in values:
        torch.distributed.all_reduce(value, group=group)
        value /= world_size
    return values


@pytest.mark.parametrize("arranged", [False, True])
@pytest.mark.parametrize(("world_size", "frames"), CASES)
def test_gradients_are_those_of_the_whole_batch(ranks, world_size, frames, arranged):
    generator = torch.Generator().manual_seed(frames)
    batch = [torch.randn(frames, 4, generator=generator, dtype=torch.float64) for _ in range(2)]
    model = Model()
    loss = whole_batch(model, *batch)
    loss.backward()
    expected = [loss.detach(), *(p.grad for p in model.parameters())]
    for found in ranks.run(world_size, gradients_by_ddp, arranged, *batch):
        for mine, other in zip(found, expected, strict=True):
            assert (mine - other).abs().max() <= 1e-12 * (1 + other.abs().max())


TYPES = [torch.bool, torch.uint8, torch.uint16, torch.int32, torch.int64, torch.float16]


def gathered_values(rank, world_size, group, frames, arranged):
    order = other_order(frames) if arranged else None
    cut = Cut.of(frames, rank, world_size, group, order)
    rows = torch.arange(frames * 2).reshape(-1, 1)
    values = [dealt(rows.reshape(frames, 2), cut).reshape(-1, 1).to(each) for each in TYPES]
    empty = torch.zeros(max(1, cut.mine), 0, 3)
    names = dealt([f"frame {i}" for i in range(frames)], cut)
    found = gather([*values, empty], cut, [2] * len(TYPES) + [1], False)
    of_types = [(each.dtype, each.long()) for each in found]
    return of_types, gather_list(names, cut, 1)


@pytest.mark.parametrize("arranged", [False, True])
@pytest.mark.parametrize(("world_size", "frames"), [(2, 1), (3, 5), (4, 2), (3, 3)])
def test_rows_of_any_type_come_in_the_frames_order(ranks, world_size, frames, arranged):
    """Also where a batch was dealt in another order, by what ranks keep."""
    for (*found, (_, empty)), names in ranks.run(world_size, gathered_values, frames, arranged):
        for (dtype, value), expected in zip(found, TYPES, strict=True):
            assert dtype is expected
            assert torch.equal(value, torch.arange(frames * 2).reshape(-1, 1).to(dtype).long())
        assert empty.shape == (frames, 0, 3)
        assert names == [f"frame {i}" for i in range(frames)]


def unlike(rank, world_size, group):
    try:
        gather([torch.zeros(1, 3 + rank)], Cut.of(2, rank, world_size, group), [1], False)
    except InputError as error:
        return str(error)
    return None


def test_frames_of_unlike_shapes_are_named(ranks):
    for said in ranks.run(2, unlike):
        assert "rank 0 has [3] of float32, one of rank 1 [4] of float32" in said


def only_one_needs_a_gradient(rank, world_size, group):
    value = torch.ones(1, 2, dtype=torch.float64, requires_grad=rank == 1)
    (whole,) = gather([value], Cut.of(2, rank, world_size, group), [1], False)
    (whole.sum() * (1 + rank)).backward()
    return value.grad


def test_a_rank_without_gradients_takes_part_in_the_backward_pass(ranks):
    assert torch.equal(ranks.run(2, only_one_needs_a_gradient)[1], torch.full((1, 2), 3.0).double())


# ---- batch norms -----------------------------------------------------------------------

NORMS = {
    "images": (lambda: nn.BatchNorm2d(3), (3, 4, 5)),
    "cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), (3, 4, 5)),
    "without parameters": (lambda: nn.BatchNorm2d(3, affine=False), (3, 4, 5)),
    "without running statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (3, 2, 2)),
    "vectors": (lambda: nn.BatchNorm1d(6), (6,)),
    "volumes": (lambda: nn.BatchNorm3d(2), (2, 2, 3, 2)),
}


def normed(make, scale=1.0):
    torch.manual_seed(1)
    norm = nn.Sequential(make(), nn.Identity()).double()
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 2.0)
    return norm


def through(norm, frames, targets):
    """Two batches, so that running statistics move twice."""
    norm(frames * 3 - 1)
    out = norm(frames)
    return out, (out - targets).pow(2).flatten(1).mean(1)


def norm_gradients(rank, world_size, group, name, frames, targets):
    cut = Cut.of(len(frames), rank, world_size, group)
    norm = normed(NORMS[name][0])
    mine = dealt(frames, cut).clone().requires_grad_()
    with synchronized(batch_norms(norm), cut):
        out, losses = through(norm, mine, dealt(targets, cut))
    (cut.weight * losses.mean()).backward()
    rows = slice(0, cut.mine)
    (everything,) = gather([mine.grad / world_size], cut, [1], False)
    averages = averaged([p.grad for p in norm.parameters()], group, world_size)
    assert not any("forward" in each.__dict__ for each in norm.modules())
    return out[rows].detach(), everything, averages, list(norm.buffers())


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(("world_size", "frames"), [(1, 2), (2, 5), (3, 2), (4, 6), (4, 3)])
def test_a_batch_norm_sees_the_whole_batch(ranks, name, world_size, frames):
    make, shape = NORMS[name]
    generator = torch.Generator().manual_seed(frames)
    batch = torch.randn(frames, *shape, generator=generator, dtype=torch.float64) * 4 + 7
    targets = torch.rand(batch.shape, generator=generator, dtype=torch.float64)
    norm = normed(make)
    whole = batch.clone().requires_grad_()
    out, losses = through(norm, whole, targets)
    losses.mean().backward()
    found = ranks.run(world_size, norm_gradients, name, batch, targets)
    assert torch.allclose(torch.cat([part for part, *_ in found]), out, rtol=0, atol=1e-12)
    for _, inputs, parameters, buffers in found:
        assert torch.allclose(inputs, whole.grad, rtol=0, atol=1e-12)
        for mine, other in zip(parameters, norm.parameters(), strict=True):
            assert torch.allclose(mine, other.grad, rtol=0, atol=1e-12)
        for mine, other in zip(buffers, norm.buffers(), strict=True):
            assert torch.allclose(mine, other, rtol=0, atol=1e-12)


def evaluated(rank, world_size, group, frames):
    norm = normed(NORMS["images"][0])
    norm.eval()
    with synchronized(batch_norms(norm), Cut.of(len(frames), rank, world_size, group)):
        return norm(frames).detach()


def test_a_batch_norm_that_does_not_train_is_left_alone(ranks):
    frames = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    norm = normed(NORMS["images"][0]).eval()
    for out in ranks.run(2, evaluated, frames):
        assert torch.equal(out, norm(frames))


def one_value(rank, world_size, group):
    norm = normed(NORMS["vectors"][0])
    try:
        with synchronized(batch_norms(norm), Cut.of(1, rank, world_size, group)):
            norm(torch.ones(1, 6, dtype=torch.float64))
    except ValueError as error:
        return str(error)
    return None


def test_a_batch_of_one_value_is_refused_as_torch_refuses_it(ranks):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm1d(6)(torch.ones(1, 6))
    assert all("more than 1 value per channel" in said for said in ranks.run(2, one_value))
