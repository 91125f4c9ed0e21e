"""An initialization is saved with its card, taken into another pipeline, and made again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from archives import ROOT, edit
from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.data import CU3SDataNode
from cuvis_ai.node.normalization import MinMaxNormalizer
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from faults import FragileModule
from settings import scaling_of

from cuvis_dist import StatisticalTrainer, load_initialization, save_initialization
from cuvis_dist.archive import open_archive
from cuvis_dist.cli import main
from cuvis_dist.errors import InputError
from cuvis_dist.initialization.card import FORMAT, Card
from cuvis_dist.nodes.state import hash_state
from cuvis_dist.runs.trainrun import load_trainrun

BANDS = 5


def build_pipeline(eps=1e-6, name="rx_detector", dtype=None, bands=BANDS, **options):
    """As the guide builds one: by code, with nodes that are not fitted."""
    data, normalizer = CU3SDataNode(name="data"), MinMaxNormalizer(name="normalizer", eps=eps)
    detector = RXGlobal(num_channels=bands, name=name, **options)
    pipeline = CuvisPipeline("By_Code")
    pipeline.connect(
        (data.outputs.cube, normalizer.inputs.data),
        (normalizer.outputs.normalized, detector.inputs.data),
    )
    return pipeline.to(dtype) if dtype else pipeline


def node(pipeline, name):
    return next(node for node in pipeline.nodes() if node.name == name)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A pipeline that was fitted in this process, and the files that were saved of it."""
    folder = tmp_path_factory.mktemp("fitted")
    pipeline = build_pipeline()
    trainer = StatisticalTrainer(pipeline, FragileModule(folder), scaling=scaling_of(workers=0))
    trainer.fit()
    card = save_initialization(pipeline, folder / "initialization.pt", trainer, name="v1")
    return pipeline, folder / "initialization.pt", card


@pytest.fixture
def saved(fitted, tmp_path):
    """A copy of the files, to change."""
    for ending in ("pt", "yaml", "json"):
        file = fitted[1].with_suffix(f".{ending}")
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / "initialization.pt"


# ---- the guide's option 2 --------------------------------------------------------------


@pytest.mark.parametrize("ending", ["pt", "yaml", "json"])
def test_load_with_separate_initialization(fitted, ending):
    """The state alone, into a pipeline that was built by code; its nodes count as fitted."""
    pipeline = build_pipeline()
    detector = node(pipeline, "rx_detector")
    assert not detector._statistically_initialized
    found = load_initialization(pipeline, fitted[1].with_suffix(f".{ending}"))
    assert hash_state(pipeline.nodes()) == hash_state(fitted[0].nodes()) == found.sha256
    assert found.name == "v1"
    assert detector._statistically_initialized
    batch = {"cube": torch.rand(1, 3, 4, BANDS), "wavelengths": torch.arange(BANDS).int()[None]}
    key = ("rx_detector", "scores")
    ours, theirs = (each.forward(batch=dict(batch))[key] for each in (pipeline, fitted[0]))
    assert torch.equal(ours, theirs)
    pipeline.unfreeze_nodes_by_name(["rx_detector"])
    assert [name for name, _ in detector.named_parameters()], "it can be trained"


def test_the_card_says_what_was_fitted(fitted):
    pipeline, file, card = fitted
    assert Card.from_bytes(file.with_suffix(".json").read_bytes(), file) == card
    assert card.state == hash_state(pipeline.nodes())
    assert len(card.frames.used) == 12
    assert card.nodes["rx_detector"]["pixels"] == 12 * 72
    assert card.settings["pixels"] == "all"
    assert card.versions["torch"] == version("torch")
    assert card.trainrun is None, "nobody knows how the data module was built"


def test_nodes_behind_may_be_others(fitted):
    """What is not fitted, and comes after what is, keeps its own settings."""
    from cuvis_ai.node.deciders.binary_decider import BinaryDecider

    pipeline, decider = build_pipeline(), BinaryDecider(threshold=0.25, name="decider")
    pipeline.connect((node(pipeline, "rx_detector").outputs.scores, decider.inputs.logits))
    load_initialization(pipeline, fitted[1])
    assert decider.threshold == 0.25


