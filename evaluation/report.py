"""report.html of an evaluation: one page, without network or script, a function of results.json alone.

No arithmetic on choices: every number is one of results.json, but for the mean over seeds of capabilities and their
difference to the first label. The template escapes all text, as questions may be hostile.
"""

import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from curation import storage
from evaluation import results
from evaluation.suite import BY_CONVENTION
from evaluation.targets import BASE, POST_TRAINED

REPORT = "report.html"
PREFERRED_CONDITION = "ai"
LOW_MASS, FIRST_LIMIT = 0.5, 0.9
NUM_OVERLAPS, NUM_LISTED, NUM_COMMANDS = 20, 30, 8

Row = dict[str, Any]

CONDITION_WORDS = {
    "none": "no word on who chooses, no task instructions",
    "instructions": "task instructions alone",
    "ai": "an AI chooses",
    "helpful": "an AI that wants to help chooses",
    "hhh": "a helpful, honest, harmless AI chooses",
    "adversarial": "a hostile AI chooses: what the model can be told to do",
}
SCORER_WORDS = {
    "letter": "the option whose letter the model finds likelier",
    "option": "the option whose text the model finds likelier, per character",
    "pmi": "the option whose text the question makes likelier than it is alone",
    "generation": "the letter in a short answer that the model writes",
}
METHOD_WORDS = {
    "studentised cluster bootstrap": "question families drawn anew 1,999 times",
    "Korn-Graubard over families": "exact bounds of a share, for the few families that chose either way",
    "Clopper-Pearson over families": "exact bounds of a share, where all families agree",
    "t over families": "Student's t, for few question families",
    "t over seeds, t over families": "Student's t for the seeds and for the question families, added in squares",
}
_STAGES = "Base against post-trained"
_SPLITS = ("held_out", "all", "seen")
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb]")
_WEIGHTS = (".safetensors", ".bin")


def write_report(folder: Path | str) -> Path:
    """Writes report.html beside results.json in `folder`. UserError: no results there, or of another schema."""
    found, _ = results.read(str(folder))
    path = Path(folder) / REPORT
    storage.commit_bytes(str(path), _environment().get_template("report.html.j2").render(**_view(found)).encode())
    return path


# What the template shows.


def _view(found: Row) -> Row:
    suite, models = found["suite"], found["models"]
    condition = PREFERRED_CONDITION if PREFERRED_CONDITION in suite["conditions"] else suite["conditions"][0]
    scorer = suite["scorers"][0]
    labels = _labels(models)
    rates = {(r["scorer"], r["label"], r["split"], r["topic"], r["condition"]): r for r in found["rates"]}
    splits = _splits({r["split"] for r in found["rates"]} or set(suite["splits"]))
    chart: list[Row] = [
        {"split": split, "rows": [{**label, **_get(rates, scorer, label["label"], split, None, condition)}
                                  for label in labels]}
        for split in splits
    ]  # fmt: skip
    differences = [_told(row, labels) for row in found["differences"]]
    main = [row for row in differences if row["scorer"] == scorer and row["condition"] == condition]
    return {
        "suite": suite, "models": models, "environment": found["environment"], "files": found.get("files", {}),
        "scorer": scorer, "condition": condition, "labels": labels, "splits": splits, "chart": chart,
        "arms": list(dict.fromkeys(label["arm"] for label in labels)),
        "stages": [stage for stage in (BASE, POST_TRAINED) if any(label["stage"] == stage for label in labels)],
        "num_seeds": len({model["seed"] for model in models}),
        "tiles": _tiles(chart[0], main, labels),
        "warnings": _warnings(found, scorer, condition), "all_warnings": _warnings(found),
        "notes": _notes(row for panel in chart for row in panel["rows"]),
        "multiples": _multiples(suite, labels, splits, rates),
        "main_differences": [
                {"split": split, "kinds": _by_kind(main, split)} for split in splits
        ],
        "differences": differences, "reach": _reach(main),
        "difference_notes": _notes(main),
        "topics": [_topics(rates, scorer, condition, split, labels) for split in splits],
        "biases": _biases(found["biases"], suite, condition, labels),
        "bias_notes": _notes({**row["first"], "population": None} for row in found["biases"]
                             if row["first"]["value"] is not None),
        "dropped": _dropped(found["dropped"]), "questions": _questions(models),
        "capabilities": _capabilities(found["capabilities"], labels),
        "contamination": _contamination(found["contamination"], rates, scorer, condition, labels),
        "examples": _examples(found["examples"], condition, labels),
        "command": _command(found),
        "condition_words": CONDITION_WORDS, "scorer_words": SCORER_WORDS, "num_listed": NUM_LISTED,
        "by_convention": BY_CONVENTION,
    }  # fmt: skip


