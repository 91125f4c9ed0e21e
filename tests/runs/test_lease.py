"""Two runs at one URI: the second is kept out until the first has ended, or is long silent."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from cuvis_dist.errors import InputError
from cuvis_dist.runs import lease
from cuvis_dist.runs.lease import LEASE, leased, read_lease
from cuvis_dist.runs.lock import only_run, writer_of
from cuvis_dist.storage import OutputFolder


@pytest.fixture
def folder(s3, monkeypatch, tmp_path):
    """Return an empty folder of a bucket, in which leases are short."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    monkeypatch.setattr(lease, "SECONDS", 1.5)
    monkeypatch.setattr(lease, "_SETTLING", 0.2)
    return OutputFolder(f"s3://bucket/{tmp_path.name}/run")


def test_a_second_run_is_kept_out_as_long_as_the_first_lives(folder):
    with only_run(folder):
        time.sleep(2)  # longer than a lease that nobody renews
        with pytest.raises(InputError, match=r"another run is writing to s3://.*\(process \d+ on"):
            only_run(folder).__enter__()
        assert writer_of(folder).startswith("process ")
    assert read_lease(folder) is None
    assert writer_of(folder) == ""
    with only_run(folder):
        pass


def test_a_lease_that_is_over_is_taken_over_and_the_log_says_so(folder, warnings):
    lease._renew(folder, "process 1 on elsewhere", "its key")
    with pytest.raises(InputError, match="process 1 on elsewhere"):
        leased(folder).__enter__()
    time.sleep(1.6)
    with leased(folder):
        assert "is taken over from process 1 on elsewhere" in warnings[-1]


def test_of_two_that_begin_at_the_same_moment_one_goes_on(folder):
    entered, refused, begin = [], [], threading.Barrier(2)

    def run():
        begin.wait()
        try:
            with leased(folder):
                entered.append(1)
                time.sleep(1)
        except InputError:
            refused.append(1)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(entered), len(refused)) == (1, 1)


def test_who_has_lost_the_lease_ends(folder):
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def lose():
        with leased(folder):
            lease._renew(folder, "process 1 on elsewhere", "its key")
            time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        lose()
    assert read_lease(folder).key == "its key", "it is not removed by another"


def test_what_is_no_lease_is_none(folder):
    folder.write(LEASE, b"[1, 2]")
    with leased(folder):
        assert read_lease(folder).owner.startswith("process ")
