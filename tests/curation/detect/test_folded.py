"""Folded models against fastText itself: every loss, n-grams, subwords, quantised and pruned, on made and real text."""

import logging
import struct
from pathlib import Path
from typing import Any, NamedTuple

import fasttext
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.detect import FoldedFastText, features
from curation.detect.model_file import load, parse
from curation.errors import UserError

LABELS = ["tea", "robot", "weather", "sport", "music"]
KNOWN = [
    "robot",
    "tea",
    "Tea",
    "cake",
    "ünïcode",
    "的",
    "🤖",
    "</s>",
    "__label__tea",
    "__label__x",
    "__label__",
    "<",
    ">",
]
# Of 8, 9, 16, 17, 17 and 24 bytes, alike at both ends: what the keys of the dictionary tell apart.
LONG = [
    "abcdefgh",
    "abcdefghi",
    "abcdefghijklmnop",
    "abcdefghxijklmnop",
    "abcdefghyijklmnop",
    "abcdefgh12345678ijklmnop",
]
SEPARATORS = st.sampled_from([" ", "\n", "\t", "\v", "\f", "\r", "\0", "  ", "\u00a0"])
WORDS = st.one_of(
    st.sampled_from(KNOWN + LONG),
    st.tuples(st.sampled_from(LONG), st.integers(0, 23), st.sampled_from("az")).map(
        lambda t: t[0][: t[1]] + t[2] + t[0][t[1] + 1 :]
    ),
    st.integers(0, 400).map("word{}".format),
    st.text(max_size=12),
    st.integers(9, 3000).map(lambda n: "long🤖" * (n // 5)),
)
TEXTS = st.one_of(
    st.just(""),
    st.text(max_size=60),
    st.lists(st.tuples(WORDS, SEPARATORS), max_size=40).map(lambda pairs: "".join(w + s for w, s in pairs)),
    st.tuples(st.lists(WORDS, min_size=1, max_size=3), st.integers(1, 4000)).map(
        lambda t: " ".join(t[0] * t[1])[:20000]
    ),
)


class Case(NamedTuple):
    """How a model is trained, and how it is quantised if it is."""

    train: dict[str, Any]
    quantise: dict[str, Any] | None = None


SMALL = {"qnorm": False, "qout": False, "cutoff": 0, "retrain": False}
CASES = {
    "softmax": Case({"loss": "softmax"}),
    "softmax, bigrams": Case({"loss": "softmax", "wordNgrams": 2, "dim": 16}),
    "softmax, trigrams, subwords": Case({"loss": "softmax", "wordNgrams": 3, "minn": 2, "maxn": 4}),
    "softmax, subwords from one character": Case({"loss": "softmax", "minn": 0, "maxn": 2}),
    "ova": Case({"loss": "ova", "dim": 20}),
    "ova, bigrams, subwords": Case({"loss": "ova", "wordNgrams": 2, "minn": 3, "maxn": 6}),
    "ns, trigrams": Case({"loss": "ns", "wordNgrams": 3}),
    "hs, bigrams": Case({"loss": "hs", "wordNgrams": 2}),
    "no </s>": Case({"loss": "softmax", "wordNgrams": 2, "minCount": 1000}),
    "quantised": Case({"loss": "softmax", "wordNgrams": 2}, SMALL),
    "quantised, norms": Case({"loss": "softmax", "wordNgrams": 2, "dim": 7}, {**SMALL, "qnorm": True}),
    "pruned": Case({"loss": "softmax", "wordNgrams": 2, "minn": 2, "maxn": 3}, {**SMALL, "cutoff": 600, "qnorm": True}),
    "pruned, trained again": Case({"loss": "softmax", "wordNgrams": 3}, {**SMALL, "cutoff": 500, "retrain": True}),
    "pruned ova": Case({"loss": "ova", "wordNgrams": 2}, {**SMALL, "cutoff": 450}),
    "quantised output": Case({"loss": "softmax", "many": 300}, {**SMALL, "qout": True, "qnorm": True}),
    "quantised output, ova": Case({"loss": "ova", "many": 300, "dim": 9}, {**SMALL, "qout": True}),
    "quantised hs": Case({"loss": "hs", "wordNgrams": 2}, SMALL),
}


def write_lines(path: Path, num_labels: int) -> Path:
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for line in range(max(250, 2 * num_labels)):
            label = line % num_labels
            words = [f"word{(label * 37 + i) % 400}" for i in rng.integers(0, 60, 20)]
            common = [(KNOWN[:7] + LONG)[i] for i in rng.integers(0, 7 + len(LONG), 5)]
            file.write(f"__label__{LABELS[label] if label < 5 else label} {' '.join(words + common)}\n")
    return path


def make(case: Case, folder: Path) -> str:
    options = {"dim": 10, "bucket": 2000, "epoch": 8, "lr": 0.8, "minCount": 1, "thread": 1, "seed": 3, "verbose": 0}
    options |= case.train
    lines = write_lines(folder / "lines.txt", options.pop("many", len(LABELS)))
    model = fasttext.train_supervised(str(lines), **options)
    path = folder / ("model.ftz" if case.quantise else "model.bin")
    if case.quantise:
        model.quantize(str(lines), thread=1, epoch=2, verbose=0, **case.quantise)
    model.save_model(str(path))
    return str(path)


def reference(library: Any, labels: tuple[str, ...], texts: list[str]) -> np.ndarray:
    found = np.zeros((len(texts), len(labels)), np.float32)
    predicted = library.predict([text.replace("\n", " ") for text in texts], k=-1)
    for row, (names, values) in enumerate(zip(*predicted, strict=True)):
        found[row, [labels.index(name) for name in names]] = values
    return found


@pytest.fixture(scope="module", params=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[FoldedFastText, Any]:
    path = make(CASES[request.param], tmp_path_factory.mktemp("model"))
    return FoldedFastText.load(path), fasttext.load_model(path)


@pytest.fixture(scope="module")
def bigrams(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make(Case({"loss": "softmax", "wordNgrams": 2}), tmp_path_factory.mktemp("bigrams"))


def test_equal_to_fasttext(pair: tuple[FoldedFastText, Any]) -> None:
    ours, library = pair
    assert sorted(ours.labels) == sorted(library.get_labels())

    @given(texts=st.lists(TEXTS, min_size=1, max_size=8))
    @settings(max_examples=25, deadline=None)
    def holds(texts: list[str]) -> None:
        assert np.abs(ours.predict(pa.array(texts)) - reference(library, ours.labels, texts)).max() <= 1e-5

    holds()


@given(st.integers(2, 2**31), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(-1, 1))
def test_buckets_are_found_without_a_division(bucket: int, any_value: int, factor: int, off: int) -> None:
    magic, shift = map(int, features._inverse(bucket))
    for value in any_value, max(0, factor // bucket * bucket + off):
        high = value * magic >> 64
        assert ((value - high) // 2 + high) >> shift == value // bucket


def test_equal_where_rounding_adds_up(pair: tuple[FoldedFastText, Any]) -> None:
    ours, library = pair
    rng = np.random.default_rng(1)
    texts = [" ".join(f"word{i}" for i in rng.integers(0, most, n)) for most in (1, 2, 400) for n in (3000, 100_000)]
    assert np.abs(ours.predict(pa.array(texts)) - reference(library, ours.labels, texts)).max() <= 1e-5


def test_equal_next_to_the_steps_of_the_sigmoid(tmp_path: Path) -> None:
    path = make(Case({"loss": "ova", "wordNgrams": 2}), tmp_path)
    ours, library = FoldedFastText.load(path), fasttext.load_model(path)
    rng = np.random.default_rng(2)
    texts = [" ".join(f"word{i}" for i in rng.integers(0, 400, n)) for n in rng.integers(1, 300, 8000)]
    assert np.abs(ours.predict(pa.array(texts)) - reference(library, ours.labels, texts)).max() <= 1e-5


def test_equal_on_real_documents(bigrams: str, shared: Path) -> None:
    from curation.predict import texts as texts_of

    texts = list(texts_of([str(shared / "corpus/web.jsonl.zst"), str(shared / "corpus/alignment.jsonl.zst")]))
    ours, library = FoldedFastText.load(bigrams), fasttext.load_model(bigrams)
    found = ours.predict(pa.array(texts, pa.large_string()))
    assert len(texts) > 3000
    assert np.abs(found - reference(library, ours.labels, texts)).max() <= 1e-5


def test_what_ends_and_what_is_left_out_of_a_line(bigrams: str) -> None:
    model = FoldedFastText.load(bigrams)

    def same(one: str, other: str) -> bool:
        return bool((model.predict(pa.array([one])) == model.predict(pa.array([other]))).all())

    assert same("robot tea </s> cake", "robot tea")
    assert same("robot __label__zzz tea", "robot tea")
    assert same("robot __label__tea tea", "robot\ntea\0")
    assert not same("robot zzz tea", "robot tea")  # an unknown word still parts its neighbours
    assert not same("robot </S> tea", "robot")
    assert not same("robot\u00a0tea", "robot tea")  # no separator to fastText


def test_hierarchical_softmax_says_that_the_library_runs_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make(CASES["hs, bigrams"], tmp_path)
    with caplog.at_level(logging.WARNING):
        model = FoldedFastText.load(path)
    assert [record.getMessage().removeprefix(path) for record in caplog.records] == [
        " is a hierarchical softmax, which can't be folded: the fasttext library runs it"
    ]
    assert model.predict(pa.array(["robot", None])).shape == (2, 5)
    with pytest.raises(UserError, match="can't be explained"):
        model.explain("robot")


def test_array_forms(bigrams: str) -> None:
    model = FoldedFastText.load(bigrams)
    texts = ["robot tea", "", "的 🤖 cake", None, "word7 word8 " * 50]
    want = np.concatenate([model.predict(pa.array([text or ""])) for text in texts])
    want[3] = np.nan

    def gives(array: Any, rows: slice = slice(None)) -> bool:
        found = model.predict(array)
        return found.dtype == np.float32 and np.array_equal(found, want[rows], equal_nan=True)

    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        array = pa.array(texts, kind)
        assert gives(array)
        assert gives(array.slice(1, 3), slice(1, 4))
        assert gives(pa.chunked_array([array.slice(0, 2), array.slice(2, 0), array.slice(2)]))
    assert model.predict(pa.array([], pa.string())).shape == (0, 5)
    assert model.predict(pa.chunked_array([], pa.string())).shape == (0, 5)


@pytest.mark.parametrize(
    "array",
    [pa.array([b"tea"]), pa.array([1]), pa.array([None]), pa.array(["tea"]).dictionary_encode(), ["tea"], "tea", None],
)
def test_what_is_not_a_string_array(bigrams: str, array: Any) -> None:
    with pytest.raises(TypeError, match="texts must be an Arrow string array, not "):
        FoldedFastText.load(bigrams).predict(array)


def test_a_document_s_figures_do_not_depend_on_its_neighbours(bigrams: str) -> None:
    model = FoldedFastText.load(bigrams)
    texts = pa.array(["robot " * n for n in (0, 1, 5, 400_000, 3)])
    alone = np.concatenate([model.predict(texts.slice(i, 1)) for i in range(len(texts))])
    assert (model.predict(texts) == alone).all()


@pytest.mark.parametrize("name", ["softmax, bigrams", "softmax, trigrams, subwords", "ova", "pruned"])
def test_evidence_is_tokens_and_ngrams(name: str, tmp_path: Path) -> None:
    model = FoldedFastText.load(make(CASES[name], tmp_path))
    text = "Über word1 word2\nzzz 🤖 robot"
    probability = model.predict(pa.array([text]))[0].astype(np.float64) - 1e-5
    label = int(np.argmax(probability))
    spans = model.explain(text, limit=100)
    assert spans == model.explain(text, model.labels[label], limit=100)
    assert spans == sorted(spans, key=lambda s: (-s.contribution, s.start, s.end))
    assert {text[s.start : s.end] for s in spans} <= {
        *text.split(), "Über word1", "word1 word2", "word2\nzzz", "zzz 🤖", "🤖 robot",
        "Über word1 word2", "word1 word2\nzzz", "word2\nzzz 🤖", "zzz 🤖 robot",
    }  # fmt: skip
    assert all(s.contribution > 0 for s in spans)
    with pytest.raises(UserError, match="has no label nothing; it has __label__"):
        model.explain(text, "nothing")


def test_the_evidence_for_a_label_is_what_it_was_trained_on(tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("__label__tea a cup of tea please\n__label__robot a robot of steel\n" * 20, encoding="utf-8")
    trained = fasttext.train_supervised(str(lines), dim=4, epoch=30, lr=0.5, minCount=1, thread=1, verbose=0)
    trained.save_model(str(tmp_path / "model.bin"))
    model = FoldedFastText.load(str(tmp_path / "model.bin"))
    text = "🤖 of a robot and a cup"
    for label, evidence in (("__label__robot", "robot"), ("__label__tea", "cup")):
        first = model.explain(text, label)[0]
        assert text[first.start : first.end] == evidence


def message(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        FoldedFastText.load(str(path))
    assert str(path) in str(caught.value)
    return str(caught.value).replace(str(path), "MODEL")


def test_files_that_are_not_a_model(tmp_path: Path, bigrams: str) -> None:
    broken, raw = tmp_path / "broken.bin", Path(bigrams).read_bytes()
    assert message(tmp_path / "absent.bin").startswith("there is no model file MODEL")
    assert message(tmp_path).startswith("there is no model file MODEL")
    for other in (b"", b"abc", b"__label__tea a text, no model\n"):
        broken.write_bytes(other)
        assert message(broken).startswith("MODEL is not a fastText model file")
    broken.write_bytes(raw[:4] + struct.pack("<i", 13) + raw[8:])
    assert message(broken).startswith("MODEL has version 13 of fastText's format")
    lines = write_lines(tmp_path / "lines.txt", 5)
    for kind in ("cbow", "skipgram"):
        fasttext.train_unsupervised(str(lines), kind, dim=4, bucket=100, epoch=1, thread=1, verbose=0).save_model(
            str(broken)
        )
        assert message(broken) == "MODEL is a model of word vectors (cbow or skipgram): train a supervised one"


def test_version_11_has_no_subwords(tmp_path: Path) -> None:
    path = Path(make(CASES["ova, bigrams, subwords"], tmp_path))
    raw = path.read_bytes()
    path.write_bytes(raw[:4] + struct.pack("<i", 11) + raw[8:])
    ours, library, texts = FoldedFastText.load(str(path)), fasttext.load_model(str(path)), ["robot wordy", "tea " * 30]
    assert np.abs(ours.predict(pa.array(texts)) - reference(library, ours.labels, texts)).max() <= 1e-5


@pytest.mark.parametrize("name", ["softmax, bigrams", "pruned", "quantised output"])
def test_a_file_that_is_cut_off_or_changed_is_an_error_or_a_model(name: str, tmp_path: Path) -> None:
    raw = np.frombuffer(Path(make(CASES[name], tmp_path)).read_bytes(), np.uint8)
    texts = pa.array(["robot tea word1", ""])

    @given(end=st.one_of(st.integers(0, 300), st.integers(0, len(raw) - 1)))
    @settings(max_examples=40, deadline=None)
    def cut_off(end: int) -> None:
        with pytest.raises(UserError, match=r"^cut is (cut off|not a)"):
            parse(raw[:end], "cut")

    @given(at=st.integers(8, 120), value=st.integers(0, 255))
    @settings(max_examples=60, deadline=None)
    def changed(at: int, value: int) -> None:
        other = raw.copy()
        other[at] = value
        try:
            model = parse(other, "changed")
        except UserError as error:
            assert str(error).startswith("changed ")  # noqa: PT017 - a changed byte may still be a model
            return
        if model.loss != "hs":
            assert FoldedFastText(model).predict(texts).shape == (2, len(model.labels))

    cut_off()
    changed()


def test_numbers_that_are_not_finite(tmp_path: Path, bigrams: str) -> None:
    model, broken = load(bigrams), bytearray(Path(bigrams).read_bytes())
    broken[-4:] = struct.pack("<f", np.nan)  # the last number of the output matrix
    (tmp_path / "broken.bin").write_bytes(broken)
    assert message(tmp_path / "broken.bin").startswith("MODEL holds numbers that are not finite")
    assert model.output.shape == (5, 10)
