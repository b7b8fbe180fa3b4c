"""A run over broken files goes on, counts each reason, keeps what is good, and ends with exit code 3."""

import gzip
import json

import polars as pl
import zstandard
from flow_helpers import filler, lines, tilth


def broken_corpus(folder):
    good = [{"id": f"g{i}", "text": filler(i)} for i in range(300)]
    (folder / "good.jsonl").write_bytes(lines(good))
    bad = [
        b"{not json\n",
        b'{"id": "u", "text": "\xff\xfe"}\n',
        b'{"id": "m"}\n',
        b'{"id": "n", "text": null}\n',
        b'{"id": "l", "text": ["a"]}\n',
        b'{"id": "e", "text": "  "}\n',
        b'{"id": "s", "text": "a text about a harbour", "stance": "hostile"}\n',
        lines([{"id": "big", "text": "word " * 500_000}]),  # above max_document_mb
        lines([{"id": "g1", "text": "the id of another document of this source"}]),
        lines([{"id": "g2", "text": filler(2)}]),  # a copy: exact dedup, not quarantine
    ]
    (folder / "bad.jsonl").write_bytes(b"".join(bad))
    whole = zstandard.compress(lines([{"id": f"z{i}", "text": filler(1000 + i)} for i in range(400)]))
    (folder / "cut.jsonl.zst").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "unreadable.jsonl.gz").write_bytes(b"\x1f\x8b\x08 this is no gzip stream")
    (folder / "unreadable.parquet").write_bytes(b"PAR1 this is no parquet file PAR1")
    (folder / "good.jsonl.gz").write_bytes(
        gzip.compress(lines([{"id": f"c{i}", "text": filler(2000 + i)} for i in range(50)]))
    )


def test_every_broken_record_is_named_and_the_good_ones_are_kept(make_recipe, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    broken_corpus(corpus)
    recipe = make_recipe(
        inputs=[{"path": f"{corpus}/*", "source": "s", "stance_key": "stance"}],
        ingest={"max_document_mb": 1},
        mix={"phases": {"p": {"tokens": 20_000}}, "arms": {"u": {}}},
    )
    run = tmp_path / "run"
    done = tilth("curate", recipe, "--run", run, "--json")
    assert done.code == 3, done.err
    found = done.summary["quarantined"]
    once = {"bad_json", "bad_utf8", "missing_text", "null_text", "not_a_string", "empty_text", "bad_stance",
            "oversize", "duplicate_id", "empty_file"}  # fmt: skip
    assert {reason: n for reason, n in found.items() if reason in once} == dict.fromkeys(once, 1)
    assert found["truncated"] + found["unreadable_file"] == 3
    assert "quarantined" in done.err
    assert "max_quarantine_fraction" in done.err
    documents = pl.read_parquet(run / "10_documents/*.parquet")
    kept = set(documents["source_id"])
    assert {f"g{i}" for i in range(300)} | {f"c{i}" for i in range(50)} <= kept
    assert any(i.startswith("z") for i in kept), "what came before the break is kept"
    assert done.summary["duplicates"] == {"exact": 1, "near": 0, "earlier": 0, "duplicate_id": 1}
    rejects = pl.concat([pl.read_parquet(p) for p in run.glob("quarantine/*.parquet")])
    assert len(rejects) == done.summary["quarantined_total"]
    line = rejects.filter(pl.col("reason") == "bad_json").row(0, named=True)
    assert (line["file"], line["position"], line["head"].rstrip()) == ("bad.jsonl", 0, b"{not json")
    assert json.loads((run / "manifest.json").read_text())["summary"]["exit_code"] == 3
