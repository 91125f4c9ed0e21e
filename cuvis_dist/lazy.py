"""How does a package hand out names whose modules are loaded when they are first asked for?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def found_in(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return what a package has as its ``__getattr__``.

    Parameters
    ----------
    package : str
        Its ``__name__``.
    homes : dict of str to str
        By public name: the module that has it, as named from the package.

    Returns
    -------
    callable
        Returns what has a name, and raises AttributeError for other names.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return find
