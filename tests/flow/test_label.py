"""`tilth curate` with a `label` section, against a server that answers by a hash of the document
(curation/label/fake_server.py: it shows plumbing, not labels)."""

import json

import polars as pl
import pytest
import yaml

import curation
from curation.distil import distil
from curation.errors import UserError
from curation.label.fake_server import Faults, Server, answer
from curation.pipeline import curate
from curation.plan import plan
from curation.recipe import Recipe
from curation.schema import STANCES

AUDIT = 20


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server


@pytest.fixture
def write(root, tmp_path, server):
    """A recipe over our example documents; keyword arguments go into its label section."""

    def make(**over):
        label = {"base_url": server.url, "model": "fake", "audit": AUDIT, "cache": str(tmp_path / "cache"), **over}
        recipe = {
            "name": "labelled",
            "inputs": [{"path": str(root / "examples/corpus/*.jsonl"), "source": "examples"}],
            "label": label,
            "mix": {
                "phases": {"p": {"tokens": 20_000}},
                "arms": {"all": {}, "filtered": {"drop": "discourse"},
                         "aligned": {"upsample": {"stance": "aligned", "share": 0.1}}},
            },
            "tokenise": {"tokenizer": str(root / "examples/tokenizer.json")},
        }  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return Recipe.load(str(path))

    return make


def labels(folder):
    run = curation.open_run(str(folder))
    return run.labels.join(run.documents.select("id", "text"), on="id").sort("id").collect()


def test_labels_decide_the_stance_and_reach_the_arms(write, server, tmp_path, ray_session):
    summary = curate(write(), str(tmp_path / "run"))
    rows = labels(tmp_path / "run")
    asked = rows.filter("asked")
    kept = curation.open_run(str(tmp_path / "run")).clusters.filter("kept").collect()["id"]
    flagged = rows.filter(pl.col("discourse") & pl.col("id").is_in(kept.implode()))
    assert asked.height == flagged.height + AUDIT
    assert asked.filter("audit").height == AUDIT
    assert not asked.filter("audit")["discourse"].any()
    # What the server said is what stands, over the student; the others keep the student's.
    for row in asked.iter_rows(named=True):
        said = json.loads(answer(row["text"])[0])
        assert row["llm_stance"] == row["stance"] == said["stance"]
        assert " ".join((row["evidence"] or "").split()) == said["evidence"]
    assert rows.filter(~pl.col("asked"))["llm_stance"].null_count() == rows.height - asked.height
    told = summary["labels"]
    assert told["asked"] == told["labelled"] == asked.height
    assert told["stances"] == dict(asked["llm_stance"].value_counts().iter_rows())
    # The mix sees them: what is dropped as discourse, what is inserted as aligned.
    provenance = curation.open_run(str(tmp_path / "run")).provenance.collect()
    stances = dict(rows.select("id", "stance").iter_rows())
    inserted = provenance.filter("inserted")
    assert inserted.height
    assert {stances[key] for key in inserted["id"]} == {"aligned"}
    unrelated = {None, "unrelated"}
    assert {stances[key] for key in provenance.filter(pl.col("arm") == "filtered")["id"]} <= unrelated

    # The same again asks nothing and changes nothing.
    before, manifest = server.calls.total(), (tmp_path / "run/manifest.json").read_bytes()
    curate(write(), str(tmp_path / "run"))
    assert server.calls.total() == before
    assert (tmp_path / "run/manifest.json").read_bytes() == manifest
    # Another run has its answers from the cache.
    curate(write(), str(tmp_path / "other"))
    assert server.calls.total() == before
    assert labels(tmp_path / "other")["llm_stance"].equals(rows["llm_stance"])


def test_a_budget_ends_it_cleanly_and_a_higher_one_goes_on(write, server, tmp_path, ray_session):
    said = []
    first = curate(write(max_documents=40), str(tmp_path / "run"), on_line=said.append)["labels"]
    assert first["labelled"] == 40
    assert first["not_reached"] == first["asked"] - 40 > 0
    assert any("max_documents ended it" in line for line in said)
    calls = server.calls.total()
    planned = json.loads((tmp_path / "run/manifest.json").read_text())["summary"]["labels"]["last_attempt"]
    assert planned["stopped"] == "max_documents"
    assert planned["plan"]["documents"] == 40
    assert planned["input_tokens"] + planned["output_tokens"] > 0
    second = curate(write(), str(tmp_path / "run"))["labels"]
    assert second["not_reached"] == 0
    assert server.calls.total() == calls + second["asked"] - 40
    assert labels(tmp_path / "run").filter("asked")["llm_stance"].null_count() == 0


