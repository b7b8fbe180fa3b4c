"""What a run folder holds, and the chain of hashes that says what it was made from.

A part is one unit of work of one stage: its data files, then `FOLDER/NAME.json`. A part
without its .json does not exist. `chain` is a sha256 over what the part was made from (inputs,
the stage's recipe section, STAGE_VERSION, the chains of its parents), known before the work is
done: a part whose chain has not changed is not made again. The driver rolls the parts of a
stage into `manifest.json` when the stage ends.
"""

import hashlib
import json
import os
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from curation import storage
from curation.errors import RunLocked, TilthError, UserError
from curation.schema import SCHEMA_VERSION

DOCUMENTS, DETECT, DEDUP, LABELS = "10_documents", "20_detect", "30_dedup", "40_labels"
TOKENS, ARMS = "50_tokens", "60_arms"
SIGNATURES = f"{DEDUP}/signatures"
QUARANTINE = "quarantine"


def fingerprint(value: Any) -> str:
    """sha256 of `value` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()).hexdigest()


@dataclass(frozen=True)
class File:
    """A data file of a part; `path` is relative to the run folder."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Part:
    """One committed unit of a stage. `counts` are summed over parts for the summary."""

    folder: str
    name: str
    chain: str
    files: tuple[File, ...]
    counts: dict[str, int] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True, indent=1).encode()

    @staticmethod
    def from_json(raw: bytes) -> "Part":
        data = json.loads(raw)
        return Part(**{**data, "files": tuple(File(**f) for f in data["files"])})


@dataclass(frozen=True)
class RunFolder:
    """Paths and commits within one run. Cheap to send to workers."""

    root: str

    def path(self, *parts: str) -> str:
        return storage.join(self.root, *parts)

    def commit_table(self, path: str, table: pa.Table) -> File:
        return File(path, *storage.commit_table(self.path(path), table))

    def commit_bytes(self, path: str, data: bytes) -> File:
        return File(path, *storage.commit_bytes(self.path(path), data))

    def commit_part(self, part: Part) -> Part:
        """Publish the part: its files must have been committed before."""
        storage.commit_bytes(self.path(part.folder, f"{part.name}.json"), part.to_json())
        return part

    def part(self, folder: str, name: str) -> Part | None:
        """The committed part, or None when there is none."""
        try:
            return Part.from_json(storage.read_bytes(self.path(folder, f"{name}.json")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise TilthError(f"{self.path(folder, name)}.json is damaged ({error}): delete it and run again") from None

    def current(self, folder: str, name: str, chain: str) -> Part | None:
        """The committed part if it was made from `chain` and its files have their sizes, else None."""
        part = self.part(folder, name)
        if part is None or part.chain != chain:
            return None
        for file in part.files:
            try:
                if storage.size_bytes(self.path(file.path)) != file.size_bytes:
                    return None
            except FileNotFoundError:
                return None
        return part

    def parts(self, folder: str) -> list[Part]:
        """All committed parts directly in `folder`, by name."""
        names = [n[:-5] for n in storage.list_names(self.path(folder)) if n.endswith(".json")]
        return [part for name in names if (part := self.part(folder, name))]

    def drop_parts(self, folder: str, keep: Iterable[str]) -> None:
        """Remove parts that the current inputs do not have: .json first, so that a kill leaves no half part."""
        keep = set(keep)
        for part in self.parts(folder):
            if part.name not in keep:
                storage.remove(self.path(folder, f"{part.name}.json"))
                for file in part.files:
                    storage.remove(self.path(file.path))

    def read(self, path: str, columns: list[str] | None = None) -> pa.Table:
        return storage.read_table(self.path(path), columns)


def read_manifest(run: RunFolder) -> dict[str, Any]:
    """manifest.json, or a UserError when `run` is not a run folder."""
    try:
        manifest: dict[str, Any] = json.loads(storage.read_bytes(run.path("manifest.json")))
    except FileNotFoundError:
        raise UserError(f"{run.root} holds no manifest.json: give the folder of a `tilth curate` run") from None
    except ValueError as error:
        raise TilthError(f"{run.path('manifest.json')} is damaged ({error}): run `tilth curate` again") from None
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{run.root} was written with schema {manifest.get('schema_version')}, this Tilth reads {SCHEMA_VERSION}: "
            "run `tilth curate` again into a new folder"
        )
    return manifest


def verify(run: RunFolder) -> tuple[list[str], int]:
    """Re-hash every file that the manifest names: a sentence for each that is damaged or missing, and the
    number of files looked at."""
    damaged, checked = [], 0
    for stage in read_manifest(run)["stages"].values():
        for part in stage["parts"]:
            for file in part["files"]:
                checked += 1
                try:
                    found = storage.file_sha256(run.path(file["path"]))
                except FileNotFoundError:
                    damaged.append(f"{file['path']} is missing")
                    continue
                if found.size_bytes != file["size_bytes"]:
                    damaged.append(f"{file['path']} has {found.size_bytes} bytes, not {file['size_bytes']}")
                elif found.sha256 != file["sha256"]:
                    damaged.append(f"{file['path']} has other bytes than were written (sha256 differs)")
    return damaged, checked


class WriterLock:
    """One run folder, one writer. Local: an flock, which the kernel drops when the holder dies.
    Object stores have no lock that outlives nobody: there a marker object is created and removed."""

    def __init__(self, run: RunFolder):
        self._run = run
        self._handle: TextIO | None = None

    def __enter__(self) -> "WriterLock":
        holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        path = self._run.path("writer.lock")
        if not storage.is_local(path):
            if storage.exists(path):
                who = storage.read_bytes(path).decode()
                raise RunLocked(f"{self._run.root} has a writer ({who}): wait for it, or delete {path} if it is dead")
            storage.commit_bytes(path, holder.encode())
            return self
        import fcntl

        inner = Path(storage.filesystem(path)[1])
        inner.parent.mkdir(parents=True, exist_ok=True)
        handle = open(inner, "a+")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            who = handle.read().strip() or "another process"
            handle.close()
            raise RunLocked(f"{self._run.root} has a writer ({who}): wait for it, or use another --run") from None
        handle.truncate(0)
        handle.write(holder)
        handle.flush()
        self._handle = handle
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.truncate(0)
            self._handle.close()
        else:
            storage.remove(self._run.path("writer.lock"))
