"""A run's labels against people's: read their labels, find the documents, ask `agreement` and `prevalence`.

Human labels are JSON lines (.gz, .zst, .bz2 too), one document each:

    id       the document's id in the run, or its source_id (the record's own id)
    stance   one of STANCES; `label` is taken too. Or is_ai_discourse false, which is unrelated whatever the stance

A record with an id and nothing else that says something (null counts as nothing) is a blank of a sheet still being
filled in: counted, not used. What is not found is counted with its reason.

The run's label of a document is its effective stance or, without one, the student's most probable class. Its
confidence is the student's probability of that class, or the level (low, medium, high) that the language model said; a
given stance has neither. Prevalence and
the detector's recall are about the background documents that dedup kept, which is what the mix draws from and what
audits sample.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from curation.errors import UserError
from curation.inspection.agreement import LEVELS, UNRELATED, Agreement, Counts, agreement
from curation.inspection.excerpts import one_line, shorten, visible
from curation.inspection.prevalence import Prevalence, Recall, Stratum, prevalence, recall, uncorrected
from curation.records import read_records
from curation.schema import BACKGROUND, STANCES, discourse_expression

if TYPE_CHECKING:
    from curation.inspection.run import Run

EXCERPT_CHARS = 300
MAX_EXAMPLES = 3
ABOVE, BELOW = "above the threshold", "below the threshold"
LIKELIEST = "the student's likeliest"  # a label that is not sure enough to stand as the document's stance

BLANK = "no label in the record"
NOT_HERE = "no document has this id or source_id"
QUARANTINED = "quarantined at ingest"
AMBIGUOUS = "documents of more than one source have this source_id"
TWICE = "labelled before, alike"


@dataclass(frozen=True)
class Matching:
    """How many human labels found their document."""

    num_records: int
    num_matched: int
    not_matched: dict[str, int]
    """Records by the reason why they are not used."""
    examples: dict[str, tuple[str, ...]]
    """The first few ids of each reason."""

    def told(self) -> str:
        """One sentence for a person."""
        reasons = "; ".join(
            f"{num:,} {why} ({', '.join(self.examples[why])}{', …' if num > len(self.examples[why]) else ''})"
            for why, num in self.not_matched.items()
        )
        return f"{self.num_matched:,} of {self.num_records:,} human labels used" + (f"; {reasons}" if reasons else "")


@dataclass(frozen=True)
class Matched:
    """`rows`: one row a document: id, truth, and the columns of `labelled`."""

    rows: pl.DataFrame
    matching: Matching


@dataclass(frozen=True)
class Judged:
    """A run's labels beside people's: what the command prints and agreement.html shows."""

    human: str
    matched: Matched
    agreement: Agreement
    prevalence: Prevalence | None
    prevalence_reason: str | None
    """Why `prevalence` is None: the labelled documents do not allow it."""
    recalls: tuple[Recall, ...]

    def facts(self) -> dict[str, Any]:
        """Everything as plain dicts. `prevalence` is {"reason": …} where there is none."""
        matching = self.matched.matching
        shares = {"reason": self.prevalence_reason} if self.prevalence is None else asdict(self.prevalence)
        facts = {
            "human": self.human,
            "matching": {**asdict(matching), "told": matching.told()},
            "agreement": asdict(self.agreement),
            "prevalence": shares,
            "recall": [asdict(stage) for stage in self.recalls],
        }
        return json.loads(json.dumps(facts))  # tuples as lists: the same facts, read back or not


def judge(run: "Run", human: str) -> Judged:
    """All that the human labels in the file `human` say of the run's. Raises UserError as `match` does."""
    matched = match(run, human)
    shares, reason = None, None
    try:
        shares = _prevalence(run, matched.rows)
    except UserError as error:
        reason = str(error)
    return Judged(human, matched, _agreement(matched.rows), shares, reason, _recalls(run, matched.rows))


def agreement_facts(run: "Run", human: str) -> dict[str, Any]:
    """Everything about the quality of the run's labels, as plain dicts: matching, agreement, prevalence, recall."""
    return judge(run, human).facts()


def run_agreement(run: "Run", human: str) -> Agreement:
    """The run's labels against the human labels in the file `human`."""
    return _agreement(match(run, human).rows)


def run_prevalence(run: "Run", human: str | None = None) -> Prevalence:
    """The share of each stance among the kept background documents; with human labels corrected, with intervals."""
    if human is None:
        return uncorrected(sum(_predicted(run).values(), np.zeros(len(STANCES), np.int64)))
    return _prevalence(run, match(run, human).rows)


