"""A recording that one node cannot read is read on another, in every kind of work.

:mod:`test_lost_nodes` has the same of the command, with recordings that no node can read.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from elsewhere import results
from heads import cluster
from readings import counting

from cuvis_dist import Scaling

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
SCRIPTS = Path(__file__).parent.parent


def files_of(trainrun: Path, split: str) -> list[str]:
    """Names of the files of a split, in order."""
    splits = yaml.safe_load(trainrun.read_text())["data"]["splits"]
    return [
        f"{Path(selector['source']).stem}_{index:03d}.npz"
        for selector in splits[split]
        for index in selector["ids"]
    ]


def on_two_nodes(folder: Path, absent: Sequence[Sequence[str]], script: str, *options: str) -> dict:
    """What a script prints where each node lacks some files; it is given the address last."""
    with cluster(folder, 9540) as started:
        for number, files in enumerate(absent):
            log = folder / f"readings_{number}.log"
            log.touch()
            started.join(CUVIS_DIST_ABSENT=",".join(files), **counting(log, seconds=0))
        started.wait()
        done = subprocess.run(
            [
                sys.executable,
                str(SCRIPTS / script),
                *options,
                f"127.0.0.1:{started.port + 1}",
            ],
            env=started.environment,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_shard_comes_whole_from_another_node(tmp_path):
    """Also its rows before the one that could not be; the last node that is asked decides."""
    got = on_two_nodes(tmp_path, ["01237", "4567"], "shards.py")
    rows = [tuple(row) for row in got["rows"]]
    assert [ordinal for ordinal, *_ in rows] == [n for n in range(8) for _ in (0, 1)]
    assert [payload for _, payload, *_ in rows] == ["first", "second"] * 7 + ["first", None]
    assert [skipped for *_, skipped, _ in rows] == [[]] * 15 + [[["7", "cannot read 7"]]]
    moved = {ordinal for ordinal, *_, again in rows if again}
    assert 7 in moved
    assert got["error"].startswith("cannot read 7 (on node 127.0.0.")
    assert "127.0.0.2" in got["error"]
    assert "127.0.0.3" in got["error"]


@pytest.mark.long
def test_a_recording_that_one_node_lacks_changes_no_result(ray_session, demo_trainrun, tmp_path):
    every = {split: files_of(demo_trainrun, split) for split in ("train", "val", "test")}
    # Whoever gets a shard first: each node lacks every other file.
    names = sorted({name for files in every.values() for name in files})
    absent = names[0::2], names[1::2]
    there = on_two_nodes(tmp_path, absent, "elsewhere.py", str(demo_trainrun))
    assert there.get("error") is None
    said = "\n".join(there.pop("said"))
    for files in (every["val"], every["test"]):  # said by the driver, not by a streamed pass
        assert any(f"{name}" in line for name in files for line in said.splitlines())
    assert "(on node 127.0.0.2); another node is asked" in said
    here = results(demo_trainrun, Scaling(measuring={"shard_frames": 1}))
    for name in ("measured", "streamed"):
        assert there.pop(f"{name} repeated"), name
        assert here.pop(f"{name} repeated") == []
    assert there == here
