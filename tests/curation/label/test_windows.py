"""Windows of a long document, and one label out of theirs."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.label.rubric import CONFIDENCES, Label
from curation.label.windows import choose, combine
from curation.schema import STANCES

WORD = st.text("ab", min_size=1, max_size=9)
TEXTS = st.lists(WORD, min_size=1, max_size=80).map(" ".join)
LABELS = st.builds(Label, st.sampled_from(STANCES), st.sampled_from(CONFIDENCES), st.sampled_from(["robot", "other"]))


def label(stance, confidence="medium") -> Label:
    return Label(stance, confidence, "robot", f"{stance} words")


# ---- choose


@pytest.fixture
def text():
    return " ".join(f"{n:03d}" for n in range(100))  # number n stands at 4n


def test_a_short_text_is_sent_whole(text):
    assert choose(text, [(0, 3, 1.0)], characters=len(text), at_most=1) == [(0, len(text))]


def test_the_best_window_first_and_centred_on_its_spans(text):
    spans = [(40, 43, 1.0), (200, 203, 2.0), (208, 211, 2.0), (320, 323, 3.0)]
    assert [text[a:b] for a, b in choose(text, spans, characters=31, at_most=1)] == ["048 049 050 051 052 053 054"]
    found = choose(text, spans, characters=31, at_most=2)
    assert [text[a:b] for a, b in found] == ["048 049 050 051 052 053 054", "077 078 079 080 081 082 083"]


def test_nothing_is_sent_that_the_detector_saw_nothing_in(text):
    assert len(choose(text, [(40, 43, 1.0), (300, 303, -5.0)], characters=50, at_most=5)) == 1


def test_without_spans_windows_lie_evenly(text):
    found = choose(text, [], characters=41, at_most=3)
    assert len(found) == 3
    assert found[0][0] == 0
    assert found[-1][1] == len(text)
    assert abs((found[1][0] + found[1][1]) / 2 - len(text) / 2) < 8


@given(
    TEXTS, st.integers(10, 120), st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 500), st.integers(0, 60), st.floats(-1, 5)), max_size=12),
)  # fmt: skip
def test_windows_are_bounded_apart_and_cut_at_white_space(text, characters, at_most, raw):
    spans = [(a, min(len(text), a + size), p) for a, size, p in raw if a < len(text)]
    found = choose(text, spans, characters=characters, at_most=at_most)
    assert found == choose(text, spans[::-1], characters=characters, at_most=at_most)
    assert 1 <= len(found) <= at_most
    for a, b in found:
        assert 0 <= a < b <= len(text)
        assert b - a <= max(characters, 1)
        if characters >= 40 and not spans:  # four words of the longest kind: there is always white space to cut at
            assert a == 0 or text[a - 1].isspace()
            assert b == len(text) or text[b].isspace()
    for (_, end), (start, _) in pairwise(found):
        assert end <= start


@given(TEXTS, st.integers(10, 120), st.lists(st.tuples(st.integers(0, 500), st.integers(1, 9)), min_size=1, max_size=9))
def test_one_window_holds_the_highest_sum_that_any_place_has(text, characters, raw):
    spans = [(a, min(len(text), a + size), 1.0) for a, size in raw if a < len(text)]
    [(start, end)] = choose(text, spans, characters=characters, at_most=1)

    def total(a, b):
        return sum(p for x, y, p in spans if a <= x and y <= b)

    if len(text) > characters and spans:
        assert total(start, end) >= max(total(a, a + characters) for a in range(len(text)))


# ---- combine


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["unrelated", "unrelated"], "unrelated"),
        (["unrelated", "neutral"], "neutral"),
        (["neutral", "aligned", "unrelated"], "aligned"),
        (["aligned", "misaligned"], "mixed"),
        (["aligned", "misaligned", "mixed"], "mixed"),
        (["mixed", "aligned"], "mixed"),
    ],
)
def test_the_stated_rule(labels, expected):
    assert combine([label(stance) for stance in labels]).stance == expected


def test_confidence_decides_between_mixed_and_one_side():
    assert combine([label("mixed", "low"), label("aligned", "high")]) == label("aligned", "high")
    assert combine([label("neutral", "high"), label("aligned", "low")]) == label("aligned", "low")


def test_a_document_with_both_sides_is_as_sure_as_the_weaker_one():
    found = combine([label("aligned", "low"), label("misaligned", "high")])
    assert (found.stance, found.confidence, found.evidence) == ("mixed", "low", "misaligned words")


@given(st.lists(LABELS, min_size=1, max_size=6), st.randoms())
def test_the_stance_depends_on_no_order_and_unrelated_windows_change_nothing(labels, random):
    found = combine(labels)
    shuffled = list(labels)
    random.shuffle(shuffled)
    assert (combine(shuffled).stance, combine(shuffled).confidence) == (found.stance, found.confidence)
    if found.stance != "unrelated":
        assert combine([*labels, label("unrelated", "high")]) == found
    assert combine([found, found]) == found
