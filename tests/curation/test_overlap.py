"""Words, shingles and signatures: datasketch is the oracle for values, Python sets for similarity."""

import unicodedata
from itertools import pairwise

import datasketch
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import overlap
from curation.overlap import MinHasher

VOCABULARY = [
    "a",
    "Bee",
    "sea",
    "naïve",
    "Straße",
    "12345678",
    "123456789abcdefg",
    "über-lang",
    "机器人",
    "can't",
    "が",
]
TEXTS = st.lists(st.sampled_from(VOCABULARY), max_size=40).map(" ".join)


def words(text: str) -> list[str]:
    return bytes(overlap.words(pa.array([text])).data).decode().split()


def shingles(text: str, ngram: int) -> list[bytes]:
    own = [word.encode() for word in words(text)]
    return [b" ".join(own[i : i + ngram]) for i in range(len(own) - ngram + 1)]


@settings(max_examples=60, deadline=None)
@given(st.one_of(TEXTS, st.text(max_size=300)), st.sampled_from([(16, 1, 1), (128, 5, 1), (33, 3, 7)]))
def test_signatures_are_datasketchs_own(text, how):
    num_perm, ngram, seed = how
    signature, num_shingles = MinHasher(num_perm, ngram, seed).sign(pa.array([text]))
    theirs = datasketch.MinHash(num_perm, seed=seed, scheme="affine32", hashfunc=overlap.hash_shingle)
    theirs.update_batch(shingles(text, ngram))
    assert signature[0].tolist() == theirs.hashvalues.tolist()
    assert num_shingles.tolist() == [len(shingles(text, ngram))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat, the CAT's hat-box_2!", "the cat the cat s hat box 2"),
        ("  \t\n ", ""),
        ("... !?", ""),
        ("ÉCOLE e\u0301cole", "e\u0301cole e\u0301cole"),  # composed and decomposed accents
        ("Straße STRASSE ΣΟΦΟΣ", "strasse strasse σοφοσ"),
        ("ﬁne Ｆｕｌｌ ½", "fine full 1 2"),  # ligature, full width, fraction
        ("ex\u00adam\u200bple \ufeffx☺\ufe0f", "example x"),  # soft hyphen, zero width, variation selector
        ("机器人AI很好", "机 器 人 ai 很 好"),
        ("हिन्दी भाषा", "हिन्दी भाषा"),  # vowel signs belong to words
        ("𠀀𠀁 \U0010fffd x", "𠀀 𠀁 x"),  # beyond the basic plane; private use separates
        ("a\x00b", "a b"),
    ],
)
def test_words(text, expected):
    assert " ".join(words(text)) == expected


def defined_words(text: str) -> list[str]:
    """The words of a text by the definition, a character at a time, in Python."""
    spaced = []
    for char in text:
        folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", char).casefold())
        for c in folded:
            if unicodedata.category(c) == "Cf" or 0xFE00 <= ord(c) <= 0xFE0F or 0xE0100 <= ord(c) <= 0xE01EF:
                continue
            alone = "\u3041" <= c <= "\u30ff" or "\u4e00" <= c <= "\u9fff" or "\u0e01" <= c <= "\u0e5b"
            is_word = c.isalnum() or unicodedata.category(c)[0] == "M"
            spaced.append(f" {c} " if alone and is_word else c if is_word else " ")
    return "".join(spaced).split()


# Runs that are longer and shorter than the blocks of 64 bytes and the stretches of 16 KiB that the kernels work on.
RUNS = st.sampled_from(
    ["a", "Word ", "x" * 70, " ", ".  ,", "é", "ΣΑ ", "机器人", "ไทย", "½", "ﷺ", "\u200b", "😀", "\x00", "I'm "]
)
LONG = st.lists(st.tuples(RUNS, st.sampled_from([1, 3, 15, 64, 4000])), max_size=7).map(
    lambda runs: "".join(run * count for run, count in runs)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(LONG, min_size=1, max_size=3), st.sampled_from([1, 2, 5]))
def test_words_and_shingles_of_long_texts_are_the_definition(texts, ngram):
    array = pa.array(texts, pa.large_string())
    folded, sets = overlap.words(array), overlap.shingle_sets(array, ngram)
    signatures, num_shingles = MinHasher(16, ngram).sign(array)
    for doc, text in enumerate(texts):
        expected = defined_words(text)
        data = bytes(folded.data[folded.offsets[doc] : folded.offsets[doc + 1]])
        assert data.decode() == " ".join(expected)
        grams = {" ".join(expected[i : i + ngram]).encode() for i in range(len(expected) - ngram + 1)}
        assert sets.ends[doc] - sets.starts[doc] == len(grams)
        assert num_shingles[doc] == max(0, len(expected) - ngram + 1)
        theirs = datasketch.MinHash(16, seed=1, scheme="affine32", hashfunc=overlap.hash_shingle)
        theirs.update_batch(grams)
        assert signatures[doc].tolist() == theirs.hashvalues.tolist()


def test_signatures_go_into_datasketch():
    shared_words = "alpha beta gamma delta epsilon zeta eta theta " * 3
    texts = [shared_words, shared_words + "iota", "nothing of this is in the other texts at all, not a word"]
    hasher = MinHasher(128, 5)
    rows = hasher.signatures(pa.array(texts))
    assert (rows.shape, rows.dtype) == ((3, 128), np.uint32)
    index = datasketch.MinHashLSH(threshold=0.8, num_perm=128)
    sketches = [
        datasketch.MinHash(128, seed=1, scheme="affine32", hashfunc=overlap.hash_shingle, hashvalues=row)
        for row in rows
    ]
    for name, sketch in zip("abc", sketches, strict=True):
        index.insert(name, sketch)
    assert sorted(index.query(sketches[0])) == ["a", "b"]
    assert sketches[0].jaccard(sketches[1]) == pytest.approx(overlap.jaccard(texts[0], texts[1], 5), abs=0.15)


