"""A store loses nothing and mixes nothing: writers that are killed, two at once, damaged files."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loguru import logger

from cuvis_dist.archive import Contents, Frame
from cuvis_dist.statistics import ExactMoments, Extrema, Moments, PixelSample
from cuvis_dist.statistics.columns import from_table, to_table
from cuvis_dist.store import DamagedFileError, Entry, Key, Store, UnusableFileError
from cuvis_dist.store.upkeep import damaged, kinds, prune, recordings

KEY = Key("Extrema(data.cube)", {"port": "data.cube"})
OTHER = Key("Extrema(data.cube)", {"port": "data.cube", "pixels": "finite"})


@pytest.fixture
def warnings():
    """Collect what is logged."""
    said: list[str] = []
    number = logger.add(lambda message: said.append(message.record["message"]), level="WARNING")
    yield said
    logger.remove(number)


class Files:
    """Frames with a file each, and what was measured of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "archive"
        self.folder.mkdir()
        self.store = folder / "store"

    def frame(self, number: int) -> Frame:
        path = self.folder / f"{number}.npz"
        if not path.exists():
            path.write_text(str(number))
        return Frame(f"r{number // 3}#{number}", f"r{number // 3}", str(path), reads=(str(path),))

    def add(
        self, *numbers: int, key: Key = KEY, store: Store | None = None, value: float = 0, **about
    ):
        frames = [self.frame(number) for number in numbers]
        contents = Contents.of(frames)
        table = to_table([Extrema.measure(torch.full((4, 3), n + value)) for n in numbers])
        entries = [Entry(f.uid, f.recording, contents.only([f]).as_json(), about) for f in frames]
        return (store or Store(self.store)).add(key, Extrema.name, table, entries)

    def found(self, *numbers: int, key: Key = KEY, store: Store | None = None) -> dict[int, float]:
        """What a store has of frames: the value that was measured, by number."""
        store, frames = store or Store(self.store), [self.frame(number) for number in numbers]
        places = store.find(key, frames, Contents.of(frames))
        values = {}
        for (uid, _), place in places.items():
            (extrema,) = from_table(store.read(place.file), place.file.kind, [place.row])
            values[int(uid.partition("#")[2])] = float(extrema.minimum[0])
        return values


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def test_what_was_added_is_found_by_whoever_opens_the_store(files):
    files.add(0, 1)
    files.add(4)
    assert files.found(0, 1, 2, 3, 4) == {0: 0, 1: 1, 4: 4}
    assert files.found(0, 1, key=OTHER) == {}


def test_a_store_that_is_open_sees_what_others_add(files):
    store = Store(files.store)
    assert files.found(0, store=store) == {}
    files.add(0)
    assert files.found(0, store=store) == {0: 0}


def test_a_frame_of_which_a_file_changed_is_not_found(files):
    files.add(0, 1)
    time.sleep(0.01)
    Path(files.frame(0).path).write_text("x")
    assert files.found(0, 1) == {1: 1}
    files.add(0, value=0.5)
    assert files.found(0, 1) == {0: 0.5, 1: 1}


def test_the_better_measurement_counts_whatever_the_clock_of_its_writer(files):
    """Names are ordered by times, and the clocks of two machines differ."""
    files.add(0, probes=True)
    time.sleep(1.1)
    files.add(0, value=0.5, probes=False)
    assert files.found(0) == {0: 0}
    files.add(0, value=0.25, probes=True)
    assert files.found(0) == {0: 0.25}


def test_a_frame_of_another_file_with_the_same_uid_is_another_frame(files):
    files.add(0)
    frame = files.frame(0)
    copy = files.folder / "copy.npz"
    copy.write_text("0")
    os.utime(copy, ns=(1, Path(frame.path).stat().st_mtime_ns))
    moved = Frame(frame.uid, frame.recording, str(copy), reads=(str(copy),))
    assert Store(files.store).find(KEY, [moved], Contents.of([moved])) == {}


# ---- writers -----------------------------------------------------------------------------

#: The renames of three writings: of a Parquet file and of its manifest, each time.
KILLED_AT = [(step, number) for step in ("before", "after") for number in range(1, 6)]