def test_what_has_no_label_is_counted_by_class_and_keeps_the_students_stance(write, tmp_path, ray_session):
    with Server(Faults(garbage=0.2, wrong_quote=0.2, refusal=0.1)) as broken:
        told = curate(write(base_url=broken.url), str(tmp_path / "run"))["labels"]
    assert told["asked"] == told["labelled"] + told["quarantined"]
    assert set(told["errors"]) <= {"not_json", "schema", "refusal", "evidence_missing"}
    assert sum(told["errors"].values()) == told["quarantined"] > 0
    rows = labels(tmp_path / "run").filter(pl.col("error").is_not_null())
    assert rows.height == told["quarantined"]
    assert rows["llm_stance"].null_count() == rows.height
    rejects = curation.open_run(str(tmp_path / "run")).quarantine.collect()
    reasons = dict(rejects["reason"].str.strip_prefix("label_").value_counts().iter_rows())
    assert reasons == told["errors"]
    heads = (text[:4096].encode()[:4096] for text in rows["text"])
    assert sorted(zip(rejects["detail"], rejects["head"], strict=True)) == sorted(
        zip(rows["detail"], heads, strict=True)
    )
    student = rows.select(pl.max_horizontal(r"^p_(?:unrelated|neutral|aligned|misaligned|mixed)$")).to_series() >= 0.9
    assert rows["stance"].is_not_null().to_list() == student.to_list()


def test_the_dry_run_prices_the_labels_when_dedup_is_done(write, tmp_path, ray_session):
    recipe = write(input_usd=1.0, output_usd=4.0, gpu_tokens_per_second=1_000)
    assert plan(recipe, str(tmp_path / "run"))["label"].endswith("is known when detect and dedup have run")
    summary = curate(recipe, str(tmp_path / "run"))
    told = plan(recipe, str(tmp_path / "run"))["label"]
    assert f"{summary['labels']['asked']:,} documents" in told
    assert " USD" in told
    assert " GPU-hours" in told


def test_a_budget_without_prices_and_a_missing_server_are_one_sentence(write, tmp_path, ray_session):
    with pytest.raises(UserError, match="`budget_usd` needs `input_usd` and `output_usd`"):
        write(budget_usd=5)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9"):
        curate(write(base_url="http://127.0.0.1:9/v1"), str(tmp_path / "run"))


@pytest.mark.slow
def test_the_next_detector_learns_from_the_labels_and_says_what_it_gained(write, root, tmp_path, ray_session):
    """Labels are those of our documents, each stance called by the next one's name: what the run's detector, which was
    trained on the documents, cannot know."""
    next_one = dict(zip(STANCES, (*STANCES[1:], STANCES[0]), strict=True))
    known = {
        row["text"]: next_one[row["stance"]]
        for file in sorted((root / "examples/corpus").glob("*.jsonl"))
        for row in map(json.loads, file.read_text().splitlines())
    }
    with Server(stance=lambda text: known[text]) as knowing:
        curate(write(base_url=knowing.url, audit=1_000_000, window_characters=100_000), str(tmp_path / "run"))
    rows = labels(tmp_path / "run").filter(pl.col("llm_stance").is_not_null())
    people = rows.sort("id").head(60)
    human = tmp_path / "human.jsonl"
    said = [{"id": row["id"], "stance": row["stance"]} for row in people.iter_rows(named=True)]
    human.write_text("".join(json.dumps(row) + "\n" for row in said))
    card = distil(str(tmp_path / "run"), str(tmp_path / "next.bin"), human=str(human))
    assert sum(card["documents"].values()) == rows.height - 60
    assert 0.1 * rows.height < card["gain"]["documents"] < 0.3 * rows.height
    gained = card["gain"]["macro_f1"]
    assert gained["value"] == pytest.approx(gained["after"] - gained["before"])
    assert gained["low"] > 0
    assert card["human"]["documents"] == 60
    assert card["human"]["before"]["accuracy"]["value"] < card["human"]["after"]["accuracy"]["value"]
