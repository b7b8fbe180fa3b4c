"""Any records, any line ends, any compression, any split size: the same documents, nothing lost or doubled."""

import bz2
import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Read = Callable[..., Any]  # the fixture of conftest

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
}


class Line(NamedTuple):
    record: dict[str, Any] | None  # None: a blank line
    is_ascii: bool
    blank: str
    end: str

    def encoded(self, is_last: bool) -> bytes:
        body = self.blank if self.record is None else json.dumps(self.record, ensure_ascii=self.is_ascii)
        return (body + ("" if is_last else self.end)).encode()


records = st.fixed_dictionaries(
    {"text": st.text(max_size=30)},
    optional={"id": st.text(max_size=5) | st.integers(), "é": st.text(max_size=5), "created": st.text(max_size=3)},
)
lines = st.builds(
    Line,
    record=st.none() | records,
    is_ascii=st.booleans(),
    blank=st.sampled_from(["", " ", "\t"]),
    end=st.sampled_from(["\n", "\r\n"]),
)


def expected(encoded: list[bytes], given_lines: list[Line], name: str) -> tuple[list[Any], list[int]]:
    """(id, text, position) of each document, and the positions of the records that have no text."""
    documents, rejects, position = [], [], 0
    for line, raw in zip(given_lines, encoded, strict=True):
        if line.record is not None:
            own = line.record.get("id", "")
            tail = f"={own}" if own != "" else f"@{position}"
            digest = xxhash.xxh3_128_hexdigest(f"web\0{name}\0{tail}".encode())
            if line.record["text"].strip():
                documents.append((digest, line.record["text"], position))
            else:
                rejects.append(position)
        position += len(raw)
    return documents, rejects


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    given_lines=st.lists(lines, max_size=8),
    split_bytes=st.integers(1, 200),
    ends=st.booleans(),
    cut=st.integers(0, 500),
)
def test_every_record_once(read: Read, given_lines: list[Line], split_bytes: int, ends: bool, cut: int) -> None:
    encoded = [line.encoded(is_last=k == len(given_lines) - 1 and not ends) for k, line in enumerate(given_lines)]
    content = b"".join(encoded)
    with tempfile.TemporaryDirectory() as folder:
        for suffix, compress in COMPRESS.items():
            path = Path(folder) / f"1.jsonl{suffix}"
            cut = min(cut, len(content))
            path.write_bytes(compress(content[:cut]) + compress(content[cut:]))  # two members, cut anywhere
            reading = read(path, split_bytes=split_bytes)
            documents, rejects = expected(encoded, given_lines, path.name)
            assert [(d["id"], d["text"], d["position"]) for d in reading.documents] == documents
            of_records = [r["position"] for r in reading.rejects if r["reason"] == "empty_text"]
            assert of_records == rejects
            assert reading.num_records == len(documents) + len(rejects)
            assert set(reading.reasons) <= ({"empty_text"} if reading.num_records else {"empty_file"})
            assert len({chunk.name for chunk in reading.chunks}) == len(reading.chunks)
