"""Every statistical node of the installed cuvis-ai: is it known, and fitted as upstream fits it?"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import reduce

import cuvis_ai.node
import pytest
import torch
from archives import real_scene, relative_difference, statistical_trainrun
from cuvis_ai_core.node import Node
from cuvis_ai_core.training import StatisticalTrainer as UpstreamStatisticalTrainer

from cuvis_dist import Scaling, StatisticalTrainer
from cuvis_dist.archive import open_archive
from cuvis_dist.nodes.catalogue import is_known, recipe_for
from cuvis_dist.nodes.probing import digest
from cuvis_dist.nodes.written import Unwritten, read_all
from cuvis_dist.plain import from_bytes, to_bytes
from cuvis_dist.statistics import PixelSample


def catalog():
    """Every public node class of cuvis-ai that defines or inherits a statistical fit."""
    classes = set()
    for module in pkgutil.walk_packages(cuvis_ai.node.__path__, "cuvis_ai.node."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if (
                inspect.isclass(value)
                and issubclass(value, Node)
                and value.__module__.startswith("cuvis_ai.")
                and not name.startswith("_")
                and value.statistical_initialization is not Node.statistical_initialization
            ):
                classes.add(value)
    return sorted(classes, key=lambda cls: cls.__name__)


def test_the_catalog_is_found():
    assert len(catalog()) >= 40


@pytest.mark.parametrize("node_class", catalog(), ids=lambda cls: cls.__name__)
def test_a_statistical_node_is_known(node_class):
    assert is_known(node_class), (
        f"{node_class.__name__} is new or fits itself in a new way: give it an entry, with a "
        "recipe or the decision that it is streamed, in cuvis_dist/nodes/catalogue.py"
    )


def test_a_node_that_nobody_decided_about_is_not_known():
    class New(Node):
        def statistical_initialization(self, input_stream):
            pass

        def forward(self):
            return {}

    assert not is_known(New)


# ---- each class against upstream's own fit ---------------------------------------------

SAMPLED = {"GaussianMixtureClusterer", "KMeansClusterer", "NMFUnmixing", "OneClassSVMDetector"}
#: No node of a pipeline: a base class, and a projection that is loaded and not fitted.
NOT_FITTED = {"ChannelSelectorBase", "SupervisedSelectorBase", "FixedPCAProjection"}


def settings_of(node_class, channels):
    """Settings under which a node of the class asks for a fit."""
    names = inspect.signature(node_class.__init__).parameters
    sizes = ("num_channels", "input_channels", "n_channels", "num_spectral_bands", "rep_dim")
    hparams = {name: channels for name in sizes if name in names}
    hparams |= {
        name: 3 for name in ("n_components", "n_select", "output_channels") if name in names
    }
    hparams |= {name: 2 for name in ("n_clusters", "n_endmembers") if name in names}
    hparams |= {"LearnableChannelMixer": {"init_method": "pca"}}.get(node_class.__name__, {})
    hparams |= {"SoftChannelSelector": {"init_method": "variance"}}.get(node_class.__name__, {})
    if node_class.__name__ == "GaussianMixtureClusterer":
        hparams["reg_covar"] = 1e-6 if channels == 12 else 1e6  # few pixels of large values
    if "wavelengths" in node_class.INPUT_SPECS or "norm_mode" in names:
        hparams["norm_mode"] = "statistical"
    if node_class.__name__.startswith("Supervised"):
        hparams["num_spectral_bands"] = channels
    return hparams


def every_node(folder, universe, channels, **changes):
    """A trainrun with one node of each class, side by side behind the data."""
    nodes = [("data", "data.AnomalyDataNode", {"normal_class_ids": [0]})]
    edges = []
    for cls in catalog():
        name = cls.__name__
        if name in NOT_FITTED:
            continue
        hparams = settings_of(cls, channels) | (changes if name in SAMPLED else {})
        nodes.append((name, f"{cls.__module__.removeprefix('cuvis_ai.node.')}.{name}", hparams))
        for port in cls.INPUT_SPECS:
            if port == "scores":
                edges.append(("RXGlobal.outputs.scores", f"{name}.inputs.{port}"))
            elif port != "mask" or name.startswith("Supervised"):
                source = "cube" if port in ("data", "embeddings") else port
                edges.append((f"data.outputs.{source}", f"{name}.inputs.{port}"))
    pooled = {"n_channels": channels, "norm_mode": "statistical", "statistical_fit": "pooled"}
    for name, more in (("pooled", {}), ("pooled_inverted", {"invert": True, "fit_subsample": 1})):
        nodes.append((name, "normalization.PercentileNormalizer", pooled | more))
        edges.append(("data.outputs.cube", f"{name}.inputs.data"))
    return statistical_trainrun(folder, universe, nodes, edges)


@pytest.fixture(params=["demo", pytest.param("lhdata", marks=pytest.mark.long)])
def archive(request, demo_trainrun, tmp_path):
    """``(universe, channels)`` of the demo archive and of a real scene."""
    if request.param == "demo":
        return demo_trainrun.parent / "archive" / "universe.csv", 12
    return real_scene("lhdata", tmp_path / "archive", frames=3), 186


def force(trainrun):
    """Let classes that never ask for their fit, since they render their own output, ask too."""
    for node in trainrun.pipeline.nodes():
        if type(node).__name__ not in (*NOT_FITTED, "AnomalyDataNode"):
            node._requires_initial_fit_override = True
    return trainrun


@pytest.mark.slow
def test_every_class_is_fitted_as_upstream_fits_it(archive, tmp_path, ray_session):
    """Exact ones to 1e-6; streamed ones and samples of the whole archive bit for bit."""
    # A sample is all of the demo's pixels, so that upstream's own fit sees the same ones.
    size = 20_000 if archive[1] == 12 else 24
    theirs = force(every_node(tmp_path, *archive, max_fit_pixels=size))
    module = theirs.datamodule()
    module.train_dataloader = module.val_dataloader  # upstream shuffles; compare in order
    parameters = [name for name, _ in theirs.pipeline.named_parameters()]
    UpstreamStatisticalTrainer(theirs.pipeline, module).fit()
    now = [name for name, _ in theirs.pipeline.named_parameters()]
    assert now == parameters, "check_trainable counts on it"
    ours = force(every_node(tmp_path, *archive, max_fit_pixels=size))
    trainer = StatisticalTrainer(
        ours.pipeline,
        ours.datamodule(),
        scaling=Scaling(resources={"workers": 3}, measuring={"shard_frames": 2, "fold": False}),
    )
    trainer.fit()
    fitted = {name for record in trainer.records for name in record.nodes}
    assert {type(node).__name__ for node in ours.pipeline.nodes() if node.name in fitted} == {
        cls.__name__ for cls in catalog()
    } - NOT_FITTED
    frames = list(ours.datamodule().val_dataloader())
    for mine, other in zip(ours.pipeline.nodes(), theirs.pipeline.nodes(), strict=True):
        recipe = recipe_for(mine) if mine.name in fitted else None
        sampled = recipe is not None and recipe.statistic is PixelSample
        if sampled and mine.name in SAMPLED and size == 24:
            other = fitted_on_sample(mine, recipe, frames, trainer)
        for name, value in other.state_dict().items():
            difference = relative_difference(mine.state_dict()[name], value)
            exact = recipe is not None and not sampled
            assert difference <= (1e-6 if exact else 0), (mine.name, name, difference)


@pytest.mark.slow
def test_the_state_of_every_class_can_be_kept(demo_trainrun, tmp_path):
    """So that a run that is typed again does not fit it again."""
    universe = demo_trainrun.parent / "archive" / "universe.csv"
    fitted, fresh = (force(every_node(tmp_path, universe, 12, max_fit_pixels=50)) for _ in range(2))
    before = Unwritten(fitted.pipeline.nodes())
    UpstreamStatisticalTrainer(fitted.pipeline, fitted.datamodule()).fit()
    states = before.write_all(fitted.pipeline.nodes())
    read_all(fresh.pipeline.nodes(), from_bytes(to_bytes(states)))
    for mine, other in zip(fresh.pipeline.nodes(), fitted.pipeline.nodes(), strict=True):
        assert digest(mine) == digest(other), mine.name


def fitted_on_sample(node, recipe, batches, trainer):
    """A fresh node of the same settings, fitted by itself on the sample drawn here."""
    archive = open_archive(trainer.datamodule, "train")
    parts = []
    for position, batch in enumerate(batches):
        inputs = {port: batch[port] for port in node.INPUT_SPECS}
        counts = recipe.counts(node, inputs)
        pixels = recipe.pixels(node, inputs)
        index = torch.arange(len(pixels)) if counts is None else counts.nonzero().flatten()
        where = {"uid": archive.frames[position].uid, "position": position, "index": index}
        parts.append(PixelSample.measure(pixels[index], **recipe.options, **where))
    sample = reduce(PixelSample.merge, parts)
    assert len(sample.rank) == sample.size < sample.n
    fresh = type(node)(**{k: v for k, v in node.hparams.items() if k != "name"})
    fresh.statistical_initialization(iter([{"cube": sample.surrogate().float()[None, :, None]}]))
    return fresh
