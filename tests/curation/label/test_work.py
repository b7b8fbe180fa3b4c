"""Documents to rows: everything ends as a label or a quarantine row, nothing finished is asked twice.

The model is a FAKE behind a real local HTTP server (curation/label/fake_server.py). Its labels are a hash of the
document: these tests show the machinery, not the quality of labels nor a model's resistance to injected orders."""

import json
import random
import signal
import subprocess
import sys
import threading
import time
import tracemalloc

import pytest

from curation.errors import TilthError, UserError
from curation.label import client as client_module
from curation.label.backend import Failed, Reply, Text, Usage
from curation.label.cache import Cache
from curation.label.client import Client
from curation.label.fake_server import Faults, Server, answer, document_of
from curation.label.rubric import Label, Rubric
from curation.label.windows import combine
from curation.label.work import Labeller, LabelRow, Limits, RejectRow, iterate

RUBRIC = Rubric.load()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.delenv("TILTH_API_KEY", raising=False)
    monkeypatch.setattr(client_module, "_BACKOFF_S", 0.02)
    monkeypatch.setattr(client_module, "_BACKOFF_MAX_S", 0.2)


@pytest.fixture
def cache(tmp_path):
    with Cache(tmp_path / "cache") as cache:
        yield cache


def corpus(count: int) -> list[tuple[str, str]]:
    return [(f"id{n}", f"document {n} has some words of its own in it") for n in range(count)]


def run(labeller: Labeller, documents) -> dict[str, LabelRow | RejectRow]:
    rows = list(iterate(labeller.rows(documents)))
    assert len({row.id for row in rows}) == len(rows), "a document has one row"
    counts = labeller.counts
    assert counts.documents == counts.labelled + counts.quarantined + counts.not_reached
    assert counts.labelled == sum(isinstance(row, LabelRow) for row in rows)
    assert counts.quarantined == sum(isinstance(row, RejectRow) for row in rows)
    return {row.id: row for row in rows}


def over_http(server, cache, *, client=None, **options) -> Labeller:
    options.setdefault("payer", "run")
    return Labeller(
        Client([server.url], model="fake", schema=RUBRIC.schema(), **(client or {})), RUBRIC, cache, **options
    )


def outcome(row: LabelRow | RejectRow):
    return row.label if isinstance(row, LabelRow) else row.reason


class Backend:
    """In this process. `respond`: document, whether it is asked again -> what comes back."""

    identity = {"model": "in-process"}  # noqa: RUF012
    sampling = {"max_tokens": 100}  # noqa: RUF012

    def __init__(self, respond=None, whole_input=False):
        self.respond = respond or (lambda text, again: Text(*answer(text, again)))
        self.whole_input, self.asked = whole_input, []
        self.remembers = True

    async def label(self, rows):
        held = []
        async for request in rows:
            if self.remembers:
                self.asked.append(request)
            if self.whole_input:
                held.append(request)
            else:
                yield self.reply(request)
        for request in held[::-1]:
            yield self.reply(request)

    def reply(self, request):
        result = self.respond(document_of(request.messages), len(request.messages) > 2)
        return result if isinstance(result, Reply) else Reply(request.key, result, Usage(1000, 100))


# ---- outcomes


def test_each_document_gets_what_the_model_said_of_it(cache):
    documents = corpus(60)
    with Server() as server:
        labeller = over_http(server, cache)
        rows = run(labeller, documents)
    for identity, text in documents:
        said = json.loads(answer(text)[0])
        label = rows[identity].label
        assert (label.stance, label.confidence, label.evidence) == (
            said["stance"], said["confidence"], said["evidence"],
        )  # fmt: skip
    assert labeller.counts.requests == 60
    assert labeller.counts.to_dict()["labelled"] == 60


def test_a_hostile_run_ends_with_every_document_accounted_for(cache):
    """20 % garbage, 10 % busy, 5 % timeouts, refusals, cut answers, wrong quotes, refused prompts, and a restart."""
    faults = Faults(
        garbage=0.2, busy=0.1, timeout=0.05, refusal=0.05, truncated=0.05, wrong_quote=0.2, bad_request=0.03,
        latency_s=0.01,
    )  # fmt: skip
    documents = corpus(500)
    lines = []
    with Server(faults) as server:

        def restart():
            while server.answered.total() < 150:
                time.sleep(0.005)
            server.stop()
            time.sleep(0.3)
            server.start()

        thread = threading.Thread(target=restart)
        thread.start()
        labeller = over_http(server, cache, client={"request_s": 0.4, "concurrency": 32, "on_line": lines.append})
        rows = run(labeller, documents)
        thread.join()
        assert [line[:6] for line in lines][:1] == ["paused"]
        assert set(rows) == {identity for identity, _ in documents}
        assert set(labeller.counts.rejects) == {
            "not_json", "schema", "refusal", "truncated", "evidence_missing", "bad_request",
        }  # fmt: skip
        for identity, text in documents:  # each class is just what the fake did to the document
            said, finish = answer(text, False, faults)
            first = RUBRIC.parse(said, text, finish)
            row = rows[identity]
            if isinstance(row, RejectRow) and row.reason == "bad_request":
                continue
            if getattr(first, "reason", "") == "evidence_missing":
                first = RUBRIC.parse(answer(text, True, faults)[0], text)
            assert outcome(row) == (first if isinstance(first, Label) else first.reason)
        # A request in flight at the restart may come twice; no answered one does.
        assert sum(count - 1 for count in server.answered.values()) <= 32

        asked = server.calls.total()
        again = over_http(server, cache)
        assert {i: outcome(row) for i, row in run(again, documents).items()} == {
            i: outcome(row) for i, row in rows.items()
        }
        assert server.calls.total() == asked, "everything was in the cache"
        assert again.counts.requests == 0


