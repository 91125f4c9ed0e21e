"""How is a value written so that reading it back runs no code?

Numbers, text, members of enumerations, containers of them, tensors, arrays and the states of random
generators are written, each with the name of its kind; of everything else :class:`NotPlainError`
says what it is. The content is torch's format as it is read with ``weights_only=True``, behind its
SHA-256. So whoever can write to a results folder can spoil a result, but cannot run anything as
the next person who types the command.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

_DIGEST_BYTES = 32


class NotPlainError(ValueError):
    """A value that cannot be written, or content that holds more than such values."""


def to_bytes(value: Any) -> bytes:
    """Return a plain value as bytes; raises NotPlainError if it is none."""
    buffer = io.BytesIO()
    torch.save(encode(value), buffer)
    content = buffer.getvalue()
    return hashlib.sha256(content).digest() + content


def from_bytes(data: bytes) -> Any:
    """Return the value that :func:`to_bytes` was given; raises NotPlainError for other bytes."""
    digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise NotPlainError("it is damaged")
    return decode(load(io.BytesIO(content)))


def load(file: io.BytesIO | Path, mmap: bool | None = None) -> Any:
    """Return what torch saved, if that is tensors and plain values.

    Parameters
    ----------
    file : Path or BytesIO
        What torch wrote.
    mmap : bool, optional
        Read tensors when they are looked at.

    Raises
    ------
    NotPlainError
        If it holds anything else, or is nothing that torch wrote.
    FileNotFoundError
        If there is no such file.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch's own message advises to trust the file
        raise NotPlainError("it holds more than tensors and plain values, or is damaged") from error


# ---- kinds -----------------------------------------------------------------------------

_AS_THEY_ARE = (type(None), bool, int, float, str)


def encode(value: Any) -> Any:
    """Return a value as numbers, text, tensors, lists and dictionaries with the names of kinds.

    Raises
    ------
    NotPlainError
        If something in it is of no kind that is known here; the message names its class.
    """
    try:
        return _encoded(value)
    except RecursionError:
        raise NotPlainError("it contains itself") from None


def _encoded(value: Any) -> Any:
    if type(value) in _AS_THEY_ARE:
        return value
    if type(value) is list:
        return [_encoded(item) for item in value]
    if type(value) is torch.Tensor:
        return _compact(value)
    for kind, (cls, write, _) in _KINDS.items():
        if type(value) is cls:
            return {"kind": kind, "value": _encoded(write(value))}
    if isinstance(value, Enum):
        cls = type(value)
        named = [cls.__module__, cls.__qualname__, value.name]
        if _enum_member(*named) is value:
            return {"kind": "enum", "value": named}
    if isinstance(value, PurePath):
        return {"kind": "path", "value": os.fspath(value)}
    if isinstance(value, np.generic) and value.dtype != object:
        return {"kind": "scalar", "value": _encoded(np.asarray(value))}
    raise NotPlainError(f"a {type(value).__module__}.{type(value).__qualname__} cannot be written")


def decode(value: Any) -> Any:
    """Return what :func:`encode` was given; raises NotPlainError if it cannot have been."""
    try:
        return _decoded(value)
    except NotPlainError:
        raise
    except Exception as error:
        raise NotPlainError(f"it is not what was written: {error}") from error


def _decoded(value: Any) -> Any:
    if type(value) is list:
        return [_decoded(item) for item in value]
    if type(value) is not dict:
        return value
    kind, content = value["kind"], _decoded(value["value"])
    if kind == "path":
        return Path(content)
    if kind == "scalar":
        return content[()]
    if kind == "enum":
        return _enum_member(*content)
    return _KINDS[kind][2](content)


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose memory holds nothing else: torch saves memory as a whole."""
    tensor = tensor.detach()
    alone = tensor.untyped_storage().nbytes() == tensor.nbytes
    return (
        tensor if alone or tensor.is_sparse else tensor.clone(memory_format=torch.contiguous_format)
    )


def _enum_member(module: str, name: str, member: str) -> Enum:
    """Return a member of an enumeration of a module that is loaded: nothing is imported for it."""
    cls = vars(sys.modules[module]).get(name) if module in sys.modules else None
    if not (isinstance(cls, type) and issubclass(cls, Enum) and member in cls.__members__):
        raise NotPlainError(f"{module}.{name}.{member} cannot be found")
    return cls.__members__[member]


def _write_array(array: np.ndarray) -> dict[str, Any]:
    if array.dtype.hasobject or array.dtype.names is not None:
        raise NotPlainError(f"an array of {array.dtype} cannot be written")
    return {"dtype": array.dtype.str, "shape": array.shape, "bytes": array.tobytes()}


def _read_array(parts: dict[str, Any]) -> np.ndarray:
    flat = np.frombuffer(bytearray(parts["bytes"]), dtype=np.dtype(parts["dtype"]))
    return flat.reshape(parts["shape"])


def _read_bytes(content: torch.Tensor) -> bytes:
    return content.numpy().tobytes()


def _write_bytes(content: bytes | bytearray) -> torch.Tensor:
    if not content:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _read_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise NotPlainError(f"{name} is no type of tensors")
    return dtype


def _read_torch_generator(parts: list[Any]) -> torch.Generator:
    device, state = parts
    generator = torch.Generator(device)
    generator.set_state(state)
    return generator


def _read_numpy_generator(state: dict[str, Any]) -> np.random.Generator:
    bits = {cls.__name__: cls for cls in _BIT_GENERATORS}[state["bit_generator"]]()
    bits.state = state  # type: ignore[assignment]
    return np.random.Generator(bits)


def _read_python_generator(state: tuple) -> random.Random:
    generator = random.Random()
    generator.setstate(state)
    return generator


_BIT_GENERATORS = (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox)
#: By name: the class, what an object of it is written as, and what makes that an object again.
_KINDS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "tuple": (tuple, list, tuple),
    "dict": (dict, lambda value: [[*pair] for pair in value.items()], dict),
    "ordered": (OrderedDict, lambda value: [[*pair] for pair in value.items()], OrderedDict),
    "counter": (Counter, dict, Counter),
    "set": (set, lambda value: sorted(value, key=repr), set),
    "frozenset": (frozenset, lambda value: sorted(value, key=repr), frozenset),
    "deque": (
        deque,
        lambda value: [value.maxlen, list(value)],
        lambda parts: deque(parts[1], parts[0]),
    ),
    "bytes": (bytes, _write_bytes, _read_bytes),
    "bytearray": (bytearray, _write_bytes, lambda content: bytearray(_read_bytes(content))),
    "complex": (complex, lambda value: [value.real, value.imag], lambda parts: complex(*parts)),
    "slice": (slice, lambda value: [value.start, value.stop, value.step], lambda p: slice(*p)),
    "range": (range, lambda value: [value.start, value.stop, value.step], lambda p: range(*p)),
    "array": (np.ndarray, _write_array, _read_array),
    "parameter": (
        torch.nn.Parameter,
        lambda value: [value.detach(), value.requires_grad],
        lambda parts: torch.nn.Parameter(*parts),
    ),
    "dtype": (torch.dtype, lambda value: str(value).removeprefix("torch."), _read_dtype),
    "device": (torch.device, str, torch.device),
    "size": (torch.Size, list, torch.Size),
    "torch generator": (
        torch.Generator,
        lambda value: [str(value.device), value.get_state()],
        _read_torch_generator,
    ),
    "numpy generator": (
        np.random.Generator,
        lambda value: value.bit_generator.state,
        _read_numpy_generator,
    ),
    "python generator": (random.Random, lambda value: value.getstate(), _read_python_generator),
}
