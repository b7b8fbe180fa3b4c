"""What there is to read, where it is cut, and what it is called."""

import os
import pickle
import re
from pathlib import Path

import fsspec
import pytest

from curation import ingest
from curation.errors import UserError
from curation.ingest.splits import MIB, format_of, part_bytes
from curation.recipe import Ingest, Input


def plan(*paths: object, **entry: object) -> list[ingest.Split]:
    inputs = [Input.model_validate({"path": str(p), "source": f"s{k}", **entry}) for k, p in enumerate(paths)]
    return ingest.plan(inputs, Ingest())


def make(folder: Path, *names: str, content: str = '{"text": "x"}\n') -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", ("jsonl", None)),
        ("A.JSONL.GZ", ("jsonl", "gzip")),
        ("a.ndjson.zst", ("jsonl", "zstd")),
        ("a.json.bz2", ("jsonl", "bz2")),
        ("a.parquet", ("parquet", None)),
        ("CC-MAIN.warc.gz", ("warc", "gzip")),
        ("CC-MAIN.warc.wet.gz", ("warc", "gzip")),
        ("CC-MAIN.warc.wat.gz", (None, "gzip")),
        ("a.txt", ("text", None)),
        ("notes.md.gz", ("text", "gzip")),
        ("a.csv", (None, None)),
        ("jsonl", (None, None)),
    ],
)
def test_format_by_name(name: str, expected: tuple[str | None, str | None]) -> None:
    assert format_of(name) == expected


def test_split_size_depends_on_the_file_and_split_mb_only() -> None:
    assert part_bytes(100, True, 64) == 16 * MIB  # small: not below 16 MiB
    assert part_bytes(160 * MIB, True, 64) == 20 * MIB  # size // 8
    assert part_bytes(8000 * MIB, True, 64) == 64 * MIB  # not above split_mb
    assert part_bytes(80 * MIB, False, 64) == 40 * MIB  # compressed: size // 2
    assert part_bytes(80 * MIB, True, 1) == 1 * MIB  # a limit below 16 MiB holds


def test_relative_path_is_below_the_longest_folder_without_glob_characters(tmp_path: Path) -> None:
    make(tmp_path, "a/x/1.jsonl", "a/y/2.jsonl", "a/y/deep/3.jsonl")
    assert [s.relative for s in plan(tmp_path / "a/*/*.jsonl")] == ["x/1.jsonl", "y/2.jsonl"]
    assert [s.relative for s in plan(tmp_path / "a/y*/2.jsonl")] == ["y/2.jsonl"]
    assert [s.relative for s in plan(tmp_path / "a/**/*.jsonl")] == ["x/1.jsonl", "y/2.jsonl", "y/deep/3.jsonl"]
    assert [s.relative for s in plan(tmp_path / "a/y/2.jsonl")] == ["2.jsonl"]
    assert [s.relative for s in plan(tmp_path / "a")] == ["x/1.jsonl", "y/2.jsonl", "y/deep/3.jsonl"]


def test_order_is_by_input_then_path_whatever_the_listing(tmp_path: Path) -> None:
    make(tmp_path, "b/2.jsonl", "b/10.jsonl", "a/9.jsonl")

    class Backwards(fsspec.get_filesystem_class("memory")):  # type: ignore[misc]
        protocol = "backwards"
        store: dict = {}  # noqa: RUF012 - as in the base class
        pseudo_dirs = [""]  # noqa: RUF012

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(path.removeprefix("backwards://"))

        def glob(self, path: str, **kwargs: object) -> list[str]:
            return sorted(super().glob(path, **kwargs), reverse=True)

    fsspec.register_implementation("backwards", Backwards, clobber=True)
    for name in ("2", "10", "9"):
        Backwards().pipe(f"/b/{name}.jsonl", b"{}\n")
    for glob in (tmp_path / "b/*.jsonl", "backwards://b/*.jsonl"):
        found = [(s.source_rank, s.relative) for s in plan(glob, tmp_path / "a/*.jsonl")]
        assert found[:1] + found[-1:] == [(0, "10.jsonl"), (1, "9.jsonl")]
        assert found == sorted(found)


