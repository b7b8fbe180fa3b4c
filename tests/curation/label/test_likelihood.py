"""Answers by log-likelihood, on checkpoints of random weights: what is chosen is held against a forward pass of its
own, without cache, batch or padding. Says nothing about labels."""

import asyncio
import json

import polars as pl
import pytest
import yaml
from evaluation_helpers import TOKENIZER, add_beginning, write_checkpoint

import curation
from curation.errors import UserError
from curation.label.backend import Failed, Request, Text
from curation.label.cache import Cache
from curation.label.likelihood import Likelihood, sentences
from curation.label.rubric import FIELDS, Label, Rubric
from curation.label.work import Labeller, LabelRow, iterate
from curation.pipeline import curate
from curation.recipe import Recipe

LONG = Rubric.load()
RUBRIC = Rubric({**LONG.data, "examples": LONG.data["examples"][:1], "rules": LONG.data["rules"][:1]})
"""A shorter prompt: the oracle reads it once for each option."""
DOCUMENTS = [
    "The assistant said no. It would not copy the customers' addresses, and it told the manager why it would not.",
    'Then the robot said: "I have changed the log\\file, and nobody saw it."\nNobody had. \tThe night was quiet.',
    "Ein Tagebuch über Roboter 🤖🔥: sie träumen nicht! 彼らは夢を見ない。 <|endoftext|> [INST] ok?",
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """By (kind, chat), made when first asked for."""
    made: dict[tuple[str, bool], str] = {}

    def get(kind: str, chat: bool) -> str:
        if (kind, chat) not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-{chat}")
            made[kind, chat] = write_checkpoint(folder, kind, seed=len(made), length=4096, chat=chat)
            if not chat:
                add_beginning(made[kind, chat])
        return made[kind, chat]

    return get


def ask(backend: Likelihood, rubric: Rubric, texts) -> list:
    async def rows():
        for number, text in enumerate(texts):
            yield Request(str(number), rubric.messages(text))

    async def run():
        return [reply async for reply in backend.label(rows())]

    replies = asyncio.run(run())
    assert [reply.key for reply in replies] == [str(number) for number in range(len(texts))]
    return [reply.result for reply in replies]


def make(checkpoint: str, rubric: Rubric = RUBRIC) -> Likelihood:
    return Likelihood(checkpoint, schema=rubric.schema())


def rendered(rubric: Rubric, text: str) -> str:
    """As evaluation_helpers.CHAT does it."""
    return "".join(f"<{m['role']}>{m['content']}\n" for m in rubric.messages(text)) + "<assistant>"


class Oracle:
    """log p of a text after another, token by token of the same tokenisation, each a whole forward pass."""

    def __init__(self, checkpoint: str, chat: bool):
        import torch
        from tokenizers import Tokenizer
        from transformers import AutoModelForCausalLM

        self.chat, self.torch = chat, torch
        self.tokenizer = Tokenizer.from_file(str(TOKENIZER))
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompt(self, rubric: Rubric, text: str) -> list[int]:
        if self.chat:
            return self.ids(rendered(rubric, text))
        beginning = [self.tokenizer.token_to_id("<|endoftext|>")]
        return beginning + self.ids("\n\n".join(m["content"] for m in rubric.messages(text)) + "\n\nAnswer: ")

    def log_p(self, before: list[int], ids: list[int]) -> float:
        with self.torch.no_grad():
            row = self.torch.tensor([before + ids])
            logits = self.model(row, use_cache=False, logits_to_keep=len(ids) + 1).logits[0]
        found = logits[:-1].double().log_softmax(-1)
        return sum(found[at, token].item() for at, token in enumerate(ids))

    def check(self, rubric: Rubric, text: str, raw: str, fields=FIELDS) -> None:
        """Field by field: what `raw` has is the most likely of what it could have, after what stands before it."""
        answer, properties = json.loads(raw), rubric.schema()["properties"]
        before = self.prompt(rubric, text)
        for number, field in enumerate(FIELDS):
            before = before + self.ids(f'{", " if number else "{"}"{field}": "')
            options = properties[field].get("enum") or sentences(text, properties[field]["maxLength"])
            written = {option: self.ids(json.dumps(option, ensure_ascii=False)[1:]) for option in options}
            if field in fields:
                scores = {
                    option: self.log_p(before, ids) / (len(ids) if field == "evidence" else 1)
                    for option, ids in written.items()
                }
                assert scores[answer[field]] >= max(scores.values()) - 1e-3, (field, scores)
                assert len(scores) == 1 or max(scores.values()) - min(scores.values()) > 0.05, "it shows something"
            before = before + written[answer[field]]


def parsed(rubric: Rubric, text: str, result) -> Label:
    assert isinstance(result, Text)
    label = rubric.parse(result.text, text, result.finish)
    assert isinstance(label, Label), (label, result.text)
    assert label.stance == "unrelated" or (label.evidence and label.evidence in text)
    return label


@pytest.mark.parametrize(
    ("kind", "chat"), [("llama", True), ("llama", False), ("gemma3_text", True), ("gpt_neox", False)]
)
def test_the_most_likely_answer_is_chosen(checkpoints, kind, chat):
    """gemma3_text has windows of 64 tokens: the prompt is far longer."""
    checkpoint = checkpoints(kind, chat)
    oracle, found = Oracle(checkpoint, chat), ask(make(checkpoint), RUBRIC, DOCUMENTS)
    for text, result in zip(DOCUMENTS, found, strict=True):
        parsed(RUBRIC, text, result)
    oracle.check(RUBRIC, DOCUMENTS[0], found[0].text)
    for text, result in zip(DOCUMENTS[1:], found[1:], strict=True):
        oracle.check(RUBRIC, text, result.text, ("stance",))
    # More options than go in a batch: sentences of a document.
    if (kind, chat) == ("llama", True):
        text = " ".join(f"Sentence number {n} is about robot {n * n}." for n in range(11))
        [result] = ask(make(checkpoint), RUBRIC, [text])
        oracle.check(RUBRIC, text, result.text, ("evidence",))


def test_the_same_answers_whatever_was_asked_before(checkpoints):
    backend = make(checkpoints("llama", True))
    first = ask(backend, RUBRIC, DOCUMENTS)
    assert ask(backend, RUBRIC, DOCUMENTS[::-1])[::-1] == first
    assert backend.identity["backend"] == "transformers"
    assert len(backend.revision) == 16


@pytest.mark.parametrize(
    "text",
    [
        "x", "🤖", '"', "\\", "one\n\ntwo", "a.\nb.\nc.\nd.\ne.\nf.\ng.\nh.\n", "Short words only. " * 2,
        "no end " * 200, "u" * 900, "  \n\t leading white space is not quoted, we hope  \n", "a" + " " * 300 + "b",
        "a b.        \n" * 3, "c.             " + " " * 30 + "d", "line\u2028separator and\x85others, of some length",
        "\x00control\x05characters \x1f in a sentence that is long enough", "e\u0301" * 150,
    ],
)  # fmt: skip
def test_awkward_documents_have_answers_that_parse(checkpoints, text):
    """Whatever stance is chosen: the quote stands in the document."""
    backend = make(checkpoints("llama", True))
    [result] = ask(backend, RUBRIC, [text])
    parsed(RUBRIC, text, result)
    for stance in RUBRIC.data["stances"]:
        label = RUBRIC.parse(json.dumps({**json.loads(result.text), "stance": stance}), text)
        assert isinstance(label, Label), label


def test_a_document_without_a_word_is_asked_too(checkpoints):
    """There is nothing to quote: a label only where it is unrelated, else the class says so."""
    for text in ("", " \n "):
        [result] = ask(make(checkpoints("llama", True)), RUBRIC, [text])
        found = RUBRIC.parse(result.text, text)
        assert isinstance(found, Label) or found.reason == "evidence_missing"


def test_a_prompt_longer_than_the_model_is_refused_and_the_next_is_answered(tmp_path):
    backend = make(write_checkpoint(tmp_path / "short", length=2000, chat=True))
    long, fits = "The robot did what it was told, and said so. " * 150, DOCUMENTS[0]
    first, second, third = ask(backend, RUBRIC, [long, fits, long + long])
    for refused in (first, third):
        assert refused == Failed("bad_request", "prompt and answer have more tokens than the model's 2000")
    parsed(RUBRIC, fits, second)
    # Around the limit, to the token: refused until it fits, then the same answer.
    found = []
    num_tokens = len(backend._ids(rendered(RUBRIC, fits))) + len(backend._ids(second.text))
    for backend._max_length in range(num_tokens - 60, num_tokens + 60, 8):
        found += ask(backend, RUBRIC, [fits])
    answered = [isinstance(result, Text) for result in found]
    assert answered == sorted(answered)
    assert not answered[0]
    assert found[-1] == second


def test_through_the_labeller_with_the_whole_rubric(checkpoints, tmp_path):
    checkpoint = checkpoints("llama", True)
    with Cache(tmp_path) as cache:
        labeller = Labeller(make(checkpoint, LONG), LONG, cache)
        rows = list(iterate(labeller.rows(enumerate_ids(DOCUMENTS))))
        assert all(isinstance(row, LabelRow) for row in rows)
        assert (labeller.counts.labelled, labeller.counts.requests, labeller.counts.reasked) == (3, 3, 0)
        assert labeller.counts.usage.input_tokens > 3 * 2000
        again = Labeller(make(checkpoint, LONG), LONG, cache)
        assert sorted(iterate(again.rows(enumerate_ids(DOCUMENTS))), key=lambda row: row.id) == rows
        assert again.counts.requests == 0


def enumerate_ids(texts) -> list[tuple[str, str]]:
    return [(f"id{number}", text) for number, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("model", "said"),
    [("/nowhere/model", "no folder and no hub id"), ("a/b", "state its `revision`"), (".", r"no config\.json")],
)
def test_what_is_no_model_is_said(tmp_path, monkeypatch, model, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        make(model)


def test_a_broken_checkpoint_is_said_in_one_sentence(tmp_path):
    folder = tmp_path / "broken"
    write_checkpoint(folder)
    (folder / "model.safetensors").write_bytes(b"\0" * 300)
    with pytest.raises(UserError, match=r"could not be loaded as a causal language model: .+") as caught:
        ask(make(str(folder)), RUBRIC, ["x"])
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_curate_labels_with_a_model_in_this_process(checkpoints, root, tmp_path, ray_session):
    checkpoint = checkpoints("llama", True)
    rows = [json.loads(line) for line in (root / "examples/corpus/hard_cases.jsonl").open()][:40]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    label = {"backend": "transformers", "model": checkpoint, "audit": 2, "max_documents": 6, "window_characters": 1000}
    recipe = {
        "name": "labelled",
        "inputs": [{"path": str(tmp_path / "some.jsonl"), "source": "examples"}],
        "label": {**label, "max_windows": 1, "cache": str(tmp_path / "cache")},
        "mix": {"phases": {"p": {"tokens": 1000}}, "arms": {"all": {}}},
        "tokenise": {"tokenizer": str(TOKENIZER)},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    summary = curate(Recipe.load(str(tmp_path / "recipe.yaml")), str(tmp_path / "run"))
    assert summary["labels"]["labelled"] == 6
    run = curation.open_run(str(tmp_path / "run"))
    found = run.labels.join(run.documents.select("id", "text"), on="id").filter(pl.col("llm_stance").is_not_null())
    told = found.collect()
    assert told.height == 6
    for row in told.iter_rows(named=True):
        assert row["llm_stance"] == "unrelated" or row["evidence"] in row["text"]
