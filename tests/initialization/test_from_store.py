"""A fit from a store has the bits of one that reads, and reads what the store lacks. No Ray."""

from __future__ import annotations

import functools
import os

import numpy as np
import pytest
import torch
from archives import edit, real_scene, statistical_trainrun
from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.data import CU3SDataNode
from cuvis_ai.node.normalization import MinMaxNormalizer
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.post_fit import TrainHook
from fits import Fits
from node_rows import NODES
from readings import Wrapped

from cuvis_dist import Scaling, load_trainrun
from cuvis_dist.errors import DataError
from cuvis_dist.execution.local import LocalEngine, as_worker
from cuvis_dist.initialization.shards import MeasureFrames
from cuvis_dist.nodes.catalogue import CATALOGUE, recipe_for
from cuvis_dist.runs.measure import look
from cuvis_dist.statistics import ExactMoments
from cuvis_dist.store import Store


class Integers(Wrapped):
    """Cubes of whole numbers, as a sensor gives them."""

    def __getitem__(self, index):
        item = self.dataset[index]
        cube = np.round(np.asarray(item["cube"]) * 10_000).astype(np.uint16)
        return item | {"cube": torch.from_numpy(cube)}


@pytest.fixture(params=["reflectances", "whole numbers"])
def fits(request, demo, tmp_path):
    wrapper = Integers if request.param == "whole numbers" else lambda dataset: dataset
    return Fits(demo, tmp_path, wrapper)


@pytest.mark.kernels
@pytest.mark.parametrize(
    "settings",
    [
        {"shard_frames": 1},
        {"shard_frames": 3},
        {"later_levels": "sampled", "shard_frames": 1},
        {"later_levels": "sampled", "shard_frames": 3, "sample_pixels": 1024},
    ],
    ids=str,
)
def test_the_bits_are_those_of_a_fit_that_reads(fits, tmp_path, settings):
    stored = settings | {"store": str(tmp_path / "store")}
    some, every = fits(without=["*_01*"], **settings), fits(**settings)
    frames = fits.first.frames
    assert fits.first.from_store is None
    # An empty store, a half full one, a full one; then a recording is taken out of it.
    assert fits(without=["*_01*"], **stored) == some
    few = fits.first.frames
    assert fits.first.from_store == 0
    assert fits(**stored) == every
    assert (fits.first.from_store, len(fits.read)) == (few, frames - few)
    assert fits(**stored) == every
    assert (fits.first.from_store, fits.read) == (frames, [])
    assert fits(without=["*_01*"], **stored) == some
    assert (fits.first.from_store, fits.read) == (few, [])


def test_what_belongs_to_frames_as_wholes_is_one_object_for_all_of_a_shard(demo, tmp_path):
    """So that it is pickled, and written, once; and it is what each frame has."""
    run, scaling = load_trainrun(demo), Scaling(measuring={"store": str(tmp_path / "store")})
    archive, _, stored = look(run, "train", scaling)
    (*_, shard) = archive.shards(4)
    with LocalEngine(cpus=1) as engine, as_worker(1):
        order = engine.make_order(run.pipeline, archive)
        measure = MeasureFrames(order, stored.this_pass.by_key(), scaling, stored.drawing)
        rows = measure(shard)
    kept = [row.payload[1].drawn.constants for row in rows]
    assert len(rows) == len(shard) > 1
    assert kept[0].keys() == {".wavelengths"}
    for number, constants in enumerate(kept, shard.start):
        assert constants[".wavelengths"] is kept[0][".wavelengths"]
        assert constants[".wavelengths"].equal(archive.read(number)["wavelengths"])


def test_whole_numbers_stay_exact_in_a_store(demo, tmp_path):
    fits = Fits(demo, tmp_path, Integers)
    fits(store=str(tmp_path / "store"))
    kinds = {file.kind for file in Store(tmp_path / "store").files()}
    assert ExactMoments.name in kinds
    assert {how["exact"] for how in fits.first.nodes.values()} == {True}


def test_few_pixels_serve_half_of_an_archive_and_of_less_it_is_read_again(
    demo, tmp_path, monkeypatch
):
    monkeypatch.setattr("cuvis_dist.initialization.stored._FEW_PIXELS", 1)
    fits = Fits(demo, tmp_path)
    settings = {"later_levels": "sampled", "sample_pixels": 1024}
    stored = settings | {"store": str(tmp_path / "store")}
    fits(**stored)
    for without, read_again in ((["*_01*"], False), (["*_01*", "*_02*"], True), ([], False)):
        state = fits(without=without, **stored)
        assert bool(fits.every) == read_again
        assert fits(without=without, **settings) == state


class Dark(Wrapped):
    """The first frame has no finite pixel."""

    def __getitem__(self, index):
        item = self.dataset[index]
        cube = np.asarray(item["cube"])
        return item | {"cube": torch.from_numpy(np.full_like(cube, np.nan) if not index else cube)}