def run_recall(run: "Run", human: str) -> tuple[Recall, ...]:
    """What detect (its threshold) and dedup lose of the true AI discourse."""
    return _recalls(run, match(run, human).rows)


def disagreements(run: "Run", human: str) -> pl.DataFrame:
    """Documents whose label is not the human one, the most confident first: id, source_id, text (its beginning),
    truth, label, whose it is, the student's `probability` or the language model's `level` (null for another's)."""
    return disagreeing(run, match(run, human).rows)


def disagreeing(run: "Run", rows: pl.DataFrame, at_most: int | None = None) -> pl.DataFrame:
    """`disagreements` of matched rows, the first `at_most`. The language model's come before the student's: a level and
    a probability do not compare."""
    rows = rows.filter(pl.col("truth") != pl.col("label"))
    rank = pl.col("level").replace_strict({name: k for k, name in enumerate(LEVELS)}, return_dtype=pl.Int32)
    rows = rows.sort(rank, "probability", "id", descending=[True, True, False], nulls_last=True)[:at_most]
    rows = rows.select("id", "source_id", "truth", "label", "whose", "probability", "level")
    among = run.documents.filter(pl.col("id").is_in(rows["id"].implode()))
    # Cut before it is collected: a text may be of any length.
    texts = _collect(among.select("id", text=pl.col("text").str.slice(0, 4 * EXCERPT_CHARS)))
    begins = {id_: visible(shorten(one_line(text), EXCERPT_CHARS)) for id_, text in texts.iter_rows()}
    text = pl.Series("text", [begins[id_] for id_ in rows["id"]], pl.String)
    return rows.insert_column(2, text)


# The run's labels.


def labelled(run: "Run") -> pl.LazyFrame:
    """Every document: id, source, source_id, `label`, whose it is, its `probability` or `level` where it has one, and
    what the stages did with the document: `above` the detect threshold, `background`, `kept` by dedup, `discourse`, and
    `represented`: AI discourse is kept for it."""
    from curation.inspection.run import MODEL, STUDENT, whose_expression

    student = pl.concat_list(f"p_{s}" for s in STANCES)
    best = student.list.arg_max().replace_strict(dict(enumerate(STANCES)), return_dtype=pl.String)
    parts = [
        run.labels.drop("part", "hits"),
        run.documents.select("source_id"),
        run.clusters.select("kept", "how", "cluster_discourse"),
    ]
    rows = pl.concat(parts, how="horizontal").with_columns(
        label=pl.coalesce("stance", best),
        whose=pl.coalesce(whose_expression(labelled=run.labelled), pl.lit(LIKELIEST)),
    )
    level = pl.when(pl.col("whose") == MODEL).then("confidence") if run.labelled else pl.lit(None, pl.String)
    return rows.select(
        "id", "source", "source_id", "label", "whose", "kept",
        probability=pl.when(pl.col("whose").is_in([STUDENT, LIKELIEST])).then(student.list.max().clip(0, 1)),
        level=level,
        above="discourse",
        background=pl.col("role") == BACKGROUND,
        discourse=discourse_expression("stance"),
        represented=pl.col("kept") | (pl.col("cluster_discourse") & ~pl.col("how").is_in(["duplicate_id", "earlier"])),
    )  # fmt: skip


def _predicted(run: "Run") -> dict[bool, Counts]:
    """Kept background documents with each label, above the threshold and below."""
    rows = labelled(run).filter("background", "kept")
    counts = {(a, s): n for a, s, n in _collect(rows.group_by("above", "label").len()).iter_rows()}
    return {above: np.array([counts.get((above, s), 0) for s in STANCES], np.int64) for above in (True, False)}


def _confusion(rows: pl.DataFrame) -> Counts:
    counts = {(t, s): n for t, s, n in rows.group_by("truth", "label").len().iter_rows()}
    return np.array([[counts.get((t, s), 0) for s in STANCES] for t in STANCES], np.int64)


def _agreement(rows: pl.DataFrame) -> Agreement:
    return agreement(rows["truth"], rows["label"], rows["probability"], levels=rows["level"])


def _strata(run: "Run", rows: pl.DataFrame) -> list[Stratum]:
    predicted, rows = _predicted(run), rows.filter("background", "kept")
    names = {True: ABOVE, False: BELOW}
    return [
        Stratum(names[above], predicted[above], _confusion(rows.filter(pl.col("above") == above))) for above in names
    ]


def _prevalence(run: "Run", rows: pl.DataFrame) -> Prevalence:
    return prevalence(_strata(run, rows))


