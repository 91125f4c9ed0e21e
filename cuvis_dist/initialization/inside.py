"""Which pixels of a frame are of the bulk, so that phase 1 is fitted on these alone?

An ellipsoid around the bulk of an archive's pixels says it, at the port of which the first pass
measures a covariance: every pass looks there at each pixel of each frame, and those outside do not
count, as annotated ones with ``pixels: unlabelled``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cuvis_dist.hashing import hash_settings
from cuvis_dist.statistics.bulk import PixelBulk


@dataclass(frozen=True, eq=False)
class Inside:
    """Which pixels are of the bulk.

    Attributes
    ----------
    node, port : str
        Where they are looked at: the node, and its input port.
    source : str
        What arrives there: ``<node>.<port>``, or ``batch.<port>``.
    bulk : PixelBulk
        The ellipsoid.
    sample, of : int
        How many pixels it was found from, and how many there are in the archive.
    shares : dict of str to float
        By recording, the part of its pixels in the sample that is outside, the largest first.
    """

    node: str
    port: str
    source: str
    bulk: PixelBulk
    sample: int
    of: int
    shares: dict[str, float] = field(default_factory=dict)

    def mask(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return which pixels are inside, ``[N]`` bool, given what the node receives.

        A pixel that is not finite is no outlier, but an error that others report: it is inside.
        """
        pixels: Tensor = inputs[self.port]
        pixels = pixels.reshape(-1, pixels.shape[-1]).double()
        centre, whiten = (
            torch.from_numpy(v).to(pixels) for v in (self.bulk.centre, self.bulk.whiten)
        )
        distance = ((pixels - centre) @ whiten).square().sum(dim=1)
        return ~(distance > self.bulk.bound)

    def described(self) -> dict[str, Any]:
        """Return what a record says of it, as plain values."""
        values = [self.bulk.centre.tolist(), self.bulk.whiten.tolist(), self.bulk.bound]
        return {
            "at": self.source,
            "sample": self.sample,
            "of": self.of,
            "kept_of_sample": self.bulk.kept,
            "outside": self.shares,
            "sha256": hash_settings(values),
        }
