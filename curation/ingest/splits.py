"""Paths and globs -> Splits: which files there are, what they are, and where they are cut.

Files are sorted by (input, relative path), so the order of a listing changes nothing. Plain
JSON Lines are cut into byte ranges here, because that needs the size only. Compressed files,
archives and Parquet stay whole: where they can be cut is known once they are opened, which is a
task's work (`cutting`), not the driver's. The most bytes of a part depend on the file's own
size: small files still make a few parts, large ones do not make many.
"""

import errno
import importlib.util
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from curation import storage
from curation.errors import UserError
from curation.manifest import fingerprint
from curation.recipe import Ingest, Input
from curation.rng import key64

MIB = 1 << 20
MIN_SPLIT_BYTES = 16 * MIB  # below this, tasks and commits cost more than a tenth of the work
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
FORMATS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    ".parquet": "parquet",
    **dict.fromkeys((".warc", ".wet"), "warc"),
    **dict.fromkeys((".txt", ".md", ".text"), "text"),
}
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Split:
    """A file, or a byte range of a plain JSON Lines file, that one task reads."""

    path: str  # fsspec path
    relative: str  # path below the input's glob root
    source_rank: int  # index of the input in the recipe
    input: Input
    format: str  # jsonl | parquet | warc | text
    compression: str | None  # gzip | zstd | bz2
    ordinal: int  # of this split within its file
    start: int  # byte range [start, end) of the file as stored
    end: int
    is_whole_file: bool
    split_bytes: int  # uncompressed bytes after which a part is cut at the next record end
    max_document_bytes: int
    identity: str  # changes when the file does

    @property
    def name(self) -> str:
        return self.part_name(self.ordinal)

    def part_name(self, ordinal: int) -> str:
        """File-name safe, and a function of source, relative path, format and ordinal alone."""
        file_hash = key64(self.input.source, self.relative, self.format)
        return f"{self.input.source}-{file_hash:016x}-{ordinal:05d}"

    @property
    def fingerprint(self) -> str:
        """sha256 of all that the rows of this split depend on, but for the version of the code."""
        entry = self.input.model_dump(exclude={"path"})  # a corpus may move
        cut = [self.start, self.end, self.split_bytes, self.max_document_bytes]
        return fingerprint([self.identity, self.relative, self.source_rank, self.format, self.compression, entry, cut])


class _File(NamedTuple):
    path: str
    relative: str
    size_bytes: int
    identity: str


def plan(recipe_inputs: Sequence[Input], ingest: Ingest) -> list[Split]:
    """The splits of all inputs, sorted by (input, relative path, ordinal).

    Raises UserError for an input that is missing, matches nothing or has no readable file, for a
    name that says no format, and for two files that would have the same document ids.
    """
    splits = [
        split
        for rank, entry in enumerate(recipe_inputs)
        for file in _files(entry)
        for split in _splits_of_file(file, rank, entry, ingest)
    ]
    _check_distinct(splits)
    if any(split.format == "warc" for split in splits) and not importlib.util.find_spec("fastwarc"):
        raise UserError("WARC and WET inputs need fastwarc and resiliparse: pip install 'tilth[web]'")
    return splits


def format_of(name: str) -> tuple[str | None, str | None]:
    """(format, compression) that a file name says; format is None when it says none."""
    stem, suffix = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression:
        suffix = os.path.splitext(stem)[1]
    return FORMATS.get(suffix), compression


def part_bytes(size_bytes: int, is_plain: bool, split_mb: int) -> int:
    """Uncompressed bytes after which a part of a file of `size_bytes` as stored is cut."""
    share = size_bytes // 8 if is_plain else size_bytes // 2
    return min(max(share, MIN_SPLIT_BYTES), split_mb * MIB)


def _splits_of_file(file: _File, rank: int, entry: Input, ingest: Ingest) -> Iterator[Split]:
    named, compression = format_of(file.path)
    form = named if entry.format == "auto" else entry.format
    if form is None:
        raise UserError(f"the name of {file.path} does not say its format: set `format` of source {entry.source}")
    is_range = form == "jsonl" and compression is None
    most = part_bytes(file.size_bytes, is_range, ingest.split_mb)
    step = most if is_range else max(file.size_bytes, 1)
    for ordinal, start in enumerate(range(0, max(file.size_bytes, 1), step)):
        end = min(start + step, file.size_bytes)
        yield Split(
            path=file.path,
            relative=file.relative,
            source_rank=rank,
            input=entry,
            format=form,
            compression=compression,
            ordinal=ordinal,
            start=start,
            end=end,
            is_whole_file=start == 0 and end == file.size_bytes,
            split_bytes=most,
            max_document_bytes=ingest.max_document_mb * MIB,
            identity=file.identity,
        )


