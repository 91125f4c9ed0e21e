"""What of a pass does a store have, frame by frame, and what is missing in it?

A store keeps the statistics of the first pass, whose ports no node stands before that phase 1 fits:
those of later passes change with every frame that comes or goes. Beside them it keeps a sample of
each frame's pixels, for nodes that are fitted on a sample, and for whoever asks what is in an
archive.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pytorch_lightning as pl
import torch
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from torch import Tensor

from cuvis_dist.archive import Archive, Contents, Frame
from cuvis_dist.errors import one_line
from cuvis_dist.initialization.drawing import Drawing, Frontier, kept_at, port_of
from cuvis_dist.initialization.levels import planned
from cuvis_dist.initialization.plan import Pass
from cuvis_dist.initialization.shards import Measurement
from cuvis_dist.nodes.catalogue import is_pixelwise
from cuvis_dist.nodes.upstream import nodes_before
from cuvis_dist.scaling import Measuring
from cuvis_dist.statistics import Drawn, PixelSample, Statistic, from_bytes
from cuvis_dist.statistics.columns import from_table, to_table
from cuvis_dist.statistics.drawn import expected_per_frame
from cuvis_dist.statistics.statistic import as_array
from cuvis_dist.store import (
    DamagedFileError,
    Entry,
    Found,
    Identity,
    Key,
    Keys,
    Store,
    StoredFile,
    identity_of,
)
from cuvis_dist.store import pixels as pixel_table

#: Pixels that are kept of a frame, on average, where no node is fitted on a sample.
_FEW_PIXELS = 512
#: Class of what a file holds that has no statistics.
_PIXELS = "pixels"
#: Port of the batch that says where the bands lie, in nm.
_WAVELENGTHS = "wavelengths"


class StoredPass:
    """The measurements of one pass that a store has of the frames of an archive.

    Parameters
    ----------
    store : Store
        The store.
    pipeline : CuvisPipeline
        As it is when the pass begins.
    datamodule : LightningDataModule
        It reads the frames.
    archive : Archive
        The frames.
    this_pass : Pass
        What is measured of them.
    measuring : Measuring
        Which pixels count, and how many are kept.

    Attributes
    ----------
    keys : dict of str to Key
        By measurement.
    drawing : Drawing
        It draws the pixels of a frame that are kept.
    fitted_on : list of str
        What of each pixel later levels are fitted on: more is kept.
    """

    def __init__(
        self,
        store: Store,
        pipeline: CuvisPipeline,
        datamodule: pl.LightningDataModule,
        archive: Archive,
        this_pass: Pass,
        measuring: Measuring,
    ) -> None:
        self.store, self.archive, self.this_pass = store, archive, this_pass
        keys = Keys(pipeline, datamodule, measuring.pixels)
        self.keys = {
            m.key: keys.of_statistic(m.key, m.node, m.recipe) for m in this_pass.measurements
        }
        names = _kept(pipeline, this_pass, measuring)
        self._pixels = keys.of_pixels(map(port_of, names), measuring.sample_seed)
        self._needed = self._expected = 0.0
        drawn = float(_FEW_PIXELS)
        self.fitted_on: list[str] = []
        if this_pass.later:
            self.fitted_on = Frontier(pipeline, this_pass).names
            self._needed = expected_per_frame(measuring.sample_pixels, len(archive))
            # Twice as many: enough for an archive of which half is taken out.
            drawn = max(drawn, expected_per_frame(measuring.sample_pixels, -(-len(archive) // 2)))
        self.drawing = Drawing(pipeline, names, measuring, drawn)
        self._found: dict[str, dict[Identity, Found]] = {}

    def look(self, contents: Contents) -> None:
        """Find what the store has of the frames, whose files are these."""
        frames = self.archive.frames
        for key in self.keys.values():
            self._found[key.digest] = self.store.find(key, frames, contents)
        self._found[self._pixels.digest] = self.store.find(
            self._pixels, frames, contents, self._enough
        )

    def _enough(self, entry: Entry) -> bool:
        """Whether so many pixels of a frame were kept as are needed."""
        n, bound = entry.about["n"], entry.about["bound"]
        return bound is None or bound >= min(1.0, self._needed / max(1, n))

    def missing(self, without: Collection[Identity] = ()) -> list[int]:
        """Return the positions of the frames that have to be read, each frame once.

        Parameters
        ----------
        without : collection of Identity
            Frames that do not count.
        """
        first: dict[Identity, int] = {}
        for position, frame in enumerate(self.archive.frames):
            if identity_of(frame) not in without:
                first.setdefault(identity_of(frame), position)
        lacking = [
            position
            for identity, position in first.items()
            if not all(identity in found for found in self._found.values())
        ]
        if not lacking and any(fit.chain for fit in self.this_pass.fits):
            for key in self.keys.values():
                found = self._found[key.digest]
                if not any(found[each].entry.about["probes"] for each in first):
                    return [*first.values()][:1]  # some frame has to show that maps are affine
        return lacking

    # ---- what is there ---------------------------------------------------------------

    def statistics(
        self, name: str, positions: Collection[int]
    ) -> Iterator[tuple[int, Statistic, Tensor | None]]:
        """Yield a measurement's statistic of each frame, and its probes, file by file.

        Parameters
        ----------
        name : str
            The measurement.
        positions : collection of int
            The frames of the archive whose measurements are wanted.

        Raises
        ------
        UnusableFileError
            If a file is damaged, and then set aside, or cannot be read any more.
        """
        for file, table, rows in self._files(self.keys[name], positions):
            with self._sound(file):
                statistics = from_table(table, file.kind, [row for row, _ in rows])
                probes = [_probes(table, row) for row, _ in rows]
            for (_, position), statistic, few in zip(rows, statistics, probes, strict=True):
                placed = statistic.at(position) if isinstance(statistic, PixelSample) else statistic
                yield position, placed, few if few is None else few.reshape(-1, placed.channels)

    def pixels(self, positions: Collection[int]) -> Iterator[tuple[int, Drawn | None]]:
        """Yield the pixels that were kept of each frame, file by file.

        As many as the pass needs; all of them where it needs none. The parameters are those of
        :meth:`statistics`.
        """
        for file, table, rows in self._files(self._pixels, positions):
            with self._sound(file):
                every = pixel_table.from_table(table, [row for row, _ in rows])
            for (_, position), drawn in zip(rows, every, strict=True):
                if drawn is not None and self._needed:
                    drawn = drawn.thinned(self._needed)
                yield position, drawn

    def _files(
        self, key: Key, positions: Collection[int]
    ) -> Iterator[tuple[StoredFile, pa.Table, list[tuple[int, int]]]]:
        """Yield each file with the rows in it, and the positions of their frames."""
        found, frames = self._found[key.digest], self.archive.frames
        rows: dict[str, list[tuple[int, int]]] = {}
        files: dict[str, StoredFile] = {}
        for position in positions:
            place = found[identity_of(frames[position])]
            files[place.file.name] = place.file
            rows.setdefault(place.file.name, []).append((place.row, position))
        for name in sorted(files):
            yield files[name], self.store.read(files[name]), rows[name]

    @contextmanager
    def _sound(self, file: StoredFile) -> Iterator[None]:
        """Set a file aside whose content raises an error: it is damaged, whatever its hash says."""
        try:
            yield
        except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
            why = f"{self.store.folder.at(file.name)} is damaged: {one_line(error)}"
            self.store.set_aside(file.name, why)
            raise DamagedFileError(why) from error

    # ---- what is added ---------------------------------------------------------------

    def add(self, measured: Mapping[int, Measurement], contents: Contents) -> None:
        """Write what was measured of some frames.

        Parameters
        ----------
        measured : dict of int to Measurement
            By position.
        contents : Contents
            The files that the frames were read from.

        Raises
        ------
        InputError, ClusterError
            If the store cannot be written to.
        """
        frames = self.archive.frames
        entries = {i: _entry(frames[i], contents) for i in measured}
        for number, name in enumerate(self.keys):  # one after another, for the memory that it takes
            by_kind: dict[str, list[tuple[int, Statistic]]] = {}
            for position, each in measured.items():
                if not self._has(name, position, each):
                    statistic = from_bytes(each.statistics[number])
                    by_kind.setdefault(statistic.name, []).append((position, statistic))
            for kind, some in by_kind.items():
                few = [measured[i].probes.get(name) for i, _ in some]
                table = _with_probes(to_table([statistic for _, statistic in some]), few)
                told: list[dict[str, Any]] = [{"probes": probes is not None} for probes in few]
                self._write(self.keys[name], kind, table, [entries[i] for i, _ in some], told)
        known = self._found[self._pixels.digest]
        kept = {i: m.drawn for i, m in measured.items() if entries[i].identity not in known}
        if kept:
            about = [{"n": d.n if d else 0, "bound": d.bound if d else None} for d in kept.values()]
            table = pixel_table.to_table([*kept.values()])
            self._write(self._pixels, _PIXELS, table, [entries[i] for i in kept], about)

    def _has(self, name: str, position: int, measured: Measurement) -> bool:
        """Whether a frame's statistic is there, with probes if there are any now."""
        there = self._found[self.keys[name].digest].get(identity_of(self.archive.frames[position]))
        return there is not None and (name not in measured.probes or there.entry.about["probes"])

    def _write(
        self, key: Key, kind: str, table: pa.Table, entries: list[Entry], about: list[dict]
    ) -> None:
        told = [
            Entry(entry.uid, entry.recording, entry.files, what)
            for entry, what in zip(entries, about, strict=True)
        ]
        self.store.add(key, kind, table, told)


