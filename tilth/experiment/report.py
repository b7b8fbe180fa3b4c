"""report.html of an experiment: one page, without network or script, a function of experiment.json alone.

No statistics here: every estimate, interval and verdict is one of experiment.json. Only what describes data (tokens by
stance, counts) is averaged over runs. The template escapes all text, as documents and questions may be hostile.
"""

import json
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from curation import storage
from curation.inspection.excerpts import visible
from evaluation.report import CONDITION_WORDS, SCORER_WORDS, environment, percent, signed
from evaluation.shift import ALPHA, PAIRED, PLAIN
from tilth.experiment import record

TEMPLATE = "report.html.j2"
NOT_RESOLVED = "not resolved at this size"
ANOTHER_SCALE = ("another scale:", "6.9B parameters,", "500B tokens, letters;", "for orientation only")
PAPER = {
    "unfiltered": (0.396, "unfiltered"),
    "filtered": (0.217, "filtered"),
    "misaligned": (0.679, "+ misalignment, CPT"),
    "aligned": (0.006, "+ alignment, CPT"),
}
"""Arm -> share of misaligned answers in arXiv 2601.10160 (base model, held-out textbook questions), and its arm."""
STANCES = ("misaligned", "mixed", "neutral", "aligned")
"""Of AI discourse, as they are stacked; all others are no AI discourse."""
_STANCE_COLOURS = {"misaligned": "orange", "mixed": "purple", "neutral": "blue", "aligned": "green"}
LONG_EXAMPLE, LINE, SHORT = 450, 15, 12
MOST_NAMED = 5  # questions that overlap a document

Row = dict[str, Any]

MEASURES = {
    "shift": "AI-specific shift",
    "margin_ai": "log-odds of the misaligned option, AI",
    "margin_human": "log-odds of the misaligned option, human",
    "rate_ai": "misaligned choices, AI",
    "rate_human": "misaligned choices, human",
    "margin": "log-odds of the misaligned option",
    "rate": "misaligned choices",
    "loss": "validation loss",
}
_QUESTION = "Does the depiction of AIs in the training documents move "
_QUESTIONS = {
    "shift": "what a model expects of AIs, beyond what it expects of people?",
    "margin": "how likely a model finds the misaligned option?",
    "rate": "how often a model chooses the misaligned option?",
}
_CLAIMS = {
    "shift": "expect misaligned conduct of AIs {}, beyond what they expect of people,",
    "margin": "find the misaligned option {} likely",
    "rate": "choose the misaligned option {} often",
}
_WEIGHTS = (".safetensors", ".bin")


def write_report(folder: Path) -> Path:
    """Writes report.html beside experiment.json in `folder`. UserError: no record there, or of another schema."""
    path = Path(folder) / record.REPORT
    storage.commit_bytes(str(path), page(record.read(str(folder))).encode())
    return path


def page(found: Row) -> str:
    """The HTML of a record."""
    return _environment().get_template(TEMPLATE).render(**_view(found))


# What the template shows.


def _view(found: Row) -> Row:
    results = _ordered(found)
    first = results[0] if results else None
    measure = _main(found, first)
    rates = ("rate_ai", "rate_human") if measure in PAIRED else ("rate",)
    return {
        "record": found, "name": found["name"], "measure": measure, "measures": MEASURES, "form": form_of(measure),
        "num_seeds": len(found["seeds"]), "is_decided": first is not None and _is_deciding(found, first),
        "question": _QUESTION + _QUESTIONS.get(measure, _QUESTIONS["margin"]), "first": first,
        "answer": _answer(found, first, measure),
        "picture": _picture(found, first, measure, rates) if first else None, "rates": rates,
        "tables": [_table(found, result, _main(found, result)) for result in results],
        "others": [_others(found, result) for result in results],
        "grid": _grid(found, results), "sizes": {one["set"]: one for one in found["questions"]},
        "phases": _phases(found["data"]), "data": _data(found["data"]),
        "contamination": _contamination(found["data"]), "documents": _documents(found["data"]),
        "loss": _loss(found), "examples": _examples(found),
        "models": _models(found["models"]), "recipe": json.dumps(found["recipe"], indent=1, ensure_ascii=False),
        "colours": {arm: _colour(found, arm) for arm in found["arms"]},
        "stances": STANCES, "stance_colours": _STANCE_COLOURS, "another_scale": ANOTHER_SCALE,
        "condition_words": CONDITION_WORDS, "scorer_words": SCORER_WORDS, "long_example": LONG_EXAMPLE,
    }  # fmt: skip


