"""A trainrun as a user runs it: the command, what it leaves, and every bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import yaml
from archives import buffers_sha256, edit
from settings import scaling_of

from cuvis_dist import Scaling
from cuvis_dist.cli import main
from cuvis_dist.errors import InputError
from cuvis_dist.initialization.preview import preview
from cuvis_dist.runs.lock import only_run
from cuvis_dist.runs.trainrun import load_trainrun
from cuvis_dist.runs.two_phase import run_trainrun
from cuvis_dist.storage import OutputFolder
from cuvis_dist.training import group


def test_a_second_run_in_the_same_folder_is_kept_out(demo, capsys):
    with only_run(OutputFolder(demo.parent / "results")):
        assert main(["run", str(demo)]) == 2
    said = capsys.readouterr().err
    assert re.search(rf"another run is writing to .*results \(process {os.getpid()} on ", said)
    with only_run(OutputFolder(demo.parent / "results")):  # free again
        pass


PLAIN = """
    import sys, torch, yaml
    from pathlib import Path
    import cuvis_ai.node
    from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
    from cuvis_ai_core.utils.node_registry import NodeRegistry
    import numpy as np
    path = Path(sys.argv[1])
    pipeline = CuvisPipeline.load_pipeline(path, path.with_suffix(".pt"))
    with np.load(sys.argv[2]) as f:
        batch = {k: torch.as_tensor(f[k])[None] for k in ("cube", "mask", "wavelengths")}
    scores = pipeline.forward(batch=batch)[("rx_detector", "scores")]
    assert scores.shape == (1, 16, 20, 1) and scores.isfinite().all(), scores
    assert "ray" not in sys.modules or "cuvis_dist" not in sys.modules
    print("scored")