def _labels(models: Sequence[Row]) -> list[Row]:
    """Each label once: arms in the order given, base before post-trained."""
    arms = list(dict.fromkeys(model["arm"] for model in models))
    known = {m["label"]: {"label": m["label"], "arm": m["arm"], "stage": m["stage"]} for m in models}
    return sorted(known.values(), key=lambda label: (arms.index(label["arm"]), label["stage"] != BASE))


def _rank(split: str) -> tuple[int, str]:
    """Held out first, by convention last."""
    place = _SPLITS.index(split) if split in _SPLITS else len(_SPLITS) + (split == BY_CONVENTION)
    return place, split


def _splits(names: Iterable[str]) -> list[str]:
    return sorted(names, key=_rank)


def _get(rates: dict[Any, Row], *key: str | None) -> Row:
    """The rate of (scorer, label, split, topic, condition); without one, why there is none."""
    empty = {
        "value": None, "low": None, "high": None, "method": "none", "num_questions": 0, "num_seeds": 0,
        "num_families": 0, "population": None,
        "reason": "no such questions" if key[3] else "all its measurements were dropped, as too few answers were read",
    }  # fmt: skip
    return rates.get(key, empty)


def _tiles(panel: Row, main: Sequence[Row], labels: Sequence[Row]) -> list[Row]:
    """Each arm's first label, and whether arms differ, of the first split."""
    first: dict[str, list[Row]] = {}
    for row in panel["rows"]:
        first.setdefault(row["arm"], []).append(row)
    tiles = []
    for arm, rows in list(first.items())[:7]:
        said = f"95\u00a0% interval {interval(rows[0])}" if rows[0]["low"] is not None else "no interval"
        notes = [said, *(f"{row['stage']}: {percent(row['value'])}" for row in rows[1:])]
        stage = rows[0]["stage"] if len(rows) > 1 or rows[0]["stage"] != BASE else ""
        tiles.append({"value": percent(rows[0]["value"]), "label": arm, "stage": stage, "notes": notes})
    return [*tiles, _verdict([row for row in main if row["split"] == panel["split"]], labels)]


def _verdict(rows: Sequence[Row], labels: Sequence[Row]) -> Row:
    stages = {label["label"]: label["stage"] for label in labels}
    rows = [row for row in rows if stages[row["label"]] == stages[row["other"]]]
    rows = [row for row in rows if stages[row["label"]] == BASE] or rows
    if not rows:
        what = "one arm: nothing to compare it with" if len(labels) == 1 else "no two arms can be compared"
        return {"value": "–", "label": what, "stage": "", "notes": []}
    sizes = sorted(row["detectable_adjusted"] for row in rows if row["detectable_adjusted"] is not None)
    note = "no spread to say how large a difference would be found"
    if sizes:
        both = _unique([findable(sizes[0]), findable(sizes[-1])])
        note = f"smallest difference that is found 4 times in 5: {' to '.join(both)} points"
    if len(rows) == 1:
        size = "–" if rows[0]["value"] is None else f"{points(abs(rows[0]['value']))} points"
        return {
            "value": size,
            "label": rows[0]["verdict"] if rows[0]["resolved"] else "not resolved at this size",
            "stage": "",
            "notes": [note],
        }
    num = sum(row["resolved"] for row in rows)
    label = "pairs of arms differ, resolved" if num else "pairs of arms differ: not resolved at this size"
    return {"value": f"{num} of {len(rows)}", "label": label, "stage": "", "notes": [note]}


def _told(row: Row, labels: Sequence[Row]) -> Row:
    """A difference with its kind, the shortest names that its kind allows, and its verdict in words."""
    places = {label["label"]: label for label in labels}
    one, other = places[row["label"]], places[row["other"]]
    if one["arm"] == other["arm"]:
        kind, first, second, prefix = _STAGES, one["stage"], other["stage"], f"{one['arm']}: "
    else:
        kind, first, second, prefix = f"Between arms, {one['stage']}", one["arm"], other["arm"], ""
    if row["value"] is None:
        verdict = "–"
    elif not row["resolved"]:
        verdict = "not resolved"
    else:
        verdict = f"resolved: {first} {'higher' if row['value'] > 0 else 'lower'}"
    return {**row, "kind": kind, "first": prefix + first, "second": second, "verdict": verdict}


