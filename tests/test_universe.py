"""Is a universe that upstream reads read, and does another say which row is wrong?"""

from __future__ import annotations

import csv

import pytest
from cuvis_ai_dataloader.data._universe import parse_universe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cuvis_dist.errors import InputError
from cuvis_dist.universe import read_universe

GOOD = "source,index,materialized_path\na.cu3s,0,a_0.npz\na.cu3s,1,a_1.npz\n"

BAD = {
    "byte order mark": ("\ufeff" + GOOD, "no column source: it begins with a byte order mark"),
    "semicolons": (GOOD.replace(",", ";"), "parted by semicolons; save it with commas"),
    "tabs": (GOOD.replace(",", "\t"), "parted by tabs"),
    "utf-16": (GOOD.encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
    "utf-16 without a mark": (GOOD.encode("utf-16-le"), "no column source"),
    "latin-1": (GOOD.replace("a_1", "\xe4").encode("latin-1"), r"byte 0xe4, line 3\): save it"),
    "no header": ("a.cu3s,0,a_0.npz\n", "its first line is 'a.cu3s,0,a_0.npz'"),
    "empty": ("", "it is empty"),
    "a word": (GOOD.replace(",1,", ",one,"), "line 3: the index of source 'a.cu3s' is 'one'"),
    "a fraction": (GOOD.replace(",1,", ",1.0,"), "line 3: the index .* is '1.0'"),
    "no index": (GOOD.replace(",1,", ",,"), "line 3: the index .* is missing"),
    "a short row": (f"{GOOD}b.cu3s\n", "line 4: the index of source 'b.cu3s' is missing"),
    "a huge field": (f"{GOOD}{'x' * 200_000},1,y\n", "line 4: Error: field larger than"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_and_what_to_do_is_said(case):
    text, words = BAD[case]
    content = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(InputError, match=rf"^u\.csv.*{words}"):
        read_universe(content, "u.csv", "npz_multi")


@pytest.mark.parametrize(
    "content", [GOOD, GOOD.replace("\n", "\r\n"), GOOD.replace(",1,", ", 1 ,")]
)
def test_rows_are_those_of_the_file(content):
    columns, rows = read_universe(content.encode(), "u.csv", "npz_multi")
    assert columns == ["source", "index", "materialized_path"]
    assert [int(row["index"]) for row in rows] == [0, 1]


def test_ranges_are_for_recordings_alone():
    content = b"source,index\na.cu3s,0-49\n"
    assert read_universe(content, "u.csv", "cu3s_multi")[1][0]["index"] == "0-49"
    with pytest.raises(InputError, match="line 2: the index"):
        read_universe(content, "u.csv", "npz_multi")


CELLS = st.sampled_from(["0", " 1", "+2", "1_0", "-3", "x", "", "1.5", "٣", "2-4"])
HEADERS = st.sampled_from(
    ["source,index,materialized_path", "index,source,materialized_path,more", "source;index",
     "\ufeffmore,source,index,materialized_path", "\ufeffsource,index,materialized_path"]
)  # fmt: skip


@given(HEADERS, st.lists(CELLS, min_size=1, max_size=3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_nothing_is_refused_that_upstream_reads(tmp_path, header, cells):
    names = header.lstrip("\ufeff").split(",")
    path = tmp_path / "u.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write(f"{header}\n")
        for i, cell in enumerate(cells):
            row = {"source": f"{i}.cu3s", "index": cell, "materialized_path": f"{i}.npz"}
            csv.writer(file).writerow([row.get(name, "") for name in names])
    try:
        parse_universe(
            path, require_materialized_path=True, accept_split=False,
            unique_materialized_path=True, allow_index_ranges=False,
        )  # fmt: skip
    except ValueError:
        return
    read_universe(path.read_bytes(), "u.csv", "npz_multi")
