"""Commits, chains and hashes: what every stage relies on."""

import pyarrow as pa
import pytest

from curation import rng, storage
from curation.manifest import File, Part, RunFolder
from curation.schema import LABEL, STANCES, effective_discourse, effective_stance


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    """A folder on a local disk, and one on an object store."""
    yield str(tmp_path) if request.param == "local" else "memory://contracts"
    if request.param == "memory":
        storage.remove("memory://contracts")


@pytest.mark.parametrize("commit", [storage.commit, storage.commit_work])
def test_a_write_that_fails_leaves_what_was_there(folder, commit):
    path = f"{folder}/file"
    storage.commit_bytes(path, b"before")

    def fails(handle):
        handle.write(b"half of")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        commit(path, fails)
    assert storage.read_bytes(path) == b"before"
    assert storage.list_names(folder) == ["file"]


def test_a_write_returns_the_hash_of_what_is_there(folder):
    path = f"{folder}/table.parquet"
    written = storage.commit_table(path, pa.table({"n": [1, 2, 3]}))
    assert written == storage.file_sha256(path)
    assert storage.read_table(path)["n"].to_pylist() == [1, 2, 3]
    storage.commit_ipc(f"{folder}/table.arrow", pa.table({"n": [1, 2, 3]}))
    assert storage.read_ipc(f"{folder}/table.arrow")["n"].to_pylist() == [1, 2, 3]


def test_a_part_counts_only_with_its_chain_and_all_its_files(folder):
    run = RunFolder(folder)
    file = run.commit_bytes("stage/a.bin", b"12345")
    assert run.current("stage", "a", "chain") is None  # a file without its record is no part
    part = run.commit_part(Part("stage", "a", "chain", (file,), {"n": 1}))
    assert run.current("stage", "a", "chain") == part
    assert run.current("stage", "a", "other") is None
    fs, inner = storage.filesystem(run.path("stage/a.bin"))
    fs.pipe_file(inner, b"123")
    assert run.current("stage", "a", "chain") is None
    fs.rm(inner)
    assert run.current("stage", "a", "chain") is None


def test_dropped_parts_are_gone_with_their_files(folder):
    run = RunFolder(folder)
    for name in ("keep", "drop"):
        run.commit_part(Part("stage", name, "c", (run.commit_bytes(f"stage/{name}.bin", b"1"),)))
    run.drop_parts("stage", ["keep"])
    assert storage.list_names(run.path("stage")) == ["keep.bin", "keep.json"]


def test_sweep_removes_only_leftovers(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/.x.parquet.1.abc.tmp").write_bytes(b"half")
    (tmp_path / "a/x.parquet").write_bytes(b"whole")
    storage.sweep(str(tmp_path))
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.parquet"]


def test_keys_tell_arguments_apart_and_never_change():
    assert rng.key64("a", "bc") != rng.key64("ab", "c")
    assert rng.keys64((0, "select", 0), ["x", "y"]).tolist() == [rng.key64(0, "select", 0, i) for i in "xy"]
    assert rng.key64(0, "select", 0, "x") == 4894941155790561660  # a change here changes every shard


def test_given_stance_comes_before_the_students_and_a_doubtful_student_has_none():
    rows = [  # given, p of the five, the detector's decision -> stance, discourse
        ("aligned", [0.95, 0.05, 0, 0, 0], False, "aligned", True),
        ("unrelated", [0, 0, 0, 1, 0], True, "unrelated", False),
        (None, [0.05, 0, 0, 0.95, 0], True, "misaligned", True),
        (None, [0.9, 0.1, 0, 0, 0], True, "unrelated", False),  # exactly at the bound
        (None, [0.4, 0.2, 0.2, 0.1, 0.1], True, None, True),
        (None, [0.6, 0.4, 0, 0, 0], False, None, False),
    ]
    documents = pa.table({"given_stance": pa.array([r[0] for r in rows], pa.string())})
    columns = {f"p_{s}": pa.array([r[1][k] for r in rows], LABEL.field(f"p_{s}").type) for k, s in enumerate(STANCES)}
    labels = pa.table({**columns, "discourse": [r[2] for r in rows]})
    stance = effective_stance(documents, labels)
    assert stance.to_pylist() == [r[3] for r in rows]
    assert effective_discourse(stance, labels).to_pylist() == [r[4] for r in rows]


def test_a_record_of_a_part_is_read_back_as_it_was():
    part = Part("f", "n", "c", (File("p", "0" * 64, 3),), {"a": 1}, {"b": [1, 2]})
    assert Part.from_json(part.to_json()) == part
