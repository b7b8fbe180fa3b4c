"""Corrected shares against hand counts, and how often their intervals cover in a simulated corpus."""

import numpy as np
import pytest

from curation.errors import UserError
from curation.inspection.agreement import Counts, clopper_pearson
from curation.inspection.prevalence import MIN_LABELLED, Stratum, cells_of, prevalence, recall, uncorrected

TWO = ("unrelated", "aligned")


def stratum(documents: list[int], confusion: list[list[int]], name: str = "all") -> Stratum:
    return Stratum(name, np.array(documents), np.array(confusion))


def test_shares_are_weighted_by_what_each_cell_stands_for() -> None:
    # 900 labelled unrelated, of which 1 in 10 is aligned; 100 labelled aligned, of which 8 in 10 are.
    found = prevalence([stratum([900, 100], [[9, 2], [1, 8]])], TWO)
    unrelated, aligned = found.shares
    assert (unrelated.predicted, aligned.predicted) == (0.9, 0.1)
    assert aligned.corrected.value == pytest.approx(0.9 * 0.1 + 0.1 * 0.8)
    assert unrelated.corrected.value == pytest.approx(1 - aligned.corrected.value)
    assert (unrelated.corrected.low, unrelated.corrected.high) == (
        pytest.approx(1 - aligned.corrected.high, abs=0.02),
        pytest.approx(1 - aligned.corrected.low, abs=0.02),
    )
    assert found.discourse.corrected.value == aligned.corrected.value
    assert (found.num_documents, found.num_labelled, found.num_cells) == (1000, 20, 2)


@pytest.mark.parametrize("hits", [0, 3, 40])
def test_with_one_cell_the_interval_is_clopper_pearson(hits: int) -> None:
    found = prevalence([stratum([10**9, 0], [[40 - hits, 0], [hits, 0]])], TWO).shares[1].corrected
    assert (found.low, found.high) == pytest.approx(clopper_pearson(hits, 40), abs=0.01)


def test_a_corpus_that_is_labelled_whole_is_known() -> None:
    found = prevalence([stratum([20, 10], [[18, 1], [2, 9]])], TWO).shares[1].corrected
    assert (found.low, found.value, found.high) == pytest.approx((11 / 30, 11 / 30, 11 / 30))


def test_cells_with_few_labels_are_merged() -> None:
    wide = stratum([100, 50, 10], [[6, 1, 0], [0, 3, 1], [0, 0, 1]])
    cells = cells_of(wide)
    assert sorted((c.num_documents, c.num_labelled) for c in cells) == [(60, 6), (100, 6)]
    assert all(c.num_labelled >= MIN_LABELLED for c in cells)
    assert sum(c.truth_K for c in cells).tolist() == wide.confusion_KK.sum(axis=1).tolist()


def test_refusals() -> None:
    with pytest.raises(UserError, match="none of the 900 documents below has a human label"):
        prevalence([stratum([10, 10], [[5, 0], [0, 5]]), stratum([900, 0], [[0, 0], [0, 0]], "below")], TWO)
    with pytest.raises(UserError, match="more are labelled than there are"):
        prevalence([stratum([3, 10], [[5, 0], [0, 5]])], TWO)
    with pytest.raises(UserError, match="there are none"):
        prevalence([], TWO)
    with pytest.raises(UserError, match="there are none"):
        uncorrected(np.zeros(2, np.int64), TWO)


def test_uncorrected_shares_have_no_interval() -> None:
    found = uncorrected(np.array([3, 1]), TWO)
    assert [(s.predicted, s.corrected) for s in (*found.shares, found.discourse)] == [
        (0.75, None),
        (0.25, None),
        (0.25, None),
    ]


def test_recall_counts_what_was_held_back() -> None:
    passed, lost = stratum([0, 100], [[0, 2], [0, 8]]), stratum([900, 0], [[99, 0], [1, 0]])
    found = recall("detect", [passed], [lost], TWO)
    assert (found.true_passed, found.true_lost) == (pytest.approx(80), pytest.approx(9))
    assert found.figure.value == pytest.approx(80 / 89)
    assert found.figure.low < 0.75  # 1 in 100 rejects may be 5 in 100
    assert 0.95 < found.figure.high < 1
    assert (found.num_lost, found.num_labelled_lost, found.reason) == (900, 100, None)


def test_recall_where_nothing_can_be_said_or_lost() -> None:
    passed, nothing = stratum([0, 100], [[0, 2], [0, 8]]), np.zeros((2, 2), np.int64)
    unlabelled = recall("detect", [passed], [Stratum("below", np.array([900, 0]), nothing)], TWO)
    assert unlabelled.figure.value is None
    assert "none of the 900 documents below" in unlabelled.reason
    assert recall("dedup", [passed], [Stratum("removed", np.array([0, 0]), nothing)], TWO).figure.value == 1
    found = recall("detect", [stratum([0, 9], [[0, 3], [0, 0]])], [stratum([9, 0], [[3, 0], [0, 0]])], TWO)
    assert "no labelled document is AI discourse" in found.reason


TRUTH = np.array([0.962, 0.02, 0.01, 0.005, 0.003])
LABELLER = np.array(
    [
        [0.985, 0.006, 0.004, 0.003, 0.002],
        [0.2, 0.65, 0.08, 0.05, 0.02],
        [0.2, 0.15, 0.55, 0.05, 0.05],
        [0.15, 0.1, 0.05, 0.65, 0.05],
        [0.2, 0.2, 0.2, 0.2, 0.2],
    ]
)
ABOVE = np.array([0.02, 0.9, 0.9, 0.95, 0.9])  # by label: the share above the threshold


def test_intervals_cover() -> None:
    """100 corpora of 100,000 documents, 200 labelled above the threshold and 200 below."""
    rng = np.random.default_rng(1)
    covered, errors = [], []
    for _ in range(100):
        all_KK: Counts = rng.multinomial(100_000, (TRUTH[:, None] * LABELLER).ravel()).reshape(5, 5)
        above_KK = rng.binomial(all_KK, ABOVE)
        strata = [
            Stratum(name, side.sum(axis=0), rng.multivariate_hypergeometric(side.ravel(), 200).reshape(5, 5))
            for name, side in (("above", above_KK), ("below", all_KK - above_KK))
        ]
        true = all_KK.sum(axis=1) / 100_000
        found = prevalence(strata)
        figures = [*[s.corrected for s in found.shares], found.discourse.corrected]
        passed = recall("detect", strata[:1], strata[1:]).figure
        truths = [*true, 1 - true[0], above_KK[1:].sum() / all_KK[1:].sum()]
        covered.append([f.low <= t <= f.high for f, t in zip([*figures, passed], truths, strict=True)])
        errors.append([f.value - t for f, t in zip(figures, truths, strict=False)])
    assert (np.mean(covered, axis=0) >= 0.93).all()
    assert np.abs(np.mean(errors, axis=0)).max() < 0.002  # unbiased
