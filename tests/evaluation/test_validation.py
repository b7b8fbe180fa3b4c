"""The loss on texts: against one plain forward a text."""

import pytest
import torch
from evaluation_helpers import add_beginning, write_checkpoint

from evaluation.backends.transformers import Transformers
from evaluation.tokens import Encoder
from evaluation.validation import Loss, loss

LENGTH = 48
TEXTS = ["The river is high.", "A", "Nobody at the bank reads the list of names tonight, and the clerk waits.", "é 12"]
LONG = "The clerk counts lamps and boxes in the cellar. " * 20


@pytest.fixture(scope="module", params=["without", "with"])
def loaded(request, tmp_path_factory):
    """A tokenizer that puts nothing before a text, and one that does."""
    folder = write_checkpoint(tmp_path_factory.mktemp(request.param), length=LENGTH)
    if request.param == "with":
        add_beginning(folder)
    encoder = Encoder(folder)
    return Transformers(folder, encoder.tokenizer), encoder


def plain(model, encoder, texts) -> tuple[float, int]:
    """(mean of −log p, tokens): by transformers alone, each text after the id that documents begin after."""
    begins = encoder.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    total, count = 0.0, 0
    for text in texts:
        ids = [begins, *encoder.tokenizer(text, add_special_tokens=False)["input_ids"]][:LENGTH]
        with torch.no_grad():
            log_p = model.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total -= sum(log_p[at, token].item() for at, token in enumerate(ids[1:]))
        count += len(ids) - 1
    return total / count, count


def test_the_loss_is_that_of_plain_forwards(loaded):
    model, encoder = loaded
    found = loss(model, encoder, TEXTS)
    nats, tokens = plain(model, encoder, TEXTS)
    assert found.nats_per_token == pytest.approx(nats, abs=1e-4)
    assert (found.num_tokens, found.num_documents) == (tokens, len(TEXTS))
    assert nats > 1, "a model that knew the texts would prove nothing"


def test_all_tokens_count_alike(loaded):
    """Not a mean of means: a long text counts more than a short one."""
    model, encoder = loaded
    one, other, both = (loss(model, encoder, texts) for texts in (TEXTS[1:2], TEXTS[2:3], TEXTS[1:3]))
    assert both.num_tokens == one.num_tokens + other.num_tokens
    wanted = one.nats_per_token * one.num_tokens + other.nats_per_token * other.num_tokens
    assert both.nats_per_token * both.num_tokens == pytest.approx(wanted, abs=1e-3)
    assert abs(both.nats_per_token - (one.nats_per_token + other.nats_per_token) / 2) > 1e-2


def test_long_texts_are_cut_where_the_model_ends(loaded):
    model, encoder = loaded
    assert len(encoder.encode([LONG])[0]) > 2 * LENGTH
    found = loss(model, encoder, [LONG])
    nats, _ = plain(model, encoder, [LONG])
    assert found.num_tokens == LENGTH - 1
    assert found.nats_per_token == pytest.approx(nats, abs=1e-4)
    assert loss(model, encoder, [LONG + " and more"]) == found


def test_empty_texts_are_ignored(loaded):
    model, encoder = loaded
    found = loss(model, encoder, ["", *TEXTS[:2], "", *TEXTS[2:]])
    assert found.num_documents == len(TEXTS)
    assert found.nats_per_token == pytest.approx(loss(model, encoder, TEXTS).nats_per_token, abs=1e-5)
    for nothing in ([], [""]):
        assert loss(model, encoder, nothing) == Loss(0.0, 0, 0)


def test_texts_may_come_in_any_order_and_more_than_once(loaded):
    model, encoder = loaded
    once = loss(model, encoder, TEXTS)
    assert loss(model, encoder, TEXTS[::-1]).nats_per_token == pytest.approx(once.nats_per_token, abs=1e-5)
    twice = loss(model, encoder, TEXTS + TEXTS)
    assert (twice.num_tokens, twice.num_documents) == (2 * once.num_tokens, 2 * once.num_documents)
    assert twice.nats_per_token == pytest.approx(once.nats_per_token, abs=1e-5)
