"""Pieces of text: what is marked is what was asked, and nothing in them acts on a terminal."""

import unicodedata

from hypothesis import given, settings
from hypothesis import strategies as st

from curation.inspection.excerpts import (
    Piece,
    Quote,
    Span,
    char_offsets,
    differences,
    excerpt,
    quote,
    shorten,
    term_span,
    visible,
)


def test_visible_spells_out_controls_and_overrides_and_nothing_else() -> None:
    assert visible("a\x1b[31mb\u202egnp.exe") == "a\\u001b[31mb\\u202egnp.exe"
    kept = "naïve 漢字 שלום\u200f 👩\u200d🚀\ttab\nline \\u202e"
    assert visible(kept) == kept


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_no_control_character_survives_visible(text: str) -> None:
    assert all(unicodedata.category(c) != "Cc" or c in "\t\n" for c in visible(text))


@given(st.text(min_size=1, max_size=60), st.data())
@settings(max_examples=100, deadline=None)
def test_char_offsets_undo_utf8(text: str, data: st.DataObject) -> None:
    chars = data.draw(st.lists(st.integers(0, len(text) - 1), max_size=5))
    assert char_offsets(text, [len(text[:c].encode()) for c in chars]) == chars


def test_offset_inside_a_character_is_its_start() -> None:
    assert char_offsets("é€x", [0, 1, 2, 3, 4, 5]) == [0, 0, 1, 1, 1, 2]


def test_term_is_marked_to_the_end_of_its_word_only() -> None:
    assert term_span("the A.I. said", 4, "ai") == Span(4, 7, "term")  # `A.I`
    assert term_span("self-aware one", 0, "self aware") == Span(0, 10, "term")
    assert term_span("a robot", 2, "robot") == Span(2, 7, "term")


def test_quote_shows_where_it_was_cut() -> None:
    assert quote("one two three four", 4, 7, 60) == Quote("one ", "two", " three four")
    assert quote("one two three\nfour", 8, 13, 4) == Quote("…two ", "three", " fou…")


def test_excerpt_marks_spans_and_the_first_wins_where_they_overlap() -> None:
    spans = [Span(4, 7, "term"), Span(0, 13, "evidence")]
    assert excerpt("one two three four", spans, 100) == [
        Piece("one ", "evidence"),
        Piece("two", "term"),
        Piece(" three", "evidence"),
        Piece(" four"),
    ]


def test_excerpt_is_where_most_spans_are() -> None:
    text = "robot " + "x " * 400 + "robot robot " + "y " * 400
    spans = [Span(i, i + 5, "term") for i in (0, 806, 812)]
    pieces = excerpt(text, spans, 80)
    assert [p.text for p in pieces if p.kind == "term"] == ["robot", "robot"]
    assert pieces[0] == pieces[-1] == Piece("…")


@given(st.text(max_size=300), st.lists(st.tuples(st.integers(0, 300), st.integers(1, 30)), max_size=6))
@settings(max_examples=100, deadline=None)
def test_excerpt_is_a_bounded_stretch_of_the_text(text: str, places: list[tuple[int, int]]) -> None:
    spans = [Span(start, start + n, "term") for start, n in places if start < len(text)]
    pieces = excerpt(text, spans, 120)
    inner = pieces[(len(text) > 120 and pieces[0] == Piece("…")) : len(pieces) - (pieces[-1:] == [Piece("…")])]
    whole = "".join(p.text for p in inner)
    assert whole in text
    assert len(whole) <= 120
    if len(text) <= 120:
        marked = {i for span in spans for i in range(span.start, min(span.end, len(text)))}
        assert sum(len(p.text) for p in pieces if p.kind) == len(marked)


def test_differences_marks_words_of_one_side() -> None:
    kept, removed = differences("the cat sat here", "the dog sat here now", 50)
    assert kept == [Piece("the"), Piece("cat", "differs"), Piece("sat here")]
    assert removed == [Piece("the"), Piece("dog", "differs"), Piece("sat here"), Piece("now", "differs")]


def test_differences_of_equal_texts_marks_nothing_and_long_ones_start_near_the_first() -> None:
    assert differences("a b", "a b", 50) == ([Piece("a b")], [Piece("a b")])
    head = [f"w{i}" for i in range(1000)]
    same, _ = differences(" ".join(head), " ".join(head), 20)
    assert same == [Piece(" ".join(head[:20])), Piece("…")]
    left, right = differences(" ".join([*head, "x", *head]), " ".join([*head, "y", *head]), 20)
    assert left[:3] == [Piece("…"), Piece(" ".join(head[-12:])), Piece("x", "differs")]
    assert right[2] == Piece("y", "differs")
    assert left[-1] == right[-1] == Piece("…")


def test_text_without_spaces_cannot_fill_the_page() -> None:
    left, right = differences("a" * 100_000, "a" * 50_000 + "b" * 50_000, 30)
    assert sum(len(p.text) for p in left) < 30 * 41 + 2
    assert any(p.kind for p in right)


def test_shorten_keeps_what_fits() -> None:
    assert (shorten("four", 4), shorten("fives", 4)) == ("four", "fiv…")
