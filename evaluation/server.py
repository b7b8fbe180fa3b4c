"""A real vLLM server for a checkpoint: started, watched and ended with everything that it started.

vLLM lives in an environment of its own: curation/vllm.py finds it.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from curation.errors import TilthError, UserError
from curation.vllm import Environment, find_environment

HOST = "127.0.0.1"
READY_S = 900.0  # compiling for a GPU takes minutes


class Server:
    """`with Server(checkpoint) as server:` serves on server.url until the block ends.

    Raises UserError when vLLM is missing, the port is taken or the checkpoint is no model, TilthError when
    vLLM ends before it is ready (with its own words, and where its log is)."""

    def __init__(
        self, checkpoint: str, *, port: int | None = None, dtype: str | None = None, max_length: int | None = None,
        name: str | None = None, log: str | None = None, on_line: Callable[[str], None] | None = None,
    ):  # fmt: skip
        self.checkpoint, self.dtype, self.max_length = checkpoint, dtype, max_length
        self.port = port or _free_port()
        self.name = name or Path(checkpoint).name
        self._say = on_line or (lambda _: None)
        self._log, self._keep_log = log, log is not None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The OpenAI-compatible API's base."""
        return f"http://{HOST}:{self.port}/v1"

    def __enter__(self) -> "Server":
        _check_checkpoint(self.checkpoint)
        _check_port(self.port)
        environment = find_environment()
        if self._log is None:
            handle, self._log = tempfile.mkstemp(prefix="tilth-vllm-", suffix=".log")
            os.close(handle)
        self._say(f"starting vLLM on {'GPU' if environment.cuda else 'CPU'} for {self.checkpoint}; log {self._log}")
        supervisor = [sys.executable, "-m", "evaluation.supervisor", self._log]
        self._process = subprocess.Popen(
            [*supervisor, *self._command(environment)], stdin=subprocess.PIPE, env=self._environment(environment),
            start_new_session=True,  # Ctrl-C is ours: the server ends when the pipe closes
        )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if error is None and not self._keep_log and self._log is not None:
            Path(self._log).unlink(missing_ok=True)

    def stop(self) -> None:
        """End the server and all that it started; twice does nothing."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
            self._process = None

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log_tail(self, lines: int = 20) -> str:
        return "\n".join(Path(self._log or os.devnull).read_text(errors="replace").splitlines()[-lines:])

    def _command(self, environment: Environment) -> list[str]:
        local = Path(self.checkpoint)
        model = str(local.resolve()) if local.exists() else self.checkpoint
        command = [
            environment.python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", HOST,
            "--port", str(self.port), "--served-model-name", self.name, "--max-logprobs", "-1",
            # JSON by a schema: by default small models fill it with white space until it is cut.
            "--structured-outputs-config", '{"backend": "guidance", "disable_any_whitespace": true}',
            "--dtype", self.dtype or ("auto" if environment.cuda else "float32"),
        ]  # fmt: skip
        if not environment.cuda:
            command.append("--enforce-eager")  # compiling wants a C++ compiler and takes longer than it saves
            # Prompts share beginnings of 60-150 tokens; in the default block of 128 few of them are found again.
            command += ["--block-size", "32"]
        if self.max_length is not None:
            command += ["--max-model-len", str(self.max_length)]
        return command

    def _environment(self, environment: Environment) -> dict[str, str]:
        # Our own package path reaches the supervisor; vLLM's statistics stay at home.
        paths = [str(Path(__file__).resolve().parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        extra = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        if Path(self.checkpoint).exists():
            extra |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        if not environment.cuda:
            extra["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        return {**os.environ, **extra}

    def _wait(self) -> None:
        started, said = time.monotonic(), 0.0
        while (waited := time.monotonic() - started) < READY_S:
            if not self.alive():
                raise TilthError(f"vLLM could not serve {self.checkpoint}: {self._reason()} (its log: {self._log})")
            if _healthy(self.port):
                self._say(f"ready after {waited:.0f} s: {self.url}")
                return
            if waited - said >= 10:
                said = waited
                self._say(f"waiting for vLLM: {waited:.0f} s")
            time.sleep(0.25)
        raise TilthError(f"vLLM was not ready after {READY_S:.0f} s (its log: {self._log}): look there, or try again")

    def _reason(self) -> str:
        """The last line of the log that names an error."""
        lines = Path(self._log or os.devnull).read_text(errors="replace").splitlines()
        errors = [
            line for line in lines if "Error" in line and "Traceback" not in line and "core init" not in line.lower()
        ]
        return (errors or lines or ["it said nothing"])[-1].strip()[-300:]


def _check_checkpoint(checkpoint: str) -> None:
    folder = Path(checkpoint)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(f"{checkpoint} has no config.json: give the folder of a Hugging Face checkpoint")
    elif folder.exists() or checkpoint.startswith((".", "/")) or checkpoint.count("/") != 1:
        raise UserError(f"{checkpoint} is no folder and no hub id: give a Hugging Face checkpoint")


def _check_port(port: int) -> None:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((HOST, port))
        except OSError:
            raise UserError(f"port {port} is taken: choose another with --port, or leave it out") from None


def _free_port() -> int:
    with socket.socket() as trial:
        trial.bind((HOST, 0))
        return int(trial.getsockname()[1])


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