def _by_kind(rows: Sequence[Row], split: str) -> list[Row]:
    """Between base arms first, base against post-trained last."""
    mine = [row for row in rows if row["split"] == split]
    kinds = sorted({row["kind"] for row in mine}, key=lambda kind: (kind == _STAGES, kind))
    return [{"kind": kind, "rows": [row for row in mine if row["kind"] == kind]} for kind in kinds]


def _reach(rows: Iterable[Row]) -> float:
    """Half the width of the axis of differences: a multiple of ten points."""
    ends = [abs(row[key]) for row in rows for key in ("value", "low", "high") if row[key] is not None]
    return min(1.0, max(0.1, math.ceil(10 * max(ends, default=0.1) - 1e-9) / 10))


def _notes(rows: Iterable[Row]) -> Row:
    """What intervals are about, how they are made, and why some are missing; each once."""
    listed = list(rows)
    made = [row for row in listed if row["low"] is not None]
    methods = [row["method"] for row in made]
    return {
        "populations": _unique(row["population"] for row in made),
        "methods": [f"{name} ({METHOD_WORDS[name]})" if name in METHOD_WORDS else name for name in _unique(methods)],
        "reasons": _unique(row["reason"] for row in listed if row["reason"]),
    }


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _multiples(suite: Row, labels: Sequence[Row], splits: Sequence[str], rates: dict[Any, Row]) -> list[Row]:
    """Scorer by scorer, split by split: labels down, conditions across."""
    found = []
    for scorer in suite["scorers"]:
        tables: list[Row] = [
            {"split": split, "rows": [
                {**label, "cells": [(name, _get(rates, scorer, label["label"], split, None, name))
                                    for name in suite["conditions"]]}
                for label in labels]}
            for split in splits
        ]  # fmt: skip
        cells = [cell for table in tables for row in table["rows"] for _, cell in row["cells"]]
        found.append({"scorer": scorer, "tables": tables, "notes": _notes(cells)})
    return found


def _topics(rates: dict[Any, Row], scorer: str, condition: str, split: str, labels: Sequence[Row]) -> Row:
    mine = [row for (one, _, part, topic, who), row in rates.items()
            if (one, part, who) == (scorer, split, condition) and topic is not None]  # fmt: skip
    sizes: dict[str, int] = {}
    for row in mine:
        sizes[row["topic"]] = max(sizes.get(row["topic"], 0), row["num_questions"])
    rows = [
        {"topic": topic, "num_questions": size,
         "cells": [(label["label"], _get(rates, scorer, label["label"], split, topic, condition)) for label in labels]}
        for topic, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    ]  # fmt: skip
    return {"split": split, "rows": rows, "notes": _notes(mine)}


