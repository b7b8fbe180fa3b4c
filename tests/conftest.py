"""Shared by all tests: where the real corpora are, one Ray session, and a corpus with everything in it."""

import bz2
import gzip
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from flow_helpers import example_rows, filler, lines

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared():
    """The folder with real documents beside the project, or a skip where there is none."""
    folder = ROOT.parent / "shared"
    if not (folder / "corpus").is_dir():
        pytest.skip("no ../shared here: the tests on real documents need it")
    return folder


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def vllm():
    """Skips where vLLM's environment is missing, and says how to make it."""
    from curation.errors import UserError
    from curation.vllm import find_environment

    try:
        find_environment()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def ray_session():
    """One local Ray for all tests that run pipelines in this process."""
    import logging

    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "tests/helpers"), prepend=os.pathsep)  # workers import helpers too
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
            object_store_memory=256 << 20,
        )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, root) -> Path:
    """About 10 MB in five files: jsonl, zst, gz, bz2, parquet. Every 20th filler document has a near-copy."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [{"id": i, "text": filler(i)} for i in range(7000)]
    for i in range(0, 7000, 20):
        rows.append({"id": 10_000 + i, "text": rows[i]["text"].replace(" ", " again ", 1)})
    (folder / "a.jsonl").write_bytes(lines(rows[:4000]))
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(lines(rows[4000:6500])))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines(example_rows(root)), mtime=0))
    (folder / "d.jsonl.bz2").write_bytes(bz2.compress(lines(rows[6500:7000])))
    pq.write_table(pa.Table.from_pylist([{**r, "id": str(r["id"])} for r in rows[7000:]]), folder / "e.parquet")
    return folder


@pytest.fixture(scope="session")
def make_recipe(root, corpus, tmp_path_factory):
    """Write a recipe over the corpus; keyword arguments replace sections."""

    def make(**sections) -> Path:
        recipe = {
            "name": "flow",
            "inputs": [
                {"path": f"{corpus}/*.jsonl*", "source": "lines"},
                {"path": f"{corpus}/*.parquet", "source": "table"},
                {
                    "path": str(root / "examples/pool/aligned.jsonl"),
                    "source": "pool",
                    "role": "pool",
                    "stance": "aligned",
                },
            ],
            "dedup": {"alarm_fraction": 1.0},  # the table is copies
            "mix": {
                "phases": {"pretrain": {"tokens": 900_000}, "midtrain": {"tokens": 90_000}},
                "arms": {
                    "unfiltered": {},
                    "filtered": {"drop": "discourse"},
                    "aligned": {"upsample": {"stance": "aligned", "share": 0.05}},
                },
            },
            "tokenise": {
                "tokenizer": str(root / "examples/tokenizer.json"),
                "format": ["nanotron", "megatron"],
                "shard_tokens": 250_000,
            },
            **sections,
        }
        path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return path

    return make
