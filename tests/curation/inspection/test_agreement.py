"""Agreement against hand counts, a textbook kappa and simulations; properties that any such figure must have."""

from dataclasses import fields

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from curation.errors import UserError
from curation.inspection.agreement import (
    LEVELS,
    Agreement,
    ClassFigures,
    Figure,
    Level,
    agreement,
    calibrated,
    clopper_pearson,
)
from curation.label.rubric import CONFIDENCES
from curation.schema import STANCES

PAIRS = st.lists(st.tuples(st.sampled_from(STANCES), st.sampled_from(STANCES)), min_size=1, max_size=60)
CONFIDENT = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60)


def of(truth: list[str], labels: list[str], **more: object) -> Agreement:
    return agreement(pl.Series(truth, dtype=pl.String), pl.Series(labels, dtype=pl.String), **more)


def figures(found: Agreement) -> list[Figure]:
    parts = [found, *found.classes, found.binary]
    return [getattr(part, f.name) for part in parts for f in fields(part) if isinstance(getattr(part, f.name), Figure)]


def test_figures_are_the_counts_of_ten_documents() -> None:
    truth = ["unrelated", "unrelated", "unrelated", "unrelated", "aligned", "aligned", "aligned", "misaligned",
             "misaligned", "mixed"]  # fmt: skip
    label = ["unrelated", "unrelated", "unrelated", "aligned", "aligned", "aligned", "misaligned", "misaligned",
             "aligned", "unrelated"]  # fmt: skip
    found = of(truth, label)
    assert found.confusion == (
        (3, 0, 1, 0, 0),
        (0, 0, 0, 0, 0),
        (0, 0, 2, 1, 0),
        (0, 0, 1, 1, 0),
        (1, 0, 0, 0, 0),
    )
    unrelated, neutral, aligned, misaligned, mixed = found.classes
    values = [(c.precision.value, c.recall.value, c.f1.value) for c in (unrelated, aligned, misaligned)]
    assert values == [(3 / 4, 3 / 4, 3 / 4), (2 / 4, 2 / 3, 4 / 7), (1 / 2, 1 / 2, 1 / 2)]
    assert (mixed.precision.value, mixed.recall.value, mixed.f1.value) == (None, 0, 0)
    assert (neutral.precision.value, neutral.recall.value, neutral.f1.value) == (None, None, None)
    assert found.macro_over == ("unrelated", "aligned", "misaligned", "mixed")  # neutral occurs nowhere
    assert found.macro_f1.value == pytest.approx((3 / 4 + 4 / 7 + 1 / 2 + 0) / 4)
    assert found.accuracy.value == 6 / 10
    expected = (4 * 4 + 3 * 4 + 2 * 2 + 1 * 0) / 100
    assert found.kappa.value == pytest.approx((0.6 - expected) / (1 - expected))
    two = found.binary
    assert two is not None
    assert two.confusion == ((3, 1), (1, 5))
    assert (two.precision.value, two.recall.value, two.accuracy.value) == (5 / 6, 5 / 6, 0.8)


def test_kappa_of_a_textbook_table() -> None:
    """50 grant proposals, two readers: both yes 20, both no 15, 5 and 10 apart: 0.4 (Wikipedia, Cohen's kappa)."""
    truth = ["yes"] * 25 + ["no"] * 25
    labels = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    found = of(truth, labels, stances=("no", "yes"))
    assert found.kappa.value == pytest.approx(0.4)
    assert found.binary is None
    # Its asymptotic interval (Fleiss, Cohen & Everitt 1969) is 0.4 ± 1.96 · 0.126 or so.
    assert (found.kappa.low, found.kappa.high) == (pytest.approx(0.15, abs=0.03), pytest.approx(0.65, abs=0.03))