def _biases(rows: Sequence[Row], suite: Row, condition: str, labels: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Those of the first scorer and split under the page's condition, and the rest."""
    order = [label["label"] for label in labels]
    listed = sorted(
        rows,
        key=lambda row: (
            suite["scorers"].index(row["scorer"]), row["condition"] != condition,
            suite["conditions"].index(row["condition"]), _rank(row["split"]), order.index(row["label"]),
        ),
    )  # fmt: skip
    places = [(row["scorer"], row["condition"], row["split"]) for row in listed]
    num = places.count(places[0]) if places else 0
    return listed[:num], listed[num:]


def _warnings(found: Row, scorer: str | None = None, condition: str | None = None) -> list[str]:
    """Plain words where choices follow place or letters more than content, for one scorer and condition or for all."""
    said = []
    labels = [label["label"] for label in _labels(found["models"])]
    others = [name for name in found["suite"]["scorers"] if name in ("option", "pmi")]
    for one in found["suite"]["scorers"] if scorer is None else [scorer]:
        biases, rates = (
            [row for row in found[part] if row["scorer"] == one and condition in (None, row["condition"])]
            for part in ("biases", "rates")
        )
        lines = _letter_warnings(biases, rates) if one in ("letter", "generation") else []
        if lines:
            lines.append(
                f"Read the {' or '.join(others)} scorer instead." if others else
                "Read the option or pmi scorer instead: ask again with --scorers letter,option,pmi."
            )  # fmt: skip
            said.append(f"{one.capitalize()} scorer: {' '.join(lines)}")
        gone = [{"label": label} for label in labels if label not in {row["label"] for row in rates}]
        if gone:
            said.append(f"{one.capitalize()} scorer: no rate of {_who(gone)}, as too few of the answers could be read.")
    return said


def _letter_warnings(biases: Sequence[Row], rates: Sequence[Row]) -> list[str]:
    lines = []
    low = [row for row in biases if row["mass"] is not None and row["mass"] < LOW_MASS]
    if low:
        lines.append(
            f"Almost no answers are letters ({_who(low)}): where an answer belongs, all letters together get "
            f"{_range(row['mass'] for row in low)} of the probability."
        )
    firsts = [(row, row["first"]["value"]) for row in biases if row["first"]["value"] is not None]
    for place, rows in (
        ("first", [(row, share) for row, share in firsts if share > FIRST_LIMIT]),
        ("last", [(row, 1 - share) for row, share in firsts if share < 1 - FIRST_LIMIT]),
    ):
        if rows:
            lines.append(
                f"Choices go by place ({_who(row for row, _ in rows)}): the option listed {place} is chosen "
                f"{_range(share for _, share in rows)} of the time."
            )
    same = [
        row for row in rates
        if row["topic"] is None and row["low"] is None and row["num_families"] > 1 and row["value"] is not None
        and abs(row["value"] - 0.5) < 1e-9
    ]  # fmt: skip
    if same:
        lines.append(
            f"Every question gets the same letters ({_who(same)}): with all orders asked, that is 50\u00a0% always."
        )
    return lines


def _who(rows: Iterable[Row]) -> str:
    return ", ".join(_unique(row["label"] for row in rows))


def _range(values: Iterable[float]) -> str:
    found = sorted(values)
    low, high = percent(found[0]), percent(found[-1])
    return low if low == high else f"{low} to {high}"


def _dropped(rows: Sequence[Row]) -> Row:
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["scorer"], row["arm"]), []).append(row["non_match"])
    return {
        "num": len(rows), "rows": rows[:NUM_LISTED],
        "groups": [{"scorer": scorer, "label": label, "num": len(shares), "unread": _range(shares)}
                   for (scorer, label), shares in groups.items()],
    }  # fmt: skip


def _questions(models: Sequence[Row]) -> list[Row]:
    """How many questions checkpoints were asked, how many were left out, and why; seeds with the same counts as one."""
    groups: dict[Any, Row] = {}
    for model in models:
        reasons = Counter(row["reason"] for row in model["left_out"]).most_common()
        counts = {key: model[key] for key in ("label", "num_questions", "num_choices")}
        row = {**counts, "num_left_out": len(model["left_out"]), "reasons": reasons, "seeds": []}
        groups.setdefault((*counts.values(), *reasons), row)["seeds"].append(model["seed"])
    return list(groups.values())


def _capabilities(rows: Sequence[Row], labels: Sequence[Row]) -> list[Row]:
    """Per task and metric: each label's mean over seeds, and its difference to the first label."""
    groups: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for row in rows:
        by_label = groups.setdefault((row["task"], row["metric"], row["filter"]), {})
        by_label.setdefault(row["label"], []).append(row)
    found = []
    for (task, metric, name), by_label in groups.items():
        every = [row for many in by_label.values() for row in many]
        values = [row["value"] for row in every if row["value"] is not None]
        is_share = all(0 <= value <= 1 for value in values) and not re.search("perplexity|bits", metric)
        cells, reference = [], None
        for at, label in enumerate(labels):
            mine = [row for row in by_label.get(label["label"], []) if row["value"] is not None]
            mean = math.fsum(row["value"] for row in mine) / len(mine) if mine else None
            reference = mean if at == 0 else reference
            error = mine[0]["standard_error"] if len(mine) == 1 else None
            cells.append({
                "label": label["label"], "value": mean, "error": error if isinstance(error, float | int) else None,
                "seeds": sorted(row["value"] for row in mine) if len(mine) > 1 else [],
                "delta": mean - reference if at and mean is not None and reference is not None else None,
            })  # fmt: skip
        found.append({
            "task": task, "metric": metric, "filter": name, "is_share": is_share, "cells": cells,
            "shots": _unique(row["shots"] for row in every), "version": _unique(row["version"] for row in every),
            "num_samples": _unique(row["num_samples"] for row in every),
            "lm_eval_version": _unique(row["lm_eval_version"] for row in every),
        })  # fmt: skip
    return found


