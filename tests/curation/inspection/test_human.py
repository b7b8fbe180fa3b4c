"""Human labels of a run: how they are read and joined, and what Run and the command line say of them."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from flow_helpers import tilth

from curation.errors import UserError
from curation.inspection import Run, open_run
from curation.inspection.human import (
    AMBIGUOUS,
    BLANK,
    LIKELIEST,
    NOT_HERE,
    QUARANTINED,
    TWICE,
    agreement_facts,
    match,
    read_human,
)
from curation.inspection.run import GIVEN, MODEL, STUDENT

WriteRun = Callable[..., Any]
WriteHuman = Callable[..., str]


@pytest.fixture
def human(tmp_path: Path) -> WriteHuman:
    def write(rows: list[dict[str, Any]], name: str = "human.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def toy(write_run: WriteRun, doc: type) -> Any:
    docs = [
        doc("a kind robot", stance="aligned", p=0.95, source_id="one"),
        doc("soup", stance="unrelated", p=0.6, source_id="two"),
        doc("a vile robot", stance="aligned", p=0.5, source_id="three"),
        doc("given", stance="unrelated", p=0.99, given="mixed", source_id="four"),
        doc("bread", stance="unrelated", p=0.99, source_id="same"),
        doc("bread", stance="unrelated", p=0.99, source_id="same", duplicate_of=4, how="exact"),
        doc("cheese", stance="unrelated", p=0.97, source_id="shared", source="a"),
        doc("wine", stance="unrelated", p=0.98, source_id="shared", source="b"),
    ]
    return write_run(docs, rejects=[{"reason": "bad_json", "source_id": "broken"}])


def test_the_ways_to_say_a_stance(human: WriteHuman) -> None:
    path = human(
        [
            {"id": "a", "stance": "mixed"},
            {"id": 7, "label": "aligned"},
            {"id": "b", "stance": "neutral", "is_ai_discourse": False},
            {"id": "c", "stance": "neutral", "is_ai_discourse": True},
            {"id": "d", "stance": None, "label": None, "is_ai_discourse": None},
        ]
    )
    assert [(key, truth) for key, truth, _ in read_human(path)] == [
        ("a", "mixed"), ("7", "aligned"), ("b", "unrelated"), ("c", "neutral"), ("d", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"stance": "mixed"}, "line 1 has no `id`"),
        ({"id": "a", "stance": "alined"}, "did you mean 'aligned'"),
        ({"id": "a", "is_ai_discourse": "no"}, "give true or false"),
        ({"id": "a", "is_ai_discourse": True}, "known are unrelated"),
        ({"id": "a", "is_ai_discourse": True, "stance": "unrelated"}, "keep one"),
        (["a"], "is not a JSON object"),
    ],
)
def test_what_is_wrong_in_the_file_is_named_with_its_line(human: WriteHuman, row: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        list(read_human(human([row])))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, told in ((tmp_path / "none.jsonl", "there is no file"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=told):
            list(read_human(str(path)))
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"bad\.jsonl line 1 is not JSON"):
        list(read_human(str(tmp_path / "bad.jsonl")))
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(b'{"id": "a", "stance": "mixed"}\n'))
    assert [key for key, *_ in read_human(str(tmp_path / "packed.jsonl.gz"))] == ["a"]


def test_labels_find_their_documents_or_say_why_not(toy: Any, human: WriteHuman) -> None:
    rows = [
        {"id": toy.ids[0], "stance": "aligned"},
        {"id": "one", "stance": "aligned"},  # the same document by its source_id
        {"id": "two", "stance": "neutral"},
        {"id": "same", "stance": "unrelated"},  # two copies: the kept one
        {"id": "shared", "stance": "unrelated"},
        {"id": "broken", "stance": "mixed"},
        {"id": "elsewhere", "stance": "mixed"},
        {"id": "three", "stance": None},
    ]
    found = match(open_run(toy.root), human(rows))
    assert sorted(found.rows["id"]) == sorted([toy.ids[0], toy.ids[1], toy.ids[4]])
    assert (found.matching.num_records, found.matching.num_matched) == (8, 3)
    assert found.matching.not_matched == {TWICE: 1, AMBIGUOUS: 1, QUARANTINED: 1, NOT_HERE: 1, BLANK: 1}
    assert found.matching.examples[NOT_HERE] == ("elsewhere",)
    assert "3 of 8 human labels used; 1 " in found.matching.told()


def test_labels_that_contradict_or_match_nothing(toy: Any, human: WriteHuman) -> None:
    run = open_run(toy.root)
    with pytest.raises(UserError, match=r"'one' is mixed in .* line 1 and aligned in .* line 2: keep one"):
        run.agreement(human([{"id": "one", "stance": "mixed"}, {"id": "one", "stance": "aligned"}]))
    with pytest.raises(UserError, match=r"no label of a document .* 0 of 1 human labels used; 1 no document has"):
        run.agreement(human([{"id": "x", "stance": "mixed"}]))
    with pytest.raises(UserError, match="it has no records"):
        run.agreement(human([]))


def test_a_label_is_the_effective_stance_or_the_likeliest(toy: Any, human: WriteHuman) -> None:
    """one: the student is sure; two and three: it is not, so its likeliest; four: given, so without a confidence."""
    rows = [{"id": key, "stance": "mixed"} for key in ("one", "two", "three", "four")]
    found = match(open_run(toy.root), human(rows)).rows.sort("source_id")
    assert found.select("source_id", "label", "probability").rows() == [
        ("four", "mixed", None),
        ("one", "aligned", pytest.approx(0.95)),
        ("three", "aligned", pytest.approx(0.5)),
        ("two", "unrelated", pytest.approx(0.6)),
    ]


def test_disagreements_come_with_the_surest_first(toy: Any, human: WriteHuman) -> None:
    rows = [("one", "aligned"), ("two", "neutral"), ("three", "misaligned"), ("four", "neutral"), ("same", "mixed")]
    found = open_run(toy.root).disagreements(human([{"id": k, "stance": s} for k, s in rows]))
    assert found.columns == ["id", "source_id", "text", "truth", "label", "whose", "probability", "level"]
    assert found.drop("id").rows() == [
        ("same", "bread", "mixed", "unrelated", STUDENT, pytest.approx(0.99), None),
        ("two", "soup", "neutral", "unrelated", LIKELIEST, pytest.approx(0.6), None),
        ("three", "a vile robot", "misaligned", "aligned", LIKELIEST, pytest.approx(0.5), None),
        ("four", "given", "neutral", "mixed", GIVEN, None, None),
    ]


def test_a_language_models_label_has_a_level_and_no_probability(
    write_run: WriteRun, doc: type, human: WriteHuman
) -> None:
    """low: 1 of 2 right; high: 2 of 2. `unread` has no answer, so the student's stands; `given` was not asked."""
    toy = write_run(
        [
            doc("a", stance="aligned", llm="mixed", level="low", source_id="low, wrong"),
            doc("b", stance="aligned", llm="aligned", level="low", source_id="low"),
            doc("c", stance="aligned", llm="unrelated", level="high", source_id="high, wrong about AI"),
            doc("d", stance="aligned", llm="aligned", level="high", source_id="high"),
            doc("e", stance="aligned", error="refusal", source_id="unread"),
            doc("f", stance="aligned", given="neutral", source_id="given"),
        ]
    )
    truth = {"low, wrong": "aligned", "low": "aligned", "high, wrong about AI": "unrelated", "high": "aligned",
             "unread": "mixed", "given": "neutral"}  # fmt: skip
    path = human([{"id": key, "stance": stance} for key, stance in truth.items()])
    run = open_run(toy.root)
    rows = match(run, path).rows.sort("source_id").select("source_id", "label", "whose", "probability", "level").rows()
    assert rows == [
        ("given", "neutral", GIVEN, None, None),
        ("high", "aligned", MODEL, None, "high"),
        ("high, wrong about AI", "unrelated", MODEL, None, "high"),
        ("low", "aligned", MODEL, None, "low"),
        ("low, wrong", "mixed", MODEL, None, "low"),
        ("unread", "aligned", STUDENT, pytest.approx(0.95), None),
    ]
    levels = agreement_facts(run, path)["agreement"]["confidence_levels"]
    assert [(row["name"], row["documents"], row["right"], row["share"]) for row in levels] == [
        ("low", 2, 1, 0.5), ("medium", 0, 0, None), ("high", 2, 2, 1.0),
    ]  # fmt: skip
    # The language model's first: its level and the student's probability do not compare.
    assert run.disagreements(path)["source_id"].to_list() == ["low, wrong", "unread"]


