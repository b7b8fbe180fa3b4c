"""datatrove: read -> clusters, and the stages of `tilth curate` that it has (in its own environment).

    peer_datatrove.py dedup  INPUT OUT WORKERS WORDS
    peer_datatrove.py curate INPUT OUT WORKERS WORDS MODEL TERMS TOKENIZER

Its four MinHash stages with a task a file. `curate`: fastText and keywords annotate documents on their way to the
signatures, and what the last stage keeps is tokenised, shuffled and merged. WORDS: `english` is its own word
tokenizer for English (spaCy's); `split` is str.split, which is faster than any that it has.
"""

import json
import os
import re
import struct
import sys
import tempfile
import time
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.readers import JsonlReader
from datatrove.utils.word_tokenizers import WordTokenizer

CONFIG = MinhashConfig(n_grams=5, num_buckets=16, hashes_per_bucket=8)


class Split(WordTokenizer):
    """Words as they stand between spaces; the text comes simplified."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError


class Keywords(PipelineStep):
    """Marks documents that match a pattern of terms."""

    type, name = "🔻 - FILTER", "keywords"

    def __init__(self, terms: list[str]):
        super().__init__()
        self.pattern = r"\b(?:" + "|".join(map(re.escape, terms)) + r")\b"

    def run(self, data, rank: int = 0, world_size: int = 1):
        pattern = re.compile(self.pattern, re.IGNORECASE)
        for document in data:
            document.metadata["keyword"] = pattern.search(document.text) is not None
            yield document


def main(task: str, source: str, out: str, workers: str, words: str, *curate: str) -> None:
    files = sorted(Path(source).iterdir())
    language = Split() if words == "split" else "eng"
    with tempfile.TemporaryDirectory() as folder:

        def execute(name: str, pipeline: list, tasks: int) -> None:
            logs = f"{folder}/logs/{name}"
            LocalPipelineExecutor(pipeline, tasks=tasks, workers=min(tasks, int(workers)), logging_dir=logs).run()

        def read() -> JsonlReader:
            return JsonlReader(source, doc_progress=False)

        annotate, tokenise = stages(out, *curate) if curate else ([], [])
        signatures, buckets, removed = f"{folder}/signatures", f"{folder}/buckets", f"{folder}/removed"
        signing = MinhashDedupSignature(signatures, CONFIG, language=language)
        execute("sign", [read(), *annotate, signing], len(files))
        execute("buckets", [MinhashDedupBuckets(signatures, buckets, config=CONFIG)], CONFIG.num_buckets)
        execute("cluster", [MinhashDedupCluster(buckets, removed, config=CONFIG, save_cluster_id=True)], 1)
        execute("filter", [read(), MinhashDedupFilter(removed), *tokenise], len(files))
        if curate:
            from datatrove.pipeline.tokens import DocumentTokenizerMerger

            merger = DocumentTokenizerMerger(f"{out}/shards", f"{out}/merged", save_filename="all", seed=0)
            execute("merge", [merger], 1)
        seconds = time.time() - float(os.environ["BENCH_STARTED"])
        if not curate:
            Path(out).write_text(json.dumps(clusters(files, removed)))
    print(json.dumps({"seconds": seconds}))


def stages(out: str, model: str, terms: str, tokenizer: str) -> tuple[list, list]:
    from datatrove.pipeline.filters import FastTextClassifierFilter
    from datatrove.pipeline.tokens import DocumentTokenizer

    # Annotates and keeps all; 0.10.1 fails on remove_labels=None, its default.
    detector = FastTextClassifierFilter(model, remove_labels=[], save_labels_in_metadata=True, newline_replacement=" ")
    writer = DocumentTokenizer(f"{out}/shards", tokenizer, eos_token="<|endoftext|>", seed=0)
    return [Keywords(Path(terms).read_text().splitlines()), detector], [writer]


def clusters(files: list[Path], folder: str) -> dict[str, str]:
    """The kept document of each that was removed, by id."""
    import zstandard

    members: dict[int, list[str]] = {}
    kept: dict[int, str] = {}
    for rank, path in enumerate(files):
        found, gone = (Path(folder, f"{rank:06d}.{kind}") for kind in ("clusters", "remove"))
        if not found.exists():
            continue
        with zstandard.open(path, "rt", encoding="utf-8") as lines:
            ids = [row["id"] for row in map(json.loads, lines) if row["text"]]  # it passes over empty texts
        removed = {place for (place,) in struct.iter_unpack("<I", gone.read_bytes())} if gone.exists() else set()
        for place, cluster in struct.iter_unpack("<2I", found.read_bytes()):
            if place in removed:
                members.setdefault(cluster, []).append(ids[place])
            else:
                kept[cluster] = ids[place]
    return {one: kept[cluster] for cluster, ones in members.items() for one in ones}


if __name__ == "__main__":
    main(*sys.argv[1:])
