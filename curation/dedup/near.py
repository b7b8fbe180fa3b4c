"""Near-duplicates: candidates from LSH buckets, then one pass of best-first leaders in each component.

1. A bucket (documents of one band key) links its members to one of them. The components of all
   links hold whatever can meet, so each is settled by itself, whole, by one task (a *bin* is as
   many components as a task takes on; see `components`).
2. In a component, documents come in order of preference. Each is compared with the leaders that
   it shares buckets with, or that a member of its buckets follows, best first; it follows the
   first that it is verified against, and leads itself when there is none.

So a removed document was itself verified against the kept one (there are no chains), a false
candidate costs a comparison and hides no pair, whoever is kept is preferred to all that follow,
and the outcome is a function of the documents alone. A bucket remembers MAX_LEADERS leaders, so
a bucket of thousands of different documents costs MAX_LEADERS comparisons for each of them, not
their square; documents that met a full bucket and found no leader are `crowded`, counted and warned of.

Verified: the share of equal signature values is at least `verify`; within RECHECK of it, and for
texts longer than a signature covers, the exact Jaccard similarity of the sets of shingles decides.
(With 128 values the estimate's standard error at .8 is .035: RECHECK is four of them.) Documents of
earlier runs come first and lead always; their texts are not read, so the estimate alone decides.
"""

from dataclasses import dataclass

import numba as nb
import numpy as np
import polars as pl
import pyarrow as pa

from curation import overlap, storage
from curation.dedup import bands, components, shuffle
from curation.dedup.work import (
    BANDS,
    BINS,
    EXACT,
    LINKS,
    NEAR,
    PREFERENCE,
    REJECTED,
    PartitionTask,
    PartTask,
    Removed,
    part_of,
    row_of,
    tally,
)
from curation.manifest import DOCUMENTS, SIGNATURES
from curation.recipe import Dedup

RECHECK = 0.15
MAX_LEADERS = 256


def link_buckets(task: PartitionTask) -> int:
    """Write the partition's links, (a, b) of uint64: in each bucket its smallest member and each other one.
    Members are texts (the low key of an exact group), so that copies count once. Returns how many."""
    rows = shuffle.read(task.work.run.path(BANDS), task.index)
    links = (
        rows.filter(pl.col("key").is_duplicated())
        .select(pl.col("entity").min().over("key").alias("a"), pl.col("entity").alias("b"))
        .filter(pl.col("a") != pl.col("b"))
        .unique()
    )
    storage.commit_ipc(task.work.run.path(LINKS, f"{task.index:06d}.arrow"), links.to_arrow())
    return len(links)


@dataclass(frozen=True)
class ShipTask:
    """A part whose candidates go to `num_bins` bins."""

    part: PartTask
    num_bins: int


def ship_part(task: ShipTask) -> None:
    """Send the part's documents that have candidates to their bins, with signatures and texts."""
    part, run = task.part, task.part.work.run
    columns = ["node", "key_lo", "banded", "id", "order", "position", "source_rank", "discourse", "source", "stance"]
    rows = pl.from_arrow(storage.read_ipc(run.path(part.rows)).select([*columns, "fresh", "salt", "num_shingles"]))
    assert isinstance(rows, pl.DataFrame)
    rows = rows.filter("banded")
    linked, component = components.find(part.work, rows["key_lo"].to_numpy())
    # Smallest members of components are small numbers, their low bits as good as any.
    bins = (component % np.uint64(task.num_bins)).astype(np.int64)
    candidates = rows.with_columns(bin=bins).filter(linked)
    if part.earlier is None:
        rejected = shuffle.read(run.path(REJECTED), part.index)
        exact = shuffle.read(run.path(EXACT), part.index)
        candidates = (
            candidates.join(rejected, on="node", how="anti", maintain_order="left")
            .join(exact.filter(~pl.col("leads")), on="node", how="anti", maintain_order="left")
            .join(exact.filter("leads").select("node", "members"), on="node", how="left", maintain_order="left")
        )
    else:
        candidates = candidates.with_columns(members=pl.lit(None, pl.List(pl.UInt64)))
    at = pa.array(row_of(candidates["node"]))
    signatures = part.run.read(f"{SIGNATURES}/{part.name}.parquet", ["signature"])["signature"].take(at)
    if part.earlier is None:
        texts = run.read(f"{DOCUMENTS}/{part.name}.parquet", ["text"])["text"].take(at)
    else:
        texts = pa.chunked_array([pa.repeat(pa.scalar("", pa.large_string()), len(candidates))])
    candidates = candidates.with_columns(
        text=pl.Series(pl.from_arrow(texts), dtype=pl.String),
        signature=pl.Series(pl.from_arrow(signatures), dtype=pl.List(pl.UInt32)),
    )
    destinations = candidates["bin"].to_numpy()
    shuffle.write(run.path(BINS), f"{part.index:06d}", candidates.drop("bin"), destinations, task.num_bins)


