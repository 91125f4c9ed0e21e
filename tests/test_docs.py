"""What README and docs say is run: their commands, their Python, their files and links."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from archives import ROOT

from cuvis_dist import save_initialization
from cuvis_dist.cli import _parser, main
from cuvis_dist.demo import DemoSettings, write_demo
from cuvis_dist.initialization.card import Card, FileStamp, UsedFrame, UsedFrames
from cuvis_dist.runs.record import RunRecord
from cuvis_dist.runs.trainrun import load_trainrun

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "cluster" / "README.md"]

_INSTALLS = "installs an environment first; what it then runs is the suite, or is run below"
#: Commands that are not run here, each with the reason.
NOT_RUN = {
    "make demo": _INSTALLS,
    "make test": _INSTALLS,
    "make test-all": _INSTALLS,
    "make lint": _INSTALLS,
    "make browser": "installs a package of the system, in CI",
    "make bench": "takes many minutes, and an idle machine",
    ".venv/bin/python -m pytest tests/statistics": "runs tests, as this is",
    ".venv/bin/ruff check . && .venv/bin/ruff format . && .venv/bin/mypy": "make lint, in CI",
    "python docs/generate_settings.py": "writes into the clone; test_the_settings_page compares",
}
#: Commands that :func:`test_the_one_word_change` runs to their ends, and nothing else does.
RUN_WHOLE = {
    "PLUGINS=$(python -c \"import cuvis_ai; print(cuvis_ai.__path__[0] + '/configs/plugins')\")",
    "restore-trainrun --trainrun-path outputs/demo/trainrun.yaml --mode train "
    "--plugins-dir $PLUGINS",
}
JOBS = {"run", "init", "train", "evaluate", "score"}
#: Python blocks of each page, all of which are run: here, that of the nodes by test_readme, and how
#: an initialization is made again by runs/test_initialized.
PYTHON = {"README.md": 1, "settings.md": 1, "nodes.md": 1, "initializations.md": 2}


def blocks(page: Path, language: str) -> list[str]:
    """Return a page's fenced blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def commands(block: str) -> list[str]:
    """Return the commands of a block, on one line each and without comments."""
    lines = re.sub(r"\s*\\\n\s*", " ", block).splitlines()
    lines = [re.sub(r"(^|\s+)#\s.*", "", line).strip() for line in lines]
    return [line for line in lines if line]


COMMANDS = {line: page.name for page in PAGES for b in blocks(page, "bash") for line in commands(b)}


def words_of(command: str) -> list[str] | None:
    """Return what to call for a command, or for the job that it submits; None if it is neither.

    The first word is ``cuvis-dist`` or a module of ``jobs``; jobs are only to say what they would
    do.
    """
    words = shlex.split(command)
    if words[:3] == ["ray", "job", "submit"]:
        return words_of(shlex.join(words[words.index("--") + 1 :]))
    if words[:2] == ["cuvis-dist", "submit"]:
        return words_of(shlex.join(["cuvis-dist", *_parser().parse_args(words[1:]).job]))
    if words[:2] == ["python", "-m"] and words[2].startswith("jobs."):
        return [*words[2:], "--dry-run"]
    if words[0] != "cuvis-dist":
        return None
    return [*words, "--dry-run"] if words[1] in JOBS and "--dry-run" not in words else words


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Iterator[Path]:
    """A folder like a clone in which ``make demo`` was run, but with a small demo."""
    folder = tmp_path_factory.mktemp("clone")
    settings = DemoSettings(frames=16, height=16, width=20, bands=12, recordings=2, max_epochs=2)
    trainrun = write_demo(folder / "outputs" / "demo", settings)
    shutil.copy(trainrun, folder)
    shutil.copy(trainrun.with_name("pipeline.yaml"), folder)
    (page,) = (page for page in PAGES if page.name == "settings.md")
    (folder / "scaling.yaml").write_text(blocks(page, "yaml")[0])
    trained = trainrun.parent / "results" / "trained_models"
    trained.mkdir(parents=True)
    for ending in ("initialized", "restored"):
        pipeline = load_trainrun(trainrun).pipeline
        save_initialization(pipeline, trained / f"Channel_Selector_{ending}.yaml")
    shutil.copytree(trained, folder / "outputs" / "clean" / "trained_models")
    for output in (trainrun.parent / "results", folder / "outputs" / "other" / "results"):
        RunRecord(job="run", output_dir=str(output), trainrun=str(trainrun), name="demo").write()
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def test_every_command_is_run_or_named_as_not_run():
    unknown = {
        line: page
        for line, page in COMMANDS.items()
        if line not in NOT_RUN and line not in RUN_WHOLE and words_of(line) is None
    }
    assert not unknown
    assert set(NOT_RUN) | RUN_WHOLE <= set(COMMANDS), "named here, and in no page any more"


