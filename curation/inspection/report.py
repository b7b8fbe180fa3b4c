"""report.html: what a run found and made, as one page that needs no network and no script.

`facts` computes from the run's files, the manifest's summary gives what only the driver knows
(asked and achieved tokens, seconds, memory); this module puts them into the shapes that the
template draws. Fields that a summary lacks leave their section out. The page's size is bounded:
excerpts and lists are cut, whatever the corpus.
"""

import math
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from curation.inspection.excerpts import shorten
from curation.inspection.facts import BINS, Facts, gather
from curation.inspection.pages import count, duration, percent, render, size
from curation.inspection.run import MODEL, STUDENT, Explainer, Run
from curation.manifest import RunFolder
from curation.schema import STUDENT_P

MAX_SHARDS = 300
MAX_RECIPE_CHARS = 20_000
_STAGE_NAMES = {
    "start_ray": "start Ray",
    "ingest_detect": "ingest, detect, sign",
    "tokenise": "tokenise",
    "dedup": "dedup",
    "mix": "mix, write shards",
    "report": "report",
}


class Tile(NamedTuple):
    """A headline number."""

    value: str
    label: str
    note: str


class Output(NamedTuple):
    """A bar of the flow, `inserted` being the up-sampled fraction of its width."""

    label: str
    number: str
    width: float
    inserted: float = 0.0


class Step(NamedTuple):
    """A stage of the flow. `width` and `next_width` are fractions of the records read; `marked` the
    AI-discourse fraction of the bar. `bars` are the outputs of a stage with several."""

    name: str
    value: str
    unit: str
    note: str
    width: float | None = None
    next_width: float | None = None
    marked: float = 0.0
    bars: tuple[Output, ...] = ()


class Segment(NamedTuple):
    """A part of an arm's tokens."""

    kind: str  # background | natural | inserted
    tokens: int
    fraction: float


class ArmPhase(NamedTuple):
    """A row of the asked-versus-achieved table."""

    arm: str
    phase: str
    tokens_asked: int | None
    tokens: int
    share_asked: float | None
    share: float | None
    documents: int | None
    inserted_documents: int | None
    dropped_documents: int | None
    drop: str
    max_repeat: int | None
    common: float | None
    segments: tuple[Segment, ...]


class Column(NamedTuple):
    """A bar of the p(discourse) histogram; `height` is logarithmic, 0..1."""

    low: float
    high: float
    documents: int
    height: float


def write_report(run: RunFolder, manifest: dict[str, Any], explainer: Explainer | None = None) -> None:
    """Commit `report.html` into the run folder. With an `explainer`, samples also show what the
    fastText detector saw. Raises TilthError when a file of the run cannot be read."""
    opened = Run(run, manifest, explainer)
    run.commit_bytes("report.html", render("report.html.j2", **_view(opened, gather(opened))).encode())


def _view(run: Run, facts: Facts) -> dict[str, Any]:
    summary = run.summary
    arms = [_arm_phase(row) for row in summary.get("arms") or []]
    seconds = summary.get("seconds") or {}
    shards = [shard for row in summary.get("arms") or [] for shard in row.get("shards") or []]
    detect = run.recipe.get("detect") or {}
    recipe = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True, width=100)
    return {
        "name": run.recipe.get("name") or "unnamed",
        "root": run.folder.root,
        "version": run.manifest.get("tilth_version"),
        "exit_code": summary.get("exit_code"),
        "warnings": summary.get("warnings") or [],
        "tiles": _tiles(summary, facts, arms),
        "flow": _flow(facts, arms, len(shards)),
        "facts": facts,
        "background": [s for s in facts.sources if not s.pool],
        "pools": [s for s in facts.sources if s.pool],
        "histogram": _histogram(facts.histogram),
        "threshold": (detect.get("fasttext") or {}).get("threshold"),
        "verify": (run.recipe.get("dedup") or {}).get("verify"),
        "has_evidence": any(
            piece.kind == "evidence" for samples in facts.samples.values() for s in samples for piece in s.pieces
        ),
        "arms": arms,
        "shards": shards[:MAX_SHARDS],
        "num_shards": len(shards),
        "seconds": [(_STAGE_NAMES.get(stage, stage), s) for stage, s in seconds.items()],
        "peak_memory_bytes": summary.get("peak_memory_bytes"),
        "recipe": shorten(recipe, MAX_RECIPE_CHARS),
        "root_python": repr(run.folder.root),
        "student_p": STUDENT_P,
        "whose": {"model": MODEL, "student": STUDENT},
        "root_shell": shlex.quote(run.folder.root),
        "an_id": next((s.id for samples in facts.samples.values() for s in samples), None),
    }


def _totals(facts: Facts) -> dict[str, int]:
    fields = ("documents", "discourse", "blocklist", "kept")
    return {field: sum(getattr(source, field) for source in facts.sources) for field in fields}


def _quarantined(facts: Facts) -> int:
    return sum(r.records for r in facts.rejects)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _plural(number: int, noun: str) -> str:
    return f"{count(number)} {noun}{'s' * (number != 1)}"


