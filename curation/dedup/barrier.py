"""The barrier: all parts' signatures in, one CLUSTER table for each part out.

Seven rounds of tasks that meet through files (shuffle.py), each a function of one item:

    parts       rows.scatter_part          what is needed of each document, sent to its equals
    partitions  exact.reject_duplicate_ids records that claim one id with different texts
    partitions  exact.group_exact          same text
    partitions  near.link_buckets          candidates from LSH bands
    (here)      components.label           components of candidates; in rounds of tasks when there are many
    parts       near.ship_part             signatures and texts of candidates, sent to their bins
    bins        near.settle_bin            who is kept
    parts       write_part                 CLUSTER

The number of partitions and bins follows from the number of rows and decides nothing but who
works on what. Nothing is held for each document but in tasks of bounded size, and, in the driver, up
to Sizes.links links between texts that share a bucket; yet a component of candidates is one task's
work however large it is.

What earlier runs kept takes part by its signatures, leads whatever is like it, and is never removed.

Whoever is kept is the best by (AI discourse first, the recipe's `keep`), so a cluster with any
discourse in it is represented by discourse. No edge crosses a stance class; pool documents only
meet copies in their own pool. When more than `alarm_fraction` of a source or a stance would be
removed, nothing is written.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from curation import schema, storage
from curation.dedup import components, exact, near, rows, shuffle
from curation.dedup.earlier import Earlier
from curation.dedup.work import (
    EXACT,
    NEAR,
    REJECTED,
    WORK,
    PartitionTask,
    PartTask,
    Removed,
    Sizes,
    Work,
)
from curation.errors import UserError
from curation.manifest import DEDUP, QUARANTINE, SIGNATURES, Part, RunFolder
from curation.recipe import Dedup
from curation.stage import Item, Mapper, Result

REJECTS_PART = "duplicate-ids"  # a part of 30_dedup with the file quarantine/duplicate-ids.parquet, when there are any
_BINS, _BIN_DOCUMENTS = 8, 2_000  # up to so many bins of so many documents where one would do
ALARM_DOCUMENTS = 100  # a source or stance of fewer documents raises no alarm


@dataclass(frozen=True)
class Outcome:
    """How many documents ended how. `earlier`: as duplicates of what an earlier run kept. `crowded`: kept
    ones that met a bucket of near.MAX_LEADERS different documents, so that a duplicate of theirs
    further on in it could be missed."""

    kept: int
    exact: int
    near: int
    earlier: int
    duplicate_id: int
    crowded: int


def cluster(
    run: RunFolder,
    part_names: Sequence[str],
    section: Dedup,
    chain: str,
    mapper: Mapper,
    sizes: Sizes = Sizes(),  # noqa: B008 - frozen
    earlier: Sequence[Earlier] = (),
) -> Outcome:
    """Write 30_dedup/PART.parquet (CLUSTER) for every part and commit it with `chain`, and
    quarantine/duplicate-ids.parquet (REJECT) when records claim one id with different texts.

    Reads 10_documents, 20_detect and 30_dedup/signatures of the parts, and of `earlier` runs all but
    texts. Raises UserError when a source or stance of at least ALARM_DOCUMENTS would lose more than
    `section.alarm_fraction`.
    """
    names = sorted(part_names)
    every = [(run, name) for name in names] + [(e.run, name) for e in earlier for name in e.parts]
    counts_of = [_num_rows(of.path(SIGNATURES, f"{name}.parquet")) for of, name in every]
    partitions = [max(1, -(-count // sizes.rows)) for count in (sum(counts_of), sum(counts_of) * section.bands)]
    work = Work(run, section, chain, len(names), *partitions)
    tasks = [
        PartTask(work, index, name, count, None if of is run else of)
        for index, ((of, name), count) in enumerate(zip(every, counts_of, strict=True))
    ]
    parts, others = tasks[: len(names)], tasks[len(names) :]
    storage.remove(run.path(WORK))
    try:
        if parts:
            _settle(work, parts, others, mapper, sizes)
        counts: Counter[str] = Counter()
        for part in _map(mapper, write_part, _largest_first(parts), "write clusters"):
            counts.update(part.counts)
    finally:
        storage.remove(run.path(WORK))
    return Outcome(**{field.name: counts[field.name] for field in fields(Outcome)})


def _num_rows(path: str) -> int:
    with storage.open_read(path) as handle:
        return int(pq.read_metadata(handle).num_rows)


def _settle(work: Work, parts: list[PartTask], others: list[PartTask], mapper: Mapper, sizes: Sizes) -> None:
    """All rounds up to who is kept, quarantine and alarm. `others` are of earlier runs."""
    every = _largest_first([*parts, *others])
    total: Removed = sum(_map(mapper, rows.scatter_part, every, "read signatures"), Counter())
    partitions = [PartitionTask(work, k) for k in range(work.num_partitions)]
    removed: Removed = Counter()
    rejecting: set[int] = set()
    for rejected, in_parts in _map(mapper, exact.reject_duplicate_ids, partitions, "duplicate ids"):
        removed += rejected
        rejecting.update(in_parts)
    removed += sum(_map(mapper, exact.group_exact, partitions, "exact duplicates"), Counter())
    band_partitions = [PartitionTask(work, k) for k in range(work.num_band_partitions)]
    num_links = sum(_map(mapper, near.link_buckets, band_partitions, "near-duplicate candidates"))
    if num_links:
        num_texts = components.label(work, num_links, sizes.links, mapper)
        # Few candidates are cut into smaller bins too, for the CPUs to share.
        num_bins = max(-(-num_texts // sizes.documents), min(_BINS, -(-num_texts // _BIN_DOCUMENTS)))
        ships = [near.ShipTask(part, num_bins) for part in every]
        _drain(_map(mapper, near.ship_part, ships, "gather candidates"))
        bins = [PartitionTask(work, k) for k in range(num_bins)]
        removed += sum(_map(mapper, near.settle_bin, bins, "near-duplicates"), Counter())
    _check_alarm(total, removed, work.section.alarm_fraction)
    _quarantine(work, [parts[index] for index in sorted(rejecting)], mapper)


def _map(mapper: Mapper, function: Callable[[Item], Result], items: Sequence[Item], label: str) -> Iterator[Result]:
    """One item is done here: a small corpus is spared most of an engine's rounds."""
    return iter([function(items[0])]) if len(items) == 1 else mapper(function, items, label)


