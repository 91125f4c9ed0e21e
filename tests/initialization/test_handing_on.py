"""Nodes that change with every frame end a fit in the state in which upstream leaves them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from archives import assert_same_state, buffers_sha256, relative_difference, statistical_trainrun
from cases import IMAGE, Memory, Noise, Refiner
from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.channel_mixer import LearnableChannelMixer
from cuvis_ai.node.conversion import ScoreToLogit
from cuvis_ai.node.data import AnomalyDataNode
from cuvis_ai.node.dimensionality_reduction import TrainablePCA
from cuvis_ai.node.normalization import MinMaxNormalizer, PercentileNormalizer, SigmoidTransform
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training import StatisticalTrainer as UpstreamStatisticalTrainer
from readings import CountedCubes, counted
from settings import scaling_of
from steps import BANDS, FRAMES, frames
from torch.utils.data import DataLoader, Dataset

from cuvis_dist import StatisticalTrainer
from cuvis_dist.cli import main
from cuvis_dist.errors import DataError
from cuvis_dist.initialization.plan import make_plan

pytestmark = pytest.mark.usefixtures("ray_session")


class Frames(Dataset):
    """Seven frames; one may be damaged, and one of another size."""

    def __init__(self, damaged: int | None = None, wide: int | None = None) -> None:
        self.damaged, self.wide = damaged, wide
        self.content = {name: value.numpy() for name, value in frames().items()}

    def __len__(self):
        return FRAMES

    def __getitem__(self, index):
        if index == self.damaged:
            raise ValueError("damaged")
        item = {name: value[index] for name, value in self.content.items()}
        return item | {"cube": np.tile(item["cube"], (1, 1 + (index == self.wide), 1))}


class Module(pl.LightningDataModule):
    """Serves some frames as its train split, in order."""

    def __init__(self, batch_size: int, dataset: Dataset | None = None) -> None:
        super().__init__()
        self.batch_size, self.dataset = batch_size, dataset or Frames()

    def train_dataloader(self):
        return DataLoader(self.dataset, batch_size=self.batch_size)


class Batches(Node):
    """A statistical node that nobody described: it notes how many frames it is given at a time."""

    INPUT_SPECS, OUTPUT_SPECS = {"data": IMAGE}, {"out": IMAGE}

    def __init__(self, **options):
        super().__init__(**options)
        self.lengths = []

    def statistical_initialization(self, input_stream):
        self.lengths = [len(batch["data"]) for batch in input_stream]
        self._statistically_initialized = True

    def forward(self, data, **_):
        return {"out": data}


class Spread(Batches):
    """A plain node that nobody described, and that does not change."""

    statistical_initialization = Node.statistical_initialization


# ---- pipelines with nodes that change with every frame ---------------------------------


def chain(*nodes):
    """Feed each node's first output to the next one's first input, from the data on."""
    return branches(nodes)


def branches(*chains):
    source, pipeline = AnomalyDataNode(normal_class_ids=[0], name="data"), CuvisPipeline("chain")
    for nodes in chains:
        previous, output = source, "cube"
        for node in nodes:
            pair = previous._output_ports[output], node._input_ports[next(iter(node.INPUT_SPECS))]
            if previous not in pipeline.nodes() or node not in pipeline.nodes():
                pipeline.connect(pair)
            previous, output = node, next(iter(node.OUTPUT_SPECS))
    return pipeline


def rx(channels=BANDS, name="rx"):
    return RXGlobal(channels, name=name)


def running():
    return PercentileNormalizer(BANDS, running_warmup_frames=2, name="running")


def two_behind_one():
    memory = Memory(name="memory")
    return branches((memory, MinMaxNormalizer(name="range")), (memory, rx(), ScoreToLogit()))


def several():
    """Known and unknown ones, before and behind fitted nodes."""
    first, memory = running(), Memory(name="memory")
    return branches(
        (first, MinMaxNormalizer(name="range"), memory, rx()),
        (first, TrainablePCA(num_channels=BANDS, n_components=3, name="pca")),
        (Refiner(name="refiner"), SigmoidTransform(), rx(name="refined"), ScoreToLogit()),
    )


PIPELINES = {
    "running": lambda: chain(running(), rx()),
    "mixer": lambda: chain(LearnableChannelMixer(BANDS, 3, name="mixer"), rx(3)),
    "fitted mixer": lambda: chain(
        LearnableChannelMixer(BANDS, 3, init_method="pca", name="mixer"), rx(3), ScoreToLogit()
    ),
    "list": lambda: chain(Memory(name="memory"), rx()),
    "list behind a fitted one": lambda: chain(
        MinMaxNormalizer(name="range"), Memory(name="memory"), rx(), ScoreToLogit()
    ),
    "batch norms": lambda: chain(Refiner(name="refiner"), SigmoidTransform(), rx()),
    "noise": lambda: chain(Noise(name="noise"), rx(), ScoreToLogit()),
    "two behind one": two_behind_one,
    "several": several,
}


def fitted(pipeline, module, **settings):
    torch.manual_seed(5)
    output = {key: settings.pop(key) for key in ("output_dir",) if key in settings}
    trainer = StatisticalTrainer(
        pipeline, module, scaling=scaling_of(shard_frames=2, **settings), **output
    )
    trainer.fit(resume=bool(output))
    return trainer


def fitted_upstream(pipeline, module):
    """Fit in one process, with one thread as a worker has, so that sums round alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(5)
    try:
        with torch.no_grad():  # what is fitted on gradients cannot be copied
            UpstreamStatisticalTrainer(pipeline, module).fit()
    finally:
        torch.set_num_threads(threads)
    return pipeline


