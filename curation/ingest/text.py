"""Plain text and Markdown: a file is one document, at position 0, without an id of its own."""

from collections.abc import Iterator

from curation.ingest.pieces import Piece
from curation.ingest.rows import Flaw, Reject, Rows
from curation.ingest.splits import Split
from curation.ingest.streams import Window, blocks


def cut(split: Split) -> Iterator[Piece]:
    return iter([Piece(0)])


def parse(split: Split, piece: Piece, rows: Rows) -> int:
    """Add the file to `rows`. Returns the bytes parsed."""
    limit, window = split.max_document_bytes, Window(blocks(split.path, split.compression))
    is_oversize = window.fill(limit + 1)
    if window.broken:
        rows.reject(Reject.of_stream(window.broken, 0, window.data))
    elif window.data:
        try:
            if is_oversize:
                raise Flaw.oversize(limit)
            rows.add(_decoded(window.data), 0)
        except Flaw as flaw:
            rows.reject(Reject.of_flaw(flaw, 0, window.data))
    return len(window.data)


def _decoded(data: bytearray) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Flaw("bad_utf8", f"the file is not UTF-8 ({error.reason} at byte {error.start})") from None
