"""Text -> token ids: `tokenizers`, `fastokens` and our stage, one core and all, with the ids compared.

    python -m benchmarks.tokenise [--megabytes N] [--json]

A byte-level BPE of 16,384 ids trained on the corpus. The libraries encode lists of texts in memory, 1,000 at a time,
each in a process of its own; the stage also reads and writes its files, as inside `tilth curate`. The fastest of up
to five rounds.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import corpus, peers

WORKERS = 2
LIBRARIES = ("tokenizers", "fastokens", "stage")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=16)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    texts = corpus.sample(options.megabytes)
    size = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = corpus.tokenizer()
    speed: dict[str, dict[str, float]] = {}
    ids = set()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "texts.json")
        source.write_text(json.dumps(texts))
        for cores in (1, WORKERS):
            row = speed[str(cores)] = {}
            for library in LIBRARIES:
                peers.say(f"{library}, {cores} cores")
                with peers.on_cores(cores):
                    found = peers.run("tilth", "peer_tokenise.py", library, source, tokenizer, cores)
                row[library] = round(size / found["seconds"], 2)
                ids.add(found["ids"])
    result: dict[str, Any] = {"megabytes": round(size, 1), "mb_per_second": speed, "same_ids": len(ids) == 1}
    result["claims"] = [
        peers.claim(
            f"tokenise, {cores} core{'s' * (cores != '1')}, same ids: {result['same_ids']}",
            f"{row['stage']} MB/s",
            f"encode_batch_fast {row['tokenizers']} MB/s",
            row["stage"] / row["tokenizers"] * result["same_ids"],
            20,
        )
        for cores, row in speed.items()
    ]
    peers.show(result, options.json)


if __name__ == "__main__":
    main()
