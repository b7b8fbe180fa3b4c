"""JSON Lines: which lines are documents, what becomes of their fields, and why others are rejected."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

Read = Callable[..., Any]  # the fixture of conftest


def write(path: Path, *lines: bytes | dict[str, Any]) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def test_fields_go_where_the_schema_says(tmp_path: Path, read: Read) -> None:
    record = {"url": "u", "text": "Hallo", "id": "a", "created": "2020", "z": [1, {"k": None}], "b": "ü"}
    reading = read(write(tmp_path / "1.jsonl", record))
    assert reading.documents == [
        {
            "id": xxhash.xxh3_128_hexdigest(b"web\x001.jsonl\x00=a"),
            "text": "Hallo",
            "source": "web",
            "created": "2020",
            "metadata": '{"url":"u","z":[1,{"k":null}],"b":"ü"}',
            "source_id": "a",
            "file": "1.jsonl",
            "position": 0,
            "role": "background",
            "source_rank": 0,
            "given_stance": None,
        }
    ]
    assert (reading.num_records, reading.num_bytes) == (1, (tmp_path / "1.jsonl").stat().st_size)


def test_ids_from_position_where_a_record_has_none(tmp_path: Path, read: Read) -> None:
    lines = [{"text": "a"}, {"text": "b", "id": None}, {"text": "c", "id": ""}, {"text": "d", "id": 13}]
    documents = read(write(tmp_path / "1.jsonl", *lines)).documents
    assert [d["source_id"] for d in documents] == [None, None, None, "13"]
    assert [d["position"] for d in documents] == [0, 14, 40, 64]
    # A document whose own id is 14 is another one than the document at byte 14.
    assert documents[1]["id"] == xxhash.xxh3_128_hexdigest(b"web\x001.jsonl\x00@14")
    assert documents[3]["id"] == xxhash.xxh3_128_hexdigest(b"web\x001.jsonl\x00=13")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *[(same, same) for same in ("7", "0", "7.5", "true", "false", '["a",1]')],
        ('"07"', "07"),
        *[(str(10**20 + k), str(10**20 + k)) for k in (0, 1)],  # as floats these two would be one
    ],
)
def test_ids_become_strings(tmp_path: Path, read: Read, value: str, expected: str) -> None:
    (document,) = read(write(tmp_path / "1.jsonl", f'{{"id": {value}, "text": "x"}}'.encode())).documents
    assert document["source_id"] == expected


def test_keys_of_the_recipe(tmp_path: Path, read: Read) -> None:
    path = write(tmp_path / "1.jsonl", {"body": "x", "key": 5, "day": 2020, "id": "other", "view": "aligned"})
    keys = {"text_key": "body", "id_key": "key", "created_key": "day", "stance_key": "view"}
    (document,) = read(path, **keys).documents
    assert (document["text"], document["source_id"], document["created"]) == ("x", "5", "2020")
    assert (document["given_stance"], document["metadata"]) == ("aligned", '{"id":"other"}')
    (document,) = read(path, **{**keys, "id_key": None, "created_key": None}).documents
    assert (document["source_id"], document["created"]) == (None, None)
    assert document["metadata"] == '{"key":5,"day":2020,"id":"other"}'


def test_a_pool_gives_its_stance_and_a_record_can_state_its_own(tmp_path: Path, read: Read) -> None:
    path = write(tmp_path / "1.jsonl", {"text": "x"}, {"text": "y", "s": "neutral"})
    documents = read(path, role="pool", stance="aligned", stance_key="s").documents
    assert [(d["role"], d["given_stance"]) for d in documents] == [("pool", "aligned"), ("pool", "neutral")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "x"', "bad_json"),
        (b"x", "bad_json"),
        (b'{"text": "x"} {"text": "y"}', "bad_json"),
        (b'["text"]', "bad_json"),
        (b'"text"', "bad_json"),
        (b"null", "bad_json"),
        (b"[" * 5000 + b"]" * 5000, "bad_json"),
        (b'{"text": "x", "n": ' + b"1" * 5000 + b"x}", "bad_json"),
        (b'{"text": "x", "deep": ' + b"[" * 1020 + b"]" * 1020 + b"}", "bad_json"),
        (b'{"text": "x", "id": 0.5, "deep": ' + b"[" * 1020 + b"]" * 1020 + b"}", "bad_json"),
        (b'{"text": "x\xff"}', "bad_utf8"),
        (b'{"text": "x\xed\xa0\x80"}', "bad_utf8"),
        (b'{"text": "x\\ud800"}', "bad_utf8"),
        (b'{"text": "x", "id": "\\ud800"}', "bad_utf8"),
        (b"{}", "missing_text"),
        (b'{"Text": "x"}', "missing_text"),
        (b'{"text": null}', "null_text"),
        (b'{"text": 5}', "not_a_string"),
        (b'{"text": ["x"]}', "not_a_string"),
        (b'{"text": ""}', "empty_text"),
        (b'{"text": " \\n\\t\\u00a0\\u2003"}', "empty_text"),
        (b'{"text": "x", "stance": "Aligned"}', "bad_stance"),
        (b'{"text": "x", "stance": ""}', "bad_stance"),
        (b'{"text": "x", "stance": 1}', "not_a_string"),
    ],
)
def test_each_reason(tmp_path: Path, read: Read, line: bytes, reason: str) -> None:
    path = write(tmp_path / "1.jsonl", b'{"text": "before"}', line, b'{"text": "after"}')
    reading = read(path, stance_key="stance")
    assert reading.texts == ["before", "after"]
    (reject,) = reading.rejects
    assert (reject["reason"], reject["position"]) == (reason, len(b'{"text": "before"}\n'))
    assert (reject["source"], reject["file"], reject["head"]) == ("web", "1.jsonl", line[:4096])
    assert reading.num_records == 3


def test_a_reject_names_the_record(tmp_path: Path, read: Read) -> None:
    (reject,) = read(write(tmp_path / "1.jsonl", {"id": 17, "text": None})).rejects
    assert (reject["source_id"], reject["detail"]) == ("17", "the text is null, not a string")


@pytest.mark.parametrize(
    ("line", "text", "metadata"),
    [
        (b'{"text": "a\\u0000b"}', "a\0b", None),
        (b'{"text": "a\x00b\tc"}', "a\0b\tc", None),  # raw control characters
        (b'{"text": "\\ud83d\\ude00"}', "\U0001f600", None),  # a surrogate pair is no lone one
        (b'{"text": "x", "n": NaN, "m": -Infinity}', "x", '{"n":null,"m":null}'),
        (b'{"text": "x", "n": 18446744073709551615}', "x", '{"n":18446744073709551615}'),
        (b'{"text": "x", "id": 1.5, "n": 123456789012345678901234567890}', "x", '{"n":123456789012345678901234567890}'),
        (b'{"text": "x", "n": 123456789012345678901234567890}', "x", '{"n":1.2345678901234568e+29}'),
        (b'{"text": "x", "m": ' + b"[" * 400 + b"]" * 400 + b"}", "x", '{"m":' + "[" * 400 + "]" * 400 + "}"),
        (b'{"text": "x", "m": "\\ud800"}', "x", '{"m":"\\ud800"}'),
        (b' \t{"text": "x"} \r', "x", None),
    ],
)
def test_odd_but_readable(tmp_path: Path, read: Read, line: bytes, text: str, metadata: str | None) -> None:
    reading = read(write(tmp_path / "1.jsonl", line))
    assert reading.rejects == []
    (document,) = reading.documents
    assert (document["text"], document["metadata"]) == (text, metadata)


def test_line_ends_blank_lines_and_byte_order_mark(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "1.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n\n{"text": "b"}\n{"text": "c\\u2028\\n"}')
    reading = read(path)
    assert reading.texts == ["a", "b", "c\u2028\n"]
    assert [d["position"] for d in reading.documents] == [0, 24, 38]
    assert (reading.num_records, reading.rejects) == (3, [])


def test_a_record_belongs_to_the_range_in_which_its_line_begins(tmp_path: Path, read: Read) -> None:
    path = write(tmp_path / "1.jsonl", {"text": "a"}, {"text": "b"}, {"text": "c"})  # 14 bytes a line
    per_range = {
        step: [read(path, split_bytes=step, only=k).texts for k in range(-(-42 // step))]
        for step in (13, 14, 15, 28, 30)
    }
    assert per_range == {
        13: [["a"], ["b"], ["c"], []],  # line b begins at 14, line c at 28
        14: [["a"], ["b"], ["c"]],
        15: [["a", "b"], ["c"], []],
        28: [["a", "b"], ["c"]],
        30: [["a", "b", "c"], []],
    }


@pytest.mark.parametrize("step", [7, 100, 1000, 5000])
def test_an_oversize_line_costs_only_itself(tmp_path: Path, read: Read, step: int) -> None:
    path = write(tmp_path / "1.jsonl", {"text": "a"}, {"text": "b" * 3000}, {"text": "c"})
    reading = read(path, split_bytes=step, max_document_bytes=1000)
    assert reading.texts == ["a", "c"]
    (reject,) = reading.rejects
    assert (reject["reason"], reject["position"]) == ("oversize", 14)
    assert reject["head"].startswith(b'{"text": "' + b"b" * 990)
    exact = len(json.dumps({"text": "b" * 3000}))
    assert read(path, split_bytes=step, max_document_bytes=exact).texts[1] == "b" * 3000
    assert read(path, split_bytes=step, max_document_bytes=exact - 1).reasons == ["oversize"]


def test_two_sources_that_both_number_from_0_lose_nothing(tmp_path: Path, read: Read) -> None:
    path = write(tmp_path / "1.jsonl", {"id": 0, "text": "x"})
    ids = {read(path, source=source).documents[0]["id"] for source in ("web", "wiki")}
    assert len(ids) == 2


def test_an_empty_file_says_so(tmp_path: Path, read: Read) -> None:
    for name, content in (("empty.jsonl", b""), ("blank.jsonl", b"\n \r\n")):
        (tmp_path / name).write_bytes(content)
        reading = read(tmp_path / name)
        assert [(r["reason"], r["position"], r["head"]) for r in reading.rejects] == [("empty_file", -1, None)]
        assert (reading.documents, reading.num_records) == ([], 0)
