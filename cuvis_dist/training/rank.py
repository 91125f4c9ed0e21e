"""What does one DDP process do, from its assignment to the outcome?

It runs upstream's gradient trainer (:mod:`~cuvis_dist.training.module`) on its part of every
batch (:mod:`~cuvis_dist.training.loaders`), and tells the driver how it goes
(:mod:`~cuvis_dist.training.reporting`). The post-fit steps wait until all ranks are gone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial

from cuvis_ai_core.training.post_fit import CheckpointRestored
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning.callbacks import ModelCheckpoint

from cuvis_dist.execution.worker import prepare_worker
from cuvis_dist.nodes.sinks import close_sinks, silence_sinks
from cuvis_dist.pace import Pace
from cuvis_dist.storage import Mirror, OutputFolder, mirror_of, writing_to
from cuvis_dist.training.assignment import Assignment, Outcome, Seat
from cuvis_dist.training.checkpoint import LAST, LastState
from cuvis_dist.training.heartbeat import Heartbeat
from cuvis_dist.training.lightning import RankConfig
from cuvis_dist.training.loaders import DealtDataModule
from cuvis_dist.training.module import RankTrainer
from cuvis_dist.training.reporting import EpochEvents
from cuvis_dist.training.watch import STORING


def run_rank(assignment: Assignment, seat: Seat) -> Outcome | None:
    """Carry out an assignment as one of the ranks; rank 0 returns the outcome."""
    resources, driver = assignment.scaling.resources, seat.driver
    prepare_worker(int(resources.cpus_per_worker))
    if os.path.isdir(driver.directory):
        os.chdir(driver.directory)
    watch = driver.watch
    watch.begin(seat.group, seat.world_size)
    heartbeat = Heartbeat(watch, seat.rank, seat.group, resources.stall_seconds, assignment.on_gpu)
    output = assignment.output
    if assignment.verb == "fit":  # an earlier group may have left it, of more or fewer ranks
        last = str(output.at(LAST)) if output.exists(LAST) else None
        assignment = replace(assignment, checkpoint=last)
    storing = partial(heartbeat.doing, STORING)
    with mirror_of(output, storing) as mirror, writing_to(mirror.root):
        return _Rank(assignment, seat, heartbeat, mirror).carry_out()


class _Rank:
    """One rank with what it has on its machine.

    Parameters
    ----------
    assignment : Assignment
        What it is to do.
    seat : Seat
        Which one it is.
    heartbeat : Heartbeat
        It tells the watch what the rank is doing.
    mirror : Mirror
        The output folder, as this machine has it.
    """

    def __init__(
        self, assignment: Assignment, seat: Seat, heartbeat: Heartbeat, mirror: Mirror
    ) -> None:
        self.assignment, self.parts, self.seat = assignment, assignment.parts, seat
        self.is_first = seat.rank == 0
        self.heartbeat, self.mirror = heartbeat, mirror

    def carry_out(self) -> Outcome | None:
        """Do what the assignment says; return the outcome on rank 0."""
        self._bring_checkpoints()
        module = self._module()
        if not self.is_first:
            silence_sinks(self.parts.pipeline)
        metrics: Sequence[Mapping[str, float]] = ()
        with self.heartbeat, closing(module.datamodule):
            if self.assignment.verb == "fit":
                module.fit()
            else:
                checkpoint = self.mirror.to_local(self.assignment.checkpoint)
                metrics = getattr(module, self.assignment.verb)(ckpt_path=checkpoint)
        return self._outcome(module, metrics) if self.is_first else None

    def _module(self) -> RankTrainer:
        assignment, root = self.assignment, str(self.mirror.root)
        last = None
        if assignment.verb == "fit":
            resume_from = self.mirror.to_local(assignment.checkpoint)
            pace = Pace(assignment.scaling.resources.save_seconds)
            last = LastState(self.mirror, self.parts.pipeline, pace, resume_from)
        return RankTrainer(
            self.parts,
            DealtDataModule(assignment, self.seat, self.heartbeat),
            RankConfig.of(self.parts.config, self.seat, assignment.on_gpu, root, self.heartbeat),
            self.heartbeat,
            last=last,
            events=EpochEvents(self.seat.driver.emit) if self.is_first else None,
        )

    def _outcome(self, module: RankTrainer, metrics: Sequence[Mapping[str, float]]) -> Outcome:
        """Restore the best checkpoint of a fit, store what was written, and free the devices."""
        mirror, pipeline = self.mirror, self.parts.pipeline
        best: CheckpointRestored | None = None
        if self.assignment.verb == "fit":
            best = module.load_best_checkpoint()
            best = replace(best, path=mirror.to_output(best.path))
            mirror.push()
        module.zero_grad(set_to_none=True)
        close_sinks(pipeline)
        pipeline.cpu()
        return Outcome(
            list(pipeline.nodes()),
            best,
            module.trainer.current_epoch,
            module.trainer.global_step,
            [dict(row) for row in metrics],
            # best scores are where they were computed, and the driver may have no GPU
            tuple(
                move_data_to_device(mirror.to_output(callback.state_dict()), "cpu")
                for callback in self.parts.callbacks
            ),
            tuple(module.datamodule.notes),
            module.plans,
        )

    def _bring_checkpoints(self) -> None:
        """Have on this machine what the assignment reads, and let callbacks write here.

        Rank 0 needs the checkpoints of earlier fits, too: one of them may turn out to be the best.
        """
        assignment, mirror, output = self.assignment, self.mirror, self.assignment.output
        if output.local is not None:
            return
        if assignment.checkpoint is not None:
            name = output.name_of(assignment.checkpoint)
            if name is not None:
                mirror.pull(name)
        training = self.parts.config
        logs = OutputFolder(training.default_root_dir or output.location)
        folders = {str(logs.at("lightning_logs"))}
        training.default_root_dir = mirror.to_local(training.default_root_dir)
        config = training.callbacks
        if config is not None and config.checkpoint is not None:
            folders.add(config.checkpoint.dirpath)
            config.checkpoint.dirpath = mirror.to_local(config.checkpoint.dirpath)
        for callback in self.parts.callbacks:
            if isinstance(callback, ModelCheckpoint):
                folders.add(str(callback.dirpath))
                state = mirror.to_local(callback.state_dict())
                callback.dirpath = state["dirpath"]
                callback.load_state_dict(state)
        if self.is_first and assignment.verb == "fit":
            for folder in sorted(filter(None, map(output.name_of, folders))):
                mirror.pull_folder(folder, ".ckpt")
