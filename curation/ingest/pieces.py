"""What a file is cut into, whatever its format."""

from dataclasses import dataclass

from curation.ingest.rows import Flaw
from curation.ingest.streams import Broken
from curation.schema import REJECT_HEAD_BYTES


@dataclass(frozen=True)
class Reject:
    """A record, or all that is left of a file, that could not be read."""

    position: int  # byte offset in the uncompressed file, or row; -1 for the whole file
    reason: str  # one of schema.REJECT_REASONS
    detail: str
    head: bytes | None = None

    @staticmethod
    def of_stream(broken: Broken, position: int, rest: bytes | bytearray = b"") -> "Reject":
        """What is left of a stream that broke after the last whole record, which ended at `position`."""
        is_whole_file = broken.reason == "unreadable_file" and position == 0
        head = bytes(rest[:REJECT_HEAD_BYTES]) or None
        return Reject(-1 if is_whole_file else position, broken.reason, broken.detail, head)

    @staticmethod
    def oversize(position: int, head: bytes | bytearray, max_document_bytes: int) -> "Reject":
        flaw = Flaw.oversize(max_document_bytes)
        return Reject(position, flaw.reason, flaw.detail, bytes(head[:REJECT_HEAD_BYTES]))


@dataclass(frozen=True)
class Piece:
    """Whole records of a file, and what lies behind them that could not be read.

    Compressed files and archives carry their bytes, because one task has to read them in order;
    of others the place is named, and `parse` reads them where it runs."""

    start: int  # of the first record: byte offset in the uncompressed file, or row
    payload: bytes | None = None  # None: at that place in the file
    row_groups: tuple[int, int] = (0, 0)  # [first, past the last) of a Parquet file
    reject: Reject | None = None
