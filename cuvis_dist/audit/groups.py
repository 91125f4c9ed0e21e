"""What is audited? The statistics of frames, merged by recording, frame or a field of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cuvis_dist.errors import InputError
from cuvis_dist.statistics import ExactMoments, Extrema, Moments


@dataclass(frozen=True)
class FrameStatistics:
    """What is known of one frame of the archive, as it reaches one port of the pipeline.

    Attributes
    ----------
    uid : str
        Identity of the frame.
    recording : str
        The file that it comes from.
    fields : dict of str to str
        The frame's row of the universe.
    moments : Moments or ExactMoments
        The moments of all of its pixels, with the full covariance.
    extrema : Extrema or None
        Smallest and largest value of each band.
    pixels : ndarray
        ``[K, C]``: a sample of its pixels; ``K`` may be 0.
    """

    uid: str
    recording: str
    fields: dict[str, str]
    moments: Moments | ExactMoments
    extrema: Extrema | None = None
    pixels: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))


@dataclass(frozen=True)
class Group:
    """Some frames together.

    Attributes
    ----------
    name : str
        What they have in common.
    frames : tuple of FrameStatistics
        In the archive's order.
    n : int
        Number of pixels.
    mean : ndarray
        ``[C]`` float64.
    M2 : ndarray
        ``[C, C]`` float64.
    minimum, maximum : ndarray or None
        ``[C]`` float64.
    pixels : ndarray
        ``[K, C]`` float64, a sample.
    """

    name: str
    frames: tuple[FrameStatistics, ...]
    n: int
    mean: np.ndarray
    M2: np.ndarray
    minimum: np.ndarray | None
    maximum: np.ndarray | None
    pixels: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """``[C, C]``, with the divisor n - 1."""
        return self.M2 / max(1, self.n - 1)

    @property
    def variance(self) -> np.ndarray:
        """``[C]``."""
        return self.M2.diagonal() / max(1, self.n - 1)


def group_of(name: str, frames: Sequence[FrameStatistics]) -> Group:
    """Merge frames; raises ValueError if there are none or they have other channels."""
    moments = frames[0].moments
    extrema = frames[0].extrema
    for frame in frames[1:]:
        moments = moments.merge(frame.moments)
        extrema = extrema.merge(frame.extrema) if extrema and frame.extrema else None
    rounded = moments.rounded() if isinstance(moments, ExactMoments) else moments
    samples = [frame.pixels for frame in frames if len(frame.pixels)]
    pixels = np.concatenate(samples) if samples else np.empty((0, moments.channels))
    return Group(
        name,
        tuple(frames),
        rounded.n,
        rounded.mean.numpy(),
        rounded.M2.numpy(),
        extrema.minimum.numpy() if extrema else None,
        extrema.maximum.numpy() if extrema else None,
        pixels.astype(np.float64),
    )


def grouped(frames: Sequence[FrameStatistics], by: str = "recording") -> list[Group]:
    """Return the groups in the order in which the archive has them.

    Parameters
    ----------
    frames : sequence of FrameStatistics
        Those without pixels are left out.
    by : str
        ``recording``, ``frame``, or a field of the universe.

    Raises
    ------
    InputError
        If there are no frames with pixels, no such field, or frames of unlike channels.
    """
    frames = [frame for frame in frames if frame.moments.n]
    if not frames:
        raise InputError("no frame has statistics to audit: measure the archive first")
    members: dict[str, list[FrameStatistics]] = {}
    for frame in frames:
        members.setdefault(_key(frame, by), []).append(frame)
    first = frames[0]
    for frame in frames:
        if frame.moments.channels != first.moments.channels:
            raise InputError(
                f"frame {frame.uid} has {frame.moments.channels} channels and frame {first.uid} "
                f"has {first.moments.channels}: they cannot be compared; audit them apart"
            )
    return [group_of(name, those) for name, those in members.items()]


def _key(frame: FrameStatistics, by: str) -> str:
    if by == "recording":
        return frame.recording
    if by == "frame":
        return frame.uid
    if by not in frame.fields:
        known = ", ".join(["recording", "frame", *frame.fields])
        raise InputError(f"frame {frame.uid} has no field {by!r} to group by; there are {known}")
    return frame.fields[by]