def attributes(pipeline):
    return {node.name: node.seen for node in pipeline.nodes() if isinstance(node, Memory)}


def scores(pipeline):
    """What the last nodes give for new frames, in evaluation mode."""
    pipeline = copy.deepcopy(pipeline)
    for module in pipeline.torch_layers:
        module.eval()
    torch.manual_seed(8)
    with torch.no_grad():
        return pipeline.forward(batch=frames(3))


def assert_alike(ours, theirs):
    assert_same_state(ours, theirs, 1e-5)
    assert attributes(ours) == {
        name: pytest.approx(seen, rel=1e-5) for name, seen in attributes(theirs).items()
    }
    found, expected = scores(ours), scores(theirs)
    assert found.keys() == expected.keys()
    for port, value in expected.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert relative_difference(found[port], value) <= 1e-5, port


#: Those that CI runs, with batches of several frames.
OFTEN = {"running", "list", "two behind one"}


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [
        pytest.param(name, size, marks=() if size > 1 and name in OFTEN else pytest.mark.long)
        for name in PIPELINES
        for size in (1, 3)
    ],
)
def test_state_and_scores_are_upstreams(name, batch_size):
    torch.manual_seed(3)
    start = PIPELINES[name]()
    theirs = fitted_upstream(copy.deepcopy(start), Module(batch_size))
    bits = set()
    for workers in (0, 2):
        ours = copy.deepcopy(start)
        fitted(ours, Module(batch_size), workers=workers)
        assert_alike(ours, theirs)
        bits.add(buffers_sha256(ours))
    assert len(bits) == 1


def test_a_resumed_fit_hands_the_same_state_on(tmp_path):
    start = several()
    module = Module(3, CountedCubes(Frames(), tmp_path / "read.log"))
    first, second = copy.deepcopy(start), copy.deepcopy(start)
    fitted(first, module, workers=2, output_dir=tmp_path / "results")
    read = counted(tmp_path / "read.log")
    trainer = fitted(second, module, workers=1, output_dir=tmp_path / "results")
    assert buffers_sha256(first) == buffers_sha256(second)
    assert attributes(first) == attributes(second)
    assert trainer.records[-1].restored_frames == FRAMES
    tried = counted(tmp_path / "read.log") - read
    assert max(tried.values()) <= 3, "only what found nodes out may be read again"


def test_a_turn_to_in_order_is_one_line_of_the_log(said):
    fitted(two_behind_one(), Module(3), workers=2)
    lines = [line for line in said if "memory" in line]
    behind = "fitting range, rx, ScoreToLogit in order"
    assert lines == [f"memory changes with every frame: {behind}"]
    assert not [line for line in said if "Traceback" in line or "\n" in line]


@pytest.mark.parametrize("unknown", [False, True])
def test_nodes_that_stay_the_same_cost_no_reading(tmp_path, unknown):
    """Described ones are believed, and others tried on a frame that is there anyway."""
    module = Module(3, CountedCubes(Frames(), tmp_path / "read.log"))
    pipeline = chain(*([Spread()] if unknown else []), MinMaxNormalizer(name="range"), rx())
    fitted(pipeline, module, workers=2, fold=False)
    assert counted(tmp_path / "read.log") == dict.fromkeys(range(FRAMES), 2)


