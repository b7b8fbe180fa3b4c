"""The blocklist: rules, boundaries, offsets, and what is wrong with a user's files."""

import re
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.detect.blocklist import Blocklist
from curation.errors import UserError


@pytest.fixture(scope="module")
def blocklist() -> Blocklist:
    return Blocklist.load("default")


def hits(blocklist: Blocklist, text: str) -> list[tuple[str, str, int]]:
    return [tuple(hit.values()) for hit in blocklist.scan(pa.array([text]))[1].to_pylist()[0]]


def flagged(blocklist: Blocklist, text: str) -> bool:
    return bool(blocklist.scan(pa.array([text]))[0][0])


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("Skynet woke up.", True),  # scifi_agents
        ("A note from OpenAI", True),  # ai_labs
        ("the Partnership on AI", True),  # safety_organisations
        ("A robot.", True),  # general_ai
        ("He said it was a maid's brain", False),  # `ai` inside words
        ("the machine stopped", False),  # entity alone
        ("they murdered the king", False),  # negative alone
        ("the machine murdered the king", True),  # one of each
        ("murdered. " + "and so on " * 500 + "machine", True),  # anywhere in the document
        ("", False),
    ],
)
def test_rules(blocklist: Blocklist, text: str, flag: bool) -> None:
    assert flagged(blocklist, text) is flag


def test_one_side_of_a_co_occurrence_is_recorded_though_not_flagged(blocklist: Blocklist) -> None:
    assert hits(blocklist, "the machine stopped") == [("machine", "entities", 4)]


def test_offsets_are_utf8_bytes_of_the_text_as_given(blocklist: Blocklist) -> None:
    text = "Ünïcödé ☃ “Robots” and A.I. and SELF—AWARE"
    found = {term: offset for term, _, offset in hits(blocklist, text)}
    raw = text.encode()
    assert {term: raw[offset:].split()[0] for term, offset in found.items()} == {
        "robots": "Robots”".encode(),
        "AI": b"A.I.",
        "self-aware": "SELF—AWARE".encode(),
    }


def test_adjacent_terms_share_their_boundary(blocklist: Blocklist) -> None:
    assert [h[0] for h in hits(blocklist, "robot robot android")] == ["robot", "robot", "android"]


def test_a_term_may_be_broken_over_lines(blocklist: Blocklist) -> None:
    text = "  > artificial \r\n   intelligence,\n\n\trobot"
    assert [(h[0], text[h[2] :].split()[0]) for h in hits(blocklist, text)] == [
        ("artificial intelligence", "artificial"),
        ("artificial", "artificial"),
        ("intelligence", "intelligence,"),
        ("robot", "robot"),
    ]


def test_no_match_across_documents(blocklist: Blocklist) -> None:
    flags, _ = blocklist.scan(pa.array(["neural", "network", "ro", "bot"]))
    assert flags.tolist() == [False] * 4
    assert flagged(blocklist, "neural network")


def test_slices_chunks_and_nulls(blocklist: Blocklist) -> None:
    texts = pa.array(["skip", "a robot", None, "tea"], pa.large_string())
    for array in (texts, pa.chunked_array([texts.slice(0, 2), texts.slice(2)])):
        flags, found = blocklist.scan(array.slice(1))
        assert flags.tolist() == [True, False, False]
        assert [len(h) for h in found.to_pylist()] == [1, 0, 0]


@given(
    st.lists(
        st.sampled_from(["robot", "Robot", "robots", "rob", "ai", "é", "-", " ", "\n", "“", "x1", "的"]), max_size=30
    )
)
@settings(max_examples=150, deadline=None)
def test_same_hits_as_a_regular_expression(blocklist: Blocklist, pieces: list[str]) -> None:
    text = "".join(pieces)
    found = [
        (m.group().lower(), len(text[: m.start()].encode())) for m in re.finditer(r"(?<!\w)robots?(?!\w)", text, re.I)
    ]
    assert [(term, offset) for term, _, offset in hits(blocklist, text) if term.startswith("robot")] == found


def write(folder: Path, index: str, **files: str) -> str:
    (folder / "blocklist.yaml").write_text(index, encoding="utf-8")
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return str(folder)


ONE = "version: 3\ncategories:\n  mine: {rule: instant, file: mine.txt}\n"


def test_a_list_of_ones_own(tmp_path: Path) -> None:
    own = Blocklist.load(write(tmp_path, ONE, mine="# about\nZeppelin  # airships\n\nhot-air balloon\n"))
    assert own.version == 3
    assert hits(own, "HOT AIR BALLOON, zeppelin; robot") == [("hot-air balloon", "mine", 0), ("Zeppelin", "mine", 17)]


NESTED = ["ai", "ai safety", "safety", "safety of ai", "the machine", "the machine the"]


@given(st.lists(st.sampled_from(["ai", "safety", "of", "the", "machine", "them"]), max_size=40), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_terms_within_and_across_terms_are_all_found(tmp_path_factory, words: list[str], spaces: int) -> None:
    own = Blocklist.load(write(tmp_path_factory.mktemp("own"), ONE, mine="\n".join(NESTED)))
    gap = " " * spaces
    found = [(term, offset) for term, _, offset in hits(own, gap.join(words))]
    starts = [sum(len(word) + spaces for word in words[:k]) for k in range(len(words))]
    assert found == [
        (term, start)
        for k, start in enumerate(starts)
        for term in NESTED
        if words[k : k + len(term.split())] == term.split()
    ]


def test_fingerprint_follows_terms_and_rules(tmp_path: Path) -> None:
    def of(name: str, index: str, terms: str) -> str:
        (tmp_path / name).mkdir()
        return Blocklist.load(write(tmp_path / name, index, mine=terms)).fingerprint

    same, again = of("a", ONE, "zeppelin\n"), of("b", ONE, "# a comment\nzeppelin\n")
    assert same == again
    assert len({same, of("c", ONE, "zeppelins\n"), of("d", ONE.replace("instant", "entity"), "zeppelin\n")}) == 3


@pytest.mark.parametrize(
    ("index", "terms", "message"),
    [
        ("version: [", "a", "is not YAML"),
        ("- a\n", "a", "must be a mapping"),
        ("version: one\ncategories: {}\n", "a", "needs `version`"),
        (ONE.replace("instant", "always"), "a", "category mine needs `rule` (instant, entity, negative)"),
        (ONE.replace("mine.txt", "absent.txt"), "a", "there is no blocklist file"),
        (ONE, "# nothing\n", "has no terms"),
        (ONE, "...\n", "has no letter or digit"),
        (ONE, "self-aware\nself aware\n", "is the same term as"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, index: str, terms: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Blocklist.load(write(tmp_path, index, mine=terms))


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no blocklist file"):
        Blocklist.load(str(tmp_path / "nowhere"))
