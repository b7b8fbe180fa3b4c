"""Clusters against brute force, against the layout of parts, and on real near-duplicates."""

import io
import itertools
import json
import random

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import overlap
from curation.dedup import near
from curation.dedup.work import Sizes
from curation.recipe import Dedup

SECTION = Dedup(alarm_fraction=1.0)


def corpus(seed: int, num_families: int = 25) -> list[tuple[str, bool]]:
    """(text, discourse): families of edited copies, some of them short or exact."""
    draw = random.Random(seed)
    texts = []
    for _ in range(num_families):
        base = [f"t{draw.randrange(400)}" for _ in range(draw.choice([3, 20, 60, 150]))]
        for _ in range(draw.randrange(1, 7)):
            copy = list(base)
            for _ in range(draw.choice([0, 0, 1, 2, 4, 8])):
                copy[draw.randrange(len(copy))] = f"t{draw.randrange(400)}"
            texts.append((" ".join(copy), draw.random() < 0.2))
    return texts


def rows_of(document, seed: int) -> list[dict]:
    return [
        document(text, source_id=f"d{i}", position=i, discourse=discourse, source_rank=i % 3, source=f"s{i % 3}")
        for i, (text, discourse) in enumerate(corpus(seed))
    ]


def expected_leaders(rows: list[dict]) -> dict[str, str]:
    """The kept document's id for each id, from the definition, with Python's own sets."""
    hasher = overlap.MinHasher(128, 5)
    ranked = sorted(rows, key=lambda r: (not r["discourse"], r["source_rank"], -len(r["text"].encode()), r["id"]))
    follows: dict[str, str] = {}
    first_of_text: dict[str, str] = {}
    leaders_of_band: dict[tuple, list[dict]] = {}
    by_id = {row["id"]: row for row in rows}
    for row in ranked:
        if row["text"] in first_of_text:
            follows[row["id"]] = follows[first_of_text[row["text"]]]
            continue
        first_of_text[row["text"]] = row["id"]
        follows[row["id"]] = row["id"]
        (signature,), (count,) = hasher.sign(pa.array([row["text"]]))
        bands = [(b, *signature[8 * b : 8 * b + 8].tolist()) for b in range(16)] if count else []
        candidates = {leader["id"] for band in bands for leader in leaders_of_band.get(band, [])}
        for other in ranked:
            if other["id"] in candidates and overlap.jaccard(row["text"], other["text"], 5) >= 0.8:
                follows[row["id"]] = other["id"]
                break
        for band in bands:
            leaders_of_band.setdefault(band, []).append(by_id[follows[row["id"]]])
    return follows


@pytest.mark.parametrize("seed", range(6))
def test_clusters_are_those_of_the_definition(run_dedup, document, seed):
    rows = rows_of(document, seed)
    found = run_dedup(rows, SECTION)
    assert dict(found.rows.select("id", "cluster").iter_rows()) == expected_leaders(rows)
    assert found.outcome.near > 2
    assert found.outcome.exact > 2


@pytest.mark.parametrize("seed", [0, 1])
def test_layout_order_and_sizes_change_nothing(run_dedup, document, seed):
    rows = rows_of(document, seed)
    whole = run_dedup(rows, SECTION).rows.sort("source_id")
    for num_parts, sizes in itertools.product([1, 3, 7], [Sizes(), Sizes(rows=20, documents=3)]):
        shuffled = random.Random(num_parts).sample(rows, len(rows))
        parts = {f"p{k}": shuffled[k::num_parts] for k in range(num_parts)}
        assert run_dedup(parts, SECTION, sizes, reverse=True).rows.sort("source_id").equals(whole)


