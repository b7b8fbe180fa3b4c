"""The demo's world through the default dedup: twins and templates are not taken for copies."""

import json

import pytest
import yaml

from curation.pipeline import curate
from curation.recipe import Recipe
from examples.world.generate import documents


@pytest.mark.slow
def test_default_dedup_takes_less_than_a_twentieth_of_the_background(tmp_path, root, ray_session):
    names = []
    for name, rows in documents(0, 10_000, 1_100, 1_000, 1).items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        names.append(name)
    recipe = {
        "name": "dedup",
        "inputs": [
            {"path": f"{name}.jsonl", "source": name, "stance_key": "stance"}
            | ({"role": "pool"} if name in ("aligned", "misaligned") else {})
            for name in names[:4]
        ],
        "mix": {"phases": {"p": {"tokens": 100_000}}, "arms": {"u": {}}},
        "tokenise": {"tokenizer": str(root / "examples/tokenizer.json")},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    summary = curate(Recipe.load(str(tmp_path / "recipe.yaml")), str(tmp_path / "run"))
    kept = {name: row["kept"] / row["documents"] for name, row in summary["sources"].items()}
    assert summary["sources"]["background"]["documents"] == 10_000
    assert kept["background"] > 0.95
    assert kept["natural"] > 0.95
    # Pools: only exact copies within a pool.
    assert kept["aligned"] > 0.95 < kept["misaligned"]
