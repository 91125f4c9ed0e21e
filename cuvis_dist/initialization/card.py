"""What was an initialization made from? Its card says it: a JSON file beside the saved pipeline.

The schema is described in ``docs/initializations.md``. What a card says is enough to make the
initialization again from the same data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from cuvis_dist.archive import Contents, Frame
from cuvis_dist.errors import InputError
from cuvis_dist.hashing import hash_settings
from cuvis_dist.initialization.diagnosis import Finding
from cuvis_dist.initialization.passes import PassRecord
from cuvis_dist.nodes.state import hash_state
from cuvis_dist.scaling import Measuring

#: The format of the cards that are written here.
FORMAT = 1
_PACKAGES = (
    "cuvis-dist",
    "cuvis-ai",
    "cuvis-ai-core",
    "cuvis-ai-dataloader",
    "ray",
    "torch",
    "pytorch-lightning",
    "numpy",
)
#: By the name of a node, the buffers and parameters of its state dict.
States = Mapping[str, Mapping[str, Tensor]]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileStamp(_Part):
    """What a file was known by: see :class:`cuvis_dist.archive.contents.Stamp`."""

    size: int
    changed: int
    checksum: str | None = None
    etag: str | None = None


class UsedFrame(_Part):
    """A frame that was measured, and the files that it was read from."""

    uid: str
    recording: str
    files: list[str]


class UsedFrames(_Part):
    """Which frames an initialization was made from.

    Attributes
    ----------
    sha256 : str
        Hash of the uids of ``used``, in their order.
    used : list of UsedFrame
        The frames that were measured, in canonical order.
    skipped : dict of str to str
        The frames that could not be used, by uid, each with its reason.
    files : dict of str to FileStamp
        The files of all of them, by path or URI.
    """

    sha256: str
    used: list[UsedFrame]
    skipped: dict[str, str]
    files: dict[str, FileStamp]


class Card(_Part):
    """What an initialization was made from.

    Attributes
    ----------
    format : int
        The version of the card's format; a reader refuses one that it does not know.
    name : str
        What the initialization is called.
    made : str
        When, in UTC, as ISO 8601.
    state : str
        SHA-256 of all buffers and parameters, as ``initialized`` in ``run.json``.
    settings : dict
        The part ``measuring`` of the settings, which pixels count among them, less the store.
    nodes : dict of str to dict
        Per fitted node its statistic, how many pixels, whether it is exact; see
        :class:`~cuvis_dist.initialization.passes.PassRecord`.
    inside : dict or None
        Which pixels counted, where only those of the bulk did; see
        :class:`~cuvis_dist.initialization.inside.Inside`.
    findings : list of dict
        What looked bad about the fit: ``node`` and ``message``.
    metrics : dict
        Per split, the metrics of the initialized pipeline.
    versions : dict of str to str
        Packages.
    pipeline : dict
        The pipeline as it was built, before the fit: the content of a pipeline's file.
    trainrun : dict or None
        What of the trainrun an initialization depends on: the content of a trainrun's file, whose
        ``pipeline`` is called ``pipeline.yaml``.
    frames : UsedFrames or None
        The frames; None where whoever saved the state did not say.
    """

    format: int = FORMAT
    name: str
    made: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    state: str
    settings: dict[str, Any] = {}
    nodes: dict[str, dict[str, Any]] = {}
    inside: dict[str, Any] | None = None
    findings: list[dict[str, str]] = []
    metrics: dict[str, dict[str, float | None]] = {}
    versions: dict[str, str] = Field(default_factory=lambda: package_versions())
    pipeline: dict[str, Any]
    trainrun: dict[str, Any] | None = None
    frames: UsedFrames | None = None

    def to_bytes(self) -> bytes:
        """Return the card as the content of a JSON file."""
        return self.model_dump_json(indent=2).encode() + b"\n"

    @classmethod
    def from_bytes(cls, content: bytes, where: object) -> Card:
        """Return the card that a JSON file holds.

        Parameters
        ----------
        content : bytes
            The content of the file.
        where : path or URI
            The file, for messages.

        Raises
        ------
        InputError
            If it is no card, or one of a format that is not known here.
        """
        try:
            values = json.loads(content)
            found = values["format"]
            if isinstance(found, int) and found > FORMAT:
                raise InputError(
                    f"the card {where} has the format {found}, and this release of cuvis-dist "
                    f"({version('cuvis-dist')}) reads {FORMAT}: use the release that wrote it"
                )
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise InputError(f"{where} is no card: {place}: {first['msg']}") from error
        except InputError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{where} is no card of an initialization: it has no format"
            ) from error


@dataclass(frozen=True)
class Source:
    """What a fit of phase 1 was made from.

    Attributes
    ----------
    frames : sequence of Frame
        The frames that it was given, in canonical order.
    contents : Contents
        Their files, as they were.
    passes : sequence of PassRecord
        What each pass read and fitted.
    findings : sequence of Finding
        What looks bad about it.
    measuring : Measuring
        The settings that change results.
    """

    frames: Sequence[Frame]
    contents: Contents
    passes: Sequence[PassRecord]
    findings: Sequence[Finding]
    measuring: Measuring

    def described(self) -> dict[str, Any]:
        """Return what a card says of it."""
        skipped = {uid: why for done in self.passes for uid, why in done.skipped.items()}
        used = [frame for frame in self.frames if frame.uid not in skipped]
        return {
            "frames": UsedFrames(
                sha256=hash_settings([frame.uid for frame in used]),
                used=[
                    UsedFrame(uid=frame.uid, recording=frame.recording, files=[*frame.reads])
                    for frame in used
                ],
                skipped=skipped,
                files={name: FileStamp(**asdict(s)) for name, s in self.contents.files.items()},
            ),
            # Where statistics are kept changes no result.
            "settings": self.measuring.model_dump(mode="json", exclude={"store"}),
            "nodes": {name: fit for done in self.passes for name, fit in done.nodes.items()},
            "inside": next((done.inside for done in self.passes if done.inside), None),
            "findings": [asdict(finding) for finding in self.findings],
        }


@dataclass(frozen=True)
class Initialization:
    """The fitted state of a pipeline, as it was saved.

    Attributes
    ----------
    file : Path
        The ``.pt``, on this machine.
    sha256 : str
        Hash of the state.
    states : dict of str to dict of str to Tensor
        The state, by node and name.
    card : Card or None
        What it was made from; None for a saved pipeline of which nobody knows.
    structure : dict or None
        The nodes and connections of the pipeline that was fitted, as far as is known.
    """

    file: Any
    sha256: str
    states: States
    card: Card | None
    structure: dict[str, Any] | None

    @property
    def name(self) -> str | None:
        """The name that its card says."""
        return self.card.name if self.card else None

    def __str__(self) -> str:
        return f"{self.card.name} ({self.file})" if self.card else str(self.file)


def make_card(
    pipeline: CuvisPipeline, /, source: Source | None = None, name: str | None = None, **more: Any
) -> Card:
    """Return the card of the state that a pipeline has now.

    Parameters
    ----------
    source : Source, optional
        What its fit was made from.
    name : str, optional
        What the initialization is called; by default the pipeline's name and the first digits of
        the state's hash, so that equal states have equal names.
    **more
        Further fields of the card.
    """
    state = hash_state(pipeline.nodes())
    said = source.described() if source else {}
    fields = {"pipeline": built(pipeline)} | said | more
    return Card(name=name or f"{pipeline.name}-{state[:8]}", state=state, **fields)


def built(pipeline: CuvisPipeline) -> dict[str, Any]:
    """Return the content of a pipeline's file, less the time, with values that JSON has as well."""
    content = json.loads(json.dumps(pipeline.serialize().to_dict(), default=str))
    content["metadata"].pop("created", None)
    return content


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    return {name: version(name) for name in _PACKAGES}
