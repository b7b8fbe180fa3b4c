"""What a document's duplicates are found by: the hash of its text, its MinHash signature, its stance class."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation import overlap, schema
from curation.recipe import Dedup

ALIGNED, MISALIGNED, OTHER = "aligned", "misaligned", "other"


def signature_table(documents: pa.Table, labels: pa.Table, section: Dedup) -> pa.Table:
    """SIGNATURE rows for DOCUMENT rows and their row-aligned LABEL rows. The table's metadata says which
    signatures they are: only equal ones compare."""
    hasher = overlap.MinHasher(section.bands * section.rows, section.ngram)
    signatures, num_shingles = hasher.sign(documents["text"])
    columns = [
        documents["id"],
        pa.array(overlap.text_hash(documents["text"]), pa.binary(16)),
        pc.binary_length(documents["text"]).cast(pa.int64()),
        pa.array(num_shingles, pa.int32()),
        _lists(signatures, num_shingles > 0),
        _stance_class(documents, labels),
    ]
    return pa.table(columns, schema=schema.SIGNATURE.with_metadata(about(section)))


def about(section: Dedup) -> dict[str, str]:
    """What two signatures must have in common to compare."""
    return {
        "algorithm": overlap.ALGORITHM,
        "shingles": overlap.SHINGLES,
        "ngram": str(section.ngram),
        "num_perm": str(section.bands * section.rows),
    }


def _lists(matrix: np.ndarray, present: np.ndarray) -> pa.ListArray:
    """The rows of `matrix` as lists, null where not `present`."""
    ends = np.cumsum(present, dtype=np.int64) * matrix.shape[1]
    offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(matrix[present].ravel()), mask=pa.array(~present))


def _stance_class(documents: pa.Table, labels: pa.Table) -> pa.Array:
    import polars as pl

    stance = pl.Series("stance", pl.from_arrow(schema.effective_stance(documents, labels)))
    apart = stance.is_in([ALIGNED, MISALIGNED]).fill_null(False)
    return pa.array(stance.zip_with(apart, pl.Series([OTHER])).to_list(), pa.string())
