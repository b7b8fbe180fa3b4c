"""Split -> chunks -> parsed parts, through the module of the split's format.

A piece with payload is the shortest run of whole records that is at least `split_bytes` long, so
where it ends depends on the file's bytes alone, not on the blocks in which they were read.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from curation.ingest import jsonl, parquet, text, warc
from curation.ingest.pieces import Piece
from curation.ingest.rows import Parsed, Reject, Rows
from curation.ingest.splits import Split
from curation.ingest.streams import Broken

_FORMATS = {"jsonl": jsonl, "parquet": parquet, "warc": warc, "text": text}


@dataclass(frozen=True)
class Chunk:
    """One piece of a split: what one task parses into the part `name`."""

    name: str
    split: Split
    piece: Piece
    is_whole_file: bool
    last: bool  # of its split


def chunks(split: Split) -> Iterator[Chunk]:
    """The chunks of `split` in file order: at least one, the last one marked. Holds two at a time."""
    pieces = _FORMATS[split.format].cut(split)
    piece = next(pieces, Piece(0, b""))  # a file without a record makes a part too, which says so
    ordinal = split.ordinal
    while True:
        following = next(pieces, None)
        is_whole_file = split.is_whole_file and ordinal == 0 and following is None
        yield Chunk(split.part_name(ordinal), split, piece, is_whole_file, last=following is None)
        if following is None:
            return
        piece, ordinal = following, ordinal + 1


def parse(chunk: Chunk) -> Parsed:
    """The documents and rejects of a chunk. Every record is in one of the two tables."""
    rows, num_bytes = Rows(chunk.split), 0
    try:
        num_bytes = _FORMATS[chunk.split.format].parse(chunk.split, chunk.piece, rows)
    except Broken as broken:
        rows.reject(Reject.of_stream(broken, 0))
    if chunk.piece.reject:
        rows.reject(chunk.piece.reject)
    if chunk.is_whole_file and rows.is_empty:
        rows.reject(Reject(-1, "empty_file", "there is no record in the file"))
    return rows.parsed(num_bytes)
