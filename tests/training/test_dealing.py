"""Dealing frames: every frame once, the step's weights those of one process, all in step."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
    default_collate,
)

from cuvis_dist.archive import Numbered
from cuvis_dist.training.dealing import (
    Dealing,
    DealtBatches,
    WatchedFrames,
    cut,
    deal,
    keeps_own_order,
)
from cuvis_dist.training.feeding import DeviceFrames, Drawn, Fed, as_tensors
from cuvis_dist.training.places import Places
from cuvis_dist.training.read_ahead import ReadAhead

frames = st.integers(1, 40)
sizes = st.integers(1, 9)
worlds = st.integers(1, 6)


def shuffled(n, size, drop_last=False, **options):
    return DataLoader(range(n), size, shuffle=True, drop_last=drop_last, **options)


def drawn(loader, seed=5):
    """The batches that a loader's sampler makes after so many draws."""
    torch.manual_seed(seed)
    return list(loader.batch_sampler)


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
def test_training_uses_every_frame_once_in_the_same_global_batches(n, size, world, seed):
    ranks = [DealtBatches(shuffled(n, size), rank, world) for rank in range(world)]
    batches = []
    for dealt in ranks:
        assert dealt.frames == n
        torch.manual_seed(seed)
        batches.append(list(dealt))
    assert len({len(b) for b in batches}) == 1, "a rank would run out of steps"
    used = [
        [i for mine, dealt in zip(batches, ranks, strict=True) if dealt.weights[k] for i in mine[k]]
        for k in range(len(batches[0]))
    ]
    assert used == drawn(shuffled(n, size), seed)
    assert sorted(i for batch in used for i in batch) == list(range(n))
    assert {dealt.frames for dealt in ranks} == {n}


@given(frames, sizes, worlds)
def test_evaluation_deals_whole_batches_once(n, size, world):
    def whole(rank):
        return DealtBatches(DataLoader(range(n), size), rank, world, dealing=Dealing.TURNS)

    ranks = [whole(rank) for rank in range(world)]
    mine = [list(dealt) for dealt in ranks]
    assert all(mine), "a rank without a batch could not take part in the reductions"
    assert [len(m) for m in mine] == [len(dealt) for dealt in ranks]
    counted = [
        b for m, d in zip(mine, ranks, strict=True) for b, w in zip(m, d.weights, strict=True) if w
    ]
    assert sorted(counted) == list(DataLoader(range(n), size).batch_sampler)


@pytest.mark.parametrize(("limit", "steps"), [(None, 5), (2, 2), (9, 5), (0.5, 2), (0, 0)])
def test_a_limit_counts_global_batches(limit, steps):
    ranks = [
        DealtBatches(shuffled(20, 4), rank, 2, dealing=Dealing.TURNS, limit=limit)
        for rank in (0, 1)
    ]
    for dealt in ranks:
        torch.manual_seed(1)
        list(dealt)
    counted = sum(sum(1 for w in d.weights if w) for d in ranks)
    assert counted == steps


def test_the_loader_keeps_what_its_module_chose():
    def collate(items):
        return {"x": torch.stack(items)}

    loader = DataLoader(torch.arange(6), batch_size=4, collate_fn=collate, num_workers=0)
    dealt = deal(loader, loader.dataset, DealtBatches(loader, 1, 2))
    assert [batch["x"].tolist() for batch in dealt] == [[2, 3], [5]]


class ByEpoch(Sampler):
    """Shuffles by a seed of its own and the epoch, as samplers for many processes do."""

    epoch = 0

    def __len__(self):
        return 7

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(7, generator=generator).tolist())


class Drifting(ByEpoch):
    """Keeps a NumPy generator."""

    def __init__(self):
        self.generator = np.random.default_rng(3)

    def __iter__(self):
        return iter(self.generator.permutation(7).tolist())


def seeded(**options):
    return shuffled(7, 2, generator=torch.Generator().manual_seed(8), **options)


KINDS = {
    "shuffled": lambda: shuffled(7, 2),
    "shuffled, the last left out": lambda: shuffled(7, 2, drop_last=True),
    "in order": lambda: DataLoader(range(7), 3),
    "with processes": lambda: shuffled(7, 2, num_workers=1),
    "with processes that stay": lambda: shuffled(7, 2, num_workers=1, persistent_workers=True),
    "with replacement": lambda: DataLoader(
        range(7), 2, sampler=RandomSampler(range(7), replacement=True, num_samples=40)
    ),
    "weighted": lambda: DataLoader(
        range(7), 2, sampler=WeightedRandomSampler([1.0, 2, 3, 4, 5, 6, 7], 9)
    ),
    "a generator of its own": seeded,
    "one, with processes": lambda: seeded(num_workers=1),
    "by epoch": lambda: DataLoader(range(7), 2, sampler=ByEpoch()),
    "a NumPy generator of its own": lambda: DataLoader(range(7), 2, sampler=Drifting()),
}


