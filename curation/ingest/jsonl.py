r"""JSON Lines: one object a line, lines end in \n or \r\n, blank lines are not records.

A plain file is read by byte range: a record belongs to the range in which its line begins.
`position` is the offset at which the line begins, a byte order mark of the file included.

Lines go to orjson as they are. What it refuses has a second chance with the standard library,
which takes what writers in the field produce: raw control characters within strings, NaN (read
as null), a lone surrogate (kept as an escape in metadata; in text, id or date the record is
`bad_utf8`, because no UTF-8 can hold it). orjson reads an integer beyond 64 bits as a float, so
in metadata such a number keeps 17 digits; an id that came as a float is read again, exactly.
"""

import json
from collections.abc import Iterator
from typing import Any

import orjson

from curation.ingest.pieces import Piece
from curation.ingest.rows import Flaw, Reject, Rows
from curation.ingest.splits import Split
from curation.ingest.streams import Window, blocks, reading
from curation.recipe import Input
from curation.schema import REJECT_HEAD_BYTES

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
TAIL_BYTES = 1 << 16  # read at a time behind a range, for the end of its last line


def cut(split: Split) -> Iterator[Piece]:
    if split.compression is None:
        return iter([Piece(split.start)])
    return cut_lines(Window(blocks(split.path, split.compression)), split.split_bytes, split.max_document_bytes)


def cut_lines(window: Window, split_bytes: int, max_document_bytes: int) -> Iterator[Piece]:
    """Pieces of whole lines. An oversize line that a piece would have to grow for is passed over
    as it streams by. Of a stream that breaks, what follows the last line end is rejected."""
    data = window.data
    while window.fill(split_bytes):
        begin = data.rfind(b"\n", 0, split_bytes - 1) + 1  # of the line that the cut falls into
        most = begin + max_document_bytes
        end = window.find(b"\n", split_bytes - 1, most)
        if 0 <= end <= most:
            yield Piece(window.position, window.take(end + 1))
        elif len(data) > most:
            head = data[begin : begin + REJECT_HEAD_BYTES]
            oversize = Reject.of_flaw(Flaw.oversize(max_document_bytes), window.position + begin, head)
            yield Piece(window.position, window.take(begin), reject=oversize)
            window.drop_to(b"\n")
        else:
            break
    whole = len(data) if window.broken is None else data.rfind(b"\n") + 1
    reject = None
    if window.broken:
        reject = Reject.of_stream(window.broken, window.position + whole, data[whole:])
    if whole or reject:
        yield Piece(window.position, window.take(whole), reject=reject)


def parse(split: Split, piece: Piece, rows: Rows) -> int:
    """Add the records of a piece to `rows`. Returns the bytes parsed. Raises Broken."""
    if piece.payload is not None:
        parse_lines(piece.payload, piece.start, split, rows)
        return len(piece.payload)
    start, data, oversize = read_range(split)
    parse_lines(data, start, split, rows)
    if oversize:
        rows.reject(oversize)
    return len(data)


def read_range(split: Split) -> tuple[int, bytes, Reject | None]:
    """(start, lines, the last one where it is oversize) that begin in the split's byte range.
    Raises Broken."""
    limit = split.max_document_bytes
    with reading(split.path) as file:
        # From one byte earlier: a line end there means that a line begins with the range.
        lead = max(split.start - 1, 0)
        file.seek(lead)
        data = file.read(split.end - lead)
        first = data.find(b"\n") + 1 if split.start else 0
        if split.start and not first:
            return split.end, b"", None
        start = lead + first
        begin = data.rfind(b"\n") + 1  # of the line that goes on behind the range
        parts, length = [data[first:]], len(data) - begin
        ended = length == 0
        while not ended and length <= limit and (tail := file.read(TAIL_BYTES)):
            end = tail.find(b"\n")
            ended = end >= 0
            parts.append(tail[: end + 1] if ended else tail)
            length += end if ended else len(tail)
        if length > limit:
            head = b"".join([data[begin : begin + REJECT_HEAD_BYTES], *parts[1:2]])
            return start, data[first:begin], Reject.of_flaw(Flaw.oversize(limit), lead + begin, head)
        return start, b"".join(parts), None


def parse_lines(data: bytes, start: int, split: Split, rows: Rows) -> None:
    """Add each line of `data`, which begins at byte `start` of the file, as a document or a reject."""
    entry, limit, position = split.input, split.max_document_bytes, start
    for line in data.split(b"\n"):
        if line and not line.isspace():
            try:
                if len(line) > limit:
                    raise Flaw.oversize(limit)
                has_mark = position == 0 and line.startswith(BYTE_ORDER_MARK)
                rows.add_record(load(line[len(BYTE_ORDER_MARK) :] if has_mark else line, entry), position)
            except Flaw as flaw:
                rows.reject(Reject.of_flaw(flaw, position, line))
        position += len(line) + 1


def load(line: bytes, entry: Input) -> dict[str, Any]:
    """The record of a line. Raises Flaw (bad_json, bad_utf8)."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        record = _load_leniently(line, entry)
    if not isinstance(record, dict):
        raise Flaw("bad_json", f"the line is a JSON {type(record).__name__}, not an object")
    exact: dict[str, Any] = _load_leniently(line, entry) if isinstance(record.get(entry.id_key), float) else record
    return exact


def _load_leniently(line: bytes, entry: Input) -> Any:
    try:
        record = json.loads(line.decode(), strict=False, parse_constant=lambda name: None)
    except UnicodeDecodeError as error:
        raise Flaw("bad_utf8", f"the line is not UTF-8 ({error.reason} at its byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise Flaw("bad_json", f"the line is not JSON: {error}") from None
    if isinstance(record, dict):
        for key in (entry.text_key, entry.id_key, entry.created_key):
            if isinstance(value := record.get(key), str) and not _is_encodable(value):
                raise Flaw("bad_utf8", f"the field {key} has a lone surrogate, which UTF-8 cannot hold")
    return record


def _is_encodable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
