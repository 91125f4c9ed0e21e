"""How is a decoded frame written to a file so that reading it back copies nothing?

Its arrays lie in the file as they lie in memory, behind a pickle of everything else, and the file
is mapped: the pages of a frame are there once for all processes of a node. For files of one user
and one run alone, since a pickle can hold code.
"""

from __future__ import annotations

import io
import mmap
import pickle
import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch

#: Where an array may begin, in bytes: what processors load at a time.
_ALIGNED = 64
_NUMBERS = struct.Struct("<Q")


class PackedFrame:
    """A frame's item as the bytes of its file.

    Parameters
    ----------
    item : object
        What a dataset gives for the frame: mostly a dictionary of arrays and tensors.

    Attributes
    ----------
    size : int
        Bytes of the file.
    """

    def __init__(self, item: Any) -> None:
        stream, arrays = io.BytesIO(), list[pickle.PickleBuffer]()
        _Pickler(stream, protocol=5, buffer_callback=arrays.append).dump(item)
        parts = [memoryview(stream.getvalue()), *(array.raw() for array in arrays)]
        head = memoryview(_numbers([part.nbytes for part in parts]))
        self._parts = [head, *parts]
        self.size = sum(_padded(part.nbytes) for part in self._parts)

    def write(self, file: BinaryIO) -> None:
        """Write into a file; raises OSError if the disk is full."""
        for part in self._parts:
            file.write(part)
            file.write(bytes(_padded(part.nbytes) - part.nbytes))


def read_frame(path: Path) -> Any:
    """Return the item of a file that :class:`PackedFrame` has written.

    Its arrays can be written to; nobody else sees that.

    Raises
    ------
    OSError
        If the file is not there.
    """
    with open(path, "rb") as file:
        return unpacked(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)))


def unpacked(content: memoryview) -> Any:
    """Return the item of the bytes of such a file, whose memory its arrays use.

    They are from a process of the same user and run, since a pickle can hold code.
    """
    (count,) = _NUMBERS.unpack_from(content)
    sizes = [_NUMBERS.unpack_from(content, _NUMBERS.size * (i + 1))[0] for i in range(count)]
    parts, start = [], _padded(_NUMBERS.size * (count + 1))
    for size in sizes:
        parts.append(content[start : start + size])
        start += _padded(size)
    return pickle.loads(parts[0], buffers=parts[1:])


class _Pickler(pickle.Pickler):
    """Leaves the memory of tensors beside the pickle, as that of arrays."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not torch.Tensor or value.requires_grad:
            return NotImplemented
        try:
            return torch.from_numpy, (value.numpy(),)
        except (TypeError, RuntimeError):  # on a GPU, sparse, or of a type that NumPy lacks
            return NotImplemented


def _numbers(sizes: list[int]) -> bytes:
    return b"".join(map(_NUMBERS.pack, [len(sizes), *sizes]))


def _padded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