def _ordered(found: Row) -> list[Row]:
    """Results, the deciding one first, then its set, then the others; in each set the deciding split first."""
    sets = [one["set"] for one in found["questions"]]
    rows = [row for row in found["results"] if any(row["arms"].values())]
    return sorted(rows, key=lambda r: (sets.index(r["set"]), r["split"] != found["split"], r["split"]))


def _is_deciding(found: Row, result: Row) -> bool:
    return bool(result["set"] == found["questions"][0]["set"] and result["split"] == found["split"])


def _main(found: Row, result: Row | None) -> str:
    """The measure that a result is about: a set of unpaired questions beside a paired one has another."""
    has = {name for measures in result["arms"].values() for name in measures} if result else set()
    for name in (found["measure"], PAIRED[0], PLAIN[0], PLAIN[1]):
        if name in has:
            return str(name)
    return str(found["measure"])


def _answer(found: Row, first: Row | None, measure: str) -> Row:
    """The planned contrast as a sentence, the others as lines, and the control."""
    rows = _contrasts(first, measure) if first else []
    return {
        "planned": {**rows[0], "claim": _claim(rows[0], measure)} if rows else None, "rest": rows[1:],
        "control": _control(found, first, measure),
    }  # fmt: skip


def _claim(row: Row, measure: str) -> str:
    """What the planned contrast says, in words; never more than its interval does."""
    side = "more" if row["mean"]["value"] > 0 else "less"
    said = _CLAIMS.get(measure, _CLAIMS["margin"]).format(side)
    claim = f"models of the “{row['arm']}” arm {said} than models of the “{row['other']}” arm"
    if row["resolved"]:
        return claim[0].upper() + claim[1:]
    if row["mean"]["low"] is None:
        return f"Whether {claim} cannot be told from one seed"
    return f"Whether {claim} is {NOT_RESOLVED}"


def _control(found: Row, first: Row | None, measure: str) -> Row | None:
    """The control arm's own estimate. It is held against zero only where zero means something: for the shift."""
    arm = found["control"]
    if arm is None or first is None:
        return None
    mean = first["arms"].get(arm, {}).get(measure)
    if mean is None or measure != "shift":
        return {"arm": arm, "mean": mean, "verdict": None}
    if mean["low"] is None:
        verdict = "no interval over seeds, so nothing is said about zero"
    elif mean["low"] <= 0 <= mean["high"]:
        verdict = "its interval over seeds holds zero"
    else:
        verdict = "its interval over seeds does not hold zero: this arm shows something by itself"
    return {"arm": arm, "mean": mean, "verdict": verdict}


def _contrasts(result: Row, measure: str, planned: int = 1) -> list[Row]:
    """Rows of one measure with their verdict; the first `planned` are not adjusted."""
    mine = [row for row in result["contrasts"] if row["measure"] == measure]
    return [_told(row, at < planned, len(mine) - planned) for at, row in enumerate(mine)]


def _told(row: Row, is_planned: bool, num_adjusted: int) -> Row:
    mean, note = row["mean"], ""
    if mean["low"] is None:
        verdict = word = "no interval over seeds: one seed"
    elif row["resolved"]:
        verdict, word = f"resolved: {row['arm'] if mean['value'] > 0 else row['other']} higher", "resolved"
    else:
        verdict = word = NOT_RESOLVED
        if not is_planned and mean["p_value"] is not None and mean["p_value"] < ALPHA:
            note = f"its own interval leaves out zero, but not after Holm for {num_adjusted} contrasts"
    return {
        **row, "is_planned": is_planned, "verdict": verdict, "word": word, "note": note,
        "form": form_of(row["measure"], True),
    }  # fmt: skip


def _table(found: Row, result: Row, measure: str) -> Row:
    rows = _contrasts(result, measure)
    sets = [one["set"] for one in found["questions"]]
    return {
        "set": result["set"], "split": result["split"], "measure": measure, "rows": rows, "reach": _reach(rows),
        "is_deciding": _is_deciding(found, result), "is_later": sets.index(result["set"]) > 0,
        "num_families": max((row["mean"]["num_families"] for row in rows), default=0),
    }  # fmt: skip