@settings(max_examples=40, deadline=None)
@given(st.text(st.sampled_from("aZé ĀếǚΆйガ가각힣ﾊ中,.\u2014’“ \n"), max_size=60))
def test_words_do_not_see_composition_case_or_a_second_pass(text):
    once = words(text)
    assert words(unicodedata.normalize("NFD", text)) == once
    assert words(text.upper()) == once
    assert words(" ".join(once)) == once


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.none(), TEXTS), max_size=12), st.integers(0, 5), st.sampled_from([1, 2, 5]))
def test_any_arrow_layout_gives_the_same_rows(texts, cut, ngram):
    hasher = MinHasher(32, ngram)
    expected, counts = [], []
    for text in texts:
        signature, count = hasher.sign(pa.array([text or ""]))
        expected.append(signature[0].tolist())
        counts.append(count[0])
    whole = pa.array(["gone", *texts, "gone"], pa.large_string())
    layouts = [
        pa.array(texts, pa.string()),
        whole.slice(1, len(texts)),
        whole.cast(pa.string()).slice(1, len(texts)),
        pa.chunked_array([whole.slice(1, min(cut, len(texts))), whole.slice(1 + cut, max(len(texts) - cut, 0))]),
        pa.array(texts, pa.string_view()),
        pa.chunked_array([pa.array(texts, pa.string()).slice(len(texts)), pa.array(texts, pa.string())]),
    ]
    for layout in layouts:
        signatures, num_shingles = hasher.sign(layout)
        assert signatures.shape == (len(texts), 32)
        assert signatures.tolist() == expected
        assert num_shingles.tolist() == counts
        assert overlap.text_hash(layout) == [overlap.text_hash(pa.array([t or ""]))[0] for t in texts]
        folded = overlap.words(layout)
        bounds = folded.offsets.tolist()
        assert [bytes(folded.data[a:b]).decode().split() for a, b in pairwise(bounds)] == [
            words(t or "") for t in texts
        ]


def test_bytes_behind_a_null_are_not_read():
    buffers = [pa.py_buffer(b"\x01"), pa.py_buffer(np.array([0, 3, 9], np.int32)), pa.py_buffer(b"a bhidden")]
    array = pa.Array.from_buffers(pa.string(), 2, buffers)
    assert array.to_pylist() == ["a b", None]
    assert MinHasher(4, 1).sign(array)[1].tolist() == [2, 0]


def test_bytes_that_are_not_utf8_end_in_the_array():
    raw = b"ok \xf0\x9f\xff \xc3"
    buffers = [None, pa.py_buffer(np.array([0, len(raw)], np.int32)), pa.py_buffer(raw)]
    assert words_of(pa.Array.from_buffers(pa.string(), 1, buffers)).split() == [b"ok"]


def words_of(array: pa.Array) -> bytes:
    return bytes(overlap.words(array).data)


@pytest.mark.parametrize("array", [pa.array([1, 2]), pa.array([b"x"]), pa.chunked_array([pa.array([["x"]])])])
def test_other_types_are_refused_by_name(array):
    with pytest.raises(TypeError, match=r"column of strings, not (int64|binary|list)"):
        MinHasher(4, 1).sign(array)


def test_no_rows():
    for array in (pa.array([], pa.string()), pa.chunked_array([], pa.large_string())):
        signatures, num_shingles = MinHasher(4, 1).sign(array)
        assert signatures.shape == (0, 4)
        assert num_shingles.shape == (0,)
        assert overlap.text_hash(array) == []


@pytest.mark.parametrize(("num_perm", "ngram"), [(0, 5), (8, 0)])
def test_sizes_are_checked(num_perm, ngram):
    with pytest.raises(ValueError, match="at least 1"):
        MinHasher(num_perm, ngram)


def test_a_signature_covers_the_first_words_and_a_set_all():
    numbers = [str(i) for i in range(overlap.MAX_WORDS + 10)]
    hasher = MinHasher(8, 5)
    long, cut = hasher.sign(pa.array([" ".join(numbers), " ".join(numbers[: overlap.MAX_WORDS])]))[0]
    assert long.tolist() == cut.tolist()
    assert hasher.sign(pa.array([" ".join(numbers)]))[1].tolist() == [overlap.MAX_WORDS - 4]
    sets = overlap.shingle_sets(pa.array([" ".join(numbers)]), 5)
    assert (sets.ends - sets.starts).tolist() == [overlap.MAX_WORDS + 6]  # and no two shingles share a hash


@settings(max_examples=80, deadline=None)
@given(*[st.lists(st.sampled_from("abc"), max_size=30).map(" ".join)] * 2, st.integers(1, 3))
def test_jaccard_is_that_of_the_sets(a, b, ngram):
    set_a, set_b = set(shingles(a, ngram)), set(shingles(b, ngram))
    expected = len(set_a & set_b) / len(set_a | set_b) if set_a and set_b else 0.0
    assert overlap.jaccard(a, b, ngram) == expected


def test_text_hash_sees_past_case_and_space_only():
    def same(a: str, b: str) -> bool:
        first, second = overlap.text_hash(pa.array([a, b]))
        return first == second

    assert same("The  cat\n sat.", "the cat SAT. ")
    assert same("caf\u00e9", "cafe\u0301")
    assert same("exam\u00adple", "example")
    assert not same("The cat sat.", "The cat sat!")
    assert not same("?!", "...")
    assert not same("3 < 5", "3 > 5")
    assert not same("ok 😀", "ok 😡")
    assert not same("ab", "a b")
    assert not same("", ".")
    assert not same("\ue000", "\ue001")  # private use: unknown, so kept
