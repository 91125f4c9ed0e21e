"""A saved pipeline over an archive: maps as upstream computes them, one file per frame."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from archives import ROOT
from cuvis_ai.node.normalization import PercentileNormalizer
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training import StatisticalTrainer as UpstreamStatisticalTrainer
from cuvis_ai_core.training.evaluation import evaluate_split
from cuvis_ai_schemas.enums import ExecutionStage
from labelled import Count, LabelledModule, Trail, scoring_pipeline
from readings import counting
from torch.utils.data import DataLoader, Dataset

from cuvis_dist import Scaling
from cuvis_dist.cli import main
from cuvis_dist.errors import InputError
from cuvis_dist.runs.lock import only_run
from cuvis_dist.runs.record import save_pipeline
from cuvis_dist.runs.score import Scoring
from cuvis_dist.runs.trainrun import load_trainrun
from cuvis_dist.scoring.frames import ScoreShard
from cuvis_dist.storage import OutputFolder


@pytest.fixture(scope="module")
def saved(demo_trainrun, tmp_path_factory) -> Path:
    """The demo's pipeline, fitted and saved by upstream."""
    trainrun = load_trainrun(demo_trainrun)
    UpstreamStatisticalTrainer(trainrun.pipeline, trainrun.datamodule()).fit()
    return save_pipeline(
        trainrun.pipeline, OutputFolder(tmp_path_factory.mktemp("saved")), "pipeline"
    )


@pytest.fixture
def own(demo_trainrun, tmp_path):
    """A trainrun with an archive that a test may damage."""
    shutil.copytree(demo_trainrun.parent / "archive", tmp_path / "archive")
    run = yaml.safe_load(demo_trainrun.read_text())
    run["data"]["params"]["universe_csv"] = str(tmp_path / "archive" / "universe.csv")
    run["output_dir"] = str(tmp_path / "out")
    path = tmp_path / "trainrun.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def in_one_process(saved: Path, archive: Path) -> dict[str, dict[tuple[str, str], torch.Tensor]]:
    """Forward each frame of the demo by upstream alone; outputs by uid."""
    pipeline = CuvisPipeline.load_pipeline(saved, saved.with_suffix(".pt"))
    outputs = {}
    with open(archive / "universe.csv", newline="") as table:
        for row in csv.DictReader(table):
            with np.load(archive / row["materialized_path"]) as frame:
                keys = ("cube", "mask", "wavelengths")
                batch = {key: torch.as_tensor(frame[key])[None] for key in keys}
            with torch.no_grad():
                outputs[f"{row['source']}#{row['index']}"] = pipeline.forward(batch=batch)
    return outputs


