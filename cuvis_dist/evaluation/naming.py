"""Whose fault is an error of the post-fit steps? It names the frames that were being computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from cuvis_ai_schemas.enums import ExecutionStage
from cuvis_ai_schemas.execution import Context

from cuvis_dist.errors import CuvisDistError, DataError, one_line
from cuvis_dist.evaluation.cluster import Split


class NamingPipeline:
    """A pipeline whose errors name the frames of the batch; in all else it is the pipeline.

    It remembers which sizes the outputs of calibration have, since upstream joins them.

    Parameters
    ----------
    pipeline : CuvisPipeline or ClusterPipeline
        What computes.
    splits : mapping of str to Split
        ``val`` and ``test``, once they are opened.
    """

    def __init__(self, pipeline: Any, splits: Mapping[str, Split]) -> None:
        self.pipeline, self.splits = pipeline, splits
        self._sizes: dict[tuple[int, ...], str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    def forward(self, *, batch: dict[str, Any], context: Context, **options: Any) -> Any:
        """Return the pipeline's outputs.

        Raises
        ------
        DataError
            If a node cannot use the batch; the message names its frames.
        """
        try:
            outputs = self.pipeline.forward(batch=batch, context=context, **options)
        except CuvisDistError:
            raise
        except Exception as error:
            names = self._names(context)
            raise DataError(f"{names} cannot be used: {one_line(error)}") from error
        if context.stage is ExecutionStage.INFERENCE:
            for (_, port), value in outputs.items():
                if port == "mask" and isinstance(value, torch.Tensor):
                    size = tuple(value.shape[1:])
                    if size not in self._sizes:  # names are looked up among all batches
                        self._sizes[size] = self._names(context)
        return outputs

    def unlike_sizes(self) -> DataError | None:
        """Return what to say of a failed calibration if frames of unlike sizes may be why."""
        if len(self._sizes) < 2:
            return None
        sizes = ", ".join(f"{size} of {names}" for size, names in list(self._sizes.items())[:3])
        return DataError(
            f"the deciders cannot be calibrated on val, whose frames have unlike sizes ({sizes}): "
            "the scores of all of them are joined. Use frames of one size in val"
        )

    def _names(self, context: Context) -> str:
        split = self.splits.get("test" if context.stage is ExecutionStage.TEST else "val")
        if split is None:
            return f"batch {context.batch_idx} of {context.stage.value}"
        return split.archive.named(split.batches()[context.batch_idx])
