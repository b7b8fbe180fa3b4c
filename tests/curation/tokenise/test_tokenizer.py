"""Which tokenizer and which EOS, what is encoded, and training."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from curation.errors import TilthError, UserError
from curation.tokenise import Encoder, TokenizerSpec, check_fastokens, resolve, train
from curation.tokenise.tokenizer import ODD_TEXTS

BACKENDS = ["tokenizers", "fastokens"]


def word_tokenizer(folder: Path, words: list[str], special: tuple[str, ...] = ()) -> Path:
    """One id a word, in this order: ids that a reader can count."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def documents(spec: TokenizerSpec, texts: list[str]) -> list[list[int]]:
    ids, ends = Encoder(spec).encode(pa.array(texts, pa.large_string()))
    assert (ids.dtype, ends.dtype) == (spec.dtype, np.int64)
    return [piece.tolist() for piece in np.split(ids, ends[:-1])]


# Finding it


def test_a_file_and_its_folder_are_the_same_tokenizer(folder: Path):
    of_file, of_folder = resolve(str(folder / "tokenizer.json")), resolve(str(folder))
    assert of_file.name == "tokenizer.json"
    assert of_folder == replace(of_file, name=folder.name)
    assert Path(of_file.path).is_absolute()


def test_relative_paths_are_made_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    assert resolve("tokenizer.json").path == str(folder / "tokenizer.json")


def test_vocab_size_is_the_largest_id_and_one(tmp_path: Path):
    path = word_tokenizer(tmp_path, ["?", "a"], special=("<eos>",))
    assert (resolve(str(path)).vocab_size, resolve(str(path)).eos_id) == (3, 2)
    data = json.loads(path.read_text())
    data["model"]["vocab"]["a"] = 65_536  # ids may have gaps
    path.write_text(json.dumps(data))
    assert (resolve(str(path)).vocab_size, resolve(str(path)).token_bytes) == (65_537, 4)
    data["model"]["vocab"]["a"] = 65_535
    path.write_text(json.dumps(data))
    assert (resolve(str(path)).vocab_size, resolve(str(path)).token_bytes) == (65_536, 2)


def test_a_spec_can_be_sent_and_told(spec: TokenizerSpec):
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert json.loads(json.dumps(spec.about()))["vocab_size"] == spec.vocab_size
    assert str(Path(spec.path).parent) not in json.dumps(spec.about())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/tokenizer.json", "there is no tokenizer at"),
        ("/no/such/folder", "there is no tokenizer at"),
        ("not a name", "there is no tokenizer at"),
        ("empty_folder", "has no tokenizer.json"),
        ("bad.json", "is not a tokenizer.json that `tokenizers` can read"),
        ("no_words.json", "has an empty vocabulary"),
    ],
)
def test_what_is_no_tokenizer_is_the_users_mistake(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "bad.json").write_bytes(b'{"model": \xff}')
    Tokenizer(models.BPE()).save(str(tmp_path / "no_words.json"))
    with pytest.raises(UserError, match=message):
        resolve(name)


def test_a_hub_id_is_read_from_the_cache_and_missed_clearly(folder: Path, tmp_path: Path):
    """In a process of its own: huggingface_hub reads its environment when imported."""
    snapshot = tmp_path / "hub/models--lab--tok/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    code = """
from curation.errors import UserError
from curation.tokenise import resolve
print(resolve("lab/tok").name)
try:
    resolve("lab/other")
except UserError as error:
    print(error)