def _files(entry: Input) -> list[_File]:
    """The files of an input, sorted by relative path."""
    try:
        fs, inner = storage.filesystem(entry.path)
        fs.invalidate_cache()  # a listing from earlier in this process may be old
        root, found = _listing(fs, inner, entry)
        if isinstance(fs, LocalFileSystem):
            _check_listable(root, inner)
        files = [_file(fs, path, path[len(root) :].lstrip("/")) for path in found]
    except UserError:
        raise
    except Exception as error:  # listing goes through any store's client, each with errors of its own
        raise UserError(f"input {entry.path} of source {entry.source} cannot be listed: {error}") from error
    regular = sorted((file for file in files if file), key=lambda file: file.relative)
    if not regular:
        raise UserError(f"input {entry.path} of source {entry.source} matches no file: mend its `path`")
    return regular


def _listing(fs: fsspec.AbstractFileSystem, inner: str, entry: Input) -> tuple[str, list[str]]:
    """(glob root, paths). A path that exists is taken as it is, even with glob characters in its name."""
    if fs.isfile(inner):
        return inner.rpartition("/")[0], [inner]
    if fs.isdir(inner):
        return inner.rstrip("/"), [path for path in fs.find(inner) if _is_wanted(path[len(inner) :], entry)]
    if _GLOB.search(inner):
        fixed = inner[: _GLOB.search(inner).start()]  # type: ignore[union-attr]
        return fixed.rpartition("/")[0], fs.glob(inner)
    raise UserError(f"input {entry.path} of source {entry.source} does not exist: mend its `path`")


def _check_listable(root: str, inner: str) -> None:
    """Raises OSError for a local folder that the input reaches and that may not be listed or
    entered: fsspec passes over it, or over its files, in silence."""

    def stop(error: OSError) -> None:
        raise error

    below = inner[len(root) :].strip("/")
    deepest = None if "**" in below or not below else below.count("/")  # in folders below root; None: all
    for folder, names, _ in os.walk(root, onerror=stop):
        if not os.access(folder, os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
        if deepest is not None and folder[len(root) :].count("/") >= deepest:
            names.clear()


def _is_wanted(relative: str, entry: Input) -> bool:
    """Of a folder: no hidden or marker files (`.x`, `_SUCCESS`), and under `auto` only names that say a format."""
    hidden = any(step.startswith((".", "_")) for step in relative.split("/"))
    return not hidden and (entry.format != "auto" or format_of(relative)[0] is not None)


def _file(fs: fsspec.AbstractFileSystem, path: str, relative: str) -> _File | None:
    """None for what is not a file. One that cannot be looked at is kept, and quarantined when it is read."""
    try:
        relative.encode()
    except UnicodeEncodeError:
        raise UserError(f"the name of {path!r} is not UTF-8: rename the file") from None
    if not isinstance(fs, LocalFileSystem):
        info = fs.info(path)
        is_file = info["type"] == "file"
        return _File(fs.unstrip_protocol(path), relative, int(info["size"] or 0), fs.ukey(path)) if is_file else None
    try:
        status = os.stat(path)
    except OSError as error:
        return _File(path, relative, 0, f"unreadable: {error.strerror}")
    identity = f"{status.st_size} bytes, {status.st_mtime_ns} ns"
    return _File(path, relative, status.st_size, identity) if stat.S_ISREG(status.st_mode) else None


def _check_distinct(splits: Sequence[Split]) -> None:
    """Ids and part names are made of source and relative path: no two files may share both."""
    seen: dict[tuple[str, str], Split] = {}
    for split in splits:
        first = seen.setdefault((split.input.source, split.relative), split)
        if first.source_rank != split.source_rank:
            raise UserError(
                f"{first.path} and {split.path} are both {split.relative} of source {split.input.source}, so their "
                "documents would have the same ids: give one input another `source`, or use one glob above both"
            )
