"""Labelled text -> a fastText model of the five stances, and its card with held-out figures.

Documents that share text (any common MinHash of word-5 shingles, or equal text) form a group; a
fifth of the groups of each stance, by a hash of (seed, text), is held out, so no near-duplicate
is on both sides. The figures come from a model of the rest; the model that is written is trained
on everything, with the same settings. Lines made from the rows (see `augment`) are made after the
split, from the rows of one side. Each document is one line whatever its length: label passages
rather than whole books.

A model is the mean of MEMBERS fastText models, which is one fastText model again since they are
linear. For the default rows a single one's held-out F1 was 0.76-0.80 over five seeds, the mean of
five 0.79-0.80 over three. One thread and seeds: the same input gives the same bytes.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import xxhash
from scipy.linalg import helmert

from curation import storage
from curation.detect import metrics
from curation.detect.augment import augmented
from curation.detect.fasttext import LABELS, WINDOW_WORDS, Detector, fold_stances
from curation.detect.normalise import NORMALISATION, normalise_text
from curation.errors import UserError
from curation.records import read_records, text_of
from curation.rng import key64
from curation.schema import STANCES

HELD_OUT = 0.2
MEMBERS = 5
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
CARD_VERSION = 1
_SHINGLE_WORDS, _NUM_HASHES = 5, 16  # two documents with Jaccard 0.3 share one of 16 MinHashes at p = 0.997


@dataclass(frozen=True)
class Settings:
    """fastText's hyperparameters. Tried one at a time, by AUC with one kind of text left out: lr 0.5
    0.824, 0.2 0.792; epoch 30 0.824, 10 0.767 (rows alone); epoch 15 0.882, 40 0.886 (with halves and
    mixtures); dim 8 0.824, 16 0.828; word vectors trained beforehand 0.80 or less against 0.836. dim
    and bucket share a file of 2 MB: with single models the differences were no larger than the seed's."""

    dim: int = len(STANCES) - 1  # the rank of a softmax over as many classes
    epoch: int = 15
    lr: float = 0.5
    wordNgrams: int = 2
    minCount: int = 5
    bucket: int = 50_000


@dataclass(frozen=True, eq=False)
class Labelled:
    """Training rows: normalised text and class index into STANCES, and whether the row is of the files or a `more`."""

    lines: list[str]
    classes: np.ndarray  # int64[n]
    more: np.ndarray  # bool[n]

    def take(self, keep: np.ndarray) -> "Labelled":
        return Labelled([self.lines[i] for i in np.flatnonzero(keep)], self.classes[keep], self.more[keep])


class Row(NamedTuple):
    """A labelled text that is in no file."""

    text: str
    stance: str


def train(
    labelled: Sequence[str], out: str, seed: int = 0, *, more: Sequence[Row] = (), before: Detector | None = None
) -> dict[str, Any]:
    """Train on JSON-lines files whose records have `text` and `stance` (or `label`) and on `more`, write the model
    to `out` (a name ending in .bin) and its card beside it (.json), and return the card. With `before`, the card has
    its figures too, on the held-out rows of `more`, under "gain". Raises UserError for bad records, or when one of
    the five stances is missing."""
    if not out.endswith(".bin"):
        raise UserError(f"the model's name must end with .bin, not {out}")
    data = read_labelled(labelled, more)
    held_out = split(data, seed)
    measured = Detector(fold_stances(_model_bytes(_fit(data.take(~held_out), seed)), "the model"), "")
    report = held_out_report(measured, data.take(held_out))
    committed = storage.commit_bytes(out, _model_bytes(_fit(data, seed)))
    Detector.forget()
    card = {
        "card_version": CARD_VERSION,
        "sha256": committed.sha256,
        "labels": list(STANCES),
        "normalisation": NORMALISATION,
        "window_words": WINDOW_WORDS,
        "seed": seed,
        "settings": asdict(Settings()),
        "documents": _counts(data),
        "held_out": report,
        **({"gain": gain(before, measured, data.take(held_out & data.more), seed)} if before else {}),
    }
    storage.commit_bytes(out.removesuffix(".bin") + ".json", orjson.dumps(card, option=orjson.OPT_INDENT_2) + b"\n")
    return card


