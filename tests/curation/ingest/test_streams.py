"""Compressed files: cut at record ends, broken streams, records that are too long, files that cannot be read."""

import bz2
import contextlib
import gzip
import io
import json
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFileSystem

Read = Callable[..., Any]  # the fixture of conftest

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstandard.ZstdCompressor().compress,
    "bz2": bz2.compress,
}
LINES = [
    json.dumps({"id": k, "text": random.Random(k).randbytes(400).hex()}).encode() + b"\n" for k in range(3000)
]  # 2.5 MB


@pytest.mark.parametrize("suffix", COMPRESS)
def test_members_in_a_row_are_one_stream(tmp_path: Path, read: Read, suffix: str) -> None:
    path = tmp_path / f"1.jsonl.{suffix}"
    third = len(LINES) // 3
    path.write_bytes(b"".join(COMPRESS[suffix](b"".join(LINES[k : k + third])) for k in range(0, len(LINES), third)))
    reading = read(path)
    assert [d["source_id"] for d in reading.documents] == [str(k) for k in range(3000)]
    assert (reading.rejects, reading.num_bytes) == ([], sum(map(len, LINES)))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_chunks_are_the_shortest_runs_of_lines_that_reach_the_size(tmp_path: Path, read: Read, suffix: str) -> None:
    path = tmp_path / f"1.jsonl.{suffix}"
    path.write_bytes(COMPRESS[suffix](b"".join(LINES)))
    chunks = read(path, split_bytes=100_000).chunks
    payloads = [chunk.piece.payload for chunk in chunks]
    assert b"".join(payloads) == b"".join(LINES)
    for payload in payloads[:-1]:
        assert payload.endswith(b"\n")
        assert len(payload) - len(payload.splitlines()[-1]) - 1 < 100_000 <= len(payload)
    assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [chunk.name[-6:] for chunk in chunks] == [f"-{k:05d}" for k in range(len(chunks))]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("split_bytes", [50_000, 10_000_000])
def test_rows_before_a_break_are_kept(tmp_path: Path, read: Read, suffix: str, split_bytes: int) -> None:
    whole = COMPRESS[suffix](b"".join(LINES))
    path = tmp_path / f"1.jsonl.{suffix}"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    reading = read(path, split_bytes=split_bytes)
    assert 500 < len(reading.documents) < 3000
    assert [d["source_id"] for d in reading.documents] == [str(k) for k in range(len(reading.documents))]
    (reject,) = reading.rejects
    rest = sum(map(len, LINES[: len(reading.documents)]))
    assert (reject["reason"], reject["position"]) == ("truncated", rest)
    assert LINES[len(reading.documents)].startswith(reject["head"] or b"")
    assert "ends early" in reject["detail"]
    assert reading.num_records == len(reading.documents) + 1


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_corrupt_middle_is_truncated_there(tmp_path: Path, read: Read, suffix: str) -> None:
    members = [COMPRESS[suffix](b"".join(LINES[:1000])), COMPRESS[suffix](b"".join(LINES[1000:]))]
    path = tmp_path / f"1.jsonl.{suffix}"
    path.write_bytes(members[0] + b"garbage" + members[1])
    reading = read(path)
    assert len(reading.documents) == 1000
    assert [(r["reason"], r["position"]) for r in reading.rejects] == [("truncated", sum(map(len, LINES[:1000])))]
    assert "corrupt" in reading.rejects[0]["detail"]


