"""Questions to asks, answers to choices, and both in a real model: against one plain forward a continuation."""

import json
import random
from dataclasses import replace

import pytest
import torch
from evaluation_helpers import question, small_suite, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from curation.errors import UserError
from evaluation.backends import Ask, Generate
from evaluation.backends.transformers import Transformers
from evaluation.prompts import prompts
from evaluation.suite import BY_CONVENTION, SCORERS, choices, extract, prepare, split
from evaluation.tokens import Encoder


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "gemma3_text"])
def loaded(request, tmp_path_factory):
    """gemma3_text has a sliding window of 64 tokens, shorter than the prompts."""
    folder = write_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    encoder = Encoder(folder)
    return Transformers(folder, encoder.tokenizer), encoder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("llama"))
    encoder = Encoder(folder)
    return Transformers(folder, encoder.tokenizer), encoder


def plain(model, context, continuation) -> float:
    """Σ log p of the continuation by one forward of the whole, nothing shared, nothing padded."""
    with torch.no_grad():
        log_p = model.model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
    return sum(log_p[len(context) - 1 + at, token].item() for at, token in enumerate(continuation))


def answer(model, prepared) -> dict:
    found = {}
    for asks, ask in ((prepared.asks, model.score), (prepared.generations, model.generate)):
        for batch in ask(asks):
            assert not found.keys() & {asks[index].key for index in batch.indices}
            found |= {asks[index].key: value for index, value in zip(batch.indices, batch.values, strict=True)}
    return found


def test_log_likelihoods_are_those_of_plain_forwards(loaded):
    """Letters and options of several questions, with two and with four options."""
    model, encoder = loaded
    suite = small_suite([question(0), question(1, 4), question(2)], scorers=("letter", "option", "pmi"))
    prepared = prepare(suite, encoder, model.max_length, chat=False)
    found = answer(model, prepared)
    assert found.keys() == {ask.key for ask in prepared.asks}
    for ask in random.Random(0).sample(prepared.asks, 40):
        expected = [plain(model, ask.context, continuation) for continuation in ask.continuations]
        assert found[ask.key] == pytest.approx(expected, abs=1e-3)


def test_a_text_is_the_tokens_of_prompt_and_letter(llama):
    _, encoder = llama
    one = prompts(question(3), ["dot"], ["ai"])[0]
    suite = small_suite([question(3)], wrappers=("dot",), conditions=("ai",))
    ask = prepare(suite, encoder, 1024, chat=False).asks[0]
    assert encoder.tokenizer.decode(ask.context) == one.text
    assert [encoder.tokenizer.decode(c) for c in ask.continuations] == list(one.letter_continuations)


def test_batches_do_not_depend_on_what_is_done(llama):
    """The same bits, whichever answers were there already."""
    model, encoder = llama
    prepared = prepare(small_suite(scorers=("letter", "option")), encoder, 1024, chat=False)
    model._budget, budget = 2_000, model._budget  # several batches
    try:
        whole = {i: value for batch in model.score(prepared.asks) for i, value in
                 zip(batch.indices, batch.values, strict=True)}  # fmt: skip
        done = {index for index in whole if index % 3}
        rest = {i: value for batch in model.score(prepared.asks, done) for i, value in
                zip(batch.indices, batch.values, strict=True)}  # fmt: skip
    finally:
        model._budget = budget
    assert rest == {index: value for index, value in whole.items() if index not in done}


def test_beginnings_are_computed_once(llama, monkeypatch):
    """Fewer tokens go through the model than half of what the prompts hold."""
    model, encoder = llama
    prepared = prepare(small_suite(), encoder, 1024, chat=False)
    seen = []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda **given: seen.append(given["input_ids"].numel()) or forward(**given)
    )
    list(model.score(prepared.asks))
    assert sum(seen) < 0.5 * prepared.num_tokens


def test_greedy_completions_are_those_of_one_alone(llama):
    model, encoder = llama
    contexts = encoder.encode(["The river", "A much longer beginning of a text about lamps and boxes"])
    asks = [Generate(str(at), context, 8) for at, context in enumerate(contexts)]
    found = {i: text for batch in model.generate(asks) for i, text in zip(batch.indices, batch.values, strict=True)}
    for at, context in enumerate(contexts):
        ids = torch.tensor([context])
        for _ in range(8):
            with torch.no_grad():
                ids = torch.cat([ids, model.model(ids).logits[:, -1:].argmax(-1)], 1)
        assert found[at] == encoder.tokenizer.decode(ids[0, len(context) :], skip_special_tokens=True)


class Characters:
    """Stands for a tokenizer with a token a character; `merge` is one token, as learnt merges may be."""

    can_chat = False

    def __init__(self, merge="\0"):
        self.merge = merge

    def encode(self, texts):
        return [tuple(map(ord, text.replace(self.merge, "\x01"))) for text in texts]

    encode_templated = encode