def read_labelled(paths: Sequence[str], more: Sequence[Row] = ()) -> Labelled:
    """The records of all files, then `more`, equal texts once (the first), in an order that is a hash of the text."""
    classes: dict[str, int] = {}
    for path in paths:
        for place, record in read_records(path):
            stance = record.get("stance", record.get("label"))
            if stance not in STANCES:
                raise UserError(f"{place} has the stance {stance!r}; known are {', '.join(STANCES)}")
            line = _line(text_of(record, "text", place))
            if classes.setdefault(line, STANCES.index(stance)) != STANCES.index(stance):
                raise UserError(f"{place} has the text of an earlier record with another stance: keep one of them")
    in_files = set(classes)
    for row in more:
        classes.setdefault(_line(row.text), STANCES.index(row.stance))
    lines = sorted(classes, key=lambda line: (key64("train order", line), line))
    missing = [s for c, s in enumerate(STANCES) if c not in classes.values()]
    if missing:
        raise UserError(f"no record has the stance {' or '.join(missing)}: a detector needs examples of all five")
    return Labelled(
        lines, np.array([classes[line] for line in lines]), np.array([line not in in_files for line in lines])
    )


def split(data: Labelled, seed: int) -> np.ndarray:
    """bool[n]: held out. A fifth of the groups of each stance (of the group's first document)."""
    group = near_duplicate_groups(data.lines)
    _, first = np.unique(group, return_index=True)  # groups are numbered by their first document
    keys = np.array([key64(seed, "held out", data.lines[i]) for i in first], dtype=np.uint64)
    chosen = np.zeros(len(first), dtype=bool)
    for stance in range(len(STANCES)):
        of_stance = np.flatnonzero(data.classes[first] == stance)
        chosen[of_stance[np.argsort(keys[of_stance])][: round(HELD_OUT * len(of_stance))]] = True
    return chosen[group]


