"""A driver that is lost in the middle of a pass leaves what it measured, and another goes on."""

from __future__ import annotations

import functools

import pytest
import torch
from archives import buffers_sha256
from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.data import CU3SDataNode
from cuvis_ai.node.normalization import MinMaxNormalizer
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.post_fit import TrainHook
from faults import FragileCubes, FragileModule
from readings import CountedCubes, wrap_train
from settings import scaling_of

from cuvis_dist import Scaling, StatisticalTrainer
from cuvis_dist.archive import open_archive
from cuvis_dist.execution.tally import Tally
from cuvis_dist.initialization.kept_pass import PASSES, KeptPass, identify
from cuvis_dist.initialization.plan import make_plan
from cuvis_dist.plain import from_bytes
from cuvis_dist.runs.trainrun import load_trainrun
from cuvis_dist.storage import OutputFolder

SETTINGS = {"workers": 2, "shard_frames": 2, "save_seconds": 0}


class Fits:
    """Fits of the demo's pipeline into one folder, each with its frames counted."""

    def __init__(self, trainrun, folder):
        self.trainrun, self.folder = trainrun, folder
        _, module, _ = self.load("unread")
        self.archive = open_archive(module, "train")  # cut into the shards that the fits have

    def load(self, name):
        """Return the trainrun, and its data with a log of the frames that are read, and the log."""
        run, log = load_trainrun(self.trainrun), self.folder / f"{name}.log"
        module = run.datamodule()
        wrap_train(module, functools.partial(CountedCubes, log=log))
        return run, module, log

    def fit(self, name, resume=True, emit=None, **scaling):
        run, module, log = self.load(name)
        trainer = StatisticalTrainer(
            run.pipeline,
            module,
            emit=emit,
            scaling=scaling_of(**SETTINGS | scaling),
            output_dir=self.folder / "results",
        )
        try:
            trainer.fit(resume=resume)
        finally:
            self.read = [int(line) for line in log.read_text().split()]
        return run.pipeline, trainer

    def interrupted(self, name, number, frames, **scaling):
        """Ctrl-C once a pass has measured so many frames; returns the shards that it kept."""
        fitted = {1: "normalizer", 2: "logit_head"}[number]

        def emit(event):
            progressing = event.hook is TrainHook.STATISTICAL_PROGRESS and event.node == fitted
            if progressing and event.progress.done >= frames:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.fit(name, emit=emit, **scaling)
        return self.kept(number)

    def kept(self, number):
        """Frames in the file of a pass."""
        path = self.folder / "results" / PASSES / f"{number}.state"
        stored = KeptPass(OutputFolder(self.folder / "results"), number, identity_in(path), 0)
        shards = self.archive.shards(SETTINGS["shard_frames"])
        return {
            frame
            for shard in shards
            if shard.ordinal in stored.earlier["shards"]
            for frame in range(shard.start, shard.stop)
        }


def identity_in(path):
    return from_bytes(path.read_bytes())["identity"]


@pytest.mark.usefixtures("ray_session")
def test_a_pass_goes_on_where_it_was_interrupted(demo_trainrun, tmp_path, warnings):
    fits = Fits(demo_trainrun, tmp_path)
    undisturbed, trainer = fits.fit("undisturbed", resume=False)
    frames = set(range(len(fits.archive)))
    assert len(trainer.records) == 2
    assert not (tmp_path / "results").exists(), "a plain fit leaves nothing"

    kept = fits.interrupted("first", number=1, frames=4)
    assert 4 <= len(kept) < len(frames)

    kept_2 = fits.interrupted("second", number=2, frames=6)
    pass_1 = fits.read[: len(frames - kept)]
    assert set(pass_1) == frames - kept, "a frame whose partial was kept is not read again"
    assert 6 <= len(kept_2) < len(frames)
    assert any("pass 1 goes on: " in line for line in warnings)

    pipeline, trainer = fits.fit("third", workers=1)
    assert sorted(fits.read) == sorted(frames - kept_2), "each missing frame once, pass 2 alone"
    assert buffers_sha256(pipeline) == buffers_sha256(undisturbed)
    assert [record.frames for record in trainer.records] == [len(frames)] * 2
    assert [record.restored_frames for record in trainer.records] == [len(frames), len(kept_2)]
    assert trainer.records[0].restored_shards == trainer.records[0].shards
    assert all(record.repeated == [] for record in trainer.records)

    pipeline, _ = fits.fit("finished")
    assert fits.read == []
    assert buffers_sha256(pipeline) == buffers_sha256(undisturbed)


