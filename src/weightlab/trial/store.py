"""The trial store: one append-only SQLite file of runs that any number of processes may share."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from weightlab.exceptions import StoreError
from weightlab.trial.spec import RunResult

APPLICATION_ID = 0x77_4C_61_62  # "wLab", in bytes 68 to 71 of the file's header
SCHEMA_VERSION = 1

_MAGIC = b"SQLite format 3\x00"
_BUSY_SECONDS = 60.0
_CHUNK = 500
_DISCARDED = "discarded"

_SCHEMA = f"""
CREATE TABLE runs (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL,
    status TEXT NOT NULL,
    created_at TEXT NOT NULL,
    result TEXT,
    digest BLOB
);
CREATE INDEX runs_by_key ON runs (key, id);
CREATE TABLE trials (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL,
    created_at TEXT NOT NULL,
    definition TEXT NOT NULL
);
CREATE TABLE leases (
    key TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    place TEXT NOT NULL,
    pid INTEGER NOT NULL,
    started TEXT NOT NULL,
    beat REAL NOT NULL
) WITHOUT ROWID;
CREATE TRIGGER runs_keep BEFORE UPDATE ON runs BEGIN SELECT RAISE(ABORT, 'runs are append-only'); END;
CREATE TRIGGER runs_stay BEFORE DELETE ON runs BEGIN SELECT RAISE(ABORT, 'runs are append-only'); END;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""

# Closing any descriptor of a file drops the POSIX locks that SQLite holds on it elsewhere in this
# process, so a file that is already open here must not be opened again to look at its bytes.
_open_files: dict[tuple[int, int], int] = {}
_opening = threading.Lock()


