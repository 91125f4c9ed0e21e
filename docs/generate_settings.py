"""Which settings are there? Writes ``docs/settings.md`` from ``cuvis_dist.Scaling``.

    python docs/generate_settings.py

What a setting does is the docstring below it in ``cuvis_dist/scaling.py``; a test compares the page
with what this makes of them.
"""

from __future__ import annotations

import argparse
import inspect
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from cuvis_dist.commands.options import add_fold, add_scaling_options
from cuvis_dist.scaling import PARTS

PAGE = Path(__file__).with_name("settings.md")

_HEAD = """\
# Settings

<!-- Written by docs/generate_settings.py from cuvis_dist/scaling.py: change it there. -->

What a run has that a trainrun does not say. Everything has a default, so that none is needed to
begin with. There are three parts, and only `measuring` changes what a run computes: with other
`resources` or another `reading` phase 1 ends in the same bits, on the same kind of processor, and
every training step is the same one.

| where | how |
|---|---|
| a scaling file, `--scaling FILE` | a mapping of the three parts, as below |
| the command line | `--set PART.NAME=VALUE`, repeatable, the value as YAML; it wins over the file |
| a short option | those named below, which are `--set` of the same setting |
| Python | `Scaling(resources={...}, measuring={...}, reading={...})` or `Scaling.load(...)` |

```yaml
# scaling.yaml
resources: {workers: 16, train_workers: 2}
measuring: {pixels: unlabelled, on_error: skip}
```

```bash
cuvis-dist run outputs/demo/trainrun.yaml --scaling scaling.yaml --set measuring.max_skipped=3
```

```python
from cuvis_dist import Scaling

scaling = Scaling(resources={"workers": 8}, measuring={"pixels": "unlabelled"})
same = Scaling.load(settings=["resources.workers=8", "measuring.pixels=unlabelled"])
```

A setting that does not exist, or stands in the wrong part, is refused, and the message names the
one that is meant. Where results go is no setting: it is `output_dir` of the trainrun,
`--output-dir`, or the argument `output_dir` of the trainers in Python.
"""


def settings_page() -> str:
    """Return the text of ``docs/settings.md``."""
    options = short_options()
    lines = [_HEAD]
    for part, model in PARTS.items():
        lines += [f"## `{part}`", "", _markdown(inspect.getdoc(model) or ""), ""]
        for name, field in model.model_fields.items():
            default = "not set" if field.default is None else f"`{_shown(field.default)}`"
            facts = [_values(field), f"by default {default}", options.get(name, "")]
            lines += [f"### `{part}.{name}`", "", " · ".join(filter(None, facts)), ""]
            lines += [_markdown(field.description or ""), ""]
    return "\n".join(lines).rstrip() + "\n"


def short_options() -> dict[str, str]:
    """Return how the settings that have an option of their own are given, by name."""
    parser = argparse.ArgumentParser()
    add_scaling_options(parser)
    add_fold(parser)
    return {
        action.dest: ", ".join(
            f"`{option} {action.metavar}`" if action.metavar else f"`{option}`"
            for option in action.option_strings
        )
        for action in parser._actions
    }


def _values(field: FieldInfo) -> str:
    """Return which values a setting takes, in words."""
    kinds = list(get_args(field.annotation) or (field.annotation,))
    if get_origin(field.annotation) is Literal:
        return " or ".join(f"`{value}`" for value in kinds)
    words = {int: "whole number", float: "number", bool: "`true` or `false`", str: "text"}
    kind = next(kind for kind in kinds if kind is not type(None))
    bounds = []
    for bound in field.metadata:
        for name, sign in (("ge", "at least"), ("gt", "above"), ("le", "at most")):
            if (limit := getattr(bound, name, None)) is not None:
                bounds.append(f"{sign} {_shown(limit)}")
    return ", ".join([words.get(kind, "path"), *bounds])


def _shown(value: Any) -> str:
    """Return a value as one writes it in YAML."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10**6:
        return f"{value:_}"
    return yaml.safe_dump(value).removesuffix("\n...\n").strip()


def _markdown(text: str) -> str:
    """Return a docstring as Markdown."""
    return re.sub(r"``([^`]+)``", r"`\1`", text).strip()


if __name__ == "__main__":
    PAGE.write_text(settings_page(), encoding="utf-8")