def test_what_a_fit_leaves_empty_is_taken(tmp_path):
    """Upstream cannot load an RXGlobal that keeps no inverse."""
    one, other = build_pipeline(cache_inverse=False), build_pipeline(cache_inverse=False)
    trainer = StatisticalTrainer(one, FragileModule(tmp_path), scaling=scaling_of(workers=0))
    trainer.fit()
    save_initialization(one, tmp_path / "x.pt", trainer)
    load_initialization(other, tmp_path / "x.pt")
    assert hash_state(other.nodes()) == hash_state(one.nodes())


def test_a_saved_pipeline_without_a_card_is_taken_with_a_warning(saved, warnings):
    saved.with_suffix(".json").unlink()
    load_initialization(build_pipeline(), saved)
    assert warnings == [f"{saved} has no card: nothing says what it was made from"]
    with pytest.raises(InputError, match=r"eps of node normalizer was 1e-06, and is 0\.1"):
        load_initialization(build_pipeline(eps=0.1), saved)  # its .yaml says so
    saved.with_suffix(".yaml").unlink()
    load_initialization(build_pipeline(), saved)


def test_a_card_without_a_trainer_says_less(fitted, tmp_path):
    card = save_initialization(fitted[0], tmp_path / "x.yaml")
    assert card.name == f"By_Code-{card.state[:8]}"
    assert card.frames is None
    load_initialization(build_pipeline(), tmp_path / "x.yaml")


# ---- what does not fit -----------------------------------------------------------------

UNFIT = {
    "another name": (lambda: build_pipeline(name="rx"), "it has no node rx; its nodes are data, "),
    "another setting": (
        lambda: build_pipeline(eps=1e-3),
        "eps of node normalizer was 1e-06, and is 0.001",
    ),
    "another number of bands": (
        lambda: build_pipeline(bands=7),
        "num_channels of node rx_detector was 5, and is 7",
    ),
    "another dtype": (
        lambda: build_pipeline(dtype=torch.float64),
        "normalizer.running_min is torch.float32 in it, and torch.float64 in the node",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_refused_with_the_reason(case, fitted):
    make, reason = UNFIT[case]
    pipeline = make()
    before = hash_state(pipeline.nodes())
    with pytest.raises(InputError) as refused:
        load_initialization(pipeline, fitted[1])
    said = f"{fitted[1]} does not fit the pipeline By_Code: {reason}"
    assert str(refused.value).startswith(said)
    assert hash_state(pipeline.nodes()) == before


def test_another_class_and_another_edge_are_refused(fitted):
    class Other(RXGlobal):
        pass

    for make, at, reason in (
        (Other, "normalizer.outputs.normalized", "node rx_detector was a cuvis_ai.*RXGlobal, and"),
        (RXGlobal, "data.outputs.cube", "rx_detector.inputs.data was fed by normalizer.outputs."),
    ):
        data, normalizer = CU3SDataNode(name="data"), MinMaxNormalizer(name="normalizer")
        detector = make(num_channels=BANDS, name="rx_detector")
        ports = {
            "normalizer.outputs.normalized": normalizer.outputs.normalized,
            "data.outputs.cube": data.outputs.cube,
        }
        pipeline = CuvisPipeline("By_Code")
        pipeline.connect((data.outputs.cube, normalizer.inputs.data))
        pipeline.connect((ports[at], detector.inputs.data))
        with pytest.raises(InputError, match=reason):
            load_initialization(pipeline, fitted[1])


def change(file, **buffers):
    """Change the state of the detector in a ``.pt``; None takes a buffer out."""
    content = torch.load(file, weights_only=True)
    state = content["state_dict"]["rx_detector"]
    for name, value in buffers.items():
        if value is None:
            del state[name]
        else:
            state[name] = value
    torch.save(content, file)


@pytest.mark.parametrize(
    ("buffers", "reason"),
    [
        ({"mu": torch.zeros(9)}, "rx_detector.mu has the shape [9] in it, and [5] in the node"),
        ({"mu": None}, "it has no rx_detector.mu; of this node it has cov, cov_inv"),
        ({"more": torch.zeros(1)}, "it has rx_detector.more, and the node only mu, cov, cov_inv"),
    ],
)
def test_a_state_of_other_tensors_is_refused(saved, buffers, reason):
    change(saved, **buffers)
    for ending in (".json", ".yaml"):
        saved.with_suffix(ending).unlink()
    with pytest.raises(InputError, match=re.escape(f"{saved} does not fit")) as refused:
        load_initialization(build_pipeline(), saved)
    assert reason in str(refused.value)


def test_a_node_whose_fit_nothing_keeps_is_refused(tmp_path):
    """Its class registers no buffer, so that nothing of the fit is saved."""

    class Forgetful(MinMaxNormalizer):
        def __init__(self, **options):
            super().__init__(**options)
            del self.running_min, self.running_max

    def forgetful():
        data, own = CU3SDataNode(name="data"), Forgetful(name="own")
        pipeline = CuvisPipeline("By_Code")
        pipeline.connect((data.outputs.cube, own.inputs.data))
        return pipeline

    save_initialization(forgetful(), tmp_path / "x.pt")
    with pytest.raises(InputError, match="node own has to be fitted, and its class keeps what"):
        load_initialization(forgetful(), tmp_path / "x.pt")


def test_a_changed_file_is_noticed(saved):
    change(saved, mu=torch.zeros(BANDS))
    said = f"{saved} is not the state that its card {saved.with_suffix('.json')} describes"
    with pytest.raises(InputError, match=re.escape(said)):
        load_initialization(build_pipeline(), saved)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda card: json.dumps(card | {"format": FORMAT + 1}), f"has the format {FORMAT + 1}"),
        (lambda card: json.dumps(card | {"frames": 3}), "is no card: frames"),
        (lambda card: json.dumps(card | {"more": 3}), "is no card: more"),
        (lambda card: json.dumps([]), "is no card of an initialization"),
        (lambda card: "{", "is no card of an initialization"),
    ],
)
def test_a_card_that_cannot_be_read_is_named(saved, spoil, words):
    file = saved.with_suffix(".json")
    file.write_text(spoil(json.loads(file.read_text())))
    with pytest.raises(InputError, match=re.escape(str(file))) as refused:
        load_initialization(build_pipeline(), saved)
    assert words in str(refused.value)


