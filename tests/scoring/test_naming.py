"""Names of files that come from names of recordings: plain, inside one folder, never alike."""

from __future__ import annotations

import re

from hypothesis import example, given
from hypothesis import strategies as st

from cuvis_dist.archive import Frame
from cuvis_dist.scoring.naming import file_names

NAMES = st.text(st.sampled_from("aA.-_/\\#:1~ é\0\n"), min_size=1, max_size=12)


def frame(recording: str, index: object) -> Frame:
    return Frame(f"{recording}#{index}", recording, recording)


def test_names_that_people_expect():
    frames = [frame("/data/field one/rec_01.cu3s", i) for i in (0, 12)]
    frames += [frame("s3://bucket/day.2/rec.02", 3), Frame("whole.npz", "whole.npz", "whole.npz")]
    assert file_names(frames, ".npz") == [
        "rec_01/0.npz", "rec_01/12.npz", "rec/3.npz", "whole/0.npz",
    ]  # fmt: skip


def test_recordings_that_would_share_a_folder_stay_apart_whatever_their_order():
    frames = [frame(name, 0) for name in ("a/rec.cu3s", "b/rec.cu3s", "b/REC.cu3s", "other.cu3s")]
    names = file_names(frames, ".npz", taken=["other"])
    assert all(re.fullmatch(r"(rec|REC|other)-[0-9a-f]{12}/0\.npz", name) for name in names)
    assert len({name.casefold() for name in names}) == 4
    assert file_names(frames[::-1], ".npz", taken=["other"]) == names[::-1]


@given(st.lists(st.tuples(NAMES, NAMES), unique=True, max_size=8))
@example([("..", ".."), ("../..", "0"), ("/etc/passwd", "/etc"), (".", "."), ("\\\\host\\x", "a")])
def test_no_name_leaves_the_folder_and_none_are_alike(pairs):
    frames = list({f.uid: f for f in (frame(*pair) for pair in pairs)}.values())
    names = file_names(frames, ".npz", taken=["frames.csv"])
    assert len({name.casefold() for name in names}) == len(frames)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*\.npz", name)
        assert not name.startswith("frames.csv/")
