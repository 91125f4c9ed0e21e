"""Where does what a trainrun writes go, and may it go there? Decided before any data is read."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from cuvis_ai_schemas.training import TrainRunConfig

from cuvis_dist.errors import InputError, one_line
from cuvis_dist.storage import OutputFolder, location_of

if TYPE_CHECKING:
    from cuvis_ai_core.pipeline.pipeline import CuvisPipeline

#: Folders that a run makes in its output folder.
_FOLDERS = ("trained_models", "checkpoints", "lightning_logs", "resume")
#: How many bytes a pipeline's name may have: a file system's names have 255, and this is what is
#: left of them beside ``_initialized.yaml`` and what a temporary name adds.
_MAX_NAME = 220


def moved(config: TrainRunConfig, own: str) -> TrainRunConfig:
    """Return ``config`` with what lay in its own output folder in the one that replaces it.

    Trainruns repeat the name of their output folder: as ``default_root_dir``, where Lightning's
    logs go, and in the checkpoints' ``dirpath``. Upstream leaves both behind when ``output_dir``
    is overridden.

    Parameters
    ----------
    config : TrainRunConfig
        As it is after all overrides.
    own : str
        The output folder that the trainrun itself names; relative ones are meant from the
        working directory.
    """
    training = config.training
    if training is None:
        return config
    training = training.model_copy(deep=True)
    before, output = OutputFolder(own), OutputFolder(config.output_dir)
    if training.default_root_dir is not None:
        root = _moved(training.default_root_dir, before, output)
        # At a URI, logs are written in a mirror of the output folder, which is their default.
        at_root = output.local is None and location_of(root) == output.location
        training.default_root_dir = None if at_root else root
    checkpoint = training.callbacks.checkpoint if training.callbacks else None
    if checkpoint is not None and "dirpath" in checkpoint.model_fields_set:  # else it is ours
        checkpoint.dirpath = _moved(checkpoint.dirpath, before, output)
    return config.model_copy(update={"training": training})


def _moved(place: str, before: OutputFolder, output: OutputFolder) -> str:
    location = location_of(place)
    if before.location == output.location:
        return place
    if location == before.location:
        return str(output)
    name = before.name_of(location)
    return place if name is None else str(output.at(name))


def check_output(path: Path, config: TrainRunConfig, archive: Collection[Path]) -> None:
    """Refuse an output folder that cannot be one, or lies among the recordings.

    Parameters
    ----------
    path : Path
        The trainrun.
    config : TrainRunConfig
        What it says.
    archive : collection of Path
        Folders that hold frames.

    Raises
    ------
    InputError
        If the output folder cannot be made, is the root of the file system, or is or lies in one
        of ``archive``. Where a trainrun lies beside its recordings, its results may do so, too.
    """
    said = f"output_dir of trainrun {path} is {config.output_dir!r}"
    instead = "name a folder of its own (output_dir, --output-dir)"
    try:
        output = OutputFolder(config.output_dir).local
        if output is None:
            return
        there = next(folder for folder in (output, *output.parents) if folder.exists())
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, no such user, NUL
        raise InputError(f"{said}, which no folder can be named: {one_line(error)}") from error
    if not there.is_dir():
        raise InputError(f"{said}, and {there} is a file: {instead}")
    if output == Path(output.anchor):
        raise InputError(f"{said}, the root of the file system: {instead}")
    for folder in archive:
        beside = path.is_relative_to(folder) and output != folder
        if output.is_relative_to(folder) and not beside:
            raise InputError(f"{said}, in {folder}, which holds frames of the archive: {instead}")


def check_name(path: Path, name: str) -> None:
    """Refuse a name of a pipeline that no file can have; raises InputError.

    Parameters
    ----------
    path : Path
        The trainrun.
    name : str
        What its pipeline is called.
    """
    if "/" in name or "\0" in name or not name:
        raise InputError(
            f"the pipeline of trainrun {path} is named {name!r}: its files are saved under that "
            "name, which must be one of a file, without /"
        )
    if (size := len(name.encode())) > _MAX_NAME:
        raise InputError(
            f"the pipeline of trainrun {path} has a name of {size} bytes, {name[:20]}...: its "
            f"files are saved under that name, which may have {_MAX_NAME}"
        )


def check_places(path: Path, config: TrainRunConfig, pipeline: CuvisPipeline) -> None:
    """Refuse what would write outside of the output folder and of the working directory.

    Raises
    ------
    InputError
        If the trainrun at ``path`` would; the message names the setting, or the link.
    """
    check_name(path, pipeline.name)
    output = OutputFolder(config.output_dir)
    training = config.training
    checkpoint = training.callbacks.checkpoint if training and training.callbacks else None
    filename = PurePath(checkpoint.filename or "") if checkpoint else PurePath()
    if filename.is_absolute() or ".." in filename.parts:
        raise InputError(
            f"training.callbacks.checkpoint.filename of trainrun {path} is {str(filename)!r}, "
            f"which leads out of {output.at('checkpoints')}"
        )
    if training and training.default_root_dir is not None:
        logs = location_of(training.default_root_dir)
        here = output.local is not None and OutputFolder(Path.cwd()).name_of(logs) is not None
        if not here and logs != output.location and output.name_of(logs) is None:
            raise InputError(
                f"training.default_root_dir of trainrun {path} is {training.default_root_dir}, "
                f"outside of the output folder {output}; remove it"
            )
    if output.local is None:
        return
    for name in ("", *_FOLDERS):
        for entry in (output.local / name).iterdir() if (output.local / name).is_dir() else ():
            if entry.is_symlink() and not entry.resolve().is_relative_to(output.local):
                raise InputError(
                    f"{entry} is a link to {entry.resolve()}, outside of the output folder of "
                    f"trainrun {path}: remove it, or choose another output_dir"
                )
