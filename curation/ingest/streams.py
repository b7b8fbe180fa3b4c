"""Bytes of a file, decompressed as they are needed, and a window on them.

A decoder never hands out more than some MiB at a time, whatever the ratio (a 200 MB document of
one letter is 6 kB of zstd), so memory is bounded by what the reader keeps. Each loses nothing
that was decoded before a stream breaks: bytes come out in the smallest pieces at which its
library reports errors.
"""

import bz2
import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import zstandard

from curation import storage

BLOCK_BYTES = 1 << 20
# zstd expands 4 bytes to at most a block of 128 KiB, so 1 KiB gives at most 32 MiB. Measured on a
# JSON Lines corpus: 900 MB/s with 1 KiB, 1030 with 8 KiB.
ZSTD_INPUT_BYTES = 1024
ZSTD_WINDOW_BYTES = 1 << 31  # `zstd --long=31`, as in web dumps


class Broken(Exception):
    """The file gives no more bytes, for a reason that trying again would not change."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail  # reason: one of schema.REJECT_REASONS


@contextmanager
def reading(path: str) -> Iterator[BinaryIO]:
    """`path` open for reading. Raises Broken when it cannot be read now or later; errors of a
    remote store that may pass (time-outs, throttling) are raised as they are and end the run,
    because a document that is missing by chance would make two runs differ."""
    try:
        with storage.open_read(path) as file:
            yield file
    except (FileNotFoundError, PermissionError) as error:
        raise Broken("unreadable_file", f"cannot be read: {error.strerror or error}") from error
    except OSError as error:
        if not storage.is_local(path):
            raise
        raise Broken("unreadable_file", f"cannot be read: {error.strerror or error}") from error


def blocks(path: str, compression: str | None) -> Iterator[bytes]:
    """The uncompressed bytes of a file, in pieces. Raises Broken where they end too early."""
    with reading(path) as file:
        if compression is None:
            while block := file.read(BLOCK_BYTES):
                yield block
        else:
            yield from _decompressed(file, compression)


def says_corrupt(error: OSError) -> bool:
    """True when gzip, bz2 or Parquet say that the bytes are wrong: an OSError of no other kind and
    without a number. Others are of the file below, which could not be read."""
    return type(error) in (OSError, gzip.BadGzipFile) and error.errno is None


def _decompressed(file: BinaryIO, compression: str) -> Iterator[bytes]:
    num_bytes = 0
    try:
        for block in _DECODERS[compression](file):
            num_bytes += len(block)
            yield block
    except EOFError:
        if file.tell() == 0:
            return  # an empty file, which bz2 alone takes for a cut one
        raise Broken("truncated", f"the {compression} stream ends early, after {num_bytes} bytes") from None
    except (OSError, zlib.error, zstandard.ZstdError) as error:
        if isinstance(error, OSError) and not says_corrupt(error):
            raise
        reason = "truncated" if num_bytes else "unreadable_file"
        raise Broken(reason, f"the {compression} stream is corrupt after {num_bytes} bytes: {error}") from None


def _gzip(file: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as members:
        while block := members.read1(BLOCK_BYTES):  # read() would lose what it has when a member breaks
            yield block


def _bz2(file: BinaryIO) -> Iterator[bytes]:
    with bz2.BZ2File(file) as streams:
        while block := streams.read1(BLOCK_BYTES):
            yield block


def _zstd(file: BinaryIO) -> Iterator[bytes]:
    # Not stream_reader(): it ends without an error where a frame is cut off.
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
    frame = None
    while data := file.read(ZSTD_INPUT_BYTES):
        while data:
            frame = frame or decompressor.decompressobj()
            if block := frame.decompress(data):
                yield block
            data = frame.unused_data
            if frame.eof:
                frame = None
    if frame:
        raise EOFError


_DECODERS: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {"gzip": _gzip, "zstd": _zstd, "bz2": _bz2}


class Window:
    """What has been read of a stream and not been taken from it yet."""

    def __init__(self, stream: Iterator[bytes]):
        self._stream = stream
        self.data = bytearray()
        self.position = 0  # of data[0] in the stream
        self.ended = False
        self.broken: Broken | None = None  # why the stream ended early, once it has

    def more(self) -> bool:
        """Read another block; False at the end of the stream."""
        try:
            block = next(self._stream, b"")
        except Broken as broken:
            self.broken, block = broken, b""
        self.data += block
        self.ended = not block
        return bool(block)

    def fill(self, num_bytes: int) -> bool:
        """Have at least `num_bytes` in `data`; False when the stream ends before."""
        while len(self.data) < num_bytes:
            if not self.more():
                return False
        return True

    def find(self, needle: bytes, start: int, most: int) -> int:
        """Index of `needle` in `data` from `start` on, reading on until `data` is longer than `most`; else -1."""
        while (found := self.data.find(needle, start)) < 0:
            start = max(start, len(self.data) - len(needle) + 1)
            if len(self.data) > most or not self.more():
                return -1
        return found

    def take(self, num_bytes: int) -> bytes:
        """Remove and return the first `num_bytes` of `data`."""
        with memoryview(self.data) as view:
            taken = bytes(view[:num_bytes])
        self._discard(num_bytes)
        return taken

    def drop(self, num_bytes: int) -> None:
        """Pass over `num_bytes`, keeping no more than a block of them."""
        while num_bytes and (self.data or self.more()):
            present = min(num_bytes, len(self.data))
            self._discard(present)
            num_bytes -= present

    def drop_to(self, needle: bytes) -> None:
        """Pass over all before the next `needle`, or to the end, keeping no more than a block."""
        while (found := self.data.find(needle)) < 0:
            self._discard(max(len(self.data) - len(needle) + 1, 0))
            if not self.more():
                found = len(self.data)
                break
        self._discard(found)

    def _discard(self, num_bytes: int) -> None:
        del self.data[:num_bytes]
        self.position += num_bytes
