"""How much of their wording two texts share: normalised words, word shingles, MinHash signatures.

Dedup, the contamination audit and tracing all mean the same thing by "the same words":

*Characters.* Each is compatibility-decomposed and case-folded (NFKD, casefold, NFKD), one at a
time, so that composed and decomposed accents, full-width letters and ligatures come out equal.
Soft hyphens, zero-width characters and variation selectors vanish.
*Words* are maximal runs of letters, digits and marks; everything else separates. In scripts
written without spaces (Han, kana, Thai, Lao, Khmer, Myanmar) each character is a word.
*Shingles* are `ngram` consecutive words; a text with fewer words has none.
*Hash of a word*: its bytes, eight at a time, little-endian, through h = (h ^ block) * WORD,
h ^= h >> 32 (words hold no NUL, so that the last block may be short). *Hash of a shingle*: the
polynomial of its words' hashes in SHINGLE mod 2**64, which rolls, so that a shingle costs the same
for any `ngram`. Sets of shingles hold these 64 bits; MinHash sees 32 (`hash_shingle`).
*Signatures* are datasketch 2's `affine32` bit for bit: `datasketch.MinHash(num_perm, seed,
scheme="affine32", hashfunc=hash_shingle)` fed a text's shingles has the same hashvalues.

    characters.py   how characters fold, from unicodedata
    kernels.py      folding, hashing, permuting, straight from Arrow's buffers
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from curation.overlap import kernels
from curation.overlap.characters import Table, tables
from curation.overlap.kernels import EMPTY, MAX_WORDS, MINHASH, SHINGLE, WORD, Int32s, Int64s, Uint8s, Uint32s, Uint64s
from curation.overlap.kernels import sets_jaccard as sets_jaccard

ALGORITHM = "affine32"  # datasketch's name for the scheme of the signatures
SHINGLES = "word-v2"  # what a shingle is and how it is hashed: signatures of another kind do not compare

__all__ = [
    "ALGORITHM",
    "MAX_WORDS",
    "SHINGLES",
    "Folded",
    "MinHasher",
    "ShingleSets",
    "hash_shingle",
    "jaccard",
    "sets_jaccard",
    "shingle_sets",
    "text_hash",
    "words",
]


class Folded(NamedTuple):
    """Normalised documents in one buffer: document i is data[offsets[i]:offsets[i + 1]], UTF-8,
    single spaces between its words, none at its ends."""

    data: Uint8s
    offsets: Int64s


class ShingleSets(NamedTuple):
    """Sorted distinct 64-bit shingle hashes: those of document i are hashes[starts[i]:ends[i]]."""

    hashes: Uint64s
    starts: Int64s
    ends: Int64s


class MinHasher:
    """MinHash signatures of `num_perm` values over shingles of `ngram` words."""

    def __init__(self, num_perm: int, ngram: int, seed: int = 1):
        if num_perm < 1 or ngram < 1:
            raise ValueError(f"num_perm and ngram are at least 1, not {num_perm} and {ngram}")
        self.num_perm, self.ngram, self.seed = num_perm, ngram, seed
        random = np.random.RandomState(seed)  # datasketch's own draw, in its order
        self._a = random.randint(0, 1 << 31, num_perm, np.uint32) * np.uint32(2) + np.uint32(1)
        self._b = random.randint(0, 1 << 32, num_perm, np.uint32)

    def signatures(self, array: pa.Array | pa.ChunkedArray) -> Uint32s:
        """uint32[n, num_perm] of a column of strings: row i is the `hashvalues` of a datasketch.MinHash.
        A document of fewer than `ngram` words, or null, has a row of 2**32 - 1; one of more than
        MAX_WORDS words has the signature of its first MAX_WORDS. Raises TypeError for a column that
        does not hold strings."""
        return self.sign(array)[0]

    def sign(self, array: pa.Array | pa.ChunkedArray) -> tuple[Uint32s, Int32s]:
        """`signatures`, and int32[n]: the shingles that each row has seen, repeats counted."""
        chunks = list(_chunks(array))
        num_docs = sum(len(offsets) - 1 for _, offsets in chunks)
        signatures, num_shingles = np.full((num_docs, self.num_perm), EMPTY, np.uint32), np.zeros(num_docs, np.int32)
        done = 0
        for data, offsets in chunks:
            rows = slice(done, done := done + len(offsets) - 1)
            kernels.sign_documents(
                data, offsets, tuple(tables().words), self.ngram, self._a, self._b, signatures[rows], num_shingles[rows]
            )
        return signatures, num_shingles


def words(array: pa.Array | pa.ChunkedArray) -> Folded:
    """The normalised words of a column of strings."""
    parts = [_squeeze(*chunk, tables().words) for chunk in _chunks(array)]
    if len(parts) == 1:
        return parts[0]
    ends, base = [np.zeros(1, np.int64)], 0
    for part in parts:
        ends.append(part.offsets[1:] + base)
        base += len(part.data)
    return Folded(np.concatenate([np.empty(0, np.uint8), *[p.data for p in parts]]), np.concatenate(ends))


def text_hash(array: pa.Array | pa.ChunkedArray) -> list[bytes]:
    """xxh3_128 of each text, blind to case, compatibility forms, runs of white space and invisible
    characters, and to nothing else: punctuation and symbols count, so that texts made of little
    else stay apart. (Long texts that differ in punctuation only meet as near-duplicates.)"""
    hashes: list[bytes] = []
    for chunk in _chunks(array):
        folded = _squeeze(*chunk, tables().text)
        view = folded.data.data
        hashes += [xxhash.xxh3_128_digest(view[a:b]) for a, b in pairwise(folded.offsets.tolist())]
    return hashes


def hash_shingle(shingle: bytes) -> int:
    """The 32-bit hash that MinHash sees of a shingle: normalised words with single spaces between.
    In Python, for datasketch's `hashfunc` and for tests; the kernels compute the same."""
    mask, polynomial = 2**64 - 1, 0
    for word in shingle.split(b" "):
        h = 0
        for block in (word[i : i + 8] for i in range(0, len(word), 8)):
            h = ((h ^ int.from_bytes(block, "little")) * int(WORD)) & mask
            h ^= h >> 32
        polynomial = (polynomial * int(SHINGLE) + h) & mask
    return (((polynomial ^ polynomial >> 32) * int(MINHASH)) & mask) >> 32


