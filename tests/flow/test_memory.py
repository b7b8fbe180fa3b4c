"""A corpus ten times larger than the memory that its workers may use."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

LIMIT_BYTES = 128 << 20
CORPUS_BYTES = 10 * LIMIT_BYTES

RUN = """
import glob, json, logging, os, ray, sys, threading, time

def end_when_a_worker_was_killed():  # Ray would start another and try again
    while not glob.glob(os.environ["LIMIT_NOTES"] + "/killed-*"):
        time.sleep(0.5)
    os._exit(3)

threading.Thread(target=end_when_a_worker_was_killed, daemon=True).start()
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
         object_store_memory=128 << 20, runtime_env={"worker_process_setup_hook": "memory_limit.watch",
         "env_vars": {k: v for k, v in os.environ.items() if k.startswith("LIMIT_") or k == "PYTHONPATH"}})
from curation.pipeline import curate
from curation.recipe import Recipe
print(json.dumps(curate(Recipe.load(sys.argv[1]), sys.argv[2], workers=2)))
"""


@pytest.fixture
def big_corpus(tmp_path) -> Path:
    """JSON lines of words drawn at random, 50 kB a document."""
    words = [f"{a}{b}" for a in ("north", "light", "stone", "field", "river") for b in range(4000)]
    draw = np.random.default_rng(0)
    path, size = tmp_path / "big.jsonl", 0
    with open(path, "w") as handle:
        while size < CORPUS_BYTES:
            drawn = (words[k] for k in draw.integers(len(words), size=5500).tolist())
            size += handle.write(json.dumps({"id": size, "text": " ".join(drawn)}) + "\n")
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the limit is read from /proc")
@pytest.mark.slow
def test_workers_hold_a_tenth_of_the_corpus_at_most(big_corpus, make_recipe, root, tmp_path):
    inputs = [{"path": str(big_corpus), "source": "big"}]
    mix = {"phases": {"p": {"tokens": 8_000_000}}, "arms": {"u": {}, "f": {"drop": "blocklist"}}}
    tokenise = {"tokenizer": str(root / "examples/tokenizer.json"), "shard_tokens": 1_000_000}
    recipe = make_recipe(inputs=inputs, mix=mix, tokenise=tokenise, ingest={"split_mb": 2})
    environment = os.environ | {
        "LIMIT_BYTES": str(LIMIT_BYTES),
        "LIMIT_NOTES": str(tmp_path),
        "LIMIT_TOKENIZER": tokenise["tokenizer"],
        "PYTHONPATH": f"{root / 'tests/helpers'}{os.pathsep}{root}",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, recipe, tmp_path / "run"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(tmp_path.glob("killed-*"))
    assert list(tmp_path.glob("peak-*")), "no worker was watched"
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["bytes_read"] >= CORPUS_BYTES
    assert [row["tokens"] for row in summary["arms"]] == [8_000_000, 8_000_000]
