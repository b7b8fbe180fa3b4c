"""A fastText Python module, fasttext-community or fasttext-turbo, on the documents of an Arrow file: predict(list).

    python peer_fasttext.py MODEL TEXTS.arrow OUT.npy CORES ROUNDS

Writes float32[n, labels], labels as the model lists them, and prints the seconds of each round. The lists of texts
are made before the clock starts. On more than one core each process has every CORES-th of the documents: predict
holds the GIL, so threads would wait for each other.
"""

import json
import sys
import time
from multiprocessing import get_context
from typing import Any

import fasttext
import numpy as np
import pyarrow as pa

_state: dict[str, Any] = {}


def _start(model: str, texts: str, cores: int) -> None:
    with pa.memory_map(texts) as file:
        array = pa.ipc.open_file(file).read_all()["text"]
        _state["parts"] = [[t.replace("\n", " ") for t in array[k::cores].to_pylist()] for k in range(cores)]
    _state["model"] = fasttext.load_model(model)


def _predict(part: int) -> tuple[list[list[str]], list[np.ndarray]]:
    found: tuple[list[list[str]], list[np.ndarray]] = _state["model"].predict(_state["parts"][part], k=-1)
    return found


def _work(part: int) -> int:
    return len(_predict(part)[0])


def main() -> None:
    model, texts, out, cores, rounds = *sys.argv[1:4], *map(int, sys.argv[4:6])
    _start(model, texts, cores)
    seconds = []
    with get_context("fork").Pool(cores) as pool:  # the model's pages are shared
        for _ in range(rounds):
            started = time.perf_counter()
            if cores == 1:
                found = _predict(0)
            else:
                pool.map(_work, range(cores), chunksize=1)
            seconds.append(time.perf_counter() - started)
    if cores == 1:
        column = {label: c for c, label in enumerate(_state["model"].get_labels())}
        probability = np.zeros((len(found[0]), len(column)), np.float32)
        for row, (names, values) in enumerate(zip(*found, strict=True)):
            probability[row, [column[name] for name in names]] = values
        np.save(out, probability)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
