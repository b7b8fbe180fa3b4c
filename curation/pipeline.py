"""Recipe -> run folder: ingest -> detect -> dedup (-> label) -> tokenise -> mix on one Ray session.

The driver holds names, chains and sums, never documents. What each stage made is read back
from its committed parts, so a run that was killed and run again ends with the same manifest.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from curation import dedup, detect, ingest, steps, storage, tokenise
from curation.detect.fasttext import Detector
from curation.engine import Engine, session
from curation.label import stage as label
from curation.manifest import (
    ARMS,
    DEDUP,
    DETECT,
    DOCUMENTS,
    LABELS,
    SIGNATURES,
    TOKENS,
    Part,
    RunFolder,
    WriterLock,
    fingerprint,
)
from curation.memory import PeakMemory
from curation.mix import arms
from curation.mix.budget import ArmPhase
from curation.recipe import Recipe
from curation.schema import SCHEMA_VERSION
from curation.summary import summarise
from curation.tokenise.tokenizer import TokenizerSpec

__version__ = "0.1.0"


@dataclass
class _Run:
    """What the stages of one run share."""

    recipe: Recipe
    folder: RunFolder
    engine: Engine
    seconds: dict[str, float] = field(default_factory=dict)  # wall time by stage
    busy: dict[str, float] = field(default_factory=dict)  # summed over workers
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    labelling: dict[str, Any] = field(default_factory=dict)  # plan and counts of this attempt's requests

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        self.event("start", stage=name)
        yield
        self.seconds[name] = time.perf_counter() - started
        self.event("end", stage=name, seconds=round(self.seconds[name], 3))

    def record(self, name: str, parts: list[Part]) -> None:
        """Roll a stage's parts into the manifest."""
        chain = fingerprint(sorted(part.chain for part in parts))
        self.stages[name] = {"chain": chain, "parts": [asdict(part) for part in parts]}

    def event(self, what: str, **about: Any) -> None:
        if not storage.is_local(self.folder.root):
            return  # object stores cannot append; their runs have the manifest only
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": what, **about})
        with open(storage.filesystem(self.folder.path("events.jsonl"))[1], "a", encoding="utf-8") as handle:
            handle.write(line + "\n")


