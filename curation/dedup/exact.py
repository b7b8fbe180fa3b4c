"""Records that claim one id, and texts that are the same but for case and white space."""

import numpy as np
import polars as pl
import pyarrow as pa

from curation.dedup import shuffle
from curation.dedup.work import (
    EXACT,
    PREFERENCE,
    REJECTED,
    SOURCE_IDS,
    TEXTS,
    PartitionTask,
    PartTask,
    Removed,
    part_of,
    row_of,
    tally,
)
from curation.manifest import DOCUMENTS
from curation.schema import REJECT, REJECT_HEAD_BYTES


def reject_duplicate_ids(task: PartitionTask) -> tuple[Removed, list[int]]:
    """Of records with the same source and source_id the first by (file, position) stays; those of
    another text are rejected, those of the same are left to `group_exact`. Returns how many were
    rejected of each kind, and the parts that they are in."""
    run = task.work.run
    claims = ["source", "source_id"]
    rows = shuffle.read(run.path(SOURCE_IDS), task.index)
    rows = rows.filter(pl.struct(claims).is_duplicated()).sort(*claims, "file", "position", "source_rank", "node")
    first = [pl.col(c).first().over(claims).alias(f"first_{c}") for c in ("id", "file", "position", "key_hi", "key_lo")]
    other_text = (pl.col("key_hi") != pl.col("first_key_hi")) | (pl.col("key_lo") != pl.col("first_key_lo"))
    rejected = rows.with_columns(first).filter(other_text)
    parts = part_of(rejected["node"])
    sent = rejected.select("node", "first_id", "first_file", "first_position")
    shuffle.write(run.path(REJECTED), f"{task.index:06d}", sent, parts, task.work.num_parts)
    return tally(rejected), np.unique(parts).tolist()


def reject_rows(task: PartTask) -> pa.Table:
    """REJECT rows of the part's records that claim an id already taken."""
    run = task.work.run
    rejected = shuffle.read(run.path(REJECTED), task.index).sort("node")
    rows = row_of(rejected["node"])
    columns = ["source", "file", "position", "source_id", "text"]
    documents = run.read(f"{DOCUMENTS}/{task.name}.parquet", columns).take(pa.array(rows))
    details = [
        f"{source_id} is already the id of the record at {file}:{position}"
        for source_id, file, position in zip(
            documents["source_id"].to_pylist(), rejected["first_file"], rejected["first_position"], strict=True
        )
    ]
    table = documents.drop_columns("text")
    table = table.append_column("reason", pa.array(["duplicate_id"] * len(rows), pa.string()))
    table = table.append_column("detail", pa.array(details, pa.string()))
    heads = [text.encode()[:REJECT_HEAD_BYTES] for text in documents["text"].to_pylist()]
    return table.append_column("head", pa.array(heads, pa.large_binary())).cast(REJECT)


def group_exact(task: PartitionTask) -> Removed:
    """Group documents of the same text, stance class and pool, and send each member of a group of
    several to its part: its leader, and to the leader the nodes of the others. Returns how many
    are not leaders, of each kind."""
    run = task.work.run
    rejected = shuffle.read(run.path(REJECTED), None).select("node")
    rows = shuffle.read(run.path(TEXTS), task.index)
    key = ["key_hi", "key_lo"]
    rows = rows.join(rejected, on="node", how="anti").filter(pl.struct(key).is_duplicated()).sort(PREFERENCE)
    groups = rows.group_by(key, maintain_order=True).agg(
        leader=pl.col("node").first(),
        leader_id=pl.col("id").first(),
        leader_discourse=pl.col("discourse").first(),  # any of them: discourse sorts first
        earlier=~pl.col("fresh").first(),
        members=pl.col("node").slice(1),
    )
    rows = rows.join(groups, on=key, how="left", maintain_order="left").filter("fresh")
    leads = pl.col("node") == pl.col("leader")
    sent = rows.select(
        "node", "leader_id", "leader_discourse", "earlier", leads=leads, members=pl.when(leads).then("members")
    )
    shuffle.write(run.path(EXACT), f"{task.index:06d}", sent, part_of(rows["node"]), task.work.num_parts)
    return tally(rows.filter(~leads))