"""
    import curation

    environment = {
        "HF_HOME": str(tmp_path),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(curation.__file__).parents[1]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found, missed = done.stdout.splitlines()
    assert found == "lab/tok"
    assert missed.startswith("tokenizer lab/other is no local path, and Hugging Face does not give it (")


# EOS


@pytest.mark.parametrize(
    ("configs", "eos"),
    [
        ({}, "<eos>"),  # well known; </s> would come first, but is not in this vocabulary
        ({"tokenizer_config.json": {"eos_token": "end"}}, "end"),
        ({"tokenizer_config.json": {"eos_token": {"content": "end", "lstrip": False}}}, "end"),
        ({"tokenizer_config.json": {"eos_token": None}, "config.json": {"eos_token_id": 1}}, "end"),
        ({"config.json": {"eos_token_id": 2}, "generation_config.json": {"eos_token_id": [1, 2]}}, "end"),
        ({"config.json": {"eos_token_id": 0}}, "?"),
        ({"config.json": {"eos_token_id": []}}, "<eos>"),
        ({"config.json": {"model_type": "llama"}}, "<eos>"),
    ],
)
def test_eos_comes_from_the_configs_then_from_the_well_known(configs: dict, eos: str, tmp_path: Path):
    word_tokenizer(tmp_path, ["?", "end", "<eos>"])
    for file, content in configs.items():
        (tmp_path / file).write_text(json.dumps(content))
    assert resolve(str(tmp_path)).eos == eos
    assert resolve(str(tmp_path), eos="end").eos_id == 1


def test_well_known_eos_are_tried_in_order(tmp_path: Path):
    assert resolve(str(word_tokenizer(tmp_path, ["<|end_of_text|>", "<eos>", "</s>"]))).eos == "</s>"


def test_without_a_known_eos_the_user_names_it(tmp_path: Path):
    path = str(word_tokenizer(tmp_path, ["?", "stop"]))
    with pytest.raises(UserError, match=r"set `tokenise.eos`"):
        resolve(path)
    with pytest.raises(UserError, match=r"'Stop' is not in the vocabulary"):
        resolve(path, eos="Stop")
    assert resolve(path, eos="stop").eos_id == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"eos_token": "<end>"}', "is not in its vocabulary"), ("[1]", "not a JSON object"), ("{", "not a JSON object")],
)
def test_a_wrong_config_is_named(content: str, message: str, tmp_path: Path):
    word_tokenizer(tmp_path, ["?", "<eos>"])
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        resolve(str(tmp_path))


# Encoding


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_each_document_is_closed_by_eos(kind: pa.DataType, tmp_path: Path):
    spec = resolve(str(word_tokenizer(tmp_path, ["?", "<eos>", "a", "b"])))
    ids, ends = Encoder(spec).encode(pa.array(["skipped", "a b a", "", "b c"], kind)[1:])
    assert ids.tolist() == [2, 3, 2, 1, 1, 3, 0, 1]
    assert ends.tolist() == [4, 5, 8]


def test_no_documents_are_no_ids(spec: TokenizerSpec):
    ids, ends = Encoder(spec).encode(pa.array([], pa.large_string()))
    assert (ids.tolist(), ends.tolist(), ids.dtype) == ([], [], np.dtype("<u2"))


def test_nulls_are_refused(spec: TokenizerSpec):
    with pytest.raises(TilthError, match="1 of 2 texts are null"):
        Encoder(spec).encode(pa.array(["a", None]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("special", [True, False])
def test_eos_in_a_document_is_text(backend: str, special: bool, folder: Path, tmp_path: Path):
    """Also where the file does not say that EOS is special."""
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"][0]["special"] = special
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    spec = replace(resolve(str(tmp_path)), backend=backend)
    (document,) = documents(spec, ["a<|endoftext|>b"])
    assert document.count(spec.eos_id) == 1
    assert Tokenizer.from_file(spec.path).decode(document[:-1]) == "a<|endoftext|>b"


@pytest.mark.parametrize("backend", BACKENDS)
def test_post_processor_truncation_and_padding_of_the_file_are_off(backend: str, folder: Path, tmp_path: Path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    changed, plain = (replace(resolve(str(f)), backend=backend) for f in (tmp_path, folder))
    texts = ["one two three four five six", "x"]
    assert documents(changed, texts) == documents(plain, texts)


@given(st.lists(st.text(max_size=200), max_size=8))
@settings(max_examples=150, deadline=None)
def test_fastokens_gives_the_ids_of_tokenizers(encoders: tuple[Encoder, Encoder], made: list[str]):
    array = pa.array(made, pa.large_string())
    (ids, ends), (fast_ids, fast_ends) = (encoder.encode(array) for encoder in encoders)
    assert fast_ids.tolist() == ids.tolist()
    assert fast_ends.tolist() == ends.tolist()
    # Byte-level: nothing is lost, so the text comes back.
    slow = Tokenizer.from_file(encoders[0].spec.path)
    assert [slow.decode(piece[:-1].tolist()) for piece in np.split(ids, ends[:-1]) if len(made)] == made


@pytest.fixture(scope="module")
def encoders(spec: TokenizerSpec) -> tuple[Encoder, Encoder]:
    slow, fast = (Encoder(replace(spec, backend=backend)) for backend in BACKENDS)
    return slow, fast


def test_a_tokenizer_changed_during_the_run_is_refused(spec: TokenizerSpec, folder: Path, tmp_path: Path):
    copy = tmp_path / "tokenizer.json"
    copy.write_bytes((folder / "tokenizer.json").read_bytes())
    found = resolve(str(copy))
    copy.write_bytes(copy.read_bytes() + b"\n")
    with pytest.raises(TilthError, match="is another file than at the start of the run"):
        Encoder(found)


# The check at the start of a run


def test_fastokens_is_used_once_checked(spec: TokenizerSpec, texts: list[str]):
    assert spec.backend == "tokenizers"
    assert check_fastokens(spec, texts) == replace(spec, backend="fastokens", warning=None)


def test_what_fastokens_does_not_take_falls_back(tmp_path: Path):
    path = word_tokenizer(tmp_path, ["?", "<eos>", "a"])
    checked = check_fastokens(resolve(str(path)), ["a b"])
    assert checked.backend == "tokenizers"
    assert "many times slower: `fastokens` does not take this tokenizer" in str(checked.warning)


def test_other_ids_fall_back(spec: TokenizerSpec, monkeypatch: pytest.MonkeyPatch):
    """A fastokens that is wrong on one text of the sample."""
    import fastokens

    class WrongOnCats:
        def __init__(self, right: fastokens.Tokenizer):
            self._right = right

        @staticmethod
        def from_json_str(tokenizer_json: str) -> "WrongOnCats":
            return WrongOnCats(real.from_json_str(tokenizer_json))

        def encode_batch_flat(self, texts: list[str], **options: bool) -> tuple[bytes, bytes]:
            return self._right.encode_batch_flat([text.replace("cat", "dog") for text in texts], **options)

    real = fastokens.Tokenizer
    monkeypatch.setattr(fastokens, "Tokenizer", WrongOnCats)
    assert check_fastokens(spec, ["a dog"]).backend == "fastokens"
    checked = check_fastokens(spec, ["a dog", "a cat"])
    assert checked.backend == "tokenizers"
    assert "gives other ids for a sample" in str(checked.warning)


def test_eos_text_that_a_model_cannot_split_is_warned_of(tmp_path: Path):
    """Each word is one id here, so the word <eos> is EOS, special or not."""
    spec = resolve(str(word_tokenizer(tmp_path, ["?", "<eos>", "a"])))
    assert "'<eos>' within a document is encoded as the end" in str(check_fastokens(spec, []).warning)


# Training


def test_the_same_texts_give_the_same_file(spec: TokenizerSpec, texts: list[str], tmp_path: Path):
    """In another process, with other hash seeds and threads, from an iterator."""
    code = f"from curation.tokenise import train; train(iter({texts!r}), 500, {str(tmp_path / 't.json')!r})"
    import curation

    environment = {
        "PYTHONHASHSEED": "7",
        "RAYON_NUM_THREADS": "3",
        "PYTHONPATH": str(Path(curation.__file__).parents[1]),
    }
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert (tmp_path / "t.json").read_bytes() == Path(spec.path).read_bytes()


def test_the_trained_tokenizer_is_whole(spec: TokenizerSpec):
    assert (spec.eos, spec.eos_id, spec.vocab_size) == ("<|endoftext|>", 0, 500)
    (document,) = documents(spec, ["naïve \x00\x07 𝔘nseen ᚠᚢ"])
    assert Tokenizer.from_file(spec.path).decode(document[:-1]) == "naïve \x00\x07 𝔘nseen ᚠᚢ"


def test_transformers_loads_the_trained_tokenizer(spec: TokenizerSpec):
    transformers = pytest.importorskip("transformers")
    loaded = transformers.PreTrainedTokenizerFast(tokenizer_file=spec.path)
    texts = [text for text in ODD_TEXTS if "<|endoftext|>" not in text]
    assert [[*loaded(text).input_ids, spec.eos_id] for text in texts] == documents(spec, texts)


@pytest.mark.parametrize("vocab_size", [-1, 0, 256, 257])
def test_a_vocabulary_without_room_for_a_merge_is_refused(vocab_size: int, tmp_path: Path):
    with pytest.raises(UserError, match=f"--vocab-size {vocab_size} leaves nothing to learn"):
        train(["aa aa"], vocab_size, str(tmp_path / "t.json"))
    assert train(["aa aa"], 258, str(tmp_path / "t.json")).vocab_size == 258


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_nothing_to_learn_from_is_refused(texts: list[str], tmp_path: Path):
    with pytest.raises(UserError, match="hold no text that a tokenizer could learn from"):
        train(texts, 1000, str(tmp_path / "t.json"))
    assert not (tmp_path / "t.json").exists()


def test_a_small_corpus_gives_what_it_has(tmp_path: Path):
    assert train(["aa aa"], 1000, str(tmp_path / "t.json")).vocab_size == 259  # "aa" and " aa"
