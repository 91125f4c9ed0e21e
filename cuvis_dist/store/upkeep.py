"""What is in a store, is it sound, and what of it does no frame have any more?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa

from cuvis_dist.archive import Contents
from cuvis_dist.errors import DataError
from cuvis_dist.storage import is_uri
from cuvis_dist.store.files import (
    DamagedFileError,
    Entry,
    Key,
    StoredFile,
    manifest_of,
    read_file,
    written_at,
)
from cuvis_dist.store.store import SET_ASIDE, Store

#: Files of fewer bytes are joined, into one of so many at most.
_SMALL, _JOINED = 1 << 25, 1 << 26
#: A file without a manifest may be one that somebody writes now, up to this age.
_WRITING = timedelta(days=1)


@dataclass(frozen=True)
class Kind:
    """One kind of measurement in a store.

    Attributes
    ----------
    key : str
        Name of its folder.
    measured, data_module : str
        What was measured, and by which data module it was read.
    frames, files, bytes : int
        How much of it there is; a frame that was measured twice counts once.
    written : str
        When the last file was written, as ISO 8601.
    """

    key: str
    measured: str
    data_module: str
    frames: int
    files: int
    bytes: int
    written: str


def kinds(store: Store) -> list[Kind]:
    """Return the kinds of measurements that a store has, by name."""
    found = []
    for key, files in _by_key(store.files()).items():
        entries = [entry for file in files for entry in file.entries]
        module = files[0].depends_on.get("data module", {}).get("class", "?")
        found.append(
            Kind(
                key,
                files[0].measured,
                str(module).rpartition(".")[2],
                len(_last(entries)),
                len(files),
                sum(file.bytes for file in files),
                max(file.written for file in files),
            )
        )
    return sorted(found, key=lambda kind: (kind.measured, kind.key))


def recordings(store: Store) -> dict[str, dict[str, set[str]]]:
    """Return, by recording and by what was measured, the uids of the frames."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for file in store.files():
        for entry in file.entries:
            found[entry.recording][file.measured].add(entry.uid)
    return {name: dict(found[name]) for name in sorted(found)}


def damaged(store: Store) -> list[str]:
    """Read every file of a store, and return what is wrong with those that are damaged."""
    wrong = []
    for file in store.files():
        try:
            read_file(store.folder, file)
        except DamagedFileError as error:
            wrong.append(str(error))
    return wrong


@dataclass
class Pruning:
    """What of a store is not needed.

    Attributes
    ----------
    stale : dict of str to set of str
        By recording, the uids of the frames whose files are gone or have changed since.
    again : int
        Rows of frames that were measured once more later.
    hidden : set of str
        Files of frames that cannot be seen from here, with their folders: what is known of their
        frames stays.
    rubbish : list of str
        Names of files that were set aside, or never finished.
    rows, bytes : int
        How many rows stay, and how many bytes go.
    """

    stale: dict[str, set[str]]
    again: int
    hidden: set[str]
    rubbish: list[str]
    rows: int = 0
    bytes: int = 0


def prune(store: Store, dry_run: bool = False) -> Pruning:
    """Remove what no frame has any more, and join small files.

    A frame is gone where its file is, while the folder of the file is there; and has changed where
    its file has another size or time of change. New files are complete before old ones go.

    Parameters
    ----------
    dry_run : bool
        Only say what would be removed.

    Raises
    ------
    DataError
        If no file of any frame, nor its folder, can be seen from here.
    InputError, ClusterError
        If the store cannot be written to.
    """
    files = store.files()
    state = _states(files)
    hidden = {path for path, known in state.items() if known is None}
    if state and len(hidden) == len(state):
        raise DataError(
            f"none of the {len(state)} files that the frames of {store} are read from can be seen "
            "from here, nor their folders: run this where the archive is"
        )
    found = Pruning(defaultdict(set), 0, hidden, _rubbish(store))
    for some in _by_key(files).values():
        _prune_kind(store, some, state, found, dry_run)
    if not dry_run:
        store.folder.remove(*found.rubbish)
    return found


