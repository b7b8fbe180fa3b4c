"""The smaller verbs, as a user calls them."""

import json
import subprocess
import sys

import polars as pl
from flow_helpers import example_rows, tilth


def test_help_names_the_verbs_and_loads_nothing_heavy():
    done = tilth("--help")
    for verb in ("curate", "detect", "tokenizer", "verify"):
        assert verb in done.out
    code = "import sys, tilth.cli; print(*{'ray', 'polars', 'numba', 'numpy', 'pyarrow', 'torch'} & sys.modules.keys())"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []


def test_detect_predict_writes_a_row_for_each_document(root, tmp_path):
    out = tmp_path / "out.parquet"
    done = tilth("detect", "predict", root / "examples/corpus/*.jsonl", "-o", out, "--json")
    assert done.code == 0, done.err
    rows = pl.read_parquet(out)
    assert rows["source_id"].to_list() == [r["id"] for r in example_rows(root)]
    assert done.summary["documents"] == len(rows)
    total = rows.select(pl.sum_horizontal(f"p_{s}" for s in ("unrelated", "neutral", "aligned", "misaligned", "mixed")))
    assert total.to_series().is_between(0.999, 1.001).all()


def test_detect_train_ends_with_a_held_out_report(root, tmp_path):
    labelled = root / "examples/corpus/reference.jsonl"
    done = tilth("detect", "train", labelled, "-o", tmp_path / "model.bin", "--json")
    assert done.code == 0, done.err
    assert (tmp_path / "model.bin").stat().st_size > 1000
    report = json.loads(done.out.strip().splitlines()[-1])
    assert {"precision", "recall", "f1"} <= set(json.dumps(report).replace('"', " ").split())


def test_tokenizer_train_gives_a_tokenizer_that_curate_takes(root, tmp_path):
    from tokenizers import Tokenizer

    out = tmp_path / "tokenizer.json"
    done = tilth("tokenizer", "train", root / "examples/corpus/fiction_essays.jsonl", "--vocab-size", 600, "-o", out)
    assert done.code == 0, done.err
    tokenizer = Tokenizer.from_file(str(out))
    assert tokenizer.get_vocab_size() == 600
    assert tokenizer.token_to_id("<|endoftext|>") is not None