def files(folder: Path) -> dict[str, int]:
    """Times of change of all score files, by path relative to ``folder``."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*.npz")}


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


@pytest.mark.usefixtures("ray_session")
def test_files_hold_what_upstream_computes_and_are_not_written_twice(
    saved, demo_trainrun, tmp_path, capsys
):
    out = tmp_path / "out"
    command = ["score", str(saved), "--data", str(demo_trainrun), "--output-dir", str(out)]
    assert main([*command, "--workers", "2"]) == 0
    printed = capsys.readouterr()
    assert "frames   22: 22 written, 0 before" in printed.out
    assert "scored 22/22 frames" in printed.err
    expected = in_one_process(saved, demo_trainrun.parent / "archive")
    with open(out / "scores" / "frames.csv", newline="") as table:
        listed = {row["uid"]: row["file"] for row in csv.DictReader(table)}
    assert listed.keys() == expected.keys()
    assert listed["recording_01.cu3s#2"] == "recording_01/2.npz"
    for uid, file in listed.items():
        with np.load(out / "scores" / file) as maps:
            assert sorted(maps.files) == ["decider.decisions", "rx_detector.scores", "uid"]
            assert maps["uid"] == uid
            for node, port in (("rx_detector", "scores"), ("decider", "decisions")):
                theirs = expected[uid][node, port][0].numpy()
                assert maps[f"{node}.{port}"].dtype == theirs.dtype
                assert np.array_equal(maps[f"{node}.{port}"], theirs)

    before = files(out / "scores")
    assert len(before) == 22
    assert main(command) == 0
    assert "frames   22: 0 written, 22 before" in capsys.readouterr().out
    assert files(out / "scores") == before
    assert result(out) | {"job": "score", "status": "done", "exit_code": 0, "there": 22} == result(
        out
    )

    # What else is asked for is refused, or takes the place of all that was there.
    notes = out / "scores" / "notes.txt"
    notes.write_text("mine")
    other = [*command, "--outputs", "logit_head.logits", "--split", "test"]
    assert main(other) == 2
    error = capsys.readouterr().err
    assert "another frames, another outputs" in error
    assert "--restart" in error
    assert files(out / "scores") == before
    assert result(out)["exit_code"] == 2
    assert main([*other, "--restart"]) == 0
    assert len(files(out / "scores")) == 6
    with np.load(out / "scores" / "recording_00" / "6.npz") as maps:
        theirs = expected["recording_00.cu3s#6"]["logit_head", "logits"][0].numpy()
        assert np.array_equal(maps["logit_head.logits"], theirs)
    assert notes.read_text() == "mine"


@pytest.mark.usefixtures("ray_session")
def test_a_damaged_frame_is_named_and_the_rest_comes_when_it_is_repaired(saved, own, capsys):
    out, archive = own.parent / "out", own.parent / "archive"
    damaged = archive / "recording_01_003.npz"
    good = damaged.read_bytes()
    damaged.write_bytes(b"not a frame")
    command = ["score", str(saved), "--data", str(own), "--workers", "1"]
    assert main(command) == 3
    error = capsys.readouterr().err
    assert "recording_01.cu3s#3" in error
    assert str(damaged) in error
    assert "Traceback" not in error
    assert (result(out)["status"], result(out)["exit_code"]) == ("failed", 3)
    before = files(out / "scores")
    assert 0 < len(before) < 22
    assert not (out / "scores" / "frames.csv").exists()

    scaling = own.parent / "scaling.yaml"
    scaling.write_text("measuring: {on_error: skip, max_skipped: 0}\n")
    skipping = [*command, "--scaling", str(scaling)]
    assert main(skipping) == 3
    assert "more than max_skipped" in capsys.readouterr().err
    scaling.write_text("measuring: {on_error: skip}\n")
    assert main(skipping) == 0
    assert f"skipped  cannot read frame recording_01.cu3s#3 ({damaged})" in capsys.readouterr().out
    assert list(result(out)["skipped"]) == ["recording_01.cu3s#3"]
    with open(out / "scores" / "frames.csv", newline="") as table:
        listed = {row["uid"]: row["file"] for row in csv.DictReader(table)}
    assert [uid for uid, file in listed.items() if not file] == ["recording_01.cu3s#3"]
    assert len(files(out / "scores")) == 21

    damaged.write_bytes(good)
    assert main(command) == 0
    assert "frames   22: 1 written, 21 before" in capsys.readouterr().out
    after = files(out / "scores")
    assert len(after) == 22
    assert {file: after[file] for file in before} == before

    damaged.write_bytes(good)  # written again, if with the same content
    assert main(command) == 0
    said = capsys.readouterr()
    assert f"1 of the frames are scored again: {damaged} has changed (it was written" in said.err
    assert "frames   22: 1 written, 21 before" in said.out
    again = files(out / "scores")
    assert [name for name in after if again[name] != after[name]] == ["recording_01/3.npz"]

    with only_run(OutputFolder(out / "scores")):
        assert main(command) == 2
    assert "another run is writing" in capsys.readouterr().err
    assert (result(out)["status"], result(out)["written"]) == ("done", 1)

    shutil.rmtree(out / "scores" / "recording_02")
    (out / "scores" / "recording_02").write_text("where a folder belongs")
    assert main(command) == 2
    said = capsys.readouterr().err
    assert f"in {out}/scores/recording_02, a folder lies where a file belongs, or" in said
    assert result(out)["exit_code"] == 2


def over(module, pipeline, folder: Path, saved: Path, demo_trainrun):
    """A trainrun whose pipeline and data module are these."""
    trainrun = load_trainrun(demo_trainrun, output_dir=folder, saved=saved)
    trainrun = replace(trainrun, pipeline=pipeline)
    trainrun.datamodule = lambda scaling=None, fitting=True: module
    return trainrun


def reference(module, pipeline, ports) -> list[dict[str, np.ndarray]]:
    """Forward the frames of a module one after another, in this process."""
    maps = []
    for module_ in pipeline.torch_layers:
        module_.eval()
    for index in range(len(module.test_ds)):
        item = module.test_ds[index]
        batch = {key: torch.as_tensor(value)[None] for key, value in item.items()}
        with torch.no_grad():
            outputs = pipeline.forward(batch=batch)
        maps.append({".".join(port): outputs[port][0].numpy() for port in ports})
    return maps


class Listed(Dataset):
    """Frames that are named and not read."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        raise AssertionError("a plan reads no frame")


