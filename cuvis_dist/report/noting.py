"""What does a run note for its report, while it has it at hand?

Nothing of it may fail the run: what cannot be noted is a warning, and the report does without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.post_fit import EmitFn
from cuvis_ai_schemas.enums import ExecutionStage
from loguru import logger

from cuvis_dist.errors import one_line
from cuvis_dist.evaluation.seen import Picture, Pixels, Seen
from cuvis_dist.execution.copies import Snapshot
from cuvis_dist.initialization.measured import Outcome
from cuvis_dist.initialization.plan import Measurement, Pass
from cuvis_dist.initialization.trainer import StatisticalTrainer
from cuvis_dist.nodes.catalogue import is_pixelwise, keeps_bands
from cuvis_dist.nodes.shown import judged, portraits
from cuvis_dist.nodes.upstream import nodes_before
from cuvis_dist.report.diary import Diary
from cuvis_dist.report.kept import PAGE, forget, keep, read_parts
from cuvis_dist.statistics import ExactMoments, Extrema, Moments, Statistic
from cuvis_dist.storage import OutputFolder

#: A matrix of more bands takes megabytes, and nobody sees its cells.
_MOST_BANDS = 1024
#: Pictures of a split that are shown: of the worst frames, and of those with anomalies.
_SHOWN = 3


class Notebook:
    """Takes notes of one run.

    Parameters
    ----------
    output : OutputFolder
        The run's folder.
    emit : callable
        Where its events go.

    Attributes
    ----------
    emit : Diary
        Takes the events of the run.
    seen : dict of str to Seen
        For an evaluator to fill.
    """

    def __init__(self, output: OutputFolder, emit: EmitFn) -> None:
        self.output, self.emit = output, Diary(emit)
        self.seen: dict[str, Seen] = {}
        self._nodes: dict[str, Any] = {}
        self._before: Snapshot | None = None
        self._wavelengths: Callable[[], Any] = lambda: None
        self._initialized = ""

    def begin(self) -> None:
        """Remove the page about an earlier run in this folder, and what it has ended with."""
        with harmless("the report of an earlier run is still there"):
            self.output.remove(PAGE)
            forget(self.output, "nodes", "seen")

    def measured(self, trainer: StatisticalTrainer, initialized: str) -> None:
        """Keep what phase 1 has measured.

        Parameters
        ----------
        trainer : StatisticalTrainer
            It has fitted the pipeline.
        initialized : str
            The hash of what phase 1 ended with: the notes are those of no other.
        """
        with harmless("what phase 1 has measured is not kept for the report"):
            ports: dict[str, dict[str, Any]] = {}
            for this_pass, outcome in trainer.outcomes:
                for measurement in this_pass.measurements:
                    port = ports.setdefault(
                        measurement.source, _port(trainer.pipeline, measurement)
                    )
                    _describe(port, measurement.key, this_pass, outcome)
            content = {
                "initialized": initialized,
                "ports": [port for port in ports.values() if port["values"]],
            }
            keep(self.output, "measured", content)
            self._wavelengths = trainer.wavelengths

    def initialized(self, pipeline: CuvisPipeline, initialized: str, trains: bool) -> None:
        """Note what the nodes are after phase 1; keep a copy where training follows."""
        self._initialized = initialized
        with harmless("the nodes after phase 1 are not kept for the report"):
            self._nodes["initialized"] = [vars(each) for each in portraits(pipeline)]
            if trains and _judges_pixels(pipeline):
                self._before = Snapshot(pipeline)

    def finished(self, pipeline: CuvisPipeline, trained: bool) -> None:
        """Keep what the run ended with."""
        with harmless("what the run ended with is not kept for the report"):
            if trained:
                self._nodes["trained"] = [vars(each) for each in portraits(pipeline)]
            if all(seen.wavelengths is None for seen in self.seen.values()):
                self._nodes["wavelengths"] = _flat(self._wavelengths())  # reads a frame
            keep(self.output, "nodes", {"of": self._initialized, **self._nodes})
            bands = judged(pipeline).bands
            content = {split: _evaluated(seen, bands) for split, seen in self.seen.items()}
            if self._before is not None and self.seen:
                before = self._before.take()
                for split, seen in self.seen.items():
                    content[split]["before"] = _judge(before, seen.pixels, seen.wavelengths)
            keep(self.output, "seen", content)

    def close(self) -> None:
        """Keep what happened when, with the epochs of earlier tries of the same training."""
        with harmless("what happened when is not kept for the report"):
            if not self.emit.notes:
                return
            notes = [{"hook": "initialized", "of": self._initialized, "at": 0.0}, *self.emit.notes]
            first = min((n["epoch"] for n in notes if "epoch" in n), default=0)
            earlier = read_parts(self.output).get("diary", [])
            if first > 1 and earlier and earlier[0].get("of") == self._initialized:
                notes += [n | {"earlier": True} for n in earlier if 0 < n.get("epoch", 0) < first]
            keep(self.output, "diary", notes)


@contextmanager
def harmless(what: str) -> Iterator[None]:
    """Turn any error into a warning that opens with ``what``."""
    try:
        yield
    except Exception as error:
        logger.opt(exception=True).debug(what)
        logger.warning(f"{what}: {one_line(error)}")


# ---- phase 1 -----------------------------------------------------------------------------


def _port(pipeline: CuvisPipeline, measurement: Measurement) -> dict[str, Any]:
    before = nodes_before(pipeline, [measurement.node])
    bands = all(keeps_bands(node) for node in before)
    return {"source": measurement.source, "bands": bands, "values": {}, "recordings": {}}


def _describe(port: dict[str, Any], key: str, this_pass: Pass, outcome: Outcome) -> None:
    """Add to a port what one of its measurements says."""
    port["values"] |= _values(outcome.statistics[key])
    port["fits"] = [fit.node.name for fit in this_pass.fits]
    found = {
        name: _values(statistics[key])
        for name, statistics in outcome.recordings.items()
        if key in statistics and statistics[key].n
    }
    for name, values in found.items():
        port["recordings"].setdefault(name, {}).update(values)


def _values(statistic: Statistic) -> dict[str, Any]:
    """Return the spectra of a statistic as arrays; nothing of one that has none."""
    if isinstance(statistic, ExactMoments):
        statistic = statistic.rounded()
    if isinstance(statistic, Moments) and statistic.n > 1:
        full = statistic.covariance
        variances = full if statistic.diagonal else full.diagonal()
        values = {"n": statistic.n, "mean": statistic.mean, "std": variances.clamp(min=0).sqrt()}
        if not statistic.diagonal and len(full) <= _MOST_BANDS:
            values["covariance"] = full
    elif type(statistic) is Extrema and statistic.n:
        values = {"n": statistic.n, "minimum": statistic.minimum, "maximum": statistic.maximum}
    else:
        return {}
    return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in values.items()}


def _flat(wavelengths: Any) -> np.ndarray | None:
    return None if wavelengths is None else torch.as_tensor(wavelengths).flatten().numpy()


# ---- evaluation --------------------------------------------------------------------------


def _evaluated(seen: Seen, bands: int) -> dict[str, Any]:
    return {
        "frames": seen.frames,
        "annotated": seen.annotated,
        "unknown": seen.unknown,
        "bands": bands,
        "wavelengths": seen.wavelengths,
        "wrong": np.asarray(seen.wrong),
        "counts": {
            name: {"scores": each.scores, "counts": each.counts}
            for name, each in seen.counts.items()
        },
        "pictures": [{"why": why, **vars(picture)} for why, picture in _shown(seen)],
    }


def _shown(seen: Seen) -> list[tuple[str, Picture]]:
    """Return the pictures to show, each with why: the worst, the median, and with anomalies."""
    pictures = seen.pictures
    middle = float(np.median(seen.wrong)) if seen.wrong else 0.0
    by_wrong = sorted(pictures, key=lambda picture: -picture.wrong)
    chosen = [("worst", picture) for picture in by_wrong[:_SHOWN]]
    taken = [id(picture) for _, picture in chosen]
    rest = [picture for picture in pictures if id(picture) not in taken]
    median = sorted(rest, key=lambda picture: abs(picture.wrong - middle))[:1]
    chosen += [("median", picture) for picture in median]
    rest = [p for p in rest if p.anomalies and all(p is not each for each in median)]
    most = sorted(rest, key=lambda picture: -picture.anomalies)
    return chosen + [("with anomalies", picture) for picture in most[:_SHOWN]]


def _judges_pixels(pipeline: CuvisPipeline) -> bool:
    """Whether a pixel's score is its own, whatever the rest of its frame is."""
    port = judged(pipeline).logits
    last = next((n for n in pipeline.nodes() if port and n.name == port[0]), None)
    if last is None:
        return False
    return all(is_pixelwise(node) for node in (last, *nodes_before(pipeline, [last])))


def _judge(
    pipeline: CuvisPipeline, sample: Sequence[Pixels], wavelengths: np.ndarray | None
) -> dict[str, Any]:
    """Return what a pipeline says of a sample of pixels, given to it as one frame."""
    if not sample:
        return {}
    ports = judged(pipeline)
    spectra = torch.as_tensor(np.concatenate([each.spectra for each in sample]))
    marked = np.concatenate([each.anomalous for each in sample])
    batch: dict[str, Any] = {
        "cube": spectra[None, :, None, :],
        "mask": torch.as_tensor(marked[None, :, None].astype(np.int32)),
    }
    if wavelengths is not None:
        batch["wavelengths"] = torch.as_tensor(wavelengths)[None]
    for layer in pipeline.torch_layers:
        layer.eval()
    with torch.no_grad():
        outputs = pipeline.forward(
            batch=batch, stage=ExecutionStage.INFERENCE, keep_ports=ports.ports()
        )
    found = {
        name: outputs[port].float().flatten().numpy()
        for name, port in (("scores", ports.scores), ("logits", ports.logits))
        if port and port in outputs and outputs[port].numel() == len(marked)
    }
    weights = np.concatenate([each.weights for each in sample])
    return {**found, "anomalous": marked, "weights": weights}
