"""The names that the barrier's tasks share: their items, and their folders under 30_dedup/work.

A row is known by its node, part << 32 | row: two records of a file that claim the same id have
the same `id`. Nothing that a user sees depends on nodes. Parts of earlier runs have the numbers
after those of this run's own; their rows are not `fresh`.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import polars as pl

from curation.manifest import DEDUP, RunFolder
from curation.recipe import Dedup

WORK = f"{DEDUP}/work"
ROWS = f"{WORK}/rows"  # one file a part: what the later rounds need of each document, row-aligned
SOURCE_IDS, TEXTS, BANDS = f"{WORK}/source_ids", f"{WORK}/texts", f"{WORK}/bands"  # parts -> partitions
REJECTED, EXACT, NEAR = f"{WORK}/rejected", f"{WORK}/exact", f"{WORK}/near"  # partitions -> parts
BINS = f"{WORK}/bins"  # parts -> bins
LINKS, STARS, COMPONENTS = f"{WORK}/links", f"{WORK}/stars", f"{WORK}/components"  # see components

ROW_BITS = 32
# Who is kept, most wanted first, before all what an earlier run kept; `order` holds whether it is
# discourse and the recipe's `keep` up to `id`.
PREFERENCE = ["fresh", "order", "id", "position", "source_rank", "node"]

Removed = Counter[tuple[str, str]]  # documents by ("source", name) and ("stance", name)


@dataclass(frozen=True)
class Sizes:
    """How much one task takes on; results do not depend on it."""

    rows: int = 2_000_000  # rows of a partition
    documents: int = 20_000  # documents of a bin, with texts, signatures and shingle hashes: 2.5 times their text
    links: int = 8_000_000  # of all partitions, whose components are found in one place


@dataclass(frozen=True)
class Work:
    """What every task of one barrier knows."""

    run: RunFolder
    section: Dedup
    chain: str
    num_parts: int
    num_partitions: int  # of SOURCE_IDS and TEXTS
    num_band_partitions: int


@dataclass(frozen=True)
class PartTask:
    """One part of 10_documents; `index` is its place among the sorted names. `earlier`: of that run, not of this."""

    work: Work
    index: int
    name: str
    num_rows: int
    earlier: RunFolder | None = None

    @property
    def run(self) -> RunFolder:
        """Where the part's documents and signatures are."""
        return self.earlier or self.work.run

    @property
    def rows(self) -> str:
        return f"{ROWS}/{self.index:06d}.arrow"


@dataclass(frozen=True)
class PartitionTask:
    """One destination of a shuffle."""

    work: Work
    index: int


def tally(frame: pl.DataFrame) -> Removed:
    """How many rows of `frame` each source and each stance has."""
    counts: Removed = Counter()
    for kind in ("source", "stance"):
        groups = frame.filter(pl.col(kind).is_not_null()).group_by(kind).len()
        counts.update({(kind, name): n for name, n in groups.iter_rows()})
    return counts


def part_of(nodes: pl.Series) -> np.ndarray:
    """The index of the part that each node is in."""
    return (nodes.to_numpy() >> np.uint64(ROW_BITS)).astype(np.int64)


def row_of(nodes: pl.Series) -> np.ndarray:
    """The row that each node is in its part."""
    return (nodes.to_numpy() & np.uint64((1 << ROW_BITS) - 1)).astype(np.int64)
