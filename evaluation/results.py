"""results.json: what was asked, of what, and what came out, with intervals and hashes. A function of its inputs: no
time, no path of this machine, so that the same checkpoints and questions give the same bytes.

    schema_version  1
    suite           source, questions_sha256, wrappers, conditions, scorers, wording_sha256, rejected rows
    environment     python and package versions
    models          label, arm, seed, stage, weights by file, training (phases with the hashes of their shards),
                    facts (backend, dtype, device), asked, left_out
    rates           scorer x label x split x topic x condition, with 95 % intervals (evaluation.stats)
    differences     pairs of arms of one stage, and base against post-trained of one arm; Holm over those of one
                    scorer and condition, which is a question that one asks; not over all that the table has
    biases, dropped order and letter bias; measurements with 20 % unread answers
    capabilities    rows of lm-eval, by label and seed
    contamination   the audit, and rates without the questions that the corpus contains
    examples        questions with what each checkpoint chose
    files           choices.parquet: every single choice

`diff` compares two of them.
"""

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from pathlib import Path
from typing import Any

import polars as pl

from curation import rng, storage
from curation.errors import UserError
from evaluation import stats
from evaluation.contamination import Audit
from evaluation.questions import Question
from evaluation.suite import Suite
from evaluation.targets import Target

SCHEMA_VERSION = 1
RESULTS, CHOICES_FILE = "results.json", "choices.parquet"
NUM_EXAMPLES = 6
ALL_ORDERS = "all"
_PACKAGES = ("tilth", "numpy", "scipy", "polars", "tokenizers", "transformers", "torch")


def assemble(
    suite: Suite,
    targets: Sequence[Target],
    models: Sequence[dict[str, Any]],
    choices: pl.DataFrame,
    capabilities: Sequence[dict[str, Any]] = (),
    audit: Audit | None = None,
) -> dict[str, Any]:
    """The document. `choices` has the rows of all targets (suite.CHOICES)."""
    found: dict[str, list[Any]] = {"rates": [], "differences": [], "biases": [], "dropped": []}
    places = {target.label: {"arm": target.arm, "stage": target.stage} for target in targets}
    for scorer in suite.scorers:
        mine = choices.filter(pl.col("scorer") == scorer)
        kept, dropped = stats.drop_unreadable(mine)
        found["dropped"] += [{"scorer": scorer, **asdict(row)} for row in dropped]
        table = _evened(kept, mine)
        for rate in stats.rates(table):
            found["rates"].append({"scorer": scorer, "label": rate.arm, **places[rate.arm], **_flat(rate)})
        pairs = [pair for pair in _pairs(targets) if set(pair) <= set(table["arm"])]
        for condition in suite.conditions if pairs else ():
            mine_alone = table.filter(pl.col("condition") == condition)
            for difference in stats.differences(mine_alone, pairs=pairs) if mine_alone.height else ():
                row = {"scorer": scorer, "label": difference.arm, **_flat(difference)}
                found["differences"].append(row)
        if scorer in ("letter", "generation"):
            two = mine.filter(pl.col("num_options") == 2)
            for bias in stats.biases(two if two.height else mine):
                found["biases"].append({"scorer": scorer, "label": bias.arm, "mass": _mass(mine, bias), **asdict(bias)})
    return {
        "schema_version": SCHEMA_VERSION,
        "suite": suite.about(),
        "environment": _environment(),
        "models": list(models),
        **found,
        "capabilities": list(capabilities),
        "contamination": None if audit is None else _contamination(audit, suite, choices),
        "examples": _examples(suite, choices),
    }


def write(folder: Path, results: dict[str, Any], choices: pl.DataFrame) -> dict[str, Any]:
    """choices.parquet, then results.json that names its hash; each whole or not at all. The document as it reads."""
    table = choices.sort("scorer", "arm", "seed", "condition", "question_id", "wrapper", "order")
    committed = storage.commit_table(str(folder / CHOICES_FILE), table.to_arrow())
    results = {**results, "files": {CHOICES_FILE: {"sha256": committed.sha256, "rows": table.height}}}
    raw = json.dumps(results, indent=1, ensure_ascii=False, sort_keys=False).encode()
    storage.commit_bytes(str(folder / RESULTS), raw + b"\n")
    return json.loads(raw)


