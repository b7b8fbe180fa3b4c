"""The client against a local aiohttp server. The server is a FAKE (curation/label/fake_server.py): it answers by a
hash of the document and fails on purpose. It shows what the client does about failures; it can't show a real server's
speed, its schema enforcement or its own way of failing (those are in the tests with vLLM)."""

import asyncio
import logging
import threading
import time

import pytest

from curation.errors import TilthError, UserError
from curation.label import client as module
from curation.label.backend import Failed, Request, Text, Usage
from curation.label.client import Client
from curation.label.fake_server import Faults, Server, answer
from curation.label.rubric import Rubric

RUBRIC = Rubric.load()
KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No key of the one who runs the tests, and short waits."""
    monkeypatch.delenv("TILTH_API_KEY", raising=False)
    monkeypatch.setattr(module, "_BACKOFF_S", 0.02)
    monkeypatch.setattr(module, "_BACKOFF_MAX_S", 0.2)


def texts(count: int) -> list[str]:
    return [f"document {n} has some words of its own in it" for n in range(count)]


def requests(documents) -> list[Request]:
    return [Request(str(n), RUBRIC.messages(text)) for n, text in enumerate(documents)]


def ask(client: Client, rows) -> dict:
    async def run():
        return {reply.key: reply async for reply in client.label(rows)}

    return asyncio.run(run())


def make(server, **options) -> Client:
    servers = server if isinstance(server, list) else [server]
    return Client([s.url for s in servers], model="fake", schema=RUBRIC.schema(), **options)


class Standing(Server):
    """A fake whose answer a test writes itself."""

    def __init__(self, respond):
        super().__init__()
        self.bodies, self.respond = [], respond

    async def _respond(self, body, headers):
        self.bodies.append(body)
        return self.respond(len(self.bodies))


def good(text="{}", **more):
    message = {"role": "assistant", "content": text, **more.pop("message", {})}
    return 200, {"choices": [{"message": message, "finish_reason": "stop", **more}], "usage": {"prompt_tokens": 7}}, {}


# ---- answers


def test_every_row_gets_its_own_answer_and_no_more_than_asked_are_in_flight():
    documents = texts(200)
    with Server(Faults(latency_s=0.01)) as server:
        client = make(server, concurrency=16)
        found = ask(client, requests(documents))
        assert {key: reply.result for key, reply in found.items()} == {
            str(n): Text(answer(text)[0]) for n, text in enumerate(documents)
        }
        assert all(reply.usage.input_tokens > 100 for reply in found.values())
        assert server.most_at_once <= 16
        assert set(server.calls.values()) == {1}


def test_the_request_asks_for_the_schema_at_temperature_0_with_a_seed():
    with Standing(lambda _: good()) as server:
        client = make(server, sampling={"seed": None, "chat_template_kwargs": {"enable_thinking": False}})
        ask(client, requests(["x"]))
        [body] = server.bodies
    assert body["messages"] == RUBRIC.messages("x")
    assert body["response_format"]["json_schema"]["schema"] == RUBRIC.schema()
    assert (body["temperature"], body["max_tokens"], "seed" in body) == (0, 400, False)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert Client([server.url], model="m").sampling["seed"] == 0


@pytest.mark.parametrize(
    ("response", "result"),
    [
        (good("a", finish_reason="length"), Text("a", "length")),
        (good(None), Text("")),
        (good(None, message={"refusal": "I won't"}), Text("I won't", "refusal")),
        (good("x", finish_reason="content_filter"), Text("x", "refusal")),
        (good("half \ud83d of a pair"), Text("half ? of a pair")),
    ],
)
def test_kinds_of_answers(response, result):
    with Standing(lambda _: response) as server:
        assert ask(make(server), requests(["x"]))["0"] == ("0", result, Usage(7, 0))


def test_memory_is_bounded_by_concurrency_not_by_rows():
    taken = 0

    async def run(client):
        nonlocal taken

        async def rows():
            nonlocal taken
            for request in requests(texts(300)):
                taken += 1
                yield request

        answered = 0
        async for _ in client.label(rows()):
            answered += 1
            await asyncio.sleep(0.001)
            assert taken - answered <= 2 * 8 + 1  # in flight, and done but not yet read
        return answered

    with Server() as server:
        assert asyncio.run(run(make(server, concurrency=8))) == 300


# ---- failures


def test_busy_broken_and_slow_tries_are_repeated():
    documents = texts(120)
    with Server(Faults(busy=0.1, broken=0.1, timeout=0.05)) as server:
        client = make(server, concurrency=32, request_s=0.3)
        found = ask(client, requests(documents))
        assert [found[str(n)].result.text for n in range(120)] == [answer(text)[0] for text in documents]
        assert set(client.retries) == {"rate_limited", "server_error", "timeout"}
        assert set(server.answered.values()) == {1}


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_is_not_repeated(status):
    with Standing(lambda _: (status, {"error": {"message": "too long"}}, {})) as server:
        found = ask(make(server), requests(["x", "y"]))
        assert len(server.bodies) == 2
        assert found["0"].result == Failed("bad_request", f"{status}: too long")


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "wants an API key"), (403, "wants an API key"), (404, "correct the label backend's URL"), (302, "correct")],
)
def test_what_no_row_could_do_better_ends_the_run_with_one_sentence(status, words):
    with Standing(lambda _: (status, {"error": "no"}, {"Location": "http://127.0.0.1:9/"})) as server:
        with pytest.raises(UserError, match=words) as error:
            ask(make(server, concurrency=4), requests(texts(50)))
        assert "\n" not in str(error.value)
        assert len(server.bodies) <= 8


@pytest.mark.parametrize("after", ["0.4", "date"])
def test_retry_after_is_waited_for(after):
    from email.utils import formatdate

    def respond(n):
        value = formatdate(time.time() + 2, usegmt=True) if after == "date" else after
        return good() if n > 1 else (429, {}, {"Retry-After": value})

    with Standing(respond) as server:
        begun = time.monotonic()
        found = ask(make(server), requests(["x"]))
        assert isinstance(found["0"].result, Text)
        assert time.monotonic() - begun >= 0.4


def test_a_row_ends_at_its_deadline_or_after_its_tries():
    with Server(Faults(timeout=1.0)) as server:
        begun = time.monotonic()
        found = ask(make(server, request_s=0.2, deadline_s=0.5), requests(["x"]))
        assert found["0"].result.error == "timeout"
        assert time.monotonic() - begun < 2
    with Standing(lambda _: (500, {"detail": "engine"}, {})) as server:
        found = ask(make(server, tries=3), requests(["x"]))
        assert found["0"].result == Failed("server_error", "500: engine, 3 tries")
        assert len(server.bodies) == 3
    with Standing(lambda _: (429, {}, {"Retry-After": "100"})) as server:
        assert ask(make(server, deadline_s=50), requests(["x"]))["0"].result.error == "rate_limited"


def test_a_200_that_is_no_completion_is_a_servers_error():
    with Standing(lambda _: (200, {"ok": True}, {})) as server:
        assert ask(make(server, tries=2), requests(["x"]))["0"].result.error == "server_error"


# ---- the breaker, and several endpoints


def test_the_run_pauses_while_the_server_is_gone_and_goes_on_after():
    lines = []
    documents = texts(400)
    with Server(Faults(latency_s=0.01)) as server:
        client = make(server, concurrency=16, on_line=lines.append, deadline_s=1.0)

        def restart():
            while server.answered.total() < 100:
                time.sleep(0.005)
            server.stop()
            time.sleep(1.5)  # longer than a row's deadline, which does not run meanwhile
            server.start()

        thread = threading.Thread(target=restart)
        thread.start()
        found = ask(client, requests(documents))
        thread.join()
    assert [found[str(n)].result.text for n in range(400)] == [answer(text)[0] for text in documents]
    assert len(lines) == 2
    assert lines[0].startswith(f"paused: {server.url}: ")
    assert "answers again" in lines[1]


def test_patience_has_an_end():
    with Server() as server:
        pass
    with pytest.raises(TilthError, match=r"no label server answered for 0\.3 s"):
        ask(make(server, patience_s=0.3), requests(["x"]))


def test_several_endpoints_share_the_work_and_one_that_is_gone_costs_no_row():
    documents = texts(300)
    with Server(Faults(latency_s=0.005)) as one, Server(Faults(latency_s=0.005)) as two, Server() as gone:
        gone.stop()
        lines = []
        found = ask(make([one, gone, two], concurrency=16, on_line=lines.append), requests(documents))
        assert [found[str(n)].result.text for n in range(300)] == [answer(text)[0] for text in documents]
        assert min(one.answered.total(), two.answered.total()) > 100
        assert not lines


def test_an_endpoint_that_only_fails_is_left_alone():
    with Server() as good_one, Standing(lambda _: (503, {}, {})) as bad:
        found = ask(make([good_one, bad], concurrency=8), requests(texts(300)))
        assert all(isinstance(reply.result, Text) for reply in found.values())
        assert len(bad.bodies) < 60


# ---- before it starts, and secrets


def test_what_is_checked_before_anything_is_spent():
    with Server() as server:
        client = make(server)
        asyncio.run(client.check())
        assert client.identity == {"backend": "openai", "model": "fake", "revision": "/models/fake"}
        with pytest.raises(UserError, match="serves fake, not other"):
            asyncio.run(Client([server.url], model="other").check())
        with pytest.raises(UserError, match="no OpenAI-compatible API"):
            asyncio.run(Client([server.url + "/x"], model="fake").check())
    with pytest.raises(UserError, match="nothing answers at"):
        asyncio.run(make(server).check())
    for url, words in [("localhost:8000", "no URL"), ("http://u:p@h", "password"), ("http://h:x", "can't be read")]:
        with pytest.raises(UserError, match=words):
            Client([url], model="m")


def test_the_key_is_sent_and_never_shown(monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    lines = []
    monkeypatch.setenv("TILTH_API_KEY", KEY)
    with Server(key=KEY) as server:
        assert isinstance(ask(make(server), requests(["x"]))["0"].result, Text)
        server.key = "another"
        with pytest.raises(UserError, match="does not take the API key") as error:
            ask(make(server), requests(["x"]))
        shown = str(error.value)
    # A server that says the key back, in every kind of failure.
    for status in (400, 429, 500, 302):
        with Standing(lambda _, s=status: (s, {"error": {"message": f"header Bearer {KEY}"}}, {})) as echo:
            client = make(echo, tries=2, deadline_s=0.3, on_line=lines.append)
            try:
                shown += repr(ask(client, requests(texts(8))))
            except UserError as error:
                shown += str(error)
            shown += repr(client) + repr(client._endpoints)
    out = capfd.readouterr()
    everything = shown + "".join(lines) + caplog.text + out.out + out.err
    assert "Bearer …" in everything
    assert KEY not in everything


def test_overhead_of_a_request_at_concurrency_64():
    """Printed with -s. The server is in its own process, on the same cores as the client."""
    import json
    import subprocess
    import sys

    code = (
        "import asyncio, sys; from aiohttp import web\n"
        'body = b\'{"choices":[{"message":{"content":"{}"},"finish_reason":"stop"}],"usage":{}}\'\n'
        "async def reply(request):\n"
        "    await request.read()\n"
        "    return web.Response(body=body, content_type='application/json')\n"
        "async def main():\n"
        "    app = web.Application(); app.add_routes([web.post('/v1/chat/completions', reply)])\n"
        "    runner = web.AppRunner(app, access_log=None); await runner.setup()\n"
        "    await web.TCPSite(runner, '127.0.0.1', 0).start(); print(runner.addresses[0][1], flush=True)\n"
        "    await asyncio.to_thread(sys.stdin.read)\n"
        "asyncio.run(main())\n"
    )
    server = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        rows = requests(texts(1000))
        client = Client([url], model="fake", schema=RUBRIC.schema(), concurrency=64)
        ask(client, rows[:100])
        wall, cpu = time.perf_counter(), time.process_time()
        assert len(ask(client, rows)) == 1000
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"requests_per_s": 1000 / wall, "wall_us": wall * 1e3, "client_cpu_us": cpu * 1e3}))
    finally:
        server.communicate("")
