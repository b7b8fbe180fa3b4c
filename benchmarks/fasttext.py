"""Folded fastText beside fasttext and fasttext-turbo on real documents: megabytes a second, and the largest difference.

    python -m benchmarks.fasttext [--corpus FOLDER] [--work FOLDER] [--rounds N] [--cores N] [--json]

The model (dim 100, bigrams, 2M buckets, softmax over the five stances as the default detector decides them, one epoch)
is trained on the documents and kept in --work. All three predict every label of every document, in turns, the best of
the rounds each; the peers are given Python lists, ours the Arrow array that a pipeline holds. On many cores the peers
fork (their predict holds the GIL), ours has threads. `ratio` is ours over fasttext's predict(list) on one core.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks import peers

ROOT = Path(__file__).resolve().parents[1]
MODEL = {"dim": 100, "wordNgrams": 2, "bucket": 2_000_000, "epoch": 1, "lr": 0.5, "loss": "softmax"}
SAMPLE_BYTES = 60_000_000
TURBO = ("fasttext-turbo", ["fasttext-turbo==0.1.0", "numpy", "pyarrow"])


def prepare(corpus: Path, work: Path) -> tuple[Path, Path]:
    """The model, and an Arrow file of documents from all over the corpus: made where they are not there."""
    model, texts = work / "model.bin", work / "texts.arrow"
    if model.exists() and texts.exists():
        return model, texts
    import fasttext

    from curation.detect.fasttext import Detector
    from curation.predict import texts as texts_of
    from curation.schema import STANCES

    work.mkdir(parents=True, exist_ok=True)
    found = list(texts_of([str(path) for path in sorted(corpus.glob("*.jsonl*"))]))
    stances = Detector.load().predict(pa.array(found, pa.large_string())).argmax(axis=1)
    documents = [(STANCES[stance], text) for stance, text in zip(stances, found, strict=True)]
    with (work / "lines.txt").open("w", encoding="utf-8") as file:
        for label, text in documents:
            file.write(f"__label__{label} {' '.join(text.replace('__label__', '').split())}\n")
    fasttext.train_supervised(str(work / "lines.txt"), verbose=0, **MODEL).save_model(str(model))
    (work / "lines.txt").unlink()
    step = -(-sum(len(text) for _, text in documents) // SAMPLE_BYTES)
    table = pa.table({"text": pa.array([text for _, text in documents[::step]], pa.large_string())})
    with pa.OSFile(str(texts), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return model, texts


def ours(model: Any, array: pa.Array, cores: int) -> float:
    """Seconds for all documents, in slices of a 16th for the threads."""
    step = -(-len(array) // 16)
    slices = [array.slice(first, step) for first in range(0, len(array), step)]
    started = time.perf_counter()
    if cores == 1:
        model.predict(array)
    else:
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(model.predict, slices))
    return time.perf_counter() - started


def measure(model: Path, texts: Path, rounds: int, cores: int) -> dict[str, Any]:
    from curation.detect import FoldedFastText

    with pa.memory_map(str(texts)) as file:
        array = pa.ipc.open_file(file).read_all()["text"].combine_chunks()
    megabytes = array.nbytes / 1e6
    started = time.perf_counter()
    folded = FoldedFastText.load(str(model))
    load_seconds = time.perf_counter() - started
    probability = folded.predict(array)

    interpreters: dict[str, Any] = {"fasttext": Path(sys.executable)}
    rows: dict[str, dict[str, Any]] = {"fasttext": {}, "fasttext-turbo": {}, "tilth": {}}
    try:
        interpreters["fasttext-turbo"] = peers.python(*TURBO)
    except peers.Unavailable as error:
        rows["fasttext-turbo"]["error"] = str(error)
    for count in sorted({1, cores}):
        best: dict[str, float] = {}
        with peers.on_cores(count):
            for _ in range(rounds):
                taken = {"tilth": min(ours(folded, array, count) for _ in range(2))}
                for name, interpreter in interpreters.items():
                    taken[name] = peer(interpreter, model, texts, texts.parent / f"{name}.npy", count)
                best = {name: min(seconds, best.get(name, seconds)) for name, seconds in taken.items()}
        for name, seconds in best.items():
            rows[name][f"mb_per_second_{count}_core{'s' * (count > 1)}"] = round(megabytes / seconds, 1)
    reference = np.load(texts.parent / "fasttext.npy")
    for name in interpreters:
        found = probability if name == "fasttext" else np.load(texts.parent / f"{name}.npy")
        rows["tilth" if name == "fasttext" else name]["max_difference"] = float(np.abs(found - reference).max())
    one = {name: row.get("mb_per_second_1_core") for name, row in rows.items()}
    turbo = one["fasttext-turbo"]
    what = "folded fastText, one core: predict(list), dim 100, bigrams, 2M buckets"
    worst = round(rows["tilth"]["max_difference"] / 1e-5, 3)
    speeds = [f"{one[name]} MB/s" for name in ("tilth", "fasttext")]
    return {
        "documents": len(array),
        "megabytes": round(megabytes, 1),
        "labels": len(folded.labels),
        "load_seconds": round(load_seconds, 1),
        **rows,
        "ratio_to_turbo": round(one["tilth"] / turbo, 1) if turbo else None,
        "claims": [
            peers.claim(what, *speeds, one["tilth"] / one["fasttext"], 15),
            peers.claim("its largest difference from fasttext, in 1e-5", worst, "", worst, 1, at_most=True),
        ],
    }


def peer(interpreter: Path, model: Path, texts: Path, out: Path, cores: int) -> float:
    script = ROOT / "benchmarks/peer_fasttext.py"
    command = [interpreter, "-P", script, model, texts, out, cores, 1]  # -P: its folder has this module, also fasttext
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True)
    return float(min(json.loads(done.stdout.splitlines()[-1])["seconds"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=ROOT.parent / "shared/corpus")
    parser.add_argument("--work", type=Path, default=peers.ENVIRONMENTS / "fasttext-model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.corpus.is_dir():
        sys.exit(f"no corpus at {options.corpus}: give --corpus a folder of .jsonl or .jsonl.zst files")
    result = measure(*prepare(options.corpus, options.work), options.rounds, options.cores)
    peers.show(result, options.json)


if __name__ == "__main__":
    main()
