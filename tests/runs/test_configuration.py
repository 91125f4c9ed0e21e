"""Is what the files of a trainrun get wrong told at once, and only what upstream refuses?"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from archives import edit
from cuvis_ai_core.utils.restore import _resolve_pipeline_reference

from cuvis_dist.errors import InputError
from cuvis_dist.runs.configuration import pipeline_file, read_configuration
from cuvis_dist.runs.trainrun import load_trainrun

#: Runs commands one after another; says how each ended and which heavy packages were loaded.
COMMANDS = """
import json, sys
from cuvis_dist.cli import main
HEAVY = {"ray", "torch", "pytorch_lightning", "cuvis_ai", "cuvis_ai_core"}
for arguments in json.loads(sys.argv[1]):
    print(json.dumps([main(arguments), sorted(HEAVY & set(sys.modules))]), flush=True)
"""


def wrong_commands(demo: Path) -> dict[str, tuple[list[str], str]]:
    """Commands that cannot work, by what is wrong: arguments, and what the message has."""

    def written(name: str, text: str) -> list[str]:
        (demo.parent / name).write_text(text)
        return ["run", str(demo.parent / name)]

    def with_splits(name: str, text: str | None) -> list[str]:
        if text is not None:
            (demo.parent / f"{name}.json").write_text(text)
        return ["run", str(demo), "--override", f"data.splits.splits_path={name}.json"]

    good, pipeline = demo.read_text(), (demo.parent / "pipeline.yaml").read_text()
    written("f.yaml", pipeline.replace("hparams", "params"))
    run = ["run", str(demo)]
    return {
        "setting": ([*run, "--set", "measuring.pixel=all"], "did you mean measuring.pixels?"),
        "workers": ([*run, "--workers", str(10**9)], "resources.workers is 1000000000"),
        "no trainrun": (["run", f"{demo}.none"], "trainrun not found"),
        "no output folder": ([*run, "--output-dir", ""], "--output-dir is empty"),
        "robust": ([*run, "--robust", "0.9"], "looks into a store: name one"),
        "a folder": (["run", str(demo.parent)], f"{demo.parent} is a folder: name the file"),
        "no yaml": (written("a.yaml", "a: [1,\nb: }"), "line 2"),
        "a list": (written("b.yaml", "- 1"), "is no mapping of settings: name, "),
        "key": (
            written("c.yaml", good.replace("batch_size", "batchsize")),
            "data.batchsize is unknown; did you mean batch_size?",
        ),
        "type": (
            written("d.yaml", good.replace("max_epochs: 3", "max_epochs: many")),
            "training.max_epochs: Input should be a valid integer",
        ),
        "override": ([*run, "--override", "training.optimiser.lr=1"], "did you mean optimizer?"),
        "no pipeline": (
            written("e.yaml", good.replace("pipeline.yaml", "none.yaml")),
            "the pipeline 'none.yaml' of trainrun",
        ),
        "node": (
            written("g.yaml", good.replace("pipeline.yaml", "f.yaml")),
            "nodes.0.params is unknown; did you mean hparams?",
        ),
        "long name": (["run", "x" * 300], "File name too long"),
        "no such user": (["run", "~nobody-of-this-name/x"], "cannot be read: RuntimeError"),
        "long pipeline": (
            written("h.yaml", good.replace("pipeline.yaml", "p" * 300)),
            "the pipeline of trainrun",
        ),
        "no splits": (with_splits("i", None), f"is not there: {demo.parent / 'i.json'}"),
        "no json": (with_splits("j", "{train: x}"), "j.json is not valid: Invalid JSON"),
        "wrong splits": (
            with_splits("k", '{"trian": []}'),
            "k.json is not valid: trian is unknown; did you mean train?",
        ),
        "no initialization": (
            ["train", str(demo), "--initialization", "none.yaml"],
            "initialization not found: ",
        ),
        "no ending": (
            ["train", str(demo), "--initialization", "none"],
            "none names no initialization: it is a file that ends in .yaml, .pt or .json",
        ),
        "nothing to compare": (["init", str(demo), "--compare", "none.json"], "none.json"),
        "no saved": (["evaluate", "none.yaml", "--data", str(demo)], "saved pipeline not found: "),
    }


def test_bad_input_is_told_before_anything_heavy_is_loaded(demo):
    commands = wrong_commands(demo)
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps([args for args, _ in commands.values()])],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ends = [json.loads(line) for line in done.stdout.splitlines()]
    assert dict(zip(commands, ends, strict=True)) == {case: [2, []] for case in commands}
    said = [line for line in done.stderr.splitlines() if line.startswith("cuvis-dist: ")]
    for (_, words), line in zip(commands.values(), said, strict=True):
        assert words in line


@pytest.fixture
def composed(demo):
    """A trainrun that Hydra composes of two files."""
    configs = demo.parent / "configs"
    (configs / "trainrun").mkdir(parents=True)
    (configs / "data").mkdir()
    run = yaml.safe_load(demo.read_text())
    (configs / "data" / "small.yaml").write_text(yaml.safe_dump(run.pop("data")))
    run |= {"defaults": [{"/data@data": "small"}, "_self_"], "pipeline": "../../pipeline.yaml"}
    path = configs / "trainrun" / "composed.yaml"
    path.write_text(f"# @package _global_\n{yaml.safe_dump(run)}")
    return path


def test_hydra_composes_without_torch(composed):
    read = read_configuration(composed, ["data.batch_size=3"])
    assert read.config.data.batch_size == 3
    assert read.config.data.data_module == "npz_multi"
    spoiled = composed.read_text().replace("loss_nodes", "losses", 1)
    composed.write_text(spoiled)
    code = f"""
