"""Which frames does each worker get, so that the result is that of one process?

The data module's own batch sampler stays in charge, and the order is the one in which its loader
would bring the frames in one process. A training batch is cut over the workers; a validation or
test batch goes to one worker whole, since a metric need not be a mean over frames. Functions of
(batches, rank, world size): no Ray, no Lightning.

What upstream's single process draws from torch's random state, after its trainer has seeded it at
the start of the fit (whatever was drawn before, in phase 1, is so forgotten):

1. the sanity check draws nothing: Lightning puts the random state back after it;
2. the train loader is asked for its iterator: the base seed of its processes is drawn, one int64,
   whether it has processes or not. For the first epoch that is before its callbacks are told of
   the start, for the others after; a loader that keeps its processes draws it once;
3. with the first batch (of a loader with processes: with the iterator) the sampler draws: a
   ``RandomSampler`` one int64, the seed of its permutation;
4. the nodes draw what they draw, step by step;
5. each validation asks its loader for an iterator: one int64, and its sampler's draws, if any;
6. from 2. on again, in the next epoch.

:class:`DealtBatches` draws the same at the same points, on every rank. Rank 0 hands its order on
(``share``), so that ranks agree also where a sampler draws elsewhere. A checkpoint keeps the
random state at the end of 5., and a fit that goes on asks for a new iterator there; one of the
middle of an epoch keeps the order, too, of which the rest is dealt without a draw: see
``training/checkpoint.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from enum import Enum
from itertools import islice
from typing import Any

import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from cuvis_dist.training.gathering import Cut

Batches = list[list[int]]
"""The frames of each batch, by their index in the dataset."""


def cut(batch: list[int], rank: int, world_size: int) -> tuple[list[int], float]:
    """Return the rank's part of a global batch and its weight in the step.

    DDP averages the workers' gradients with equal weights; scaling a worker's loss by
    ``frames · world_size / batch frames`` makes the average that of the whole batch. A worker
    without a frame gets one with weight 0, since every worker must take part in the step.
    """
    mine = Cut.of(len(batch), rank, world_size)
    return batch[mine.dealt], mine.weight


class Dealing(Enum):
    """How global batches are dealt over the workers."""

    CUT = "each batch is cut over the workers"
    TURNS = "whole batches go to the workers in turn"
    ALL = "every worker gets every batch, which counts on the first one alone"


class DealtBatches(Sampler[list[int]]):
    """One worker's batches of each epoch.

    Parameters
    ----------
    loader : DataLoader
        The data module's own, whose batch sampler makes the global batches.
    rank, world_size : int
        Which worker this is, of how many.
    dealing : Dealing
        Training batches are cut; those of validation and test stay whole, and go to every worker
        for nodes that each batch changes.
    limit : int or float or None
        Only the first so many (int) of the global batches are dealt, or this fraction (float).
    share : callable, optional
        Takes the global batches that this rank has drawn and returns rank 0's; called once in
        every epoch, on every rank.

    Attributes
    ----------
    weights : list of float
        Weight of each of the worker's batches of the current epoch in a sum over workers that
        counts every frame once: see :func:`cut`; for whole batches 1, or 0 for one that only
        keeps the worker in step.
    sizes : list of int
        Frames of each global batch of the current epoch.
    orders : list of tuple of int, or None
        Where in its global batch each frame stands that is dealt, if a batch was arranged.
    frames : int
        Frames of all of them.
    generator : torch.Generator
        For this worker's loader, whose processes are seeded from it: from the base seed that the
        module's own loader would have drawn, and the rank.
    arrange : callable
        Takes the frames of a batch that is to be cut, and returns them in another order, the same
        on every rank; by default in theirs.
    held : bool
        Whether loaders give no batch until :meth:`go_on` was called.
    unread : callable
        Takes one of the worker's batches, just before its frames are read, and returns those that
        have to be; by default all.
    mine : list of list of int
        The worker's batches of the current epoch, as they are dealt: those that are left of it.
    """

    def __init__(
        self,
        loader: DataLoader,
        rank: int,
        world_size: int,
        *,
        dealing: Dealing = Dealing.CUT,
        limit: int | float | None = None,
        share: Callable[[Batches], Batches] | None = None,
    ) -> None:
        self.loader, self.dealing, self.limit = loader, dealing, limit
        self.batches: Any = loader.batch_sampler
        self.rank, self.world_size, self.share = rank, world_size, share
        self.weights: list[float] = []
        self.orders: list[tuple[int, ...] | None] = []
        self.sizes: list[int] = []
        self.frames = _frames(loader)
        self.generator = torch.Generator()
        self.arrange: Callable[[list[int]], list[int]] = list
        self.held = False
        self.unread: Callable[[list[int]], list[int]] = list
        self.mine: Batches = []
        self._begun = False
        self._global: Batches = []
        self._seed = 0
        #: How many batches of an order that was kept are done; None where an epoch is drawn.
        self._done: int | None = None

    @property
    def whole(self) -> bool:
        """Whether batches are not cut."""
        return self.dealing is not Dealing.CUT

    @property
    def sampler(self) -> DealtBatches:
        """Itself: Lightning looks for ``set_epoch`` at ``loader.batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Tell the module's own sampler which epoch begins, as Lightning would."""
        own = getattr(getattr(self.batches, "sampler", None), "set_epoch", None)
        if callable(own):
            own(epoch)

    def _size(self) -> int:
        size = len(self.batches)
        if self.limit is None:
            return size
        return int(size * self.limit) if isinstance(self.limit, float) else min(size, self.limit)

    def __len__(self) -> int:
        size = self._size()
        if self.dealing is not Dealing.TURNS:
            return size
        return max(len(range(self.rank, size, self.world_size)), min(size, 1))

    def begin(self) -> None:
        """Draw the base seed that the module's loader would draw for a new iterator."""
        if self._done is not None:  # not as at the epoch's start: other numbers for other frames
            self.generator.manual_seed((self._seed + self.rank + (self._done << 32)) % 2**63)
        elif not (self._begun and self.loader.persistent_workers):
            seed = torch.empty((), dtype=torch.int64).random_(generator=self.loader.generator)
            self._seed = int(seed)
            self.generator.manual_seed((self._seed + self.rank) % 2**63)
        self._begun = True

    def order(self) -> dict[str, Any]:
        """Return what :meth:`go_on` needs to deal the rest of the current epoch."""
        frames = [index for batch in self._global for index in batch]
        return {
            "frames": torch.tensor(frames, dtype=torch.int64),
            "sizes": torch.tensor(self.sizes, dtype=torch.int64),
            "seed": self._seed,
        }

    def go_on(self, order: dict[str, Any] | None = None, done: int = 0) -> None:
        """Go on where another process stopped, whatever number of workers it was one of.

        Parameters
        ----------
        order : dict, optional
            The :meth:`order` of an epoch of which the next iterator yields the rest; without one,
            the next iterator draws an epoch.
        done : int
            How many batches of it are done.
        """
        self.held, self._begun = False, True
        if order is not None:
            sizes = order["sizes"].tolist()
            self._global = [part.tolist() for part in order["frames"].split(sizes)]
            self._seed, self._done = order["seed"], done

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this worker's batches; they are drawn when the first one is asked for."""
        done, self._done = self._done, None
        if done is None:
            self._global = list(islice(self.batches, self._size()))
            if self.share is not None:
                self._global = self.share(self._global)
        batches = self._global
        self.sizes = [len(batch) for batch in batches]
        self.orders = [None] * len(batches)
        self.frames = sum(self.sizes)
        if self.dealing is Dealing.ALL:
            mine = [(batch, float(self.rank == 0)) for batch in batches]
        elif self.dealing is Dealing.TURNS:
            mine = [(batch, 1.0) for batch in batches[self.rank :: self.world_size]]
            if not mine and batches:
                mine = [(batches[0], 0.0)]
        else:
            arranged = [self.arrange(batch) for batch in batches]
            self.orders = [*map(_order, batches, arranged)]
            mine = [cut(batch, self.rank, self.world_size) for batch in arranged]
        self.weights = [weight for _, weight in mine]
        self.mine = [batch for batch, _ in mine[done or 0 :]]
        yield from map(self.unread, self.mine)

    def generators(self) -> list[torch.Generator]:
        """Return the generators that the module gave its loader and samplers, each once."""
        places = (self.loader, self.batches, getattr(self.batches, "sampler", None))
        found = [getattr(place, "generator", None) for place in places]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _order(batch: list[int], arranged: list[int]) -> tuple[int, ...] | None:
    """Return where in a batch its frames stand, as they were arranged, or None for its order."""
    if arranged == batch:
        return None
    places: dict[int, list[int]] = {}
    for place in reversed(range(len(batch))):
        places.setdefault(batch[place], []).append(place)
    return tuple(places[frame].pop() for frame in arranged)