def curate(
    recipe: Recipe,
    root: str,
    *,
    workers: int | None = None,
    address: str | None = None,
    on_progress: Callable[[str, int, int | None], None] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run `recipe` into the run folder `root` and return the summary (also in manifest.json).

    `workers` limits the CPUs used, `address` names a Ray cluster; without one a local session is
    started and ended. `on_progress(label, done, total)` and `on_line(text)` are told how it goes.
    Raises UserError for what the user must mend, TilthError for what failed.
    """
    splits = ingest.plan(recipe.inputs, recipe.ingest)
    if storage.is_local(root):
        root = os.path.abspath(storage.filesystem(root)[1])
    detect_fingerprint = detect.section_fingerprint(recipe.detect)  # loads the model: a wrong path ends here
    spec = tokenise.resolve(recipe.tokenise.tokenizer, recipe.tokenise.eos)
    earlier = [dedup.open_earlier(path, recipe.dedup) for path in recipe.dedup.against]
    with WriterLock(RunFolder(root)), PeakMemory() as memory, session(workers, address, root) as engine:
        if on_progress:
            engine.on_progress = on_progress
        storage.sweep(root)
        run = _Run(recipe, RunFolder(root), engine)
        run.event("curate", recipe=recipe.name, tilth=__version__)
        names = _read_and_sign(run, splits, detect_fingerprint)
        _dedup(run, names, earlier)
        _label(run, names, on_line or (lambda _: None))
        spec = _tokenise(run, names, spec)
        _mix(run, spec)
        if on_line:
            for warning in run.warnings:
                on_line(f"warning: {warning}")
        return _finish(run, spec, memory)


def _read_and_sign(run: _Run, splits: list[ingest.Split], detect_fingerprint: str) -> list[str]:
    """Ingest, detect and signatures, in one pass over the input. Returns the names of the parts."""
    recipe, folder = run.recipe, run.folder
    readings = [
        steps.Reading(folder, s, steps.Chains.of(s, detect_fingerprint, recipe.dedup), recipe.detect, recipe.dedup)
        for s in splits
    ]
    names: dict[str, list[str]] = {}
    stale = []
    with run.stage("ingest_detect"):
        for reading in readings:
            done = _complete(reading)
            if done is None:
                stale.append(reading)
            else:
                names[reading.split.name] = done
        sizes = [reading.split.end - reading.split.start for reading in stale]
        for worked in run.engine.fan_out(steps.read_split, steps.work_part, stale, sizes, "ingest, detect"):
            names.setdefault(worked.split, []).append(worked.name)
            _account(run, worked)
        for reading in stale:
            steps.finish_split(reading, names[reading.split.name])
        every = sorted(name for parts in names.values() for name in parts)
        for stage, place in (("ingest", DOCUMENTS), ("detect", DETECT), ("signatures", SIGNATURES)):
            folder.drop_parts(place, every)
            run.record(stage, _parts(folder, place, every))
        folder.drop_parts(steps.SPLITS, [s.name for s in splits])
    return every


def _complete(reading: steps.Reading) -> list[str] | None:
    """The parts of a split when nothing of it has to be done again, else None."""
    names = steps.split_parts(reading.run, reading.split, reading.chains)
    if names is None:
        return None
    made = (reading.run.current(place, name, chain) for place, chain in reading.chains.places() for name in names)
    return names if all(made) else None


def _dedup(run: _Run, names: list[str], earlier: list[dedup.Earlier]) -> None:
    section = run.recipe.dedup
    signed = sorted(part["chain"] for part in run.stages["signatures"]["parts"])
    asked = section.model_dump(exclude={"against"})  # what earlier runs hold counts, not where they lie
    kept_before = [e.fingerprint for e in earlier]
    chain = fingerprint(["dedup", dedup.STAGE_VERSION, asked, names, signed, kept_before])
    with run.stage("dedup"):
        if not all(run.folder.current(DEDUP, name, chain) for name in names):
            dedup.cluster(run.folder, names, section, chain, run.engine.map, earlier=earlier)
        run.folder.drop_parts(DEDUP, [*names, dedup.REJECTS_PART])
        rejects = run.folder.part(DEDUP, dedup.REJECTS_PART)
        parts = _parts(run.folder, DEDUP, names)
        run.record("dedup", [*parts, *([rejects] if rejects else [])])
    crowded = sum(part.counts["crowded"] for part in parts)
    if crowded:
        run.warnings.append(
            f"dedup: {crowded:,} kept documents share a bucket with very many different ones and were compared with "
            "the first of them only: some may have a near-duplicate that stayed (more dedup.rows make smaller buckets)"
        )


def _label(run: _Run, names: list[str], on_line: Callable[[str], None]) -> None:
    """What a language model says of what the detector found, where the recipe names one."""
    if run.recipe.label is None:
        run.folder.drop_parts(LABELS, ())  # with their quarantine rows
        storage.remove(run.folder.path(LABELS))
        return
    parents = [part["chain"] for stage in ("ingest", "detect", "dedup") for part in run.stages[stage]["parts"]]
    work = steps.label_work(run.recipe, run.folder, names, parents, run.engine.cluster)
    with run.stage("label"):
        parts, counts = label.label(work, on_line, lambda done, total: run.engine.on_progress("label", done, total))
        run.event("labels", **counts)
        run.record("label", parts)
        run.labelling = counts if "plan" in counts else {}


def _tokenise(run: _Run, names: list[str], spec: TokenizerSpec) -> TokenizerSpec:
    """Token ids of every representative. Returns the spec with the encoder that was chosen."""
    folder = run.folder
    with run.stage("tokenise"):
        # Parents by content where it is cheap: a dedup that comes out the same costs nothing downstream.
        ingested = {part["name"]: part["chain"] for part in run.stages["ingest"]["parts"]}
        clusters = {part["name"]: part["files"] for part in run.stages["dedup"]["parts"]}
        identity = [tokenise.STAGE_VERSION, spec.sha256, spec.eos_id, spec.token_bytes]
        chains = {
            name: fingerprint(["tokenise", *identity, ingested[name], [f["sha256"] for f in clusters[name]]])
            for name in names
        }
        sizes = {part["name"]: part["counts"]["bytes"] for part in run.stages["ingest"]["parts"]}
        stale = [name for name in names if not folder.current(TOKENS, name, chains[name])]
        if stale:
            sample = folder.read(f"{DOCUMENTS}/{stale[0]}.parquet", ["text"])["text"][:200].to_pylist()
            spec = tokenise.check_fastokens(spec, sample)
            if spec.warning:
                run.warnings.append(spec.warning)
        # Beside the shards for whoever trains on them, and where every node finds it.
        raw = storage.read_bytes(spec.path)
        spec = replace(spec, path=folder.path("tokenizer.json"))
        if stale or not storage.exists(spec.path):
            storage.commit_bytes(spec.path, raw)
        stale.sort(key=lambda name: -sizes[name])
        items = [steps.TokenItem(folder, name, chains[name], spec) for name in stale]
        for worked in run.engine.map(steps.tokenise_part, items, "tokenise"):
            _account(run, worked)
        folder.drop_parts(TOKENS, names)
        run.record("tokenise", _parts(folder, TOKENS, names))
    return spec


def _mix(run: _Run, spec: TokenizerSpec) -> None:
    """Plan the arms and write their shards, or find them done."""
    recipe, folder = run.recipe, run.folder
    tokens = recipe.tokenise.shard_tokens
    section = {
        "mix": recipe.mix.model_dump(),
        "seed": recipe.seed,
        "formats": recipe.tokenise.formats,
        "shard_tokens": tokens,
        "tokenizer": spec.name,
    }
    before = [stage for stage in ("detect", "dedup", "label", "tokenise") if stage in run.stages]
    parents = [part["files"] for stage in before for part in run.stages[stage]["parts"]]
    chain = steps.mix_chain(section, [fingerprint(parents)])
    with run.stage("mix"):
        done = folder.current(ARMS, "plan", chain)
        if done and all(folder.current(place, name, chain) for place, name in done.about["shards"]):
            run.record("mix", [done, *(_part(folder, place, name) for place, name in done.about["shards"])])
            return
        sizes = {part["name"]: part["counts"]["documents"] for part in run.stages["ingest"]["parts"]}
        batches = arms.batches(folder, sizes, recipe.seed, recipe.label is not None)
        for _ in run.engine.map(arms.gather, batches, "gather"):
            pass
        plan = arms.make_plan(recipe.mix, arms.MappedSupply(batches, run.engine.map))
        counts = arms.shard_counts(plan, tokens)
        stats, limits = _select(run, batches, plan, counts)
        items = _shard_items(batches, plan, counts, limits, chain, recipe.tokenise.formats, spec)
        written = list(run.engine.map(steps.write_shard, items, "write shards"))
        places = sorted((part.folder, part.name) for part in written)
        _drop_other_shards(folder, places)
        storage.remove(folder.path(arms.WORK))
        about = {"shards": places, "arms": _achieved(plan, stats)}
        done = folder.commit_part(Part(ARMS, "plan", chain, (), about=about))
        run.record("mix", [done, *sorted(written, key=lambda part: (part.folder, part.name))])


def _select(
    run: _Run, batches: list[arms.Batch], plan: list[ArmPhase], counts: tuple[int, ...]
) -> tuple[np.ndarray, list[int]]:
    """Write every batch's rows; sums over batches: stats of each arm-phase, and the tokens to keep of each shard."""
    shard_tokens = np.zeros(sum(counts), np.int64)
    stats = np.zeros((len(plan), len(arms.STATS)), np.int64)
    items = [replace(batch, plan=tuple(plan), shards=counts) for batch in batches]
    for selected in run.engine.map(arms.select_rows, items, "select"):
        shard_tokens += selected["shard_tokens"]
        most = np.maximum(stats[:, -1], selected["stats"][:, -1])
        stats += selected["stats"]
        stats[:, -1] = most
    return stats, arms.cut_to_budget(plan, counts, shard_tokens)


def _shard_items(
    batches: list[arms.Batch],
    plan: list[ArmPhase],
    counts: tuple[int, ...],
    limits: list[int],
    chain: str,
    formats: tuple[str, ...],
    spec: TokenizerSpec,
) -> list[steps.WriteShard]:
    items, shard = [], 0
    for arm_phase, count in zip(plan, counts, strict=True):
        place = steps.arm_folder(arm_phase.arm, arm_phase.phase)
        for k in range(count):
            if limits[shard]:
                rows = arms.ShardItem(batches[0].run, tuple(batches), shard, limits[shard])
                items.append(steps.WriteShard(rows, place, f"{k:05d}", chain, formats, spec))
            shard += 1
    return items


def _drop_other_shards(folder: RunFolder, places: list[tuple[str, str]]) -> None:
    """Remove the shards of arms and phases that the recipe no longer has."""
    wanted: dict[str, list[str]] = {}
    for place, name in places:
        wanted.setdefault(place, []).append(name)
    for arm in storage.list_names(folder.path(ARMS)):
        if arm.endswith(".json") or f"{ARMS}/{arm}" == arms.WORK:
            continue
        for phase in storage.list_names(folder.path(ARMS, arm)):
            place = steps.arm_folder(arm, phase)
            folder.drop_parts(place, wanted.get(place, []))
            if place not in wanted:
                storage.remove(folder.path(place))
        if not any(place.startswith(f"{ARMS}/{arm}/") for place in wanted):
            storage.remove(folder.path(ARMS, arm))


def _achieved(plan: list[ArmPhase], stats: np.ndarray) -> list[dict[str, Any]]:
    """The asked-versus-achieved table, one row an arm-phase."""
    rows = []
    for arm_phase, sums in zip(plan, stats.tolist(), strict=True):
        found = dict(zip(arms.STATS, sums, strict=True))
        background = found["tokens"] - found["inserted_tokens"]
        rows.append(
            {
                "arm": arm_phase.arm,
                "phase": arm_phase.phase,
                "tokens_asked": arm_phase.target,
                "tokens": found["tokens"] - arm_phase.excess,
                "share_asked": arm_phase.share,
                "share": found["inserted_tokens"] / arm_phase.target,
                "documents": found["documents"],
                "background_documents": found["documents"] - found["inserted_documents"],
                "inserted_documents": found["inserted_documents"],
                "dropped_documents": found["dropped_documents"],
                "drop": sorted(arm_phase.drop),
                "max_repeat": found["max_uses"],
                "discourse_tokens": found["discourse_tokens"],
                "common_with_first": found["common_tokens"] / background if background else 0.0,
            }
        )
    return rows


def _finish(run: _Run, spec: TokenizerSpec, memory: PeakMemory) -> dict[str, Any]:
    """Summary, cards, manifest and report. When nothing was made and nothing is asked otherwise, all of them
    are there already and stay as they are."""
    from curation.inspection import cards, report

    run.seconds["start_ray"] = run.engine.start_seconds
    manifest: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "tilth_version": __version__,
        "recipe": run.recipe.model_dump(mode="json"),
        "tokenizer": spec.about(),
        "stages": json.loads(json.dumps(run.stages)),
    }
    before = _manifest_before(run.folder)
    seconds = {name: round(value, 2) for name, value in run.seconds.items()}
    if before and {k: v for k, v in before.items() if k not in ("summary", "tokenizer")} == {
        k: v for k, v in manifest.items() if k != "tokenizer"
    }:
        run.event("done", changed=False)
        return {**before["summary"], "seconds": seconds}
    summary = summarise(run.folder.root, run.recipe, run.stages, seconds, run.busy, memory.peak_bytes())
    if "labels" in summary:
        earlier = ((before or {}).get("summary") or {}).get("labels") or {}
        summary["labels"]["last_attempt"] = run.labelling or earlier.get("last_attempt")
    manifest["summary"] = {**summary, "warnings": run.warnings}
    with run.stage("report"):
        storage.commit_bytes(run.folder.path("recipe.yaml"), _recipe_yaml(run.recipe))
        cards.write_cards(run.folder, manifest)
        storage.commit_bytes(run.folder.path("manifest.json"), json.dumps(manifest, indent=1).encode())
        report.write_report(run.folder, manifest, lambda model: Detector.load(model).explain)
    run.event("done", exit_code=summary["exit_code"])
    manifest["summary"]["seconds"]["report"] = round(run.seconds["report"], 2)
    return dict(manifest["summary"])


def _manifest_before(folder: RunFolder) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(storage.read_bytes(folder.path("manifest.json")))
        return found if storage.exists(folder.path("report.html")) else None
    except (FileNotFoundError, ValueError):
        return None


def _parts(folder: RunFolder, place: str, names: list[str]) -> list[Part]:
    return [_part(folder, place, name) for name in names]


def _part(folder: RunFolder, place: str, name: str) -> Part:
    part = folder.part(place, name)
    assert part is not None, f"{place}/{name} was committed by this run"
    return part


def _account(run: _Run, worked: steps.Worked) -> None:
    for stage, seconds in worked.seconds.items():
        run.busy[stage] = run.busy.get(stage, 0.0) + seconds


def _recipe_yaml(recipe: Recipe) -> bytes:
    import yaml

    text: str = yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)
    return text.encode()
