"""What of an earlier run counts as the same? No Ray, no frame read."""

from __future__ import annotations

import yaml
from settings import scaling_of

from cuvis_dist.runs.resume import Resume, fingerprint
from cuvis_dist.runs.trainrun import load_trainrun

STATE = {"nodes": {}, "passes": [], "skipped_frames": {"a": "b"}, "findings": []}


def parts(path, *overrides, **scaling):
    run = load_trainrun(path, overrides)
    return fingerprint(run.config, run.pipeline, run.datamodule(), scaling_of(**scaling))


def changed(before, after):
    return {name for name in before | after if before.get(name) != after.get(name)}


def test_what_changes_a_result_is_seen_and_nothing_else(demo):
    before = parts(demo)
    assert parts(demo) == before
    assert parts(demo, workers=7, train_workers=3, address="auto") == before
    assert parts(demo, "output_dir=elsewhere", "tags.who=me") == before
    assert changed(before, parts(demo, "training.optimizer.lr=0.1")) == {"trainrun"}
    assert changed(before, parts(demo, shard_frames=2)) == {"measuring"}
    assert changed(before, parts(demo, fold=False)) == {"measuring"}

    pipeline = demo.parent / "pipeline.yaml"
    content = yaml.safe_load(pipeline.read_text())
    content["nodes"][2]["hparams"]["n_select"] = 3
    pipeline.write_text(yaml.safe_dump(content))
    assert changed(before, parts(demo)) == {"pipeline"}


def test_other_frames_are_seen(demo):
    universe = demo.parent / "archive" / "universe.csv"
    every = ("data.splits.test=[{kind: all}]", f"data.params.universe_csv={universe}")
    before = parts(demo, *every)
    lines = universe.read_text().splitlines()
    universe.write_text("\n".join(lines[:-1]) + "\n")
    assert "frames of test" in changed(before, parts(demo, *every))
    assert "trainrun" not in changed(before, parts(demo, *every))


def test_another_run_starts_anew_and_says_why(tmp_path, warnings):
    run = Resume(tmp_path, {"trainrun": "a", "pipeline": "b"})
    run.begin()
    run.save_initialized(**STATE)
    same = Resume(tmp_path, {"trainrun": "a", "pipeline": "b"})
    assert same.load_initialized() == STATE
    assert same.finished() is None
    assert warnings == []
    other = Resume(tmp_path, {"trainrun": "a", "pipeline": "c"})
    assert other.load_initialized() is None
    assert warnings[0] == (f"starting anew: an earlier run in {tmp_path} had another pipeline")


def test_a_restart_forgets(tmp_path):
    run = Resume(tmp_path, {"trainrun": "a"})
    run.begin()
    run.save_initialized(**STATE)
    assert Resume(tmp_path, {"trainrun": "a"}, restart=True).load_initialized() is None


def test_a_damaged_state_is_not_used(tmp_path):
    run = Resume(tmp_path, {"trainrun": "a"})
    run.begin()
    (run.folder / "initialized.state").write_bytes(b"half")
    assert run.load_initialized() is None
    (run.folder / "fingerprint.json").write_text("{")
    assert Resume(tmp_path, {"trainrun": "a"}).load_initialized() is None
