"""What do the files of a trainrun say, and can it be so? Told before anything heavy is loaded.

Neither torch nor Ray nor cuvis.ai's nodes are imported for it, so that a misspelt key costs no
wait. What only a pipeline or a data module can tell comes later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import UnionType
from typing import Any, TypeGuard, Union, get_args, get_origin

from cuvis_ai_schemas.pipeline import PipelineConfig
from cuvis_ai_schemas.training import DataConfig, TrainRunConfig
from cuvis_ai_schemas.training.data import DataSplitConfig
from omegaconf import OmegaConf
from pydantic import BaseModel, ValidationError

from cuvis_dist.errors import CuvisDistError, InputError, one_line
from cuvis_dist.misspelt import closest
from cuvis_dist.runs.destinations import check_name, check_output, moved
from cuvis_dist.storage import is_uri
from cuvis_dist.universe import MODULES, read_universe
from cuvis_dist.yaml_file import read_yaml

#: NumPy's generators, which Lightning seeds as well, take none above.
_MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Configuration:
    """A trainrun and the pipeline that it names, as their files have them.

    Attributes
    ----------
    path : Path
        The trainrun file.
    config : TrainRunConfig
        Resolved and overridden.
    pipeline : PipelineConfig or None
        What the pipeline's file says; None where a saved pipeline is used instead.
    saved : Path or None
        That saved pipeline, ``.pt`` beside it.
    """

    path: Path
    config: TrainRunConfig
    pipeline: PipelineConfig | None
    saved: Path | None


def read_configuration(
    path: str | Path,
    overrides: Sequence[str] = (),
    output_dir: str | Path | None = None,
    saved: str | Path | None = None,
) -> Configuration:
    """Read a trainrun (flat YAML or with Hydra ``defaults``) and its pipeline's file.

    Parameters
    ----------
    path : str or Path
        The trainrun.
    overrides : sequence of str
        ``key=value`` each.
    output_dir : str or Path, optional
        It overrides the trainrun's.
    saved : str or Path, optional
        A saved pipeline to use instead of the trainrun's own, which then need not be there.

    Raises
    ------
    InputError
        If a file is missing or invalid, or a place or number cannot be used.
    """
    path = _found(path, "trainrun")
    if output_dir is not None and not str(output_dir).strip():
        raise InputError("--output-dir is empty: name a folder, or a URI such as s3://bucket/run")
    overrides = [*overrides, *([f"output_dir={output_dir}"] if output_dir else [])]
    try:
        config = _read(path, overrides)
        if config.training is not None and config.training.seed > _MAX_SEED:
            raise InputError(
                f"training.seed of trainrun {path} is {config.training.seed}; the largest is "
                f"{_MAX_SEED} (2**32 - 1)"
            )
        _check_splits(path, config.data)
        check_output(path, config, archive_folders(config.data))
        config = moved(config, _own_output_dir(path, overrides, config))
    except ValidationError as error:
        raise InputError(f"trainrun {path} is not valid: {_said(error, TrainRunConfig)}") from error
    except CuvisDistError:
        raise
    except Exception as error:
        raise InputError(f"trainrun {path} cannot be read: {one_line(error)}") from error
    if saved is None:
        return Configuration(path, config, _read_pipeline(path, config.pipeline), None)
    saved = _found(saved, "saved pipeline")
    fitted_state(saved)
    read_yaml(saved, "saved pipeline")
    return Configuration(path, config, None, saved)


def fitted_state(saved: str | Path) -> Path:
    """Return the ``.pt`` beside a saved pipeline; raises InputError if there is none."""
    return _found(Path(saved).with_suffix(".pt"), "fitted state")


def _found(place: str | Path, what: str) -> Path:
    """Return the absolute path of a file; raises InputError if it is not there."""
    try:
        path = Path(place).expanduser().resolve()
        there = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, NUL
        raise InputError(f"{what} {place} cannot be read: {one_line(error)}") from error
    if path.is_dir():
        raise InputError(f"{what} {path} is a folder: name the file")
    if not there:
        raise InputError(f"{what} not found: {path}")
    return path


def _read(path: Path, overrides: Sequence[str]) -> TrainRunConfig:
    values = read_yaml(path, "trainrun") or ({} if overrides else None)
    if not isinstance(values, dict):
        raise InputError(
            f"trainrun {path} is no mapping of settings: {', '.join(TrainRunConfig.model_fields)}"
        )
    if "defaults" in values:
        from cuvis_ai_core.utils.config_helpers import resolve_config_with_hydra

        configs_dir = path.parent.parent
        values = resolve_config_with_hydra(
            config_type="trainrun",
            config_path=path.relative_to(configs_dir).with_suffix("").as_posix(),
            search_paths=[str(configs_dir)],
            overrides=list(overrides) or None,
        )
    elif overrides:  # upstream takes ${...} as it stands where there are none
        merged = OmegaConf.merge(OmegaConf.create(values), OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    return TrainRunConfig.model_validate(values)


def _check_splits(path: Path, data: DataConfig) -> None:
    """Refuse a local splits file that is missing or says nothing valid; raises InputError."""
    named = data.splits.splits_path if data.splits else None
    if not named or not _is_local(named):  # a program fills in what is empty
        return
    file = path.parent / named  # as upstream has it
    if not file.is_file():
        raise InputError(f"the splits file of trainrun {path} is not there: {file}")
    try:
        DataSplitConfig.model_validate_json(file.read_bytes())
    except ValidationError as error:
        problems = _said(error, DataSplitConfig)
        raise InputError(f"the splits file {file} is not valid: {problems}") from error


def _own_output_dir(path: Path, overrides: Sequence[str], config: TrainRunConfig) -> str:
    """Return the output folder that the trainrun names where nothing overrides it."""
    others = [text for text in overrides if text.partition("=")[0].lstrip("+") != "output_dir"]
    if len(others) == len(overrides):
        return config.output_dir
    try:
        return _read(path, others).output_dir
    except Exception:  # it names none, and asks to be given one
        return config.output_dir


def pipeline_file(reference: str, base_dir: Path) -> Path | None:
    """Return the file that a trainrun in ``base_dir`` means by a pipeline; None without one.

    Upstream looks in the same places in the same order (``_resolve_pipeline_reference``), but
    loads torch to say so.
    """
    names = [reference]
    if not reference.endswith((".yaml", ".yml")):
        names.append(f"{reference}.yaml")
    roots = (base_dir, base_dir.parent, Path.cwd())
    found = (file for name in names for root in roots if (file := root / name).is_file())
    return next(found, None)


def _read_pipeline(path: Path, reference: str | None) -> PipelineConfig:
    if reference is None:
        raise InputError(f"trainrun {path} names no pipeline: set `pipeline:` to a file")
    try:
        file = pipeline_file(reference, path.parent)
    except OSError as error:  # a name that is too long
        raise InputError(
            f"the pipeline of trainrun {path} cannot be read: {one_line(error)}"
        ) from error
    if file is None:
        raise InputError(
            f"the pipeline {reference!r} of trainrun {path} is not there: it is looked for beside "
            "the trainrun, in the folder above, and in the working directory"
        )
    try:
        pipeline = PipelineConfig.model_validate(read_yaml(file, "pipeline"))
        TopologicalSorter(_edges(pipeline)).prepare()
        if pipeline.metadata and "${" not in pipeline.metadata.name:
            check_name(path, pipeline.metadata.name)
        return pipeline
    except CycleError as error:
        circle = " -> ".join(error.args[1])
        raise InputError(
            f"the nodes of pipeline {file} wait for each other ({circle}): take out one of these "
            "connections"
        ) from error
    except ValidationError as error:
        raise InputError(
            f"pipeline {file} of trainrun {path} is not valid: {_said(error, PipelineConfig)}"
        ) from error


def _edges(pipeline: PipelineConfig) -> dict[str, set[str]]:
    """Return the nodes that each node waits for."""
    before: dict[str, set[str]] = {}
    for edge in pipeline.connections:
        before.setdefault(edge.to_node, set()).add(edge.from_node)
    return before


def archive_folders(data: DataConfig) -> set[Path]:
    """Return the local folders that hold frames of an archive, as far as its settings say.

    Raises
    ------
    InputError
        If its universe is missing or cannot be read.
    """
    params = data.params
    files = params.get("files") or []
    named = [params.get("cu3s_file_path"), *(files.split(",") if isinstance(files, str) else files)]
    folders = {Path(file.strip()).resolve().parent for file in named if _is_local(file)}
    for key, suffix in (("data_dir", ".cu3s"), ("images_dir", ".tif*")):
        # A data_dir may be the root of the file system, whose splits name files anywhere below.
        folder = Path(params[key]).resolve() if _is_local(params.get(key)) else None
        if folder and folder.is_dir() and any(folder.glob(f"*{suffix}")):
            folders.add(folder)
    universe = params.get("universe_csv")
    if data.data_module in MODULES and _is_local(universe):
        file = Path(universe).resolve()
        if not file.is_file():
            raise InputError(f"the universe of the data is not there: {file}")
        try:
            _, rows = read_universe(file.read_bytes(), str(file), data.data_module)
        except OSError as error:
            raise InputError(f"{file} cannot be read: {one_line(error)}") from error
        listed = {(row.get("materialized_path") or row["source"] or "").strip() for row in rows}
        folders |= {(file.parent / frame).parent for frame in listed if frame and _is_local(frame)}
    return folders


def _is_local(place: Any) -> TypeGuard[str]:
    return isinstance(place, str) and not is_uri(place)


def _said(error: ValidationError, model: type[BaseModel]) -> str:
    """Return what is wrong with each setting; one that is unknown may be misspelt."""
    problems = []
    for item in error.errors():
        *parents, last = item["loc"] or ("",)
        name = ".".join(map(str, item["loc"]))
        if item["type"] == "model_type" and isinstance(item["input"], str):
            problems.append(
                f"{name} is {item['input']!r}, and not a mapping of settings: --override gives a "
                f"setting in it a value ({name}.NAME=VALUE); a config group is chosen in `defaults`"
            )
            continue
        if item["type"] != "extra_forbidden":
            problems.append(f"{name}: {item['msg']}" if name else item["msg"])
            continue
        known = _settings_at(model, parents)
        close = closest(str(last), known)
        meant = f"did you mean {close}?" if close else f"known there: {', '.join(known)}"
        problems.append(f"{name} is unknown; {meant}")
    return "; ".join(problems)


def _settings_at(model: type[BaseModel], parents: Sequence[Any]) -> list[str]:
    """Return the names of the settings in the part of a model that ``parents`` lead to."""
    for name in parents:
        if name in model.model_fields:
            model = next(_models(model.model_fields[name].annotation), model)
    return list(model.model_fields)


def _models(annotation: Any) -> Any:
    """Yield the models that a setting's type allows, in lists or beside None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, list):
        for part in get_args(annotation):
            yield from _models(part)
