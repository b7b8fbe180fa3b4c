"""What a file is cut into, whatever its format."""

from dataclasses import dataclass

from curation.ingest.rows import Reject


@dataclass(frozen=True)
class Piece:
    """Whole records of a file, and what lies behind them that could not be read.

    Compressed files and archives carry their bytes, because one task has to read them in order;
    of others the place is named, and `parse` reads them where it runs."""

    start: int  # of the first record: byte offset in the uncompressed file, or row
    payload: bytes | None = None  # None: at that place in the file
    row_groups: tuple[int, int] = (0, 0)  # [first, past the last) of a Parquet file
    reject: Reject | None = None
