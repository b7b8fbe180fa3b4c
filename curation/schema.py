"""The tables that stages hand to each other, as pyarrow schemas with units in field metadata.

DOCUMENT is written once by ingest and never edited. Every other table is a sidecar: the file
`20_detect/PART.parquet` has one row for each row of `10_documents/PART.parquet`, in the same
order, so that a join is a column append; `id` is repeated for readers who join by key.
A change of any schema raises SCHEMA_VERSION.
"""

from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    import polars as pl

SCHEMA_VERSION = 2

STANCES = ("unrelated", "neutral", "aligned", "misaligned", "mixed")
BACKGROUND, POOL = "background", "pool"
STUDENT_P = 0.9  # a student's stance counts as a label from this probability on (design.md, Effective stance)


def _field(name: str, kind: pa.DataType, about: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"about": about})


DOCUMENT = pa.schema(
    [
        _field("id", pa.string(), "xxh3_128 of (source, file, source_id or position), 32 hex digits"),
        _field("text", pa.large_string(), "UTF-8 text as ingested"),
        _field("source", pa.string(), "the recipe's name for the input"),
        _field("created", pa.string(), "as given by the input, unparsed", nullable=True),
        _field("metadata", pa.string(), "other fields of the record, as a JSON object", nullable=True),
        _field("source_id", pa.string(), "the record's own id", nullable=True),
        _field("file", pa.string(), "path relative to the input's glob root"),
        _field("position", pa.int64(), "byte offset of the record in the uncompressed file, or row number"),
        _field("role", pa.string(), "background | pool"),
        _field("source_rank", pa.int32(), "index of the input in the recipe: lower is better"),
        _field("given_stance", pa.string(), "stance stated by the input, one of STANCES", nullable=True),
    ]
)

REJECT = pa.schema(
    [
        _field("source", pa.string(), "the recipe's name for the input"),
        _field("file", pa.string(), "path relative to the input's glob root"),
        _field("position", pa.int64(), "byte offset or row number; -1 when the whole file is meant"),
        _field("source_id", pa.string(), "the record's own id, where it could be read", nullable=True),
        _field("reason", pa.string(), "one of REJECT_REASONS, or label_ and why a document has no label (label.work)"),
        _field("detail", pa.string(), "one sentence for a person", nullable=True),
        _field("head", pa.large_binary(), "first 4 KiB of the record, as bytes", nullable=True),
    ]
)
REJECT_HEAD_BYTES = 4096
REJECT_REASONS = (
    "bad_json",  # not JSON, or not an object
    "bad_utf8",  # bytes that are not UTF-8
    "missing_text",  # no text field
    "null_text",
    "not_a_string",  # text (or stance) of another type
    "empty_text",  # empty or whitespace only
    "oversize",  # longer than MAX_DOCUMENT_BYTES
    "bad_stance",  # a stance_key value that is not one of STANCES
    "duplicate_id",  # same source and source_id, other text: the first stays
    "truncated",  # a compressed stream or archive record that ends early or is corrupt
    "empty_file",
    "unreadable_file",
)

HIT = pa.struct(
    [
        pa.field("term", pa.string()),
        pa.field("category", pa.string()),
        pa.field("offset", pa.int64()),  # UTF-8 bytes from the start of the text
    ]
)

LABEL = pa.schema(
    [
        _field("id", pa.string(), "document id"),
        *[_field(f"p_{s}", pa.float32(), f"fastText probability of {s}, 0..1") for s in STANCES],
        _field("p_discourse", pa.float32(), "1 - p_unrelated"),
        _field("discourse", pa.bool_(), "p_discourse >= the recipe's threshold"),
        _field("blocklist", pa.bool_(), "the blocklist's decision"),
        _field("hits", pa.list_(HIT), "every blocklist hit; offset in UTF-8 bytes"),
    ]
)

SIGNATURE = pa.schema(
    [
        _field("id", pa.string(), "document id"),
        _field("text_hash", pa.binary(16), "xxh3_128 of the normalised text"),
        _field("num_bytes", pa.int64(), "UTF-8 bytes of the text"),
        _field("num_shingles", pa.int32(), "distinct or repeated word shingles seen; 0 = too short for MinHash"),
        _field(
            "signature", pa.list_(pa.uint32()), "MinHash values (num_perm), null when num_shingles is 0", nullable=True
        ),
        _field("stance_class", pa.string(), "aligned | misaligned | other: part of the band key"),
    ]
)

