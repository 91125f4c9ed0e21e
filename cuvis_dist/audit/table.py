"""How does an audit look on a terminal, and as JSON?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cuvis_dist.audit.audit import Audit, Row

if TYPE_CHECKING:
    from cuvis_dist.audit.drift import NodeDrift

#: The columns: what is above, the figure, and how it is written.
COLUMNS = {
    "gain": ("gain", "{:.3f}"),
    "offset": ("offset", "{:+.3g}"),
    "shift": ("mean_shift", "{:.2f}"),
    "noise": ("noise", "{:.2f}"),
    "outside": ("outside", "{:.1%}"),
    "Bhattach.": ("bhattacharyya", "{:.2g}"),
    "affine-inv.": ("affine_invariant", "{:.2g}"),
    "condition": ("condition", "{:.1e}"),
    "maximum": ("maximum", "{:.5g}"),
}
#: Lines that are shown where nothing stands out in them.
_SHOWN = 20


def as_text(audit: Audit) -> list[str]:
    """Return the lines of the table, those that stand out most first, and the remarks."""
    unusual = sum(row.unusual for row in audit.rows)
    shown = audit.rows[: max(unusual, _SHOWN)]
    head = ["stands out", audit.by, "frames", "pixels", *COLUMNS, "likely cause"]
    body = [cells_of(row) for row in shown]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    left = {1, len(head) - 1}
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in [head, *body]
    ]
    if len(shown) < len(audit.rows):
        lines.append(f"and {len(audit.rows) - len(shown)} more, none of which stands out")
    return [*lines, *audit.remarks, verdict(audit)]


def cells_of(row: Row) -> list[str]:
    """Return the line of a group: how far it stands out, its name, figures and likely cause."""
    figures = (
        form.format(row.figures[name]) if math.isfinite(row.figures.get(name, math.nan)) else "-"
        for name, form in COLUMNS.values()
    )
    cause = "; ".join(map(str, row.causes)) or "-"
    return [
        f"{row.standing_out:.2f}",
        row.name,
        f"{row.frames:,}",
        f"{row.pixels:,}",
        *figures,
        cause,
    ]


def verdict(audit: Audit) -> str:
    """Return how many groups stand out."""
    unusual = sum(row.unusual for row in audit.rows)
    if unusual:
        return f"{unusual} of {len(audit.rows)} stand out (above 1: more than content explains)"
    return f"none of {len(audit.rows)} stands out"


def drift_text(drifts: Sequence[NodeDrift], why_not: Mapping[str, str]) -> list[str]:
    """Return a line for each node, and for the groups that are farthest from it.

    Parameters
    ----------
    why_not : mapping of str to str
        The nodes that were not compared, each with the reason.
    """
    lines = []
    for each in drifts:
        figures = ", ".join(
            f"{SAID[name]} {value:{',.0f' if name == 'sample' else '.4g'}}"
            for name, value in each.figures.items()
        )
        more = f" ({figures})" if figures else ""
        lines.append(f"drift    {each.node}: {each.ratio:.4f} of its {each.of}{more}")
        farthest = sorted(each.groups.items(), key=lambda item: -item[1])[:3]
        lines += [f"           {ratio:.4f}  {name}" for name, ratio in farthest]
    return lines + [f"drift    {name}: not compared: {why}" for name, why in why_not.items()]


#: What the figures of a drift are called.
SAID = {
    "gain": "gain",
    "offset": "offset",
    "left": "what is left",
    "mahalanobis": "Mahalanobis distance of the means",
    "affine_invariant": "affine-invariant distance",
    "bhattacharyya": "Bhattacharyya distance",
    "minimum": "minimum by",
    "maximum": "maximum by",
    "standard_error": "standard error",
    "sample": "sampled pixels",
}


def as_json(
    audit: Audit, drifts: Sequence[NodeDrift] = (), why_not: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the audit as plain values; what is not known is null."""

    def known(figures: dict[str, float]) -> dict[str, float | None]:
        return {name: v if math.isfinite(v) else None for name, v in figures.items()}

    return {
        "by": audit.by,
        "rows": [
            {
                "name": row.name,
                "frames": row.frames,
                "pixels": row.pixels,
                "stands_out": row.standing_out,
                "unusual": row.unusual,
                "causes": [{"kind": c.kind, "words": c.words} for c in row.causes],
                "figures": known(row.figures),
            }
            for row in audit.rows
        ],
        "remarks": [*audit.remarks],
        "could_see": {
            fault: known(dict(zip(("in_one", "in_all"), sizes, strict=True)))
            for fault, sizes in audit.could_see.items()
        },
        "drift": [
            {
                "node": each.node,
                **known({"ratio": each.ratio}),
                "of": each.of,
                "figures": known(each.figures),
                "groups": known(each.groups),
            }
            for each in drifts
        ],
        "not_compared": dict(why_not or {}),
    }
