"""Run's frames: exactly the files of the manifest, with labels that mean what the schema says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from curation.errors import TilthError, UserError
from curation.inspection import open_run

WriteRun = Callable[..., Any]


def test_frames_have_the_rows_of_every_part_in_order(write_run: WriteRun, doc: type) -> None:
    toy = write_run([doc(f"text {i}") for i in range(5)], num_parts=2)
    documents = open_run(toy.root).documents.collect()
    assert documents["id"].to_list() == toy.ids
    assert documents["part"].to_list() == ["web-00000"] * 2 + ["web-00001"] * 3
    assert open_run(toy.root).clusters.collect()["id"].to_list() == toy.ids


def test_a_part_that_the_manifest_lacks_is_not_read(write_run: WriteRun, doc: type) -> None:
    toy = write_run([doc("mine")], num_parts=1)
    source = Path(toy.root) / "10_documents" / "web-00000.parquet"
    (source.parent / "web-00009.parquet").write_bytes(source.read_bytes())
    assert open_run(toy.root).documents.collect().height == 1


def test_labels_carry_source_and_effective_stance(write_run: WriteRun, doc: type) -> None:
    docs = [
        doc("sure", stance="aligned", p=0.95, source="a"),
        doc("unsure", stance="aligned", p=0.85, source="b"),
        doc("given", stance="unrelated", p=0.99, given="mixed", source="c"),
    ]
    labels = open_run(write_run(docs).root).labels.collect()
    assert labels["stance"].to_list() == ["aligned", None, "mixed"]
    assert labels["source"].to_list() == ["a", "b", "c"]
    assert {"p_aligned", "p_discourse", "discourse", "blocklist", "hits", "part"} <= set(labels.columns)


def test_quarantine_is_an_empty_frame_with_its_columns_when_nothing_was(write_run: WriteRun, doc: type) -> None:
    quarantine = open_run(write_run([doc("fine")]).root).quarantine.collect()
    assert quarantine.height == 0
    assert quarantine.columns == ["source", "file", "position", "source_id", "reason", "detail", "head", "part"]


def test_quarantine_rows(write_run: WriteRun, doc: type) -> None:
    toy = write_run([doc("fine")], rejects=[{"reason": "bad_json", "position": 7, "head": b"{\xff"}])
    row = open_run(toy.root).quarantine.collect().row(0, named=True)
    assert (row["reason"], row["position"], row["head"], row["part"]) == ("bad_json", 7, b"{\xff", "web-00000")


def test_sample_does_not_depend_on_parts_but_on_the_seed(write_run: WriteRun, doc: type) -> None:
    docs = [doc(f"text {i}", stance="aligned" if i % 2 else "neutral") for i in range(60)]
    one, many = write_run(docs, num_parts=1), write_run(docs, name="many", num_parts=7)
    first = open_run(one.root).sample("aligned", n=8, seed=3)
    assert first["stance"].to_list() == ["aligned"] * 8
    assert first["id"].to_list() == open_run(many.root).sample("aligned", n=8, seed=3)["id"].to_list()
    assert first["id"].to_list() != open_run(one.root).sample("aligned", n=8, seed=4)["id"].to_list()
    assert first["id"].to_list()[:5] == open_run(one.root).sample("aligned", n=5, seed=3)["id"].to_list()


def test_sample_gives_what_there_is(write_run: WriteRun, doc: type) -> None:
    run = open_run(write_run([doc("a"), doc("b", stance="mixed", p=0.5)]).root)
    assert run.sample("aligned").height == 0
    assert run.sample(n=10).height == 2
    with pytest.raises(UserError, match="did you mean 'aligned'"):
        run.sample("alignd")


def test_arms_is_the_summary_table_without_the_shards(write_run: WriteRun, doc: type) -> None:
    rows = [{"arm": "a", "phase": "p", "tokens": 5, "share": 0.0, "drop": ["x"], "shards": [{"path": "s"}]}]
    arms = open_run(write_run([doc("a")], summary={"arms": rows}).root).arms
    assert arms.to_dicts() == [{"arm": "a", "phase": "p", "tokens": 5, "share": 0.0}]


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        open_run(tmp_path)


def test_a_missing_file_is_named_as_damage(write_run: WriteRun, doc: type) -> None:
    toy = write_run([doc("a")], num_parts=1)
    (Path(toy.root) / "10_documents" / "web-00000.parquet").unlink()
    with pytest.raises(TilthError, match="tilth verify"):
        open_run(toy.root).sample()


def test_repr_has_counts_and_html_is_escaped(write_run: WriteRun, doc: type) -> None:
    arms = [{"arm": "<i>x</i>", "phase": "p", "tokens": 1200}]
    run = open_run(write_run([doc("a")], summary={"documents_read": 54412, "arms": arms}).root)
    assert repr(run) == "Run(toy: 54,412 documents, 1 arm-phases)"
    assert "<i>" not in run._repr_html_()
    assert "1,200" in run._repr_html_()
