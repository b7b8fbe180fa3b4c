"""Folded inference: a supervised fastText model as one small logit row per feature.

fastText averages the input rows of a line's features (words, hashed word n-grams, `</s>`) and
multiplies by the output matrix. Both steps are linear, so input x output is folded once into
logits_FC (features x classes), and a text's logits are the mean of its features' rows: exact up
to rounding (fastText itself reports p + 1e-5, the guard of its logarithm). The kernel works on
normalised bytes in two passes: the first hashes every word of every document (FNV-1a with
sign-extended bytes, as fastText does) and looks it up; the second sums rows per window in a
loop without text. No Python object per document, no GIL.

Scope: softmax models without subwords, as `tilth detect train` writes; `fold` refuses others.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from curation.errors import UserError

_FNV_OFFSET, _FNV_PRIME = np.uint32(2166136261), np.uint32(16777619)
_NGRAM_FACTOR = np.uint64(116049371)
_SPACE = np.uint8(32)
EOS = "</s>"


@dataclass(frozen=True, eq=False)
class Folded:
    """`logits_FC[f]` is what feature f adds to a text's summed logits; features are the words, then the buckets."""

    logits_FC: np.ndarray  # float32[num_words + num_buckets, num_classes]
    vocabulary: np.ndarray  # uint8: the words' bytes, joined
    word_bounds: np.ndarray  # int64[num_words + 1]
    slots: np.ndarray  # int32[a power of two]: open addressing by hash, word id or -1
    num_words: int
    ngrams: int  # longest word n-gram
    eos_id: int  # word id of </s>, -1 where it is not in the vocabulary
    eos_hash: np.uint32


def fold(model: Any, labels: list[str], name: str) -> Folded:
    """Fold a loaded fasttext model; class c of the result is `labels[c]` (with the label prefix).
    Raises UserError for a model that this kernel does not compute."""
    args = model.f.getArgs()
    if args.maxn > 0 or args.loss.name != "softmax" or model.is_quantized():
        raise UserError(
            f"{name} has subwords, is quantised, or is not a softmax model: train one with `tilth detect train`"
        )
    columns = [model.get_labels().index(label) for label in labels]
    words = [word.encode() for word in model.get_words()]
    logits_FC = model.get_input_matrix() @ model.get_output_matrix()[columns].T
    hashes = np.array([_hash_bytes(np.frombuffer(word, np.uint8)) for word in words], dtype=np.uint32)
    word_bounds = np.concatenate([[0], np.cumsum([len(word) for word in words])]).astype(np.int64)
    eos = words.index(EOS.encode()) if EOS.encode() in words else -1
    return Folded(
        logits_FC=np.ascontiguousarray(logits_FC, dtype=np.float32),
        vocabulary=np.frombuffer(b"".join(words), np.uint8),
        word_bounds=word_bounds,
        slots=_slots(hashes),
        num_words=len(words),
        ngrams=args.wordNgrams,
        eos_id=eos,
        eos_hash=_hash_bytes(np.frombuffer(EOS.encode(), np.uint8)),
    )


