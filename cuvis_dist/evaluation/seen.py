"""What of the frames that are evaluated is kept for a person to look at?

Few of them as pictures, how often each score occurs, and a sample of pixels with their spectra, on
which an earlier state of the pipeline can be judged. Bounded however many frames there are, merged
in the order of the parts, and no random number is drawn: results do not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from cuvis_dist.archive import Frame
from cuvis_dist.nodes.shown import Judged, PortOf

#: Longest side of a picture, in pixels.
_SIDE = 128
#: RX scores are counted of one pixel in so many: their distribution is all that is shown.
_EVERY = 8
#: Pictures that the driver keeps: so many of the worst frames, as many of those with anomalies, and
#: of others, among which the median is looked for.
_WORST, _OTHERS = 4, 48
#: Pixels of a split that are sampled, about; and of one frame at most.
_SAMPLED, _OF_A_FRAME = 1 << 14, 1 << 11
#: Scores are counted by the first 18 bits of a float32: to one part in 500, and fast.
_DROPPED = 14
#: What is shown of a frame, in nm; and by part of the bands where no wavelengths are known.
_COLOURS_NM, _COLOURS = (650.0, 550.0, 460.0), (0.75, 0.45, 0.15)


@dataclass(frozen=True, eq=False)
class Counts:
    """How often each score occurs, to one part in 500.

    Attributes
    ----------
    keys : ndarray
        ``[K]`` int64, in the order of the scores.
    counts : ndarray
        ``[K, 2]`` int64: of pixels that are not annotated as anomalies, and of those that are.
    """

    keys: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, anomalous: np.ndarray) -> Counts:
        """Count scores ``[N]`` float32; those that are NaN are left out."""
        known = ~np.isnan(scores)
        bits = np.ascontiguousarray(scores[known], dtype=np.float32).view(np.uint32)
        ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)) >> _DROPPED
        both = ordered.astype(np.int64) * 2 + anomalous[known]
        pairs = np.bincount(both, minlength=1 << (33 - _DROPPED)).reshape(-1, 2)
        keys = np.flatnonzero(pairs.any(axis=1))
        return cls(keys, pairs[keys])

    def merge(self, other: Counts) -> Counts:
        """Return the counts of both."""
        keys = np.union1d(self.keys, other.keys)
        counts = np.zeros((len(keys), 2), dtype=np.int64)
        for each in (self, other):
            counts[np.searchsorted(keys, each.keys)] += each.counts
        return type(self)(keys, counts)

    @property
    def scores(self) -> np.ndarray:
        """The score of each key, ``[K]`` float32: the middle of what it stands for."""
        ordered = (self.keys.astype(np.uint32) << _DROPPED) | np.uint32(1 << (_DROPPED - 1))
        bits = np.where(ordered >> 31, ordered & np.uint32((1 << 31) - 1), ~ordered)
        return bits.astype(np.uint32).view(np.float32)


@dataclass(frozen=True, eq=False)
class Picture:
    """One frame as a person looks at it.

    Attributes
    ----------
    uid, recording : str
        Which frame it is.
    colours : ndarray
        ``[h, w, 3]`` float32, three of its bands, of one pixel of each cell.
    bands : tuple of int
        Which ones.
    scores, decided, annotated : ndarray or None
        ``[h, w]`` float32 and bool: the largest of the pixels that a cell stands for.
    wrong : float
        How bad it is: the share of pixels that are decided wrongly, or the largest score where
        there is no decision or no annotation.
    anomalies : int
        Pixels that are annotated as anomalies.
    block : int
        How many pixels of the frame, along each side, are one of the picture.
    """

    uid: str
    recording: str
    colours: np.ndarray | None
    bands: tuple[int, ...]
    scores: np.ndarray | None
    decided: np.ndarray | None
    annotated: np.ndarray | None
    wrong: float
    anomalies: int
    block: int


@dataclass(frozen=True, eq=False)
class Pixels:
    """A sample of pixels.

    Attributes
    ----------
    spectra : ndarray
        ``[N, C]`` float32, as they are read.
    anomalous : ndarray
        ``[N]`` bool.
    weights : ndarray
        ``[N]`` float64: how many pixels of the split each stands for.
    """

    spectra: np.ndarray
    anomalous: np.ndarray
    weights: np.ndarray


@dataclass
class Seen:
    """What was seen of a split, or of a part of it.

    Attributes
    ----------
    frames : int
        How many frames were looked at.
    annotated : bool
        Whether they have an annotation.
    counts : dict of str to Counts
        The counts of ``scores`` are those of some pixels, the counts of ``logits`` those of all:
        see :class:`~cuvis_dist.nodes.shown.Judged`.
    unknown : int
        How many pixels have a score that is not a finite number.
    wrong : list of float
        :attr:`Picture.wrong` of each frame.
    pictures : list of Picture
        The worst first; then those with most anomalies; then others.
    pixels : list of Pixels
        A sample, part by part.
    wavelengths : ndarray or None
        Those of the first frame, in nm.
    """

    frames: int = 0
    annotated: bool = False
    counts: dict[str, Counts] = field(default_factory=dict)
    unknown: int = 0
    wrong: list[float] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    pixels: list[Pixels] = field(default_factory=list)
    wavelengths: np.ndarray | None = None

    def merge(self, other: Seen, worst: int = _WORST, others: int = _OTHERS) -> Seen:
        """Take over what was seen of further frames; return this one."""
        self.frames += other.frames
        self.annotated = self.annotated or other.annotated
        for name, counts in other.counts.items():
            known = self.counts.get(name)
            self.counts[name] = known.merge(counts) if known else counts
        self.unknown += other.unknown
        self.wrong += other.wrong
        self.pixels += other.pixels
        if self.wavelengths is None:
            self.wavelengths = other.wavelengths
        self._choose([*self.pictures, *other.pictures], worst, others)
        return self

    def _choose(self, pictures: list[Picture], worst: int, others: int) -> None:
        by_wrong = sorted(pictures, key=lambda p: -p.wrong)
        chosen = by_wrong[:worst]
        most = sorted((p for p in pictures if p.anomalies), key=lambda p: -p.anomalies)
        chosen += [p for p in most[:worst] if p not in chosen]
        middle = float(np.median(self.wrong)) if self.wrong else 0.0
        rest = sorted((p for p in pictures if p not in chosen), key=lambda p: abs(p.wrong - middle))
        self.pictures = chosen + rest[:others]


class Look:
    """Looks at batches of a split as they are evaluated.

    Parameters
    ----------
    judged : Judged
        The outputs that are looked at.
    frames : int
        How many frames the split has.
    """

    def __init__(self, judged: Judged, frames: int) -> None:
        self.judged = judged
        self.every = max(1, frames * 4 // _SAMPLED)  # of many frames some, a few pixels each
        self.per_frame = int(np.clip(_SAMPLED * self.every // max(1, frames), 4, _OF_A_FRAME))

    def batch(
        self,
        batch: Mapping[str, Any],
        outputs: Mapping[PortOf, Any],
        frames: Sequence[Frame],
        positions: Sequence[int],
    ) -> Seen:
        """Return what is seen of one batch.

        Parameters
        ----------
        batch : mapping
            What was read.
        outputs : mapping
            What the pipeline made of it, as far as it is looked at.
        frames : sequence of Frame
            The batch's frames.
        positions : sequence of int
            Where they stand in the split: what is sampled of a frame depends on it.
        """
        seen = Seen()
        maps = {
            name: _map(outputs.get(port)) if (port := getattr(self.judged, name)) else None
            for name in ("scores", "logits", "decisions", "mask")
        }
        cube, wavelengths = _map(batch.get("cube")), batch.get("wavelengths")
        if wavelengths is not None:
            seen.wavelengths = (
                torch.as_tensor(wavelengths).reshape(len(frames), -1)[0].cpu().numpy()
            )
        for i, (frame, position) in enumerate(zip(frames, positions, strict=True)):
            one = {name: None if value is None else value[i] for name, value in maps.items()}
            spectra = cube[i] if cube is not None else None
            seen.merge(self._frame(frame, position, spectra, one, seen.wavelengths), 1, 1)
        return seen

    def _frame(
        self,
        frame: Frame,
        position: int,
        cube: Tensor | None,
        maps: Mapping[str, Tensor | None],
        wavelengths: np.ndarray | None,
    ) -> Seen:
        mask, shown = maps["mask"], maps["logits"]
        shown = maps["scores"] if shown is None else shown
        anomalous = None if mask is None else (mask[..., 0] != 0).cpu()
        decided = None if maps["decisions"] is None else (maps["decisions"][..., 0] != 0).cpu()
        counts = {}
        for name in ("scores", "logits"):
            if (value := maps[name]) is not None and value.shape[-1] == 1:
                flat = value.float().cpu().numpy().reshape(-1)
                marked = np.zeros(len(flat), bool)
                if anomalous is not None and anomalous.numel() == len(flat):
                    marked = anomalous.numpy().reshape(-1)
                step = _EVERY if name == "scores" else 1
                counts[name] = Counts.of(flat[::step], marked[::step])
        if anomalous is not None and decided is not None and anomalous.shape == decided.shape:
            wrong = int((anomalous != decided).sum()) / anomalous.numel()
        else:
            wrong = float(shown.max()) if shown is not None else 0.0
        colours, bands = _colours(cube, wavelengths)
        picture = Picture(
            frame.uid,
            frame.recording,
            colours,
            bands,
            _largest(shown),
            _largest(decided),
            _largest(anomalous),
            wrong if np.isfinite(wrong) else 0.0,
            int(anomalous.sum()) if anomalous is not None else 0,
            max((_step(*each.shape[:2]) for each in (cube, shown) if each is not None), default=1),
        )
        pixels = [] if cube is None else self._sample(cube, anomalous, position)
        unknown = 0 if shown is None else int((~shown.isfinite()).any(dim=-1).sum())
        return Seen(1, anomalous is not None, counts, unknown, [picture.wrong], [picture], pixels)

    def _sample(self, cube: Tensor, anomalous: Tensor | None, position: int) -> list[Pixels]:
        """Return some pixels of a frame, as many of each kind if there are enough."""
        if position % self.every:
            return []
        number = cube.shape[0] * cube.shape[1]
        marked = np.zeros(number, bool)
        if anomalous is not None and anomalous.numel() == number:
            marked = anomalous.numpy().reshape(-1)
        random, chosen, weights = np.random.default_rng(position), [], []
        for kind in (False, True):
            there = np.flatnonzero(marked == kind)
            some = min(len(there), self.per_frame)
            if some:
                chosen.append(random.choice(there, some, replace=False))
                weights.append(np.full(some, self.every * len(there) / some))
        index = np.concatenate(chosen)
        spectra = cube.reshape(number, -1)[torch.as_tensor(index, device=cube.device)]
        return [Pixels(spectra.float().cpu().numpy(), marked[index], np.concatenate(weights))]


def _map(value: Any) -> Tensor | None:
    """Return what is a map ``[B, H, W, C]``, with one channel where it has no axis for them."""
    if not isinstance(value, Tensor) or value.ndim not in (3, 4):
        return None
    return value.detach() if value.ndim == 4 else value.detach()[..., None]


def _step(height: int, width: int) -> int:
    """Return how many pixels of a frame, along each side, are one of its picture."""
    return -(-max(height, width) // _SIDE)


def _colours(
    cube: Tensor | None, wavelengths: np.ndarray | None
) -> tuple[np.ndarray | None, tuple[int, ...]]:
    if cube is None:
        return None, ()
    bands = colour_bands(cube.shape[-1], wavelengths)
    step = _step(*cube.shape[:2])
    return cube[::step, ::step][..., list(bands)].float().cpu().numpy(), bands


def colour_bands(channels: int, wavelengths: np.ndarray | None) -> tuple[int, int, int]:
    """Return which bands are shown red, green and blue."""
    if wavelengths is not None and len(wavelengths) == channels:
        red, green, blue = (int(np.abs(wavelengths - nm).argmin()) for nm in _COLOURS_NM)
        if red != green and green != blue:
            return red, green, blue
    red, green, blue = (min(channels - 1, int(part * channels)) for part in _COLOURS)
    return red, green, blue


def _largest(value: Tensor | None) -> np.ndarray | None:
    if value is None:
        return None
    plane = (value if value.ndim == 2 else value[..., 0]).float()
    step = _step(*plane.shape)
    small = max_pool2d(plane[None, None], step, ceil_mode=True)[0, 0].cpu().numpy()
    return small > 0 if value.dtype is torch.bool else small
