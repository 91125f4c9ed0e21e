"""The command is killed, interrupted and typed again; it starts a Ray of its own each time."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from archives import assert_same_state, buffers_sha256
from commands import Command, kept_files, record, train_files
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from gradients import initialized, train_upstream
from stores import s3_server

from cuvis_dist.initialization.kept_pass import PASSES
from cuvis_dist.runs.lease import read_lease
from cuvis_dist.storage import OutputFolder

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.long]
#: What of ``resume`` is left when a run is done.
KEPT = ["files.json", "fingerprint.json", "initialized.state"]


def test_a_command_typed_again_goes_on(demo_trainrun, tmp_path):
    overrides = ("data.batch_size=3", "training.max_epochs=5", "training.scheduler.patience=0")
    expected = initialized(demo_trainrun, tmp_path / "one", *overrides)
    train_upstream(expected)
    frames = train_files(demo_trainrun)

    results = tmp_path / "results"
    options = [part for override in overrides for part in ("--override", override)]
    command = Command(
        tmp_path, "run", demo_trainrun, *options, "--output-dir", results,
        "--workers", 2, "--train-workers", 2, "--no-fold",
    )  # fmt: skip

    def read(readings):
        return sum(readings[name] for name in frames)

    code, said, readings = command.run(until="epoch 2/5: 10/10", number=signal.SIGKILL)
    assert code == -signal.SIGKILL, said
    assert read(readings) >= (4 + 2) * len(frames)

    code, said, readings = command.run()
    assert code == 0, said
    assert "phase 1 was finished before" in said
    assert "fitted" not in said
    assert "epoch 1/5" not in said
    # The epochs that were left, and what the data module opens when it is set up.
    assert read(readings) <= 4 * len(frames) + 10, said
    record = json.loads((results / "run.json").read_text())
    assert record["status"] == "done"
    assert len(record["passes"]) == 4
    assert record["epochs"] == 5
    pipeline = Path(record["pipeline"])
    saved = CuvisPipeline.load_pipeline(pipeline, pipeline.with_suffix(".pt"))
    assert_same_state(saved, expected.pipeline, 1e-5)
    assert sorted(path.name for path in (results / "resume").iterdir()) == KEPT


def test_it_goes_on_from_a_bucket_on_another_machine(demo_trainrun, tmp_path):
    """Every local file is removed between the attempts; the best checkpoint is the first one's."""
    best = "training.callbacks.checkpoint"
    overrides = (
        "data.batch_size=3", "training.max_epochs=5", "training.scheduler.patience=0",
        f"{best}.monitor=val_loss", f"{best}.mode=max", f"{best}.save_top_k=-1",
    )  # fmt: skip
    expected = initialized(demo_trainrun, tmp_path / "one", *overrides)
    train_upstream(expected)

    options = [part for override in overrides for part in ("--override", override)]
    local, working = tmp_path / "tmp", tmp_path / "working"
    working.mkdir()
    output = OutputFolder("s3://bucket/runs/interrupted")
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.chdir(working)
        command = Command(
            tmp_path, "run", demo_trainrun, *options, "--output-dir", output,
            "--workers", 2, "--train-workers", 2, "--no-fold",
            TMPDIR=str(local), RAY_TMPDIR="/tmp",  # paths of Ray's sockets must be short
        )  # fmt: skip
        local.mkdir()
        code, said, _ = command.run(until="epoch 3/5: 10/10", number=signal.SIGKILL)
        assert code == -signal.SIGKILL, said
        first = {Path(name).name for name in output.names("checkpoints")}
        assert first
        assert {*KEPT, "last.ckpt"} == {Path(name).name for name in output.names("resume")}
        assert list(local.glob("cuvis-dist-*/mirror-*"))
        shutil.rmtree(local)
        local.mkdir()

        lease = read_lease(output)  # a killed run cannot give it back
        time.sleep(max(0.0, lease.until - time.time()))
        code, said, _ = command.run()
        assert code == 0, said
        assert "phase 1 was finished before" in said
        assert "fitted" not in said
        assert "epoch 2/5" not in said
        assert not list(local.rglob("mirror-*")), "a mirror was left"
        assert not list(local.rglob("ray-train-*"))
        assert not list(working.iterdir()), "something was written beside the output folder"
        record = json.loads(output.read("run.json"))
        assert (record["status"], record["epochs"]) == ("done", 5)
        restored = record["checkpoint"]
        assert (restored["restored"], restored["epoch"]) == (True, 0)
        assert Path(restored["path"]).name in first
        names = output.names()
        assert output.name_of(restored["path"]) in names
        assert [n for n in names if n.startswith("resume/")] == [f"resume/{n}" for n in KEPT]
        versions = {name.split("/")[1] for name in names if name.startswith("lightning_logs/")}
        assert versions == {"version_0"}
        pipeline = output.download(output.name_of(record["pipeline"]), tmp_path / "a.yaml")
        output.download(f"trained_models/{expected.pipeline.name}_restored.pt", tmp_path / "a.pt")
        epochs = {
            Path(name).name.replace("-v1", ""): output.download(name, tmp_path / name)
            for name in output.names("checkpoints")
        }
        code, said, _ = command.run()
        assert code == 0
        assert f"its result is in {record['pipeline']}" in said
    saved = CuvisPipeline.load_pipeline(pipeline, pipeline.with_suffix(".pt"))
    assert_same_state(saved, expected.pipeline, 1e-5)
    expected_epochs = list((tmp_path / "one" / "checkpoints").iterdir())
    assert len(expected_epochs) == 5
    for path in expected_epochs:
        ours, theirs = (
            torch.load(file, weights_only=True)["state_dict"] for file in (epochs[path.name], path)
        )
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


