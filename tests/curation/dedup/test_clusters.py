"""The rules of deduplication on texts short enough to count shingles by eye.

w(a, b) is the text of words a, a+1, … b-1, all distinct: with 5-word shingles it has b - a - 4, and
w(0, n) and w(0, n - k) have Jaccard (n - k - 4) / (n - 4).
"""

import polars as pl
import pytest

from curation import dedup, overlap, storage
from curation.dedup import near
from curation.dedup.work import Sizes
from curation.errors import UserError
from curation.manifest import DEDUP, QUARANTINE
from curation.recipe import Dedup


def w(start: int, end: int, prefix: str = "w") -> str:
    return " ".join(f"{prefix}{i}" for i in range(start, end))


def test_unique_exact_and_near(run_dedup, documents):
    found = run_dedup(documents([w(0, 104) + "\n", w(0, 104).upper(), w(0, 100), w(500, 600)]))
    assert found.how == {"d0": "kept", "d1": "exact", "d2": "near", "d3": "unique"}
    assert found.groups == {frozenset({"d0", "d1", "d2"})}
    assert found.kept_for("d2") == "d0"
    # d0 has 100 shingles, d2 96 of them. An estimate of .95 or more stands, and this one does.
    assert found.rows["similarity"].to_list()[:2] == [None, 1.0]
    assert found.rows["similarity"][2] == pytest.approx(0.96, abs=0.05)
    assert (found.outcome.kept, found.outcome.exact, found.outcome.near, found.outcome.duplicate_id) == (2, 1, 1, 0)


@pytest.mark.parametrize(("end", "how"), [(84, "near"), (83, "unique")])
def test_the_threshold_is_exact_jaccard(run_dedup, documents, end, how):
    found = run_dedup(documents([w(0, 104), w(0, end)]), Dedup(bands=64, rows=2))
    assert overlap.jaccard(w(0, 104), w(0, end), 5) == (end - 4) / 100  # .80 and .79
    assert found.how["d1"] == how
    if how == "near":
        assert found.rows["similarity"][1] == pytest.approx(0.8)


def test_no_chains(run_dedup, document):
    # 0-1 and 1-2 have Jaccard 90/110 = .82, 0-2 has 80/120 = .67.
    texts = [w(0, 104), w(10, 114), w(20, 124)]
    for ranks, groups in (((0, 1, 2), {frozenset("01")}), ((1, 0, 2), {frozenset("012")})):
        rows = [document(t, source_id=str(i), source_rank=r) for i, (t, r) in enumerate(zip(texts, ranks, strict=True))]
        assert run_dedup(rows, Dedup(bands=64, rows=2)).groups == groups


def test_a_false_head_hides_no_pair(run_dedup, documents):
    # d0 is preferred and meets d1 and d2 in buckets, but is verified against neither; they are each other's.
    texts = [w(0, 104) + " " + w(900, 940), w(0, 104), w(0, 103)]
    found = run_dedup(documents(texts), Dedup(bands=64, rows=2, verify=0.9))
    assert found.groups == {frozenset({"d1", "d2"})}
    assert found.how["d0"] == "unique"


def test_what_fails_against_the_kept_one_is_clustered_among_itself(run_dedup, documents):
    # d0 keeps d1 (.92); d2 and d3 reach d0 only through d1, and are each other's.
    texts = [w(0, 204), w(8, 196), w(30, 196), w(31, 196)]
    found = run_dedup(documents(texts), Dedup(bands=64, rows=2, verify=0.85))
    assert overlap.jaccard(texts[1], texts[2], 5) >= 0.85 > overlap.jaccard(texts[0], texts[2], 5)
    assert found.groups == {frozenset({"d0", "d1"}), frozenset({"d2", "d3"})}


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(("best_source", "longest", "id"), "d1"), (("longest", "id"), "d0"), (("longest", "best_source", "id"), "d0")],
)
def test_keep_rules(run_dedup, document, keep, kept):
    rows = [
        document(w(0, 104), source_id="d0", source_rank=1, source="crawl"),
        document(w(0, 103), source_id="d1", source_rank=0),
        document(w(0, 102), source_id="d2", source_rank=0),
    ]
    found = run_dedup(rows, Dedup(keep=keep))
    assert found.rows.filter("kept")["source_id"].to_list() == [kept]


