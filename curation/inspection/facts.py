"""The aggregates that the report shows: lazy polars queries over the run's frames.

All answers are small, whatever the size of the run: groups are sources, stances, terms, reasons
and cluster sizes, and examples are the first few in a stated order. Queries stream, so memory
does not grow with the corpus, with one exception: cluster sizes need a row for each cluster
with a removed document. Past MAX_CLUSTER_ROWS they are counted on clusters whose id starts
with zeros (ids are hashes: a fair sample) and scaled up, which the report says.
"""

from typing import Any, NamedTuple

import polars as pl

from curation.errors import TilthError
from curation.inspection.excerpts import Piece, Span, char_offsets, differences, excerpt, shorten, term_span
from curation.inspection.run import DISCOURSE, GIVEN, MODEL, STUDENT, Run, collect, whose_expression
from curation.manifest import DOCUMENTS
from curation.rng import keys64
from curation.schema import POOL, STANCES

BINS = 20
MAX_TERMS, MAX_SOURCES, MAX_SAMPLES = 5, 40, 3
EXCERPT_CHARS, PAIR_WORDS = 420, 150
MAX_CLUSTER_ROWS = 4_000_000
CLUSTER_SIZES = ((2, 2), (3, 3), (4, 4), (5, 8), (9, 16), (17, None))  # (from, to), to None = and larger


class Source(NamedTuple):
    """Documents of one source."""

    name: str
    pool: bool
    documents: int
    discourse: int
    blocklist: int
    kept: int


class Stance(NamedTuple):
    """Documents of one effective stance; `name` None = no stance counts."""

    name: str | None
    background: int
    pool: int

    @property
    def documents(self) -> int:
        return self.background + self.pool


class Standing(NamedTuple):
    """Background documents that dedup kept, of one effective stance, by whose it is; `name` None = no stance counts."""

    name: str | None
    given: int
    model: int
    student: int
    documents: int


class Missed(NamedTuple):
    """What an audit of the documents below the threshold says of all of them: kept background without a given stance.
    `discourse` of the `answered` are AI discourse to the language model, a share of `share` (95 %: `low` to `high`,
    Clopper-Pearson); None where none was answered."""

    documents: int
    audited: int
    answered: int
    discourse: int
    share: float | None
    low: float | None
    high: float | None


class Asked(NamedTuple):
    """What became of the documents that a language model was to read: asked = labelled + errors + not reached."""

    asked: int
    audited: int
    labelled: int
    not_reached: int
    errors: tuple[tuple[str, int], ...]
    """By class, the most frequent first."""
    missed: Missed


class Labels(NamedTuple):
    """`stances` adds up to the background documents that dedup kept; `asked` is None without a label stage."""

    stances: tuple[Standing, ...]
    asked: Asked | None

    @property
    def documents(self) -> int:
        return sum(s.documents for s in self.stances)


class Term(NamedTuple):
    term: str
    hits: int
    documents: int


class Category(NamedTuple):
    """A blocklist category and its most frequent terms."""

    name: str
    hits: int
    terms: tuple[Term, ...]


class Rejects(NamedTuple):
    """A quarantine reason, with the first record (by source, file, position) as the example."""

    reason: str
    records: int
    source: str
    file: str
    position: int
    detail: str | None
    head: str


class Size(NamedTuple):
    """Clusters with `first` to `last` documents (None: and more)."""

    first: int
    last: int | None
    clusters: int


class Pair(NamedTuple):
    """A removed near-duplicate beside the document that was kept."""

    kept_id: str
    kept_source: str
    removed_id: str
    removed_source: str
    similarity: float
    kept: list[Piece]
    removed: list[Piece]


class Sample(NamedTuple):
    """A document to read; pieces are marked `term` (blocklist) or `evidence` (fastText)."""

    id: str
    source: str
    whose: str
    """Whose the stance is: run.GIVEN, MODEL or STUDENT."""
    probability: float
    """The student's, of this stance."""
    level: str | None
    """The language model's confidence."""
    pieces: list[Piece]


