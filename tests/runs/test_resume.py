"""What of an earlier run counts as the same? No Ray, no frame read."""

from __future__ import annotations

import json
import os
from functools import partial

import pytest
import yaml
from settings import scaling_of

from cuvis_dist.archive import Contents
from cuvis_dist.archive.contents import Stamp
from cuvis_dist.runs.dependences import PHASE_1, RESULT, STEPS, TRAINING, Dependences, depends_on
from cuvis_dist.runs.resume import INITIALIZED, Resume
from cuvis_dist.runs.trainrun import load_trainrun
from cuvis_dist.training.checkpoint import LAST

STATE = {
    "nodes": {},
    "begun": "x",
    "unfitted": {},
    "passes": [],
    "skipped_frames": {"a": "b"},
    "left_out": {"c": "d"},
    "findings": [],
}


def depends_on_of(path, *overrides, module=None, **scaling):
    run = load_trainrun(path, overrides)
    return depends_on(run, module or run.datamodule(), scaling_of(**scaling))


def changed(before, after):
    """By step, what differs: the names of things, and of files."""
    differ = {}
    for step in STEPS:
        old, new = before.parts[step], after.parts[step]
        names = {name for name in old | new if old.get(name) != new.get(name)}
        files = after.files[step].changed_since(before.files[step])
        differ[step] = names | {os.path.basename(name) for name in files}
    return [differ[step] for step in STEPS]


def test_each_step_sees_what_changes_it_and_nothing_else(demo):
    module = load_trainrun(demo).datamodule()  # to make one takes most of the time
    of = partial(depends_on_of, module=module)
    before = depends_on_of(demo)
    assert of(demo) == before
    assert of(demo, workers=7, train_workers=3, address="auto", verify=False) == before
    assert of(demo, "output_dir=elsewhere", "tags.who=me", "name=x") == before
    for name, value in (
        ("training.callbacks.checkpoint.monitor", "val_loss"),
        ("training.seed", "7"),  # no node of the demo begins with random weights, or draws any
        ("unfreeze_nodes", "[selector]"),
    ):
        part = ".".join(name.split(".")[:2])
        assert changed(before, of(demo, f"{name}={value}")) == [set(), {part}, set()]
    assert changed(before, depends_on_of(demo, "data.batch_size=3")) == [
        set(),
        {"data.batch_size"},
        set(),
    ]
    assert changed(before, of(demo, shard_frames=2)) == [{"measuring"}, set(), set()]
    assert changed(before, of(demo, fold=False)) == [{"measuring"}, set(), set()]

    pipeline = demo.parent / "pipeline.yaml"
    content = yaml.safe_load(pipeline.read_text())
    content["nodes"][6]["hparams"]["weight"] = 3.0  # of the loss
    pipeline.write_text(yaml.safe_dump(content))
    behind = of(demo)
    assert changed(before, behind) == [set(), {"pipeline"}, set()]
    content["nodes"][2]["hparams"]["n_select"] = 3
    pipeline.write_text(yaml.safe_dump(content))
    part = "pipeline up to its statistical nodes"
    assert changed(behind, of(demo)) == [{part}, {"pipeline"}, set()]


def test_a_seed_counts_where_a_node_is_fitted_by_its_own_code(demo):
    pipeline = demo.parent / "pipeline.yaml"
    content = yaml.safe_load(pipeline.read_text())
    content["nodes"].append(
        {"name": "own", "class_name": "cuvis_ai.node.channel_selector.SupervisedCIRSelector",
         "hparams": {"num_spectral_bands": 12}}
    )  # fmt: skip
    content["connections"] += [
        {"source": f"data.outputs.{port}", "target": f"own.inputs.{port}"}
        for port in ("cube", "wavelengths", "mask")
    ]
    pipeline.write_text(yaml.safe_dump(content))
    before = depends_on_of(demo)
    expected = [{"training.seed"}, {"training.seed"}, set()]
    assert changed(before, depends_on_of(demo, "training.seed=7")) == expected


def test_other_frames_are_seen(demo):
    universe = demo.parent / "archive" / "universe.csv"
    every = ("data.splits.test=[{kind: all}]", f"data.params.universe_csv={universe}")
    before = depends_on_of(demo, *every)
    lines = universe.read_text().splitlines()
    universe.write_text("\n".join(lines[:-1]) + "\n")
    phase_1, training, result = changed(before, depends_on_of(demo, *every))
    assert (phase_1, training) == (set(), set())
    assert "list of test frames" in result


