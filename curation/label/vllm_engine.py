"""The backend for a GPU cluster without a server: vLLM's engine inside Ray Data (`ray.data.llm`).

It runs as a process of its own, in the environment that has vLLM (curation/vllm.py), on a Ray of its own or the
cluster at `address`, whose nodes need vLLM in their environment. Requests go there in files of 10,000, each one Ray
Data execution, replies come back through a pipe as they are made: a kill loses what was on its way. Second asks need
the first answers, so they are one more execution at the end, with the engine's start once more.

vLLM says no finish_reason here: an answer of `max_tokens` tokens is taken as cut.
"""

import asyncio
import contextlib
import json
import os
import re
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from curation.errors import TilthError
from curation.label.backend import Failed, Reply, Request, Text, Usage
from curation.label.client import SAMPLING
from curation.label.model import identity_of, revision_of
from curation.vllm import find_environment

_WORKER = Path(__file__).with_name("vllm_worker.py")
_AT_ONCE = 10_000  # requests, 14 KB each, that wait in a file
_SILENCE_S = 1800.0  # a model is downloaded and compiled in this time
_TOO_LONG = ("ValueError", "VLLMValidationError")  # what vLLM calls a prompt that does not fit

_ERROR = re.compile(r"[\w.]*(?:Error|Exception): .+")
_FOLLOWS = ("initialization failed", "ActorDiedError", "Traceback")


class VllmEngine:
    """model: folder of a Hugging Face checkpoint, which all nodes see, or a hub id. replicas: engines, each on as many
    GPUs as `engine` makes it (tensor_parallel_size); on a machine without any, one CPU each. engine: keyword arguments
    of vLLM's EngineArgs. Raises UserError where vLLM is missing, TilthError when the engine ends or says nothing for
    half an hour."""

    def __init__(
        self, model: str, *, revision: str = "", schema: Mapping[str, Any], sampling: Mapping[str, Any] | None = None,
        replicas: int = 1, engine: Mapping[str, Any] | None = None, address: str | None = None,
        on_line: Callable[[str], None] | None = None,
    ):  # fmt: skip
        self.model, self.revision = model, revision_of(model, revision)
        self._sampling = {**SAMPLING, **(sampling or {})}
        self._schema, self._replicas, self._engine, self._address = schema, replicas, engine or {}, address
        self._say = on_line or (lambda _: None)

    @property
    def identity(self) -> Mapping[str, str]:
        return identity_of("vllm", self.model, self.revision)

    @property
    def sampling(self) -> Mapping[str, Any]:
        return self._sampling

    async def label(self, rows: AsyncIterator[Request]) -> AsyncGenerator[Reply, None]:
        with tempfile.TemporaryDirectory(prefix="tilth-label-") as folder:
            requests = Path(folder, "requests.jsonl")
            while keys := await _write(rows, requests):
                async with contextlib.aclosing(self._run(requests, folder, len(keys))) as replies:
                    async for reply in replies:
                        keys.discard(reply.key)
                        yield reply
                if keys:
                    raise TilthError(
                        f"vLLM's engine left {len(keys)} requests without a reply: run the same command again, which "
                        "goes on from here"
                    )

    async def _run(self, requests: Path, folder: str, num_requests: int) -> AsyncGenerator[Reply, None]:
        environment = find_environment()
        where = self._address or "a Ray of its own"
        self._say(f"label: {num_requests:,} requests to vLLM's engine in Ray Data, on {where}")
        asked = {
            "requests": str(requests), "model": self.model, "address": self._address, "replicas": self._replicas,
            "engine": {**self._hub_revision(), **self._engine}, "sampling": self._sampling, "schema":
            dict(self._schema),
        }  # fmt: skip
        reading, writing = os.pipe()
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                environment.python, str(_WORKER), json.dumps(asked), str(writing), stdin=asyncio.subprocess.PIPE,
                stdout=output, stderr=output, pass_fds=(writing,), start_new_session=True,
                env={**os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "RAY_USAGE_STATS_ENABLED": "0"},
            )  # fmt: skip
        os.close(writing)
        replies = asyncio.StreamReader(limit=1 << 24)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(replies), os.fdopen(reading, "rb")
        )
        try:
            while line := await asyncio.wait_for(replies.readline(), _SILENCE_S):
                yield self._reply(json.loads(line))
            if await process.wait():
                raise TilthError(f"vLLM's engine ended with an error: {_reason(log)}")
        except TimeoutError:
            raise TilthError(f"vLLM's engine said nothing for {_SILENCE_S:.0f} s: {_reason(log)}") from None
        finally:
            transport.close()
            assert process.stdin is not None
            process.stdin.close()  # the worker ends itself and its Ray
            await process.wait()

    def _hub_revision(self) -> dict[str, str]:
        return {} if Path(self.model).is_dir() else {"revision": self.revision}

    def _reply(self, row: Mapping[str, Any]) -> Reply:
        if row["error"]:
            final = str(row["error"]).startswith(_TOO_LONG)
            return Reply(row["key"], Failed("bad_request" if final else "server_error", row["error"]), Usage())
        cut = row["output_tokens"] >= self._sampling["max_tokens"]
        usage = Usage(row["input_tokens"], row["output_tokens"])
        return Reply(row["key"], Text(row["text"], "length" if cut else "stop"), usage)


async def _write(rows: AsyncIterator[Request], path: Path) -> set[str]:
    """The next requests as JSON lines; their keys, none at the end."""
    keys: set[str] = set()
    with path.open("w", encoding="utf-8") as file:
        while len(keys) < _AT_ONCE and (row := await anext(rows, None)) is not None:
            keys.add(row.key)
            file.write(json.dumps({"key": row.key, "messages": row.messages}) + "\n")
    return keys


def _reason(log: Path) -> str:
    """The last error that the log names, not those that only follow from it."""
    lines = log.read_text(errors="replace").splitlines()
    found = [match[0] for line in lines if (match := _ERROR.search(line)) and not any(one in line for one in _FOLLOWS)]
    return " ".join((found or lines or ["it said nothing"])[-1].split())[-300:]