def near_duplicate_groups(lines: list[str]) -> np.ndarray:
    """int64[n]: a number shared by lines that are linked by common MinHashes, by order of first line."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    signatures = np.array([_min_hashes(line) for line in lines], dtype=np.uint64)
    _, nodes = np.unique(signatures.ravel(), return_inverse=True)
    documents = np.repeat(np.arange(len(lines)), _NUM_HASHES)
    num_nodes = len(lines) + nodes.max() + 1
    edges = coo_array((np.ones(len(nodes), np.int8), (documents, len(lines) + nodes)), (num_nodes, num_nodes))
    component = connected_components(edges, directed=False)[1][: len(lines)]
    _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def held_out_report(detector: Detector, data: Labelled) -> dict[str, Any]:
    """Figures of `detector` on documents that it never saw, for discourse and for each stance."""
    probability = detector.predict(pa.array(data.lines, pa.large_string()))
    discourse, p_discourse = data.classes != 0, 1 - probability[:, 0]
    error, bins = metrics.calibration_error(discourse, p_discourse)
    decided = probability.argmax(axis=1)
    return {
        "documents": _counts(data),
        "discourse": {
            **_figures(discourse, p_discourse >= 0.5),
            "accuracy": metrics.accuracy(discourse, p_discourse >= 0.5),
        },
        "calibration_error": error,
        "calibration_bins": bins,
        "thresholds": [{"threshold": t, **_figures(discourse, p_discourse >= t)} for t in THRESHOLDS],
        "stances": {s: _figures(data.classes == c, decided == c) for c, s in enumerate(STANCES)},
        "stance_accuracy": metrics.accuracy(data.classes, decided),
    }


def gain(before: Detector, after: Detector, data: Labelled, seed: int) -> dict[str, Any]:
    """Figures of both detectors on rows that `after` was not trained on: F1 of discourse (p >= 0.5) and macro-F1 of
    the most probable stance, over those that occur, and the difference with its 95 % interval (paired percentile
    bootstrap over rows)."""
    if not len(data.lines):
        return {"documents": 0}
    texts = pa.array(data.lines, pa.large_string())
    probabilities = [detector.predict(texts) for detector in (before, after)]
    decisions = {
        "discourse_f1": (metrics.f1, data.classes != 0, [1 - p[:, 0] >= 0.5 for p in probabilities]),
        "macro_f1": (_macro_f1, data.classes, [p.argmax(axis=1) for p in probabilities]),
    }
    found: dict[str, Any] = {"documents": len(data.lines)}
    for name, (figure, truth, decided) in decisions.items():

        def difference(truth: np.ndarray, pair: np.ndarray, figure: Any = figure) -> float:
            return float(figure(truth, pair[:, 1]) - figure(truth, pair[:, 0]))

        interval = metrics.bootstrap(difference, truth, np.stack(decided, axis=1), seed)
        one, other = (figure(truth, row) for row in decided)
        found[name] = {"before": one, "after": other, **interval._asdict()}
    return found


def _macro_f1(truth: np.ndarray, decided: np.ndarray) -> float:
    occurs = np.union1d(truth, decided)
    return float(np.mean([metrics.f1(truth == c, decided == c) for c in occurs]))


def _figures(truth: np.ndarray, decided: np.ndarray) -> dict[str, float]:
    return {
        "precision": metrics.precision(truth, decided),
        "recall": metrics.recall(truth, decided),
        "f1": metrics.f1(truth, decided),
    }


def _counts(data: Labelled) -> dict[str, int]:
    return {stance: int((data.classes == c).sum()) for c, stance in enumerate(STANCES)}


def _line(text: str) -> str:
    return " ".join(normalise_text(text).decode().split())


def _min_hashes(line: str) -> list[int]:
    words = line.split()
    shingles = {
        " ".join(words[i : i + _SHINGLE_WORDS]).encode() for i in range(max(1, len(words) - _SHINGLE_WORDS + 1))
    }
    return [min(xxhash.xxh3_64_intdigest(s, seed=k) for s in shingles) for k in range(_NUM_HASHES)]


def _fit(data: Labelled, seed: int) -> Any:
    """One fasttext model whose logits are the mean of MEMBERS models that differ in seed and order of lines."""
    rows = augmented(data.lines, data.classes.tolist())
    members = [_fit_one(rows, key64(seed, "member", k) % 2**31) for k in range(MEMBERS)]
    first, labels = members[0], members[0].get_labels()
    words = first.get_words()
    logits_FC = sum(_logits(model, words, labels) for model in members) / MEMBERS
    # A softmax ignores what all classes share: logits without it lose nothing and fit in dim = classes - 1.
    basis_CD = np.ascontiguousarray(helmert(len(labels)).T, dtype=np.float32)  # set_matrices ignores strides
    first.set_matrices(np.einsum("fc,cd->fd", logits_FC, basis_CD).astype(np.float32), basis_CD)
    return first


def _fit_one(rows: list[tuple[str, int]], seed: int) -> Any:
    import fasttext

    rows = sorted(rows, key=lambda row: (key64(seed, "line order", *row), row))  # SGD sees the rows in this order
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.writelines(f"{LABELS[c]} {line}\n" for line, c in rows)
        file.flush()
        return fasttext.train_supervised(file.name, thread=1, seed=seed, verbose=0, **asdict(Settings()))


def _logits(model: Any, words: list[str], labels: list[str]) -> np.ndarray:
    """float[features, classes] of one member, features and classes in the order of `words` and `labels`:
    fastText numbers equally frequent words by order of appearance."""
    number = {word: i for i, word in enumerate(model.get_words())}
    order = [*(number[word] for word in words), *range(len(words), len(words) + Settings().bucket)]
    columns = [model.get_labels().index(label) for label in labels]
    # einsum, not BLAS, whose last bits depend on the machine
    return np.einsum("fd,cd->fc", model.get_input_matrix()[order], model.get_output_matrix()[columns])


def _model_bytes(model: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.bin"
        model.save_model(str(path))
        return path.read_bytes()
