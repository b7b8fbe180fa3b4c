"""What differs between two experiments: recipe, code, questions, documents of each arm, and results."""

from pathlib import Path
from typing import Any

import polars as pl

import curation
from curation import storage
from curation.inspection.run import collect
from tilth.experiment import record
from tilth.experiment.plan import DATA

Row = dict[str, Any]


def are_experiments(before: str, after: str) -> bool:
    """Whether both are folders of experiments, or their records."""
    return all(
        path.endswith(record.RECORD) or storage.exists(storage.join(path, record.RECORD)) for path in (before, after)
    )


def diff(before: str, after: str) -> Row:
    """A row for everything that is not the same.

    recipe, code: dotted key -> (before, after). questions: sets whose hashes differ. data: for each (seed, arm, phase)
    with other shards the share of tokens that are of documents which both have, and how many only one has. results: for
    each set, split and arm that both have, the deciding measure before and after. Document figures need both run
    folders; without them they are None."""
    one, two = record.read(before), record.read(after)
    recipes = [_flat(found["recipe"]) for found in (one, two)]
    codes = [_flat({**found["code"], "backend": found["backend"]}) for found in (one, two)]
    return {
        "before": one["name"], "after": two["name"],
        "recipe": _changed(*recipes), "code": _changed(*codes),
        "questions": [q["set"] for q in one["questions"] if q["sha256"] not in [r["sha256"] for r in two["questions"]]],
        "data": _data(before, after, one, two),
        "measure": one["measure"], "results": _results(one, two),
        "only_before": sorted(set(one["arms"]) - set(two["arms"])),
        "only_after": sorted(set(two["arms"]) - set(one["arms"])),
    }  # fmt: skip


def _flat(value: Any, at: str = "") -> Row:
    """Dotted key -> leaf."""
    if isinstance(value, dict):
        return {
            k: v for key, inner in value.items() for k, v in _flat(inner, f"{at}.{key}" if at else str(key)).items()
        }
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        return {k: v for i, inner in enumerate(value) for k, v in _flat(inner, f"{at}.{i}").items()}
    return {at: value}


def _changed(one: Row, two: Row) -> dict[str, tuple[Any, Any]]:
    return {key: (one.get(key), two.get(key)) for key in sorted(one | two) if one.get(key) != two.get(key)}


def _data(before: str, after: str, one: Row, two: Row) -> list[Row]:
    rows = []
    for data in one["data"]:
        other = next((d for d in two["data"] if set(d["seeds"]) & set(data["seeds"])), None)
        if other is None:
            continue
        theirs = {(arm["arm"], arm["phase"]): arm for arm in other["arms"]}
        for arm in data["arms"]:
            match = theirs.get((arm["arm"], arm["phase"]))
            if match is None or match["shards"] == arm["shards"]:
                continue
            row: Row = {
                "seeds": sorted(set(data["seeds"]) & set(other["seeds"])), "arm": arm["arm"], "phase": arm["phase"],
                "tokens": (arm["tokens"], match["tokens"]), "share": (arm["share"], match["share"]),
                "common_tokens": None, "only_before": None, "only_after": None,
            }  # fmt: skip
            mine, others = (_members(where, d, arm) for where, d in ((before, data), (after, other)))
            if mine is not None and others is not None:
                both = mine.join(others, on="id", how="semi")
                row["common_tokens"] = int(both["tokens"].sum()) / max(int(mine["tokens"].sum()), 1)
                row["only_before"] = mine.height - both.height
                row["only_after"] = others.join(mine, on="id", how="anti").height
            rows.append(row)
    return rows


def _members(where: str, data: Row, arm: Row) -> pl.DataFrame | None:
    folder = Path(where.removesuffix(f"/{record.RECORD}"), DATA)
    folder = folder if data["run"] == DATA else folder / data["run"]
    if not (folder / "manifest.json").exists():
        return None
    mine = (pl.col("arm") == arm["arm"]) & (pl.col("phase") == arm["phase"])
    tokens = (pl.col("end") - pl.col("start")).sum().alias("tokens")
    return collect(curation.open_run(str(folder)).provenance.filter(mine).group_by("id").agg(tokens))


def _results(one: Row, two: Row) -> list[Row]:
    theirs = {(r["set"], r["split"]): r for r in two["results"]}
    weights = [{(m["arm"], m["seed"]): m["files"] for m in found["models"]} for found in (one, two)]
    rows = []
    for result in one["results"]:
        other = theirs.get((result["set"], result["split"]), {"arms": {}})
        for arm, means in result["arms"].items():
            a, b = means.get(one["measure"]), other["arms"].get(arm, {}).get(one["measure"])
            if a is None or b is None:
                continue
            same = [key for key in weights[0] if key[0] == arm and weights[0][key] == weights[1].get(key)]
            rows.append(
                {
                    "set": result["set"], "split": result["split"], "arm": arm, "before": _short(a), "after": _short(b),
                    "same_models": len(same), "num_models": len(a["by_seed"]),
                }
            )  # fmt: skip
    return rows


def _short(mean: Row) -> Row:
    return {key: mean[key] for key in ("value", "low", "high")}
