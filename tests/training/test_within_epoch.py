"""A fit that is cut off within an epoch goes on at the next step, as if nothing had happened."""

from __future__ import annotations

import multiprocessing
import shutil
import signal

import pytest
import torch
from cutting import FRAMES, SIZE, fit, fit_rank, readings
from ranks import MOST, Ranks

ACCUMULATING = {
    "max_epochs": 5, "accumulate_grad_batches": 2, "val_check_interval": 2,
    "optimizer": {"name": "adamw", "lr": 0.05},
    "scheduler": {"name": "plateau", "monitor": "val_loss", "patience": 0},
    "callbacks": {
        "early_stopping": [{"monitor": "val_loss", "patience": 6, "min_delta": 0.1}],
        "checkpoint": {"monitor": "val_loss", "every_n_train_steps": 2, "save_top_k": 2},
    },
}  # fmt: skip
PLAIN = {
    "max_epochs": 3, "optimizer": {"name": "sgd", "lr": 0.02}, "check_val_every_n_epoch": 2,
    "scheduler": {"name": "cosine", "t_max": 3},
    # Of which the first waits for a validation.
    "callbacks": {"checkpoint": {"monitor": "val_loss", "every_n_train_steps": 5}},
}  # fmt: skip


@pytest.fixture(scope="module")
def ranks():
    pool = Ranks("cutting")
    yield pool
    pool.close()


def assert_alike(ours, theirs, tolerance: float = 0) -> None:
    """Compare down to the bits, or to a relative difference."""
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance / 10)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_alike(ours[key], value, tolerance)
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_alike(mine, other, tolerance)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance / 10)
    else:
        assert ours == theirs


@pytest.mark.parametrize(
    ("name", "options", "least"),
    [("mixer_with_batch_norm-None", ACCUMULATING, 6), ("unknown-Noise", PLAIN, 17)],
    ids=["batch norm, accumulation, plateau", "noise, cosine"],
)
def test_goes_on_within_an_epoch(tmp_path, name, options, least):
    """From any step, and from the start of an epoch; each frame of the rest is read once."""
    whole = fit(name, tmp_path / "whole", options)
    read = readings(tmp_path / "whole")
    copies = list((tmp_path / "cut off").iterdir())
    assert len(copies) >= least
    for folder in copies:
        epoch, batch = map(int, folder.name.split("-"))
        assert_alike(fit(name, folder, options), whole)
        assert readings(folder) == read[epoch * FRAMES + batch * SIZE :]


def test_goes_on_with_frames_on_the_device(tmp_path):
    """In the same bits as a fit that reads every frame in time; none is read twice."""
    name = "unknown-Noise"
    whole = fit(name, tmp_path / "read" / "whole", PLAIN)
    assert_alike(fit(name, tmp_path / "kept" / "whole", PLAIN, cache="device"), whole)
    assert sorted(readings(tmp_path / "kept" / "whole")) == sorted(map(str, range(FRAMES)))
    for point in ("0-3", "1-0", "1-2", "2-5"):
        folder = tmp_path / "kept" / "cut off" / point
        assert_alike(fit(name, folder, PLAIN, cache="device"), whole)
        read = readings(folder)
        assert len(read) == len(set(read))
        # A fit may go on with another setting than it began with.
        folder = tmp_path / "read" / "cut off" / point
        assert_alike(fit(name, folder, PLAIN, cache="device"), whole)


def test_goes_on_on_ranks_with_frames_on_their_devices(ranks, tmp_path):
    name = "unknown-Noise"
    whole = fit(name, tmp_path / "one" / "whole", PLAIN)
    many, *_ = ranks.run(MOST, fit_rank, name, tmp_path / "many" / "whole", PLAIN, "device")
    assert_alike(many, whole, 1e-5)
    for point in ("0-3", "1-2"):
        folder = tmp_path / "many" / "cut off" / point
        found, *_ = ranks.run(MOST, fit_rank, name, folder, PLAIN, "device")
        assert_alike(found, whole, 1e-5)
    found = fit(name, tmp_path / "many" / "cut off" / "2-5", PLAIN, cache="device")
    assert_alike(found, whole, 1e-5)


def test_a_killed_process_goes_on_within_its_epoch(tmp_path):
    whole = fit("unknown-Noise", tmp_path / "whole", PLAIN)
    folder, at = tmp_path / "killed", FRAMES + 3 * SIZE + 1
    process = multiprocessing.get_context("forkserver").Process(
        target=fit, args=("unknown-Noise", folder, PLAIN, at)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert readings(folder) == readings(tmp_path / "whole")[:at]

    assert_alike(fit("unknown-Noise", folder, PLAIN), whole)
    assert readings(folder)[at:] == readings(tmp_path / "whole")[at - 1 :]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("mixer_with_batch_norm-None", ACCUMULATING, marks=pytest.mark.long),
        ("unknown-Noise", PLAIN),
    ],
    ids=["batch norm, accumulation, plateau", "noise, cosine"],
)
def test_goes_on_with_as_many_ranks_and_with_others(ranks, tmp_path, name, options):
    options = {**options, "optimizer": PLAIN["optimizer"]}  # AdamW makes steps of rounding errors
    whole = fit(name, tmp_path / "one" / "whole", options)
    many, *_ = ranks.run(MOST, fit_rank, name, tmp_path / "many" / "whole", options)
    assert_alike(many, whole, 1e-5)
    point = "1-2"
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "many" / "cut off" / point, again)
    found, *_ = ranks.run(MOST, fit_rank, name, again, options)
    assert_alike(found, many, 1e-5)
    found = fit(name, tmp_path / "many" / "cut off" / point, options)
    assert_alike(found, whole, 1e-5)
    found, *_ = ranks.run(MOST, fit_rank, name, tmp_path / "one" / "cut off" / point, options)
    assert_alike(found, whole, 1e-5)