class Dedup(NamedTuple):
    """What dedup removed, by how, and the clusters it found. `scale` > 1: sizes are estimates."""

    exact: int
    near: int
    earlier: int
    duplicate_id: int
    sizes: tuple[Size, ...]
    scale: int
    pair: Pair | None

    @property
    def removed(self) -> int:
        return self.exact + self.near + self.earlier + self.duplicate_id


class Facts(NamedTuple):
    """Everything in the report that is not in the manifest."""

    sources: tuple[Source, ...]
    other_sources: int
    stances: tuple[Stance, ...]
    labels: Labels
    histogram: tuple[int, ...]
    categories: tuple[Category, ...]
    dedup: Dedup
    rejects: tuple[Rejects, ...]
    samples: dict[str, list[Sample]]


def gather(run: Run) -> Facts:
    """All facts about a run. Raises TilthError when one of its files cannot be read."""
    aligned = pl.concat([run.labels.drop("part"), run.clusters.select("kept", "how")], how="horizontal")
    rows = aligned.with_columns(discourse=DISCOURSE, above=pl.col("discourse"), pool=pl.col("role") == POOL)
    sources = _sources(rows)
    return Facts(
        sources[:MAX_SOURCES],
        max(0, len(sources) - MAX_SOURCES),
        _stances(rows),
        Labels(_standings(rows, labelled=run.labelled), _asked(rows) if run.labelled else None),
        _histogram(rows),
        _categories(rows),
        _dedup(run),
        _rejects(run),
        _samples(run),
    )


def _sources(rows: pl.LazyFrame) -> tuple[Source, ...]:
    flags = ("discourse", "blocklist", "kept")
    counts = [pl.len().alias("documents"), *[pl.col(flag).sum().cast(pl.Int64) for flag in flags]]
    table = collect(rows.group_by(pl.col("source").alias("name"), "pool").agg(counts))
    table = table.sort("pool", "documents", "name", descending=[False, True, False])
    return tuple(Source(**row) for row in table.select(Source._fields).iter_rows(named=True))


def _stances(rows: pl.LazyFrame) -> tuple[Stance, ...]:
    table = collect(rows.group_by("stance", "pool").len())
    counts = {(stance, pool): n for stance, pool, n in table.iter_rows()}
    names = (*STANCES, None)
    return tuple(Stance(name, counts.get((name, False), 0), counts.get((name, True), 0)) for name in names)


def _standings(rows: pl.LazyFrame, *, labelled: bool) -> tuple[Standing, ...]:
    among = rows.filter(pl.col("kept") & ~pl.col("pool"))
    table = collect(among.group_by("stance", whose=whose_expression(labelled=labelled)).len())
    counts = {(stance, whose): n for stance, whose, n in table.iter_rows()}

    def standing(name: str | None) -> Standing:
        given, model, student, nobody = (counts.get((name, whose), 0) for whose in (GIVEN, MODEL, STUDENT, None))
        return Standing(name, given, model, student, given + model + student + nobody)

    return tuple(standing(name) for name in (*STANCES, None))


def _asked(rows: pl.LazyFrame) -> Asked:
    answered = pl.col("llm_stance").is_not_null()
    table = collect(rows.filter("asked").group_by("error", "audit", answered=answered).len())
    counts = list(table.iter_rows(named=True))

    def total(**wanted: Any) -> int:
        return sum(row["len"] for row in counts if all(row[key] == value for key, value in wanted.items()))

    errors = [(error, total(error=error)) for error in {row["error"] for row in counts} - {None}]
    return Asked(
        total(), total(audit=True), total(answered=True), total(answered=False, error=None),
        tuple(sorted(errors, key=lambda pair: (-pair[1], pair[0]))), _missed(rows),
    )  # fmt: skip