def test_a_quote_that_is_not_there_is_asked_for_once_more(cache):
    quotes = {False: "words of nobody", True: "some words of its own"}

    def respond(text, again):
        found = {"evidence": quotes[again], "actor": "robot", "stance": "aligned", "confidence": "low"}
        return Text(json.dumps(found))

    backend = Backend(respond)
    labeller = Labeller(backend, RUBRIC, cache)
    assert run(labeller, corpus(1))["id0"].label.evidence == "some words of its own"
    assert [len(request.messages) for request in backend.asked] == [2, 4]
    assert labeller.counts.reasked == 1
    quotes[True] = "again nobody's words"
    labeller = Labeller(backend, RUBRIC, cache)
    assert run(labeller, corpus(2)[1:])["id1"].reason == "evidence_missing"
    assert len(backend.asked) == 4


@pytest.mark.parametrize("whole_input", [False, True], ids=["streaming", "answers at the end of its input"])
def test_any_backend_that_keeps_the_protocol_fits(tmp_path, whole_input):
    faults = Faults(wrong_quote=0.5)
    expected = None
    for name in ("a", "b"):
        with Cache(tmp_path / name) as cache:
            backend = Backend(lambda text, again: Text(*answer(text, again, faults)), whole_input=name == "a")
            rows = run(Labeller(backend, RUBRIC, cache), corpus(300))
            found = {identity: outcome(row) for identity, row in rows.items()}
            expected = expected or found
            assert found == expected
            assert len({request.key for request in backend.asked}) == len(backend.asked)


def test_transient_errors_are_quarantined_and_asked_again_next_time(cache):
    failing = Backend(lambda text, again: Failed("timeout", "no answer"))
    assert outcome(run(Labeller(failing, RUBRIC, cache), corpus(1))["id0"]) == "timeout"
    assert cache.counts() == {"answers": 0, "timeout": 1}
    assert isinstance(run(Labeller(Backend(), RUBRIC, cache), corpus(1))["id0"], LabelRow)


def test_a_server_that_refuses_everything_ends_the_run_and_leaves_nothing_behind(cache):
    with Server(Faults(bad_request=1.0)) as server, pytest.raises(UserError, match="refused the first 20 requests"):
        run(over_http(server, cache), corpus(200))
    assert cache.counts() == {"answers": 0}


def test_refusals_without_any_answer_are_not_kept_but_one_among_answers_is(cache):
    refused = Backend(lambda text, again: Failed("bad_request", "400: no response_format here"))
    assert outcome(run(Labeller(refused, RUBRIC, cache), corpus(3))["id2"]) == "bad_request"
    assert cache.counts() == {"answers": 0}
    some = Backend(lambda text, again: Failed("bad_request", "too long") if "3" in text else Text(*answer(text)))
    run(Labeller(some, RUBRIC, cache), corpus(30))
    asked = len(some.asked)
    assert cache.counts() == {"answers": 27, "bad_request": 3}
    assert outcome(run(Labeller(some, RUBRIC, cache), corpus(30))["id13"]) == "bad_request"
    assert len(some.asked) == asked == 30


def test_a_backend_that_ends_early_is_named(cache):
    class Short(Backend):
        async def label(self, rows):
            async for request in rows:
                yield self.reply(request)
                return

    with pytest.raises(TilthError, match="the label backend ended with"):
        run(Labeller(Short(), RUBRIC, cache), corpus(200))


def test_a_document_with_the_text_of_another_is_asked_once(cache):
    backend = Backend(whole_input=True)
    documents = [(identity, "the same words in each of these documents") for identity, _ in corpus(5)]
    rows = run(Labeller(backend, RUBRIC, cache), documents)
    assert len(rows) == 5
    assert len(backend.asked) == 1


# ---- long documents