def three_epochs(loader, batches):
    """As Lightning iterates: iterator, hooks, batches with draws between them, validation."""
    torch.manual_seed(42)
    validation = DataLoader(range(3))
    order = []
    for epoch in range(3):
        if hasattr(batches.sampler, "set_epoch"):
            batches.sampler.set_epoch(epoch)
        iterator = iter(loader)
        torch.rand(1)
        for batch in iterator:
            torch.rand(2)
            order.append(batch.tolist())
        iter(validation)
    return order, torch.rand(4).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read_ahead", [False, True])
@pytest.mark.parametrize("on_device", [False, True])
def test_the_order_is_that_of_the_modules_own_loader(kind, read_ahead, on_device, request):
    """And so is the random state that is left."""
    theirs = KINDS[kind]()
    expected = three_epochs(theirs, theirs.batch_sampler)
    mine = KINDS[kind]()
    batches = DealtBatches(mine, 0, 1)
    loader = deal(mine, Numbered(Drawn(mine.dataset)) if on_device else mine.dataset, batches)
    if on_device:
        loader.collate_fn = as_tensors
    if read_ahead:
        request.getfixturevalue("ray_session")
        loader = ReadAhead(loader, 2)
    if on_device:
        frames = DeviceFrames(torch.device("cpu"), 10**6)
        elsewhere = read_ahead or mine.num_workers > 0
        loader = Fed(loader, collated, frames, "train", elsewhere=elsewhere)
    assert three_epochs(loader, batches) == expected


OWN = {"by epoch", "a NumPy generator of its own"}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in OWN])
@pytest.mark.parametrize("done", [0, 1, 3])
def test_an_epoch_goes_on_where_it_was_cut_off(kind, done):
    """In another process; so do the epochs after it. ``0``: at its start, before an iterator."""
    mine = KINDS[kind]()
    cut_off = DealtBatches(mine, 0, 1)
    order, kept = [], {}

    def epochs(loader, batches, first, skip):
        for epoch in range(first, 3):
            if (epoch, done) == (1, 0) and not first:
                kept.update(state=states(batches), order=None, at=len(order))
            iterator = iter(loader)
            for number, batch in enumerate(iterator, skip):
                torch.rand(2)
                order.append(batch.tolist())
                if (epoch, number + 1) == (1, done) and not first:
                    kept.update(state=states(batches), order=batches.order(), at=len(order))
            skip = 0

    def states(batches):
        return [torch.get_rng_state(), *(g.get_state() for g in batches.generators())]

    torch.manual_seed(42)
    epochs(deal(mine, mine.dataset, cut_off), cut_off, 0, 0)
    whole, end = list(order), torch.rand(4).tolist()

    mine = KINDS[kind]()
    goes_on = DealtBatches(mine, 0, 1)
    goes_on.held = True
    loader = deal(mine, mine.dataset, goes_on)
    torch.manual_seed(7)
    assert list(loader) == [], "nothing is read before it is known what"
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(7).get_state())
    state, *generators = kept["state"]
    torch.set_rng_state(state)
    for generator, each in zip(goes_on.generators(), generators, strict=True):
        generator.set_state(each)
    goes_on.go_on(kept["order"], done)
    order.clear()
    epochs(loader, goes_on, 1, done)
    assert order == whole[kept["at"] :]
    assert torch.rand(4).tolist() == end
    assert len(goes_on.weights) == len(goes_on)


@given(frames, sizes, worlds, worlds, st.data())
def test_the_rest_of_an_epoch_is_dealt_over_other_ranks(n, size, before, after, data):
    ranks = [DealtBatches(shuffled(n, size), rank, before) for rank in range(before)]
    for dealt in ranks:
        torch.manual_seed(2)
        list(dealt)
    order, expected = ranks[-1].order(), drawn(shuffled(n, size), 2)
    done = data.draw(st.integers(0, len(expected)))
    ranks = [DealtBatches(shuffled(n, size), rank, after) for rank in range(after)]
    rest = []
    for dealt in ranks:
        dealt.go_on(order, done)
        rest.append(list(dealt))
        assert dealt.sizes == [len(batch) for batch in expected]
    for number, parts in enumerate(zip(*rest, strict=True), done):
        weighed = zip(parts, ranks, strict=True)
        used = [i for part, dealt in weighed if dealt.weights[number] for i in part]
        assert used == expected[number]