def test_a_driver_killed_in_the_middle_of_a_pass(demo_trainrun, tmp_path):
    scaling = tmp_path / "scaling.yaml"
    scaling.write_text("resources: {workers: 2, save_seconds: 0}\nmeasuring: {shard_frames: 1}\n")

    def command(name):
        output = tmp_path / name
        arguments = ("init", demo_trainrun, "--scaling", scaling, "--output-dir", output)
        return Command(tmp_path, *arguments), output

    undisturbed, output = command("undisturbed")
    code, said, _ = undisturbed.run()
    assert code == 0, said
    expected = saved_sha256(output)

    files = train_files(demo_trainrun)
    for number in (1, 2):
        disturbed, output = command(f"disturbed_{number}")
        path = output / PASSES / f"{number}.state"
        enough = functools.partial(_has_shards, path, 4)
        code, said, _ = disturbed.run(until=enough, number=signal.SIGKILL)
        assert code == -signal.SIGKILL, said
        kept = kept_files(path, files)
        assert 4 <= len(kept) < len(files), "killed too early or too late"

        code, said, readings = disturbed.run()
        assert code == 0, said
        assert f"pass {number} goes on: {len(kept)} of {len(files)} frames were read before" in said
        passes = 3 - number
        for name in files[1:]:  # the data module opens the first one when it is set up
            assert readings[name] == passes - (name in kept), name
        assert saved_sha256(output) == expected
        restored = [p["restored_frames"] for p in record(output)["passes"]]
        assert restored == ([len(kept), 0] if number == 1 else [len(files), len(kept)])
        assert sorted(path.name for path in (output / "resume").iterdir()) == KEPT


def _has_shards(path: Path, count: int) -> bool:
    return path.exists() and len(kept_files(path, range(99))) >= count


def saved_sha256(output: Path) -> str:
    """Hash of the buffers of the pipeline that a run saved."""
    pipeline = Path(record(output)["pipeline"])
    return buffers_sha256(CuvisPipeline.load_pipeline(pipeline, pipeline.with_suffix(".pt")))
