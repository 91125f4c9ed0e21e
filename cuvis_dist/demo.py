"""What can a newcomer run without data? A labelled archive and the guide's two-phase example.

Cubes are linear mixtures of smooth material spectra under varying illumination, with sensor
noise; anomalies are small patches of a material that the background does not contain.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from cuvis_dist.errors import InputError


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the generated archive; the seed fixes every pixel."""

    frames: int = 32
    height: int = 64
    width: int = 64
    bands: int = 61
    recordings: int = 4
    seed: int = 7
    max_epochs: int = 12

    def __post_init__(self) -> None:
        """Refuse sizes that no archive has; raises InputError."""
        for name, value in vars(self).items():
            if value < (name != "seed"):
                least = 0 if name == "seed" else 1
                raise InputError(f"--{name.replace('_', '-')} is {value}; the least is {least}")


WAVELENGTH_RANGE_NM = (430, 910)
_MATERIALS = 4


def write_demo(folder: Path, settings: DemoSettings) -> Path:
    """Write archive, pipeline and trainrun into ``folder``; return the trainrun's path.

    Every other frame has anomalies. Of each recording's frames the first half trains, the next
    quarter validates, the rest tests. What is there already, with the same content, stays.

    Raises
    ------
    InputError
        If one of the files is there with another content; it is left.
    """
    folder = folder.resolve()
    archive, rows = folder / "archive", _rows(settings)
    trainrun = folder / "trainrun.yaml"
    described = {
        archive / "universe.csv": _universe(rows),
        folder / "pipeline.yaml": yaml.safe_dump(_pipeline(settings), sort_keys=False),
        trainrun: yaml.safe_dump(_trainrun(folder, rows, settings), sort_keys=False),
    }
    for path, text in described.items():
        _is_there(path, text.encode())
    archive.mkdir(parents=True, exist_ok=True)
    for name, content in _frames(rows, settings):
        _write(archive / name, content)
    for path, text in described.items():
        _write(path, text.encode())
    return trainrun


def _write(path: Path, content: bytes) -> None:
    """Write a file as a whole, unless it is there."""
    if not _is_there(path, content):
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(content)
        part.replace(path)


def _is_there(path: Path, content: bytes) -> bool:
    """Whether a file is there with this content; raises InputError if it has another one."""
    if not path.exists():
        return False
    if path.is_file() and path.read_bytes() == content:
        return True
    raise InputError(
        f"{path} is not what the demo would write: it was changed, or is of other options or of "
        "something else. It is left as it is: name another --folder, or remove this one"
    )


