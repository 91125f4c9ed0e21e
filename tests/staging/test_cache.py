"""The cache of remote files: shared by processes, bounded, never half a file. Without Ray."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from small_disks import on_small_disk

from cuvis_dist.errors import ClusterError, DataError, InputError
from cuvis_dist.staging import cache as module
from cuvis_dist.staging import uris
from cuvis_dist.staging.cache import Staging, staging_here

forked = multiprocessing.get_context("fork")


@pytest.fixture
def store(tmp_path):
    """Six files of 1000 bytes; returns a function that names one's URI."""
    folder = tmp_path / "store"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.bin").write_bytes(bytes([i]) * 1000)
    return lambda name: (folder / f"{name}.bin").as_uri()


@pytest.fixture
def cache(tmp_path):
    return Staging(tmp_path / "cache", 3500)


def again(cache: Staging, limit: int | None = None) -> Staging:
    """The same cache as another process would open it."""
    return Staging(cache.disk.folder, limit or cache.room.limit)


def content(cache: Staging, uri: str) -> bytes:
    with cache.held([uri]):
        return cache.path_of(uri).read_bytes()


def here(cache: Staging) -> list[str]:
    return sorted(p.stem for p in cache.files.rglob("*.bin") if p.stat().st_size)


def on_disk(cache: Staging) -> int:
    """Bytes of the copies and of what is being fetched, at a moment when nothing is evicted."""
    size = 0
    with cache.room.books():
        for tree in (cache.files, cache.disk.fetching):  # a file may move from here to there
            for path in tree.rglob("*"):
                with suppress(FileNotFoundError):
                    size += path.stat().st_size if path.is_file() else 0
    return size


