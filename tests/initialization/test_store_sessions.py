"""A store of .cu3s recordings, through the stand-in SDK: all frames of a file are known by it."""

from __future__ import annotations

import numpy as np
from archives import edit, statistical_trainrun
from cuvis import write_session
from fits import Fits

NODES = [
    ("data", "data.CU3SDataNode", {}),
    ("rx", "anomaly.rx_detector.RXGlobal", {"num_channels": 12}),
]


def write(path, seed):
    cubes = np.random.default_rng(seed).integers(0, 4000, (6, 8, 7, 12), dtype=np.uint16)
    write_session(path, cubes, np.linspace(430, 910, 12))


def test_a_recording_that_changes_is_measured_again_and_modes_are_apart(tmp_path, session_log):
    for i in range(3):
        write(tmp_path / f"rec_{i}.cu3s", i)
    params = {"data_dir": str(tmp_path), "frames": "measurements", "sdk_cuda": False}
    data = {"data_module": "cu3s", "params": params}
    edges = [("data.outputs.cube", "rx.inputs.data")]
    run = statistical_trainrun(tmp_path, tmp_path, NODES, edges, **data)
    fits, store = Fits(run.path, tmp_path), str(tmp_path / "store")
    read = fits()
    assert (fits(store=store), len(fits.every)) == (read, 18)
    assert (fits(store=store), fits.every) == (read, [])
    write(tmp_path / "rec_1.cu3s", 9)
    changed = fits(store=store)
    assert [int(n) // 6 for n in fits.every] == [1] * 6
    assert fits() == changed != read
    edit(run.path, lambda made: made["data"]["params"].update(processing_mode="Raw"))
    fits(store=store)
    assert fits.first.from_store == 0