def make_cube(
    spectra: np.ndarray, height: int, width: int, anomalies: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Make one frame from ``[M + 1, C]`` spectra, of which the last is the anomaly's.

    Returns
    -------
    tuple of ndarray
        Reflectance ``[H, W, C]`` float32 and mask ``[H, W]`` int32 (1 = anomalous).
    """
    background, target = spectra[:-1], spectra[-1]
    abundances = np.stack([_smooth_noise(height, width, rng) for _ in background], axis=-1)
    abundances = np.exp(2.5 * abundances)
    abundances /= abundances.sum(axis=-1, keepdims=True)
    cube = abundances @ background
    mask = np.zeros((height, width), dtype=np.int32)
    for _ in range(anomalies):
        side = int(rng.integers(2, 5))
        top = int(rng.integers(0, max(1, height - side)))
        left = int(rng.integers(0, max(1, width - side)))
        patch = (slice(top, top + side), slice(left, left + side))
        share = rng.uniform(0.25, 0.7)
        cube[patch] = (1 - share) * cube[patch] + share * target
        mask[patch] = 1
    illumination = 1 + 0.15 * _smooth_noise(height, width, rng)
    cube *= illumination[..., None]
    cube += rng.normal(0, 0.014, cube.shape)
    return cube.astype(np.float32), mask


def make_spectra(bands: int, rng: np.random.Generator) -> np.ndarray:
    """Make ``[M + 1, C]`` smooth reflectance spectra between 430 and 910 nm."""
    x = np.linspace(0, 1, bands)
    spectra = []
    for _ in range(_MATERIALS + 1):
        bumps = sum(
            rng.uniform(0.1, 0.4)
            * np.exp(-0.5 * ((x - rng.uniform(0, 1)) / rng.uniform(0.08, 0.3)) ** 2)
            for _ in range(4)
        )
        spectra.append(0.1 + bumps)
    return np.stack(spectra)


def _smooth_noise(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Return a smooth random field with unit scale: low frequencies with random phases."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    field = np.zeros((height, width))
    for _ in range(6):
        fy, fx = rng.uniform(-4, 4, size=2)
        field += np.cos(2 * np.pi * (fy * y + fx * x + rng.uniform()))
    return field / np.sqrt(3)


def _rows(settings: DemoSettings) -> list[tuple[str, int]]:
    """Return recording and index of every frame."""
    rows: list[tuple[str, int]] = []
    for frame in range(settings.frames):
        recording = frame * settings.recordings // settings.frames
        source = f"recording_{recording:02d}.cu3s"
        rows.append((source, rows[-1][1] + 1 if rows and rows[-1][0] == source else 0))
    return rows


def _file_of(source: str, index: int) -> str:
    return f"{Path(source).stem}_{index:03d}.npz"


def _universe(rows: list[tuple[str, int]]) -> str:
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["source", "index", "materialized_path"])
    table.writerows([source, index, _file_of(source, index)] for source, index in rows)
    return text.getvalue()


def _frames(rows: list[tuple[str, int]], settings: DemoSettings) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every frame's file."""
    rng = np.random.default_rng(settings.seed)
    spectra = make_spectra(settings.bands, rng)
    low, high = WAVELENGTH_RANGE_NM
    wavelengths = np.linspace(low, high, settings.bands).astype(np.int32)
    height, width = settings.height, settings.width
    for source, index in rows:
        anomalies = 0 if index % 2 else max(1, height * width // 800)
        cube, mask = make_cube(spectra, height, width, anomalies, rng)
        content = io.BytesIO()
        np.savez(
            content,
            cube=cube,
            mask=mask,
            class_mask=mask.astype(np.uint8),
            wavelengths=wavelengths,
        )
        yield _file_of(source, index), content.getvalue()


def _pipeline(settings: DemoSettings) -> dict:
    node = "cuvis_ai.node"
    nodes = {
        "data": (f"{node}.data.LentilsAnomalyDataNode", {"normal_class_ids": [0]}),
        "normalizer": (
            f"{node}.normalization.MinMaxNormalizer",
            {"eps": 1e-6, "use_running_stats": True},
        ),
        "selector": (
            f"{node}.channel_selector.SoftChannelSelector",
            {
                "n_select": min(10, settings.bands),
                "input_channels": settings.bands,
                "init_method": "variance",
            },
        ),
        "rx_detector": (
            f"{node}.anomaly.rx_detector.RXGlobal",
            {"num_channels": settings.bands, "eps": 1e-6},
        ),
        "logit_head": (f"{node}.conversion.ScoreToLogit", {}),
        "decider": (f"{node}.deciders.binary_decider.BinaryDecider", {"threshold": 0.5}),
        "bce": (f"{node}.losses.AnomalyBCEWithLogits", {"weight": 10.0}),
        "metrics_anomaly": (f"{node}.metrics.AnomalyDetectionMetrics", {}),
    }
    edges = [
        ("data.outputs.cube", "normalizer.inputs.data"),
        ("normalizer.outputs.normalized", "selector.inputs.data"),
        ("selector.outputs.selected", "rx_detector.inputs.data"),
        ("rx_detector.outputs.scores", "logit_head.inputs.scores"),
        ("logit_head.outputs.logits", "bce.inputs.predictions"),
        ("data.outputs.mask", "bce.inputs.targets"),
        ("logit_head.outputs.logits", "decider.inputs.logits"),
        ("decider.outputs.decisions", "metrics_anomaly.inputs.decisions"),
        ("logit_head.outputs.logits", "metrics_anomaly.inputs.logits"),
        ("data.outputs.mask", "metrics_anomaly.inputs.targets"),
    ]
    return {
        "metadata": {"name": "Channel_Selector"},
        "plugins": ["cuvis_ai_builtin"],
        "nodes": [
            {"name": name, "class_name": class_name, "hparams": hparams}
            for name, (class_name, hparams) in nodes.items()
        ],
        "connections": [{"source": source, "target": target} for source, target in edges],
    }


def _trainrun(folder: Path, rows: list[tuple[str, int]], settings: DemoSettings) -> dict:
    splits: dict[str, dict[str, list[int]]] = {"train": {}, "val": {}, "test": {}}
    of_recording: dict[str, list[int]] = {}
    for source, index in rows:
        of_recording.setdefault(source, []).append(index)
    for source, ids in of_recording.items():
        half, three_quarters = max(1, len(ids) // 2), max(2, 3 * len(ids) // 4)
        splits["train"][source] = ids[:half]
        splits["val"][source] = ids[half:three_quarters]
        splits["test"][source] = ids[three_quarters:]
    return {
        "name": "demo",
        "pipeline": "pipeline.yaml",
        "data": {
            "data_module": "npz_multi",
            "batch_size": 2,
            "splits": {
                split: [
                    {"kind": "file_indices", "source": source, "ids": ids}
                    for source, ids in by_source.items()
                    if ids
                ]
                for split, by_source in splits.items()
            },
            "params": {"universe_csv": str(folder / "archive" / "universe.csv")},
        },
        "training": {
            "seed": 42,
            "max_epochs": settings.max_epochs,
            "enable_progress_bar": False,
            "optimizer": {"name": "adamw", "lr": 1e-3},
            "scheduler": {
                "name": "reduce_on_plateau",
                "monitor": "metrics_anomaly/iou",
                "mode": "max",
            },
            "callbacks": {
                "checkpoint": {"monitor": "metrics_anomaly/iou", "mode": "max", "save_top_k": 1}
            },
        },
        "unfreeze_nodes": ["selector", "rx_detector", "logit_head"],
        "loss_nodes": ["bce"],
        "metric_nodes": ["metrics_anomaly"],
        "output_dir": str(folder / "results"),
    }
