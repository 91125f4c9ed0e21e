"""A run's files at a URI: a real S3 server on loopback, stopped and broken on purpose."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import resource
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from archives import assert_same_state, edit
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from gradients import initialized
from pyarrow.fs import LocalFileSystem
from stores import CREDENTIALS, s3_server

from cuvis_dist import GradientTrainer
from cuvis_dist.cli import main
from cuvis_dist.errors import ClusterError, InputError
from cuvis_dist.runs.trainrun import load_trainrun
from cuvis_dist.storage import OutputFolder, mirror_of, remote
from cuvis_dist.storage.local import LocalFolder
from cuvis_dist.storage.remote import RemoteFolder

SECRET = CREDENTIALS["AWS_SECRET_ACCESS_KEY"]


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """Address of an empty folder of a bucket: all servers of a process have the same buckets."""
    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield f"s3://bucket/{tmp_path.name}"


@pytest.fixture(autouse=True)
def own_temporary_folder(monkeypatch, tmp_path):
    """Where mirrors, and copies of what could not be stored, are made."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp" / f"cuvis-dist-{os.getuid()}"


# ---- files -----------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["local", "s3", "s3 with a query", "without atomic uploads"])
def test_files_come_back(place, tmp_path, request):
    if place == "local":
        folder = OutputFolder(tmp_path / "runs")
    elif place.startswith("without"):
        folder = OutputFolder("hdfs://name-node/runs")
        folder._connected = LocalFileSystem(), str(tmp_path / "runs")
    else:
        query = "?region=eu-central-1" if "query" in place else ""
        address = request.getfixturevalue("bucket") + "/runs/x"
        folder = OutputFolder(f"{address}/{query}")
        assert folder.at("a/b") == f"{address}/a/b{query}"
    folder.probe()
    assert folder.names() == []
    with pytest.raises(FileNotFoundError):
        folder.read("deep/er/a")
    folder.write("deep/er/a", b"1" * 100_000)
    assert folder.write("deep/er/a", b"2") == folder.at("deep/er/a")
    (tmp_path / "file").write_bytes(b"3")
    folder.upload(tmp_path / "file", "deep/b")
    assert folder.names() == ["deep/b", "deep/er/a"]
    assert folder.names("deep/er") == ["deep/er/a"]
    assert (folder.exists("deep/b"), folder.exists("deep"), folder.exists("b")) == (1, 0, 0)
    assert folder.read("deep/er/a") == b"2"
    assert folder.download("deep/b", tmp_path / "new" / "b").read_bytes() == b"3"
    assert folder.name_of(folder.at("deep/b")) == "deep/b"
    assert folder.name_of(f"{folder}y/b") is None
    folder.remove("deep/b", "nothing")
    assert folder.names() == ["deep/er/a"]
    folder.remove_folder("deep")
    folder.remove_folder("deep")
    assert folder.names() == []
    assert not list(tmp_path.rglob(".*")), "something temporary was left"


@pytest.mark.parametrize("kind", [LocalFolder, RemoteFolder])
def test_both_kinds_of_folder_do_all_that_is_promised(kind):
    promised = {name for name in vars(OutputFolder) if not name.startswith("_")} - {"location"}
    assert promised > {"write", "names", "probe"}
    assert promised <= vars(kind).keys()


def test_the_kind_of_place_decides(tmp_path):
    assert type(OutputFolder(tmp_path)) is LocalFolder
    remote_folder = OutputFolder("s3://bucket/x/")
    assert type(remote_folder) is RemoteFolder
    again = pickle.loads(pickle.dumps(remote_folder))
    assert (type(again), again.location) == (RemoteFolder, "s3://bucket/x")


def test_a_file_uri_is_a_local_folder(tmp_path):
    assert OutputFolder(f"file://{tmp_path}/x").local == tmp_path / "x"


