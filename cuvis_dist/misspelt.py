"""Which name is meant by one that nothing has?"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from cuvis_dist.errors import InputError

#: How alike two names are of which one is the other misspelt: difflib's ratio.
_CLOSE = 0.7


def refuse_unknown(values: Any, where: str, known: Mapping[str, list[str]]) -> None:
    """Refuse settings that do not exist, or stand in the wrong part, and name what is meant.

    Parameters
    ----------
    values : mapping of str to mapping
        Settings by part, as somebody has written them.
    where : str
        Where they were written.
    known : mapping of str to list of str
        The names of all settings, by part.

    Raises
    ------
    InputError
        Naming each such setting.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where} is not a mapping of settings: {', '.join(known)}")
    problems = []
    for part, settings in values.items():
        if part not in known:
            problems.append(f"{part} is no part of the settings{_meant(str(part), known)}")
        elif settings is not None and not isinstance(settings, Mapping):
            problems.append(f"{part} is not a mapping of settings: {', '.join(known[part])}")
        else:
            problems += [
                f"{part}.{name} is unknown{_meant(str(name), known)}"
                for name in settings or {}
                if name not in known[part]
            ]
    if problems:
        raise InputError(f"{where}: {'; '.join(problems)}")


def closest(name: str, known: Iterable[str], alike: float = _CLOSE) -> str | None:
    """Return the known name that is nearly the given one, or None."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=alike)
    return close[0] if close else None


def _meant(name: str, known: Mapping[str, list[str]]) -> str:
    """Return which settings a wrong name may stand for, as the rest of a sentence."""
    if name == "output_dir":
        return ": it belongs to the trainrun, or to --output-dir"
    by_name: dict[str, list[str]] = {}
    for part, names in known.items():
        for setting in names:
            by_name.setdefault(setting, []).append(f"{part}.{setting}")
    last = name.rpartition(".")[2]
    if last in by_name:
        return f": the setting is called {' or '.join(by_name[last])}"
    if close := closest(last, [*by_name, *known]):
        return f": did you mean {' or '.join(by_name.get(close, [close]))}?"
    every = [setting for settings in by_name.values() for setting in settings]
    return f". Known settings: {', '.join(every)}"
