"""Ours as the peers are run: read -> clusters, without the stages that they do not have (benchmarks.dedup).

    peer_tilth.py INPUT OUT WORKERS

Ingest, signatures and dedup of `tilth curate`, on its engine, with every file that it writes.
"""

import json
import os
import sys
import tempfile
import time
from itertools import pairwise

import pyarrow as pa

from curation import dedup, ingest, steps
from curation.engine import session
from curation.manifest import DEDUP, DETECT, DOCUMENTS, SIGNATURES, RunFolder
from curation.recipe import Dedup, Detect, Ingest, Input
from curation.schema import LABEL

SECTION = Dedup(alarm_fraction=1)


def unknown_labels(num_rows: int) -> pa.Table:
    """LABEL rows that say that nothing is known."""
    unknown = {pa.float32(): 0.0, pa.bool_(): False, pa.string(): ""}
    columns = [pa.array([unknown.get(field.type, [])] * num_rows, field.type) for field in LABEL]
    return pa.table(columns, schema=LABEL)


def sign_part(work: steps.Work) -> str:
    """Ingest and sign one part; a label of every document says that nothing is known of it."""
    run, name = work.reading.run, work.name
    documents = ingest.parse(work.chunk).documents
    labels = unknown_labels(documents.num_rows)
    run.commit_table(f"{DOCUMENTS}/{name}.parquet", documents)
    run.commit_table(f"{DETECT}/{name}.parquet", labels)
    run.commit_table(f"{SIGNATURES}/{name}.parquet", dedup.signature_table(documents, labels, SECTION))
    return name


def main(source: str, out: str, workers: str) -> None:
    splits = ingest.plan((Input(path=source, source="bench"),), Ingest())
    with tempfile.TemporaryDirectory() as root, session(int(workers), None, root) as engine:
        run = RunFolder(root)
        chains = steps.Chains("ingest", "detect", "signatures")
        readings = [steps.Reading(run, split, chains, Detect(), SECTION) for split in splits]
        engine.start()
        laps = [time.time()]
        names = list(engine.fan_out(steps.read_split, sign_part, readings, [s.end - s.start for s in splits], "sign"))
        laps.append(time.time())
        dedup.cluster(run, names, SECTION, "bench", engine.map)
        laps.append(time.time())
        seconds = time.time() - float(os.environ["BENCH_STARTED"])
        documents = pa.concat_tables([run.read(f"{DOCUMENTS}/{n}.parquet", ["id", "source_id"]) for n in names])
        clusters = pa.concat_tables([run.read(f"{DEDUP}/{n}.parquet", ["id", "cluster"]) for n in names])
    own = dict(zip(documents["id"].to_pylist(), documents["source_id"].to_pylist(), strict=True))
    pairs = zip(clusters["id"].to_pylist(), clusters["cluster"].to_pylist(), strict=True)
    with open(out, "w") as file:
        json.dump({own[one]: own[kept] for one, kept in pairs if one != kept}, file)
    read, clustered = (round(b - a, 2) for a, b in pairwise(laps))
    found = {"start_ray": engine.start_seconds, "read_and_sign": read, "cluster": clustered}
    print(json.dumps({"documents": len(own), "seconds": seconds, **found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
