"""Raw text -> MinHash signatures (128 values, shingles of five words): ours and peers, one core and all.

    python -m benchmarks.minhash [--megabytes N] [--json]

The same texts from all over ../shared/corpus for all, and the same texts with Cyrillic letters for Latin ones, so
that no character is ASCII. The fastest of up to five rounds; the first call of each, which loads and compiles, is
not among them. `error` is the root mean square of estimated less true Jaccard over pairs of versions of one document
(../shared/neardup), whose words come normalised, so that all mean the same shingles; `expected` is what 128 perfect
permutations give.
"""

import argparse
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks import corpus, peers
from benchmarks.truth import NGRAM, Truth
from curation import overlap

NUM_PERM, WORKERS = 128, 2
LIBRARIES = {  # name: environment
    "datasketch": "minhash",
    "datasketch_affine32": "minhash",
    "rensa": "minhash",
    "daft": "minhash",
    "daft_normalised": "minhash",
    "datatrove": "datatrove",
    "datatrove_split": "datatrove",
}
SLOW = ("datatrove", "datatrove_split")  # one core and Latin letters are enough
WANTED = {"daft": 4, "rensa": 13, "datasketch": 50, "datasketch_affine32": 50}
CYRILLIC = str.maketrans(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", "абцдефгхийклмнопярстувщыжзАБЦДЕФГХИЙКЛМНОПЯРСТУВЩЫЖЗ"
)


def ours(texts: list[str], cores: int) -> float:
    """Seconds for all texts, in `cores` threads: the kernels run without the GIL."""
    hasher = overlap.MinHasher(NUM_PERM, NGRAM)
    arrays = [pa.array(texts[k::cores], pa.large_string()) for k in range(cores)]
    hasher.signatures(arrays[0][:8])
    with ThreadPoolExecutor(cores) as pool:
        return peers.best(lambda: list(pool.map(hasher.signatures, arrays)))


def versions() -> tuple[list[str], np.ndarray, np.ndarray]:
    """Normalised texts of ../shared/neardup, neighbours (int64[n, 2]) and their Jaccard of 0.2 and more."""
    rows, _ = corpus.near_duplicates()
    folded = overlap.words(pa.array([row["text"] for row in rows], pa.large_string()))
    raw = bytes(folded.data)
    texts = [raw[a:b].decode() for a, b in zip(folded.offsets[:-1], folded.offsets[1:], strict=True)]
    pairs = np.stack([np.arange(len(texts) - 1), np.arange(1, len(texts))], axis=1)
    jaccard = Truth([str(k) for k in range(len(texts))], texts).similarity(pairs)
    wanted = (jaccard >= 0.2) & (jaccard < 1)
    return texts, pairs[wanted], jaccard[wanted]


def error(signatures: np.ndarray, pairs: np.ndarray, jaccard: np.ndarray) -> dict[str, float]:
    estimate = (signatures[pairs[:, 0]] == signatures[pairs[:, 1]]).mean(axis=1)
    return {"error": _round(np.sqrt(np.mean((estimate - jaccard) ** 2))), "bias": _round(np.mean(estimate - jaccard))}


def _round(value: float) -> float:
    return round(float(value), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    latin = corpus.sample(options.megabytes)
    inputs = {"latin": latin, "cyrillic": [text.translate(CYRILLIC) for text in latin]}
    named, pairs, jaccard = versions()
    speed: dict[str, dict[str, float]] = {}
    accuracy = {"tilth": error(overlap.MinHasher(NUM_PERM, NGRAM).signatures(pa.array(named)), pairs, jaccard)}
    accuracy["expected"] = {"error": _round(np.sqrt(np.mean(jaccard * (1 - jaccard) / NUM_PERM))), "bias": 0.0}
    unavailable: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        out, files = Path(folder, "signatures.npy"), {**inputs, "versions": named}
        for name, texts in files.items():
            Path(folder, f"{name}.json").write_text(json.dumps(texts))
        for name, texts in inputs.items():
            size = sum(len(text.encode()) for text in texts) / 1e6
            for cores in (1, WORKERS):
                row = speed[f"{name}, {cores}"] = {}
                peers.say(f"{name}, {cores} cores")
                with peers.on_cores(cores):
                    row["tilth"] = round(size / ours(texts, cores), 2)
                    for library, environment in LIBRARIES.items():
                        if library in unavailable or (library in SLOW and (name, cores) != ("latin", 1)):
                            continue
                        try:
                            arguments = (library, Path(folder, f"{name}.json"), out, cores)
                            found = peers.run(environment, "peer_minhash.py", *arguments)
                        except peers.Unavailable as problem:
                            unavailable[library] = str(problem)
                            continue
                        row[library] = round(size / found["seconds"], 2)
        for library in LIBRARIES:
            if library not in unavailable:
                peers.run(LIBRARIES[library], "peer_minhash.py", library, Path(folder, "versions.json"), out, 1)
                accuracy[library] = error(np.load(out), pairs, jaccard)
    result: dict[str, Any] = {
        "megabytes": options.megabytes,
        "mb_per_second": speed,
        "accuracy": accuracy,
        "pairs": len(pairs),
        "unavailable": unavailable,
    }
    result["claims"] = [
        peers.claim(
            f"signatures, one core, {what}: {peer}",
            f"{row['tilth']} MB/s",
            f"{row[peer]} MB/s",
            row["tilth"] / row[peer],
            least,
        )
        for what, row, wanted in (
            ("raw text", speed["latin, 1"], WANTED),
            ("no ASCII", speed["cyrillic, 1"], {"daft": 2}),
        )
        for peer, least in wanted.items()
        if peer in row
    ]
    peers.show(result, options.json)


if __name__ == "__main__":
    main()
