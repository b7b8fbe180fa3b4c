"""A model behind an OpenAI-compatible API. Log-likelihoods need vLLM's additions to it; completions do not.

**Letters**: log p of chosen ids at the next position (`logprob_token_ids`, whatever their rank), so one prompt answers
an ask and the server's prefix cache holds what its neighbours share. **Longer continuations**: the prompt ends before
the continuation's last token; `prompt_logprobs` gives the tokens inside, `logprob_token_ids` the last. So a sequence
of exactly the model's length fits, which with `echo` it does not: vLLM keeps a place for one more token. With
`prompt_logprobs` vLLM reads nothing from its prefix cache.
"""

import asyncio
import http.client
import json
import os
import queue
import random
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from curation.errors import TilthError, UserError
from evaluation.backends import Ask, Batch, Generate, Tokens

# vLLM 0.32 on one core, 1.5 M parameters, 100-250 tokens of which neighbours share 70 %; 1, 8, 16 prompts in a request:
# 313, 339, 335 letters' prompts/s (±7 %), 92, 89, 101 continuations/s of 12 tokens; `echo` is as fast as
# `prompt_logprobs` (71 and 74, ±10). The engine is the brake, not HTTP: small lists commit early and spare the client.
_PROMPTS = 8  # in one request
_IDS = 128  # most that vLLM takes as logprob_token_ids
_TRIES = 5
_WAIT_S = 0.5  # before the second try; then twice as long each time
_GONE_S = 5.0  # of refused connections
_ASK_S = 30.0  # for a question about the server

_Value = tuple[float, ...] | str
_Read = Callable[[Any], _Value]
"""From one element of `choices`."""


@dataclass(frozen=True)
class _Request:
    """Prompts that travel together, and how each one's answer is read."""

    fields: dict[str, Any]
    prompts: list[Tokens]
    places: list[tuple[int, int]]
    """Of each prompt: index of the ask, and number of the continuation (0 when all are read at once)."""
    reads: Sequence[_Read]


