"""Raw text -> signatures of 128 values over shingles of five words, by one library (in its own environment).

    peer_minhash.py LIBRARY TEXTS OUT WORKERS

TEXTS is a JSON list; with one worker, OUT gets the signatures as a .npy file. Words are what stands between
white space, but for datatrove, which has a normalisation of its own. Libraries without threads of their own are run
in WORKERS processes.
"""

import json
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context

import numpy as np

NUM_PERM, NGRAM, ROUNDS, LEAST_S = 128, 5, 5, 3.0


def shingles(text: str) -> list[str]:
    words = text.split()
    return list(map(" ".join, zip(*(words[k:] for k in range(NGRAM)))))  # noqa: B905 - the tails are shorter


def datasketch(texts: list[str], **settings: object) -> np.ndarray:
    """In batches, with what it has by default."""
    from datasketch import MinHash

    rows = ([shingle.encode() for shingle in shingles(text)] for text in texts)
    return np.stack([sketch.hashvalues for sketch in MinHash.generator(rows, num_perm=NUM_PERM, **settings)])


def datasketch_affine32(texts: list[str]) -> np.ndarray:
    """Its fastest scheme, with a faster hash."""
    import xxhash

    return datasketch(texts, hashfunc=xxhash.xxh32_intdigest, scheme="affine32")


def rensa(texts: list[str]) -> np.ndarray:
    from rensa import RMinHash

    step, rows = 1000, []
    for k in range(0, len(texts), step):
        sets = [shingles(text) for text in texts[k : k + step]]
        rows += RMinHash.digest_matrix_from_token_sets(sets, NUM_PERM, 42).to_rows()
    return np.array(rows, np.uint32)


def daft(texts: list[str], normalised: bool = False) -> np.ndarray:
    import daft
    import pyarrow as pa
    from daft.functions import minhash, normalize

    frame = daft.from_arrow(pa.table({"text": pa.array(texts, pa.large_string())}))
    text = daft.col("text")
    if normalised:
        text = normalize(text, remove_punct=True, lowercase=True, nfd_unicode=True, white_space=True)
    signature = minhash(text, num_hashes=NUM_PERM, ngram_size=NGRAM, hash_function="xxhash")
    found = frame.select(signature.alias("signature")).to_arrow()["signature"].combine_chunks()
    return found.flatten().to_numpy().reshape(-1, NUM_PERM)


def daft_normalised(texts: list[str]) -> np.ndarray:
    return daft(texts, normalised=True)


def datatrove(texts: list[str], language: object = "eng") -> np.ndarray:
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig

    config = MinhashConfig(n_grams=NGRAM, num_buckets=16, hashes_per_bucket=8)
    step = MinhashDedupSignature("/tmp", config, language=language)
    rows = np.full((len(texts), NUM_PERM), 2**64 - 1, np.uint64)
    for k, text in enumerate(texts):
        found = step.get_shingles(text)
        if found.size:
            rows[k] = np.concatenate(step.get_signature(found))
    return rows


def datatrove_split(texts: list[str]) -> np.ndarray:
    from benchmarks.peer_datatrove import Split

    return datatrove(texts, Split())


LIBRARIES: dict[str, Callable[[list[str]], np.ndarray]] = {
    one.__name__: one
    for one in (datasketch, datasketch_affine32, rensa, daft, daft_normalised, datatrove, datatrove_split)
}
OWN_THREADS = ("daft", "daft_normalised")


def main(library: str, source: str, out: str, workers: str) -> None:
    with open(source) as file:
        texts = json.load(file)
    sign, count = LIBRARIES[library], int(workers)
    pool = get_context("spawn").Pool(count) if count > 1 and library not in OWN_THREADS else None
    pieces = [texts[k::count] for k in range(count)]
    sign(texts[:8])  # the first call loads what it needs
    if pool:
        pool.map(sign, [texts[:8]] * count * 4, chunksize=1)
    seconds: list[float] = []
    while len(seconds) < ROUNDS and sum(seconds) < LEAST_S:
        started = time.perf_counter()
        signed = pool.map(sign, pieces, chunksize=1) if pool else sign(texts)
        seconds.append(time.perf_counter() - started)
    if count == 1:
        np.save(out, signed)
    print(json.dumps({"seconds": min(seconds)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
