"""What a trainrun names moves with its output folder; plugin manifests count once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from archives import edit

from cuvis_dist.errors import InputError
from cuvis_dist.runs.trainrun import installed_plugins_dirs, load_trainrun


@pytest.fixture
def relative(demo, monkeypatch):
    """A trainrun whose output folder is relative, as upstream's are, and repeated."""
    monkeypatch.chdir(demo.parent)
    edit(demo, lambda run: run.update(output_dir="outputs/x"))
    edit(demo, lambda run: run["training"].update(default_root_dir="./outputs/x"))
    edit(demo, lambda run: run["training"]["callbacks"]["checkpoint"].update(
        dirpath="outputs/x/kept/checkpoints"))  # fmt: skip
    return demo


def places(trainrun):
    training = trainrun.config.training
    return training.default_root_dir, training.callbacks.checkpoint.dirpath


def test_without_another_output_folder_places_stay(relative):
    assert places(load_trainrun(relative)) == ("./outputs/x", "outputs/x/kept/checkpoints")


def test_they_move_with_the_output_folder(relative, tmp_path):
    moved = str(tmp_path / "y"), str(tmp_path / "y" / "kept" / "checkpoints")
    assert places(load_trainrun(relative, output_dir=tmp_path / "y")) == moved
    assert places(load_trainrun(relative, [f"output_dir={tmp_path / 'y'}"])) == moved
    edit(
        relative,
        lambda run: run["training"].update(default_root_dir=str(Path.cwd() / "outputs/x/a")),
    )
    assert places(load_trainrun(relative, output_dir=tmp_path / "y"))[0] == f"{tmp_path}/y/a"


def test_they_move_to_a_uri(relative):
    logs, checkpoints = places(load_trainrun(relative, output_dir="s3://bucket/y"))
    assert logs is None, "logs go to the output folder by default"
    assert checkpoints == "s3://bucket/y/kept/checkpoints"


def test_what_lies_beside_the_output_folder_stays(relative, tmp_path):
    edit(relative, lambda run: run["training"].update(default_root_dir="outputs/logs"))
    assert places(load_trainrun(relative, output_dir=tmp_path / "y"))[0] == "outputs/logs"
    with pytest.raises(InputError, match=r"outputs/logs, outside of the output folder s3://b"):
        load_trainrun(relative, output_dir="s3://bucket/y")


def test_flat_yaml_is_resolved_where_something_is_overridden_as_upstream_does(relative):
    edit(relative, lambda run: run.update(output_dir="outputs/${name}"))
    assert load_trainrun(relative).config.output_dir == "outputs/${name}"
    overridden = load_trainrun(relative, ["name=z", "data.batch_size=2"])
    assert overridden.config.output_dir == "outputs/z"


@pytest.fixture
def clone(demo):
    """A trainrun with the manifests of all plugins beside it, as in a clone of upstream's."""
    configs = demo.parent / "configs"
    shutil.copytree(installed_plugins_dirs()[0], configs / "plugins")
    return demo


def test_a_manifest_found_twice_counts_once(clone, tmp_path):
    assert len(load_trainrun(clone).datamodule().train_ds) == 10
    shutil.copytree(clone.parent / "configs" / "plugins", tmp_path / "more")
    assert len(load_trainrun(clone, plugins_dirs=[tmp_path / "more"]).datamodule().train_ds) == 10
    installed = installed_plugins_dirs()
    assert len(load_trainrun(clone, plugins_dirs=installed).datamodule().train_ds) == 10


def test_the_trainruns_own_manifest_wins_over_the_installed_one(clone, tmp_path):
    own = clone.parent / "configs" / "plugins" / "cuvis_ai_dataloader.yaml"
    edit(own, lambda manifest: manifest.update(capabilities=manifest["capabilities"][:1]))
    with pytest.raises(InputError, match="npz_multi"):  # which the own one no longer has
        load_trainrun(clone).datamodule()
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(installed_plugins_dirs()[0] / own.name, other)
    with pytest.raises(InputError, match=f"cuvis_ai_dataloader is declared by .*{other}"):
        load_trainrun(clone, plugins_dirs=[other]).datamodule()
