"""Machines are lost, join, and lack recordings, in clusters of several nodes on loopback."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from archives import ROOT, assert_same_state
from commands import kept_files, one_process, record, train_files
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from heads import BIN, cluster
from readings import counting

from cuvis_dist import Scaling, StatisticalTrainer
from cuvis_dist.initialization.kept_pass import PASSES
from cuvis_dist.nodes.state import hash_state
from cuvis_dist.runs.trainrun import load_trainrun

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.long]


class Nodes:
    """A cluster whose nodes each note the frames that they read."""

    def __init__(self, started, folder: Path, seconds: float) -> None:
        self.cluster, self.folder, self.seconds = started, folder, seconds
        self.logs: list[Path] = []

    def join(self, **environment: str):
        log = self.folder / f"readings_{len(self.logs)}.log"
        log.touch()
        self.logs.append(log)
        return self.cluster.join(**(counting(log, seconds=self.seconds) | environment))

    def read(self, number: int, names) -> list[str]:
        """Which of the frames a node has read, in order."""
        return [name for name in self.logs[number].read_text().split() if name in set(names)]

    def readings(self, names) -> Counter:
        return Counter(name for n in range(len(self.logs)) for name in self.read(n, names))

    def command(self, *arguments: object) -> subprocess.Popen:
        """Start ``cuvis-dist`` on the cluster."""
        command = [sys.executable, "-m", "cuvis_dist.cli", *map(str, arguments)]
        address = f"127.0.0.1:{self.cluster.port + 1}"
        return subprocess.Popen(
            [*command, "--address", address],
            env=self.cluster.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


@contextlib.contextmanager
def nodes_that_note(folder: Path, seconds: float, **environments: dict[str, str]):
    with cluster(folder, 9750) as started:
        nodes = Nodes(started, folder, seconds)
        for environment in environments.values():
            nodes.join(**environment)
        started.wait()
        yield nodes


def wait_for(happened, process: subprocess.Popen, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)


def initialized_here(trainrun: Path, folder: Path) -> str:
    """What phase 1 comes to on one worker of this machine."""
    run = load_trainrun(trainrun)
    scaling = Scaling(resources={"workers": 1}, measuring={"shard_frames": 1})
    StatisticalTrainer(run.pipeline, run.datamodule(), scaling=scaling).fit()
    return hash_state(run.pipeline.nodes())


@pytest.fixture
def scaling(tmp_path) -> Path:
    path = tmp_path / "scaling.yaml"
    path.write_text("measuring: {shard_frames: 1}\nresources: {save_seconds: 0}\n")
    return path


def test_a_node_is_lost_in_the_middle_of_a_pass_and_another_joins(
    ray_session, demo_trainrun, tmp_path, scaling
):
    files, output = train_files(demo_trainrun), tmp_path / "results"
    with nodes_that_note(tmp_path, 1.5, one={}, two={}) as nodes:
        run = nodes.command("init", demo_trainrun, "--scaling", scaling, "--output-dir", output)
        wait_for(lambda: len(nodes.read(1, files)) == 2, run)
        nodes.cluster.nodes[2].kill()  # while it reads
        lost = nodes.read(1, files)
        nodes.join()
        wait_for(lambda: nodes.read(2, files), run)
        joined_in_pass_1 = not (output / PASSES / "2.state").exists()
        said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said
    assert joined_in_pass_1
    assert record(output)["initialized"] == initialized_here(demo_trainrun, tmp_path / "one")
    again = {name: n - 2 for name, n in nodes.readings(files).items() if n != 2}
    again.pop(files[0], None)  # the data module opens it when it is set up
    first, second = record(output)["passes"]
    repeated = {files[ordinal] for ordinal in first["repeated"]}
    assert lost[-1] in repeated
    assert repeated - {files[0]} == set(again), "those and no others were read again"
    assert second["repeated"] == []


def test_a_node_is_lost_in_the_middle_of_training(ray_session, demo_trainrun, tmp_path):
    output = tmp_path / "results"
    last = output / "resume" / "last.ckpt"
    with cluster(tmp_path, 9750, nodes=2) as started:
        nodes = Nodes(started, tmp_path, 0)
        run = nodes.command("run", demo_trainrun, "--output-dir", output, "--train-workers", 2)
        wait_for(last.exists, run)  # a state is kept
        started.nodes[2].kill()
        said = ""
        while "Training goes on" not in said:
            line = run.stdout.readline()
            assert line, said
            said += line
        assert run.poll() is None, "it waits for a node"
        started.join()
        said += run.stdout.read()
        run.wait(60)
    assert run.returncode == 0, said
    ended = record(output)
    initialized, expected = one_process(demo_trainrun, tmp_path / "one")
    assert ended["initialized"] == initialized
    assert ended["epochs"] == 3
    pipeline = Path(ended["pipeline"])
    saved = CuvisPipeline.load_pipeline(pipeline, pipeline.with_suffix(".pt"))
    assert_same_state(saved, expected, 1e-5)


def test_the_driver_of_a_job_is_killed_and_the_job_submitted_again(
    ray_session, demo_trainrun, tmp_path, scaling
):
    files, output = train_files(demo_trainrun), tmp_path / "results"
    path = output / PASSES / "1.state"
    with nodes_that_note(tmp_path, 0.3, one={}, two={}) as nodes:
        command = [
            BIN / "ray", "job", "submit", "--address", nodes.cluster.address, "--",
            "env", f"PYTHONPATH={ROOT}", "python", "-m", "cuvis_dist.cli", "init", demo_trainrun,
            "--scaling", scaling, "--output-dir", output,
        ]  # fmt: skip

        def submit():
            return subprocess.Popen(
                [str(part) for part in command],
                env=nodes.cluster.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )

        job = submit()
        wait_for(lambda: path.exists() and len(kept_files(path, files)) >= 4, job)
        workers = workers_of(nodes.cluster)
        assert workers
        driver_of(nodes.cluster).send_signal(signal.SIGKILL)
        said, _ = job.communicate(timeout=120)
        assert job.returncode != 0, said
        kept = kept_files(path, files)
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive, "workers of the killed driver go on reading"
        before = nodes.readings(files)

        job = submit()
        said, _ = job.communicate(timeout=300)
        assert job.returncode == 0, said
        readings = nodes.readings(files) - before
    assert f"pass 1 goes on: {len(kept)} of {len(files)} frames were read before" in said
    for name in files:
        assert readings[name] == 2 - (name in kept), name
    assert record(output)["initialized"] == initialized_here(demo_trainrun, tmp_path / "one")


def workers_of(started) -> list[psutil.Process]:
    """The processes that work for a driver, on any node of this cluster, but for Ray's own."""
    own, found = ("Agent", "Actor", "IDLE"), []
    for node in started.nodes:
        for process in psutil.Process(node.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                name = process.cmdline()[0] if process.cmdline() else ""
                if name.startswith("ray::") and not any(part in name for part in own):
                    found.append(process)
    return found


def driver_of(started) -> psutil.Process:
    """The process that a job runs in, below the head node of this cluster."""
    for process in psutil.Process(started.nodes[0].process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "cuvis_dist.cli" in process.cmdline() and "env" not in process.cmdline()[0]:
                return process
    raise AssertionError("no driver")


@pytest.mark.parametrize("lacking", ["one node", "both nodes"])
def test_a_recording_that_a_node_cannot_read(
    ray_session, demo_trainrun, tmp_path, scaling, lacking
):
    files, output = train_files(demo_trainrun), tmp_path / "results"
    absent = {"CUVIS_DIST_ABSENT": files[-1]}
    slow = {"CUVIS_DIST_READING_SECONDS": "4"}  # so that the other node reads most frames
    environments = {"one": absent, "two": absent if lacking == "both nodes" else slow}
    with nodes_that_note(tmp_path, 0.1, **environments) as nodes:
        run = nodes.command("init", demo_trainrun, "--scaling", scaling, "--output-dir", output)
        said, _ = run.communicate(timeout=300)
    if lacking == "both nodes":
        assert run.returncode == 3, said
        error = json.loads((output / "result.json").read_text())["error"]
        assert files[-1] in error
        assert "FileNotFoundError" in error
        assert "127.0.0.2" in error
        assert "127.0.0.3" in error
        return
    assert run.returncode == 0, said
    assert "another node is asked" in said
    assert files[-1] in said
    assert "(on node 127.0.0.2)" in said
    ended = record(output)
    assert ended["initialized"] == initialized_here(demo_trainrun, tmp_path / "one")
    assert len(files) - 1 in {n for done in ended["passes"] for n in done["repeated"]}
