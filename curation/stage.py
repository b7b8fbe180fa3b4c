"""How stages meet the engine.

A stage is written as functions of plain, picklable items (a part's name, a partition's number)
that read and commit files and return small results; it never imports Ray. `pipeline` hands it
a Mapper that runs such a function over many items, on Ray Data; tests hand it `serial`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Mapper(Protocol):
    """Runs `function` on every item, in any order and process, and yields the results in any order. Items whose work
    differs come largest first: they are dealt out in that order."""

    def __call__(self, function: Callable[[Item], Result], items: Sequence[Item], label: str) -> Iterator[Result]: ...


def serial(function: Callable[[Item], Result], items: Sequence[Item], label: str) -> Iterator[Result]:
    """The Mapper without an engine."""
    return (function(item) for item in items)
