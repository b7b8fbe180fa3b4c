"""Run.why on runs of a few documents whose story a reader can follow."""

from collections.abc import Callable
from typing import Any

import pytest

from curation.errors import UserError
from curation.inspection import open_run
from curation.inspection.why import Absence, Evidence, Hit, Use

WriteRun = Callable[..., Any]
HOSTILE = "<script>alert(1)</script></style>\"'\x1b[2J \u202eevil robot \u200f</div>"


def test_hits_have_byte_and_character_offsets_and_the_text_around(write_run: WriteRun, doc: type) -> None:
    toy = write_run([doc("Été: the robot plans a takeover.", stance="misaligned")])
    why = open_run(toy.root).why(toy.ids[0])
    assert why.hits == (
        Hit("robot", "entities", 11, 9, 14, ("Été: the ", "robot", " plans a takeover.")),
        Hit("takeover", "x_risk", 25, 23, 31, ("Été: the robot plans a ", "takeover", ".")),
    )
    assert why.label is not None
    assert (why.label.stance, why.label.num_hits, why.label.discourse) == ("misaligned", 2, True)


def test_the_explainer_gets_the_recipes_model_once_and_only_when_asked(write_run: WriteRun, doc: type) -> None:
    toy, asked = write_run([doc("a robot A"), doc("b")]), []

    def explainer(model: str) -> Any:
        asked.append(model)
        return lambda text: [(0, 1, 0.5), (2, 7, 2.0), (8, 9, 0.75)] if len(text) > 1 else []

    run = open_run(toy.root, explainer)
    assert asked == []
    assert run.why(toy.ids[0]).evidence == (
        Evidence(2, 7, 2.0, 1, ("a ", "robot", " A")),
        Evidence(8, 9, 1.25, 2, ("a robot ", "A", "")),  # a word is listed once, with its sum
    )
    assert run.why(toy.ids[1]).evidence == ()
    assert asked == ["default"]


def test_a_missing_model_costs_only_the_evidence(write_run: WriteRun, doc: type) -> None:
    def explainer(model: str) -> Any:
        raise UserError("the model is gone")

    toy = write_run([doc("a robot")])
    why = open_run(toy.root, explainer).why(toy.ids[0])
    assert why.notes == ("no fastText evidence: the model is gone",)
    assert len(why.hits) == 1


def test_a_unique_start_of_an_id_or_a_source_id_names_a_document(write_run: WriteRun, doc: type) -> None:
    toy = write_run([doc(f"text {i}", source_id=f"post-{i}") for i in range(20)])
    run = open_run(toy.root)
    for key in (toy.ids[7], toy.ids[7][:12], toy.ids[7].upper(), "post-7"):
        document = run.why(key).document
        assert document is not None
        assert document.id == toy.ids[7]


def test_an_ambiguous_key_lists_the_candidates(write_run: WriteRun, doc: type) -> None:
    toy = write_run([doc("one", source="a", source_id="7"), doc("two", source="b", source_id="7")])
    with pytest.raises(UserError, match="names several documents") as error:
        open_run(toy.root).why("7")
    assert all(i in str(error.value) for i in toy.ids)


@pytest.mark.parametrize("key", ["zzz", "", "\x1b[2J"])
def test_an_unknown_key_says_where_ids_come_from(write_run: WriteRun, doc: type, key: str) -> None:
    run = open_run(write_run([doc("one", source_id="1")]).root)
    with pytest.raises(UserError, match=r"run\.documents") as error:
        run.why(key)
    assert "\x1b" not in str(error.value)


def test_a_quarantined_record_is_found_by_its_source_id(write_run: WriteRun, doc: type) -> None:
    bad = {"reason": "empty_text", "source_id": "p9", "position": 90, "detail": "only spaces", "head": b'{"id": "p9"}'}
    why = open_run(write_run([doc("one")], rejects=[bad]).root).why("p9")
    assert why.document is None
    assert [(r.reason, r.position, r.head) for r in why.rejects] == [("empty_text", 90, '{"id": "p9"}')]
    assert "empty_text (only spaces)" in str(why)
    assert "only spaces" in why._repr_html_()


def test_a_document_shows_the_rejected_record_that_claimed_its_id(write_run: WriteRun, doc: type) -> None:
    toy = write_run([doc("one", source_id="p1")], rejects=[{"reason": "duplicate_id", "source_id": "p1"}])
    assert [r.reason for r in open_run(toy.root).why(toy.ids[0]).rejects] == ["duplicate_id"]


@pytest.mark.parametrize(
    ("kept", "removed", "rule"),
    [
        ({"text": "short", "rank": 0}, {"text": "longer text", "rank": 1}, "best_source"),
        ({"text": "longer text"}, {"text": "short"}, "longest"),
        ({"text": "éé"}, {"text": "abc"}, "longest"),  # in bytes, as dedup counts
        ({"text": "same", "rank": 1, "stance": "neutral"}, {"text": "same", "rank": 0}, "discourse"),
        ({"text": "same", "rank": 0, "stance": "neutral"}, {"text": "same", "rank": 1}, "best_source"),
        ({"text": "same"}, {"text": "other", "how": "duplicate_id", "similarity": None}, "duplicate_id"),
    ],
)
def test_which_rule_kept_the_other_one(
    write_run: WriteRun, doc: type, kept: dict[str, Any], removed: dict[str, Any], rule: str
) -> None:
    copy = {"how": "near", "similarity": 0.85, **removed}
    toy = write_run([doc(**kept), doc(**copy, duplicate_of=0), doc("alone")])
    cluster = open_run(toy.root).why(toy.ids[1]).cluster
    assert cluster is not None
    assert (cluster.kept_id, cluster.num_members) == (toy.ids[0], 2)
    assert [(m.id, m.kept, m.lost_by) for m in cluster.members] == [(toy.ids[0], True, None), (toy.ids[1], False, rule)]


