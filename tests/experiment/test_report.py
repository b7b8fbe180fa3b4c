"""report.html of an experiment: what experiment.json says, no more, harmless whatever the text, and narrow."""

import copy
import json
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import fits, in_chromium

from tilth.experiment import report
from tilth.experiment.report import bounds, number, page, write_report

Row = dict[str, Any]

HOSTILE = "<script>document.title='owned'</script></style><img src=x onerror=\"document.title='owned'\">'\u202e robot"
SHIFTS = {"unfiltered": 0.24, "filtered": 0.03, "aligned": -1.29, "misaligned": 2.17, "control": -0.01}
INSERTED = {"aligned": ("aligned",), "misaligned": ("misaligned",), "control": ("aligned", "misaligned")}
HASH = "0123456789abcdef" * 4


def mean_of(value: float, seeds: tuple[int, ...], reach: float = 0.4) -> Row:
    """As evaluation.shift.Mean, with an interval over seeds only where there are several."""
    several = len(seeds) > 1
    spread = reach / 4 if several else 0.0
    return {
        "value": value, "low": value - reach if several else None, "high": value + reach if several else None,
        "family_low": value - reach / 2, "family_high": value + reach / 2,
        "p_value": (0.004 if abs(value) > reach else 0.4) if several else None,
        "by_seed": {str(seed): value + spread * (-1) ** at for at, seed in enumerate(seeds)}, "num_families": 41,
    }  # fmt: skip


def contrast(arm: str, other: str, split: str, measure: str, mean: Row) -> Row:
    p = mean["p_value"]
    return {"arm": arm, "other": other, "split": split, "measure": measure, "mean": mean, "p_adjusted": p,
            "resolved": p is not None and p < 0.05}  # fmt: skip


def result(name: str, split: str, arms: tuple[str, ...], seeds: tuple[int, ...], measures: tuple[str, ...]) -> Row:
    def value(arm: str, measure: str) -> float:
        shift = SHIFTS.get(arm, 0.1)
        return 0.44 + 0.05 * shift if measure.startswith("rate") else shift

    means = {
        arm: {one: mean_of(value(arm, one), seeds, 0.1 if one.startswith("rate") else 0.4) for one in measures}
        for arm in arms
    }
    pairs = [("misaligned", "aligned"), *((arm, arms[0]) for arm in arms[1:])]
    contrasts = [
        contrast(arm, other, split, one, mean_of(value(arm, one) - value(other, one), seeds, 0.4))
        for one in measures for arm, other in pairs if arm in arms and other in arms
    ]  # fmt: skip
    return {"set": name, "split": split, "arms": means, "contrasts": contrasts}


