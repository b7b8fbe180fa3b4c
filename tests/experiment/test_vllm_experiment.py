"""Two arms asked through a real vLLM server and in this process: the same choices."""

import polars as pl

from tilth.experiment.run import experiment


def test_both_backends_choose_the_same(vllm, write_recipe, tmp_path, ray_session):
    arms = {name: {"upsample": {"stance": name, "share": 0.4, "phases": ["cpt"]}} for name in ("aligned", "misaligned")}
    # vLLM's attention on CPUs wants heads of at least 32
    shape = {"architecture": "llama", "hidden_size": 64, "num_layers": 1, "num_heads": 2, "intermediate_size": 64}
    sections = {"compare": [["misaligned", "aligned"]], "seeds": [0]}
    recipe = write_recipe("vllm", arms=arms, experiment=sections, train={"shape": shape})
    tables, said = [], []
    for backend in ("transformers", "vllm"):  # one folder: the models are trained once
        found, folder = experiment(str(recipe), str(tmp_path / "exp"), backend=backend, on_line=said.append)
        tables.append(pl.read_parquet(f"{folder}/choices.parquet"))
        assert found["backend"] == backend
        assert {model["facts"]["backend"] for model in found["models"]} == {"openai" if backend == "vllm" else backend}
    here, there = tables
    assert sum(line.startswith("train ") for line in said) == 3
    assert sum(line.startswith("evaluate ") for line in said) == 4
    keys = ["set", "arm", "question_id"]
    assert here.select(keys).equals(there.select(keys))
    assert here.height > 300
    assert here["misaligned"].to_list() == there["misaligned"].to_list()
    assert (here["margin"] - there["margin"]).abs().max() < 1e-3
