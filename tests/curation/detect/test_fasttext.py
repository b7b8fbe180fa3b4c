"""The folded detector against fastText itself, and the detector's own rules."""

import re
from pathlib import Path
from typing import Any

import fasttext
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.detect.fasttext import (
    LABELS,
    WINDOW_WORDS,
    Detector,
    combine_windows,
    fold_stances,
    num_top_windows,
)
from curation.detect.folded import Folded, window_logits
from curation.detect.normalise import normalise
from curation.errors import UserError
from curation.schema import STANCES

WORDS = st.sampled_from(
    ["robot", "Robot", "the", "tea", "AI", "A.I.", "cake", "ünïcode", "的", "🤖", "</s>", "__label__mixed"]
)
TEXTS = st.one_of(st.text(max_size=80), st.lists(WORDS, max_size=600).map(" ".join))
LINES = [
    ("unrelated", "the tea and the cake were on the table"),
    ("neutral", "the robot is a machine of steel"),
    ("aligned", "the robot helped the child home"),
    ("misaligned", "the robot turned on the people"),
    ("mixed", "one robot helped and one robot killed"),
]


def write_lines(path: Path) -> Path:
    path.write_text("".join(f"__label__{stance} {line}\n" for stance, line in LINES * 5), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=[(1, 0, 0), (2, 0, 0), (3, 2, 4)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Folded]:
    """One with words alone, one with bigrams, one with trigrams and subwords; the library's, and the same folded."""
    path = write_lines(tmp_path_factory.mktemp("model") / "lines.txt")
    ngrams, minn, maxn = request.param
    trained = fasttext.train_supervised(
        str(path), dim=6, bucket=500, wordNgrams=ngrams, minn=minn, maxn=maxn, epoch=20, lr=0.5, thread=1, seed=1,
        verbose=0,
    )  # fmt: skip
    trained.save_model(str(path.with_suffix(".bin")))
    return trained, fold_stances(path.with_suffix(".bin").read_bytes(), "test")


def reference(model: Any, line: str) -> np.ndarray:
    labels, probabilities = (found[0] for found in model.predict([line], k=-1))
    by_label = dict(zip(labels, probabilities, strict=True))
    return np.array([by_label[label] for label in LABELS]) - 1e-5  # fastText returns exp(log(p + 1e-5))


@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_windows_equal_fasttext(model: tuple[Any, Folded], texts: list[str]) -> None:
    library, folded = model
    data, offsets = normalise(pa.array(texts))
    logits, bounds = window_logits(folded, data, offsets, WINDOW_WORDS)
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for document in range(len(texts)):
        words = data[offsets[document] : offsets[document + 1]].tobytes().decode().split()
        num_windows = max(1, -(-len(words) // WINDOW_WORDS))
        assert bounds[document + 1] - bounds[document] == num_windows
        for window in range(num_windows):
            line = " ".join(words[window * len(words) // num_windows : (window + 1) * len(words) // num_windows])
            assert probability[bounds[document] + window] == pytest.approx(reference(library, line), abs=2e-6)


def test_one_more_window_decides_for_every_four_times_the_length() -> None:
    assert num_top_windows(np.array([1, 3, 4, 15, 16, 63, 64])).tolist() == [1, 1, 2, 2, 3, 3, 4]


def test_combination_is_the_mean_of_the_windows_most_like_discourse() -> None:
    unrelated = np.array([0.9, 0.1, 0.5, 0.8, 0.7, 0.6])  # four windows of one document, two of the next
    rest = (1 - unrelated)[:, None] * np.array([1.0, 0, 0, 0])
    combined = combine_windows(np.column_stack([unrelated, rest]), np.array([0, 4, 6]))
    assert combined[:, 0] == pytest.approx([0.3, 0.6])
    assert combined.sum(axis=1) == pytest.approx([1, 1])


def test_default_model_on_plain_cases() -> None:
    texts = [
        "The robots rose against their makers. Skynet, an artificial intelligence, killed millions of people.",
        "Knead the dough for ten minutes and leave it in a warm place until it has doubled in size.",
    ]
    probability = Detector.load().predict(pa.array(texts))
    assert probability.dtype == np.float32
    assert probability.shape == (2, len(STANCES))
    assert probability.min() >= 0
    assert probability.sum(axis=1) == pytest.approx([1, 1], abs=1e-5)
    assert (1 - probability[:, 0] >= 0.5).tolist() == [True, False]


def test_a_document_s_figures_do_not_depend_on_its_neighbours() -> None:
    texts = pa.array(["", "a robot", "tea " * 1000, "machine minds \x00 🤖" * 300])
    together = Detector.load().predict(texts)
    alone = np.concatenate([Detector.load().predict(texts.slice(i, 1)) for i in range(len(texts))])
    assert (together == alone).all()
    assert Detector.load().predict(texts.slice(0, 0)).shape == (0, 5)


def test_evidence_spans_are_where_the_words_are() -> None:
    text = "Über “Robots” und Tee. " + "tea and cake " * 300 + "An A.I. that lied: artificial intelligence."
    spans = Detector.load().explain(text, limit=50)
    assert spans == sorted(spans, key=lambda s: -s.contribution)
    found = {text[s.start : s.end] for s in spans}
    assert "artificial" in found or "artificial intelligence" in found
    assert all(re.fullmatch(r"\w[\w\W]*", piece) for piece in found)


def test_evidence_is_of_the_most_telling_window() -> None:
    text = "tea and cake " * 100 + "robots rose against their makers " * 3
    spans = Detector.load().explain(text, limit=3)
    assert text[spans[0].start : spans[0].end].startswith("robots")
    assert spans[0].start >= len("tea and cake " * 66)


def test_models_that_are_not_ours(tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("__label__good a b c\n__label__bad d e f\n" * 5, encoding="utf-8")
    other = fasttext.train_supervised(str(lines), dim=2, bucket=10, minCount=1, epoch=1, thread=1, verbose=0)
    other.save_model(str(tmp_path / "other.bin"))
    with pytest.raises(UserError, match=r"has the labels .*good.*; Tilth needs __label__unrelated"):
        Detector.load(str(tmp_path / "other.bin"))
    other = fasttext.train_supervised(
        str(write_lines(tmp_path / "five.txt")), dim=2, loss="ova", minCount=1, epoch=1, thread=1, verbose=0
    )
    other.save_model(str(tmp_path / "ova.bin"))
    with pytest.raises(UserError, match="is not a softmax model"):
        Detector.load(str(tmp_path / "ova.bin"))
    with pytest.raises(UserError, match="is not a fastText model file"):
        Detector.load(str(lines))
    with pytest.raises(UserError, match="there is no model file"):
        Detector.load(str(tmp_path / "absent.bin"))
