"""Every trainrun that cuvis-ai ships: ``restore-trainrun`` and the one-word change, side by side.

They run as they are, but for their data: an npz archive with the same sources and indices takes
the place of a recording that is not public. Where upstream refuses one (a plugin that is not
installed, a field that the schema no longer has), the one-word change does so for the same reason.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import cuvis_ai
import numpy as np
import pytest
import torch
from archives import edit
from cuvis_ai_core.training.post_fit import PostFitCallback
from cuvis_ai_core.utils.restore import restore_trainrun
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cuvis_dist.cli import main
from cuvis_dist.nodes.sinks import close_sinks
from cuvis_dist.runs.trainrun import installed_plugins_dirs, load_trainrun

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.slow]

SHIPPED = Path(cuvis_ai.__file__).parent / "configs"
NAMES = sorted(path.stem for path in (SHIPPED / "trainrun").glob("*.yaml"))
#: What runs here: nodes that cuvis-ai itself has, on the data that the copy has.
RUNS = ("channel_selector", "deep_svdd", "default_statistical", "rx_statistical")
SOURCE = "data/Lentils/Lentils_000.cu3s"
KEPT = {"resume/files.json", "resume/fingerprint.json", "resume/initialized.state"}
REPORT = {f"report/{name}.state" for name in ("diary", "measured", "nodes", "seen")}
OWN = {".lock", "run.json", "result.json", "report.html", *REPORT, *KEPT}


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> Path:
    """A copy of what is shipped, with seven small frames for ``data/lentils.yaml``."""
    folder = tmp_path_factory.mktemp("shipped")
    shutil.copytree(SHIPPED, folder / "configs", ignore=shutil.ignore_patterns("plugins"))
    archive = folder / "archive"
    archive.mkdir()
    rng = np.random.default_rng(0)
    rows = [("source", "index", "materialized_path")]
    for index in range(7):
        cube = rng.uniform(100, 1000, (12, 14, 61)) * rng.normal(1, 0.2, 61)
        mask = np.zeros((12, 14), np.int32)
        mask[8:, :2] = 1  # a class that counts as normal
        mask[2:5, 3 + index % 4 : 7 + index % 4] = 2
        cube[mask == 2] *= np.linspace(0.5, 1.6, 61)
        wavelengths = 430 + 8 * np.arange(61)
        path = archive / f"frame_{index}.npz"
        np.savez(path, cube=cube.astype(np.float32), mask=mask, wavelengths=wavelengths)
        rows.append((SOURCE, str(index), path.name))
    with open(archive / "universe.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    params = {"universe_csv": str(archive / "universe.csv")}
    edit(
        folder / "configs" / "data" / "lentils.yaml",
        lambda data: data.update(data_module="npz_multi", params=params),
    )
    return folder / "configs" / "trainrun"


class Upstream:
    """A trainrun by ``restore-trainrun``, in this process and a folder of its own."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.folder, self.result = folder, None
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            run = PostFitCallback.run

            def kept(callback, pipeline, *args, **options):
                self.result = run(callback, pipeline, *args, **options)
                close_sinks(pipeline)  # it does so when the process ends
                return self.result

            patch.setattr(PostFitCallback, "run", kept)
            restore_trainrun(path, mode="train", plugins_dirs=installed_plugins_dirs())


@pytest.fixture(scope="module")
def upstream(configs, tmp_path_factory):
    """Upstream's runs, by name; each runs once."""
    runs: dict[str, Upstream] = {}

    def run(name):
        if name not in runs:
            folder = tmp_path_factory.mktemp("upstream") / name
            runs[name] = Upstream(configs / f"{name}.yaml", folder)
        return runs[name]

    return run


def files(folder: Path) -> set[str]:
    """Names of the files in a folder; TensorBoard's have times and hosts in theirs."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return {re.sub(r"events\.out\.tfevents\..*", "events", name) for name in names}


def state(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a saved pipeline or checkpoint, by name."""
    content = torch.load(path, map_location="cpu", weights_only=False)
    content = content.get("state_dict", content)
    flat: dict[str, torch.Tensor] = {}

    def walk(value, name):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}")
        elif isinstance(value, torch.Tensor):
            flat[name] = value.double()

    walk(content, "")
    return flat


def as_built(pipeline) -> dict[str, torch.Tensor]:
    """Every tensor of a pipeline, by its name in a saved pipeline and in a checkpoint."""
    tensors = {}
    for node in pipeline.nodes():
        for key, value in node.state_dict().items():
            tensors[f".{node.name}.{key}"] = value.double()
    for key, value in pipeline.torch_layers.state_dict().items():
        tensors[f".pipeline_modules.{key}"] = value.double()
    return tensors