"""


@pytest.fixture
def started_early(monkeypatch):
    """Which groups of ranks were started beside phase 1, and how many were used."""
    started: list[group.Group] = []
    start = group.start_early

    def noted(*args):
        start(*args)
        started.extend(group._early)

    monkeypatch.setattr(group, "start_early", noted)
    return started


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_both_phases_leave_a_pipeline_that_plain_cuvis_ai_loads(demo, capsys, started_early):
    """Ray has room for both kinds of workers, so that the ranks start beside phase 1."""
    assert main(["run", str(demo), "--workers", "1", "--train-workers", "2"]) == 0
    assert len(started_early) == 1
    assert started_early[0].ranks.num_workers == 2
    assert not group._early, "training has used them"
    results = demo.parent / "results"
    saved = results / "trained_models" / "Channel_Selector_restored.yaml"
    printed = capsys.readouterr()
    assert f"pipeline {saved}" in printed.out
    assert "test  metrics_anomaly/iou" in printed.out
    assert "fitted normalizer, selector, rx_detector: 10/10 frames" in printed.err
    assert "epoch 3/3: 10/10 frames" in printed.err
    assert "INFO" not in printed.err

    script = [sys.executable, "-c", textwrap.dedent(PLAIN), saved]
    script.append(demo.parent / "archive" / "recording_00_000.npz")
    done = subprocess.run([str(s) for s in script], capture_output=True, text=True, timeout=120)
    assert "scored" in done.stdout, done.stderr

    record = json.loads((results / "run.json").read_text())
    assert record["status"] == "done"
    assert record["exit_code"] == 0
    assert [p["frames"] for p in record["passes"]] == [10] * 2
    fitted = record["passes"][0]["nodes"]["rx_detector"]
    derived = "Moments(data) derived from Moments(data.cube) through normalizer, selector"
    measured = fitted.pop("sha256")
    assert measured == record["passes"][0]["nodes"]["selector"]["sha256"], "the same moments"
    assert fitted == {"statistic": derived, "pixels": 10 * 320, "exact": False}
    assert all(p["bytes"] > 10 * 16 * 20 * 12 * 4 for p in record["passes"])
    assert record["epochs"] == 3
    assert record["nodes"]["selector"] == "per frame: treats each frame by itself"
    assert record["nodes"]["metrics_anomaly"] == "not in a training step"
    result = json.loads((results / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("done", 0)
    assert result["pipeline"] == str(saved)
    assert result["metrics"] == record["metrics"]
    assert record["checkpoint"]["restored"]
    assert record["skipped_frames"] == {}
    assert record["versions"]["ray"].startswith("2.60")
    assert set(record["metrics"]) == {"val", "test"}
    assert set(record["seconds"]) == {"start", "initialization", "training", "report"}
    assert list((results / "checkpoints").glob("*.ckpt"))
    assert [path.name for path in results.rglob(".*")] == [".lock"], "something temporary was left"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_ranks_that_started_beside_a_phase_1_that_fails_are_ended(demo, capsys, started_early):
    (demo.parent / "archive" / "recording_00_001.npz").write_bytes(b"damaged")
    assert main(["run", str(demo), "--workers", "1", "--train-workers", "2"]) == 3
    assert "recording_00_001" in capsys.readouterr().err
    assert started_early
    assert not group._early
    assert not (demo.parent / "results" / "ray_train").exists()
    for _ in range(100):
        if ray.available_resources().get("CPU") == 3:
            return
        time.sleep(0.1)
    pytest.fail("the ranks still occupy the cluster")


def test_a_run_leaves_the_configuration_of_its_caller_as_it_is(demo):
    """So that the same trainrun, run again, is known as the same run."""
    edit(demo, lambda run: run["training"].update(max_epochs=1))
    trainrun = load_trainrun(demo)
    assert trainrun.config.training.callbacks.checkpoint is not None
    before = trainrun.config.model_copy(deep=True)
    here = scaling_of(workers=0, train_workers=0)
    record = run_trainrun(trainrun, here)
    assert trainrun.config == before
    assert list((demo.parent / "results" / "checkpoints").glob("*.ckpt"))
    again = run_trainrun(load_trainrun(demo), here)
    assert again.started == record.started, "it was run again"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_statistical_trainrun_and_restore_trainrun_test(demo, capsys):
    """Phase 1 alone; then upstream's own command finds the result and tests it."""
    edit(demo, lambda run: run.pop("training"))
    assert main(["run", str(demo)]) == 0
    record = json.loads((demo.parent / "results" / "run.json").read_text())
    assert record["epochs"] == 0
    assert "training" not in record["seconds"]
    saved = Path(record["pipeline"])

    def again(*options):
        before = saved.stat().st_mtime_ns
        capsys.readouterr()
        assert main(["run", str(demo), *options]) == 0
        said = capsys.readouterr()
        assert f"pipeline {saved}" in said.out
        return saved.stat().st_mtime_ns > before, "fitted logit_head" in said.err, said.err

    ran, fitted, said = again("--workers", "3", "--train-workers", "2")
    assert not ran, "a finished run was run again"
    assert not fitted
    assert "this run is done since" in said
    assert again("--restart")[:2] == (True, True)
    ran, fitted, said = again("--override", "data.batch_size=1")
    assert ran
    assert not fitted, "phase 1 does not depend on it"
    assert "phase 1 of it is used, the rest is done anew: an earlier run" in said
    assert "had another data.batch_size" in said

    from cuvis_ai_core.utils.restore import restore_trainrun

    from cuvis_dist.runs.trainrun import installed_plugins_dirs

    restore_trainrun(demo, mode="test", plugins_dirs=installed_plugins_dirs())


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_init_runs_phase_1_alone_and_says_whether_the_fit_looks_sound(demo, capsys):
    """It trains nothing, and an earlier trained result stays; ``run`` says the same findings."""
    results = demo.parent / "results"
    trained = results / "trained_models" / "Channel_Selector_restored.pt"
    trained.parent.mkdir(parents=True)
    trained.write_text("an earlier, trained result")
    assert main(["init", str(demo), "--workers", "2"]) == 0
    printed = capsys.readouterr().out
    saved = trained.with_name("Channel_Selector_initialized.yaml")
    assert f"pipeline {saved}" in printed
    assert "test  metrics_anomaly/iou" in printed
    assert printed.splitlines()[-1] == "the fit looks sound"
    assert saved.with_suffix(".pt").is_file()
    assert trained.read_text() == "an earlier, trained result"
    record = json.loads((results / "run.json").read_text())
    assert record["findings"] == []
    assert record["epochs"] == 0
    assert set(record["seconds"]) == {"start", "initialization", "evaluation", "report"}
    assert set(record["metrics"]) == {"val", "test"}

    for path in (demo.parent / "archive").glob("*.npz"):
        with np.load(path) as content:
            arrays = dict(content)
        arrays["cube"][..., 4] = 0.25
        np.savez(path, **arrays)
    edit(demo, lambda run: run.pop("training"))
    for command in ("init", "run"):
        assert main([command, str(demo), "--restart"]) == 0
        lines = capsys.readouterr().out.splitlines()
        nanometres = arrays["wavelengths"][4]
        warning = (
            f"warning: rx_detector: constant over the train split: band 4 ({nanometres} nm); "
            "drop such bands"
        )
        assert warning in lines
        assert "the fit looks sound" not in lines
        findings = json.loads((results / "run.json").read_text())["findings"]
        assert [f"warning: {f['node']}: {f['message']}" for f in findings] == [
            line for line in lines if line.startswith("warning: ")
        ]


