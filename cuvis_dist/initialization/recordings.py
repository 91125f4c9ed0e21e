"""What does a person see of each recording, beside the archive as a whole?

Spectra of its pixels, for the report: mean, variance and range. No fit depends on them, so that
they are merged as shards come, and bounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cuvis_dist.statistics import ExactMoments, Extrema, Moments, Statistic, from_bytes

#: So many recordings are kept, those that come first: nobody looks at more curves.
_MOST = 1000

OfRecording = dict[str, Statistic]
"""By measurement, of the pixels of one recording; of moments the variances alone."""


class Recordings:
    """The spectra of each recording, as far as its shards have come.

    Attributes
    ----------
    found : dict of str to OfRecording
        By recording.
    """

    def __init__(self) -> None:
        self.found: dict[str, OfRecording] = {}

    def add(self, recording: str, statistics: Mapping[str, Statistic]) -> None:
        """Merge what was measured of one of its shards; other statistics are passed over."""
        if recording not in self.found and len(self.found) >= _MOST:
            return
        merged = self.found.setdefault(recording, {})
        for key, statistic in statistics.items():
            if isinstance(statistic, Moments | ExactMoments):
                statistic = statistic.only_diagonal()
            elif not isinstance(statistic, Extrema):
                continue
            merged[key] = merged[key].merge(statistic) if key in merged else statistic

    def state(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {
            recording: {key: statistic.to_bytes() for key, statistic in statistics.items()}
            for recording, statistics in self.found.items()
        }

    def take(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        self.found = {
            recording: {key: from_bytes(data) for key, data in statistics.items()}
            for recording, statistics in state.items()
        }