def _entry(frame: Frame, contents: Contents) -> Entry:
    return Entry(frame.uid, frame.recording, contents.only([frame]).as_json())


def _kept(pipeline: CuvisPipeline, this_pass: Pass, measuring: Measuring) -> list[str]:
    """Return what is kept of each pixel that is drawn: see :class:`Drawing`.

    What later levels could be fitted on, whether they are or not, so that the setting can be
    changed; and the measured ports themselves.
    """
    names = {kept_at("", _WAVELENGTHS)}
    sampled = measuring.model_copy(update={"later_levels": "sampled"})
    for step in [this_pass, *planned(pipeline, sampled)]:
        if step.later and step.by_key() == this_pass.by_key():
            names |= {*Frontier(pipeline, step).names}
            break
    by_name = {node.name: node for node in pipeline.nodes()}
    for measurement in this_pass.measurements:
        node, _, port = measurement.source.rpartition(".")
        known = [by_name[node]] if node in by_name else []
        if all(map(is_pixelwise, [*known, *nodes_before(pipeline, known)])):
            names.add(kept_at(node if known else "", port))
    return sorted(names)


# ---- probes ----------------------------------------------------------------------------


def _with_probes(table: pa.Table, probes: list[Tensor | None]) -> pa.Table:
    """Return a table with a column of pixels to check affine maps on, where there are any."""
    arrays = [None if few is None else as_array(few) for few in probes]
    content = [None if each is None else np.ascontiguousarray(each).tobytes() for each in arrays]
    table = table.append_column("probes", pa.array(content, pa.large_binary()))
    types = [None if each is None else each.dtype.str for each in arrays]
    return table.append_column("probes.type", pa.array(types, pa.string()))


def _probes(table: pa.Table, row: int) -> Tensor | None:
    content = table.column("probes")[row].as_py()
    if content is None:
        return None
    values = np.frombuffer(content, table.column("probes.type")[row].as_py()).copy()
    return torch.from_numpy(values)
