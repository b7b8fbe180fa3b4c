"""`tilth curate` on a corpus of real documents, stage by stage, beside what each stage's library alone needs.

    python -m benchmarks.curate [--corpus FOLDER] [--workers N] [--json]

The run: four arms, two phases, a 16k tokenizer trained on the corpus (before the clock starts), Nanotron and
Megatron shards. Beside each stage: one core doing the bare library calls for the same work on a sample of the
documents, scaled to all of them by bytes. Those calls write nothing, keep no ids and cannot resume.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_BYTES = 8 << 20


def recipe(corpus: Path, tokenizer: Path, tokens: int) -> dict[str, Any]:
    pools = [
        {"path": str(ROOT / f"examples/pool/{stance}.jsonl"), "source": "pool", "role": "pool", "stance": stance}
        for stance in ("aligned", "misaligned")
    ]
    inputs = [{"path": str(path), "source": path.name.split(".")[0]} for path in sorted(corpus.glob("*.jsonl*"))]
    upsample = {s: {"upsample": {"stance": s, "share": 0.003}} for s in ("aligned", "misaligned")}
    return {
        "name": "bench",
        "inputs": [*inputs, *pools],
        "mix": {
            "phases": {"pretrain": {"tokens": int(tokens * 0.75)}, "midtrain": {"tokens": int(tokens * 0.05)}},
            "arms": {"unfiltered": {}, "filtered": {"drop": "discourse"}, **upsample},
        },
        "tokenise": {"tokenizer": str(tokenizer), "format": ["nanotron", "megatron"], "shard_tokens": 5_000_000},
    }


def texts_of(corpus: Path) -> list[str]:
    from curation.predict import texts

    return list(texts([f"{corpus}/*.jsonl*"]))


def libraries_alone(corpus: Path, texts: list[str], tokenizer: Path) -> dict[str, float]:
    """Seconds on one core for all documents: reading measured whole, the rest on a sample, scaled by bytes."""
    import fastokens
    import fasttext
    import orjson
    import xxhash
    import zstandard
    from datasketch import MinHash
    from tokenizers import Tokenizer

    total, sample, size = sum(map(len, texts)), [], 0
    for text in texts[:: max(1, len(texts) // 4000)]:
        if size < SAMPLE_BYTES:
            sample.append(text)
            size += len(text)
    scale = total / size
    seconds = {}

    def clock(name: str, work: Any, factor: float = scale) -> None:
        started = time.perf_counter()
        work()
        seconds[name] = round((time.perf_counter() - started) * factor, 2)

    def read() -> None:
        for path in sorted(corpus.glob("*.jsonl.zst")):
            with open(path, "rb") as raw:
                for line in io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw)):
                    orjson.loads(line)

    def sign() -> None:
        for text in sample:
            words = text.lower().split()
            shingles = {" ".join(words[i : i + 5]).encode() for i in range(len(words) - 4)}
            MinHash(128, scheme="affine32", hashfunc=xxhash.xxh32_intdigest).update_batch(shingles)

    model = fasttext.load_model(str(ROOT / "curation/detect/models/default.bin"))
    lines = [" ".join(text.split()) for text in sample]
    encoder = Tokenizer.from_file(str(tokenizer))
    fast = fastokens.Tokenizer.from_json_str(tokenizer.read_text())
    clock("ingest: zstandard + orjson", read, 1)
    clock("detect: fasttext predict(list)", lambda: model.predict(lines, k=-1))
    clock("signatures: datasketch update_batch", sign)
    clock("tokenise: tokenizers encode_batch_fast", lambda: encoder.encode_batch_fast(sample))
    clock("tokenise: fastokens encode_batch_flat", lambda: fast.encode_batch_flat(sample))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=ROOT.parent / "shared/corpus")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.corpus.is_dir():
        sys.exit(f"no corpus at {options.corpus}: give --corpus a folder of .jsonl or .jsonl.zst files")
    from curation.tokenise import train

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        texts = texts_of(options.corpus)
        train(iter(texts[::10]), 16_384, str(work / "tokenizer.json"))
        size = sum(len(text) for text in texts)
        (work / "recipe.yaml").write_text(
            yaml.safe_dump(recipe(options.corpus, work / "tokenizer.json", size // 5), sort_keys=False)
        )
        started = time.perf_counter()
        arguments = ["curate", str(work / "recipe.yaml"), "--run", str(work / "run"), "--workers", str(options.workers)]
        done = subprocess.run(
            [sys.executable, "-m", "tilth.cli", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False
        )
        wall = time.perf_counter() - started
        if done.returncode not in (0, 3):
            sys.exit(f"tilth curate ended with {done.returncode}")
        summary = json.loads(done.stdout.splitlines()[-1])
        result = {
            "documents": summary["documents_read"],
            "megabytes": round(size / 1e6, 1),
            "wall_seconds": round(wall, 1),
            "seconds": summary["seconds"],
            "worker_seconds": summary["worker_seconds"],
            "peak_memory_gb": round(summary["peak_memory_bytes"] / 1e9, 2),
            "libraries_alone_one_core": libraries_alone(options.corpus, texts, work / "tokenizer.json"),
        }
    print(json.dumps(result) if options.json else yaml.safe_dump(result, sort_keys=False))


if __name__ == "__main__":
    main()
