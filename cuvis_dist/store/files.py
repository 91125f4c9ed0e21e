"""How is one file of a store written and read, and what can be wrong with it?

Parquet, with a manifest beside it: JSON, which says what was measured, of which frames, and the
file's size and hash. Both have a name that no other file has, and are written whole and never
again. The manifest is written last: a file without one does not count, so that a writer that is
killed leaves the store as it was.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cuvis_dist.archive import Contents
from cuvis_dist.errors import CuvisDistError, one_line
from cuvis_dist.hashing import hash_settings
from cuvis_dist.storage import OutputFolder

#: Version of what is described here; files of other versions are not read.
FORMAT = 1
_TIME = "%Y%m%dT%H%M%S"


Identity = tuple[str, str]
"""What a frame is known by: its uid, and the path or URI of its file."""


class UnusableFileError(CuvisDistError):
    """A file that cannot be used, or not any more; the message names it and says why."""


class DamagedFileError(UnusableFileError):
    """A file that is not what its manifest says."""


@dataclass(frozen=True)
class Key:
    """One kind of measurement.

    Attributes
    ----------
    name : str
        What people are told, such as ``Moments(data.cube)``.
    depends_on : dict
        All that it depends on, as JSON can say it.
    """

    name: str
    depends_on: dict[str, Any]

    @cached_property
    def digest(self) -> str:
        """The name of its folder in a store: 32 hexadecimal digits of a SHA-256."""
        return hash_settings(self.depends_on)[:32]


@dataclass(frozen=True)
class Entry:
    """One frame in a file.

    Attributes
    ----------
    uid, recording : str
        Identity of the frame.
    files : dict of str to list
        The files that it was read from, as :meth:`~cuvis_dist.archive.Contents.as_json` has them.
    about : dict
        What is to be known before the file is read.
    """

    uid: str
    recording: str
    files: dict[str, list[Any]]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> Identity:
        """What the frame is known by; the first file is its own."""
        return self.uid, next(iter(self.files))

    @property
    def worth(self) -> tuple[bool, float]:
        """What makes one measurement of a frame better than another: probes, more pixels."""
        bound = self.about.get("bound")
        return bool(self.about.get("probes")), float(bound) if bound is not None else 0.0

    @property
    def contents(self) -> Contents:
        """The files that the frame was read from."""
        return Contents.parse(self.files)


@dataclass(frozen=True)
class StoredFile:
    """A file of a store, as its manifest tells.

    Attributes
    ----------
    name : str
        Name of the Parquet file in the store.
    kind : str
        Class of the statistics in it, or what else it holds.
    measured : str
        What was measured, for people.
    depends_on : dict
        What that depends on (:class:`Key`).
    bytes : int
        Size of the file.
    blake2b : str
        Hash of its content.
    entries : tuple of Entry
        The frames in it, row by row.
    written : str
        When, as ISO 8601.
    by : str
        Which ``cuvis_dist`` wrote it.
    """

    name: str
    kind: str
    measured: str
    depends_on: dict[str, Any]
    bytes: int
    blake2b: str
    entries: tuple[Entry, ...]
    written: str
    by: str

    @property
    def manifest(self) -> str:
        """Name of the manifest in the store."""
        return manifest_of(self.name)


def manifest_of(name: str) -> str:
    """Return the name of a Parquet file's manifest."""
    return name.removesuffix(".parquet") + ".json"


def written_at(name: str) -> datetime | None:
    """Return when a file of a store was written, as its name says; None if it has no such name."""
    try:
        stamp = name.rpartition("/")[2].partition("-")[0]
        return datetime.strptime(stamp, _TIME).replace(tzinfo=UTC)
    except ValueError:
        return None