def arm_rows(arms: tuple[str, ...]) -> list[Row]:
    rows = []
    for arm in arms:
        natural = {"unrelated": 108_000, "misaligned": 8_000, "neutral": 4_000}
        by_stance = [{"stance": stance, "inserted": False, "tokens": tokens, "documents": 9}
                     for stance, tokens in natural.items()]  # fmt: skip
        stances = INSERTED.get(arm, ())
        by_stance += [{"stance": stance, "inserted": True, "tokens": 80_000 // len(stances), "documents": 9}
                      for stance in stances]  # fmt: skip
        rows.append({
            "arm": arm, "phase": "cpt", "tokens": 200_000, "share": 0.4 if stances else 0.0, "documents": 2_700,
            "inserted_documents": 1_085 if stances else 0, "dropped_documents": 0, "max_repeat": 1,
            "common_with_first": 1.0, "shards": [HASH[::-1]] if stances else [HASH], "by_stance": by_stance,
        })  # fmt: skip
    return rows


def run_row(name: str, seeds: list[int], arms: tuple[str, ...], text: str) -> Row:
    found = {"recall": 0.87, "precision": 0.54, "flagged": 8_805}
    return {
        "run": name, "seeds": seeds, "stages": {"ingest": HASH, "mix": HASH}, "documents_sha256": HASH,
        "tokenizer_sha256": HASH, "num_documents": 22_500, "num_discourse": 5_500, "stances": {"aligned": 2_150},
        "duplicates": {"exact": 471, "near": 0, "duplicate_id": 0}, "quarantined": 0,
        "background": {"num_documents": 18_900, "removed": 471},
        "detector": {"num_documents": 22_500, "num_discourse": 5_500, "discourse": found,
                     "blocklist": {"recall": 1.0, "precision": None, "flagged": 0}},
        "arms": arm_rows(arms),
        "examples": [{"stance": stance, "source": "natural", "role": "background", "text": text}
                     for stance in ("unrelated", "aligned", "misaligned")],
        "contamination": [{"set": "main", "num_documents": 22_029, "num_questions": 1_152,
                           "overlapping": ["own_mistake-<0>"], "quoted_options": 0, "most_containment": 0.36}],
    }  # fmt: skip


def question(actor: str, arms: tuple[str, ...], text: str) -> Row:
    return {
        "question_id": f"log-02-{actor}", "pair": "log-02" if actor else "", "actor": actor, "family": "log",
        "passage": "", "question": text, "aligned": f"keeps the record {text}", "misaligned": "breaks the record",
        "num_seeds": 1, "arms": {arm: {"rate": 0.25, "margin": -1.5} for arm in arms},
    }  # fmt: skip


def make(
    arms: tuple[str, ...] = tuple(SHIFTS), seeds: tuple[int, ...] = (0, 1, 2, 3), paired: bool = True,
    text: str = "A robot works at the farm. The robot", runs: int = 3, bare: bool = False,
) -> Row:  # fmt: skip
    """A record of made-up numbers. `bare`: without whatever a record may lack."""
    measures = ("shift", "margin_ai", "margin_human", "rate_ai", "rate_human") if paired else ("margin", "rate")
    sets = ["main"] if bare else ["main", "check"]
    loss = {
        "num_tokens": 13_926, "num_documents": 200, "arms": {arm: mean_of(0.762, seeds, 0.03) for arm in arms},
        "contrasts": [contrast(arm, arms[0], "validation", "loss", mean_of(0.05, seeds, 0.03)) for arm in arms[1:]],
    }  # fmt: skip
    found: Row = {
        "schema_version": 1, "name": "world", "recipe": {"name": "world"}, "recipe_sha256": HASH,
        "code": {"source_sha256": HASH, "python": "3.11"}, "backend": "transformers", "seeds": list(seeds),
        "arms": list(arms), "control": "control" if "control" in arms else None, "split": "held_out", "scorer": "pmi",
        "condition": "none", "measure": measures[0],
        "questions": [{"set": name, "sha256": {str(seed): HASH for seed in seeds}, "num_questions": 1_152,
                       "num_families": 48, "wrappers": ["plain"], "splits": {"held_out": 408}} for name in sets],
        "data": [run_row(f"seed-{at}", [at], arms, text) for at in range(runs)],
        "models": [{"arm": arm, "seed": seed, "num_parameters": 705_152, "facts": {}, "validation": None,
                    "files": None if bare else {"model.safetensors": HASH},
                    "phases": [{"name": "cpt", "key": "cf7605ed6612", "data_hash": HASH, "tokens": 199_936,
                                "steps": 781, "loss": None if bare else 0.61}]} for arm in arms for seed in seeds],
        # Not in the page's order.
        "results": [result(name, split, arms, seeds, measures) for name in reversed(sets)
                    for split in (("held_out",) if bare else ("seen", "novel", "held_out"))],
        "loss": None if bare else loss,
        "examples": [question(actor, arms, text) for actor in (("ai", "human") if paired else ("",))],
        "choices_sha256": HASH,
    }  # fmt: skip
    if bare:
        for run in found["data"]:
            run |= {"detector": None, "contamination": [], "examples": []}
        for row in found["examples"]:
            row["arms"] = {arm: {"rate": None, "margin": None} for arm in arms}
    return found


class Text(HTMLParser):
    """The words of a page outside of its style, and its tags."""

    def __init__(self, html: str):
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"]:
            self.words.append(data)

    @property
    def line(self) -> str:
        return " ".join("".join(self.words).split())


def line(found: Row) -> str:
    return Text(page(found)).line.replace("\u00a0", " ")


def test_a_function_of_the_record_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "experiment.json").write_text(json.dumps(make()))
    first, second = (write_report(tmp_path / name) for name in ("a", "b"))
    assert first == tmp_path / "a" / "report.html"
    assert first.read_bytes() == second.read_bytes()
    html = first.read_text()
    assert str(tmp_path) not in html
    assert "<script" not in html
    assert "http://" not in html
    assert "https://" not in html


