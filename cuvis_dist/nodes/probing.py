"""How does a node that nobody described treat the frames of a batch? It is run, to find out.

A copy of the node gets a batch of two frames, then each of them alone, in the mode in which it
will train, from the same random state. Its outputs, its state (tensors, plain attributes, modules
inside) and the random states are compared. A probe can only refute: what differs is joint.
"""

from __future__ import annotations

import copy
import hashlib
import math
import pickle
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from cuvis_ai_core.node.node import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import Metric

from cuvis_dist.nodes.rows import Rows, frame_of, has_frames, is_ragged, map_rows, rows_of
from cuvis_dist.nodes.treatment import Batching, Treatment

#: By how much a frame's values may differ alone and in a batch, relative to the largest: kernels
#: add up in another order for another shape.
_ROUNDING = 1e-4
#: A mean is computed in one step from values that are bits the same.
_MEAN_ROUNDING = 1e-5


@dataclass(frozen=True)
class Seen:
    """What a node receives for two frames and for the first of them.

    Attributes
    ----------
    two, one : dict
        Inputs by port.
    rows : dict of str to Rows
        Which rows of each port belong to a frame.
    more : dict
        What is handed over besides: the context.
    """

    two: dict[str, Any]
    one: dict[str, Any]
    rows: dict[str, Rows]
    more: dict[str, Any]

    def frame(self, index: int) -> dict[str, Any]:
        """Return the inputs for one of the two frames."""
        return {port: frame_of(value, self.rows[port], index) for port, value in self.two.items()}


def probe(node: Node, seen: Seen, read: frozenset[str], is_loss: bool) -> Batching:
    """Find out how ``node`` treats the frames of a training batch; it is left as it is.

    Parameters
    ----------
    read : frozenset of str
        Output ports that matter.
    is_loss : bool
        Whether its outputs are added to the loss, so that a mean can be recognized.
    """
    try:
        subject = copy.deepcopy(node)
        norms = [m for m in subject.modules() if isinstance(m, _BatchNorm) and m.training]
        for norm in norms:
            norm.eval()
        with left_alone():
            return _probed(subject, seen, read, is_loss, bool(norms))
    except Exception as error:
        return _joint(f"cannot be run on single frames: {type(error).__name__}")


def evolves_when_run(node: Node, inputs: dict[str, Any], as_is: bool = False) -> bool:
    """Whether running ``node`` changes what it does next; it is left as it is.

    Parameters
    ----------
    as_is : bool
        Run it in the mode that it is in; otherwise in evaluation mode.
    """
    try:
        subject = copy.deepcopy(node)
        if not as_is:
            subject.eval()
        with left_alone():
            subject.forward(**inputs)  # what it keeps from a first run, caches say, stays
            before = digest(subject), random_states()
            subject.forward(**inputs)
            return (digest(subject), random_states()) != before
    except Exception:
        return True


def _probed(
    subject: Node, seen: Seen, read: frozenset[str], is_loss: bool, norms: bool
) -> Batching:
    subject.forward(**seen.two, **seen.more)  # fills caches
    state, start = digest(subject), random_states()
    whole = subject.forward(**seen.two, **seen.more)
    end = random_states()
    drew = end != start
    if digest(subject) != state:
        return _joint("its state changes as it runs", random=drew)
    frames = []
    for index in (0, 1):
        set_random_states(start)
        frames.append(subject.forward(**seen.frame(index), **seen.more))
        if random_states() != end:
            return _joint("draws random numbers for each frame", random=True)
    if digest(subject) != state:
        return _joint("its state changes as it runs", random=drew)
    ports = sorted(read & whole.keys())
    differing = [port for port in ports if not _each_alone(port, whole, frames)]
    if not differing:
        why = "treats each frame by itself" + (", but for its batch norms" if norms else "")
        return Batching(Treatment.PER_FRAME, why, norms, drew, found=True)
    plain = not norms and not drew
    if is_loss and plain and _is_mean(subject, seen, ports):
        return Batching(Treatment.MEAN, "is a mean over frames", found=True)
    return _joint(f"{', '.join(differing)}: other for a batch than for its frames", random=drew)


def _joint(why: str, random: bool = False) -> Batching:
    return Batching(Treatment.JOINT, why, random=random, found=True)


def _each_alone(port: str, whole: dict[str, Any], frames: list[dict[str, Any]]) -> bool:
    rows = rows_of(whole[port], frames[0][port])
    if is_ragged(rows):
        return False
    return all(
        _alike(frame_of(whole[port], rows, index), frame[port])
        for index, frame in enumerate(frames)
    )


