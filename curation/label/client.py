"""The backend for any OpenAI-compatible /v1/chat/completions: vLLM first.

A row is tried until it has an answer, its deadline is over, or it failed too often:

    200                          an answer, whatever it says
    401, 403, 404, 405, 3xx      ends the run with one sentence: no row would fare better
    400, 413, 422 and other 4xx  the row's fault: no second try
    429                          waits (Retry-After, else the backoff), until the deadline
    408, 5xx, timeout, broken    waits and tries again, `tries` times at most, until the deadline
    connection refused           waits for the server, without an end but `patience_s`

**Circuit breaker**, one for each endpoint: a refused connection opens it, and five other failures in a row. Open, it
gets nothing but one row at a time, after 0.5 s, 1 s, … 30 s; an answer closes it. While another endpoint is closed,
rows go there; when all are open the run pauses, with a line, and no row's deadline runs.

A row goes to the closed endpoint with the fewest requests in flight, ties in turn. At most `concurrency` rows are
held, and as many replies. Backoff doubles from 0.5 s to 30 s, times a uniform draw from ½ to 1, so that rows that
failed together don't come back together.
"""

import asyncio
import email.utils
import json
import os
import random
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from curation.errors import TilthError, UserError
from curation.label.backend import CallError, Failed, Reply, Request, Text, Usage

if TYPE_CHECKING:
    import aiohttp

SAMPLING: Mapping[str, Any] = {"temperature": 0, "seed": 0, "max_tokens": 400}
KEY_VARIABLE = "TILTH_API_KEY"

_BACKOFF_S, _BACKOFF_MAX_S = 0.5, 30.0
_RETRY_AFTER_MAX_S = 120.0
_TRIPS = 5  # failures in a row that open an endpoint's breaker
_CONNECT_S = 10.0


@dataclass
class _Endpoint:
    url: str
    in_flight: int = 0
    turn: int = 0
    failures: int = 0
    """In a row, since its last answer."""
    pause_s: float = 0.0
    """0 while the breaker is closed."""
    due: float = 0.0
    """When an open one may be tried again."""
    trying: bool = False
    why: str = ""
    proxy: str | None = None

    @property
    def open(self) -> bool:
        return self.pause_s > 0


@dataclass
class _Problem:
    """Why a try gave no answer."""

    error: CallError
    detail: str
    after_s: float = 0.0
    """What the server asked to wait."""
    charged: bool = True
    """Counts as one of the row's tries."""


class _Stopped(Exception):
    """Inside: a row ends with this."""

    def __init__(self, failed: Failed):
        self.failed = failed