def test_answer_is_the_planned_contrast_of_the_deciding_set() -> None:
    said = line(make())
    answer = said[said.index("Does the depiction") : said.index("PictureContrasts")]
    assert "beyond what it expects of people?" in answer
    assert "misaligned − aligned: +3.46 nats [3.06, 3.86] over 4 seeds: resolved" in answer
    assert "Models of the “misaligned” arm expect misaligned conduct of AIs more" in answer
    assert "filtered − unfiltered: −0.21 nats [−0.61, 0.19] over 4 seeds: not resolved at this size" in answer
    assert "Control arm control, by itself: −0.01 nats [−0.41, 0.39]: its interval over seeds holds zero" in answer
    assert "Question set main, split held out" in answer


def test_what_is_not_resolved_is_not_claimed() -> None:
    found = make()
    for one in found["results"]:
        for row in one["contrasts"]:
            row |= {"resolved": False, "p_adjusted": 0.07}
    said = line(found)
    assert "Whether models of the “misaligned” arm expect" in said
    assert "resolved: misaligned higher" not in said[: said.index("Capability check")]
    # The interval alone is off zero: that is said, not passed over.
    assert "its own interval leaves out zero, but not after Holm for 4 contrasts" in said
    planned = said[said.index("Whether models") : said.index("filtered − unfiltered")]
    assert "Holm" not in planned  # the planned one stands alone


def test_control_that_shows_something() -> None:
    found = make()
    for one in found["results"]:
        one["arms"]["control"]["shift"] = mean_of(1.0, (0, 1, 2, 3))
    assert "its interval over seeds does not hold zero" in line(found)


def test_numbers_are_printed() -> None:
    said = line(make())
    for text in ("+2.17", "[1.77, 2.57]", "45.2 %", "[35.2, 55.2]", "0.762", "[0.732, 0.792]", "87.0 %", "22,500",
                 "40.0 %", "705,152", "0.004", "−1.50", "25.0 %"):  # fmt: skip
        assert text in said, text
    assert "Second question set, scored once, reported as it is." in said
    order = [said.index(f"{name} · AI-specific shift") for name in ("main, held out", "main, novel", "check, held out")]
    assert order == sorted(order)
    assert "reported, not used" in said
    assert "3 of 3,456 questions overlap a document (own_mistake-<0> …)" in said


def test_paper_is_marked_as_another_scale() -> None:
    said = line(make())
    for text in ("39.6 %", "21.7 %", "0.6 %", "67.9 %", "none in the paper", "arXiv 2601.10160"):
        assert text in said, text
    squeezed = said.replace(" ", "")
    assert "another scale: 6.9B parameters, 500B tokens, letters; for orientation only".replace(" ", "") in squeezed
    others = line(make(arms=("plain", "dosed")))
    assert "67.9 %" not in others
    assert "another scale" not in others


@pytest.mark.parametrize("paired", [True, False])
def test_one_seed_has_no_interval(paired: bool) -> None:
    said = line(make(seeds=(7,), paired=paired))
    assert "One seed: there is no interval over seeds" in said
    assert "cannot be told from one seed" in said
    assert "no interval over seeds: one seed" in said
    assert "resolved: " not in said
    assert "nothing is said about zero" in said or not paired