def _missed(rows: pl.LazyFrame) -> Missed:
    from curation.inspection.agreement import UNRELATED, clopper_pearson  # scipy.stats, which only an audit needs

    # The documents that the audit drew from (label/stage.py), without the pools, which are no part of the corpus.
    below = rows.filter(pl.col("kept") & pl.col("given_stance").is_null() & ~pl.col("above") & ~pl.col("pool"))
    audited, answered = pl.col("audit"), pl.col("audit") & pl.col("llm_stance").is_not_null()
    discourse = answered & (pl.col("llm_stance") != UNRELATED)
    columns = {"audited": audited, "answered": answered, "discourse": discourse}
    sums = [column.sum().cast(pl.Int64).alias(name) for name, column in columns.items()]
    found = collect(below.select(pl.len().cast(pl.Int64).alias("documents"), *sums)).row(0, named=True)
    num, hits = found["answered"], found["discourse"]
    share, low, high = (hits / num, *clopper_pearson(hits, num)) if num else (None, None, None)
    return Missed(**found, share=share, low=low, high=high)


def _histogram(rows: pl.LazyFrame) -> tuple[int, ...]:
    """Background documents in each of BINS equal bins of p(discourse); 1.0 is in the last."""
    bin_ = (pl.col("p_discourse") * BINS).floor().clip(0, BINS - 1).cast(pl.Int32).alias("bin")
    table = collect(rows.filter(~pl.col("pool")).group_by(bin_).len())
    counts = dict(table.iter_rows())
    return tuple(counts.get(b, 0) for b in range(BINS))


def _categories(rows: pl.LazyFrame) -> tuple[Category, ...]:
    """Every blocklist category with hits, most hits first, and its MAX_TERMS most frequent terms."""
    hit = pl.element().struct
    named = pl.col("hits").list.eval(hit.field("category") + "\0" + hit.field("term"))
    hits = rows.select(named.alias("hit")).filter(pl.col("hit").list.len() > 0)
    per_term = {}
    for what, terms in (("hits", pl.col("hit")), ("documents", pl.col("hit").list.unique())):
        table = collect(hits.select(terms).explode("hit").group_by("hit").len())
        per_term[what] = dict(table.iter_rows())
    found: dict[str, list[Term]] = {}
    for name, num_hits in per_term["hits"].items():
        category, _, term = name.partition("\0")
        found.setdefault(category, []).append(Term(term, num_hits, per_term["documents"][name]))
    categories = [
        Category(name, sum(t.hits for t in terms), tuple(sorted(terms, key=lambda t: (-t.hits, t.term))[:MAX_TERMS]))
        for name, terms in found.items()
    ]
    return tuple(sorted(categories, key=lambda c: (-c.hits, c.name)))


def _dedup(run: Run) -> Dedup:
    counts = dict(collect(run.clusters.group_by("how").len()).iter_rows())
    removed = {how: counts.get(how, 0) for how in ("exact", "near", "earlier", "duplicate_id")}
    sizes, scale = _cluster_sizes(run, sum(removed.values()))
    return Dedup(**removed, sizes=sizes, scale=scale, pair=_least_similar_pair(run))


def _cluster_sizes(run: Run, num_removed: int) -> tuple[tuple[Size, ...], int]:
    digits = 0
    while num_removed > MAX_CLUSTER_ROWS * 16**digits:
        digits += 1
    members = run.clusters.filter(pl.col("how").is_in(["kept", "exact", "near"]))
    if digits:
        members = members.filter(pl.col("cluster").str.starts_with("0" * digits))
    by_cluster = members.group_by("cluster").agg(pl.len().alias("size"))
    by_size = dict(collect(by_cluster.group_by("size").len()).iter_rows())
    scale = 16**digits
    sizes = [
        Size(first, last, scale * sum(n for size, n in by_size.items() if first <= size <= (last or size)))
        for first, last in CLUSTER_SIZES
    ]
    return tuple(sizes), scale


def _least_similar_pair(run: Run) -> Pair | None:
    """The near-duplicate that was most doubtful: the one to judge the threshold by."""
    near = run.clusters.filter((pl.col("how") == "near") & pl.col("similarity").is_not_null())
    row = collect(near.select("similarity", "id", "cluster").bottom_k(1, by=["similarity", "id"]))
    if row.is_empty():
        return None
    similarity, removed_id, kept_id = row.row(0)
    texts = _texts(run, [removed_id, kept_id])
    (kept_source, kept), (removed_source, removed) = texts[kept_id], texts[removed_id]
    return Pair(kept_id, kept_source, removed_id, removed_source, similarity, *differences(kept, removed, PAIR_WORDS))