def window_logits(
    model: Folded, data: np.ndarray, offsets: np.ndarray, window_words: int
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of each window of each document in normalised bytes.

    A document of n words has max(1, ceil(n / window_words)) windows whose lengths differ by at
    most one word. Returns float32[num_windows, num_classes] and int64[num_documents + 1], the
    bounds of each document's windows.
    """
    words_D = _count_words(data, offsets)
    word_bounds = np.concatenate([[0], np.cumsum(words_D)])
    windows_D = np.maximum(1, -(-words_D // window_words))
    window_bounds = np.concatenate([[0], np.cumsum(windows_D)])
    hashes, ids = _lookup(data, offsets, word_bounds, model.vocabulary, model.word_bounds, model.slots)
    out = np.empty((window_bounds[-1], model.logits_FC.shape[1]), dtype=np.float32)
    num_buckets = max(1, len(model.logits_FC) - model.num_words)
    _sum_windows(
        hashes, ids, word_bounds, window_bounds, model.logits_FC, model.num_words, num_buckets,
        model.ngrams, model.eos_id, model.eos_hash, out,
    )  # fmt: skip
    return out, window_bounds


def window_features(model: Folded, text: bytes, window: int, num_windows: int) -> list[tuple[int, int, np.ndarray]]:
    """The features of one window of a normalised text: (first byte, end byte, logit row) of each
    known word and each word n-gram; those with `</s>` alone or at their end stop at the window's
    end. The window's logits are the mean of the rows."""
    data = np.frombuffer(text, np.uint8)
    spans = _word_spans(data)
    hashes, ids = _lookup(
        data, np.array([0, len(data)]), np.array([0, len(spans)]), model.vocabulary, model.word_bounds, model.slots
    )
    first, end = window * len(spans) // num_windows, (window + 1) * len(spans) // num_windows
    stop = int(spans[end - 1, 1]) if end > first else 0
    starts, ends = [*spans[first:end, 0].tolist(), stop], [*spans[first:end, 1].tolist(), stop]
    hashes, ids = np.append(hashes[first:end], model.eos_hash), np.append(ids[first:end], model.eos_id)
    num_buckets = np.uint64(max(1, len(model.logits_FC) - model.num_words))
    found = [(a, b, model.logits_FC[i]) for a, b, i in zip(starts, ends, ids, strict=True) if i >= 0]
    for at in range(len(ids)):
        for last in range(at + 1, min(at + model.ngrams, len(ids))):
            bucket = model.num_words + int(_ngram_hash(hashes, at, last + 1) % num_buckets)
            found.append((starts[at], ends[last], model.logits_FC[bucket]))
    return found


def _slots(hashes: np.ndarray) -> np.ndarray:
    """Open addressing table at most half full: the word ids by hash."""
    slots = np.full(1 << max(4, int(2 * len(hashes)).bit_length()), -1, dtype=np.int32)
    for word, value in enumerate(hashes):
        at = int(value) & (len(slots) - 1)
        while slots[at] >= 0:
            at = (at + 1) & (len(slots) - 1)
        slots[at] = word
    return slots


@njit(cache=True, nogil=True)
def _hash_bytes(word: np.ndarray) -> np.uint32:
    value = _FNV_OFFSET
    for byte in word:
        value = np.uint32(np.uint32(value ^ np.uint32(np.int8(byte))) * _FNV_PRIME)
    return value


@njit(cache=True, nogil=True)
def _count_words(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """int64[num_documents]: words (runs of non-space bytes) of each document."""
    counts = np.zeros(len(offsets) - 1, dtype=np.int64)
    for document in range(len(counts)):
        before = _SPACE
        words = 0
        for at in range(offsets[document], offsets[document + 1]):
            words += (data[at] != _SPACE) & (before == _SPACE)
            before = data[at]
        counts[document] = words
    return counts


@njit(cache=True, nogil=True)
def _word_spans(data: np.ndarray) -> np.ndarray:
    """int64[num_words, 2]: first and end byte of each word of one document."""
    spans = np.empty((_count_words(data, np.array([0, len(data)]))[0], 2), dtype=np.int64)
    at = 0
    for word in range(len(spans)):
        while data[at] == _SPACE:
            at += 1
        spans[word, 0] = at
        while at < len(data) and data[at] != _SPACE:
            at += 1
        spans[word, 1] = at
    return spans


@njit(cache=True, nogil=True)
def _lookup(
    data: np.ndarray, offsets: np.ndarray, word_bounds: np.ndarray,
    vocabulary: np.ndarray, vocabulary_bounds: np.ndarray, slots: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """uint32 hash and int32 id (-1 = unknown) of every word of every document."""
    hashes = np.empty(word_bounds[-1], dtype=np.uint32)
    ids = np.empty(word_bounds[-1], dtype=np.int32)
    mask = len(slots) - 1
    word = 0
    for document in range(len(offsets) - 1):
        at, end = offsets[document], offsets[document + 1]
        while at < end:
            if data[at] == _SPACE:
                at += 1
                continue
            start = at
            value = _FNV_OFFSET
            while at < end and data[at] != _SPACE:
                value = np.uint32(np.uint32(value ^ np.uint32(np.int8(data[at]))) * _FNV_PRIME)
                at += 1
            slot = np.int64(value) & mask
            while slots[slot] >= 0 and not _same(data, start, at, vocabulary, vocabulary_bounds, slots[slot]):
                slot = (slot + 1) & mask
            hashes[word] = value
            ids[word] = slots[slot]
            word += 1
    return hashes, ids


@njit(cache=True, nogil=True, inline="always")
def _same(data: np.ndarray, start: int, end: int, vocabulary: np.ndarray, bounds: np.ndarray, word: int) -> bool:
    first = bounds[word]
    if bounds[word + 1] - first != end - start:
        return False
    for i in range(end - start):  # noqa: SIM110 - compiled
        if data[start + i] != vocabulary[first + i]:
            return False
    return True


@njit(cache=True, nogil=True)
def _ngram_hash(hashes: np.ndarray, first: int, end: int) -> np.uint64:
    value = np.uint64(np.int64(np.int32(hashes[first])))
    for at in range(first + 1, end):
        value = value * _NGRAM_FACTOR + np.uint64(np.int64(np.int32(hashes[at])))
    return value


@njit(cache=True, nogil=True)
def _sum_windows(
    hashes: np.ndarray, ids: np.ndarray, word_bounds: np.ndarray, window_bounds: np.ndarray,
    logits_FC: np.ndarray, num_words: int, num_buckets: int, ngrams: int, eos_id: int, eos_hash: np.uint32,
    out: np.ndarray,
) -> None:  # fmt: skip
    """out[w] = mean logit row of the features of window w, each window a line that ends with </s>."""
    num_classes = logits_FC.shape[1]
    total = np.empty(num_classes, dtype=np.float64)
    buckets = np.uint64(num_buckets)
    for document in range(len(word_bounds) - 1):
        first_word = word_bounds[document]
        num_document_words = word_bounds[document + 1] - first_word
        first_window = window_bounds[document]
        num_windows = window_bounds[document + 1] - first_window
        for window in range(num_windows):
            start = first_word + window * num_document_words // num_windows
            end = first_word + (window + 1) * num_document_words // num_windows
            total[:] = 0.0
            num_features = 0
            for at in range(start, end + 1):  # position `end` is </s>
                word = ids[at] if at < end else eos_id
                if word >= 0:
                    num_features += 1
                    for c in range(num_classes):
                        total[c] += logits_FC[word, c]
                value = np.uint64(np.int64(np.int32(hashes[at] if at < end else eos_hash)))
                for last in range(at + 1, min(at + ngrams, end + 1)):
                    value = value * _NGRAM_FACTOR + np.uint64(
                        np.int64(np.int32(hashes[last] if last < end else eos_hash))
                    )
                    row = num_words + np.int64(value % buckets)
                    num_features += 1
                    for c in range(num_classes):
                        total[c] += logits_FC[row, c]
            out[first_window + window] = total / max(1, num_features)