@pytest.mark.usefixtures("ray_session")
def test_hydra_defaults_overrides_and_splits_files(demo):
    """A composed trainrun with a pipeline by name and a splits file, overridden on the way."""
    configs = demo.parent / "configs"
    for folder in ("trainrun", "data"):
        (configs / folder).mkdir(parents=True)
    flat = yaml.safe_load(demo.read_text())
    data = flat.pop("data")
    splits = {stage: data["splits"][stage] for stage in ("train", "val", "test")}
    (configs / "trainrun" / "splits.json").write_text(json.dumps(splits))
    data["splits"] = {"splits_path": "splits.json"}
    (configs / "data" / "demo.yaml").write_text(yaml.safe_dump(data))
    flat.pop("training")
    shutil.copy(demo.parent / "pipeline.yaml", configs / "guide.yaml")
    flat["pipeline"] = "guide"
    composed = configs / "trainrun" / "demo.yaml"
    composed.write_text(
        "# @package _global_\ndefaults:\n  - /data@data: demo\n  - _self_\n" + yaml.safe_dump(flat)
    )
    trainrun = load_trainrun(composed, ["data.batch_size=5"], output_dir=demo.parent / "elsewhere")
    assert trainrun.config.data.batch_size == 5
    assert trainrun.output_dir == demo.parent / "elsewhere"
    assert len(trainrun.datamodule().train_ds) == 10


