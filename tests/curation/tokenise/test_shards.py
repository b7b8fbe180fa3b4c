"""Shards come back as they were written, or not at all."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curation.errors import TilthError
from curation.manifest import RunFolder
from curation.schema import PROVENANCE
from curation.tokenise import TokenizerSpec, shards

FORMATS = list(shards.WRITERS)
DOCUMENTS = [[5, 6, 7, 0], [300, 0], [1, 2, 3, 4, 65_535, 0]]


def spec(vocab_size: int) -> TokenizerSpec:
    return TokenizerSpec("tok.json", "tok.json", "", "<eos>", 0, vocab_size)


def arrays(documents: list[list[int]], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    flat = [i for document in documents for i in document]
    return np.array(flat, dtype), np.cumsum([len(document) for document in documents], dtype=np.int64)


def write(form: str, run: RunFolder, documents: list[list[int]], vocab_size: int = 65_536):
    ids, ends = arrays(documents, spec(vocab_size).dtype)
    return shards.WRITERS[form](run, "00000", ids, ends, spec(vocab_size)), ids, ends


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path))


@pytest.mark.parametrize("form", FORMATS)
@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip(form: str, run: RunFolder, data: st.DataObject):
    vocab_size = data.draw(st.sampled_from([300, 65_536, 65_537, 2**31]))
    documents = data.draw(st.lists(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=9), min_size=1))
    _, ids, ends = write(form, run, documents, vocab_size)
    shards.verify_shard(run, form, "00000", ids, ends)
    found_ids, found_ends = shards.READERS[form](run.path("00000"))
    pieces = np.split(found_ids, found_ends[:-1])
    assert [piece.tolist() for piece in pieces] == documents
    assert found_ids.dtype.itemsize == (2 if vocab_size <= 65_536 else 4)


@pytest.mark.parametrize("form", FORMATS)
def test_shards_on_an_object_store_read_the_same(form: str):
    run = RunFolder("memory://tilth-test-shards")
    _, ids, ends = write(form, run, DOCUMENTS)
    shards.verify_shard(run, form, "00000", ids, ends)


def test_two_bytes_hold_65536_ids_and_not_one_more():
    assert (spec(65_536).token_bytes, spec(65_536).dtype) == (2, np.dtype("<u2"))
    assert (spec(65_537).token_bytes, spec(65_537).dtype) == (4, np.dtype("<u4"))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("ids", "ends"),
    [([], []), ([], [0]), ([1, 2], [0, 2]), ([1, 2], [1, 1, 2]), ([1, 2], [1]), ([1, 2], [3]), ([1, 2, 3], [2, 1, 3])],
    ids=["no documents", "no tokens", "empty first", "empty within", "tokens left over", "too few tokens", "falling"],
)
def test_documents_that_do_not_fill_the_shard_are_refused(form: str, run: RunFolder, ids: list, ends: list):
    with pytest.raises(TilthError, match="every document needs a token"):
        shards.WRITERS[form](run, "00000", np.array(ids, "<u2"), np.array(ends, np.int64), spec(300))
    assert not list(Path(run.root).iterdir())


@pytest.mark.parametrize("form", FORMATS)
def test_ids_of_another_type_are_refused(form: str, run: RunFolder):
    with pytest.raises(TilthError, match="ids are int64, the tokenizer's are uint16"):
        shards.WRITERS[form](run, "00000", np.array([1, 0]), np.array([2]), spec(300))


@pytest.mark.parametrize("form", FORMATS)
def test_every_truncated_or_missing_file_is_found(form: str, run: RunFolder):
    files, _, _ = write(form, run, DOCUMENTS)
    for file in files:
        path = Path(run.path(file.path))
        whole = path.read_bytes()
        # The short form of the count, the metadata's last line, is for people and is not checked.
        keep = whole.rindex(b"\n") if path.suffix == ".metadata" else len(whole)
        for length in range(keep):
            path.write_bytes(whole[:length])
            with pytest.raises(TilthError, match=re.escape(run.path("00000"))):
                shards.READERS[form](run.path("00000"))
        path.unlink()
        with pytest.raises(TilthError, match="is missing"):
            shards.READERS[form](run.path("00000"))
        path.write_bytes(whole)
    shards.READERS[form](run.path("00000"))


@pytest.mark.parametrize("form", FORMATS)
def test_one_changed_bit_is_found(form: str, run: RunFolder):
    files, ids, ends = write(form, run, DOCUMENTS)
    for file in files:
        path = Path(run.path(file.path))
        whole = path.read_bytes()
        checked = range(whole.index(b"|"), whole.rindex(b"\n")) if path.suffix == ".metadata" else range(len(whole))
        for at in checked:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(TilthError):
                shards.verify_shard(run, form, "00000", ids, ends)
        path.write_bytes(whole)
    shards.verify_shard(run, form, "00000", ids, ends)


@pytest.mark.parametrize("form", FORMATS)
def test_a_whole_shard_with_other_content_is_found(form: str, run: RunFolder):
    """Files that fit each other, but are not what was meant."""
    _, ids, ends = write(form, run, [[1, 2, 0], [3, 0]])
    with pytest.raises(TilthError, match="other token ids"):
        shards.verify_shard(run, form, "00000", ids[::-1], ends)
    with pytest.raises(TilthError, match="other document ends"):
        shards.verify_shard(run, form, "00000", ids, np.array([2, 5]))
    with pytest.raises(TilthError, match="other token ids"):
        shards.verify_shard(run, form, "00000", ids.astype("<u4"), ends)


def provenance(spans: list[tuple[int, int]]) -> pa.Table:
    rows = [
        {"start": start, "end": end, "id": f"{k:032x}", "stance": None, "repeat": 0, "inserted": False}
        for k, (start, end) in enumerate(spans)
    ]
    return pa.Table.from_pylist(rows, schema=PROVENANCE)


def test_provenance_is_written_beside_the_shard(run: RunFolder):
    table = provenance([(0, 4), (4, 6), (6, 12)])
    assert shards.write_provenance(run, "00000", table).path == "00000.provenance.parquet"
    assert run.read("00000.provenance.parquet").equals(table)


@pytest.mark.parametrize("spans", [[], [(1, 4)], [(0, 4), (5, 6)], [(0, 4), (3, 6)], [(0, 4), (4, 4)]])
def test_provenance_with_gaps_or_overlaps_is_refused(run: RunFolder, spans: list):
    with pytest.raises(TilthError, match="does not cover"):
        shards.write_provenance(run, "00000", provenance(spans))