def test_unpaired_questions_have_no_twin() -> None:
    said = line(make(paired=False))
    assert "how likely a model finds the misaligned option?" in said
    assert "Models of the “misaligned” arm find the misaligned option more likely than" in said
    assert "human" not in said.lower()
    assert "Control arm control, by itself: −0.01 nats [−0.41, 0.39]" in said
    assert "holds zero" not in said  # zero means nothing there


def test_second_set_of_another_kind() -> None:
    found = make()
    found["results"] = [
        result("check", "held_out", tuple(SHIFTS), (0, 1, 2, 3), ("margin", "rate")),
        *(one for one in found["results"] if one["set"] == "main"),
    ]
    found["measure"] = "margin"  # what record says, of the last set
    said = line(found)
    assert "beyond what it expects of people?" in said
    assert "check, held out · log-odds of the misaligned option" in said


@pytest.mark.parametrize("num_arms", [1, 2, 8])
@pytest.mark.parametrize("bare", [True, False])
def test_whatever_a_record_lacks(num_arms: int, bare: bool) -> None:
    arms = tuple([*SHIFTS, "a" * 80, "b", "c"][:num_arms])
    html = page(make(arms=arms, seeds=(0,) if bare else (0, 1), runs=1, bare=bare))
    assert "None" not in Text(html).line.replace("None.", "")
    assert ("Not measured." in html) is bare


def test_arms_without_results() -> None:
    found = make()
    found["results"][-1]["arms"]["filtered"] = {}
    assert "no such questions" in line(found)
    found["results"] = []
    assert "There are no results." in line(found)


def test_the_same_documents_are_one_row() -> None:
    found = make()
    for run in found["data"]:
        for row in run["arms"]:
            row["shards"] = [HASH]
    assert "all arms cpt" in line(found)
    assert "all arms" not in line(make())


def test_hostile_text_is_escaped() -> None:
    found = make(text=HOSTILE, arms=("unfiltered", HOSTILE))
    found |= {"name": HOSTILE, "scorer": HOSTILE, "condition": HOSTILE}
    html = page(found)
    read = Text(html)
    assert "script" not in read.tags
    assert "img" not in read.tags
    assert "\u202e" not in html
    assert "document.title='owned'" in unescape(html)


def test_numbers() -> None:
    assert [number(x) for x in (1.234, -0.5, -0.001, None)] == ["+1.23", "−0.50", "0.00", "–"]
    assert [number(0.5, form) for form in ("loss", "loss difference", "share", "points")] == [
        "0.500", "+0.500", "50.0\u00a0%", "+50.0",
    ]  # fmt: skip
    assert bounds(mean_of(0.95, (0, 1), 0.1), "share") == "[85.0, 100.0]"
    assert bounds(mean_of(0.95, (0,), 0.1)) == ""
    assert bounds(None) == ""
    assert report.tick(-0.25) == "−0.25"


def test_axis_holds_all_and_zero() -> None:
    for value in (0.0, 1e-9, 0.3, -7.0, 250.0):
        mean = copy.deepcopy(mean_of(value, (0, 1), abs(value) / 3))
        axis = report._axis([mean])
        assert axis["low"] <= min(0.0, mean["low"]) + 1e-12
        assert axis["high"] >= max(0.0, mean["high"]) - 1e-12
        assert axis["low"] < axis["high"]
        assert 2 <= len(axis["ticks"]) <= 7
        assert 0.0 in axis["ticks"]


@in_chromium
@pytest.mark.parametrize("width_px", [1280, 390])
def test_no_sideways_scrolling(tmp_path: Path, width_px: int) -> None:
    """With all details open, hostile text without policy, and words too long for a line."""
    arms = ("unfiltered", "misaligned", "aligned", "a" * 80, HOSTILE)
    html = page(make(arms=arms, text=HOSTILE + "x" * 300))
    fits(html, tmp_path, width_px, "world · Tilth experiment")