def test_a_mirror_brings_what_changed_and_removes_what_is_gone(bucket, own_temporary_folder):
    folder = OutputFolder(f"{bucket}/runs/x")
    folder.write("other", b"not ours")
    stored: list[str] = []
    with mirror_of(folder) as mirror:
        send = folder.send
        folder.send = lambda path, name: stored.append(name) or send(path, name)
        files = {name: mirror.root / name for name in ("resume/last", "checkpoints/1", "board")}
        for path in files.values():
            path.parent.mkdir(exist_ok=True)
            path.write_text("x")
        (mirror.root / ".temporary").touch()
        mirror.push(last="resume/last")
        assert stored == ["board", "checkpoints/1", "resume/last"]
        files["checkpoints/1"].rename(mirror.root / "checkpoints/2")
        files["resume/last"].write_text("xy")
        mirror.push(last="resume/last")
        assert stored[3:] == ["checkpoints/2", "resume/last"]
        mirror.push()
        assert len(stored) == 5
        names = ["board", "checkpoints/2", "other", "resume/last"]
        assert folder.names() == names
        with mirror_of(folder) as other:
            other.pull_folder("checkpoints", "2")
            assert other.pull("resume/last").read_text() == "xy"
            assert not other.pull("nothing").exists()
            (other.root / "checkpoints" / "2").unlink()
            other.push()
        assert folder.names() == ["board", "other", "resume/last"]
        paths = {"best": str(mirror.root / "checkpoints/3"), "score": 1.0, "all": [mirror.root]}
        there = mirror.to_output(paths)
        assert there["best"] == f"{bucket}/runs/x/checkpoints/3"
        assert mirror.to_local(there) == paths
    left = own_temporary_folder / "mirror-of-a-killed-process"
    left.mkdir()
    (left / ".lock").touch()
    with mirror_of(folder) as mirror:
        assert not left.exists()
        with mirror_of(folder) as second:
            assert mirror.root.exists()
            assert second.root != mirror.root
    assert not list(own_temporary_folder.glob("mirror-*"))


def test_a_pause_of_the_store_is_waited_for(bucket, monkeypatch, warnings):
    monkeypatch.setattr(remote, "RETRY_S", (1.0, 1.0))
    folder = OutputFolder(f"{bucket}/runs/x")
    folder.write("before", b"1")
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    attempts = []
    put = folder._put

    def breaking(source, name):
        attempts.append(name)
        if len(attempts) == 1:
            raise OSError("AWS Error NETWORK_CONNECTION during PutObject operation")
        return put(source, name)

    monkeypatch.setattr(folder, "_put", breaking)
    folder.write("after", b"2" * 10)
    assert folder.read("after") == b"2" * 10
    assert len(attempts) == 2
    assert "next try in 1 s" in warnings[0]
    assert endpoint not in warnings[0]


def test_an_interrupted_upload_leaves_no_part_of_a_file(bucket, monkeypatch):
    """pyarrow would close, and so complete, what Ctrl-C interrupts."""
    monkeypatch.setattr(remote, "_CHUNK", 2**20)
    content = os.urandom(8 * 2**20)

    class Interrupting(io.BytesIO):
        def read(self, size=-1):
            if self.tell() == 2**21:
                signal.raise_signal(signal.SIGINT)
            return super().read(size)

    folder = OutputFolder(f"{bucket}/x")
    # A shell's background job ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            folder._put(Interrupting(content), "a")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not folder.exists("a") or folder.read("a") == content


def test_what_cannot_be_stored_is_kept(monkeypatch):
    """The store is gone in the middle of a run."""
    monkeypatch.setattr(remote, "RETRY_S", ())
    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        folder = OutputFolder("s3://bucket/runs/x")
        folder.write("a", b"1")
        mirror = mirror_of(folder)
        (mirror.root / "b").write_bytes(b"2")
        mirror.push()
        (mirror.root / "b").write_bytes(b"23")
    errors: list[ClusterError] = []

    def collect(action):
        with pytest.raises(ClusterError) as error:
            action()
        errors.append(error.value)

    actions = [lambda: folder.write("deep/a", b"12"), mirror.push]
    threads = [threading.Thread(target=collect, args=[action]) for action in actions]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - started < 60
    mirror.__exit__()
    messages = sorted(map(str, errors))
    kept = Path(re.search(r"What was not stored is in (\S+) on ", messages[0])[1])
    assert (kept / "b").read_bytes() == b"23"
    copy, place = re.search(r"lost: (\S+) on \S+ is what belongs at (\S+);", messages[1]).groups()
    assert Path(copy).read_bytes() == b"12"
    assert place == "s3://bucket/runs/x/deep/a"


@pytest.mark.parametrize(
    ("uri", "named"),
    [
        (f"s3://me:{SECRET}@bucket/x", "credentials"),
        (f"s3://bucket/x?region=eu&secret_key={SECRET}", "secret_key"),
        (f"s3://bucket/x?access_key={SECRET}", "access_key"),
    ],
)
def test_an_address_with_a_secret_is_refused_and_not_repeated(uri, named, demo_trainrun, capsys):
    assert main(["run", str(demo_trainrun), "--output-dir", uri, "--dry-run"]) == 2
    printed = capsys.readouterr()
    assert named in printed.err
    assert SECRET not in printed.err + printed.out
    pipeline = load_trainrun(demo_trainrun).pipeline
    with pytest.raises(InputError, match=named) as error:
        GradientTrainer(pipeline, None, [], output_dir=uri)
    assert SECRET not in str(error.value)


