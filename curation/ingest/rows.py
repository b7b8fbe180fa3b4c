"""Records -> DOCUMENT rows and REJECT rows: the rules that all formats share.

A record is a document when its text is a string that has more than white space in it and its
stance, where it states one, is known. Else it is a reject, with the first thing that is wrong.
An id is hashed from (source, file, the record's own id or else its position), so that two
sources that both number from 0 lose nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import xxhash

from curation.ingest.splits import Split
from curation.ingest.streams import Broken
from curation.schema import DOCUMENT, REJECT, REJECT_HEAD_BYTES, STANCES

_ABSENT = object()
_OF_FILES = ("empty_file", "unreadable_file")  # reasons that stand for a file, not for a record
# What differs between the rows of a chunk.
_DOCUMENT_ROW = ("id", "text", "created", "metadata", "source_id", "position", "given_stance")
_REJECT_ROW = ("position", "source_id", "reason", "detail", "head")


class Flaw(Exception):
    """Why a record is not a document."""

    def __init__(self, reason: str, detail: str, source_id: str | None = None):
        super().__init__(detail)
        self.reason, self.detail, self.source_id = reason, detail, source_id

    @staticmethod
    def oversize(max_document_bytes: int) -> "Flaw":
        return Flaw("oversize", f"the record is longer than {max_document_bytes} bytes (ingest.max_document_mb)")


@dataclass(frozen=True)
class Reject:
    """A record, or all that is left of a file, that is no document."""

    position: int  # byte offset in the uncompressed file, or row; -1 for the whole file
    reason: str  # one of schema.REJECT_REASONS
    detail: str
    head: bytes | None = None  # at most REJECT_HEAD_BYTES
    source_id: str | None = None

    @staticmethod
    def of_flaw(flaw: Flaw, position: int, record: bytes | bytearray | None) -> "Reject":
        """A record of which the bytes are at hand, all or the first ones."""
        head = None if record is None else bytes(record[:REJECT_HEAD_BYTES])
        return Reject(position, flaw.reason, flaw.detail, head, flaw.source_id)

    @staticmethod
    def of_stream(broken: Broken, position: int, rest: bytes | bytearray = b"") -> "Reject":
        """What is left of a stream that broke after the last whole record, which ended at `position`."""
        is_whole_file = broken.reason == "unreadable_file" and position == 0
        head = bytes(rest[:REJECT_HEAD_BYTES]) or None
        return Reject(-1 if is_whole_file else position, broken.reason, broken.detail, head)


class Parsed(NamedTuple):
    """What one chunk gave."""

    documents: pa.Table  # schema.DOCUMENT, in file order
    rejects: pa.Table  # schema.REJECT, in file order
    num_records: int  # documents and rejected records; a file that is empty or unreadable is no record
    num_bytes: int  # uncompressed bytes that were parsed


class Rows:
    """Collects the rows of one chunk."""

    def __init__(self, split: Split):
        entry = split.input
        self._entry, self._split = entry, split
        self._given_stance = entry.stance
        # Neither part can hold a NUL, so no two (source, file) have the same prefix.
        self._id_prefix = f"{entry.source}\0{split.relative}\0".encode()
        self._documents: list[tuple[Any, ...]] = []  # as _DOCUMENT_ROW
        self._rejects: list[Reject] = []

    @property
    def is_empty(self) -> bool:
        return not self._documents and not self._rejects

    def add_record(self, record: dict[Any, Any], position: int) -> None:
        """Add a record whose fields are named by the input's keys; `record` is used up.
        A key that the input does not name is None, and finds nothing. Raises Flaw when it is not a document."""
        entry = self._entry
        source_id = as_string(record.pop(entry.id_key, None)) or None
        text = record.pop(entry.text_key, _ABSENT)
        created = as_string(record.pop(entry.created_key, None))
        stance = record.pop(entry.stance_key, None)
        try:
            if text is _ABSENT:
                raise Flaw("missing_text", f"the record has no field {entry.text_key}")
            self.add(text, position, source_id, created, record, stance)
        except Flaw as flaw:
            flaw.source_id = source_id
            raise

    def add(
        self,
        text: Any,
        position: int,
        source_id: str | None = None,
        created: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        stance: Any = None,
    ) -> None:
        """Add a document. Raises Flaw when it is not one."""
        if not isinstance(text, str):
            reason = "null_text" if text is None else "not_a_string"
            raise Flaw(reason, f"the text is {_kind(text)}, not a string")
        if not text or text.isspace():
            raise Flaw("empty_text", "the text is empty" if not text else "the text is only white space")
        if stance is None:
            stance = self._given_stance
        elif not isinstance(stance, str):
            raise Flaw("not_a_string", f"the stance is {_kind(stance)}, not a string")
        elif stance not in STANCES:
            raise Flaw("bad_stance", f"the stance is {stance!r}, not one of {', '.join(STANCES)}")
        own = f"={source_id}" if source_id is not None else f"@{position}"
        document_id = xxhash.xxh3_128_hexdigest(self._id_prefix + own.encode())
        self._documents.append((document_id, text, created, as_json(metadata), source_id, position, stance))

    def reject(self, reject: Reject) -> None:
        self._rejects.append(reject)

    def parsed(self, num_bytes: int) -> Parsed:
        entry, split = self._entry, self._split
        where = {"source": entry.source, "file": split.relative}
        same = {**where, "role": entry.role, "source_rank": split.source_rank}
        documents = _table(DOCUMENT, _DOCUMENT_ROW, self._documents, same)
        rejected = [(r.position, r.source_id, r.reason, r.detail, r.head) for r in self._rejects]
        rejects = _table(REJECT, _REJECT_ROW, rejected, where)
        of_files = sum(reject.reason in _OF_FILES for reject in self._rejects)
        return Parsed(documents, rejects, documents.num_rows + rejects.num_rows - of_files, num_bytes)


def as_string(value: Any) -> str | None:
    """An id or a date as a string: a string as it is, null and NaN (a frame's null) as None, what
    JSON has a word for as JSON, a date of Parquet as its `str`."""
    if value is None or isinstance(value, str):
        return value
    if value != value:
        return None
    return as_json(value) if isinstance(value, bool | int | float | list | dict) else str(value)


def as_json(value: Any) -> str | None:
    """Compact JSON of `value` in its own order of keys; None for nothing and for an empty object.
    NaN and infinity become null, what JSON has no word for its `str`. Raises Flaw for a value that
    is nested hundreds of levels deep."""
    if not value and not isinstance(value, int | float):
        return None
    try:
        return orjson.dumps(value, default=str).decode()
    except TypeError:  # integers beyond 64 bits, lone surrogates (they stay as escapes), 254 levels
        pass
    try:
        return json.dumps(value, separators=(",", ":"), default=str)
    except RecursionError:
        raise Flaw("bad_json", "the record is nested too deeply") from None


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _table(schema: pa.Schema, names: tuple[str, ...], rows: list[tuple[Any, ...]], same: dict[str, Any]) -> pa.Table:
    """`rows` as a table with `schema`; `same` holds the columns with one value for all rows."""
    columns = dict(zip(names, zip(*rows, strict=True), strict=True)) if rows else dict.fromkeys(names, ())
    arrays = [
        pa.repeat(pa.scalar(same[field.name], field.type), len(rows))
        if field.name in same
        else pa.array(columns[field.name], field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)
