"""Records of JSON-lines files (plain, .gz, .zst, .bz2) for commands on single files.

A run's inputs go through `curation.ingest`, which quarantines what is broken; here a broken line
ends the command, with its file and line.
"""

import io
from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson
import pyarrow as pa

from curation import storage
from curation.errors import UserError

_CODECS = {"gz": "gzip", "zst": "zstd", "bz2": "bz2"}


def read_records(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's place ("FILE line N") and JSON object. Raises UserError for what can't be read."""
    try:
        with storage.open_read(path) as raw:
            for number, line in enumerate(_decompressed(path, raw), start=1):
                if line.strip():
                    yield f"{path} line {number}", _record(line, f"{path} line {number}")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: give JSON-lines files") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error}") from None


def _decompressed(path: str, raw: BinaryIO) -> Iterator[bytes]:
    """Lines. Arrow's decompressor, unlike those of the codecs' own packages, tells a truncated stream for each."""
    suffix = path.rsplit(".", 1)[-1]
    return io.BufferedReader(pa.CompressedInputStream(raw, _CODECS[suffix])) if suffix in _CODECS else raw


def text_of(record: dict[str, Any], key: str, place: str) -> str:
    """The record's string `key`. Raises UserError where it is missing or another type."""
    value = record.get(key)
    if not isinstance(value, str):
        raise UserError(f"{place} has no string `{key}`")
    return value


def _record(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{place} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{place} is not a JSON object")
    return record