def in_a_child(work) -> int:
    """Run something in a process of its own; return how that ended."""
    if not (child := os.fork()):
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize(("step", "number"), KILLED_AT)
def test_a_writer_that_is_killed_leaves_the_store_as_it_was_before_or_after(files, step, number):
    files.add(0)
    rename, seen = os.replace, [0]

    def replace(*args, **kwargs):
        seen[0] += 1
        if seen[0] == number and step == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*args, **kwargs)
        if seen[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def work():
        os.replace = replace
        for frame in (1, 2, 3):
            files.add(frame)

    assert os.WTERMSIG(in_a_child(work)) == signal.SIGKILL
    whole = (number - 1) // 2 if step == "before" else number // 2
    assert files.found(0, 1, 2, 3) == {n: n for n in range(whole + 1)}
    assert damaged(Store(files.store)) == []
    files.add(3)
    assert files.found(0, 3) == {0: 0, 3: 3}


@pytest.mark.parametrize("limit", [200, 1500])
def test_a_writer_that_ends_in_the_middle_of_a_file_leaves_none(files, limit):
    """The kernel ends it when a file has so many bytes: in the Parquet file, or its manifest."""
    files.add(0)

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        files.add(*range(1, 30))

    for number in range(1, 30):
        files.frame(number)
    assert os.WTERMSIG(in_a_child(work)) == signal.SIGXFSZ
    assert files.found(0, 1) == {0: 0}
    assert damaged(Store(files.store)) == []
    assert len(Store(files.store).files()) == 1


def test_two_writers_at_once_lose_nothing(files):
    every = range(60)
    for number in every:
        files.frame(number)

    def add(half):
        store = Store(files.store)
        for number in half:
            files.add(number, store=store)

    with ThreadPoolExecutor(2) as both:  # each waits for a process; 20 frames are in both halves
        halves = range(40), range(20, 60)
        ends = both.map(lambda half: in_a_child(lambda: add(half)), halves)
        assert [*ends] == [0, 0]
    assert files.found(*every) == {n: n for n in every}


# ---- damage ------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    """Change one bit: in the middle, or of what opens a manifest."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if path.suffix == ".parquet" else 0] ^= 1
    path.write_bytes(bytes(content))


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, empty, Path.unlink])
@pytest.mark.parametrize("suffix", [".parquet", ".json"])
def test_a_damaged_file_is_named_set_aside_and_its_frames_are_missing(
    files, damage, suffix, warnings
):
    files.add(0)
    name = files.add(1).name
    path = (files.store / name).with_suffix(suffix)
    damage(path)
    if suffix == ".parquet":
        with pytest.raises(DamagedFileError, match=path.stem):
            files.found(0, 1)
    assert files.found(0, 1) == {0: 0}
    gone = damage is Path.unlink and suffix == ".json"  # as of a writer that was killed
    assert gone or any(str(path.stem) in said and "set aside" in said for said in warnings)
    assert gone or not path.exists()
    files.add(1)
    assert files.found(0, 1) == {0: 0, 1: 1}


def test_a_file_of_a_future_version_is_named_and_left(files, warnings):
    files.add(0)
    stored = files.add(1)
    manifest = files.store / stored.manifest
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    assert files.found(0, 1) == {0: 0}
    assert any(str(manifest) in said and "99" in said for said in warnings)
    assert manifest.exists()
    prune(Store(files.store))
    assert manifest.exists()
    assert (files.store / stored.name).exists()


def test_a_damaged_file_of_a_store_that_may_only_be_read_is_left(files, warnings):
    truncate(files.store / files.add(0).name)
    store = Store(files.store)
    store.folder.write = refuse  # as a read-only mount
    with pytest.raises(DamagedFileError):
        files.found(0, store=store)
    assert files.found(0, store=store) == {}
    assert any("stays where it is" in said for said in warnings)


def refuse(name, content):
    raise PermissionError(f"read-only: {name}")


def test_foreign_files_are_left_alone(files):
    files.add(0)
    (files.store / "notes.txt").write_text("mine")
    (files.store / "notes.json").write_text("{}")
    assert files.found(0) == {0: 0}
    prune(Store(files.store))
    assert (files.store / "notes.json").exists()


# ---- upkeep ------------------------------------------------------------------------------


def test_what_is_there_is_told_by_kind_and_by_recording(files):
    files.add(0, 1, 2)
    files.add(2, 3)
    files.add(0, key=OTHER)
    found = kinds(Store(files.store))
    assert sorted((kind.measured, kind.frames, kind.files) for kind in found) == [
        (KEY.name, 1, 1),
        (KEY.name, 4, 2),
    ]
    told = recordings(Store(files.store))
    assert {name: len(set().union(*what.values())) for name, what in told.items()} == {
        "r0": 3,
        "r1": 1,
    }


