"""How is an initialization named, and where are its files?

It is a saved pipeline, ``.yaml`` with ``.pt``, and a card, ``.json``, in one folder or below one
URI. Any of the three names it. Nothing heavy is imported: a wrong name is told at once.
"""

from __future__ import annotations

import os
from pathlib import Path

from cuvis_dist.errors import InputError
from cuvis_dist.hashing import hash_settings
from cuvis_dist.storage import OutputFolder, location_of, temporary_folder

#: The endings of its files.
ENDINGS = ("yaml", "pt", "json")


def place_of(place: str | os.PathLike[str]) -> tuple[OutputFolder, str, str]:
    """Return the folder of an initialization, its name there less the ending, and the ending.

    Raises
    ------
    InputError
        If the name has none of the endings.
    """
    head, dot, ending = os.fspath(place).rpartition(".")
    if not dot or ending not in ENDINGS:
        raise InputError(
            f"{place} names no initialization: it is a file that ends in .yaml, .pt or .json"
        )
    location = location_of(head)
    if isinstance(location, Path):
        return OutputFolder(location.parent), location.name, ending
    parent, _, name = location.rpartition("/")
    return OutputFolder(parent), name, ending


def find(place: str | os.PathLike[str]) -> dict[str, Path | None]:
    """Return the files of an initialization on this machine, by ending; None for one not there.

    Those at a URI are copied here. The ``.pt`` and the file that ``place`` names are there.

    Raises
    ------
    InputError
        If one of these two is missing, or the name has none of the endings.
    ClusterError
        If a store does not answer.
    """
    folder, name, wanted = place_of(place)
    files = {ending: _here(folder, f"{name}.{ending}") for ending in ENDINGS}
    for ending in (wanted, "pt"):
        if files[ending] is None:
            raise InputError(f"initialization not found: {folder.at(f'{name}.{ending}')}")
    return files


def _here(folder: OutputFolder, name: str) -> Path | None:
    if folder.local is not None:
        path = folder.local / name
        return path if path.is_file() else None
    own = hash_settings(str(folder))[:16]
    try:
        return folder.download(name, temporary_folder() / own / name)
    except FileNotFoundError:
        return None
