"""Text to the rows of a fastText model's input matrix, as fastText does it, and sums over those rows.

1. `_split`, `_hash_tokens`: bytes to tokens at fastText's separators, 64 bytes at a time, and their FNV-1a hashes
   (bytes sign-extended), many tokens at a time.
2. `_keys`, `_identify`: the word of each token, by a 64-bit key: the token itself up to eight bytes, up to sixteen a
   hash of 56 bits, beyond it the hash and a comparison. `_drop`: labels, and what `</s>` ends. Words that aren't in the
   dictionary stay, since n-grams are made of their hashes.
3. `_list_rows`: the row numbers of each line (a range of tokens, then `</s>`): words, or their subwords, then the
   buckets of word n-grams.
4. `_sum_rows`: adds those rows.

Where a table is larger than the cache (2, 4), its lines are asked for hundreds of items ahead. Documents pass in
batches whose lists stay in the cache. Compiled, without the GIL, no Python object per document; kernels take flat
arrays and call nothing that takes arrays, as numba counts references with atomic operations (a view a row and a call a
token were half of the time).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from curation import blocks
from curation.blocks import high_product, prefetch, trailing_zeros

BATCH_BYTES = 1 << 18
LANES = 16  # tokens that are hashed together
EIGHT = 8  # rows that are added together
_MOST_LANES = 16  # of a row that are
_AHEAD = np.uint64(256)  # items ahead of which cache lines are asked for
_FNV_OFFSET, _FNV_PRIME = np.uint32(2166136261), np.uint32(16777619)
_NGRAM_FACTOR = np.uint64(116049371)
_SEPARATORS = np.isin(np.arange(256), [0, 9, 10, 11, 12, 13, 32])
_EOS = b"</s>"
_EOS_KEY = np.uint64(int.from_bytes(_EOS, "little"))
_LABEL = np.frombuffer(b"__label__", np.uint8)  # of a loaded model, whichever prefix it was trained with
# Keys of words over eight and over sixteen bytes have a separator where no other key has one.
_LONG, _LONGER, _MARKS = (np.uint64(n << 56) for n in (32, 9, 255))
_MIX = np.uint64(0x9E3779B97F4A7C15)
_LABEL_ID = -2
_NO, _YES = np.uint64(0), np.uint64(1)
_EIGHTS = np.uint64(2**64 - EIGHT)
_BYTE, _SIXTEEN, _SHIFTS, _EIGHT_BYTES = (np.uint64(n) for n in (8, 16, 63, 64))
_ALL_BITS = np.uint64(2**64 - 1)


class Features(NamedTuple):
    """What a model needs of the text. Row numbers: words, then buckets."""

    vocabulary: np.ndarray  # uint8: the bytes of the words and labels, joined
    bounds: np.ndarray  # int64[num_words + num_labels + 1]
    slots: np.ndarray  # uint64[2 * a power of two]: open addressing by hash, key and number of the word + 1
    num_words: int
    ngrams: int
    bucket: int
    inverse: tuple[np.uint64, np.uint64]  # of bucket, see `_inverse`
    minn: int
    maxn: int
    pruned: np.ndarray  # int32[bucket]: which of the rows after the words, or -1; empty: the bucket itself
    eos_id: int  # the word `</s>`, -1 where it is not in the dictionary
    eos_hash: np.uint32


class Words(NamedTuple):
    """What stands between separators in a batch; document i has those from bounds[i] to bounds[i + 1]. Arrays but
    `bounds` go on behind them."""

    data: np.ndarray  # uint8
    keys: np.ndarray  # uint64, see `_keys`
    hashes: np.ndarray  # uint32: FNV-1a as fastText has it
    starts: np.ndarray  # uint64: first byte in `data`
    ends: np.ndarray  # uint64
    bounds: np.ndarray  # int64


class Tokens(NamedTuple):
    """Tokens of a batch; document i has those from bounds[i] to bounds[i + 1]."""

    data: np.ndarray  # uint8
    hashes: np.ndarray  # uint32
    ids: np.ndarray  # int32: number of the word, -1 = not in the dictionary
    starts: np.ndarray  # int64: first byte in `data`
    ends: np.ndarray  # int64
    bounds: np.ndarray  # int64


class Rows(NamedTuple):
    """Rows of each line of a batch; line i has those from bounds[i] to bounds[i + 1]."""

    rows: np.ndarray  # int32
    bounds: np.ndarray  # int64
    num_features: np.ndarray  # int64[lines]: of which fastText takes the mean


def features(
    vocabulary: np.ndarray, bounds: np.ndarray, num_words: int, *, ngrams: int, bucket: int, minn: int, maxn: int,
    pruned: np.ndarray | None,
) -> Features:  # fmt: skip
    """The dictionary, ready for look-ups."""
    slots = _slots(vocabulary, bounds)
    eos, length = np.frombuffer(_EOS, np.uint8), np.uint64(len(_EOS))
    eos_hash, bucket = fnv(eos), max(1, bucket)
    eos_id = int(slots[2 * int(_slot(eos, _NO, length, eos_hash, _EOS_KEY, slots, vocabulary, bounds)) + 1]) - 1
    return Features(
        vocabulary, bounds, slots, num_words, ngrams, bucket, _inverse(bucket), minn, maxn,
        np.zeros(0, np.int32) if pruned is None else pruned, eos_id if eos_id < num_words else -1, eos_hash,
    )  # fmt: skip


def batches(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of documents of about BATCH_BYTES, one document at least."""
    first = 0
    while first < len(offsets) - 1:
        fits = int(np.searchsorted(offsets, offsets[first] + BATCH_BYTES, side="right")) - 1
        last = max(first + 1, fits)
        yield first, last
        first = last


