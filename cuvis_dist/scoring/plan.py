"""Which maps of which frames go into which files, and which are there already?"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_schemas.enums import ExecutionStage, NodeCategory
from loguru import logger

from cuvis_dist.archive import Archive, Contents, in_words, read_contents
from cuvis_dist.errors import InputError
from cuvis_dist.hashing import hash_settings
from cuvis_dist.scoring.naming import file_names
from cuvis_dist.storage import OutputFolder

#: Ports of these names are written unless others are asked for.
DEFAULT_PORTS = ("scores", "decisions")
#: Files beside the maps: what they are of, which belongs to which frame, and the files that the
#: frames were read from.
FINGERPRINT, INDEX, READ = "fingerprint.json", "frames.csv", "files.json"


@dataclass(frozen=True)
class ScorePlan:
    """What a job is to write, and what of it is there.

    Attributes
    ----------
    folder : OutputFolder
        ``<output_dir>/scores``.
    archive : Archive
        The frames, each once, in canonical order.
    files : list of str
        The name of each frame's file, relative to ``folder``.
    outputs : list of tuple of str
        Node and port of each map.
    todo : list of int
        The frames whose file is not there.
    leftover : list of str
        Files of an earlier job that go when this one begins.
    fingerprint : dict of str to str
        SHA-256 of each thing that the maps depend on, by name.
    contents : Contents
        The files that the frames are read from.
    """

    folder: OutputFolder
    archive: Archive
    files: list[str]
    outputs: list[tuple[str, str]]
    todo: list[int]
    leftover: list[str]
    fingerprint: dict[str, str]
    contents: Contents


def plan_scores(
    archive: Archive,
    outputs: list[tuple[str, str]],
    folder: OutputFolder,
    depends_on: Mapping[str, str],
    restart: bool = False,
    verify: bool = False,
) -> ScorePlan:
    """Find out what is to be written; writes nothing, and reads no frame unless it is to verify.

    Parameters
    ----------
    archive : Archive
        The frames to score.
    outputs : list of tuple of str
        Node and port of each map, from :func:`ports`.
    folder : OutputFolder
        Where the files go, from :func:`scores_folder`.
    depends_on : mapping of str to str
        SHA-256 of each further thing that the maps depend on, by name: the pipeline, the data.
    restart : bool
        Count nothing as there.
    verify : bool
        Compare the checksums of frames' files, too.

    Raises
    ------
    InputError
        If two frames have one uid, or the folder holds the scores of something else.
    """
    archive = _each_once(archive)
    files = file_names(archive.frames, ".npz", taken=(FINGERPRINT, INDEX, READ))
    fingerprint = {
        **depends_on,
        "frames": hash_settings([frame.uid for frame in archive.frames]),
        "outputs": hash_settings(outputs),
    }
    # A name that begins with a dot is no file of scores: the lock of a job is one.
    there = {name for name in folder.names() if not name.startswith(".")}
    if there and not restart:
        _refuse_others(folder, there, fingerprint)
    contents = Contents.of(archive.frames, verify)
    earlier = _read_before(folder)
    changed = {} if restart else contents.changed_since(earlier)
    stale = _stale(archive, files, changed, there)
    done: set[str] = set() if restart else there - stale
    ours = re.compile(r".*\.npz" if restart else r"(.*/)?\.[^/]*\.npz\.\d+")  # of lost workers
    refuse_links(folder.local, files)
    return ScorePlan(
        folder,
        archive,
        files,
        outputs,
        [i for i, file in enumerate(files) if file not in done],
        [f for f in sorted(there) if f == INDEX or f in stale or ours.fullmatch(f)],
        fingerprint,
        contents.with_checksums_of(earlier),
    )


def _read_before(folder: OutputFolder) -> Contents:
    try:
        return read_contents(folder.read(READ)).get("frames", Contents({}))
    except OSError:
        return Contents({})


def _stale(
    archive: Archive, files: list[str], changed: Mapping[str, str], there: set[str]
) -> set[str]:
    """Return the files of frames that were read from other contents; say which have changed."""
    stale = {
        file
        for file, frame in zip(files, archive.frames, strict=True)
        if file in there and any(name in changed for name in frame.reads)
    }
    if stale:
        logger.warning(f"{len(stale)} of the frames are scored again: {in_words(changed)}")
    return stale


def _refuse_others(folder: OutputFolder, there: set[str], fingerprint: dict[str, str]) -> None:
    """Raise InputError unless what is there are scores of the same things."""
    earlier = _earlier(folder) if FINGERPRINT in there else None
    if earlier is None:
        raise InputError(
            f"{folder} holds files, but does not say of which job; choose another output "
            "folder, or --restart to replace them"
        )
    if differ := sorted(name for name in fingerprint if earlier.get(name) != fingerprint[name]):
        raise InputError(
            f"{folder} holds the scores of another {', another '.join(differ)}; choose "
            "another --output-dir, or --restart to replace them"
        )


def ports(pipeline: CuvisPipeline, names: str | None = None) -> list[tuple[str, str]]:
    """Return node and port of each output, in the pipeline's order.

    Parameters
    ----------
    names : str, optional
        ``node.port,node.port``; by default every port called ``scores`` or ``decisions``.

    Raises
    ------
    InputError
        If one does not exist or is no array, with those that there are.
    """
    known = [
        (node.name, port)
        for node in pipeline.nodes()
        if node.should_execute(ExecutionStage.INFERENCE)
        and node.get_category() is not NodeCategory.SINK
        for port, spec in node.OUTPUT_SPECS.items()
        if not isinstance(spec, list) and spec.dtype not in (list, dict, str)
    ]
    there = f"There are: {', '.join('.'.join(port) for port in known)}"
    if names is None:
        found = [port for port in known if port[1] in DEFAULT_PORTS]
        if not found:
            raise InputError(
                f"the pipeline {pipeline.name} has no port called scores or decisions; name what "
                f"to write with --outputs. {there}"
            )
        return found
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in {".".join(port) for port in known}]
    if unknown or not wanted:
        raise InputError(
            f"the pipeline {pipeline.name} has no output {', '.join(unknown) or 'named'}. {there}"
        )
    return [port for port in known if ".".join(port) in wanted]


def _each_once(archive: Archive) -> Archive:
    """Return the archive without frames that ``samples_per_frame`` repeats."""
    first: dict[str, int] = {}
    for index, frame in enumerate(archive.frames):
        other = archive.frames[first.setdefault(frame.uid, index)]
        if other != frame:
            raise InputError(f"two frames have one uid, {frame.uid}: {other.path} and {frame.path}")
    return archive.only(list(first.values()))


def scores_folder(output: OutputFolder) -> OutputFolder:
    """Return ``scores`` in an output folder; raises InputError if a link stands there."""
    place = output.at("scores")
    if isinstance(place, Path):
        refuse_links(place, [])
    return OutputFolder(place)


def _earlier(folder: OutputFolder) -> dict[str, str] | None:
    try:
        return dict(json.loads(folder.read(FINGERPRINT)))
    except (OSError, ValueError, TypeError):
        return None


def refuse_links(folder: Path | None, files: list[str]) -> None:
    """Raise InputError if a link stands where a local folder of scores belongs."""
    if folder is None:
        return
    for path in (folder, *(folder / name for name in {os.path.dirname(f) for f in files})):
        if path.is_symlink():
            raise InputError(
                f"{path} is a link to {os.path.realpath(path)}; scores are written to the output "
                "folder alone. Remove the link, or choose another --output-dir"
            )
