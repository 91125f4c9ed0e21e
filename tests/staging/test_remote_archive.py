"""Two-phase training on two nodes from a bucket that fits neither node's cache."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from heads import BIN, cluster
from pyarrow.fs import S3FileSystem, copy_files
from settings import nested
from stores import s3_server

from cuvis_dist.staging.cache import Staging
from cuvis_dist.storage import OutputFolder

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.long]


def run(verb: str, trainrun: Path, scaling: Path, address: str, environment) -> dict:
    """Run a command to its end and return its record."""
    command = [BIN / "cuvis-dist", verb, trainrun, "--scaling", scaling, "--address", address]
    command = [str(part) for part in command]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    output = OutputFolder(yaml.safe_load(trainrun.read_text())["output_dir"])
    return json.loads(output.read("run.json"))


def saved_state(record: dict) -> dict:
    """Return the tensors of the pipeline that a run saved."""
    output = OutputFolder(record["output_dir"])
    name = output.name_of(record["pipeline"])
    return torch.load(io.BytesIO(output.read(f"{name.removesuffix('.yaml')}.pt")))


def written(demo: Path, folder: Path, name: str, universe: str, output: str = "") -> Path:
    values = yaml.safe_load(demo.read_text())
    values["data"]["params"]["universe_csv"] = universe
    values["pipeline"] = str(demo.parent / "pipeline.yaml")
    values["output_dir"] = output or str(folder / name)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_two_nodes_and_a_bucket(demo_trainrun, tmp_path, monkeypatch):
    """Archive and results remote: the same bits as with local ones, within the bound; each file
    once per node if all fits.
    """
    archive = demo_trainrun.parent / "archive"
    sizes = [path.stat().st_size for path in archive.glob("*.npz")]
    limit = 6 * max(sizes)
    head = {"CUVIS_DIST_STAGE_DIR": str(tmp_path / "head")}
    with s3_server() as store, cluster(tmp_path, 9650, **store, **head) as started:
        for node in "ab":
            started.join(cpus=2, CUVIS_DIST_STAGE_DIR=str(tmp_path / node))
            started.wait()
        monkeypatch.setenv("AWS_ENDPOINT_URL", store["AWS_ENDPOINT_URL"])
        endpoint = store["AWS_ENDPOINT_URL"].removeprefix("http://")
        bucket = S3FileSystem(
            access_key=store["AWS_ACCESS_KEY_ID"],
            secret_key=store["AWS_SECRET_ACCESS_KEY"],
            endpoint_override=endpoint,
            scheme="http",
        )
        copy_files(str(archive), "bucket/archive", destination_filesystem=bucket)
        local = written(demo_trainrun, tmp_path, "local", str(archive / "universe.csv"))
        universe = "s3://bucket/archive/universe.csv"
        remote = written(demo_trainrun, tmp_path, "remote", universe, "s3://bucket/runs/remote")
        environment = started.environment
        settings = {"workers": 3, "train_workers": 2, "shard_frames": 2, "stage_bytes": limit}
        scaling = tmp_path / "scaling.yaml"
        scaling.write_text(yaml.safe_dump(nested(**settings)))
        address = f"127.0.0.1:{started.port + 1}"
        records = [run("run", path, scaling, address, environment) for path in (local, remote)]
        assert records[1]["pipeline"].startswith("s3://bucket/runs/remote/trained_models/")
        assert_equal(*map(saved_state, records))
        assert records[0]["metrics"] == records[1]["metrics"]
        for node in "ab":
            done = Staging(tmp_path / node, limit).counters()
            files = [p for p in (tmp_path / node / "files").rglob("*") if p.is_file()]
            assert sum(path.stat().st_size for path in files) == done.bytes <= limit
            assert done.fetched > done.evicted > 0

        scaling.write_text(yaml.safe_dump(nested(**settings | {"stage_bytes": 10**9})))
        before = [Staging(tmp_path / node, limit).counters() for node in "ab"]
        once = written(demo_trainrun, tmp_path, "once", universe)
        record = run("init", once, scaling, address, environment)
        assert len(record["passes"]) == 2
        for node, earlier in zip("ab", before, strict=True):
            done = Staging(tmp_path / node, 10**9).counters()
            assert done.evicted == earlier.evicted
            assert done.fetched - earlier.fetched <= len(sizes)


def assert_equal(ours, theirs) -> None:
    if torch.is_tensor(ours):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        for pair in zip(ours, theirs, strict=True):
            assert_equal(*pair)