def words(data: np.ndarray, offsets: np.ndarray) -> Words:
    """The words of the documents data[offsets[i]:offsets[i + 1]]."""
    start, end = int(offsets[0]), int(offsets[-1])
    data, eight = _readable(data[start:end])
    most = (end - start) // 2 + len(offsets) + int(_AHEAD)
    hashes, starts, ends = np.empty(most, np.uint32), np.empty(most, np.uint64), np.empty(most, np.uint64)
    bounds = _split(data, offsets - start, _SEPARATORS, starts, ends)
    return Words(data, _hash(data, eight, starts, ends, hashes, int(bounds[-1])), hashes, starts, ends, bounds)


def tokens(model: Features, data: np.ndarray, offsets: np.ndarray) -> Tokens:
    """The tokens of the documents data[offsets[i]:offsets[i + 1]]."""
    data, keys, hashes, starts, ends, bounds = words(data, offsets)
    count = int(bounds[-1])
    ids = np.empty(count, np.int32)
    dictionary = model.slots, model.vocabulary, model.bounds, model.num_words
    if _identify(data, keys, hashes, starts, ends, ids, count, *dictionary):
        _drop(keys, hashes, starts, ends, ids, bounds)
    kept = bounds[-1]
    return Tokens(data, hashes[:kept], ids[:kept], starts[:kept].view(np.int64), ends[:kept].view(np.int64), bounds)


def list_rows(
    model: Features, found: Tokens, firsts: np.ndarray, lasts: np.ndarray, weights: np.ndarray | None = None
) -> Rows:
    """The rows of the lines of tokens firsts[i]:lasts[i], each with `</s>` behind it, in fastText's order.

    A word of a model with subwords is its row and those of its subwords. With `weights` it is its own row alone, for
    a table whose rows of words are sums already: row w then counts for weights[w] features.
    """
    count = len(found.ids) + len(firsts)
    most = count * min(model.ngrams, count)
    if model.maxn:
        lengths = found.ends - found.starts + 2  # with < and >
        pieces = min(model.maxn, int(lengths.max(initial=0))) - max(1, model.minn) + 1
        most += int(lengths.sum()) * max(0, pieces)
    rows, bounds = np.empty(most + 1 + int(_AHEAD) + EIGHT, np.int32), np.empty(len(firsts) + 1, np.int64)
    num_features = np.empty(len(firsts), np.int64)
    _list_rows(
        found.data, found.hashes, found.ids, found.starts, found.ends, firsts, lasts,
        np.zeros(0, np.int32) if weights is None else weights, model.num_words, model.ngrams, model.bucket,
        *model.inverse, model.minn, model.maxn, model.pruned, model.eos_id, model.eos_hash, rows, bounds, num_features,
    )  # fmt: skip
    return Rows(rows, bounds, num_features)


