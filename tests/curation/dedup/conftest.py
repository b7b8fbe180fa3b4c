"""A run folder with documents, labels and signatures as the earlier stages leave them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import xxhash

from curation import dedup, schema, stage
from curation.dedup.work import Sizes
from curation.manifest import DEDUP, DETECT, DOCUMENTS, SIGNATURES, RunFolder
from curation.recipe import Dedup


def document(text: str, **given) -> dict:
    """A DOCUMENT row; `discourse` (default False) becomes its label. Give `source_id`."""
    row = {
        "text": text,
        "source": "web",
        "created": None,
        "metadata": None,
        "source_id": None,
        "file": "f.jsonl",
        "position": 0,
        "role": "background",
        "source_rank": 0,
        "given_stance": None,
        "discourse": False,
        **given,
    }
    name = row["source_id"] if row["source_id"] is not None else str(row["position"])
    row["id"] = xxhash.xxh3_128_hexdigest(f"{row['source']}\0{row['file']}\0{name}".encode())
    return row


def documents(texts: Sequence[str], **given) -> list[dict]:
    """One row for each text, named d0, d1, …"""
    return [document(text, source_id=f"d{i}", position=i, **given) for i, text in enumerate(texts)]


def _labels(rows: list[dict]) -> pa.Table:
    discourse = np.array([row["discourse"] for row in rows], bool)
    columns = {
        "id": [r["id"] for r in rows],
        "discourse": discourse,
        "blocklist": discourse,
        "hits": [[] for _ in rows],
    }
    columns["p_discourse"] = discourse.astype(np.float32)
    # No class reaches STUDENT_P: the stance is what the input gives, or none.
    columns |= {f"p_{s}": np.full(len(rows), 0.2, np.float32) for s in schema.STANCES}
    return pa.table([pa.array(columns[f.name], f.type) for f in schema.LABEL], schema=schema.LABEL)


@dataclass
class Clusters:
    """What `cluster` left: its Outcome and the rows of all parts, joined to their documents."""

    outcome: dedup.Outcome
    rows: pl.DataFrame
    run: RunFolder
    names: list[str] = field(default_factory=list)

    @property
    def how(self) -> dict[str, str]:
        """How each document ended, by source_id."""
        return dict(self.rows.select("source_id", "how").iter_rows())

    @property
    def groups(self) -> set[frozenset[str]]:
        """The source_ids of each cluster of several."""
        grouped = self.rows.group_by("cluster").agg("source_id").filter(pl.col("source_id").list.len() > 1)
        return {frozenset(ids) for ids in grouped["source_id"].to_list()}

    def kept_for(self, source_id: str) -> str:
        """The source_id of the document that is kept for this one."""
        cluster = self.rows.filter(pl.col("source_id") == source_id)["cluster"][0]
        return self.rows.filter((pl.col("id") == cluster) & pl.col("kept"))["source_id"][0]


@pytest.fixture
def run_dedup(tmp_path: Path):
    """Deduplicate parts, each a list of rows, in a new run folder (or again in `run`)."""
    numbers = iter(range(1000))

    def run_once(
        parts: dict[str, list[dict]] | list[dict],
        section: Dedup = Dedup(),  # noqa: B008
        sizes: Sizes = Sizes(),  # noqa: B008
        run: RunFolder | None = None,
        reverse: bool = False,
        earlier: Sequence[dedup.Earlier] = (),
    ) -> Clusters:
        parts = parts if isinstance(parts, dict) else {"p0": parts}
        run = run or RunFolder(str(tmp_path / f"run{next(numbers)}"))
        for name, rows in parts.items():
            columns = [[row[f.name] for row in rows] for f in schema.DOCUMENT]
            table = pa.table(
                [pa.array(c, f.type) for c, f in zip(columns, schema.DOCUMENT, strict=True)], schema=schema.DOCUMENT
            )
            labels = _labels(rows)
            run.commit_table(f"{DOCUMENTS}/{name}.parquet", table)
            run.commit_table(f"{DETECT}/{name}.parquet", labels)
            run.commit_table(f"{SIGNATURES}/{name}.parquet", dedup.signature_table(table, labels, section))
        names = sorted(parts, reverse=reverse)
        outcome = dedup.cluster(run, names, section, "chain", stage.serial, sizes, earlier)
        tables = []
        for name in names:
            rows = pl.from_arrow(run.read(f"{DEDUP}/{name}.parquet"))
            own = pl.from_arrow(
                run.read(f"{DOCUMENTS}/{name}.parquet", ["id", "source_id", "source", "file", "position"])
            )
            assert rows["id"].to_list() == own["id"].to_list()
            tables.append(rows.with_columns(own.drop("id")))
        return Clusters(outcome, pl.concat(tables), run, names)

    return run_once


@pytest.fixture(name="document")
def document_fixture():
    return document


@pytest.fixture(name="documents")
def documents_fixture():
    return documents
