"""Are the files of an archive those that an earlier run has read?

A file is known by its size and time of change, which are asked for without opening it, in a store
that has ETags by that as well, and on request by a checksum of its content. What is reused from an
earlier run was read from the same files, or it is read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cuvis_dist.errors import DataError, one_line
from cuvis_dist.staging import etags, listed
from cuvis_dist.staging.uris import opened
from cuvis_dist.storage import is_uri

if TYPE_CHECKING:
    from cuvis_dist.archive.frames import Frame

#: So many changed files are named in a message.
_NAMED = 3
#: Of so many files at URIs the ETags are asked for, a request each; of more that would take long.
_ETAGS = 1000
#: Files whose checksums are computed at the same time.
_READERS = 8


@dataclass(frozen=True)
class Stamp:
    """What a file is known by.

    Attributes
    ----------
    size : int
        Bytes.
    changed : int
        Time of change in ns, as the disk or the store tells.
    checksum : str or None
        BLAKE2b of the content, where it was asked for.
    etag : str or None
        The store's ETag, where it was asked for.
    """

    size: int
    changed: int
    checksum: str | None = None
    etag: str | None = None

    def differs(self, earlier: Stamp) -> str:
        """Return in what this differs from an earlier stamp of the file; nothing if in nothing."""
        if self.size != earlier.size:
            return f"its size was {earlier.size} bytes and is {self.size}"
        if self.changed != earlier.changed:
            return "it was written again"
        for name, now, before in (
            ("ETag", self.etag, earlier.etag),
            ("checksum", self.checksum, earlier.checksum),
        ):
            if now and before and now != before:
                return f"its {name} is another one"
        return ""


@dataclass(frozen=True)
class Contents:
    """The files of some frames, as they are at one moment.

    Attributes
    ----------
    files : dict of str to Stamp
        By path or URI; without those that cannot be found from here.
    """

    files: dict[str, Stamp]

    @classmethod
    def of(cls, frames: Iterable[Frame], verify: bool = False) -> Contents:
        """Look at all files that the frames are read from; with ``verify`` read them.

        Raises
        ------
        DataError
            If a store does not answer, or a file cannot be read.
        """
        return cls.of_files([name for frame in frames for name in frame.reads], verify)

    @classmethod
    def of_files(cls, files: Iterable[str], verify: bool = False) -> Contents:
        """Look at files, by path or URI, as :meth:`of` does; raises what that does."""
        names = list(dict.fromkeys(files))
        found = {uri: Stamp(*stamp) for uri, stamp in listed(filter(is_uri, names)).items()}
        told = etags(found) if len(found) <= _ETAGS else {}
        found = {uri: replace(stamp, etag=told.get(uri)) for uri, stamp in found.items()}
        for path in names:
            if not is_uri(path) and (stamp := _local(path)):
                found[path] = stamp
        if verify:
            with ThreadPoolExecutor(_READERS) as readers:
                stamps = readers.map(_checked, found, found.values())
            found = dict(zip(found, stamps, strict=True))
        return cls({name: found[name] for name in names if name in found})

    @classmethod
    def parse(cls, value: Any) -> Contents:
        """Return what :meth:`as_json` returned; raises ValueError or TypeError for other values."""
        return cls({str(name): Stamp(*stamp) for name, stamp in dict(value).items()})

    def as_json(self) -> dict[str, list[Any]]:
        """Return what JSON can say."""
        return {n: [s.size, s.changed, s.checksum, s.etag] for n, s in self.files.items()}

    def changed_since(self, earlier: Contents) -> dict[str, str]:
        """Return in what files differ from what they were; only files that differ are in it."""
        differ = {}
        for name, stamp in self.files.items():
            if name not in earlier.files:
                differ[name] = "it was not read before"
            elif what := stamp.differs(earlier.files[name]):
                differ[name] = what
        return differ | {n: "it is gone" for n in earlier.files if n not in self.files}

    def only(self, frames: Iterable[Frame]) -> Contents:
        """Return the files that some of the frames are read from."""
        names = dict.fromkeys(name for frame in frames for name in frame.reads)
        return Contents({name: self.files[name] for name in names if name in self.files})

    def without_checksum_in(self, earlier: Contents) -> int:
        """Return how many files have a checksum here, and had none before."""
        known = earlier.files
        return sum(
            1 for n, s in self.files.items() if s.checksum and n in known and not known[n].checksum
        )

    def with_checksums_of(self, earlier: Contents) -> Contents:
        """Return these stamps with the checksums that unchanged files are known to have."""
        files = {}
        for name, stamp in self.files.items():
            before = earlier.files.get(name)
            same = before is not None and stamp.checksum is None and not stamp.differs(before)
            files[name] = replace(stamp, checksum=before.checksum) if same and before else stamp
        return Contents(files)

    def require_unchanged(self, frames: Iterable[Frame], what: str) -> None:
        """Raise DataError, which names the files, if some have changed since, during ``what``."""
        if changed := Contents.of(frames).changed_since(self):
            raise DataError(
                f"{in_words(changed)} while {what} read it: what was computed is of neither "
                "content, and is not used. Run again when nobody writes there"
            )


def in_words(changed: Mapping[str, str]) -> str:
    """Return which files have changed and how, as the beginning of a sentence."""
    few = [f"{name} has changed ({what})" for name, what in list(changed.items())[:_NAMED]]
    more = len(changed) - len(few)
    return ", ".join(few) + (f", and {more} other files" if more else "")


def read_contents(content: bytes) -> dict[str, Contents]:
    """Return what :func:`write_contents` wrote, nothing of what is damaged or foreign."""
    try:
        return {str(k): Contents.parse(v) for k, v in dict(json.loads(content)).items()}
    except (ValueError, TypeError):
        return {}


def write_contents(contents: Mapping[str, Contents]) -> bytes:
    """Return contents by name as the bytes of a JSON file."""
    return json.dumps({name: each.as_json() for name, each in contents.items()}).encode()


def _local(path: str) -> Stamp | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # such as a name that is no path
        return None
    # A folder, or what stands for "no file", changes without any frame that does.
    return Stamp(found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def _checked(name: str, stamp: Stamp) -> Stamp:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with opened(name) if is_uri(name) else open(name, "rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    except OSError as error:
        raise DataError(f"{name} cannot be read: {one_line(error)}") from error
    return replace(stamp, checksum=digest.hexdigest())
