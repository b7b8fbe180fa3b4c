"""Documents in, label rows and quarantine rows out: the loop between cache, backend and rubric.

    document -> windows -> each: cache, else the backend (once more where the quote is not in the document)
             -> all windows labelled: a LabelRow; one without a label: a RejectRow with its class

Every document ends as one of labelled, quarantined, not reached, and `Counts` adds up. What is known is not asked:
a run that was stopped, killed or short of money goes on by the same command.

Memory holds the documents in flight: as many as the backend holds rows, and 64 requests ahead of it. Work goes in
rounds, since a backend may want the end of its input before it answers (backend.py): what turns up after a round's
input has ended (a second ask, a key that another run was asking) goes into the next.

**Budget.** Before a document is asked, the price of its requests is set aside: max_tokens each, and as many tokens
a character as the answers so far had, a third before there are any. When that no longer fits beside what this run
(`payer`) ever spent, what is in flight is awaited; if it still does not fit, the run asks no more, and documents that
the cache does not hold whole are not reached. Tokens of failed tries, which servers don't report, are not counted.
"""

import asyncio
import hashlib
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, get_args

from curation.errors import TilthError, UserError
from curation.label.backend import FINAL_ERRORS, Backend, CallError, Failed, Messages, Reply, Request, Text, Usage
from curation.label.cache import Cache, Key, Keys
from curation.label.rubric import Failure, FailureClass, Label, Rubric
from curation.label.windows import Span, choose, combine

_AHEAD = 64  # requests ready for the backend
_WAITING = 1024  # keys that another run asks; more are asked twice rather than kept
_LOOK_S = 0.1  # between looks for the other run's answers
_REFUSALS = 20  # requests refused without any answer before: the request is wrong, not the documents
_CHARACTERS_PER_TOKEN = 3.0
REASONS: tuple[str, ...] = (*get_args(FailureClass), *get_args(CallError))
"""Of RejectRow."""
_HANDFUL, _HANDFUL_S = 64, 0.1


@dataclass(frozen=True)
class Limits:
    """Where a run stops cleanly, and how long documents are cut. Prices are USD per million tokens."""

    max_documents: int | None = None
    budget_usd: float | None = None
    input_usd: float = 0.0
    output_usd: float = 0.0
    window_characters: int = 6000
    max_windows: int = 3

    def price(self, usage: Usage) -> float:
        return (usage.input_tokens * self.input_usd + usage.output_tokens * self.output_usd) / 1e6


@dataclass(frozen=True)
class LabelRow:
    """A document's label; `windows` are those of its parts, in order, which `label` was combined from."""

    id: str
    label: Label
    windows: tuple[Label, ...]


@dataclass(frozen=True)
class RejectRow:
    """A document without a label: the class of what went wrong with one of its windows, and in words."""

    id: str
    reason: str
    detail: str


