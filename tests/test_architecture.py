"""Do imports point down the list of folders only, and is everything small enough to read?"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import networkx as nx
import pytest

import cuvis_dist

PACKAGE = Path(cuvis_dist.__file__).parent
#: From top to bottom. A module imports from its own folder and from those of lower lines. The
#: package itself hands out the public names, so that it is above all, and nothing imports from it.
ORDER = [
    {"cuvis_dist"},
    {"cli"},
    {"commands"},
    {"runs"},
    {"report"},
    {"audit"},
    {"initialization"},
    {"training"},
    {"evaluation"},
    {"scoring"},
    {"execution"},
    {"store"},
    {"archive"},
    {"staging"},
    {"storage"},
    {"nodes"},
    {"statistics"},
    {
        "scaling",
        "errors",
        "hashing",
        "lazy",
        "lending",
        "misspelt",
        "pace",
        "plain",
        "waiting",
        "stopping",
        "demo",
        "universe",
        "yaml_file",
    },
]
LEVEL = {folder: level for level, folders in enumerate(ORDER) for folder in folders}
#: Packages that load what they hand out when it is asked for.
LAZY = ("cuvis_dist", "cuvis_dist.archive", "cuvis_dist.staging", "cuvis_dist.store")
LINES, PARAMETERS = 350, 6
#: Functions that have more parameters, and why they must.
MORE_PARAMETERS = {
    "cuvis_dist.initialization.trainer.StatisticalTrainer.__init__": (
        "upstream's StatisticalTrainer has five; scaling and output_dir are ours"
    ),
    "cuvis_dist.statistics.sample.PixelSample.measure": (
        "pixels, the sample's two settings, and four that say where the pixels are of the archive"
    ),
    "cuvis_dist.training.trainer.GradientTrainer.__init__": (
        "upstream's GradientTrainer has seven; emit, scaling and output_dir are ours"
    ),
}


def package() -> dict[str, str]:
    """The source of each module by its name."""
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        modules[name.removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return modules


# ---- imports ---------------------------------------------------------------------------


def imported(source: str) -> Iterator[str]:
    """Yield every name that a module imports, inside functions and for types alike."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import: {ast.unparse(node)}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_graph(modules: dict[str, str]) -> nx.DiGraph:
    """The imports between modules; a name belongs to the longest module that begins it."""
    graph = nx.DiGraph()
    graph.add_nodes_from(modules)
    for module, source in modules.items():
        for name in imported(source):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name:
                graph.add_edge(module, name)
    return graph


def folder(module: str) -> str:
    """The folder of a module, or the module where it lies in none."""
    return module.split(".")[1] if "." in module else module


def upward(graph: nx.DiGraph) -> list[str]:
    """The imports that do not point down."""
    found = []
    for importer, target in graph.edges:
        above, below = LEVEL[folder(importer)], LEVEL[folder(target)]
        bottom = above == below == len(ORDER) - 1
        if folder(importer) != folder(target) and above >= below and not bottom:
            found.append(f"{importer} imports {target}")
    return sorted(found)


def folder_cycles(graph: nx.DiGraph) -> list[list[str]]:
    """The folders that import each other, directly or by way of others."""
    folders = nx.DiGraph((folder(a), folder(b)) for a, b in graph.edges if folder(a) != folder(b))
    return [sorted(c) for c in nx.strongly_connected_components(folders) if len(c) > 1]


def test_every_folder_has_its_place():
    assert {folder(module) for module in package()} == set(LEVEL)


def test_imports_point_down():
    assert upward(import_graph(package())) == []


def test_no_folders_import_each_other():
    assert folder_cycles(import_graph(package())) == []


