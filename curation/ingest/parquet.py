"""Parquet: a row is a record, `position` its number in the file.

A file is cut between row groups. Rows become Python records in batches and go through the same
rules as those of other formats. Parquet does not promise that its strings are UTF-8, so a batch
with a bad one is taken row by row.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from curation.ingest.pieces import Piece
from curation.ingest.rows import Flaw, Reject, Rows, as_json
from curation.ingest.splits import Split
from curation.ingest.streams import Broken, reading, says_corrupt

BATCH_ROWS = 1024


def cut(split: Split) -> Iterator[Piece]:
    """Runs of row groups of at least `split_bytes` uncompressed."""
    import pyarrow.parquet as pq

    try:
        with reading(split.path) as file, _sound():
            if split.end == 0:
                return
            metadata = pq.read_metadata(file)
            _check_text_column(metadata.schema.to_arrow_schema(), split.input.text_key)
    except Broken as broken:
        yield Piece(0, reject=Reject.of_stream(broken, 0))
        return
    first, first_row, num_rows, size_bytes = 0, 0, 0, 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        num_rows, size_bytes = num_rows + group.num_rows, size_bytes + group.total_byte_size
        if size_bytes >= split.split_bytes or index == metadata.num_row_groups - 1:
            yield Piece(first_row, row_groups=(first, index + 1))
            first, first_row, num_rows, size_bytes = index + 1, first_row + num_rows, 0, 0


def parse(split: Split, piece: Piece, rows: Rows) -> int:
    """Add the rows of a piece's row groups to `rows`; a corrupt group costs its own rows only.
    Returns their bytes in Arrow's layout. Raises Broken."""
    import pyarrow.parquet as pq

    groups = range(*piece.row_groups)
    if not groups:
        return 0
    start, num_bytes = piece.start, 0
    with reading(split.path) as file, _sound(), pq.ParquetFile(file) as table:
        for group in groups:
            num_rows = table.metadata.row_group(group).num_rows
            position = start
            try:
                with _sound():
                    for batch in table.iter_batches(BATCH_ROWS, row_groups=[group]):
                        _add_batch(batch, position, split, rows)
                        position += batch.num_rows
                        num_bytes += batch.nbytes
            except Broken as broken:
                detail = f"rows {position} to {start + num_rows - 1} cannot be read: the file {broken.detail}"
                rows.reject(Reject(position, broken.reason, detail))
            start += num_rows
    return num_bytes


@contextmanager
def _sound() -> Iterator[None]:
    """Raises Broken for what Arrow says of bytes that are not Parquet."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and not says_corrupt(error):
            raise
        raise Broken("unreadable_file", f"is not sound Parquet: {error}") from None


def _check_text_column(schema: pa.Schema, text_key: str) -> None:
    if text_key not in schema.names:
        raise Broken("unreadable_file", f"has no column {text_key}; its columns are {', '.join(schema.names)}")
    kind = schema.field(text_key).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
        raise Broken("unreadable_file", f"column {text_key} is {kind}, not a string")


def _add_batch(batch: pa.RecordBatch, start: int, split: Split, rows: Rows) -> None:
    try:
        records: list[dict[str, Any] | Flaw] = batch.to_pylist()
    except (ValueError, OverflowError):
        records = [_record(batch.slice(k, 1)) for k in range(batch.num_rows)]
    for position, record in enumerate(records, start):
        head = None
        try:
            if isinstance(record, Flaw):
                raise record
            text = record.get(split.input.text_key)
            head = (text if isinstance(text, str) else as_json(record) or "").encode()
            if len(head) > split.max_document_bytes:
                raise Flaw.oversize(split.max_document_bytes)
            rows.add_record(record, position)
        except Flaw as flaw:
            rows.reject(Reject.of_flaw(flaw, position, head))


def _record(row: pa.RecordBatch) -> dict[str, Any] | Flaw:
    """The record of a batch of one row, or why there is none."""
    try:
        record: dict[str, Any] = row.to_pylist()[0]
    except UnicodeDecodeError:
        return Flaw("bad_utf8", "a string of the row is not UTF-8")
    except (ValueError, OverflowError) as error:  # a date beyond the year 9999
        return Flaw("bad_json", f"a value of the row has no JSON form: {error}")
    return record
