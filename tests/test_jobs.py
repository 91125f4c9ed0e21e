"""``ray job submit`` against a real head node on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from archives import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
BIN = Path(sys.executable).parent


@pytest.fixture
def head(tmp_path):
    """A head node with token authentication and a dashboard; yields its job address."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    token.chmod(0o600)
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TMPDIR": "/tmp/cuvis-dist-jobs",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # a job's python is the cluster's
    }
    Path(environment["RAY_TMPDIR"]).mkdir(exist_ok=True)
    command = [
        BIN / "ray", "start", "--head", "--block", "--port=9479", "--dashboard-port=9465",
        "--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", "--num-cpus=3",
        "--object-store-memory=200000000", "--ray-client-server-port=9466",
        "--dashboard-agent-listen-port=9467", "--metrics-export-port=9468",
    ]  # fmt: skip
    with open(tmp_path / "head.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [str(part) for part in command],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a process group of its own, to end as one
        )
        try:
            yield "http://127.0.0.1:9465", environment
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what did not listen
            process.wait()


def submit(address, environment, *arguments, attempts=1):
    """Submit from a clone-like working directory and follow the job to its end."""
    command = [
        BIN / "ray", "job", "submit", "--address", address, "--working-dir", "jobs_dir", "--",
        "python", "-m", "jobs.two_phase", *arguments,
    ]  # fmt: skip
    for attempt in range(attempts):
        done = subprocess.run(
            [str(part) for part in command],
            env=environment,
            cwd=environment["JOB_CWD"],
            capture_output=True,
            text=True,
            timeout=400,
        )
        unreachable = "Failed to connect" in done.stdout + done.stderr
        if not unreachable or attempt == attempts - 1:
            return done
        time.sleep(2)
    raise AssertionError


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
    environment["JOB_CWD"] = str(tmp_path)

    done = submit(address, environment, "trainrun.yaml", "--train-workers", "2", attempts=20)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"rx_detector: 10/10 frames", done.stdout)
    record = json.loads((tmp_path / "results" / "run.json").read_text())
    assert record["status"] == "done"
    assert Path(record["pipeline"]).is_file()

    failed = submit(address, environment, "nowhere.yaml")
    assert failed.returncode != 0
    assert "trainrun not found" in failed.stdout

    stranger = {k: v for k, v in environment.items() if not k.startswith("RAY_AUTH")}
    refused = submit(address, stranger | {"RAY_AUTH_MODE": "disabled"}, "trainrun.yaml")
    assert refused.returncode != 0
    assert re.search("(?i)auth|401|403", refused.stdout + refused.stderr)
