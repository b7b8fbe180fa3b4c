"""Whole runs: same bytes however the work is cut, nothing lost, nothing done twice."""

import json
import os
import random
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from flow_helpers import shard_hashes

from curation.pipeline import curate
from curation.recipe import Recipe


@pytest.fixture(scope="module")
def reference(make_recipe, tmp_path_factory, ray_session):
    """One run that the others are compared with."""
    run = tmp_path_factory.mktemp("reference")
    return run, curate(Recipe.load(make_recipe()), str(run), workers=2)


def test_counts_add_up(reference):
    _, summary = reference
    assert summary["exit_code"] == 0
    assert summary["records_read"] == summary["documents_read"] + summary["quarantined_total"]
    duplicates = summary["duplicates"]
    assert summary["documents_read"] == summary["kept"] + sum(duplicates.values())
    assert duplicates["near"] >= 350  # every 20th of 7,000 has a near-copy


def test_every_phase_has_exactly_its_tokens(reference):
    run, summary = reference
    for row in summary["arms"]:
        assert row["tokens"] == row["tokens_asked"]
        for suffix in (".ds", ".bin"):
            paths = [s for s in row["shards"] if s["path"].endswith(suffix)]
            assert sum(os.path.getsize(run / s["path"]) // 2 for s in paths) == row["tokens_asked"]


def test_shards_hold_the_documents_that_provenance_names(reference, root):
    from tokenizers import Tokenizer

    run, _ = reference
    tokenizer = Tokenizer.from_file(str(root / "examples/tokenizer.json"))
    texts = dict(pl.read_parquet(run / "10_documents" / "*.parquet").select("id", "text").iter_rows())
    for stem in sorted((run / "60_arms/aligned").rglob("*.ds")):
        tokens = np.fromfile(stem, "<u2")
        rows = pl.read_parquet(f"{str(stem)[:-3]}.provenance.parquet")
        assert rows["end"].to_list()[-1] == len(tokens)
        for row in rows.sample(20, seed=1).iter_rows(named=True):
            ids = [
                *tokenizer.encode(texts[row["id"]], add_special_tokens=False).ids,
                tokenizer.token_to_id("<|endoftext|>"),
            ]
            assert tokens[row["start"] : row["end"]].tolist() == ids[: row["end"] - row["start"]]


def test_the_filtered_arm_holds_no_discourse(reference):
    run, summary = reference
    rows = pl.read_parquet(run / "60_arms/filtered/*/*.provenance.parquet")
    labels = pl.read_parquet(run / "20_detect/*.parquet").select("id", "p_discourse")
    assert rows.filter(pl.col("stance").is_not_null() & (pl.col("stance") != "unrelated")).is_empty()
    undecided = rows.filter(pl.col("stance").is_null()).join(labels, on="id")
    assert undecided.filter(pl.col("p_discourse") >= 0.5).is_empty()
    assert {r["arm"] for r in summary["arms"] if r["discourse_tokens"]} == {"unfiltered", "aligned"}


@pytest.mark.parametrize(("workers", "split_mb"), [(1, 64), (2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_same_bytes_for_any_workers_and_splits(reference, make_recipe, tmp_path, workers, split_mb):
    run, summary = reference
    other = curate(Recipe.load(make_recipe(ingest={"split_mb": split_mb})), str(tmp_path / "run"), workers=workers)
    assert shard_hashes(tmp_path / "run") == shard_hashes(run)
    assert {k: other[k] for k in ("kept", "duplicates", "quarantined")} == {
        k: summary[k] for k in ("kept", "duplicates", "quarantined")
    }
    if split_mb == 1:
        assert len(list((tmp_path / "run/10_documents").glob("*.parquet"))) > len(
            list((run / "10_documents").glob("*.parquet"))
        )


def test_same_bytes_for_a_shuffled_listing(reference, make_recipe, tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    def shuffled(original):
        def call(self, *args, **kwargs):
            found = original(self, *args, **kwargs)
            if isinstance(found, list):
                random.Random(3).shuffle(found)
                return found
            return dict(sorted(found.items(), reverse=True)) if isinstance(found, dict) else found

        return call

    for name in ("ls", "glob", "find"):
        monkeypatch.setattr(LocalFileSystem, name, shuffled(getattr(LocalFileSystem, name)))
    curate(Recipe.load(make_recipe()), str(tmp_path / "run"), workers=2)
    assert shard_hashes(tmp_path / "run") == shard_hashes(reference[0])


def mtimes(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_a_second_run_does_nothing_and_a_new_mix_redoes_mix_only(reference, make_recipe):
    run, summary = reference
    manifest_time = (run / "manifest.json").stat().st_mtime_ns
    before = {name: mtimes(run / name) for name in ("10_documents", "20_detect", "30_dedup", "50_tokens", "60_arms")}
    again = curate(Recipe.load(make_recipe()), str(run), workers=2)
    assert {name: mtimes(run / name) for name in before} == before
    assert (run / "manifest.json").stat().st_mtime_ns == manifest_time
    assert again["seconds"]["start_ray"] == 0  # not even Ray is started
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}
    mix = {"phases": {"pretrain": {"tokens": 500_000}}, "arms": {"only": {}}}
    curate(Recipe.load(make_recipe(mix=mix)), str(run), workers=2)
    assert sorted(p.name for p in (run / "60_arms").iterdir() if p.is_dir()) == ["only"]
    for name in ("10_documents", "20_detect", "30_dedup", "50_tokens"):
        assert mtimes(run / name) == before[name]
    curate(Recipe.load(make_recipe()), str(run), workers=2)  # as it was, for the other tests


def test_a_changed_input_redoes_what_depends_on_it(make_recipe, corpus, tmp_path, ray_session):
    import shutil

    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    inputs = [{"path": f"{copy}/*", "source": "all"}]
    mix = {"phases": {"p": {"tokens": 500_000}}, "arms": {"u": {}}}
    recipe, run = make_recipe(inputs=inputs, mix=mix), tmp_path / "run"
    curate(Recipe.load(recipe), str(run), workers=2)
    before = mtimes(run / "10_documents")
    with open(copy / "a.jsonl", "a") as handle:
        handle.write(json.dumps({"id": "new", "text": "One more document about a lighthouse and its keeper."}) + "\n")
    summary = curate(Recipe.load(recipe), str(run), workers=2)
    after = mtimes(run / "10_documents")
    redone = {p for p in after if after[p] != before.get(p)}
    files = {
        json.loads(Path(p).read_bytes())["about"].get("file")
        for p in redone
        if p.endswith(".json") and "/splits/" not in p
    }
    assert files == {"a.jsonl"}
    fresh = curate(Recipe.load(recipe), str(tmp_path / "fresh"), workers=2)
    assert shard_hashes(run) == shard_hashes(tmp_path / "fresh")
    assert summary["documents_read"] == fresh["documents_read"]
