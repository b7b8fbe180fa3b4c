"""Where the CPU seconds of `tilth curate` go: the whole run in one process, without Ray.

    OMP_NUM_THREADS=1 python -m benchmarks.profile_curate [--corpus FOLDER] [--functions N] [--json]

The recipe is that of benchmarks.curate. Every step runs where the engine would have sent it, one after the other, and
its CPU seconds (of all threads) are summed by name; what is left over is the driver's. `--functions N` adds the N
functions with the most CPU seconds of their own, by cProfile, which makes the whole 1.8 times slower.
"""

import argparse
import cProfile
import json
import pstats
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from benchmarks.curate import ROOT, recipe, texts_of
from curation import pipeline
from curation.engine import Engine
from curation.recipe import Recipe


class Here(Engine):
    """An Engine without Ray: everything in this process. `cpu_seconds` by step."""

    def __init__(self) -> None:
        super().__init__(1, None, "")
        self.cpu_seconds: Counter[str] = Counter()

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], label: str) -> Iterator[Any]:
        for item in items:
            yield self._clocked(label, function, item)

    def fan_out(
        self,
        expand: Callable[[Any], Iterator[Any]],
        function: Callable[[Any], Any],
        items: Sequence[Any],
        sizes: Sequence[int],
        label: str,
    ) -> Iterator[Any]:
        for item in items:
            values = expand(item)
            while (value := self._clocked("read", next, values, None)) is not None:
                yield self._clocked(label, function, value)

    def _clocked(self, label: str, function: Callable[..., Any], *arguments: Any) -> Any:
        started = time.process_time()
        try:
            return function(*arguments)
        finally:
            self.cpu_seconds[label] += time.process_time() - started


def run(recipe_path: Path, root: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """(summary, CPU seconds by step) of a run in this process."""
    engine = Here()
    with patch.object(pipeline, "session") as session:
        session.return_value.__enter__.return_value = engine
        # What a step says of its own stages is wall time; here nothing waits for another core.
        started = time.process_time()
        with patch("curation.steps.time.perf_counter", time.process_time):
            summary = pipeline.curate(Recipe.load(recipe_path), str(root))
        total = time.process_time() - started
    seconds = {**engine.cpu_seconds, "driver": total - engine.cpu_seconds.total(), "all": total}
    return summary, {step: round(value, 2) for step, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=ROOT.parent / "shared/corpus")
    parser.add_argument("--functions", type=int, default=0)
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
        del texts
        asked = recipe(options.corpus, work / "tokenizer.json", size // 5)
        (work / "recipe.yaml").write_text(yaml.safe_dump(asked, sort_keys=False))
        profile = cProfile.Profile(time.process_time)
        if options.functions:
            profile.enable()
        summary, seconds = run(work / "recipe.yaml", work / "run")
        profile.disable()
    result = {"megabytes": round(size / 1e6, 1), "cpu_seconds": seconds, "of_each_stage": summary["worker_seconds"]}
    print(json.dumps(result) if options.json else yaml.safe_dump(result, sort_keys=False))
    if options.functions:
        pstats.Stats(profile).sort_stats("tottime").print_stats(options.functions)


if __name__ == "__main__":
    main()
