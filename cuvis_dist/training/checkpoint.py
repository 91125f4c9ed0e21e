"""How does a fit go on after a failure? It starts an epoch from a checkpoint of everything.

Lightning's checkpoint has parameters, optimizers, schedulers, callbacks and loops. Added here is
what state dicts leave out: the nodes' plain attributes (temperatures, fitted flags), the states
of torchmetrics and the random generators of every rank. The file is written under a temporary
name, then renamed. The user's own checkpoints are not touched. Callbacks keep the paths of files
that they wrote; where the run's folder is another one when the fit goes on, they are changed.

The file holds tensors and plain values (:mod:`cuvis_dist.plain`), and is read as such: whoever can
write to the output folder cannot run code in the fit that goes on.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from loguru import logger
from pytorch_lightning import Callback
from pytorch_lightning.loggers import Logger as RunLogger
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torchmetrics import Metric

from cuvis_dist.nodes.probing import random_states, set_random_states
from cuvis_dist.nodes.sinks import boards_of, continue_boards, is_sink
from cuvis_dist.nodes.written import Unwritten, read_all
from cuvis_dist.plain import NotPlainError, decode, encode, load
from cuvis_dist.storage import Mirror, relocated
from cuvis_dist.training.dealing import DealtBatches

#: The name, in the output folder, of the state that a fit goes on from.
LAST = "resume/last.ckpt"


def finished_epochs(path: Path) -> int:
    """Return how many epochs a checkpoint has behind it, 0 without one; read no parameters.

    Raises
    ------
    NotPlainError
        If it is no checkpoint of tensors and plain values.
    """
    return _count(path, "epoch") if path.is_file() else 0


def _count(path: Path, name: str) -> int:
    found = load(path, mmap=True)
    if not isinstance(found, dict) or not isinstance(found.get(name), int):
        raise NotPlainError("it is no checkpoint")
    return found[name]


def continued(logger: RunLogger, last: Path) -> RunLogger:
    """Return a logger that goes on in the folder of the fit that left the checkpoint ``last``.

    TensorBoard then shows one run: what was logged after the checkpoint counts as undone.
    """
    if not isinstance(logger, TensorBoardLogger) or not isinstance(logger.version, int):
        return logger
    return TensorBoardLogger(
        logger.save_dir,
        name=logger.name,
        version=max(0, logger.version - 1),
        purge_step=_count(last, "global_step"),
    )


class LastEpoch(Callback):
    """Keeps the state of the last finished epoch, and takes it up again.

    The state is saved at the start of the next epoch, which is when the last one is over for
    schedulers and callbacks, too; a fit that goes on starts there.

    Parameters
    ----------
    mirror : Mirror
        The output folder as this machine has it; the file in it is :data:`LAST`.
    pipeline : CuvisPipeline
        The nodes whose attributes are kept.
    resume_from : str, optional
        Path of such a file that the fit goes on from.
    """

    def __init__(
        self, mirror: Mirror, pipeline: CuvisPipeline, resume_from: str | None = None
    ) -> None:
        super().__init__()
        self.mirror = mirror
        self.pipeline = pipeline
        self.resume_from = resume_from
        self._unwritten = Unwritten(self._kept())
        self._saving: dict[str, Any] = {}
        #: Why this epoch cannot be kept, and what was said of an earlier one.
        self._unkept = self._said = ""
        self._loaded: dict[str, Any] | None = None

    def attach_to(self, trainer: pl.Trainer) -> None:
        """Take part in a trainer's fit, and let it go on from ``resume_from``, if that is given.

        Upstream's ``fit`` has no argument for a checkpoint, so the trainer is told beforehand.
        """
        # It comes before the user's callbacks, which may change nodes at an epoch's start.
        trainer.callbacks.insert(0, self)  # type: ignore[attr-defined]
        if self.resume_from is not None:
            trainer.ckpt_path = self.resume_from
            trainer.strategy.checkpoint_io = _PlainCheckpoints()
            last = Path(self.resume_from)
            trainer.loggers = [continued(each, last) for each in trainer.loggers]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up a loaded state, or save this one."""
        if self._loaded is not None:
            # Lightning takes a checkpoint for one of the middle of an epoch: it would count
            # the last epoch's batches as this one's, and leave out its schedulers.
            trainer.fit_loop.restarting = False
            self._restore_rank(trainer, pl_module)
            self._loaded = None
        elif trainer.current_epoch:
            self._save(trainer, pl_module)

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        own = {
            "random": random_states(),
            "samplers": [generator.get_state() for generator in _generators(trainer)],
            "metrics": _metric_states(pl_module),
        }
        ranks = _gathered(own)
        self._saving = {"ranks": ranks, "folder": str(self.mirror.root)}
        path = self.mirror.root / LAST
        if trainer.is_global_zero:
            try:
                self._saving["nodes"] = self._unwritten.write_all(self._kept())
            except NotPlainError as error:
                self._unkept = str(error)
            self._saving["boards"] = boards_of(self.pipeline)
            path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        trainer.save_checkpoint(temporary)
        self._saving = {}
        if trainer.is_global_zero and self._is_plain(temporary):
            os.replace(temporary, path)
            self.mirror.push(last=LAST)

    def _kept(self) -> list[Node]:
        """Return the nodes whose state is kept: all but sinks, which hold open files."""
        return [node for node in self.pipeline.nodes() if not is_sink(node)]

    def _is_plain(self, path: Path) -> bool:
        """Whether a fit can go on from this file; else it is removed, which is said."""
        try:
            if not self._unkept:
                load(path, mmap=True)
                return True
        except NotPlainError as error:  # a callback, or an optimizer, has put it there
            self._unkept = str(error)
        path.unlink()
        if self._unkept != self._said:  # else each epoch would say so
            logger.warning(
                "epochs are not kept; if training is interrupted, it goes on from an earlier one, "
                f"or begins anew: {self._unkept}"
            )
        self._said, self._unkept = self._unkept, ""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return what is added to the checkpoint, which is nothing in the user's own ones."""
        return self._saving

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the states of callbacks as plain values, in this file and in no other."""
        if not self._saving:
            return
        for key, state in checkpoint["callbacks"].items():
            try:
                checkpoint["callbacks"][key] = encode(state)
            except NotPlainError as error:
                self._unkept = f"the state of the callback {key}: {error}"

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Tell callbacks where their files are now: where rank 0 has them."""
        states = checkpoint["callbacks"] = {
            key: decode(state) for key, state in checkpoint["callbacks"].items()
        }
        was = states.get(self.state_key, {}).get("folder")
        now = trainer.strategy.broadcast(str(self.mirror.root))
        if was not in (None, now):
            for key, state in states.items():
                if key != self.state_key:
                    states[key] = relocated(state, partial(_moved_path, was, now))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give the nodes their attributes; the rest follows when the epoch starts."""
        read_all(self.pipeline.nodes(), state_dict["nodes"])
        continue_boards(self.pipeline, state_dict["boards"])
        self._loaded = state_dict

    def _restore_rank(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give this rank the states of metrics and random generators that it had."""
        assert self._loaded is not None
        ranks = self._loaded["ranks"]
        same = len(ranks) == _world_size()
        # Of other workers than before, no metric's state is one rank's own; the order of frames,
        # and what joint nodes draw, is that of rank 0 on all of them.
        mine = ranks[pl_module.global_rank if same else 0]
        metrics = dict(_metrics(pl_module))
        for name, (updates, states) in mine["metrics"].items() if same else ():
            metric = metrics[name]
            metric._update_count = updates
            for key, value in states.items():
                setattr(metric, key, _moved(value, metric.device))
        set_random_states(mine["random"])
        for generator, state in zip(_generators(trainer), mine["samplers"], strict=True):
            generator.set_state(state)
        # A fit that was not cut off asks for this epoch's iterator now, which draws; Lightning
        # has done so already, under another random state, and does not when it goes on.
        iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]


