"""Rows of files: lines, or the items of an array; many of nothing cost nothing."""

import json

import pytest

from sa2jax.errors import FileError
from sa2jax.files import rows
from sa2jax.files.limits import Limits
from sa2jax.files.rows import find_rows, read_rows


def found(path) -> list[tuple[str, bytes]]:
    """All rows, by both readers."""
    table, data = find_rows(path), path.read_bytes()
    spans = zip(table.starts.tolist(), table.sizes.tolist(), strict=True)
    made = [(table.place(n), data[a : a + size]) for n, (a, size) in enumerate(spans)]
    assert made == [(place, row.removesuffix(b"\n")) for place, row in read_rows(path)]
    return made


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", []),
        ("\ufeff [ \n ]\n", []),
        ('[{"a": "}],\\" {"}, 2 ,\n[3]]', ['{"a": "}],\\" {"}', "2", "[3]"]),
        ("[{},]", ["{}", ""]),  # the second one is no JSON, and its reader says so
    ],
)
def test_items_of_an_array(tmp_path, text, expected):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    items = [row.decode() for _, row in found(tmp_path / "a.json")]
    assert items == expected
    assert [place for place, _ in found(tmp_path / "a.json")] == [
        f"[{n}]" for n in range(len(expected))
    ]


@pytest.mark.parametrize("text", ['[{"a": 1}]\n[{"b": "]"}]', '[\n{"a": 1}', '["a]\n{"b": 1}]'])
def test_what_only_begins_like_an_array_is_lines(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(text)
    assert found(tmp_path / "a.jsonl") == [
        (f":{n}", line.encode()) for n, line in enumerate(text.split("\n"), 1)
    ]


def test_blank_lines_count_and_are_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n\r\n1\n \t \n{}\r\n2")
    assert found(path) == [(":3", b"1"), (":5", b"{}\r"), (":6", b"2")]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "UTF-16, expected UTF-8: `iconv"),
        ("a.json", b'[{"a": 1}, {"b', "a JSON array without its end: it is cut off"),
    ],
)
def test_files_without_a_row(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    for read in (find_rows, lambda path: list(read_rows(path))):
        with pytest.raises(FileError) as caught:
            read(tmp_path / name)
        assert reason in str(caught.value)


def test_limits(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([1] * 60))
    monkeypatch.setattr(rows, "ROWS", Limits(bytes=1 << 20, nodes=50, depth=1))
    with pytest.raises(FileError, match="more than 50 items"):
        find_rows(path)
    monkeypatch.setattr(rows, "ROWS", Limits(bytes=1 << 6, nodes=100, depth=1))
    with pytest.raises(FileError, match=r"at most 0 KiB, got more; `jq -c '.\[\]' a.json`"):
        find_rows(path)
    path.write_bytes(b"\n" * 3_000_000)
    assert not len(find_rows(path).starts)
    path.write_bytes(b"a\n" * 100_001)
    with pytest.raises(FileError, match="more than 100000 lines that are too short"):
        find_rows(path)
