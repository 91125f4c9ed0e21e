"""Which frames of a group are those that make it stand out: all, or some?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cuvis_dist.audit.groups import FrameStatistics, Group
from cuvis_dist.audit.reference import Reference

#: A frame is another one's kind if it is so much farther off than nearly all frames of the others.
_FARTHER, _NEARLY_ALL = 1.25, 0.98
#: Frames of the others that are looked at.
_MOST = 300


def unusual_frames(
    group: Group, others: Sequence[Group], reference: Reference
) -> list[FrameStatistics]:
    """Return the frames that stand out, if they are some and not all; otherwise none."""
    if len(group.frames) < 2:
        return []
    theirs = [frame for other in others for frame in other.frames]
    theirs = theirs[:: max(1, len(theirs) // _MOST)]
    usual = np.array([_deviations(frame, reference) for frame in theirs]).reshape(-1, 2)
    if len(usual) < 4:
        return []
    bound = _FARTHER * np.quantile(usual, _NEARLY_ALL, axis=0)
    those = [f for f in group.frames if (np.array(_deviations(f, reference)) > bound).any()]
    return those if 0 < len(those) < len(group.frames) else []


def beyond(
    frames: Sequence[FrameStatistics], others: Sequence[Group], reference: Reference
) -> float:
    """Return how far frames are off, in units of the farthest frame of the other groups.

    The group that is farthest of the others does not count: it may have the same fault. Where two
    more have frames that are as unusual, it is content.
    """
    theirs = np.array(
        [np.max([_deviations(f, reference) for f in g.frames[:_MOST]], axis=0) for g in others]
    )
    if len(theirs) < 2:
        return np.inf
    farthest = np.sort(theirs, axis=0)[-2]
    own = np.array([_deviations(frame, reference) for frame in frames])
    return float((own / np.maximum(farthest, 1e-300)).max())


def _deviations(frame: FrameStatistics, reference: Reference) -> tuple[float, float]:
    """Return how far mean and variances of a frame are off, whatever its content's contrast."""
    diagonal, bands = frame.moments.only_diagonal(), reference.bands
    mean = reference.whitened(diagonal.mean.numpy()[bands]) - reference.centre
    variance = diagonal.M2.numpy()[bands] / max(1, frame.moments.n)
    ratio = np.log(np.maximum(variance / reference.scale**2, 1e-12))
    return (
        float(np.sqrt(((mean / reference.units(frame.moments.n)) ** 2).mean())),
        float(np.abs(ratio - np.median(ratio)).max()),
    )
