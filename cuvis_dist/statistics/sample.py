"""A uniform sample of pixels that is the same whatever the cluster.

Every pixel has a rank, a hash of (seed, frame uid, pixel index) in [0, 1); the sample is the
pixels of the k smallest ranks ("bottom-k sketch", E. Cohen and H. Kaplan, "Summarizing Data
using Bottom-k Sketches", PODC 2007). Those of two sets of pixels are among those of each, so
samples merge exactly.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from cuvis_dist.statistics.statistic import Statistic


@dataclass(frozen=True)
class PixelSample(Statistic):
    """At most ``size`` of ``n`` pixels.

    Attributes
    ----------
    n : int
        Number of pixels that the sample was drawn from.
    size : int
        Largest number of pixels kept.
    rank : Tensor
        ``[K]`` float64, ascending, in [0, 1).
    place : Tensor
        ``[K, 2]`` float64 of whole numbers: the frame's position in the archive, and the
        pixel's in the frame.
    values : Tensor
        ``[K, C]`` float64.
    """

    n: int
    size: int
    rank: Tensor
    place: Tensor
    values: Tensor

    located: ClassVar[bool] = True

    @classmethod
    def measure(
        cls,
        pixels: Tensor,
        size: int = 20_000,
        seed: int = 0,
        uid: str = "",
        position: int = 0,
        index: Tensor | None = None,
        bound: float = 1.0,
    ) -> Self:
        """Sample ``pixels`` ``[N, C]`` of one frame.

        Pixels that are not finite come before all others (rank -1), so that they are found.

        Parameters
        ----------
        size : int
            Largest number of pixels kept.
        seed : int
            Chooses among samples.
        uid : str
            Identity of the frame, which the ranks depend on.
        position : int
            The frame's place in the archive: a sample is handed out in that order.
        index : Tensor, optional
            ``[N]`` int64, of each pixel in its frame; ``0 .. N - 1`` by default.
        bound : float
            Ranks above it are known not to be among the smallest and are left out.
        """
        n = pixels.shape[0]
        where = np.arange(n) if index is None else index.cpu().numpy()
        rank = ranks_of(where, seed, uid)
        rank[~torch.isfinite(pixels).all(dim=-1).cpu().numpy()] = -1
        chosen = np.flatnonzero(rank <= bound)
        if len(chosen) > size:
            chosen = chosen[np.argpartition(rank[chosen], size - 1)[:size]]
        chosen = chosen[np.argsort(rank[chosen], kind="stable")]
        place = np.stack([np.full(len(chosen), position), where[chosen]], axis=1)
        values = pixels.detach()[torch.as_tensor(chosen, device=pixels.device)]
        return cls(
            n,
            size,
            torch.as_tensor(rank[chosen]),
            torch.as_tensor(place, dtype=torch.float64),
            values.double().cpu(),
        )

    def at(self, position: int) -> Self:
        """Return the sample of one frame for another place of that frame in the archive."""
        place = self.place.clone()
        place[:, 0] = position
        return replace(self, place=place)

    def merge(self, other: Self) -> Self:
        """Return the sample of both; raises ValueError on unlike channels or sizes."""
        if (self.channels, self.size) != (other.channels, other.size):
            raise ValueError(
                f"cannot merge samples of {self.size} pixels of {self.channels} channels and "
                f"{other.size} of {other.channels}"
            )
        rank = torch.cat([self.rank, other.rank])
        first = torch.argsort(rank, stable=True)[: self.size]
        return type(self)(
            self.n + other.n,
            self.size,
            rank[first],
            torch.cat([self.place, other.place])[first],
            torch.cat([self.values, other.values])[first],
        )

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return self.values.shape[1]

    def surrogate(self) -> Tensor:
        """Return the pixels in the order of the archive: all of it when it has no more."""
        position, index = self.place.T.numpy()
        return self.values[torch.as_tensor(np.lexsort((index, position)))]


def ranks_of(index: np.ndarray, seed: int, uid: str) -> np.ndarray:
    """Hash each pixel index of a frame to 53 bits in [0, 1).

    SplitMix64 (G. L. Steele, D. Lea, C. H. Flood, "Fast Splittable Pseudorandom Number
    Generators", OOPSLA 2014) of the index-th state after a start that seed and uid fix.
    """
    start = hashlib.blake2b(f"{seed}:{uid}".encode(), digest_size=8).digest()
    z = index.astype(np.uint64) + np.uint64(1)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(int.from_bytes(start, "little"))
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)) * 2.0**-53