@pytest.mark.parametrize(
    "source",
    [
        "from cuvis_dist.runs import trainrun",
        "from cuvis_dist.runs.trainrun import load_trainrun",
        "import cuvis_dist.runs.trainrun",
        "def f():\n    from cuvis_dist.runs.trainrun import load_trainrun",
        "if TYPE_CHECKING:\n    from cuvis_dist.runs.trainrun import TrainRun",
    ],
)
def test_an_import_that_points_up_is_noticed(source):
    modules = dict.fromkeys(("cuvis_dist", "cuvis_dist.runs", "cuvis_dist.runs.trainrun"), "")
    modules["cuvis_dist.storage.output"] = source
    (only,) = upward(import_graph(modules))
    assert only.startswith("cuvis_dist.storage.output imports cuvis_dist.runs")
    modules["cuvis_dist.runs.trainrun"] = "from cuvis_dist.storage.output import Output"
    modules["cuvis_dist.runs"] = "from cuvis_dist.runs.trainrun import load_trainrun"
    if "runs import" not in source:
        assert folder_cycles(import_graph(modules)) == [["runs", "storage"]]


def test_an_import_of_the_package_itself_is_noticed():
    modules = {"cuvis_dist": "", "cuvis_dist.errors": "from cuvis_dist import Scaling"}
    assert upward(import_graph(modules)) == ["cuvis_dist.errors imports cuvis_dist"]


def test_a_cycle_of_three_is_noticed():
    modules = {
        "cuvis_dist.errors": "import cuvis_dist.hashing",
        "cuvis_dist.hashing": "import cuvis_dist.scaling",
        "cuvis_dist.scaling": "import cuvis_dist.errors",
    }
    assert folder_cycles(import_graph(modules)) == [["errors", "hashing", "scaling"]]


def begins(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_only_nodes_know_the_node_classes_of_cuvis_ai():
    found = {
        module
        for module, source in package().items()
        for name in imported(source)
        if begins(name, {"cuvis_ai.node"}) and folder(module) != "nodes"
    }
    assert found == set()


def test_statistics_need_neither_ray_nor_cuvis_ai():
    heavy = {"ray", "cuvis_ai", "cuvis_ai_core", "cuvis_ai_schemas", "pytorch_lightning"}
    found = {
        (module, name)
        for module, source in package().items()
        for name in imported(source)
        if begins(name, heavy) and folder(module) in ("statistics", *ORDER[-1])
    }
    assert found == set()


@pytest.mark.parametrize("package", LAZY)
def test_every_public_name_is_where_its_package_looks_for_it(package):
    names, folder = import_module(package), PACKAGE / Path(*package.split(".")[1:])
    for name in names.__all__:
        assert not (folder / f"{name}.py").exists(), "a module of that name would be found instead"
        found = getattr(names, name)
        assert name == "Identity" or found.__name__ == name  # an alias has no name of its own
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        names.nothing  # noqa: B018


# ---- sizes -----------------------------------------------------------------------------


def functions(module: str, source: str) -> Iterator[tuple[str, int]]:
    """Yield the qualified name of every function and how many parameters it has.

    Without ``self`` and ``cls``, and without ``*args`` and ``**kwargs``.
    """

    def inside(parent: ast.AST, name: str) -> Iterator[tuple[str, int]]:
        for node in ast.iter_child_nodes(parent):
            named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            full = f"{name}.{node.name}" if named else name
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = node.args
                names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
                bound = isinstance(parent, ast.ClassDef) and names[:1] in (["self"], ["cls"])
                yield full, len(names) - bound
            yield from inside(node, full)

    yield from inside(ast.parse(source), module)


def test_modules_are_short_enough_to_read():
    lengths = {module: source.count("\n") for module, source in package().items()}
    assert {m: n for m, n in lengths.items() if n > LINES} == {}


def test_functions_have_few_parameters():
    counts = dict(pair for name, text in package().items() for pair in functions(name, text))
    many = {name: count for name, count in counts.items() if count > PARAMETERS}
    assert {name: many[name] for name in set(many) - set(MORE_PARAMETERS)} == {}
    assert set(MORE_PARAMETERS) <= set(many), "an exception that is needed no more"


def test_parameters_are_counted():
    source = (
        "class A:\n"
        "    def f(self, a, /, b, *c, d=1, **e):\n"
        "        def g(x): ...\n"
        "    @classmethod\n"
        "    async def h(cls): ...\n"
        "def self_made(self): ...\n"
    )
    assert dict(functions("m", source)) == {"m.A.f": 3, "m.A.f.g": 1, "m.A.h": 0, "m.self_made": 1}
