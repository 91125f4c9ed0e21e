"""Which resources does a run have, what does it measure, and how does it read?

The one configuration object that upstream does not have, in three parts. Only
:class:`Measuring` changes what is computed. A run with other :class:`Resources` or another
:class:`Reading` computes the same: phase 1 ends in the same bits, and training in the same numbers
but for float32 sums in another order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from cuvis_dist.errors import InputError, one_line
from cuvis_dist.misspelt import refuse_unknown
from cuvis_dist.yaml_file import read_yaml

#: More workers, CPUs or GPUs than any cluster has.
_MOST = 100_000


class _Settings(BaseModel):
    """Settings that cannot be changed, described by the docstring below each."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Resources(_Settings):
    """Which workers there are, and what happens when they are lost. Changes no result."""

    address: str | None = None
    """Ray cluster to join (``auto``, ``host:port`` or ``ray://host:port``). Without one, the
    cluster that ``RAY_ADDRESS`` names is joined (as inside ``ray job submit``), or Ray starts on
    this machine."""

    workers: int | None = Field(default=None, ge=0, le=_MOST)
    """How many shards are measured, scored or evaluated at the same time, each by a worker; 0:
    one, in the process of the command or script itself, without Ray. By default that is chosen
    where it ends sooner than workers start, else one worker per CPU of the cluster. Where Ray
    starts on this machine, more than 8 for each of its CPUs are refused, in either phase."""

    cpus_per_worker: float = Field(default=1, gt=0, le=_MOST)
    """CPUs of each worker, of either phase, and how many threads it computes on. So does the
    process of the command or script, where it does a worker's work; but it trains on as many
    threads as torch has there, as upstream does, unless this is set."""

    train_workers: int = Field(default=1, ge=0, le=_MOST)
    """DDP processes of phase 2. ``batch_size`` of a trainrun stays the global batch size: a step's
    frames are dealt over these processes. 0: the process of the command or script itself trains,
    without Ray, as it does where this is not set and nothing else asks for workers (a cluster's
    address, GPUs, ``reading.read_ahead``)."""

    min_train_workers: int | None = Field(default=None, ge=1, le=_MOST)
    """Train on as few as these while the cluster has no room for ``train_workers``, which must not
    be fewer; by default training waits for all of them. When the cluster grows or shrinks, training
    goes on with another number after the last step whose state was kept."""

    train_gpus: float = Field(default=0, ge=0, le=_MOST)
    """GPUs of each DDP process, and of as many processes of an evaluation; 0 trains on CPUs.
    Gradients meet over nccl, or over gloo where processes share a GPU (less than 1 each)."""

    max_failures: int = Field(default=3, ge=0)
    """How often training workers may be lost before the run gives up, and how often Ray repeats
    other work that lost its worker. Errors that would come again (a frame that cannot be read, a
    stuck worker) end the run at once."""

    stall_seconds: float = Field(default=45, gt=0)
    """How long a training worker may do nothing at all, neither computing nor reading nor
    writing, before the run ends with an error that names it. A slow read that goes on is no
    pause, unless it goes on elsewhere (``reading.read_ahead``)."""

    read_seconds: float = Field(default=300, gt=0)
    """How long reading a frame may take in phase 1, evaluation and scoring before it counts as one
    that this node cannot read: another node is asked, then ``measuring.on_error`` decides. After
    ``stall_seconds`` a warning names frame, file and node. Fetching a file from a URI does not
    count."""

    save_seconds: float = Field(default=5, ge=0)
    """How often a pass of phase 1 writes down what it has measured, and training its state within
    an epoch, for a run that goes on after workers or its driver were lost. What took t seconds to
    write is not written again for 20 t: at most a twentieth of the time goes into it."""

    @field_validator("min_train_workers")
    @classmethod
    def _not_above(cls, least: int | None, settings: ValidationInfo) -> int | None:
        """Refuse more than ``train_workers``, unless that is 0: training then needs no workers."""
        most = settings.data.get("train_workers")
        if least and most and least > most:
            raise PydanticCustomError(
                "above", f"training has {most} workers: resources.train_workers must not be fewer"
            )
        return least

    @property
    def least_train_workers(self) -> int:
        """How many training workers there must be."""
        return min(self.train_workers, self.min_train_workers or self.train_workers)


