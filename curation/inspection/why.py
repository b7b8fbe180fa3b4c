"""Everything a run knows about one document: the answer of `Run.why`.

Only the rows of the document and of the shown members of its cluster are brought into memory.
What is long (hits, members, uses) is cut at a stated number, with the full count beside it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from curation.errors import TilthError, UserError
from curation.inspection.excerpts import Quote, char_offsets, one_line, quote, shorten, term_span, visible
from curation.inspection.run import DISCOURSE, collect
from curation.schema import POOL, STANCES

if TYPE_CHECKING:
    from curation.inspection.run import Run

MAX_HITS, MAX_EVIDENCE, MAX_MEMBERS, MAX_USES = 100, 12, 20, 100
_KEEP_REASONS = {
    "earlier": "an earlier run has kept one that is like it (dedup.against)",
    "duplicate_id": "the kept one has the same source_id and comes first in the input",
    "discourse": "the kept one is AI discourse, this one is not (discourse-safe)",
    "best_source": "the kept one's source comes first in the recipe (best_source)",
    "longest": "the kept one is longer (longest)",
    "id": "the kept one's id is smaller, all else being equal (id)",
}


class Document(NamedTuple):
    """schema.DOCUMENT without the text, of which `start` is the first 300 characters."""

    id: str
    source: str
    source_id: str | None
    file: str
    position: int
    role: str
    created: str | None
    part: str
    num_chars: int
    start: str


class Label(NamedTuple):
    """What the detectors and the input say. `probabilities` is in the order of schema.STANCES."""

    stance: str | None
    given_stance: str | None
    probabilities: tuple[float, ...]
    discourse: bool
    blocklist: bool
    num_hits: int


class Hit(NamedTuple):
    """A blocklist hit; offsets from the start of the text."""

    term: str
    category: str
    start_byte: int
    start_char: int
    end_char: int
    quote: Quote


class Evidence(NamedTuple):
    """Words of the text and what they add to the detector's log-odds of AI discourse, summed over
    `occurrences`; the place is the strongest one's."""

    start_char: int
    end_char: int
    contribution: float
    occurrences: int
    quote: Quote


class Member(NamedTuple):
    """A document of the cluster. `lost_by` says which rule kept another one; None for the kept one."""

    id: str
    source: str
    how: str
    similarity: float | None
    kept: bool
    discourse: bool
    size_bytes: int
    lost_by: str | None

    @property
    def reason(self) -> str:
        """Why another member was kept, in words; empty for the kept one."""
        return _KEEP_REASONS[self.lost_by] if self.lost_by else ""


class Cluster(NamedTuple):
    """The document's cluster; `members` are at most MAX_MEMBERS of `num_members`, the kept one first."""

    kept_id: str
    num_members: int
    members: tuple[Member, ...]

    @property
    def alone(self) -> bool:
        """Whether the document has no duplicates."""
        return self.num_members == 1 and self.members[0].kept


class Use(NamedTuple):
    """A stretch of a shard that is the document, in tokens; `repeat` is 0 for its first use in the arm."""

    arm: str
    phase: str
    shard: str
    start: int
    end: int
    repeat: int
    inserted: bool


class Absence(NamedTuple):
    """An arm-phase without the document, and why."""

    arm: str
    phase: str
    reason: str


class Reject(NamedTuple):
    """A record that was quarantined."""

    source: str
    file: str
    position: int
    reason: str
    detail: str | None
    head: str


