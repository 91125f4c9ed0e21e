"""How are the manifests of plugins read, once each and fast?

Private names of upstream are replaced while it reads them: those by which its modules know
``_build_catalog`` and yaml.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from cuvis_ai_core.utils import restore
from cuvis_ai_schemas.plugin import manifest_capabilities


@contextmanager
def manifests_counted_once(installed: Collection[Path]) -> Iterator[None]:
    """Let a plugin's manifest that is found in several folders count once.

    Upstream refuses a name that it finds twice. Here the same content counts once, and whatever
    another folder says wins over one of ``installed``, which are looked up without being asked
    for. Private: the name by which ``restore`` knows ``_build_catalog``, which reads the folders.

    Parameters
    ----------
    installed : collection of Path
        Folders that come last and give way.
    """
    theirs = restore._build_catalog

    def merged(folders: list[Path]) -> dict[str, Any]:
        catalog: dict[str, Any] = {}
        found: dict[str, Path] = {}
        for folder in folders:
            for name, manifest in _read_once(folder, theirs).items():
                if name not in catalog:
                    catalog[name], found[name] = manifest, folder
                elif folder not in installed and (
                    _manifests_of(folder)[name] != _manifests_of(found[name])[name]
                ):
                    raise ValueError(
                        f"plugin {name} is declared by {found[name]} and otherwise by {folder}: "
                        "remove one of the two manifests"
                    )
        return catalog

    replaced: Any = merged
    restore._build_catalog = replaced
    try:
        yield
    finally:
        restore._build_catalog = theirs


def data_modules(folders: Collection[Path], installed: Collection[Path]) -> list[str]:
    """Return the names of the data modules that manifests declare."""
    plugins = declared_plugins(folders, installed).values()
    declared = [entry for plugin in plugins for entry in plugin.capabilities]
    names = {getattr(entry, "data_module_name", None) for entry in declared}
    return sorted(filter(None, names))


def declared_plugins(folders: Collection[Path], installed: Collection[Path]) -> dict[str, Any]:
    """Return the manifests in folders, by the plugin's name."""
    with manifests_counted_once(installed):
        return restore._build_catalog([*folders])


#: What was read from folders of manifests, by folder and the files' sizes and times of change.
_catalogs: dict[Any, dict[str, Any]] = {}


def _read_once(folder: Path, read: Callable[[list[Path]], dict[str, Any]]) -> dict[str, Any]:
    """Return what ``read`` makes of a folder, from memory while its files are the same.

    The data is set up many times in a run, and reading cuvis_ai's own manifests took 0.4 s each
    time: 0.05 s with libyaml. Private: the name by which ``manifest_capabilities`` knows yaml.
    """
    stats = [(file, file.stat()) for file in sorted(folder.glob("*.yaml"))]
    known = folder, *((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats)
    if known not in _catalogs:
        theirs = manifest_capabilities.yaml
        replaced: Any = SimpleNamespace(**vars(theirs) | {"safe_load": _safe_load})
        manifest_capabilities.yaml = replaced
        try:
            _catalogs[known] = read([folder])
        finally:
            manifest_capabilities.yaml = theirs
    return copy.deepcopy(_catalogs[known])


def _manifests_of(folder: Path) -> dict[str, Any]:
    """Return what the manifests in a folder say, by plugin, paths as they are written."""
    files = folder.glob("*.yaml")
    contents = [_safe_load(file.read_text(encoding="utf-8")) for file in files]
    return {content["name"]: content for content in contents}


def _safe_load(text: Any) -> Any:
    """Do as ``yaml.safe_load``, by libyaml where Python's yaml was built with it."""
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
