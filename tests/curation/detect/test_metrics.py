"""Figures on toy labels that a reader can check by eye."""

import math

import numpy as np
import pytest

from curation.detect import metrics

TRUTH = np.array([True, True, True, False, False])
DECIDED = np.array([True, True, False, True, False])


def test_two_of_three() -> None:
    assert metrics.precision(TRUTH, DECIDED) == metrics.recall(TRUTH, DECIDED) == pytest.approx(2 / 3)
    assert metrics.f1(TRUTH, DECIDED) == pytest.approx(2 / 3)
    assert metrics.accuracy(TRUTH, DECIDED) == pytest.approx(3 / 5)


def test_undefined_is_nan_not_zero() -> None:
    never = np.zeros(5, bool)
    assert math.isnan(metrics.precision(TRUTH, never))
    assert math.isnan(metrics.recall(never, DECIDED))
    assert metrics.recall(TRUTH, never) == 0


def test_calibration_error() -> None:
    truth = np.array([True, False, False, False, True])
    error, bins = metrics.calibration_error(truth, np.array([0.25, 0.25, 0.25, 0.25, 1.0]))
    assert error == 0
    assert [(b["from"], b["count"], b["true"]) for b in bins] == [(0.2, 4, 0.25), (0.9, 1, 1.0)]
    assert metrics.calibration_error(truth, np.full(5, 0.9))[0] == pytest.approx(0.5)


def test_bootstrap_is_seeded_and_holds_the_value() -> None:
    one = metrics.bootstrap(metrics.f1, TRUTH, DECIDED, seed=1)
    assert one == metrics.bootstrap(metrics.f1, TRUTH, DECIDED, seed=1)
    assert one.low <= one.value == metrics.f1(TRUTH, DECIDED) <= one.high
    certain = metrics.bootstrap(metrics.accuracy, TRUTH, TRUTH, seed=1)
    assert certain == (1, 1, 1)
