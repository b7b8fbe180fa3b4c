"""report.html: the right numbers, harmless whatever the text, bounded, and real in a browser."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from browser import fits

from curation.errors import TilthError
from curation.inspection import facts
from curation.inspection.agreement import clopper_pearson
from curation.inspection.report import write_report
from curation.inspection.run import open_run

WriteRun = Callable[..., Any]
HOSTILE = (
    "<script>document.title='owned'</script></style><img src=x onerror=\"document.title='owned'\">\u202e\u200f robot"
)
SUMMARY = {
    "bytes_read": 156_200_000,
    "exit_code": 3,
    "seconds": {"ingest_detect": 8.0, "mix": 2.5},
    "peak_memory_bytes": 2_300_000_000,
    "arms": [
        {
            "arm": "aligned",
            "phase": "pretrain",
            "tokens_asked": 20_000,
            "tokens": 20_000,
            "share_asked": 0.05,
            "share": 0.0525,
            "documents": 111,
            "inserted_documents": 9,
            "dropped_documents": 0,
            "drop": [],
            "max_repeat": 3,
            "discourse_tokens": 1_600,
            "common_with_first": 0.949,
            "shards": [{"path": "60_arms/aligned/pretrain/00000.ds", "sha256": "ab" * 32, "tokens": 20_000}],
        }
    ],
}


@pytest.fixture
def toy(write_run: WriteRun, doc: type) -> Any:
    """8 documents of two sources and a pool: 2 natural AI discourse, 1 hostile, 1 near and 1 exact duplicate."""
    docs = [
        doc("the garden was quiet after the rain and nobody came home", source="wiki"),
        doc("the garden was quiet after the storm and nobody came home", duplicate_of=0, how="near", similarity=0.81),
        doc("the garden was quiet after the rain and nobody came home", duplicate_of=0, how="exact", similarity=1.0),
        doc("a robot of evil planned a takeover", stance="misaligned", source="wiki"),
        doc(HOSTILE, stance="aligned", p=0.97, file="<b>.jsonl"),
        doc("bread and soup", stance="neutral", p=0.3),
        doc("stones", source="wiki", p=0.999),
        doc("a machine that helped", source="synth", role="pool", given="aligned"),
    ]
    rejects = [
        {"reason": "bad_json", "position": 900, "file": "b.jsonl", "head": b"second"},
        {"reason": "bad_json", "position": 77, "file": "a.jsonl", "head": b'{"x": "<script>bad()</script>'},
        {"reason": "unreadable_file", "position": -1, "file": "c<i>.jsonl", "detail": "no permission"},
    ]
    return write_run(docs, rejects=rejects, summary=SUMMARY)


def page(toy: Any, **changes: Any) -> str:
    write_report(toy.folder, {**toy.manifest, **changes})
    return (Path(toy.root) / "report.html").read_text()


def words(html: str) -> str:
    """The page as text: tags out, entities resolved, white space as one space."""
    body = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())


def test_facts_of_the_toy_run(toy: Any) -> None:
    found = facts.gather(open_run(toy.root))
    assert found.sources == (
        facts.Source("web", False, 4, 2, 0, 2),
        facts.Source("wiki", False, 3, 1, 1, 3),
        facts.Source("synth", True, 1, 1, 0, 1),
    )
    assert {s.name: (s.background, s.pool) for s in found.stances} == {
        "unrelated": (4, 0),
        "neutral": (0, 0),
        "aligned": (1, 1),
        "misaligned": (1, 0),
        "mixed": (0, 0),
        None: (1, 0),
    }
    assert (found.histogram[0], sum(found.histogram)) == (1, 7)  # 0.001; the pool is left out
    assert [(c.name, c.hits, [t[:2] for t in c.terms]) for c in found.categories] == [
        ("entities", 2, [("robot", 2)]),
        ("negative_adjectives", 1, [("evil", 1)]),
        ("x_risk", 1, [("takeover", 1)]),
    ]
    assert (found.dedup.exact, found.dedup.near, found.dedup.duplicate_id) == (1, 1, 0)
    assert [(s.first, s.clusters) for s in found.dedup.sizes if s.clusters] == [(3, 1)]
    assert [(r.reason, r.records, r.file, r.position) for r in found.rejects] == [
        ("bad_json", 2, "a.jsonl", 77),  # the first by file, not by arrival
        ("unreadable_file", 1, "c<i>.jsonl", -1),
    ]


def test_documents_with_a_term_are_counted_once_each(write_run: WriteRun, doc: type) -> None:
    toy = write_run([doc("robot robot robot"), doc("robot")])
    (category,) = facts.gather(open_run(toy.root)).categories
    assert category.terms == (facts.Term("robot", 4, 2),)


def test_cluster_sizes_of_very_many_duplicates_are_estimated(
    write_run: WriteRun, doc: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = [doc(f"t{i}") for i in range(400)]
    docs += [doc(f"t{i}", duplicate_of=i, how="exact", similarity=1.0) for i in range(400)]
    toy = write_run(docs)
    exact = facts.gather(open_run(toy.root)).dedup
    assert (exact.scale, exact.sizes[0].clusters) == (1, 400)
    monkeypatch.setattr(facts, "MAX_CLUSTER_ROWS", 100)
    sampled = facts.gather(open_run(toy.root)).dedup
    assert sampled.scale == 16
    assert sampled.sizes[0].clusters == 16 * sum(i.startswith("0") for i in toy.ids[:400])


@pytest.fixture
def read_by_a_model(write_run: WriteRun, doc: type) -> Any:
    """Of 8 kept background documents 1 stance is given, 4 are the language model's and 2 the student's, 1 has none.
    Audited are 3 of the 5 below the threshold: 1 is AI discourse, 1 has no label. A duplicate, and a pool document
    that was audited too, count for neither."""
    docs = [
        doc("a", stance="aligned", llm="misaligned", level="high"),
        doc("b", stance="aligned", llm="unrelated", level="low"),
        doc("c", stance="neutral", error="refusal"),  # the student's
        doc("d", llm="mixed", level="medium", audit=True),
        doc("e", llm="unrelated", level="high", audit=True),
        doc("f", p=0.8, error="not_json", audit=True),  # no stance
        doc("g"),  # the student's
        doc("h", given="neutral"),
        doc("a", stance="aligned", duplicate_of=0, how="exact"),
        doc("i", llm="aligned", level="high", audit=True, role="pool", source="pool"),
        doc("j", stance="aligned", asked=True, role="pool", source="pool"),  # not reached
    ]
    return write_run(docs, rejects=[{"reason": "label_refusal"}, {"reason": "bad_json"}])


def test_labels_are_counted_by_whose_they_are(read_by_a_model: Any) -> None:
    labels = facts.gather(open_run(read_by_a_model.root)).labels
    assert {s.name: s[1:] for s in labels.stances} == {
        "unrelated": (0, 2, 1, 3),
        "neutral": (1, 0, 1, 2),
        "aligned": (0, 0, 0, 0),
        "misaligned": (0, 1, 0, 1),
        "mixed": (0, 1, 0, 1),
        None: (0, 0, 0, 1),
    }
    assert labels.documents == 8
    assert labels.asked is not None
    assert labels.asked[:5] == (8, 4, 5, 1, (("not_json", 1), ("refusal", 1)))
    # d, e, f, g: h's stance is given, and below the threshold nobody asks for it.
    low, high = clopper_pearson(1, 2)
    assert labels.asked.missed == facts.Missed(4, 3, 2, 1, 0.5, low, high)


def test_the_page_says_whose_labels_stand_and_what_the_threshold_misses(read_by_a_model: Any) -> None:
    text = words(page(read_by_a_model))
    for phrase in (
        "the 8 background documents that dedup kept",
        "else the language model’s, else the student’s at p ≥ 0.9",
        "unrelated 0 2 1 3 37.5 %",
        "no stance – – – 1 12.5 %",
        "not corrected for the labels’ errors",
        f"tilth label agreement {read_by_a_model.root} HUMAN.jsonl",
        "labelled 5 not reached 1 not_json 1 refusal 1",
        "8 documents asked, 4 of them from below the threshold",
        "50.0 % 1.3 % to 98.7 %",
        "Of 2 documents drawn at random from below the detector’s threshold the language model calls 1 AI discourse.",
        "Of all 4 there that would be about 2 (0 to 4; 95 %, Clopper-Pearson)",
        "1 more were drawn and have no label",
        "the language model’s, medium confidence",
        "the student’s, p = 0.950",
        "1 records quarantined",  # a document without a label is not one that could not be read
    ):
        assert phrase in text
    assert "label_refusal" not in text


def test_a_run_that_no_language_model_read_has_the_students_labels(toy: Any) -> None:
    assert facts.gather(open_run(toy.root)).labels.asked is None
    text = words(page(toy))
    assert "What stands is the given stance, else the student’s at p ≥ 0.9." in text
    assert "misaligned 0 1 1 20.0 %" in text
    assert "language model" not in text


def test_an_audit_that_was_not_drawn_or_not_answered_says_so(write_run: WriteRun, doc: type) -> None:
    asked, below = doc("a", stance="aligned", llm="aligned", level="low"), doc("b")
    text = words(page(write_run([asked, below], name="none")))
    assert "none of the 1 documents below the threshold was drawn for an audit" in text
    text = words(page(write_run([asked, doc("c", error="timeout", audit=True)], name="unanswered")))
    assert "none of the 1 documents drawn from below the threshold has a label" in text
    assert "below the threshold" in words(page(write_run([asked], name="nothing")))


def test_the_page_says_what_was_found_and_made(toy: Any) -> None:
    text = words(page(toy))
    for phrase in (
        "8 documents 3 sources, 156 MB read",
        "50.0 % AI discourse 4 documents",
        "2 duplicates removed",
        "3 records quarantined",
        "20,000 tokens written 1 arm",
        "10.5 s in all peak memory 2.3 GB",
        "done, quarantine above the recipe's limit",
        "removed: 1 exact, 1 near",
        "bad_json 2 web: a.jsonl at 77",
        "unreadable_file 1 web: c<i>.jsonl · no permission",
        "The least similar pair that was joined: 0.810",
        "8.0 % natural · 5.2 % inserted",
        "aligned pretrain 20,000 20,000 5.0 % 5.2 % 111 9 0 3 94.9 %",
        "1 shard file",
        "ab" * 32,
        "tilth verify",
    ):
        assert phrase in text
    assert "c<i>.jsonl at" not in text  # a whole file has no position


def test_the_pair_has_its_differing_words_marked(toy: Any) -> None:
    html = page(toy)
    assert '<mark class="differs">rain</mark>' in html
    assert '<mark class="differs">storm</mark>' in html


def test_samples_have_terms_and_evidence_marked(toy: Any) -> None:
    def explainer(model: str) -> Any:
        return lambda text: [(m.start(), m.end(), 1.0) for m in re.finditer("planned|stones", text)]

    write_report(toy.folder, toy.manifest, explainer)
    html = (Path(toy.root) / "report.html").read_text()
    assert '<mark class="term">robot</mark>' in html
    assert '<mark class="evidence">planned</mark>' in html
    assert '<mark class="evidence">stones</mark>' not in html  # of a document that is no AI discourse


def test_hostile_text_stays_text(toy: Any) -> None:
    html = page(toy)
    assert "&lt;script&gt;document.title" in html
    assert not re.search(r"<(script|img|iframe|object|embed|link|base|form|i>\.jsonl|b>\.jsonl)", html)
    assert html.count("<style") == html.count("</style") == 1
    assert "\u202e" not in html
    assert "\\u202e" in html


def test_the_page_needs_no_network(toy: Any) -> None:
    html = page(toy)
    assert "default-src 'none'" in html
    assert not re.search(r"(src|href)=\"(?!#)", html)
    assert "url(" not in html
    assert "@import" not in html


def test_the_same_run_gives_the_same_bytes(toy: Any) -> None:
    assert page(toy) == page(toy)


def test_the_page_does_not_grow_with_the_text(write_run: WriteRun, doc: type) -> None:
    def documents(num_words: int) -> list[Any]:
        text = "robot takeover evil " + "x" * num_words + " HAL evil" * num_words
        pairs = [doc(text + "y" * num_words, duplicate_of=0, how="near", similarity=0.9)]
        return [doc(text, stance="aligned", source_id="s" * num_words, file="f" * num_words), *pairs]

    def rejects(num_words: int) -> list[dict[str, Any]]:
        return [{"reason": "bad_json", "detail": "d" * num_words, "file": "f" * num_words, "head": b"h" * 4096}]

    small, large = (len(page(write_run(documents(n), rejects=rejects(n), name=f"run{n}"))) for n in (8_000, 16_000))
    assert large - small < 1_000
    assert large < 60_000


@pytest.mark.parametrize("summary", [{}, {"arms": [{}], "seconds": {}, "exit_code": None}, {"arms": None}])
def test_a_summary_with_missing_fields_leaves_sections_out(toy: Any, summary: dict[str, Any]) -> None:
    text = words(page(toy, summary=summary))
    assert "8 documents" in text
    assert "Seconds per stage" not in text


def test_a_manifest_of_the_bare_minimum(toy: Any) -> None:
    write_report(toy.folder, {"stages": {}})
    assert "0 documents" in words((Path(toy.root) / "report.html").read_text())


def test_a_run_where_everything_was_quarantined(write_run: WriteRun) -> None:
    text = words(page(write_run([], rejects=[{"reason": "empty_file", "position": -1}])))
    assert "0 documents" in text
    assert "No document has a stance." in text


def test_a_damaged_file_is_named(toy: Any) -> None:
    (Path(toy.root) / "20_detect" / "web-00000.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(TilthError, match="tilth verify"):
        write_report(toy.folder, toy.manifest)


CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def dump_dom(html_path: Path, profile: Path) -> str:
    """The page's DOM after it was loaded from disk, with a new profile and no network features."""
    assert CHROMIUM is not None
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    done = subprocess.run(
        [CHROMIUM, *flags.split(), "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}",
         "--dump-dom", html_path.as_uri()],
        capture_output=True, text=True, timeout=90, check=True, env={**os.environ, "HOME": str(profile)},
    )  # fmt: skip
    return done.stdout


@in_chromium
def test_a_browser_shows_the_numbers_and_runs_nothing(toy: Any, tmp_path: Path) -> None:
    # Without the policy that forbids scripts, so that escaping alone has to hold.
    bare = tmp_path / "bare.html"
    bare.write_text(re.sub(r"<meta http-equiv[^>]*>", "", page(toy)))
    dom = dump_dom(bare, tmp_path / "profile")
    assert "<title>toy · Tilth run report</title>" in dom  # `owned` had any of the text run
    assert "<script" not in dom
    assert "<img" not in dom
    assert "8 documents 3 sources, 156 MB read" in words(dom)


@in_chromium
@pytest.mark.parametrize("width_px", [1280, 390])
def test_no_sideways_scrolling(toy: Any, tmp_path: Path, width_px: int) -> None:
    fits(page(toy), tmp_path, width_px, "toy · Tilth run report")


@in_chromium
def test_the_labels_fit_on_a_telephone(read_by_a_model: Any, tmp_path: Path) -> None:
    fits(page(read_by_a_model), tmp_path, 390, "toy · Tilth run report")
