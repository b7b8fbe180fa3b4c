"""A fastText model file, read without the library, whose Python module shows neither the index of pruned
buckets nor quantised matrices.

The layout, little-endian, is that of fastText 0.9 (`FastText::saveModel`): magic, version, settings, dictionary
(words, then labels), pruned buckets, input matrix, output matrix, each matrix dense or product-quantised. Every
size is checked against the bytes that are there before anything is made of it, so that a broken file is a UserError
and never a crash. The matrices stay views of the bytes: of a mapped file only the rows that are asked for are read.
"""

import mmap
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numba import njit

from curation import storage
from curation.blocks import prefetch
from curation.errors import UserError

MAGIC = 793712314
VERSIONS = (11, 12)  # 11: supervised models had no subwords, whatever their settings say
_LOSSES = {1: "hs", 2: "ns", 3: "softmax", 4: "ova"}
_SUPERVISED = 3
_SETTINGS = ("dim", "ws", "epoch", "minCount", "neg", "wordNgrams", "loss", "model", "bucket", "minn", "maxn", "rate")
_CENTROIDS = 256
_BATCH_ROWS = 4096
_AHEAD = 16  # rows ahead of which cache lines are asked for
_MAX_PRUNED_BUCKETS = 1 << 26  # their index is an array


class Matrix(Protocol):
    """`rows(i)` are `unscaled(i)` times `norms(i)`; only quantised matrices with qnorm have norms other than 1."""

    @property
    def shape(self) -> tuple[int, int]: ...
    def unscaled(self, index: np.ndarray) -> np.ndarray: ...
    def norms(self, index: np.ndarray) -> np.ndarray: ...
    def rows(self, index: np.ndarray) -> np.ndarray: ...
    def sum_in_order(self, index: np.ndarray) -> np.ndarray: ...  # float32[dim], of rows, each added to those before


@dataclass(frozen=True, eq=False)
class Dense:
    values: np.ndarray  # float32[rows, dim]

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def unscaled(self, index: np.ndarray) -> np.ndarray:
        return self.values[index]

    def norms(self, index: np.ndarray) -> np.ndarray:
        return np.ones(len(index), np.float32)

    def rows(self, index: np.ndarray) -> np.ndarray:
        return self.values[index]

    def sum_in_order(self, index: np.ndarray) -> np.ndarray:
        total_D = np.zeros(self.shape[1], np.float32)
        _add_in_order(self.values.reshape(-1), index.astype(np.uint64), total_D)
        return total_D


@dataclass(frozen=True, eq=False)
class Quantised:
    """Each row is one centroid a part of `dsub` columns (the last part may be narrower)."""

    codes: np.ndarray  # uint8[rows, parts]
    centroids: np.ndarray  # float32[dim * 256], part after part
    dim: int
    dsub: int
    norm_codes: np.ndarray | None  # uint8[rows]
    norm_centroids: np.ndarray | None  # float32[256]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), self.dim

    def unscaled(self, index: np.ndarray) -> np.ndarray:
        found = np.empty((len(index), self.dim), np.float32)
        codes = self.codes[index]
        for part in range(self.codes.shape[1]):
            start, end = part * self.dsub, min((part + 1) * self.dsub, self.dim)
            centroids = self.centroids[start * _CENTROIDS : end * _CENTROIDS].reshape(_CENTROIDS, end - start)
            found[:, start:end] = centroids[codes[:, part]]
        return found

    def norms(self, index: np.ndarray) -> np.ndarray:
        if self.norm_codes is None or self.norm_centroids is None:
            return np.ones(len(index), np.float32)
        return self.norm_centroids[self.norm_codes[index]]

    def rows(self, index: np.ndarray) -> np.ndarray:
        return self.unscaled(index) * self.norms(index)[:, None]

    def sum_in_order(self, index: np.ndarray) -> np.ndarray:
        total_D = np.zeros(self.dim, np.float32)
        for first in range(0, len(index), _BATCH_ROWS):
            rows = self.rows(index[first : first + _BATCH_ROWS])
            _add_in_order(rows.reshape(-1), np.arange(len(rows), dtype=np.uint64), total_D)
        return total_D