def _recalls(run: "Run", rows: pl.DataFrame) -> tuple[Recall, ...]:
    """Dedup's is about what counts as AI discourse when it gets there. A removed document is not lost when its cluster
    is AI discourse, since then its representative is."""
    above, below = _strata(run, rows)
    among = labelled(run).filter("background", "discourse")
    counts = {(r, s): n for r, s, n in _collect(among.group_by("represented", "label").len()).iter_rows()}
    rows = rows.filter("background", "discourse")
    sides = [
        Stratum(
            name,
            np.array([counts.get((side, s), 0) for s in STANCES], np.int64),
            _confusion(rows.filter(pl.col("represented") == side)),
        )
        for side, name in ((True, "that dedup keeps"), (False, "that dedup removes"))
    ]
    return recall("detect", [above], [below]), recall("dedup", sides[:1], sides[1:])


# Human labels.


def match(run: "Run", human: str) -> Matched:
    """The documents of the human labels. Raises UserError for what is wrong in the file, or when nothing matches."""
    records = list(read_human(human))
    wanted = pl.Series([key for key, _, _ in records], dtype=pl.String).unique().implode()
    documents = _collect(labelled(run).filter(pl.col("id").is_in(wanted) | pl.col("source_id").is_in(wanted)))
    rejects = _collect(run.quarantine.select("source_id").filter(pl.col("source_id").is_in(wanted)))
    quarantined = set(rejects["source_id"])
    by_id = {id_: {id_} for id_ in documents["id"]}
    # Records of one source with the same id are copies: the one that dedup kept stands for them.
    alike = documents.filter(pl.col("source_id").is_not_null()).sort("kept", "id", descending=[True, False])
    by_source_id: dict[str, set[str]] = {}
    for id_, source_id in alike.unique(["source", "source_id"], keep="first").select("id", "source_id").iter_rows():
        by_source_id.setdefault(source_id, set()).add(id_)

    truths: dict[str, tuple[str, str]] = {}
    unused: dict[str, list[str]] = {}
    for key, truth, place in records:
        found = by_id.get(key) or by_source_id.get(key, set())
        if truth is None:
            why = BLANK
        elif not found:
            why = QUARANTINED if key in quarantined else NOT_HERE
        elif len(found) > 1:
            why = AMBIGUOUS
        else:
            (id_,) = found
            before, where = truths.setdefault(id_, (truth, place))
            if before != truth:
                raise UserError(f"{visible(key)!r} is {before} in {where} and {truth} in {place}: keep one")
            if where == place:
                continue
            why = TWICE
        unused.setdefault(why, []).append(visible(shorten(key, 40)))
    counts = dict(sorted(((why, len(keys)) for why, keys in unused.items()), key=lambda item: -item[1]))
    matching = Matching(len(records), len(truths), counts, {why: tuple(unused[why][:MAX_EXAMPLES]) for why in counts})
    if not truths:
        what = matching.told() if records else "it has no records"
        raise UserError(f"{human} has no label of a document of {run.folder.root}: {what}")
    truth_of = pl.DataFrame({"id": list(truths), "truth": [t for t, _ in truths.values()]}, orient="col")
    return Matched(documents.join(truth_of, on="id").sort("id"), matching)


def read_human(path: str) -> Iterator[tuple[str, str | None, str]]:
    """(id, stance or None where blank, place "FILE line N") of each record. Raises UserError for what can't be read."""
    for place, record in read_records(path):
        key = record.get("id")
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise UserError(f"{place} has no `id`: give the document's id or source_id")
        yield str(key), _truth(record, place), place


def _truth(record: dict[str, Any], place: str) -> str | None:
    discourse = record.get("is_ai_discourse")
    stance = record.get("stance") if record.get("stance") is not None else record.get("label")
    if discourse is not None and not isinstance(discourse, bool):
        raise UserError(f"{place} has `is_ai_discourse` {shorten(visible(repr(discourse)), 40)}: give true or false")
    if discourse is False:
        return UNRELATED
    if stance is None and not discourse:
        return None
    if stance not in STANCES:
        close = get_close_matches(str(stance), STANCES, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(STANCES)}"
        raise UserError(f"{place} has the stance {shorten(visible(repr(stance)), 40)}: {hint}")
    if discourse and stance == UNRELATED:
        raise UserError(f"{place} says AI discourse and {UNRELATED}: keep one")
    return str(stance)


def _collect(frame: pl.LazyFrame) -> pl.DataFrame:
    from curation.inspection.run import collect

    return collect(frame)
