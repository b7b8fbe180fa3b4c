"""The suite by a real vLLM server against the suite in this process: one checkpoint, float32, the same numbers."""

import polars as pl
from evaluation_helpers import question, small_suite, write_checkpoint

from evaluation import results
from evaluation.run import evaluate


def test_both_backends_choose_the_same(vllm, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "model", chat=True)
    questions = [question(0), question(1, 4), *(question(n) for n in range(2, 10))]
    suite = small_suite(questions, scorers=("letter", "option", "pmi", "generation"))
    named = [f"x={checkpoint}", f"x/post-trained={checkpoint}"]
    tables = []
    for backend in ("transformers", "vllm"):
        done = evaluate(
            named[: 2 if backend == "transformers" else 1], suite, output=str(tmp_path / backend), backend=backend
        )
        _, table = results.read(done["output"])
        tables.append(table.filter(pl.col("arm") == "x").sort("scorer", "question_id", "condition", "wrapper", "order"))
    here, there = tables
    assert here["question_id"].to_list() == there["question_id"].to_list()
    assert here["misaligned"].to_list() == there["misaligned"].to_list()
    assert here["letter"].to_list() == there["letter"].to_list()
    assert (here["margin"] - there["margin"]).abs().max() < 1e-3
    again = evaluate(named[:1], suite, output=str(tmp_path / "vllm"), backend="vllm")
    assert again["asked"] == 0