def test_a_long_document_is_read_in_the_windows_that_the_detector_points_at(cache):
    text = " ".join(f"word{n:04d}" for n in range(1000))
    backend = Backend()
    limits = Limits(window_characters=300, max_windows=2)
    spans = [(900, 908, 2.0), (4500, 4508, 3.0), (8100, 8108, 1.0)]
    labeller = Labeller(backend, RUBRIC, cache, limits=limits, explain=lambda _: spans)
    row = run(labeller, [("long", text)])["long"]
    asked = [document_of(request.messages) for request in backend.asked]
    assert [("word0100" in window, "word0500" in window) for window in asked] == [(True, False), (False, True)]
    assert row.windows == tuple(RUBRIC.parse(answer(window)[0], window) for window in asked)
    assert row.label == combine(row.windows)


def test_a_document_is_quarantined_when_one_of_its_windows_is(cache):
    text = " ".join(f"word{n:04d}" for n in range(1000))
    backend = Backend(lambda text, again: Text(answer(text)[0] if "word0000" in text else "garbage"))
    limits = Limits(window_characters=300, max_windows=3)
    assert outcome(run(Labeller(backend, RUBRIC, cache, limits=limits), [("long", text)])["long"]) == "not_json"
    assert len(backend.asked) == 3


# ---- where it stops


def test_max_documents_takes_the_first_ones(cache):
    backend = Backend()
    labeller = Labeller(backend, RUBRIC, cache, limits=Limits(max_documents=7))
    assert set(run(labeller, corpus(20))) == {f"id{n}" for n in range(7)}
    assert (labeller.counts.not_reached, labeller.counts.stopped) == (13, "max_documents")


@pytest.mark.parametrize("whole_input", [False, True])
def test_a_budget_is_kept_and_a_higher_one_goes_on(cache, whole_input):
    # 1,000 tokens in at 1 USD a million and 100 out at 10: 0.002 USD a request.
    def go(budget):
        backend = Backend(whole_input=whole_input)
        limits = Limits(budget_usd=budget, input_usd=1.0, output_usd=10.0)
        labeller = Labeller(backend, RUBRIC, cache, limits=limits, payer="run")
        return backend, labeller, run(labeller, corpus(100))

    backend, labeller, rows = go(0.05)
    assert 15 <= len(rows) == len(backend.asked) <= 25
    assert labeller.counts.usd == pytest.approx(0.002 * len(rows))
    assert labeller.counts.stopped == "budget_usd"
    more, labeller, rows2 = go(0.05)
    assert set(rows2) == set(rows), "the same budget buys nothing more"
    assert not more.asked
    assert labeller.counts.usd == 0
    more, labeller, rows3 = go(1.0)
    assert len(rows3) == 100
    assert labeller.counts.stopped is None
    assert len(more.asked) == 100 - len(rows)


def test_a_budget_holds_with_a_tokenizer_that_makes_more_tokens_than_expected(cache):
    # 20,000 tokens for some 9,000 characters: 0.02 USD a request.
    class Costly(Backend):
        def reply(self, request):
            return super().reply(request)._replace(usage=Usage(20_000, 100))

    limits = Limits(budget_usd=1.0, input_usd=1.0)
    labeller = Labeller(Costly(whole_input=True), RUBRIC, cache, limits=limits, payer="run")
    run(labeller, corpus(60))
    assert labeller.counts.usd <= 1.0 + 0.02 * 60
    labeller = Labeller(Costly(), RUBRIC, cache, limits=Limits(budget_usd=3.0, input_usd=1.0), payer="run")
    run(labeller, corpus(1000))
    assert 2.9 < Usage(*cache.spent("run")).input_tokens / 1e6 <= 3.0 + 0.02


def test_the_plan_says_what_will_be_asked(cache):
    limits = Limits(max_documents=30, input_usd=1.0, output_usd=10.0)
    backend = Backend()
    run(Labeller(backend, RUBRIC, cache), corpus(10))
    plan = Labeller(backend, RUBRIC, cache, limits=limits).plan(corpus(50))
    assert (plan.documents, plan.windows, plan.requests, plan.output_tokens) == (30, 30, 20, 2000)
    characters = sum(len(message["content"]) for message in RUBRIC.messages(corpus(1)[0][1]))
    assert plan.input_tokens == pytest.approx(20 * characters / 3, rel=0.01)
    assert plan.usd == pytest.approx((plan.input_tokens + 10 * 2000) / 1e6)
    assert len(backend.asked) == 10


# ---- kills, and several at once

