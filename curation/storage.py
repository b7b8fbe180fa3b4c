"""Files anywhere that fsspec reaches, and writes that are visible only when whole.

Local: temporary name in the same folder, fsync, rename, fsync of the folder.
Object stores: one upload, which the store publishes when it is finished.
"""

import contextlib
import hashlib
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

_BUFFER_BYTES = 1 << 16


class Committed(NamedTuple):
    """What a finished write left behind."""

    sha256: str
    size_bytes: int


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `path` (s3://, gs://, hf://, local) and the path within it."""
    return cast("tuple[fsspec.AbstractFileSystem, str]", fsspec.core.url_to_fs(str(path)))


def is_local(path: str) -> bool:
    return isinstance(filesystem(path)[0], LocalFileSystem)


def join(base: str, *parts: str) -> str:
    return "/".join([str(base).rstrip("/"), *parts])


def exists(path: str) -> bool:
    fs, inner = filesystem(path)
    return bool(fs.exists(inner))


def size_bytes(path: str) -> int:
    fs, inner = filesystem(path)
    return int(fs.size(inner))


def open_read(path: str) -> BinaryIO:
    fs, inner = filesystem(path)
    return cast("BinaryIO", fs.open(inner, "rb"))


def read_bytes(path: str) -> bytes:
    with open_read(path) as handle:
        return handle.read()


def list_names(folder: str) -> list[str]:
    """Sorted names in `folder`; empty when it does not exist."""
    fs, inner = filesystem(folder)
    if not fs.exists(inner):
        return []
    fs.invalidate_cache(inner)
    return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(inner, detail=False))


def remove(path: str) -> None:
    """Remove a file or folder that may not exist."""
    fs, inner = filesystem(path)
    if fs.exists(inner):
        fs.rm(inner, recursive=True)


def sweep(folder: str) -> None:
    """Remove what killed writers left under temporary names. Only for the folder's one writer; object stores
    have no such leftovers."""
    if is_local(folder):
        for path in Path(filesystem(folder)[1]).rglob(".*.tmp"):
            path.unlink(missing_ok=True)


class _Hashing:
    """A write-only file that hashes what goes through it, so that no file is read again for its sha256."""

    def __init__(self, raw: IO[bytes]):
        self._raw, self._sha, self.size_bytes, self.closed = raw, hashlib.sha256(), 0, False

    def write(self, data: bytes) -> int:
        self._sha.update(data)
        self.size_bytes += memoryview(data).nbytes
        self._raw.write(data)
        return memoryview(data).nbytes

    def tell(self) -> int:
        return self.size_bytes

    def flush(self) -> None:
        self._raw.flush()

    def close(self) -> None:
        pass

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def committed(self) -> Committed:
        return Committed(self._sha.hexdigest(), self.size_bytes)


def commit(path: str, write: Callable[[BinaryIO], object]) -> Committed:
    """Call `write(file)` and publish what it wrote as `path`, whole or not at all."""
    fs, inner = filesystem(path)
    if not isinstance(fs, LocalFileSystem):
        # Written here first: closing a remote file publishes what is in it, also when `write` failed.
        with tempfile.NamedTemporaryFile() as whole:
            hashing = _Hashing(whole)
            write(cast("BinaryIO", hashing))
            whole.flush()
            fs.put_file(whole.name, inner)
        return hashing.committed()
    with _renamed_to(inner) as temporary, open(temporary, "wb") as handle:
        hashing = _Hashing(handle)
        write(cast("BinaryIO", hashing))
        handle.flush()
        os.fsync(handle.fileno())
    folder = os.open(Path(inner).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return hashing.committed()


def commit_work(path: str, write: Callable[[pa.NativeFile], object]) -> None:
    """Like `commit` for files of a stage's own work, which are made again after a crash: not hashed, and without
    waiting for the disk."""
    fs, inner = filesystem(path)
    if not isinstance(fs, LocalFileSystem):
        with tempfile.TemporaryDirectory() as folder:
            whole = join(folder, "whole")
            with pa.output_stream(whole, compression=None, buffer_size=_BUFFER_BYTES) as file:
                write(file)
            fs.put_file(whole, inner)
        return
    with (
        _renamed_to(inner) as temporary,
        pa.output_stream(str(temporary), compression=None, buffer_size=_BUFFER_BYTES) as file,
    ):
        write(file)


@contextlib.contextmanager
def _renamed_to(inner: str) -> Iterator[Path]:
    """A temporary name beside `inner`, which becomes `inner` when the block ends well."""
    target = Path(inner)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A leading dot and .tmp: never listed as a part; `sweep` removes what a kill leaves.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def commit_bytes(path: str, data: bytes) -> Committed:
    return commit(path, lambda handle: handle.write(data))


def commit_table(path: str, table: pa.Table) -> Committed:
    """Write `table` as zstd Parquet. The same table gives the same bytes.

    Only `string` columns (ids, names, categories) are tried for a dictionary: for texts (`large_string`), numbers
    and signatures one is filled and given up, which takes longer than writing them (0.9 s instead of 0.2 for the
    signatures of 55,000 documents)."""
    repeated = [field.name for field in table.schema if pa.types.is_string(field.type)]
    return commit(
        path,
        lambda handle: pq.write_table(
            table,
            handle,
            compression="zstd",
            compression_level=1,
            use_dictionary=repeated,
            row_group_size=65_536,
            store_schema=True,
        ),
    )


def read_table(path: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file with its own schema. One thread: workers have a core each."""
    fs, inner = filesystem(path)
    if isinstance(fs, LocalFileSystem):
        with pq.ParquetFile(inner, memory_map=True) as file:
            return file.read(columns, use_threads=False)
    with fs.open(inner, "rb") as handle, pq.ParquetFile(handle) as file:
        return file.read(columns, use_threads=False)


def commit_ipc(path: str, table: pa.Table) -> None:
    """`commit_work` of `table` as an uncompressed Arrow IPC file, for readers that map it and touch few rows."""

    def write(file: pa.NativeFile) -> None:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table.combine_chunks())

    commit_work(path, write)


def open_ipc(path: str) -> pa.RecordBatchFileReader:
    """An Arrow IPC file, mapped when it is local."""
    fs, inner = filesystem(path)
    return pa.ipc.open_file(pa.memory_map(inner) if isinstance(fs, LocalFileSystem) else fs.open(inner, "rb"))


def read_ipc(path: str) -> pa.Table:
    """A table of `commit_ipc`."""
    return open_ipc(path).read_all()


def file_sha256(path: str) -> Committed:
    """Hash a file as it is now."""
    sha, size = hashlib.sha256(), 0
    with open_read(path) as handle:
        while block := handle.read(1 << 20):
            sha.update(block)
            size += len(block)
    return Committed(sha.hexdigest(), size)
