"""Which parts of a long document a model reads, and how the labels of the parts become one.

`choose`: the window whose detector spans have the highest sum of contributions, then the next among what is left,
and so on; a window is centred on its spans. Nothing is sent that the detector saw nothing in. Without spans (the
audit sample of rejects) windows lie evenly over the document.

`combine`: any aligned and any misaligned -> mixed; else the non-neutral label of the highest confidence (a tie:
mixed); else neutral, if any; else unrelated.
"""

from collections.abc import Sequence

from curation.label.rubric import CONFIDENCES, Label

Span = tuple[int, int, float]  # start and end in characters, contribution to AI discourse: inspection's Explain


def choose(text: str, spans: Sequence[Span], *, characters: int, at_most: int) -> list[tuple[int, int]]:
    """(start, end) of at most `at_most` windows of at most `characters` each, in the document's order, cut at white
    space where there is some. The whole text when it is short. They don't overlap."""
    if characters < 1 or at_most < 1:
        raise ValueError(f"windows need at least one character and one window, not {characters} and {at_most}")
    if len(text) <= characters:
        return [(0, len(text))]
    # A span longer than a window stands for its beginning.
    left = sorted((a, min(b, a + characters, len(text)), p) for a, b, p in spans if 0 <= a < b and a < len(text))
    left = [span for span in left if span[2] > 0]
    if not left:
        return _even(text, characters, at_most)
    chosen: list[tuple[int, int]] = []
    while left and len(chosen) < at_most:
        first, last = _best(left, chosen, characters)
        low = max((b for _, b in chosen if b <= first), default=0)
        high = min((a for a, _ in chosen if a >= last), default=len(text))
        start = max(low, min(first - (characters - (last - first)) // 2, high - characters))
        end = min(high, start + characters)
        chosen.append(_at_white_space(text, start, end, first, last))
        start, end = chosen[-1]
        left = [(a, b, p) for a, b, p in left if b <= start or a >= end]
    return sorted(chosen)


def combine(labels: Sequence[Label]) -> Label:
    """One label for the document. The stance does not depend on the order."""
    if not labels:
        raise ValueError("a document has at least one window")
    strongest: dict[str, Label] = {}
    for label in labels:
        before = strongest.get(label.stance)
        if before is None or _strength(label) > _strength(before):
            strongest[label.stance] = label
    aligned, misaligned = strongest.get("aligned"), strongest.get("misaligned")
    if aligned and misaligned:
        # As sure as its less sure half; an own `mixed` window may be surer.
        weak = min((misaligned, aligned), key=_strength)
        halves = Label("mixed", weak.confidence, misaligned.actor, misaligned.evidence)
        return max((halves, strongest.get("mixed", halves)), key=_strength)
    for stances in (("mixed", "misaligned", "aligned"), ("neutral",), ("unrelated",)):
        found = [strongest[stance] for stance in stances if stance in strongest]
        if found:
            return max(found, key=_strength)  # the first of equals
    raise ValueError(f"no stance among {labels}")


def _strength(label: Label) -> int:
    return CONFIDENCES.index(label.confidence)


def _best(left: list[Span], chosen: list[tuple[int, int]], characters: int) -> tuple[int, int]:
    """From the first to the last character of the spans with the highest sum that fit into one window beside those
    chosen; the leftmost of equals. Only windows that begin with a span need be looked at."""
    best, where = 0.0, (0, 0)
    for index, (first, _, _) in enumerate(left):
        limit = min(first + characters, min((a for a, _ in chosen if a >= first), default=first + characters))
        total, last = 0.0, first
        for a, b, p in left[index:]:
            if a >= limit:
                break
            if b <= limit:
                total, last = total + p, max(last, b)
        if total > best:
            best, where = total, (first, last)
    return where


def _even(text: str, characters: int, at_most: int) -> list[tuple[int, int]]:
    count = min(at_most, -(-len(text) // characters))
    room = len(text) - count * characters  # between windows; below zero they would overlap
    size = characters if room >= 0 else len(text) // count
    gaps = max(1, count - 1)
    starts = [index * (len(text) - size) // gaps for index in range(count)]
    return [_at_white_space(text, start, start + size, start + size, start) for start in starts]


def _at_white_space(text: str, start: int, end: int, first: int, last: int) -> tuple[int, int]:
    """[start, end) shrunk to begin and end beside white space, without losing [first, last); as it is where that
    would need half of it (text without spaces)."""
    half = (start + end) // 2
    to = min(first, half)
    new = start
    while new < to and new > 0 and not text[new - 1].isspace():
        new += 1
    if new > 0 and not text[new - 1].isspace():
        new = start
    to = max(last, half)
    stop = end
    while stop > to and stop < len(text) and not text[stop].isspace():
        stop -= 1
    if stop < len(text) and not text[stop].isspace():
        stop = end
    return new, stop