@dataclass(frozen=True)
class Why:
    """What is known about `key`. `document`, `label` and `cluster` are None when the record was
    quarantined and never became a document. Prints as text, and as HTML in a notebook."""

    key: str
    document: Document | None
    label: Label | None
    hits: tuple[Hit, ...]
    evidence: tuple[Evidence, ...]
    cluster: Cluster | None
    uses: tuple[Use, ...]
    num_uses: int
    absences: tuple[Absence, ...]
    rejects: tuple[Reject, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return visible("\n".join(" ".join(line.splitlines()) for line in _lines(self)))

    def _repr_html_(self) -> str:
        from curation.inspection.pages import render

        return render("why.html.j2", why=self, stances=STANCES)


def look_up(run: "Run", key: str) -> Why:
    """The Why of the document that `key` names: an id, the start of one, or a source_id."""
    key = str(key).strip()
    document_id = _find(run, key) if key else None
    rejects = _rejects(run, key)
    if document_id is None:
        if not rejects:
            raise UserError(
                f"no document of {run.folder.root} has an id that starts with {visible(shorten(key, 60))!r} "
                "or that source_id: take an id from `run.documents`, or from `run.sample(n=5)`"
            )
        return Why(key, None, None, (), (), None, (), 0, (), rejects, ())
    row = collect(run.documents.filter(pl.col("id") == document_id)).row(0, named=True)
    text, source_id = row["text"], row["source_id"]
    labels = run.labels.with_columns(effective=DISCOURSE).filter(pl.col("id") == document_id)
    label_row = collect(labels).row(0, named=True)
    label = _label(label_row)
    evidence, notes = _evidence(run, text)
    cluster = _cluster(run, document_id)
    uses, num_uses = _uses(run, document_id)
    fields = {name: row[name] for name in Document._fields if name in row}
    document = Document(**fields, num_chars=len(text), start=shorten(one_line(text[:600]), 300))
    absences = _absences(run, row, label, cluster, uses)
    if source_id and source_id != key:
        rejects = _rejects(run, source_id)
    hits = _hits(text, label_row["hits"] or [])
    return Why(key, document, label, hits, evidence, cluster, uses, num_uses, absences, rejects, notes)


def _find(run: "Run", key: str) -> str | None:
    """The id that `key` names, None when no document matches."""
    named = pl.col("source_id") == key
    if re.fullmatch("[0-9a-fA-F]{1,32}", key):
        low = key.lower()  # ids are hex, so that "g" is above every digit that may follow
        named = named.fill_null(False) | ((pl.col("id") >= low) & (pl.col("id") < low + "g"))
    found = collect(run.documents.filter(named).select("id", "source").head(6)).sort("id")
    if key.lower() in found["id"]:
        return key.lower()
    if found.height > 1:
        some = ", ".join(f"{i} ({visible(source)})" for i, source in found.head(5).iter_rows())
        more = " and more" if found.height > 5 else ""
        raise UserError(f"{visible(key)!r} names several documents: {some}{more}; give more digits of the id")
    return found["id"][0] if found.height else None


def _rejects(run: "Run", source_id: str) -> tuple[Reject, ...]:
    rows = collect(run.quarantine.filter(pl.col("source_id") == source_id).head(MAX_USES))
    rejects = []
    for row in rows.sort("source", "file", "position").iter_rows(named=True):
        head = (row["head"] or b"")[:300].decode(errors="replace")
        rejects.append(Reject(**{**{field: row[field] for field in Reject._fields}, "head": head}))
    return tuple(rejects)


def _label(row: dict[str, Any]) -> Label:
    probabilities = tuple(row[f"p_{s}"] for s in STANCES)
    hits = len(row["hits"] or [])
    return Label(row["stance"], row["given_stance"], probabilities, row["effective"], row["blocklist"], hits)


def _hits(text: str, rows: Sequence[dict[str, Any]]) -> tuple[Hit, ...]:
    rows = rows[:MAX_HITS]
    starts = char_offsets(text, [row["offset"] for row in rows]) if rows else []
    hits = []
    for row, start in zip(rows, starts, strict=True):
        end = term_span(text, start, row["term"]).end
        hits.append(Hit(row["term"], row["category"], row["offset"], start, end, quote(text, start, end)))
    return tuple(hits)


def _evidence(run: "Run", text: str) -> tuple[tuple[Evidence, ...], tuple[str, ...]]:
    """The strongest words, for or against, each once, and notes on what is missing."""
    try:
        explain = run.explain
        spans = explain(text) if explain else ()
    except TilthError as error:
        return (), (f"no fastText evidence: {error}",)
    if explain is None:
        return (), ("no fastText evidence: the run was opened without a detector (use curation.open_run)",)
    groups: dict[str, list[tuple[int, int, float]]] = {}
    for a, b, contribution in sorted(spans, key=lambda span: (-abs(span[2]), span[0], span[1])):
        groups.setdefault(one_line(text[a:b]).casefold(), []).append((a, b, contribution))
    found = [
        Evidence(a, b, sum(float(c) for _, _, c in group), len(group), quote(text, a, b, 30))
        for group in groups.values()
        for a, b, _ in group[:1]
    ]
    return tuple(sorted(found, key=lambda e: (-abs(e.contribution), e.start_char))[:MAX_EVIDENCE]), ()


def _cluster(run: "Run", document_id: str) -> Cluster | None:
    mine = collect(run.clusters.filter(pl.col("id") == document_id).select("cluster"))
    if mine.is_empty():
        return None
    of_cluster = run.clusters.filter(pl.col("cluster") == mine["cluster"][0])
    num_members = collect(of_cluster.select(pl.len())).item()
    shown = of_cluster.select("id", "how", "similarity", "kept", mine=pl.col("id") == document_id)
    order = ["kept", "mine", "similarity", "id"]
    members = collect(shown.sort(order, descending=[True, True, True, False], nulls_last=True).head(MAX_MEMBERS))
    among = pl.col("id").is_in(members["id"].implode())
    about = collect(
        run.documents.filter(among).select("id", "source", "source_rank", size_bytes=pl.col("text").str.len_bytes())
    )
    labels = collect(run.labels.filter(among).select("id", discourse=DISCOURSE))
    rows = members.join(about, on="id", maintain_order="left").join(labels, on="id", maintain_order="left").to_dicts()
    keep = (run.recipe.get("dedup") or {}).get("keep") or ["id"]
    fields = [f for f in Member._fields if f != "lost_by"]
    kept = rows[0]
    found = [Member(**{f: row[f] for f in fields}, lost_by=_lost_by(kept, row, keep)) for row in rows]
    return Cluster(mine["cluster"][0], num_members, tuple(found))


def _lost_by(kept: dict[str, Any], other: dict[str, Any], keep: Sequence[str]) -> str | None:
    """The rule that kept `kept` and not `other`: `duplicate_id`, `discourse`, or one of `keep`.
    `discourse` only where the order of `keep` alone would have kept the other one."""
    if other["kept"]:
        return None
    if other["how"] in ("duplicate_id", "earlier"):  # of a record that may itself have been removed; not in this run
        return str(other["how"])
    values = {
        "best_source": lambda row: row["source_rank"],
        "longest": lambda row: -row["size_bytes"],
        "id": lambda row: row["id"],
    }
    rule = next((r for r in keep if values[r](kept) != values[r](other)), "id")
    if kept["discourse"] and not other["discourse"] and values[rule](kept) > values[rule](other):
        return "discourse"
    return rule


def _uses(run: "Run", document_id: str) -> tuple[tuple[Use, ...], int]:
    mine = run.provenance.filter(pl.col("id") == document_id)
    rows = collect(mine.select(Use._fields)).sort("arm", "phase", "repeat", "shard", "start")
    return tuple(Use(*row) for row in rows.head(MAX_USES).iter_rows()), rows.height


def _absences(
    run: "Run", row: dict[str, Any], label: Label, cluster: Cluster | None, uses: Sequence[Use]
) -> tuple[Absence, ...]:
    """Why the document is missing from each arm-phase that it is missing from."""
    used = {(use.arm, use.phase) for use in uses}
    mix = run.recipe.get("mix") or {}
    removed = cluster is not None and cluster.kept_id != row["id"]
    absent = []
    for arm, asked in (mix.get("arms") or {}).items():
        for phase, about in (mix.get("phases") or {}).items():
            if (arm, phase) in used:
                continue
            reason = "removed by dedup" if removed else _not_taken(row["role"], label, asked or {}, about or {}, phase)
            absent.append(Absence(arm, phase, reason))
    return tuple(absent)


def _not_taken(role: str, label: Label, arm: dict[str, Any], about: dict[str, Any], phase: str) -> str:
    if role == POOL:
        asked = arm.get("upsample") or ()
        each = (asked,) if isinstance(asked, dict) else asked  # in the manifest as it may be written in a recipe
        if label.stance not in {_in_force(one, phase).get("stance") for one in each}:
            return "a pool document, and its stance is not up-sampled here"
    else:
        rules = {about.get("drop"), _in_force(arm.get("drop"), phase).get("rule")}
        flagged = {"discourse": label.discourse, "blocklist": label.blocklist}
        dropped = [rule for rule, is_flagged in flagged.items() if rule in rules and is_flagged]
        if dropped:
            return f"dropped by the rule {' and '.join(dropped)}"
    return "not drawn: the token budget was full before its turn"


def _in_force(section: dict[str, Any] | None, phase: str) -> dict[str, Any]:
    """An arm's `drop` or `upsample` when it holds in `phase` (it may name its phases), else nothing."""
    section = section or {}
    return section if phase in (section.get("phases") or [phase]) else {}


def _lines(why: Why) -> list[str]:
    lines = _document_lines(why) if why.document else [f"{why.key} is not a document: it was quarantined"]
    for reject in why.rejects:
        detail = f" ({reject.detail})" if reject.detail else ""
        lines.append(f"Quarantined: {reject.source}, {reject.file} at {reject.position}: {reject.reason}{detail}")
        if reject.head:
            lines.append(f"    {shorten(one_line(reject.head), 160)}")
    return [*lines, *(f"Note: {note}" for note in why.notes)]


def _document_lines(why: Why) -> list[str]:
    document, label = why.document, why.label
    assert document is not None
    assert label is not None
    place = f"{document.source}, {document.role}; {document.file} at {document.position}"
    stance = f"{label.stance or 'none'}{' (given)' if label.given_stance else ''}"
    lines = [
        f"Document {document.id}",
        f"  {place}; source_id {document.source_id or '-'}",
        f"  {document.num_chars:,} characters: {document.start}",
        f"Stance: {stance}; AI discourse: {_yes(label.discourse)}; blocklist: {_yes(label.blocklist)}",
        "  " + "  ".join(f"p({s}) {p:.3f}" for s, p in zip(STANCES, label.probabilities, strict=True)),
        f"Blocklist hits: {label.num_hits:,}" + _shown(len(why.hits), label.num_hits),
    ]
    lines += [f"  {h.start_char:>8}  {h.category}: {h.term}  {_marked(h.quote)}" for h in why.hits]
    lines.append(
        "fastText evidence, its sum in the log-odds of AI discourse and in how many places:"
        + " none" * (not why.evidence)
    )
    lines += [
        f"  {e.start_char:>8}  {e.contribution:+.3f} in {e.occurrences}  {_marked(e.quote)}" for e in why.evidence
    ]
    if why.cluster:
        lines += _cluster_lines(why.cluster, document.id)
    lines.append(f"Uses in arms: {why.num_uses:,}" + _shown(len(why.uses), why.num_uses))
    lines += [
        f"  {u.arm} / {u.phase}: shard {u.shard}, tokens {u.start:,} to {u.end:,}, repeat {u.repeat}"
        + (", inserted" if u.inserted else "")
        for u in why.uses
    ]
    return lines + [f"  not in {a.arm} / {a.phase}: {a.reason}" for a in why.absences]


def _cluster_lines(cluster: Cluster, document_id: str) -> list[str]:
    if cluster.alone:
        return ["Cluster: no duplicates"]
    of_earlier = "" if any(m.kept for m in cluster.members) else f" of {cluster.kept_id}, kept by an earlier run"
    shown = _shown(len(cluster.members), cluster.num_members)
    lines = [f"Cluster{of_earlier}: {cluster.num_members:,} document{'s' * (cluster.num_members > 1)}{shown}"]
    for member in cluster.members:
        similarity = "" if member.similarity is None else f", similarity {member.similarity:.3f}"
        here = "  <- this document" if member.id == document_id else ""
        verdict = "kept" if member.kept else f"{member.how}, removed: {member.reason}"
        lines.append(f"  {member.id}  {member.source}, {member.size_bytes:,} bytes{similarity}; {verdict}{here}")
    return lines


def _marked(text: Quote) -> str:
    return f"{text.before}[{text.match}]{text.after}"


def _shown(num_shown: int, num_all: int) -> str:
    return f" (the first {num_shown:,})" if num_shown < num_all else ""


def _yes(value: bool) -> str:
    return "yes" if value else "no"
