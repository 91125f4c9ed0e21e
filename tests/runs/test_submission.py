"""``run --dry-run`` and ``submit``: what is asked for, and how a job's end comes back."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from heads import BIN, head_node

from cuvis_dist.cli import main
from cuvis_dist.runs.submission import Submission

NO_RAY = (
    "import sys, ray; from cuvis_dist.cli import main; code = main(sys.argv[1:]);"
    "assert not ray.is_initialized(); sys.exit(code)"
)


def write_trainrun(folder, demo_trainrun, results, change=lambda run: None):
    """Write the demo's trainrun and pipeline into a folder that holds nothing else."""
    folder.mkdir()
    shutil.copy(demo_trainrun.parent / "pipeline.yaml", folder)
    run = yaml.safe_load(demo_trainrun.read_text())
    run["output_dir"] = str(results)
    change(run)
    (folder / "trainrun.yaml").write_text(yaml.safe_dump(run))
    return folder


def test_a_dry_run_tells_plan_and_resources_and_reads_one_frame(demo):
    for path in (demo.parent / "archive").glob("recording_0[12]_*.npz"):
        path.write_bytes(b"not to be read")  # of recording_00 the data module reads its shape
    job = [demo, "--dry-run", "--workers", "5", "--train-workers", "2"]
    job += ["--train-gpus", "1"]
    for command in (["-c", NO_RAY, "run", *job], ["-m", "jobs.two_phase", *job]):
        done = subprocess.run(
            [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert "10 frames in 3 shards" in done.stdout
        assert "pass 2: reads" in done.stdout
        assert "  rx_detector: per frame: treats each frame by itself" in done.stdout
        assert "  bce: mean: is a mean over pixels" in done.stdout
        assert "phase 1  5 workers, 1 CPUs each" in done.stdout
        assert "phase 2  2 workers, 1 CPUs and 1 GPUs each; at most 3 epochs" in done.stdout
    assert not (demo.parent / "results").exists()


def test_a_dry_run_refuses_what_the_run_would(demo, capsys):
    for override, words in (
        ("training.optimizer.name=lion", "Unsupported optimizer: lion"),
        ("training.val_check_interval=99", "an epoch has 5 batches"),
        ("data.splits.val=[]", "the val split: it selects no frames"),
    ):
        assert main(["run", str(demo), "--dry-run", "--override", override]) == 2
        assert words in capsys.readouterr().err
    assert main(["run", str(demo), "--dry-run", "--plugins-dir", "none"]) == 2
    assert "--plugins-dir none is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "trainrun.yaml"], ["trainrun.yaml", "--working-dir"]),
        (["--working-dir", "{tmp}", "run", "trainrun.yaml"], ["trainrun.yaml is not in"]),
        (["--working-dir", "{tmp}/none", "run", "/t.yaml"], ["not there", "none"]),
        (["score", "p.yaml", "--data", "/t.yaml"], ["p.yaml", "--working-dir"]),
        (["evaluate", "/p.yaml", "--data", "t.yaml"], ["t.yaml", "--working-dir"]),
        (
            ["--working-dir", "{tmp}", "train", "/t.yaml", "--initialization", "p.pt"],
            ["p.pt is not"],
        ),
        (["init", "/t.yaml", "--compare", "p.json"], ["p.json", "--working-dir"]),
        (["--address", "auto", "run", "/t.yaml"], ["http://", "'auto'"]),
        (["submit", "run", "/t.yaml"], ["wait for itself"]),
    ],
)
def test_what_is_not_submitted(arguments, words, tmp_path, capsys):
    assert main(["submit", *(part.format(tmp=tmp_path) for part in arguments)]) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error


def test_a_wrong_option_of_the_job_is_found_here(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["submit", "run", "/t.yaml", "--wrokers", "2"])
    assert stop.value.code == 2
    assert "--wrokers" in capsys.readouterr().err


def test_a_cluster_that_is_not_there(capsys):
    address = "http://127.0.0.1:9"
    assert main(["submit", "--address", address, "run", "/data/train run.yaml"]) == 4
    printed = capsys.readouterr()
    assert address in printed.err
    words = shlex.split(printed.out)
    assert words[:5] == ["ray", "job", "submit", "--address", address]
    assert words[-5:] == ["python", "-m", "cuvis_dist.cli", "run", "/data/train run.yaml"]


def test_the_printed_command_is_one_of_rays(tmp_path):
    from ray.dashboard.modules.job.cli import submit as ray_job_submit

    submission = Submission(["run", "trainrun.yaml"], "http://127.0.0.1:8265", tmp_path)
    words = shlex.split(submission.as_ray_command())
    assert words[:3] == ["ray", "job", "submit"]
    options = ray_job_submit.make_context("submit", words[3:]).params
    runtime_env = json.loads(options["runtime_env_json"])
    runtime_env["working_dir"] = options["working_dir"]
    assert runtime_env == submission.runtime_env
    assert shlex.join(options["entrypoint"]) == submission.entrypoint
    assert options["submission_id"] == submission.submission_id


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.long
def test_a_job_ends_submit_with_its_own_exit_code(demo_trainrun, tmp_path):
    """Done, bad input, stopped in the middle of training, and refused without the token."""
    with head_node(tmp_path, 9565) as (address, environment):

        def start(folder, command="run", **changed):
            return subprocess.Popen(
                [BIN / "cuvis-dist", "submit", "--address", address, "--working-dir", folder,
                 command, "trainrun.yaml"],
                env=environment | changed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True,
            )  # fmt: skip

        folder = write_trainrun(tmp_path / "a", demo_trainrun, tmp_path / "a", lambda run: None)
        job = start(folder, command="info")
        log, _ = job.communicate(timeout=300)
        assert job.returncode == 0, log
        assert "frames   train 10, val 6, test 6" in log

        results = tmp_path / "bad"
        missing = str(tmp_path / "universe.csv")
        folder = write_trainrun(
            tmp_path / "b",
            demo_trainrun,
            results,
            lambda run: run["data"]["params"].update(universe_csv=missing),
        )
        job = start(folder)
        log, _ = job.communicate(timeout=300)
        assert job.returncode == 2, log
        assert missing in log  # said before the job has a folder to write to

        results = tmp_path / "stopped"
        folder = write_trainrun(
            tmp_path / "c",
            demo_trainrun,
            results,
            lambda run: run["training"].update(max_epochs=10000),
        )
        job = start(folder)
        lines = []
        for line in job.stdout:
            lines.append(line)
            if "epoch 1/10000" in line:
                break
        assert not (results / "result.json").exists()
        name = re.search(r"--submission-id (\S+)", "".join(lines))[1]
        stop = [BIN / "ray", "job", "stop", "--address", address, name]
        subprocess.run(stop, env=environment, check=True, capture_output=True, timeout=120)
        log, _ = job.communicate(timeout=300)
        assert job.returncode == 130, log
        result = json.loads((results / "result.json").read_text())
        assert (result["status"], result["exit_code"]) == ("interrupted", 130)

        stranger = tmp_path / "stranger"
        stranger.write_text("0" * 64)
        for changed in (
            {"RAY_AUTH_MODE": "disabled"},
            {"RAY_AUTH_TOKEN_PATH": str(stranger)},
        ):
            job = start(folder, **changed)
            log, _ = job.communicate(timeout=300)
            assert job.returncode == 4, log
            assert "did not take the job" in log
            assert re.search("(?i)authenticat|40[13]", log)
        assert (tmp_path / "token").read_text() not in log