def _frames(loader: DataLoader) -> int:
    """Return how many frames an epoch will have, as far as can be said before it is drawn."""
    batches, dataset = loader.batch_sampler, loader.dataset
    if not isinstance(batches, BatchSampler):
        return len(dataset)  # type: ignore[arg-type]
    frames = len(batches.sampler)  # type: ignore[arg-type]
    return frames - frames % batches.batch_size if batches.drop_last else frames


def keeps_own_order(loader: DataLoader) -> bool:
    """Whether a loader's order depends on more than the random states that a fit seeds.

    Its batch sampler is copied and asked twice under the same state of Python's, NumPy's and
    torch's generators; the loader and these states are left as they were.
    """
    dataset = loader.dataset
    try:
        batches: Any = copy.deepcopy(loader.batch_sampler, {id(dataset): dataset})
    except Exception:
        return True  # what cannot be copied holds something that is not ours to see
    drawn = []
    for _ in range(2):
        with isolate_rng(include_cuda=False):
            drawn.append(list(batches))
    return drawn[0] != drawn[1]


class _DealtLoader(DataLoader):
    """A loader in :class:`DealtBatches`, which hear of every new iterator."""

    def __iter__(self) -> Any:
        if self.batch_sampler.held:  # type: ignore[union-attr]
            return iter(())
        self.batch_sampler.begin()  # type: ignore[union-attr]
        return super().__iter__()