class OpenAI:
    """`url` with or without /v1; the key, where the server wants one, is in TILTH_API_KEY or OPENAI_API_KEY.

    concurrency: requests at a time, of a few prompts each. deadline_s: seconds for one request. on_line: what is
    worth telling while it runs.

    Raises UserError when nothing answers at `url`, when it is no OpenAI-compatible API, or when it serves several
    models and none of them is named."""

    name = "openai"

    def __init__(
        self, url: str, *, model: str | None = None, concurrency: int = 16, deadline_s: float = 600.0,
        on_line: Callable[[str], None] | None = None,
    ):  # fmt: skip
        self.url = _base(url)
        self._key = (os.environ.get("TILTH_API_KEY") or os.environ.get("OPENAI_API_KEY") or "").strip()
        self._concurrency, self._deadline_s = concurrency, deadline_s
        self._say = on_line or (lambda _: None)
        cards = self._cards()
        card = cards.get(model or "") if model or len(cards) != 1 else next(iter(cards.values()))
        if card is None:
            named = f", not {model}" if model else ""
            raise UserError(f"{self.url} serves {', '.join(cards)}{named}: name one of them as the model")
        # A LoRA adapter's length and tokenizer are those of the model that it was made for.
        whole = cards.get(card.get("parent") or "", card)
        self.model = str(card["id"])
        self.root = str(whole.get("root") or whole["id"])
        """Path or hub id of the served checkpoint, as the server sees it; without one, the model's name."""
        self.max_length = int(whole.get("max_model_len") or 1_000_000)
        self._vllm = card.get("owned_by") == "vllm"
        self._server = self._version(str(card.get("owned_by") or ""))

    def facts(self) -> dict[str, str]:
        # vLLM's default name for a model is its path.
        model = Path(self.model).name if self.model.startswith("/") else self.model
        return {"backend": self.name, "server": self._server, "model": model}

    def score(self, asks: Sequence[Ask], done: Collection[int] = ()) -> Iterator[Batch]:
        """Raises UserError when the server gives no log-probabilities of chosen tokens."""
        requests = [*self._letters(asks, done), *self._continuations(asks, done)]
        found: dict[int, dict[int, Any]] = {}
        with closing(self._run(requests)) as lines:
            for line in lines:
                answered = []
                for (index, number), value in line:
                    values = found.setdefault(index, {})
                    values[number] = value
                    if asks[index].single or len(values) == len(asks[index].continuations):
                        answered.append(index)
                answers = [sorted(found.pop(index).items()) for index in answered]
                if answered:
                    yield Batch(tuple(answered), tuple(tuple(p for _, ps in answer for p in ps) for answer in answers))

    def generate(self, asks: Sequence[Generate], done: Collection[int] = ()) -> Iterator[Batch]:
        """Texts begin as they continue the context, so often with a space."""
        # Else vLLM takes a penalty from the checkpoint's generation_config.json, where other servers know none.
        fields = {"repetition_penalty": 1.0} if self._vllm else {}
        requests = []
        for length in sorted({ask.max_tokens for ask in asks}):
            for part in _parts([i for i, ask in enumerate(asks) if ask.max_tokens == length and i not in done]):
                contexts, places = [asks[index].context for index in part], [(index, 0) for index in part]
                requests.append(_Request({"max_tokens": length, **fields}, contexts, places, [_text] * len(part)))
        with closing(self._run(requests)) as lines:
            for line in lines:
                yield Batch(tuple(index for (index, _), _ in line), tuple(value for _, value in line))

    # What is sent, and how it is read.

    def _letters(self, asks: Sequence[Ask], done: Collection[int]) -> Iterator[_Request]:
        indices: list[int] = []
        ids: set[int] = set()
        for index in [index for index, ask in enumerate(asks) if ask.single and index not in done]:
            wanted = {tokens[0] for tokens in asks[index].continuations}
            if len(wanted) > _IDS:
                raise TilthError(f"an ask has {len(wanted)} continuations, and vLLM takes {_IDS} at most")
            if indices and (len(indices) == _PROMPTS or len(ids | wanted) > _IDS):
                yield self._lettered(asks, indices, ids)
                indices, ids = [], set()
            indices, ids = [*indices, index], ids | wanted
        if indices:
            yield self._lettered(asks, indices, ids)

    def _lettered(self, asks: Sequence[Ask], indices: list[int], ids: set[int]) -> _Request:
        reads = [_next(tuple(tokens[0] for tokens in asks[index].continuations)) for index in indices]
        return _Request(_asking(ids), [asks[i].context for i in indices], [(i, 0) for i in indices], reads)

    def _continuations(self, asks: Sequence[Ask], done: Collection[int]) -> Iterator[_Request]:
        rows = [
            (index, number, ask.context, tokens)
            for index, ask in enumerate(asks)
            if not ask.single and index not in done
            for number, tokens in enumerate(ask.continuations)
        ]
        for part in _parts(rows):
            yield _Request(
                {**_asking({tokens[-1] for _, _, _, tokens in part}), "prompt_logprobs": 0},
                [context + tokens[:-1] for _, _, context, tokens in part],
                [(index, number) for index, number, _, _ in part],
                [_sum(len(context), tokens) for _, _, context, tokens in part],
            )

    # The loop in its thread.

    def _run(self, requests: list[_Request]) -> Generator[list[tuple[tuple[int, int], _Value]], None, None]:
        """Places and values of each request as it is answered. Nothing goes on when the iterator is closed."""
        if not requests:
            return
        out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        loop = asyncio.new_event_loop()
        task = loop.create_task(_Run(self, requests, out.put).main())

        def work() -> None:
            try:
                loop.run_until_complete(task)
            except asyncio.CancelledError:
                pass
            except BaseException as error:
                out.put(error)
            finally:
                loop.run_until_complete(loop.shutdown_default_executor())  # which looks names up

        thread = threading.Thread(target=work, name="tilth-openai", daemon=True)
        thread.start()
        try:
            left = len(requests)
            while left:
                got = out.get()
                if isinstance(got, BaseException):
                    raise got
                if isinstance(got, str):
                    self._say(got)
                    continue
                left -= 1
                yield got
        finally:
            loop.call_soon_threadsafe(task.cancel)
            thread.join()
            loop.close()

    # What the server says of itself.

    def _get(self, url: str) -> Any:
        request = urllib.request.Request(url)
        if self._key:  # not handed on to where a redirection leads
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        with urllib.request.urlopen(request, timeout=_ASK_S) as answer:
            return orjson.loads(answer.read())

    def _cards(self) -> dict[str, dict[str, Any]]:
        """Name -> what the server says of the model."""
        try:
            cards = {str(card["id"]): card for card in self._get(f"{self.url}/models")["data"]}
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise self._refused() from None
            if error.code >= 500 or error.code == 429:
                raise TilthError(f"{self.url} answers {error.code} for its models: try again later") from None
            raise self._no_api(f"it answers {error.code} for its models") from None
        except OSError as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(
                f"nothing answers at {self.url} ({self.short(str(reason))}): start a server with `tilth serve`, or "
                "correct the URL"
            ) from None
        except (ValueError, LookupError, TypeError, http.client.HTTPException):
            raise self._no_api("what it gives for its models is no list of them") from None
        if not cards:
            raise UserError(f"{self.url} serves no model: start a server with `tilth serve`")
        return cards

    def _version(self, owner: str) -> str:
        try:
            version = str(self._get(self.url.removesuffix("/v1") + "/version")["version"])
        except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException):
            version = ""
        return f"{owner} {version}".strip() or "unknown"

    # Words.

    def _no_api(self, what: str) -> UserError:
        return UserError(f"{self.url} is no OpenAI-compatible API ({what}): give the URL that `tilth serve` prints")

    def _refused(self) -> UserError:
        what = "does not take the API key" if self._key else "wants an API key"
        return UserError(f"{self.url} {what}: put the right one into TILTH_API_KEY")

    def _no_logprobs(self) -> UserError:
        return UserError(
            f"{self.model} at {self.url} gives no log-probabilities: use --scorers generation, or serve the "
            "checkpoint with vLLM"
        )

    def short(self, body: str) -> str:
        """A server's own words in one line, never with our key."""
        try:
            found = json.loads(body)
            found = found.get("error", found)
            body = str(found if isinstance(found, str) else found.get("message") or found.get("detail") or body)
        except (ValueError, AttributeError):
            pass
        body = " ".join(body.split())
        body = body.replace(self._key, "…") if self._key else body
        return body if len(body) <= 200 else body[:199] + "…"


