"""Which file does a frame get, whatever its recording is called?

A recording's name comes from an archive, and may be a path, a URI, or ``..``. The names made of it
here are plain: one folder per recording, one file per frame, none with a separator, and no two
alike, also where capitals do not count.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from cuvis_dist.archive import Frame

_LONGEST = 100


def file_names(frames: Sequence[Frame], suffix: str, taken: Iterable[str] = ()) -> list[str]:
    """Return ``<recording>/<index><suffix>`` for each of some frames of different uids.

    Parameters
    ----------
    frames : sequence of Frame
        The names depend on all of them: those that would be alike get a hash of what they stand
        for.
    suffix : str
        What the names of the files end in, such as ``.npz``.
    taken : iterable of str
        What a recording's folder must not be called.
    """
    recordings = list(dict.fromkeys(frame.recording for frame in frames))
    folders = _distinct({name: _stem(name) for name in recordings}, taken)
    of: dict[str, dict[str, str]] = {name: {} for name in recordings}
    for frame in frames:
        of[frame.recording][frame.uid] = _index(frame)
    files = {recording: _distinct(names, ()) for recording, names in of.items()}
    return [
        f"{folders[frame.recording]}/{files[frame.recording][frame.uid]}{suffix}"
        for frame in frames
    ]


def _stem(recording: str) -> str:
    """Return the last part of a recording's path without its suffix, made plain."""
    last = re.split(r"[/\\]", recording.rstrip("/\\"))[-1]
    return _plain(re.sub(r"(?<=.)\.[A-Za-z0-9]{1,5}$", "", last))


def _index(frame: Frame) -> str:
    """Return what a frame's uid adds to its recording: the index, as a rule."""
    return _plain(frame.uid.removeprefix(frame.recording).lstrip("#") or "0")


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".-")[:_LONGEST] or "_"


def _distinct(names: dict[str, str], taken: Iterable[str]) -> dict[str, str]:
    """Give those that would be alike a hash of their keys, until none are."""
    names, reserved = dict(names), {name.casefold() for name in taken}
    while True:
        uses = Counter(name.casefold() for name in names.values())
        alike = [
            key
            for key, name in names.items()
            if uses[name.casefold()] > 1 or name.casefold() in reserved
        ]
        if not alike:
            return names
        for key in alike:
            names[key] += f"-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
