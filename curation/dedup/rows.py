"""First round, by part: what the barrier must know of each document, sent to where its equals go."""

import numpy as np
import polars as pl
import pyarrow as pa

from curation import storage
from curation.dedup import bands, shuffle
from curation.dedup.work import BANDS, PREFERENCE, ROW_BITS, SOURCE_IDS, TEXTS, PartTask, Removed, tally
from curation.manifest import DEDUP, DETECT, DOCUMENTS, SIGNATURES
from curation.recipe import Dedup
from curation.rng import key64
from curation.schema import POOL, STANCES, effective_discourse, effective_stance

_DOCUMENT_COLUMNS = ["id", "source", "source_id", "file", "position", "role", "source_rank", "given_stance"]
_CLAIM = ["node", "id", "source", "source_id", "file", "position", "source_rank", "key_hi", "key_lo", "stance"]
_TEXT = [*PREFERENCE, "key_hi", "key_lo", "discourse", "source", "stance"]
_LENGTH_BITS, _RANK_BITS = 40, 23  # with the discourse bit: 64


def scatter_part(task: PartTask) -> Removed:
    """Send the part's rows on: by source id, by text, by band. Returns how many of this run there are of each kind."""
    work, run = task.work, task.work.run
    rows, signatures = _rows(task) if task.earlier is None else _earlier_rows(task)
    storage.commit_ipc(run.path(task.rows), rows.to_arrow())

    def send(folder: str, frame: pl.DataFrame, hashes: np.ndarray, num_partitions: int) -> None:
        shuffle.write(run.path(folder), f"{task.index:06d}", frame, hashes % np.uint64(num_partitions), num_partitions)

    named = rows.filter(pl.col("source_id").is_not_null()).select(_CLAIM)
    send(
        SOURCE_IDS,
        named,
        named.select(pl.struct("source", "source_id").hash(0)).to_series().to_numpy(),
        work.num_partitions,
    )
    texts = rows.select(_TEXT)
    send(TEXTS, texts, texts["key_hi"].to_numpy(), work.num_partitions)
    banded = _band_rows(rows, signatures, work.section)
    send(BANDS, banded, banded["key"].to_numpy(), work.num_band_partitions)
    return tally(rows.filter("fresh"))


def _band_rows(rows: pl.DataFrame, signatures: pa.ChunkedArray, section: Dedup) -> pl.DataFrame:
    """(key, entity) for each band of each document that takes part in MinHash."""
    matrix = bands.matrix(signatures.filter(pa.array(rows["banded"].to_numpy())))
    rows = rows.filter("banded")
    keys = bands.keys(matrix, section.bands, section.rows, rows["salt"].to_numpy())
    return pl.DataFrame({"key": keys.ravel(), "entity": np.repeat(rows["key_lo"].to_numpy(), section.bands)})


def _rows(task: PartTask) -> tuple[pl.DataFrame, pa.ChunkedArray]:
    """The part's rows, and its signatures as they were stored."""
    run, section = task.work.run, task.work.section
    documents = run.read(f"{DOCUMENTS}/{task.name}.parquet", _DOCUMENT_COLUMNS)
    labels = run.read(f"{DETECT}/{task.name}.parquet", ["discourse", *(f"p_{s}" for s in STANCES)])
    signed = run.read(f"{SIGNATURES}/{task.name}.parquet")
    stance = effective_stance(documents, labels)
    discourse = effective_discourse(stance, labels)
    frame = pl.from_arrow(documents)
    assert isinstance(frame, pl.DataFrame)
    frame = frame.with_columns(
        stance=pl.Series(pl.from_arrow(stance), dtype=pl.String),
        discourse=pl.Series(pl.from_arrow(discourse), dtype=pl.Boolean),
        fresh=True,
    )
    frame = frame.with_columns(order=_order(frame, signed["num_bytes"].to_numpy(), section))
    return _keyed(task, frame, signed), signed["signature"]


def _earlier_rows(task: PartTask) -> tuple[pl.DataFrame, pa.ChunkedArray]:
    """Like `_rows` for what an earlier run kept, without its pools; nothing else of it takes part."""
    columns = ["id", "role", "given_stance"]
    documents = pl.from_arrow(task.run.read(f"{DOCUMENTS}/{task.name}.parquet", columns))
    clusters = pl.from_arrow(task.run.read(f"{DEDUP}/{task.name}.parquet", ["kept", "cluster_discourse"]))
    signed = task.run.read(f"{SIGNATURES}/{task.name}.parquet")
    assert isinstance(documents, pl.DataFrame)
    assert isinstance(clusters, pl.DataFrame)
    frame = documents.with_columns(
        source=pl.lit(""), source_id=pl.lit(None, pl.String), file=pl.lit(""), position=pl.lit(0, pl.Int64),
        source_rank=pl.lit(0, pl.Int32), stance=pl.lit(None, pl.String), discourse=clusters["cluster_discourse"],
        fresh=False, order=pl.lit(0, pl.UInt64),
    )  # fmt: skip
    wanted = clusters["kept"] & (frame["role"] != POOL)
    return _keyed(task, frame, signed).filter(wanted), signed["signature"].filter(wanted.to_arrow())


def _keyed(task: PartTask, frame: pl.DataFrame, signed: pa.Table) -> pl.DataFrame:
    """With `node` and what the rounds go by: row i of `signed` is that of row i."""
    text_hash = signed["text_hash"].combine_chunks()
    hashes = np.frombuffer(text_hash.buffers()[1], "<u8").reshape(-1, 2)[text_hash.offset :][: len(text_hash)]
    salt = _salt(frame, signed["stance_class"])
    return frame.with_columns(
        node=np.uint64(task.index << ROW_BITS) + np.arange(len(frame), dtype=np.uint64),
        num_shingles=pl.Series(pl.from_arrow(signed["num_shingles"])),
        salt=salt,
        key_hi=hashes[:, 0] ^ salt,
        key_lo=hashes[:, 1] ^ salt,
    ).with_columns(banded=(pl.col("role") != POOL) & (pl.col("num_shingles") > 0))


def _order(frame: pl.DataFrame, num_bytes: np.ndarray, section: Dedup) -> np.ndarray:
    """uint64 that sorts by (discourse first, then `keep` up to `id`)."""
    order = (~frame["discourse"].to_numpy()).astype(np.uint64)
    fields = {
        "best_source": (_RANK_BITS, frame["source_rank"].to_numpy().astype(np.uint64)),
        "longest": (_LENGTH_BITS, np.uint64((1 << _LENGTH_BITS) - 1) - num_bytes.astype(np.uint64)),
    }
    for rule in section.keep[:-1]:
        bits, value = fields[rule]
        order = (order << np.uint64(bits)) | value
    return order


def _salt(frame: pl.DataFrame, stance_class: pa.ChunkedArray) -> np.ndarray:
    """uint64 for each row, the same for rows that may be duplicates of each other: those of one
    stance class, or of one pool (source and stance)."""
    pool = pl.concat_str(pl.lit("pool"), "source", "given_stance", separator="\0", ignore_nulls=True)
    group = pl.when(pl.col("role") == POOL).then(pool).otherwise(pl.concat_str(pl.lit("class\0"), "class"))
    groups = frame.with_columns(pl.Series("class", pl.from_arrow(stance_class))).select(group.alias("g"))["g"]
    encoded = groups.to_arrow().dictionary_encode()
    return np.array([key64(name) for name in encoded.dictionary.to_pylist()], np.uint64)[encoded.indices.to_numpy()]
