"""Which archives do tests use? Small generated ones, real scenes, and stand-in sessions."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline

from cuvis_dist.runs.trainrun import TrainRun, load_trainrun

ROOT = Path(__file__).resolve().parents[1]
SCENES = ROOT.parent / "shared" / "data"


def statistical_trainrun(
    folder: Path, universe: Path, nodes: list, edges: list, **data
) -> TrainRun:
    """Write and load a phase-1 trainrun over an npz archive; all frames are the train split."""
    every = [{"kind": "all"}]
    (folder / "pipeline.yaml").write_text(
        yaml.safe_dump(
            {
                "metadata": {"name": "Test"},
                "plugins": ["cuvis_ai_builtin"],
                "nodes": [
                    {"name": name, "class_name": f"cuvis_ai.node.{cls}", "hparams": hparams}
                    for name, cls, hparams in nodes
                ],
                "connections": [{"source": a, "target": b} for a, b in edges],
            }
        )
    )
    trainrun = folder / "trainrun.yaml"
    trainrun.write_text(
        yaml.safe_dump(
            {
                "name": "test",
                "pipeline": "pipeline.yaml",
                "data": {
                    "data_module": "npz_multi",
                    "batch_size": 1,
                    "splits": {"train": every, "val": every, "test": every},
                    "params": {"universe_csv": str(universe)},
                }
                | data,
                "output_dir": str(folder / "results"),
            }
        )
    )
    return load_trainrun(trainrun)


def real_scene(name: str, folder: Path, frames: int = 5) -> Path:
    """Turn a real scene into an npz archive and return its universe; skips where it is absent."""
    if not (SCENES / "to_archive.py").exists():
        pytest.skip("the real scenes are not on this machine")
    command = [sys.executable, SCENES / "to_archive.py", name, folder, "--frames", frames]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return folder / "universe.csv"


def buffers_sha256(pipeline: CuvisPipeline) -> str:
    """Return one hash of every buffer and parameter of a pipeline, by node and name."""
    digest = hashlib.sha256()
    for node in pipeline.nodes():
        for name, value in sorted(node.state_dict().items()):
            digest.update(f"{node.name}.{name}{tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return ``||ours - theirs|| / ||theirs||`` in the Frobenius norm."""
    if not theirs.numel():
        return float(ours.numel())
    difference = (ours.double() - theirs.double()).norm()
    return float(difference / theirs.double().norm().clamp(min=1e-300))


def assert_same_state(ours: CuvisPipeline, theirs: CuvisPipeline, tolerance: float) -> None:
    """Assert that two pipelines' states agree, node by node and name by name."""
    for mine, other in zip(ours.nodes(), theirs.nodes(), strict=True):
        states = mine.state_dict(), other.state_dict()
        assert states[0].keys() == states[1].keys(), mine.name
        for name, value in states[0].items():
            difference = relative_difference(value, states[1][name])
            assert difference <= tolerance, f"{mine.name}.{name} differs by {difference:.3g}"


def edit(path: Path, change) -> None:
    """Change the content of a YAML file."""
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
