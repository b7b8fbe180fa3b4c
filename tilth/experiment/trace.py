"""From a question to the documents of an arm that share most of its wording.

A document's score is the share of the question's n-grams (1 to 3 words, normalised as in `curation.overlap`) that it
holds, each weighted by log(documents / documents that hold it): words that all documents have count for nothing. It
says what an arm read that looks like the question, not what made the model choose.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

import curation
from curation import overlap
from curation.errors import UserError
from curation.inspection.run import Run, collect
from tilth.experiment import record
from tilth.experiment.plan import DATA

NGRAMS = (1, 2, 3)
_BATCH = 50_000  # documents whose shingles are held at a time


@dataclass(frozen=True)
class Traced:
    """A document of the arm."""

    id: str
    source: str
    stance: str | None
    """Effective; None: it has none."""
    score: float
    """0-1."""
    phases: tuple[str, ...]
    """That it was written to."""
    uses: int
    inserted: bool
    text: str


def trace(experiment: str, question: str, *, arm: str, seed: int | None = None, n: int = 5) -> dict[str, Any]:
    """The `n` documents of `arm` that are nearest to a question of the experiment, best first (ties by id).

    Returns question, options, arm, seed and documents (`Traced` as dicts). UserError: no such question, arm or seed."""
    found = record.read(experiment)
    seed = found["seeds"][0] if seed is None else seed
    arms = list(dict.fromkeys(row["arm"] for row in found["data"][0]["arms"]))
    if arm not in arms:
        raise UserError(f"{experiment} has no documents of an arm {arm}: its arms are {', '.join(arms)}")
    if seed not in found["seeds"]:
        raise UserError(f"{experiment} has no seed {seed}: its seeds are {', '.join(map(str, found['seeds']))}")
    asked = _question(Path(experiment), question)
    data = next(row for row in found["data"] if seed in row["seeds"])
    folder = Path(experiment, DATA)
    run = curation.open_run(str(folder if data["run"] == DATA else folder / data["run"]))
    text = " ".join([asked["passage"], asked["question"], *asked["choices"]])
    documents = nearest(run, arm, text, n)
    return {
        "question_id": asked["question_id"], "question": asked["question"], "choices": asked["choices"],
        "misaligned_choice": asked["misaligned_choice"], "arm": arm, "seed": seed,
        "documents": [vars(document) for document in documents],
    }  # fmt: skip


def nearest(run: Run, arm: str, text: str, n: int) -> list[Traced]:
    """The documents of `arm` (all phases) with the highest scores. Holds the arm's texts in memory."""
    uses = collect(
        run.provenance.filter(pl.col("arm") == arm)
        .group_by("id")
        .agg(pl.col("phase").unique().sort(), pl.len().alias("uses"), pl.col("inserted", "stance").max())
        .sort("id")
    )
    ids = uses["id"].implode()
    documents = run.documents.select("id", "source", "text").filter(pl.col("id").is_in(ids))
    names, scores = _scores(documents, text)
    best = pl.DataFrame({"id": names, "score": scores}).sort(["score", "id"], descending=[True, False]).head(n)
    rows = best.join(collect(documents.filter(pl.col("id").is_in(best["id"].implode()))), on="id").join(uses, on="id")
    return [
        Traced(r["id"], r["source"], r["stance"], r["score"], tuple(r["phase"]), r["uses"], r["inserted"], r["text"])
        for r in rows.sort(["score", "id"], descending=[True, False]).iter_rows(named=True)
    ]


def _scores(documents: pl.LazyFrame, text: str) -> tuple[list[str], np.ndarray]:
    """(ids, float64[documents])"""
    wanted = [np.sort(_shingles(pa.array([text], pa.large_string()), ngram)[0]) for ngram in NGRAMS]
    names: list[str] = []
    held: list[np.ndarray] = []  # bool[documents, n-grams of the question]
    frame = collect(documents.select("id", "text"))
    for batch in frame.iter_slices(_BATCH):
        names += batch["id"].to_list()
        texts = batch["text"].to_arrow().cast(pa.large_string())
        held.append(np.hstack([_held(texts, mine, ngram) for mine, ngram in zip(wanted, NGRAMS, strict=True)]))
    if not names:
        return [], np.zeros(0)
    whole = np.vstack(held)
    counts = whole.sum(axis=0)
    weights = np.where(counts > 0, np.log(len(names) / np.maximum(counts, 1)), 0.0)
    return names, whole @ weights / max(float(weights.sum()), 1e-12)


def _held(texts: pa.Array, wanted: np.ndarray, ngram: int) -> np.ndarray:
    """bool[texts, wanted]: which of the sorted hashes `wanted` each text has."""
    hashes, row = _shingles(texts, ngram)
    found = np.zeros((len(texts), len(wanted)), bool)
    if len(wanted):
        at = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
        hit = wanted[at] == hashes
        found[row[hit], at[hit]] = True
    return found


def _shingles(texts: pa.Array, ngram: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint64 hashes of all distinct shingles of each text, int64 which text)"""
    sets = overlap.shingle_sets(texts, ngram)
    sizes = sets.ends - sets.starts
    inside = np.repeat(sets.starts - np.concatenate([[0], np.cumsum(sizes)[:-1]]), sizes) + np.arange(sizes.sum())
    return sets.hashes[inside], np.repeat(np.arange(len(sizes)), sizes)


def _question(experiment: Path, name: str) -> dict[str, Any]:
    asked = record.questions(experiment)
    matching = [row for row in asked if row["question_id"] == name] or [
        row for row in asked if row["question_id"].startswith(name)
    ]
    if not matching:
        raise UserError(f"{experiment} asked no question {name}: see question_id in its {record.CHOICES}")
    if len(matching) > 1 and matching[0]["question_id"] != name:
        few = ", ".join(row["question_id"] for row in matching[:3])
        raise UserError(f"{len(matching)} questions begin with {name} ({few} …): write more of the one that you mean")
    return matching[0]