def test_files_that_are_missing_or_something_else(saved, tmp_path):
    for place in (tmp_path / "none.json", tmp_path / "none.pt"):
        with pytest.raises(InputError, match=re.escape(f"initialization not found: {place}")):
            load_initialization(build_pipeline(), place)
    with pytest.raises(InputError, match=r"names no initialization: it is a file that ends in"):
        save_initialization(build_pipeline(), tmp_path / "initialization")
    torch.save({"rx_mean": torch.zeros(BANDS)}, saved)  # as the guide writes one by hand
    with pytest.raises(InputError, match=r"is no saved pipeline: it has no state_dict"):
        load_initialization(build_pipeline(), saved)
    torch.save(torch.nn.Linear(1, 1), saved)
    with pytest.raises(InputError, match=r"cannot be loaded: it holds more than tensors"):
        load_initialization(build_pipeline(), saved)
    saved.unlink()
    with pytest.raises(InputError, match=re.escape(f"initialization not found: {saved}")):
        load_initialization(build_pipeline(), saved.with_suffix(".json"))


def test_in_a_bucket(fitted, s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    pipeline = fitted[0]
    save_initialization(pipeline, "s3://bucket/initializations/mine.pt")
    other = build_pipeline()
    load_initialization(other, "s3://bucket/initializations/mine.json")
    assert hash_state(other.nodes()) == hash_state(pipeline.nodes())
    with pytest.raises(InputError, match=r"not found: s3://bucket/initializations/none\.pt"):
        load_initialization(other, "s3://bucket/initializations/none.pt")


# ---- cuvis-dist init, and what it leaves -----------------------------------------------

PLAIN = """
import sys
from importlib.metadata import version
from pathlib import Path
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
path = Path(sys.argv[1])
pipeline = CuvisPipeline.load_pipeline(path, path.with_suffix(".pt"))
assert "cuvis_dist" not in sys.modules
print(pipeline.name)
"""


@pytest.fixture(scope="module")
def made(demo_trainrun, tmp_path_factory):
    """A demo that nobody changes, initialized in this process: folder and base of the files."""
    folder = tmp_path_factory.mktemp("made")
    assert main(["init", str(demo_trainrun), "--output-dir", str(folder)]) == 0
    return folder, folder / "trained_models" / "Channel_Selector_initialized.json"


def test_init_leaves_a_card_beside_what_plain_cuvis_ai_loads(made):
    folder, file = made
    card, record = (json.loads(each.read_text()) for each in (file, folder / "run.json"))
    assert card["state"] == record["initialized"]
    assert card["name"] == f"Channel_Selector-{card['state'][:8]}"
    assert len(card["frames"]["used"]) == 10
    assert {*card["nodes"]} == {"normalizer", "selector", "rx_detector", "logit_head"}
    assert card["metrics"].keys() == record["metrics"].keys() == {"val", "test"}
    files = card["frames"]["files"]
    for frame in card["frames"]["used"]:
        assert all(files[name]["size"] == Path(name).stat().st_size for name in frame["files"])
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(file.with_suffix(".yaml"))],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == "Channel_Selector", done.stderr


