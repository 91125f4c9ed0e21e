"""Workers import what they need before there is work for them; without workers nothing starts."""

from __future__ import annotations

import sys

import pytest
import ray
from settings import scaling_of

from cuvis_dist.execution import importing
from cuvis_dist.execution.importing import await_imports, import_everywhere


def loaded(module: str) -> bool:
    return module in sys.modules


@pytest.mark.usefixtures("ray_session")
def test_workers_import_before_there_is_work(monkeypatch):
    # A module that nothing else imports, so that the one who did is known.
    monkeypatch.setattr(importing, "_ON_WORKERS", ("wave",))
    monkeypatch.setattr(importing, "_IN_DRIVER", ("no_such_module",))  # told where it is needed
    assert not loaded("wave")
    import_everywhere(scaling_of(workers=3))
    await_imports()
    # Three CPUs: the session's workers are those that have imported.
    tasks = [ray.remote(num_cpus=1)(loaded).remote("wave") for _ in range(3)]
    assert any(ray.get(tasks))
    assert not loaded("wave")


def test_nothing_begins_where_the_settings_ask_for_no_workers(monkeypatch):
    def connect(*_):
        raise AssertionError("Ray is not asked for")

    monkeypatch.setattr(importing, "connect", connect)
    import_everywhere(scaling_of(workers=0))
    await_imports()