import sys
from cuvis_dist.runs.configuration import read_configuration
try:
    read_configuration({str(composed)!r})
except ValueError as error:
    print(error, sorted({{"ray", "torch", "cuvis_ai"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "losses is unknown; did you mean loss_nodes? []" in done.stdout, done.stderr


OUTPUTS = {
    "a file": (lambda folder: folder / "f", "f is a file: name a folder of its own"),
    "below a file": (lambda folder: folder / "f" / "x", "f is a file: name a folder of its own"),
    "nul": (lambda folder: f"{folder}/a\0b", "which no folder can be named"),
    "too long": (lambda folder: folder / ("x" * 300), "which no folder can be named"),
    "a circle of links": (lambda folder: folder / "link", "which no folder can be named"),
    "no such user": (lambda folder: "~nobody-of-this-name/x", "which no folder can be named"),
    "the root": (lambda folder: "/", "the root of the file system"),
    "the archive": (lambda folder: folder / "archive", "which holds frames of the archive"),
    "in it": (lambda folder: folder / "archive" / "r", "which holds frames of the archive"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_an_output_folder_that_cannot_be_one_is_refused(demo, case):
    place, words = OUTPUTS[case]
    folder = demo.parent
    (folder / "f").write_text("")
    (folder / "link").symlink_to("link")
    edit(demo, lambda run: run.update(output_dir=str(place(folder))))
    with pytest.raises(InputError, match=rf"^output_dir of trainrun {demo} is .*{words}"):
        read_configuration(demo)


def test_an_output_folder_beside_the_archive_is_not(demo):
    edit(demo, lambda run: run.update(output_dir=str(demo.parent)))
    assert read_configuration(demo).config.output_dir == str(demo.parent)


@pytest.mark.parametrize("params", ["cu3s_file_path", "data_dir", "files", "images_dir"])
def test_recordings_of_other_modules_are_an_archive_too(demo, tmp_path, params):
    folder = tmp_path / "recordings"
    folder.mkdir()
    (folder / "a.cu3s").touch()
    (folder / "a.tiff").touch()
    value = str(folder if params.endswith("_dir") else folder / "a.cu3s")
    module = "tiff_paired" if params == "images_dir" else "cu3s"

    def change(run):
        run.update(output_dir=str(folder / "results"))
        run["data"].update(data_module=module, params={params: value})

    edit(demo, change)
    with pytest.raises(InputError, match=f"in {folder}, which holds frames"):
        read_configuration(demo)
    if params == "data_dir":  # splits name files anywhere below it
        edit(demo, lambda run: run["data"]["params"].update(data_dir="/"))
        read_configuration(demo)


def test_a_seed_that_no_generator_takes_is_refused(demo):
    edit(demo, lambda run: run["training"].update(seed=2**32 - 1))
    read_configuration(demo)
    edit(demo, lambda run: run["training"].update(seed=2**32))
    with pytest.raises(InputError, match=r"training.seed of trainrun .* is 4294967296"):
        read_configuration(demo)


def test_a_config_group_is_not_chosen_by_an_override(demo):
    """Upstream puts its name in the place of the settings."""
    words = r"training is 'fast', and not a mapping of settings: .*training.NAME=VALUE.*`defaults`"
    with pytest.raises(InputError, match=words):
        read_configuration(demo, ["training=fast"])


def test_nodes_that_freeze_nodes_does_not_freeze_are_named(demo, warnings):
    edit(demo, lambda run: run.update(freeze_nodes=["normalizer", "rx_detector", "no such node"]))
    load_trainrun(demo)
    (said,) = (line for line in warnings if "freeze_nodes" in line)
    assert "phase 2 trains rx_detector, as" in said
    warnings.clear()
    edit(demo, lambda run: run.update(unfreeze_nodes=["selector"]))
    load_trainrun(demo)
    assert not warnings


def test_what_stands_twice_is_refused_in_every_file(demo):
    for name, key in (("trainrun.yaml", "name"), ("pipeline.yaml", "metadata")):
        path = demo.parent / name
        good = path.read_text()
        path.write_text(f"{good}\n{key}: {{name: x}}\n")
        with pytest.raises(InputError, match=rf"{name}, line \d+: {key} stands there for the sec"):
            read_configuration(demo)
        path.write_text(good)
    read_configuration(demo)


def test_a_universe_is_looked_at(demo):
    universe = demo.parent / "archive" / "universe.csv"
    good = universe.read_text()
    universe.write_text(good.replace(",", ";"))
    with pytest.raises(InputError, match=rf"{universe} has no column .* save it with commas"):
        read_configuration(demo)
    universe.unlink()
    with pytest.raises(InputError, match=f"the universe of the data is not there: {universe}"):
        read_configuration(demo)


def test_an_empty_trainrun_may_be_overridden_as_upstream_has_it(demo, tmp_path):
    empty = demo.parent / "empty.yaml"
    empty.touch()
    read = read_configuration(empty, ["name=x", "pipeline=pipeline.yaml", "data.batch_size=2"])
    assert read.config.data.batch_size == 2
    with pytest.raises(InputError, match="is no mapping of settings"):
        read_configuration(empty)


@pytest.mark.parametrize(
    "reference", ["a.yaml", "a", "sub/a", "above", "above.yml", "cwd.v1", "cwd.v1.yaml", "none"]
)
def test_a_pipeline_is_looked_for_where_upstream_does(tmp_path, monkeypatch, reference):
    base = tmp_path / "configs" / "trainrun"
    for file in ("trainrun/a.yaml", "a.yaml", "trainrun/a", "trainrun/sub/a.yaml", "above.yaml",
                 "above.yml", "../cwd/cwd.v1.yaml", "../cwd/a.yaml"):  # fmt: skip
        path = tmp_path / "configs" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path / "cwd")
    for text in (reference, str(base / reference)):
        try:
            theirs = _resolve_pipeline_reference(text, base)
        except FileNotFoundError:
            theirs = None
        ours = pipeline_file(text, base)
        assert (ours.resolve() if ours else None) == theirs


def test_nodes_that_wait_for_each_other_are_named(demo):
    def change(pipeline):
        normalizer = "cuvis_ai.node.normalization.MinMaxNormalizer"
        pipeline["nodes"].append({"name": "again", "class_name": normalizer, "hparams": {}})
        for source, target in (("normalizer", "again"), ("again", "normalizer")):
            edge = {"source": f"{source}.outputs.normalized", "target": f"{target}.inputs.data"}
            pipeline["connections"].append(edge)

    edit(demo.parent / "pipeline.yaml", change)
    with pytest.raises(InputError, match=r"wait for each other \((normalizer|again) -> \w+ -> "):
        read_configuration(demo)


def test_a_name_that_no_file_can_have_is_refused_at_once(demo):
    def rename(name):
        edit(demo.parent / "pipeline.yaml", lambda p: p["metadata"].update(name=name))

    rename("n" * 220)
    read_configuration(demo)
    rename("ä" * 111)
    with pytest.raises(InputError, match=r"has a name of 222 bytes, ä{20}\.\.\."):
        read_configuration(demo)
    rename("out/of/it")
    with pytest.raises(InputError, match=r"is named 'out/of/it': its files are saved under that"):
        read_configuration(demo)
    rename("${metadata.author}/y")  # known once the pipeline is built
    with pytest.raises(InputError, match=r"is named '/y': its files"):
        load_trainrun(demo)