def test_a_first_frame_of_which_no_pixel_counts(demo, tmp_path):
    fits, store = Fits(demo, tmp_path, Dark), str(tmp_path / "store")
    read = fits(pixels="finite")
    assert fits(pixels="finite", store=store) == read
    assert fits(pixels="finite", store=store) == read
    assert fits.first.from_store == fits.first.frames


def with_a_streamed_node():
    data, stream, behind, beside = (
        CU3SDataNode(name="data"),
        MinMaxNormalizer(max_initialization_frames=99, name="stream"),
        RXGlobal(12, name="behind"),
        RXGlobal(12, name="beside"),
    )
    pipeline = CuvisPipeline("p")
    pipeline.connect(
        (data.outputs.cube, stream.inputs.data),
        (stream.outputs.normalized, behind.inputs.data),
        (data.outputs.cube, beside.inputs.data),
    )
    return pipeline


def test_a_streamed_node_and_what_is_behind_it_are_read(demo, tmp_path):
    fits = Fits(demo, tmp_path, pipeline=with_a_streamed_node)
    read, store = fits(once=False), str(tmp_path / "store")
    frames = fits.first.frames
    for from_store in (0, frames):
        assert fits(once=False, store=store) == read
        assert {r.from_store for r in fits.records if "beside" in r.nodes} == {from_store}
        others = [r for r in fits.records if "beside" not in r.nodes]
        assert {r.from_store for r in others} == {None}
        assert {*map(str, range(frames))} == {*fits.every}


