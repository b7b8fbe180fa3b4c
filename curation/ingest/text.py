"""Plain text and Markdown: a file is one document, at position 0, without an id of its own."""

from collections.abc import Iterator

from curation.ingest.pieces import Piece, Reject
from curation.ingest.rows import Flaw, Rows
from curation.ingest.splits import Split
from curation.ingest.streams import Window, blocks


def cut(split: Split) -> Iterator[Piece]:
    return iter([Piece(0)])


def parse(split: Split, piece: Piece, rows: Rows) -> int:
    """Add the file to `rows`. Returns the bytes parsed."""
    limit, window = split.max_document_bytes, Window(blocks(split.path, split.compression))
    reject = None
    if window.fill(limit + 1):
        reject = Reject.oversize(0, window.data, limit)
    elif window.broken:
        reject = Reject.of_stream(window.broken, 0, window.data)
    if reject:
        rows.reject(reject.position, reject.reason, reject.detail, reject.head)
    elif window.data:
        try:
            rows.add(_decoded(window.data), 0)
        except Flaw as flaw:
            rows.reject_flaw(0, flaw, bytes(window.data))
    return len(window.data)


def _decoded(data: bytearray) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Flaw("bad_utf8", f"the file is not UTF-8 ({error.reason} at byte {error.start})") from None
