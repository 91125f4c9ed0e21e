"""What is found when each group is compared with the usual others?"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cuvis_dist.audit import bands as of_bands
from cuvis_dist.audit import models
from cuvis_dist.audit.causes import causes_of
from cuvis_dist.audit.compared import Cause, Compared
from cuvis_dist.audit.extremes import without_extremes
from cuvis_dist.audit.facts import broken_bands, facts_of, plain_facts, without_copies
from cuvis_dist.audit.features import Outside, bulk_of, condition_of, features_of
from cuvis_dist.audit.groups import FrameStatistics, Group, group_of
from cuvis_dist.audit.judging import ALONE, Judge
from cuvis_dist.audit.noise import Noise, noise
from cuvis_dist.audit.parts import beyond, unusual_frames
from cuvis_dist.audit.reference import axis_of, reference_of
from cuvis_dist.audit.visible import visible

#: Others whose noise is looked at, spread over all.
_MOST_NOISES = 40
#: What stands out in one of so many frames, or fewer, may be content.
_FEW_FRAMES = 4
#: How far the other frames are then off, at most.
_REST = 0.75
#: Frames are no content if they are so many times as far off as the farthest of other groups.
_BEYOND = 1.5
#: Of what extreme pixels make, so much may be left when they are taken out.
_LEFT = 0.15
#: Where most bands are constant or saturated, the few others say nothing more.
_FEW_BANDS = 0.2
#: Facts beside which no other cause is looked for.
_EXPLAINS_ALL = ("bytes",)
#: And what some causes explain. Bands that are shifted repeat the one at the end.
_EXPLAINS = {
    "coarse": ("noise", "noisy"),
    "empty": ("foreign",),
    "spectral shift": ("copied",),
}
#: What is no fault stands out by less than the limit.
NOT_QUITE = 0.99


class Comparison:
    """All groups, and what was computed of them for one set of bands or another."""

    def __init__(self, groups: Sequence[Group], wavelengths: np.ndarray | None) -> None:
        self.groups, self.wavelengths = [without_copies(g) for g in groups], wavelengths
        self._extreme: dict[int, tuple[int, float]] = {}
        self.live = of_bands.live_bands(groups)
        self._facts = plain_facts(groups, self.live)
        self._broken = broken_bands(groups, self.live, wavelengths)
        self._kept: dict[tuple[Any, ...], Any] = {}  # of single groups
        # Of the usual ones of this round:
        self._shared: dict[tuple[tuple[Hashable, ...], str], Any] = {}

    def judge(self, usual: np.ndarray) -> Judge:
        """Compare every group with the others, given which of them say what is usual."""
        self._shared = {}
        self.compared = [self._compare(i, usual) for i in range(len(self.groups))]
        known = [c.features for c in self.compared if c.features]
        squares = [(f.trace, float((f.mean**2).mean())) for f in known] or [(1.0, 1.0)]
        trace, deviation = map(float, np.median(np.array(squares), axis=0))
        return Judge([c.measures() for c in self.compared], usual, (trace, deviation))

    def standing(self, i: int, judge: Judge) -> float:
        """Return how far a group is off, in units of the limit.

        A fact stands out as such, and more than any estimate that is not above the limit.
        """
        compared, away = self.compared[i], judge.away(i)
        known = self._facts.get(i, []) + (
            compared.facts if judge.judged else self._all(compared, away, judge)
        )
        return max([self._far(i, judge), *(cause.weight for cause in known)])

    def _far(self, i: int, judge: Judge) -> float:
        """Return how far a group is off, below the limit where that is content or a few pixels."""
        far = max(judge.away(i).values())
        if far > 1 and self._is_rare_content(i, judge):
            return NOT_QUITE
        if i in self._extreme:  # a little of the pixels may be left
            return far if far > max(1, _LEFT * self._extreme[i][1]) else NOT_QUITE
        return far

    def causes(self, i: int, judge: Judge) -> list[Cause]:
        """Return what is likely the matter with a group, the first one first."""
        compared, facts = self.compared[i], self._facts.get(i, [])
        if any(fact.kind in _EXPLAINS_ALL for fact in facts):
            return facts
        causes = self._all(compared, judge.away(i), judge)
        if causes and i not in self._extreme:  # frames still have the pixels
            causes = self._of_some_frames(i, compared, judge) or causes
        if max(judge.away(i).values()) > 1 >= self._far(i, judge):
            causes = [cause.guessed(NOT_QUITE) for cause in causes]
        kinds = {cause.kind for cause in (*facts, *causes)}
        explained = {kind for each in kinds for kind in _EXPLAINS.get(each, ())}
        causes = [cause for cause in causes if cause.kind not in explained]
        said = {cause.words for cause in causes}
        causes += [fact for fact in facts if fact.words not in said]
        if i in self._extreme:
            count = self._extreme[i][0]
            causes.append(_extreme(count, self.groups[i].n + count))
        return sorted(causes, key=lambda cause: -cause.weight)

    def _all(self, compared: Compared, away: dict[str, float], judge: Judge) -> list[Cause]:
        return compared.facts + causes_of(compared, away, judge.context, self.wavelengths)

    def _compare(self, i: int, usual: np.ndarray, group: Group | None = None) -> Compared:
        """Compare a group, or some of its frames, with the other usual groups."""
        whole = group is None
        group = self.groups[i] if group is None else group
        alone = len(self.groups) <= ALONE or not usual[i]
        rest = np.flatnonzero(usual)
        others = tuple((rest[rest != i] if alone else rest).tolist())
        bands, found = self._bands(group, others)
        if i in self._broken:
            broken, said = self._broken[i]
            if broken[bands].any():  # and not constant in nearly all frames
                bands, found = bands[~broken[bands]], found + said
        if not others or len(bands) <= _FEW_BANDS * self.live.sum():
            return Compared(group, found)
        key = others, bands.tobytes()
        reference = self._once(key, "reference", lambda: reference_of(self._of(others), bands))
        bulk = self._once(key, "bulk", lambda: bulk_of(self._of(others), reference))
        axis = axis_of(bands, self.wavelengths, len(group.mean))
        some = others[:: -(-len(others) // _MOST_NOISES)]
        noises = [self._of_group(j, bands, noise) for j in some if j != i]
        own = self._of_group(i, bands, noise) if whole else noise(group, bands)
        features = features_of(
            group,
            reference,
            Noise(own, noises, axis, reference.n),
            Outside.of(group, reference, bulk),
            self._of_group(i, bands, condition_of) if whole else condition_of(group, bands),
        )
        known = models.atoms(features, reference.mean, axis)
        return Compared(group, found, reference, axis, features, known)

    def shifts(self, judge: Judge) -> dict[int, np.ndarray]:
        """Return the shift of the mean of each group that stands out, in spreads."""
        return {
            i: compared.features.mean
            for i, compared in enumerate(self.compared)
            if compared.features is not None and max(judge.away(i).values()) > 1
        }

    def visible(self, judge: Judge) -> dict[str, tuple[float, float]]:
        """Return how small a fault would stand out: see :mod:`~cuvis_dist.audit.visible`."""
        usual = [int(i) for i in np.flatnonzero(judge.usual)]
        usual = [i for i in usual if self.compared[i].features is not None]
        if not judge.judged or not usual:
            return {}

        def away(k: int, group: Group) -> float:
            found = self._compare(usual[k], judge.usual, group)
            return max(judge.away(usual[k], found.measures()).values())

        size = len(self.live)
        axis = axis_of(np.arange(size), self.wavelengths, size)
        return visible(self._of(usual), away, axis)

    def take_out_extremes(self, judge: Judge) -> bool:
        """Go on without the few extreme pixels of groups that stand out; return if there are any.

        Otherwise a single pixel would hide a fault, and be called one.
        """
        found = False
        for i, compared in enumerate(self.compared):
            if compared.reference is None or i in self._extreme or self.standing(i, judge) <= 1:
                continue
            group, count = without_extremes(self.groups[i], compared.reference)
            if count:
                found = True
                self.groups[i] = group
                self._extreme[i] = count, max(judge.away(i).values())
                self._kept = {key: kept for key, kept in self._kept.items() if key[0] != i}
        return found

    def _is_rare_content(self, i: int, judge: Judge) -> bool:
        """Whether a group stands out in few frames only, and others have frames that do as much."""
        if i not in judge.rare:
            judge.rare[i] = judge.judged and self._looks_like_content(i, judge)
        return judge.rare[i]

    def _looks_like_content(self, i: int, judge: Judge) -> bool:
        reference, group = self.compared[i].reference, self.groups[i]
        if reference is None:
            return False
        others = [j for j in range(len(self.groups)) if j != i]
        usual = self._of([j for j in others if judge.usual[j]])
        those = unusual_frames(group, usual, reference)
        if not those or len(those) > max(1, len(group.frames) // _FEW_FRAMES):
            return False
        rest = [f for f in group.frames if not any(f is each for each in those)]
        part = self._compare(i, judge.usual, group_of(group.name, rest))
        if max(judge.away(i, part.measures()).values()) > _REST:
            return False
        return beyond(those, self._of(others), reference) <= _BEYOND

    def _of(self, which: Sequence[int]) -> list[Group]:
        return [self.groups[j] for j in which]

    def _bands(self, group: Group, others: tuple[int, ...]) -> tuple[np.ndarray, list[Cause]]:
        """Return the bands that can be compared, and what is wrong with the others."""
        key = (others,)
        usual = self._once(key, "variance", lambda: of_bands.usual_variance(self._of(others)))
        constant = of_bands.constant_bands(group, usual, self.live)
        full = of_bands.saturated_bands(group, self._of(others), self.live)
        bands = np.flatnonzero(self.live & ~constant & ~full)
        return bands, facts_of(group, constant, full, self.wavelengths)

    def _once(self, key: tuple[Hashable, ...], what: str, make: Callable[[], Any]) -> Any:
        """Compute something of several groups, which the next one may need as well."""
        if len(self.groups) <= ALONE:  # another one for each group
            self._shared = {k: kept for k, kept in self._shared.items() if k[0][0] == key[0]}
        if (key, what) not in self._shared:
            self._shared[key, what] = make()
        return self._shared[key, what]

    def _of_group(self, j: int, bands: np.ndarray, make: Callable[[Group, np.ndarray], Any]) -> Any:
        """Compute something of one group, which does not depend on the others."""
        key = j, make, bands.tobytes()
        if key not in self._kept:
            self._kept[key] = make(self.groups[j], bands)
        return self._kept[key]

    def _of_some_frames(self, i: int, compared: Compared, judge: Judge) -> list[Cause]:
        """Return the causes of those frames that stand out, if they are not all of the group's."""
        if compared.reference is None:
            return []
        others = [g for j, g in enumerate(self.groups) if judge.usual[j] and j != i]
        those = unusual_frames(compared.group, others, compared.reference)
        rest = [frame for frame in compared.group.frames if not any(frame is f for f in those)]
        if not those or self._of_frames(i, rest, judge):  # the others have it, less plainly
            return []
        found = self._of_frames(i, those, judge)
        where = f"in {len(those)} of {len(compared.group.frames)} frames"
        return [replace(cause, words=f"{where}: {cause.words}") for cause in found]

    def _of_frames(self, i: int, frames: Sequence[FrameStatistics], judge: Judge) -> list[Cause]:
        """Return the causes of some frames of a group, as if they were all of it."""
        part = self._compare(i, judge.usual, group_of(self.groups[i].name, frames))
        return self._all(part, judge.away(i, part.measures()), judge)


def _extreme(count: int, n: int) -> Cause:
    words = "1 pixel is" if count == 1 else f"{count} pixels are"
    return Cause("extreme", f"{words} extreme, of {n:,}; judged without", NOT_QUITE)
