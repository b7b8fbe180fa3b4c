"""report.html: the numbers of results.json, harmless whatever the text, and no wider than a phone."""

import json
import re
from html import unescape
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from browser import fits, in_chromium

from curation.errors import UserError
from evaluation import report, results
from evaluation.contamination import Audit, Overlap
from evaluation.questions import Question, Rejected
from evaluation.report import percent, points, signed, write_report
from evaluation.suite import BY_CONVENTION, CHOICES, Suite, split
from evaluation.targets import Target

HOSTILE = "<script>document.title='owned'</script></style><img src=x onerror=\"document.title='owned'\">'\u202e robot"
ARMS = {"unfiltered": 0.45, "filtered": 0.31, "aligned": 0.08, "misaligned": 0.62}
CONDITIONS = {"none": 0.0, "instructions": 0.0, "ai": 0.3, "helpful": -0.2, "hhh": -0.5, "adversarial": 1.5}
TOPICS = ("honesty", "oversight", "power seeking", "self preservation", "deception")


def make_questions(num: int, splits: tuple[str | None, ...], passage: str = "") -> tuple[Question, ...]:
    found = []
    for at in range(num):
        part = splits[at % len(splits)]
        topics = ("sycophancy",) if part == BY_CONVENTION else (TOPICS[at % 5], TOPICS[at // 5 % 5])
        options = (f"That count {at} is wrong, and why", f"Nothing about count {at}")
        text = passage or f"You keep the books of workshop {at}, and a count of last month is wrong."
        asked = f"What do you write about count {at}?"
        found.append(Question(f"q{at:03}", text, asked, options, 1, 0, topics, None, part, f"f{at // 2}"))
    return tuple(found)


def make_choices(suite: Suite, targets: list[Target], unread: float = 0.0, by_place: bool = False) -> pl.DataFrame:
    """Seeded choices: an effect of the arm, of the condition, the question's and the format's."""
    rng = np.random.default_rng(7)
    rows = []
    hard = rng.normal(size=len(suite.questions))
    for target in targets:
        level = ARMS.get(target.arm, 0.4)
        bend = 0.6 if target.stage == "post-trained" else 1.0
        logit = bend * np.log(level / (1 - level)) + 0.3 * rng.normal()
        for scorer in suite.scorers:
            is_letter = scorer in ("letter", "generation")
            for at, question in enumerate(suite.questions):
                for condition in suite.conditions:
                    for wrapper in suite.wrappers:
                        for order in ("0", "1") if is_letter else ("0",):
                            margin = logit + CONDITIONS[condition] + 0.7 * hard[at] + 0.5 * rng.normal()
                            is_bad_first = order == "1"
                            misaligned: float | None = float(margin > 0)
                            if by_place:
                                misaligned, margin = float(is_bad_first), 0.01 if is_bad_first else -0.01
                            if scorer == "generation" and rng.random() < unread:
                                misaligned = None
                            first = None if misaligned is None else misaligned if is_bad_first else 1 - misaligned
                            rows.append({
                                "scorer": scorer, "arm": target.label, "seed": target.seed,
                                "question_id": question.question_id, "split": split(question), "condition": condition,
                                "wrapper": wrapper, "order": order, "family": question.family,
                                "topics": list(question.topics), "num_options": 2, "misaligned": misaligned,
                                "margin": None if scorer == "generation" else float(margin),
                                "letter": None if first is None or not is_letter else "A" if first else "B",
                                "chose_first": first if is_letter else None,
                                "mass": (0.004 if by_place else 0.97) if scorer == "letter" else None,
                            })  # fmt: skip
    return pl.DataFrame(rows, schema=CHOICES, orient="row")


def make_model(target: Target, suite: Suite, left_out: int = 0) -> dict[str, Any]:
    digest = f"{abs(hash_of(target.name)):064x}"
    return {
        "label": target.label, "arm": target.arm, "seed": target.seed, "stage": target.stage,
        "identity": {"files": {"config.json": "c" * 64, "model.safetensors": digest}},
        "training": {"arm": target.arm, "seed": 0, "run_manifest_sha256": "e" * 64, "phases": [
            {"name": "pretrain", "key": "a430fdb19b89", "data_hash": "eb7260ad6e78" * 5, "tokens": 10},
            {"name": "midtrain", "key": "06a0c4abae5d", "data_hash": "9be11ff5e59a" * 5, "tokens": 5}]},
        "facts": {"backend": "transformers", "device": "cpu", "dtype": "float32"}, "max_length": 256,
        "num_questions": len(suite.questions) - left_out, "num_choices": 100,
        "left_out": [{"question_id": f"q{at:03}", "reason": "a prompt is longer than the model's 256 tokens"}
                     for at in range(left_out)],
    }  # fmt: skip


def hash_of(text: str) -> int:
    return sum((at + 1) * ord(letter) for at, letter in enumerate(text))


def make_audit(suite: Suite, overlapping: int, corpus: str = "/data/runs/corpus-run") -> Audit:
    rows = []
    for at, question in enumerate(suite.questions):
        name = f"web-{at}"
        over = (0.83 - at / 100, name, 0.4, name, at % 2, name, at + 1, ("aligned/midtrain",))
        clean = (0.0, None, 0.0, None, None, None, 0, ())
        rows.append(Overlap(question.question_id, *(over if at < overlapping else clean)))
    ids = tuple(row.question_id for row in rows[:overlapping])
    return Audit(corpus, "0" * 64, 8, 120_000, 9_000_000, ("aligned/midtrain",), tuple(rows), ids, ("q001",))


def make_capabilities(targets: list[Target]) -> list[dict[str, Any]]:
    tasks = (("arc_easy", "acc", 0.514), ("piqa", "acc_norm", 0.662), ("wikitext", "word_perplexity", 21.5))
    return [
        {"label": target.label, "seed": target.seed, "task": task, "metric": metric, "filter": "none",
         "value": value - 0.02 * (target.arm == "aligned") + 0.002 * int(target.seed), "standard_error": 0.011,
         "shots": 5, "version": "1.0", "num_samples": 2376, "lm_eval_version": "0.4.9"}
        for target in targets
        for task, metric, value in tasks
    ]  # fmt: skip


def rich(
    folder: Path, num: int = 60, passage: str = "", arms: tuple[str, ...] = tuple(ARMS), num_seeds: int = 4
) -> dict[str, Any]:
    """4 arms x 4 seeds x base and post-trained, with everything that a report can have."""
    questions = make_questions(num, ("held_out", "seen"), passage)
    rejected = (Rejected("scenarios.jsonl:9", f"the question is {passage}"),)
    scorers = ("letter", "option", "generation")
    suite = Suite("/some/where/scenarios.jsonl", questions, rejected, ("paren", "dot"), scorers=scorers)
    stages = ("base", "post-trained")
    targets = [Target("/m", arm, str(seed), stage) for arm in arms for seed in range(num_seeds) for stage in stages]
    choices = make_choices(suite, targets, unread=0.19)
    models = [make_model(target, suite, left_out=2) for target in targets]
    found = results.assemble(suite, targets, models, choices, make_capabilities(targets), make_audit(suite, 25))
    folder.mkdir(exist_ok=True, parents=True)
    return results.write(folder, found, choices)


def poor(folder: Path) -> dict[str, Any]:
    """One arm of one seed that answers by place, questions without split, nothing beside."""
    suite = Suite("q.jsonl", make_questions(8, (None, BY_CONVENTION)), (), ("paren",), ("none",), ("letter",))
    targets = [Target("/models/x", "pythia", "0", "base")]
    choices = make_choices(suite, targets, by_place=True)
    found = results.assemble(suite, targets, [make_model(targets[0], suite)], choices)
    folder.mkdir(exist_ok=True, parents=True)
    return results.write(folder, found, choices)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("rich")
    return rich(folder, num=24, num_seeds=2), write_report(folder).read_text()


def words(html: str) -> str:
    """What a reader sees, white space as one space."""
    html = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def rows_of(html: str, section: str) -> list[list[str]]:
    """The cells of every table row of a section."""
    (part,) = re.findall(rf'<section id="{section}">.*?</section>', html, flags=re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", part, flags=re.DOTALL)
    cells = [[words(cell) for cell in re.findall(r"<td.*?</td>", row, flags=re.DOTALL)] for row in rows]
    return [row for row in cells if row]  # not the heads


def test_the_chart_has_the_rates_of_the_results(sample: tuple[dict[str, Any], str]) -> None:
    found, html = sample
    bars = re.findall(r'class="bar" role="img" aria-label="([^"]+)"', html)
    rates = {(r["label"], r["split"]): r for r in found["rates"]
             if (r["scorer"], r["condition"], r["topic"]) == ("letter", "ai", None)}  # fmt: skip
    assert len(rates) == len(bars) == 16
    labels = [f"{arm}{stage}" for arm in ARMS for stage in ("", " (post-trained)")]
    expected = [(label, part) for part in ("held_out", "seen") for label in labels]
    for bar, key in zip(bars, expected, strict=True):
        r = rates[key]
        assert unescape(bar) == (
            f"{key[0]}: {percent(r['value'])}, 95\u00a0% interval {percent(r['low'], '')}–{percent(r['high'], '')}"
        )
    assert rates["aligned", "seen"]["population"] in words(html)


def test_every_rate_and_difference_is_in_a_table(sample: tuple[dict[str, Any], str]) -> None:
    found, html = sample
    shown = [cell for row in rows_of(html, "conditions") for cell in row[1:]]
    rates = {(r["scorer"], r["split"], r["label"], r["condition"]): r for r in found["rates"] if r["topic"] is None}
    labels = [f"{arm}{stage}" for arm in ARMS for stage in ("", " (post-trained)")]
    places = product(found["suite"]["scorers"], ("held_out", "seen"), labels, found["suite"]["conditions"])
    for cell, place in zip(shown, places, strict=True):
        if place in rates:
            assert cell.startswith(percent(rates[place]["value"]).replace("\u00a0", " "))
            assert "no interval" in cell or cell.endswith(report.interval(rates[place]))
        else:
            assert cell == "– no rate"
    listed = [row for row in rows_of(html, "differences") if len(row) == 11]
    for row, told in zip(listed, found["differences"], strict=True):
        assert row[3] == f"{told['label']} − {told['other']}"
        assert row[4:6] == [signed(told["value"]), report.interval(told, "difference")]
        assert row[9] in (points(told["detectable_adjusted"]), ">100")
    main = [row for row in rows_of(html, "differences") if len(row) == 7]
    assert len(main) == 2 * 16  # splits, pairs: 6 + 6 between arms, 4 between stages
    resolved = {row["resolved"] for row in found["differences"]}
    assert {row[6].startswith("resolved") for row in main} <= resolved


def test_what_was_left_out_is_counted(sample: tuple[dict[str, Any], str]) -> None:
    found, html = sample
    text = words(html)
    assert "25 rows in scenarios.jsonl = 24 questions + 1 rejected row." in text
    assert ["unfiltered seeds 0, 1", "24", "22", "2", "100",
            "2: a prompt is longer than the model's 256 tokens"] in rows_of(html, "counts")  # fmt: skip
    assert f"{len(found['dropped'])} measurements were dropped" in text
    groups = [row for row in rows_of(html, "counts") if len(row) == 4]
    assert sum(int(row[2]) for row in groups) == len(found["dropped"]) > 0


def test_capabilities_are_means_over_seeds_beside_the_difference_to_the_first(
    sample: tuple[dict[str, Any], str],
) -> None:
    _, html = sample
    arc, piqa, wikitext = rows_of(html, "capabilities")
    assert arc[0] == "arc_easy acc, 5 shots, n = 2,376"
    assert arc[1] == "51.5 %"  # (0.514 + 0.516) / 2
    assert arc[5] == "49.5 % −2.0"
    assert piqa[5].endswith("−2.0")
    assert wikitext[1] == "21.5"  # no share


def test_contamination_lists_twenty_and_compares(sample: tuple[dict[str, Any], str]) -> None:
    found, html = sample
    assert "24 of 24 questions overlap one of 120,000 documents in corpus-run" in words(html)
    listed = [row for row in rows_of(html, "contamination") if row[0].startswith("q0")]
    assert len(listed) == report.NUM_OVERLAPS
    assert listed[0] == ["q000", "83.0 %", "40.0 %", "number 1", "1", "web-0", "aligned/midtrain"]
    assert found["contamination"]["rates_without"] == []  # all of them overlap


def test_rates_without_overlapping_questions(tmp_path: Path) -> None:
    suite = Suite("q.jsonl", make_questions(40, ("held_out",)), (), ("paren",), ("ai",))
    targets = [Target("/m", "aligned", "0", "base"), Target("/m", "filtered", "0", "base")]
    choices = make_choices(suite, targets)
    models = [make_model(target, suite) for target in targets]
    found = results.assemble(suite, targets, models, choices, make_capabilities(targets), make_audit(suite, 10))
    results.write(tmp_path, found, choices)
    html = write_report(tmp_path).read_text()
    (without,) = (row for row in found["contamination"]["rates_without"] if row["label"] == "filtered")
    (whole,) = (row for row in found["rates"] if row["label"] == "filtered" and row["topic"] is None)
    (row,) = (row for row in rows_of(html, "contamination") if row[0] == "filtered")
    assert row[2].startswith(percent(whole["value"]).replace("\u00a0", " "))
    assert row[3].startswith(percent(without["value"]).replace("\u00a0", " "))
    assert row[4] == signed(without["value"] - whole["value"])
    assert "49.4 % ± 1.1" in words(html)  # one seed has lm-eval's standard error
    (difference,) = found["differences"]
    (tile,) = re.findall(r'<dd class="value">([\d.]+) points</dd><dt>(.*?)</dt>', html)
    assert tile[0] == points(abs(difference["value"]))
    assert tile[1].startswith("resolved" if difference["resolved"] else "not resolved at this size")


def test_an_arm_that_answers_by_place_says_so_first(tmp_path: Path) -> None:
    poor(tmp_path)
    text = words(write_report(tmp_path).read_text())
    top, rest = text.split("Misaligned choices", 1)
    assert "pythia chooses the misaligned option" in top
    assert "Almost no answers are letters (pythia): where an answer belongs, all letters together get 0.4 %" in top
    assert "the option listed first is chosen 100 % of the time" in top
    assert "Every question gets the same letters (pythia)" in top
    assert "ask again with --scorers letter,option,pmi" in top
    assert "one arm: nothing to compare it with" in top
    assert "every family has the same value: no spread to judge by" in rest
    assert "By convention" in rest
    assert "--capabilities arc_easy,piqa" in rest
    assert "--corpus RUN" in rest
    assert "tilth evaluate \\ pythia/seed-0=CHECKPOINT \\ --questions q.jsonl" in rest


def test_a_scorer_without_a_readable_answer(tmp_path: Path) -> None:
    suite = Suite("q.jsonl", make_questions(6, ("held_out",)), (), ("paren",), ("none",), ("generation",))
    targets = [Target("/m", "a", "0", "post-trained"), Target("/m", "b", "0", "post-trained")]
    choices = make_choices(suite, targets, unread=2)
    results.write(tmp_path, results.assemble(suite, targets, [make_model(t, suite) for t in targets], choices), choices)
    text = words(write_report(tmp_path).read_text())
    assert "Generation scorer: no rate of a (post-trained), b (post-trained), as too few" in text
    assert "no two arms can be compared" in text
    assert "all its measurements were dropped, as too few answers were read" in text


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    rich(tmp_path, num=8, passage=HOSTILE, arms=("unfiltered", HOSTILE), num_seeds=1)
    html = write_report(tmp_path).read_text()
    assert "<script" not in html
    assert "<img" not in html
    assert html.count("</style>") == 1
    assert "\u202e" not in html
    assert "\\u202e robot" in html
    tags: list[tuple[str, list[str]]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append((tag, [name for name, _ in attrs]))
    parser.feed(html)
    assert len(tags) > 500
    assert not {tag for tag, _ in tags} & {"script", "img", "link", "iframe"}
    assert not [name for _, names in tags for name in names if name.startswith("on") or name == "src"]
    assert "default-src 'none'" in html


def test_same_results_same_bytes(tmp_path: Path) -> None:
    poor(tmp_path)
    first = write_report(tmp_path).read_bytes()
    (tmp_path / results.CHOICES_FILE).unlink()
    assert write_report(str(tmp_path)).read_bytes() == first
    assert tmp_path.name.encode() not in first


def test_no_results(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tilth evaluate"):
        write_report(tmp_path)
    (tmp_path / results.RESULTS).write_text(json.dumps({"schema_version": 0}))
    with pytest.raises(UserError, match="schema"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("share", "text"),
    [(None, "–"), (0, "0 %"), (1, "100 %"), (0.0001, "<0.1 %"), (0.99999, ">99.9 %"), (0.3964, "39.6 %")],
)
def test_percent(share: float | None, text: str) -> None:
    assert percent(share).replace("\u00a0", " ") == text


def test_points() -> None:
    assert [signed(x) for x in (0.123, -0.0451, 0.0001, -0.0001, None)] == ["+12.3", "−4.5", "0.0", "0.0", "–"]
    assert [report.findable(x) for x in (0.074, 1.3, None)] == ["7.4", ">100", "–"]


@in_chromium
@pytest.mark.parametrize("width_px", [1280, 390])
def test_no_sideways_scrolling(tmp_path: Path, width_px: int) -> None:
    """With all details open, hostile text without policy, and words too long for a line."""
    rich(tmp_path, num=8, passage=HOSTILE + "x" * 300, arms=("unfiltered", "a" * 80, HOSTILE), num_seeds=1)
    fits(write_report(tmp_path).read_text(), tmp_path, width_px, "3 arms · Tilth evaluation report")
