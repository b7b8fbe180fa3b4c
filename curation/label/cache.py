"""Answers on disk: what was paid for once is never asked again. SQLite in WAL mode, shared by any number of processes
of one machine; WAL does not work over network file systems.

An answer's key is a sha256 over the text's and the prompt's hashes, the model with its revision, the schema and the
sampling. Each answer is a transaction of its own, without fsync: it outlives a kill -9 as soon as `put` returns; a
power cut may take the last ones, but never the file. Answers and final errors are kept; errors that would go away
are only tallied by class.

**Claims** keep two runs from asking the same thing at once: who is about to ask claims the key first, and who finds it
claimed waits for the other's answer. An owner is alive while it holds the lock on its file in `owners/`, which the
kernel lets go however it ends, so a dead owner's claims are free at once.
"""

import contextlib
import fcntl
import hashlib
import itertools
import os
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, cast

from curation.errors import TilthError, UserError
from curation.label.backend import CallError, Failed, Text, Usage
from curation.manifest import fingerprint

_FILE = "labels.sqlite"
_OWNERS = "owners"
_VERSION = 1
_BUSY_S = 60.0  # transactions are short: longer means that something else holds the file
_RECENT, _ENOUGH, _PAUSE_S = 5_000, 20, 30.0
_TABLES = """
CREATE TABLE IF NOT EXISTS settings(id INTEGER PRIMARY KEY, key TEXT UNIQUE NOT NULL);
CREATE TABLE IF NOT EXISTS answers(
  key BLOB PRIMARY KEY, text BLOB NOT NULL, prompt BLOB NOT NULL, setting INTEGER NOT NULL REFERENCES settings(id),
  answer TEXT, finish TEXT, error TEXT, detail TEXT, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL,
  payer TEXT NOT NULL, created REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS answers_payer ON answers(payer, input_tokens, output_tokens);
CREATE INDEX IF NOT EXISTS answers_error ON answers(error) WHERE error IS NOT NULL;
CREATE TABLE IF NOT EXISTS claims(key BLOB PRIMARY KEY, owner TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tally(error TEXT PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID;
"""


class Key(NamedTuple):
    """Of one request. `digest` is what it is found by."""

    digest: bytes
    text: bytes
    prompt: bytes


class Keys:
    """Makes the keys of requests with the same model, schema and sampling."""

    def __init__(self, *, identity: Mapping[str, str], schema_sha256: str, sampling: Mapping[str, Any]):
        self.setting = fingerprint([dict(identity), schema_sha256, dict(sampling)])
        self._setting = bytes.fromhex(self.setting)

    def key(self, text: str, prompt_sha256: str) -> Key:
        text_hash = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
        prompt = bytes.fromhex(prompt_sha256)
        return Key(hashlib.sha256(text_hash + prompt + self._setting).digest(), text_hash, prompt)


class Row(NamedTuple):
    """A cached answer or final error."""

    key: bytes
    result: Text | Failed
    usage: Usage


