"""The genuine SDK library: its errors end in our messages; an opt-in genuine recording is read.

``make sdk`` puts a library into ``build/sdk``. Each test runs in a process of its own, away from
the stand-in. A genuine recording is named by ``CUVIS_TEST_CU3S`` (with a full SDK by ``CUVIS``).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from archives import ROOT

pytestmark = [pytest.mark.sdk, pytest.mark.slow]


def sdk_environment():
    folder = Path(os.environ.get("CUVIS_TEST_SDK", ROOT / "build" / "sdk"))
    if not (folder / "libcuvis.so").exists():
        pytest.skip("no SDK library; `make sdk` fetches one")
    return os.environ | {
        "CUVIS": str(folder),
        "LD_LIBRARY_PATH": f"{folder / 'cuvis_il.libs'}:{folder}",
        "PYTHONPATH": "",
    }


def run(path, environment):
    return subprocess.run(
        [Path(sys.executable).with_name("cuvis-dist"), "run", path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def write_trainrun(folder, demo_trainrun, module, **params):
    content = yaml.safe_load(demo_trainrun.read_text())
    every = [{"kind": "all"}]
    content["data"] = {
        "data_module": module,
        "splits": {"train": every, "val": every, "test": every},
        "params": {**params, "sdk_cuda": False},
    }
    content["pipeline"] = str(demo_trainrun.parent / "pipeline.yaml")
    content["output_dir"] = str(folder / "results")
    content.pop("training")
    path = folder / "trainrun.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("module", ["cu3s", "cu3s_multi"])
def test_a_file_that_is_no_session_is_named(tmp_path, demo_trainrun, module):
    fake = tmp_path / "notes.cu3s"
    fake.write_text("these are notes, not a session\n")
    if module == "cu3s":
        params = {"cu3s_file_path": str(fake)}
    else:
        params = {"universe_csv": str(tmp_path / "universe.csv")}
        (tmp_path / "universe.csv").write_text("source,index\nnotes.cu3s,0\n")
    done = run(write_trainrun(tmp_path, demo_trainrun, module, **params), sdk_environment())
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert str(fake) in last
    assert "Session File format" in last
    assert "Traceback" not in done.stderr


def test_a_genuine_recording(tmp_path, demo_trainrun):
    path = os.environ.get("CUVIS_TEST_CU3S")
    if not path:
        pytest.skip("CUVIS_TEST_CU3S names no recording")
    trainrun = write_trainrun(
        tmp_path, demo_trainrun, "cu3s", cu3s_file_path=path, processing_mode="Raw"
    )
    pipeline = {
        "metadata": {"name": "Genuine"},
        "plugins": ["cuvis_ai_builtin"],
        "nodes": [
            {"name": "data", "class_name": "cuvis_ai.node.data.CU3SDataNode", "hparams": {}},
            {
                "name": "normalizer",
                "class_name": "cuvis_ai.node.normalization.MinMaxNormalizer",
                "hparams": {},
            },
        ],
        "connections": [{"source": "data.outputs.cube", "target": "normalizer.inputs.data"}],
    }
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    content = yaml.safe_load(trainrun.read_text())
    content |= {"pipeline": "pipeline.yaml", "metric_nodes": [], "loss_nodes": []}
    content["unfreeze_nodes"] = []
    trainrun.write_text(yaml.safe_dump(content))
    done = run(trainrun, os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