def _generators(trainer: pl.Trainer) -> list[torch.Generator]:
    """Return the random generators of the train loader itself."""
    batches = getattr(trainer.train_dataloader, "batch_sampler", None)
    return batches.generators() if isinstance(batches, DealtBatches) else []


class _PlainCheckpoints(TorchCheckpointIO):
    """Reads checkpoints of tensors and plain values alone, whatever Lightning's default is."""

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Read a file that may be anybody's."""
        return super().load_checkpoint(path, *args, **options | {"weights_only": True})


def _moved_path(was: str, now: str, text: str) -> str:
    return now + text[len(was) :] if text == was or text.startswith(f"{was}/") else text


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_initialized() else 1


def _gathered(value: Any) -> list[Any]:
    """Return what every rank gave, in the order of ranks."""
    values = [value] * _world_size()
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def _metrics(module: torch.nn.Module) -> list[tuple[str, Metric]]:
    return [(name, m) for name, m in module.named_modules() if isinstance(m, Metric)]


def _metric_states(module: torch.nn.Module) -> dict[str, tuple[int, dict[str, Any]]]:
    """Return the states of every torchmetrics object that has seen something."""
    return {
        name: (metric._update_count, _moved(metric.metric_state, torch.device("cpu")))
        for name, metric in _metrics(module)
        if metric._update_count
    }


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to(device)
    if isinstance(value, list):
        return [_moved(item, device) for item in value]
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value
