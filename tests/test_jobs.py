"""``ray job submit`` against a real head node on loopback."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from archives import ROOT
from heads import BIN, head_node

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture
def head(tmp_path):
    """A head node's job address, and the environment of who may use it."""
    with head_node(tmp_path, 9465) as (address, environment):
        yield address, environment


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


def test_submitting_the_demo(head, demo_trainrun, tmp_path):
    address, environment = head
    working_dir = tmp_path / "jobs_dir"
    for part in ("cuvis_dist", "jobs"):
        shutil.copytree(
            ROOT / part, working_dir / part, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(demo_trainrun.parent / "pipeline.yaml", working_dir)
    run = yaml.safe_load(demo_trainrun.read_text())
    run["output_dir"] = str(tmp_path / "results")
    run["training"]["max_epochs"] = 1
    (working_dir / "trainrun.yaml").write_text(yaml.safe_dump(run))

    done = submit(tmp_path, address, environment, "trainrun.yaml", "--train-workers", "2")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"rx_detector: 10/10 frames", done.stdout)
    record = json.loads((tmp_path / "results" / "run.json").read_text())
    assert record["status"] == "done"
    assert Path(record["pipeline"]).is_file()

    failed = submit(tmp_path, address, environment, "nowhere.yaml")
    assert failed.returncode != 0
    assert "trainrun not found" in failed.stdout

    stranger = {k: v for k, v in environment.items() if not k.startswith("RAY_AUTH")}
    stranger["RAY_AUTH_MODE"] = "disabled"
    refused = submit(tmp_path, address, stranger, "trainrun.yaml")
    assert refused.returncode != 0
    assert re.search("(?i)auth|401|403", refused.stdout + refused.stderr)
