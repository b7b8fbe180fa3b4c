"""The token ids of a part's representatives, one after the other, and where each document is.

Only what dedup kept is encoded: every arm selects from these ids, so a document is tokenised
once however many arms and repeats use it. Memory: one batch of text as Python strings beside
the part's ids.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import TilthError
from curation.schema import TOKENS
from curation.tokenise.tokenizer import Encoder

BATCH_BYTES = 8 << 20  # of UTF-8 text; a longer document is a batch of its own


def tokens_table(documents: pa.Table, clusters: pa.Table, encoder: Encoder) -> tuple[np.ndarray, pa.Table]:
    """(ids, schema.TOKENS) of a part.

    documents: columns id, text. clusters: columns id, kept, row-aligned with documents.
    ids: encoder.spec.dtype, the kept documents' ids with EOS, in row order. The table has a row
    for each document; one that was not kept has start -1 and no tokens.
    """
    if not documents["id"].equals(clusters["id"]):
        raise TilthError("documents and clusters of this part do not have the same ids: run `tilth curate` again")
    kept = clusters["kept"].to_numpy()
    encoded = [encoder.encode(batch) for batch in _batches(documents["text"].filter(clusters["kept"]))]
    ids = np.concatenate([np.empty(0, encoder.spec.dtype), *(ids for ids, _ in encoded)])
    lengths = np.concatenate([np.empty(0, np.int64), *(np.diff(ends, prepend=0) for _, ends in encoded)])

    num_tokens = np.zeros(len(kept), np.int32)
    num_tokens[kept] = lengths
    start = np.full(len(kept), -1, np.int64)
    start[kept] = np.cumsum(lengths) - lengths
    id_column = documents["id"].combine_chunks()
    return ids, pa.Table.from_arrays([id_column, pa.array(start), pa.array(num_tokens)], schema=TOKENS)


def _batches(texts: pa.ChunkedArray) -> Iterator[pa.Array]:
    """Slices of about BATCH_BYTES, none empty. How texts are cut does not change their ids."""
    for chunk in texts.chunks:
        batch = np.cumsum(pc.binary_length(chunk).to_numpy()) // BATCH_BYTES
        first_rows = np.flatnonzero(np.diff(batch, prepend=-1))
        for start, stop in pairwise([*first_rows.tolist(), len(chunk)]):
            yield chunk.slice(start, stop - start)