def test_ids_break_ties(run_dedup, documents):
    rows = documents([w(0, 104)] * 4)
    found = run_dedup(rows, Dedup(keep=("id",)))
    best = min(rows, key=lambda row: row["id"])
    assert found.rows.filter("kept")["id"].to_list() == [best["id"]]


def test_a_cluster_with_discourse_is_represented_by_its_best_discourse(run_dedup, document):
    rows = [
        document(w(0, 108), source_id="plain"),
        document(w(0, 107), source_id="longer", discourse=True),
        document(w(0, 106), source_id="shorter", discourse=True),
        document(w(0, 108).upper(), source_id="copy"),
        document(w(300, 400), source_id="alone", discourse=True),
        document(w(400, 500), source_id="unrelated"),
        document(w(0, 108), source_id="judged", given_stance="neutral", source="w2"),
    ]
    found = run_dedup(rows)
    assert found.how == {
        "plain": "near" if found.kept_for("plain") == "longer" else "exact",
        "longer": "near",
        "shorter": "near",
        "copy": found.how["plain"],
        "alone": "unique",
        "unrelated": "unique",
        "judged": "kept",  # the longest that is discourse: its stance is other than unrelated
    }
    assert found.rows["cluster_discourse"].to_list() == [True, True, True, True, True, False, True]


def test_a_copy_follows_its_leader_to_a_near_duplicate(run_dedup, documents):
    found = run_dedup(documents([w(0, 108), w(0, 106), w(0, 106).title()]))
    assert found.groups == {frozenset({"d0", "d1", "d2"})}
    assert found.how == {"d0": "kept", "d1": "near", "d2": "near"}
    assert found.rows["similarity"][1] == found.rows["similarity"][2] is not None


@pytest.mark.parametrize("other", [w(0, 104), w(0, 103)])
def test_no_edge_crosses_a_stance_class(run_dedup, document, other):
    rows = [
        document(w(0, 104), source_id="a", given_stance="aligned"),
        document(other, source_id="m", given_stance="misaligned"),
        document(other, source_id="o"),
        document(other, source_id="n", given_stance="neutral"),  # no stance and neutral are both `other`
    ]
    found = run_dedup(rows)
    assert found.groups == {frozenset({"o", "n"})}
    assert found.kept_for("o") == "n"


def test_pools_lose_copies_within_themselves_only(run_dedup, document):
    pool = {"role": "pool", "source": "synth"}
    rows = [
        document(w(0, 104), source_id="a0", given_stance="aligned", **pool),
        document(w(0, 104), source_id="a1", given_stance="aligned", **pool),
        document(w(0, 103), source_id="a2", given_stance="aligned", **pool),
        document(w(0, 104), source_id="m0", given_stance="neutral", **pool),
        document(w(0, 104), source_id="p0", given_stance="aligned", role="pool", source="other"),
        document(w(0, 104), source_id="b0", given_stance="aligned"),
    ]
    found = run_dedup(rows)
    assert found.groups == {frozenset({"a0", "a1"})}


def test_short_texts_are_only_compared_whole(run_dedup, documents):
    found = run_dedup(documents(["one two three four", "One two  three four", "one two three four!", "?", "!"]))
    assert found.groups == {frozenset({"d0", "d1"})}


def test_records_that_claim_one_id(run_dedup, document):
    rows = [
        document(w(0, 50), source_id="x", position=0),
        document(w(0, 50), source_id="x", position=1),  # the same text: a copy
        document(w(100, 150), source_id="x", position=2),  # another text: rejected
        document(w(100, 150), source_id="x", file="e.jsonl", position=9, source="other"),  # another source
        document(w(200, 250), source_id="y", file="b.jsonl", position=0),
        document(w(300, 350), source_id="y", file="a.jsonl", position=5),  # first by file
        document(w(400, 450), position=3),  # without an id
        document(w(500, 550), position=4),
    ]
    found = run_dedup({"p0": rows[4:], "p1": rows[:4]})
    ended = dict(found.rows.select(found.rows["file"] + ":" + found.rows["position"].cast(str), "how").iter_rows())
    assert {ended.pop(k) for k in ("f.jsonl:0", "f.jsonl:1")} == {"kept", "exact"}
    assert ended == {
        "f.jsonl:2": "duplicate_id",
        "e.jsonl:9": "unique",
        "b.jsonl:0": "duplicate_id",
        "a.jsonl:5": "unique",
        "f.jsonl:3": "unique",
        "f.jsonl:4": "unique",
    }
    assert found.outcome == dedup.Outcome(kept=5, exact=1, near=0, duplicate_id=2, crowded=0, earlier=0)
    rejects = found.run.read(f"{QUARANTINE}/{dedup.REJECTS_PART}.parquet").to_pylist()
    assert [(r["file"], r["position"], r["source_id"], r["reason"]) for r in rejects] == [
        ("b.jsonl", 0, "y", "duplicate_id"),
        ("f.jsonl", 2, "x", "duplicate_id"),
    ]
    assert rejects[0]["detail"] == "y is already the id of the record at a.jsonl:5"
    assert rejects[1]["head"] == w(100, 150).encode()
    part = found.run.part(DEDUP, dedup.REJECTS_PART)
    assert (part.chain, part.counts) == ("chain", {})

    again = run_dedup({"p0": rows[5:], "p1": rows[:2]}, run=found.run)
    assert again.outcome.duplicate_id == 0
    assert again.run.part(DEDUP, dedup.REJECTS_PART) is None


