"""How does a fit go on after a failure? From a checkpoint of everything: an epoch, or its rest.

Lightning's checkpoint has parameters, optimizers, schedulers, callbacks and loops. Added here is
what state dicts leave out: the nodes' plain attributes (temperatures, fitted flags), the states
of torchmetrics and the random generators of every rank, what the epoch has logged, and the order of
its frames. It is written between two steps of the optimizer
(:mod:`~cuvis_dist.training.epoch_loop`), where no gradients wait. The file is written under a
temporary name, then renamed. The user's own checkpoints are not touched. Callbacks keep the paths
of files that they wrote; where the run's folder is another one when the fit goes on, they are
changed.

The file holds tensors and plain values (:mod:`cuvis_dist.plain`), and is read as such: whoever can
write to the output folder cannot run code in the fit that goes on.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from loguru import logger
from pytorch_lightning import Callback
from pytorch_lightning.loggers import Logger as RunLogger
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO

from cuvis_dist.nodes.sinks import boards_of, continue_boards, is_sink
from cuvis_dist.nodes.written import Unwritten, read_all
from cuvis_dist.pace import Pace
from cuvis_dist.plain import NotPlainError, decode, encode, load
from cuvis_dist.storage import Mirror, relocated
from cuvis_dist.training.epoch_loop import EpochLoop
from cuvis_dist.training.rank_state import (
    dealt_to,
    give_back,
    rank_here,
    ranks_now,
    states_of_ranks,
)

#: The name, in the output folder, of the state that a fit goes on from.
LAST = "resume/last.ckpt"
#: What a checkpoint callback of Lightning's goes by, and leaves out of its state.
_LEFT_OUT = ("_last_global_step_saved", "_last_checkpoint_saved", "_defer_save_until_validation")


@dataclass(frozen=True)
class Reached:
    """How far a fit got, as far as it was kept.

    Attributes
    ----------
    epochs : int
        Epochs that are finished.
    batches : int
        Batches of the next one that are done.
    """

    epochs: int = 0
    batches: int = 0

    def __str__(self) -> str:
        if self.batches:
            return f"after batch {self.batches} of epoch {self.epochs + 1}"
        return f"from the end of epoch {self.epochs}" if self.epochs else "from the beginning"


def reached(path: Path) -> Reached:
    """Return how far a checkpoint is, or nothing without one; read no parameters.

    Raises
    ------
    NotPlainError
        If it is no checkpoint of tensors and plain values.
    """
    if not path.is_file():
        return Reached()
    return Reached(_count(path, "epoch"), _count(path, "batches"))


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


class LastState(Callback):
    """Keeps the state of a fit, and takes it up again.

    The state is saved at the start of every epoch but the first, which is when the last one is over
    for schedulers and callbacks, too; and within epochs, between two steps of the optimizer, as
    often as ``pace`` says.

    Parameters
    ----------
    mirror : Mirror
        The output folder as this machine has it; the file in it is :data:`LAST`.
    pipeline : CuvisPipeline
        The nodes whose attributes are kept.
    pace : Pace
        How often a state is saved within an epoch.
    resume_from : str, optional
        Path of such a file that the fit goes on from.

    Attributes
    ----------
    agreed : Tensor or bool
        On several ranks: whether all of them save at the end of this step, as rank 0 asks for
        (:attr:`wish`). Whoever reduces values over the ranks reduces this, too.
    """

    def __init__(
        self,
        mirror: Mirror,
        pipeline: CuvisPipeline,
        pace: Pace,
        resume_from: str | None = None,
    ) -> None:
        super().__init__()
        self.mirror = mirror
        self.pipeline = pipeline
        self.pace = pace
        self.resume_from = resume_from
        self.agreed: torch.Tensor | bool = False
        self._unwritten = Unwritten(self._kept())
        self._saving: dict[str, Any] = {}
        #: Why this state cannot be kept, and what was said of an earlier one.
        self._unkept = self._said = ""
        self._loaded: dict[str, Any] | None = None

    def attach_to(self, trainer: pl.Trainer) -> None:
        """Take part in a trainer's fit, and let it go on from ``resume_from``, if that is given.

        Upstream's ``fit`` has no argument for a checkpoint, so the trainer is told beforehand.
        """
        # It comes before the user's callbacks, which may change nodes at an epoch's start.
        trainer.callbacks.insert(0, self)  # type: ignore[attr-defined]
        trainer.fit_loop.epoch_loop = EpochLoop(
            trainer.fit_loop.epoch_loop,
            partial(self._restore, trainer),
            partial(self._step, trainer),
        )
        if self.resume_from is not None:
            trainer.ckpt_path = self.resume_from
            trainer.strategy.checkpoint_io = _PlainCheckpoints()
            last = Path(self.resume_from)
            trainer.loggers = [continued(each, last) for each in trainer.loggers]

    @property
    def wish(self) -> float:
        """1 if a state is to be saved, else 0; of all ranks, rank 0's counts."""
        return float(rank_here() == 0 and self.pace.due)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up a loaded state, or save this one."""
        if self._loaded is not None:
            # Lightning takes a checkpoint for one of the middle of an epoch: it would count
            # the last epoch's batches as this one's, and leave out its schedulers.
            trainer.fit_loop.restarting = False
            self._restore(trainer)
        elif trainer.current_epoch:
            self._save(trainer, 0)

    def _step(self, trainer: pl.Trainer) -> None:
        """Save a state after a step, if it is time to."""
        agreed, self.agreed = self.agreed, False
        if bool(agreed) if ranks_now() > 1 else self.pace.due:
            self._save(trainer, trainer.fit_loop.epoch_loop.batch_progress.current.completed)

    def _save(self, trainer: pl.Trainer, batches: int) -> None:
        with self.pace.writing():
            self._write(trainer, batches)

    def _write(self, trainer: pl.Trainer, batches: int) -> None:
        """Write the state after so many batches of an epoch."""
        self._saving = {
            "ranks": states_of_ranks(trainer),
            "folder": str(self.mirror.root),
            "batches": batches,
            "order": dealt_to(trainer).order() if batches else None,
            "accumulate": trainer.accumulate_grad_batches,  # a callback may change it
            "checkpoints": {
                callback.state_key: {name: vars(callback).get(name) for name in _LEFT_OUT}
                for callback in trainer.checkpoint_callbacks
            },
        }
        path = self.mirror.root / LAST
        if trainer.is_global_zero:
            try:
                self._saving["nodes"] = self._unwritten.write_all(self._kept())
            except NotPlainError as error:
                self._unkept = str(error)
            self._saving["boards"] = boards_of(self.pipeline)
            path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        trainer.save_checkpoint(temporary, weights_only=False)
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
        if self._unkept != self._said:  # else each one would say so
            logger.warning(
                "the state of training is not kept; if it is interrupted, it goes on from an "
                f"earlier one, or begins anew: {self._unkept}"
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
        checkpoint["batches"] = self._saving["batches"]
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
        mine = states.get(self.state_key, {})
        was, now = mine.get("folder"), trainer.strategy.broadcast(str(self.mirror.root))
        if was not in (None, now):
            moved = partial(_moved_path, was, now)
            mine["checkpoints"] = relocated(mine["checkpoints"], moved)
            for key, state in states.items():
                if key != self.state_key:
                    states[key] = relocated(state, moved)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give the nodes their attributes; the rest follows when the epoch starts, or goes on."""
        read_all(self.pipeline.nodes(), state_dict["nodes"])
        continue_boards(self.pipeline, state_dict["boards"])
        self._loaded = state_dict

    def _restore(self, trainer: pl.Trainer) -> None:
        """Give the trainer, and this rank, the state that they had."""
        assert self._loaded is not None
        loaded, self._loaded = self._loaded, None
        trainer.accumulate_grad_batches = loaded["accumulate"]
        for callback in trainer.checkpoint_callbacks:
            vars(callback).update(loaded["checkpoints"].get(callback.state_key, {}))
        give_back(trainer, loaded["ranks"])
        dealt_to(trainer).go_on(loaded["order"], loaded["batches"])
        # A fit that was not cut off asks for an epoch's iterator now, which draws; Lightning has
        # done so already, under another random state, and does not when it goes on.
        iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]


class _PlainCheckpoints(TorchCheckpointIO):
    """Reads checkpoints of tensors and plain values alone, whatever Lightning's default is."""

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Read a file that may be anybody's."""
        return super().load_checkpoint(path, *args, **options | {"weights_only": True})


def _moved_path(was: str, now: str, text: str) -> str:
    return now + text[len(was) :] if text == was or text.startswith(f"{was}/") else text
