"""Which archives are audited in tests? Made or real scenes as recordings, and their faults."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from cuvis_dist.audit.groups import FrameStatistics
from cuvis_dist.demo import make_cube, make_spectra
from cuvis_dist.statistics import Extrema, Moments

Fault = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""Takes the frames ``[F, H, W, C]`` of one recording and returns them with a fault."""


def made(
    seed: int, recordings: int = 12, frames: int = 4, side: int = 40, bands: int = 40
) -> list[np.ndarray]:
    """Return uint16 recordings ``[F, H, W, C]`` of similar scenes, as a sensor counts them."""
    rng = np.random.default_rng(seed)
    spectra = make_spectra(bands, np.random.default_rng(7))
    return [
        np.stack(
            [
                np.clip(np.rint(4000 * make_cube(spectra, side, side, 0, rng)[0]), 0, 65535)
                for _ in range(frames)
            ]
        ).astype(np.uint16)
        for _ in range(recordings)
    ]


def dealt(scene: np.ndarray, seed: int, recordings: int = 12, block: int = 8) -> list[np.ndarray]:
    """Cut a real scene ``[H, W, C]`` into blocks and deal them to recordings at random."""
    rng = np.random.default_rng(seed)
    h, w = (n // block * block for n in scene.shape[:2])
    blocks = [
        scene[i : i + block, j : j + block] for i in range(0, h, block) for j in range(0, w, block)
    ]
    order = rng.permutation(len(blocks))[: len(blocks) // recordings * recordings]
    return [np.stack([blocks[i] for i in part]) for part in order.reshape(recordings, -1)]


def interleaved(scene: np.ndarray, recordings: int = 12) -> list[np.ndarray]:
    """Give every 12th pixel of a real scene to one recording: contents are as alike as can be."""
    flat = scene.reshape(-1, scene.shape[-1])
    flat = flat[: len(flat) // (recordings * 4) * recordings * 4]
    return [flat[i::recordings].reshape(4, -1, 1, scene.shape[-1]) for i in range(recordings)]


def statistics(
    recordings: Sequence[np.ndarray], sample: int = 400, seed: int = 0
) -> list[FrameStatistics]:
    """Measure every frame as a worker does."""
    rng = np.random.default_rng(seed)
    result = []
    for r, cubes in enumerate(recordings):
        for f, cube in enumerate(cubes):
            pixels = cube.reshape(-1, cube.shape[-1])
            kept = np.sort(rng.permutation(len(pixels))[:sample])
            tensor = torch.from_numpy(np.ascontiguousarray(pixels))
            name = f"recording_{r:02d}.cu3s"
            result.append(
                FrameStatistics(
                    f"{name}:{f}",
                    name,
                    {"sensor": "AB"[r % 2]},
                    Moments.measure(tensor),
                    Extrema.measure(tensor),
                    pixels[kept],
                )
            )
    return result


def faulty(recordings: Sequence[np.ndarray], which: int, fault: Fault, seed: int = 0):
    """Return the recordings with one of them spoilt, in their own type."""
    result = list(recordings)
    kind = result[which].dtype
    bad = fault(result[which].astype(np.float64), np.random.default_rng(seed))
    if np.issubdtype(kind, np.integer):
        bad = np.clip(np.rint(bad), np.iinfo(kind).min, np.iinfo(kind).max)
    result[which] = bad.astype(kind)
    return result


def gain(by: float) -> Fault:
    return lambda cubes, rng: cubes * by


def offset(by: float) -> Fault:
    return lambda cubes, rng: cubes + by


def slope(ends: float) -> Fault:
    """Another lamp: from 1 - ends in the first band to 1 + ends in the last."""
    return lambda cubes, rng: cubes * np.linspace(1 - ends, 1 + ends, cubes.shape[-1])


def constant(band: int) -> Fault:
    def spoil(cubes, rng):
        cubes = cubes.copy()
        cubes[..., band] = np.round(cubes[..., band].mean())
        return cubes

    return spoil


def swapped(a: int, b: int) -> Fault:
    def spoil(cubes, rng):
        cubes = cubes.copy()
        cubes[..., [a, b]] = cubes[..., [b, a]]
        return cubes

    return spoil


def foreign(share: float, spectrum: np.ndarray | None = None) -> Fault:
    """Put pixels of another material (a spectrum upside down, by default) in patches of 2 x 2."""

    def spoil(cubes, rng):
        cubes = cubes.copy()
        mean = cubes.mean(axis=(0, 1, 2))
        other = spectrum if spectrum is not None else mean[::-1] * 1.1
        mask = rng.random(cubes.shape[:3]) < share
        noise = cubes[mask] - mean
        cubes[mask] = other + 0.3 * noise
        return cubes

    return spoil


def noisy(band: int, times: float) -> Fault:
    def spoil(cubes, rng):
        cubes = cubes.copy()
        spread = cubes[..., band].std()
        cubes[..., band] += rng.normal(0, times * spread, cubes.shape[:-1])
        return cubes

    return spoil


def band_shifted(band: int, by: float) -> Fault:
    def spoil(cubes, rng):
        cubes = cubes.copy()
        cubes[..., band] += by
        return cubes

    return spoil


def saturated(quantile: float) -> Fault:
    return lambda cubes, rng: np.minimum(cubes, np.round(np.quantile(cubes, quantile)))


def spectrally_shifted(bands: int) -> Fault:
    def spoil(cubes, rng):
        shifted = np.roll(cubes, bands, axis=-1)
        shifted[..., :bands] = cubes[..., :1]
        return shifted

    return spoil


def stripes(by: float) -> Fault:
    """Every fourth column of the sensor is brighter by an offset."""

    def spoil(cubes, rng):
        cubes = cubes.copy()
        cubes[:, :, ::4] += by
        return cubes

    return spoil


def half(fault: Fault) -> Fault:
    """Spoil the second half of the recording's frames only."""

    def spoil(cubes, rng):
        cut = len(cubes) // 2
        return np.concatenate([cubes[:cut], fault(cubes[cut:], rng)])

    return spoil


def dark(cubes, rng):
    return np.maximum(0, 0.02 * cubes + rng.normal(20, 5, cubes.shape))
