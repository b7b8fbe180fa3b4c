"""What the suite asks of a model, in token ids, and what a backend answers.

A backend knows nothing of questions, wrappers or chat templates: the suite renders and tokenises, so that two
backends of one checkpoint get the same ids. Answers come in batches, in any order, as soon as they are there; the
suite commits each batch before it takes the next.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Ask:
    """The log-likelihoods of some continuations of one context."""

    key: str
    """32 hex digits of context and continuations: its name in the journal."""
    context: Tokens
    """At least one token."""
    continuations: tuple[Tokens, ...]
    """Each at least one token. For letters one token each: all are then read from one position."""

    @property
    def num_tokens(self) -> int:
        """Of context and longest continuation together."""
        return len(self.context) + max(len(continuation) for continuation in self.continuations)

    @property
    def single(self) -> bool:
        """Every continuation is one token."""
        return all(len(continuation) == 1 for continuation in self.continuations)


@dataclass(frozen=True)
class Generate:
    """A greedy completion of one context."""

    key: str
    context: Tokens
    max_tokens: int

    @property
    def num_tokens(self) -> int:
        return len(self.context) + self.max_tokens


@dataclass(frozen=True)
class Batch:
    """Answers to some of the asks: `values[i]` is for `asks[indices[i]]`."""

    indices: tuple[int, ...]
    values: tuple[tuple[float, ...] | str, ...]
    """For an Ask, Σ log p (nats) of each continuation; for a Generate, the text."""


class Backend(Protocol):
    """A model that answers. Asks with the same beginning should be neighbours: it is computed once."""

    name: str
    """transformers | openai"""
    max_length: int
    """Longest sequence, in tokens. The suite never asks for more."""

    def facts(self) -> dict[str, str]:
        """What the numbers depend on: dtype, device, versions. No paths, no secrets."""
        ...

    def score(self, asks: Sequence[Ask], done: Collection[int] = ()) -> Iterator[Batch]:
        """Answers to all but the asks whose indices are `done`; the rest get the same numbers as with none done.

        Raises TilthError when the model cannot be reached any more: what was yielded stays."""
        ...

    def generate(self, asks: Sequence[Generate], done: Collection[int] = ()) -> Iterator[Batch]: ...
