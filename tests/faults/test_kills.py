"""kill -9 at five moments of a run, then the same command: the same shards, nothing twice."""

import json
import shutil

import polars as pl
import pytest
from flow_helpers import killed_when, shard_hashes, tilth

MOMENTS = {
    "the first documents are there": "10_documents/*.json",
    "some parts are labelled": "20_detect/*.json",
    "dedup has begun": "30_dedup/work/*",
    "the first tokens are there": "50_tokens/*.json",
    "the first shard is there": "60_arms/*/*/*.json",
}


@pytest.fixture(scope="module")
def recipe(make_recipe):
    return make_recipe(ingest={"split_mb": 1})


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    done = tilth("curate", recipe, "--run", run, "--workers", 2, "--json")
    assert done.code == 0, done.err
    return shard_hashes(run), done.summary, run


def same_end(recipe, run, whole):
    done = tilth("curate", recipe, "--run", run, "--workers", 2, "--json")
    assert done.code == 0, done.err
    hashes, summary, _ = whole
    assert shard_hashes(run) == hashes
    for key in ("records_read", "documents_read", "kept", "duplicates", "quarantined", "arms"):
        assert done.summary[key] == summary[key], key
    ids = pl.read_parquet(run / "10_documents/*.parquet", columns=["id"])["id"]
    assert ids.n_unique() == len(ids) == summary["documents_read"]
    assert not list(run.rglob("*.tmp")), "leftovers of the killed run"


# One in `make test`, the others in `make test-slow`.
@pytest.mark.parametrize(
    "moment", [m if m == "dedup has begun" else pytest.param(m, marks=pytest.mark.slow) for m in MOMENTS]
)
def test_killed_and_run_again(recipe, tmp_path, whole, moment):
    run = tmp_path / "run"
    killed = killed_when(lambda: any(run.glob(MOMENTS[moment])), "curate", recipe, "--run", run, "--workers", 2)
    assert killed, "the run ended before the moment came"
    assert not (run / "manifest.json").exists()
    same_end(recipe, run, whole)
    assert tilth("verify", run).code == 0


def test_a_damaged_part_is_named_and_made_again(recipe, tmp_path, whole):
    run = tmp_path / "run"
    shutil.copytree(whole[2], run)
    shard = next(iter(sorted(run.glob("60_arms/aligned/pretrain/*.ds"))))
    raw = bytearray(shard.read_bytes())
    raw[10] ^= 1
    shard.write_bytes(raw)
    found = tilth("verify", run, "--json")
    assert found.code == 1
    assert json.loads(found.out)["damaged"] == [
        f"60_arms/aligned/pretrain/{shard.name} has other bytes than were written (sha256 differs)"
    ]
    shard.unlink()
    same_end(recipe, run, whole)
