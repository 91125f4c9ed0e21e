"""What is written comes back as it was, and what holds code is not read. No Ray."""

from __future__ import annotations

import hashlib
import math
import pickle
import random
from collections import Counter, OrderedDict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from cuvis_ai_core.training.post_fit import TrainHook
from cuvis_ai_schemas.enums import ExecutionStage
from planted import Touch

from cuvis_dist.nodes.probing import digest
from cuvis_dist.plain import NotPlainError, decode, from_bytes, to_bytes

VALUES = [
    None, True, -(2**70), 1.5, math.inf, math.nan, "ü\0", 1 + 2j, b"", b"\0a", bytearray(b"a"),
    [1, (2, [3]), {}], {"a": 1, (1, 2): {3}, None: frozenset("ab")}, OrderedDict(b=1, a=2),
    Counter("abca"), {1, "a"}, deque([1, 2], 3), slice(1, None), range(3), Path("/a/b"),
    np.arange(6.0).reshape(2, 3).T, np.zeros((0, 3), "<u2"), np.array(["a", "bc"]), np.array(2),
    np.float32(3), np.int64(4), np.bool_(True), np.datetime64("2026-01-01"),
    torch.tensor([1, 65535], dtype=torch.uint16), torch.ones(3, dtype=torch.bfloat16),
    torch.ones(2, 3).T, torch.ones(1).expand(3, 4), torch.tensor(3), torch.empty(0, 3),
    torch.tensor([True]), torch.nn.Parameter(torch.ones(2), requires_grad=False),
    torch.float16, torch.device("cpu"), torch.Size([1, 2]),
    TrainHook.EPOCH_END, ExecutionStage.VAL,
    torch.Generator().manual_seed(3), np.random.default_rng(1), random.Random(4),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_plain_value_comes_back(value):
    again = from_bytes(to_bytes(value))
    assert type(again) is type(value)
    assert digest(again) == digest(value)


def test_a_view_is_written_without_what_it_is_a_view_of():
    assert len(to_bytes(torch.zeros(10**6)[:3])) < 10_000


@pytest.mark.parametrize(
    "value", [print, Touch("x"), [Touch("x")], np.array([Touch("x")]), math, np.zeros(1, "f4,f4")]
)
def test_what_is_not_plain_is_not_written(value):
    with pytest.raises(NotPlainError, match="cannot be written"):
        to_bytes({"a": (value,)})


def test_what_contains_itself_is_not_written():
    value = []
    value.append(value)
    with pytest.raises(NotPlainError):
        to_bytes(value)


def test_code_is_not_run(tmp_path):
    """Whoever plants a file can also write its checksum."""
    marker = tmp_path / "marker"
    torch.save({"kind": "dict", "value": Touch(marker)}, tmp_path / "saved")
    for content in (pickle.dumps(Touch(marker)), (tmp_path / "saved").read_bytes()):
        for planted in (content, hashlib.sha256(content).digest() + content):
            with pytest.raises(NotPlainError):
                from_bytes(planted)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Touch(marker)))
    assert marker.exists(), "such a file runs code where it is unpickled"


@pytest.mark.parametrize(
    "written",
    [{}, {"kind": "x", "value": 1}, {"kind": "dtype", "value": "load"}, {"kind": "size"},
     {"kind": "enum", "value": ["os", "path", "join"]}, {"kind": "enum", "value": ["antigravity"]},
     {"kind": "set", "value": [[]]}, {"kind": "array", "value": None}, [{"kind": 3, "value": 3}]],
)  # fmt: skip
def test_what_nobody_wrote_is_not_read(written):
    with pytest.raises(NotPlainError):
        decode(written)