def _tiles(summary: dict[str, Any], facts: Facts, arms: Sequence[ArmPhase]) -> list[Tile]:
    totals, num_sources = _totals(facts), len(facts.sources) + facts.other_sources
    documents, discourse, removed = totals["documents"], totals["discourse"], facts.dedup.removed
    read = f", {size(summary['bytes_read'])} read" if summary.get("bytes_read") else ""
    tiles = [
        Tile(count(documents), "documents", f"{_plural(num_sources, 'source')}{read}"),
        Tile(percent(_share(discourse, documents)), "AI discourse", f"{count(discourse)} documents"),
        Tile(count(removed), "duplicates removed", f"{percent(_share(removed, documents))} of documents"),
        Tile(count(_quarantined(facts)), "records quarantined", "each with its reason"),
    ]
    if arms:
        tokens = sum(row.tokens for row in arms)
        tiles.append(Tile(count(tokens), "tokens written", _plural(len({row.arm for row in arms}), "arm")))
    if summary.get("seconds"):
        peak_bytes = summary.get("peak_memory_bytes")
        note = f"peak memory {size(peak_bytes)}" if peak_bytes else ""
        tiles.append(Tile(duration(sum(summary["seconds"].values())), "in all", note))
    return tiles


def _flow(facts: Facts, arms: Sequence[ArmPhase], num_shards: int) -> list[Step]:
    totals = _totals(facts)
    documents, discourse, kept = totals["documents"], totals["discourse"], totals["kept"]
    # Duplicate ids are found by dedup, so they are among the documents.
    rejected = _quarantined(facts) - facts.dedup.duplicate_id
    whole = max(1, documents + rejected)
    read, left, dedup = documents / whole, kept / whole, facts.dedup
    removed = f"removed: {count(dedup.exact)} exact, {count(dedup.near)} near"
    if dedup.earlier:
        removed += f", {count(dedup.earlier)} like what an earlier run kept"
    if dedup.duplicate_id:
        removed += f", {count(dedup.duplicate_id)} with a source_id seen before"
    steps = [
        Step("ingest", count(documents), "documents", f"{count(rejected)} records quarantined", read, read),
        Step(
            "detect",
            count(discourse),
            "AI discourse",
            f"the blocklist flags {count(totals['blocklist'])}",
            read,
            left,
            _share(discourse, documents),
        ),
        Step("dedup", count(kept), "kept", removed, left),
    ]
    if arms:
        steps += [_mix_step(arms), _tokenise_step(arms, num_shards)]
    return steps


def _mix_step(arms: Sequence[ArmPhase]) -> Step:
    uses: dict[str, int] = {}
    inserted: dict[str, int] = {}
    for row in arms:
        uses[row.arm] = uses.get(row.arm, 0) + (row.documents or 0)
        inserted[row.arm] = inserted.get(row.arm, 0) + (row.inserted_documents or 0)
    most = max(1, *uses.values())
    bars = tuple(Output(arm, count(n), n / most, _share(inserted[arm], n)) for arm, n in uses.items())
    dropped = sum(row.dropped_documents or 0 for row in arms)
    note = f"{count(sum(inserted.values()))} inserted; {count(dropped)} dropped by rule"
    return Step("mix", count(len(uses)), "arms, documents with repeats", note, bars=bars)


def _tokenise_step(arms: Sequence[ArmPhase], num_shards: int) -> Step:
    tokens: dict[str, int] = {}
    for row in arms:
        tokens[row.phase] = tokens.get(row.phase, 0) + row.tokens
    most = max(1, *tokens.values())
    bars = tuple(Output(phase, count(n), n / most) for phase, n in tokens.items())
    note = f"in {_plural(num_shards, 'shard file')}, each re-read before commit" if num_shards else ""
    return Step("tokenise", count(sum(tokens.values())), "tokens, all arms by phase", note, bars=bars)


def _arm_phase(row: dict[str, Any]) -> ArmPhase:
    tokens = row.get("tokens") or 0
    inserted = min(tokens, round((row.get("share") or 0.0) * (row.get("tokens_asked") or tokens)))
    natural = min(tokens - inserted, row.get("discourse_tokens") or 0)
    parts = (("background", tokens - inserted - natural), ("natural", natural), ("inserted", inserted))
    return ArmPhase(
        row.get("arm", "?"),
        row.get("phase", "?"),
        row.get("tokens_asked"),
        tokens,
        row.get("share_asked"),
        row.get("share"),
        row.get("documents"),
        row.get("inserted_documents"),
        row.get("dropped_documents"),
        ", ".join(row.get("drop") or []),
        row.get("max_repeat"),
        row.get("common_with_first"),
        tuple(Segment(kind, n, _share(n, tokens)) for kind, n in parts),
    )


def _histogram(counts: Sequence[int]) -> list[Column]:
    top = math.log1p(max(counts, default=0)) or 1.0
    return [Column(b / BINS, (b + 1) / BINS, n, math.log1p(n) / top) for b, n in enumerate(counts)]
