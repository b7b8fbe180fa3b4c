"""The one object that says what a run did: the last line of `--json`, and `summary` in the manifest."""

from collections import Counter
from typing import Any

from curation.recipe import Recipe

EXIT_DONE, EXIT_QUARANTINE = 0, 3


def summarise(
    root: str,
    recipe: Recipe,
    stages: dict[str, dict[str, Any]],
    seconds: dict[str, float],
    busy: dict[str, float],
    peak_memory_bytes: int,
) -> dict[str, Any]:
    """Counts from the committed parts; the same for a run in one go and one that was killed and resumed.
    `seconds` is wall time by stage, `busy` the seconds that workers spent, summed."""
    ingested, detected = _sums(stages["ingest"]), _sums(stages["detect"])
    deduped = _sums(stages["dedup"])
    quarantined = {k.removeprefix("quarantine:"): n for k, n in ingested.items() if k.startswith("quarantine:")}
    if deduped["duplicate_id"]:
        quarantined["duplicate_id"] = deduped["duplicate_id"]
    total = sum(quarantined.values())
    table = next(part["about"]["arms"] for part in stages["mix"]["parts"] if part["name"] == "plan")
    # A file that could not be read counts as one record, so that a run of nothing else is not below the limit.
    seen = max(ingested["records"], total)
    too_many = total > recipe.max_quarantine_fraction * seen
    return {
        "run": root,
        "recipe": recipe.name,
        "records_read": ingested["records"],
        "documents_read": ingested["documents"],
        "bytes_read": ingested["bytes"],
        "quarantined": dict(sorted(quarantined.items())),
        "quarantined_total": total,
        "discourse": detected["discourse"],
        "blocklist": detected["blocklist"],
        "stances_of": "student",  # what a language model said is under `labels`
        "stances": {k.removeprefix("stance:"): n for k, n in sorted(detected.items()) if k.startswith("stance:")},
        **({"labels": _labels(_sums(stages["label"]))} if "label" in stages else {}),
        "duplicates": {k: deduped[k] for k in ("exact", "near", "earlier", "duplicate_id")},
        "kept": deduped["kept"],
        "dropped": {
            f"{row['arm']}/{row['phase']}": {"+".join(row["drop"]): row["dropped_documents"]}
            for row in table
            if row["drop"]
        },
        "sources": _sources(stages),
        "arms": [{**row, "shards": _shards(stages["mix"], row)} for row in table],
        "seconds": {k: round(v, 2) for k, v in seconds.items()},
        "worker_seconds": {k: round(v, 2) for k, v in sorted(busy.items())},
        "peak_memory_bytes": peak_memory_bytes,
        "exit_code": EXIT_QUARANTINE if too_many else EXIT_DONE,
    }


def _labels(sums: Counter[str]) -> dict[str, Any]:
    """What a language model said: asked = labelled + quarantined + not_reached."""
    asked, labelled, quarantined = (sums[key] for key in ("asked", "labelled", "quarantined"))
    return {
        "asked": asked, "audit": sums["audit"], "labelled": labelled, "quarantined": quarantined,
        "not_reached": asked - labelled - quarantined,
        **{
            f"{kind}s": {k.removeprefix(f"{kind}:"): n for k, n in sorted(sums.items()) if k.startswith(f"{kind}:")}
            for kind in ("stance", "error")
        },
    }  # fmt: skip


def _sums(stage: dict[str, Any]) -> Counter[str]:
    total: Counter[str] = Counter()
    for part in stage["parts"]:
        total.update(part["counts"])
    return total


def _sources(stages: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    source = {part["name"]: part["about"]["source"] for part in stages["ingest"]["parts"]}
    rows: dict[str, dict[str, int]] = {}
    for stage, counts in (("ingest", ["documents"]), ("detect", ["discourse", "blocklist"]), ("dedup", ["kept"])):
        for part in stages[stage]["parts"]:
            if part["name"] in source:
                row = rows.setdefault(source[part["name"]], Counter())
                row.update({k: part["counts"].get(k, 0) for k in counts})
    return {name: dict(row) for name, row in sorted(rows.items())}


def _shards(stage: dict[str, Any], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The token files of an arm-phase with their hashes."""
    folder = f"60_arms/{row['arm']}/{row['phase']}"
    return [
        {"path": file["path"], "sha256": file["sha256"], "tokens": part["counts"]["tokens"]}
        for part in stage["parts"]
        if part["folder"] == folder
        for file in part["files"]
        if file["path"].endswith((".ds", ".bin"))
    ]