# ---- batches ---------------------------------------------------------------------------


def test_a_streamed_node_gets_the_modules_batches(tmp_path):
    for before in ([], [running()]):
        node = Batches(name="batches")
        pipeline = chain(*before, node)
        fitted(pipeline, Module(3), workers=2)
        assert node.lengths == [3, 3, 1]
        fitted(pipeline, Module(3, Frames(damaged=4)), workers=2, on_error="skip")
        assert node.lengths == [3, 2, 1]


def test_a_bad_frame_of_a_batch_is_named():
    with pytest.raises(DataError, match="cannot read frame data#4"):
        fitted(chain(Batches()), Module(3, Frames(damaged=4)), workers=2)


def test_frames_of_unlike_sizes_that_meet_in_a_batch_are_named():
    module = Module(3, Frames(wide=4))
    with pytest.raises(DataError, match=r"frame data#3, frame data#4, frame data#5.*batch_size: 1"):
        fitted(chain(Batches()), module, workers=2)
    module.batch_size = 1
    node = Batches()
    fitted(chain(node), module, workers=2)
    assert node.lengths == [1] * FRAMES


# ---- the plan --------------------------------------------------------------------------


def test_the_plan_keeps_upstreams_order_among_those_in_order():
    first, late = running(), rx(name="late")
    pipeline = branches((MinMaxNormalizer(name="range"), late), (first, rx(name="soon")))
    plan = make_plan(pipeline)
    assert [[node.name for node in step.nodes] for step in plan] == [["range", "late"], ["soon"]]
    assert [step.after for step in plan] == [(), ("running",)]
    plan = make_plan(pipeline, found=["data"])
    assert [step.after for step in plan] == [("data",), ("data",), ("data", "running")]
    named = {node.name: node for node in pipeline.nodes()}
    (left,) = make_plan(pipeline, fitted=[named["range"], named["late"]])
    assert left.streamed is named["soon"]


def test_plan_says_what_is_fitted_in_order_and_on_which_batches(demo_trainrun, tmp_path, capsys):
    nodes = [
        ("data", "data.LentilsAnomalyDataNode", {"normal_class_ids": [0]}),
        ("running", "normalization.PercentileNormalizer", {"n_channels": 12}),
        ("rx", "anomaly.rx_detector.RXGlobal", {"num_channels": 12}),
    ]
    edges = [
        ("data.outputs.cube", "running.inputs.data"),
        ("running.outputs.normalized", "rx.inputs.data"),
    ]
    universe = demo_trainrun.parent / "archive" / "universe.csv"
    statistical_trainrun(tmp_path, universe, nodes, edges, batch_size=3)
    assert main(["plan", str(tmp_path / "trainrun.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "fits rx by streaming its inputs, in order: running changes with every frame" in printed
    shuffled = "rx: batches of 3 frames in canonical order (upstream would shuffle them)"
    assert shuffled in printed


def bounds_of_batches(demo_trainrun, folder, size):
    """A trainrun whose percentile bounds upstream takes of batches of so many frames."""
    bounds = {"n_channels": 12, "norm_mode": "statistical"}
    nodes = [
        ("data", "data.LentilsAnomalyDataNode", {"normal_class_ids": [0]}),
        ("bounds", "normalization.PercentileNormalizer", bounds),
    ]
    edges = [("data.outputs.cube", "bounds.inputs.data")]
    universe = demo_trainrun.parent / "archive" / "universe.csv"
    return statistical_trainrun(folder, universe, nodes, edges, batch_size=size)


def test_a_fit_says_that_bounds_are_those_of_frames(demo_trainrun, tmp_path, warnings):
    for size in (1, 3):
        trainrun = bounds_of_batches(demo_trainrun, tmp_path, size)
        scaling = scaling_of(workers=0)
        StatisticalTrainer(trainrun.pipeline, trainrun.datamodule(), scaling=scaling).fit()
        said = [line for line in warnings if "bounds: fitted frame by frame" in line]
        assert len(said) == (size > 1)


def test_a_plan_says_that_bounds_are_those_of_frames(demo_trainrun, tmp_path, capsys):
    bounds_of_batches(demo_trainrun, tmp_path, 3)
    assert main(["plan", str(tmp_path / "trainrun.yaml")]) == 0
    line = "bounds: frame by frame (upstream: batches of 3 frames)"
    assert line in capsys.readouterr().out