def _prune_kind(
    store: Store,
    files: list[StoredFile],
    state: Mapping[str, Contents | None],
    found: Pruning,
    dry_run: bool,
) -> None:
    """Prune the files of one kind of measurement."""
    live: list[tuple[StoredFile, list[int]]] = []
    last = _last(entry for file in files for entry in file.entries)
    for file in files:
        rows = []
        for row, entry in enumerate(file.entries):
            if _is_stale(entry, state):
                found.stale[entry.recording].add(entry.uid)
            elif last[_identity(entry)] is not entry:
                found.again += 1
            else:
                rows.append(row)
        live.append((file, rows))
        found.rows += len(rows)
    found.bytes += sum(f.bytes for f, rows in live if not rows)
    if dry_run:
        return
    small = sum(1 for file, _ in live if file.bytes < _SMALL)
    group: list[tuple[StoredFile, list[int]]] = []
    for file, rows in sorted(live, key=lambda each: each[0].kind):
        if len(rows) == len(file.entries) and (file.bytes >= _SMALL or small < 2):
            continue
        if group and (group[0][0].kind != file.kind or _bytes(group) + file.bytes > _JOINED):
            _rewrite(store, group)
            group = []
        group.append((file, rows))
    if group:
        _rewrite(store, group)


def _bytes(group: list[tuple[StoredFile, list[int]]]) -> int:
    return sum(file.bytes for file, _ in group)


def _rewrite(store: Store, some: list[tuple[StoredFile, list[int]]]) -> None:
    """Write the rows that stay of some files into one, then remove these."""
    tables, entries = [], list[Entry]()
    for file, rows in some:
        if not rows:
            continue
        table = store.read(file).drop_columns(["uid"])
        tables.append(table.take(pa.array(rows, pa.int64())))
        entries += [file.entries[row] for row in rows]
    first = some[0][0]
    if tables:
        table = pa.concat_tables(tables, promote_options="default")
        store.add(Key(first.measured, first.depends_on), first.kind, table, entries)
    store.remove([file for file, _ in some])


def _by_key(files: Iterable[StoredFile]) -> dict[str, list[StoredFile]]:
    found: dict[str, list[StoredFile]] = defaultdict(list)
    for file in files:
        found[file.name.partition("/")[0]].append(file)
    return found


def _identity(entry: Entry) -> tuple[str, str]:
    """Return what tells frames apart, and one frame before its file changed from after that."""
    return entry.uid, str(entry.files)


def _last(entries: Iterable[Entry]) -> dict[tuple[str, str], Entry]:
    """Return the last entry of each frame as it was read from the same files.

    Among samples of pixels the largest one counts.
    """
    last: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        before = last.get(_identity(entry))
        if before is None or entry.worth >= before.worth:
            last[_identity(entry)] = entry
    return last


def _states(files: Iterable[StoredFile]) -> dict[str, Contents | None]:
    """Return each file that a frame was read from as it is now; None where that is not known."""
    paths = list(dict.fromkeys(p for f in files for entry in f.entries for p in entry.files))
    now = Contents.of_files(paths)
    return {
        path: None
        if path not in now.files and not is_uri(path) and not Path(path).parent.is_dir()
        else Contents({path: now.files[path]} if path in now.files else {})
        for path in paths
    }


def _is_stale(entry: Entry, state: Mapping[str, Contents | None]) -> bool:
    """Whether a file that the frame was read from is gone or has changed, for all that is known."""
    known = {path: contents for path in entry.files if (contents := state[path]) is not None}
    if len(known) < len(entry.files):
        return False
    now = Contents({p: stamp for contents in known.values() for p, stamp in contents.files.items()})
    return bool(now.changed_since(entry.contents))


def _rubbish(store: Store) -> list[str]:
    """Return the names of files that were set aside, or never finished."""
    names = store.folder.names()
    there = {*names}
    old = datetime.now(UTC) - _WRITING
    return [
        name
        for name in names
        if name.startswith(f"{SET_ASIDE}/")
        or (
            name.endswith(".parquet")
            and manifest_of(name) not in there
            and (written_at(name) or datetime.now(UTC)) < old
        )
    ]