class Client:
    """`urls` with or without /v1. The key, where servers want one, is in TILTH_API_KEY and is never written anywhere.

    model: as the servers call it; with several of them the same everywhere. revision: what changes when the model
    behind that name does (a hash or date of the weights); by default what the server calls the model's root.
    schema: JSON schema that answers must have; None for servers that take none. sampling: fields of a request, over
    SAMPLING; None removes one. concurrency: requests in flight, over all endpoints. request_s, deadline_s: seconds
    for one request, and for a row with all its tries. patience_s: seconds that the run stays paused before it ends.
    """

    def __init__(
        self, urls: Sequence[str], *, model: str, revision: str = "", schema: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None, concurrency: int = 64, request_s: float = 120.0,
        deadline_s: float = 900.0, tries: int = 8, patience_s: float = 3600.0,
        on_line: Callable[[str], None] | None = None,
    ):  # fmt: skip
        if not urls:
            raise UserError("the label backend needs at least one URL")
        self._endpoints = [
            _Endpoint(url, turn=number, proxy=_proxy(url)) for number, url in enumerate(dict.fromkeys(map(_base, urls)))
        ]
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        self.model, self.revision = model, revision
        self._sampling = {k: v for k, v in {**SAMPLING, **(sampling or {})}.items() if v is not None}
        self._fields: dict[str, Any] = {"model": model, **self._sampling}
        if schema is not None:
            named = {"name": "label", "schema": dict(schema), "strict": True}
            self._fields["response_format"] = {"type": "json_schema", "json_schema": named}
        self._concurrency, self._request_s, self._deadline_s = concurrency, request_s, deadline_s
        self._tries, self._patience_s = tries, patience_s
        self._say = on_line or (lambda _: None)
        self._paused_since: float | None = None
        self._turns = len(self._endpoints)
        self.retries: Counter[str] = Counter()
        """Tries without an answer, by class of error."""

    @property
    def identity(self) -> Mapping[str, str]:
        return {"backend": "openai", "model": self.model, "revision": self.revision}

    @property
    def sampling(self) -> Mapping[str, Any]:
        return self._sampling

    async def check(self) -> None:
        """Asks each endpoint for its models, and takes the revision from there when none was given. Raises UserError
        when one does not answer, wants another key, or does not serve the model."""
        roots = set()
        async with self._session() as session:
            for endpoint in self._endpoints:
                cards = await self._cards(session, endpoint.url)
                if self.model not in cards:
                    raise UserError(f"{endpoint.url} serves {', '.join(cards) or 'no model'}, not {self.model}")
                roots.add(str(cards[self.model].get("root") or self.model))
        if not self.revision:
            if len(roots) > 1:
                raise UserError(
                    f"the endpoints serve different models as {self.model} ({', '.join(sorted(roots))}): serve one, or "
                    "state a `revision` if they are the same"
                )
            self.revision = roots.pop()

    async def label(self, rows: AsyncIterator[Request] | Iterable[Request]) -> AsyncGenerator[Reply, None]:
        """Replies in order of completion. Raises UserError when no row could fare better (a wrong key or URL),
        TilthError when no server came back within `patience_s`."""
        source = rows if isinstance(rows, AsyncIterator) else _asynchronous(rows)
        turn, out = asyncio.Lock(), asyncio.Queue[Reply | BaseException | None](self._concurrency)
        async with self._session() as session:

            async def worker() -> None:
                while True:
                    async with turn:
                        row = await anext(source, None)
                    if row is None:
                        return
                    await out.put(await self._row(session, row))

            async def all_workers() -> None:
                workers = [asyncio.create_task(worker()) for _ in range(self._concurrency)]
                end: BaseException | None = None
                try:
                    await asyncio.gather(*workers)
                except Exception as error:
                    end = error
                finally:
                    for task in workers:
                        task.cancel()
                    await asyncio.gather(*workers, return_exceptions=True)
                await out.put(end)

            running = asyncio.create_task(all_workers())
            try:
                while isinstance(reply := await out.get(), Reply):
                    yield reply
                if reply is not None:
                    raise reply
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

    # One row.

    async def _row(self, session: "aiohttp.ClientSession", row: Request) -> Reply:
        import orjson

        body = orjson.dumps({**self._fields, "messages": row.messages})
        charged, spent_s, waits = 0, 0.0, 0
        while True:
            endpoint, probe = await self._endpoint()
            begun = time.monotonic()
            left_s = self._deadline_s - spent_s
            try:
                found = await self._try(session, endpoint, probe, body, min(self._request_s, left_s))
            except _Stopped as stopped:
                return Reply(row.key, stopped.failed, Usage())
            finally:
                endpoint.in_flight -= 1
                endpoint.trying = endpoint.trying and not probe
            if not isinstance(found, _Problem):
                return Reply(row.key, *found)
            self.retries[found.error] += 1
            charged += found.charged
            waits += 1
            spent_s += time.monotonic() - begun
            pause_s = min(_BACKOFF_MAX_S, _BACKOFF_S * 2 ** min(waits - 1, 10)) * random.uniform(0.5, 1.0)
            pause_s = max(pause_s, found.after_s * random.uniform(1.0, 1.1))
            if found.error == "connection" and not found.charged:
                pause_s = 0.0  # the breaker waits instead, and the deadline does not run meanwhile
            if charged >= self._tries or spent_s + pause_s >= self._deadline_s:
                return Reply(row.key, Failed(found.error, f"{found.detail}, {waits} tries"), Usage())
            spent_s += pause_s
            await asyncio.sleep(pause_s)

    async def _try(
        self, session: "aiohttp.ClientSession", endpoint: _Endpoint, probe: bool, body: bytes, limit_s: float
    ) -> tuple[Text, Usage] | _Problem:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=limit_s, sock_connect=min(_CONNECT_S, limit_s))
        try:
            async with session.post(
                f"{endpoint.url}/chat/completions", data=body, timeout=timeout, allow_redirects=False,
                proxy=endpoint.proxy,
            ) as response:  # fmt: skip
                raw = await response.read()
                status = response.status
                after = response.headers.get("Retry-After", "")
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            reason = getattr(getattr(error, "os_error", None), "strerror", None) or "no connection"
            self._opened(endpoint, probe, self._short(str(reason)))
            return _Problem("connection", f"{endpoint.url} does not answer", charged=False)
        except TimeoutError:
            self._failed(endpoint, probe, f"no answer within {limit_s:g} s")
            return _Problem("timeout", f"no answer within {limit_s:g} s")
        except (aiohttp.ClientError, ConnectionError) as error:
            self._failed(endpoint, probe, f"broke the connection off ({type(error).__name__})")
            return _Problem("connection", f"{endpoint.url} broke the connection off")
        if status == 200:
            found = _answer(raw)
            if found is None:
                self._failed(endpoint, probe, "answers with what is no chat completion")
                return _Problem("server_error", f"no chat completion: {self._words(raw)}")
            self._answered(endpoint)
            return found
        detail = f"{status}: {self._words(raw)}"
        if status == 429:
            self._answered(endpoint)  # it is there, and says so
            return _Problem("rate_limited", detail, _retry_after(after), charged=False)
        if status >= 500 or status == 408:
            self._failed(endpoint, probe, f"answers {detail}")
            return _Problem("timeout" if status == 408 else "server_error", detail, _retry_after(after))
        if status in (401, 403):
            raise self._refused(endpoint.url)
        if status in (404, 405) or status < 400:
            raise UserError(f"{endpoint.url} answers {detail}: correct the label backend's URL or model")
        self._answered(endpoint)
        raise _Stopped(Failed("bad_request", detail))

    # Endpoints.

    async def _endpoint(self) -> tuple[_Endpoint, bool]:
        """One to send a row to, counted as in flight, and whether the row tries an open one; waits while there is
        none."""
        while True:
            now = time.monotonic()
            due = [e for e in self._endpoints if e.open and not e.trying and now >= e.due]
            usable = due[:1] or [e for e in self._endpoints if not e.open]
            if usable:
                chosen = min(usable, key=lambda e: (e.in_flight, e.turn))
                chosen.trying = chosen.trying or bool(due)
                self._turns += 1
                chosen.turn = self._turns
                chosen.in_flight += 1
                return chosen, bool(due)
            if self._paused_since is None:
                self._paused_since = now
                self._say(f"paused: {'; '.join(f'{e.url}: {e.why}' for e in self._endpoints)}; asking again")
            elif now - self._paused_since > self._patience_s:
                raise TilthError(
                    f"no label server answered for {self._patience_s:g} s ({self._endpoints[0].url}): start it again "
                    "and run the same command, which goes on from here"
                )
            soonest = min((e.due for e in self._endpoints if not e.trying), default=now + 0.1)
            await asyncio.sleep(min(0.25, max(0.01, soonest - now)) * random.uniform(1.0, 1.5))

    def _answered(self, endpoint: _Endpoint) -> None:
        endpoint.failures, endpoint.pause_s = 0, 0.0
        if self._paused_since is not None:
            self._say(f"{endpoint.url} answers again after {time.monotonic() - self._paused_since:.0f} s: going on")
            self._paused_since = None

    def _failed(self, endpoint: _Endpoint, probe: bool, why: str) -> None:
        endpoint.failures += 1
        if probe or endpoint.failures >= _TRIPS:
            self._opened(endpoint, probe, why)

    def _opened(self, endpoint: _Endpoint, probe: bool, why: str) -> None:
        endpoint.why = why
        if endpoint.open and not probe:
            return  # one of those that were in flight when it opened
        endpoint.pause_s = min(_BACKOFF_MAX_S, endpoint.pause_s * 2 or _BACKOFF_S)
        endpoint.due = time.monotonic() + endpoint.pause_s * random.uniform(0.8, 1.0)

    # What the server says, and how we say it.

    def _session(self) -> "aiohttp.ClientSession":
        import aiohttp

        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers)

    async def _cards(self, session: "aiohttp.ClientSession", url: str) -> dict[str, Mapping[str, Any]]:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=30.0, sock_connect=_CONNECT_S)
        try:
            async with session.get(
                f"{url}/models", timeout=timeout, allow_redirects=False, proxy=_proxy(url)
            ) as response:
                raw = await response.read()
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            reason = getattr(getattr(error, "os_error", None), "strerror", None) or type(error).__name__
            raise UserError(
                f"nothing answers at {url} ({reason}): start a server with `tilth serve`, or correct the URL"
            ) from None
        if response.status in (401, 403):
            raise self._refused(url)
        try:
            return {str(card["id"]): card for card in json.loads(raw)["data"]}
        except (ValueError, LookupError, TypeError):
            raise UserError(
                f"{url} is no OpenAI-compatible API (it answers {response.status} for its models): correct the URL"
            ) from None

    def _refused(self, url: str) -> UserError:
        what = "does not take the API key" if self._key else "wants an API key"
        return UserError(f"{url} {what}: put the right one into {KEY_VARIABLE}")

    def _words(self, raw: bytes) -> str:
        """A server's own words in one line."""
        text = raw[:4000].decode(errors="replace")
        try:
            found = json.loads(text)
            found = found.get("error", found)
            text = str(found if isinstance(found, str) else found.get("message") or found.get("detail") or text)
        except (ValueError, AttributeError, RecursionError):
            pass
        return self._short(text)

    def _short(self, text: str) -> str:
        """Never with our key."""
        text = " ".join(text.split())
        text = text.replace(self._key, "…") if self._key else text
        return text if len(text) <= 200 else text[:199] + "…"