def test_disagreements_show_no_control_characters_and_not_the_whole_text(
    write_run: WriteRun, doc: type, human: WriteHuman
) -> None:
    toy = write_run([doc("\x1b[31m\n" + "word " * 500)], num_parts=1)
    text = open_run(toy.root).disagreements(human([{"id": toy.ids[0], "stance": "mixed"}]))["text"][0]
    assert text.startswith("\\u001b[31m word word")
    assert len(text) <= 310


def big(write_run: WriteRun, doc: type, human: WriteHuman) -> tuple[Run, str]:
    """90 unrelated documents and 10 aligned. Labelled: 9 of 10 aligned ones right, and 1 of 30 unrelated ones is not.
    Two more were removed by dedup, one of them AI discourse whose representative is not; a pool document is no one's
    background."""
    docs = [doc(f"soup {i}", source_id=f"u{i}") for i in range(90)]
    docs += [doc(f"robot {i}", stance="aligned", source_id=f"a{i}") for i in range(10)]
    docs += [
        doc("soup 0", source_id="copy", duplicate_of=0, how="exact"),
        doc("robot x", stance="aligned", source_id="gone", duplicate_of=1, how="duplicate_id"),
        doc("pool", stance="misaligned", source_id="pool", role="pool", source="pool"),
    ]
    toy = write_run(docs)
    rows = [{"id": f"a{i}", "stance": "aligned" if i else "unrelated"} for i in range(10)]
    rows += [{"id": f"u{i}", "stance": "unrelated" if i else "misaligned"} for i in range(30)]
    rows += [{"id": "gone", "stance": "aligned"}, {"id": "pool", "stance": "misaligned"}]
    return open_run(toy.root), human(rows)


