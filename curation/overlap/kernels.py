"""Folding, hashing and permuting over Arrow's buffers: no Python object a document, no GIL.

A document is worked on whole while it is in cache, in passes without a branch a byte:

1. `_fold`: 64 bytes at a time are lower-cased and what separates words becomes a space, in
   vector registers; the mask of its non-ASCII bytes says how far that holds. Other characters go
   through a table one by one.
2. `_edges`: the same 64 bytes against the space give a mask; where it changes, a word begins or ends.
3. `_hash_words`: eight bytes of a word in one load; `_roll`: word hashes to shingle hashes.
4. `_permute`: permutations outside, shingles inside, the running minima in registers.

Measured on one core on 139 MB of real text with the loops byte by byte that these passes replaced:
2.3 times as fast; the permutations, bound by the multiplier, are now half of it.

Loads reach up to 64 bytes past a position: `text` is always that much longer than what it holds.
"""

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from curation import blocks
from curation.blocks import trailing_zeros

Uint8s = npt.NDArray[np.uint8]
Uint32s = npt.NDArray[np.uint32]
Uint64s = npt.NDArray[np.uint64]
Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]

CharacterTable = tuple[Uint32s, Int32s, Int32s, Uint8s, int, bool]  # characters.Table

MAX_WORDS = 200_000  # a signature covers the first MAX_WORDS words (about 1.2 MB of English); sets cover all
ONE = 1 << 13  # characters of one byte in Table.short, behind those of two
COPY, ALONE = -1, -2  # how a character folds when it has no entry: as it is; as it is, a word of its own
EMPTY = np.uint32(0xFFFFFFFF)  # datasketch's value of a slot that has seen nothing
WORD, SHINGLE, MINHASH = (np.uint64(k) for k in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F))

_SPACE = 32
_WIDE = np.uint64(0x8080808080808080)  # in eight bytes, of those that are not ASCII
_BLOCK = blocks.BLOCK  # bytes, and shingles, that are worked on together
_ROOM = 1 << 20  # bytes of a folded document for which none are counted before
_STRETCH = 1 << 14  # bytes of a document whose words are found at a time: their edges stay in cache

_LANES = ir.VectorType(blocks.I32, 16)


@intrinsic
def _load8(typing: Any, data: Any, at: Any) -> Any:
    """data[at:at + 8] as a little-endian uint64."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return blocks.load(context, builder, signature.args[0], args[0], args[1], blocks.I64)

    return types.uint64(data, types.int64), build


@intrinsic
def _store4(typing: Any, text: Any, at: Any, value: Any) -> Any:
    """text[at:at + 4] = a little-endian uint32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        blocks.store(context, builder, signature.args[0], args[0], args[1], args[2])
        return context.get_dummy_value()

    return types.void(text, types.int64, types.uint32), build


@intrinsic
def _copy_block(typing: Any, source: Any, at: Any, target: Any, to: Any) -> Any:
    """target[to:to + 64] = source[at:at + 64]."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = blocks.load(context, builder, signature.args[0], args[0], args[1], blocks.BYTES)
        blocks.store(context, builder, signature.args[2], args[2], args[3], value)
        return context.get_dummy_value()

    return types.void(source, types.int64, target, types.int64), build


@intrinsic
def _word_bytes(typing: Any, text: Any, at: Any) -> Any:
    """Bit i is set where text[at + i] is not a space."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        block = blocks.load(context, builder, signature.args[0], args[0], args[1], blocks.BYTES)
        return blocks.mask(builder, builder.icmp_unsigned("!=", block, blocks.filled(blocks.BYTES, _SPACE)))

    return types.uint64(text, types.int64), build