class Cache:
    """The store in the folder `folder`, made when there is none. For one thread; each process opens its own.

    Raises UserError for a folder that can't be used, TilthError when the disk refuses later on."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if "://" in str(folder):
            raise UserError(f"the label cache must be on a local disk, not at {folder}")
        self.owner = uuid.uuid4().hex
        self._settings: dict[str, int] = {}
        self._alive: dict[str, float] = {}
        """Owners found alive, and when: a look is a system call."""
        try:
            (self.folder / _OWNERS).mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._owner_file(self.owner), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(f"the label cache {folder} can't be made: {error.strerror or error}") from None
        self._db = sqlite3.connect(self.folder / _FILE, timeout=_BUSY_S, isolation_level=None)
        try:
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _VERSION):
                raise UserError(f"the label cache {folder} is of version {version}, and this Tilth reads {_VERSION}")
            self._begin_wal()
            self._db.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version={_VERSION}; COMMIT;")
            self._sweep()
        except sqlite3.DatabaseError as error:
            self.close()
            raise UserError(f"the label cache {self.folder / _FILE} can't be used: {error}") from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Cache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the claims too."""
        with contextlib.suppress(sqlite3.Error):  # else they are a dead owner's
            self._db.execute("DELETE FROM claims WHERE owner = ?", (self.owner,))
        self._db.close()
        # The file first: who finds it gone takes the owner for dead, which it is.
        self._owner_file(self.owner).unlink(missing_ok=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # Answers.

    def get(self, key: Key) -> Row | None:
        row = self._db.execute(
            "SELECT key, answer, finish, error, detail, input_tokens, output_tokens FROM answers WHERE key = ?",
            (key.digest,),
        ).fetchone()
        return _row(row) if row else None

    def put(self, keys: Keys, key: Key, result: Text | Failed, usage: Usage, payer: str = "") -> None:
        """Keeps an answer, and gives the claim back. Of two answers to one key the first stays."""
        words: tuple[str | None, ...]
        if isinstance(result, Text):
            words = (_clean(result.text), result.finish, None, None)
        else:
            words = (None, None, result.error, _clean(result.detail))
        values = (key.digest, key.text, key.prompt, self._setting(keys.setting), *words, *usage, payer, time.time())
        with self._transaction():
            self._db.execute(f"INSERT OR IGNORE INTO answers VALUES ({','.join('?' * len(values))})", values)
            self._db.execute("DELETE FROM claims WHERE key = ?", (key.digest,))

    def rows(self, keys: Keys | None = None) -> Iterator[Row]:
        """Every row, or those of one setting, in order of arrival. Streamed: memory is flat."""
        where, values = ("", ()) if keys is None else ("WHERE setting = ?", (self._setting(keys.setting),))
        found = self._db.cursor().execute(
            f"SELECT key, answer, finish, error, detail, input_tokens, output_tokens FROM answers {where} "
            "ORDER BY rowid",
            values,
        )
        return map(_row, found)

    def spent(self, payer: str) -> Usage:
        """Tokens of everything that `payer` asked for itself."""
        sums = "SELECT COALESCE(SUM(input_tokens), 0), COALESCE(SUM(output_tokens), 0) FROM answers WHERE payer = ?"
        return Usage(*self._db.execute(sums, (payer,)).fetchone())

    def tokens_per_second(self, keys: Keys) -> float | None:
        """Prompt and answer tokens a second of the setting's last answers, over all that asked at once; None where
        there are too few to tell. Pauses are left out."""
        found = self._db.execute(
            "SELECT created, input_tokens + output_tokens FROM answers WHERE setting = ? AND error IS NULL "
            "ORDER BY rowid DESC LIMIT ?",
            (self._setting(keys.setting), _RECENT),
        ).fetchall()
        tokens = seconds = 0.0
        for (later, count), (earlier, _) in itertools.pairwise(found):
            if 0 <= later - earlier < _PAUSE_S:
                tokens, seconds = tokens + count, seconds + later - earlier
        return tokens / seconds if len(found) >= _ENOUGH and seconds > 0 else None

    # Errors.

    def tally(self, error: CallError, count: int = 1) -> None:
        """Counts an error that is not kept."""
        with self._transaction():
            self._db.execute(
                "INSERT INTO tally VALUES (?, ?) ON CONFLICT(error) DO UPDATE SET count = count + excluded.count",
                (error, count),
            )

    def counts(self) -> dict[str, int]:
        """`answers`, and each class of error: kept ones and tallied ones."""
        answers = self._db.execute("SELECT COUNT(*) FROM answers WHERE error IS NULL").fetchone()[0]
        kept = self._db.execute("SELECT error, COUNT(*) FROM answers WHERE error IS NOT NULL GROUP BY error")
        tallied = self._db.execute("SELECT error, count FROM tally")
        return {"answers": answers, **dict(kept.fetchall()), **dict(tallied.fetchall())}

    def forget(self, *, error: CallError | None = None, key: Key | None = None) -> int:
        """Removes the kept errors of a class, or of one key, so that they are asked again; how many."""
        column, value = ("error", error) if key is None else ("key", key.digest)
        with self._transaction():
            return self._db.execute(f"DELETE FROM answers WHERE {column} = ? AND error IS NOT NULL", (value,)).rowcount

    # Claims.

    def claim(self, key: Key) -> bool:
        """True: nobody else asks for `key`, so we do. False: somebody does (this owner too), or it is answered."""
        while True:
            with self._transaction():
                if self._db.execute("SELECT 1 FROM answers WHERE key = ?", (key.digest,)).fetchone():
                    return False
                self._db.execute("INSERT OR IGNORE INTO claims VALUES (?, ?)", (key.digest, self.owner))
                if self._db.execute("SELECT changes()").fetchone()[0]:
                    return True
                owner = self._db.execute("SELECT owner FROM claims WHERE key = ?", (key.digest,)).fetchone()[0]
            if owner == self.owner or self._is_alive(owner):
                return False
            self._bury(owner)

    def release(self, key: Key) -> None:
        """Gives a claim back without an answer."""
        with self._transaction():
            self._db.execute("DELETE FROM claims WHERE key = ? AND owner = ?", (key.digest, self.owner))

    def _owner_file(self, owner: str) -> Path:
        return self.folder / _OWNERS / owner

    def _is_alive(self, owner: str) -> bool:
        if time.monotonic() - self._alive.get(owner, float("-inf")) < 0.5:
            return True
        try:
            handle = os.open(self._owner_file(owner), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._alive[owner] = time.monotonic()
            return True
        finally:
            os.close(handle)
        return False

    def _bury(self, owner: str) -> None:
        with self._transaction():
            self._db.execute("DELETE FROM claims WHERE owner = ?", (owner,))
        self._owner_file(owner).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Removes what dead owners left."""
        for (owner,) in self._db.execute("SELECT DISTINCT owner FROM claims").fetchall():
            if owner != self.owner and not self._is_alive(owner):
                self._bury(owner)

    # The database.

    def _begin_wal(self) -> None:
        # The switch needs the file alone, and answers "locked" at once without the busy timeout.
        until = time.monotonic() + _BUSY_S
        while True:
            try:
                mode = self._db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
                break
            except sqlite3.OperationalError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
        if mode != "wal":
            raise UserError(f"the label cache {self.folder} is on a file system without shared memory: use a local one")
        self._db.execute("PRAGMA synchronous=NORMAL")

    def _transaction(self) -> "_Transaction":
        return _Transaction(self._db, self.folder)

    def _setting(self, key: str) -> int:
        found = self._settings.get(key)
        if found is None:
            with self._transaction():
                self._db.execute("INSERT OR IGNORE INTO settings(key) VALUES (?)", (key,))
            found = int(self._db.execute("SELECT id FROM settings WHERE key = ?", (key,)).fetchone()[0])
            self._settings[key] = found
        return found


class _Transaction:
    """BEGIN IMMEDIATE … COMMIT: a reader that turns writer in the middle would fail where this one waits."""

    def __init__(self, db: sqlite3.Connection, folder: Path):
        self._db, self._folder = db, folder

    def __enter__(self) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            raise self._named(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._db.execute("ROLLBACK" if error else "COMMIT")
        except sqlite3.OperationalError as failed:
            raise self._named(failed) from failed
        if isinstance(error, sqlite3.OperationalError):
            raise self._named(error) from error

    def _named(self, error: sqlite3.OperationalError) -> TilthError:
        return TilthError(f"the label cache {self._folder} can't be written: {error}")


def _row(row: tuple[Any, ...]) -> Row:
    key, answer, finish, error, detail, *usage = row
    result = Text(answer, finish) if error is None else Failed(cast("CallError", error), detail)
    return Row(key, result, Usage(*usage))


def _clean(text: str) -> str:
    """Without lone surrogates, which no UTF-8 holds."""
    return text.encode(errors="replace").decode()
