"""`tilth curate` on 1x, 3x and 10x documents, with one and two workers; memory for each document with an edge.

    python -m benchmarks.scaling [--megabytes N] [--edges N] [--json]

--megabytes is 10x. Start-up (64 documents) is taken off each time. *Memory for an edge*: dedup in one process over
documents that all have a near-copy, --edges of them and four times as many; the growth of the process's peak over
the documents more. What a task holds at a time is bounded (partitions, bins; here of TASK_ROWS), so what grows with the
documents is the driver's.
"""

import argparse
import resource
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks import corpus, peers
from benchmarks.curate import ONE_ARM, curate, figures, plain_recipe, startup_of

TIMES = (1, 3, 10)
WORKERS = (1, 2)
PART_DOCUMENTS = 50_000
TASK_ROWS = 100_000  # of a dedup task, so that even the smaller corpus has tasks that are full


def grow(megabytes: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        tiny = Path(folder, "tiny")
        size_bytes = corpus.write(tiny, islice(corpus.documents(), 64), 8)
        for workers in WORKERS:
            startup = startup_of(plain_recipe(tiny, size_bytes, ONE_ARM), workers)
            for times in TIMES:
                peers.say(f"{times}x, {workers} workers")
                size = megabytes * times // TIMES[-1]
                asked = plain_recipe(corpus.grown(size), size * 1e6, ONE_ARM)
                found[f"{times}x, {workers}"] = figures(curate(asked, workers), startup, size, workers)
    return found


def dedup_alone(num_documents: int) -> int:
    """Peak bytes of this process: `num_documents` texts of 20 words, each with a near-copy among them, by dedup."""
    import numpy as np
    import pyarrow as pa

    from benchmarks.peer_tilth import SECTION, unknown_labels
    from curation import dedup
    from curation.dedup.work import Sizes
    from curation.manifest import DETECT, DOCUMENTS, SIGNATURES, RunFolder
    from curation.schema import DOCUMENT
    from curation.stage import serial

    random = np.random.RandomState(0)
    with tempfile.TemporaryDirectory() as root:
        run, names = RunFolder(root), []
        for first in range(0, num_documents, PART_DOCUMENTS):
            count = min(PART_DOCUMENTS, num_documents - first)
            words = random.randint(0, 1 << 40, (count // 2, 20))
            texts = [" ".join(map(str, row)) for row in words.tolist()]
            texts += [f"{text} end" for text in texts]
            ids = [f"{first + k:032x}" for k in range(len(texts))]
            given = {"id": ids, "text": texts, "source_id": ids, "position": list(range(len(ids)))}
            fixed = {"source": "bench", "file": "f", "role": "background", "source_rank": 0}
            columns = [given.get(field.name, [fixed.get(field.name)] * len(ids)) for field in DOCUMENT]
            documents = pa.table(
                [pa.array(column, field.type) for column, field in zip(columns, DOCUMENT, strict=True)],
                schema=DOCUMENT,
            )
            labels, name = unknown_labels(len(ids)), f"bench-{first:09d}"
            run.commit_table(f"{DOCUMENTS}/{name}.parquet", documents)
            run.commit_table(f"{DETECT}/{name}.parquet", labels)
            run.commit_table(f"{SIGNATURES}/{name}.parquet", dedup.signature_table(documents, labels, SECTION))
            names.append(name)
        dedup.cluster(run, names, SECTION, "bench", serial, Sizes(rows=TASK_ROWS))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def edge_memory(num_edges: int) -> dict[str, float]:
    sizes = (num_edges, 4 * num_edges)
    peers.say(f"memory of dedup with {sizes[0]:,} and {sizes[1]:,} documents with an edge")
    few, many = (peers.run("tilth", "scaling.py", "--dedup-alone", size)["peak_bytes"] for size in sizes)
    return {
        "documents_with_an_edge": sizes[1],
        "peak_gb": round(many / 1e9, 3),
        "bytes_for_each": round(max(0, many - few) / (sizes[1] - sizes[0]), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--edges", type=int, default=300_000)
    parser.add_argument("--dedup-alone", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.dedup_alone:
        print(f'{{"peak_bytes": {dedup_alone(options.dedup_alone)}}}')
        return
    result: dict[str, Any] = {"runs": grow(options.megabytes), "edges": edge_memory(options.edges), "unavailable": {}}
    few, many = (result["runs"][f"{times}x, {WORKERS[-1]}"] for times in (TIMES[0], TIMES[-1]))
    alone = result["runs"][f"{TIMES[-1]}x, 1"]
    key = "beyond_startup_seconds"
    each = result["edges"]["bytes_for_each"]
    result["claims"] = [
        peers.claim(
            f"time of {TIMES[-1]}x documents",
            f"{many[key]} s",
            f"1x {few[key]} s",
            many[key] / few[key],
            10.5,
            at_most=True,
        ),
        peers.claim("bytes of memory for a document with an edge", f"{each} bytes", "", each, 64, at_most=True),
        peers.claim("two workers against one", f"{many[key]} s", f"{alone[key]} s", alone[key] / many[key], 1.7),
    ]
    peers.show(result, options.json)


if __name__ == "__main__":
    main()
