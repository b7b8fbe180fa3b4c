"""How much of their wording two texts share: normalised words, word shingles, MinHash signatures.

Dedup, the contamination audit and tracing all mean the same thing by "the same words":

*Characters.* Each is compatibility-decomposed and case-folded (NFKD, casefold, NFKD), one at a
time, so that composed and decomposed accents, full-width letters and ligatures come out equal.
Soft hyphens, zero-width characters and variation selectors vanish.
*Words* are maximal runs of letters, digits and marks; everything else separates. In scripts
written without spaces (Han, kana, Thai, Lao, Khmer, Myanmar) each character is a word.
*Shingles* are `ngram` consecutive words; a text with fewer words has none.
*Hash of a word*: its bytes, eight at a time, big-endian, NUL-free, through h = (h ^ block) * _WORD,
h ^= h >> 32. *Hash of a shingle*: the polynomial of its words' hashes in _SHINGLE mod 2**64, which
rolls, so that a shingle costs the same for any `ngram`. Sets of shingles hold these 64 bits;
MinHash sees 32 (`hash_shingle`).
*Signatures* are datasketch 2's `affine32` bit for bit: `datasketch.MinHash(num_perm, seed,
hashfunc=hash_shingle)` fed a text's shingles has the same hashvalues.

Two kernels run over Arrow's own buffers without the GIL: one folds a column into a buffer of
words, one hashes and permutes. Folding apart from hashing costs a write and a read of the text
in cache and makes both loops tight: no branch a byte in the first, a multiplication for each
eight bytes in the second. ASCII bytes go through a table of 128, other characters through one
of 0x110000 that is made from Python's unicodedata (a character that its version does not know
separates words).
"""

import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numba as nb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

ALGORITHM = "affine32"  # datasketch's name for the scheme of the signatures
MAX_WORDS = 200_000  # a signature covers the first MAX_WORDS words (about 1.2 MB of English); sets cover all

_WORD, _SHINGLE, _MINHASH = (np.uint64(k) for k in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F))
_EMPTY = np.uint32(0xFFFFFFFF)  # datasketch's value of a slot that has seen nothing
_LANES = 64
_SPACE = 32
_COPY, _ALONE = -1, -2  # how a character folds when it has no entry: as it is; as it is, a word of its own

Uint8s = npt.NDArray[np.uint8]
Uint32s = npt.NDArray[np.uint32]
Uint64s = npt.NDArray[np.uint64]
Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


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

    def signatures(self, array: pa.Array | pa.ChunkedArray) -> tuple[Uint32s, Int32s]:
        """(uint32[n, num_perm], int32[n] shingles seen, repeats counted) of a column of strings.
        A document of fewer than `ngram` words, or null, has 0 shingles and a row of 2**32 - 1.
        Raises TypeError for a column that does not hold strings."""
        signed = [self._sign(*_fold(chunk, _tables().words)) for chunk in _chunks(array)]
        if not signed:
            return np.empty((0, self.num_perm), np.uint32), np.empty(0, np.int32)
        return np.concatenate([s for s, _ in signed]), np.concatenate([n for _, n in signed])

    def _sign(self, data: Uint8s, offsets: Int64s) -> tuple[Uint32s, Int32s]:
        num_docs = len(offsets) - 1
        signatures = np.full((num_docs, self.num_perm), _EMPTY, np.uint32)
        num_shingles = np.zeros(num_docs, np.int32)
        _signatures(data, offsets, self.ngram, self._a, self._b, signatures, num_shingles)
        return signatures, num_shingles


def words(array: pa.Array | pa.ChunkedArray) -> Folded:
    """The normalised words of a column of strings."""
    return _joined([_fold(chunk, _tables().words) for chunk in _chunks(array)])


def text_hash(array: pa.Array | pa.ChunkedArray) -> list[bytes]:
    """xxh3_128 of each text, blind to case, compatibility forms, runs of white space and invisible
    characters, and to nothing else: punctuation and symbols count, so that texts made of little
    else stay apart. (Long texts that differ in punctuation only meet as near-duplicates.)"""
    hashes: list[bytes] = []
    for chunk in _chunks(array):
        data, offsets = _fold(chunk, _tables().text)
        view, ends = data.data, offsets.tolist()
        hashes += [xxhash.xxh3_128_digest(view[a:b]) for a, b in pairwise(ends)]
    return hashes


def hash_shingle(shingle: bytes) -> int:
    """The 32-bit hash that MinHash sees of a shingle: normalised words with single spaces between.
    In Python, for datasketch's `hashfunc` and for tests; the kernels compute the same."""
    mask, polynomial = 2**64 - 1, 0
    for word in shingle.split(b" "):
        h = 0
        full = len(word) - len(word) % 8
        for block in [word[i : i + 8] for i in range(0, full, 8)] + [word[full:]]:
            h = ((h ^ int.from_bytes(block, "big")) * int(_WORD)) & mask
            h ^= h >> 32
        polynomial = (polynomial * int(_SHINGLE) + h) & mask
    return (((polynomial ^ polynomial >> 32) * int(_MINHASH)) & mask) >> 32