SCORES = [("score", "scores"), ("decider", "decisions")]


@pytest.mark.usefixtures("ray_session")
def test_frames_are_read_once_more_only_where_a_file_is_missing(saved, demo_trainrun, tmp_path):
    """One worker is killed while it reads; three files are lost later."""
    module = LabelledModule(tmp_path, fragile=True)
    out = tmp_path / "out"
    trainrun = over(module, scoring_pipeline(), out, saved, demo_trainrun)
    scaling = Scaling(resources={"workers": 2}, measuring={"shard_frames": 2})
    record = Scoring(trainrun, "test", scaling=scaling).run()
    assert (tmp_path / "died").exists()
    assert (record.written, record.skipped) == (12, {})
    log = tmp_path / "read.log"
    assert sorted(Counter(log.read_text().split()).values())[-2:] in ([1, 2], [2, 2])

    log.write_text("")
    expected = reference(module, scoring_pipeline(), SCORES)
    for index in range(12):
        with np.load(out / "scores" / "field" / f"{index}.npz") as maps:
            for name, value in expected[index].items():
                assert np.array_equal(maps[name], value)
    for index in (2, 3, 11):
        (out / "scores" / "field" / f"{index}.npz").unlink()
    (out / "scores" / "field" / ".4.npz.77").write_bytes(b"what a killed worker left")
    log.write_text("")
    record = Scoring(trainrun, "test", scaling=Scaling(resources={"workers": 2})).run()
    assert (record.written, record.there) == (3, 9)
    # The first one also before there are workers: it says how much room the maps need.
    assert sorted(log.read_text().split()) == ["11", "2", "2", "3"]
    assert not (out / "scores" / "field" / ".4.npz.77").exists()


def running() -> PercentileNormalizer:
    return PercentileNormalizer(5, name="normalizer", running_warmup_frames=0)


@pytest.mark.parametrize("node", [running, Trail, Count])
@pytest.mark.usefixtures("ray_session")
def test_what_changes_with_every_frame_is_computed_in_order(node, saved, demo_trainrun, tmp_path):
    """No file is written from a wrong state, also when only some are missing."""

    def pipeline():
        return scoring_pipeline(before=node())

    module, out = LabelledModule(tmp_path), tmp_path / "out"
    expected = reference(module, pipeline(), SCORES)
    last = module.test_ds[11]
    batch = {key: torch.as_tensor(value)[None] for key, value in last.items()}
    assert not np.array_equal(
        pipeline().forward(batch=batch)["score", "scores"][0], expected[11]["score.scores"]
    ), "this archive does not tell whether the order counts"

    scaling = Scaling(resources={"workers": 3}, measuring={"shard_frames": 2})
    seen = []
    for missing in (range(12), (5, 10)):
        for index in missing:
            (out / "scores" / "field" / f"{index}.npz").unlink(missing_ok=True)
        trainrun = over(module, pipeline(), out, saved, demo_trainrun)
        scoring = Scoring(trainrun, "test", scaling=scaling)
        record = scoring.run(on_frames=lambda done, total: seen.append(done))
        assert record.written == len(missing)
        for index in range(12):
            with np.load(out / "scores" / "field" / f"{index}.npz") as maps:
                for name, value in expected[index].items():
                    assert np.array_equal(maps[name], value), (index, name)
    assert seen[-1] == 12