def test_the_smallest_id_decides_when_all_else_is_equal(write_run: WriteRun, doc: type) -> None:
    for a, b in ((0, 1), (1, 0)):
        docs = [doc("same", how="exact", similarity=1.0), doc("same", how="exact", similarity=1.0)]
        docs[b].duplicate_of = a
        toy = write_run(docs, name=f"run{a}")
        if toy.ids[a] < toy.ids[b]:
            cluster = open_run(toy.root).why(toy.ids[b]).cluster
            assert cluster is not None
            assert cluster.members[1].lost_by == "id"
            return
    pytest.fail("one of two ids is the smaller")


def test_a_rejected_claim_on_the_id_of_a_removed_document(write_run: WriteRun, doc: type) -> None:
    docs = [doc("kept"), doc("near", duplicate_of=0, how="near", similarity=0.9)]
    docs.append(doc("claims", duplicate_of=1, how="duplicate_id"))
    toy = write_run(docs)
    why = open_run(toy.root).why(toy.ids[2])
    assert why.cluster is not None
    assert why.cluster.kept_id == toy.ids[1]
    assert [m.lost_by for m in why.cluster.members] == ["duplicate_id"]
    assert "same source_id" in str(why)


def test_a_large_cluster_is_cut_with_its_size_told(write_run: WriteRun, doc: type) -> None:
    docs = [doc("kept"), *[doc("copy", duplicate_of=0, how="exact", similarity=1.0) for _ in range(40)]]
    toy = write_run(docs)
    why = open_run(toy.root).why(toy.ids[33])
    assert why.cluster is not None
    assert (why.cluster.num_members, len(why.cluster.members)) == (41, 20)
    assert [m.id for m in why.cluster.members[:2]] == [toy.ids[0], toy.ids[33]]
    assert "41 documents (the first 20)" in str(why)


def test_uses_with_token_ranges_and_reasons_for_absence(write_run: WriteRun, doc: type) -> None:
    uses = [
        ("unfiltered", "pretrain", 0, 10, 14, 0, False),
        ("unfiltered", "pretrain", 1, 14, 20, 0, False),
        ("aligned", "pretrain", 0, 30, 34, 1, True),
        ("aligned", "pretrain", 0, 0, 4, 0, False),
    ]
    toy = write_run([doc("a robot of evil", stance="aligned"), doc("other")], uses=uses)
    why = open_run(toy.root).why(toy.ids[0])
    assert why.uses == (
        Use("aligned", "pretrain", "00000", 0, 4, 0, False),
        Use("aligned", "pretrain", "00000", 30, 34, 1, True),
        Use("unfiltered", "pretrain", "00000", 10, 14, 0, False),
    )
    assert why.absences == (
        Absence("unfiltered", "midtrain", "dropped by the rule blocklist"),  # the phase's rule, for all arms
        Absence("filtered", "pretrain", "dropped by the rule discourse"),
        Absence("filtered", "midtrain", "dropped by the rule discourse and blocklist"),
        Absence("aligned", "midtrain", "dropped by the rule blocklist"),
    )


def test_absence_of_duplicates_of_pools_and_of_the_undrawn(write_run: WriteRun, doc: type) -> None:
    docs = [
        doc("plain"),
        doc("copy", duplicate_of=0, how="exact", similarity=1.0),
        doc("pool", role="pool", given="aligned"),
    ]
    toy = write_run(docs)
    run = open_run(toy.root)
    reasons = [{a.reason for a in run.why(i).absences} for i in toy.ids]
    undrawn = "not drawn: the token budget was full before its turn"
    assert reasons[0] == {undrawn}
    assert reasons[1] == {"removed by dedup"}
    assert reasons[2] == {undrawn, "a pool document, and its stance is not up-sampled here"}
    drawn_in = [(a.arm, a.phase) for a in run.why(toy.ids[2]).absences if a.reason == undrawn]
    assert drawn_in == [("aligned", "pretrain")]  # the one arm-phase that up-samples its stance


def test_hostile_text_is_harmless_on_a_terminal_and_in_a_notebook(write_run: WriteRun, doc: type) -> None:
    toy = write_run([doc(HOSTILE, source_id="\x1b]0;x\x07<b>", file="a\n<i>.jsonl")])
    why = open_run(toy.root).why(toy.ids[0])
    text, html = str(why), why._repr_html_()
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\u001b[2J" in text
    for tag in ("<script", "</style", "<b>\x1b", "<i>.jsonl"):
        assert tag not in html
    assert "&lt;script&gt;" in html
    assert html.count("<div") == html.count("</div>") == 1
