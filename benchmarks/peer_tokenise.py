"""Texts -> token ids, by one library in a process of its own (this environment; see benchmarks.tokenise).

    peer_tokenise.py tokenizers|fastokens|stage TEXTS TOKENIZER WORKERS

`stage` is `tilth curate`'s: from a part's Parquet files to its committed ids, in WORKERS processes.
"""

import json
import sys
import tempfile
from collections.abc import Iterable
from itertools import count
from multiprocessing import get_context
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from benchmarks import peers
from curation import steps, tokenise
from curation.manifest import DEDUP, DOCUMENTS, TOKENS, RunFolder

BATCH = 1000


def digest(rows: Iterable[np.ndarray]) -> str:
    """Of the ids of every text, without EOS."""
    hasher = xxhash.xxh3_64()
    for row in rows:
        hasher.update(np.asarray(row, "<u4").tobytes() + b"|")
    return str(hasher.hexdigest())


def tokenizers(texts: list[str], path: str) -> tuple[float, str]:
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(path)
    encoder.encode_special_tokens = True
    seconds = peers.best(lambda: [encoder.encode_batch_fast(part, add_special_tokens=False) for part in batches(texts)])
    found = (row.ids for part in batches(texts) for row in encoder.encode_batch_fast(part, add_special_tokens=False))
    return seconds, digest(found)


def fastokens(texts: list[str], path: str) -> tuple[float, str]:
    import fastokens

    with open(path) as file:
        encoder = fastokens.Tokenizer.from_json_str(file.read())
    options = {"add_special_tokens": False, "split_special_tokens": True}
    seconds = peers.best(lambda: [encoder.encode_batch_flat(part, **options) for part in batches(texts)])

    def rows() -> Iterable[np.ndarray]:
        for part in batches(texts):
            ids, offsets = encoder.encode_batch_flat(part, **options)
            yield from np.split(np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<u8")[1:-1].astype(np.int64))

    return seconds, digest(rows())


def stage(texts: list[str], path: str, workers: int) -> tuple[float, str]:
    spec = tokenise.check_fastokens(tokenise.resolve(path), texts[:200])
    names, rounds = [f"part-{k}" for k in range(workers)], count()
    with tempfile.TemporaryDirectory() as root, get_context("spawn").Pool(workers) as pool:
        run = RunFolder(root)
        for k, name in enumerate(names):
            own = texts[k::workers]
            ids = pa.array([f"{k}" for k in range(len(own))])
            documents = pa.table({"id": ids, "text": pa.array(own, pa.large_string())})
            run.commit_table(f"{DOCUMENTS}/{name}.parquet", documents)
            run.commit_table(f"{DEDUP}/{name}.parquet", pa.table({"id": ids, "kept": pa.array([True] * len(own))}))

        def once() -> None:
            chain = str(next(rounds))  # else the parts would be there already
            pool.map(steps.tokenise_part, [steps.TokenItem(run, name, chain, spec) for name in names], chunksize=1)

        once()  # loads the tokenizer
        seconds = peers.best(once)
        rows: list[Any] = [None] * len(texts)
        for k, name in enumerate(names):
            ids = np.fromfile(run.path(TOKENS, f"{name}.bin"), spec.dtype)
            lengths = run.read(f"{TOKENS}/{name}.parquet")["num_tokens"].to_numpy()
            rows[k::workers] = [row[:-1] for row in np.split(ids, np.cumsum(lengths)[:-1])]
    return seconds, digest(rows)


def batches(texts: list[str]) -> Iterable[list[str]]:
    return (texts[k : k + BATCH] for k in range(0, len(texts), BATCH))


def main(library: str, source: str, tokenizer: str, workers: str) -> None:
    with open(source) as file:
        texts = json.load(file)
    libraries = {"tokenizers": tokenizers, "fastokens": fastokens}
    if library == "stage":
        seconds, ids = stage(texts, tokenizer, int(workers))
    else:
        seconds, ids = libraries[library](texts, tokenizer)
    print(json.dumps({"seconds": seconds, "ids": ids}))


if __name__ == "__main__":
    main(*sys.argv[1:])
