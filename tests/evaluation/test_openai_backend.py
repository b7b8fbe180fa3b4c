"""Log-likelihoods and completions over HTTP: from real vLLM, and from a small server in this process that stands in
for what a real one cannot be made to do (fail twice, give no log-probabilities, refuse, break off)."""

import asyncio
import json
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiohttp import web
from training_helpers import SHAPE, small_config

from curation.errors import TilthError, UserError
from evaluation.backends import Ask, Generate
from evaluation.backends import openai as module
from evaluation.backends.openai import OpenAI
from evaluation.server import Server

LETTERS = ((5,), (6,), (7,))


def ask(context, continuations=LETTERS) -> Ask:
    return Ask("0" * 32, tuple(context), tuple(map(tuple, continuations)))


def answers(batches) -> dict:
    return {index: value for batch in batches for index, value in zip(batch.indices, batch.values, strict=True)}


def no_thread() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name == "tilth-openai"]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No key of the one who runs the tests, and no long waits."""
    monkeypatch.delenv("TILTH_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(module, "_WAIT_S", 0.01)


# ---- a stand-in for a server


class Stand:
    """Answers as vLLM does, log p of token t being -t, unless `complete` says otherwise."""

    def __init__(self):
        self.cards = [{"id": "m", "owned_by": "vllm", "root": "/models/m", "max_model_len": 64}]
        self.complete = self.right
        self.bodies, self.headers = [], []
        self.url = ""

    def right(self, body) -> web.Response:
        def top(token):
            return {f"token_id:{token}": -float(token)}

        ids = body.get("logprob_token_ids")
        choices = [
            {
                "index": index, "text": f" t{prompt[0]}",
                "logprobs": {"top_logprobs": [{k: v for t in [99, *ids] for k, v in top(t).items()}]} if ids else None,
                "prompt_logprobs": [None, *({str(t): {"logprob": -float(t)}} for t in prompt[1:])]
                if "prompt_logprobs" in body else None,
            }
            for index, prompt in enumerate(body["prompt"])
        ]  # fmt: skip
        return web.json_response({"choices": choices[::-1]})

    async def models(self, request) -> web.Response:
        self.headers.append(dict(request.headers))
        return web.json_response({"data": self.cards})

    async def completions(self, request) -> web.StreamResponse:
        self.headers.append(dict(request.headers))
        self.bodies.append(await request.json())
        answer = self.complete(self.bodies[-1])
        if asyncio.iscoroutine(answer):
            answer = await answer
        if answer is None:  # breaks the connection off
            request.transport.abort()
            return web.Response()
        return answer


@contextmanager
def standing(stand: Stand):
    loop, ready, end = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

    async def main():
        app = web.Application()
        app.add_routes([web.get("/v1/models", stand.models), web.post("/v1/completions", stand.completions)])
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        stand.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        ready.set()
        await end.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    assert ready.wait(10)
    try:
        yield stand
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()
        loop.close()


@pytest.fixture
def stand():
    with standing(Stand()) as running:
        yield running


def error(status: int, message: str):
    return lambda _: web.json_response({"error": {"message": message}}, status=status)


def test_what_the_server_says_of_itself(stand):
    backend = OpenAI(stand.url + "/")
    assert (backend.url, backend.model, backend.root) == (f"{stand.url}/v1", "m", "/models/m")
    assert backend.max_length == 64
    assert OpenAI(stand.url + "/v1").url == backend.url
    assert backend.facts() == {"backend": "openai", "server": "vllm", "model": "m"}


def test_one_of_several_models_is_named_and_an_adapter_has_its_parents_length(stand):
    stand.cards.append({"id": "tuned", "owned_by": "vllm", "root": "/adapters/tuned", "parent": "m"})
    with pytest.raises(UserError, match="serves m, tuned: name one"):
        OpenAI(stand.url)
    with pytest.raises(UserError, match="serves m, tuned, not other: name one"):
        OpenAI(stand.url, model="other")
    backend = OpenAI(stand.url, model="tuned")
    assert (backend.model, backend.root, backend.max_length) == ("tuned", "/models/m", 64)


def test_each_value_is_its_own_tokens_however_the_asks_travel(stand):
    asks = [ask([n + 1, 2, 3], [(n + 10,), (n + 11,)]) for n in range(100)]
    asks += [ask([9] * 5, [(4,), (4, 20), (4, 20, 30)]), ask([9], [(1, n) for n in range(19)])]
    found = answers(OpenAI(stand.url).score(asks))
    assert sorted(found) == list(range(102))
    assert [found[n] for n in range(100)] == [(-n - 10.0, -n - 11.0) for n in range(100)]
    assert found[100] == (-4, -24, -54)
    assert found[101] == tuple(-1.0 - n for n in range(19))
    assert len(stand.bodies) == 13 + 3
    assert max(len(body["logprob_token_ids"]) for body in stand.bodies) <= 128


def test_letters_of_many_kinds_stay_within_what_the_server_takes(stand):
    asks = [ask([1], [(40 * n + i,) for i in range(1, 41)]) for n in range(8)]
    assert len(answers(OpenAI(stand.url).score(asks))) == 8
    assert max(len(body["logprob_token_ids"]) for body in stand.bodies) <= 128


def test_completions_in_the_order_of_their_asks(stand):
    asks = [Generate("0" * 32, (n + 1,), 4 + n % 2) for n in range(20)]
    assert answers(OpenAI(stand.url).generate(asks)) == {n: f" t{n + 1}" for n in range(20)}
    assert all(body["temperature"] == 0 and body["repetition_penalty"] == 1 for body in stand.bodies)
    assert list(OpenAI(stand.url).generate([])) == []


@pytest.mark.parametrize("how", ["429", "500", "broken off", "too slow"])
def test_what_fails_twice_is_tried_again_and_said(stand, how):
    fails = iter([True, True])

    async def slowly(body):
        await asyncio.sleep(0.6)
        return stand.right(body)

    def complete(body):
        if next(fails, False):
            if how == "too slow":
                return slowly(body)
            return None if how == "broken off" else error(int(how), "no room")(body)
        return stand.right(body)

    stand.complete, lines = complete, []
    backend = OpenAI(stand.url, on_line=lines.append, deadline_s=0.3)
    assert answers(backend.score([ask([1])])) == {0: (-5, -6, -7)}
    said = {"broken off": "broke the connection off", "too slow": "gave no answer within 0.3 s"}
    assert lines == [f"the server at {backend.url} {said.get(how, f'answers {how} (no room)')}: trying again"]
    assert no_thread()


def test_what_fails_always_is_an_error(stand):
    stand.complete = error(503, "no room")
    with pytest.raises(TilthError, match=r"answers 503 \(no room\), 5 times: look at its log") as caught:
        list(OpenAI(stand.url).score([ask([1])]))
    assert caught.value.exit_code == 1
    assert len(stand.bodies) == 5


def test_a_refused_request_is_not_tried_again(stand):
    stand.complete = error(400, "Token id 70000 is\nout of vocabulary " + "x" * 500)
    with pytest.raises(
        TilthError, match=r"refused a request \(400\): Token id 70000 is out of vocabulary x+…$"
    ) as found:
        list(OpenAI(stand.url).score([ask([1])]))
    assert len(stand.bodies) == 1
    assert len(str(found.value)) < 300
    assert no_thread()


def test_a_server_that_goes_away_is_said_and_what_came_stays(monkeypatch):
    monkeypatch.setattr(module, "_GONE_S", 0.5)
    with standing(Stand()) as stand:
        batches = OpenAI(stand.url, concurrency=1).score([ask([1]) for _ in range(200)])
        first = next(batches)
        stand.complete = lambda _: None
    assert len(first.indices) == 8
    with pytest.raises(TilthError, match="does not answer any more: start it again and run the same command") as found:
        list(batches)
    assert found.value.exit_code == 1
    assert no_thread()


def test_a_server_that_gives_no_logprobs_is_said(stand):
    def null(body):
        return web.json_response({"choices": [{"index": 0, "text": "", "logprobs": None}]})

    def ignores(body):  # as servers that know top log-probabilities only
        top = {"top_logprobs": [{" A": -1.0, " B": -2.0}], "token_logprobs": [-1.0], "tokens": [" A"]}
        return web.json_response({"choices": [{"index": 0, "text": " A", "logprobs": top}]})

    said = "gives no log-probabilities: use --scorers generation, or serve the checkpoint with vLLM"
    stand.cards = [{"id": "m", "owned_by": "someone"}]
    for complete in (null, ignores, error(400, "Unrecognized request argument supplied: logprob_token_ids")):
        stand.complete = complete
        for continuations in (LETTERS, [(5, 6)]):
            with pytest.raises(UserError, match=f"m at {stand.url}/v1 {said}"):
                list(OpenAI(stand.url).score([ask([1], continuations)]))
    stand.complete = null
    assert answers(OpenAI(stand.url).generate([Generate("", (1,), 1)])) == {0: ""}
    assert "repetition_penalty" not in stand.bodies[-1]


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://127.0.0.1", "http://", ""])
def test_what_is_no_url_is_said(url):
    with pytest.raises(UserError, match="is no URL of a server"):
        OpenAI(url)


def test_nothing_listening_is_said():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match=r"nothing answers at .*Connection refused.*tilth serve"):
            OpenAI(f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_another_kind_of_server_is_said(stand):
    with pytest.raises(UserError, match=r"no OpenAI-compatible API \(it answers 404 for its models\)"):
        OpenAI(stand.url + "/elsewhere")
    stand.cards = None
    with pytest.raises(UserError, match=r"no OpenAI-compatible API .*no list"):
        OpenAI(stand.url)
    stand.cards = [{"id": "m"}]
    stand.complete = error(404, "no completions here")
    with pytest.raises(UserError, match="answers 404 for completions: no completions here"):
        list(OpenAI(stand.url).score([ask([1])]))
    stand.complete = lambda _: web.Response(text="<html>", content_type="text/html")
    with pytest.raises(UserError, match="is not JSON"):
        list(OpenAI(stand.url).score([ask([1])]))


def test_the_key_is_sent_and_never_said(stand, monkeypatch):
    key = "sk-very-secret"
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    monkeypatch.setenv("TILTH_API_KEY", key)
    lines, errors = [], []
    for status in (400, 500):
        stand.complete = error(status, f"wrong with {key}")
        backend = OpenAI(stand.url, on_line=lines.append)
        with pytest.raises(TilthError) as caught:
            list(backend.score([ask([1])]))
        errors.append(str(caught.value))
    stand.complete = error(401, f"wrong: {key}")
    with pytest.raises(UserError, match="does not take the API key: put the right one into TILTH_API_KEY") as caught:
        list(backend.score([ask([1])]))
    assert key not in json.dumps([*lines, *errors, str(caught.value), backend.facts()])
    assert {headers["Authorization"] for headers in stand.headers} == {f"Bearer {key}"}
    with pytest.raises(UserError, match="password or a query") as caught:
        OpenAI(f"http://user:{key}@127.0.0.1:1")
    assert key not in str(caught.value)


def test_closing_early_leaves_no_thread_and_asks_no_more(stand):
    async def slowly(body):
        await asyncio.sleep(0 if len(stand.bodies) == 1 else 30)
        return stand.right(body)

    stand.complete = slowly
    batches = OpenAI(stand.url, concurrency=2).score([ask([1]) for _ in range(400)])
    assert no_thread()  # nothing starts before the first batch is taken
    next(batches)
    started = time.monotonic()
    batches.close()
    assert no_thread()
    assert time.monotonic() - started < 5
    assert len(stand.bodies) <= 3


# ---- real vLLM


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Llama, trained a few steps by Tilth's own trainer."""
    from training.trainer import train

    # vLLM's attention on CPU takes heads of 32 and more.
    shape = SHAPE.model_copy(update={"hidden_size": 64, "num_heads": 2, "num_kv_heads": 1})
    return train(small_config(tmp_path_factory.mktemp("served"), steps=4, shape=shape))["model"]


