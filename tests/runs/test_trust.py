"""What lies in a results folder is not trusted: it can be wrong, foreign or made to do harm."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from archives import buffers_sha256, edit
from cuvis_ai_core.training.post_fit import TrainHook
from planted import pickles
from settings import scaling_of

from cuvis_dist import StatisticalTrainer
from cuvis_dist.cli import main
from cuvis_dist.errors import DataError
from cuvis_dist.runs.trainrun import load_trainrun
from cuvis_dist.runs.two_phase import run_trainrun
from cuvis_dist.storage import OutputFolder

HERE = scaling_of(workers=0, train_workers=0)
pytestmark = pytest.mark.slow


def run(path, *overrides, emit=None, scaling=HERE):
    """Run a trainrun in this process; returns its record and the hash of its pipeline."""
    trainrun = load_trainrun(path, overrides)
    record = run_trainrun(trainrun, scaling, emit or (lambda event: None))
    return record, buffers_sha256(trainrun.pipeline)


def interrupted(path, *overrides, hook, at, scaling=HERE):
    """Run a trainrun up to Ctrl-C at the n-th event of a kind."""
    seen = []

    def emit(event):
        seen.extend([event] if event.hook is hook else [])
        if len(seen) == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(path, *overrides, emit=emit, scaling=scaling)


@pytest.fixture(scope="module")
def cut_off(demo_trainrun, tmp_path_factory):
    """Results of a run that was interrupted after two of three epochs, and of a whole one."""
    folder = tmp_path_factory.mktemp("cut_off")
    interrupted(demo_trainrun, f"output_dir={folder / 'results'}", hook=TrainHook.EPOCH_END, at=2)
    whole = run(demo_trainrun, f"output_dir={folder / 'whole'}")
    return folder / "results", whole


#: What this project wrote under other names before is planted, too.
NAMES = ("initialized.state", "initialized.pkl", "last.ckpt", "passes/1.state", "passes/1.pkl")


@pytest.mark.parametrize(
    "kind", ["pickle", pytest.param("torch", marks=pytest.mark.long), "checksum"]
)
def test_no_code_of_a_results_folder_is_run(cut_off, demo_trainrun, tmp_path, warnings, kind):
    results, (_, expected) = cut_off
    planted = tmp_path / "results"
    shutil.copytree(results, planted)
    marker = tmp_path / "marker"
    content = pickles(marker)[kind]
    for name in NAMES:
        OutputFolder(planted).write(f"resume/{name}", content)
    for path in planted.rglob("*"):
        if path.is_file() and path.name not in ("fingerprint.json", "files.json"):
            path.write_bytes(content)
    files = json.loads((planted / "resume" / "files.json").read_text())
    (planted / "resume" / "passes" / "files.json").write_text(
        json.dumps({"train": files["phase 1"]})
    )
    record, found = run(demo_trainrun, f"output_dir={planted}")
    assert not marker.exists()
    assert record.status == "done"
    assert found == expected
    said = "\n".join(warnings)
    for name in ("initialized.state", "last.ckpt", "passes/1.state"):
        assert f"{planted / 'resume' / name} is not used: it " in said


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_no_code_of_a_saved_pipeline_is_run(cut_off, demo_trainrun, tmp_path, capsys, kind):
    record = cut_off[1][0]
    marker = tmp_path / "marker"
    models = tmp_path / "results" / "trained_models"
    shutil.copytree(OutputFolder(record.output_dir).local / "trained_models", models)
    (saved,) = models.glob("*.yaml")
    for name in (saved.stem, saved.stem.replace("restored", "initialized")):
        (models / name).with_suffix(".pt").write_bytes(pickles(marker)[kind])
    options = ["--output-dir", str(tmp_path / "results")]
    data = ["--data", str(demo_trainrun)]
    for command in (
        ["train", str(demo_trainrun), *options],
        ["evaluate", str(saved), *data, *options],
        ["score", str(saved), *data, *options],
    ):
        assert main(command) == 2
        assert "cannot be loaded: it holds more than tensors" in capsys.readouterr().err
    assert not marker.exists()


# ---- contents --------------------------------------------------------------------------


def frame_file(path, split, number=0):
    """The file of one of the first frames of a split."""
    selector = load_trainrun(path).config.data.splits.model_dump()[split][0]
    name = f"{selector['source'].removesuffix('.cu3s')}_{selector['ids'][number]:03d}.npz"
    return path.parent / "archive" / name


def overwrite(file, quietly=False):
    """Write other values into a file; quietly, with its old size and time of change."""
    before = file.stat()
    with np.load(file) as archive:
        arrays = dict(archive)
    arrays["cube"] = arrays["cube"][::-1].copy() * np.float32(2)
    np.savez(file, **arrays)
    if quietly:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (
            before.st_size,
            before.st_mtime_ns,
        )


def phase_1(path, folder, *overrides, **options):
    """Run phase 1 of a trainrun in this process; returns its record and the pipeline's hash."""
    trainrun = load_trainrun(path, [f"output_dir={folder}", *overrides]).initialization_only()
    emit = options.pop("emit", lambda event: None)
    record = run_trainrun(trainrun, scaling_of(workers=0, **options), emit)
    return record, record.initialized