def collated(numbered):
    return default_collate([item for _, item in numbered])


def test_ranks_follow_rank_zero():
    loaders = [seeded(), shuffled(7, 2)]
    shared = []

    def share(batches):
        shared.append(batches)
        return shared[0]

    ranks = [DealtBatches(loader, i, 2, share=share) for i, loader in enumerate(loaders)]
    first, second = (list(dealt) for dealt in ranks)
    assert [a + b for a, b in zip(first, second, strict=True)][:3] == shared[0][:3]
    assert shared[0] != shared[1]


def test_processes_of_ranks_have_seeds_of_their_own():
    seeds = set()
    for rank in range(3):
        torch.manual_seed(0)
        dealt = DealtBatches(shuffled(7, 2), rank, 3)
        dealt.begin()
        seeds.add(dealt.generator.initial_seed())
    assert len(seeds) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_that_keeps_a_random_state_is_known(kind):
    loader = KINDS[kind]()
    state = torch.get_rng_state()
    before = drawn(copy.deepcopy(loader))
    torch.set_rng_state(state)
    assert keeps_own_order(loader) == ("own" in kind or kind == "one, with processes")
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn(loader) == before, "it was asked, and not moved"


class Drawing(torch.utils.data.Dataset):
    def __init__(self, draws):
        self.draws = draws

    def __getitem__(self, index):
        return torch.rand(1) if self.draws else index


@pytest.mark.parametrize("draws", [False, True])
def test_frames_that_draw_are_noticed_once(draws):
    told = []
    frames = WatchedFrames(Drawing(draws), lambda: told.append(True))
    assert pickle.loads(pickle.dumps(frames))[0] is not None
    for index in range(3):
        frames[index]
    assert told == [True] * draws


# ---- on nodes that keep frames ---------------------------------------------------------


@given(st.integers(1, 30), st.lists(st.sampled_from("abc"), min_size=1, max_size=5), st.data())
def test_places_change_the_order_alone(n, nodes, data):
    decoded = data.draw(st.dictionaries(st.integers(0, n - 1), st.sampled_from("abcd")))
    places, others = Places(nodes, decoded), Places(nodes, decoded)
    for _ in range(3):
        batch = data.draw(st.permutations(range(n)))
        arranged = places.arrange(batch)
        assert sorted(arranged) == sorted(batch)
        assert others.arrange(batch) == arranged, "every rank deals alike"


def test_a_frame_goes_to_a_rank_of_a_node_that_has_decoded_it():
    places = Places(["a", "b", "b"], {0: "b", 1: "a", 2: "c", 3: "b"})
    assert places.arrange([0, 1, 2]) == [1, 0, 2]
    assert places.arrange([2, 1, 0]) == [1, 0, 2], "2 was decoded on b meanwhile"
    assert places.arrange([3, 0, 2, 4, 5, 6]) == [4, 5, 3, 0, 2, 6], "no rank gets more"
    assert places.arrange([6, 5, 4]) == [5, 6, 4]


def test_a_frame_goes_to_the_rank_that_keeps_it():
    places = Places.of_ranks([[3, 5], [0, 1]])
    assert places.arrange([0, 1, 3, 5]) == [3, 5, 0, 1]
    assert places.arrange([5, 2, 1]) == [5, 1, 2]
    assert places.arrange([0, 1, 2]) == [2, 0, 1], "no rank gets more"


def test_where_arranged_frames_stand_in_their_batch_is_known():
    """By place, since a sampler may give a frame twice."""
    loader = DataLoader(range(10), batch_sampler=[[4, 7, 4], [5, 6]])
    batches = DealtBatches(loader, 0, 1)
    batches.arrange = sorted
    assert list(batches) == [[4, 4, 7], [5, 6]]
    assert batches.orders == [(0, 2, 1), None]


def test_in_later_epochs_most_frames_are_where_they_were_decoded():
    """64 frames in batches of 8 on two nodes: three quarters in the second epoch, then more."""
    places, kept = Places(["a", "b"], {}), {"a": set(), "b": set()}
    shares = []
    for epoch in range(4):
        order = np.random.default_rng(epoch).permutation(64).reshape(8, 8).tolist()
        again = 0
        for batch in map(places.arrange, order):
            for node, frames in (("a", batch[:4]), ("b", batch[4:])):
                again += len(kept[node] & {*frames})
                kept[node] |= {*frames}
        shares.append(again / 64)
    assert shares[0] == 0
    assert shares[1] >= 0.75
    assert shares[-1] > shares[1]