LLM_LABEL = pa.schema(
    [
        _field("id", pa.string(), "document id"),
        _field("asked", pa.bool_(), "a language model was to read it"),
        _field("audit", pa.bool_(), "because it was drawn from the documents below the detector's threshold"),
        _field("llm_stance", pa.string(), "one of STANCES; null where there is no label", nullable=True),
        _field("confidence", pa.string(), "low | medium | high", nullable=True),
        _field("actor", pa.string(), "who acts, by the rubric", nullable=True),
        _field("evidence", pa.string(), "a passage as it stands in the document", nullable=True),
        _field("num_windows", pa.int32(), "windows that were read", nullable=True),
        _field("error", pa.string(), "class of what went wrong; null where nothing did", nullable=True),
        _field("detail", pa.string(), "the error for a person", nullable=True),
    ]
)

CLUSTER = pa.schema(
    [
        _field("id", pa.string(), "document id"),
        _field("cluster", pa.string(), "id of the kept document (earlier: in that run); the own id when alone"),
        _field("kept", pa.bool_(), "true for the representative"),
        _field("how", pa.string(), "unique | kept | exact | near | earlier | duplicate_id"),
        _field("similarity", pa.float32(), "Jaccard (exact or estimated) to the kept document", nullable=True),
        _field("cluster_discourse", pa.bool_(), "any member of the cluster is discourse"),
    ]
)

TOKENS = pa.schema(
    [
        _field("id", pa.string(), "document id"),
        _field("start", pa.int64(), "first token in the part's .bin; -1 when not tokenised (dropped by dedup)"),
        _field("num_tokens", pa.int32(), "tokens with the closing EOS; 0 when not tokenised"),
    ]
)

PROVENANCE = pa.schema(
    [
        _field("start", pa.int64(), "first token in the shard"),
        _field("end", pa.int64(), "one past the last token in the shard"),
        _field("id", pa.string(), "document id"),
        _field("stance", pa.string(), "effective stance", nullable=True),
        _field("repeat", pa.int32(), "0 for the first use of the document in this arm"),
        _field("inserted", pa.bool_(), "true when up-sampled, false for background"),
    ]
)


def stance_expression(*, labelled: bool = False) -> "pl.Expr":
    """Effective stance from the columns `given_stance`, `llm_stance` when `labelled`, and `p_*`, null when there is
    none: given by the input, else the language model's, else the student's class when its probability is at least
    STUDENT_P."""
    import polars as pl

    student = [pl.when(pl.col(f"p_{s}") >= STUDENT_P).then(pl.lit(s)) for s in STANCES]
    return pl.coalesce("given_stance", *(["llm_stance"] if labelled else []), *student).cast(pl.String)


def discourse_expression(stance: str) -> "pl.Expr":
    """Whether a document counts as AI discourse, from the column named `stance` (effective) and `discourse`: its
    stance is other than unrelated or, without one, the detector decided so."""
    import polars as pl

    return pl.coalesce(pl.col(stance) != "unrelated", "discourse")


def effective_stance(documents: pa.Table, labels: pa.Table, read: pa.Table | None = None) -> pa.ChunkedArray:
    """`stance_expression` of row-aligned tables; only `given_stance`, `p_*` and of `read` (LLM_LABEL) `llm_stance` are
    used."""
    import polars as pl

    names = [f"p_{s}" for s in STANCES]
    columns = [documents["given_stance"], *(labels[n] for n in names)]
    if read is not None:
        columns, names = [*columns, read["llm_stance"]], [*names, "llm_stance"]
    table = pa.table(columns, ["given_stance", *names])
    return pl.DataFrame(table).select(stance=stance_expression(labelled=read is not None)).to_arrow()["stance"]


def effective_discourse(stance: pa.ChunkedArray, labels: pa.Table) -> pa.ChunkedArray:
    """`discourse_expression` of a row-aligned `effective_stance` and LABEL rows."""
    import polars as pl

    table = pa.table([stance, labels["discourse"]], ["stance", "discourse"])
    return pl.DataFrame(table).select(discourse=discourse_expression("stance")).to_arrow()["discourse"]