def zeros(rows: int, lanes: int) -> np.ndarray:
    """float32[rows, lanes] from the start of a cache line, so that no row of 16 lanes lies on two."""
    whole = np.zeros(rows * lanes + 16, np.float32)
    first = -whole.ctypes.data % 64 // 4
    return whole[first : first + rows * lanes].reshape(rows, lanes)


def sum_rows(table_FL: np.ndarray, lines: Rows) -> np.ndarray:
    """float64[lines, lanes]: the sum of each line's rows."""
    width = table_FL.shape[1]
    total = np.empty((len(lines.num_features), width))
    _sum_rows(
        table_FL.ravel(), lines.rows, lines.bounds, total.ravel(), np.uint64(width), (0,) * min(width, _MOST_LANES)
    )
    return total


def sum_subwords(model: Features, table_FL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32[words, lanes], the sum of each word's rows (its own and its subwords'), and int32[words], how many."""
    alone = model._replace(ngrams=1, eos_id=-1)
    total, counts = np.empty((model.num_words, table_FL.shape[1]), np.float32), np.empty(model.num_words, np.int32)
    for first in range(0, model.num_words, 4096):
        part = np.arange(first, min(first + 4096, model.num_words))
        nothing = np.zeros(len(part), np.uint32)
        starts, ends = model.bounds[part], model.bounds[part + 1]
        words = Tokens(model.vocabulary, nothing, part.astype(np.int32), starts, ends, part)
        lines = list_rows(alone, words, part - first, part - first + 1)
        total[part], counts[part] = sum_rows(table_FL, lines), lines.num_features
    if model.eos_id >= 0:  # the one word without subwords
        total[model.eos_id], counts[model.eos_id] = table_FL[model.eos_id], 1
    return total, counts


def sums_of_squares(lines: Rows, wanted: np.ndarray) -> np.ndarray:
    """float64[lines]: the sum over a line's features of the square of how often each occurs, or a little more
    (features are counted by 12 bits of their numbers); 0 for a line that is not `wanted`."""
    squares = np.zeros(len(lines.num_features))
    _sums_of_squares(lines.rows, lines.bounds, np.flatnonzero(wanted), squares)
    return squares


def ngram_rows(model: Features, hashes: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Of a line of tokens (`</s>` is behind them): first and end token of each word n-gram, and its row."""
    signed = [int(value) - ((int(value) >> 31) << 32) for value in [*hashes, model.eos_hash]]
    for first in range(len(signed)):
        value = signed[first]
        for last in range(first + 1, min(first + model.ngrams, len(signed))):
            value = (value * int(_NGRAM_FACTOR) + signed[last]) % 2**64
            row = value % model.bucket
            left = int(model.pruned[row]) if len(model.pruned) else row
            if left >= 0:
                yield first, last + 1, model.num_words + left


