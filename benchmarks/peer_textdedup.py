"""text-dedup: read -> clusters, by its MinHash command (in its own environment).

peer_textdedup.py INPUT OUT WORKERS
"""

import json
import os
import pickle
import sys
import tempfile
import time
from pathlib import Path

from text_dedup import minhash


def main(source: str, out: str, workers: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        options = {
            "path": "json", "data_files": f"{source}/*.jsonl.zst", "split": "train", "cache_dir": f"{folder}/cache",
            "output": f"{folder}/out", "column": "text", "idx_column": "id", "num_proc": workers, "debug": None,
            "ngram": 5, "num_perm": 128, "b": 16, "r": 8, "hash_func": "xxh3", "hash_bits": 32,
        }  # fmt: skip
        arguments = [part for k, v in options.items() for part in (f"--{k}", v) if part is not None]
        minhash.main(list(map(str, arguments)), standalone_mode=False)
        seconds = time.time() - float(os.environ["BENCH_STARTED"])
        union = pickle.loads(Path(folder, "out/uf.pkl").read_bytes())  # written by itself just now
    removed = {one: head for one in list(union.parent) if (head := union.find(one)) != one}
    Path(out).write_text(json.dumps(removed))
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
