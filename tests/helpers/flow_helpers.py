"""Documents made of words, runs as a user starts them, kills, and the hashes of what a run left."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from curation.rng import key64

WORDS = ["harbour", "ledger", "copper", "winter", "garden", "signal", "bread", "engine", "valley", "lantern", "river"]


def filler(i: int, num_words: int = 160) -> str:
    """A document of made-up words, the same for the same number, unlike any other."""
    return " ".join(f"{WORDS[(k := key64('word', i, n)) % len(WORDS)]}{k % 997}" for n in range(num_words))


def example_rows(root: Path) -> list[dict]:
    return [
        json.loads(line)
        for path in sorted((root / "examples/corpus").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]


def lines(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def shard_hashes(run: Path) -> dict[str, str]:
    """sha256 of every file of every arm by path, as they are on disk."""
    files = sorted(
        p
        for p in (run / "60_arms").rglob("*")
        if p.is_file() and p.suffix in {".ds", ".index", ".metadata", ".bin", ".idx", ".parquet"}
    )
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@dataclass
class Finished:
    code: int
    out: str
    err: str

    @property
    def summary(self) -> dict:
        return json.loads(self.out.strip().splitlines()[-1])


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tilth.cli", *map(str, arguments)]


def tilth(*arguments: object, timeout_s: float = 240, **options) -> Finished:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=timeout_s, **options)
    return Finished(done.returncode, done.stdout, done.stderr)


def killed_when(condition, *arguments: object, timeout_s: float = 120) -> bool:
    """Start the command in a process group of its own, kill the group with SIGKILL once `condition()` holds.
    False when the command ended first."""
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.002)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("the command neither met the condition nor ended")
    return False
