"""Two-phase training on two nodes from a bucket that fits neither node's cache."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from heads import BIN, cluster
from pyarrow.fs import S3FileSystem, copy_files
from stores import s3_server

from cuvis_dist.archive.staging import Staging

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.long]


def run(verb: str, trainrun: Path, scaling: Path, address: str, environment) -> dict:
    """Run a command to its end and return its record."""
    command = [BIN / "cuvis-dist", verb, trainrun, "--scaling", scaling, "--address", address]
    command = [str(part) for part in command]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    output_dir = yaml.safe_load(trainrun.read_text())["output_dir"]
    return json.loads((Path(output_dir) / "run.json").read_text())


def written(demo: Path, folder: Path, name: str, universe: str) -> Path:
    values = yaml.safe_load(demo.read_text())
    values["data"]["params"]["universe_csv"] = universe
    values["pipeline"] = str(demo.parent / "pipeline.yaml")
    values["output_dir"] = str(folder / name)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_two_nodes_and_a_bucket(demo_trainrun, tmp_path):
    """The same bits as from a local archive, within the bound; once per node if all fits."""
    archive = demo_trainrun.parent / "archive"
    sizes = [path.stat().st_size for path in archive.glob("*.npz")]
    limit = 6 * max(sizes)
    head = {"CUVIS_DIST_STAGE_DIR": str(tmp_path / "head")}
    with s3_server() as store, cluster(tmp_path, 9650, **store, **head) as started:
        for node in "ab":
            started.join(cpus=2, CUVIS_DIST_STAGE_DIR=str(tmp_path / node))
            started.wait()
        endpoint = store["AWS_ENDPOINT_URL"].removeprefix("http://")
        bucket = S3FileSystem(
            access_key=store["AWS_ACCESS_KEY_ID"],
            secret_key=store["AWS_SECRET_ACCESS_KEY"],
            endpoint_override=endpoint,
            scheme="http",
        )
        copy_files(str(archive), "bucket/archive", destination_filesystem=bucket)
        local = written(demo_trainrun, tmp_path, "local", str(archive / "universe.csv"))
        remote = written(demo_trainrun, tmp_path, "remote", "s3://bucket/archive/universe.csv")
        environment = started.environment
        settings = {"workers": 3, "train_workers": 2, "shard_frames": 2, "stage_bytes": limit}
        scaling = tmp_path / "scaling.yaml"
        scaling.write_text(yaml.safe_dump(settings))
        address = f"127.0.0.1:{started.port + 1}"
        records = [run("run", path, scaling, address, environment) for path in (local, remote)]
        states = [torch.load(Path(r["pipeline"]).with_suffix(".pt")) for r in records]
        assert_equal(*states)
        assert records[0]["metrics"] == records[1]["metrics"]
        for node in "ab":
            done = Staging(tmp_path / node, limit).counters()
            files = [p for p in (tmp_path / node / "files").rglob("*") if p.is_file()]
            assert sum(path.stat().st_size for path in files) == done.bytes <= limit
            assert done.fetched > done.evicted > 0

        scaling.write_text(yaml.safe_dump(settings | {"stage_bytes": 10**9}))
        before = [Staging(tmp_path / node, limit).counters() for node in "ab"]
        once = written(demo_trainrun, tmp_path, "once", "s3://bucket/archive/universe.csv")
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
