"""WARC and WET: a `response` or `conversion` record is a document, the others are not records.

Archives are cut by their own headers: Content-Length says where a record ends. That shows what
fastwarc does not: a record that ends early (it returns the short record), or bytes that are no
record (it ends). Reading goes on at the next record. Each record is then given to fastwarc by
itself (HTTP headers, chunked and compressed bodies), and HTML to resiliparse, whose main text
is the document. Bytes of a page that its charset does not explain are replaced, as a browser
does; WET is UTF-8 or `bad_utf8`. Responses without a text to extract (HTTP status other than
2xx, images) are quarantined as `missing_text`. A dictionary in a .warc.zst is not supported.
"""

import contextlib
import io
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from curation.ingest.pieces import Piece
from curation.ingest.rows import Flaw, Reject, Rows
from curation.ingest.splits import Split
from curation.ingest.streams import Window, blocks
from curation.schema import REJECT_HEAD_BYTES

WANTED = (b"response", b"conversion")
MAX_HEADER_BYTES = 1 << 20
_MAGIC = b"WARC/"
_NEXT = b"\n" + _MAGIC  # where reading goes on behind what is no record
_HEADER_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"^content-length:[ \t]*(\d{1,18})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
_KIND = re.compile(rb"^warc-type:[ \t]*(\S+)[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
_LINE_ENDS = b"\r\n"
_TEXTS = ("text/html", "application/xhtml+xml", "text/plain", "")  # "": not stated


class Record(NamedTuple):
    """Where a record lies in a buffer. The line ends behind it are not part of it."""

    begin: int
    end: int
    is_wanted: bool


def cut(split: Split) -> Iterator[Piece]:
    return cut_records(Window(blocks(split.path, split.compression)), split.split_bytes, split.max_document_bytes)


def cut_records(window: Window, split_bytes: int, max_document_bytes: int) -> Iterator[Piece]:
    """Pieces of whole records; between them what is too long, cut off, or no record at all."""
    data, whole = window.data, 0  # whole: bytes of whole records at the front of the window
    while (begin := _next_begin(window, whole)) is not None:
        record = _record(data, begin, window.find(_HEADER_END, begin, begin + MAX_HEADER_BYTES))
        if record and record.end - begin <= max_document_bytes:
            if not window.fill(record.end):
                break
            whole = record.end
            if whole < split_bytes:
                continue
            yield Piece(window.position, window.take(whole))
        elif record is None and window.ended and data.startswith(_MAGIC, begin):
            break  # within the header
        else:
            reject = _passed_over(window, record, begin, max_document_bytes)
            yield Piece(window.position, window.take(begin), reject=reject)
            if record:
                window.drop(record.end - begin)
            else:
                window.drop_to(_NEXT)
        whole = 0
    rest = data[whole:].lstrip(b"\r\n")
    position = window.position + len(data) - len(rest)
    reject = None
    if window.broken:
        reject = Reject.of_stream(window.broken, position, rest)
    elif rest:
        reject = Reject(position, "truncated", "the file ends within this record", bytes(rest[:REJECT_HEAD_BYTES]))
    if whole or reject:
        yield Piece(window.position, window.take(whole), reject=reject)


def _passed_over(window: Window, record: Record | None, begin: int, max_document_bytes: int) -> Reject | None:
    """What to say of bytes that no piece will hold; None for a long record that is not a document."""
    most = begin + REJECT_HEAD_BYTES
    end = record.end if record else window.data.find(_NEXT, begin, most) + 1
    position, head = window.position + begin, bytes(window.data[begin : min(end or most, most)])
    if record:
        return Reject.of_flaw(Flaw.oversize(max_document_bytes), position, head) if record.is_wanted else None
    if position == 0:
        return Reject(-1, "unreadable_file", "does not begin with a WARC record", head)
    return Reject(position, "truncated", "no WARC record begins where the one before it ends", head)


def _next_begin(window: Window, at: int) -> int | None:
    """Where the next record begins: behind line ends; None at the end of the stream."""
    while window.fill(at + 1):
        if window.data[at] not in _LINE_ENDS:
            return at
        at += 1
    return None


def _record(data: bytes | bytearray, begin: int, header_end: int) -> Record | None:
    """The record at `begin` whose header ends at `header_end`; None when that is no WARC header."""
    if header_end < 0 or not data.startswith(_MAGIC, begin):
        return None
    header = bytes(data[begin : header_end + 2])
    length, kind = _LENGTH.search(header), _KIND.search(header)
    if not length or not kind:
        return None
    end = header_end + len(_HEADER_END) + int(length[1])
    return Record(begin, end, kind[1].lower() in WANTED)


def parse(split: Split, piece: Piece, rows: Rows) -> int:
    """Add the documents of a piece to `rows`. Returns the bytes parsed."""
    data = piece.payload or b""
    begin = _past_line_ends(data, 0)
    while record := _record(data, begin, data.find(_HEADER_END, begin)):
        if record.is_wanted:
            raw = data[begin : record.end]
            try:
                _add(raw, piece.start + begin, rows)
            except Flaw as flaw:
                rows.reject(Reject.of_flaw(flaw, piece.start + begin, raw))
        begin = _past_line_ends(data, record.end)
    return len(data)


def _past_line_ends(data: bytes, at: int) -> int:
    while data[at : at + 1] in (b"\r", b"\n"):
        at += 1
    return at


def _add(raw: bytes, position: int, rows: Rows) -> None:
    """Add one record. Raises Flaw when it is not a document."""
    from fastwarc.warc import ArchiveIterator

    record = next(iter(ArchiveIterator(io.BytesIO(raw), auto_decode="all", stream_detect=False)), None)
    if record is None:
        raise Flaw("truncated", "the record's headers cannot be parsed")
    headers = record.headers
    source_id = (headers.get("WARC-Record-ID") or "").strip("<>") or None
    url = headers.get("WARC-Target-URI")
    try:
        rows.add(_text(record), position, source_id, headers.get("WARC-Date"), {"url": url} if url else None)
    except Flaw as flaw:
        flaw.source_id = source_id
        raise


def _text(record: Any) -> str:
    """The text of a fastwarc record. Raises Flaw when there is none to be had."""
    from fastwarc.warc import WarcRecordType
    from resiliparse.extract.html2text import extract_plain_text

    is_page = record.record_type == WarcRecordType.response
    if is_page:
        _check_page(record)
    try:
        body: bytes = record.reader.read()
    except OSError as error:
        raise Flaw("truncated", f"the body of the response cannot be decoded: {error}") from None
    if not is_page:
        try:
            return body.decode()
        except UnicodeDecodeError as error:
            raise Flaw("bad_utf8", f"the record is not UTF-8 ({error.reason} at byte {error.start})") from None
    page = _decoded_page(body, record.http_charset)
    return page if _media_type(record) == "text/plain" else extract_plain_text(page, main_content=True)


def _check_page(record: Any) -> None:
    if record.http_headers is None:
        raise Flaw("missing_text", "the response is not HTTP")
    status = record.http_headers.status_code
    if status is None or not 200 <= status < 300:
        raise Flaw("missing_text", f"HTTP status {status}")
    if _media_type(record) not in _TEXTS:
        raise Flaw("missing_text", f"a response of type {_media_type(record)} has no text")


def _media_type(record: Any) -> str:
    return (record.http_content_type or "").partition(";")[0].strip().lower()


def _decoded_page(body: bytes, charset: str | None) -> str:
    """The page by the charset of its HTTP header, else by what it states or looks like."""
    from resiliparse.parse.encoding import bytes_to_str

    try:
        return bytes_to_str(body, charset or _guessed_charset(body))
    except LookupError:  # a charset that nobody knows
        return bytes_to_str(body, _guessed_charset(body))


def _guessed_charset(body: bytes) -> str:
    """What is not ASCII and is sound UTF-8 is UTF-8: of short pages, detectors think otherwise."""
    from resiliparse.parse.encoding import detect_encoding

    if not body.isascii():
        with contextlib.suppress(UnicodeDecodeError):
            body.decode()
            return "utf-8"
    return detect_encoding(body, from_html_meta=True) or "utf-8"