def test_a_card_is_enough_to_make_the_initialization_again(made, tmp_path, monkeypatch, capsys):
    """The Python and the command of the docs, which read the card and nothing else."""
    text = (ROOT / "docs" / "initializations.md").read_text()
    (block,) = [b for b in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S) if "card" in b]
    monkeypatch.chdir(tmp_path)
    results = Path("outputs/demo/results/trained_models")
    results.mkdir(parents=True)
    for ending in ("json", "pt"):
        file = made[1].with_suffix(f".{ending}")
        (results / file.name).write_bytes(file.read_bytes())
    exec(block, {})
    assert main([
        "init", "outputs/again/trainrun.yaml", "--scaling", "outputs/again/scaling.yaml",
        "--compare", str(results / made[1].name),
    ]) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "state    the same, in all 8 buffers and parameters"
    assert "frames   " not in out
    assert "settings " not in out


def test_skipped_frames_and_what_the_card_says_of_them(demo, capsys):
    (demo.parent / "archive" / "recording_00_001.npz").write_bytes(b"damaged")
    options = ["--set", "measuring.on_error=skip"]
    assert main(["init", str(demo), *options]) == 0
    file = demo.parent / "results/trained_models/Channel_Selector_initialized.json"
    card = json.loads(file.read_text())
    (uid,) = card["frames"]["skipped"]
    assert uid == "recording_00.cu3s#1"
    assert "recording_00_001.npz" in card["frames"]["skipped"][uid]
    assert uid not in [frame["uid"] for frame in card["frames"]["used"]]
    assert len(card["frames"]["used"]) == 9

    # Without a card it is not done, and phase 1, which is done, is not read again.
    first = json.loads((demo.parent / "results/run.json").read_text())
    assert main(["init", str(demo), *options]) == 0
    file.unlink()
    assert main(["init", str(demo), *options]) == 0
    again = json.loads(file.read_text())
    assert again | {"made": ""} == card | {"made": ""}
    assert json.loads((demo.parent / "results/run.json").read_text())["passes"] == first["passes"]


def test_splits_are_written_into_the_card(demo):
    """Those of a file, and without the recordings that a command left out."""
    splits = yaml.safe_load(demo.read_text())["data"]["splits"]
    (demo.parent / "splits.json").write_text(json.dumps(splits))
    edit(demo, lambda run: run["data"].update(splits={"splits_path": "splits.json"}))
    file = demo.parent / "results/trained_models/Channel_Selector_initialized.json"

    def said(*options):
        assert main(["init", str(demo), *options]) == 0
        card = json.loads(file.read_text())
        return card["trainrun"], [frame["uid"] for frame in card["frames"]["used"]]

    trainrun, _ = said()
    assert trainrun["data"]["splits"] == splits
    sampled = "--set", "measuring.later_levels=sampled"
    store = "--store", str(demo.parent / "store")
    trainrun, used = said("--without", "recording_02*", *store, *sampled)
    assert len(used) == 7
    again = demo.parent / "again.yaml"
    again.write_text(yaml.safe_dump(trainrun))
    module = load_trainrun(again).datamodule()
    assert [frame.uid for frame in open_archive(module, "train").frames] == used