def test_prevalence_is_of_kept_background_documents(write_run: WriteRun, doc: type, human: WriteHuman) -> None:
    run, path = big(write_run, doc, human)
    plain, corrected = run.prevalence(), run.prevalence(path)
    assert [round(s.predicted, 6) for s in plain.shares] == [0.9, 0, 0.1, 0, 0]
    assert (plain.discourse.corrected, plain.num_labelled) == (None, 0)
    assert (corrected.num_documents, corrected.num_labelled) == (100, 40)
    values = {s.name: s.corrected.value for s in corrected.shares}
    assert values == pytest.approx({"unrelated": 0.88, "neutral": 0, "aligned": 0.09, "misaligned": 0.03, "mixed": 0})
    assert corrected.discourse.corrected.value == pytest.approx(0.12)
    assert corrected.discourse.corrected.low < 0.12 < corrected.discourse.corrected.high


def test_recall_of_detect_and_dedup(write_run: WriteRun, doc: type, human: WriteHuman) -> None:
    run, path = big(write_run, doc, human)
    detect, dedup = run.recall_lost(path)
    assert detect.figure.value == pytest.approx(9 / (9 + 3))  # 10 · 9/10 pass, 90 · 1/30 do not
    assert (dedup.num_lost, dedup.num_labelled_lost) == (1, 1)
    assert dedup.figure.value == pytest.approx(9 / 10)


def test_facts_are_plain_and_say_what_cannot_be_corrected(toy: Any, human: WriteHuman) -> None:
    facts = agreement_facts(open_run(toy.root), human([{"id": "one", "stance": "aligned"}]))
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert "documents below the threshold has a human label" in facts["prevalence"]["reason"]
    assert [stage["stage"] for stage in facts["recall"]] == ["detect", "dedup"]


def test_the_command_prints_tables_and_one_json_line(write_run: WriteRun, doc: type, human: WriteHuman) -> None:
    run, path = big(write_run, doc, human)
    done = tilth("label", "agreement", run.folder.root, path, "--json")
    assert done.code == 0, done.err
    assert done.summary["agreement"]["num_documents"] == 42
    assert done.summary == agreement_facts(run, path)
    for said in (
        "42 of 42 human labels used",
        "confusion",
        "kappa",
        "macro-F1",
        "(ECE)",
        "prevalence",
        "detect  recall",
        f"page: {run.folder.root}/agreement.html",
    ):
        assert said in done.err
    assert (Path(run.folder.root) / "agreement.html").read_text().startswith("<!doctype html>")
    assert run.agreement(path).confusion == tuple(map(tuple, done.summary["agreement"]["confusion"]))


def test_the_command_ends_with_one_sentence_where_it_cannot(toy: Any, human: WriteHuman, tmp_path: Path) -> None:
    for arguments in ((toy.root, "none.jsonl"), (tmp_path / "no-run", human([])), (toy.root, human([]))):
        done = tilth("label", "agreement", *arguments)
        assert done.code == 2
        assert done.out == ""
        assert done.err.startswith("error: ")
        assert len(done.err.strip().splitlines()) == 1
    assert not (Path(toy.root) / "agreement.html").exists()


def test_labels_of_an_empty_frame_keep_their_types(toy: Any, human: WriteHuman) -> None:
    found = open_run(toy.root).disagreements(human([{"id": "one", "stance": "aligned"}]))
    assert found.height == 0
    assert found.schema["probability"] in (pl.Float32, pl.Float64)