class _Run:
    """The requests of one call, inside the loop."""

    def __init__(self, backend: OpenAI, requests: list[_Request], put: Callable[[Any], None]):
        self._backend, self._requests, self._put = backend, requests, put
        self._refused_since: float | None = None
        self._said: set[str] = set()
        """Since the last answer: many requests fail alike."""

    async def main(self) -> None:
        backend = self._backend
        todo, many = iter(self._requests), min(backend._concurrency, len(self._requests))
        headers = {"Content-Type": "application/json"}
        if backend._key:
            headers["Authorization"] = f"Bearer {backend._key}"
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=many), headers=headers, proxy=_proxy(backend.url),
            timeout=aiohttp.ClientTimeout(total=backend._deadline_s, sock_connect=_GONE_S),
        ) as session:  # fmt: skip

            async def worker() -> None:
                for request in todo:
                    self._put(self._read(request, await self._post(session, request)))

            workers = [asyncio.create_task(worker()) for _ in range(many)]
            try:
                await asyncio.gather(*workers)
            finally:
                for task in workers:
                    task.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    def _read(self, request: _Request, answer: Any) -> list[tuple[tuple[int, int], _Value]]:
        backend = self._backend
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        except (LookupError, TypeError):
            choices = []
        if len(choices) != len(request.prompts):
            raise TilthError(
                f"{backend.url} answered {len(request.prompts)} prompts with {len(choices)} completions: it is not "
                "the API that is needed, so serve the checkpoint with `tilth serve`"
            )
        try:
            values = [read(choice) for read, choice in zip(request.reads, choices, strict=True)]
        except (LookupError, TypeError, ValueError):
            if "logprobs" in request.fields:
                raise backend._no_logprobs() from None
            raise TilthError(f"{backend.url} answered with a completion without a text") from None
        return list(zip(request.places, values, strict=True))

    async def _post(self, session: aiohttp.ClientSession, request: _Request) -> Any:
        """The answer's JSON. A few tries, except while connections are refused: then for a few seconds."""
        backend, loop = self._backend, asyncio.get_running_loop()
        body = orjson.dumps({"model": backend.model, "prompt": request.prompts, "temperature": 0, **request.fields})
        tries = 0
        while True:
            pause = 0.0
            try:
                async with session.post(f"{backend.url}/completions", data=body) as response:
                    text = await response.text()
                    self._refused_since = None
                    if response.status == 200:
                        self._said.clear()
                        return orjson.loads(text)
                    if response.status != 429 and response.status < 500:
                        raise self._final(response.status, text, request)
                    what = f"answers {response.status} ({backend.short(text)})"
                    after = response.headers.get("Retry-After", "")
                    pause = min(60.0, float(after)) if after.isdecimal() else 0.0
            except orjson.JSONDecodeError:
                raise backend._no_api("what it gives for a completion is not JSON") from None
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
                now = loop.time()
                self._refused_since = now if self._refused_since is None else self._refused_since
                if now - self._refused_since >= _GONE_S:
                    raise self._gone() from None
                await asyncio.sleep(random.uniform(0.2, 0.4))
                continue
            except TimeoutError:
                what = f"gave no answer within {backend._deadline_s:g} s"
            except (aiohttp.ClientError, ConnectionError):
                what = "broke the connection off"
            tries += 1
            if tries == _TRIES:
                raise TilthError(
                    f"the server at {backend.url} {what}, {tries} times: look at its log and run the same command "
                    "again, which goes on from here"
                )
            if what not in self._said:
                self._said.add(what)
                self._put(f"the server at {backend.url} {what}: trying again")
            await asyncio.sleep(max(pause, _WAIT_S * 2 ** (tries - 1)) * random.uniform(1.0, 1.5))

    def _final(self, status: int, text: str, request: _Request) -> TilthError:
        backend = self._backend
        said = backend.short(text)
        if status in (401, 403):
            return backend._refused()
        # A server that does not know logprob_token_ids may say so; vLLM knows it and means something else.
        if "logprob" in said and "logprobs" in request.fields and not backend._vllm:
            return backend._no_logprobs()
        if status in (404, 405):
            return backend._no_api(f"it answers {status} for completions: {said}")
        return TilthError(f"the server at {backend.url} refused a request ({status}): {said}")

    def _gone(self) -> TilthError:
        return TilthError(
            f"the server at {self._backend.url} does not answer any more: start it again and run the same command, "
            "which goes on from here"
        )