def _largest_first(parts: list[PartTask]) -> list[PartTask]:
    return sorted(parts, key=lambda part: -part.num_rows)


def _drain(results: Iterator[object]) -> None:
    for _ in results:
        pass


def _check_alarm(total: Removed, removed: Removed, fraction: float) -> None:
    for kind, name in sorted(total):
        of, lost = total[kind, name], removed[kind, name]
        if of >= ALARM_DOCUMENTS and lost > fraction * of:
            raise UserError(
                f"dedup would remove {lost} of the {of} documents of {kind} {name}, more than dedup.alarm_fraction = "
                f"{fraction:g}: check the input's id_key and text_key, or raise alarm_fraction if they are copies"
            )


def _quarantine(work: Work, parts: list[PartTask], mapper: Mapper) -> None:
    """Commit the rejects before any CLUSTER part: a run that is killed in between does both again."""
    run, path = work.run, f"{QUARANTINE}/{REJECTS_PART}.parquet"
    if not parts:
        storage.remove(run.path(DEDUP, f"{REJECTS_PART}.json"))
        storage.remove(run.path(path))
        return
    table = pa.concat_tables(_map(mapper, exact.reject_rows, parts, "quarantine"))
    table = table.sort_by([(name, "ascending") for name in ("source", "file", "position", "source_id")])
    run.commit_part(Part(DEDUP, REJECTS_PART, work.chain, (run.commit_table(path, table),)))


def write_part(task: PartTask) -> Part:
    """Commit the CLUSTER rows of a part."""
    work, run = task.work, task.work.run
    own = pl.from_arrow(storage.read_ipc(run.path(task.rows)).select(["node", "id", "discourse"]))
    assert isinstance(own, pl.DataFrame)
    copies = shuffle.read(run.path(EXACT), task.index).drop("members")
    rejected = shuffle.read(run.path(REJECTED), task.index).select("node", "first_id")
    found = own.join(copies, on="node", how="left", maintain_order="left")
    found = found.join(rejected, on="node", how="left", maintain_order="left")
    found = found.join(_near(work, task.index), on="node", how="left", maintain_order="left")
    frame = found.select(
        "id",
        cluster=pl.coalesce("first_id", "kept_id", "leader_id", "id"),
        how=pl.when(pl.col("first_id").is_not_null())
        .then(pl.lit("duplicate_id"))
        .when(pl.coalesce("kept_earlier", "earlier"))
        .then(pl.lit("earlier"))
        .when(pl.col("similarity").is_not_null())
        .then(pl.lit("near"))
        .when(~pl.col("leads"))
        .then(pl.lit("exact"))
        .when(pl.col("leads") | pl.col("kept_id").is_not_null())
        .then(pl.lit("kept"))
        .otherwise(pl.lit("unique")),
        similarity=pl.coalesce("similarity", pl.when(~pl.col("leads")).then(pl.lit(1.0, pl.Float32))),
        cluster_discourse=pl.coalesce("kept_discourse", "leader_discourse", "discourse"),
    ).with_columns(kept=pl.col("how").is_in(["kept", "unique"]))
    table = frame.select(schema.CLUSTER.names).to_arrow().cast(schema.CLUSTER)
    counts = {how: int((frame["how"] == how).sum()) for how in ("exact", "near", "earlier", "duplicate_id")}
    counts |= {"kept": int(frame["kept"].sum()), "crowded": int(found["crowded"].sum())}
    file = run.commit_table(f"{DEDUP}/{task.name}.parquet", table)
    return run.commit_part(Part(DEDUP, task.name, work.chain, (file,), counts))


def _near(work: Work, index: int) -> pl.DataFrame:
    """What bins sent to a part; nothing when there was no candidate in the whole corpus."""
    if storage.list_names(work.run.path(NEAR)):
        return shuffle.read(work.run.path(NEAR), index)
    strings, flags = {"node": pl.UInt64, "kept_id": pl.String}, ("kept_discourse", "kept_earlier", "crowded")
    return pl.DataFrame(schema={**strings, **dict.fromkeys(flags, pl.Boolean), "similarity": pl.Float32})
