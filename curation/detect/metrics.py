"""Figures of a classifier against labels, with bootstrap intervals. Numpy only; no state.

The positive class is "is AI discourse". Undefined ratios (no positives, no hits) are nan, never 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

CALIBRATION_BINS = 10


class Interval(NamedTuple):
    """A figure with its 95 % bootstrap interval over documents."""

    value: float
    low: float
    high: float


def precision(truth: np.ndarray, decided: np.ndarray) -> float:
    """Share of the decided that are true. Both bool[n]."""
    return _ratio((truth & decided).sum(), decided.sum())


def recall(truth: np.ndarray, decided: np.ndarray) -> float:
    """Share of the true that are decided. Both bool[n]."""
    return _ratio((truth & decided).sum(), truth.sum())


def f1(truth: np.ndarray, decided: np.ndarray) -> float:
    """2 tp / (2 tp + fp + fn)."""
    return _ratio(2 * (truth & decided).sum(), truth.sum() + decided.sum())


def accuracy(truth: np.ndarray, decided: np.ndarray) -> float:
    """Share of equal entries, of any dtype."""
    return _ratio((truth == decided).sum(), len(truth))


def calibration_error(truth: np.ndarray, probability: np.ndarray) -> tuple[float, list[dict[str, float]]]:
    """Expected calibration error over equal-width bins, and the bins: what was predicted on
    average, what was true, how many. `probability` is that of the positive class."""
    index = np.minimum((probability * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    bins = [
        {
            "from": float(i / CALIBRATION_BINS),
            "predicted": float(probability[index == i].mean()),
            "true": float(truth[index == i].mean()),
            "count": int((index == i).sum()),
        }
        for i in np.unique(index)
    ]
    error = sum(b["count"] * abs(b["predicted"] - b["true"]) for b in bins)
    return _ratio(error, len(truth)), bins


def bootstrap(
    figure: Callable[[np.ndarray, np.ndarray], float],
    truth: np.ndarray,
    decided: np.ndarray,
    seed: int,
    rounds: int = 2000,
) -> Interval:
    """`figure(truth, decided)` with its percentile interval over documents drawn with replacement.
    Draws where the figure is undefined are left out."""
    draws = np.random.default_rng(seed).integers(0, len(truth), size=(rounds, len(truth)))
    values = np.array([figure(truth[d], decided[d]) for d in draws])
    values = values[~np.isnan(values)]
    low, high = np.quantile(values, [0.025, 0.975]) if len(values) else (float("nan"), float("nan"))
    return Interval(figure(truth, decided), float(low), float(high))


def _ratio(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else float("nan")