CHILD = """
import json, sys
from curation.label import client
client._BACKOFF_S, client._BACKOFF_MAX_S = 0.02, 0.2
from curation.label.cache import Cache
from curation.label.client import Client
from curation.label.rubric import Rubric
from curation.label.work import Labeller, LabelRow, iterate
url, folder, count, out = sys.argv[1:]
rubric = Rubric.load()
documents = ((f"id{n}", f"document {n} has some words of its own in it") for n in range(int(count)))
with Cache(folder) as cache:
    labeller = Labeller(Client([url], model="fake", schema=rubric.schema(), concurrency=8), rubric, cache, payer=out)
    rows = {r.id: r.label.stance if isinstance(r, LabelRow) else r.reason for r in iterate(labeller.rows(documents))}
    json.dump([rows, labeller.counts.to_dict()], open(out, "w"))
"""


def child(server, folder, count, out) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", CHILD, server.url, str(folder), str(count), str(out)])


def test_a_run_killed_again_and_again_repeats_no_finished_call_and_ends_with_the_same_labels(tmp_path):
    faults = Faults(wrong_quote=0.2, garbage=0.1, latency_s=0.02)
    draw = random.Random(0)
    with Server(faults) as server:
        whole = child(server, tmp_path / "whole", 500, tmp_path / "whole.json")
        assert whole.wait(60) == 0
        calls, server.calls = server.calls, type(server.calls)()
        server.answered.clear()
        kills = 0
        while kills < 10:
            before = server.answered.total()
            running = child(server, tmp_path / "killed", 500, tmp_path / "killed.json")
            until = before + draw.randint(20, 60)
            while server.answered.total() < until and running.poll() is None:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.03))
            running.send_signal(signal.SIGKILL)
            running.wait()
            kills += 1
            # What is on disk now was finished: it must never come again.
            with Cache(tmp_path / "killed") as cache:
                finished = cache.counts()["answers"]
            assert finished >= server.answered.total() - 8 * kills, "an answer was lost that was not in flight"
        assert kills == 10
        assert child(server, tmp_path / "killed", 500, tmp_path / "killed.json").wait(60) == 0
        assert set(server.calls) == set(calls), "the same requests"
        repeated = server.calls.total() - len(server.calls)
        assert repeated <= 16 * kills, "only what was on its way at a kill came twice: 8 sent, 8 in the client's hands"
        unread = sum(count - 1 for count in server.answered.values())
        print(
            f"{kills} kills, {len(server.calls)} requests, {repeated} sent twice, {unread} of them answered but unread"
        )
    rows, counts = json.loads((tmp_path / "killed.json").read_text())
    assert rows == json.loads((tmp_path / "whole.json").read_text())[0]
    assert counts["documents"] == counts["labelled"] + counts["quarantined"] == 500


def test_no_key_in_the_cache_after_a_kill_is_asked_again(tmp_path):
    """The same, key by key: the cache's rows at the kill, against what the server is asked after."""
    with Server(Faults(latency_s=0.02)) as server:
        running = child(server, tmp_path / "c", 300, tmp_path / "out.json")
        while server.answered.total() < 100:
            time.sleep(0.002)
        running.kill()
        running.wait()
        with Cache(tmp_path / "c") as cache:
            kept = [row.result.text for row in cache.rows()]
        server.calls.clear()
        assert child(server, tmp_path / "c", 300, tmp_path / "out.json").wait(60) == 0
        assert server.calls.total() == 300 - len(kept)
    assert len(kept) >= 90


def test_two_runs_at_once_share_the_cache_and_pay_once(tmp_path):
    with Server(Faults(wrong_quote=0.2, latency_s=0.01)) as server:
        both = [child(server, tmp_path / "cache", 400, tmp_path / f"{name}.json") for name in "ab"]
        assert [process.wait(60) for process in both] == [0, 0]
        assert set(server.calls.values()) == {1}, "nothing was asked by both"
        calls = server.calls.total()
    (a, counts_a), (b, counts_b) = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert a == b
    assert len(a) == 400
    assert counts_a["requests"] + counts_b["requests"] == calls
    assert min(counts_a["requests"], counts_b["requests"]) > 0


# ---- size


def test_memory_is_flat_in_the_number_of_documents_from_the_server_and_from_the_cache(cache):
    def peak(count):
        documents = ((f"id{n}", f"text {n} " + "with some more words " * 50) for n in range(count))
        backend = Backend()
        backend.remembers = False
        labeller = Labeller(backend, RUBRIC, cache)
        tracemalloc.start()
        for _ in iterate(labeller.rows(documents)):
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found, labeller.counts

    peak(100)
    small, _ = peak(300)
    large, counts = peak(1500)
    assert counts.requests == 1200
    cached, counts = peak(1500)
    assert counts.requests == 0
    assert max(large, cached) < small + 300_000


def test_the_loop_ends_what_it_started_when_its_reader_leaves(cache):
    with Server(Faults(latency_s=0.05)) as server:
        rows = iterate(over_http(server, cache).rows(corpus(1000)))
        next(rows)
        rows.close()
        time.sleep(0.1)  # what was sent arrives
        asked = server.calls.total()
        time.sleep(0.2)
        assert server.calls.total() == asked