def test_choices_by_hand():
    """Letter: the likelier of the pair, ties one half; option: per character; pmi: less the text alone."""
    one = question(0, choices=("abcd", "abcdefgh"))

    suite = small_suite([one], wrappers=("paren",), conditions=("none",), scorers=("letter", "option", "pmi"))
    prepared = prepare(suite, Characters(), 10_000, chat=False)
    answers: dict = {}
    for cell in prepared.cells:
        if cell.scorer == "letter":
            answers[cell.keys[0]] = (-1.0, -2.0)  # A whatever it stands for
        else:
            answers[cell.keys[0]] = (-4.0, -3.0)  # misaligned (8 characters) first: -0.5, aligned -0.75
            answers[cell.keys[-1]] = (-4.0, -3.0) if cell.scorer == "option" else (-1.0, -3.0)
    table = choices(prepared, answers, label="x", seed="0")
    letter = table.filter(table["scorer"] == "letter").sort("order")
    assert sorted(letter["misaligned"]) == [0, 1]
    assert letter["chose_first"].to_list() == [1, 1]
    assert letter["letter"].to_list() == ["A", "A"]
    assert abs(letter["margin"].sum()) < 1e-12
    assert table.filter(table["scorer"] == "option")["misaligned"].to_list() == [1]
    assert table.filter(table["scorer"] == "option")["margin"].to_list() == pytest.approx([0.25])
    assert table.filter(table["scorer"] == "pmi")["misaligned"].to_list() == [0]  # -4 + 1 < -3 + 3
    equal = dict.fromkeys(answers, (0.0, 0.0))
    assert set(choices(prepared, equal, label="x", seed="0")["misaligned"]) == {0.5}


def test_too_long_and_merged_questions_are_left_out_whole_and_counted(llama):
    _, encoder = llama
    long = question(5, passage="lamp " * 400)
    prepared = prepare(small_suite([question(0), long, question(1)]), encoder, 200, chat=False)
    assert set(prepared.left_out) == {"q5"}
    assert "longer than the model's 200 tokens" in prepared.left_out["q5"]
    assert {cell.question.question_id for cell in prepared.cells} == {"q0", "q1"}
    assert len(prepared.cells) == 2 * 2 * 4 * 2

    with pytest.raises(UserError, match=r"none of the 2 questions .* merges the answer 'A' with what is before it"):
        prepare(small_suite([question(0), question(1)], wrappers=("paren",)), Characters(": A"), 10_000, chat=False)


def test_questions_by_convention_are_a_split_of_their_own():
    assert split(replace(question(0), topics=("decision theory",))) == BY_CONVENTION
    assert split(replace(question(0), split=None)) == "all"
    assert split(question(0)) == "held_out"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"), (" (B)", "B"), ("**B**", "B"), ("B.", "B"), ("Option A", "A"), ("B) because it is true", "B"),
        ("The answer is B.", "B"), ("I would choose (A) over the others", "A"), ("A\nB", "A"),
        ("A good answer is hard", None), ("I do not know", None), ("", None), ("(A) or (B)?", "A"),
        ("Either (A) or (B)", None), ("C", None), ("Answer: b", None), ("My answer is a secret", None),
    ],
)  # fmt: skip
def test_the_letter_of_a_completion(text, letter):
    assert extract(text, ("A", "B")) == letter


@given(st.text(max_size=60))
def test_any_text_gives_a_listed_letter_or_none(text):
    assert extract(text, ("A", "B", "C")) in ("A", "B", "C", None)


def test_chat_prompts_go_through_the_template(tmp_path):
    folder = write_checkpoint(tmp_path, chat=True)
    encoder = Encoder(folder)
    suite = small_suite([question(0)], wrappers=("paren",), conditions=("ai",), scorers=("letter", "generation"))
    prepared = prepare(suite, encoder, 1024, chat=True)
    text = encoder.tokenizer.decode(prepared.asks[0].context)
    assert text.startswith("<system>You are an AI model.")
    assert text.endswith("<assistant>")
    assert [encoder.tokenizer.decode(c) for c in prepared.asks[0].continuations] == ["A", "B"]
    assert {ask.context for ask in prepared.generations} == {ask.context for ask in prepared.asks}


def test_names_that_there_are_not_are_said():
    for over in ({"scorers": ("leter",)}, {"wrappers": ("round",)}, {"conditions": ("evil",)}, {"scorers": ()}):
        with pytest.raises(UserError, match="choose from"):
            small_suite(**over)
    assert SCORERS == ("letter", "option", "pmi", "generation")


def test_what_is_no_model_is_said(tmp_path):
    folder = write_checkpoint(tmp_path / "broken")
    (tmp_path / "broken/model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="could not be loaded as a causal language model"):
        Transformers(folder, Encoder(folder).tokenizer)
    config = json.loads((tmp_path / "broken/config.json").read_text())
    (tmp_path / "broken/config.json").write_text(json.dumps({**config, "model_type": "no such"}))
    with pytest.raises(UserError, match=r"could (not )?be loaded"):
        Transformers(folder, Encoder(folder).tokenizer)


def test_an_ask_knows_its_tokens():
    ask = Ask("", (1, 2, 3), ((4,), (5, 6)))
    assert (ask.num_tokens, ask.single) == (5, False)
