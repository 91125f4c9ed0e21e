"""Does a pipeline's file, or a plugin's manifest, get nothing called but nodes and data modules?

Each planted class writes a file when it is called, and its module another when it is imported.
"""

from __future__ import annotations

import sys

import pytest
import torch
import yaml
from archives import edit

from cuvis_dist.cli import main
from cuvis_dist.errors import InputError
from cuvis_dist.runs.trainrun import load_trainrun

PLANTED = """
from pathlib import Path
from cuvis_ai_core.node import Node

Path("{folder}/imported").touch()


class NoNode:
    DATA_MODULE_NAME = "planted"

    def __init__(self, **settings):
        Path("{folder}/called").touch()


def no_class(**settings):
    Path("{folder}/called").touch()


class Own(Node):
    INPUT_SPECS, OUTPUT_SPECS = {{}}, {{}}

    def __init__(self, scale=1, **settings):
        super().__init__(scale=scale, **settings)
        self.scale = scale

    def forward(self, **_):
        return {{}}
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A folder in which planted code leaves files; the module ``planted`` can be imported."""
    (tmp_path / "planted.py").write_text(PLANTED.format(folder=tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "planted", raising=False)
    yield tmp_path
    sys.modules.pop("planted", None)


def named(pipeline: dict, class_name: str, **hparams) -> None:
    """Let the pipeline have a node of a class, whatever it is."""
    pipeline["nodes"].append({"name": "planted", "class_name": class_name, "hparams": hparams})


def called(folder) -> bool:
    return (folder / "called").exists()


@pytest.mark.parametrize(
    "class_name", ["subprocess.Popen", "os.system", "subprocess.run", "${metadata.author}"]
)
def test_no_command_is_run(planted, demo, class_name, capsys):
    def change(pipeline):
        pipeline["metadata"]["author"] = "subprocess.Popen"
        named(pipeline, class_name, args=["touch", str(planted / "called")])

    edit(demo.parent / "pipeline.yaml", change)
    assert main(["info", str(demo)]) == 2
    assert not called(planted)
    shown = class_name.replace("${metadata.author}", "subprocess.Popen")
    assert f"cannot be built: {shown} is no node: class_name must" in capsys.readouterr().err


def test_nothing_of_python_itself_is_imported_to_find_out(demo):
    before = sys.modules.pop("antigravity", None)  # it opens a browser
    edit(demo.parent / "pipeline.yaml", lambda p: named(p, "antigravity.Fly"))
    with pytest.raises(InputError, match=r"antigravity.Fly is no node"):
        load_trainrun(demo)
    assert before is None
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("name", ["NoNode", "no_class", "Path", "nothing"])
def test_what_can_be_imported_is_called_only_if_it_is_a_node(planted, demo, name):
    edit(demo.parent / "pipeline.yaml", lambda p: named(p, f"planted.{name}"))
    with pytest.raises(InputError, match=rf"cannot be built: .*planted.*{name}"):
        load_trainrun(demo)
    assert (planted / "imported").exists(), "as docs/nodes.md says"
    assert not called(planted)


def test_a_node_of_a_module_of_the_users_own_is_built(planted, demo):
    edit(demo.parent / "pipeline.yaml", lambda p: named(p, "planted.Own", scale=3))
    built = load_trainrun(demo).pipeline
    assert [node.scale for node in built.nodes() if node.name == "planted"] == [3]


def test_a_saved_pipeline_is_built_of_nodes_alone(planted, demo, capsys):
    saved = demo.parent / "saved.yaml"
    pipeline = yaml.safe_load((demo.parent / "pipeline.yaml").read_text())
    named(pipeline, "planted.NoNode")
    saved.write_text(yaml.safe_dump(pipeline))
    torch.save({"state_dict": {}}, saved.with_suffix(".pt"))
    for command in ("evaluate", "score"):
        assert main([command, str(saved), "--data", str(demo), "--workers", "0"]) == 2
        assert not called(planted)
        assert "planted.NoNode is no node" in capsys.readouterr().err


def test_a_manifest_names_data_modules_alone(planted, demo):
    """Upstream checks that a manifest's data module is one before it is called."""
    plugins = demo.parent / "configs" / "plugins"
    plugins.mkdir(parents=True)
    entry = {"class_name": "planted.NoNode", "kind": "data_module", "data_module_name": "planted"}
    manifest = {"name": "planted", "path": str(planted), "package_name": "planted"}
    (plugins / "planted.yaml").write_text(yaml.safe_dump(manifest | {"capabilities": [entry]}))
    edit(demo, lambda run: run["data"].update(data_module="planted"))
    with pytest.raises(InputError, match=r"NoNode: .*not a BaseCuvisAIDataModule subclass"):
        load_trainrun(demo).datamodule()
    assert (planted / "imported").exists()
    assert not called(planted)
