"""What share of a corpus has each stance, corrected for the labels' errors; and what recall a stage costs. No files.

Labels are known for the whole corpus, the truth for a sample of it. Documents are put in cells by stratum (what the
detector decided: above the threshold or rejected) and by their label, and

    share(truth = k) = Σ over cells of (documents of the cell / all documents) · (share of k in the cell's sample)

which is the post-stratified estimator (Cochran 1977, § 5A.9), for labels with errors that of double sampling (Tenenbein
1970, 1972). It holds when the sample is random *within each cell*; rates may differ between cells, so picking documents
by label or by the threshold is fine, picking them by what they turn out to say is not. The other way, to invert
P(label | truth) (Rogan & Gladen 1978; adjusted counts, Forman 2008), needs only that this matrix carries over from
elsewhere; but it needs no sample of the corpus exactly because it trusts that, it can leave 0..1, and it is unstable
where labels of a class are mostly wrong, as for a rare stance. We have the sample, so we do not.

Cells with fewer than MIN_LABELLED labelled documents are merged, the smallest two of a stratum at a time; between
these, and only these, rates should be alike.

**Intervals** (95 %) are about the documents of this corpus that were not labelled. Each cell's share is drawn from
Beta(hits, misses), the Bayesian bootstrap (Rubin 1981), and the sum over cells is taken; unlike resampling, this needs
one thing more: no hit in a sample of 200 rejects does not mean none in a million. So the upper bound counts one hit
more, and the lower one miss more, in the cell where a document weighs most, as Fay & Feuer (1997) do for rates
standardised by age. With one cell that is Clopper-Pearson. The part of a cell that is labelled is known: spread is
scaled by √(1 − labelled / documents).
Measured at shares from 0.3 to 96 %, with 60 to 300 labelled documents above the threshold and 150 to 400 rejects:
95-100 % of these intervals cover (for recall 98-100: it is wider than it need be), a percentile bootstrap's 62-94.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from curation.errors import UserError
from curation.inspection.agreement import ALPHA, NUM_DRAWS, UNRELATED, Counts, Figure, Floats
from curation.rng import key64
from curation.schema import STANCES

MIN_LABELLED = 5


@dataclass(frozen=True)
class Stratum:
    """Documents that a stage treated alike, and those of them whose truth is known."""

    name: str
    documents_K: Counts
    """Documents with each label."""
    confusion_KK: Counts
    """Labelled documents: rows truth, columns label."""


@dataclass(frozen=True)
class Share:
    """Of all documents of the corpus, 0..1."""

    name: str
    predicted: float
    """As labelled, uncorrected."""
    corrected: Figure | None
    """None where no truth was given."""


@dataclass(frozen=True)
class Prevalence:
    """`shares` in the order of stances; `discourse` is every stance but unrelated."""

    shares: tuple[Share, ...]
    discourse: Share
    num_documents: int
    num_labelled: int
    num_cells: int
    """Cells of the estimate, after merging; 0 where no truth was given."""

    def _repr_html_(self) -> str:
        from curation.inspection.pages import render

        return render("notebook.html.j2", agreement=None, prevalence=self)


@dataclass(frozen=True)
class Recall:
    """Share of the true AI discourse that passes a stage. `figure.value` is None where `reason` says why."""

    stage: str
    figure: Figure
    true_passed: float | None
    true_lost: float | None
    """Estimated documents of true AI discourse that pass, and that the stage loses."""
    num_lost: int
    num_labelled_lost: int
    """Documents that the stage holds back, and how many of them have the truth."""
    reason: str | None


@dataclass(frozen=True)
class Cell:
    num_documents: int
    num_labelled: int
    truth_K: Counts


def prevalence(strata: Sequence[Stratum], stances: Sequence[str] = STANCES) -> Prevalence:
    """Share of each stance, from labels of every document and the truth of a sample in each stratum.

    Raises UserError when a stratum has documents but none with the truth, or the counts cannot be."""
    cells = [cell for stratum in strata for cell in cells_of(stratum)]
    total = sum(cell.num_documents for cell in cells)
    if not total:
        raise UserError("prevalence needs documents, and there are none")
    discourse = [k for k, name in enumerate(stances) if name != UNRELATED]
    documents_K = np.sum([stratum.documents_K for stratum in strata], axis=0)
    return Prevalence(
        tuple(Share(s, float(documents_K[k] / total), _share(cells, [k])) for k, s in enumerate(stances)),
        Share("AI discourse", float(documents_K[discourse].sum() / total), _share(cells, discourse)),
        total, sum(cell.num_labelled for cell in cells), len(cells),
    )  # fmt: skip


def uncorrected(documents_K: Counts, stances: Sequence[str] = STANCES) -> Prevalence:
    """The shares as labelled, where no truth is known."""
    total = int(documents_K.sum())
    if not total:
        raise UserError("prevalence needs documents, and there are none")
    shares = tuple(Share(name, float(documents_K[k] / total), None) for k, name in enumerate(stances))
    discourse = sum(share.predicted for share in shares if share.name != UNRELATED)
    return Prevalence(shares, Share("AI discourse", discourse, None), total, 0, 0)


def recall(stage: str, passed: Sequence[Stratum], lost: Sequence[Stratum], stances: Sequence[str] = STANCES) -> Recall:
    """Of the true AI discourse among all documents, the share in `passed`. The bounds take what passed at its low end
    and what was lost at its high end, and the other way round, draw by draw. A stage that holds nothing back loses
    nothing; one whose held-back documents have no truth says so in `reason`."""
    num_lost = int(sum(stratum.documents_K.sum() for stratum in lost))
    num_labelled_lost = int(sum(stratum.confusion_KK.sum() for stratum in lost))
    if not num_lost:
        return Recall(stage, Figure(1.0, 1.0, 1.0), None, 0.0, 0, 0, None)

    def unknown(reason: str) -> Recall:
        return Recall(stage, Figure(None, None, None), None, None, num_lost, num_labelled_lost, reason)

    try:
        cells = [[cell for stratum in side for cell in cells_of(stratum)] for side in (passed, lost)]
    except UserError as error:
        return unknown(str(error))
    discourse = [k for k, name in enumerate(stances) if name != UNRELATED]
    (kept, kept_low, kept_high), (gone, gone_low, gone_high) = (_total(side, discourse) for side in cells)
    if not kept + gone:
        return unknown("no labelled document is AI discourse: label more")
    low = np.quantile(kept_low / np.maximum(kept_low + gone_high, 1e-300), ALPHA / 2)
    high = np.quantile(kept_high / np.maximum(kept_high + gone_low, 1e-300), 1 - ALPHA / 2)
    value = kept / (kept + gone)
    figure = Figure(value, min(float(low), value), max(float(high), value))
    return Recall(stage, figure, kept, gone, num_lost, num_labelled_lost, None)


def cells_of(stratum: Stratum) -> list[Cell]:
    """The stratum's cells: a label each, merged until each has enough labelled documents."""
    if (stratum.confusion_KK < 0).any() or (stratum.confusion_KK.sum(axis=0) > stratum.documents_K).any():
        raise UserError(f"of the documents {stratum.name} more are labelled than there are")
    if stratum.documents_K.any() and not stratum.confusion_KK.any():
        raise UserError(
            f"none of the {int(stratum.documents_K.sum()):,} documents {stratum.name} has a human label: label a "
            "random sample of them"
        )
    by_label = zip(stratum.documents_K.tolist(), stratum.confusion_KK.T, strict=True)
    cells = [Cell(num, int(truth_K.sum()), truth_K) for num, truth_K in by_label if num]
    while len(cells) > 1 and min(cell.num_labelled for cell in cells) < MIN_LABELLED:
        one, other, *rest = sorted(cells, key=lambda cell: (cell.num_labelled, cell.num_documents))
        merged = Cell(
            one.num_documents + other.num_documents, one.num_labelled + other.num_labelled, one.truth_K + other.truth_K
        )
        cells = [merged, *rest]
    return cells


