"""The detector and the tokenizer trainer over documents without a run: one process, one part at a time."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from curation import detect, ingest, storage
from curation.recipe import Detect, Ingest, Input
from curation.schema import LABEL


def _documents(paths: Sequence[str], text_key: str, id_key: str | None) -> Iterator[ingest.Parsed]:
    inputs = [Input(path=path, source=f"input{k}", text_key=text_key, id_key=id_key) for k, path in enumerate(paths)]
    for split in ingest.plan(inputs, Ingest()):
        for chunk in ingest.chunks(split):
            yield ingest.parse(chunk)


def texts(paths: Sequence[str], text_key: str = "text") -> Iterator[str]:
    """The text of every readable document, in the order of files and positions."""
    for parsed in _documents(paths, text_key, None):
        yield from parsed.documents["text"].to_pylist()


def predict(paths: Sequence[str], output: str, section: Detect, *, text_key: str, id_key: str) -> dict[str, int]:
    """Write schema.LABEL with `source_id`, `file` and `position` for every readable document of `paths` as
    Parquet. Returns counts: documents, discourse, blocklist, rejects."""
    schema = pa.schema([pa.field("source_id", pa.string()), pa.field("file", pa.string()),
                        pa.field("position", pa.int64()), *LABEL])  # fmt: skip
    counts = {"documents": 0, "discourse": 0, "blocklist": 0, "rejects": 0}

    def write(handle: object) -> None:
        with pq.ParquetWriter(handle, schema, compression="zstd") as writer:
            for parsed in _documents(paths, text_key, id_key):
                labels = detect.label_table(parsed.documents, section)
                places = parsed.documents.select(["source_id", "file", "position"])
                for name in places.column_names[::-1]:
                    labels = labels.add_column(0, name, places[name])
                writer.write_table(labels.cast(schema))
                counts["documents"] += labels.num_rows
                counts["discourse"] += sum(labels["discourse"].to_pylist())
                counts["blocklist"] += sum(labels["blocklist"].to_pylist())
                counts["rejects"] += parsed.rejects.num_rows

    storage.commit(output, write)
    return counts