class Measuring(_Settings):
    """What phase 1 counts and in which order it merges. Changes results."""

    shard_frames: int = Field(default=4, ge=1)
    """Frames in a shard, the unit of work. Fixes the order of merging, and so the last bits of
    moments, but for those of whole numbers, which are exact."""

    fold: bool = True
    """Derive the statistics of ports that affine nodes separate from a measured one, instead of
    reading the archive again. What the nodes between round to float32 is then not seen: moments
    change by about 1e-8 relative, the inverse of a covariance by that times its condition. Scores
    that move by 1e-6 can move a reported metric in its third or fourth digit, where float32
    sigmoids saturate and ties break otherwise. False measures every node's own input, as upstream
    does."""

    later_levels: Literal["exact", "sampled"] = "exact"
    """How nodes are fitted that depend on earlier fits, such as a score head. ``exact`` reads the
    archive again for them. ``sampled`` fits them on ``sample_pixels`` pixels that the first reading
    keeps, where all nodes before map each pixel by itself and moments are wanted, and gives the
    standard errors; what a sample says nothing about, such as extrema, is read again all the
    same."""

    sample_pixels: int = Field(default=1 << 20, ge=1 << 10, le=1 << 28)
    """How many pixels ``later_levels: sampled`` keeps, at most; fewer where frames differ much in
    how many of their pixels count. The driver holds them: 61 bands in float32 take 270 MB."""

    pixels: Literal["all", "unlabelled", "finite"] = "all"
    """Which pixels count: ``all``; ``unlabelled``, without those that the annotation marks as
    anomalies; ``finite``, without those that have a value that is not finite."""

    store: str | None = None
    """Folder or URI of a store: what the first pass measures of each frame is taken from there, and
    added where it is missing. Changes no result. The same store serves any number of trainruns,
    and several runs at the same time."""

    robust: float | None = Field(default=None, gt=0.5, le=1)
    """Fit phase 1 on the bulk of the train frames: at least this part of them, and all others whose
    pixels are not unusually far from it; ``run.json`` names those that are left out. Needs
    ``store``. As ``--robust`` of ``run`` and ``init``."""

    robust_pixels: float | None = Field(default=None, gt=0.5, le=1)
    """Fit phase 1 on the bulk of the train pixels, about this part of them at least. It is looked
    for in the sample of pixels that ``store`` has, which is needed; the archive is then read once
    more, and in every pass only pixels inside count. As ``--robust-pixels``."""

    sample_frames: int | None = Field(default=None, ge=1)
    """Measure at most so many frames of the train split, drawn by a hash of their uid."""

    sample_fraction: float | None = Field(default=None, gt=0, le=1)
    """Measure at most this fraction of the train frames, rounded up; the smaller sample counts
    where ``sample_frames`` is given, too."""

    sample_seed: int = 0
    """Chooses among samples, of frames and of pixels."""

    gpus: float = Field(default=0, ge=0, le=_MOST)
    """GPUs of each worker of phase 1, which then computes and measures on it, or of each that
    scores; 0 uses CPUs. A GPU rounds otherwise than a CPU."""

    on_error: Literal["raise", "skip"] = "raise"
    """``raise`` ends phase 1, or scoring, at the first frame that cannot be used; ``skip`` leaves
    such frames out and names them in ``run.json``, or ``result.json``."""

    max_skipped: int = Field(default=10, ge=0)
    """How many frames ``skip`` may leave out of a pass before the run ends all the same."""


class Reading(_Settings):
    """How frames reach workers, and files at URIs a node. Changes no result."""

    read_ahead: int = Field(default=0, ge=0)
    """Frames that Ray tasks decode ahead of each training worker's next batch, on any CPU of the
    cluster; 0: the data module's own loader reads, in the worker."""

    cache: Literal["none", "memory", "disk", "device", "memory+device", "disk+device"] = "none"
    """Where frames that were decoded are kept, for later passes, epochs and evaluations: ``none``;
    ``memory``, of each node and shared by its processes, at most a third of ``/dev/shm``; ``disk``,
    likewise, below the node's folder for temporary files; or ``device``, the memory of each
    training worker's GPU or, without one, its own: for the epochs of a fit alone, and what is not
    kept is read while the step before computes. ``memory+device`` and ``disk+device`` are both.
    Nodes fetch from each other what one of them keeps. A frame that draws random numbers when it
    is read is not kept (``device`` looks at the first ones that are read in an epoch); not for data
    modules that change frames in other ways each time."""

    cache_bytes: int = Field(default=4 * 10**9, ge=0)
    """How many bytes each node may keep so, and with ``device`` each training worker, beside what
    its steps need."""

    verify: bool = False
    """Read all files once before they are used, and compare their checksums with those that an
    earlier run with this setting has read. Without it, what an earlier run left is used where the
    files' sizes and times of change are the same."""

    stage_dir: Path | None = None
    """Where each node keeps copies of recordings that lie at URIs, on a disk of its own; by default
    below its folder for temporary files. ``CUVIS_DIST_STAGE_DIR`` on a node wins."""

    stage_bytes: int = Field(default=20 * 10**9, ge=1)
    """How many bytes these copies may take on a node; at least a few recordings."""


