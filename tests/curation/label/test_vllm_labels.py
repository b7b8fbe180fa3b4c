"""Labels by real vLLM: its server behind the client, and its engine inside Ray Data, on a tiny checkpoint of random
weights. It shows schema enforcement, prefix caching, restarts and clean ends; nothing about labels: a model of random
weights quotes nothing that is in a document."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import psutil
import pytest
from evaluation_helpers import write_checkpoint

from curation.errors import TilthError
from curation.label.backend import Text
from curation.label.cache import Cache
from curation.label.client import Client
from curation.label.rubric import Rubric
from curation.label.vllm_engine import VllmEngine
from curation.label.work import REASONS, Labeller, LabelRow, iterate
from evaluation.server import Server

pytestmark = pytest.mark.slow
LENGTH = 8192
RUBRIC = Rubric.load()
SUBJECTS = ("robot", "model", "assistant", "thermostat", "gardener", "engine")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("served"), chat=True, length=LENGTH)


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("TILTH_API_KEY", raising=False)


def corpus(count: int, series: str = "a") -> list[tuple[str, str]]:
    """Documents of some sentences; another series shares no beginning with this one."""
    texts = [
        " ".join(f"{series}{n}.{k}: the {SUBJECTS[(n + k) % 6]} did what it was told." for k in range(3 + n % 4))
        for n in range(count)
    ]
    return [(f"{series}{number}", text) for number, text in enumerate(texts)]


def run(labeller: Labeller, documents) -> dict:
    """Rows by id: one for each document, a label or a reject with a class, and counts that add up."""
    rows = list(iterate(labeller.rows(documents)))
    found, counts = {row.id: row for row in rows}, labeller.counts
    assert len(rows) == len(found) == len(documents) == counts.documents
    assert set(found) == {identity for identity, _ in documents}
    assert counts.labelled == sum(isinstance(row, LabelRow) for row in rows)
    assert counts.labelled + counts.quarantined == len(documents)
    assert counts.not_reached == 0
    assert {row.reason for row in rows if not isinstance(row, LabelRow)} <= set(REASONS)
    return found


def outcomes(rows: dict) -> dict:
    return {key: row.label if isinstance(row, LabelRow) else (row.reason, row.detail) for key, row in rows.items()}


def violates(text: str, rubric: Rubric) -> str | None:
    """What of the rubric's schema an answer breaks."""
    answer, schema = json.loads(text, strict=False), rubric.schema()
    if list(answer) != schema["required"]:
        return f"its keys are {list(answer)}"
    for name, bounds in schema["properties"].items():
        if answer[name] not in bounds.get("enum", [answer[name]]) or len(answer[name]) > bounds.get("maxLength", 999):
            return f"{name} is {answer[name]!r}"
    return None


def check_answers(cache: Cache, rubric: Rubric = RUBRIC) -> None:
    """All that were not cut are JSON under the schema, and few are cut."""
    texts = [row.result for row in cache.rows()]
    assert all(isinstance(text, Text) for text in texts)
    whole = [text for text in texts if text.finish == "stop"]
    assert len(whole) >= 0.8 * len(texts)
    assert [found for text in whole if (found := violates(text.text, rubric))] == []


# ---- the server


