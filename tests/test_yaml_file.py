"""Is YAML read as upstream reads it, but for keys that stand twice and aliases that explode?"""

from __future__ import annotations

import pytest
import yaml

from cuvis_dist.errors import InputError
from cuvis_dist.yaml_file import MAX_ALIASED, read_yaml

#: Nine lists of nine, each of the one before: 9**10 values in a line.
BOMB = ", ".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(10))
MERGED = "\n".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}], k: v}}" if i else "a0: &a0 {k: v}"
    for i in range(10)
)


def read(folder, text):
    path = folder / "file.yaml"
    path.write_text(text, encoding="utf-8")
    return read_yaml(path, "settings")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: 1\nb: [1, two, {c: null}]",
        "\ufeffa: 1",
        "base: &base {a: 1, b: 2}\nmore: {<<: *base, a: 3}\nlist: [*base, *base]",
        "one: {<<: {a: 1}, b: 1, a: 2}",
        "1: a\n'1': b",
        f"ids: &ids {list(range(500))}\nall: [{', '.join(['*ids'] * 100)}]",
    ],
)
def test_what_is_said_once_is_read_as_upstream_does(tmp_path, text):
    assert read(tmp_path, text) == yaml.safe_load(text)


def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path):
    with pytest.raises(InputError, match=r"settings .*file.yaml, line 4: lr .* after line 2"):
        read(tmp_path, "optimizer:\n  lr: 1\n  name: a\n  'lr': 2\n")


@pytest.mark.parametrize("text", [f"{{{BOMB}}}", MERGED, f"x: {{y: {{{BOMB}}}}}"])
def test_aliases_that_stand_for_billions_are_refused_before_they_are_written_out(tmp_path, text):
    with pytest.raises(InputError, match=rf"at most {MAX_ALIASED} are read"):
        read(tmp_path, text)


def test_a_part_within_itself_is_refused(tmp_path):
    with pytest.raises(InputError, match="line 1: the alias of a part stands within that part"):
        read(tmp_path, "a: &a [1, *a]")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1,\nb: }", "line 2"),
        (b"\xff\xfea\x00", "utf-8"),
        (b"[" * 5000, "nested too deep"),
        (b"a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        (b"[{}]: 1\n{a: 1}: 2", "unhashable"),
        (b"a:\n\tb: 1", "token in line 2, column 1"),
        (b"a:\n\tb: 1", "indented with spaces, not with tabs"),
    ],
)
def test_what_is_no_yaml_is_refused(tmp_path, content, words):
    (tmp_path / "file.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"settings .*file.yaml cannot be read: ") as refused:
        read_yaml(tmp_path / "file.yaml", "settings")
    assert words in str(refused.value)
    with pytest.raises(InputError, match=r"settings not found: /.*none.yaml$"):
        read_yaml(tmp_path / "none.yaml", "settings")
