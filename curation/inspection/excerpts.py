"""Pieces of document text that are safe and short enough to show.

Offsets of spans are characters unless a name says bytes. An excerpt is a list of pieces, so
that what is marked survives escaping: markup is added by the template, never here.
"""

import difflib
import re
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

# Controls (ANSI escapes among them) but tab and newline, line separators, and the characters that
# reorder what follows them. Left-to-right and right-to-left marks and joiners stay: scripts need them.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb]")
_WORD_CHARS = 24  # an excerpt is cut between words where a space is this near
_COMPARED_CHARS = 200_000  # of each document of a pair: beyond, differences are not looked for


class Span(NamedTuple):
    """A marked stretch of a text, [start, end)."""

    start: int
    end: int
    kind: str


class Piece(NamedTuple):
    """A stretch of an excerpt; `kind` is None where nothing is marked."""

    text: str
    kind: str | None = None


class Quote(NamedTuple):
    """A marked stretch with the text around it."""

    before: str
    match: str
    after: str


def visible(text: str) -> str:
    r"""`text` with characters that act on a terminal or reorder a line spelled out, as in `\u001b`."""
    return _UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def one_line(text: str) -> str:
    """`text` with every run of white space as one space."""
    return " ".join(text.split())


def shorten(text: str, max_chars: int) -> str:
    """The start of `text`, ending in an ellipsis when it was cut."""
    return text if len(text) <= max_chars else text[: max_chars - 1].rstrip() + "…"


def char_offsets(text: str, byte_offsets: Sequence[int]) -> list[int]:
    """Characters before each UTF-8 byte offset of `text`; an offset inside a character counts as its start."""
    raw = np.frombuffer(text.encode(), np.uint8)
    starts = np.flatnonzero((raw & 0xC0) != 0x80)
    offsets = np.asarray(byte_offsets, np.int64)
    found: list[int] = (np.searchsorted(starts, offsets, side="right") - 1).clip(0).tolist()
    return found


def term_span(text: str, start: int, term: str) -> Span:
    """Where a blocklist term found at `start` ends. The text may spell it with other separators
    (`A.I.` for `ai`), so a stretch of the term's length is extended to the end of its word."""
    end = min(start + len(term), len(text))
    while end < len(text) and text[end].isalnum():
        end += 1
    return Span(start, end, "term")


def quote(text: str, start: int, end: int, around_chars: int = 60) -> Quote:
    """text[start:end] with up to `around_chars` on each side, on one line."""
    before, after = text[max(0, start - around_chars) : start], text[end : end + around_chars]
    left = ("…" if start > around_chars else "") + re.sub(r"\s+", " ", before)
    right = re.sub(r"\s+", " ", after) + ("…" if end + around_chars < len(text) else "")
    return Quote(left, shorten(one_line(text[start:end]), 200), right)


def excerpt(text: str, spans: Sequence[Span], max_chars: int) -> list[Piece]:
    """The stretch of at most `max_chars` of `text` that holds the most spans, with these marked.
    Cut between words where it can be; where spans overlap, the first in `spans` wins."""
    start = _densest(sorted({span.start for span in spans}), len(text), max_chars)
    end = min(len(text), start + max_chars)
    if start and (space := re.search(r"\s", text[start : start + _WORD_CHARS])):
        start += space.end()
    if end < len(text) and (space := re.search(r"\s\S*$", text[end - _WORD_CHARS : end])):
        end += space.start() - _WORD_CHARS
    kinds: list[str | None] = [None] * (end - start)
    for span in reversed(spans):
        a, b = max(span.start, start) - start, min(span.end, end) - start
        if a < b:
            kinds[a:b] = [span.kind] * (b - a)
    pieces = [Piece("…")] if start else []
    at = start
    for kind, run in groupby(kinds):
        stop = at + len(list(run))
        pieces.append(Piece(text[at:stop], kind))
        at = stop
    return [*pieces, Piece("…")] if end < len(text) else pieces


def _densest(starts: list[int], num_chars: int, max_chars: int) -> int:
    """The first character of the window that holds the most of `starts`, with some text before the first of them."""
    if num_chars <= max_chars or not starts:
        return 0
    reach = max_chars * 3 // 4
    held = np.searchsorted(starts, np.asarray(starts) + reach) - np.arange(len(starts))
    first = starts[int(held.argmax())]
    return max(0, min(first - max_chars // 8, num_chars - max_chars))


def differences(left: str, right: str, max_words: int) -> tuple[list[Piece], list[Piece]]:
    """Two texts as pieces, words that only one of them has marked as `differs`; at most
    `max_words` of each, from shortly before the first difference on."""
    # Longer words are broken: text without spaces must neither be one difference nor fill the page.
    a, b = (re.findall(r"\S{1,40}", text[:_COMPARED_CHARS]) for text in (left, right))
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = max(0, same - 12) if a != b else 0
    a_shown, b_shown = a[start : start + max_words], b[start : start + max_words]
    sides: tuple[list[Piece], list[Piece]] = ([], [])
    # autojunk would call frequent words junk and mark half the text.
    for tag, a1, a2, b1, b2 in difflib.SequenceMatcher(None, a_shown, b_shown, autojunk=False).get_opcodes():
        for pieces, words in zip(sides, (a_shown[a1:a2], b_shown[b1:b2]), strict=True):
            if words:
                pieces.append(Piece(" ".join(words), None if tag == "equal" else "differs"))
    for pieces, words in zip(sides, (a, b), strict=True):
        if start:
            pieces.insert(0, Piece("…"))
        if len(words) > start + max_words:
            pieces.append(Piece("…"))
    return sides
