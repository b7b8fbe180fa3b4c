"""Parquet: rows are records, files are cut between row groups."""

import datetime
import decimal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

Read = Callable[..., Any]  # the fixture of conftest


def write(path: Path, columns: dict[str, Any], row_group_rows: int = 100) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_rows)
    return path


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_rows_become_documents(tmp_path: Path, read: Read, kind: pa.DataType) -> None:
    text = pa.array(["a", "b\0ü", "a"], pa.string()).cast(kind)
    path = write(tmp_path / "1.parquet", {"id": [7, 8, None], "text": text, "n": [1, None, 3]})
    reading = read(path)
    assert reading.texts == ["a", "b\0ü", "a"]
    assert [d["source_id"] for d in reading.documents] == ["7", "8", None]
    assert [d["position"] for d in reading.documents] == [0, 1, 2]
    assert [d["metadata"] for d in reading.documents] == ['{"n":1}', '{"n":null}', '{"n":3}']
    assert reading.documents[2]["id"] == xxhash.xxh3_128_hexdigest(b"web\x001.parquet\x00@2")


def test_cut_between_row_groups_with_positions_that_go_on(tmp_path: Path, read: Read) -> None:
    path = write(tmp_path / "1.parquet", {"text": [f"document {k}" for k in range(10)]}, row_group_rows=3)
    whole = read(path)
    assert [c.piece.row_groups for c in whole.chunks] == [(0, 4)]
    cut = read(path, split_bytes=1)
    assert [c.piece.row_groups for c in cut.chunks] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert cut.documents == whole.documents
    assert [d["position"] for d in cut.documents] == list(range(10))
    assert all(chunk.piece.payload is None for chunk in cut.chunks)


def test_values_of_any_type_go_to_metadata(tmp_path: Path, read: Read) -> None:
    columns = {
        "text": ["x"],
        "created": [datetime.datetime(2020, 1, 2, 3)],
        "day": [datetime.date(2021, 1, 2)],
        "price": [decimal.Decimal("1.50")],
        "tags": [["a", "b"]],
        "inner": [{"k": 1}],
        "raw": [b"\xff"],
        "nan": [float("nan")],
    }
    (document,) = read(write(tmp_path / "1.parquet", columns)).documents
    assert document["created"] == "2020-01-02 03:00:00"
    assert document["metadata"] == (
        '{"day":"2021-01-02","price":"1.50","tags":["a","b"],"inner":{"k":1},"raw":"b\'\\\\xff\'","nan":null}'
    )


def test_each_reason(tmp_path: Path, read: Read) -> None:
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"x\xff")])
    text = pa.chunked_array([["ok", None, "", " \n", "long" * 100], bad, ["last"]])
    columns = {"id": list("abcdefg"), "text": text, "view": ["aligned", None, None, None, None, None, "other"]}
    reading = read(write(tmp_path / "1.parquet", columns), stance_key="view", max_document_bytes=300)
    assert [(d["text"], d["given_stance"]) for d in reading.documents] == [("ok", "aligned")]
    assert [(r["position"], r["source_id"], r["reason"]) for r in reading.rejects] == [
        (1, "b", "null_text"),
        (2, "c", "empty_text"),
        (3, "d", "empty_text"),
        (4, None, "oversize"),
        (5, None, "bad_utf8"),
        (6, "g", "bad_stance"),
    ]
    assert [r["head"] for r in reading.rejects][3:5] == [b"long" * 100, None]
    assert reading.num_records == 7


def test_a_date_beyond_what_python_knows_costs_only_its_row(tmp_path: Path, read: Read) -> None:
    day = pa.array([0, 2**30], pa.int32()).cast(pa.date32())
    reading = read(write(tmp_path / "1.parquet", {"text": ["x", "y"], "day": day}))
    assert (reading.texts, reading.reasons, reading.num_records) == (["x"], ["bad_json"], 2)


@pytest.mark.parametrize(
    ("columns", "detail"),
    [
        ({"body": ["x"], "n": [1]}, "has no column text; its columns are body, n"),
        ({"text": [1]}, "column text is int64, not a string"),
        ({"text": [b"x"]}, "column text is binary, not a string"),
    ],
)
def test_no_text_column_makes_one_reject(tmp_path: Path, read: Read, columns: dict[str, Any], detail: str) -> None:
    reading = read(write(tmp_path / "1.parquet", columns))
    assert [(r["reason"], r["position"], r["detail"]) for r in reading.rejects] == [("unreadable_file", -1, detail)]
    assert reading.num_records == 0


def test_corrupt_files_are_unreadable(tmp_path: Path, read: Read) -> None:
    path = write(tmp_path / "1.parquet", {"text": [f"document {k}" for k in range(100)]})
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"PAR1 not at all", whole[:-100] + b"\xff" * 92 + whole[-8:]):
        path.write_bytes(content)
        reading = read(path)
        assert [(r["reason"], r["position"]) for r in reading.rejects] == [("unreadable_file", -1)]


def test_a_corrupt_row_group_costs_its_own_rows_only(tmp_path: Path, read: Read) -> None:
    path = write(tmp_path / "1.parquet", {"text": [f"document {k}" for k in range(3000)]}, row_group_rows=1000)
    content = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    content[start : start + 2000] = b"\xff" * 2000
    path.write_bytes(content)
    for split_bytes in (1, 10_000_000):
        reading = read(path, split_bytes=split_bytes)
        assert [d["position"] for d in reading.documents] == [*range(1000), *range(2000, 3000)]
        assert [(r["reason"], r["position"]) for r in reading.rejects] == [("unreadable_file", 1000)]
        assert "rows 1000 to 1999 cannot be read" in reading.rejects[0]["detail"]


def test_no_rows_are_an_empty_file(tmp_path: Path, read: Read) -> None:
    write(tmp_path / "1.parquet", {"text": pa.array([], pa.string())})
    (tmp_path / "2.parquet").write_bytes(b"")
    assert read(tmp_path / "*.parquet").reasons == ["empty_file", "empty_file"]