def test_checkpoint_folders_of_python_trainers(demo_trainrun, tmp_path, monkeypatch):
    """Below a URI; what would be on one node's disk, and lost with it, is refused."""
    monkeypatch.chdir(tmp_path)
    pipeline = load_trainrun(demo_trainrun).pipeline

    def folder_of(dirpath, output_dir="s3://bucket/x/"):
        trainer = GradientTrainer(pipeline, None, [], output_dir=output_dir)
        return trainer._checkpoint_folder(dirpath)

    assert folder_of("my/checkpoints") == "s3://bucket/x/my/checkpoints"
    assert folder_of(str(tmp_path / "checkpoints")) == "s3://bucket/x/checkpoints"
    assert folder_of("s3://bucket/x/checkpoints") == "s3://bucket/x/checkpoints"
    assert folder_of("checkpoints", "results") == str(tmp_path / "checkpoints")
    for elsewhere in ("/data/checkpoints", "../checkpoints", ".", "s3://bucket/y/checkpoints"):
        with pytest.raises(InputError, match="not below the output folder s3://bucket/x:"):
            folder_of(elsewhere)

    config = load_trainrun(demo_trainrun).config.training
    for said, folder in ((False, tmp_path / "results" / "checkpoints"), (True, tmp_path / "mine")):
        if said:
            config.callbacks.checkpoint.dirpath = "mine"
        trainer = GradientTrainer(pipeline, None, [], training_config=config, output_dir="results")
        assert trainer._with_absolute_paths().callbacks.checkpoint.dirpath == str(folder)


# ---- runs ------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_session")
def test_phase_1_at_a_uri(demo, bucket, capsys):
    """The same result as in a local folder; typed again it is left, unless it is to be run anew."""
    command = ["init", str(demo), "--workers", "2"]
    assert main(command) == 0
    local = demo.parent / "results" / "trained_models" / "Channel_Selector_initialized.yaml"
    expected = torch.load(local.with_suffix(".pt"), weights_only=False)

    folder = OutputFolder(f"{bucket}/runs/phase_1")
    folder.write("resume/of an earlier run", b"")
    command += ["--output-dir", f"{bucket}/runs/phase_1/"]
    capsys.readouterr()
    assert main(command) == 0
    out = capsys.readouterr().out
    saved = f"{bucket}/runs/phase_1/trained_models/Channel_Selector_initialized.yaml"
    assert f"pipeline {saved}\n" in out
    assert f"record   {bucket}/runs/phase_1/run.json\n" in out
    names = [
        "report.html",
        *(f"report/{part}.state" for part in ("diary", "measured", "nodes", "seen")),
        "result.json",
        "resume/files.json",
        "resume/fingerprint.json",
        "resume/initialized.state",
        "run.json",
        "trained_models/Channel_Selector_initialized.json",
        "trained_models/Channel_Selector_initialized.pt",
        "trained_models/Channel_Selector_initialized.yaml",
    ]
    assert folder.names() == names
    for name in names[-2:]:
        folder.download(name, demo.parent / Path(name).name)
    copied = demo.parent / "Channel_Selector_initialized.yaml"
    found = torch.load(copied.with_suffix(".pt"), weights_only=False)
    for key, states in expected["state_dict"].items():
        assert all(torch.equal(value, found["state_dict"][key][k]) for k, value in states.items())
    pipeline, other = (
        CuvisPipeline.load_pipeline(path, path.with_suffix(".pt")) for path in (local, copied)
    )
    assert_same_state(pipeline, other, 0)
    content = folder.read("run.json")
    for part in (SECRET, os.environ["AWS_ENDPOINT_URL"], str(demo.parent / "results")):
        assert part not in content.decode()
    record, result = json.loads(content), json.loads(folder.read("result.json"))
    assert record["pipeline"] == result["pipeline"] == saved
    assert record["output_dir"] == f"{bucket}/runs/phase_1"
    assert result["run"] == f"{bucket}/runs/phase_1/run.json"

    assert main(command) == 0
    assert f"its result is in {saved}" in capsys.readouterr().err
    assert folder.read("run.json") == content
    folder.write("resume/initialized.state", b"damaged")
    assert main([*command, "--restart"]) == 0
    again = json.loads(folder.read("run.json"))
    assert again["started"] >= record["finished"]
    assert folder.names() == names


