"""agreement.html: the figures of `judge` as pictures, harmless whatever the text, bounded, and real in a browser."""

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from browser import fits, in_chromium

from curation.inspection import open_run
from curation.inspection.human import judge
from curation.inspection.quality import MAX_DISAGREEMENTS, write_agreement

WriteRun = Callable[..., Any]
HOSTILE = "<script>document.title='owned'</script></style><img src=x onerror=\"document.title='owned'\">\u202e robot"
TITLE = "toy · Tilth label agreement"


@pytest.fixture
def toy(write_run: WriteRun, doc: type) -> Any:
    """Labels of the language model, of the student and one given; people disagree on a hostile text."""
    docs = [
        doc(HOSTILE, stance="aligned", llm="misaligned", level="high", source_id="hostile"),
        *(doc(f"robot {i}", stance="aligned", llm="aligned", level="low", source_id=f"r{i}") for i in range(9)),
        *(doc(f"soup {i}", p=0.91 + i / 400, source_id=f"s{i}") for i in range(30)),
        doc("vague", stance="neutral", p=0.6, source_id="vague"),
        doc("told", given="mixed", source_id="told"),
    ]
    return write_run(docs)


def said(**changes: str) -> dict[str, str]:
    """What people say of `toy`: all as labelled but the hostile one, `changes` and one who is not there."""
    truth = {f"r{i}": "aligned" for i in range(9)} | {f"s{i}": "unrelated" for i in range(30)}
    return truth | {"hostile": "neutral", "vague": "neutral", "told": "mixed", "<i>nobody</i>": "mixed"} | changes


def page(run: Any, truth: dict[str, str]) -> str:
    human = Path(run.root).parent / "<b>human.jsonl"
    human.write_text("".join(json.dumps({"id": key, "stance": stance}) + "\n" for key, stance in truth.items()))
    opened = open_run(run.root)
    path = write_agreement(opened, judge(opened, str(human)))
    assert path == f"{run.root}/agreement.html"
    return Path(path).read_text()


def words(html: str) -> str:
    """The page as text: tags out, entities resolved, white space as one space."""
    body = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())


def test_the_page_says_how_good_the_labels_are(toy: Any) -> None:
    text = words(page(toy, said(s0="aligned")))
    for phrase in (
        "against people, on 42 documents.",
        "42 of 43 human labels used",
        "the label is the student’s for 30, the language model’s for 10, given for 1, the student’s likeliest for 1",
        "95.2 % labels right 40 of 42",
        "aligned 1 10 % · 9 90 % · · 10",  # the confusion's row
        "Of 13 documents that people call AI discourse the run has 12; of the 29 others it takes 0 for AI discourse",
        "low 9 9 1.00 0.66 to 1.00",
        "medium 0 0 never said here",
        "high 1 0 0.00 0.00 to 0.97",
        "Expected calibration error",
        "Perfect calibration would show",
        "Share of the 42 background documents that dedup kept. Corrected by 42 of them",
        "all it holds nothing back",
        "2 documents, the surest labels first",
        "misaligned the language model’s, high confidence",
        "unrelated the student’s, p = 0.910 soup 0",
        "no document has this id or source_id 1 <i>nobody</i>",
    ):
        assert phrase in text, phrase


def test_what_is_unknown_says_why(write_run: WriteRun, doc: type) -> None:
    toy = write_run([doc("a robot", given="aligned", source_id="a"), doc("soup"), doc("robots", stance="aligned")])
    text = words(page(toy, {"a": "aligned"}))
    for phrase in (
        "Macro-F1 1.00",
        "one class only: all agreement is expected",
        "the run has none",
        "people have none",
        "None of these labels is the student’s",
        "No language model read this run",
        "Not corrected for the labels’ errors: none of the 1 documents above the threshold has a human label",
        "detect the detector’s threshold none of the 1 documents above the threshold has a human label",
        "Nowhere, on these documents.",
    ):
        assert phrase in text, phrase
    assert "aligned 66.7 %" in text  # as labelled, for want of better


def test_no_background_document_has_no_share(write_run: WriteRun, doc: type) -> None:
    toy = write_run([doc("a robot", given="aligned", source_id="a", role="pool")])
    assert "prevalence needs documents, and there are none" in words(page(toy, {"a": "aligned"}))


def test_only_the_first_disagreements_are_shown(write_run: WriteRun, doc: type) -> None:
    docs = [doc(f"soup {i} " + "x" * 10_000, p=0.91 + i / 1000, source_id=f"s{i}") for i in range(30)]
    html = page(write_run(docs), {f"s{i}": "aligned" for i in range(30)})
    assert f"{MAX_DISAGREEMENTS} of 30, the surest labels first" in words(html)
    shown = re.findall(r">soup (\d+) ", html)
    assert shown == [str(i) for i in range(29, 9, -1)]
    assert len(html) < 60_000


def test_hostile_text_stays_text(toy: Any) -> None:
    html = page(toy, said())
    assert "&lt;script&gt;document.title" in html
    assert "&lt;i&gt;nobody" in html
    assert not re.search(r"<(script|img|iframe|object|embed|link|base|form|i>nobody|b>human)", html)
    assert html.count("<style") == html.count("</style") == 1
    assert "\u202e" not in html
    assert "default-src 'none'" in html
    assert not re.search(r"(src|href)=\"(?!#)|url\(|@import", html)


def test_the_same_labels_give_the_same_bytes(toy: Any) -> None:
    assert page(toy, said()) == page(toy, said())


def test_notebooks_show_tables(toy: Any, tmp_path: Path) -> None:
    page(toy, said())
    run, human = open_run(toy.root), tmp_path / "<b>human.jsonl"
    text = words(run.agreement(human)._repr_html_())
    assert "Which stance" in text
    assert "low 9 9 1.00" in text
    assert re.search(r"0\.600 to 0\.9\d\d 16 ", text)  # the first bin
    corrected, plain = run.prevalence(human)._repr_html_(), run.prevalence()._repr_html_()
    assert "95 % interval" in corrected
    assert "95 % interval" not in plain
    for html in (corrected, plain):
        assert "unrelated 71.4 %" in words(html)


@in_chromium
@pytest.mark.parametrize("width_px", [1280, 390])
def test_a_browser_runs_nothing_and_scrolls_not_sideways(toy: Any, tmp_path: Path, width_px: int) -> None:
    fits(page(toy, said(s0="aligned")), tmp_path, width_px, TITLE)