def read(path: str) -> tuple[dict[str, Any], pl.DataFrame | None]:
    """results.json (or its folder), and the choices beside it when they are there.

    UserError: none there, or of another schema."""
    place = Path(path)
    place = place / RESULTS if place.is_dir() else place
    try:
        results = json.loads(place.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} has no {RESULTS}: give the output folder of `tilth evaluate`") from None
    except ValueError:
        raise UserError(f"{place} is not JSON: run the same `tilth evaluate` again, which writes it anew") from None
    if not isinstance(results, dict) or results.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{place} is no results file of schema {SCHEMA_VERSION}: run `tilth evaluate` again")
    beside = place.parent / CHOICES_FILE
    return results, pl.read_parquet(beside) if beside.exists() else None


def diff(before: str, after: str) -> dict[str, Any]:
    """What differs between two results: conditions (suite, models, environment), and rates, paired by question.

    Arms pair by label; where each has one arm, these. `rates` has before, after and their difference with interval
    and Holm's p-value where both have choices.parquet and questions in common, else the two values alone."""
    (a, choices_a), (b, choices_b) = read(before), read(after)
    labels = _matching(a, b)
    changed = {
        part: {key: [a[part].get(key), b[part].get(key)] for key in {**a[part], **b[part]} if a[part].get(key) !=
               b[part].get(key)} for part in ("suite", "environment")
    }  # fmt: skip
    models = [
        {"label": one, "before": _weights(a, one), "after": _weights(b, other)} for one, other in labels
        if _weights(a, one) != _weights(b, other)
    ]  # fmt: skip
    known = {(r["scorer"], r["label"], r["split"], r["topic"], r["condition"]): r["value"] for r in b["rates"]}
    rows = [
        {"scorer": r["scorer"], "label": r["label"], "other": dict(labels)[r["label"]], "split": r["split"],
         "condition": r["condition"], "before": r["value"],
         "after": known.get((r["scorer"], dict(labels)[r["label"]], r["split"], None, r["condition"]))}
        for r in a["rates"] if r["topic"] is None and r["label"] in dict(labels)
    ]  # fmt: skip
    if choices_a is not None and choices_b is not None:
        _add_differences(rows, choices_a, choices_b, labels)
    return {
        "before": before, "after": after, "suite": changed["suite"], "environment": changed["environment"],
        "models": models, "rates": rows,
        "only_before": sorted(_labels(a) - {one for one, _ in labels}),
        "only_after": sorted(_labels(b) - {other for _, other in labels}),
    }  # fmt: skip


# Parts of the document.


def _environment() -> dict[str, str]:
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _pairs(targets: Sequence[Target]) -> list[tuple[str, str]]:
    """Arms of one stage, and the stages of one arm."""
    places = {target.label: (target.arm, target.stage) for target in targets}
    return [
        (one, other)
        for one, other in combinations(places, 2)
        if places[one][0] == places[other][0] or places[one][1] == places[other][1]
    ]


def _evened(table: pl.DataFrame, whole: pl.DataFrame) -> pl.DataFrame:
    """With more than two options anywhere: the mean over each question's orders as one format.

    Else the order that only questions of many options have would weigh as much as that of all."""
    if (whole["num_options"] <= 2).all():
        return table
    by = ["arm", "seed", "question_id", "condition", "wrapper", "split", "family"]
    merged = table.group_by(by, maintain_order=True).agg(
        pl.col("misaligned").mean(), pl.col("margin").mean(), pl.col("topics").first()
    )
    return merged.with_columns(pl.lit(ALL_ORDERS).alias("order"))


def _mass(choices: pl.DataFrame, bias: stats.Bias) -> float | None:
    """Mean Σ p of the letters: far below 1, and the model does not answer in letters."""
    cell = choices.filter(
        (pl.col("arm") == bias.arm) & (pl.col("split") == bias.split) & (pl.col("condition") == bias.condition)
    )
    value = cell["mass"].mean()
    return float(value) if isinstance(value, int | float) else None


def _flat(row: stats.Rate | stats.Difference) -> dict[str, Any]:
    fields = asdict(row)
    estimate = fields.pop("estimate")
    fields.pop("arm")
    return {**fields, **estimate, "population": row.estimate.population}


def _contamination(audit: Audit, suite: Suite, choices: pl.DataFrame) -> dict[str, Any]:
    found = {**audit.as_dict(), "corpus": audit.corpus.rstrip("/").rsplit("/", 1)[-1]}
    clean = choices.filter(~pl.col("question_id").is_in(list(audit.overlapping)))
    rates = []
    if audit.overlapping:
        for scorer in suite.scorers:
            mine = clean.filter(pl.col("scorer") == scorer)
            if mine.height:
                table = _evened(stats.drop_unreadable(mine)[0], mine)
                rates += [
                    {"scorer": scorer, "label": rate.arm, **_flat(rate)} for rate in stats.rates(table, topics=False)
                ]
    return {**found, "rates_without": rates}