class Store:
    """Runs and trials in one SQLite file.

    A run is stored under its key, the hash of everything that determines it. Rows are only ever
    added: the latest row of a key counts, and a tombstone (`discard`) hides what came before it.
    Every write is one transaction in WAL mode, so a process may be killed at any moment: what was
    stored stays, what was being written is wholly there or not at all. Leases (`claim`) keep
    processes that share the file from doing the same run at the same time.

    Args:
        path: The file. Missing or empty: a new store is made there, with its folders.
        read_only: Only read; the file must exist.
        beat_seconds: Seconds between heartbeats of this process's leases.
        stale_seconds: Age of the last heartbeat at which a lease held on another machine ends.

    Raises:
        StoreError: When the file is not a store, is newer than this version, damaged, unreadable or
            read-only, or when the disk is full. The file is left as it was.

    Note:
        SQLite's WAL mode needs a local file system. Runs on other machines (Ray) are stored by the
        process that asked for them, so the file itself need not be shared over a network.

    Example:
        >>> import tempfile
        >>> from weightlab.trial.spec import RunResult, RunSpec
        >>> spec = RunSpec("t", "", "adamw", "", {"lr": 1e-3}, 0, "test", 10, 2, 8, 1, "cpu", {})
        >>> with tempfile.TemporaryDirectory() as folder, Store(f"{folder}/trials.db") as store:
        ...     store.claim(spec.key), store.put(RunResult(spec, "ok", {"loss": 0.1}))
        ...     store.claim(spec.key), store.get(spec.key).metrics
        (True, True)
        (False, {'loss': 0.1})
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        read_only: bool = False,
        *,
        beat_seconds: float = 10.0,
        stale_seconds: float = 60.0,
    ) -> None:
        self.path = Path(path)
        self.read_only = read_only
        self._file = self.path.resolve()
        self._beat_seconds = beat_seconds
        self._stale_seconds = stale_seconds
        self._owner = uuid.uuid4().hex
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None
        self._db: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        with _opening, self._explained("opened"):
            self._open()

    def put(self, result: RunResult) -> bool:
        """Store a run and end its lease, in one transaction.

        Args:
            result: What came of the run, failed or not. Floats come back bit for bit.

        Returns:
            Whether it was stored. A second result of a run that ended `"ok"` and was not discarded
            is refused: nothing is stored twice.

        Raises:
            StoreError: When the file cannot be written; what it held before stays readable.
        """
        text = json.dumps(result.to_dict())
        with self._writing("written") as db:
            latest = self._latest_status(db, result.key)
            stored = latest != "ok"
            if stored:
                db.execute(
                    "INSERT INTO runs (key, status, created_at, result, digest) VALUES (?, ?, ?, ?, ?)",
                    (result.key, result.status, _now(), text, _digest(text)),
                )
            db.execute("DELETE FROM leases WHERE key = ?", (result.key,))
        return stored

    def get(self, key: str) -> RunResult | None:
        """Return the latest result of a run, or `None` if there is none or it was discarded."""
        return self.get_many([key]).get(key)

    def get_many(self, keys: Iterable[str]) -> dict[str, RunResult]:
        """Return the latest results of those of `keys` that have one; O(len(keys) · log rows)."""
        wanted = list(dict.fromkeys(keys))
        found: dict[str, RunResult] = {}
        for chunk in _chunks(wanted):
            rows = self._read(
                "SELECT key, id, result, digest FROM runs WHERE id IN (SELECT max(id) FROM runs"
                f" WHERE key IN ({_marks(chunk)}) GROUP BY key) AND result IS NOT NULL",
                chunk,
            )
            found |= {key: self._decode(*row) for key, *row in rows}
        return {key: found[key] for key in wanted if key in found}

    def results(self) -> Iterator[RunResult]:
        """Yield the latest result of every run that was not discarded, oldest first.

        Memory stays bounded; rows added while iterating do not appear.
        """
        latest = self._read("SELECT max(id) AS id FROM runs GROUP BY key ORDER BY id", ())
        for chunk in _chunks([row[0] for row in latest]):
            rows = self._read(
                f"SELECT id, result, digest FROM runs WHERE id IN ({_marks(chunk)})"
                " AND result IS NOT NULL ORDER BY id",
                chunk,
            )
            for row in rows:
                yield self._decode(*row)

    def history(self, key: str) -> list[RunResult | None]:
        """Return every row of a run, oldest first; `None` stands for a discard."""
        rows = self._read("SELECT id, result, digest FROM runs WHERE key = ? ORDER BY id", (key,))
        return [None if row[1] is None else self._decode(*row) for row in rows]

    def discard(self, keys: Iterable[str]) -> int:
        """Hide the results of runs so that they are done afresh; nothing is deleted.

        Returns:
            How many results were hidden; runs without a result are passed over.
        """
        hidden = 0
        with self._writing("written") as db:
            for key in dict.fromkeys(keys):
                if self._latest_status(db, key) not in (None, _DISCARDED):
                    db.execute(
                        "INSERT INTO runs (key, status, created_at) VALUES (?, ?, ?)",
                        (key, _DISCARDED, _now()),
                    )
                    hidden += 1
        return hidden

    def save_trial(self, trial_key: str, definition: Mapping[str, Any]) -> None:
        """Store what a trial is made of, so that it can be listed and drawn again.

        Args:
            trial_key: The trial's identity; the latest definition of a key counts.
            definition: Plain JSON types.
        """
        text = json.dumps(definition)
        with self._writing("written") as db:
            latest = db.execute(
                "SELECT definition FROM trials WHERE key = ? ORDER BY id DESC LIMIT 1", (trial_key,)
            ).fetchone()
            if latest is None or latest[0] != text:
                db.execute(
                    "INSERT INTO trials (key, created_at, definition) VALUES (?, ?, ?)",
                    (trial_key, _now(), text),
                )

    def trials(self) -> list[dict[str, Any]]:
        """Return the latest definition of every trial; the one saved last comes last."""
        rows = self._read(
            "SELECT definition FROM trials WHERE id IN (SELECT max(id) FROM trials GROUP BY key) ORDER BY id",
            (),
        )
        try:
            return [json.loads(text) for (text,) in rows]
        except ValueError as error:
            raise self._damaged(str(error)) from error

    def claim(self, key: str) -> bool:
        """Take the right to do a run, unless it is done or somebody is doing it.

        The lease lasts until `put`, `release` or `close`, or until this process is gone: a killed
        process's leases can be claimed at once on the same machine, and once their heartbeat is
        older than `stale_seconds` on others.

        Returns:
            Whether the run is now this store's to do.
        """
        with self._writing("written") as db:
            if self._latest_status(db, key) not in (None, _DISCARDED):
                return False
            lease = db.execute(
                "SELECT place, pid, started, beat FROM leases WHERE key = ?", (key,)
            ).fetchone()
            if lease is not None and _lives(*lease, stale_seconds=self._stale_seconds):
                return False
            pid = os.getpid()
            db.execute(
                "INSERT OR REPLACE INTO leases (key, owner, place, pid, started, beat)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (key, self._owner, _place(), pid, _process_start(pid) or "", time.time()),
            )
        with self._lock:
            if self._heart is None:
                self._heart = threading.Thread(target=self._keep_alive, name="store-heartbeat", daemon=True)
                self._heart.start()
        return True

    def release(self, key: str) -> None:
        """Give back a claimed run undone. Another store's lease is left alone."""
        with self._writing("written") as db:
            db.execute("DELETE FROM leases WHERE key = ? AND owner = ?", (key, self._owner))

    def close(self) -> None:
        """Give back all leases and leave one tidy file behind. Safe to call twice."""
        with self._lock:
            heart, self._heart = self._heart, None
        self._stop.set()
        if heart is not None:
            heart.join()
        with self._lock, _opening:
            db, self._db = self._db, None
            if db is None:
                return
            with suppress(sqlite3.Error):  # a lease that cannot be deleted ends with this process
                if heart is not None:
                    db.execute("DELETE FROM leases WHERE owner = ?", (self._owner,))
            db.close()
            self._forget()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        created = self._check_permissions()
        if not created:
            here = os.stat(self._file)
            if (here.st_dev, here.st_ino) not in _open_files:
                self._inspect()
        self._db = self._connect("rwc" if created else "rw")
        try:
            if not self.read_only:
                self._prepare(self._db)
            here = os.stat(self._file)
        except BaseException:
            self._db.close()
            self._db = None
            raise
        self._identity = (here.st_dev, here.st_ino)
        _open_files[self._identity] = _open_files.get(self._identity, 0) + 1

    def _check_permissions(self) -> bool:
        """Refuse what cannot be used; return whether the file has to be made."""
        file = self._file
        if file.is_dir():
            raise StoreError(f"{self.path} is a folder; the store is a file: give one inside it")
        exists = file.exists()
        if self.read_only:
            if not exists:
                raise StoreError(f"{self.path} does not exist; give the file of a store to read")
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            if not _permits(file.parent, os.W_OK):
                raise StoreError(
                    f"{self.path}: its folder is read-only; a store needs to write there: "
                    "make it writable or give another file"
                )
        if exists and not file.is_file():
            raise StoreError(f"{self.path} is not a regular file; give another file")
        if exists and not _permits(file, os.R_OK):
            raise StoreError(f"{self.path} is not readable; change its permissions or give another file")
        if exists and not self.read_only and not _permits(file, os.W_OK):
            raise StoreError(f"{self.path} is read-only; make it writable or give another file")
        return not exists

    def _inspect(self) -> None:
        """Look at the file without changing a byte of it, or of what lies beside it.

        What seems wrong while another process is making the file, or moving its log into it, is
        looked at again.
        """
        for _ in range(50):
            before = self._footprint()
            problem = self._problem()
            if problem is None:
                return
            if self._footprint() == before:
                raise problem
            time.sleep(0.02)
        raise self._damaged("it changes under every look")

    def _problem(self) -> StoreError | None:
        recovering = self._beside("-journal")
        with self._file.open("rb") as stream:
            header = stream.read(100)
        if not header:
            return StoreError(f"{self.path} is empty; there is nothing to read") if self.read_only else None
        if header[: len(_MAGIC)] != _MAGIC[: len(header)]:
            return StoreError(
                f"{self.path} is not a weightlab store (nor any SQLite file); give another file"
            )
        if len(header) < 100:
            return self._damaged("it ends within its header")
        if int.from_bytes(header[68:72], "big") != APPLICATION_ID:
            return StoreError(f"{self.path} is an SQLite file of another program; give another file")
        version = int.from_bytes(header[60:64], "big")
        if version == SCHEMA_VERSION and recovering:
            return None
        if version == SCHEMA_VERSION:
            try:
                with closing(self._connect("ro")) as db:
                    (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
                    (version,) = db.execute("PRAGMA user_version").fetchone()
            except sqlite3.Error as error:
                return self._translate(error, "read")
            if verdict != "ok":
                return self._damaged(verdict.splitlines()[-1])
        if version != SCHEMA_VERSION:
            return StoreError(
                f"{self.path} has store format {version}, this weightlab knows {SCHEMA_VERSION}; "
                "upgrade weightlab or give another file"
            )
        return None

    def _connect(self, mode: str) -> sqlite3.Connection:
        # Without a log beside it the file is complete, and an immutable view of it leaves no side files.
        if self.read_only or mode == "ro":
            mode = "ro" if self._beside("-wal") else "ro&immutable=1"
        db = sqlite3.connect(
            f"{self._file.as_uri()}?mode={mode}",
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        db.execute("PRAGMA trusted_schema = OFF")
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        """Make the tables if the file is new, in one transaction, and turn on the write-ahead log."""
        if not db.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone():
            with _transaction(db):
                if not db.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone():
                    for statement in _statements(_SCHEMA):
                        db.execute(statement)
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
                break
            except sqlite3.OperationalError as error:  # SQLite does not wait for this lock by itself
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        db.execute(f"PRAGMA synchronous = {'NORMAL' if mode == 'wal' else 'FULL'}")

    def _beside(self, suffix: str) -> bool:
        try:
            return os.stat(f"{self._file}{suffix}").st_size > 0
        except OSError:
            return False

    def _footprint(self) -> list[tuple[int, int] | None]:
        found: list[tuple[int, int] | None] = []
        for suffix in ("", "-journal", "-wal"):
            try:
                here = os.stat(f"{self._file}{suffix}")
                found.append((here.st_size, here.st_mtime_ns))
            except OSError:
                found.append(None)
        return found

    def _forget(self) -> None:
        if self._identity is not None:
            _open_files[self._identity] -= 1
            if not _open_files[self._identity]:
                del _open_files[self._identity]
            self._identity = None

    def _keep_alive(self) -> None:
        while not self._stop.wait(self._beat_seconds):
            with suppress(sqlite3.Error), closing(self._connect("rw")) as db:  # the next beat tries again
                db.execute("PRAGMA busy_timeout = 2000")
                db.execute("UPDATE leases SET beat = ? WHERE owner = ?", (time.time(), self._owner))

    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            raise StoreError(f"{self.path}: the store is closed; open it again")
        return self._db

    def _read(self, query: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        with self._lock, self._explained("read"):
            return self._connection().execute(query, tuple(values)).fetchall()

    @contextmanager
    def _writing(self, verb: str) -> Iterator[sqlite3.Connection]:
        if self.read_only:
            raise StoreError(f"{self.path} was opened read-only; open it without read_only to write")
        with self._lock, self._explained(verb):
            db = self._connection()
            with _transaction(db):
                yield db

    @contextmanager
    def _explained(self, verb: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._translate(error, verb) from error
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be {verb}: {error.strerror or error}; give another file"
            ) from error

    def _translate(self, error: sqlite3.Error, verb: str) -> StoreError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return self._damaged(str(error))
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            return StoreError(
                f"{self.path} cannot be {verb}: {error} (disk full?); what was stored is kept: "
                "free some space and repeat the command"
            )
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return StoreError(
                f"{self.path} cannot be {verb}: another process has kept it locked for "
                f"{_BUSY_SECONDS:.0f} s; wait for it to end or give another file"
            )
        if code == sqlite3.SQLITE_READONLY:
            return StoreError(f"{self.path} is read-only; make it writable or give another file")
        return StoreError(f"{self.path} cannot be {verb}: {error}; check the file or give another one")

    def _damaged(self, detail: str) -> StoreError:
        return StoreError(
            f"{self.path} is damaged or cut short ({detail}); restore it from a copy or give another file"
        )

    def _decode(self, row: int, text: str, digest: bytes) -> RunResult:
        if _digest(text) != digest:
            raise self._damaged(f"the run in row {row} is not what was stored")
        try:
            return RunResult.from_dict(json.loads(text))
        except (ValueError, TypeError, KeyError) as error:
            raise self._damaged(f"the run in row {row} cannot be understood: {error}") from error

    @staticmethod
    def _latest_status(db: sqlite3.Connection, key: str) -> str | None:
        row = db.execute("SELECT status FROM runs WHERE key = ? ORDER BY id DESC LIMIT 1", (key,)).fetchone()
        return None if row is None else row[0]


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _statements(script: str) -> Iterator[str]:
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK))


def _marks(items: Sequence[Any]) -> str:
    return ", ".join("?" * len(items))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _permits(path: Path, access: int) -> bool:
    """Whether `path` may be read (`os.R_OK`) or written (`os.W_OK`).

    The superuser may do anything; a file without a single permission bit for it is respected all the same.
    """
    anyone = 0o444 if access == os.R_OK else 0o222
    return os.access(path, access) and bool(stat.S_IMODE(path.stat().st_mode) & anyone)


def _place() -> str:
    """Name the set of processes among which a process id means something."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _process_start(pid: int) -> str | None:
    """Return what tells a process from a later one with its id; `None` if it is gone, `""` if unknown."""
    if sys.platform == "linux":
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    if os.name == "posix":
        found = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
        return found.stdout.strip() or None
    return ""


def _lives(place: str, pid: int, started: str, beat: float, *, stale_seconds: float) -> bool:
    if place == _place() and started:
        return _process_start(pid) == started
    return time.time() - beat < stale_seconds
