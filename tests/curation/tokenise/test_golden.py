"""The shard writers against bytes recorded from datatrove 0.10.1, and against its and megatron-core's readers.

golden/datatrove-0.10.1.json was made by golden/datatrove_peer.py, which says how. Where
TILTH_DATATROVE_PYTHON names a Python with datatrove and megatron-core, it is made again and compared.
"""

import hashlib
import json
import os
import runpy
import subprocess
from pathlib import Path

import numpy as np
import pytest

from curation.manifest import RunFolder
from curation.tokenise import TokenizerSpec, shards

GOLDEN = Path(__file__).parent / "golden"
RECORDED = json.loads((GOLDEN / "datatrove-0.10.1.json").read_text())
PEER = runpy.run_path(str(GOLDEN / "datatrove_peer.py"))

needs_datatrove = pytest.mark.skipif(
    "TILTH_DATATROVE_PYTHON" not in os.environ,
    reason="TILTH_DATATROVE_PYTHON names no Python with datatrove 0.10.1 and megatron-core (see golden/)",
)


def peer(*arguments: str) -> dict:
    command = [os.environ["TILTH_DATATROVE_PYTHON"], "-W", "ignore", str(GOLDEN / "datatrove_peer.py"), *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def write(folder: Path, token_bytes: int, documents: list[list[int]]) -> list[Path]:
    """The documents as shard.* in both formats, by our writers; the paths of the files."""
    spec = TokenizerSpec(PEER["TOKENIZER"], "", "", "<eos>", 0, 65_536 if token_bytes == 2 else 2_000_001)
    ids = np.array([i for document in documents for i in document], spec.dtype)
    ends = np.cumsum([len(document) for document in documents])
    files = [
        file for writer in shards.WRITERS.values() for file in writer(RunFolder(str(folder)), "shard", ids, ends, spec)
    ]
    for file in files:
        raw = (folder / file.path).read_bytes()
        assert (file.sha256, file.size_bytes) == (hashlib.sha256(raw).hexdigest(), len(raw))
    return [folder / file.path for file in files]


@pytest.mark.parametrize("name", PEER["CASES"])
def test_shards_have_the_bytes_of_datatrove(name: str, tmp_path: Path):
    token_bytes, lengths = PEER["CASES"][name]
    paths = write(tmp_path, token_bytes, PEER["documents"](token_bytes, lengths))
    assert {path.name: PEER["fixed"](path.read_bytes()) for path in paths} == RECORDED["cases"][name]


def test_counts_for_people_are_those_of_humanize():
    assert {count: shards._for_people(int(count)) for count in RECORDED["counts"]} == RECORDED["counts"]


@needs_datatrove
def test_the_recording_is_what_datatrove_writes_now():
    assert peer("record") == RECORDED


@needs_datatrove
@pytest.mark.parametrize("token_bytes", [2, 4])
def test_datatrove_and_megatron_read_our_shards(token_bytes: int, tmp_path: Path):
    documents = PEER["documents"](token_bytes, [4, 2, 6, 1])
    write(tmp_path, token_bytes, documents)
    flat = [i for document in documents for i in document]
    # 13 ids are three windows of 3 + 1; the last id is in none.
    assert peer("read", str(tmp_path), str(token_bytes)) == {
        "windows": [flat[0:4], flat[4:8], flat[8:12]],
        "documents": documents,
    }
