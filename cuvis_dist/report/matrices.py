"""How do the bands hang together, and what have the nodes made of that?

Correlation, eigenvalues and condition; weights of a selection; loadings of components.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from cuvis_dist.report.kept import Kept
from cuvis_dist.report.plot import (
    BLUE,
    COLOURS,
    GREY,
    LINES,
    VERMILLION,
    Plot,
    drawing,
    literal,
    logarithmic,
    marker_of,
    number,
    several,
)
from cuvis_dist.report.section import Section, label
from cuvis_dist.report.spectra import band_port

#: Spacing of float32 at 1.
_EPS32 = float(np.finfo(np.float32).eps)
#: Components whose loadings are drawn.
_COMPONENTS = 4


def correlation(runs: Sequence[Kept]) -> Section:
    """Show which bands vary together, and whether the covariance can be inverted."""
    section = Section("correlation", "Correlation and condition")
    curves: list[tuple[str, np.ndarray, str]] = []
    for i, kept in enumerate(runs):
        port = band_port(kept)
        if port is not None and "covariance" in port["values"]:
            if len(port["values"]["covariance"]) > 1:
                section.plots.append(_correlation(kept, port, runs))
            values = _eigenvalues(port["values"]["covariance"])
            curves.append((f"{port['source']}{label(kept, runs)}", values, LINES[i]))
        for each in portraits(kept, "gaussian"):
            values = _eigenvalues(each["values"]["covariance"])
            eps = number(float(each["values"]["eps"]), 2)
            name = f"{each['node']} (eps {eps} added)"
            curves.append((f"{name}{label(kept, runs)}", values, LINES[i]))
            section.said.append(_condition(each, values) + f"{label(kept, runs)}.")
            if (below := int((values < 2 * float(each["values"]["eps"])).sum())) > len(values) / 2:
                section.said.append(
                    f"{number(below)} of its {number(len(values))} eigenvalues are hardly more "
                    f"than its eps of {eps}: along these its distances say little, and scores are "
                    f"far below χ²{label(kept, runs)}."
                )
    if not curves:
        section.missing = "No covariance was measured or is held by a node."
        return section
    plot = Plot(
        "eigenvalues",
        "Eigenvalues of the covariances, from the largest to the smallest on a logarithmic axis: "
        + "; ".join(
            f"{name}: {number(float(v[0]), 2)} to {number(float(v[-1]), 2)}"
            for name, v, _ in curves
        )
        + ".",
        "A flat end is noise; values below the dotted line are lost when float32 inverts the "
        "covariance of the node.",
        _columns("number", [(name, values) for name, values, _ in curves]),
    )
    with drawing(plot) as figure:
        axes = figure.subplots()
        for i, (name, values, line) in enumerate(curves):
            shown = np.where(values > 0, values, np.nan)
            x = np.arange(1, len(values) + 1)
            axes.plot(
                x, shown, line, color=COLOURS[i % len(COLOURS)], **marker_of(len(x)),
                label=literal(name),
            )  # fmt: skip
        held = next((v for name, v, _ in curves if "eps" in name), None)
        if held is not None:
            limit = held[0] * len(held) * _EPS32
            axes.axhline(limit, color=GREY, ls=":", label="limit of float32")
        logarithmic(axes.yaxis)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="eigenvalue", ylabel="variance", title="eigenvalues of the covariance")
    section.plots.append(plot)
    return section


def portraits(kept: Kept, kind: str, when: str = "initialized") -> list[dict[str, Any]]:
    """Return what nodes of a kind had learnt after phase 1, or after training."""
    return [each for each in kept.nodes.get(when, []) if each["kind"] == kind]


def _eigenvalues(covariance: np.ndarray) -> np.ndarray:
    return np.linalg.eigvalsh(np.asarray(covariance, dtype=float))[::-1]


def _condition(each: dict[str, Any], values: np.ndarray) -> str:
    limit = 1 / (len(values) * _EPS32)
    smallest = float(values[-1])
    condition = float(values[0]) / smallest if smallest > 0 else np.inf
    verdict = "within" if condition <= limit else "beyond"
    return (
        f"Covariance of {each['node']}, {several(len(values), 'band')}: condition number "
        f"{number(condition, 2)}, {verdict} what float32 can invert ({number(limit, 2)})"
    )


def _correlation(kept: Kept, port: dict[str, Any], runs: Sequence[Kept]) -> Plot:
    covariance = np.asarray(port["values"]["covariance"], dtype=float)
    x, what = kept.axis(len(covariance), port["bands"])
    std = np.sqrt(np.clip(covariance.diagonal(), 0, None))
    with np.errstate(divide="ignore", invalid="ignore"):
        matrix = covariance / np.outer(std, std)
    upper = matrix[np.triu_indices(len(matrix), 1)]
    known = upper[np.isfinite(upper)]
    low = (
        f" The smallest is {known.min():.2f}, the median {np.median(known):.2f}."
        if len(known)
        else ""
    )
    plot = Plot(
        "correlation" if kept is runs[0] else "correlation-other",
        f"Correlation of each band with each other, over {what} on both axes{label(kept, runs)}."
        + low,
        "Blocks are bands that carry the same; a stripe is a band that is like no other, and what "
        f"is grey has no variance{label(kept, runs)}.",
        {what: x, **{f"{v:g}": matrix[:, i] for i, v in enumerate(x)}},
    )
    step = (x[-1] - x[0]) / max(1, len(x) - 1) / 2 if len(x) > 1 else 0.5
    extent = (x[0] - step, x[-1] + step, x[-1] + step, x[0] - step)
    with drawing(plot, (5.0, 4.0), fitted=True) as figure:
        axes = figure.subplots()
        axes.grid(False)
        axes.set_facecolor("#9A9A9A")
        image = axes.imshow(matrix, cmap="PuOr", vmin=-1, vmax=1, extent=extent, aspect="auto")
        bar = figure.colorbar(image, ax=axes, label="correlation")
        bar.outline.set_visible(False)
        title = f"correlation at {literal(port['source'])}{label(kept, runs)}"
        axes.set(xlabel=what, ylabel=what, title=title)
    return plot


def selection(runs: Sequence[Kept]) -> Section:
    """Show the weights that a selector gives to the bands, before and after training."""
    section = Section("selection", "Weights of the bands")
    for kept in runs:
        for each in portraits(kept, "weights"):
            trained = [
                e for e in portraits(kept, "weights", "trained") if e["node"] == each["node"]
            ]
            weights = np.asarray(each["values"]["weights"])
            after = np.asarray(trained[0]["values"]["weights"]) if trained else None
            x, what = kept.axis(len(weights), each["bands"])
            last = weights if after is None else after
            most = ", ".join(f"{v:g}" for v in np.sort(x[np.argsort(-last)[:5]]))
            most = f"{most} nm" if "nm" in what else f"{what} {most}"
            moved = "" if after is None else _moved(weights, after, x, what)
            plot = Plot(
                f"weights-{each['node']}" + ("" if kept is runs[0] else "-other"),
                f"Weights that {each['node']} gives to bands over {what}; largest at {most}"
                f"{label(kept, runs)}.",
                f"Largest weights of {each['node']} at {most}{moved}{label(kept, runs)}.",
                {what: x, "after phase 1": weights}
                | ({} if after is None else {"after training": after}),
            )
            with drawing(plot) as figure:
                axes = figure.subplots()
                marks = marker_of(len(x))
                axes.plot(x, weights, color=BLUE, label="after phase 1", **marks)
                if after is not None:
                    axes.plot(x, after, "--", color=VERMILLION, label="after training", **marks)
                axes.set_ylim(bottom=0)
                title = f"weights of {literal(each['node'])}{label(kept, runs)}"
                axes.set(xlabel=what, ylabel="weight", title=title)
            section.plots.append(plot)
    if not section.plots:
        section.missing = "The pipeline has no node that gives weights to bands."
    return section


def _moved(before: np.ndarray, after: np.ndarray, x: np.ndarray, what: str) -> str:
    """Return how far training has moved weights, as the end of a sentence."""
    change = np.abs(after - before)
    where = int(change.argmax())
    share = float(change[where]) / max(float(np.abs(before).max()), 1e-300)
    if share < 1e-3:
        return "; training moved none by more than a thousandth of the largest"
    unit = f"{number(float(x[where]))} nm" if "nm" in what else f"{what} {x[where]:g}"
    return f"; training moved that at {unit} most, from {number(float(before[where]))} to " + (
        number(float(after[where]))
    )


def components(runs: Sequence[Kept]) -> Section:
    """Show the loadings of components, and how much each explains."""
    section = Section("components", "Components")
    for kept in runs:
        for each in portraits(kept, "loadings"):
            trained = [
                e for e in portraits(kept, "loadings", "trained") if e["node"] == each["node"]
            ]
            section.plots += _components(kept, each, trained[:1], runs)
    if not section.plots:
        section.missing = "The pipeline has no principal components and no mixer of bands."
    return section


def _components(
    kept: Kept, each: dict[str, Any], trained: list[dict[str, Any]], runs: Sequence[Kept]
) -> Iterator[Plot]:
    node, suffix = each["node"], "" if kept is runs[0] else "-other"
    loadings = np.asarray(each["values"]["loadings"])
    x, what = kept.axis(loadings.shape[1], each["bands"])
    first = min(_COMPONENTS, len(loadings))
    plot = Plot(
        f"loadings-{node}{suffix}",
        f"Loadings of the first {first} components of {node} over {what}{label(kept, runs)}.",
        "Which bands a component looks at"
        + (
            "; continuous after phase 1, dashed after training"
            if trained
            else ", and with which sign"
        )
        + f"{label(kept, runs)}.",
        _columns(what, [(f"component {i + 1}", row) for i, row in enumerate(loadings)], x),
    )
    with drawing(plot) as figure:
        axes = figure.subplots()
        for i in range(first):
            axes.plot(x, loadings[i], color=COLOURS[i], label=f"component {i + 1}")
            if trained:
                axes.plot(x, trained[0]["values"]["loadings"][i], "--", color=COLOURS[i], lw=1)
        axes.axhline(0, color=GREY, lw=0.8)
        title = f"loadings of {literal(node)}{label(kept, runs)}"
        axes.set(xlabel=what, ylabel="loading", title=title)
    yield plot
    if "variances" not in each["values"]:
        return
    variances = np.asarray(each["values"]["variances"])
    share = variances / max(float(variances.sum()), 1e-300)
    plot = Plot(
        f"explained-{node}{suffix}",
        f"Variance of each of the {len(share)} components of {node}; the first has "
        f"{share[0]:.1%} of that of all of them{label(kept, runs)}.",
        f"Of the variance that the components keep{label(kept, runs)}.",
        {"component": np.arange(1, len(share) + 1), "variance": variances, "share": share},
    )
    with drawing(plot) as figure:
        _bars(
            figure.subplots(), share, f"share of the variance, {literal(node)}{label(kept, runs)}"
        )
    yield plot


def _bars(axes: Axes, share: np.ndarray, title: str) -> None:
    x = np.arange(1, len(share) + 1)
    axes.bar(x, share, color=BLUE, label="each")
    axes.plot(x, share.cumsum(), color=VERMILLION, marker=".", label="added up")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="component", ylabel="share", title=title, ylim=(0, 1.05))


def _columns(
    what: str, curves: list[tuple[str, np.ndarray]], x: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Return curves of unlike lengths as columns of one length."""
    longest = max(len(values) for _, values in curves)
    found = {what: np.arange(1, longest + 1) if x is None else x}
    for name, values in curves:
        found[name] = np.concatenate([values, np.full(longest - len(values), np.nan)])
    return found