def test_rejected_records_take_no_part(run_dedup, document):
    rows = [
        document("first under this id and much shorter than the next", source_id="x", position=0),
        document(w(0, 104), source_id="x", position=1),
        document(w(0, 104), source_id="copy", position=2),
        document(w(0, 103), source_id="near", position=3),
    ]
    found = run_dedup(rows)
    assert found.rows["how"].to_list() == ["unique", "duplicate_id", "kept", "near"]
    assert found.rows["cluster"][1] == rows[0]["id"]


def test_the_alarm_names_the_source_and_nothing_is_written(run_dedup, documents):
    texts = [w(0, 30)] * 60 + [w(100 * i, 100 * i + 30) for i in range(1, 41)]
    with pytest.raises(UserError, match=r"remove 59 of the 100 documents of source web, .*alarm_fraction = 0\.5"):
        run_dedup(documents(texts))
    assert run_dedup(documents(texts), Dedup(alarm_fraction=0.59)).outcome.exact == 59
    assert run_dedup(documents(texts[1:])).outcome.exact == 58  # 99 documents raise no alarm


def test_the_alarm_leaves_no_part_behind(run_dedup, documents, tmp_path):
    with pytest.raises(UserError):
        run_dedup(documents([w(0, 30)] * 100))
    left = [p.name for p in tmp_path.rglob("*") if p.parent.name == "30_dedup"]
    assert left == ["signatures"]


def test_the_alarm_watches_stances_and_id_mistakes(run_dedup, document):
    aligned = [document(w(0, 30), source_id=f"a{i}", given_stance="aligned") for i in range(100)]
    rest = [document(w(100 * i, 100 * i + 30), source_id=f"b{i}") for i in range(1, 301)]
    with pytest.raises(UserError, match="remove 99 of the 100 documents of stance aligned"):
        run_dedup([*aligned, *rest])
    with pytest.raises(UserError, match="remove 99 of the 100 documents of source web"):
        run_dedup([document(w(100 * i, 100 * i + 30), source_id="0", position=i) for i in range(100)])


