"""What lies in a results folder is not trusted: it can be wrong, foreign or made to do harm."""

from __future__ import annotations

import shutil

import pytest
from archives import buffers_sha256
from cuvis_ai_core.training.post_fit import TrainHook
from planted import pickles
from settings import scaling_of

from cuvis_dist.cli import main
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


@pytest.mark.parametrize("kind", ["pickle", "torch", "checksum"])
def test_no_code_of_a_results_folder_is_run(cut_off, demo_trainrun, tmp_path, warnings, kind):
    results, (_, expected) = cut_off
    planted = tmp_path / "results"
    shutil.copytree(results, planted)
    marker = tmp_path / "marker"
    content = pickles(marker)[kind]
    for name in NAMES:
        OutputFolder(planted).write(f"resume/{name}", content)
    for path in planted.rglob("*"):
        if path.is_file() and path.name != "fingerprint.json":
            path.write_bytes(content)
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
        assert "is not loaded: it holds more than tensors" in capsys.readouterr().err
    assert not marker.exists()