def test_a_file_that_changes_between_two_tries_is_measured_again(demo, tmp_path, warnings):
    seen = []

    def interrupt(event):
        seen.extend([event] if event.hook is TrainHook.STATISTICAL_PROGRESS else [])
        if len(seen) == 3:
            raise KeyboardInterrupt

    options = {"shard_frames": 1, "save_seconds": 0}
    with pytest.raises(KeyboardInterrupt):
        phase_1(demo, tmp_path / "out", emit=interrupt, **options)
    assert (tmp_path / "out" / "resume" / "passes" / "1.state").exists()
    file = frame_file(demo, "train")
    overwrite(file)
    record, found = phase_1(demo, tmp_path / "out", **options)
    _, expected = phase_1(demo, tmp_path / "new", **options)
    assert found == expected
    assert record.passes[0].restored_frames == 0
    assert any(f"starting anew: {file} has changed (its size was" in w or
               f"starting anew: {file} has changed (it was written again)" in w
               for w in warnings)  # fmt: skip


def test_a_fit_in_python_notices_it_too(demo, tmp_path, warnings):
    def fit():
        run = load_trainrun(demo)
        trainer = StatisticalTrainer(
            run.pipeline, run.datamodule(), scaling=HERE, output_dir=tmp_path / "out"
        )
        trainer.fit(resume=True)
        return trainer.records[0].restored_frames, buffers_sha256(run.pipeline)

    frames, first = fit()
    assert (frames, fit()) == (0, (10, first))
    file = frame_file(demo, "train")
    overwrite(file)
    frames, second = fit()
    assert (frames, second == first) == (0, False)
    assert [w for w in warnings if f"all passes are measured anew: {file} has changed" in w]


def test_a_file_that_changes_while_a_pass_reads_it_ends_the_run(demo, tmp_path, monkeypatch):
    file = frame_file(demo, "train")

    def change(event):
        if event.hook is TrainHook.STATISTICAL_PROGRESS and event.progress.done == 3:
            overwrite(file)

    with pytest.raises(DataError, match=f"{file} has changed .* while pass 1 read it"):
        phase_1(demo, tmp_path / "out", emit=change, shard_frames=1, save_seconds=0)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("failed", 3)
    record, _ = phase_1(demo, tmp_path / "out", shard_frames=1)
    assert record.passes[0].restored_frames == 0


def test_checksums_notice_what_sizes_and_times_do_not(demo, tmp_path, said):
    phase_1(demo, tmp_path / "out")
    first, _ = phase_1(demo, tmp_path / "out", verify=True)
    assert any("checksums are noted for the next time" in line for line in said)
    file = frame_file(demo, "train")
    overwrite(file, quietly=True)
    assert phase_1(demo, tmp_path / "out")[0].started == first.started, "left as it is"
    record, _ = phase_1(demo, tmp_path / "out", verify=True)
    assert record.status == "done"
    assert record.passes[0].restored_frames == 0
    assert any(f"{file} has changed (its checksum is another one)" in line for line in said)


