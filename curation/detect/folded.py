"""Folded inference: a supervised fastText model as one small row of logits per feature.

fastText averages the input rows of a line's features (words, subwords, hashed word n-grams, `</s>`) and multiplies by
the output matrix. Both steps are linear, so input x output is folded once, and a text's logits are the mean of its
features' rows: 64 bytes a feature for 16 labels instead of 400 for 100 dimensions. `features` finds the rows.

The sums are float64 and in effect exact; fastText's are float32, and what differs is its rounding. In a sum between
two powers of two a feature is rounded alike each time, so the errors of copies add up: real texts of 60,000 features
move by up to 8e-6, one word 10,000 times by up to 3e-4. `FoldedFastText` estimates that for each text, and where
it could show does the text again in fastText's own order and precision (`_replay`, from the input matrix): where a
softmax may move by TOLERANCE, or a logit of a one-vs-all model may lie beyond a step of fastText's sigmoid, which is a
table of 512 steps. The estimate is that of independent errors over features and dimensions, four standard deviations
wide: a logit moves by u Q |o * h|, where u = 2^-24, Q^2 is the sum over features of the square of how often they
occur, o the label's output row (less the mean one, in a softmax) and h the mean input row (from the logits, by the
pseudoinverse). Measured errors were 1.0 of it at most over 300 texts made to be repetitive and 0.5 over 55,000 real
ones, 4 % of whose text is done again: an estimate with a margin, no proof.
"""

import logging
import tempfile
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numba import njit

from curation import storage
from curation.detect import features, model_file
from curation.detect.features import Features, Rows, Tokens
from curation.detect.model_file import ModelFile
from curation.detect.normalise import text_bytes
from curation.errors import UserError

TOLERANCE = 6e-6  # of 1e-5
_FOLD_ROWS = 1 << 15
_UNIT = 2.0**-24  # of rounding in float32
_GUARD = 1e-5  # fastText reports exp(log(p + 1e-5))
_SIGMOID_STEPS, _SIGMOID_END = 512, 8.0
_log = logging.getLogger(__name__)


class Span(NamedTuple):
    """Evidence: characters [start, end) of the text and what they add to the log-odds of the class in question."""

    start: int
    end: int
    contribution: float


@dataclass(frozen=True, eq=False)
class Folded:
    """`table_FL[f, c]` is what feature f adds to the summed logits of class c; lanes beyond the classes are 0.

    A softmax sees differences only, so its last class is taken from the others and has no lane (`less_last`): half of
    the memory for 5 classes, and memory is what the sums wait for.
    """

    features: Features
    table_FL: np.ndarray  # float32[num_words + num_buckets, lanes]
    weights: np.ndarray | None  # int32[num_words]: with subwords, how many features the row of a word stands for
    num_classes: int
    less_last: bool

    def logits(self, sums_NL: np.ndarray) -> np.ndarray:
        """float64[n, num_classes] of sums of rows of the table; `less_last`: but for a term that all classes share."""
        own = sums_NL[:, : self.num_classes - self.less_last]
        if not self.less_last:
            return own
        return np.column_stack([own, np.zeros(len(own))]) - own.sum(axis=1, keepdims=True) / self.num_classes


def fold(model: ModelFile, labels: tuple[str, ...] | list[str]) -> Folded:
    """Class c of the result is `labels[c]`."""
    columns = model.output.rows(np.array([model.labels.index(label) for label in labels]))
    num_rows = model.input.shape[0]
    less_last = model.loss == "softmax" and len(labels) > 1 and _sum_to_nothing(columns)
    stored = columns[:-1] - columns[-1] if less_last else columns
    table_FL = features.zeros(num_rows, _lanes(len(stored)))
    for first in range(0, num_rows, _FOLD_ROWS):
        part = np.arange(first, min(first + _FOLD_ROWS, num_rows))
        table_FL[part, : len(stored)] = model.input.rows(part) @ stored.T
    if not np.isfinite(table_FL).all():
        raise UserError(f"{model.name} holds numbers that are not finite: train it again with a lower learning rate")
    of_text = features.features(
        model.vocabulary, model.bounds, model.num_words, ngrams=model.ngrams, bucket=model.bucket,
        minn=model.minn, maxn=model.maxn, pruned=model.pruned,
    )  # fmt: skip
    weights = None
    if model.maxn:
        table_FL[: model.num_words], weights = features.sum_subwords(of_text, table_FL)
    return Folded(of_text, table_FL, weights, len(labels), less_last)


