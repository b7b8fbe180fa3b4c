"""The stage `label`, after dedup: which documents a language model reads, and its labels beside the documents.

Read are representatives without a given stance that the detector takes for AI discourse, and an audit sample of those
that it does not: the `audit` with the smallest h(seed, "audit", id), so that what it misses can be estimated. Runs in
the driver: the work is the server's, and what is here waits for it.

A part's table has a row for each of its documents, so that it lines up with 10_documents. A part is committed when the
last of its documents has an outcome; the cache holds every answer before that. Documents that the money or
`max_documents` did not reach leave their part incomplete: the same command asks them when there is more of either.
"""

import asyncio
import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from curation import storage
from curation.label import STAGE_VERSION
from curation.label.backend import Backend
from curation.label.cache import Cache
from curation.label.client import Client
from curation.label.likelihood import Likelihood
from curation.label.rubric import Rubric
from curation.label.vllm_engine import VllmEngine
from curation.label.windows import Span
from curation.label.work import Labeller, LabelRow, Limits, Plan, RejectRow, iterate
from curation.manifest import DEDUP, DETECT, DOCUMENTS, LABELS, QUARANTINE, Part, RunFolder, fingerprint
from curation.recipe import Label
from curation.rng import keys64
from curation.schema import LLM_LABEL, REJECT, REJECT_HEAD_BYTES

Line = Callable[[str], None]
Explain = Callable[[str], Iterable[Span]]


@dataclass(frozen=True)
class Selection:
    """What is read of a part: rows in its tables, and which of them are of the audit sample."""

    name: str
    rows: list[int]
    audit: frozenset[int]


@dataclass(frozen=True)
class Work:
    """What a run gives this stage."""

    run: RunFolder
    names: tuple[str, ...]
    section: Label
    seed: int
    parents: tuple[str, ...]
    """Chains of the parts of ingest, detect and dedup."""
    explain: Explain
    address: str | None = None
    """Of the Ray cluster that the run is on."""

    def chain(self) -> str:
        """Of every part: the audit sample is drawn from all of them."""
        section = self.section
        asked = [section.backend, section.model, section.revision, Rubric.load(section.rubric).sha256]
        size = [section.window_characters, section.max_windows, section.audit]
        return fingerprint(["label", STAGE_VERSION, asked, size, self.seed, list(self.names), sorted(self.parents)])


def select(work: Work) -> list[Selection]:
    """What is read, part by part."""
    found: list[Selection] = []
    sample: list[tuple[int, str, int]] = []  # of the rejects: (minus key, part, row), the smallest keys of all
    for name in work.names:
        documents = work.run.read(f"{DOCUMENTS}/{name}.parquet", ["id", "given_stance"])
        flagged = work.run.read(f"{DETECT}/{name}.parquet", ["discourse"])["discourse"]
        kept = work.run.read(f"{DEDUP}/{name}.parquet", ["kept"])["kept"]
        open_ = pc.and_(kept, pc.is_null(documents["given_stance"]))
        rows = pc.indices_nonzero(pc.and_(open_, flagged)).to_pylist()
        found.append(Selection(name, rows, frozenset()))
        if work.section.audit:
            rejects = pc.indices_nonzero(pc.and_(open_, pc.invert(flagged))).to_pylist()
            keys = keys64((work.seed, "audit"), documents["id"].take(pa.array(rejects, pa.int64())).to_pylist())
            for key, row in zip(keys.tolist(), rejects, strict=True):
                entry = (-int(key), name, row)
                if len(sample) < work.section.audit:
                    heapq.heappush(sample, entry)
                elif entry > sample[0]:
                    heapq.heapreplace(sample, entry)
    drawn: dict[str, set[int]] = {}
    for _, name, row in sample:
        drawn.setdefault(name, set()).add(row)
    return [
        Selection(one.name, sorted({*one.rows, *drawn.get(one.name, ())}), frozenset(drawn.get(one.name, ())))
        for one in found
    ]


def plan(work: Work) -> Plan:
    """What `label` would ask and what it costs at most, without a request to the server: so what the cache has is known
    only where the recipe names the model's revision."""
    with Cache(_cache_folder(work.section)) as cache:
        return _labeller(work, cache, lambda _: None, check=False).plan(_documents(work, select(work)))