@intrinsic
def _fold_block(typing: Any, data: Any, at: Any, text: Any, to: Any, symbols: Any) -> Any:
    """Fold the ASCII among data[at:at + 64] into text[to:to + 64]: as words, or with `symbols` as text.
    Bit i of the result is set where data[at + i] is not ASCII."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        block = blocks.load(context, builder, signature.args[0], args[0], args[1], blocks.BYTES)
        space = blocks.filled(blocks.BYTES, _SPACE)
        low = builder.or_(block, blocks.filled(blocks.BYTES, 0x20))
        letter, digit = blocks.among(builder, low, ord("a"), 26), blocks.among(builder, block, ord("0"), 10)
        white = builder.or_(blocks.among(builder, block, 9, 5), blocks.among(builder, block, 28, 5))  # str.isspace
        lowered = builder.select(letter, low, block)
        as_words = builder.select(builder.or_(letter, digit), lowered, space)
        folded = builder.select(args[4], builder.select(white, space, lowered), as_words)
        blocks.store(context, builder, signature.args[2], args[2], args[3], folded)
        return blocks.mask(builder, builder.icmp_signed("<", block, blocks.filled(blocks.BYTES, 0)))

    return types.uint64(data, types.int64, text, types.int64, types.boolean), build


@intrinsic
def _least(typing: Any, hashes: Any, count: Any, factor: Any, term: Any) -> Any:
    """min(hashes[k] * factor + term mod 2**32 for k < count), `count` a multiple of 64. In vectors of 512
    bits by hand: left to itself LLVM takes 256 where it could have them, a third slower."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        undefined = ir.Constant(_LANES, ir.Undefined)

        def splat(scalar: Any) -> Any:
            first = builder.insert_element(undefined, scalar, ir.Constant(blocks.I32, 0))
            return builder.shuffle_vector(first, undefined, blocks.filled(_LANES, 0))

        def smaller(a: Any, b: Any) -> Any:
            return builder.select(builder.icmp_unsigned("<", a, b), a, b)

        factors, terms = splat(args[2]), splat(args[3])
        minima = [cgutils.alloca_once_value(builder, blocks.filled(_LANES, 0xFFFFFFFF)) for _ in range(_BLOCK // 16)]
        zero, step = ir.Constant(blocks.I64, 0), ir.Constant(blocks.I64, _BLOCK)
        with cgutils.for_range_slice(builder, zero, args[1], step) as (k, _):
            for lane, minimum in enumerate(minima):
                at = builder.add(k, ir.Constant(blocks.I64, 16 * lane))
                value = blocks.load(context, builder, signature.args[0], args[0], at, _LANES)
                value = builder.add(builder.mul(value, factors), terms)
                builder.store(smaller(value, builder.load(minimum)), minimum)
        least = builder.load(minima[0])
        for minimum in minima[1:]:
            least = smaller(least, builder.load(minimum))
        for distance in (8, 4, 2, 1):
            turned = ir.Constant(_LANES, [(lane + distance) % 16 for lane in range(16)])
            least = smaller(least, builder.shuffle_vector(least, undefined, turned))
        return builder.extract_element(least, ir.Constant(blocks.I32, 0))

    return types.uint32(hashes, types.int64, types.uint32, types.uint32), build


@nb.njit(nogil=True, cache=True)
def sign_documents(
    data: Uint8s,
    offsets: Int64s,
    table: CharacterTable,
    ngram: int,
    a: Uint32s,
    b: Uint32s,
    signatures: Uint32s,
    num_shingles: Int32s,
) -> None:
    """Row i of `signatures` and of `num_shingles` from document i; rows without a shingle keep what they hold."""
    text, edges = np.empty(_ROOM, np.uint8), np.empty(_STRETCH + 2 * _BLOCK, np.int32)
    hashes, mixed = np.empty(MAX_WORDS, np.uint64), np.empty(MAX_WORDS + _BLOCK, np.uint32)
    for doc in range(len(offsets) - 1):
        text = _roomy(text, data, offsets[doc], offsets[doc + 1], table)
        num_bytes = _fold(data, offsets[doc], offsets[doc + 1], table, text)
        count = _roll(hashes, _hash_document(text, num_bytes, edges, hashes, MAX_WORDS), ngram)
        num_shingles[doc] = count
        if count:
            _permute(hashes, count, a, b, mixed, signatures[doc])


@nb.njit(nogil=True, cache=True)
def shingle_documents(text: Uint8s, offsets: Int64s, ngram: int, hashes: Uint64s, starts: Int64s, ends: Int64s) -> None:
    """Every shingle of document i, text[offsets[i]:offsets[i + 1]] squeezed, into hashes[starts[i]:ends[i]], in
    the order of the text; starts[i + 1] is where its words must end."""
    edges = np.empty(_STRETCH + 2 * _BLOCK, np.int32)
    for doc in range(len(offsets) - 1):
        own = hashes[starts[doc] : starts[doc + 1]]
        count = _hash_document(text[offsets[doc] :], offsets[doc + 1] - offsets[doc], edges, own, len(own))
        ends[doc] = starts[doc] + _roll(own, count, ngram)


@nb.njit(nogil=True, cache=True)
def squeeze_documents(
    data: Uint8s,
    offsets: Int64s,
    table: CharacterTable,
    out: Uint8s,
    out_offsets: Int64s,
) -> None:
    """Document i folded into out[out_offsets[i]:out_offsets[i + 1]], single spaces between its words.
    `out` needs two blocks more."""
    text, to = np.empty(_ROOM, np.uint8), 0
    for doc in range(len(offsets) - 1):
        text = _roomy(text, data, offsets[doc], offsets[doc + 1], table)
        num_bytes = _fold(data, offsets[doc], offsets[doc + 1], table, text)
        text[num_bytes : num_bytes + _BLOCK] = _SPACE
        before = np.uint64(1)  # a space before the first word is one too many
        for at in range(0, num_bytes, _BLOCK):
            spaces = ~_word_bytes(text, at)
            surplus = spaces & ((spaces << np.uint64(1)) | before)
            before = spaces >> np.uint64(63)
            kept = 0  # what stands before each surplus space goes to the end of `out`, with all that follows
            while surplus:
                place = trailing_zeros(surplus)
                _copy_block(text, at + kept, out, to)
                to += place - kept
                kept = place + 1
                surplus &= surplus - np.uint64(1)
            _copy_block(text, at + kept, out, to)
            to += _BLOCK - kept
        if to > out_offsets[doc] and out[to - 1] == _SPACE:
            to -= 1
        out_offsets[doc + 1] = to


@nb.njit(nogil=True, cache=True)
def count_wide(data: Uint8s, lo: int, hi: int) -> int:
    """Bytes of data[lo:hi] that are not ASCII."""
    count = 0
    for i in range(lo, hi):
        count += data[i] >> np.uint8(7)
    return count


@nb.njit(nogil=True, cache=True)
def drop_repeats(hashes: Uint64s, starts: Int64s, ends: Int64s) -> None:
    """Sorted hashes of each document to the front, each once."""
    for doc in range(len(ends)):
        end = min(starts[doc] + 1, ends[doc])
        for k in range(end, ends[doc]):
            value = hashes[k]
            is_new = value != hashes[end - 1]
            hashes[end] = value
            end += is_new
        ends[doc] = end


@nb.njit(nogil=True, cache=True)
def sets_jaccard(hashes: Uint64s, starts: Int64s, ends: Int64s, a: int, b: int) -> float:
    """|A and B| / |A or B| of documents a and b of a ShingleSets; 0.0 when either has no shingle."""
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
def _roomy(text: Uint8s, data: Uint8s, lo: int, hi: int, table: CharacterTable) -> Uint8s:
    """`text`, or a larger one where data[lo:hi] folded might not fit. Pages that are not written cost nothing."""
    if (hi - lo) * (1 + table[4]) + 3 * _BLOCK <= len(text):
        return text
    needed = hi - lo + count_wide(data, lo, hi) * table[4] + 3 * _BLOCK
    return text if needed <= len(text) else np.empty(2 * needed, np.uint8)


@nb.njit(nogil=True, cache=True)
def _fold(data: Uint8s, lo: int, hi: int, table: CharacterTable, text: Uint8s) -> int:
    """data[lo:hi] folded into `text`, words apart by one or more spaces; returns how many bytes."""
    short, entry_of, starts, blob, _, symbols = table
    i, k, last_block = lo, 0, len(data) - _BLOCK
    while i < hi:
        if i <= last_block:
            plain = min(trailing_zeros(_fold_block(data, i, text, k, symbols)), hi - i)
            i += plain
            k += plain
        # One by one up to eight ASCII characters in a row.
        while i < hi:
            while i <= last_block:
                eight = _load8(data, i)
                lead = np.int64(eight & np.uint64(0xFF))
                wide = lead >> 7
                two = ((lead & 0x7F) << 6) | np.int64((eight >> np.uint64(8)) & np.uint64(0x3F))
                form = short[(lead + ONE) ^ (((lead + ONE) ^ two) & -wide)]  # no branch on what is hard to predict
                if not (eight & _WIDE) or not form or i + wide >= hi:
                    break
                _store4(text, k, form)
                k += form >> 24
                i += 1 + int(wide)
            if i >= hi:
                break
            byte = data[i]
            if byte < 0x80:
                if i <= last_block:
                    break
                text[k] = np.uint8(short[ONE + byte])
                i += 1
                k += 1
                continue
            point, width = _code_point(data, i, hi)
            entry = entry_of[point]
            if entry == ALONE:
                text[k] = _SPACE
                k += 1
            # Two loops: one over a chosen array would count references, with atomic operations, for each character.
            if entry >= 0:
                for j in range(starts[entry], starts[entry + 1]):
                    text[k] = blob[j]
                    k += 1
            else:
                for j in range(i, i + width):
                    text[k] = data[j]
                    k += 1
            if entry == ALONE:
                text[k] = _SPACE
                k += 1
            i += width
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


@nb.njit(nogil=True, cache=True)
def _stretch(text: Uint8s, lo: int, hi: int) -> int:
    """Where the words of about _STRETCH bytes from `lo` on end: at a space, or at `hi`."""
    end = min(lo + _STRETCH, hi)
    while end < hi and text[end] != _SPACE:
        end += 1
    return end


@nb.njit(nogil=True, cache=True)
def _edges(text: Uint8s, lo: int, hi: int, edges: Int32s) -> int:
    """Beginning and end of each word of text[lo:hi], a stretch, into `edges`; returns how many words."""
    count, before = 0, np.uint64(0)
    for at in range(lo, hi, _BLOCK):
        inside = _word_bytes(text, at)
        if hi - at < _BLOCK:
            inside &= (np.uint64(1) << np.uint64(hi - at)) - np.uint64(1)
        changes = inside ^ ((inside << np.uint64(1)) | before)
        before = inside >> np.uint64(63)
        while changes:
            edges[count] = at + trailing_zeros(changes)
            changes &= changes - np.uint64(1)
            count += 1
    edges[count] = hi  # of a word that nothing follows
    return (count + 1) >> 1


@nb.njit(nogil=True, cache=True)
def _hash_document(text: Uint8s, num_bytes: int, edges: Int32s, hashes: Uint64s, most: int) -> int:
    """Hash of each of the first `most` words of text[:num_bytes] into `hashes`; returns how many."""
    count, lo = 0, 0
    while lo < num_bytes and count < most:
        hi = _stretch(text, lo, num_bytes)
        found = min(_edges(text, lo, hi, edges), most - count)
        _hash_words(text, edges, found, hashes[count:])
        count += found
        lo = hi
    return count


@nb.njit(nogil=True, cache=True)
def _hash_words(text: Uint8s, edges: Int32s, count: int, hashes: Uint64s) -> None:
    for k in range(count):
        at, end = np.int64(edges[2 * k]), np.int64(edges[2 * k + 1])
        h = np.uint64(0)
        while end - at > 8:
            h = (h ^ _load8(text, at)) * WORD
            h ^= h >> np.uint64(32)
            at += 8
        beyond = np.uint64(8 * (8 - (end - at)))  # bits of the load that are not the word's
        h = (h ^ ((_load8(text, at) << beyond) >> beyond)) * WORD
        hashes[k] = h ^ (h >> np.uint64(32))


@nb.njit(nogil=True, cache=True)
def _roll(hashes: Uint64s, count: int, ngram: int) -> int:
    """Turn `count` word hashes into shingle hashes, in place; returns how many shingles there are."""
    if count < ngram:
        return 0
    top, polynomial = np.uint64(1), np.uint64(0)
    for k in range(ngram):
        polynomial = polynomial * SHINGLE + hashes[k]
        if k:
            top *= SHINGLE
    last = count - ngram
    for k in range(last):
        gone = hashes[k]
        hashes[k] = polynomial
        polynomial = (polynomial - gone * top) * SHINGLE + hashes[k + ngram]
    hashes[last] = polynomial
    return last + 1


@nb.njit(nogil=True, cache=True)
def _permute(hashes: Uint64s, count: int, a: Uint32s, b: Uint32s, mixed: Uint32s, signature: Uint32s) -> None:
    """affine32 of `count` > 0 shingles; `mixed` is room for them and a block more."""
    for k in range(count):
        h = hashes[k]
        mixed[k] = _fmix32(np.uint32(((h ^ (h >> np.uint64(32))) * MINHASH) >> np.uint64(32)))
    padded = (count + _BLOCK - 1) // _BLOCK * _BLOCK
    mixed[count:padded] = mixed[0]  # a shingle twice changes no minimum
    for p in range(len(a)):
        signature[p] = _least(mixed, padded, a[p], b[p])


@nb.njit(nogil=True, cache=True, inline="always")
def _fmix32(h: np.uint32) -> np.uint32:
    """MurmurHash3's finaliser, the first step of affine32."""
    h = np.uint32(h ^ (h >> np.uint32(16)))
    h = np.uint32(h * np.uint32(0x85EBCA6B))
    h = np.uint32(h ^ (h >> np.uint32(13)))
    h = np.uint32(h * np.uint32(0xC2B2AE35))
    return np.uint32(h ^ (h >> np.uint32(16)))