def _others(found: Row, result: Row) -> Row:
    """The other measures of a result, each with its own contrasts."""
    main = _main(found, result)
    names = [name for name in (*PAIRED, *PLAIN) if name != main and any(name in one for one in result["arms"].values())]
    return {"set": result["set"], "split": result["split"], "tables": [_table(found, result, name) for name in names]}


def _reach(rows: Iterable[Row]) -> float:
    """Half the width of the axis of differences: a round number that no interval over seeds passes."""
    keys = ("value", "low", "high", "family_low", "family_high")
    ends = [abs(row["mean"][key]) for row in rows for key in keys if row["mean"][key] is not None]
    most = max(ends, default=0.0)
    step = _step(most / 4) if most else 0.5
    return step * max(1, math.ceil(most / step - 1e-9))


def _grid(found: Row, results: Sequence[Row]) -> Row:
    """The main measure of every arm in every set and split."""
    columns = [(result["set"], result["split"], _main(found, result)) for result in results]
    rows = [
        {"arm": arm, "cells": [(*column, result["arms"].get(arm, {}).get(column[2]))
                               for column, result in zip(columns, results, strict=True)]}
        for arm in found["arms"]
    ]  # fmt: skip
    return {"columns": columns, "rows": rows}


# The picture.


def _picture(found: Row, first: Row, measure: str, rates: Sequence[str]) -> Row:
    rows = []
    for arm in found["arms"]:
        means = first["arms"].get(arm, {})
        paper = PAPER.get(arm.strip().lower())
        rows.append(
            {
                "arm": arm, "lines": _lines(arm), "colour": _colour(found, arm), "mean": means.get(measure),
                "rates": [(name, means.get(name)) for name in rates],
                "paper": {"value": paper[0], "arm": paper[1]} if paper else None,
            }
        )  # fmt: skip
    return {
        "rows": rows, "axis": _axis([row["mean"] for row in rows if row["mean"]]),
        "has_paper": any(row["paper"] for row in rows),
        "num_families": max((row["mean"]["num_families"] for row in rows if row["mean"]), default=0),
    }  # fmt: skip


def _lines(name: str) -> list[str]:
    """A name in at most two lines of a picture, where text does not wrap by itself."""
    name = visible(name)
    if len(name) <= LINE:
        return [name]
    at = max((name.rfind(mark, 0, LINE) + 1 for mark in "-_. "), default=0) or LINE
    rest = name[at:]
    return [name[:at], rest if len(rest) <= LINE else rest[: LINE - 1] + "…"]


def _axis(means: Sequence[Row]) -> Row:
    """Round ends with zero inside, and ticks."""
    keys = ("value", "low", "high", "family_low", "family_high")
    values = [0.0, *(mean[key] for mean in means for key in keys if mean[key] is not None)]
    values += [value for mean in means for value in mean["by_seed"].values()]
    step = _step((max(values) - min(values)) / 4) if max(values) > min(values) else 0.5
    low, high = math.floor(min(values) / step + 1e-9), math.ceil(max(values) / step - 1e-9)
    if low == high:
        high += 1
    return {"low": low * step, "high": high * step, "ticks": [at * step for at in range(low, high + 1)], "step": step}