@pytest.mark.parametrize(
    ("split", "steps"),
    [("train", [PHASE_1, TRAINING]), ("val", [TRAINING]), ("test", [RESULT])],
)
def test_other_contents_are_seen(demo, split, steps):
    before = depends_on_of(demo)
    frame = load_trainrun(demo).config.data.splits.model_dump()[split][0]
    name = f"{frame['source'].removesuffix('.cu3s')}_{frame['ids'][0]:03d}.npz"
    path = demo.parent / "archive" / name
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert changed(before, depends_on_of(demo)) == [
        {name} if step in steps else set() for step in STEPS
    ]


# ---- the folder ------------------------------------------------------------------------


def dependences(phase_1="a", training="b", result="c", job="run", **sizes):
    files = {step: Contents({}) for step in STEPS}
    for name, size in sizes.items():
        files[PHASE_1] = Contents({name: Stamp(size, 1)})
    return Dependences(
        {
            PHASE_1: {"measuring": phase_1},
            TRAINING: {"training.optimizer": training, "job": job},
            RESULT: {"list of test frames": result},
        },
        files,
    )


@pytest.fixture
def left(tmp_path):
    """What a run left that was interrupted while it trained."""
    run = Resume(tmp_path, dependences(cube=10))
    run.begin()
    run.save_initialized(**STATE)
    run.output.write(LAST, b"last")
    return run


def open_again(left, *args, **changes):
    run = Resume(left.output.location, dependences(**{"cube": 10} | changes), *args)
    kept = run.output.exists(INITIALIZED), run.output.exists(LAST)
    assert run.load_initialized() == (STATE if kept[0] else None)
    return kept


def test_the_same_run_goes_on(left, warnings):
    assert open_again(left) == (True, True)
    assert warnings == []
    assert Resume(left.output.location, dependences(cube=10)).finished() is None


@pytest.mark.parametrize(
    ("change", "kept", "said"),
    [
        ({"phase_1": "x"}, (0, 0), "starting anew: an earlier run in {} had another measuring"),
        ({"training": "x"}, (1, 0), "phase 1 of it is used, the rest is done anew: an earlier run "
            "in {} had another training.optimizer"),
        ({"result": "x"}, (1, 1), "phase 1 and the training of it is used, the rest is done "
            "anew: an earlier run in {} had another list of test frames"),
        ({"cube": 12}, (0, 0), "starting anew: cube has changed (its size was 10 bytes and is 12)"),
    ],
)  # fmt: skip
def test_another_run_keeps_what_it_can_and_says_why(left, warnings, change, kept, said):
    assert open_again(left, **change) == kept
    assert warnings == [said.format(left.output)]


def test_a_restart_forgets(left):
    assert open_again(left, True) == (False, False)


def test_phase_1_is_there_for_a_run_that_trains_otherwise(left, said):
    left.finish()
    assert left.output.names("resume") == [
        f"resume/{name}" for name in ("files.json", "fingerprint.json", "initialized.state")
    ]
    alone = dependences(job="train")
    alone = Dependences(alone.parts | {PHASE_1: {}}, alone.files)
    run = Resume(left.output.location, alone)  # leaves phase 1 out
    run.begin()
    assert open_again(left) == (True, False)
    assert all("another job" in line for line in said)


@pytest.mark.parametrize("content", ["{", "[1]", "7", '"text"', "null", '{"phase 1": 3}', "{}"])
def test_a_damaged_or_foreign_fingerprint_starts_anew(left, warnings, content):
    (left.folder / "fingerprint.json").write_text(content)
    assert open_again(left) == (False, False)
    (line,) = warnings
    assert line.endswith("fingerprint.json does not say of which run it is")


@pytest.mark.parametrize("content", [b"half", b"", json.dumps(STATE).encode()])
def test_a_damaged_state_is_not_used(left, warnings, content):
    left.output.write(INITIALIZED, content)
    assert left.load_initialized() is None
    assert "initialized.state is not used: it is damaged" in warnings[-1]


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"phase 1": {"cube": 3}}', b'{"phase 1": 1}'])
def test_without_knowing_its_files_nothing_is_used(left, warnings, content):
    left.output.write("resume/files.json", content)
    assert open_again(left) == (False, False)
    assert warnings == ["starting anew: cube has changed (it was not read before)"]
