"""How are frames looked at that one process evaluates, in order?

As those that workers evaluate are (:mod:`~cuvis_dist.evaluation.parts`), batch by batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cuvis_ai_schemas.enums import ExecutionStage
from cuvis_ai_schemas.execution import Context
from loguru import logger

from cuvis_dist.errors import one_line
from cuvis_dist.evaluation.cluster import Split
from cuvis_dist.evaluation.parts import Outputs, Port
from cuvis_dist.evaluation.seen import Look, Seen
from cuvis_dist.nodes.shown import judged

_SPLITS = {ExecutionStage.VAL: "val", ExecutionStage.TEST: "test"}


class LookingPipeline:
    """A pipeline that looks at what it evaluates; in all else it is the pipeline.

    Parameters
    ----------
    pipeline : CuvisPipeline
        It computes in this process.
    splits : mapping of str to Split
        ``val`` and ``test``, once they are opened.

    Attributes
    ----------
    seen : dict of str to Seen, or None
        What people can look at, by split; nothing of a split where looking failed. None where
        nobody wants to.
    """

    def __init__(self, pipeline: Any, splits: Mapping[str, Split]) -> None:
        self.pipeline, self.splits = pipeline, splits
        self.seen: dict[str, Seen] | None = None
        self._look: Look | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    def forward(
        self,
        *,
        batch: dict[str, Any],
        context: Context,
        keep_ports: Collection[Port] | None = None,
        **options: Any,
    ) -> Outputs:
        """Return the pipeline's outputs; raises what the pipeline raises."""
        name = _SPLITS.get(context.stage)
        if self.seen is None or name is None or keep_ports is None:  # nobody looks at calibration
            return self._run(batch, context, keep_ports, options)
        if context.batch_idx == 0:
            self._look = None
            with self._harmless(name):
                self._look = Look(judged(self.pipeline), len(self.splits[name].archive))
                self.seen[name] = Seen()
        if self._look is None:
            return self._run(batch, context, keep_ports, options)
        keep = {*keep_ports}
        outputs = self._run(batch, context, keep | self._look.judged.ports(), options)
        with self._harmless(name):
            split = self.splits[name]
            positions = split.batches()[context.batch_idx]
            frames = [split.archive.frames[i] for i in positions]
            self.seen[name].merge(self._look.batch(batch, outputs, frames, positions))
        return {key: value for key, value in outputs.items() if key in keep or key[1] in keep}

    def close(self) -> None:
        """Do nothing: nothing is left open."""

    def _run(
        self,
        batch: dict[str, Any],
        context: Context,
        keep: Collection[Port] | None,
        options: dict[str, Any],
    ) -> Outputs:
        outputs: Outputs = self.pipeline.forward(
            batch=batch, context=context, keep_ports=keep, **options
        )
        return outputs

    @contextmanager
    def _harmless(self, name: str) -> Iterator[None]:
        """Stop looking at a split where that fails: nobody's result may depend on it."""
        assert self.seen is not None
        try:
            yield
        except Exception as error:
            logger.debug(f"no pictures of {name}: {one_line(error)}")
            self._look = None
            self.seen.pop(name, None)