def label(
    work: Work, on_line: Line = lambda _: None, on_progress: Callable[[int, int], None] = lambda *_: None
) -> tuple[list[Part], dict[str, Any]]:
    """Label what is not labelled; returns the parts and this attempt's counts (work.Counts as a dict, and the plan).
    Raises UserError when the server refuses the recipe's model, key or requests, TilthError when it stays away longer
    than the client's patience."""
    chain = work.chain()
    chosen = select(work)
    stale = [one for one in chosen if not _complete(work.run, one.name, chain)]
    counts: dict[str, Any] = {"documents": 0}
    if stale:
        with Cache(_cache_folder(work.section)) as cache:
            counts = _label(work, cache, stale, chain, on_line, on_progress)
    work.run.drop_parts(LABELS, work.names)
    parts = [part for name in work.names if (part := work.run.part(LABELS, name))]
    return parts, counts


def _complete(run: RunFolder, name: str, chain: str) -> bool:
    part = run.current(LABELS, name, chain)
    return part is not None and bool(part.about["complete"])


def _label(
    work: Work, cache: Cache, stale: list[Selection], chain: str, on_line: Line,
    on_progress: Callable[[int, int], None],
) -> dict[str, Any]:  # fmt: skip
    labeller = _labeller(work, cache, on_line)
    total = sum(len(one.rows) for one in stale)
    told = labeller.plan(_documents(work, stale))
    on_line(told_in_words(told, work.section))
    open_: dict[str, _Pending] = {}
    where: dict[str, str] = {}  # id -> part, of the documents on their way

    def documents() -> Iterator[tuple[str, str]]:
        for one in stale:
            ids = work.run.read(f"{DOCUMENTS}/{one.name}.parquet", ["id"])["id"]
            open_[one.name] = _Pending(one, len(ids), {ids[row].as_py(): row for row in one.rows})
            if not one.rows:
                _commit(work, open_.pop(one.name), chain)
            for identity, text in _documents(work, [one]):
                where[identity] = one.name
                yield identity, text

    for done, row in enumerate(iterate(labeller.rows(documents())), start=1):
        pending = open_[where.pop(row.id)]
        pending.outcomes[row.id] = row
        on_progress(done, total)
        if len(pending.outcomes) == len(pending.rows):
            _commit(work, open_.pop(pending.selection.name), chain)
    for pending in open_.values():  # not reached
        _commit(work, pending, chain)
    counts = labeller.counts.to_dict()
    if counts["stopped"]:
        on_line(
            f"label: {counts['stopped']} ended it, {counts['not_reached']:,} documents were not reached: raise it, and "
            "the same command goes on with them"
        )
    return {**counts, "plan": {**vars(told), "gpu_hours": gpu_hours(told, work.section)}}


@dataclass
class _Pending:
    """A part whose documents are on their way."""

    selection: Selection
    num_documents: int
    rows: dict[str, int]
    outcomes: dict[str, LabelRow | RejectRow] = field(default_factory=dict)


def _commit(work: Work, pending: _Pending, chain: str) -> None:
    name = pending.selection.name
    table: list[dict[str, Any]] = [{} for _ in range(pending.num_documents)]
    counts = {"asked": len(pending.rows), "audit": len(pending.selection.audit), "labelled": 0, "quarantined": 0}
    for identity, row in pending.rows.items():
        about: dict[str, Any] = {"asked": True, "audit": row in pending.selection.audit}
        outcome = pending.outcomes.get(identity)
        if isinstance(outcome, LabelRow):
            said = outcome.label
            about |= {
                "llm_stance": said.stance, "confidence": said.confidence, "actor": said.actor,
                "evidence": said.evidence or None, "num_windows": len(outcome.windows),
            }  # fmt: skip
            counts["labelled"] += 1
            counts[f"stance:{said.stance}"] = counts.get(f"stance:{said.stance}", 0) + 1
        elif outcome is not None:
            about |= {"error": outcome.reason, "detail": outcome.detail[:500]}
            counts["quarantined"] += 1
            counts[f"error:{outcome.reason}"] = counts.get(f"error:{outcome.reason}", 0) + 1
        table[row] = about
    ids = work.run.read(f"{DOCUMENTS}/{name}.parquet", ["id"])["id"].to_pylist()
    empty = {"asked": False, "audit": False}
    rows = [{"id": identity, **empty, **about} for identity, about in zip(ids, table, strict=True)]
    files = [work.run.commit_table(f"{LABELS}/{name}.parquet", pa.Table.from_pylist(rows, schema=LLM_LABEL))]
    rejects = f"{QUARANTINE}/{name}.label.parquet"
    if counts["quarantined"]:
        files.append(work.run.commit_table(rejects, _rejects(work, pending)))
    else:
        storage.remove(work.run.path(rejects))  # of an earlier try
    complete = len(pending.outcomes) == len(pending.rows)
    work.run.commit_part(Part(LABELS, name, chain, tuple(files), counts, {"complete": complete}))


