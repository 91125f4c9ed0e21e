"""Does the gradient trainer on Ray train joint nodes as upstream's trainer does in one process?"""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
from cases import CASES
from cuvis_ai_core.training import GradientTrainer as UpstreamGradientTrainer
from cuvis_ai_core.training.config import TrainingConfig
from gradients import Epochs
from settings import scaling_of
from steps import Trained, deviations, frames, state_of
from torch.utils.data import DataLoader, Dataset

from cuvis_dist import GradientTrainer

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.slow]


class Frames(Dataset):
    def __init__(self, start, stop):
        self.start, self.stop = start, stop

    def __len__(self):
        return self.stop - self.start

    def __getitem__(self, index):
        return {name: value[self.start + index] for name, value in frames(12).items()}


class Module(pl.LightningDataModule):
    """7 shuffled train frames, 5 of each other split, in batches that do not divide."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def train_dataloader(self):
        return DataLoader(Frames(0, 7), self.size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(Frames(7, 12), 2)

    def test_dataloader(self):
        return DataLoader(Frames(5, 10), 2)


def trained(name, trainer_class, folder, size, **options):
    """State before and after, and the values that callbacks could monitor."""
    pl.seed_everything(3)
    pipeline, losses = CASES[name]()
    before = state_of(pipeline)
    config = TrainingConfig(
        seed=5,
        max_epochs=2,
        optimizer={"name": "sgd", "lr": 0.02},
        default_root_dir=str(folder),
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
    )
    epochs = Epochs()
    trainer = trainer_class(
        pipeline, Module(size), losses, training_config=config, callbacks=[epochs], **options
    )
    trainer.fit()
    return Trained(before, state_of(pipeline), epochs.values)


#: Without biases that have no gradient; of the others one is enough.
TRAINED = {
    "dice-3": 2,
    "svdd": 2,
    "unknown-Memory": 3,
    "concrete": 2,
    "running_percentiles-2-4": 2,
    "unknown_in_the_middle": 2,
    "unknown-Noise": 2,
    "patches": 3,
    "contrast-0.0-rgb": 2,
}
ALWAYS = {"unknown-Memory"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ALWAYS else pytest.mark.long) for n in TRAINED]
)
def test_joint_nodes_train_as_in_one_process(tmp_path, name):
    size = 2 if TRAINED[name] == 3 else 4
    theirs = trained(name, UpstreamGradientTrainer, tmp_path / "one", size)
    ours = trained(
        name,
        GradientTrainer,
        tmp_path / "many",
        size,
        scaling=scaling_of(train_workers=TRAINED[name]),
        output_dir=tmp_path / "many",
    )
    for mine, other in zip(ours.losses, theirs.losses, strict=True):
        assert mine == pytest.approx(other, rel=1e-5, nan_ok=True)
    assert not {k: v for k, v in deviations(ours, theirs, 1e-3).items() if v > 1e-5}
