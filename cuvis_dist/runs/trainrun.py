"""What does a trainrun say, and can it be run? Read, built and checked, with no data touched.

The trainrun, its pipeline and data module are built by upstream's own functions, in upstream's
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytorch_lightning as pl
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.config import TrainRunConfig

from cuvis_dist.archive import open_split, setup_error
from cuvis_dist.errors import CuvisDistError, InputError, one_line
from cuvis_dist.initialization.place import find
from cuvis_dist.initialization.saved import load_initialization
from cuvis_dist.nodes import upstream
from cuvis_dist.nodes.building import build_pipeline, load_pipeline
from cuvis_dist.nodes.manifests import data_modules, manifests_counted_once
from cuvis_dist.plain import NotPlainError
from cuvis_dist.runs.configuration import Configuration, read_configuration
from cuvis_dist.runs.destinations import check_places
from cuvis_dist.runs.ignored import warn_of_ignored
from cuvis_dist.runs.leaving_out import leave_out
from cuvis_dist.scaling import Scaling
from cuvis_dist.staging import fetched_when_opened, localize
from cuvis_dist.storage import Location, OutputFolder
from cuvis_dist.training.trainable import check_trainable


@dataclass
class TrainRun:
    """A trainrun with its pipeline built and its names checked; no data was touched.

    Attributes
    ----------
    path : Path
        The trainrun file.
    config : TrainRunConfig
        Resolved and overridden.
    plugins_dirs : list of Path
        Where plugin manifests are looked up.
    job : str
        Which part of it is meant: ``run`` (all of it), ``init`` or ``train``; ``evaluate`` and
        ``score`` use its data alone.
    weights : Path or None
        The ``.pt`` that the state of the pipeline's nodes was loaded from.
    initialization : dict or None
        What ``train`` begins with, as ``run.json`` says it.
    seed : int or None
        The seed that the pipeline was built with: that of the training block, if there is one.
    without : tuple of str
        Recordings that are left out of the train split, by name or glob.
    """

    path: Path
    config: TrainRunConfig
    pipeline: CuvisPipeline
    plugins_dirs: list[Path]
    job: str = "run"
    weights: Path | None = None
    initialization: dict[str, str | None] | None = None
    seed: int | None = None
    without: tuple[str, ...] = ()

    @property
    def loss_nodes(self) -> list[Node]:
        """The loss nodes, in the pipeline's order."""
        return self._named(self.config.loss_nodes)

    @property
    def metric_nodes(self) -> list[Node]:
        """The metric nodes, in the pipeline's order."""
        return self._named(self.config.metric_nodes)

    def _named(self, names: Sequence[str]) -> list[Node]:
        return [node for node in self.pipeline.nodes() if node.name in names]

    @property
    def output(self) -> OutputFolder:
        """The output folder, a relative one meant from the working directory."""
        return OutputFolder(self.config.output_dir)

    @property
    def output_dir(self) -> Location:
        """Absolute path of the output folder, or its URI."""
        return self.output.location

    @property
    def result_name(self) -> str:
        """Place and name of the result in the output folder, less its suffix.

        Upstream's, or that of phase 1 alone.
        """
        ending = "initialized" if self.job == "init" else "restored"
        return f"trained_models/{self.pipeline.name}_{ending}"

    @property
    def saved_pipeline(self) -> Location:
        """Where the result goes."""
        return self.output.at(f"{self.result_name}.yaml")

    def check_trainable(self) -> None:
        """Refuse a training block that has nothing to train, or nothing to train with.

        Raises
        ------
        InputError
            If no loss nodes are named, or see
            :func:`~cuvis_dist.training.trainable.check_trainable`.
        """
        if self.config.training is None:
            return
        if not self.config.loss_nodes:
            raise InputError(
                f"trainrun {self.path} has a training block but no loss_nodes, so there is "
                "nothing to train; name the nodes whose losses are summed, or run phase 1 alone "
                "(cuvis-dist init)"
            )
        try:
            check_trainable(self.pipeline, self.config.unfreeze_nodes, self.loss_nodes)
        except InputError as error:
            raise InputError(f"trainrun {self.path}: {error}") from error

    def initialization_only(self) -> TrainRun:
        """Return this trainrun without phase 2; its result does not replace a trained one."""
        config = self.config.model_copy(update={"training": None})
        return replace(self, config=config, job="init")

    def training_only(self, initialization: Location | None = None) -> TrainRun:
        """Return this trainrun without phase 1: its nodes have the state of an initialization.

        The nodes, their settings and edges stay the trainrun's own, as with the ``--weights-path``
        of ``restore-trainrun``: thresholds that were calibrated when the pipeline was saved do
        not change what training monitors.

        Parameters
        ----------
        initialization : path or URI, optional
            The initialization; by default what ``cuvis-dist init`` left.

        Raises
        ------
        InputError
            If there is nothing to train, no such initialization, or it does not fit the
            trainrun's pipeline.
        """
        if self.config.training is None:
            raise InputError(f"trainrun {self.path} has no training block: nothing to train")
        place = initialization
        if place is None:
            place = self.output.at(f"{self.initialization_only().result_name}.pt")
            try:
                find(place)
            except InputError as error:
                raise InputError(
                    f"{error}. cuvis-dist init makes it; --initialization names another"
                ) from error
        found = load_initialization(self.pipeline, place)
        used = {"file": str(place), "sha256": found.sha256, "name": found.name}
        used["made"] = found.card.made if found.card else None
        return replace(self, job="train", weights=found.file, initialization=used)

    def datamodule(
        self, scaling: Scaling | None = None, fitting: bool = True
    ) -> pl.LightningDataModule:
        """Build the data module, set up for ``fitting`` or not at all.

        ``scaling`` says where files at URIs are staged.

        Raises
        ------
        InputError
            If it cannot be built: a missing plugin, parameter, recording or SDK; or a recording
            that is to be left out is not there.
        DataError
            If a remote file that it opens is missing, or cannot be fetched.
        """
        upstream.select_by_recording()
        data, base_dir = self.config.data, self.path.parent
        local = localize(data, scaling or Scaling(), base_dir)
        if self.without and fitting:
            whole = replace(self, without=()).datamodule(scaling)
            local = leave_out(local, self.without, base_dir, open_split(whole, "train")[1])
        config = self.config.model_copy(update={"data": local})
        try:
            with (
                fetched_when_opened(),
                manifests_counted_once(installed_plugins_dirs()),
            ):
                if fitting:
                    return upstream.create_datamodule(config, self.plugins_dirs, base_dir=base_dir)
                return upstream.build_datamodule(local, self.plugins_dirs, base_dir)
        except CuvisDistError:
            raise
        except (Exception, SystemExit) as error:  # importing cuvis can exit
            if "provides data module" in str(error):
                known = data_modules(self.plugins_dirs, installed_plugins_dirs())
                raise InputError(
                    f"data.data_module of trainrun {self.path} is {data.data_module!r}, which no "
                    f"plugin provides; there are: {', '.join(known)}. --plugins-dir names a folder "
                    "with manifests of others"
                ) from error
            params = ", ".join(f"{key}={value}" for key, value in data.params.items())
            raise setup_error(f"{data.data_module} ({params})", "train", error) from error