def test_a_stream_that_ends_in_its_first_block_is_truncated_at_0(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "1.jsonl.zst"
    path.write_bytes(COMPRESS["zst"](LINES[0])[:-20])
    assert [(r["reason"], r["position"]) for r in read(path).rejects] == [("truncated", 0)]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_garbage_is_unreadable_and_nothing_is_empty(tmp_path: Path, read: Read, suffix: str) -> None:
    path = tmp_path / f"1.jsonl.{suffix}"
    path.write_bytes(b"this is not what its name says\n" * 10)
    reading = read(path)
    assert [(r["reason"], r["position"]) for r in reading.rejects] == [("unreadable_file", -1)]
    assert reading.num_records == 0
    for content in (b"", COMPRESS[suffix](b"")):
        path.write_bytes(content)
        assert read(path).reasons == ["empty_file"]


@pytest.mark.parametrize(("name", "max_document_mb"), [("1.jsonl", 40), ("1.jsonl.zst", 8)])
def test_a_200_mb_document_is_passed_over_in_bounded_memory(
    tmp_path: Path, read: Read, name: str, max_document_mb: int
) -> None:
    path = tmp_path / name
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open(path, "wb"))
        if name.endswith(".zst"):
            out = stack.enter_context(zstandard.ZstdCompressor().stream_writer(out))
        out.write(LINES[0] + b'{"id": "big", "text": "')
        for _ in range(200):
            out.write(b"a" * 1_000_000)
        out.write(b'"}\n' + LINES[1])
    tracemalloc.start()
    reading = read(path, max_document_mb=max_document_mb)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [d["source_id"] for d in reading.documents] == ["0", "1"]
    assert [(r["reason"], r["position"]) for r in reading.rejects] == [("oversize", len(LINES[0]))]
    assert reading.rejects[0]["head"] == (b'{"id": "big", "text": "' + b"a" * 4096)[:4096]
    assert reading.num_records == 3
    # Plain: a range of 25 MB, then the line up to the limit. zstd: the window, and what 1 KiB became (32 MiB), twice.
    assert peak_bytes < 120_000_000


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("split_bytes", [10, 1000, 100_000])
def test_an_oversize_line_in_a_stream_costs_only_itself(
    tmp_path: Path, read: Read, suffix: str, split_bytes: int
) -> None:
    path = tmp_path / f"1.jsonl.{suffix}"
    path.write_bytes(COMPRESS[suffix](b'{"text": "a"}\n{"text": "' + b"b" * 3000 + b'"}\n{"text": "c"}'))
    reading = read(path, split_bytes=split_bytes, max_document_bytes=1000)
    assert reading.texts == ["a", "c"]
    assert [d["position"] for d in reading.documents] == [0, 3027]
    assert [(r["reason"], r["position"]) for r in reading.rejects] == [("oversize", 14)]


class Stalling(io.BytesIO):
    """A file of which only the first read succeeds."""

    error: OSError
    num_reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self.num_reads += 1
        if self.num_reads > 1:
            raise self.error
        return super().read(size)


class Failing(MemoryFileSystem):
    """A store that lists its files and fails to open them, or to read on."""

    protocol = "failing"
    store: dict = {}  # noqa: RUF012 - as in the base class
    pseudo_dirs = [""]  # noqa: RUF012
    error: OSError = PermissionError(13, "Permission denied")
    is_at_open = True

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("failing://"))

    def _open(self, path: str, mode: str = "rb", **kwargs: object) -> object:
        if mode == "rb" and self.is_at_open:
            raise self.error
        if mode == "rb":
            stalling = Stalling(self.store[path].getvalue())
            stalling.error = self.error
            return stalling
        return super()._open(path, mode=mode, **kwargs)


def parquet_bytes(columns: dict[str, list[str]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


FAILING_FILES = {
    **{f"1.jsonl.{suffix}": compress(b"".join(LINES[:10])) for suffix, compress in COMPRESS.items()},
    **dict.fromkeys(("1.jsonl", "1.warc", "1.txt"), b"".join(LINES[:10])),
    "1.parquet": parquet_bytes({"text": ["x"] * 10}),
}


@pytest.fixture
def failing() -> type[Failing]:
    fsspec.register_implementation("failing", Failing, clobber=True)
    for name, content in FAILING_FILES.items():
        Failing().pipe(f"/f/{name}", content)
    return Failing


@pytest.mark.parametrize("name", FAILING_FILES)
def test_a_file_without_permission_is_unreadable(failing: type[Failing], read: Read, name: str) -> None:
    failing.error, failing.is_at_open = PermissionError(13, "Permission denied"), True
    reading = read(f"failing://f/{name}")
    assert [(r["reason"], r["position"]) for r in reading.rejects] == [("unreadable_file", -1)]
    assert "Permission denied" in reading.rejects[0]["detail"]


@pytest.mark.parametrize(
    ("name", "is_at_open"),
    [(name, k) for name in FAILING_FILES for k in (True, False) if k or name != "1.jsonl"],  # which is read at once
)
def test_a_remote_error_that_may_pass_ends_the_run(
    failing: type[Failing], read: Read, name: str, is_at_open: bool
) -> None:
    failing.error, failing.is_at_open = TimeoutError("the store did not answer"), is_at_open
    with pytest.raises(TimeoutError):
        read(f"failing://f/{name}")


def test_a_dangling_link_is_unreadable(tmp_path: Path, read: Read) -> None:
    os.symlink(tmp_path / "nowhere", tmp_path / "1.jsonl")
    os.symlink(tmp_path / "nowhere", tmp_path / "2.parquet")
    reading = read(tmp_path / "*")
    assert reading.reasons == ["unreadable_file", "unreadable_file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_local_file_without_permission_is_unreadable(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "1.jsonl"
    path.write_bytes(LINES[0])
    path.chmod(0)
    assert read(path).reasons == ["unreadable_file"]
