"""Small work stays in the driver's process; whoever asks for workers gets them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from faults import FragileModule
from settings import scaling_of

from cuvis_dist.archive import Archive, open_archive
from cuvis_dist.errors import ClusterError, DataError, InputError
from cuvis_dist.execution.asked import trains_here
from cuvis_dist.execution.session import cpus_here, require_answer
from cuvis_dist.execution.where import START_SECONDS, Work, choose, work_on
from cuvis_dist.scaling import Scaling

LITTLE, MUCH = Work(11, 90 * 130 * 61), Work(100_000, 512 * 512 * 61)


@pytest.fixture(autouse=True)
def no_session(monkeypatch):
    """Let Ray sessions of other tests be none of this process."""
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)


def places(scaling: Scaling, work: Work = LITTLE) -> tuple[bool, bool]:
    """Whether the work stays here, and whether training does."""
    chosen = choose(scaling, lambda: work).scaling
    assert trains_here(chosen) == (chosen.resources.train_workers == 0)
    return chosen.resources.workers == 0, trains_here(chosen)


@pytest.mark.parametrize(
    ("settings", "here"),
    [
        ({}, (True, True)),
        ({"cpus_per_worker": 2, "shard_frames": 1}, (True, True)),
        ({"workers": 1}, (False, True)),
        ({"train_workers": 1}, (True, False)),
        ({"workers": 0, "train_workers": 0}, (True, True)),
        ({"min_train_workers": 1}, (True, False)),
        ({"read_ahead": 4}, (True, False)),
        ({"train_gpus": 1}, (False, False)),
        ({"gpus": 1}, (False, True)),
        ({"address": "auto"}, (False, False)),
        ({"address": "auto", "workers": 0}, (True, False)),
    ],
)
def test_settings_that_ask_for_workers(settings, here):
    assert places(scaling_of(**settings)) == here


def test_much_work_goes_to_workers_and_says_why():
    assert places(Scaling(), MUCH) == (False, True)
    choice = choose(Scaling(), lambda: MUCH)
    assert choice.why.startswith(
        "on workers: 100000 readings of 16 million values take one process"
    )
    network = Work(LITTLE.frames, LITTLE.values, weights=300_000_000)
    assert places(Scaling(), network) == (False, True)
    assert "300 million weights" in choose(Scaling(), lambda: network).why
    choice = choose(Scaling(), lambda: LITTLE)
    assert choice.why.startswith("in this process, without Ray: 11 readings")
    assert f"workers take {START_SECONDS:g} s to start" in choice.why


def test_a_cluster_that_is_there_is_used(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert places(Scaling()) == (False, False)


def test_more_processors_pay_sooner(monkeypatch):
    for cores, least in ((1, None), (2, 2 * START_SECONDS), (8, START_SECONDS * 8 / 7)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        each = Work(1, MUCH.values).seconds
        pays = [n for n in range(1, 1000) if Work(n, MUCH.values).pays_for_workers]
        if least is None:
            assert not pays
        else:
            assert pays[0] * each == pytest.approx(least, abs=1.01 * each)


def test_what_was_not_set_stays_so():
    chosen = choose(scaling_of(shard_frames=2), lambda: LITTLE).scaling
    assert chosen.measuring.model_fields_set == {"shard_frames"}
    assert chosen.resources.model_fields_set == {"workers", "train_workers"}


@pytest.mark.parametrize(
    ("settings", "other"),
    [
        ({"workers": 0, "gpus": 1}, "measuring.gpus"),
        ({"train_workers": 0, "train_gpus": 0.5}, "resources.train_gpus"),
        ({"train_workers": 0, "read_ahead": 2}, "reading.read_ahead"),
    ],
)
def test_contradictions_are_refused(settings, other):
    with pytest.raises(InputError, match=rf"workers is 0.*{other} is .*needs workers"):
        choose(scaling_of(**settings), lambda: LITTLE)


def test_the_first_frame_that_can_be_read_says_how_much_there_is(tmp_path, monkeypatch):
    archive = open_archive(FragileModule(tmp_path), "train")
    before = torch.get_rng_state()
    assert work_on(archive, CuvisPipeline("empty"), 24) == Work(24, 9 * 8 * 5)
    assert torch.equal(torch.get_rng_state(), before)

    read, tried = Archive.read, []

    def damaged(self, index):
        tried.append(index)
        if index < 2:
            raise DataError("damaged")
        return read(self, index)

    monkeypatch.setattr(Archive, "read", damaged)
    assert work_on(archive, CuvisPipeline("empty")) == Work(12, 9 * 8 * 5)
    assert tried == [0, 1, 2]


TOO_MANY = "are too many for this machine: it has "


@pytest.mark.parametrize(
    "settings",
    [{"workers": 33}, {"train_workers": 33}, {"workers": 1, "cpus_per_worker": 33},
     {"workers": 33, "cpus_per_worker": 0.1}],
)  # fmt: skip
def test_more_workers_than_this_machine_has_are_refused(settings):
    with pytest.raises(ClusterError, match=f"{TOO_MANY}4 CPUs, and at most 32 are offered"):
        cpus_here(scaling_of(**settings))
    fewer = {name: min(value, 32) for name, value in settings.items()}
    assert cpus_here(scaling_of(**fewer)) <= 32


def test_that_is_told_before_ray_starts(demo_trainrun):
    command = ["cuvis_dist.cli", "run", str(demo_trainrun), "--workers", "100000"]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    assert TOO_MANY in done.stderr.splitlines()[-1]
    assert "building the pipeline" not in done.stderr


def test_an_address_at_which_nothing_answers_is_told_soon():
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for place in (address, f"ray://{address}"):
            with pytest.raises(ClusterError, match=f"nothing answers at {place}.*refused"):
                require_answer(place, seconds=0.1)
        taken.listen()
        require_answer(address, seconds=0.1)
    for unchecked in ("auto", "local", "http://nowhere:1", "nowhere"):
        require_answer(unchecked, seconds=0.1)
