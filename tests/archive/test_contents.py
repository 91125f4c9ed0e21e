"""Is a file that changed noticed, wherever it lies? And what is said of it?"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from pyarrow.fs import S3FileSystem
from stores import CREDENTIALS

from cuvis_dist.archive import Contents, Frame, in_words, read_contents, write_contents
from cuvis_dist.archive.contents import Stamp
from cuvis_dist.errors import DataError


def frames(*names):
    return [Frame(name, name, name, reads=(str(name),)) for name in names]


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("place", ["local", "file", "s3"])
def test_a_change_is_noticed(place, many, tmp_path, request, monkeypatch):
    """Of files in a store one by one or, where there are many in a folder, by listing it."""
    names = [f"a b/{number}.npz" for number in range(20 if many else 2)]
    if place == "s3":
        endpoint = request.getfixturevalue("s3")
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        store = S3FileSystem(
            access_key=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            secret_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
            endpoint_override=endpoint,
        )
        folder = f"bucket/{tmp_path.name}"
        paths = [f"s3://{folder}/{name.replace(' ', '%20')}" for name in names]
    else:
        (tmp_path / "a b").mkdir()
        paths = [str(tmp_path / name) for name in names]
        paths = [f"file://{p.replace(' ', '%20')}" for p in paths] if place == "file" else paths

    def write(name, content):
        if place == "s3":
            with store.open_output_stream(f"{folder}/{name}") as file:
                file.write(content)
        else:
            (tmp_path / name).write_bytes(content)

    for name in names:
        write(name, b"content")
    missing = str(paths[0]).replace("0.npz", "missing.npz")
    read = frames(*paths, missing, str(tmp_path), "data")
    before = Contents.of(read, verify=True)
    assert list(before.files) == paths
    assert all(stamp.size == 7 and stamp.changed for stamp in before.files.values())
    again = Contents.of(read)
    assert again.changed_since(before) == {}
    assert again.with_checksums_of(before) == before
    again.require_unchanged(read, "a pass")
    if place == "s3":  # whose times are whole seconds
        write(names[0], b"CONTENT")
        (now,) = Contents.of(read[:1]).files.values()
        within_it = Contents({paths[0]: replace(now, changed=before.files[paths[0]].changed)})
        said = within_it.changed_since(before.only(read[:1]))
        assert said == {paths[0]: "its ETag is another one"}
        write(names[0], b"content")
        before = Contents.of(read)

    write(names[1], b"another content")
    changed = Contents.of(read, verify=True).changed_since(before)
    assert changed == {paths[1]: "its size was 7 bytes and is 15"}
    with pytest.raises(DataError, match=r"has changed \(its size.*\) while a pass read it"):
        again.require_unchanged(read, "a pass")


def test_what_differs_is_said():
    earlier = Contents({"a": Stamp(1, 1, "x"), "b": Stamp(1, 1, "x"), "c": Stamp(1, 1)})
    earlier.files["gone"] = Stamp(1, 1)
    now = Contents({"a": Stamp(1, 2, "x"), "b": Stamp(1, 1, "y"), "c": Stamp(1, 1, "y")})
    now.files["new"] = Stamp(1, 1)
    changed = now.changed_since(earlier)
    assert changed == {
        "a": "it was written again",
        "b": "its checksum is another one",
        "new": "it was not read before",
        "gone": "it is gone",
    }
    assert in_words(changed) == (
        "a has changed (it was written again), b has changed (its checksum is another one), new "
        "has changed (it was not read before), and 1 other files"
    )
    assert now.without_checksum_in(earlier) == 1


def test_contents_are_written_and_read():
    contents = {"x": Contents({"a": Stamp(1, 2, "y"), "b": Stamp(3, 4)}), "z": Contents({})}
    assert read_contents(write_contents(contents)) == contents


def test_what_is_no_file_is_not_there(tmp_path):
    path = tmp_path / "a"
    path.touch()
    contents = Contents.of(frames(path))
    path.unlink()
    os.mkfifo(path)
    assert Contents.of(frames(path), verify=True).files == {}
    assert list(Contents.of(frames(path)).changed_since(contents).values()) == ["it is gone"]