def test_pruning_removes_what_no_frame_has_and_joins_the_rest(files):
    for number in range(5):
        files.add(number)
    files.add(1)
    Path(files.frame(2).path).unlink()
    time.sleep(0.01)
    Path(files.frame(3).path).write_text("other")
    store = Store(files.store)
    before = sorted(store.folder.names())
    told = prune(store, dry_run=True)
    assert sorted(store.folder.names()) == before
    done = prune(Store(files.store))
    for found in (told, done):
        assert {name: len(uids) for name, uids in found.stale.items()} == {"r0": 1, "r1": 1}
        assert (found.again, found.rows) == (1, 3)
    assert len(Store(files.store).files()) == 1
    assert files.found(0, 1, 3, 4) == {0: 0, 1: 1, 4: 4}
    assert prune(Store(files.store)).rows == 3


def test_who_reads_while_it_is_pruned_finds_the_rest(files, warnings):
    for number in range(3):
        files.add(number)
    store, frames = Store(files.store), [files.frame(number) for number in range(3)]
    places = store.find(KEY, frames, Contents.of(frames))
    prune(Store(files.store))
    for place in places.values():
        with pytest.raises(UnusableFileError, match="removed meanwhile"):
            store.read(place.file)
    assert warnings == []
    assert files.found(0, 1, 2, store=store) == {0: 0, 1: 1, 2: 2}


def test_pruning_where_the_archive_is_not_removes_nothing(files, tmp_path):
    files.add(0)
    files.folder.rename(tmp_path / "elsewhere")
    with pytest.raises(Exception, match="run this where the archive is"):
        prune(Store(files.store))


def test_pruning_keeps_what_it_cannot_see(files, tmp_path):
    files.add(0)
    far = tmp_path / "mounted"
    far.mkdir()
    (far / "9.npz").write_text("9")
    frame = Frame("r9#9", "r9", str(far / "9.npz"), reads=(str(far / "9.npz"),))
    contents = Contents.of([frame])
    table = to_table([Extrema.measure(torch.ones(4, 3))])
    entry = Entry(frame.uid, frame.recording, contents.as_json())
    Store(files.store).add(KEY, Extrema.name, table, [entry])
    (far / "9.npz").unlink()
    far.rmdir()
    found = prune(Store(files.store))
    assert (found.rows, {*found.hidden}) == (2, {str(far / "9.npz")})


def test_pruning_removes_what_was_never_finished_once_it_is_old(files):
    stored = files.add(0)
    folder = files.store / Path(stored.name).parent
    now, long_ago = (
        folder / f"{t}-0123456789ab.parquet" for t in ("29990101T000000", "20200101T000000")
    )
    for path in (now, long_ago):
        path.write_bytes(b"half")
    assert prune(Store(files.store)).rubbish == [long_ago.relative_to(files.store).as_posix()]
    assert now.exists()
    assert not long_ago.exists()


def test_a_store_in_a_bucket(files, s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    files.store = "s3://bucket/store"
    files.add(0, 1)
    files.add(2)
    assert files.found(0, 1, 2, 3) == {0: 0, 1: 1, 2: 2}
    assert damaged(Store(files.store)) == []
    assert prune(Store(files.store)).rows == 3
    assert files.found(0, 1, 2, 3) == {0: 0, 1: 1, 2: 2}
    assert len(Store(files.store).files()) == 1


# ---- columns -----------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 4), st.booleans())
def test_statistics_come_back_from_columns_bit_by_bit(sizes, channels, whole):
    torch.manual_seed(sum(sizes))
    pixels = [torch.randn(n, channels, dtype=torch.float64) for n in sizes]
    if whole:
        pixels = [(p * 1000).abs().round() for p in pixels]
    kinds = [
        [ExactMoments.measure(p) if whole else Moments.measure_rounded(p) for p in pixels],
        [Extrema.measure(p) for p in pixels],
        [PixelSample.measure(p, size=3, uid=str(i)) for i, p in enumerate(pixels)],
    ]
    for statistics in kinds:
        rows = [*range(len(statistics))][::-1]
        back = from_table(to_table(statistics), statistics[0].name, rows)
        assert [s.to_bytes() for s in back] == [statistics[row].to_bytes() for row in rows]
