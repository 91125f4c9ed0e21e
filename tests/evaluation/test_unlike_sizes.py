"""A 1 x 1 frame among others is named wherever it does not fit, in one sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from cuvis_dist.cli import main
from cuvis_dist.errors import CuvisDistError, DataError
from cuvis_dist.execution.failures import raise_cause

#: Frames of the demo.
TRAIN, VAL, TEST = 1, 4, 6


def shrink(demo, number):
    """Leave one pixel of a frame; return its file."""
    path = demo.parent / "archive" / f"recording_00_{number:03d}.npz"
    entries = {k: v[:1, :1] if v.ndim > 1 else v for k, v in np.load(path).items()}
    np.savez(path, **entries)
    return path


def failed(demo, capsys, *overrides):
    """Run the command in this process; return the message that it ended with."""
    options = [part for override in overrides for part in ("--override", override)]
    assert main(["run", str(demo), *options]) == 3
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "\x1b" not in said
    message = json.loads((demo.parent / "results" / "result.json").read_text())["error"]
    (last,) = [line for line in said.splitlines() if line.startswith("cuvis-dist: ")]
    assert message == f"DataError: {last.removeprefix('cuvis-dist: ')}"
    assert message.count("recording_00.cu3s#") == 2
    return message


@pytest.mark.parametrize(
    ("number", "overrides"),
    [
        (TEST, ("training=null",)),
        (VAL, ("training=null",)),
        (VAL, ("training.max_epochs=1",)),
    ],
)
def test_a_frame_that_does_not_fit_its_batch(demo, capsys, number, overrides):
    path = shrink(demo, number)
    message = failed(demo, capsys, *overrides)
    assert "cannot batch " in message
    assert str(path) in message
    assert "their sizes differ (cube: (1, 1, 12), (16, 20, 12))" in message
    assert "RuntimeError" not in message


def test_a_frame_that_does_not_fit_the_others_of_val(demo, capsys):
    path = shrink(demo, VAL)
    message = failed(demo, capsys, "training=null", "data.batch_size=1")
    assert "cannot be calibrated on val, whose frames have unlike sizes ((1, 1, 1) of " in message
    assert str(path) in message


def test_one_at_a_time_they_fit(demo):
    shrink(demo, TRAIN)
    shrink(demo, TEST)
    options = ["--override", "data.batch_size=1", "--override", "training.max_epochs=1"]
    assert main(["run", str(demo), "--workers", "0", "--train-workers", "0", *options]) == 0


class Unreadable(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise DataError("cannot read frame a: it is: not there")


def test_an_error_of_a_loaders_process_has_its_own_message():
    with pytest.raises(DataError) as raised, raise_cause("training"):
        list(DataLoader(Unreadable(), num_workers=1))
    assert str(raised.value) == "cannot read frame a: it is: not there"


def test_other_errors_have_theirs():
    class Broken(Unreadable):
        def __getitem__(self, index):
            raise ValueError("two\nlines")

    with pytest.raises(CuvisDistError) as raised, raise_cause("training"):
        list(DataLoader(Broken(), num_workers=1))
    assert str(raised.value) == "training failed: ValueError: two lines"