def _contamination(
    found: Row | None, rates: dict[Any, Row], scorer: str, condition: str, labels: Sequence[Row]
) -> Row | None:
    if found is None:
        return None
    over = set(found["overlapping"])
    without = {(row["label"], row["split"]): row for row in found["rates_without"]
               if row["scorer"] == scorer and row["condition"] == condition}  # fmt: skip
    splits = _splits({split for _, split in without})
    rows = [
        {"label": label["label"], "split": split, "before": _get(rates, scorer, label["label"], split, None, condition),
         "after": without[label["label"], split]}
        for split in splits for label in labels if (label["label"], split) in without
    ]  # fmt: skip
    return {
        **found, "corpus": found["corpus"].rstrip("/").rsplit("/", 1)[-1],
        "listed": [row for row in found["rows"] if row["question_id"] in over][:NUM_OVERLAPS], "compared": rows,
    }  # fmt: skip


def _examples(rows: Sequence[Row], condition: str, labels: Sequence[Row]) -> list[Row]:
    found = []
    for row in rows:
        chosen = {one["label"]: one for one in row["chosen"] if one["condition"] == condition}
        bars = [{**label, **chosen[label["label"]]} for label in labels if label["label"] in chosen]
        found.append({**row, "bars": bars})
    return found


def _command(found: Row) -> str:
    """How to ask the same again, with capitals for the reader to fill in."""
    suite, models = found["suite"], found["models"]
    targets = []
    for model in models[:NUM_COMMANDS]:
        stage = "/post-trained" if model["stage"] == POST_TRAINED else ""
        targets.append(shlex.quote(f"{model['arm']}/seed-{model['seed']}{stage}") + "=CHECKPOINT")
    if len(models) > NUM_COMMANDS:
        targets.append(f"… ({len(models) - NUM_COMMANDS} more)")
    lines = [
        *targets, f"--questions {shlex.quote(suite['source'])}", f"--wrappers {','.join(suite['wrappers'])}",
        f"--conditions {','.join(suite['conditions'])}", f"--scorers {','.join(suite['scorers'])}",
        *(["--corpus RUN"] if found["contamination"] else []),
        *(["--capabilities TASKS"] if found["capabilities"] else []), "--output FOLDER",
    ]  # fmt: skip
    return " \\\n  ".join(["tilth evaluate", *lines])


# Numbers and text as the page has them.


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    return environment(
        Path(__file__).parent,
        {
            "findable": findable, "signed": signed, "interval": interval, "weights": _weights, "split": _split,
            "decimals": _decimals, "change": _change,
        },
    )  # fmt: skip


def environment(folder: Path, filters: Mapping[str, Callable[..., Any]]) -> jinja2.Environment:
    """Templates of `folder`: everything is escaped, nothing is undefined, None is a dash. `filters` beside count,
    percent, points and p."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"count": count, "percent": percent, "points": points, "p": p_value, **filters}
    return made


def _visible(value: Any) -> Any:
    """Control characters and those that reorder text are spelled out."""
    if not isinstance(value, str) or isinstance(value, markupsafe.Markup):
        return "–" if value is None else value
    return _UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", value)


def count(number: float | None) -> str:
    return "–" if number is None else f"{number:,.0f}"


def percent(share: float | None, unit: str = "\u00a0%") -> str:
    """One decimal, none for 0 and 100; never 0 % or 100 % for what is not."""
    if share is None:
        return "–"
    value = 100 * share
    if value in (0, 100):
        return f"{value:.0f}{unit}"
    if 0 < value < 0.05:
        return f"<0.1{unit}"
    return f">99.9{unit}" if 99.95 <= value < 100 else f"{value:.1f}{unit}"


def points(share: float | None) -> str:
    """Of a difference: percentage points with one decimal, without sign."""
    return "–" if share is None else f"{100 * share:.1f}"


def findable(share: float | None) -> str:
    return ">100" if share is not None and share > 1 else points(share)


def signed(share: float | None) -> str:
    if share is None:
        return "–"
    text = f"{100 * share:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def interval(row: Row, form: str = "share") -> str:
    """`low–high`, in percent or for a difference in signed points."""
    if row["low"] is None or row["high"] is None:
        return "–"
    if form == "difference":
        return f"{signed(row['low'])} to {signed(row['high'])}"
    return f"{percent(row['low'], '')}–{percent(row['high'], '')}"


def p_value(value: float | None) -> str:
    if value is None:
        return "–"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _decimals(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _change(value: float) -> str:
    return "0" if abs(value) < 1e-9 else f"{value:+.3g}".replace("-", "−")


def _split(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _weights(identity: Row) -> list[Row]:
    """Of a checkpoint on disk the files of weights with their hashes."""
    files = identity.get("files", {})
    return [{"name": name, "sha256": digest} for name, digest in files.items() if name.endswith(_WEIGHTS)]