def assert_moved_alike(ours: Path, theirs: Path, start: dict[str, torch.Tensor]) -> None:
    """Assert that states differ by at most 1e-5 of how far they moved from ``start``."""
    mine, other = state(ours), state(theirs)
    assert mine.keys() == other.keys()
    for name, value in other.items():
        begin = start[name]
        # Bounds begin as NaN or infinity, and some buffers empty.
        there = begin.shape == value.shape and begin.isfinite().all()
        moved = value - begin if there else value
        difference = float((mine[name] - value).norm())
        assert difference <= 1e-5 * float(moved.norm()), name


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What a TensorBoard folder shows, by tag, in the order of steps."""
    board = EventAccumulator(str(folder)).Reload()
    return {
        tag: sorted((event.step, event.value) for event in board.Scalars(tag))
        for tag in board.Tags()["scalars"]
    }


def cases():
    for name in RUNS:
        marks = [pytest.mark.long] if name == "deep_svdd" else []
        yield pytest.param(name, False, id=name, marks=marks)
        yield pytest.param(name, True, id=f"{name}, two workers", marks=pytest.mark.long)


@pytest.mark.parametrize(("name", "spread"), cases())
def test_the_one_word_change(name, spread, configs, upstream, tmp_path, monkeypatch):
    theirs = upstream(name)
    monkeypatch.chdir(tmp_path)
    path = configs / f"{name}.yaml"
    own = Path(load_trainrun(path).config.output_dir)
    output = tmp_path / ("elsewhere" if spread else own)
    if spread:
        options = ["--workers", "2", "--train-workers", "2", "--output-dir", str(output)]
    else:  # what is chosen without options, where no Ray of other tests is there
        options = ["--workers", "0", "--train-workers", "0"]
    assert main(["run", str(path), *options]) == 0

    # The same files: in the output folder, wherever it lies, and beside it.
    assert files(output) == files(theirs.folder / own) | OWN
    beside = {name for name in files(theirs.folder) if not name.startswith(f"{own.as_posix()}/")}
    inside = output.relative_to(tmp_path).as_posix()
    assert {n for n in files(tmp_path) if not n.startswith(f"{inside}/")} == beside

    # The same state, at the end and after the last epoch.
    start = as_built(load_trainrun(path).pipeline)
    saved = files(theirs.folder / own)
    for file in saved:
        if file.endswith(".pt") or file == "checkpoints/last.ckpt":
            assert_moved_alike(output / file, theirs.folder / own / file, start)

    # The same best epoch and metrics.
    record = json.loads((output / "run.json").read_text())
    for split, outcome in theirs.result.evaluations.items():
        assert record["metrics"][split] == pytest.approx(outcome.metrics, rel=1e-5, abs=1e-6)
    best = theirs.result.checkpoint
    if best is None:
        assert record["checkpoint"] is None
    else:
        assert record["checkpoint"]["epoch"] == best.epoch
        assert record["checkpoint"]["score"] == pytest.approx(best.score, rel=1e-5)
        assert Path(record["checkpoint"]["path"]).name == Path(best.path).name

    # The same curves, in one folder; rank 0 of several shows its part, and its validation batches.
    boards = {Path(name).parent for name in files(tmp_path) if name.endswith("events")}
    for board in boards:
        relative = own / board.relative_to(inside) if board.is_relative_to(inside) else board
        ours, expected = scalars(tmp_path / board), scalars(theirs.folder / relative)
        assert ours.keys() == expected.keys()
        for tag, points in expected.items():
            steps, expected_steps = ([step for step, _ in each] for each in (ours[tag], points))
            if spread:
                assert set(steps) == set(expected_steps), tag
            else:
                assert steps == expected_steps, tag
                values = [value for _, value in points]
                got = [value for _, value in ours[tag]]
                assert got == pytest.approx(values, rel=1e-4, abs=1e-6), tag


def substance(error: BaseException) -> list[str]:
    """What a refusal of upstream's must have in common with ours."""
    if isinstance(error, ValidationError):
        return [
            f"{item['loc'][-1]} is unknown" if item["type"] == "extra_forbidden" else item["msg"]
            for item in error.errors()
        ]
    text = str(error)
    if "empty parameter list" in text:
        return ["nothing to train"]
    return re.findall(r"No module named '[\w.]+'|Could not find '[\w./]+'", text)[:1]


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(RUNS)))
def test_what_upstream_refuses_is_refused(name, configs, tmp_path, monkeypatch, capsys):
    with pytest.raises(Exception) as refused:  # noqa: PT011
        Upstream(configs / f"{name}.yaml", tmp_path / "upstream")
    (tmp_path / "ours").mkdir()
    monkeypatch.chdir(tmp_path / "ours")
    assert main(["run", str(configs / f"{name}.yaml")]) == 2
    said = capsys.readouterr().err
    said = said[said.index("cuvis-dist: ") :]
    assert said.count("\n") == 1
    assert substance(refused.value)
    for part in substance(refused.value):
        assert part in said
    assert not list((tmp_path / "ours").rglob("*.pt"))


def test_all_are_there():
    assert len(NAMES) == 19
    assert set(RUNS) <= set(NAMES)