def load_trainrun(
    path: str | Path,
    overrides: Sequence[str] = (),
    plugins_dirs: Sequence[str | Path] = (),
    output_dir: str | Path | None = None,
    saved: str | Path | None = None,
    without: Sequence[str] = (),
) -> TrainRun:
    """Read a trainrun (flat YAML or with Hydra ``defaults``) and build its pipeline.

    Parameters
    ----------
    saved : str or Path, optional
        A saved pipeline, ``.pt`` beside it, to use instead of the trainrun's own, which then
        need not be there.
    without : sequence of str
        Recordings to leave out of the train split: names, or globs.

    Raises
    ------
    InputError
        If the trainrun or pipeline is missing or invalid, or names a node that is not there.
    """
    configuration = read_configuration(path, overrides, output_dir, saved)
    return build_trainrun(configuration, plugins_dirs, without)


def build_trainrun(
    configuration: Configuration,
    plugins_dirs: Sequence[str | Path] = (),
    without: Sequence[str] = (),
) -> TrainRun:
    """Build the pipeline that a trainrun names; raises InputError as :func:`load_trainrun` does."""
    path, config = configuration.path, configuration.config
    for folder in plugins_dirs:
        if not Path(folder).is_dir():
            raise InputError(f"--plugins-dir {folder} is no folder: {Path(folder).absolute()}")
    dirs = upstream.discover_plugins_dirs(path, [*plugins_dirs, *installed_plugins_dirs()])
    if configuration.pipeline is None:
        assert configuration.saved is not None
        pipeline = _load_saved(configuration.saved)
        config = config.model_copy(update={"pipeline": str(configuration.saved)})
        _check_names(path, config, pipeline, ["metric_nodes"])
        weights = configuration.saved.with_suffix(".pt")
        warn_of_ignored(configuration, pipeline, dirs, installed_plugins_dirs())
        return TrainRun(path, config, pipeline, dirs, weights=weights)

    if config.training is not None:
        # As upstream: before the pipeline, whose initial weights depend on it.
        pl.seed_everything(config.training.seed, workers=True, verbose=False)
    try:
        pipeline = build_pipeline(configuration.pipeline)
    except Exception as error:
        why = str(error) if isinstance(error, CuvisDistError) else one_line(error)
        raise InputError(
            f"the pipeline {config.pipeline!r} of trainrun {path} cannot be built: {why}"
        ) from error
    _check_names(path, config, pipeline, ["unfreeze_nodes", "loss_nodes", "metric_nodes"])
    check_places(path, config, pipeline)
    warn_of_ignored(configuration, pipeline, dirs, installed_plugins_dirs())
    seed = config.training.seed if config.training else None
    return TrainRun(path, config, pipeline, dirs, seed=seed, without=tuple(without))


def _load_saved(path: Path) -> CuvisPipeline:
    try:
        return load_pipeline(path)
    except NotPlainError as error:
        raise InputError(f"{path.with_suffix('.pt')} cannot be loaded: {error}") from error
    except Exception as error:
        raise InputError(
            f"the saved pipeline {path} cannot be loaded: {one_line(error)}"
        ) from error


def installed_plugins_dirs() -> list[Path]:
    """Return the plugin manifests that the installed ``cuvis_ai`` ships."""
    import cuvis_ai

    folder = Path(cuvis_ai.__file__).parent / "configs" / "plugins"
    return [folder] if folder.is_dir() else []


def _check_names(
    path: Path, config: TrainRunConfig, pipeline: CuvisPipeline, keys: Sequence[str]
) -> None:
    """Refuse a node name that the pipeline lacks now, not after hours of phase 1."""
    known = {node.name for node in pipeline.nodes()}
    for key in keys:
        unknown = [name for name in getattr(config, key) if name not in known]
        if unknown:
            raise InputError(
                f"{key} of trainrun {path} names {', '.join(map(repr, unknown))}, which the "
                f"pipeline {pipeline.name} does not have. Its nodes: {', '.join(sorted(known))}"
            )
