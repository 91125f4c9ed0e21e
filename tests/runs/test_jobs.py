"""``ray job submit`` against a cluster of three nodes on loopback, with token authentication."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from archives import ROOT, assert_same_state
from commands import one_process
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from heads import BIN, cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture
def three_nodes(tmp_path):
    """A head that does no work, and two nodes of one CPU each."""
    with cluster(tmp_path, 9500, nodes=2) as started:
        yield started


def submit(folder, address, environment, *arguments):
    """Submit from a clone-like working directory and follow the job to its end."""
    command = [
        BIN / "ray", "job", "submit", "--address", address, "--working-dir", "jobs_dir", "--",
        "python", "-m", "jobs.two_phase", *arguments,
    ]  # fmt: skip
    return subprocess.run(
        [str(part) for part in command],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_submitting_the_demo_to_three_nodes(ray_session, three_nodes, demo_trainrun, tmp_path):
    address, environment = three_nodes.address, three_nodes.environment
    working_dir = tmp_path / "jobs_dir"
    for part in ("cuvis_dist", "jobs"):
        shutil.copytree(
            ROOT / part, working_dir / part, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(demo_trainrun.parent / "pipeline.yaml", working_dir)
    run = yaml.safe_load(demo_trainrun.read_text())
    run["output_dir"] = str(tmp_path / "results")
    run["training"]["max_epochs"] = 1
    trainrun = working_dir / "trainrun.yaml"
    trainrun.write_text(yaml.safe_dump(run))

    done = submit(tmp_path, address, environment, "trainrun.yaml", "--train-workers", "2")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"rx_detector: 10/10 frames", done.stdout)
    result = json.loads((tmp_path / "results" / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("done", 0)
    record = json.loads(Path(result["run"]).read_text())

    initialized, expected = one_process(trainrun, tmp_path / "one")
    assert record["initialized"] == initialized, "phase 1 has the same bits on one worker"
    pipeline = Path(result["pipeline"])
    saved = CuvisPipeline.load_pipeline(pipeline, pipeline.with_suffix(".pt"))
    assert_same_state(saved, expected, 1e-5)

    stranger = {k: v for k, v in environment.items() if not k.startswith("RAY_AUTH")}
    stranger["RAY_AUTH_MODE"] = "disabled"
    refused = submit(tmp_path, address, stranger, "trainrun.yaml")
    assert refused.returncode != 0
    assert re.search("(?i)auth|401|403", refused.stdout + refused.stderr)
