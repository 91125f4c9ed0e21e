"""One Ray session of each test process, and a small demo archive that nobody changes."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from loguru import logger
from stores import CREDENTIALS, s3_server

logger.remove()
STANDIN = Path(__file__).parent / "standin"
# Before Ray starts: its workers inherit the environment. The stand-in SDK goes before the real
# package; tests of the real one (marker sdk) run in processes of their own.
_PATHS = [str(STANDIN), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _PATHS))
sys.path.insert(0, str(STANDIN))
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.pop("RAY_ADDRESS", None)
os.environ.update(CREDENTIALS)


def _starts_clusters(path: Path) -> bool:
    return "from heads import" in path.read_text(encoding="utf-8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let tests with clusters of their own come first: they take longest, and wait most."""
    items.sort(key=lambda item: not _starts_clusters(item.path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Give whole files to each process, and to one all of those that start clusters.

    So that fixtures of a module are made once, and this machine carries one such cluster at a time.
    """
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "clusters" if _starts_clusters(config.rootpath / file) else file

    config.option.loadscopereorder = False
    return Files(config, log)


@pytest.fixture(autouse=True)
def threads_put_back() -> Iterator[None]:
    """Let every test begin with as many threads as a fresh process has: sums round accordingly.

    Tests that call what a worker calls leave this process with the threads of a worker.
    """
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def session_log(tmp_path_factory):
    """Return the file in which the stand-in SDK of every process notes the contexts it makes."""
    path = tmp_path_factory.mktemp("sdk") / "contexts.log"
    path.touch()
    os.environ["CUVIS_STANDIN_LOG"] = str(path)
    return path


@pytest.fixture(scope="session")
def ray_session(session_log):
    """Start Ray with three CPUs on this machine, whatever it has."""
    import ray

    from cuvis_dist.execution.session import connect
    from cuvis_dist.scaling import Scaling

    connect(Scaling(resources={"workers": 3}))
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Yield the endpoint of an S3 server with a bucket named ``bucket``."""
    with s3_server() as environment:
        yield environment["AWS_ENDPOINT_URL"]


@pytest.fixture(scope="session")
def demo_trainrun(tmp_path_factory) -> Path:
    """Return the trainrun of a demo with small frames, which every test loads anew."""
    from cuvis_dist.demo import DemoSettings, write_demo

    settings = DemoSettings(frames=22, height=16, width=20, bands=12, recordings=3, max_epochs=3)
    return write_demo(tmp_path_factory.mktemp("demo"), settings)


@pytest.fixture
def demo(demo_trainrun, tmp_path):
    """Return the trainrun of a copy of the demo that a test may change."""
    from archives import edit

    folder = tmp_path / "demo"
    shutil.copytree(demo_trainrun.parent, folder)
    path = folder / "trainrun.yaml"
    edit(path, lambda run: run["data"]["params"].update(
        universe_csv=str(folder / "archive" / "universe.csv")
    ) or run.update(output_dir=str(folder / "results")))  # fmt: skip
    return path


@contextmanager
def _logged(level: str) -> Iterator[list[str]]:
    messages: list[str] = []
    handler = logger.add(lambda entry: messages.append(entry.record["message"]), level=level)
    yield messages
    logger.remove(handler)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Collect what this process logs during the test."""
    with _logged("INFO") as messages:
        yield messages


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Collect what this process logs as a warning, or as worse, during the test."""
    with _logged("WARNING") as messages:
        yield messages
