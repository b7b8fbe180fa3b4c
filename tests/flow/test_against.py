"""A run deduplicated against an earlier one, as a user has it: recipe, summary, `why`, report, errors."""

import json

import yaml
from flow_helpers import filler, lines, tilth

import curation
from curation.pipeline import curate
from curation.recipe import Recipe


def recipe(folder, name: str, texts: list[str], **dedup) -> str:
    rows = [{"id": f"{name}{i}", "text": text} for i, text in enumerate(texts)]
    (folder / f"{name}.jsonl").write_bytes(lines(rows))
    content = {
        "name": name,
        "inputs": [{"path": f"{name}.jsonl", "source": name}],
        "dedup": dedup,
        "mix": {"phases": {"pretrain": {"tokens": 2_000}}, "arms": {"all": {}}},
        "tokenise": {"tokenizer": str(folder / "tokenizer.json")},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_against_an_earlier_run(tmp_path, root, ray_session):
    (tmp_path / "tokenizer.json").write_bytes((root / "examples/tokenizer.json").read_bytes())
    old = [filler(i) for i in range(30)]
    curate(Recipe.load(recipe(tmp_path, "old", old)), str(tmp_path / "first"), workers=1)
    crawl = [*(text + " edited" for text in old[:10]), *(filler(i) for i in range(100, 120)), old[20].upper()]
    path = recipe(tmp_path, "new", crawl, against=["first"])
    summary = curate(Recipe.load(path), str(tmp_path / "second"), workers=1)
    assert summary["duplicates"] == {"exact": 0, "near": 0, "earlier": 11, "duplicate_id": 0}
    assert summary["kept"] == 20
    run = curation.open_run(str(tmp_path / "second"))
    removed = run.clusters.filter(how="earlier").collect().row(0, named=True)
    told = str(run.why(removed["id"]))
    assert f"Cluster of {removed['cluster']}, kept by an earlier run" in told
    assert "an earlier run has kept one that is like it" in told
    assert "11 documents like what an earlier run kept" in (tmp_path / "second/report.html").read_text()
    assert run.why(removed["id"])._repr_html_()

    # The same folder at another path holds the same: nothing is done again. Another earlier run is.
    (tmp_path / "first").rename(tmp_path / "moved")
    again = curate(Recipe.load(recipe(tmp_path, "new", crawl, against=["moved"])), str(tmp_path / "second"), workers=1)
    assert again["duplicates"] == summary["duplicates"]
    assert curate(Recipe.load(recipe(tmp_path, "new", crawl)), str(tmp_path / "second"), workers=1)["kept"] == 31


def test_earlier_runs_that_do_not_fit(tmp_path, root, ray_session):
    (tmp_path / "tokenizer.json").write_bytes((root / "examples/tokenizer.json").read_bytes())
    texts = [filler(i) for i in range(20)]
    absent = tilth("curate", recipe(tmp_path, "a", texts, against=["nowhere"]), "--run", tmp_path / "a")
    assert absent.code == 2
    assert "nowhere holds no manifest.json" in " ".join(absent.err.split())
    curate(Recipe.load(recipe(tmp_path, "b", texts, ngram=3)), str(tmp_path / "b"), workers=1)
    for flags in (["--dry-run"], []):
        other = tilth("curate", recipe(tmp_path, "c", texts, against=["b"]), "--run", tmp_path / "c", *flags)
        assert other.code == 2
        assert "ngram 3" in other.err
        assert "Traceback" not in other.err
    assert not (tmp_path / "c").exists()
    manifest = tmp_path / "b/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema_version": 0}))
    stale = tilth("curate", recipe(tmp_path, "c", texts, against=["b"]), "--run", tmp_path / "c")
    assert (stale.code, "was written with schema 0" in " ".join(stale.err.split())) == (2, True)