def test_a_finished_run_does_again_what_depended_on_a_file(demo, warnings):
    """A new test frame costs the evaluation and training, and not phase 1."""
    first, _ = run(demo)
    for split, kept in (("test", True), ("val", True), ("train", False)):
        del warnings[:]
        file = frame_file(demo, split)
        overwrite(file)
        record, _ = run(demo)
        assert record.started >= first.finished
        assert any(f"{file} has changed" in line for line in warnings)
        assert any("phase 1 was finished before" in line for line in warnings) == kept
        assert record.passes[0].frames == 10
    again, _ = run(demo)
    assert again.finished == record.finished


# ---- what phase 1 costs ----------------------------------------------------------------


@pytest.mark.parametrize(
    "correction",
    [
        "training.callbacks.checkpoint.monitor=val_loss",
        pytest.param("training.optimizer.lr=0.01", marks=pytest.mark.long),
        pytest.param("training.seed=7", marks=pytest.mark.long),
    ],
)
def test_a_correction_of_phase_2_keeps_phase_1(
    cut_off, demo_trainrun, tmp_path, warnings, correction
):
    shutil.copytree(cut_off[0], tmp_path / "results")
    record, found = run(demo_trainrun, f"output_dir={tmp_path / 'results'}", correction)
    whole, expected = run(demo_trainrun, f"output_dir={tmp_path / 'whole'}", correction)
    assert (record.epochs, found) == (3, expected)
    assert record.initialized == whole.initialized
    name = ".".join(correction.split(".")[:2]).partition("=")[0]
    said = f"phase 1 of it is used, the rest is done anew: an earlier run in {tmp_path / 'results'}"
    assert any(f"{said} had another {name}" in line for line in warnings)
    assert any("phase 1 was finished before" in line for line in warnings)


def test_other_settings_of_phase_1_start_anew(cut_off, demo_trainrun, tmp_path, warnings):
    shutil.copytree(cut_off[0], tmp_path / "results")
    scaling = scaling_of(workers=0, train_workers=0, shard_frames=2)
    record, _ = run(demo_trainrun, f"output_dir={tmp_path / 'results'}", scaling=scaling)
    assert record.epochs == 3
    assert any(line.startswith("starting anew: ") and "measuring" in line for line in warnings)
    assert not any("phase 1 was finished before" in line for line in warnings)


@pytest.mark.long
def test_other_random_weights_start_phase_1_anew(demo, tmp_path, warnings):
    """They are in front of a fitted node, and the seed is another one."""

    def add(pipeline):
        pipeline["nodes"] += [
            {"name": "svdd", "class_name": "cuvis_ai.node.anomaly.deep_svdd.DeepSVDDProjection",
             "hparams": {"in_channels": 12, "rep_dim": 8}},
            {"name": "pca", "class_name": "cuvis_ai.node.dimensionality_reduction.TrainablePCA",
             "hparams": {"num_channels": 8, "n_components": 3}},
        ]  # fmt: skip
        pipeline["connections"] += [
            {"source": "normalizer.outputs.normalized", "target": "svdd.inputs.data"},
            {"source": "svdd.outputs.embeddings", "target": "pca.inputs.data"},
        ]

    edit(demo.parent / "pipeline.yaml", add)
    run(demo)
    run(demo, "training.optimizer.lr=0.01")
    assert any("phase 1 was finished before" in line for line in warnings)
    del warnings[:]
    record, _ = run(demo, "training.seed=7")
    whole, _ = run(demo, "training.seed=7", f"output_dir={tmp_path / 'whole'}")
    assert record.initialized == whole.initialized
    assert any("begins with other random values, as training.seed says" in w for w in warnings)


# ---- what does not belong there --------------------------------------------------------


@pytest.mark.parametrize("name", ["run.json", "result.json", "resume/fingerprint.json", ".lock"])
def test_a_folder_in_the_place_of_a_file_is_named(demo, capsys, name):
    folder = demo.parent / "results" / name
    folder.mkdir(parents=True)
    code = main(["init", str(demo), "--workers", "0"])
    err = capsys.readouterr().err
    if name.startswith("resume"):  # what nobody can use goes
        assert code == 0
        return
    (message,) = [line for line in err.splitlines() if line.startswith("cuvis-dist: ")]
    assert code == 2
    assert name in message
    assert "a folder lies where a file belongs" in message