class WatchedFrames(Dataset):
    """A dataset that tells, once, if reading a frame draws from torch's random state.

    Parameters
    ----------
    frames : Dataset
        It is read in this process; what is read in others leaves this one's state alone.
    drawing : callable
        It is called after the first frame, if reading that drew.
    """

    def __init__(self, frames: Dataset, drawing: Callable[[], None]) -> None:
        self.frames, self.drawing = frames, drawing
        self._seen = False

    def __len__(self) -> int:
        return len(self.frames)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        """Read a frame."""
        if self._seen:
            return self.frames[index]
        before = torch.get_rng_state()
        item = self.frames[index]
        self._seen = True
        if not torch.equal(before, torch.get_rng_state()):
            self.drawing()
        return item

    def __getstate__(self) -> dict[str, Any]:
        """Tell nothing in another process."""
        return self.__dict__ | {"_seen": True, "drawing": None}


def deal(loader: DataLoader, dataset: Dataset, batches: DealtBatches) -> DataLoader:
    """Return ``loader`` as its module made it, over ``dataset`` and in ``batches``."""
    options: dict[str, Any] = (
        {"prefetch_factor": loader.prefetch_factor} if loader.num_workers else {}
    )
    return _DealtLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        persistent_workers=loader.persistent_workers,
        generator=batches.generator,
        **options,
    )
