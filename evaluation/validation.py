"""The loss on documents that no arm trained on: what an arm costs, without any question."""

from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.backends import Ask, Backend
from evaluation.tokens import Encoder


@dataclass(frozen=True)
class Loss:
    """Of whole texts, each from its beginning and cut at the model's longest sequence."""

    nats_per_token: float
    num_tokens: int
    num_documents: int


def loss(model: Backend, encoder: Encoder, texts: Sequence[str]) -> Loss:
    """−Σ log p / tokens, all tokens alike; the first token of a document is given."""
    encoded = encoder.encode([encoder.beginning + text for text in texts])
    cut = [ids[: model.max_length] for ids in encoded if len(ids) > 1]
    asks = [Ask(str(at), ids[:1], (ids[1:],)) for at, ids in enumerate(cut)]
    values = [0.0] * len(asks)
    for batch in model.score(asks):
        for at, answer in zip(batch.indices, batch.values, strict=True):
            values[at] = float(answer[0])
    num_tokens = sum(len(ids) - 1 for ids in cut)
    return Loss(-sum(values) / max(num_tokens, 1), num_tokens, len(cut))