def _slots(vocabulary: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The dictionary as a table half full at most, without words that no text can have."""
    count, (data, eight) = len(bounds) - 1, _readable(vocabulary)
    slots = np.zeros(2 << max(4, (2 * count - 1).bit_length()), np.uint64)
    hashes = np.empty(count + LANES, np.uint32)
    starts, ends = (np.pad(side, (0, LANES)).astype(np.uint64) for side in (bounds[:-1], bounds[1:]))
    possible = np.empty(count, np.bool_)
    _possible(data, bounds, _SEPARATORS, possible)
    keys = _hash(data, eight, starts, ends, hashes, count)
    _fill_slots(data, bounds, keys, hashes, possible, slots)
    return slots


def _inverse(divisor: int) -> tuple[np.uint64, np.uint64]:
    """(magic, shift) by which n // divisor is ((n - high) / 2 + high) >> shift, where high is the upper half of
    n * magic, for every n of 64 bits; not for 1 (Granlund and Montgomery 1994, Division by invariant integers)."""
    bits = divisor.bit_length() - 1
    if divisor == 1 << bits:
        return _NO, np.uint64(max(0, bits - 1))
    return np.uint64(-(-(1 << (65 + bits)) // divisor) % 2**64), np.uint64(bits)


def _hash(
    data: np.ndarray, eight: np.ndarray, starts: np.ndarray, ends: np.ndarray, hashes: np.ndarray, count: int
) -> np.ndarray:
    """Fills `hashes`; returns the keys."""
    keys, more = np.empty(count + LANES, np.uint64), np.empty(count + LANES, np.uint64)
    _hash_tokens(data, eight, starts, ends, keys, more, hashes, count)
    _keys(hashes, more, starts, ends, keys, count)
    return keys


def _readable(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`data`, of eight bytes at least, and a view in which item i is the eight bytes from i."""
    if len(data) < 8:
        data = np.concatenate([data, np.zeros(8 - len(data), np.uint8)])
    data = np.ascontiguousarray(data)
    return data, np.ndarray(len(data) - 7, "<u8", data.data, strides=(1,))


@njit(cache=True, nogil=True)
def fnv(word: np.ndarray) -> np.uint32:
    """FNV-1a of bytes, sign-extended as fastText has them."""
    value = _FNV_OFFSET
    for byte in word:
        value = _hashed(value, byte)
    return value


@njit(cache=True, nogil=True, inline="always")
def _hashed(value: np.uint32, byte: np.uint8) -> np.uint32:
    return np.uint32(np.uint32(value ^ np.uint32(np.int8(byte))) * _FNV_PRIME)


@intrinsic
def _inside(typing: Any, data: Any, at: Any) -> Any:
    """Bit i is set where data[at + i] is no separator."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        block = blocks.load(context, builder, signature.args[0], args[0], args[1], blocks.BYTES)
        white = builder.or_(blocks.among(builder, block, 9, 5), blocks.among(builder, block, 32, 1))
        return blocks.mask(builder, builder.not_(builder.or_(white, blocks.among(builder, block, 0, 1))))

    return types.uint64(data, types.int64), build


@njit(cache=True, nogil=True)
def _split(
    data: np.ndarray, offsets: np.ndarray, separators: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """First and end byte of every token, where the mask of a block of 64 bytes changes; returns the bounds of each
    document's tokens."""
    bounds = np.empty(len(offsets), np.int64)
    started, ended, last_block = 0, 0, len(data) - blocks.BLOCK
    for document in range(len(offsets) - 1):
        bounds[document] = started
        before, stop = _NO, offsets[document + 1]
        for at in range(offsets[document], stop, blocks.BLOCK):
            inside = _NO
            if at <= last_block:
                inside = _inside(data, at)
                if stop - at < blocks.BLOCK:
                    inside &= (_YES << np.uint64(stop - at)) - _YES
            else:
                for i in range(stop - at):
                    inside |= np.uint64(not separators[data[at + i]]) << np.uint64(i)
            shifted = (inside << _YES) | before
            begins, closes, before = inside & ~shifted, shifted & ~inside, inside >> _SHIFTS
            while begins:
                starts[started] = at + trailing_zeros(begins)
                begins &= begins - _YES
                started += 1
            while closes:
                ends[ended] = min(at + trailing_zeros(closes), stop)
                closes &= closes - _YES
                ended += 1
        if ended < started:
            ends[ended] = stop
            ended += 1
    bounds[-1] = started
    return bounds


@intrinsic
def _hash_lanes(typing: Any, keys: Any, more: Any, starts: Any, ends: Any, hashes: Any, token: Any) -> Any:
    """FNV-1a of up to sixteen bytes of LANES tokens from `token` on: the hash of one is a chain of multiplications,
    those of several are not."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        longs, ints = ir.VectorType(blocks.I64, LANES), ir.VectorType(blocks.I32, LANES)

        def lanes(array: int) -> Any:
            return blocks.load(context, builder, signature.args[array], args[array], args[5], longs)

        def int_of(value: Any, shift: int) -> Any:
            return builder.trunc(builder.lshr(value, blocks.filled(longs, shift)), ints)

        length = builder.trunc(builder.sub(lanes(3), lanes(2)), ints)
        value = blocks.filled(ints, int(_FNV_OFFSET))
        for array, first in ((0, 0), (1, 8)):
            eight = lanes(array)
            for i in range(8):
                byte = builder.shl(int_of(eight, 32 * (i // 4)), blocks.filled(ints, 24 - 8 * (i % 4)))
                byte = builder.ashr(byte, blocks.filled(ints, 24))  # sign-extended
                longer = builder.mul(builder.xor(value, byte), blocks.filled(ints, int(_FNV_PRIME)))
                inside = builder.icmp_unsigned(">", length, blocks.filled(ints, first + i))
                value = builder.select(inside, longer, value)
        blocks.store(context, builder, signature.args[4], args[4], args[5], value)
        return context.get_dummy_value()

    return types.void(keys, more, starts, ends, hashes, types.uint64), build


@njit(cache=True, nogil=True)
def _hash_tokens(
    data: np.ndarray, eight: np.ndarray, starts: np.ndarray, ends: np.ndarray, keys: np.ndarray, more: np.ndarray,
    hashes: np.ndarray, count: int,
) -> None:  # fmt: skip
    """FNV-1a of each of `count` tokens, its first eight bytes in `keys` and (before others) the next in `more`; all
    arrays have room for LANES more."""
    last_eight = np.uint64(len(eight) - 1)
    for token in range(np.uint64(count)):
        start = starts[token]
        at, length = min(start, last_eight), ends[token] - start
        rest = (_EIGHT_BYTES - _BYTE * length) & _SHIFTS if length < _BYTE else _NO
        keys[token] = (eight[at] >> (_BYTE * (start - at))) & (_ALL_BITS >> rest)
        next_at = min(start + _BYTE, last_eight)
        more[token] = eight[next_at] >> min(_BYTE * (start + _BYTE - next_at), _SHIFTS)
    for token in range(np.uint64(0), np.uint64(count), np.uint64(LANES)):
        _hash_lanes(keys, more, starts, ends, hashes, token)
    for token in range(np.uint64(count)):
        start, end = starts[token], ends[token]
        if end - start > _SIXTEEN:
            value = hashes[token]
            for at in range(start + _SIXTEEN, end):
                value = _hashed(value, data[at])
            hashes[token] = value


@njit(cache=True, nogil=True)
def _keys(
    hashes: np.ndarray, more: np.ndarray, starts: np.ndarray, ends: np.ndarray, keys: np.ndarray, count: int
) -> None:
    """Make `keys` of first bytes those of whole tokens: of more than eight bytes a hash of the first sixteen, of FNV-1a
    and of the length; of more than sixteen with another mark, and to be compared in full."""
    for token in range(np.uint64(count)):
        length = ends[token] - starts[token]
        left = (_SIXTEEN - min(max(length, _BYTE), _SIXTEEN)) * _BYTE
        mixed = (keys[token] ^ ((more[token] << (left & _SHIFTS)) * _MIX)) * _MIX
        mixed = (mixed ^ (mixed >> np.uint64(32)) ^ (length << np.uint64(32)) ^ np.uint64(hashes[token])) * _MIX
        long = (_LONGER if length > _SIXTEEN else _LONG) | (mixed >> _BYTE)
        keys[token] = long if length > _BYTE else keys[token]


@njit(cache=True, nogil=True)
def _identify(
    data: np.ndarray, keys: np.ndarray, hashes: np.ndarray, starts: np.ndarray, ends: np.ndarray,
    ids: np.ndarray, count: int, slots: np.ndarray, vocabulary: np.ndarray, word_bounds: np.ndarray, num_words: int,
) -> bool:  # fmt: skip
    """The word of each token, -1 for none, _LABEL_ID for a label. Returns whether there is a label or `</s>`."""
    mask, dropped = np.uint64(len(slots) // 2 - 1), False
    for token in range(np.uint64(count)):
        prefetch(slots, (np.uint64(hashes[token + _AHEAD]) & mask) << _YES)
        key, slot = keys[token], np.uint64(hashes[token]) & mask
        while slots[slot << _YES] != key and slots[(slot << _YES) + _YES]:
            slot = (slot + _YES) & mask
        mark = key & _MARKS
        if mark == _LONGER:
            start = starts[token]
            slot = _slot(data, start, ends[token] - start, hashes[token], key, slots, vocabulary, word_bounds)
        word = np.int64(slots[(slot << _YES) + _YES]) - 1
        if word < 0 and (mark == _LONG) | (mark == _LONGER):
            is_label = _is_label(data, starts[token])
        else:
            is_label = word >= num_words
        dropped |= is_label | (key == _EOS_KEY)
        ids[token] = _LABEL_ID if is_label else word
    return dropped


@njit(cache=True, nogil=True)
def _drop(
    keys: np.ndarray, hashes: np.ndarray, starts: np.ndarray, ends: np.ndarray, ids: np.ndarray, bounds: np.ndarray
) -> None:
    """Drop labels, and in each document what follows `</s>`, from all arrays."""
    kept, end = 0, bounds[0]
    for document in range(len(bounds) - 1):
        first, end = end, bounds[document + 1]
        bounds[document] = kept
        for token in range(first, end):
            if keys[token] == _EOS_KEY:
                break
            if ids[token] != _LABEL_ID:
                hashes[kept], starts[kept], ends[kept], ids[kept] = (
                    hashes[token], starts[token], ends[token], ids[token],
                )  # fmt: skip
                kept += 1
    bounds[-1] = kept


@njit(cache=True, nogil=True)
def _is_label(data: np.ndarray, start: np.uint64) -> bool:
    for i in range(np.uint64(len(_LABEL))):  # noqa: SIM110 - compiled
        if data[start + i] != _LABEL[i]:
            return False
    return True


@njit(cache=True, nogil=True)
def _slot(
    data: np.ndarray, start: np.uint64, length: np.uint64, value: np.uint32, key: np.uint64,
    slots: np.ndarray, vocabulary: np.ndarray, word_bounds: np.ndarray,
) -> np.uint64:  # fmt: skip
    """Where a word is in the table, or the empty place where it would be."""
    mask = np.uint64(len(slots) // 2 - 1)
    slot = np.uint64(value) & mask
    while slots[(slot << _YES) + _YES] and (
        slots[slot << _YES] != key
        or (
            length > _SIXTEEN
            and not same(data, start, length, vocabulary, word_bounds, np.int64(slots[(slot << _YES) + _YES]) - 1)
        )
    ):
        slot = (slot + _YES) & mask
    return slot


@njit(cache=True, nogil=True)
def same(
    data: np.ndarray, start: np.uint64, length: np.uint64, vocabulary: np.ndarray, bounds: np.ndarray, word: int
) -> bool:
    """Whether data[start:][:length] is the word of this number."""
    first = np.uint64(bounds[word])
    if np.uint64(bounds[word + 1]) - first != length:
        return False
    for i in range(length):  # noqa: SIM110 - compiled
        if data[start + i] != vocabulary[first + i]:
            return False
    return True


@njit(cache=True, nogil=True)
def _fill_slots(
    vocabulary: np.ndarray, bounds: np.ndarray, keys: np.ndarray, hashes: np.ndarray, possible: np.ndarray,
    slots: np.ndarray,
) -> None:  # fmt: skip
    """Of equal words the last stands, as in fastText."""
    for word in range(len(possible)):
        if possible[word]:
            start, length = np.uint64(bounds[word]), np.uint64(bounds[word + 1] - bounds[word])
            slot = _slot(vocabulary, start, length, hashes[word], keys[word], slots, vocabulary, bounds)
            slots[slot << _YES], slots[(slot << _YES) + _YES] = keys[word], np.uint64(word + 1)


@njit(cache=True, nogil=True)
def _possible(vocabulary: np.ndarray, bounds: np.ndarray, separators: np.ndarray, possible: np.ndarray) -> None:
    """Whether a text can have each word of the dictionary: not if it is empty or has a separator."""
    for word in range(len(possible)):
        possible[word] = bounds[word] < bounds[word + 1]
        for at in range(bounds[word], bounds[word + 1]):
            possible[word] &= not separators[vocabulary[at]]


@njit(cache=True, nogil=True, inline="always")
def _signed(value: np.uint32) -> np.uint64:
    return np.uint64(np.int64(np.int32(value)))


@njit(cache=True, nogil=True)
def _list_rows(
    data: np.ndarray, hashes: np.ndarray, ids: np.ndarray, starts: np.ndarray, ends: np.ndarray,
    firsts: np.ndarray, lasts: np.ndarray, weights: np.ndarray, num_words: int, ngrams: int, bucket: int,
    magic: np.uint64, shift: np.uint64, minn: int, maxn: int, pruned: np.ndarray, eos_id: int, eos_hash: np.uint32,
    rows: np.ndarray, bounds: np.ndarray, num_features: np.ndarray,
) -> None:  # fmt: skip
    row = 0
    buckets, is_pruned = np.uint64(bucket), len(pruned) > 0
    every_bit = _ALL_BITS if bucket > 1 else _NO  # `_inverse` knows no 1
    for line in range(len(firsts)):
        bounds[line] = row
        first, last = firsts[line], lasts[line]
        summed = 0  # features that a row stands for beside itself
        for at in range(first, last):
            rows[row] = ids[at]
            row += ids[at] >= 0
            if maxn > 0:
                if ids[at] >= 0 and len(weights):
                    summed += weights[ids[at]] - 1
                else:
                    row = _list_subwords(data, starts[at], ends[at], minn, maxn, bucket, pruned, num_words, rows, row)
        rows[row] = eos_id
        row += eos_id >= 0
        for at in range(first, last if ngrams > 1 else first):
            value = _signed(hashes[at])
            for ahead in range(at + 1, min(at + ngrams, last + 1)):
                value = value * _NGRAM_FACTOR + _signed(hashes[ahead] if ahead < last else eos_hash)
                high = high_product(value, magic)
                quotient = (((value - high) >> _YES) + high) >> shift
                left = np.int64((value - quotient * buckets) & every_bit)
                left = pruned[left] if is_pruned else left
                rows[row] = num_words + left
                row += int(left >= 0)
        num_features[line] = row - bounds[line] + summed
    bounds[-1] = row


@njit(cache=True, nogil=True)
def _list_subwords(
    data: np.ndarray, start: int, end: int, minn: int, maxn: int, bucket: int, pruned: np.ndarray, num_words: int,
    rows: np.ndarray, row: int,
) -> int:  # fmt: skip
    """The buckets of the pieces of `<word>` of minn to maxn characters, but for `<` and `>` alone."""
    for first in range(start - 1, end + 1):  # start - 1 is `<`, end is `>`
        if start <= first < end and data[first] & 0xC0 == 0x80:
            continue
        value = _FNV_OFFSET
        at, characters = first, 0
        while at <= end and characters < maxn:
            value = _hashed(value, np.uint8(60) if at < start else np.uint8(62) if at == end else data[at])
            at += 1
            while start <= at < end and data[at] & 0xC0 == 0x80:
                value = _hashed(value, data[at])
                at += 1
            characters += 1
            if characters >= minn and not (characters == 1 and (first < start or at > end)):
                left = np.int64(value % np.uint32(bucket))
                left = pruned[left] if len(pruned) else left
                rows[row] = num_words + left
                row += int(left >= 0)
    return row


@intrinsic
def _add_rows(
    typing: Any, table: Any, rows: Any, at: Any, total: Any, width: Any, first: Any, sums: Any, lanes: Any
) -> Any:
    """Add table[width * row + first:][:len(lanes)] for the EIGHT rows from rows[at] on to the doubles from total[sums]
    on."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        count = signature.args[7].count
        floats, doubles = (ir.VectorType(kind, count) for kind in (ir.FloatType(), ir.DoubleType()))
        indices = blocks.load(context, builder, signature.args[1], args[1], args[2], ir.VectorType(blocks.I32, EIGHT))
        found = []
        for k in range(EIGHT):
            row = builder.zext(builder.extract_element(indices, blocks.I32(k)), blocks.I64)
            where = builder.add(builder.mul(row, args[4]), args[5])
            part = blocks.load(context, builder, signature.args[0], args[0], where, floats)
            found.append(builder.fpext(part, doubles))
        while len(found) > 1:
            found = [builder.fadd(one, other) for one, other in zip(found[::2], found[1::2], strict=True)]
        before = blocks.load(context, builder, signature.args[3], args[3], args[6], doubles)
        blocks.store(context, builder, signature.args[3], args[3], args[6], builder.fadd(before, found[0]))
        return context.get_dummy_value()

    return types.void(table, rows, types.uint64, total, types.uint64, types.uint64, types.uint64, lanes), build


@njit(cache=True, nogil=True)
def _sum_rows(
    table: np.ndarray, rows: np.ndarray, bounds: np.ndarray, total: np.ndarray, width: np.uint64, lanes: tuple[int, ...]
) -> None:
    """`table` and `total` as flat arrays: a view of a row would cost atomic reference counts. A row is `width` floats:
    as many parts of len(lanes), which the compiler knows, as there are."""
    part = np.uint64(len(lanes))
    for line in range(np.uint64(len(bounds) - 1)):
        start, stop = np.uint64(bounds[line]), np.uint64(bounds[line + _YES])
        eights = start + ((stop - start) & _EIGHTS)
        for lane in range(line * width, (line + _YES) * width):
            total[lane] = 0.0
        for first in range(_NO, width, part):
            for at in range(start, eights, np.uint64(EIGHT)):
                for ahead in range(at + _AHEAD, at + _AHEAD + np.uint64(EIGHT)):
                    prefetch(table, width * np.uint64(np.uint32(rows[ahead])) + first)
                _add_rows(table, rows, at, total, width, first, line * width + first, lanes)
        for at in range(eights, stop):
            prefetch(table, width * np.uint64(np.uint32(rows[at + _AHEAD])))
            for lane in range(width):
                total[line * width + lane] += table[width * np.uint64(rows[at]) + lane]


@njit(cache=True, nogil=True)
def _sums_of_squares(rows: np.ndarray, bounds: np.ndarray, wanted: np.ndarray, squares: np.ndarray) -> None:
    counts = np.zeros(4096, np.int32)
    for line in wanted:
        total = 0
        for at in range(bounds[line], bounds[line + 1]):
            slot = rows[at] & 4095
            total += 2 * counts[slot] + 1
            counts[slot] += 1
        for at in range(bounds[line], bounds[line + 1]):
            counts[rows[at] & 4095] = 0
        squares[line] = total
