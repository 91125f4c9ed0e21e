"""What does that which is measured of a frame depend on, besides the frame?

On the data module and the parameters that it reads frames with, on the nodes before the measured
port and their state, on which pixels count, on the statistic and its options, and on the format of
the store. What nodes are called makes no difference. Which version of the code measured is noted
beside it and is no part of it, as elsewhere in ``cuvis_dist``.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline

from cuvis_dist.nodes.catalogue import annotation_port
from cuvis_dist.nodes.recipe import Recipe
from cuvis_dist.nodes.state import hash_tensors
from cuvis_dist.nodes.upstream import edges_into
from cuvis_dist.staging import original
from cuvis_dist.store.files import Key

#: Parameters of data modules that say which frames there are, or how fast they are read. Which
#: files a frame is read from is told by the frame.
_NOT_CONTENT = frozenset(
    [
        "batch_size",
        "cu3s_file_path",
        "data_dir",
        "files",
        "frames",
        "glob",
        "images_dir",
        "labels_dir",
        "max_open_sessions",
        "measurement_indices",
        "num_workers",
        "persistent_workers",
        "pin_memory",
        "read_ahead",
        "read_threads",
        "recursive",
        "samples_per_frame",
        "self",
        "source_coherent_batches",
        "split",
        "splits",
        "universe_csv",
        "worker_multiprocessing_context",
    ]
)


class Keys:
    """Makes the keys of one pipeline, as it is now, over one data module.

    Parameters
    ----------
    pipeline : CuvisPipeline
        As far as it is fitted.
    datamodule : LightningDataModule
        It reads the frames.
    pixels : str
        Which pixels count: the setting ``measuring.pixels``.
    """

    def __init__(
        self, pipeline: CuvisPipeline, datamodule: pl.LightningDataModule, pixels: str
    ) -> None:
        self.pipeline = pipeline
        self._nodes: dict[Node, Any] = {}
        labels = [node for node in pipeline.nodes() if annotation_port(node)]
        self._shared = {
            "data module": described_module(datamodule),
            "pixels": pixels,
            "labels": [self._node(node) for node in labels] if pixels == "unlabelled" else None,
        }

    def of_statistic(self, name: str, node: Node, recipe: Recipe) -> Key:
        """Return the key of what a recipe measures of what a node receives."""
        measured: Any = self._port(node, recipe.port)
        if not recipe.shareable:  # the node says which pixels, or makes them
            measured = self._node(node)
        what = {
            "recipe": f"{type(recipe).__module__}.{type(recipe).__qualname__}",
            "statistic": recipe.statistic.name,
            "options": _plain(recipe.options),
            "of": measured,
        }
        return Key(name, self._shared | what)

    def of_pixels(self, ports: Iterable[tuple[str, str]], seed: int) -> Key:
        """Return the key of a sample of pixels, as they are at some outputs ``(node, port)``.

        A value of the batch has no node.
        """
        named = {node.name: node for node in self.pipeline.nodes()}
        at = {
            f"{name}.{port}": [self._node(named[name]), port] if name else port
            for name, port in ports
        }
        return Key("pixels", self._shared | {"seed": seed, "pixels at": at})

    def _port(self, node: Node, port: str) -> Any:
        """Return what says which values arrive at a node's port."""
        into = edges_into(self.pipeline, node)
        return [[self._node(n), out] for n, out, to in into if to == port] or f"batch.{port}"

    def _node(self, node: Node) -> Any:
        if node not in self._nodes:
            self._nodes[node] = {
                "class": f"{type(node).__module__}.{type(node).__qualname__}",
                "hparams": _plain(getattr(node, "hparams", {})),
                "state": {
                    name.removeprefix(f"{node.name}."): value
                    for name, value in hash_tensors([node]).items()
                },
                "inputs": {port: self._port(node, port) for port in sorted(node.INPUT_SPECS)},
            }
        return self._nodes[node]


def described_module(datamodule: pl.LightningDataModule) -> dict[str, Any]:
    """Return the class of a data module, and the parameters that change what a frame contains.

    They are those of its constructor that it keeps under the same name, one with an underscore, or
    one that goes on after it, as in ``wavelengths_override``; and what upstream's base class keeps
    as ``params``.
    """
    cls, kept = type(datamodule), vars(datamodule)
    names = [n for n in inspect.signature(cls.__init__).parameters if n not in _NOT_CONTENT]
    values = {
        attribute: _plain(kept[attribute])
        for attribute in sorted(kept)
        for name in [*names, "params"]
        if attribute in (name, f"_{name}") or attribute.startswith(f"{name}_")
    }
    return {"class": f"{cls.__module__}.{cls.__qualname__}", "parameters": values}


def _plain(value: Any) -> Any:
    """Return a value as JSON can say it; of arrays their hash, of other objects their class."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str | Path):
        return original(str(value))
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in sorted(value.items(), key=lambda item: str(item[0]))}
    if isinstance(value, list | tuple | set | frozenset):
        each = [_plain(v) for v in value]
        return sorted(each, key=str) if isinstance(value, set | frozenset) else each
    if isinstance(value, torch.Tensor):
        value = value.numpy(force=True)
    if isinstance(value, np.ndarray | np.generic):
        content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return [str(value.dtype), list(value.shape), content]
    said = repr(value)
    return said if " at 0x" not in said else f"{type(value).__module__}.{type(value).__qualname__}"
