"""How do tensors travel that torch writes and cannot read back?

torch 2.14 pickles tensors of its younger types (uint16, uint32, uint64, the float8 family) with
their untyped storage, and cannot unpickle that: ``type object 'torch.storage.UntypedStorage' has
no attribute 'dtype'``. Seen in 2.14.1; ``torch.save`` once had the like (pytorch/pytorch#131470),
and is not touched here. ``.cu3s`` cubes are uint16, so data modules and frames contain such
tensors.

The reducer is registered where :mod:`cuvis_dist.execution` is imported, which every process of a
run does, driver and workers: it is what brings work to them.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable

import numpy as np
import torch


def register() -> None:
    """Let pickle and cloudpickle write untyped storages so that they can be read back."""
    copyreg.pickle(torch.UntypedStorage, _reduce)  # type: ignore[arg-type]


def _reduce(
    storage: torch.UntypedStorage,
) -> tuple[Callable[..., torch.TypedStorage], tuple[np.ndarray, str]]:
    """Write the bytes as an array, which pickle 5 hands on without copying them."""
    content = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return _rebuild, (content.cpu().numpy(), str(storage.device))


def _rebuild(content: np.ndarray, device: str) -> torch.TypedStorage:
    """Return the storage as torch's own function for such tensors wants it: typed, of bytes.

    It gets memory of its own, since what comes out of Ray is shared and must not be written to.
    """
    writable = content if content.flags.writeable else content.copy()
    bytes_ = torch.from_numpy(writable).to(device).untyped_storage()
    return torch.TypedStorage(wrap_storage=bytes_, dtype=torch.uint8, _internal=True)