def test_a_frame_that_is_repeated_is_measured_once(demo, tmp_path):
    edit(demo, lambda run: run["data"]["params"].update(samples_per_frame=2))
    fits, store = Fits(demo, tmp_path), str(tmp_path / "store")
    read, frames = fits(), fits.first.frames
    for from_store, first in ((0, frames // 2), (frames, 0)):
        assert fits(once=False, store=store) == read
        assert len(fits.every) == first + fits.later * frames
        assert fits.first.from_store == from_store


class Tuned(Wrapped):
    """Each frame's bands lie elsewhere."""

    def __getitem__(self, index):
        item = self.dataset[index]
        return item | {"wavelengths": np.asarray(item["wavelengths"]) + index}


def test_what_is_kept_besides_changes_no_sample(demo, tmp_path):
    """A store keeps wavelengths for whoever asks; no node of the demo is fitted on them."""
    fits, store = Fits(demo, tmp_path, Tuned), str(tmp_path / "store")
    read = fits(later_levels="sampled")
    assert fits.later == 0
    assert fits(later_levels="sampled", store=store) == read
    assert fits.later == 0
    assert (fits(later_levels="sampled", store=store), fits.every) == (read, [])


@pytest.mark.parametrize("scene", ["lhdata"])
def test_a_real_scene_has_the_same_bits(scene, tmp_path):
    universe = real_scene(scene, tmp_path / "archive")
    nodes = [
        ("data", "data.CU3SDataNode", {}),
        ("normalizer", "normalization.MinMaxNormalizer", {"use_running_stats": True}),
        ("rx", "anomaly.rx_detector.RXGlobal", {"num_channels": 186}),
    ]
    edges = [
        ("data.outputs.cube", "normalizer.inputs.data"),
        ("normalizer.outputs.normalized", "rx.inputs.data"),
    ]
    run = statistical_trainrun(tmp_path, universe, nodes, edges)
    fits = Fits(run.path, tmp_path)
    read, store = fits(), str(tmp_path / "store")
    assert fits(store=store, sample_frames=2) != read
    assert (fits(store=store), len(fits.read)) == (read, fits.first.frames - 2)
    assert (fits(store=store), fits.read) == (read, [])


def catalogued():
    """A pipeline of a data node and each node of the catalogue that has a recipe, by name."""
    made = {name: (make, make()) for name, make in NODES.items()}
    return {
        name: make for name, (make, n) in made.items() if n.requires_initial_fit and recipe_for(n)
    }


def with_data(make):
    node, data, pipeline = make(), CU3SDataNode(name="data"), CuvisPipeline("p")
    wanted = {recipe_for(node).port: "cube", "wavelengths": "wavelengths"}
    pipeline.connect(
        *(
            (getattr(data.outputs, source), getattr(node.inputs, port))
            for port, source in wanted.items()
            if port in node.INPUT_SPECS
        )
    )
    return pipeline


@pytest.mark.parametrize("name", catalogued())
def test_every_statistic_of_the_catalogue_comes_back_from_a_store(name, demo_trainrun, tmp_path):
    torch.manual_seed(0)
    fits = Fits(demo_trainrun, tmp_path, pipeline=lambda: with_data(seeded))
    make = catalogued()[name]

    def seeded():
        torch.manual_seed(0)
        return make()

    read, store = fits(), str(tmp_path / "store")
    fits(store=store, sample_frames=3)
    assert fits(store=store) == read
    assert fits.first.from_store == 3
    assert (fits(store=store), fits.read) == (read, [])


def test_the_walk_has_every_statistic_that_recipes_name():
    found = {recipe_for(make()).statistic for make in catalogued().values()}
    stated = {
        facts.recipe.statistic for facts in CATALOGUE.values() if hasattr(facts.recipe, "port")
    }
    assert stated <= found


# ---- what a frame is known by ------------------------------------------------------------


def rewritten(demo, frame, factor):
    """Write a frame again, with other values; its size stays."""
    (path,) = (demo.parent / "archive").rglob(frame)
    content = dict(np.load(path))
    content["cube"] = content["cube"] * np.float32(factor)
    before = path.stat()
    np.savez(path, **content)
    return path, before


def test_a_frame_that_changed_under_the_same_name_is_measured_again(demo, tmp_path):
    fits, store = Fits(demo, tmp_path), str(tmp_path / "store")
    fits(store=store)
    frame = sorted((demo.parent / "archive").rglob("*.npz"))[0].name
    rewritten(demo, frame, 0.5)
    changed = fits(store=store)
    assert len(fits.read) == 1
    assert fits() == changed


def test_a_checksum_finds_what_size_and_time_do_not(demo, tmp_path):
    fits, store = Fits(demo, tmp_path), str(tmp_path / "store")
    fits = functools.partial(fits, later_levels="sampled")  # later levels would read it again
    first = fits(store=store, verify=True)
    frame = sorted((demo.parent / "archive").rglob("*.npz"))[0].name
    path, before = rewritten(demo, frame, 0.5)
    if path.stat().st_size != before.st_size:
        pytest.skip("the frame has another size")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (fits(store=store), fits.func.read) == (first, [])  # as documented
    changed = fits(store=store, verify=True)
    assert len(fits.func.read) == 1
    assert fits() == changed


def test_other_pixels_seeds_and_nodes_are_measured_apart(demo, tmp_path):
    fits, store = Fits(demo, tmp_path), str(tmp_path / "store")
    fits(store=store)
    assert (fits(store=store, pixels="unlabelled"), fits.first.from_store)[1] == 0
    assert fits(store=store, pixels="unlabelled") == fits(pixels="unlabelled")
    fits(store=store, sample_seed=1)
    assert fits.first.from_store == 0
    edit(demo.parent / "pipeline.yaml", lambda p: rename(p, "data", "camera"))
    fits(store=store)
    assert fits.first.from_store in (0, fits.first.frames)  # a sample knows nodes by name


def rename(pipeline, before, after):
    for node in pipeline["nodes"]:
        node["name"] = after if node["name"] == before else node["name"]
    for edge in pipeline["connections"]:
        for end in ("source", "target"):
            if edge[end].startswith(f"{before}."):
                edge[end] = after + edge[end][len(before) :]


def test_frames_without_files_are_measured_each_time(demo, tmp_path, caplog):
    """In memory, such as a data set that somebody made up."""
    fits = Fits(demo, tmp_path, Nameless)
    read = fits()
    assert fits(store=str(tmp_path / "store")) == read
    assert fits.first.from_store is None
    assert not (tmp_path / "store").exists()


class Nameless(Wrapped):
    """Frames of which nobody knows where they come from."""

    def __getattr__(self, name):
        if name in ("rows", "sample_sources", "_base"):
            raise AttributeError(name)
        return super().__getattr__(name)


# ---- what goes wrong ----------------------------------------------------------------------


def test_an_interrupted_pass_goes_on_from_the_store(demo, tmp_path):
    fits, store = Fits(demo, tmp_path), str(tmp_path / "store")

    def emit(event):
        if event.hook is TrainHook.STATISTICAL_PROGRESS and event.progress.done >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fits(store=store, emit=emit)
    read = fits()
    assert fits(store=store) == read
    assert fits.first.from_store >= 5


class Broken(Wrapped):
    """The fourth frame cannot be read."""

    def __getitem__(self, index):
        if index == 3:
            raise OSError("a bad sector")
        return self.dataset[index]


def test_a_frame_that_cannot_be_read_is_left_out_and_tried_again(demo, tmp_path):
    store = str(tmp_path / "store")
    fits = Fits(demo, tmp_path, Broken)
    with pytest.raises(DataError, match="bad sector"):
        fits(store=store)
    skipping = {"store": store, "on_error": "skip", "later_levels": "sampled"}
    left_out = fits(on_error="skip", later_levels="sampled")
    frames = fits.first.frames
    assert fits(**skipping) == left_out
    assert len(fits.first.skipped) == 1
    assert fits(**skipping) == left_out
    assert (fits.first.from_store, fits.first.frames) == (frames, frames)
    (tmp_path / "whole").mkdir()
    whole = Fits(demo, tmp_path / "whole")
    assert whole(store=store, later_levels="sampled") == whole(later_levels="sampled")