@njit(cache=True, nogil=True)
def _add_in_order(values: np.ndarray, index: np.ndarray, total_D: np.ndarray) -> None:
    dim, line = np.uint64(len(total_D)), np.uint64(64 // 4)
    for i in range(np.uint64(len(index))):
        ahead = dim * index[min(i + np.uint64(_AHEAD), np.uint64(len(index) - 1))]
        for at in range(ahead, ahead + dim, line):
            prefetch(values, at)
        start = dim * index[i]
        for d in range(dim):
            total_D[d] += values[start + d]


@dataclass(frozen=True, eq=False)
class ModelFile:
    """A supervised model. Rows of `input` are the words, then the buckets (of a pruned model: those that are left)."""

    name: str  # for messages
    loss: str  # softmax, ova, ns or hs
    ngrams: int  # longest word n-gram
    bucket: int
    minn: int
    maxn: int  # 0: no subwords
    vocabulary: np.ndarray  # uint8: the bytes of the words and labels, joined
    bounds: np.ndarray  # int64[num_words + num_labels + 1]
    labels: tuple[str, ...]
    pruned: np.ndarray | None  # int32[bucket]: which of the buckets that are left, or -1
    input: Matrix
    output: Matrix

    @property
    def num_words(self) -> int:
        return len(self.bounds) - 1 - len(self.labels)


def load(path: str) -> ModelFile:
    """The model at `path` (any fsspec path; a local file is mapped, not read). Raises UserError for a path without
    a model file that is whole, supervised and of a known version."""
    try:
        if storage.is_local(path):
            with open(storage.filesystem(path)[1], "rb") as file:
                data = np.frombuffer(_mapped(file.fileno()), np.uint8)
        else:
            data = np.frombuffer(storage.read_bytes(path), np.uint8)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"there is no model file {path}: give the path of a fastText .bin or .ftz") from None
    return parse(data, path)


def parse(data: np.ndarray, name: str) -> ModelFile:
    """The model in the bytes (uint8) of a file that messages call `name`."""
    reader = _Reader(data, name)
    if len(data) < 8 or reader.integer() != MAGIC:
        raise UserError(f"{name} is not a fastText model file: give the .bin or .ftz that fastText saved")
    version = reader.integer()
    if version not in VERSIONS:
        raise UserError(f"{name} has version {version} of fastText's format, not 11 or 12: save it with fastText 0.9")
    settings = dict(zip(_SETTINGS, reader.array(np.int32, len(_SETTINGS)).tolist(), strict=True))
    reader.array(np.float64, 1)  # the sampling threshold
    if settings["model"] != _SUPERVISED:
        raise UserError(f"{name} is a model of word vectors (cbow or skipgram): train a supervised one")
    maxn = 0 if version == 11 else settings["maxn"]
    loss = _LOSSES.get(settings["loss"], "")
    reader.require(bool(loss) and settings["dim"] > 0 and settings["bucket"] >= 0 and min(settings["minn"], maxn) >= 0)
    uses_buckets = settings["wordNgrams"] > 1 or maxn > 0
    reader.require(settings["bucket"] > 0 or not uses_buckets)

    size, num_words, num_labels = (reader.integer() for _ in range(3))
    _, num_pruned = reader.array(np.int64, 2).tolist()  # tokens seen in training; -1 = not pruned
    reader.require(min(num_words, num_labels - 1) >= 0 and size == num_words + num_labels)
    vocabulary, bounds = reader.entries(num_words, num_labels)
    pruned = reader.pruned(num_pruned, settings["bucket"])

    quantised = reader.flag()
    matrix = reader.quantised() if quantised else reader.dense()
    reader.require(quantised or pruned is None)
    num_buckets = num_pruned if pruned is not None else settings["bucket"] if uses_buckets else 0
    reader.require(matrix.shape[0] >= num_words + num_buckets and matrix.shape[1] == settings["dim"])
    output = reader.quantised() if reader.flag() and quantised else reader.dense()
    reader.require(output.shape == (num_labels, settings["dim"]))
    words = [vocabulary[bounds[i] : bounds[i + 1]].tobytes() for i in range(num_words, size)]
    return ModelFile(
        name, loss, max(1, settings["wordNgrams"]), settings["bucket"], settings["minn"], maxn, vocabulary, bounds,
        tuple(word.decode(errors="replace") for word in words), pruned, matrix, output,
    )  # fmt: skip


