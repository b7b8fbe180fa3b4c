"""The ids of a part, and which rows they belong to."""

import numpy as np
import pyarrow as pa
import pytest

from curation.errors import TilthError
from curation.schema import TOKENS
from curation.tokenise import Encoder, TokenizerSpec, tokens, tokens_table

TEXTS = ["the first", "", "a letter", "漢字 😀", "the last of them"]


@pytest.fixture(scope="module")
def encoder(spec: TokenizerSpec) -> Encoder:
    return Encoder(spec)


def part(kept: list[bool], texts: list[str] = TEXTS) -> tuple[pa.Table, pa.Table]:
    """Documents and clusters whose columns are cut into other chunks."""
    ids = [f"{row:032x}" for row in range(len(texts))]
    half = len(texts) // 2
    columns = {"id": pa.array(ids), "text": pa.array(texts, pa.large_string())}
    documents = pa.concat_tables([pa.table(columns)[:half], pa.table(columns)[half:]])
    return documents, pa.table({"id": pa.array(ids), "kept": pa.array(kept, pa.bool_())})


def alone(encoder: Encoder, text: str) -> list[int]:
    return encoder.encode(pa.array([text]))[0].tolist()


def test_dropped_documents_have_a_row_and_no_tokens(encoder: Encoder):
    ids, table = tokens_table(*part([True, True, False, False, True]), encoder)
    first, last = alone(encoder, "the first"), alone(encoder, "the last of them")
    assert ids.tolist() == [*first, 0, *last]
    assert table.schema.equals(TOKENS)
    assert table["start"].to_pylist() == [0, len(first), -1, -1, len(first) + 1]
    assert table["num_tokens"].to_pylist() == [len(first), 1, 0, 0, len(last)]
    assert table["id"].to_pylist() == [f"{row:032x}" for row in range(5)]


@pytest.mark.parametrize("batch_bytes", [1, 9, 10, 20, 1000])
def test_batches_do_not_change_the_ids(batch_bytes: int, encoder: Encoder, monkeypatch: pytest.MonkeyPatch):
    expected = [i for text in TEXTS for i in alone(encoder, text)]
    monkeypatch.setattr(tokens, "BATCH_BYTES", batch_bytes)
    ids, table = tokens_table(*part([True] * 5), encoder)
    assert ids.tolist() == expected
    lengths = table["num_tokens"].to_numpy()
    assert table["start"].to_pylist() == (np.cumsum(lengths) - lengths).tolist()


def test_no_batch_is_much_larger_than_the_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokens, "BATCH_BYTES", 10)
    texts = pa.chunked_array([["abcd", "efgh", "ij", "k" * 25, "l"], [], ["m"]], pa.large_string())
    batches = [batch.to_pylist() for batch in tokens._batches(texts)]
    assert batches == [["abcd", "efgh"], ["ij"], ["k" * 25, "l"], ["m"]]


@pytest.mark.parametrize("kept", [[], [False] * 5])
def test_a_part_with_nothing_kept(kept: list[bool], encoder: Encoder):
    ids, table = tokens_table(*part(kept, TEXTS[: len(kept)]), encoder)
    assert (ids.tolist(), ids.dtype) == ([], encoder.spec.dtype)
    assert table.schema.equals(TOKENS)
    assert table["start"].to_pylist() == [-1] * len(kept)


def test_tables_of_other_parts_are_refused(encoder: Encoder):
    documents, clusters = part([True] * 5)
    with pytest.raises(TilthError, match="do not have the same ids"):
        tokens_table(documents, clusters.take([1, 0, 2, 3, 4]), encoder)
    with pytest.raises(TilthError, match="do not have the same ids"):
        tokens_table(documents, clusters[:4], encoder)
