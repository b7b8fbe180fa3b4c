"""Normalisation keeps byte positions, whatever the text."""

import itertools

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.detect.normalise import normalise, normalise_text, text_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't STOP, 3.5!", "don t stop  3 5 "),
        ("“GPT–4”", "   gpt   4   "),  # three bytes each
        ("«tea»\u00a0x", "  tea    x"),
        ("第一、AI。", "第一   ai   "),
        ("Ärger ÉTÉ", "Ärger ÉtÉ"),  # non-ASCII case is kept
        ("A.I. and A.I", "ai   and ai "),
        ("a.is A.I.M. b.A.I.", "a is ai  m  b ai  "),
        ("tab\tnul\0end", "tab nul end"),
        ("", ""),
    ],
)
def test_examples(text: str, expected: str) -> None:
    assert normalise_text(text).decode() == expected


@given(st.lists(st.text(), max_size=8))
@settings(max_examples=150, deadline=None)
def test_length_and_validity_are_kept_and_each_document_stands_alone(texts: list[str]) -> None:
    data, offsets = normalise(pa.array(texts, pa.large_string()))
    assert offsets.tolist() == text_bytes(pa.array(texts, pa.string())).offsets.tolist()
    pieces = [data[a:b].tobytes() for a, b in itertools.pairwise(offsets)]
    assert pieces == [normalise_text(t) for t in texts]
    for piece in pieces:
        assert piece.decode() == piece.decode().replace("\n", "")


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="must be an Arrow string array, not int64"):
        normalise(pa.array([1]))