class _Reader:
    """Takes values from the bytes of a file one after another; `require` and running out of bytes are UserErrors."""

    def __init__(self, data: np.ndarray, name: str):
        self._data, self._name, self._at = data, name, 0

    def require(self, sound: bool) -> None:
        if not sound:
            raise UserError(f"{self._name} is not a sound fastText model, its sizes do not fit together: save it again")

    def array(self, dtype: type, count: int) -> np.ndarray:
        """A view where the position allows it, else a copy."""
        self.require(count >= 0)
        end = self._at + count * np.dtype(dtype).itemsize
        if end > len(self._data):
            raise UserError(f"{self._name} is cut off: it ends at byte {len(self._data)}, copy or save it again")
        found = self._data[self._at : end]
        self._at = end
        return np.ndarray(count, dtype, found.data) if count else np.zeros(0, dtype)

    def integer(self) -> int:
        return int(self.array(np.int32, 1)[0])

    def flag(self) -> bool:
        return bool(self.array(np.uint8, 1)[0])

    def entries(self, num_words: int, num_labels: int) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of the dictionary's words and labels, and their bounds."""
        count, start = num_words + num_labels, self._at
        self.array(np.uint8, count * 10)  # an entry is a NUL, a count and a type at least
        lengths, types, self._at = _entries(self._data, start, count)
        if self._at < 0:
            self._at = start
            self.array(np.uint8, len(self._data))  # says that the file is cut off
        self.require(bool((types[:num_words] == 0).all() and (types[num_words:] == 1).all()))
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        return _joined(self._data, start, bounds), bounds

    def pruned(self, count: int, bucket: int) -> np.ndarray | None:
        if count < 0:
            return None
        pairs = self.array(np.int32, 2 * count).reshape(count, 2)
        self.require(bool(((pairs >= 0) & (pairs < [bucket, count])).all()) and bucket <= _MAX_PRUNED_BUCKETS)
        index = np.full(bucket, -1, np.int32)
        index[pairs[:, 0]] = pairs[:, 1]
        return index

    def dense(self) -> Dense:
        rows, dim = self.array(np.int64, 2).tolist()
        self.require(rows >= 0 and dim > 0)
        return Dense(self.array(np.float32, rows * dim).reshape(rows, dim))

    def quantised(self) -> Quantised:
        has_norms = self.flag()
        rows, dim = self.array(np.int64, 2).tolist()
        num_codes = self.integer()
        self.require(rows >= 0 and dim > 0)
        codes = self.array(np.uint8, num_codes)
        centroids, dsub, parts = self._centroids(dim)
        self.require(num_codes == rows * parts)
        norm_codes = norm_centroids = None
        if has_norms:
            norm_codes = self.array(np.uint8, rows)
            norm_centroids = self._centroids(1)[0]
        return Quantised(codes.reshape(rows, parts), centroids, dim, dsub, norm_codes, norm_centroids)

    def _centroids(self, dim: int) -> tuple[np.ndarray, int, int]:
        """The centroids of a product quantiser of `dim` columns, the columns of a part, and the parts of a row."""
        found, parts, dsub, last = self.array(np.int32, 4).tolist()
        self.require(found == dim and dsub > 0 and parts == -(-dim // dsub) and last == dim - (parts - 1) * dsub)
        return self.array(np.float32, dim * _CENTROIDS), dsub, parts


def _mapped(descriptor: int) -> "mmap.mmap | bytes":
    try:
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except ValueError:  # an empty file
        return b""


@njit(cache=True, nogil=True)
def _entries(data: np.ndarray, at: int, count: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Length and type of each dictionary entry (bytes, NUL, int64, int8), and where they end: -1 past the file."""
    lengths, types = np.zeros(count, np.int64), np.zeros(count, np.int8)
    for entry in range(count):
        start = at
        while at < len(data) and data[at] != 0:
            at += 1
        if at + 10 > len(data):
            return lengths, types, -1
        lengths[entry] = at - start
        types[entry] = np.int8(data[at + 9])
        at += 10
    return lengths, types, at


@njit(cache=True, nogil=True)
def _joined(data: np.ndarray, at: int, bounds: np.ndarray) -> np.ndarray:
    """The bytes of the entries that start at `at`, without what is between them."""
    joined = np.empty(bounds[-1], np.uint8)
    for entry in range(len(bounds) - 1):
        for to in range(bounds[entry], bounds[entry + 1]):
            joined[to] = data[at + to + 10 * entry]
    return joined