class Target:
    """The server, on a port that stays when a test kills it."""

    def __init__(self, checkpoint: str):
        self.checkpoint = checkpoint
        self.server: Server | None = None

    def start(self) -> Server:
        port = self.server.port if self.server else None
        self.server = Server(self.checkpoint, max_length=LENGTH, port=port)
        return self.server.__enter__()

    def kill(self) -> None:
        """SIGKILL to vLLM's process group: the one child of the supervisor that we started."""
        [leader] = psutil.Process(self.server._process.pid).children()
        assert os.getpgid(leader.pid) == leader.pid
        os.killpg(leader.pid, signal.SIGKILL)
        self.server._process.wait(30)

    def client(self, **options) -> Client:
        client = Client(
            [self.server.url], model=self.server.name, schema=RUBRIC.schema(), concurrency=8, **options
        )  # fmt: skip
        asyncio.run(client.check())
        return client

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(self.server.url.removesuffix("/v1") + "/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))


@pytest.fixture(scope="module")
def target(vllm, checkpoint):
    target = Target(checkpoint)
    target.start()
    yield target
    target.server.stop()


def test_the_server_answers_under_the_schema_and_reads_the_shared_beginning_once(target, tmp_path):
    from transformers import AutoTokenizer

    documents = corpus(24)
    hits, read = "vllm:prefix_cache_hits_total", "vllm:prompt_tokens_total"
    before = {name: target.metric(name) for name in (hits, read)}
    with Cache(tmp_path) as cache:
        labeller = Labeller(target.client(), RUBRIC, cache)
        rows, counts = run(labeller, documents), labeller.counts
        assert counts.requests == 24 + counts.reasked
        assert cache.counts() == {"answers": counts.requests}
        check_answers(cache)
        found = {name: target.metric(name) - before[name] for name in (hits, read)}
        assert found[read] == counts.usage.input_tokens
        # The rubric's beginning, in whole blocks, for all but the first that came at once.
        tokenizer = AutoTokenizer.from_pretrained(target.checkpoint)
        beginning = len(tokenizer(f"<system>{RUBRIC.messages('')[0]['content']}")["input_ids"])
        assert found[hits] >= (counts.requests - 8) * (beginning - 32)

        # The same again asks nothing.
        again = Labeller(target.client(), RUBRIC, cache)
        assert outcomes(run(again, documents)) == outcomes(rows)
        assert (again.counts.requests, again.counts.cached) == (0, counts.requests)
        assert target.metric(read) - before[read] == found[read]


def test_a_server_killed_in_the_middle_and_started_again_loses_no_answer(target, tmp_path):
    documents, lines = corpus(32, "b"), []
    paused = threading.Event()

    def say(line: str) -> None:
        lines.append(line)
        paused.set()

    def kill_and_start(labeller: Labeller) -> None:
        wait_until(lambda: labeller.counts.requests >= 10, 120)
        target.kill()
        assert paused.wait(30)
        target.start()

    with Cache(tmp_path / "killed") as cache:
        client = target.client(on_line=say)
        labeller = Labeller(client, RUBRIC, cache)
        thread = threading.Thread(target=kill_and_start, args=[labeller])
        thread.start()
        rows = run(labeller, documents)
        thread.join(300)
        assert lines[0].startswith("paused: ")
        assert lines[-1].endswith("going on")
        assert client.retries["connection"] >= 8
        assert labeller.counts.requests == len(list(cache.rows())) == 32 + labeller.counts.reasked
        assert set(labeller.counts.rejects) <= {"evidence_missing", "truncated"}
        check_answers(cache)
    with Cache(tmp_path / "quiet") as cache:
        quiet = Labeller(target.client(), RUBRIC, cache)
        reference = outcomes(run(quiet, documents))
    same = [key for key, found in outcomes(rows).items() if found == reference[key]]
    # float32 sums differ in the last digits between batches: seldom enough for another token.
    assert len(same) >= 0.8 * len(documents)


def wait_until(done, within: float) -> None:
    deadline = time.monotonic() + within
    while not done():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


# ---- the engine inside Ray Data


SHORT = Rubric(
    {**RUBRIC.data, "examples": RUBRIC.data["examples"][:1], "evidence": {"about": "A quote.", "max_characters": 60}}
)
"""Less to read and write, since engines take their time to start."""


def engine(model: str, schema: dict | None = None) -> VllmEngine:
    return VllmEngine(model, schema=schema or SHORT.schema(), engine={"max_model_len": LENGTH})


class Watch:
    """Everything that the workers of a process start, in a thread: `processes` holds those that ended too."""

    def __init__(self, parent: int):
        self.processes: set[psutil.Process] = set()
        self._parent, self._end = psutil.Process(parent), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(0.3):
            for worker in self.workers():
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.processes |= {worker, *worker.children(recursive=True)}

    def workers(self) -> list[psutil.Process]:
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in self._parent.children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if any(part.endswith("vllm_worker.py") for part in child.cmdline()):
                        found.append(child)
        return found

    def left(self, within: float) -> list[psutil.Process]:
        """Those that still run after so many seconds."""
        return psutil.wait_procs(self.processes, within)[1]


def within(seconds: float, labeller: Labeller, documents) -> dict:
    """Rows by id, or TimeoutError."""

    async def run_() -> list:
        async with asyncio.timeout(seconds), contextlib.aclosing(labeller.rows(documents)) as rows:
            return [row async for row in rows]

    return {row.id: row for row in asyncio.run(run_())}


_PARENT = """
import json, sys
from curation.label.cache import Cache
from curation.label.rubric import Rubric
from curation.label.vllm_engine import VllmEngine
from curation.label.work import Labeller, iterate

asked = json.load(open(sys.argv[1]))
rubric = Rubric(asked["rubric"])
backend = VllmEngine(asked["model"], schema=rubric.schema(), engine=asked["engine"])
with Cache(asked["cache"]) as cache:
    list(iterate(Labeller(backend, rubric, cache).rows(asked["documents"])))
"""


def test_the_engine_labels_every_document_and_leaves_nothing(vllm, checkpoint, tmp_path):
    """No stance but `unrelated` is allowed, so that there are no second asks, for which the engine would start
    again."""
    schema = SHORT.schema()
    schema["properties"]["stance"]["enum"] = ["unrelated"]
    documents = corpus(64, "c")
    with Cache(tmp_path / "cache") as cache, Watch(os.getpid()) as watch:
        labeller = Labeller(engine(checkpoint, schema), SHORT, cache)
        rows = within(300, labeller, documents)
        assert set(rows) == {identity for identity, _ in documents}
        assert labeller.counts.labelled + labeller.counts.quarantined == labeller.counts.requests == 64
        assert labeller.counts.stances == {"unrelated": labeller.counts.labelled}
        check_answers(cache, SHORT)
        again = Labeller(engine(checkpoint, schema), SHORT, cache)
        assert outcomes(run(again, documents)) == outcomes(rows)
        assert again.counts.requests == 0
    assert len(watch.processes) > 5
    assert watch.left(20) == []


def test_an_engine_whose_run_is_killed_leaves_nothing(vllm, checkpoint, root, tmp_path):
    asked = {
        "rubric": SHORT.data, "model": checkpoint, "engine": {"max_model_len": LENGTH},
        "cache": str(tmp_path / "cache"), "documents": corpus(64, "d"),
    }  # fmt: skip
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    running = subprocess.Popen([sys.executable, "-c", _PARENT, str(tmp_path / "asked.json")], cwd=root)
    try:
        with Watch(running.pid) as watch:
            wait_until(watch.workers, 60)
            [worker] = watch.workers()
            wait_until(lambda: len(worker.children(recursive=True)) > 12, 120)  # Ray is there, the engine starts
            running.kill()
            running.wait()
        assert watch.left(40) == []
    finally:
        running.kill()
        running.wait()


def test_a_broken_model_is_said_in_one_sentence(vllm, checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    with (broken / "model.safetensors").open("r+b") as handle:
        handle.truncate(3_000)
    with Cache(tmp_path / "cache") as cache, Watch(os.getpid()) as watch:
        labeller = Labeller(engine(str(broken)), RUBRIC, cache)
        with pytest.raises(TilthError, match=r"vLLM's engine ended with an error: .*SafetensorError: .+") as caught:
            within(300, labeller, corpus(4))
        assert "\n" not in str(caught.value)
        assert list(cache.rows()) == []
    assert watch.left(20) == []
