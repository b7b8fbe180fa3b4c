"""WARC and WET: pages and their text, and archives that end early or hold what is no record."""

import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

Read = Callable[..., Any]  # the fixture of conftest

PAGE = "<html><body><nav>menu</nav><main><h1>Head</h1><p>Hallo wörld of long enough text.</p></main></body></html>"


def record(kind: str, block: bytes, name: str = "1", **headers: str) -> bytes:
    lines = {
        "WARC-Type": kind,
        "WARC-Record-ID": f"<urn:uuid:{name}>",
        "WARC-Date": "2024-05-06T07:08:09Z",
        "WARC-Target-URI": f"http://example.org/{name}",
        "Content-Type": "application/http; msgtype=response" if kind == "response" else "text/plain",
        "Content-Length": str(len(block)),
        **headers,
    }
    head = "WARC/1.0\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n"
    return head.encode() + block + b"\r\n\r\n"


def page(
    body: str | bytes = PAGE, status: str = "200 OK", name: str = "1", kind: str = "text/html", **http: str
) -> bytes:
    raw = body.encode() if isinstance(body, str) else body
    lines = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in {"Content-Type": kind, **http}.items())
    return record("response", f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + raw, name)


INFO = record("warcinfo", b"software: none\r\n", "info")
WET = [record("conversion", f"Text number {k} ü\n".encode(), str(k)) for k in range(50)]


def write(path: Path, *records: bytes) -> Path:
    """Each record in a member of its own, as crawlers write them."""
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
    path.write_bytes(b"".join(compress(r) for r in records))
    return path


@pytest.mark.parametrize("name", ["1.warc", "1.warc.gz", "1.warc.zst"])
def test_the_main_text_of_pages(tmp_path: Path, read: Read, name: str) -> None:
    records = [INFO, record("request", b"GET / HTTP/1.1\r\n\r\n", "r"), page(name="a"), record("metadata", b"x: y\r\n")]
    reading = read(write(tmp_path / name, *records))
    (document,) = reading.documents
    assert "Hallo wörld" in document["text"]
    assert "menu" not in document["text"]
    assert "<" not in document["text"]
    assert document["source_id"] == "urn:uuid:a"
    assert document["created"] == "2024-05-06T07:08:09Z"
    assert document["metadata"] == '{"url":"http://example.org/a"}'
    assert document["position"] == len(INFO + records[1])
    assert (reading.num_records, reading.rejects) == (1, [])


@pytest.mark.parametrize("split_bytes", [1, 1000, 100_000])
@pytest.mark.parametrize("name", ["1.warc.wet", "1.warc.wet.gz"])
def test_wet_records_in_any_split_size(tmp_path: Path, read: Read, name: str, split_bytes: int) -> None:
    reading = read(write(tmp_path / name, INFO, *WET), split_bytes=split_bytes)
    assert reading.texts == [f"Text number {k} ü\n" for k in range(50)]
    positions = [len(INFO) + sum(map(len, WET[:k])) for k in range(50)]
    assert [d["position"] for d in reading.documents] == positions
    assert (reading.num_records, reading.rejects) == (50, [])
    assert len(reading.chunks) == {1: 51, 1000: 11, 100_000: 1}[split_bytes]  # 225 bytes a record