@pytest.mark.parametrize("command", [c for c in COMMANDS if words_of(c) is not None])
def test_the_command_does_what_it_can_without_ray(command, clone, monkeypatch, capsys):
    called, *arguments = words_of(command)
    if called == "cuvis-dist":
        code = main(arguments)
    else:
        monkeypatch.setattr(sys, "argv", [called, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(called, run_name="__main__")
        code = ended.value.code
    said = capsys.readouterr()
    assert code == 0, said.err
    assert said.out.strip()


@pytest.mark.slow
def test_the_one_word_change(clone):
    """Upstream's command and ours, each as the README has it, in processes of their own."""
    results = clone / "outputs" / "demo" / "results"
    shutil.rmtree(results)
    script = [
        line
        for block in blocks(ROOT / "README.md", "bash")
        for line in commands(block)
        if line in RUN_WHOLE or line == "cuvis-dist run outputs/demo/trainrun.yaml"
    ]
    assert len(script) == 3
    script.insert(2, f"mv {results} {clone / 'theirs'}")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(script)],
        cwd=clone,
        env=os.environ
        | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ['PYTHONPATH']}"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    saved = "trained_models/Channel_Selector_restored"
    for folder in (clone / "theirs", results):
        assert (folder / f"{saved}.yaml").is_file()
        assert (folder / f"{saved}.pt").is_file()
    assert json.loads((results / "result.json").read_text())["status"] == "done"
    section = (ROOT / "README.md").read_text().split("## What a run leaves")[1]
    named = re.findall(r"(?:<output_dir>/|, )([\w.]+(?:/|\.json))", section.split("```")[1])
    assert set(named) >= {"run.json", "result.json", "checkpoints/", "resume/"}
    for name in named:
        assert (results / name).exists(), name


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_the_python_of_the_readme(clone, capsys):
    (block,) = blocks(ROOT / "README.md", "python")
    exec(block, {"__name__": "readme"})
    assert "metrics_anomaly/iou" in capsys.readouterr().out
    from cuvis_ai_core.pipeline.pipeline import CuvisPipeline

    saved = clone / "outputs" / "mine" / "pipeline.yaml"
    pipeline = CuvisPipeline.load_pipeline(saved, saved.with_suffix(".pt"), device="cpu")
    assert pipeline.name == "Channel_Selector"


def test_the_python_of_the_settings():
    (block,) = blocks(ROOT / "docs" / "settings.md", "python")
    namespace: dict = {}
    exec(block, namespace)
    assert namespace["scaling"] == namespace["same"]


def test_the_python_of_the_initializations(clone):
    exec(blocks(ROOT / "docs" / "initializations.md", "python")[0], namespace := {})
    nodes = [node for node in namespace["pipeline"].nodes() if node.requires_initial_fit]
    assert len(nodes) == 4
    assert all(node._statistically_initialized for node in nodes)


def test_every_field_of_a_card_is_described():
    page = (ROOT / "docs" / "initializations.md").read_text()
    described = set(re.findall(r"^\| `([\w.]+)` \|", page, re.M))
    frames = {f"frames.{name}" for name in UsedFrames.model_fields}
    assert described == {*Card.model_fields, *frames}
    for part in (UsedFrame, FileStamp):
        assert all(f"`{name}`" in page for name in part.model_fields)


def test_all_python_is_run():
    found = {page.name: len(blocks(page, "python")) for page in PAGES}
    assert {name: number for name, number in found.items() if number} == PYTHON


def test_the_trainrun_of_the_readme_is_the_demos(tmp_path):
    trainrun = write_demo(tmp_path, DemoSettings(height=4, width=4))
    shown = [yaml.safe_load(block) for block in blocks(ROOT / "README.md", "yaml")]
    for path, content in zip((trainrun, trainrun.with_name("pipeline.yaml")), shown, strict=True):
        written = path.read_text().replace(str(tmp_path), "outputs/demo")
        assert content == yaml.safe_load(written)


def test_the_settings_page():
    written = runpy.run_path(str(ROOT / "docs" / "generate_settings.py"))["settings_page"]()
    stale = "stale: run python docs/generate_settings.py"
    assert (ROOT / "docs" / "settings.md").read_text() == written, stale


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    found = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_are_there(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in headings(target), link
    for name in re.findall(
        r"`((?:tests|jobs|cluster|docs|cuvis_dist)/[\w/.-]+)`", page.read_text()
    ):
        assert (ROOT / name).exists(), name


def test_every_end_of_a_run_has_its_test():
    """Each row of the table names tests, and there are tests of these names."""
    page = (ROOT / "docs" / "failures.md").read_text().split("## What happens when")[1]
    rows = [line.strip("| ").split("|") for line in page.splitlines() if line.startswith("| ")]
    ends = [row for row in rows[1:] if len(row) == 5]
    assert len(ends) > 40
    for what, _, code, _, tests in ends:
        assert all(int(each) in (0, 1, 2, 3, 4, 5, 130) for each in code.split(",") if each.strip())
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", tests)
        assert named, what
        assert tests.count("`") == 2 * len(named), what
        for file, test in named:
            source = (ROOT / "tests" / file).read_text()
            assert re.search(rf"^def {test}\(", source, re.M), f"{file}::{test}"


def test_the_architecture_names_every_folder():
    page = (ROOT / "docs" / "architecture.md").read_text()
    package = ROOT / "cuvis_dist"
    folders = [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    modules = [path.name for path in package.glob("*.py") if path.name != "__init__.py"]
    for name in [*folders, *modules]:
        assert re.search(rf"^  {re.escape(name)}\s+\w", page, re.M), name
