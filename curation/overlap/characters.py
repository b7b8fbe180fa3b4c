"""How characters fold, as tables for the kernels, made from Python's unicodedata.

A character that its version does not know separates words, and stays as it is in a text.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple
from unicodedata import category, normalize

import numpy as np

from curation.overlap.kernels import ALONE, COPY, ONE, Int32s, Uint8s, Uint32s


class Table(NamedTuple):
    """`entry_of` maps a code point to an entry of `blob`, or to COPY or ALONE. Entry k is
    blob[starts[k]:starts[k + 1]]. `short` has the same for characters of one UTF-8 byte, at ONE + byte, and of two, at
    the lower seven bits of the first and six of the second, where that is three bytes at most: they from the lowest
    byte up, and their number in the highest byte; else 0. ASCII is as the kernels' blocks have it when `symbols` says
    that they keep symbols. `most` bounds the bytes out for one byte in of a character that is not ASCII."""

    short: Uint32s
    entry_of: Int32s
    starts: Int32s
    blob: Uint8s
    most: int
    symbols: bool


class Tables(NamedTuple):
    words: Table
    text: Table


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


@lru_cache(maxsize=1)
def tables() -> Tables:
    """Both tables, about 0.2 s, once in a process."""
    chars = [c for lo, hi in _ASKED for c in map(chr, range(lo, hi)) if category(c) not in ("Cn", "Co", "Cs")]
    # All at once, a line each: line ends neither compose nor fold.
    folded = normalize("NFKD", normalize("NFKD", "\n".join(chars)).casefold())
    selectors, unspaced = (_points(ranges) for ranges in (_SELECTORS, _UNSPACED))
    invisible = {ord(c): None for c in set(folded) if category(c) == "Cf" or selectors[ord(c)]}
    visible = folded.translate(invisible)

    def word_form(c: str) -> str:
        """A folded character as words: spaces for what separates, around what stands alone."""
        if not (c.isalnum() or category(c)[0] == "M"):
            return " "
        return f" {c} " if unspaced[ord(c)] else c

    def text_form(c: str) -> str:
        """A folded character as text: white space is a space."""
        return " " if c.isspace() else c

    words = _table(word_form, chars, visible, " ")
    for lo, hi in _HAN:
        words.entry_of[lo:hi] = ALONE
    return Tables(words, _table(text_form, chars, visible, None))


def _points(ranges: tuple[tuple[int, int], ...]) -> bytearray:
    """1 for each code point in `ranges`."""
    points = bytearray(0x110000)
    for lo, hi in ranges:
        points[lo:hi] = b"\1" * (hi - lo)
    return points


def _table(form_of: Callable[[str], str], chars: list[str], visible: str, unknown: str | None) -> Table:
    """Line i of `visible` is what is seen of chars[i], folded. `unknown` is what a code point without a
    character folds to; None: it stays as it is."""
    forms = visible.translate({ord(c): form_of(c) for c in set(visible) - {"\n"}}).split("\n")
    entries = {unknown or " ": 0}
    entry_of = np.full(0x110000, COPY if unknown is None else 0, np.int32)
    most = 1
    for char, form in zip(chars, forms, strict=True):
        if form == char:
            entry_of[ord(char)] = COPY
            continue
        # What a byte of a character becomes at most; one that stands alone gains two spaces.
        most = max(most, -(-len(form.encode()) // len(char.encode())))
        entry_of[ord(char)] = ALONE if form == f" {char} " else entries.setdefault(form, len(entries))
    encoded = [form.encode() for form in entries]
    short = np.zeros(ONE + 0x80, np.uint32)
    for c in range(0x800):
        own, entry = chr(c).encode(), entry_of[c]
        if c < 0x80:
            where, folded = ONE + c, form_of(chr(c).lower()).encode()
        else:
            where, folded = (own[0] & 0x7F) << 6 | own[1] & 0x3F, own if entry == COPY else encoded[entry]
        if entry != ALONE and len(folded) <= 3:
            short[where] = int.from_bytes(folded, "little") | len(folded) << 24
    starts = np.concatenate([[0], np.cumsum([len(e) for e in encoded])]).astype(np.int32)
    return Table(short, entry_of, starts, np.frombuffer(b"".join(encoded), np.uint8), most, unknown is None)