def _share(cells: Sequence[Cell], which: Sequence[int]) -> Figure:
    total = sum(cell.num_documents for cell in cells)
    value, low_D, high_D = (part / total for part in _total(cells, which))
    low, high = float(np.quantile(low_D, ALPHA / 2)), float(np.quantile(high_D, 1 - ALPHA / 2))
    return Figure(float(value), max(0.0, min(low, float(value))), min(1.0, max(high, float(value))))


def _total(cells: Sequence[Cell], which: Sequence[int]) -> tuple[float, Floats, Floats]:
    """Documents of the stances `which`: estimated, and [draws] for the lower and for the upper bound."""
    documents_C = np.array([cell.num_documents for cell in cells], np.float64)
    labelled_C = np.array([cell.num_labelled for cell in cells], np.float64)
    hits_C = np.array([cell.truth_K[list(which)].sum() for cell in cells], np.float64)
    value = float((documents_C * hits_C / np.maximum(labelled_C, 1)).sum())
    rng = np.random.default_rng(key64("inspection.prevalence", int(labelled_C.sum()), len(cells)))
    upper = _upper(documents_C, labelled_C, hits_C, rng.beta)
    misses = _upper(documents_C, labelled_C, labelled_C - hits_C, rng.beta)
    return value, float(documents_C.sum()) - misses, upper


def _upper(documents_C: Floats, labelled_C: Floats, hits_C: Floats, beta: Callable[..., Floats]) -> Floats:
    """[draws]: documents that are hits, with one hit more in the cell where a labelled document stands for most."""
    if not len(documents_C):
        return np.zeros(NUM_DRAWS)
    scale_C = np.sqrt(1 - labelled_C / documents_C)
    heaviest = int((documents_C * scale_C / labelled_C).argmax())
    total_D = np.zeros(NUM_DRAWS)
    for c, (documents, labelled, hits) in enumerate(zip(documents_C, labelled_C, hits_C, strict=True)):
        more, misses, share = hits + (c == heaviest), labelled - hits, hits / labelled
        drawn = beta(more, misses, NUM_DRAWS) if more and misses else np.full(NUM_DRAWS, float(misses == 0))
        total_D += documents * (share + scale_C[c] * (drawn - share))
    return total_D