def settle_bin(task: PartitionTask) -> Removed:
    """Find the leaders of a bin's documents and send each removed document, and the copies that it
    led, to its part; crowded ones too. Returns how many leaders of exact groups were removed, of
    each kind (their copies were counted before)."""
    work = task.work
    rows = shuffle.read(work.run.path(BINS), task.index).sort(PREFERENCE)
    leader, similarity, crowded = find_leaders(rows, work.section)
    followed = rows.select("id", "discourse", "fresh")[leader]
    rows = rows.select("node", "members", "source", "stance", "fresh").with_columns(
        kept_id=followed["id"],
        kept_discourse=followed["discourse"],
        kept_earlier=~followed["fresh"],
        similarity=similarity,
        crowded=crowded,
    )
    follows = leader != np.arange(len(leader))
    removed = rows.filter(follows)
    copies = removed.drop("node").explode("members").filter(pl.col("members").is_not_null()).rename({"members": "node"})
    leads = np.isin(np.arange(len(leader)), leader[follows])
    alone = rows.with_columns(
        similarity=pl.lit(None, pl.Float32), kept_id=pl.when(pl.Series(leads)).then("kept_id")
    ).filter((leads | crowded) & rows["fresh"].to_numpy())
    columns = ["node", "kept_id", "kept_discourse", "kept_earlier", "similarity", "crowded"]
    sent = pl.concat([frame.select(columns) for frame in (removed, copies, alone)])
    shuffle.write(work.run.path(NEAR), f"{task.index:06d}", sent, part_of(sent["node"]), work.num_parts)
    return tally(removed)


def find_leaders(rows: pl.DataFrame, section: Dedup) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For documents in order of preference (columns text, signature, num_shingles, salt, fresh): the row
    that each follows (its own when it leads), float32 Jaccard to it, and whether it was crowded."""
    signatures = bands.matrix(pa.chunked_array([rows["signature"].to_arrow()]))
    keys = bands.keys(signatures, section.bands, section.rows, rows["salt"].to_numpy())
    buckets = np.unique(keys, return_inverse=True)[1].reshape(keys.shape).astype(np.int32)
    sets = overlap.shingle_sets(rows["text"].to_arrow(), section.ngram)
    partial = rows["num_shingles"].to_numpy() >= overlap.MAX_WORDS - section.ngram + 1
    leader, similarity = np.arange(len(rows)), np.ones(len(rows), np.float32)
    crowded, fresh = np.zeros(len(rows), bool), rows["fresh"].to_numpy()
    _find_leaders(buckets, signatures, *sets, partial, fresh, section.verify, leader, similarity, crowded)
    return leader, similarity, crowded


@nb.njit(nogil=True, cache=True)
def _find_leaders(
    buckets: np.ndarray,
    signatures: np.ndarray,
    hashes: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    partial: np.ndarray,
    fresh: np.ndarray,
    verify: float,
    leader: np.ndarray,
    similarity: np.ndarray,
    crowded: np.ndarray,
) -> None:
    num_docs, num_bands = buckets.shape
    num_buckets = buckets.max() + 1 if num_docs else 0
    # The leaders of a bucket are a linked list: first[bucket], then following[entry]; entry e is that of
    # document e // num_bands in its band e % num_bands.
    first = np.full(num_buckets, -1, np.int64)
    following = np.empty(num_docs * num_bands, np.int64)
    entry_leader = np.empty(num_docs * num_bands, np.int64)
    num_leaders = np.zeros(num_buckets, np.int32)
    seen_by = np.full(num_docs, -1, np.int64)
    candidates = np.empty(num_bands * MAX_LEADERS, np.int64)
    for doc in range(num_docs):
        count, full = 0, False
        for band in range(num_bands if fresh[doc] else 0):
            full |= num_leaders[buckets[doc, band]] == MAX_LEADERS
            entry = first[buckets[doc, band]]
            while entry >= 0:
                other = entry_leader[entry]
                if seen_by[other] != doc:
                    seen_by[other] = doc
                    candidates[count] = other
                    count += 1
                entry = following[entry]
        for k in range(count):
            other = candidates[k]
            if other < leader[doc]:
                jaccard = _verified(signatures, hashes, starts, ends, partial, fresh, verify, doc, other)
                if jaccard >= 0:
                    leader[doc], similarity[doc] = other, jaccard
        crowded[doc] = full and leader[doc] == doc
        for band in range(num_bands):
            bucket = buckets[doc, band]
            entry = first[bucket]
            while entry >= 0 and entry_leader[entry] != leader[doc]:
                entry = following[entry]
            if entry < 0 and num_leaders[bucket] < MAX_LEADERS:
                entry = doc * num_bands + band
                entry_leader[entry], following[entry], first[bucket] = leader[doc], first[bucket], entry
                num_leaders[bucket] += 1


@nb.njit(nogil=True, cache=True)
def _verified(
    signatures: np.ndarray,
    hashes: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    partial: np.ndarray,
    fresh: np.ndarray,
    verify: float,
    a: int,
    b: int,
) -> float:
    """The similarity of documents a, of this run, and b when it is at least `verify`, else -1."""
    equal = 0
    for k in range(signatures.shape[1]):
        equal += signatures[a, k] == signatures[b, k]
    jaccard = equal / signatures.shape[1]
    if not fresh[b]:  # of an earlier run: there is no text to compare
        return jaccard if jaccard >= verify and not partial[a] and not partial[b] else -1.0
    if partial[a] or partial[b] or abs(jaccard - verify) <= RECHECK:
        size_a, size_b = ends[a] - starts[a], ends[b] - starts[b]
        if min(size_a, size_b) < verify * max(size_a, size_b):
            return -1.0  # the smaller set cannot be that much of the union
        jaccard = overlap.sets_jaccard(hashes, starts, ends, a, b)
    return jaccard if jaccard >= verify else -1.0
