"""Answers on disk as they come, so that nothing is asked twice: JSON lines, appended.

A line is a batch; a kill leaves at most one torn line at the end, which is dropped. The file's name is the identity
of the model that answered (weights, tokenizer, dtype, backend), a line's keys those of the asks (context and
continuations in token ids): any suite finds there what an earlier one asked.
"""

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from evaluation.backends import Batch

Answer = tuple[float, ...] | str
_SYNC_S = 1.0


class Journal:
    """`answers` by ask key; `add` writes and remembers. One writer at a time: the output folder's lock sees to it."""

    def __init__(self, path: Path):
        self.path = path
        self.answers: dict[str, Answer] = {}
        self._file: IO[bytes] | None = None
        self._synced = time.monotonic()

    def __enter__(self) -> "Journal":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = 0
        if self.path.exists():
            with self.path.open("rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):
                        break
                    for key, value in json.loads(line).items():
                        self.answers[key] = value if isinstance(value, str) else tuple(value)
                    whole += len(line)
        self._file = self.path.open("ab")
        self._file.truncate(whole)
        return self

    def add(self, keys: list[str], batch: Batch) -> None:
        """`keys[i]` names ask i of those that the batch's indices are of."""
        assert self._file is not None
        new: dict[str, Answer] = {keys[i]: value for i, value in zip(batch.indices, batch.values, strict=True)}
        self.answers |= new
        self._file.write(json.dumps(new).encode() + b"\n")
        self._file.flush()  # outlives our process; the disk follows within a second, for the machine's
        if time.monotonic() - self._synced > _SYNC_S:
            self._sync()

    def _sync(self) -> None:
        assert self._file is not None
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._sync()
        self._file.close()
