"""A training that cannot take its first step is refused before phase 1; no other one is."""

from __future__ import annotations

import pytest
import torch
from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai_core.node.node import Node

from cuvis_dist.cli import main
from cuvis_dist.errors import InputError
from cuvis_dist.runs.trainrun import load_trainrun


def load(path, **changes):
    return load_trainrun(path, [f"{key}=[{','.join(names)}]" for key, names in changes.items()])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unfreeze_nodes": []}, "nothing to train: unfreeze_nodes (none) leaves no parameter"),
        ({"unfreeze_nodes": ["decider"]}, "It can name logit_head, normalizer, rx_detector, sel"),
        ({"loss_nodes": ["decider"]}, "names decider, which is no loss: its output decisions is n"),
        ({"loss_nodes": ["bce", "metrics_anomaly"]}, "metrics_anomaly, which is no loss: its out"),
    ],
)
def test_what_surely_fails_is_refused(changes, words, demo_trainrun):
    run = load(demo_trainrun, **changes)
    before = [(name, p.requires_grad) for name, p in run.pipeline.named_parameters()]
    with pytest.raises(InputError, match=str(demo_trainrun)) as caught:
        run.check_trainable()
    assert words in str(caught.value)
    assert [(name, p.requires_grad) for name, p in run.pipeline.named_parameters()] == before


def test_a_dry_run_and_a_run_say_so_before_anything_is_read(demo_trainrun, tmp_path, capsys):
    for more in (["--dry-run"], ["--output-dir", str(tmp_path)]):
        assert main(["run", str(demo_trainrun), "--override", "unfreeze_nodes=[]", *more]) == 2
        assert "nothing to train" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["selector", "rx_detector", "logit_head", "normalizer"])
def test_one_node_that_the_loss_depends_on_is_enough(name, demo_trainrun):
    load(demo_trainrun, unfreeze_nodes=[name]).check_trainable()


def test_a_class_that_makes_its_parameters_when_it_is_fitted_is_accepted(demo_trainrun):
    class Grows(RXGlobal):
        TRAINABLE_BUFFERS = ()

        def statistical_initialization(self, input_stream):
            super().statistical_initialization(input_stream)
            self.weight = torch.nn.Parameter(self.mu.clone())

    run = load(demo_trainrun, unfreeze_nodes=[])
    node = next(node for node in run.pipeline.nodes() if node.name == "rx_detector")
    node.__class__ = Grows
    run.check_trainable()


def test_an_unfreeze_of_its_own_is_asked(demo_trainrun):
    class Never(RXGlobal):
        def unfreeze(self):
            pass

    class NeedsItsFit(RXGlobal):
        def unfreeze(self):
            raise RuntimeError("not fitted")

    run = load(demo_trainrun, unfreeze_nodes=["rx_detector"])
    node: Node = next(node for node in run.pipeline.nodes() if node.name == "rx_detector")
    node.__class__ = NeedsItsFit
    run.check_trainable()
    node.__class__ = Never
    with pytest.raises(InputError, match="nothing to train"):
        run.check_trainable()


def test_a_metric_node_without_metrics_is_told_and_cannot_be_monitored(demo_trainrun, capsys):
    command = ["run", str(demo_trainrun), "--dry-run", "--override", "metric_nodes=[decider]"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "names decider, which has no output called metrics" in said
    assert "training.callbacks.checkpoint.monitor is 'metrics_anomaly/iou'" in said
