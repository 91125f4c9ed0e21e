"""How is a recording left out of the train split? By upstream's own selectors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from cuvis_ai_schemas.training import DataConfig
from cuvis_ai_schemas.training.data import DataSplitConfig, Selector, SelectorKind

from cuvis_dist.errors import InputError

if TYPE_CHECKING:
    from cuvis_dist.archive import Frame

#: So many recordings are named in a message.
_NAMED = 5


def leave_out(
    data: DataConfig, without: Collection[str], base_dir: Path, frames: Sequence[Frame]
) -> DataConfig:
    """Return settings whose train split has all frames but those of some recordings.

    Parameters
    ----------
    data : DataConfig
        The ``data`` block of a trainrun.
    without : collection of str
        Names of recordings, with or without their folders and suffixes, or globs of such names.
    base_dir : Path
        The folder that a relative ``splits_path`` starts from.
    frames : sequence of Frame
        Those of the whole train split.

    Raises
    ------
    InputError
        If nothing in the split has such a name, nothing else is in it, or the data module decides
        by itself what is in it.
    """
    splits = data.splits
    if splits is None:
        raise InputError(
            f"no recording can be left out: the data module {data.data_module} has no splits in "
            "the trainrun, and decides by itself what is in the train split"
        )
    recordings = list(dict.fromkeys(frame.recording for frame in frames))
    for pattern in without:
        if not any(is_called(recording, pattern) for recording in recordings):
            raise InputError(
                f"no recording of the train split is called {pattern}: there are "
                f"{some_of(recordings)}"
            )
    if all(any(is_called(name, pattern) for pattern in without) for name in recordings):
        raise InputError(f"no frame of the train split is left without {', '.join(without)}")
    if splits.splits_path is not None:
        content = (base_dir / splits.splits_path).read_bytes()
        splits = DataSplitConfig.model_validate_json(content)
    return data.model_copy(update={"splits": excluding(splits, without)})


def excluding(splits: DataSplitConfig, without: Collection[str]) -> DataSplitConfig:
    """Return splits whose train split has no frame of some recordings, named as above."""
    patterns = [each for pattern in without for each in (pattern, f"*/{pattern}")]
    of = [
        Selector(kind=SelectorKind.UNION, of=splits.train),
        *(Selector(kind=SelectorKind.GLOB, pattern=pattern) for pattern in patterns),
    ]
    return splits.model_copy(update={"train": [Selector(kind=SelectorKind.EXCEPT, of=of)]})


def is_called(recording: str, pattern: str) -> bool:
    """Whether a recording has a name, or one that a glob describes.

    Names are with or without their folders and suffixes, as upstream's selectors take them.
    """
    stem = PurePosixPath(recording.replace("\\", "/")).stem
    return any(fnmatch(name, p) for name in (recording, stem) for p in (pattern, f"*/{pattern}"))


def some_of(recordings: Iterable[str]) -> str:
    """Return the first few of some names, and how many more there are."""
    names = list(recordings)
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