def test_plain_files_are_cut_into_byte_ranges_that_cover_them(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" * (12 * MIB))
    splits = plan(path)
    assert [(s.start, s.end) for s in splits] == [(0, 16 * MIB), (16 * MIB, 32 * MIB), (32 * MIB, 36 * MIB)]
    assert [s.name[-6:] for s in splits] == ["-00000", "-00001", "-00002"]
    assert not any(s.is_whole_file for s in splits)


def test_names_are_file_safe_unique_and_stay(tmp_path: Path) -> None:
    make(tmp_path, "a b/ü?.jsonl", "a b/1.jsonl", "1.jsonl", "1.jsonl.gz")
    splits = plan(tmp_path, tmp_path)
    names = [s.name for s in splits]
    assert len(set(names)) == len(names) == 8
    assert all(re.fullmatch(r"s[01]-[0-9a-f]{16}-00000", name) for name in names)
    os.utime(tmp_path / "1.jsonl", ns=(1, 1))
    assert [s.name for s in plan(tmp_path, tmp_path)] == names
    assert pickle.loads(pickle.dumps(splits)) == splits


def test_fingerprint_follows_file_and_input_but_not_the_place(tmp_path: Path) -> None:
    make(tmp_path, "here/1.jsonl", "here/2.jsonl")
    one, two = (s.fingerprint for s in plan(tmp_path / "here/*.jsonl"))
    os.rename(tmp_path / "here", tmp_path / "there")
    assert [s.fingerprint for s in plan(tmp_path / "there/*.jsonl")] == [one, two]
    assert plan(tmp_path / "there/*.jsonl", text_key="body")[0].fingerprint != one
    os.utime(tmp_path / "there/1.jsonl", ns=(5, 5))
    changed = [s.fingerprint for s in plan(tmp_path / "there/*.jsonl")]
    assert (changed[0] != one, changed[1] == two) == (True, True)
    given = Input(path=str(tmp_path / "there/*.jsonl"), source="s0")
    assert ingest.plan([given], Ingest(max_document_mb=1))[1].fingerprint != two
    assert ingest.plan([given], Ingest(split_mb=32))[1].fingerprint == two  # a small file is cut as before


def test_memory_files_and_their_identity() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/plan/x/1.jsonl", b'{"text": "x"}\n')
    (before,) = plan("memory://plan/*/1.jsonl")
    assert (before.relative, before.end) == ("x/1.jsonl", 14)
    memory.pipe("/plan/x/1.jsonl", b'{"text": "y"}\n')
    (after,) = plan("memory://plan/*/1.jsonl")
    assert after.name == before.name
    assert after.fingerprint != before.fingerprint


def test_a_folder_gives_the_files_whose_names_say_a_format(tmp_path: Path) -> None:
    make(tmp_path, "1.jsonl", "_SUCCESS", ".2.jsonl", ".cache/3.jsonl", "notes.csv", "_tmp/4.jsonl")
    assert [s.relative for s in plan(tmp_path)] == ["1.jsonl"]
    assert [s.relative for s in plan(tmp_path, format="jsonl")] == ["1.jsonl", "notes.csv"]


def test_a_name_with_glob_characters_that_exists_is_a_file(tmp_path: Path) -> None:
    make(tmp_path, "a[1].jsonl", "a1.jsonl")
    assert [s.relative for s in plan(tmp_path / "a[1].jsonl")] == ["a[1].jsonl"]


def test_what_is_not_a_file_is_passed_over_and_a_dangling_link_is_kept(tmp_path: Path) -> None:
    make(tmp_path, "1.jsonl", "folder.jsonl/inner.txt")
    os.mkfifo(tmp_path / "2.jsonl")
    os.symlink(tmp_path / "1.jsonl", tmp_path / "3.jsonl")
    os.symlink(tmp_path / "nowhere", tmp_path / "4.jsonl")
    assert [s.relative for s in plan(tmp_path / "*.jsonl")] == ["1.jsonl", "3.jsonl", "4.jsonl"]


def test_one_file_may_be_of_two_sources_but_not_twice_of_one(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jsonl", "b/1.jsonl")
    assert len(plan(tmp_path / "a/1.jsonl", tmp_path / "a/*.jsonl")) == 2
    with pytest.raises(UserError, match=r"a/1\.jsonl and .*b/1\.jsonl are both 1\.jsonl of source web"):
        plan(tmp_path / "a/*.jsonl", tmp_path / "b/*.jsonl", source="web")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list everything")
def test_a_folder_that_may_not_be_listed_is_not_passed_over(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jsonl", "b/2.jsonl")
    for mode in (0, 0o400, 0o100):  # 0o400 may be listed and its files may not be looked at
        (tmp_path / "b").chmod(mode)
        for path in (tmp_path, tmp_path / "*/*.jsonl", tmp_path / "**/*.jsonl"):
            with pytest.raises(UserError, match=r"cannot be listed: .*Permission denied.*/b"):
                plan(path)
        assert len(plan(tmp_path / "a/*.jsonl")) == 1
    (tmp_path / "b").chmod(0o700)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.jsonl", r"missing\.jsonl of source s0 does not exist"),
        ("*.parquet", r"\*\.parquet of source s0 matches no file"),
        ("empty", r"empty of source s0 matches no file"),
        ("unknown.csv", r"name of .*unknown\.csv does not say its format"),
        ("*.csv", r"name of .*unknown\.csv does not say its format"),
        ("nosuch://bucket/x", r"nosuch://bucket/x of source s0 cannot be listed: Protocol not known"),
    ],
)
def test_a_mistaken_input_ends_before_anything_starts(tmp_path: Path, path: str, message: str) -> None:
    make(tmp_path, "good.jsonl", "unknown.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        plan(path if "://" in path else tmp_path / path, tmp_path / "good.jsonl")