@dataclass
class Counts:
    """documents = labelled + quarantined + not_reached."""

    documents: int = 0
    stances: Counter[str] = field(default_factory=Counter)
    rejects: Counter[str] = field(default_factory=Counter)
    not_reached: int = 0
    requests: int = 0
    """Answered by the backend, errors too."""
    cached: int = 0
    """Answered by the cache."""
    reasked: int = 0
    """Requests whose quote was not in the document, so that a second one followed; from the cache too."""
    usage: Usage = field(default_factory=Usage)
    """Of this process; of the run with all its attempts: Cache.spent."""
    usd: float = 0.0
    stopped: str | None = None
    """`max_documents` or `budget_usd`, when one ended it."""

    @property
    def labelled(self) -> int:
        return self.stances.total()

    @property
    def quarantined(self) -> int:
        return self.rejects.total()

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "documents": self.documents, "labelled": self.labelled, "quarantined": self.quarantined,
            "not_reached": self.not_reached, "stances": dict(self.stances), "rejects": dict(self.rejects),
            "requests": self.requests, "cached": self.cached, "reasked": self.reasked,
            "input_tokens": self.usage.input_tokens, "output_tokens": self.usage.output_tokens,
            "usd": self.usd, "stopped": self.stopped,
        }  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Of a run before it starts. Tokens and price as set aside under Budget; second asks are not counted."""

    documents: int
    windows: int
    requests: int
    """Windows that the cache does not hold."""
    input_tokens: int
    output_tokens: int
    usd: float
    tokens_per_second: float | None = None
    """Of all servers together, as measured in earlier runs with this model and schema."""


class _Document:
    """One that has windows without an outcome."""

    def __init__(self, identity: str, windows: list[str]):
        self.id, self.windows = identity, windows
        self.outcomes: list[Label | Failure | Failed | None] = [None] * len(windows)
        self.done = False
        self.skipped = False
        """Money ended before all of it was asked."""


@dataclass
class _Ask:
    """One request: a window of a document, for the first time or again."""

    document: _Document
    window: int
    key: Key
    set_aside: float = 0.0
    """USD, while it is with the backend."""
    raw: str | None = None
    """The answer whose quote was not found, when it is asked again."""

    @property
    def text(self) -> str:
        return self.document.windows[self.window]

    @property
    def name(self) -> str:
        return self.key.digest.hex()


class Labeller:
    """Labels documents by one rubric, backend and cache. `counts` is complete when `rows` has ended.

    explain: the detector's spans in a text, for the windows of long documents. payer: the run's name, whose spending
    `budget_usd` bounds over all its attempts."""

    def __init__(
        self, backend: Backend, rubric: Rubric, cache: Cache, *, limits: Limits | None = None, payer: str = "",
        explain: Callable[[str], Iterable[Span]] | None = None, on_line: Callable[[str], None] | None = None,
    ):  # fmt: skip
        self._backend, self._rubric, self._cache = backend, rubric, cache
        self._limits, self._payer = limits or Limits(), payer
        self._explain = explain or (lambda _: ())
        self._say = on_line or (lambda _: None)
        self._keys = Keys(
            identity=backend.identity, schema_sha256=rubric.schema_sha256, sampling=backend.sampling
        )  # fmt: skip
        self.counts = Counts()
        self._max_tokens = int(backend.sampling.get("max_tokens") or 0)
        self._prompt_characters = sum(len(message["content"]) for message in rubric.messages(""))
        self._before = self._limits.price(cache.spent(payer)) if payer else 0.0
        self._set_aside = 0.0
        self._tokens_per_character = 1 / _CHARACTERS_PER_TOKEN
        self._characters_answered = 0
        self._asked: dict[str, _Ask] = {}
        """With the backend, by name."""
        self._waiting: list[_Ask] = []
        """Asked by somebody else just now, or by us for another document with the same text; or for the next round."""
        self._looked = 0.0
        self._refused: list[Key] | None = []
        """Until the first answer."""

    def plan(self, documents: Iterable[tuple[str, str]]) -> Plan:
        """What `rows` of the same documents would do, without a request."""
        found, usage = Counter[str](), Usage()
        for number, (identity, text) in enumerate(documents):
            if self._limits.max_documents is not None and number >= self._limits.max_documents:
                break
            document = _Document(identity, self._windows(text))
            asks = [
                ask
                for window, part in enumerate(document.windows)
                if self._cache.get((ask := self._first(document, window, part)).key) is None
            ]
            found.update(documents=1, windows=len(document.windows), requests=len(asks))
            usage = Usage(*map(sum, zip(usage, *map(self._tokens, asks), strict=True)))
        return Plan(
            found["documents"], found["windows"], found["requests"], *usage, self._limits.price(usage),
            self._cache.tokens_per_second(self._keys),
        )  # fmt: skip

    async def rows(self, documents: Iterable[tuple[str, str]]) -> AsyncGenerator[LabelRow | RejectRow, None]:
        """The outcome of each (id, text), as they come; none for those not reached."""
        source = self._bounded(documents)
        document = next(source, None)
        asks = self._known(document) if document else []
        told = False
        while document or self._waiting:
            sent = self.counts.requests
            async with aclosing(_Round(self._backend, self._keep)) as going:
                for row in self._look(going):
                    yield row
                while document:
                    if asks and not self._affordable(asks):
                        if self._asked:  # what is in flight may cost less than was set aside
                            break
                        self._skip(document)
                    for ask in () if document.skipped else asks:
                        self._ask(ask, going)
                    for row in self._finished(document):
                        yield row
                    document = next(source, None)
                    asks = self._known(document) if document else []
                    while True:
                        await going.breathe()
                        for row in self._collect(going):
                            yield row
                        if not going.full:
                            break
                        await going.changed()
                going.close_input()
                while not going.ended:
                    await going.changed()
                    for row in self._collect(going):
                        yield row
            if self._asked:
                raise TilthError(f"the label backend ended with {len(self._asked)} requests unanswered")
            if self._waiting and self.counts.requests == sent:
                if not told:
                    told = True
                    self._say(f"waiting for {len(self._waiting)} answers that another run is asking for")
                await asyncio.sleep(_LOOK_S)
        self._forget_refused()

    # From a document to requests.

    def _bounded(self, documents: Iterable[tuple[str, str]]) -> Iterator[_Document]:
        at_most = self._limits.max_documents
        for identity, text in documents:
            self.counts.documents += 1
            if at_most is not None and self.counts.documents > at_most:
                self.counts.not_reached += 1
                self.counts.stopped = self.counts.stopped or "max_documents"
                continue
            yield _Document(identity, self._windows(text))

    def _windows(self, text: str) -> list[str]:
        size = self._limits.window_characters
        spans = list(self._explain(text)) if len(text) > size else []
        return [text[a:b] for a, b in choose(text, spans, characters=size, at_most=self._limits.max_windows)]

    def _known(self, document: _Document) -> list[_Ask]:
        """Takes what the cache has; the requests that are still to be made."""
        asks = []
        for window, text in enumerate(document.windows):
            if document.outcomes[window] is None:
                ask = self._resolve(self._first(document, window, text))
                if ask:
                    asks.append(ask)
        return asks

    def _first(self, document: _Document, window: int, text: str) -> _Ask:
        return _Ask(document, window, self._keys.key(text, self._rubric.sha256))

    def _resolve(self, ask: _Ask) -> _Ask | None:
        """Follows `ask` through the cache: None when that gave its window an outcome, else what is still to ask."""
        while True:
            row = self._cache.get(ask.key)
            if row is None:
                return ask
            self.counts.cached += 1
            if isinstance(row.result, Text):
                self._refused = None
            again = self._take(ask, row.result)
            if again is None:
                return None
            ask = again

    def _take(self, ask: _Ask, result: Text | Failed) -> _Ask | None:
        """Gives the window its outcome, unless it has to be asked again: then that request."""
        outcome: Label | Failure | Failed
        if isinstance(result, Failed):
            outcome = result
        else:
            outcome = self._rubric.parse(result.text, ask.text, result.finish)
            if isinstance(outcome, Failure) and outcome.reason == "evidence_missing" and ask.raw is None:
                self.counts.reasked += 1
                prompt = hashlib.sha256(f"{self._rubric.sha256} again {result.text}".encode()).hexdigest()
                return _Ask(ask.document, ask.window, self._keys.key(ask.text, prompt), raw=result.text)
        ask.document.outcomes[ask.window] = outcome
        return None

    def _messages(self, ask: _Ask) -> Messages:
        return self._rubric.messages(ask.text) if ask.raw is None else self._rubric.reask(ask.text, ask.raw)

    def _ask(self, ask: _Ask, going: "_Round") -> None:
        """To the backend, unless the same is being asked already: then we wait for that answer."""
        if self._cache.claim(ask.key) or (len(self._waiting) >= _WAITING and ask.name not in self._asked):
            self._send(ask, going)
        else:
            self._waiting.append(ask)

    def _send(self, ask: _Ask, going: "_Round") -> None:
        self._asked[ask.name] = ask
        ask.set_aside = self._estimate(ask)
        self._set_aside += ask.set_aside
        going.add(Request(ask.name, self._messages(ask)))

    # From replies to rows.

    def _collect(self, going: "_Round") -> Iterator[LabelRow | RejectRow]:
        while going.replies:
            yield from self._replied(going.replies.popleft(), going)
        if self._waiting and time.monotonic() - self._looked > _LOOK_S:
            yield from self._look(going)

    def _replied(self, reply: Reply, going: "_Round") -> Iterator[LabelRow | RejectRow]:
        ask = self._asked.pop(reply.key)
        self._set_aside -= ask.set_aside
        yield from self._settle(ask, self._take(ask, reply.result), going)

    def _keep(self, reply: Reply) -> None:
        """At once: what a kill takes is only what was on its way."""
        ask, counts = self._asked[reply.key], self.counts
        counts.requests += 1
        counts.usage = Usage(*map(sum, zip(counts.usage, reply.usage, strict=True)))
        counts.usd = self._limits.price(counts.usage)
        if reply.usage.input_tokens:
            self._characters_answered += self._characters(ask)
            self._tokens_per_character = counts.usage.input_tokens / self._characters_answered
        if isinstance(reply.result, Text) or reply.result.error in FINAL_ERRORS:
            self._cache.put(self._keys, ask.key, reply.result, reply.usage, self._payer)
        else:
            self._cache.release(ask.key)
            self._cache.tally(reply.result.error)
        self._all_refused(ask, reply.result)

    def _settle(self, ask: _Ask, again: _Ask | None, going: "_Round") -> Iterator[LabelRow | RejectRow]:
        """After an answer: the second request, where there has to be one, and the document's row, when it is
        complete."""
        left = self._resolve(again) if again else None
        if left is not None:
            self._ask_if_possible(left, going)
        yield from self._finished(ask.document)

    def _ask_if_possible(self, ask: _Ask, going: "_Round") -> None:
        if ask.document.skipped:
            return
        if not self._affordable([ask]):
            if self._asked:
                self._waiting.append(ask)
            else:
                self._skip(ask.document)
        elif going.input_closed:
            self._waiting.append(ask)
        else:
            self._ask(ask, going)

    def _look(self, going: "_Round") -> Iterator[LabelRow | RejectRow]:
        """Whether what we wait for is answered, or ours to ask now."""
        self._looked = time.monotonic()
        waiting, self._waiting = self._waiting, []
        for ask in waiting:
            left = self._resolve(ask)
            if left is None:
                yield from self._finished(ask.document)
            else:
                self._ask_if_possible(left, going)

    def _finished(self, document: _Document) -> Iterator[LabelRow | RejectRow]:
        """The document's row, once."""
        if document.skipped or document.done or None in document.outcomes:
            return
        document.done = True
        labels = tuple(outcome for outcome in document.outcomes if isinstance(outcome, Label))
        for outcome in document.outcomes:
            if isinstance(outcome, Failure | Failed):
                reason = outcome.reason if isinstance(outcome, Failure) else outcome.error
                self.counts.rejects[reason] += 1
                yield RejectRow(document.id, reason, outcome.detail)
                break
        else:
            label = combine(labels)
            self.counts.stances[label.stance] += 1
            yield LabelRow(document.id, label, labels)

    def _all_refused(self, ask: _Ask, result: Text | Failed) -> None:
        if self._refused is None:
            return
        if isinstance(result, Text):
            self._refused = None
        elif result.error == "bad_request":
            self._refused.append(ask.key)
            if len(self._refused) >= _REFUSALS:
                self._forget_refused()
                raise UserError(
                    f"the label server refused the first {_REFUSALS} requests ({result.detail}): correct the label "
                    "section of the recipe"
                )

    def _forget_refused(self) -> None:
        """When nothing was ever answered, what was wrong may be mended on the server's side."""
        for key in self._refused or ():
            self._cache.forget(key=key)
        self._refused = None

    # Money.

    def _tokens(self, ask: _Ask) -> Usage:
        return Usage(int(self._characters(ask) * self._tokens_per_character), self._max_tokens)

    def _characters(self, ask: _Ask) -> int:
        return self._prompt_characters + len(ask.text) + 2 * len(ask.raw or "")

    def _estimate(self, ask: _Ask) -> float:
        return self._limits.price(self._tokens(ask))

    def _affordable(self, asks: list[_Ask]) -> bool:
        budget = self._limits.budget_usd
        if budget is None:
            return True
        if self.counts.stopped == "budget_usd":  # no shorter document jumps the queue
            return False
        spent = self._before + self.counts.usd + self._set_aside
        return spent + sum(map(self._estimate, asks)) <= budget

    def _skip(self, document: _Document) -> None:
        if not document.skipped:
            document.skipped = True
            self.counts.not_reached += 1
            self.counts.stopped = "budget_usd"


