"""How does a test fit a trainrun several times, and learn which frames each fit has read?"""

from __future__ import annotations

from archives import buffers_sha256
from readings import CountedCubes, counted, wrap_train
from settings import scaling_of

from cuvis_dist import StatisticalTrainer
from cuvis_dist.runs.trainrun import load_trainrun


class Fits:
    """Fits of one trainrun, of which each knows which frames it has read.

    Attributes
    ----------
    read : list of int
        The frames that the last fit has read in its first pass.
    every : list of str
        Each reading of the last fit.
    records : list of PassRecord
        What the passes did.
    later : int
        How many passes came behind the first one.
    first : PassRecord
        What its first pass did.
    """

    def __init__(self, trainrun, folder, wrapper=lambda dataset: dataset, pipeline=None):
        self.trainrun, self.folder, self.wrapper = trainrun, folder, wrapper
        self.make, self.number = pipeline, 0

    def __call__(self, without=(), emit=None, once=True, **settings):
        """Fit; return the hash of all buffers. ``once``: no pass reads a frame twice."""
        self.number += 1
        log = self.folder / f"{self.number}.log"
        run = load_trainrun(self.trainrun, without=without)
        pipeline, module = self.make() if self.make else run.pipeline, run.datamodule()
        wrap_train(module, lambda d: CountedCubes(self.wrapper(d), log=log))
        scaling = scaling_of(**{"workers": 0, "save_seconds": 0} | settings)
        trainer = StatisticalTrainer(pipeline, module, emit=emit, scaling=scaling)
        try:
            trainer.fit()
        finally:
            self.every = log.read_text().split()
            self.read = sorted({int(n) for n in self.every})
        self.records, self.first = trainer.records, trainer.records[0]
        self.later = len(trainer.records) - 1
        later = sum(record.frames for record in trainer.records[1:])
        read = self.first.frames - (self.first.from_store or 0) + len(self.first.skipped)
        assert not once or len(self.every) == later + read
        if later:  # the frames that the first pass has read are those that were read more often
            often = counted(log)
            self.read = sorted(n for n in often if often[n] == len(trainer.records))
        return buffers_sha256(pipeline)