def _sum_to_nothing(columns_CD: np.ndarray) -> bool:
    """Whether the output rows sum to about 0, as they do in training: then logits less their mean are as good as
    logits for estimating the rounding."""
    return bool(np.abs(columns_CD.sum(axis=0, dtype=np.float64)).max() <= 0.01 * np.abs(columns_CD).max())


def window_logits(
    model: Folded, data: np.ndarray, offsets: np.ndarray, window_words: int
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of each window of each document in normalised bytes.

    A document of n words has max(1, ceil(n / window_words)) windows whose lengths differ by at
    most one word. Returns float32[num_windows, num_classes] and int64[num_documents + 1], the
    bounds of each document's windows.
    """
    logits, windows = [np.zeros((0, model.num_classes), np.float32)], [np.zeros(1, np.int64)]
    for first, last in features.batches(offsets):
        found = features.tokens(model.features, data, offsets[first : last + 1])
        starts, ends, windows_D = window_ranges(found.bounds, window_words)
        sums, num_features = _sums(model, features.list_rows(model.features, found, starts, ends, model.weights))
        logits.append((sums / np.maximum(1, num_features)[:, None]).astype(np.float32))
        windows.append(windows_D)
    return np.concatenate(logits), np.cumsum(np.concatenate(windows))


def window_ranges(bounds: np.ndarray, window_words: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First and end token of each window of documents with the tokens bounds[i]:bounds[i + 1], and the windows of
    each document."""
    words_D = np.diff(bounds)
    windows_D = np.maximum(1, -(-words_D // window_words))
    document = np.repeat(np.arange(len(words_D)), windows_D)
    window = np.arange(len(document)) - np.repeat(np.cumsum(windows_D) - windows_D, windows_D)
    start, words, windows = bounds[document], words_D[document], windows_D[document]
    return start + window * words // windows, start + (window + 1) * words // windows, windows_D


def evidence(
    model: Folded, found: Tokens, first: int, last: int, direction_C: np.ndarray, characters: np.ndarray, limit: int
) -> list[Span]:
    """The spans of the line of tokens first:last whose features add most to logits @ direction_C, strongest first.

    A span is a token, or a word n-gram (the one that `</s>` ends stops at the last token); contributions over all
    features add up to logits @ direction_C. Only positive ones are returned.
    """
    starts, ends = found.starts[first:last], found.ends[first:last]
    at = np.arange(first, last)
    alone = model.features._replace(ngrams=1, eos_id=-1)
    tokens = features.list_rows(alone, found, at, at + 1, model.weights)
    sums = model.logits(features.sum_rows(model.table_FL, tokens)) @ direction_C
    num_features = features.list_rows(model.features, found, *_one_line(first, last), model.weights).num_features[0]
    scored = [(starts[i], ends[i], sums[i]) for i in range(len(starts))]
    for i, j, row in features.ngram_rows(model.features, found.hashes[first:last]):
        scored.append(
            (starts[i], ends[min(j, len(ends)) - 1], (model.logits(model.table_FL[None, row]) @ direction_C)[0])
        )
    spans = [Span(int(characters[a]), int(characters[b]), float(s) / int(num_features)) for a, b, s in scored if s > 0]
    return sorted(spans, key=lambda s: (-s.contribution, s.start, s.end))[:limit]


def character_of_byte(text: str) -> np.ndarray:
    """int64[num_bytes + 1]: the character that each UTF-8 byte (and the end) belongs to."""
    starts = (np.frombuffer(text.encode(), np.uint8) & 0xC0) != 0x80
    return np.concatenate([np.cumsum(starts) - 1, [len(text)]])


def softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


class FoldedFastText:
    """A fastText model for classification: `predict` gives fastText's own numbers, faster.

    `labels` are as in the file. The library is needed for hierarchical softmax only, whose labels are leaves of a
    tree and not linear: such a model says so once and is run by the library.
    """

    def __init__(self, model: ModelFile):
        self.labels = model.labels
        self._model = model
        self._folded = None if model.loss == "hs" else fold(model, model.labels)
        self._library = _by_library(model) if model.loss == "hs" else None
        every = np.arange(len(model.labels))
        self._output_CD = model.output.rows(every).astype(np.float64)
        self._input_of_logits_CD = np.linalg.pinv(self._output_CD, rcond=1e-4).T.copy()

    @staticmethod
    def load(path: str) -> "FoldedFastText":
        """The supervised model, .bin or .ftz, at `path` (any fsspec path). Raises UserError for anything else."""
        return FoldedFastText(model_file.load(path))

    def predict(self, texts: pa.Array) -> np.ndarray:
        """float32[n, labels]: for each text what fasttext's predict(text.replace("\\n", " "), k=-1) gives, within 1e-5.

        A null is a row of NaN. Where fastText gives no label there is 0: a text without a known feature (which needs a
        model that does not know `</s>`), or a branch of a hierarchical softmax that it doesn't follow. `texts` is a
        string, large_string or string_view array, chunked or not; TypeError for anything else.
        """
        if not isinstance(texts, pa.Array | pa.ChunkedArray):
            raise TypeError(f"texts must be an Arrow string array, not {type(texts).__name__}")
        data, offsets = text_bytes(texts)
        if self._folded is None:
            found = _ask(self._library, self.labels, data, offsets)
        else:
            parts = [self._predict(self._folded, data, offsets[a : b + 1]) for a, b in features.batches(offsets)]
            found = np.concatenate([np.zeros((0, len(self.labels)), np.float32), *parts])
        if texts.null_count:
            found[texts.is_null().to_numpy(zero_copy_only=False)] = np.nan
        return found

    def explain(self, text: str, label: str | None = None, limit: int = 20) -> list[Span]:
        """The spans that speak most for `label` (by default the most probable one), strongest first.

        What they add to its log-odds: against the other labels, weighted by their probabilities, or in a one-vs-all
        model by itself. Raises UserError for a label that the model doesn't have, or a model that isn't folded.
        """
        if self._folded is None:
            raise UserError(f"{self._model.name} is a hierarchical softmax, which can't be explained by its features")
        if label is not None and label not in self.labels:
            raise UserError(f"{self._model.name} has no label {label}; it has {', '.join(self.labels)}")
        data = np.frombuffer(text.encode(), np.uint8)
        found = features.tokens(self._folded.features, data, np.array([0, len(data)]))
        line = _one_line(0, len(found.ids))
        lines = features.list_rows(self._folded.features, found, *line, self._folded.weights)
        sums, num_features = _sums(self._folded, lines)
        logits_C = sums[0] / max(1, num_features[0])
        chosen = int(np.argmax(logits_C)) if label is None else self.labels.index(label)
        direction_C = np.zeros(len(self.labels))
        others = np.arange(len(self.labels)) != chosen
        if self._model.loss == "softmax" and others.any():
            direction_C[others] = -softmax(logits_C[None, others])[0]
        direction_C[chosen] = 1
        return evidence(self._folded, found, 0, len(found.ids), direction_C, character_of_byte(text), limit)

    def _predict(self, folded: Folded, data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        found = features.tokens(folded.features, data, offsets)
        firsts, lasts = found.bounds[:-1], found.bounds[1:]
        lines = features.list_rows(folded.features, found, firsts, lasts, folded.weights)
        sums, num_features = _sums(folded, lines)
        logits = sums / np.maximum(1, num_features)[:, None]
        probability = self._probability(logits)
        doubtful = self._doubtful(logits, probability, lines)
        for document in np.flatnonzero(doubtful & (num_features > 0)):
            own = features.list_rows(folded.features, found, *_one_line(firsts[document], lasts[document]))
            logits[document] = self._replay(own.rows[: own.bounds[-1]])
        probability[doubtful] = self._probability(logits[doubtful])
        return np.where(num_features[:, None] > 0, probability + _GUARD, 0).astype(np.float32)

    def _probability(self, logits: np.ndarray) -> np.ndarray:
        return softmax(logits) if self._model.loss == "softmax" else _table_sigmoid(logits.astype(np.float32))

    def _doubtful(self, logits: np.ndarray, probability: np.ndarray, lines: Rows) -> np.ndarray:
        """bool[n]: whether fastText's rounding could show in a probability. Features are counted only where it could
        if they were all the same one."""
        weights = probability if self._model.loss == "softmax" else np.zeros_like(probability)
        spread = np.empty(logits.shape)
        _spread(logits, weights, self._input_of_logits_CD, self._output_CD, spread)
        doubtful = self._shows(logits, probability, lines.num_features, spread)
        squares = features.sums_of_squares(lines, doubtful)
        copies = np.sqrt(squares * lines.num_features / np.maximum(1, np.diff(lines.bounds)))
        return doubtful & self._shows(logits, probability, copies, spread)

    def _shows(self, logits: np.ndarray, probability: np.ndarray, copies: np.ndarray, spread: np.ndarray) -> np.ndarray:
        """bool[n]: whether what rounding may change in a label's logit (`spread` is |o * h| of the module, `copies` its
        Q), with the rounding of the table, may change a probability."""
        rounding = _UNIT * (copies[:, None] + 16) * spread
        if self._model.loss == "softmax":
            return (probability * rounding > TOLERANCE).any(axis=1)
        step = 2 * _SIGMOID_END / _SIGMOID_STEPS
        from_step = np.abs(logits - step * np.round(logits / step))
        return ((from_step < rounding + 1e-6) & (np.abs(logits) < _SIGMOID_END + step)).any(axis=1)

    def _replay(self, rows: np.ndarray) -> np.ndarray:
        """float32[labels]: a line's logits in fastText's order and precision."""
        hidden_D = self._model.input.sum_in_order(rows)
        hidden_D *= np.float32(1 / len(rows))
        every, output = np.arange(len(self.labels)), self._model.output
        return _dots_in_order(output.unscaled(every), hidden_D) * output.norms(every)


def _sums(model: Folded, lines: Rows) -> tuple[np.ndarray, np.ndarray]:
    return model.logits(features.sum_rows(model.table_FL, lines)), lines.num_features


def _one_line(first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    return np.array([first], np.int64), np.array([last], np.int64)


def _lanes(num_labels: int) -> int:
    """Floats in a row of the table: none lies on two cache lines where one would do."""
    return 1 << (num_labels - 1).bit_length() if num_labels <= 16 else -(-num_labels // 16) * 16


def _table_sigmoid(logits: np.ndarray) -> np.ndarray:
    """fastText's: a table of steps, 0 and 1 beyond its ends."""
    x = np.arange(_SIGMOID_STEPS + 1, dtype=np.float32) * np.float32(16) / np.float32(_SIGMOID_STEPS) - np.float32(8)
    table = (1 / (1 + np.exp(-x.astype(np.float64)))).astype(np.float32)
    end, steps = np.float32(_SIGMOID_END), np.float32(_SIGMOID_STEPS)
    step = ((np.clip(logits, -end, end) + end) * steps / end / np.float32(2)).astype(np.int64)
    return np.where(logits < -end, 0, np.where(logits > end, 1, table[step])).astype(np.float64)


@njit(cache=True, nogil=True, fastmath=True)
def _spread(
    logits_NC: np.ndarray, weights_NC: np.ndarray, input_of_logits_CD: np.ndarray, output_CD: np.ndarray,
    spread_NC: np.ndarray,
) -> None:  # fmt: skip
    """|(o - mean o by weights) * h| for each label's output row o: the module's |o * h|. Inputs are taken to be as
    large as before training (1 / dim) at least, since what training did not move the logits do not show."""
    labels, dim = output_CD.shape
    squares_D, mean_D = np.empty(dim), np.empty(dim)
    for line in range(len(logits_NC)):
        squares_D[:] = 0.0
        mean_D[:] = 0.0
        for c in range(labels):
            for d in range(dim):
                squares_D[d] += logits_NC[line, c] * input_of_logits_CD[c, d]
                mean_D[d] += weights_NC[line, c] * output_CD[c, d]
        for d in range(dim):
            squares_D[d] = squares_D[d] ** 2 + 1 / dim**2
        for c in range(labels):
            total = 0.0
            for d in range(dim):
                total += squares_D[d] * (output_CD[c, d] - mean_D[d]) ** 2
            spread_NC[line, c] = np.sqrt(total)


@njit(cache=True, nogil=True)
def _dots_in_order(output_CD: np.ndarray, hidden_D: np.ndarray) -> np.ndarray:
    dots_C = np.zeros(len(output_CD), np.float32)
    for c in range(len(output_CD)):
        for d in range(len(hidden_D)):
            dots_C[c] += output_CD[c, d] * hidden_D[d]
    return dots_C


def _by_library(model: ModelFile) -> Any:
    import fasttext

    _log.warning("%s is a hierarchical softmax, which can't be folded: the fasttext library runs it", model.name)
    if storage.is_local(model.name):
        return fasttext.load_model(storage.filesystem(model.name)[1])
    with tempfile.NamedTemporaryFile(suffix=".bin") as local:  # the library reads local files only
        local.write(storage.read_bytes(model.name))
        local.flush()
        return fasttext.load_model(local.name)


def _ask(library: Any, labels: tuple[str, ...], data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """What the library predicts, by label; 0 for labels that it leaves out."""
    column = {label: c for c, label in enumerate(labels)}
    found = np.zeros((len(offsets) - 1, len(labels)), np.float32)
    for first, last in features.batches(offsets):
        texts = [data[offsets[i] : offsets[i + 1]].tobytes().decode().replace("\n", " ") for i in range(first, last)]
        for row, (names, values) in enumerate(zip(*library.predict(texts, k=-1), strict=True), first):
            found[row, [column[name] for name in names]] = values
    return found