@pytest.mark.usefixtures("ray_session")
def test_an_interruption_in_the_middle_of_a_merge_keeps_the_state_before(
    demo_trainrun, tmp_path, monkeypatch
):
    fits = Fits(demo_trainrun, tmp_path)
    undisturbed, _ = fits.fit("undisturbed", resume=False)
    add, calls = Tally.add, []

    def interrupted_add(tally, row):
        calls.append(row)
        if len(calls) == 3:
            raise KeyboardInterrupt  # merged, but not counted
        add(tally, row)

    with monkeypatch.context() as patch:
        patch.setattr(Tally, "add", interrupted_add)
        with pytest.raises(KeyboardInterrupt):
            fits.fit("first")
    kept = fits.kept(1)
    pipeline, _ = fits.fit("second")
    frames = set(range(len(fits.archive)))
    assert len(kept) in (2, 3, 4), "two shards"
    assert sorted(fits.read) == sorted([*(frames - kept), *frames])
    assert buffers_sha256(pipeline) == buffers_sha256(undisturbed)


class OwnRX(RXGlobal):
    """A class that nobody has described: it is streamed."""

    def statistical_initialization(self, input_stream):
        super().statistical_initialization(input_stream)


def streamed():
    data, rx, pipeline = CU3SDataNode(), OwnRX(5), CuvisPipeline("streamed")
    pipeline.connect((data.outputs.cube, rx.inputs.data))
    return pipeline


@pytest.mark.usefixtures("ray_session")
def test_a_streamed_node_is_kept_when_it_is_fitted(tmp_path):
    scaling = Scaling(resources={"workers": 2}, measuring={"shard_frames": 4})
    hashes, readings = [], []
    for _ in range(2):
        pipeline = streamed()
        trainer = StatisticalTrainer(
            pipeline, FragileModule(tmp_path), scaling=scaling, output_dir=tmp_path / "results"
        )
        trainer.fit(resume=True)
        hashes.append(buffers_sha256(pipeline))
        readings.append(len((tmp_path / "read.log").read_text().split()))
    assert readings == [12, 12]
    assert hashes[0] == hashes[1]
    (record,) = trainer.records
    assert (record.restored_shards, record.restored_frames) == (3, 12)


def test_a_damaged_or_foreign_file_is_ignored(tmp_path, warnings):
    KeptPass(OutputFolder(tmp_path), 1, "mine", 5).save({"done": 3})
    path = tmp_path / PASSES / "1.state"
    assert KeptPass(OutputFolder(tmp_path), 1, "mine", 5).earlier == {"done": 3}
    assert warnings == []

    assert KeptPass(OutputFolder(tmp_path), 1, "another", 5).earlier is None
    assert "belongs to another pipeline" in warnings[-1]
    whole = path.read_bytes()
    for damaged in (whole[:-7], whole[:10], b"", b"something else " * 20):
        path.write_bytes(damaged)
        assert KeptPass(OutputFolder(tmp_path), 1, "mine", 5).earlier is None
        assert "it is damaged" in warnings[-1]
    assert [p.name for p in path.parent.iterdir()] == ["1.state"], "nothing temporary is left"


def test_writing_is_rare_and_its_failure_no_end(tmp_path, warnings):
    stored = KeptPass(OutputFolder(tmp_path), 1, "mine", every=60)
    stored.save_if_due(dict)
    assert not any(tmp_path.iterdir())

    blocked = tmp_path / "file"
    blocked.touch()
    KeptPass(OutputFolder(blocked), 1, "mine", 0).save({"done": 3})
    assert "cannot be written" in warnings[-1]


def chain(low=None):
    """Normalizer and RX; the former fitted on a range, where one is given."""
    data, normalizer, rx = CU3SDataNode(), MinMaxNormalizer(), RXGlobal(5)
    pipeline = CuvisPipeline("chain")
    pipeline.connect(
        (data.outputs.cube, normalizer.inputs.data),
        (normalizer.outputs.normalized, rx.inputs.data),
    )
    if low is not None:
        cube = torch.linspace(low, 1, 60).reshape(1, 3, 4, 5)
        normalizer.statistical_initialization(iter([{"data": cube}]))
    return pipeline


class Fewer(FragileCubes):
    def __init__(self, frames):
        self.frames = frames

    def __len__(self):
        return self.frames


def test_the_identity_of_a_pass_is_what_its_partials_depend_on(tmp_path):
    def identity(low=None, frames=12, number=0, **scaling):
        pipeline = chain(low)
        archive = open_archive(FragileModule(tmp_path, cubes=Fewer(frames)), "train")
        this_pass = make_plan(pipeline, fold=False)[number]
        return identify(pipeline, archive, this_pass, scaling_of(fold=False, **scaling))

    mine = identity()
    assert identity() == mine
    assert identity(workers=7, cpus_per_worker=2) == mine
    assert identity(shard_frames=5) != mine
    assert identity(pixels="finite") != mine
    assert identity(later_levels="sampled") != mine
    assert identity(frames=11) != mine
    assert identity(low=0.1) == mine
    behind = identity(low=0.1, number=1)  # RX, behind a fitted normalizer
    assert identity(low=0.1, number=1) == behind != mine
    assert identity(low=0.2, number=1) != behind, "the node before is in another state"