def test_interval_of_accuracy_is_that_of_a_share() -> None:
    found = of(["aligned"] * 200, ["aligned"] * 150 + ["mixed"] * 50)
    low, high = stats.binom.ppf([0.025, 0.975], 200, 0.75) / 200
    assert (found.accuracy.low, found.accuracy.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


def test_where_all_agree_the_interval_is_exact_and_not_a_point() -> None:
    found = of(["aligned"] * 5 + ["mixed"] * 5, ["aligned"] * 5 + ["mixed"] * 5)
    low = clopper_pearson(5, 5)[0]
    assert low == pytest.approx(0.025 ** (1 / 5))
    aligned = found.classes[2]
    assert (aligned.recall.low, aligned.recall.high) == (pytest.approx(low), 1)
    assert (aligned.f1.low, aligned.f1.high) == (pytest.approx(2 * low / (1 + low)), 1)
    assert found.macro_f1.low == aligned.f1.low
    assert found.kappa.low == pytest.approx((0.025 ** (1 / 10) - 0.5) / 0.5)


def test_a_class_that_is_missing_in_some_draws_is_said() -> None:
    found = of(["aligned"] * 9 + ["mixed"], ["aligned"] * 9 + ["mixed"])
    assert found.macro_f1.left_out == pytest.approx(0.9**10, abs=0.04)
    assert found.classes[4].recall.left_out == found.macro_f1.left_out
    assert found.classes[2].recall.left_out == 0


def test_one_class_only_has_no_kappa() -> None:
    assert of(["mixed"] * 4, ["mixed"] * 4).kappa == Figure(None, None, None, 1.0)


@pytest.mark.parametrize(
    ("truth", "labels", "told"),
    [
        ([], [], "no document that has both"),
        (["mixed"], ["mixed", "mixed"], "are of 1, 2 documents"),
        (["mixed"], ["mxed"], "'mxed' is no label: known are unrelated"),
        ([None], ["mixed"], "None is no truth"),
    ],
)
def test_refusals(truth: list[str], labels: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        of(truth, labels)


@given(PAIRS)
@settings(max_examples=40, deadline=None)
def test_intervals_hold_their_estimate_and_order_does_not_matter(pairs: list[tuple[str, str]]) -> None:
    truth, labels = map(list, zip(*pairs, strict=True))
    found = of(truth, labels)
    for figure in figures(found):
        if figure.low is not None and figure.high is not None:
            assert figure.low <= figure.value <= figure.high
    assert of(truth[::-1], labels[::-1]) == found


@given(st.lists(st.sampled_from(STANCES), min_size=2, max_size=40).filter(lambda names: len(set(names)) > 1))
@settings(max_examples=25, deadline=None)
def test_equal_labels_agree_fully(names: list[str]) -> None:
    found = of(names, names)
    assert found.kappa.value == pytest.approx(1)
    assert (found.accuracy.value, found.macro_f1.value) == (1, 1)
    assert [c.f1.value for c in found.classes if isinstance(c, ClassFigures) and c.num_truth] == [1] * len(set(names))


def test_independent_labels_agree_by_chance() -> None:
    rng = np.random.default_rng(0)
    truth, labels = (rng.choice(STANCES, 2000, p=[0.6, 0.2, 0.1, 0.05, 0.05]).tolist() for _ in range(2))
    kappa = of(truth, labels).kappa
    assert kappa.value == pytest.approx(0, abs=0.05)
    assert kappa.low < 0 < kappa.high


def test_calibration_of_labels_that_are_right_as_often_as_they_claim() -> None:
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0.3, 1, 4000)
    found = calibrated(confidence, rng.random(4000) < confidence)
    assert found.error.value < 0.03
    assert found.error.low == 0
    assert found.error.value < found.if_calibrated_high
    assert [b.num_documents for b in found.bins] == [400] * 10
    inside = [b.low <= b.predicted <= b.high for b in found.bins]
    assert sum(inside) >= 8


def test_calibration_of_labels_that_claim_too_much() -> None:
    rng = np.random.default_rng(2)
    confidence = rng.uniform(0.5, 1, 2000)
    found = calibrated(confidence, rng.random(2000) < confidence - 0.2)
    assert found.error.value == pytest.approx(0.2, abs=0.03)
    assert found.if_calibrated_high < found.error.low < 0.2 < found.error.high


def test_calibration_counts_by_hand() -> None:
    """Two bins of fifteen: claims 0.6, right 9; claims 0.9, right 12 of 15."""
    confidence = np.array([0.6] * 15 + [0.9] * 15)
    correct = np.array([True] * 9 + [False] * 6 + [True] * 12 + [False] * 3)
    found = calibrated(confidence, correct)
    assert [(b.predicted, b.true, b.num_documents) for b in found.bins] == [
        (pytest.approx(0.6), 0.6, 15),
        (pytest.approx(0.9), 0.8, 15),
    ]
    assert found.error.value == pytest.approx(0.05)


@given(CONFIDENT, st.randoms())
@settings(max_examples=25, deadline=None)
def test_calibration_does_not_depend_on_the_order(rows: list[tuple[float, bool]], random: object) -> None:
    found = []
    for _ in range(2):
        random.shuffle(rows)
        found.append(calibrated(np.array([c for c, _ in rows]), np.array([r for _, r in rows])))
    assert found[0] == found[1]
    assert 0 <= found[0].error.low <= found[0].error.value <= found[0].error.high <= 1
    assert sum(b.num_documents for b in found[0].bins) == len(rows)


def test_only_labels_with_a_confidence_are_judged_by_it() -> None:
    truth, labels = ["mixed"] * 3, ["mixed", "mixed", "aligned"]
    found = of(truth, labels, confidence=pl.Series([0.5, None, 0.9]))
    assert found.num_documents == 3
    assert found.calibration.num_documents == 2
    assert of(truth, labels, confidence=pl.Series([None] * 3, dtype=pl.Float32)).calibration is None
    with pytest.raises(UserError, match="between 0 and 1"):
        of(truth, labels, confidence=pl.Series([0.5, 1.5, 0.9]))


def test_a_level_is_how_many_of_its_labels_are_right() -> None:
    """high: 3 of 4, Clopper-Pearson from a table; medium was never said; a label without a level counts for none."""
    truth = ["mixed"] * 6
    labels = ["mixed", "mixed", "mixed", "aligned", "aligned", "mixed"]
    levels = pl.Series(["high"] * 4 + ["low", None])
    low, medium, high = of(truth, labels, levels=levels).confidence_levels
    assert low == Level("low", 1, 0, 0.0, 0.0, pytest.approx(0.975))
    assert medium == Level("medium", 0, 0, None, None, None)
    assert high == Level("high", 4, 3, 0.75, pytest.approx(0.1941, abs=1e-4), pytest.approx(0.9937, abs=1e-4))


def test_labels_without_a_level_have_none_and_an_unknown_one_is_named() -> None:
    assert of(["mixed"], ["mixed"]).confidence_levels == ()
    assert of(["mixed"], ["mixed"], levels=pl.Series([None], dtype=pl.String)).confidence_levels == ()
    with pytest.raises(UserError, match="'sure' is no confidence: known are low, medium, high"):
        of(["mixed"], ["mixed"], levels=pl.Series(["sure"]))
    with pytest.raises(UserError, match="of 1, 1, 2 documents"):
        of(["mixed"], ["mixed"], levels=pl.Series(["low", "low"]))


def test_levels_are_the_rubrics() -> None:
    assert LEVELS == CONFIDENCES