class Scaling(_Settings):
    """The settings of a run that upstream does not have.

    Attributes
    ----------
    resources : Resources
        Workers, and what happens when they are lost; changes no result.
    measuring : Measuring
        What phase 1 counts; changes results.
    reading : Reading
        How frames are read, cached and staged; changes no result.

    Examples
    --------
    >>> Scaling(resources={"workers": 8}, measuring={"pixels": "unlabelled"})
    >>> Scaling.load("scaling.yaml", ["resources.workers=8"])
    """

    resources: Resources = Resources()
    measuring: Measuring = Measuring()
    reading: Reading = Reading()

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        settings: Sequence[str] = (),
        given: Mapping[str, Any] | None = None,
    ) -> Scaling:
        """Read a YAML file of the three parts; ``settings`` win over it, ``given`` over both.

        Parameters
        ----------
        path : str or Path, optional
            The scaling file.
        settings : sequence of str
            ``part.name=value`` each, the value as YAML.
        given : mapping of str to object, optional
            Values by ``part.name``, taken as they are.

        Raises
        ------
        InputError
            If the file is missing or is no mapping, or a setting is unknown, misplaced (the
            message says which one is meant), or has a value that does not fit.
        """
        layers: list[tuple[str, Mapping[str, Any]]] = []  # where from, and what
        if path is not None:
            content = read_yaml(path, "scaling file")
            layers.append((f"scaling file {path}", {} if content is None else content))
        layers += [(f"--set {setting}", _parse(setting)) for setting in settings]
        values: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
        origins: dict[tuple[str, str], str] = {}
        for name, value in (given or {}).items():
            part, _, last = name.partition(".")
            layers.append(("", {part: {last: value}}))
        for where, layer in layers:
            refuse_unknown(layer, where, cls.known())
            for part, names in layer.items():
                values[part] |= names or {}
                origins |= {(part, name): where for name in names or {}}
        try:
            scaling = cls.model_validate(values)
        except ValidationError as error:
            problems = []
            for item in error.errors():
                part, name = map(str, item["loc"][:2])
                where = f"{origin}: " if (origin := origins[part, name]) else ""
                problems.append(f"{where}{part}.{name} is {item['input']!r}: {item['msg']}")
            raise InputError("; ".join(problems)) from error
        for name in ("robust", "robust_pixels"):
            if getattr(scaling.measuring, name) and scaling.measuring.store is None:
                raise InputError(f"measuring.{name} looks into a store: name one (--store FOLDER)")
        return scaling

    @classmethod
    def known(cls) -> dict[str, list[str]]:
        """Return the names of all settings, by part."""
        return {part: list(model.model_fields) for part, model in PARTS.items()}

    def replace(self, **parts: Mapping[str, Any]) -> Scaling:
        """Return these settings with others in some parts: ``replace(resources={"workers": 1})``.

        What was not set stays so.

        Raises
        ------
        ValidationError
            If a setting is unknown, or a value does not fit.
        """
        values = {part: getattr(self, part).model_dump(exclude_unset=True) for part in PARTS}
        for part, changes in parts.items():
            values[part] |= changes
        return type(self).model_validate(values)


#: The parts of :class:`Scaling`, by name.
PARTS: dict[str, type[_Settings]] = {
    name: field.annotation  # type: ignore[misc]
    for name, field in Scaling.model_fields.items()
}


def _parse(setting: str) -> dict[str, Any]:
    """Return ``part.name=value`` as a mapping of one part.

    Raises
    ------
    InputError
        If it is none, or its value is no YAML.
    """
    name, equals, text = setting.partition("=")
    part, dot, last = name.strip().partition(".")
    if not equals or (part in PARTS and not last):
        raise InputError(f"--set {setting}: settings are given as part.name=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {setting}: {one_line(error)}") from error
    return {part: {last: value}} if dot else {part: value}
