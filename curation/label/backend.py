"""What any model is to the label stage: an async stream of requests in, of replies out, in any order.

A backend may hold as many rows as it likes before it answers the first, so batch engines fit too: whoever
feeds it ends the stream without waiting for replies.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

Messages = list[dict[str, str]]

CallError = Literal["bad_request", "timeout", "rate_limited", "server_error", "connection"]
FINAL_ERRORS: tuple[CallError, ...] = ("bad_request",)
"""Would come again for the same request, so they are cached; the others are only counted."""


class Request(NamedTuple):
    key: str
    messages: Messages


@dataclass(frozen=True)
class Text:
    """A model's words, as they came."""

    text: str
    finish: str = "stop"
    """`stop`; `length` when max_tokens cut it; `refusal` when the server says that the model refused."""


@dataclass(frozen=True)
class Failed:
    """No words: the request failed for good, or until its deadline."""

    error: CallError
    detail: str = ""


class Usage(NamedTuple):
    """Tokens that a reply cost."""

    input_tokens: int = 0
    output_tokens: int = 0


class Reply(NamedTuple):
    key: str
    result: Text | Failed
    usage: Usage


class Backend(Protocol):
    @property
    def identity(self) -> Mapping[str, str]:
        """Model, revision and whatever else changes the answers: part of every cache key."""

    @property
    def sampling(self) -> Mapping[str, Any]:
        """Part of every cache key; `max_tokens` in it is what a request may cost at most."""

    def label(self, rows: AsyncIterator[Request]) -> AsyncGenerator[Reply, None]:
        """One Reply for each request, in order of completion."""