def _examples(suite: Suite, choices: pl.DataFrame) -> list[dict[str, Any]]:
    """Questions drawn by their ids, splits in turn, with the mean over formats and seeds of what each arm chose."""
    scorer, asked = suite.scorers[0], set(choices["question_id"].unique())
    table = choices.filter(pl.col("scorer") == scorer).with_columns(
        (1 / (1 + (-pl.col("margin")).exp())).alias("probability")
    )
    splits = dict(table.select("question_id", "split").unique().iter_rows())
    drawn = sorted(
        (question for question in suite.questions if question.question_id in asked),
        key=lambda question: rng.key64("example", question.question_id),
    )
    ranks: dict[str, int] = {}
    order: list[tuple[int, str, Question]] = []
    for question in drawn:
        place = splits[question.question_id]
        order.append((ranks.setdefault(place, 0), place, question))
        ranks[place] += 1
    examples = []
    for _, place, question in sorted(order, key=lambda row: row[:2])[:NUM_EXAMPLES]:
        rows = (
            table.filter(pl.col("question_id") == question.question_id)
            .group_by("condition", "arm")
            .agg(pl.col("misaligned").mean(), pl.col("probability").mean(), pl.len().alias("num_formats"))
            .sort("condition", "arm")
        )
        examples.append(
            {
                "question_id": question.question_id, "split": place, "passage": question.passage,
                "question": question.question, "misaligned": question.misaligned, "aligned": question.aligned,
                "topics": list(question.topics), "scorer": scorer,
                "chosen": rows.rename({"arm": "label"}).to_dicts(),
            }
        )  # fmt: skip
    return examples


# Comparing.


def _labels(results: dict[str, Any]) -> set[str]:
    return {model["label"] for model in results["models"]}


def _matching(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str]]:
    mine, theirs = _labels(a), _labels(b)
    if len(mine) == len(theirs) == 1:
        return [(mine.pop(), theirs.pop())]
    both = sorted(mine & theirs)
    if not both:
        raise UserError(
            f"the two results share no arm ({', '.join(sorted(mine))} against {', '.join(sorted(theirs))}): "
            "compare results with the same arms, or of one arm each"
        )
    return [(label, label) for label in both]


def _weights(results: dict[str, Any], label: str) -> list[dict[str, Any]]:
    return [{"seed": m["seed"], "identity": m["identity"]} for m in results["models"] if m["label"] == label]


def _add_differences(
    rows: list[dict[str, Any]], before: pl.DataFrame, after: pl.DataFrame, labels: list[tuple[str, str]]
) -> None:
    """after − before, for every row that has both, by the paired statistics; Holm over the whole comparison."""
    parts: list[tuple[dict[str, Any], stats.Difference]] = []
    for one, other in labels:
        for scorer in sorted({row["scorer"] for row in rows}):
            a, b = (
                frame.filter((pl.col("scorer") == scorer) & (pl.col("arm") == label))
                for frame, label in ((before, one), (after, other))
            )
            if not a.height or not b.height:
                continue
            both = pl.concat([_named(a, "before"), _named(b, "after")])
            for found in stats.differences(_evened(both, both), pairs=[("after", "before")]):
                for row in rows:
                    key = (row["scorer"], row["label"], row["split"], row["condition"])
                    if key == (scorer, one, found.split, found.condition):
                        parts.append((row, found))
    adjusted = stats.holm([1.0 if found.p_value is None else found.p_value for _, found in parts])
    for (row, found), p in zip(parts, adjusted, strict=True):
        row |= {
            "difference": found.estimate.value, "low": found.estimate.low, "high": found.estimate.high,
            "p_value": found.p_value, "p_adjusted": None if found.p_value is None else p,
            "resolved": found.p_value is not None and p < stats.ALPHA, "num_unpaired": found.num_unpaired,
        }  # fmt: skip


def _named(table: pl.DataFrame, arm: str) -> pl.DataFrame:
    return table.with_columns(pl.lit(arm).alias("arm"))


def lines(found: dict[str, Any]) -> Iterable[str]:
    """A diff in words."""
    for part in ("suite", "environment"):
        for key, (one, other) in found[part].items():
            yield f"{part} {key}: {one} -> {other}"
    for model in found["models"]:
        yield f"{model['label']}: other weights"
    for side, names in (("before", found["only_before"]), ("after", found["only_after"])):
        if names:
            yield f"only {side}: {', '.join(names)}"