@pytest.mark.usefixtures("ray_session")
def test_no_recording_leaves_the_output_folder(saved, own, capsys):
    """Recordings with absolute paths, ``..``, and alike but for their folder."""
    out, universe = own.parent / "out", own.parent / "archive" / "universe.csv"
    evil = ["../../../evil.cu3s", f"{own.parent}/evil.cu3s", "evil.cu3s"]
    with open(universe, newline="") as table:
        rows = list(csv.DictReader(table))
    names = dict(zip(sorted({row["source"] for row in rows}), evil, strict=True))
    with open(universe, "w", newline="") as table:
        writer = csv.DictWriter(table, rows[0])
        writer.writeheader()
        writer.writerows(row | {"source": names[row["source"]]} for row in rows)
    run = yaml.safe_load(own.read_text())
    run["data"]["splits"] = {"train": [{"kind": "all"}]}
    own.write_text(yaml.safe_dump(run))
    before = {path for path in own.parent.rglob("*") if out not in path.parents}
    assert main(["score", str(saved), "--data", str(own), "--workers", "2"]) == 0
    assert {path for path in own.parent.rglob("*") if out not in path.parents} == before | {out}
    folders = {path.name for path in (out / "scores").iterdir() if path.is_dir()}
    assert len(folders) == 3
    assert all(name.startswith("evil-") for name in folders)
    assert len(files(out / "scores")) == 22

    # A link inside the output folder is not followed, by the command or by a worker.
    target, link = own.parent / "elsewhere", out / "scores" / sorted(folders)[0]
    shutil.move(link, target)
    for path in target.iterdir():
        path.unlink()
    link.symlink_to(target)
    capsys.readouterr()
    assert main(["score", str(saved), "--data", str(own), "--workers", "2"]) == 2
    error = capsys.readouterr().err
    assert str(link) in error
    assert str(target) in error
    worker = ScoreShard(None, None, OutputFolder(out / "scores"), [])
    with pytest.raises(InputError, match="is a link"):
        worker._write(f"{link.name}/0.npz", None, {})
    assert not list(target.iterdir())


def test_what_cannot_be_scored_is_said_before_ray_starts(saved, own, tmp_path, capsys):
    def said(*options, pipeline=saved):
        assert main(["score", str(pipeline), "--data", str(own), *options]) == 2
        return capsys.readouterr().err

    for names in ("rx_detector.logits", "rx_detector", "metrics", "nowhere.scores"):
        error = said("--outputs", f"decider.decisions,{names}")
        assert names in error
        assert "rx_detector.scores" in error
        assert "decider.decisions" in error
    assert "saved pipeline not found" in said(pipeline=tmp_path / "none.yaml")
    shutil.copy(saved, tmp_path / "alone.yaml")
    assert str(tmp_path / "alone.pt") in said(pipeline=tmp_path / "alone.yaml")
    (tmp_path / "alone.pt").write_bytes(b"no weights")
    assert "cannot be loaded" in said(pipeline=tmp_path / "alone.yaml")
    other = tmp_path / "out" / "scores" / "mine.npz"
    other.parent.mkdir(parents=True, exist_ok=True)
    other.write_text("of somebody else")
    assert "does not say of which job" in said()
    assert other.read_text() == "of somebody else"


def test_dry_runs_and_a_trainrun_that_has_a_test_split_alone(saved, own, capsys):
    run = yaml.safe_load(own.read_text())
    run["data"]["splits"].pop("train")
    run["data"]["splits"].pop("val")
    run["pipeline"] = "nowhere.yaml"  # a saved one is used
    own.write_text(yaml.safe_dump(run))
    options = ["--data", str(own), "--workers", "3", "--dry-run"]
    assert main(["score", str(saved), *options]) == 0
    printed = capsys.readouterr().out
    assert "frames   22 of predict, 0 of them scored before" in printed
    assert "outputs  rx_detector.scores, decider.decisions" in printed
    assert "workers  3, 1 CPUs each" in printed
    assert main(["evaluate", str(saved), *options]) == 0
    assert "frames   6 of test" in capsys.readouterr().out
    assert not (own.parent / "out").exists()


def test_a_frame_that_is_repeated_is_scored_once_and_two_of_one_uid_are_refused(
    saved, demo_trainrun, tmp_path
):
    module = LabelledModule(tmp_path)
    trainrun = over(module, scoring_pipeline(), tmp_path / "out", saved, demo_trainrun)
    rows = module.test_ds.rows
    for row in rows:
        row["index"] //= 2
    module.test_dataloader = lambda: DataLoader(Listed(rows))
    with pytest.raises(InputError, match=r"one uid, field\.cu3s#0: frames/0\.npz and frames/1"):
        Scoring(trainrun, "test").plan()
    for row in rows:
        row["materialized_path"] = f"frames/{row['index']}.npz"
    assert Scoring(trainrun, "test").plan().files == [f"field/{i}.npz" for i in range(6)]