def test_what_cannot_be_reached_is_told_before_anything_is_read(demo, bucket, capsys, monkeypatch):
    for frame in (demo.parent / "archive").glob("*.npz"):
        frame.unlink()
    assert main(["init", str(demo), "--output-dir", "s3://nobucket/x"]) == 2
    err = capsys.readouterr().err
    assert "s3://nobucket/x cannot be written to" in err
    assert "NO_SUCH_BUCKET" in err
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    started = time.monotonic()
    assert main(["init", str(demo), "--output-dir", f"{bucket}/x"]) == 4
    assert time.monotonic() - started < 60
    err = capsys.readouterr().err
    (message,) = [line for line in err.splitlines() if line.startswith("cuvis-dist: ")]
    assert message.startswith(f"cuvis-dist: {bucket}/x cannot be written to: ")
    assert "connect" in message
    assert err.splitlines()[-1] == message


@contextmanager
def largest_file(size):
    """Let no file of this process grow beyond ``size`` bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("ray_session")
def test_a_full_disk_ends_with_the_name_of_the_folder(demo, capsys):
    with largest_file(8192):  # enough for the record, not for the fitted nodes
        assert main(["init", str(demo), "--workers", "2"]) == 4
    err = capsys.readouterr().err.splitlines()[-1]
    assert f"no space is left in {demo.parent / 'results' / 'resume'} on " in err
    results = demo.parent / "results"
    assert json.loads((results / "result.json").read_text())["exit_code"] == 4
    assert [path.name for path in results.rglob(".*")] == [".lock"], "something temporary was left"


class FullDisk(pl.Callback):
    """Lets files of a training worker no longer grow from its first epoch on."""

    def on_train_epoch_start(self, trainer, pl_module):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_full_disk_in_training_names_the_folder_too(demo_trainrun, tmp_path):
    trainrun = initialized(demo_trainrun, tmp_path / "results")
    trainer = GradientTrainer(
        trainrun.pipeline,
        trainrun.datamodule(),
        trainrun.loss_nodes,
        trainrun.metric_nodes,
        training_config=trainrun.config.training.model_copy(update={"callbacks": None}),
        callbacks=[FullDisk()],
        output_dir=trainrun.output_dir,
    )
    with pytest.raises(ClusterError, match=f"no space is left in {tmp_path}/results on "):
        trainer.fit()
    assert not [path for path in (tmp_path / "results").rglob("*.ckpt*") if path.is_file()]


# ---- paths -----------------------------------------------------------------------------


def rename_pipeline(name):
    return lambda demo: edit(
        demo.parent / "pipeline.yaml", lambda content: content["metadata"].update(name=name)
    )


def link(name, target="/tmp"):
    def change(demo):
        path = demo.parent / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)

    return change


def checkpoint(**settings):
    return lambda demo: edit(
        demo, lambda run: run["training"]["callbacks"]["checkpoint"].update(settings)
    )


def training(**settings):
    return lambda demo: edit(demo, lambda run: run["training"].update(settings))


ESCAPES = {
    "pipeline named ../x": (rename_pipeline("../../x"), "'../../x'"),
    "pipeline named /tmp/x": (rename_pipeline("/tmp/x"), "'/tmp/x'"),
    "checkpoints named ../x": (checkpoint(filename="a/../../x"), "filename"),
    "checkpoints named /tmp/x": (checkpoint(filename="/tmp/x"), "'/tmp/x'"),
    "logs elsewhere": (training(default_root_dir="/tmp/logs"), "/tmp/logs"),
    "a link beside the results": (link("checkpoints"), "checkpoints is a link to /tmp"),
    "a link among them": (link("trained_models/x.pt", "/tmp/x.pt"), "x.pt is a link to"),
}


@pytest.mark.parametrize("case", ESCAPES)
def test_what_leads_out_of_the_output_folder_is_refused(case, demo):
    change, named = ESCAPES[case]
    load_trainrun(demo)
    change(demo)
    with pytest.raises(InputError, match=re.escape(named)):
        load_trainrun(demo)


def test_what_stays_in_it_is_not(demo):
    checkpoint(filename="{epoch}-{val/loss:.2f}", dirpath="/tmp/not used")(demo)
    training(default_root_dir=str(demo.parent / "results" / "logs"))(demo)
    link("checkpoints", "trained_models")(demo)
    link("here", ".")(demo)
    load_trainrun(demo)
