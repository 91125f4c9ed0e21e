"""What is a mergeable statistic?

A frozen dataclass of tensors that can be measured on pixels, merged with another one
measured on other pixels, turned into a handful of pixels that carry it exactly, and sent
through Arrow. Everything here is a pure function: no Ray, no files, no cuvis.ai.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

_REGISTRY: dict[str, type[Statistic]] = {}


@dataclass(frozen=True)
class Statistic:
    """A mergeable summary of pixels.

    Subclasses are frozen dataclasses whose fields are float64 or int64 tensors, ints or bools.
    Every subclass is an identity of ``merge`` when measured on zero pixels.

    Attributes
    ----------
    n : int
        Number of pixels measured.
    """

    n: int

    #: Name of the class, under which Arrow data find it again.
    name: ClassVar[str]
    #: Whether a measurement needs one whole frame, and not any set of pixels.
    whole_frame: ClassVar[bool] = False
    #: Whether no rounding enters it: same bits for any order, shards, threads and processor.
    exact: ClassVar[bool] = True
    #: Whether ``measure`` also takes where its pixels are: ``uid``, ``position``, ``index``.
    located: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        """Register the class under its name, for :func:`from_arrow`."""
        cls.name = cls.__name__
        _REGISTRY[cls.name] = cls

    @classmethod
    def measure(cls, pixels: Tensor) -> Statistic:
        """Measure the statistic on ``pixels`` ``[N, C]`` (any real dtype, N may be 0)."""
        raise NotImplementedError

    def merge(self, other: Any) -> Statistic:
        """Return the statistic of both sets of pixels together."""
        raise NotImplementedError

    def surrogate(self) -> Tensor:
        """Return a few float64 pixels ``[K, C]`` that carry the statistic exactly."""
        raise NotImplementedError

    def affine(self, A: Tensor, b: Tensor) -> Statistic:
        """Return the statistic of ``A x + b`` for the same pixels; A is ``[D, C]``, b ``[D]``.

        Raises
        ------
        ValueError
            If it does not follow from this statistic.
        """
        raise ValueError(f"{self.name} of mapped pixels does not follow from {self.name}")

    @property
    def channels(self) -> int:
        """Number of channels C of the measured pixels."""
        raise NotImplementedError

    def is_finite(self) -> bool:
        """Whether no NaN or infinity entered the statistic."""
        return all(
            bool(torch.isfinite(value).all())
            for value in (getattr(self, field.name) for field in fields(self))
            if isinstance(value, Tensor)
        )

    def sha256(self) -> str:
        """Return a hash of the values, the same on any machine where these have the same bits."""
        digest = hashlib.sha256(self.name.encode())
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                digest.update(f"{field.name}{[*value.shape]}{value.dtype}".encode())
                digest.update(value.contiguous().numpy(force=True).tobytes())
            else:
                digest.update(f"{field.name}{value}".encode())
        return digest.hexdigest()

    def to_arrow(self) -> pa.RecordBatch:
        """Return the statistic as one Arrow row; shapes and the class travel as metadata."""
        columns, metadata = {}, {"statistic": self.name}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                metadata[f"shape:{field.name}"] = ",".join(map(str, value.shape))
                kind = pa.int64() if value.dtype is torch.int64 else pa.float64()
                columns[field.name] = pa.array([value.reshape(-1).numpy()], type=pa.list_(kind))
            else:
                columns[field.name] = pa.array([value])
        return pa.RecordBatch.from_pydict(columns).replace_schema_metadata(metadata)

    def to_bytes(self) -> bytes:
        """Return :meth:`to_arrow` as an Arrow IPC stream."""
        batch, sink = self.to_arrow(), pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return sink.getvalue().to_pybytes()


def as_array(pixels: Tensor) -> np.ndarray:
    """Return the memory of ``pixels`` as an array; NumPy has no bfloat16, which becomes float32."""
    return (pixels.float() if pixels.dtype is torch.bfloat16 else pixels).numpy(force=True)


def statistic_class(name: str) -> type[Statistic]:
    """Return the class of statistics of this name; raises ValueError if there is none."""
    if name not in _REGISTRY:
        raise ValueError(f"not a statistic: it is called {name!r}, known are {sorted(_REGISTRY)}")
    return _REGISTRY[name]


def from_arrow(batch: pa.RecordBatch) -> Statistic:
    """Rebuild the statistic that :meth:`Statistic.to_arrow` wrote.

    Raises
    ------
    ValueError
        If the batch does not name a known statistic.
    """
    metadata = {k.decode(): v.decode() for k, v in (batch.schema.metadata or {}).items()}
    cls = statistic_class(metadata.get("statistic", ""))
    values: dict[str, Any] = {}
    for field in fields(cls):
        cell = batch.column(field.name)[0]
        if f"shape:{field.name}" in metadata:
            shape = [int(n) for n in metadata[f"shape:{field.name}"].split(",") if n]
            flat = torch.tensor(cell.values.to_numpy(zero_copy_only=False))
            values[field.name] = flat.reshape(shape)
        else:
            values[field.name] = cell.as_py()
    return cls(**values)


def from_bytes(data: bytes) -> Statistic:
    """Rebuild the statistic that :meth:`Statistic.to_bytes` wrote."""
    with pa.ipc.open_stream(data) as reader:
        return from_arrow(reader.read_next_batch())
