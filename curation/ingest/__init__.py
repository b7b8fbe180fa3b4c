"""Files anywhere -> DOCUMENT rows and quarantine rows.

    plan(inputs, ingest)  driver: paths and globs -> Splits, the units that are read apart
    chunks(split)         a task: a Split -> Chunks, the units that are parsed apart and become parts
    parse(chunk)          a task: a Chunk -> Parsed: documents, rejects, counts

One module a format (`jsonl`, `parquet`, `warc`, `text`), each with `cut` and `parse`; the rules
that all formats share are in `rows`. How a file is cut is a function of that file and of the
recipe's `ingest` section, never of workers, so a run has the same parts wherever it runs. What
cannot be read is quarantined with file, position and reason, and the run goes on; only what
nobody could mean (a path with nothing behind it, a name that says no format) stops a run, and
before it starts.
"""

from curation.ingest.parts import Chunk, chunks, parse
from curation.ingest.rows import Parsed
from curation.ingest.splits import Split, plan

STAGE_VERSION = 1  # raise by hand when the same input gives other rows

__all__ = ["STAGE_VERSION", "Chunk", "Parsed", "Split", "chunks", "parse", "plan"]
