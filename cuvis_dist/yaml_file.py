"""What does a YAML file say that a person wrote, and does it say everything once?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cuvis_dist.errors import InputError, one_line

#: How many values the aliases of a file may stand for. A few lines can stand for billions, and
#: each is a value of its own as soon as settings are checked.
MAX_ALIASED = 100_000
_MERGE = "tag:yaml.org,2002:merge"


def read_yaml(path: str | Path, what: str) -> Any:
    """Return the content of a YAML file, as ``yaml.safe_load`` does.

    Parameters
    ----------
    path : str or Path
        The file.
    what : str
        What kind of file it is, for messages.

    Raises
    ------
    InputError
        If it cannot be read or is no YAML, if a key stands twice in one mapping, of which YAML
        would take the last, or if its aliases stand for more than anyone writes.
    """
    where = f"{what} {path}"
    try:
        loader = yaml.SafeLoader(Path(path).read_text(encoding="utf-8"))
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            known: dict[int, int] = {}
            aliased = _count(node, known, where) - len(known)
            if aliased > MAX_ALIASED:
                raise InputError(
                    f"{where} repeats parts by aliases (*name) that stand for {aliased} values; at "
                    f"most {MAX_ALIASED} are read: write out what is meant"
                )
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except FileNotFoundError as error:
        raise InputError(f"{what} not found: {Path(path).absolute()}") from error
    except RecursionError as error:
        raise InputError(f"{where} cannot be read: it is nested too deep") from error
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        if isinstance(error, InputError):
            raise
        said = one_line(error).replace('in "<unicode string>", ', "in ")
        if "'\\t'" in said:
            said += " (YAML is indented with spaces, not with tabs)"
        raise InputError(f"{where} cannot be read: {said}") from error


def _count(node: yaml.Node, known: dict[int, int], where: str) -> int:
    """Return how many values a node stands for with all aliases written out, itself included.

    Parameters
    ----------
    known : dict of int to int
        The numbers of the nodes that were counted, by ``id``; filled. 0: being counted.
    """
    if id(node) in known:
        if not known[id(node)]:
            raise InputError(f"{_line(node, where)}: the alias of a part stands within that part")
        return known[id(node)]
    known[id(node)] = 0
    count = 1
    if isinstance(node, yaml.MappingNode):
        _refuse_repeated(node, where)
        count += sum(_count(part, known, where) for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        count += sum(_count(part, known, where) for part in node.value)
    known[id(node)] = count
    return count


def _refuse_repeated(node: yaml.MappingNode, where: str) -> None:
    """Refuse a mapping that has a key twice; what ``<<`` merges in may be said again."""
    first: dict[tuple[str, str], yaml.Node] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
            continue
        said = first.setdefault((key.tag, key.value), key)
        if said is not key:
            raise InputError(
                f"{_line(key, where)}: {key.value} stands there for the second time, after line "
                f"{said.start_mark.line + 1}; only the last would count, so remove one"
            )


def _line(node: yaml.Node, where: str) -> str:
    return f"{where}, line {node.start_mark.line + 1}"