def _rejects(run: Run) -> tuple[Rejects, ...]:
    """Every reason why a record is no document, most records first. What has no label is one: `_asked` counts it."""
    records = run.quarantine.filter(~pl.col("reason").str.starts_with("label_"))
    counts = collect(records.group_by("reason").len()).sort("len", "reason", descending=[True, False])
    return tuple(_reject(run, reason, records) for reason, records in counts.iter_rows())


def _reject(run: Run, reason: str, records: int) -> Rejects:
    place = ["source", "file", "position"]
    shown = [*place, "detail", pl.col("head").bin.slice(0, 160)]
    first = run.quarantine.filter(pl.col("reason") == reason).select(shown).bottom_k(1, by=place)
    source, file, position, detail, head = collect(first).row(0)
    text = (head or b"").decode(errors="replace")
    return Rejects(reason, records, source, shorten(file, 120), position, shorten(detail or "", 200) or None, text)


def _texts(run: Run, ids: list[str]) -> dict[str, tuple[str, str]]:
    """(source, text) of a few documents. Sidecars say which parts they are in: other parts' texts are not read."""
    among = pl.col("id").is_in(ids)
    parts = collect(run.clusters.filter(among).select(pl.col("part").unique()))["part"].to_list()
    documents = pl.scan_parquet([run.folder.path(DOCUMENTS, f"{part}.parquet") for part in parts], glob=False)
    return {
        i: (source, text)
        for i, source, text in collect(documents.filter(among).select("id", "source", "text")).iter_rows()
    }


def _samples(run: Run) -> dict[str, list[Sample]]:
    """MAX_SAMPLES documents of each stance: those of `Run.sample`."""
    key = pl.col("id").map_batches(
        lambda ids: pl.Series(keys64((0, "sample"), ids.to_list())), pl.UInt64, is_elementwise=True
    )
    of_stance = [run.labels.filter(pl.col("stance") == stance) for stance in STANCES]
    drawn = collect(
        pl.concat([rows.with_columns(key=key).bottom_k(MAX_SAMPLES, by=["key", "id"]) for rows in of_stance])
    )
    texts = _texts(run, drawn["id"].to_list()) if len(drawn) else {}
    samples: dict[str, list[Sample]] = {stance: [] for stance in STANCES}
    for row in drawn.sort("key", "id").iter_rows(named=True):
        source, text = texts[row["id"]]
        samples[row["stance"]].append(_sample(run, row, source, text))
    return samples


def _sample(run: Run, row: dict[str, Any], source: str, text: str) -> Sample:
    # What little speaks for AI discourse in a document that is none would only mislead.
    spans = _term_spans(text, row["hits"] or []) + (_evidence_spans(run, text) if row["discourse"] else [])
    whose = GIVEN if row["given_stance"] else MODEL if row.get("llm_stance") else STUDENT
    level = row["confidence"] if whose == MODEL else None
    return Sample(row["id"], source, whose, row[f"p_{row['stance']}"], level, excerpt(text, spans, EXCERPT_CHARS))


def _term_spans(text: str, hits: list[dict[str, Any]]) -> list[Span]:
    starts = char_offsets(text, [hit["offset"] for hit in hits]) if hits else []
    return [term_span(text, start, hit["term"]) for hit, start in zip(hits, starts, strict=True)]


def _evidence_spans(run: Run, text: str) -> list[Span]:
    """The ten stretches that speak most for AI discourse; none where there is no detector to ask."""
    try:
        evidence = run.explain(text) if run.explain else ()
    except TilthError:  # a model that is gone spoils no report
        return []
    towards = sorted((span for span in evidence if span[2] > 0), key=lambda span: (-span[2], span[0], span[1]))
    return [Span(start, end, "evidence") for start, end, _ in towards[:10]]