class _Round:
    """One call of the backend: requests go in until the input is closed, replies come out."""

    def __init__(self, backend: Backend, keep: Callable[[Reply], None]):
        self.replies: deque[Reply] = deque()
        self._requests: deque[Request] = deque()
        self._input, self._change = asyncio.Event(), asyncio.Event()
        self.input_closed = False
        self._backend, self._keep = backend, keep
        self._task: asyncio.Task[None] | None = None
        """Started with the first request: a run that has everything in the cache opens no connection."""

    @property
    def full(self) -> bool:
        return len(self._requests) >= _AHEAD

    @property
    def ended(self) -> bool:
        """Nothing comes any more. Raises what ended the backend."""
        if self._task is None:
            return self.input_closed
        if self._task.done():
            self._task.result()
            return not self.replies
        return False

    def add(self, request: Request) -> None:
        self._requests.append(request)
        self._input.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    def close_input(self) -> None:
        self.input_closed = True
        self._input.set()

    async def breathe(self) -> None:
        """Lets the backend work a little, where it has something to do."""
        if self._task is not None:
            await asyncio.sleep(0)

    async def changed(self) -> None:
        """Returns when a request was taken, a reply came, or the backend ended. Raises what ended it."""
        if self._task is None or self.replies:
            return
        if self._task.done():
            self._task.result()
            if self._requests:
                raise TilthError(f"the label backend ended with {len(self._requests)} requests unread")
            return
        self._change.clear()
        await self._change.wait()

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _source(self) -> AsyncIterator[Request]:
        while True:
            while self._requests:
                request = self._requests.popleft()
                self._change.set()
                yield request
            if self.input_closed:
                return
            self._input.clear()
            await self._input.wait()

    async def _run(self) -> None:
        try:
            async with aclosing(self._backend.label(self._source())) as stream:
                async for reply in stream:
                    self._keep(reply)
                    self.replies.append(reply)
                    self._change.set()
        finally:
            self._change.set()


def iterate(rows: AsyncGenerator[Any, None]) -> Iterator[Any]:
    """An async generator as a plain one, on a loop of its own; the loop stands still while the caller works. Rows
    come in handfuls, since to start and stop the loop costs more than a cached row."""
    with asyncio.Runner() as runner:

        async def step() -> list[Any]:
            found: list[Any] = []
            until = time.monotonic() + _HANDFUL_S
            async for row in rows:
                found.append(row)
                if len(found) == _HANDFUL or time.monotonic() > until:
                    break
            return found

        try:
            while found := runner.run(step()):
                yield from found
        finally:
            runner.run(rows.aclose())
