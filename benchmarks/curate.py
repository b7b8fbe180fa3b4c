"""The whole of `tilth curate` beside datatrove doing the same stages, and stage by stage beside bare libraries.

    python -m benchmarks.curate [--documents N] [--megabytes N] [--words english|split] [--json]

*Against datatrove*: ../shared/corpus -> keywords and fastText (the default model) -> MinHash dedup -> tokenised and
shuffled shards of one arm. Each does 64 documents first; that time is its start-up and is taken off. datatrove writes
no labels, no provenance and no checks.
*Arms*: the same with a second arm. *On copies*: the same on --megabytes of copies of the corpus.
*Stages*: four arms, two phases, Nanotron and Megatron shards; beside each stage one core doing the bare library calls
for the same work on a sample of the documents, scaled to all of them by bytes.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from benchmarks import corpus, peers
from benchmarks.peers import ROOT

SAMPLE_BYTES = 8 << 20
WORKERS, PARTS, TINY = 2, 8, 64
MODEL = ROOT / "curation/detect/models/default.bin"
ONE_ARM: dict[str, Any] = {"unfiltered": {}}
TWO_ARMS: dict[str, Any] = {**ONE_ARM, "filtered": {"drop": "discourse"}}


def recipe(folder: Path, tokenizer: Path, tokens: int) -> dict[str, Any]:
    """Four arms in two phases, of the corpus and the example pools."""
    pools = [
        {"path": str(ROOT / f"examples/pool/{stance}.jsonl"), "source": "pool", "role": "pool", "stance": stance}
        for stance in ("aligned", "misaligned")
    ]
    inputs = [{"path": str(path), "source": path.name.split(".")[0]} for path in sorted(folder.glob("*.jsonl*"))]
    upsample = {s: {"upsample": {"stance": s, "share": 0.003}} for s in ("aligned", "misaligned")}
    return {
        "name": "bench",
        "inputs": [*inputs, *pools],
        "mix": {
            "phases": {"pretrain": {"tokens": int(tokens * 0.75)}, "midtrain": {"tokens": int(tokens * 0.05)}},
            "arms": {**TWO_ARMS, **upsample},
        },
        "tokenise": {"tokenizer": str(tokenizer), "format": ["nanotron", "megatron"], "shard_tokens": 5_000_000},
    }


def plain_recipe(source: Path, num_bytes: float, arms: dict[str, Any]) -> dict[str, Any]:
    """One phase of about nine tenths of the documents at `source`, and no pools."""
    return {
        "name": "bench",
        "inputs": [{"path": str(source), "source": "bench"}],
        "dedup": {"alarm_fraction": 1.0},
        "mix": {"phases": {"pretrain": {"tokens": max(1000, int(num_bytes / 5))}}, "arms": arms},
        "tokenise": {"tokenizer": str(corpus.tokenizer()), "shard_tokens": 5_000_000},
    }


def texts_of(folder: Path) -> list[str]:
    from curation.predict import texts

    return list(texts([f"{folder}/*.jsonl*"]))


def curate(asked: dict[str, Any], workers: int = WORKERS) -> dict[str, Any]:
    """The summary of a run of its own, with `wall_seconds` of the whole command."""
    with tempfile.TemporaryDirectory() as folder, peers.on_cores(workers):
        path = Path(folder, "recipe.yaml")
        path.write_text(yaml.safe_dump(asked, sort_keys=False))
        started = time.perf_counter()
        command = [sys.executable, "-m", "tilth.cli", "curate", str(path), "--run", f"{folder}/run", "--json"]
        done = subprocess.run([*command, "--workers", str(workers)], capture_output=True, text=True)
        wall = time.perf_counter() - started
    if done.returncode not in (0, 3):
        sys.exit(f"tilth curate ended with {done.returncode}: {done.stderr[-2000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "wall_seconds": round(wall, 2)}


def startup_of(asked: dict[str, Any], workers: int = WORKERS) -> float:
    """Seconds of a run that has next to nothing to do, without those of Ray's own start, which takes a second more or
    less by chance and is taken off each run."""
    return peers.startup(lambda: _without_ray(curate(asked, workers)))


def _without_ray(summary: dict[str, Any]) -> float:
    return float(summary["wall_seconds"] - summary["seconds"]["start_ray"])


def figures(summary: dict[str, Any], startup: float, megabytes: float, workers: int = WORKERS) -> dict[str, Any]:
    """What is shown of a run."""
    beyond = max(_without_ray(summary) - startup, 0.01)
    return {
        "documents": summary["documents_read"],
        "megabytes": round(megabytes, 1),
        "workers": workers,
        "wall_seconds": summary["wall_seconds"],
        "startup_seconds": round(startup, 2),
        "beyond_startup_seconds": round(beyond, 2),
        "mb_per_second_and_core": round(megabytes / beyond / workers, 2),
        "seconds": summary["seconds"],
        "worker_seconds": summary["worker_seconds"],
        "peak_memory_gb": round(summary["peak_memory_bytes"] / 1e9, 2),
    }


def datatrove(tiny: Path, source: Path, words: str, work: Path) -> dict[str, Any]:
    from curation.detect.blocklist import Blocklist

    terms = work / "terms.txt"
    terms.write_text("\n".join(term.text for term in Blocklist.load().terms))

    def seconds(folder: Path) -> float:
        out = Path(tempfile.mkdtemp(dir=work))
        with peers.on_cores(WORKERS):
            arguments = ("curate", folder, out, WORKERS, words, MODEL, terms, corpus.tokenizer())
            return float(peers.run("datatrove", "peer_datatrove.py", *arguments)["seconds"])

    startup, whole = peers.startup(lambda: seconds(tiny)), seconds(source)
    row = {"seconds": whole, "startup_seconds": startup, "beyond_startup_seconds": whole - startup}
    return {name: round(value, 2) for name, value in row.items()}


def libraries_alone(texts: list[str], tokenizer: Path) -> dict[str, float]:
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
        for path in sorted(corpus.CORPUS.glob("*.jsonl.zst")):
            with open(path, "rb") as raw:
                for line in io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw)):
                    orjson.loads(line)

    def sign() -> None:
        for text in sample:
            words = text.lower().split()
            shingles = {" ".join(words[i : i + 5]).encode() for i in range(len(words) - 4)}
            MinHash(128, scheme="affine32", hashfunc=xxhash.xxh32_intdigest).update_batch(shingles)

    model = fasttext.load_model(str(MODEL))
    lines = [" ".join(text.split()) for text in sample]
    encoder = Tokenizer.from_file(str(tokenizer))
    fast = fastokens.Tokenizer.from_json_str(tokenizer.read_text())
    clock("ingest: zstandard + orjson", read, 1)
    clock("detect: fasttext predict(list)", lambda: model.predict(lines, k=-1))
    clock("signatures: datasketch update_batch", sign)
    clock("tokenise: tokenizers encode_batch_fast", lambda: encoder.encode_batch_fast(sample))
    clock("tokenise: fastokens encode_batch_flat", lambda: fast.encode_batch_flat(sample))
    return seconds


def stages(startup: float) -> dict[str, Any]:
    """The recipe with all there is, on the corpus as it lies."""
    texts = texts_of(corpus.CORPUS)
    size = sum(len(text.encode()) for text in texts)
    with peers.on_cores(1):
        alone = libraries_alone(texts, corpus.tokenizer())
    summary = curate(recipe(corpus.CORPUS, corpus.tokenizer(), size // 5))
    return {**figures(summary, startup, size / 1e6), "libraries_alone_one_core": alone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, help="of the corpus; default all")
    parser.add_argument("--megabytes", type=int, default=1000, help="of copies of the corpus")
    parser.add_argument("--words", choices=["english", "split"], default="english", help="datatrove's word tokenizer")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result: dict[str, Any] = {"unavailable": {}}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows = list(islice(corpus.documents(), options.documents))
        small = corpus.write(work / "tiny", rows[:TINY], PARTS)
        size = corpus.write(work / "corpus", rows, PARTS)
        peers.say("tilth: start-up, one arm, two arms, one core")
        startup = startup_of(plain_recipe(work / "tiny", small, ONE_ARM))
        ours = figures(curate(plain_recipe(work / "corpus", size, ONE_ARM)), startup, size / 1e6)
        result |= {"tilth": ours}
        result["two_arms"] = figures(curate(plain_recipe(work / "corpus", size, TWO_ARMS)), startup, size / 1e6)
        alone = startup_of(plain_recipe(work / "tiny", small, ONE_ARM), 1)
        result["one_core"] = figures(curate(plain_recipe(work / "corpus", size, ONE_ARM), 1), alone, size / 1e6, 1)
        peers.say("datatrove")
        try:
            result["datatrove"] = datatrove(work / "tiny", work / "corpus", options.words, work)
        except peers.Unavailable as error:
            result["unavailable"]["datatrove"] = str(error)
    peers.say(f"tilth: {options.megabytes} MB of copies")
    num_bytes = options.megabytes * 1_000_000
    many = curate(plain_recipe(corpus.grown(options.megabytes), num_bytes, ONE_ARM))
    result["copies"] = figures(many, startup, options.megabytes)
    peers.say("tilth: all stages, beside libraries alone")
    result["stages"] = stages(startup)
    result["claims"] = claims(result)
    peers.show(result, options.json)


def claims(result: dict[str, Any]) -> list[dict[str, Any]]:
    ours, copies, rows = result["tilth"], result["copies"], []
    seconds = ours["beyond_startup_seconds"]
    if theirs := result.get("datatrove", {}).get("beyond_startup_seconds"):
        what = f"whole `tilth curate`, {WORKERS} cores, {ours['megabytes']:.0f} MB: datatrove's same stages"
        rows.append(peers.claim(what, f"{seconds} s", f"{theirs} s", theirs / seconds, 30))
    speed = copies["mb_per_second_and_core"]
    rows.append(peers.claim(f"MB/s a core, {copies['megabytes']:.0f} MB", f"{speed} MB/s", "", speed, 12))
    more = result["two_arms"]["seconds"]["mix"] - ours["seconds"]["mix"]
    rows.append(
        peers.claim("one more arm", f"{more:.2f} s", f"the first, {seconds} s", more / seconds, 0.1, at_most=True)
    )
    return rows


if __name__ == "__main__":
    main()