def run(*targets) -> None:
    """Run functions in processes of their own; all must end well."""
    processes = [forked.Process(target=target) for target in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


def test_a_file_is_fetched_once_and_the_oldest_goes(cache, store):
    for name in (0, 1, 2, 0, 3):  # 1 is the one used longest ago
        assert content(cache, store(name)) == bytes([name]) * 1000
    assert here(cache) == ["0", "2", "3"]
    counters = cache.counters()
    assert (counters.fetched, counters.fetched_bytes, counters.evicted) == (4, 4000, 1)
    assert counters.bytes == on_disk(cache) == 3000


def test_many_processes_fetch_each_file_once(store, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    filesystem = uris._filesystem("file:///", 0)[0]

    def slowly(data):
        time.sleep(0.05)
        return data

    slow = tampered(filesystem, slowly)
    monkeypatch.setattr(uris, "_filesystem", lambda root, pid: (slow, "/"))

    def reader():
        mine = Staging(folder, 10_000)
        for name in (0, 1, 2, 3, 4, 5) * 3:
            assert content(mine, store(name)) == bytes([name]) * 1000

    run(*[reader] * 6)
    assert Staging(folder, 10_000).counters().fetched == 6


def test_many_processes_keep_the_bound(store, tmp_path):
    """Each holds two files of a cache for three: they wait for each other, and finish."""
    folder = tmp_path / "cache"
    most = forked.Value("i", 0)

    def reader(seed):
        mine = Staging(folder, 3500)
        for k in range(12):
            names = [(seed + k) % 6, (seed + 2 * k + 1) % 6]
            with mine.held([store(name) for name in names]):
                for name in names:
                    assert mine.path_of(store(name)).read_bytes() == bytes([name]) * 1000
            with most:
                most.value = max(most.value, on_disk(mine))

    run(*(lambda seed=seed: reader(seed) for seed in range(5)))
    assert 0 < most.value <= 3500
    counters = Staging(folder, 3500).counters()
    assert counters.bytes == counters.fetched_bytes - counters.evicted * 1000 <= 3500


def test_what_is_read_is_not_evicted(cache, store, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    with cache.held([store(0), store(1), store(2)]):
        with pytest.raises(ClusterError, match="Raise stage_bytes"):
            content(again(cache), store(3))
        assert here(cache) == ["0", "1", "2"]
    assert content(again(cache), store(3)) == bytes([3]) * 1000


def test_waits_for_room_that_another_reader_holds(cache, store):
    full = threading.Event()

    def hold():
        with again(cache).held([store(0), store(1), store(2)]):
            full.set()
            time.sleep(0.5)

    thread = threading.Thread(target=hold)
    thread.start()
    assert full.wait(60)
    assert content(cache, store(3)) == bytes([3]) * 1000
    thread.join()


class SlowStore:
    """Pauses in the middle of every file, and says so by making another one."""

    def __init__(self, filesystem, flag: Path) -> None:
        self._filesystem, self._flag = filesystem, flag

    def __getattr__(self, name):
        return getattr(self._filesystem, name)

    def open_input_stream(self, key):
        stream = self._filesystem.open_input_stream(key)
        flag = self._flag

        class Stream:
            def metadata(self):
                return {}

            def read(self, size):
                if flag.exists():
                    time.sleep(60)
                flag.touch()
                return stream.read(500)

            __enter__ = lambda self: self  # noqa: E731
            __exit__ = lambda self, *_: stream.close()  # noqa: E731

        return Stream()


def half_way(cache, source, flag):
    """A process that fetches, and stops in the middle."""
    real = uris._filesystem

    def fetch():
        uris._filesystem = lambda root, pid: (SlowStore(real(root, pid)[0], flag), "/")
        content(again(cache), source)

    process = forked.Process(target=fetch)
    process.start()
    while not flag.exists():
        time.sleep(0.01)
    return process


def test_a_process_killed_while_it_fetches_leaves_nothing_behind(cache, store, tmp_path):
    victim = half_way(cache, store(0), tmp_path / "half")
    end = time.monotonic() + 60
    while [part.stat().st_size for part in cache.disk.fetching.iterdir()] != [500]:
        assert time.monotonic() < end, "half of the file does not arrive"
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert here(cache) == []
    assert content(cache, store(0)) == bytes(1000)  # without waiting for a lock of the dead
    assert list(cache.disk.fetching.iterdir()) == []
    assert cache.counters().bytes == 1000


def test_who_waits_for_a_large_file_is_seen_to_be_alive(store, tmp_path):
    """By what it reads, as the watch of training workers has it; as long as the file grows."""
    large = tmp_path / "store" / "large.bin"
    large.write_bytes(bytes(4_000_000))
    folder, real = tmp_path / "cache", uris._filesystem
    started = forked.Event()

    class Slow:
        def __getattr__(self, name):
            return getattr(real("file:///", 0)[0], name)

        def open_input_stream(self, key):
            stream = real("file:///", 0)[0].open_input_stream(key)

            class Stream:
                def metadata(self):
                    return {}

                def read(self, size):
                    started.set()
                    time.sleep(0.05)
                    return stream.read(100_000)

                __enter__ = lambda self: self  # noqa: E731
                __exit__ = lambda self, *_: stream.close()  # noqa: E731

            return Stream()

    def fetch():
        uris._filesystem = lambda root, pid: (Slow(), "/")
        content(Staging(folder, 10**7), store("large"))

    def read_bytes():
        return int(Path("/proc/self/io").read_text().split()[1])

    fetching = forked.Process(target=fetch)
    fetching.start()
    started.wait(10)
    before = read_bytes()
    with Staging(folder, 10**7).held([store("large")]):
        waited = read_bytes() - before
    fetching.join()
    assert waited > 10 * 2**17
    assert Staging(folder, 10**7).counters().fetched == 1


def test_what_a_killed_process_was_fetching_is_evicted_for_others(cache, store, tmp_path):
    test_a_process_killed_while_it_fetches_leaves_nothing_behind(cache, store, tmp_path)
    victim = half_way(cache, store(5), tmp_path / "again")
    victim.kill()
    victim.join()
    for name in (1, 2, 3, 4):
        content(cache, store(name))
    assert cache.counters().bytes == on_disk(cache) == 3000
    assert list(cache.disk.fetching.iterdir()) == []


def test_lost_books_are_made_again(cache, store):
    for name in (0, 1, 2):
        content(cache, store(name))
    (cache.disk.folder / "state.json").write_bytes(b"nonsense")
    assert again(cache).counters().bytes == 3000


def test_a_file_larger_than_the_cache(store, tmp_path):
    small = Staging(tmp_path / "small", 999)
    with pytest.raises(InputError, match=r"0\.bin has 1000 bytes.*\(999\); raise stage_bytes"):
        content(small, store(0))
    assert small.counters().bytes == 0


def test_a_changed_file_is_fetched_again_by_the_next_process(cache, store):
    assert content(cache, store(0)) == bytes(1000)
    path = Path(store(0).removeprefix("file://"))
    path.write_bytes(b"x" * 1200)
    assert content(cache, store(0)) == bytes(1000), "checked when first read, not every time"
    other = again(cache)
    assert content(other, store(0)) == b"x" * 1200
    assert other.counters().bytes == on_disk(cache) == 1200


def test_a_copy_that_somebody_cut_is_fetched_again(cache, store):
    content(cache, store(0))
    cache.path_of(store(0)).write_bytes(b"half")
    assert content(cache, store(0)) == bytes(1000)


def test_a_missing_file_and_one_that_cannot_be_fetched(cache, store, monkeypatch):
    with pytest.raises(DataError, match=r"nothing\.bin does not exist"):
        content(cache, store("nothing"))
    monkeypatch.setattr(uris, "PAUSE", 0.001)
    tried = []

    class Unreachable:
        def get_file_info(self, key):
            tried.append(key)
            raise OSError("no route to host")

    monkeypatch.setattr(uris, "_filesystem", lambda root, pid: (Unreachable(), "/"))
    with pytest.raises(DataError, match=r"1\.bin cannot be fetched by .*no route"):
        content(cache, store(1))
    assert len(tried) == 4
    assert list(cache.disk.index.glob("*/*")) == []


def tampered(filesystem, alter, etag=None):
    """A file system whose streams are altered, with an ETag."""

    class Stream:
        def __init__(self, data):
            self.data, self.etag = alter(data), etag or hashlib.md5(data).hexdigest()

        def metadata(self):
            return {"ETag": f'"{self.etag}"'.encode()}

        def read(self, size):
            data, self.data = self.data[:size], self.data[size:]
            return data

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda *_: None  # noqa: E731

    class Tampered:
        def get_file_info(self, key):
            return filesystem.get_file_info(key)

        def open_input_stream(self, key):
            with filesystem.open_input_stream(key) as stream:
                return Stream(stream.read())

    return Tampered()


def test_damage_on_the_way_is_found_and_mended(cache, store, monkeypatch):
    monkeypatch.setattr(uris, "PAUSE", 0.001)
    filesystem = uris._filesystem("file:///", 0)[0]
    damages = iter([lambda d: b"?" + d[1:], lambda d: d[:-1], lambda d: d])
    broken = tampered(filesystem, lambda data: next(damages)(data))
    monkeypatch.setattr(uris, "_filesystem", lambda root, pid: (broken, "/"))
    assert content(cache, store(4)) == bytes([4]) * 1000
    assert next(damages, None) is None
    assert cache.counters().fetched == 1


def test_an_etag_that_is_no_checksum(cache, store, monkeypatch):
    """As of objects that S3 encrypts with a managed key: the same content comes twice."""
    monkeypatch.setattr(uris, "PAUSE", 0.001)
    filesystem = uris._filesystem("file:///", 0)[0]
    encrypted = tampered(filesystem, lambda data: data, etag="0" * 32)
    monkeypatch.setattr(uris, "_filesystem", lambda root, pid: (encrypted, "/"))
    assert content(cache, store(4)) == bytes([4]) * 1000


def test_a_full_disk_evicts_what_is_there_then_says_so(cache, store, monkeypatch):
    content(cache, store(0))
    real, room = os.write, [500]

    def write(file, data):
        if len(data) > room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(ClusterError, match=r"disk of the cache .* on node .* is full.*stage_dir"):
        content(cache, store(1))
    assert here(cache) == []
    assert cache.counters().bytes == 0
    room[0] = 5000
    assert content(cache, store(1)) == bytes([1]) * 1000


FILLED = """
import sys
from pathlib import Path
from cuvis_dist.errors import ClusterError
from cuvis_dist.staging.cache import Staging
disk, store = map(Path, sys.argv[1:])
cache = Staging(disk / "cache", 10**9)

def content(name):
    uri = (store / f"{name}.bin").as_uri()
    with cache.held([uri]):
        return cache.path_of(uri).read_bytes()

def fill(name):
    with open(disk / name, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass

assert [content(n)[0] for n in range(3)] == [0, 1, 2]
fill("somebody's")
assert content(3) == bytes([3]) * 10**5
print(cache.counters().evicted)
cache.room.empty()
fill("more")
try:
    content(4)
except ClusterError as error:
    print(error)
(disk / "more").unlink()
assert content(4) == bytes([4]) * 10**5
"""


def test_a_disk_that_somebody_else_fills(store, tmp_path):
    """A small one: copies that nobody reads go for the next, then it is said."""
    for number in range(6):
        (tmp_path / "store" / f"{number}.bin").write_bytes(bytes([number]) * 10**5)
    disk = tmp_path / "disk"
    disk.mkdir()
    program = [sys.executable, "-c", FILLED, disk, tmp_path / "store"]
    done = subprocess.run(on_small_disk(disk, "600k", program), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    evicted, said = done.stdout.splitlines()
    assert evicted == "3"
    assert f"the disk of the cache {disk}/cache on node " in said
    assert " is full: " in said
    assert "set stage_dir to a folder on a larger disk" in said


@pytest.mark.parametrize(
    "uri",
    ["s3://b/../../etc/x", "s3://b/a/%2E%2E/x", "s3://b//x", "file:///a/./x", "s3://b/a%2F..%2Fx"],
)
def test_keys_that_lead_out_are_refused(cache, uri):
    with pytest.raises(InputError, match="must not have"):
        cache.path_of(uri)


def test_uris_and_paths_are_one_to_one(cache):
    for uri in (
        "s3://bucket/a/b.npz",
        "s3://bucket/with%20space/100%25%23.npz",
        "hdfs://host:8020/x.cu3s",
        "file:///x/y.cu3s",
        "s3://b/x.npz?region=eu-west-1",
        "gs://../x",
    ):
        path = cache.path_of(uri)
        assert path.is_relative_to(cache.files)
        assert ".." not in path.parts
        assert cache.uri_of(path) == uri
    assert cache.path_of("s3://b/a b.npz") == cache.path_of("s3://b/a%20b.npz")
    path = cache.path_of("hdfs://host:8020/x.cu3s")
    assert cache.uris_in(f"cannot open {path}: gone") == (
        "cannot open hdfs://host:8020/x.cu3s: gone"
    )


def test_links_lead_nowhere(cache, store, tmp_path):
    """Nothing is written or removed behind a link in the cache, nor in a cache that is one."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "0.bin").write_bytes(b"mine")
    folder = cache.path_of(store(0)).parent
    folder.parent.mkdir(parents=True)
    folder.symlink_to(outside)
    with pytest.raises(ClusterError, match="is a link or a file"):
        content(cache, store(0))
    folder.unlink()
    folder.mkdir()
    (folder / "0.bin").symlink_to(outside / "0.bin")
    assert content(cache, store(0)) == bytes(1000)
    assert not (folder / "0.bin").is_symlink()
    assert {p.name: p.read_bytes() for p in outside.iterdir()} == {"0.bin": b"mine"}
    (tmp_path / "link").symlink_to(outside)
    with pytest.raises(ClusterError, match="is a link, belongs"):
        content(Staging(tmp_path / "link", 1000), store(0))
    outside.chmod(0o777)
    with pytest.raises(ClusterError, match="writable by others"):
        content(Staging(outside, 1000), store(0))


def test_each_node_has_a_folder_of_its_own(tmp_path, monkeypatch):
    configured = staging_here(str(tmp_path / "a"), 5000)
    monkeypatch.setenv("CUVIS_DIST_STAGE_DIR", str(tmp_path / "b"))
    there = pickle.loads(pickle.dumps(configured))
    assert (there.disk.folder, there.room.limit) == (tmp_path / "b", 5000)
    monkeypatch.delenv("CUVIS_DIST_STAGE_DIR")
    assert pickle.loads(pickle.dumps(there)).disk.folder == tmp_path / "a"
