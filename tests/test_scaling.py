"""Settings: their three parts, what is refused with which word of help, and who wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from cuvis_dist.cli import _parser, main
from cuvis_dist.commands.options import scaling_of
from cuvis_dist.errors import InputError
from cuvis_dist.scaling import Scaling


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "scaling.yaml"
        path.write_text(text)
        return path

    return write


def typed(*options: str) -> Scaling:
    """Return the settings of a command with these options."""
    return scaling_of(_parser().parse_args(["run", "trainrun.yaml", *options]))


def test_each_layer_wins_over_the_one_before(write):
    path = write("resources: {workers: 1, train_workers: 1}\nmeasuring: {pixels: finite}\nreading:")
    options = ["--scaling", str(path), "--set", "resources.workers=2"]
    scaling = typed(*options)
    assert (scaling.resources.workers, scaling.resources.train_workers) == (2, 1)
    assert scaling.measuring.pixels == "finite"
    assert typed(*options, "--workers", "3").resources.workers == 3
    assert typed("--workers", "3", *options).resources.workers == 3, "a short option wins"
    assert typed(*options, "--set", "resources.workers=null").resources.workers is None


def test_values_of_set_are_yaml(tmp_path):
    scaling = typed(
        "--set", "measuring.sample_frames=10",
        "--set", "measuring.sample_fraction=0.5",
        "--set", "measuring.fold=no",
        "--set", "reading.cache=memory",
        "--set", "reading.cache_bytes=4_000",
        "--set", f"reading.stage_dir={tmp_path}",
        "--set", "resources.address=null",
        "--set", "resources.cpus_per_worker=2",
    )  # fmt: skip
    assert (scaling.measuring.sample_frames, scaling.measuring.sample_fraction) == (10, 0.5)
    assert scaling.measuring.fold is False
    assert (scaling.reading.cache, scaling.reading.cache_bytes) == ("memory", 4000)
    assert scaling.reading.stage_dir == tmp_path
    assert scaling.resources.address is None
    assert scaling.resources.cpus_per_worker == 2


@pytest.mark.parametrize("address", ["auto", "1:2", "null", "10.0.0.1:6379", "ray://h:1", "12"])
def test_short_options_are_values_and_no_yaml(address):
    assert typed("--address", address).resources.address == address


def test_every_short_option_reaches_its_setting():
    scaling = typed(
        "--address", "auto", "--workers", "4", "--train-workers", "3", "--train-gpus", "0.5",
        "--no-fold",
    )  # fmt: skip
    assert scaling == Scaling(
        resources={"address": "auto", "workers": 4, "train_workers": 3, "train_gpus": 0.5},
        measuring={"fold": False},
    )
    assert typed() == Scaling()
    assert typed("--fold") == Scaling()


@pytest.mark.parametrize("command", ["evaluate", "score", "train"])
def test_commands_that_carry_out_no_phase_1_do_not_offer_its_folding(command, capsys):
    data = [] if command == "train" else ["--data", "trainrun.yaml"]
    with pytest.raises(SystemExit) as ended:
        _parser().parse_args([command, "file.yaml", *data, "--no-fold"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --no-fold" in capsys.readouterr().err


def test_as_many_training_workers_as_there_must_be():
    least = "resources.min_train_workers=3"
    assert typed("--set", least, "--train-workers", "3").resources.least_train_workers == 3
    assert typed("--set", least, "--train-workers", "0").resources.least_train_workers == 0
    with pytest.raises(InputError, match="training has 2 workers"):
        typed("--set", least, "--train-workers", "2")


REFUSED = {
    "flat, as settings once were": ("workers: 2", "workers", "called resources.workers"),
    "a typo": ("resources: {worker: 2}", "resources.worker", "did you mean resources.workers?"),
    "a typo at the top": ("pixel: all", "pixel", "did you mean measuring.pixels?"),
    "a typo in a part": ("reeding: {cache: memory}", "reeding", "did you mean reading?"),
    "in the wrong part": (
        "resources: {pixels: all}", "resources.pixels", "called measuring.pixels",
    ),
    "the trainrun's": ("output_dir: here", "output_dir", "belongs to the trainrun"),
    "the trainrun's, in a part": (
        "resources: {output_dir: x}", "resources.output_dir", "--output-dir",
    ),
    "like nothing": ("resources: {xyzzy: 1}", "resources.xyzzy", "measuring.shard_frames"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_setting_is_refused_with_what_is_meant(case, write):
    text, name, meant = REFUSED[case]
    path = write(text)
    with pytest.raises(InputError) as refused:
        Scaling.load(path)
    message = str(refused.value)
    assert f"scaling file {path}: {name} is " in message
    assert meant in message


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("workers=2", ["--set workers=2", "called resources.workers"]),
        ("resources.pixels=all", ["resources.pixels is unknown", "called measuring.pixels"]),
        ("measuring.pixles=all", ["did you mean measuring.pixels?"]),
        ("resources.worker.count=2", ["resources.worker.count is unknown"]),
        ("resources.workers", ["part.name=value"]),
        ("resources=4", ["part.name=value"]),
        ("=4", ["--set =4"]),
        ("resources.workers=[", ["--set resources.workers=["]),
        ("resources.workers=many", ["resources.workers is 'many'"]),
        ("reading.cache=tape", ["reading.cache is 'tape'", "'disk'"]),
        ("measuring.sample_fraction=2", ["--set measuring.sample_fraction=2"]),
        ("output_dir=x", ["output_dir", "--output-dir"]),
        ("resources.workers=1000000000", ["resources.workers is 1000000000", "equal to 100000"]),
        ("measuring.gpus=.inf", ["measuring.gpus is inf"]),
        ("resources.train_gpus=.nan", ["resources.train_gpus is nan"]),
        ("resources.cpus_per_worker=.inf", ["resources.cpus_per_worker is inf"]),
        (
            "resources.min_train_workers=3",
            ["--set resources.min_train_workers=3: resources.min_train_workers is 3: training has"],
        ),
    ],
)
def test_a_bad_set_is_bad_input_and_named(setting, words, capsys):
    """Before anything that takes long is loaded: the trainrun is not looked at."""
    assert main(["run", "none.yaml", "--set", setting]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("cuvis-dist: ")
    for word in words:
        assert word in message


def test_a_bad_value_names_where_it_stands(write):
    path = write("resources: {workers: -1}\nmeasuring: {pixels: few}")
    with pytest.raises(InputError) as refused:
        Scaling.load(path, ["reading.read_ahead=-1"], {"resources.train_workers": -2})
    message = str(refused.value)
    assert f"scaling file {path}: resources.workers is -1" in message
    assert f"scaling file {path}: measuring.pixels is 'few'" in message
    assert "--set reading.read_ahead=-1: reading.read_ahead is -1" in message
    assert "; resources.train_workers is -2" in message


@pytest.mark.parametrize(
    "text", ["- workers", "fast", "resources: 4", "{", "\0", "reading:\nreading:"]
)
def test_a_file_that_is_no_mapping(text, write):
    path = write(text)
    with pytest.raises(InputError, match=str(path)):
        Scaling.load(path)


def test_an_empty_file_is_the_defaults(write):
    assert Scaling.load(write("")) == Scaling.load(write("reading:\n")) == Scaling()
