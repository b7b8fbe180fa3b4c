"""Plain text: one document a file."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

Read = Callable[..., Any]  # the fixture of conftest


def test_a_file_is_a_document(tmp_path: Path, read: Read) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.txt").write_bytes(b"\xef\xbb\xbfeins\r\n\0zwei\n")
    (tmp_path / "2.md.gz").write_bytes(gzip.compress("# drü".encode()))
    reading = read(tmp_path)
    assert reading.texts == ["# drü", "eins\r\n\0zwei\n"]
    assert [(d["file"], d["position"], d["source_id"], d["metadata"]) for d in reading.documents] == [
        ("2.md.gz", 0, None, None),
        ("a/1.txt", 0, None, None),
    ]
    assert reading.documents[1]["id"] == xxhash.xxh3_128_hexdigest(b"web\x00a/1.txt\x00@0")
    assert reading.num_records == 2


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("1.txt", b"", ("empty_file", -1)),
        ("1.txt", b" \n\t", ("empty_text", 0)),
        ("1.txt", b"x\xff", ("bad_utf8", 0)),
        ("1.txt", b"x" * 1001, ("oversize", 0)),
        ("1.txt.gz", gzip.compress(b"x" * 500)[:-9], ("truncated", 0)),
        ("1.txt.gz", b"no gzip", ("unreadable_file", -1)),
        ("1.txt.gz", gzip.compress(b""), ("empty_file", -1)),
    ],
)
def test_each_reason(tmp_path: Path, read: Read, name: str, content: bytes, expected: tuple[str, int]) -> None:
    (tmp_path / name).write_bytes(content)
    reading = read(tmp_path / name, max_document_bytes=1000)
    assert [(r["reason"], r["position"]) for r in reading.rejects] == [expected]
    assert reading.documents == []


def test_a_document_of_exactly_the_limit_is_kept(tmp_path: Path, read: Read) -> None:
    (tmp_path / "1.txt").write_bytes(b"x" * 1000)
    assert read(tmp_path / "1.txt", max_document_bytes=1000).texts == ["x" * 1000]
