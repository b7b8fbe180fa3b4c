"""A fake language model behind /v1/chat/completions, for your tests and ours:

    python -m curation.label.fake_server --port 8000

It does not read. Stance, quote and confidence are functions of a hash of the document, so a run against it shows that
requests, retries, cache, validation and counts work, and **nothing** about labels, about a model's resistance to
documents that talk to it, about a real server's schema enforcement, speed or token counts.

`Faults` are shares of documents (garbage, refusals, cut answers, quotes that are not there) or of tries (429, 500,
timeouts), drawn from hashes too: the same document meets the same answer in every run.
"""

import argparse
import asyncio
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from curation.label.rubric import CONFIDENCES, document_of
from curation.schema import STANCES


@dataclass(frozen=True)
class Faults:
    """Shares from 0 to 1."""

    garbage: float = 0.0
    refusal: float = 0.0
    truncated: float = 0.0
    wrong_quote: float = 0.0
    """First quotes that are not in the document. A second ask gets a right one, for three in four of them."""
    busy: float = 0.0  # 429, of tries
    broken: float = 0.0  # 500, of tries
    timeout: float = 0.0  # no answer, of tries
    bad_request: float = 0.0  # 400, of documents
    retry_after: str = "0"
    latency_s: float = 0.0


def answer(
    document: str, again: bool = False, faults: Faults | None = None, stance: str | None = None
) -> tuple[str, str]:
    """Text and finish_reason for a document: what the fake "thinks", faults of documents included. `stance`: said
    instead of the one by hash."""
    faults = faults or Faults()
    if _share("garbage", document) < faults.garbage:
        return ("stance: aligned!!", '["aligned"]', '{"stance": "aligned"}', "")[_number(document) % 4], "stop"
    if _share("refusal", document) < faults.refusal:
        return "I'm sorry, but I can't help with that.", "stop"
    words = document.split()
    stance = stance or STANCES[_number(document) % len(STANCES)]
    quote = " ".join(words[:8]) if stance != "unrelated" else ""
    wrong = _share("wrong_quote", document) < faults.wrong_quote
    if quote and wrong and (not again or _number(f"again {document}") % 4 == 0):
        quote = "words that no document holds: zyxwvut"
    found = {
        "evidence": quote[:240], "actor": "none" if stance == "unrelated" else "assistant", "stance": stance,
        "confidence": CONFIDENCES[_number(f"sure {document}") % len(CONFIDENCES)],
    }  # fmt: skip
    text = json.dumps(found, ensure_ascii=False)
    if _share("truncated", document) < faults.truncated:
        return text[: len(text) // 2], "length"
    return text, "stop"


class Server:
    """The fake in a thread of this process. A context manager; `stop` and `start` again, on the same port, is a
    restart, in which `calls` stay.

    stance: of a document; by default by its hash. calls: requests that came, by `name` of their messages. answered:
    those that got a 200."""

    def __init__(
        self, faults: Faults | None = None, *, port: int = 0, model: str = "fake", key: str = "",
        stance: Callable[[str], str] | None = None,
    ):  # fmt: skip
        self.faults = faults or Faults()
        self.port, self.model, self.key, self.stance = port, model, key, stance
        self.calls: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.most_at_once = 0
        self._now = 0
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        ready: threading.Event = threading.Event()
        failed: list[BaseException] = []
        self._loop = asyncio.new_event_loop()
        self._end = asyncio.Event()

        def work() -> None:
            try:
                self._loop.run_until_complete(self.serve(ready))
            except BaseException as error:
                failed.append(error)
                ready.set()
            finally:
                self._loop.close()

        self._thread = threading.Thread(target=work, name="tilth-fake-llm", daemon=True)
        self._thread.start()
        ready.wait()
        if failed:
            raise failed[0]

    def stop(self) -> None:
        """Breaks off what is in flight."""
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join()
            self._thread = None

    async def serve(self, ready: threading.Event | None = None) -> None:
        from aiohttp import web

        if not hasattr(self, "_end"):
            self._end = asyncio.Event()
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.add_routes([web.get("/v1/models", self._models), web.post("/v1/chat/completions", self._completions)])
        runner = web.AppRunner(app, shutdown_timeout=0.05, handler_cancellation=True, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = runner.addresses[0][1]
        if ready is not None:
            ready.set()
        await self._end.wait()
        await runner.cleanup()

    async def _models(self, request: Any) -> Any:
        from aiohttp import web

        return web.json_response({"data": [{"id": self.model, "root": f"/models/{self.model}", "owned_by": "fake"}]})

    async def _completions(self, request: Any) -> Any:
        from aiohttp import web

        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            status, body, headers = await self._respond(await request.json(), request.headers)
        finally:
            self._now -= 1
        self.statuses[status] += 1
        return web.json_response(body, status=status, headers=headers)

    async def _respond(self, body: Any, headers: Any) -> tuple[int, dict[str, Any], dict[str, str]]:
        faults = self.faults
        if self.key and headers.get("Authorization") != f"Bearer {self.key}":
            return 401, _error(f"wrong key {headers.get('Authorization')}"), {}
        if body.get("model") != self.model:
            return 404, _error(f"the model {body.get('model')} does not exist"), {}
        name = name_of(body["messages"])
        self.calls[name] += 1
        document, again = document_of(body["messages"]), len(body["messages"]) > 2
        if _share("bad_request", document) < faults.bad_request:
            return 400, _error("the prompt is longer than the model's length"), {}
        draw = _share(f"try {self.calls[name]}", name)
        for share, status in ((faults.busy, 429), (faults.broken, 500), (faults.timeout, 0)):
            if draw < share:
                if status == 0:
                    await asyncio.sleep(3600)
                return status, _error("try again"), {"Retry-After": faults.retry_after} if status == 429 else {}
            draw -= share
        if faults.latency_s:
            await asyncio.sleep(faults.latency_s)
        text, finish = answer(document, again, faults, self.stance(document) if self.stance else None)
        self.answered[name] += 1
        characters = sum(len(message["content"]) for message in body["messages"])
        usage = {"prompt_tokens": characters // 4, "completion_tokens": len(text) // 4}
        message = {"role": "assistant", "content": text}
        return 200, {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage}, {}


def name_of(messages: list[dict[str, str]]) -> str:
    """What a request is counted under: one name for the same messages."""
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:32]


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message}}


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8], "little")


def _share(what: str, text: str) -> float:
    return _number(f"{what} {text}") / 2**64


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m curation.label.fake_server", description="A fake LLM server, for tests."
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model", default="fake")
    for name in ("garbage", "refusal", "truncated", "wrong-quote", "busy", "broken", "timeout", "bad-request"):
        parser.add_argument(f"--{name}", type=float, default=0.0, metavar="SHARE")
    given = vars(parser.parse_args())
    port, model = given.pop("port"), given.pop("model")
    print(f"a FAKE language model on http://127.0.0.1:{port}/v1: its labels mean nothing", flush=True)
    asyncio.run(Server(Faults(**given), port=port, model=model).serve())


if __name__ == "__main__":
    main()