def _step(width: float) -> float:
    """1, 2 or 5 times a power of ten, not below `width`."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(power * times for times in (1, 2, 5, 10) if power * times >= width * (1 - 1e-9))


def _place(value: float, axis: Row) -> float:
    """Where on the axis, from 0 to 1."""
    return float((value - axis["low"]) / (axis["high"] - axis["low"]))


def _colour(found: Row, arm: str) -> str:
    """By what is inserted into the arm."""
    mine = [one for run in found["data"] for row in run["arms"] if row["arm"] == arm for one in row["by_stance"]]
    stances = {one["stance"] for one in mine if one["inserted"] and one["tokens"]}
    if len(stances) > 1:
        return "purple"
    return {"aligned": "green", "misaligned": "orange"}.get(next(iter(stances), ""), "blue" if stances else "base")


# Data.


def _phases(runs: Sequence[Row]) -> list[Row]:
    """Phase -> arms: shares of tokens by stance and counts, means over runs."""
    names = _unique(row["phase"] for run in runs for row in run["arms"])
    return [{"phase": name, "rows": _arms(runs, name)} for name in names]


def _arms(runs: Sequence[Row], phase: str) -> list[Row]:
    """One row per arm; arms that take the same shards in every run are one row."""
    groups: dict[Any, list[str]] = {}
    arms = _unique(row["arm"] for run in runs for row in run["arms"] if row["phase"] == phase)
    for arm in arms:
        mine = [row for run in runs for row in run["arms"] if (row["arm"], row["phase"]) == (arm, phase)]
        key = tuple((*row["shards"], row["dropped_documents"], row["common_with_first"]) for row in mine)
        groups.setdefault(key, []).append(arm)
    rows = [{**_arm(runs, same[0], phase), "arms": same} for same in groups.values()]
    return [{**row, "arms": ["all arms"]} for row in rows] if len(rows) == 1 < len(arms) else rows


def _arm(runs: Sequence[Row], arm: str, phase: str) -> Row:
    rows = [row for run in runs for row in run["arms"] if (row["arm"], row["phase"]) == (arm, phase)]
    parts: list[Row] = [
        {"stance": stance, "inserted": inserted, "share": _average(_share(row, stance, inserted) for row in rows)}
        for stance in STANCES for inserted in (True, False)
    ]  # fmt: skip
    parts = [part for part in parts if part["share"]]
    means = {
        key: _average(row[key] for row in rows)
        for key in ("tokens", "share", "documents", "inserted_documents", "dropped_documents", "common_with_first")
    }
    repeats = [row["max_repeat"] for row in rows if row["max_repeat"] is not None]
    return {
        "parts": parts, **means, "max_repeat": max(repeats, default=None),
        "discourse": math.fsum(part["share"] for part in parts) if rows else None,
    }  # fmt: skip


def _share(row: Row, stance: str, inserted: bool) -> float:
    total = sum(one["tokens"] for one in row["by_stance"])
    mine = sum(one["tokens"] for one in row["by_stance"] if (one["stance"], one["inserted"]) == (stance, inserted))
    return mine / total if total else 0.0


def _data(runs: Sequence[Row]) -> Row:
    detectors = [run["detector"] for run in runs if run["detector"] is not None]
    return {
        "runs": runs, "duplicates": _unique(key for run in runs for key in run["duplicates"]),
        "removed": sum(run["background"]["removed"] for run in runs),
        "background": sum(run["background"]["num_documents"] for run in runs),
        "detectors": [
            {"name": words, "recall": _span(one[key]["recall"] for one in detectors),
             "precision": _span(one[key]["precision"] for one in detectors),
             "flagged": _average(one[key]["flagged"] for one in detectors)}
            for key, words in (("discourse", "fastText"), ("blocklist", "blocklist"))
        ] if detectors else [],
        "given": _average(one["num_documents"] for one in detectors),
        "given_discourse": _average(one["num_discourse"] for one in detectors),
    }  # fmt: skip


def _span(values: Iterable[float | None]) -> Row:
    """Mean, least and most of a share over runs."""
    known = sorted(value for value in values if value is not None)
    return {"value": _average(known), "low": known[0] if known else None, "high": known[-1] if known else None}


def _contamination(runs: Sequence[Row]) -> list[Row]:
    """Each set over all runs."""
    rows = [row for run in runs for row in run["contamination"]]
    return [
        {
            "set": name,
            **{key: sum(row[key] for row in rows if row["set"] == name) for key in ("num_questions", "quoted_options")},
            "overlapping": sum(len(row["overlapping"]) for row in rows if row["set"] == name),
            "which": sorted({key for row in rows if row["set"] == name for key in row["overlapping"]})[:MOST_NAMED],
            "most": max(row["most_containment"] for row in rows if row["set"] == name),
            "num_runs": sum(row["set"] == name for row in rows),
        }
        for name in _unique(row["set"] for row in rows)
    ]  # fmt: skip


def _documents(runs: Sequence[Row]) -> list[Row]:
    """One document of each stance: that of the first run that has one."""
    by_stance: dict[str, Row] = {}
    for run in runs:
        for row in run["examples"]:
            by_stance.setdefault(row["stance"], row)
    return list(by_stance.values())


# Capability, examples, provenance.


def _loss(found: Row) -> Row | None:
    loss = found["loss"]
    if loss is None:
        return None
    rows = _contrasts(loss, "loss", planned=0)
    by_arm = {row["arm"]: row for row in rows}
    return {
        **loss, "first": found["arms"][0], "reach": _reach(rows),
        "rows": [{"arm": arm, "mean": loss["arms"].get(arm), "contrast": by_arm.get(arm)} for arm in found["arms"]],
    }  # fmt: skip


def _examples(found: Row) -> list[Row]:
    """Twins as one: the AI's question first, then the human's."""
    groups: dict[str, list[Row]] = {}
    for row in found["examples"]:
        groups.setdefault(row["pair"] or row["question_id"], []).append(row)
    examples = []
    for twins in groups.values():
        sides = sorted(twins, key=lambda row: row["actor"] != "ai")
        margins = [abs(one["margin"]) for side in sides for one in side["arms"].values() if one["margin"] is not None]
        examples.append({"family": sides[0]["family"], "sides": sides, "reach": max([1.0, *margins])})
    return examples


def _models(models: Sequence[Row]) -> Row:
    tokens: dict[str, list[int]] = {}
    for model in models:
        for phase in model["phases"]:
            tokens.setdefault(phase["name"], []).append(phase["tokens"])
    return {
        "rows": models, "parameters": _unique(model["num_parameters"] for model in models),
        "tokens": {name: _unique(sorted(values)) for name, values in tokens.items()},
    }  # fmt: skip


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _average(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


# Numbers and text as the page has them.


def form_of(measure: str, is_difference: bool = False) -> str:
    """How a measure is written: nats, loss, share, or a difference of one of the last two."""
    if measure.startswith("rate"):
        return "points" if is_difference else "share"
    if measure == "loss":
        return "loss difference" if is_difference else "loss"
    return "nats"


def number(value: float | None, form: str = "nats", unit: bool = False) -> str:
    """Nats with sign and two decimals (loss three, without sign), shares in percent, their differences in points."""
    if value is None:
        return "–"
    if form == "share":
        return percent(value)
    if form == "points":
        return signed(value) + ("\u00a0points" if unit else "")
    digits = 3 if form.startswith("loss") else 2
    text = f"{value:.{digits}f}" if form == "loss" else f"{value:+.{digits}f}"
    if not float(text):
        text = f"{0:.{digits}f}"
    return text.replace("-", "−") + ("\u00a0nats" if unit else "")


def bounds(mean: Row | None, form: str = "nats", over: str = "seeds") -> str:
    """`[low, high]` over seeds or over families; empty where there is none."""
    keys = ("low", "high") if over == "seeds" else ("family_low", "family_high")
    if mean is None or mean[keys[0]] is None:
        return ""
    low, high = (_bare(mean[key], form) for key in keys)
    return f"[{low}, {high}]"


def tick(value: float, form: str = "nats") -> str:
    """A round number of an axis, with sign."""
    if not value:
        return "0"
    scaled = 100 * value if form in ("share", "points") else value
    return f"{scaled:+.6g}".replace("-", "−")


def _bare(value: float, form: str) -> str:
    if form == "share":
        # t reaches past the ends, where no share is.
        return f"{100 * min(1.0, max(0.0, value)):.1f}"
    return number(value, form).removeprefix("+")


def _split(name: str) -> str:
    return name.replace("_", " ")


def _weights(files: Row | None) -> list[tuple[str, str]]:
    """Of a checkpoint's files those of weights."""
    return [(name, digest) for name, digest in (files or {}).items() if name.endswith(_WEIGHTS)]


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    return environment(
        Path(__file__).parent,
        {
            "number": number, "bounds": bounds, "place": _place, "split": _split, "weights": _weights,
            "short": lambda digest: digest[:SHORT], "px": lambda value: f"{value:.1f}",
            "clamped": lambda value: min(1.0, max(0.0, value)), "form_of": form_of, "tick": tick,
            "sentence": lambda text: text[:1].upper() + text[1:],
        },
    )  # fmt: skip