@pytest.mark.usefixtures("ray_session")
def test_evaluate_reports_upstreams_metrics(saved, own, capsys):
    out = own.parent / "out"
    for split in ("test", "val"):
        options = ["--split", split] if split == "val" else []
        assert main(["evaluate", str(saved), "--data", str(own), "--workers", "2", *options]) == 0
        printed = capsys.readouterr().out
        theirs = load_trainrun(own, saved=saved)
        module = theirs.datamodule()
        module.setup("test")
        expected = evaluate_split(
            theirs.pipeline,
            getattr(module, f"{split}_dataloader")(),
            stage=ExecutionStage(split),
            metric_nodes=theirs.metric_nodes,
        )
        content = result(out)
        assert content["metrics"][split] == pytest.approx(expected.metrics, abs=1e-6)
        assert (content["job"], content["frames"]) == ("evaluate", 6)
        value = expected.metrics["metrics_anomaly/average_precision"]
        assert f"{split:5} metrics_anomaly/average_precision {value:.4f}" in printed

    damaged = own.parent / "archive" / "recording_01_006.npz"
    damaged.write_bytes(b"not a frame")
    assert main(["evaluate", str(saved), "--data", str(own)]) == 3
    assert str(damaged) in capsys.readouterr().err
    assert (result(out)["status"], result(out)["exit_code"]) == ("failed", 3)
    assert "metrics" not in result(out)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.long
def test_a_stopped_job_goes_on_where_it_was_in_a_bucket(saved, demo_trainrun, tmp_path):
    """``python -m jobs.score``, twice, into S3; frames that are read are counted."""
    from moto.server import ThreadedMotoServer
    from pyarrow.fs import FileSelector, S3FileSystem

    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        secrets = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        environment = os.environ | secrets | {
            "AWS_REGION": "eu-central-1",
            "AWS_ENDPOINT_URL": endpoint,
            **counting(tmp_path / "readings.log", ROOT),
        }  # fmt: skip
        store = S3FileSystem(
            access_key="test", secret_key="test", allow_bucket_creation=True,
            endpoint_override=endpoint.removeprefix("http://"), scheme="http",
        )  # fmt: skip
        store.create_dir("bucket")

        def there():
            found = store.get_file_info(FileSelector("bucket", recursive=True))
            return [info.path for info in found if info.path.endswith(".npz")]

        command = [
            sys.executable, "-m", "jobs.score", saved, "--data", demo_trainrun,
            "--output-dir", "s3://bucket/run", "--workers", "1", "--scaling", tmp_path / "s.yaml",
        ]  # fmt: skip
        (tmp_path / "s.yaml").write_text("measuring: {shard_frames: 2}\n")

        def run(stop: bool):
            (tmp_path / "readings.log").write_text("")
            process = subprocess.Popen(
                [str(part) for part in command],
                env=environment,
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            while stop and len(there()) < 3 and process.poll() is None:
                time.sleep(0.05)
            if stop:
                process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=300)
            with store.open_input_file("bucket/run/result.json") as file:
                ended = json.loads(file.read())
            return process.returncode, out, err, ended

        code, _, err, ended = run(stop=True)
        assert code == 130, err
        assert "the same command goes on" in err
        assert (ended["status"], ended["exit_code"]) == ("interrupted", 130)
        finished = len(there())
        assert 3 <= finished < 22

        code, out, err, ended = run(stop=False)
        assert code == 0, err
        assert (ended["there"], ended["written"]) == (finished, 22 - finished)
        assert f"frames   22: {22 - finished} written, {finished} before" in out
        assert len(there()) == 22
        read = Counter((tmp_path / "readings.log").read_text().split())
        # The data module opens the first frame of what it serves when it is set up.
        assert sum(read.values()) <= 22 - finished + 1, read
        with store.open_input_file("bucket/run/scores/recording_02/6.npz") as file:
            maps = np.load(file)
            theirs = in_one_process(saved, demo_trainrun.parent / "archive")
            expected = theirs["recording_02.cu3s#6"]["rx_detector", "scores"][0].numpy()
            assert np.array_equal(maps["rx_detector.scores"], expected)
    finally:
        server.stop()