def _alike(a: Any, b: Any, rounding: float = _ROUNDING) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and a.dtype != object:
        a, b = torch.from_numpy(np.ascontiguousarray(a)), torch.from_numpy(np.ascontiguousarray(b))
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        if isinstance(a, list | tuple) and isinstance(b, list | tuple):
            return len(a) == len(b) and all(map(_alike, a, b))
        return digest(a) == digest(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.dtype.is_floating_point or not a.numel():
        return torch.equal(a, b)
    scale = b.double().nan_to_num(0, 0, 0).abs().max()
    return torch.allclose(
        a.double(), b.double(), rtol=0, atol=float(scale) * rounding, equal_nan=True
    )


# ---- means -----------------------------------------------------------------------------


def _is_mean(subject: Node, seen: Seen, ports: list[str]) -> bool:
    """Whether numbers are the mean over frames, for these frames and for stranger ones.

    A loss that leaves out unlabelled pixels, or frames without any, is the mean of frames only
    as long as none is left out: so one of the frames is also given without labels, and so on.
    On the CPU, where an index that does not exist is an error and no more.
    """
    subject = subject.cpu()
    pairs = [[_on_cpu(seen.frame(index)) for index in (0, 1)]]
    for port, rows in seen.rows.items():
        if has_frames(rows):
            first, second = pairs[0]
            pairs += [[first, second | {port: v}] for v in _variants(second[port], rows)]
    for number, pair in enumerate(pairs):
        batch = {port: _joined(pair, port, seen.rows[port]) for port in pair[0]}
        try:
            losses = [subject.forward(**inputs, **seen.more) for inputs in (batch, *pair)]
        except Exception:
            if not number:
                return False
            continue  # no such values for this node
        for port in ports:
            whole, *alone = (loss[port] for loss in losses)
            if not isinstance(whole, torch.Tensor) or whole.ndim:
                return False
            if not _alike(whole, torch.stack(alone).mean().to(whole.dtype), _MEAN_ROUNDING):
                return False
    return True


def _variants(value: Any, rows: Rows) -> Iterator[Any]:
    """Yield a frame's input with other contents: without labels, ignored, missing."""
    for fill in (0.0, 1.0, -1.0, 255.0, -100.0, float("nan")):
        yield map_rows(value, rows, partial(_filled, fill))


def _filled(fill: float, part: Any, each: int) -> Any:
    if not isinstance(part, torch.Tensor):
        return part
    if part.dtype is torch.bool:
        return torch.full_like(part, fill > 0)
    if not part.dtype.is_floating_point:
        limits = torch.iinfo(part.dtype)
        fill = 0 if math.isnan(fill) else int(max(limits.min, min(limits.max, fill)))
    return torch.full_like(part, fill)


def _joined(pair: list[dict[str, Any]], port: str, rows: Rows) -> Any:
    if not has_frames(rows):
        return pair[0][port]
    if isinstance(rows, dict):
        parts = [each[port] for each in pair]
        return {k: _joined([{port: part[k]} for part in parts], port, rows[k]) for k in rows}
    if isinstance(rows, list):
        items = range(len(rows))
        return [_joined([{port: each[port][i]} for each in pair], port, rows[i]) for i in items]
    first, second = (each[port] for each in pair)
    if isinstance(first, torch.Tensor):
        return torch.cat([first, second])
    return np.concatenate([first, second]) if isinstance(first, np.ndarray) else [*first, *second]


def _on_cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _on_cpu(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(each) for each in value)
    return value.cpu() if isinstance(value, torch.Tensor) else value


# ---- states ----------------------------------------------------------------------------


def random_states() -> tuple:
    """Return the states of the process's generators: torch (with GPU), NumPy, Python."""
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    name, keys, *rest = np.random.get_state(legacy=True)
    numpy = (name, np.asarray(keys).tobytes(), *rest)
    return (
        torch.get_rng_state().numpy().tobytes(),
        gpu.numpy().tobytes() if gpu is not None else None,
        numpy,
        random.getstate(),
    )


def set_random_states(states: tuple) -> None:
    """Put the process's generators into states that :func:`random_states` returned."""
    cpu, gpu, (name, keys, *rest), python = states
    torch.set_rng_state(torch.frombuffer(bytearray(cpu), dtype=torch.uint8))
    if gpu is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(gpu), dtype=torch.uint8))
    np.random.set_state((name, np.frombuffer(keys, dtype=np.uint32), *rest))
    random.setstate(python)


@contextmanager
def left_alone() -> Iterator[None]:
    """Compute without gradients, and put the random states back."""
    states = random_states()
    try:
        with torch.no_grad():
            yield
    finally:
        set_random_states(states)


def digest(value: Any) -> bytes:
    """Return what differs when something inside ``value`` does.

    Looks into tensors, arrays, generators, containers and the attributes of objects, modules
    included; not into torchmetrics, which are merged where they are computed.
    """
    found = hashlib.blake2b(digest_size=16)
    _digest(value, found, set())
    return found.digest()


#: A node's place in a pipeline, and what refers back to it.
_PLACE = {"_input_ports", "_output_ports", "_name", "_pipeline_counter"}


def _digest(value: Any, found: Any, within: set[int]) -> None:
    found.update(type(value).__qualname__.encode())
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        found.update(repr(value).encode())
    elif isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        found.update(f"{tuple(value.shape)}{value.dtype}".encode())
        found.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    elif isinstance(value, np.ndarray) and value.dtype != object:
        found.update(f"{value.shape}{value.dtype}".encode() + value.tobytes())
    elif isinstance(value, torch.Generator):
        found.update(value.get_state().numpy().tobytes())
    elif isinstance(value, random.Random):
        found.update(repr(value.getstate()).encode())
    elif isinstance(value, np.random.Generator):
        found.update(repr(value.bit_generator.state).encode())
    elif not isinstance(value, Metric | type) and id(value) not in within:
        within = within | {id(value)}
        for part in _parts(value):
            _digest(part, found, within)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [item for pair in value.items() for item in pair]
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, list | tuple | deque | np.ndarray):
        return list(value)
    attributes = getattr(value, "__dict__", None)
    if attributes is None:
        return [_pickled(value)]
    if isinstance(value, Node):
        attributes = {k: v for k, v in attributes.items() if k not in _PLACE}
    return [dict(attributes)]


def _pickled(value: Any) -> bytes | None:
    try:
        return pickle.dumps(value)
    except Exception:  # an object of a library in C: what it holds cannot be seen
        return None