def shingle_sets(array: pa.Array | pa.ChunkedArray, ngram: int) -> ShingleSets:
    """The distinct shingles of each whole text of a column of strings."""
    found = [_shingle_set(*chunk, ngram) for chunk in _chunks(array)]
    if len(found) == 1:
        return found[0]
    bases = np.cumsum([0, *(len(sets.hashes) for sets in found)])
    return ShingleSets(
        np.concatenate([np.empty(0, np.uint64), *[sets.hashes for sets in found]]),
        np.concatenate([np.empty(0, np.int64), *[s.starts + base for s, base in zip(found, bases, strict=False)]]),
        np.concatenate([np.empty(0, np.int64), *[s.ends + base for s, base in zip(found, bases, strict=False)]]),
    )


def jaccard(text_a: str, text_b: str, ngram: int) -> float:
    """|A and B| / |A or B| of the two texts' sets of shingles; 0.0 when either has none."""
    sets = shingle_sets(pa.array([text_a, text_b], pa.large_string()), ngram)
    return float(sets_jaccard(sets.hashes, sets.starts, sets.ends, 0, 1))


def _shingle_set(data: Uint8s, offsets: Int64s, ngram: int) -> ShingleSets:
    text, offsets = _squeeze(data, offsets, tables().words)
    # A word needs a byte and a space, so half a text's bytes bound its words.
    starts = np.concatenate([[0], np.cumsum((np.diff(offsets) + 1) // 2)]).astype(np.int64)
    hashes, ends = np.empty(starts[-1], np.uint64), np.empty(len(starts) - 1, np.int64)
    kernels.shingle_documents(text, offsets, ngram, hashes, starts, ends)
    for lo, hi in zip(starts[:-1].tolist(), ends.tolist(), strict=True):
        hashes[lo:hi].sort()  # NumPy's vectorised sort: several times the speed of one compiled here
    kernels.drop_repeats(hashes, starts, ends)
    return ShingleSets(hashes, starts[:-1], ends)


def _squeeze(data: Uint8s, offsets: Int64s, table: Table) -> Folded:
    """Documents folded; the buffer goes on for 64 bytes after them, for the kernels."""
    wide = kernels.count_wide(data, offsets[0], offsets[-1])
    out = np.empty(int(offsets[-1] - offsets[0]) + wide * table.most + 2 * 64, np.uint8)
    out_offsets = np.zeros(len(offsets), np.int64)
    kernels.squeeze_documents(data, offsets, tuple(table), out, out_offsets)
    return Folded(out[: out_offsets[-1]], out_offsets)


def _chunks(array: pa.Array | pa.ChunkedArray) -> Iterator[tuple[Uint8s, Int64s]]:
    """(bytes, int64 offsets[n + 1]) of each chunk, from Arrow's buffers as they are."""
    for chunk in array.chunks if isinstance(array, pa.ChunkedArray) else [array]:
        if pa.types.is_string_view(chunk.type):
            chunk = chunk.cast(pa.large_string())
        if not (pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type)):
            raise TypeError(f"texts are a column of strings, not {chunk.type}: cast it to large_string first")
        if chunk.null_count:
            chunk = pc.fill_null(chunk, "")  # a null may have bytes behind it
        width = np.int64 if pa.types.is_large_string(chunk.type) else np.int32
        _, offsets, data = chunk.buffers()
        if not len(chunk):
            yield np.empty(0, np.uint8), np.zeros(1, np.int64)
            continue
        own = np.frombuffer(offsets, width)[chunk.offset : chunk.offset + len(chunk) + 1].astype(np.int64)
        yield np.frombuffer(data, np.uint8) if data and data.size else np.empty(0, np.uint8), own