async def _asynchronous(rows: Iterable[Request]) -> AsyncIterator[Request]:
    for row in rows:
        yield row


def _answer(raw: bytes) -> tuple[Text, Usage] | None:
    """The first choice of a chat completion; None when it is none."""
    import orjson

    try:
        try:
            answer = orjson.loads(raw)
        except orjson.JSONDecodeError:  # lone surrogates, which the standard library takes
            answer = json.loads(raw)
        choice = answer["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
        finish = str(choice.get("finish_reason") or "stop")
        usage = answer.get("usage") or {}
        tokens = Usage(int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if refusal or finish == "content_filter":
        return Text(_clean(refusal or content or ""), "refusal"), tokens
    return Text(_clean(content if isinstance(content, str) else ""), finish), tokens


def _clean(text: object) -> str:
    return str(text).encode(errors="replace").decode()


def _retry_after(value: str) -> float:
    """Seconds; the header has them, or a date."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return 0.0
    return min(_RETRY_AFTER_MAX_S, seconds) if seconds > 0 else 0.0  # not for NaN


def _base(url: str) -> str:
    """Up to /v1, without a slash at the end."""
    try:
        parts = urllib.parse.urlsplit(url)
        named = bool(parts.hostname) and parts.scheme in ("http", "https") and (parts.port or 1) > 0
    except ValueError:
        raise UserError("the label backend's URL can't be read: give one like http://127.0.0.1:8000/v1") from None
    if parts.username or parts.password or parts.query:
        raise UserError(f"the label backend's URL has a password or a query in it: put the key into {KEY_VARIABLE}")
    if not named:
        raise UserError(f"{url} is no URL of a server: give one like http://127.0.0.1:8000/v1")
    return url.rstrip("/").removesuffix("/v1") + "/v1"


def _proxy(url: str) -> str | None:
    """As urllib chooses it; aiohttp's own way would look into ~/.netrc before each request."""
    parts = urllib.parse.urlsplit(url)
    return None if urllib.request.proxy_bypass(parts.hostname or "") else urllib.request.getproxies().get(parts.scheme)