def _base(url: str) -> str:
    """Up to /v1, without a slash at the end."""
    parts = urllib.parse.urlsplit(url)
    if parts.username or parts.password or parts.query:
        raise UserError("the server's URL has a password or a query in it: put the API key into TILTH_API_KEY instead")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{url} is no URL of a server: give one like http://127.0.0.1:8000/v1")
    return url.rstrip("/").removesuffix("/v1") + "/v1"


def _proxy(url: str) -> str | None:
    """As urllib chooses it; aiohttp's own way would look into ~/.netrc before each request."""
    parts = urllib.parse.urlsplit(url)
    return None if urllib.request.proxy_bypass(parts.hostname or "") else urllib.request.getproxies().get(parts.scheme)


def _parts(rows: list[Any]) -> list[list[Any]]:
    return [rows[start : start + _PROMPTS] for start in range(0, len(rows), _PROMPTS)]


def _asking(ids: set[int]) -> dict[str, Any]:
    """What makes vLLM give log p of `ids` at the position after the prompt."""
    return {"max_tokens": 1, "logprobs": 0, "logprob_token_ids": sorted(ids), "return_tokens_as_token_ids": True}


def _next(ids: Tokens) -> _Read:
    def read(choice: Any) -> tuple[float, ...]:
        found = choice["logprobs"]["top_logprobs"][0]
        return tuple(float(found[f"token_id:{token}"]) for token in ids)

    return read


def _sum(start: int, tokens: Tokens) -> _Read:
    """Σ log p of `tokens`, which begin at position `start` of the sequence."""
    last = _next(tokens[-1:])

    def read(choice: Any) -> tuple[float]:
        inside = choice["prompt_logprobs"][start:]
        found = [float(row[str(token)]["logprob"]) for row, token in zip(inside, tokens[:-1], strict=True)]
        return (sum(found) + last(choice)[0],)  # type: ignore[operator]

    return read


def _text(choice: Any) -> str:
    return str(choice["text"])
