"""How many workers, on what, and where do results go?

The one configuration object that upstream does not have. How many workers there are never changes
what is computed: a run with other resources ends in the same bits. What does change it says so
below: ``shard_frames`` (the order of merging), ``fold`` (what is derived), ``pixels`` and
``sample_*`` (what counts), frames that are skipped, and GPUs (their rounding).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cuvis_dist.errors import InputError, one_line
from cuvis_dist.storage import is_uri

#: Settings that change bits of phase 1, or which frames are used.
MEASURING_SETTINGS = (
    "shard_frames",
    "fold",
    "pixels",
    "sample_frames",
    "sample_fraction",
    "sample_seed",
    "worker_gpus",
    "on_error",
    "max_skipped",
)


class Scaling(BaseModel):
    """Resources of a run.

    Attributes
    ----------
    address : str or None
        Ray cluster to join (``auto``, ``host:port`` or ``ray://host:port``). None joins the
        cluster that ``RAY_ADDRESS`` names (as inside ``ray job submit``), or starts Ray here.
    workers : int or None
        Shards measured at the same time in phase 1 or scored, and parts of a split evaluated;
        None: one per CPU of the cluster.
    train_workers : int
        DDP processes of phase 2. ``batch_size`` of a trainrun stays the global batch size: a
        step's frames are dealt over these processes.
    min_train_workers : int or None
        Train on as few as these while the cluster has no room for ``train_workers``; None waits
        for all of them. When the cluster grows or shrinks, training goes on with another number
        from the end of the last finished epoch; what it computes stays the same.
    gpus_per_worker : float
        GPUs of each DDP process, and of as many processes of an evaluation; 0 trains on CPUs.
        Gradients meet over nccl, or over gloo where processes share a GPU (less than 1 each).
    cpus_per_worker : float
        CPUs of each worker, of either phase.
    shard_frames : int
        Frames in a shard, the unit of work of phase 1.
    worker_gpus : float
        GPUs of each worker of phase 1, which then computes and measures on it, or of each that
        scores; 0 uses CPUs.
    fold : bool
        Derive the statistics of ports that affine nodes separate from a measured one, instead
        of reading the archive again. What the nodes between round to float32 is then not seen:
        moments change by about 1e-8 relative, the inverse of a covariance by that times its
        condition. False measures every node's own input, as upstream does.
    pixels : str
        Which pixels phase 1 counts: ``all``; ``unlabelled``, without those that the annotation
        marks as anomalies; ``finite``, without those that have a value that is not finite.
    sample_frames : int or None
        Measure at most so many frames of the train split, drawn by a hash of their uid.
    sample_fraction : float or None
        Or this fraction of them, rounded up; the smaller of both where both are given.
    sample_seed : int
        Chooses among such samples.
    on_error : str
        ``raise`` ends phase 1, or scoring, at the first frame that cannot be used; ``skip``
        leaves such frames out and names them in ``run.json``, or ``result.json``.
    max_skipped : int
        How many frames ``skip`` may leave out of a pass before the run ends all the same.
    save_seconds : float
        How often a pass of phase 1 writes down what it has measured, for a run that goes on
        after its driver was lost; at most a twentieth of the time goes into writing.
    read_ahead : int
        Frames that Ray tasks decode ahead of each training worker's next batch, on any CPU of the
        cluster; 0: the data module's own loader reads, in the worker.
    cache : str
        Where a training worker keeps decoded frames for the next epochs: ``none``, ``memory``, or
        ``disk`` (a temporary folder of its machine, shared by the workers there). Not for data
        modules that change a frame at random when it is read.
    cache_bytes : int
        How much each worker may keep.
    stage_dir : Path or None
        Where each node keeps copies of recordings that lie at URIs, on a disk of its own; None:
        below its folder for temporary files. ``CUVIS_DIST_STAGE_DIR`` on a node wins.
    stage_bytes : int
        How much these copies may take on a node; at least a few recordings.
    output_dir : path or URI
        Where checkpoints and logs go when the training configuration does not say: a folder that
        all nodes see, or a URI of any file system of ``pyarrow.fs`` (``s3://bucket/runs/x``).
    max_failures : int
        How often training workers may be lost before the run gives up. Training then goes on
        from the end of the last finished epoch. Errors that would come again (a frame that
        cannot be read, a stuck worker) end the run at once.
    stall_seconds : float
        How long a training worker may do nothing at all, neither computing nor reading or
        writing, before the run ends with an error that names it. A slow read that goes on is
        no pause, unless it goes on elsewhere (``read_ahead``).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str | None = None
    workers: int | None = Field(default=None, ge=1)
    train_workers: int = Field(default=1, ge=1)
    min_train_workers: int | None = Field(default=None, ge=1)
    gpus_per_worker: float = Field(default=0, ge=0)
    cpus_per_worker: float = Field(default=1, gt=0)
    shard_frames: int = Field(default=4, ge=1)
    worker_gpus: float = Field(default=0, ge=0)
    fold: bool = True
    pixels: Literal["all", "unlabelled", "finite"] = "all"
    sample_frames: int | None = Field(default=None, ge=1)
    sample_fraction: float | None = Field(default=None, gt=0, le=1)
    sample_seed: int = 0
    on_error: Literal["raise", "skip"] = "raise"
    max_skipped: int = Field(default=10, ge=0)
    save_seconds: float = Field(default=5, ge=0)
    read_ahead: int = Field(default=0, ge=0)
    cache: Literal["none", "memory", "disk"] = "none"
    cache_bytes: int = Field(default=4 * 10**9, ge=0)
    stage_dir: Path | None = None
    stage_bytes: int = Field(default=20 * 10**9, ge=1)
    output_dir: Path | str = Path("outputs")
    max_failures: int = Field(default=3, ge=0)
    stall_seconds: float = Field(default=45, gt=0)

    @property
    def least_train_workers(self) -> int:
        """How many training workers there must be."""
        return min(self.train_workers, self.min_train_workers or self.train_workers)

    @field_validator("output_dir")
    @classmethod
    def _path_or_uri(cls, value: Path | str) -> Path | str:
        return value if is_uri(value) else Path(value)

    @classmethod
    def load(cls, path: str | Path | None = None, **overrides: Any) -> Scaling:
        """Read a YAML file of the fields above; options that are not None win over it.

        Raises
        ------
        InputError
            If the file is missing, is no mapping, or a value does not fit.
        """
        values: dict[str, Any] = {}
        if path is not None:
            try:
                values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
            except (OSError, yaml.YAMLError) as error:
                raise InputError(f"cannot read scaling file {path}: {one_line(error)}") from error
            if not isinstance(values, dict):
                raise InputError(f"scaling file {path} is not a mapping of settings")
        values |= {key: value for key, value in overrides.items() if value is not None}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()
            )
            raise InputError(
                f"scaling{f' file {path}' if path else ''}: {problems}. "
                f"Known settings: {', '.join(cls.model_fields)}"
            ) from error
