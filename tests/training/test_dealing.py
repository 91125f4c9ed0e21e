"""Dealing frames: every frame once, the step's weights those of one process, all in step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from cuvis_dist.training.dealing import DealtBatches, cut, deal

frames = st.integers(1, 40)
sizes = st.integers(1, 9)
worlds = st.integers(1, 6)


def shuffled(n, size, drop_last=False):
    return BatchSampler(RandomSampler(range(n)), size, drop_last)


@given(st.integers(1, 30), worlds)
def test_a_cut_covers_the_batch_and_its_weights_average_to_one(n, world):
    batch = list(range(n))
    parts = [cut(batch, rank, world) for rank in range(world)]
    assert [i for part, weight in parts if weight for i in part] == batch
    # The mean over ranks of weight · (mean over the part) is the mean over the batch.
    step = sum(w * sum(part) / len(part) for part, w in parts) / world
    assert step == pytest.approx(sum(batch) / n)
    assert sum(w for _, w in parts) == pytest.approx(world)
    assert all(part for part, _ in parts)


@given(frames, sizes, worlds, st.integers(0, 3))
def test_training_uses_every_frame_once_in_the_same_global_batches(n, size, world, epoch):
    ranks = [DealtBatches(shuffled(n, size), rank, world, seed=5) for rank in range(world)]
    alone = DealtBatches(shuffled(n, size), 0, 1, seed=5)
    for dealt in (*ranks, alone):
        dealt.set_epoch(epoch)
    batches = [list(dealt) for dealt in ranks]
    assert len({len(b) for b in batches}) == 1, "a rank would run out of steps"
    used = [
        [i for mine, dealt in zip(batches, ranks, strict=True) if dealt.weights[k] for i in mine[k]]
        for k in range(len(batches[0]))
    ]
    assert used == list(alone)
    assert sorted(i for batch in used for i in batch) == list(range(n))
    assert {dealt.frames for dealt in ranks} == {n}


@given(frames, sizes, worlds)
def test_evaluation_deals_whole_batches_once(n, size, world):
    def whole(rank):
        batches = BatchSampler(SequentialSampler(range(n)), size, False)
        return DealtBatches(batches, rank, world, seed=0, whole=True)

    ranks = [whole(rank) for rank in range(world)]
    mine = [list(dealt) for dealt in ranks]
    assert all(mine), "a rank without a batch could not take part in the reductions"
    assert [len(m) for m in mine] == [len(dealt) for dealt in ranks]
    counted = [
        b for m, d in zip(mine, ranks, strict=True) for b, w in zip(m, d.weights, strict=True) if w
    ]
    alone = list(BatchSampler(SequentialSampler(range(n)), size, False))
    assert sorted(counted) == alone


def test_epochs_differ_and_repeat():
    dealt = DealtBatches(shuffled(20, 4), 0, 2, seed=1)
    first = list(dealt)
    dealt.set_epoch(1)
    second = list(dealt)
    dealt.set_epoch(0)
    assert list(dealt) == first != second


def test_dealing_leaves_the_process_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(DealtBatches(shuffled(20, 4), 0, 2, seed=1))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("limit", "steps"), [(None, 5), (2, 2), (9, 5), (0.5, 2), (0, 0)])
def test_a_limit_counts_global_batches(limit, steps):
    ranks = [
        DealtBatches(shuffled(20, 4), rank, 2, seed=1, whole=True, limit=limit) for rank in (0, 1)
    ]
    for dealt in ranks:
        list(dealt)  # weights are those of what was dealt
    assert sum(1 for dealt in ranks for weight in dealt.weights if weight) == steps


def test_the_loader_keeps_what_its_module_chose():
    def collate(items):
        return {"x": torch.stack(items)}

    loader = DataLoader(torch.arange(6), batch_size=4, collate_fn=collate, num_workers=0)
    dealt = deal(loader, loader.dataset, DealtBatches(loader.batch_sampler, 1, 2, seed=0))
    assert [batch["x"].tolist() for batch in dealt] == [[2, 3], [5]]
