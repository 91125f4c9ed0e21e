"""How do frames become one batch, and what is said when they cannot? Which frames they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from cuvis_dist.errors import CuvisDistError, DataError, one_line


class Numbered(Dataset):
    """A data set whose items come with their numbers, for :class:`NamingCollate`.

    Parameters
    ----------
    dataset : map-style dataset
        Whose items these are.
    read : callable, optional
        Returns an item by its number; by default the data set does.
    """

    def __init__(self, dataset: Any, read: Callable[[int], Any] | None = None) -> None:
        self.dataset, self.read = dataset, read or dataset.__getitem__

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        """Return the number of an item, and the item."""
        return index, self.read(index)


class NamingCollate:
    """Another ``collate_fn``, for the items of :class:`Numbered`, whose errors name the frames.

    Parameters
    ----------
    collate : callable
        It makes a batch of a list of items.
    frames : sequence of Frame
        One per item of the data set.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], frames: Sequence[Any]) -> None:
        self.collate, self.frames = collate, frames

    def __call__(self, numbered: Sequence[tuple[int, Any]]) -> Any:
        """Return the batch; raises DataError as :func:`collate_frames` does."""
        items = [item for _, item in numbered]
        return collate_frames(self.collate, items, [self.frames[index] for index, _ in numbered])


def collate_frames(
    collate: Callable[[list[Any]], Any], items: list[Any], frames: Sequence[Any]
) -> Any:
    """Return what ``collate`` makes of the items of some frames.

    Raises
    ------
    DataError
        If it fails; the message names the frames, and their sizes if these differ.
    """
    try:
        return collate(items)
    except CuvisDistError:
        raise
    except Exception as error:
        reason = one_line(error)
        if sizes := _unlike_sizes(items):
            reason = (
                f"their sizes differ ({sizes}). Use batch_size: 1, recordings of one size, or "
                "leave the odd ones out of the split"
            )
        names = ", ".join(map(str, frames))
        raise DataError(f"cannot batch {names}: {reason}") from error


def is_array(value: Any) -> bool:
    """Whether a value is an array or a tensor."""
    return isinstance(value, np.ndarray | torch.Tensor)


def _unlike_sizes(items: list[Any]) -> str:
    """Return the shapes of the first entry whose shapes differ; nothing where there is none."""
    known = [item for item in items if isinstance(item, dict)]
    for key in known[0] if known else ():
        shapes = [tuple(np.shape(item[key])) for item in known if is_array(item.get(key))]
        if len(set(shapes)) > 1:
            return f"{key}: {', '.join(map(str, shapes))}"
    return ""