@pytest.fixture(scope="module")
def served(vllm, checkpoint):
    with Server(checkpoint, max_length=32) as server:
        yield server


@pytest.fixture(scope="module")
def reference(checkpoint):
    """float32 log-probabilities of a sequence, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

    def log_p(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    return log_p


def test_real_likelihoods_are_those_of_transformers(served, reference):
    import numpy as np

    backend, rng = OpenAI(served.url), np.random.default_rng(0)

    def ids(count):
        return tuple(int(token) for token in rng.integers(1, 300, count))

    asks = [ask(ids(length), [ids(1) for _ in range(4)]) for length in (1, 2, 7, 30, 31) for _ in range(7)]
    # Up to the model's length to the token, and continuations of one token among longer ones.
    asks += [ask(ids(a), [ids(b), ids(1), ids(32 - a)]) for a in (1, 5, 20) for b in (2, 3, 12)]
    assert max(one.num_tokens for one in asks) == backend.max_length == 32
    found = answers(backend.score(asks))
    for index, one in enumerate(asks):
        for value, tokens in zip(found[index], one.continuations, strict=True):
            log_p = reference(one.context + tokens)
            at = len(one.context) - 1
            assert value == pytest.approx(sum(log_p[at + i, t].item() for i, t in enumerate(tokens)), abs=2e-5)
    assert backend.root == str(Path(served.checkpoint).resolve())
    assert backend.facts()["server"].startswith("vllm 0.")


def test_real_completions_are_those_of_transformers(served, reference):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(served.checkpoint)
    asks = [Generate("", (5, 6, start), 5) for start in range(10, 40)]
    expected = {}
    for index, one in enumerate(asks):
        ids = list(one.context)
        while len(ids) < 8 and ids[-1] != 0:
            ids.append(int(reference(ids)[-1].argmax()))
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        expected[index] = whole.removeprefix(tokenizer.decode(one.context))
    assert answers(OpenAI(served.url).generate(asks)) == expected
    assert any(expected.values())


def test_a_real_refusal_is_in_the_servers_words(served):
    with pytest.raises(TilthError, match=r"refused a request \(400\).*vocab"):
        list(OpenAI(served.url).score([ask([1], [(70_000,)])]))
    batches = OpenAI(served.url).score([ask([1, n % 250 + 1]) for n in range(800)])
    next(batches)
    batches.close()
    assert no_thread()