def make_file(
    where: str, about: tuple[str, str, dict[str, Any]], table: pa.Table, entries: Sequence[Entry]
) -> tuple[StoredFile, bytes]:
    """Return a new file with a table, and its content; nothing is written.

    Parameters
    ----------
    where : str
        Name of the folder in the store.
    about : tuple of str, str and dict
        Kind, what was measured, and what that depends on.
    table : Table
        A row for each frame.
    entries : sequence of Entry
        The frames.
    """
    now = datetime.now(UTC)
    sink = io.BytesIO()
    uids = pa.array([entry.uid for entry in entries], type=pa.string())
    # Measured values hardly repeat, so that a dictionary of them costs time and space.
    table = table.add_column(0, "uid", uids)
    pq.write_table(table, sink, compression="zstd", use_dictionary=False)
    content = sink.getvalue()
    stored = StoredFile(
        f"{where}/{now.strftime(_TIME)}-{uuid.uuid4().hex[:12]}.parquet",
        *about,
        len(content),
        _hash(content),
        tuple(entries),
        now.isoformat(timespec="seconds"),
        f"cuvis-dist {version('cuvis-dist')}",
    )
    return stored, content


def write_file(folder: OutputFolder, stored: StoredFile, content: bytes) -> None:
    """Write a file, then its manifest.

    Raises
    ------
    OSError, InputError, ClusterError
        If the folder cannot be written to.
    """
    folder.write(stored.name, content)
    folder.write(stored.manifest, _as_json(stored))


def _as_json(stored: StoredFile) -> bytes:
    """Return the manifest: stamps that frames share are in it once."""
    stamps: dict[str, int] = {}
    frames = []
    for entry in stored.entries:
        of = [
            stamps.setdefault(json.dumps([name, *stamp]), len(stamps))
            for name, stamp in entry.files.items()
        ]
        frames.append([entry.uid, entry.recording, of, entry.about])
    values = asdict(replace(stored, entries=()))
    del values["entries"], values["name"]
    values |= {"format": FORMAT, "files": [json.loads(text) for text in stamps], "frames": frames}
    return (json.dumps(values) + "\n").encode()


def read_manifest(folder: OutputFolder, name: str) -> StoredFile:
    """Return the file whose manifest this is.

    Raises
    ------
    FileNotFoundError
        If somebody has removed it.
    DamagedFileError
        If it is no manifest.
    UnusableFileError
        If it is of another version, or must not be read.
    """
    place = folder.at(name)
    try:
        values = json.loads(folder.read(name))
        number = values.pop("format")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{place} is damaged: {one_line(error)}") from error
    except PermissionError as error:
        raise UnusableFileError(f"{place} cannot be read: {one_line(error)}") from error
    if number != FORMAT:
        raise UnusableFileError(
            f"{place} has the format {number!r}, and this cuvis-dist reads format {FORMAT}"
        )
    try:
        files = {i: (stamp[0], stamp[1:]) for i, stamp in enumerate(values.pop("files"))}
        entries = tuple(
            Entry(uid, recording, dict(files[i] for i in of), about)
            for uid, recording, of, about in values.pop("frames")
        )
        parquet = name.removesuffix(".json") + ".parquet"
        return StoredFile(name=parquet, entries=entries, **values)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise DamagedFileError(f"{place} is damaged: {one_line(error)}") from error


def read_file(folder: OutputFolder, stored: StoredFile) -> pa.Table:
    """Return the table of a file.

    Raises
    ------
    DamagedFileError
        If it is gone without its manifest, or not what that says.
    UnusableFileError
        If somebody has removed both.
    """
    place = folder.at(stored.name)
    try:
        content = folder.read(stored.name)
    except FileNotFoundError as error:
        if not folder.exists(stored.manifest):
            raise UnusableFileError(f"{place} was removed meanwhile") from error
        raise DamagedFileError(f"{place} is gone, and its manifest is there") from error
    return table_of(content, stored, place)


def table_of(content: bytes, stored: StoredFile, place: object) -> pa.Table:
    """Return the table that is the content of a file, which lies at ``place``.

    Raises
    ------
    DamagedFileError
        If it is not what the manifest says.
    """
    if len(content) != stored.bytes:
        raise DamagedFileError(
            f"{place} is damaged: it has {len(content)} bytes, and its manifest says {stored.bytes}"
        )
    if _hash(content) != stored.blake2b:
        raise DamagedFileError(f"{place} is damaged: its hash is not the one in its manifest")
    table = pq.read_table(pa.BufferReader(content))
    if table.column("uid").to_pylist() != [entry.uid for entry in stored.entries]:
        raise DamagedFileError(f"{place} is damaged: its frames are not those of its manifest")
    return table


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