def test_a_state_that_was_saved_without_its_card_has_none(fitted, saved, monkeypatch, warnings):
    """As when the process ends in between: an old card would say that the file was changed."""

    def end(card):
        raise KeyboardInterrupt

    monkeypatch.setattr(Card, "to_bytes", end)
    with pytest.raises(KeyboardInterrupt):
        save_initialization(build_pipeline(), saved)
    load_initialization(build_pipeline(), saved)
    assert any("has no card" in line for line in warnings)


def test_train_begins_with_the_initialization_that_is_named(made, demo, capsys):
    edit(demo, lambda run: run["training"].update(max_epochs=1))
    assert main(["train", str(demo), "--initialization", str(made[1])]) == 0
    record = json.loads((demo.parent / "results/run.json").read_text())
    card = json.loads(made[1].read_text())
    assert record["initialized"] == record["initialization"]["sha256"] == card["state"]
    assert record["initialization"]["name"] == card["name"]
    assert record["initialization"]["file"] == str(made[1])
    assert record["passes"] == []


def test_compare_says_what_changed_and_by_how_much(made, demo, capsys):
    """Of an archive in which a recording was taken out, another added, and a frame changed."""
    changed = demo.parent / "archive" / "recording_01_001.npz"
    with np.load(changed) as content:
        arrays = dict(content)
    np.savez(changed, **arrays | {"cube": arrays["cube"][..., ::-1], "more": np.zeros(3)})

    def other_frames(run):
        train = run["data"]["splits"]["train"]
        run["data"]["splits"]["train"] = [s for s in train if "_02" not in s["source"]]
        run["data"]["splits"]["train"][0]["ids"] += [4]
        run["data"]["splits"]["val"][0]["ids"] = [5]

    edit(demo, other_frames)
    edit(demo.parent / "pipeline.yaml", lambda p: p["nodes"][3]["hparams"].update(eps=1e-5))
    options = ["--set", "measuring.shard_frames=2", "--compare", str(made[1])]
    assert main(["init", str(demo), *options]) == 0
    out = capsys.readouterr().out.splitlines()
    card = json.loads(made[1].read_text())
    universe = card["trainrun"]["data"]["params"]["universe_csv"]
    own_universe = demo.parent / "archive" / "universe.csv"
    (first,) = [n for n, line in enumerate(out) if line.startswith("compared with ")]
    assert out[first] == (
        f"compared with {card['name']} ({made[1].with_suffix('.pt')}), made {card['made']}"
    )
    told = [line for line in out[first + 1 :] if not line.startswith("metrics  val metrics_an")]
    assert len(told) < len(out) - first - 1
    assert told[:7] == [
        "frames   1 added: 1 of recording_00.cu3s",
        "frames   3 removed: 3 of recording_02.cu3s",
        told[2],
        "nodes    eps of node rx_detector was 1e-06, and is 1e-05",
        f"settings data.params.universe_csv was {universe} and is {own_universe}",
        "settings shard_frames was 4 and is 2",
        "state    6 of 8 buffers and parameters changed, the most first:",
    ]
    assert re.fullmatch(
        r"frames   1 changed: recording_01.cu3s#1 \(its size was \d+ bytes and is \d+\)",
        told[2],
    )
    assert len(told) == 7 + 6
    (mean,) = [line for line in out if line.startswith("  rx_detector.mu: ")]
    assert re.match(r"  rx_detector.mu: [\d.]+ standard deviations at \[\d+\]; by at most ", mean)

    # It is done, and is compared all the same; with itself, there is nothing to tell.
    assert main(["init", str(demo), *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == out[-1]
    own = demo.parent / "results/trained_models/Channel_Selector_initialized.pt"
    assert main(["init", str(demo), *options[:2], "--compare", str(own)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("state    the same, in all 8 ")