def _rejects(work: Work, pending: _Pending) -> pa.Table:
    """The quarantine's rows: documents stay in the run, but no label of theirs could be had."""
    failed = {i: one for i, one in pending.outcomes.items() if isinstance(one, RejectRow)}
    columns = ["id", "source", "file", "position", "source_id", "text"]
    documents = work.run.read(f"{DOCUMENTS}/{pending.selection.name}.parquet", columns)
    documents = documents.take(pa.array(sorted(pending.rows[i] for i in failed), pa.int64()))
    rows = [
        {
            **{key: row[key] for key in ("source", "file", "position", "source_id")},
            "reason": f"label_{failed[row['id']].reason}", "detail": failed[row["id"]].detail[:500],
            "head": row["text"][:REJECT_HEAD_BYTES].encode()[:REJECT_HEAD_BYTES],
        }
        for row in documents.to_pylist()
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=REJECT)


def _documents(work: Work, chosen: list[Selection]) -> Iterator[tuple[str, str]]:
    """(id, text), a part at a time."""
    for one in chosen:
        if one.rows:
            table = work.run.read(f"{DOCUMENTS}/{one.name}.parquet", ["id", "text"]).take(
                pa.array(one.rows, pa.int64())
            )
            for identity, text in zip(table["id"], table["text"], strict=True):
                yield identity.as_py(), text.as_py()


def _labeller(work: Work, cache: Cache, on_line: Line, check: bool = True) -> Labeller:
    section = work.section
    rubric = Rubric.load(section.rubric)
    backend = _backend(work, rubric, on_line)
    if check and isinstance(backend, Client):
        asyncio.run(backend.check())
    limits = Limits(
        section.max_documents, section.budget_usd, section.input_usd, section.output_usd, section.window_characters,
        section.max_windows,
    )  # fmt: skip
    return Labeller(backend, rubric, cache, limits=limits, payer=work.run.root, explain=work.explain, on_line=on_line)


def _backend(work: Work, rubric: Rubric, on_line: Line) -> Backend:
    section, schema = work.section, rubric.schema()
    if section.backend == "transformers":
        return Likelihood(section.model, revision=section.revision, schema=schema)
    if section.backend == "vllm":
        return VllmEngine(
            section.model, revision=section.revision, schema=schema, replicas=section.replicas, engine=section.engine,
            address=work.address, on_line=on_line,
        )  # fmt: skip
    urls = (section.base_url,) if isinstance(section.base_url, str) else section.base_url
    return Client(
        urls, model=section.model, revision=section.revision, schema=schema, concurrency=section.concurrency,
        on_line=on_line,
    )  # fmt: skip


def _cache_folder(section: Label) -> str:
    return str(Path(section.cache).expanduser())


def told_in_words(told: Plan, section: Label) -> str:
    """The plan in a line."""
    tokens = told.input_tokens + told.output_tokens
    line = (
        f"label: {told.documents:,} documents, {told.windows:,} windows, {told.requests:,} not in the cache: at most "
        f"{tokens:,} tokens"
    )
    if told.usd:
        line += f", {told.usd:,.2f} USD"
    hours = gpu_hours(told, section)
    if hours is not None:
        line += f", {hours:,.2f} GPU-hours at the throughput {'given' if section.gpu_tokens_per_second else 'measured'}"
    return line


def gpu_hours(told: Plan, section: Label) -> float | None:
    """From the throughput that the recipe states for one GPU, else from what was measured of all; None without
    either."""
    tokens = told.input_tokens + told.output_tokens
    if section.gpu_tokens_per_second:
        return tokens / section.gpu_tokens_per_second / 3600
    if told.tokens_per_second:
        return tokens / told.tokens_per_second / 3600 * section.gpus
    return None