def test_info_starts_no_ray(demo):
    """Run apart, so that a Ray started by it would be seen."""
    code = (
        "import sys, ray; from cuvis_dist.cli import main; code = main(sys.argv[1:]);"
        "assert not ray.is_initialized(); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "info", str(demo)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "rx_detector      RXGlobal" in done.stdout
    assert "statistical: Moments(data); unfrozen" in done.stdout
    assert "frames   train 10, val 6, test 6" in done.stdout
    assert "bce" in done.stdout
    assert "loss" in done.stdout


def test_plan_tells_the_passes(demo, capsys):
    assert main(["plan", str(demo)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"10 frames in 3 shards, 1\d(\.\d)? kB a frame\n", out)
    assert re.search(r"pass 2: reads 1\d\d kB, ", out)
    assert "pass 3" not in out
    assert "rx_detector: Moments(data) derived from Moments(data.cube) through normalizer" in out
    assert "\n  exact: Extrema(data.cube); rounded: Moments(data.cube)\n" in out
    later = "exact where values are whole numbers below 65536: Moments(rx_detector.scores"
    assert later in out
    assert "a frame on one worker" not in out
    assert main(["plan", str(demo), "--no-fold", "--calibrate", "--workers", "3"]) == 0
    out = capsys.readouterr().out
    assert "pass 4: reads" in out
    assert out.count("a frame on one worker") == 4
    assert out.count("rounded: Moments") == 3
    assert re.search(r"about \S+ s with 3 workers", out)
    trainrun = load_trainrun(demo)
    before = buffers_sha256(trainrun.pipeline)
    tried = preview(
        trainrun.pipeline, trainrun.datamodule(), Scaling(resources={"workers": 2}), calibrate=True
    )
    assert tried.seconds > 0
    assert all(cost.worker_bytes > 3e8 for cost in tried.costs)
    assert buffers_sha256(trainrun.pipeline) == before, "a plan must not fit the pipeline"


# ---- bad input -------------------------------------------------------------------------


def corrupt(demo):
    (demo.parent / "archive" / "recording_01_001.npz").write_bytes(b"damaged")


def drop_band(demo):
    path = demo.parent / "archive" / "recording_02_000.npz"
    with np.load(path) as content:
        arrays = dict(content)
    np.savez(path, **arrays | {"cube": arrays["cube"][..., 1:]})


BAD = {
    "unknown node in unfreeze_nodes": (
        lambda demo: edit(demo, lambda run: run["unfreeze_nodes"].append("selektor")),
        2,
        ["unfreeze_nodes", "'selektor'", "selector", "trainrun.yaml"],
    ),
    "unknown metric node": (
        lambda demo: edit(demo, lambda run: run.update(metric_nodes=["iou"])),
        2,
        ["metric_nodes", "'iou'", "metrics_anomaly"],
    ),
    "training without losses": (
        lambda demo: edit(demo, lambda run: run.update(loss_nodes=[])),
        2,
        ["no loss_nodes"],
    ),
    "unknown field": (
        lambda demo: edit(demo, lambda run: run.update(epochs=3)),
        2,
        ["epochs", "trainrun.yaml"],
    ),
    "no yaml": (lambda demo: demo.write_text("{"), 2, ["trainrun.yaml", "cannot be read"]),
    "pipeline that is not there": (
        lambda demo: edit(demo, lambda run: run.update(pipeline="nowhere.yaml")),
        2,
        ["nowhere.yaml"],
    ),
    "node class that is not there": (
        lambda demo: edit(
            demo.parent / "pipeline.yaml",
            lambda p: p["nodes"][2].update(class_name="cuvis_ai.node.Nothing"),
        ),
        2,
        ["pipeline.yaml", "Nothing"],
    ),
    "data module that is not there": (
        lambda demo: edit(demo, lambda run: run["data"].update(data_module="hdf5")),
        2,
        ["hdf5"],
    ),
    "unknown data module": (
        lambda demo: edit(demo, lambda run: run["data"].update(data_module="npz")),
        2,
        ["data.data_module", "trainrun.yaml is 'npz'", "npz_multi, tiff_paired"],
    ),
    "universe that is not there": (
        lambda demo: (demo.parent / "archive" / "universe.csv").unlink(),
        2,
        ["universe.csv"],
    ),
    "empty train split": (
        lambda demo: edit(demo, lambda run: run["data"]["splits"].update(train=[])),
        2,
        ["the train split: it selects no frames", "data.splits"],
    ),
    "empty val split": (
        lambda demo: edit(demo, lambda run: run["data"]["splits"].update(val=[])),
        2,
        ["the val split: it selects no frames"],
    ),
    "monitor that nothing logs": (
        lambda demo: edit(
            demo,
            lambda run: run["training"]["callbacks"]["checkpoint"].update(monitor="metric/iou"),
        ),
        2,
        ["training.callbacks.checkpoint.monitor is 'metric/iou'", "metrics_anomaly/iou"],
    ),
    "missing recording": (
        lambda demo: (demo.parent / "archive" / "recording_01_001.npz").unlink(),
        3,
        ["recording_01.cu3s#1", "recording_01_001.npz", "No such file"],
    ),
    "corrupt npz": (corrupt, 3, ["recording_01.cu3s#1", "recording_01_001.npz"]),
    "another band count": (
        drop_band,
        3,
        ["recording_02.cu3s#0", "12 channels", "has 11", "different bands"],
    ),
}


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_an_exit_code(case, demo, capsys):
    spoil, code, words = BAD[case]
    earlier = demo.parent / "results" / "trained_models" / "Channel_Selector_restored.pt"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("an earlier, good result")
    spoil(demo)
    assert main(["run", str(demo)]) == code
    err = capsys.readouterr().err
    message = err[err.index("cuvis-dist: ") :]
    assert message.count("\n") == 1, f"not one line:\n{message}"
    assert "Traceback" not in err
    for word in words:
        assert word in message
    assert earlier.read_text() == "an earlier, good result"
    assert [p.name for p in earlier.parent.iterdir()] == [earlier.name]
    assert not (demo.parent / "results" / "resume" / "initialized.state").exists(), "phase 1 ran"
    if code == 3:
        record = json.loads((demo.parent / "results" / "run.json").read_text())
        assert record["status"] == "failed"
        assert record["exit_code"] == 3
        assert words[0] in record["error"]


def test_a_missing_trainrun(capsys, tmp_path):
    assert main(["run", str(tmp_path / "none.yaml")]) == 2
    assert f"trainrun not found: {tmp_path / 'none.yaml'}" in capsys.readouterr().err


def test_bad_scaling(capsys, tmp_path, demo_trainrun):
    scaling = tmp_path / "scaling.yaml"
    scaling.write_text("resources: {workers: 2, speed: high}\n")
    assert main(["run", str(demo_trainrun), "--scaling", str(scaling)]) == 2
    err = capsys.readouterr().err
    assert str(scaling) in err
    assert "resources.speed is unknown" in err
    assert "measuring.shard_frames" in err
    assert main(["run", str(demo_trainrun), "--workers", "-1"]) == 2
    assert "workers" in capsys.readouterr().err


def test_a_cu3s_path_without_the_sdk(tmp_path, demo_trainrun):
    """In a process of its own, where the real cuvis package finds no C library."""
    (tmp_path / "rec.cu3s").write_bytes(b"\0")
    shutil.copy(demo_trainrun.parent / "pipeline.yaml", tmp_path)
    content = yaml.safe_load(demo_trainrun.read_text())
    every = [{"kind": "all"}]
    content["data"] = {
        "data_module": "cu3s",
        "splits": {"train": every, "val": every},
        "params": {"cu3s_file_path": str(tmp_path / "rec.cu3s")},
    }
    path = tmp_path / "trainrun.yaml"
    path.write_text(yaml.safe_dump(content))
    environment = {k: v for k, v in os.environ.items() if k not in ("CUVIS", "PYTHONPATH")}
    done = subprocess.run(
        [Path(sys.executable).with_name("cuvis-dist"), "run", path],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in (str(tmp_path / "rec.cu3s"), "CUVIS", "SDK"):
        assert word in done.stderr.splitlines()[-1]


def test_loading_says_which_trainrun(tmp_path):
    with pytest.raises(InputError, match="trainrun not found"):
        load_trainrun(tmp_path / "x.yaml")