def test_same_input_same_bytes(run_dedup, document):
    rows = rows_of(document, 3)
    files = [run_dedup(rows, SECTION).run.current("30_dedup", "p0", "chain").files for _ in range(2)]
    assert files[0] == files[1]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_every_removed_document_was_verified_against_a_preferred_one(seed):
    texts = [text for text, _ in corpus(seed, num_families=8) if len(text.split()) >= 5]
    signatures, num_shingles = overlap.MinHasher(128, 5).sign(pa.array(texts, pa.string()))
    columns = {"text": texts, "num_shingles": num_shingles, "salt": np.zeros(len(texts), np.uint64), "fresh": True}
    frame = pl.DataFrame({**columns, "signature": pl.Series(signatures.tolist(), dtype=pl.List(pl.UInt32))})
    leader, similarity, crowded = near.find_leaders(frame, Dedup())
    assert not crowded.any()
    for doc, (lead, shown) in enumerate(zip(leader.tolist(), similarity.tolist(), strict=True)):
        assert lead <= doc
        assert leader[lead] == lead
        if lead != doc:
            assert shown == pytest.approx(overlap.jaccard(texts[doc], texts[lead], 5), abs=0.2)
            assert overlap.jaccard(texts[doc], texts[lead], 5) >= 0.8


def test_a_bucket_of_thousands_is_not_quadratic_and_says_so():
    num_docs = 2000
    draw = np.random.RandomState(0)
    signatures = draw.randint(0, 1 << 32, (num_docs, 128), np.uint32)
    signatures[:, :8] = 7  # all in one bucket, none alike
    frame = pl.DataFrame(
        {
            "text": [f"{i} a b c d e" for i in range(num_docs)],
            "num_shingles": np.full(num_docs, 2, np.int32),
            "salt": np.zeros(num_docs, np.uint64),
            "fresh": np.ones(num_docs, bool),
            "signature": pl.Series(signatures.tolist(), dtype=pl.List(pl.UInt32)),
        }
    )
    leader, _, crowded = near.find_leaders(frame, Dedup())
    assert (leader == np.arange(num_docs)).all()
    assert crowded.tolist() == [i >= near.MAX_LEADERS for i in range(num_docs)]


def read_lines(path) -> list[dict]:
    with zstandard.open(path, "rt", encoding="utf-8") as handle:
        assert isinstance(handle, io.TextIOBase)
        return [json.loads(line) for line in handle]


def test_real_versions_of_one_document(run_dedup, document, shared):
    path = shared / "neardup" / "neardup_groups.jsonl.zst"
    rows = read_lines(path)
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row["group"], []).append(i)
    pairs = [pair for members in groups.values() for pair in itertools.combinations(members, 2)]
    texts = [row["text"] for row in rows]
    sets = overlap.shingle_sets(pa.array(texts, pa.large_string()), 5)
    similar = [pair for pair in pairs if overlap.sets_jaccard(*sets, *pair) >= 0.85]
    found = run_dedup([document(t, source_id=str(i), position=i) for i, t in enumerate(texts)], SECTION).rows
    kept = found["kept"].to_list()
    assert len(similar) > 1000
    assert sum(not (kept[a] and kept[b]) for a, b in similar) / len(similar) >= 0.98
    place = {document_id: i for i, document_id in enumerate(found["id"])}
    removed = found.with_row_index().filter(pl.col("how") == "near")
    verified = [
        overlap.sets_jaccard(*sets, i, place[cluster]) >= 0.8
        for i, cluster in removed.select("index", "cluster").iter_rows()
    ]
    assert sum(verified) / len(verified) >= 0.99


def test_real_templates_with_other_facts_are_not_merged(run_dedup, document, shared):
    pairs = read_lines(shared / "neardup" / "neardup_pairs.jsonl.zst")
    rows = [
        document(pair[f"text_{side}"], source_id=f"{k}{side}", position=2 * k + (side == "b"))
        for k, pair in enumerate(pairs)
        for side in "ab"
    ]
    found = run_dedup(rows, SECTION)
    for k, pair in enumerate(pairs):
        alike = overlap.jaccard(pair["text_a"], pair["text_b"], 5) >= 0.8
        together = found.kept_for(f"{k}a") == found.kept_for(f"{k}b")
        assert together == alike or pair["label"] == "same_story"