def test_what_fastwarc_itself_writes(tmp_path: Path, read: Read) -> None:
    from fastwarc.stream_io import GzipWriter
    from fastwarc.warc import WarcRecord, WarcRecordType

    buffer = io.BytesIO()
    writer = GzipWriter(buffer)
    for text in ("one", "two"):
        made = WarcRecord()
        made.init_headers(WarcRecordType.conversion)
        made.set_bytes_content(text.encode())
        made.write(writer, checksum_data=True)
        writer.finish()
    (tmp_path / "1.wet.gz").write_bytes(buffer.getvalue())
    assert read(tmp_path / "1.wet.gz").texts == ["one", "two"]


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (page("<p>café and more of it</p>".encode("latin-1"), kind="text/html; charset=ISO-8859-1"), "café"),
        (page("<meta charset=windows-1251><p>Привет</p>".encode("cp1251")), "Привет"),
        (page("<p>café and more</p>", kind="text/html; charset=nonsense"), "café"),
        (page("a < b\nc", kind="text/plain"), "a < b\nc"),
        (page(gzip.compress(b"<p>squeezed</p>"), Content_Encoding="gzip"), "squeezed"),
        (page(b"9\r\n<p>in two\r\n8\r\n bits</p\r\n1\r\n>\r\n0\r\n\r\n", Transfer_Encoding="chunked"), "in two bits"),
    ],
    ids=["charset", "meta", "unknown charset", "plain", "gzip", "chunked"],
)
def test_pages_of_all_kinds(tmp_path: Path, read: Read, made: bytes, text: str) -> None:
    reading = read(write(tmp_path / "1.warc", made))
    assert reading.rejects == []
    assert text in reading.texts[0]


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (page(status="404 Not Found"), "missing_text"),
        (page(status="301 Moved"), "missing_text"),
        (page(b"\x89PNG", kind="image/png"), "missing_text"),
        (record("response", b"not http at all"), "missing_text"),
        (page(""), "empty_text"),
        (page("<html><body><img src=x></body></html>"), "empty_text"),
        (record("conversion", b"x\xff"), "bad_utf8"),
        (record("conversion", b""), "empty_text"),
        (record("conversion", b"x" * 5000), "oversize"),
        (b"this is no record\r\nat all\r\n\r\n", "truncated"),
        (record("conversion", b"x").replace(b"Content-Length", b"Content-Width"), "truncated"),
        (record("conversion", b"x", **{"Content-Length": "many"}), "truncated"),
        (record("conversion", b"x", **{"Content-Length": "9" * 5000}), "truncated"),
    ],
)
@pytest.mark.parametrize("split_bytes", [1, 100_000])
def test_each_reason(tmp_path: Path, read: Read, made: bytes, reason: str, split_bytes: int) -> None:
    path = write(tmp_path / "1.warc", WET[0], made, WET[1])
    reading = read(path, split_bytes=split_bytes, max_document_bytes=3000)
    assert reading.texts == ["Text number 0 ü\n", "Text number 1 ü\n"]
    assert [(r["reason"], r["position"]) for r in reading.rejects] == [(reason, len(WET[0]))]
    assert reading.rejects[0]["head"].rstrip() == made[:4096].rstrip()
    assert reading.num_records == 3


def test_a_long_record_that_is_no_document_is_passed_over(tmp_path: Path, read: Read) -> None:
    reading = read(write(tmp_path / "1.warc", record("resource", b"x" * 5000), WET[0]), max_document_bytes=3000)
    assert (reading.texts, reading.rejects, reading.num_records) == (["Text number 0 ü\n"], [], 1)


@pytest.mark.parametrize("kept_bytes", [3, 50, len(WET[1]) - 8])
@pytest.mark.parametrize("split_bytes", [1, 100_000])
def test_an_archive_that_ends_within_a_record(tmp_path: Path, read: Read, kept_bytes: int, split_bytes: int) -> None:
    path = write(tmp_path / "1.warc", WET[0], WET[1][:kept_bytes])
    reading = read(path, split_bytes=split_bytes)
    assert reading.texts == ["Text number 0 ü\n"]
    assert [(r["reason"], r["position"]) for r in reading.rejects] == [("truncated", len(WET[0]))]
    assert reading.rejects[0]["head"] == WET[1][:kept_bytes]


def test_a_record_without_the_line_ends_behind_it_is_whole(tmp_path: Path, read: Read) -> None:
    assert read(write(tmp_path / "1.warc", WET[0][:-4])).texts == ["Text number 0 ü\n"]


def test_a_compressed_archive_that_ends_early(tmp_path: Path, read: Read) -> None:
    path = write(tmp_path / "1.warc.gz", *WET)
    path.write_bytes(path.read_bytes()[:-60])
    reading = read(path)
    assert len(reading.documents) == 49
    assert [(r["reason"], r["position"]) for r in reading.rejects] == [("truncated", sum(map(len, WET[:49])))]
    assert "ends early" in reading.rejects[0]["detail"]


def test_other_files_under_its_name(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "1.warc"
    for content, expected in ((b"{}\n" * 9, "unreadable_file"), (b"", "empty_file"), (INFO, "empty_file")):
        path.write_bytes(content)
        assert [(r["reason"], r["position"]) for r in read(path).rejects] == [(expected, -1)]
