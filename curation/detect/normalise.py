"""Text as the detectors see it: one pass over the bytes of an Arrow string array.

The result has the same length and the same document offsets as the input, so that a byte
position in it is a byte position in the text. Rules (NORMALISATION names them in model cards):

- ASCII letters are lower-cased, ASCII digits kept, every other ASCII byte becomes a space.
- Latin-1 symbols (U+0080-U+00BF: no-break space, guillemets, ...), General Punctuation
  (U+2000-U+207F: curly quotes, dashes, ...) and CJK punctuation (U+3000-U+303F) become spaces.
- Other non-ASCII characters are letters, kept as they are: their case is not folded, which would
  change byte lengths. A term next to one of them is not at a word boundary.
- `A.I.` as a word becomes `ai`, since it is the one abbreviation that its letters alone do not show.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numba import njit

NORMALISATION = "ascii-lower-v1"

_SPACE = np.uint8(32)
_TABLE = np.array(
    [ord(chr(b).lower()) if chr(b).isalnum() else 32 for b in range(128)] + list(range(128, 256)), dtype=np.uint8
)


class Bytes(NamedTuple):
    """Documents as bytes: document i is data[offsets[i]:offsets[i + 1]]."""

    data: np.ndarray  # uint8[num_bytes]
    offsets: np.ndarray  # int64[num_documents + 1]


def text_bytes(texts: pa.Array) -> Bytes:
    """The UTF-8 bytes of `texts` without a copy where it is a string or large_string array. Slices
    are respected and null is an empty text. Raises TypeError for arrays of another type."""
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    if pa.types.is_string_view(texts.type):
        texts = texts.cast(pa.large_string())
    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
        raise TypeError(f"texts must be an Arrow string array, not {texts.type}")
    if texts.null_count:
        texts = texts.fill_null("")
    if not len(texts):
        return Bytes(np.zeros(0, np.uint8), np.zeros(1, np.int64))
    _, offsets_buffer, data_buffer = texts.buffers()
    width = np.int64 if pa.types.is_large_string(texts.type) else np.int32
    offsets = np.frombuffer(offsets_buffer, width, len(texts) + 1, texts.offset * np.dtype(width).itemsize).astype(
        np.int64
    )
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.zeros(0, np.uint8)
    return Bytes(data[offsets[0] : offsets[-1]], offsets - offsets[0])


def normalise(texts: pa.Array) -> Bytes:
    """`texts` by the rules of this module, byte for byte at the same offsets."""
    raw = text_bytes(texts)
    out = np.empty_like(raw.data)
    _normalise(raw.data, raw.offsets, _TABLE, out)
    return Bytes(out, raw.offsets)


def normalise_text(text: str) -> bytes:
    """One text by the rules of this module."""
    return normalise(pa.array([text], pa.large_string())).data.tobytes()


@njit(cache=True, nogil=True)
def _normalise(data: np.ndarray, offsets: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    for document in range(len(offsets) - 1):
        at, end = offsets[document], offsets[document + 1]
        start = at
        while at < end:
            byte = data[at]
            width = _punctuation_width(data, at, end) if byte >= 0xC2 else 0
            if width:
                out[at : at + width] = _SPACE
                at += width
                continue
            out[at] = table[byte]
            if byte == 46 and _ends_ai(data, table, start, at, end):  # the first full stop of A.I.
                out[at] = 105
                out[at + 1] = _SPACE
                at += 1
            at += 1


@njit(cache=True, nogil=True, inline="always")
def _punctuation_width(data: np.ndarray, at: int, end: int) -> int:
    """Bytes of the non-ASCII punctuation mark at `at`, 0 for anything else."""
    if data[at] == 0xC2:
        return 2
    if at + 2 < end and ((data[at] == 0xE2 and data[at + 1] <= 0x81) or (data[at] == 0xE3 and data[at + 1] == 0x80)):
        return 3
    return 0


@njit(cache=True, nogil=True, inline="always")
def _ends_ai(data: np.ndarray, table: np.ndarray, start: int, stop: int, end: int) -> bool:
    """Whether the full stop at `stop` is the first one of the word `A.I` in data[start:end]."""
    if stop - 1 < start or stop + 1 >= end or table[data[stop - 1]] != 97 or table[data[stop + 1]] != 105:
        return False
    before_is_word = stop - 2 >= start and _is_word(data, table, stop - 2)
    after_is_word = stop + 2 < end and _is_word(data, table, stop + 2)
    return not before_is_word and not after_is_word


@njit(cache=True, nogil=True, inline="always")
def _is_word(data: np.ndarray, table: np.ndarray, at: int) -> bool:
    """Whether an ASCII letter or digit, or any non-ASCII byte, stands at `at`."""
    return table[data[at]] != _SPACE
