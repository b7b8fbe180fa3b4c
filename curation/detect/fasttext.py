"""The fastText detector: five stances from word and bigram features, discourse = 1 - p(unrelated).

Texts go through `normalise`, so training and inference see the same words. AI discourse may be a
passage in a long text, so a document is scored by windows of about WINDOW_WORDS words, each
computed as fastText computes a line (see `folded`), and its probabilities are the mean over the
windows most likely to be discourse: one of 1-3 windows, two of 4-15, three of 16-63, and so on.
The best window alone is a chance hit in a long text, the mean of all loses a chapter in a book;
the rule was chosen on texts put together from labelled passages (models/default.md).
"""

import functools
import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa

from curation import storage
from curation.detect import features, model_file
from curation.detect.folded import (
    Folded,
    Span,
    character_of_byte,
    evidence,
    fold,
    softmax,
    window_logits,
    window_ranges,
)
from curation.detect.normalise import Bytes, normalise
from curation.errors import UserError
from curation.schema import STANCES

WINDOW_WORDS = 200
LABELS = [f"__label__{stance}" for stance in STANCES]
_DEFAULT = Path(__file__).parent / "models" / "default.bin"


class Detector:
    """A loaded model. `fingerprint` is the sha256 of its file; loaded once a process and path."""

    def __init__(self, model: Folded, fingerprint: str):
        self._model, self.fingerprint = model, fingerprint

    @staticmethod
    def load(path: str = "default") -> "Detector":
        """The model at `path` (any fsspec path), or the one that ships with Tilth. Raises UserError
        for a missing file, one that is not a fastText model, or one with other labels."""
        return _load(str(_DEFAULT) if path == "default" else path)

    @staticmethod
    def forget() -> None:
        """For who has written a model file: the next `load` reads it."""
        _load.cache_clear()

    def predict(self, texts: pa.Array) -> np.ndarray:
        """float32[n, 5]: probability of each of schema.STANCES for each text; rows sum to 1."""
        return self.predict_normalised(normalise(texts))

    def predict_normalised(self, normalised: Bytes) -> np.ndarray:
        """`predict` of what `normalise` made of the texts."""
        logits_WC, bounds = window_logits(self._model, *normalised, WINDOW_WORDS)
        return combine_windows(softmax(logits_WC), bounds)

    def explain(self, text: str, limit: int = 20) -> list[Span]:
        """The spans that speak most for AI discourse in the most telling window, strongest first.

        A feature's contribution is its share of the difference between the discourse logits
        (weighted by their probabilities given discourse) and the logit of unrelated; over all
        features they add up to that difference. Only positive ones are returned.
        """
        data, offsets = normalise(pa.array([text], pa.large_string()))
        logits_WC, _ = window_logits(self._model, data, offsets, WINDOW_WORDS)
        window = int(np.argmin(softmax(logits_WC)[:, 0]))
        direction_C = np.concatenate([[-1], softmax(logits_WC[window : window + 1, 1:])[0]])
        found = features.tokens(self._model.features, data, offsets)
        firsts, lasts, _ = window_ranges(found.bounds, WINDOW_WORDS)
        characters = character_of_byte(text)
        return evidence(self._model, found, firsts[window], lasts[window], direction_C, characters, limit)


def num_top_windows(num_windows: np.ndarray) -> np.ndarray:
    """How many windows decide for documents of `num_windows` each: one more for every four times the length."""
    return 1 + np.log2(num_windows).astype(np.int64) // 2


def combine_windows(probability_WC: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """float32[num_documents, 5]: for each document the mean of its `num_top_windows` windows with
    the least p(unrelated). Windows bounds[i]:bounds[i + 1] belong to document i."""
    windows_D = np.diff(bounds)
    documents = np.repeat(np.arange(len(windows_D)), windows_D)
    order = np.lexsort((probability_WC[:, 0], documents))
    rank = np.arange(len(order)) - np.repeat(bounds[:-1], windows_D)
    tops_D = num_top_windows(windows_D)
    top = order[rank < np.repeat(tops_D, windows_D)]
    total = np.zeros((len(windows_D), probability_WC.shape[1]))
    np.add.at(total, documents[top], probability_WC[top])
    return (total / tops_D[:, None]).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _load(path: str) -> Detector:
    try:
        raw = storage.read_bytes(path)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(
            f"there is no model file {path}: make one with `tilth detect train LABELLED -o {path}`"
        ) from None
    return Detector(fold_stances(raw, path), hashlib.sha256(raw).hexdigest())


def fold_stances(raw: bytes, name: str) -> Folded:
    """The model in a file's bytes, its classes in the order of schema.STANCES."""
    model = model_file.parse(np.frombuffer(raw, np.uint8), name)
    if sorted(model.labels) != sorted(LABELS):
        raise UserError(f"{name} has the labels {', '.join(model.labels)}; Tilth needs {', '.join(LABELS)}")
    if model.loss != "softmax":
        raise UserError(f"{name} is not a softmax model: train one with `tilth detect train`")
    return fold(model, LABELS)
