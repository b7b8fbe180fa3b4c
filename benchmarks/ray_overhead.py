"""What Ray costs: `tilth curate` on Ray Data beside the same steps in a plain pool of two processes.

    python -m benchmarks.ray_overhead [--megabytes N] [--json]

Same steps, files, recipe and driver; in the pool a split is read and worked on by one process, and chunks go through
no object store. Start-up (64 documents) is taken off both. `work_seconds` is what the steps themselves took, summed
over workers.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks import corpus, peers
from benchmarks.curate import ONE_ARM, plain_recipe
from curation import pipeline
from curation.engine import Engine
from curation.recipe import Recipe

WORKERS = 2


def expand_and_work(item: Any, expand: Callable[[Any], Iterator[Any]], function: Callable[[Any], Any]) -> list[Any]:
    return [function(value) for value in expand(item)]


class Pool(Engine):
    """An Engine without Ray."""

    def __init__(self, processes: ProcessPoolExecutor):
        super().__init__(WORKERS, None, "")
        self._processes = processes

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], label: str) -> Iterator[Any]:
        for future in as_completed([self._processes.submit(function, item) for item in items]):
            yield future.result()

    def fan_out(
        self,
        expand: Callable[[Any], Iterator[Any]],
        function: Callable[[Any], Any],
        items: Sequence[Any],
        sizes: Sequence[int],
        label: str,
    ) -> Iterator[Any]:
        for results in self.map(partial(expand_and_work, expand=expand, function=function), items, label):
            yield from results


def one(how: str, source: Path, num_bytes: float) -> dict[str, Any]:
    """A run in this process, and its seconds since the process was asked for."""
    recipe = Recipe.model_validate(plain_recipe(source, num_bytes, ONE_ARM))
    with tempfile.TemporaryDirectory() as root:
        if how == "ray":
            summary = pipeline.curate(recipe, root, workers=WORKERS)
        else:
            with ProcessPoolExecutor(WORKERS, get_context("spawn")) as processes:
                engine = nullcontext(Pool(processes))
                with patch.object(pipeline, "session", lambda *_: engine):
                    summary = pipeline.curate(recipe, root, workers=WORKERS)
        seconds = time.time() - float(os.environ["BENCH_STARTED"])
    work = sum(summary["worker_seconds"].values())
    return {"seconds": round(seconds, 2), "work_seconds": round(work, 2), "stages": summary["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.one:
        how, source, num_bytes = options.one
        print(json.dumps(one(how, Path(source), float(num_bytes))))
        return
    source, num_bytes = corpus.grown(options.megabytes), options.megabytes * 1e6
    result: dict[str, Any] = {"megabytes": options.megabytes, "unavailable": {}}
    with tempfile.TemporaryDirectory() as folder:
        tiny = Path(folder, "tiny")
        small = corpus.write(tiny, islice(corpus.documents(), 64), 8)
        for how in ("pool", "ray"):
            peers.say(f"{how}: {options.megabytes} MB")
            with peers.on_cores(WORKERS):
                job = partial(peers.run, "tilth", "ray_overhead.py", "--one", how)
                startup = peers.startup(lambda job=job: job(tiny, small)["seconds"])
                found = job(source, num_bytes)
            beyond = found["seconds"] - startup
            result[how] = {**found, "startup_seconds": round(startup, 2), "beyond_startup_seconds": round(beyond, 2)}
    ray, pool = (result[how]["beyond_startup_seconds"] for how in ("ray", "pool"))
    what = f"Ray Data against a pool, {result['pool']['work_seconds']:.0f} s of work"
    result["claims"] = [peers.claim(what, f"{ray} s", f"{pool} s", ray / pool, 1.1, at_most=True)]
    peers.show(result, options.json)


if __name__ == "__main__":
    main()