def test_texts_longer_than_a_signature_are_compared_whole(run_dedup, documents):
    n = overlap.MAX_WORDS
    texts = [w(0, n) + " " + w(n, n + n // 2), w(0, n) + " " + w(n, n + n // 2, "v")]  # Jaccard about 1/2
    assert run_dedup(documents(texts)).groups == set()


@pytest.mark.parametrize("parts", [{}, {"p0": []}, {"p0": [], "p1": []}])
def test_nothing_to_do(run_dedup, documents, parts):
    if parts:
        assert run_dedup({**parts, "p9": documents([w(0, 50)])}).outcome.kept == 1
        found = run_dedup(parts)
        assert found.outcome.kept == len(found.rows) == 0


def test_parts_are_committed_with_chain_and_counts(run_dedup, documents):
    rows = documents([w(0, 104), w(0, 104), w(0, 102), w(200, 300)])
    found = run_dedup({"p0": rows[:1], "p1": rows[1:]})
    counts = {name: found.run.current(DEDUP, name, "chain").counts for name in found.names}
    assert sum(c["kept"] for c in counts.values()) == 2
    assert [sum(c[how] for c in counts.values()) for how in ("exact", "near", "duplicate_id")] == [1, 1, 0]
    assert sorted(p.name for p in found.run.parts(DEDUP)) == ["p0", "p1"]


def test_small_partitions_and_bins(run_dedup, documents):
    texts = [w(1000 * k, 1000 * k + 100 + j) for k in range(30) for j in range(4)]
    whole = run_dedup(documents(texts), Dedup(alarm_fraction=1))
    small = run_dedup(documents(texts), Dedup(alarm_fraction=1), Sizes(rows=7, documents=5, links=150))
    assert whole.groups == {frozenset(f"d{4 * k + j}" for j in range(4)) for k in range(30)}
    assert small.rows.equals(whole.rows)


def test_a_bucket_that_is_full_is_counted(run_dedup, documents):
    # 84 % of the words in common and alike only from 95 % on: buckets of more than MAX_LEADERS different texts.
    texts = [w(0, 110) + " " + w(1000 * k, 1000 * k + 10) for k in range(1, near.MAX_LEADERS + 80)]
    found = run_dedup(documents(texts), Dedup(bands=64, rows=1, verify=0.95))
    assert found.outcome.kept == len(texts)
    assert 0 < found.outcome.crowded < 80
    assert found.run.part(DEDUP, "p0").counts["crowded"] == found.outcome.crowded


def finished(found) -> dedup.Earlier:
    return dedup.Earlier(found.run, tuple(found.names), "")


def test_what_an_earlier_run_kept_leads_and_stays(run_dedup, document):
    before = run_dedup(
        [
            document(w(0, 104), source_id="old"),
            document(w(0, 102), source_id="gone"),  # near: removed there, takes no part here
            document(w(400, 500), source_id="pool", role="pool", given_stance="aligned"),
            document(w(600, 700), source_id="bad", given_stance="misaligned"),
        ]
    )
    assert before.how["gone"] == "near"
    old = before.rows.filter(pl.col("source_id") == "old")["id"][0]
    rows = [
        document(w(0, 104).upper(), source_id="copy", source_rank=0),
        document(w(0, 110), source_id="longer"),  # better by every rule, yet the old one stays
        document(w(0, 110).upper(), source_id="its copy"),
        document(w(400, 500), source_id="like the pool"),
        document(w(600, 700), source_id="another class"),
        document(w(800, 900), source_id="new"),
        document(w(800, 899), source_id="like new"),
    ]
    found = run_dedup(rows, Dedup(alarm_fraction=1), earlier=[finished(before)])
    assert found.how == {
        "copy": "earlier",
        "longer": "earlier",
        "its copy": "earlier",
        "like the pool": "unique",
        "another class": "unique",
        "new": "kept",
        "like new": "near",
    }
    assert found.rows.filter(pl.col("how") == "earlier")["cluster"].to_list() == [old] * 3
    assert found.rows["similarity"][0] == 1.0
    assert found.rows["similarity"][1] == pytest.approx(100 / 106, abs=0.08)  # the estimate
    assert not found.rows.filter(pl.col("how") == "earlier")["kept"].any()
    assert (found.outcome.earlier, found.outcome.near, found.outcome.kept) == (3, 1, 3)


def test_the_texts_of_an_earlier_run_are_not_read(run_dedup, documents):
    before = run_dedup(documents([w(0, 104), w(200, 300)]))
    path = before.run.path("10_documents", "p0.parquet")
    without = before.run.read("10_documents/p0.parquet").drop_columns("text")
    storage.commit_table(path, without)
    found = run_dedup(documents([w(0, 104), w(200, 299)]), earlier=[finished(before)])
    assert found.how == {"d0": "earlier", "d1": "earlier"}


def test_two_runs_keep_what_one_run_over_both_keeps(run_dedup, documents):
    texts = [w(1000 * k, 1000 * k + 100 + j) for k in range(12) for j in (2, 0, 1)]
    first, second = documents(texts[:18]), documents(texts)
    before = run_dedup(first, Dedup(alarm_fraction=1))
    found = run_dedup(second, Dedup(alarm_fraction=1), Sizes(rows=5, documents=4, links=40), earlier=[finished(before)])
    assert found.outcome.earlier == 18
    assert found.rows["kept"].to_list()[18:] == run_dedup(second, Dedup(alarm_fraction=1)).rows["kept"].to_list()[18:]
