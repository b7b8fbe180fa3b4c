"""Reading a file as a run does, in one process: plan, chunks, parse."""

import dataclasses
import pickle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pytest

from curation import ingest
from curation.ingest import Chunk, Split
from curation.recipe import Ingest, Input
from curation.schema import DOCUMENT, REJECT, REJECT_REASONS


class Reading(NamedTuple):
    """All that came out of an input, in file order."""

    documents: list[dict[str, Any]]
    rejects: list[dict[str, Any]]
    num_records: int
    num_bytes: int
    chunks: list[Chunk]

    @property
    def texts(self) -> list[str]:
        return [document["text"] for document in self.documents]

    @property
    def reasons(self) -> list[str]:
        return [reject["reason"] for reject in self.rejects]


def _is_plain(split: Split) -> bool:
    return split.format == "jsonl" and split.compression is None


def read_splits(splits: list[Split]) -> Reading:
    chunks = [chunk for split in splits for chunk in ingest.chunks(split)]
    # A chunk travels to another process before it is parsed.
    parsed = [ingest.parse(pickle.loads(pickle.dumps(chunk))) for chunk in chunks]
    for part in parsed:
        assert part.documents.schema.equals(DOCUMENT, check_metadata=True)
        assert part.rejects.schema.equals(REJECT, check_metadata=True)
        part.documents.validate(full=True)
        part.rejects.validate(full=True)
    documents = pa.concat_tables([part.documents for part in parsed]).to_pylist()
    rejects = pa.concat_tables([part.rejects for part in parsed]).to_pylist()
    assert {reject["reason"] for reject in rejects} <= set(REJECT_REASONS)
    return Reading(documents, rejects, sum(p.num_records for p in parsed), sum(p.num_bytes for p in parsed), chunks)


def byte_ranges(split: Split, step: int) -> Iterator[Split]:
    """A whole plain file cut every `step` bytes: smaller than a recipe can ask for."""
    for ordinal, start in enumerate(range(0, split.end, step)):
        end = min(start + step, split.end)
        whole = step >= split.end
        yield dataclasses.replace(split, ordinal=ordinal, start=start, end=end, is_whole_file=whole)


@pytest.fixture(scope="session")
def read() -> Callable[..., Reading]:
    """read(path, split_bytes=, only=, max_document_bytes=, max_document_mb=, **fields of Input) -> Reading"""

    def _read(
        path: object,
        split_bytes: int | None = None,
        only: int | None = None,
        max_document_bytes: int | None = None,
        max_document_mb: int = 64,
        **entry: Any,
    ) -> Reading:
        given = Input.model_validate({"path": str(path), "source": "web", **entry})
        splits = ingest.plan([given], Ingest(max_document_mb=max_document_mb))
        if max_document_bytes:
            splits = [dataclasses.replace(s, max_document_bytes=max_document_bytes) for s in splits]
        if split_bytes:
            small = [dataclasses.replace(s, split_bytes=split_bytes) for s in splits]
            splits = [r for s in small for r in (byte_ranges(s, split_bytes) if _is_plain(s) and s.end else [s])]
        return read_splits(splits if only is None else [splits[only]])

    return _read