def shingle_sets(array: pa.Array | pa.ChunkedArray, ngram: int) -> ShingleSets:
    """The distinct shingles of each whole text of a column of strings."""
    data, offsets = words(array)
    # A word needs a byte and a space, so half a text's bytes bound its words.
    starts = np.concatenate([[0], np.cumsum((np.diff(offsets) + 1) // 2)]).astype(np.int64)
    hashes, ends = np.empty(starts[-1], np.uint64), np.empty(len(starts) - 1, np.int64)
    _all_shingles(data, offsets, ngram, hashes, starts, ends)
    for lo, hi in zip(starts[:-1].tolist(), ends.tolist(), strict=True):
        hashes[lo:hi].sort()  # NumPy's vectorised sort: several times the speed of one compiled here
    _drop_repeats(hashes, starts, ends)
    return ShingleSets(hashes, starts[:-1], ends)


def jaccard(text_a: str, text_b: str, ngram: int) -> float:
    """|A and B| / |A or B| of the two texts' sets of shingles; 0.0 when either has none."""
    sets = shingle_sets(pa.array([text_a, text_b], pa.large_string()), ngram)
    return float(sets_jaccard(sets.hashes, sets.starts, sets.ends, 0, 1))


@nb.njit(nogil=True, cache=True)
def sets_jaccard(hashes: Uint64s, starts: Int64s, ends: Int64s, a: int, b: int) -> float:
    """`jaccard` of documents a and b of a ShingleSets, for kernels."""
    i, j, end_i, end_j = starts[a], starts[b], ends[a], ends[b]
    total = (end_i - i) + (end_j - j)
    if i == end_i or j == end_j:
        return 0.0
    shared = 0
    while i < end_i and j < end_j:
        x, y = hashes[i], hashes[j]
        shared += x == y
        i += x <= y
        j += y <= x
    return float(shared / (total - shared))


@nb.njit(nogil=True, cache=True)
def _word_hashes(data: Uint8s, lo: int, hi: int, out: Uint64s, most: int) -> int:
    """Hash of each of the first `most` words of data[lo:hi] into `out`; returns how many."""
    if lo == hi:
        return 0
    count, h, block = 0, np.uint64(0), np.uint64(0)
    for i in range(lo, hi):
        byte = data[i]
        if byte != _SPACE:
            if block >> np.uint64(56):  # eight bytes are in: words hold no NUL
                h = (h ^ block) * _WORD
                h ^= h >> np.uint64(32)
                block = np.uint64(0)
            block = (block << np.uint64(8)) | np.uint64(byte)
            continue
        out[count] = _close(h, block)
        count += 1
        if count == most:
            return count
        h, block = np.uint64(0), np.uint64(0)
    out[count] = _close(h, block)
    return count + 1


@nb.njit(nogil=True, cache=True, inline="always")
def _close(h: np.uint64, block: np.uint64) -> np.uint64:
    """The hash of a word from its full blocks and the last one, which may be full too: then an empty one follows."""
    h = (h ^ block) * _WORD
    h ^= h >> np.uint64(32)
    if block >> np.uint64(56):
        h = h * _WORD
        h ^= h >> np.uint64(32)
    return h


@nb.njit(nogil=True, cache=True)
def _roll(hashes: Uint64s, count: int, ngram: int) -> int:
    """Turn `count` word hashes into shingle hashes, in place; returns how many shingles there are."""
    if count < ngram:
        return 0
    top, polynomial = np.uint64(1), np.uint64(0)
    for k in range(ngram):
        polynomial = polynomial * _SHINGLE + hashes[k]
        if k:
            top *= _SHINGLE
    last = count - ngram
    for k in range(last):
        gone = hashes[k]
        hashes[k] = polynomial
        polynomial = (polynomial - gone * top) * _SHINGLE + hashes[k + ngram]
    hashes[last] = polynomial
    return last + 1


@nb.njit(nogil=True, cache=True)
def _signatures(
    data: Uint8s, offsets: Int64s, ngram: int, a: Uint32s, b: Uint32s, signatures: Uint32s, num_shingles: Int32s
) -> None:
    hashes = np.empty(MAX_WORDS, np.uint64)
    mixed = np.empty(MAX_WORDS + _LANES, np.uint32)
    for doc in range(len(offsets) - 1):
        count = _word_hashes(data, offsets[doc], offsets[doc + 1], hashes, MAX_WORDS)
        count = _roll(hashes, count, ngram)
        num_shingles[doc] = count
        for k in range(count):
            h = hashes[k]
            mixed[k] = _fmix32(np.uint32(((h ^ (h >> np.uint64(32))) * _MINHASH) >> np.uint64(32)))
        # Permutations outside, shingles inside: the running minimum stays in vector registers. Repeating
        # a shingle up to a multiple of the unrolled vector saves the scalar remainder (5 ns a shingle, not 7).
        padded = (count + _LANES - 1) // _LANES * _LANES
        mixed[count:padded] = mixed[0]
        for p in range(len(a) if count else 0):
            factor, term, least = a[p], b[p], _EMPTY
            for k in range(padded):
                least = min(least, np.uint32(mixed[k] * factor + term))
            signatures[doc, p] = least


@nb.njit(nogil=True, cache=True, inline="always")
def _fmix32(h: np.uint32) -> np.uint32:
    """MurmurHash3's finaliser, the first step of affine32."""
    h = np.uint32(h ^ (h >> np.uint32(16)))
    h = np.uint32(h * np.uint32(0x85EBCA6B))
    h = np.uint32(h ^ (h >> np.uint32(13)))
    h = np.uint32(h * np.uint32(0xC2B2AE35))
    return np.uint32(h ^ (h >> np.uint32(16)))


@nb.njit(nogil=True, cache=True)
def _all_shingles(data: Uint8s, offsets: Int64s, ngram: int, hashes: Uint64s, starts: Int64s, ends: Int64s) -> None:
    """Every shingle of document i into hashes[starts[i]:ends[i]], in the order of the text."""
    for doc in range(len(offsets) - 1):
        own = hashes[starts[doc] : starts[doc + 1]]
        count = _word_hashes(data, offsets[doc], offsets[doc + 1], own, len(own))
        ends[doc] = starts[doc] + _roll(own, count, ngram)


@nb.njit(nogil=True, cache=True)
def _drop_repeats(hashes: Uint64s, starts: Int64s, ends: Int64s) -> None:
    """Sorted hashes of each document to the front, each once."""
    for doc in range(len(ends)):
        end = min(starts[doc] + 1, ends[doc])
        for k in range(end, ends[doc]):
            value = hashes[k]
            is_new = value != hashes[end - 1]
            hashes[end] = value
            end += is_new
        ends[doc] = end


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


class _Table(NamedTuple):
    """How characters fold: `ascii` byte to byte; `entry_of` a code point an entry of `blob`, or _COPY or _ALONE.
    Entry k is blob[starts[k]:starts[k + 1]]. `most` bounds the bytes out for one byte in."""

    ascii: Uint8s
    entry_of: Int32s
    starts: Int32s
    blob: Uint8s
    most: int


class _Tables(NamedTuple):
    words: _Table
    text: _Table


def _fold(chunk: tuple[Uint8s, Int64s], table: _Table) -> Folded:
    data, offsets = chunk
    size_bytes = int(offsets[-1] - offsets[0])
    wide = np.count_nonzero(data[offsets[0] : offsets[-1]] & 0x80)
    # Pages that are not written cost nothing, so the bound may be generous. One byte more for each
    # document, and one at the end, for the space that is taken back.
    out = np.empty(size_bytes + wide * table.most + len(offsets), np.uint8)
    out_offsets = np.zeros(len(offsets), np.int64)
    used = _fold_documents(data, offsets, table.ascii, table.entry_of, table.starts, table.blob, out, out_offsets)
    return Folded(out[:used], out_offsets)


def _joined(parts: list[Folded]) -> Folded:
    if len(parts) == 1:
        return parts[0]
    ends, base = [np.zeros(1, np.int64)], 0
    for part in parts:
        ends.append(part.offsets[1:] + base)
        base += len(part.data)
    return Folded(np.concatenate([np.empty(0, np.uint8), *[p.data for p in parts]]), np.concatenate(ends))


@nb.njit(nogil=True, cache=True)
def _fold_documents(
    data: Uint8s,
    offsets: Int64s,
    ascii_map: Uint8s,
    entry_of: Int32s,
    starts: Int32s,
    blob: Uint8s,
    out: Uint8s,
    out_offsets: Int64s,
) -> int:
    k = 0  # next byte to write; a space after a space is overwritten
    for doc in range(len(offsets) - 1):
        i, end = offsets[doc], offsets[doc + 1]
        was_space = True
        while i < end:
            byte = data[i]
            if byte < 0x80:
                byte = ascii_map[byte]
                out[k] = byte
                is_space = byte == _SPACE
                k += not (is_space and was_space)
                was_space = is_space
                i += 1
                continue
            point, width = _code_point(data, i, end)
            entry = entry_of[point]
            lo, hi, source = (starts[entry], starts[entry + 1], blob) if entry >= 0 else (i, i + width, data)
            if entry == _ALONE and not was_space:
                out[k] = _SPACE
                k += 1
            for j in range(lo, hi):
                out[k] = source[j]
                is_space = source[j] == _SPACE
                k += not (is_space and was_space)
                was_space = is_space
            if entry == _ALONE:
                out[k] = _SPACE
                k += 1
                was_space = True
            i += width
        if was_space and k > out_offsets[doc]:
            k -= 1
        out_offsets[doc + 1] = k
    return k


@nb.njit(nogil=True, cache=True, inline="always")
def _code_point(data: Uint8s, i: int, end: int) -> tuple[int, int]:
    """The character at data[i], a lead byte, and its width in bytes. Arrow vouches for UTF-8; what is
    not is one byte of U+FFFD, so that a wrong buffer gives wrong words and never a wild read."""
    lead = np.int64(data[i])
    width = 2 if lead < 0xE0 else (3 if lead < 0xF0 else 4)
    if lead < 0xC2 or lead > 0xF4 or i + width > end:
        return 0xFFFD, 1
    point = lead & (0x7F >> width)
    for j in range(i + 1, i + width):
        point = (point << 6) | (np.int64(data[j]) & 0x3F)
    if point > 0x10FFFF:
        return 0xFFFD, 1
    return point, width  # type: ignore[return-value]  # NumPy to mypy, an integer to numba


# Ranges of code points that have properties worth asking for; the rest is Han, private or unassigned.
_ASKED = ((0x80, 0x3400), (0x4DC0, 0x4E00), (0xA000, 0xD800), (0xF900, 0x20000), (0x2F800, 0x2FA20), (0xE0000, 0xE0200))
_HAN = ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0x20000, 0x2F800), (0x30000, 0x3FFFE))
_UNSPACED = (
    *_HAN,
    (0x3005, 0x3008),
    (0x3040, 0x3100),
    (0x31F0, 0x3200),
    (0x0E00, 0x0F00),
    (0x1000, 0x10A0),
    (0x1780, 0x1800),
)
_SELECTORS = ((0x034F, 0x0350), (0x180B, 0x1810), (0xFE00, 0xFE10), (0xE0100, 0xE01F0))


def _within(point: int, ranges: tuple[tuple[int, int], ...]) -> bool:
    return any(lo <= point < hi for lo, hi in ranges)


def _visible(char: str) -> str:
    """`char` decomposed and case-folded, without what cannot be seen."""
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", char).casefold())
    return "".join(c for c in folded if unicodedata.category(c) != "Cf" and not _within(ord(c), _SELECTORS))


def _as_words(visible: str) -> str:
    """A folded character as words: spaces for what separates, around what stands alone."""
    return "".join(
        " " if not (c.isalnum() or unicodedata.category(c)[0] == "M") else f" {c} " if _within(ord(c), _UNSPACED) else c
        for c in visible
    )


def _as_text(visible: str) -> str:
    """A folded character as text: white space is a space."""
    return "".join(" " if c.isspace() else c for c in visible)


@lru_cache(maxsize=1)
def _tables() -> _Tables:
    """Both tables, about 0.2 s, once in a process."""
    by_words: dict[int, str] = {}
    by_text: dict[int, str] = {}
    for lo, hi in _ASKED:
        for point in range(lo, hi):
            char = chr(point)
            if unicodedata.category(char) in ("Cn", "Co", "Cs"):
                continue
            visible = _visible(char)
            by_words[point], by_text[point] = _as_words(visible), _as_text(visible)
    table_words = _table(_as_words, by_words, " ")
    for lo, hi in _HAN:
        table_words.entry_of[lo:hi] = _ALONE
    return _Tables(table_words, _table(_as_text, by_text, None))


def _table(form_of: Callable[[str], str], folded: dict[int, str], unknown: str | None) -> _Table:
    """`unknown` is what a code point without a character folds to; None: it stays as it is."""
    ascii_map = np.frombuffer("".join(form_of(chr(c).lower()) for c in range(0x80)).encode(), np.uint8)
    entries = {unknown or " ": 0}
    entry_of = np.full(0x110000, _COPY if unknown is None else 0, np.int32)
    for point, form in folded.items():
        char = chr(point)
        entry_of[point] = (
            _COPY if form == char else _ALONE if form == f" {char} " else entries.setdefault(form, len(entries))
        )
    encoded = [form.encode() for form in entries]
    starts = np.concatenate([[0], np.cumsum([len(e) for e in encoded])]).astype(np.int32)
    # A character of several bytes folds to at most the longest entry, and to itself with two spaces.
    most = max(max(len(e) for e in encoded), 3)
    return _Table(ascii_map, entry_of, starts, np.frombuffer(b"".join(encoded), np.uint8), most)
