"""One log for every process of a machine: an SQLite database in WAL mode, with nothing to install.

Publishing is one short transaction, which SQLite lets one process at a time make, so the numbers of events are in the
order in which they become visible. Each process that has streams runs one listener (``listener.py``), which reads
what is new and delivers it, its own process's events too: there is one way only.

Publishing may be done from any thread or greenlet, not from a signal handler: the interrupted code may be inside the
very transaction that it would wait for.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import secrets
import sqlite3
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from ..errors import BrokerError, SettingsError
from ..event import Message, is_body
from ..keys import is_job
from ..settings import Settings
from .base import BrokerStats, Deliver, Delivery, History, Idle, Position, never_idle
from .listener import LOOK_SECONDS, READ_EVENTS, Listener, Part, wake_all

__all__ = ["SQLiteBroker"]

_RETRY_SECONDS: Final = 0.005
_TRIM_EVERY: Final = 64
_TRIM_EVENTS: Final = 4 * _TRIM_EVERY  # too old, at a time: more than come in between
_TRIM_JOBS: Final = 16  # too old, at a time
_FLOORS: Final = 10_000  # keys whose floors are known one by one
_FORMAT: Final = 4
_ALL: Final = ""  # the key of what goes to all, which no user's key can be
_MAGIC: Final = 0x55E5  # PRAGMA application_id: an existing database of somebody else's is left alone

_EPOCH: Final = re.compile(r"[0-9a-f]{12}\Z")

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS log (
    namespace TEXT PRIMARY KEY, epoch TEXT NOT NULL, head INTEGER NOT NULL, boot TEXT NOT NULL, floor INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS event (
    namespace TEXT NOT NULL, seq INTEGER NOT NULL, key TEXT NOT NULL, created REAL NOT NULL, body BLOB NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS event_by_seq ON event (namespace, seq);
CREATE INDEX IF NOT EXISTS event_by_key ON event (namespace, key, seq);
CREATE TABLE IF NOT EXISTS job_event (
    namespace TEXT NOT NULL, seq INTEGER NOT NULL, key TEXT NOT NULL, created REAL NOT NULL, body BLOB NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS job_event_by_seq ON job_event (namespace, seq);
CREATE INDEX IF NOT EXISTS job_event_by_key ON job_event (namespace, key, seq);
CREATE TABLE IF NOT EXISTS job (
    namespace TEXT NOT NULL, key TEXT NOT NULL, used REAL NOT NULL, PRIMARY KEY (namespace, key)
);
CREATE INDEX IF NOT EXISTS job_by_time ON job (namespace, used);
CREATE TABLE IF NOT EXISTS floor (
    namespace TEXT NOT NULL, key TEXT NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (namespace, key)
);
CREATE INDEX IF NOT EXISTS floor_by_seq ON floor (namespace, seq);
CREATE TABLE IF NOT EXISTS once (
    namespace TEXT NOT NULL, key TEXT NOT NULL, id TEXT NOT NULL, until REAL NOT NULL, PRIMARY KEY (namespace, key)
);
CREATE INDEX IF NOT EXISTS once_by_time ON once (namespace, until);
CREATE TABLE IF NOT EXISTS lease (
    namespace TEXT NOT NULL, name TEXT NOT NULL, holder TEXT NOT NULL, until REAL NOT NULL,
    PRIMARY KEY (namespace, name)
);
CREATE TABLE IF NOT EXISTS mark (
    namespace TEXT NOT NULL, name TEXT NOT NULL, at REAL NOT NULL, until REAL NOT NULL, PRIMARY KEY (namespace, name)
);
"""


def _boot_id() -> str:
    """Name this run of the machine: what was written shortly before it lost its power may be gone."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except FileNotFoundError:
        return "unknown"  # a system that does not say


def _place(value: Any) -> int:
    """Give a place in the log, 0 for what is none: SQLite keeps values of any type in a column of any other."""
    return value if isinstance(value, int) and value > 0 else 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _machine_time() -> float:
    """Give seconds that all processes of this run of the machine share, and that nobody can set.

    A log is of one run of the machine (clock_gettime(2): CLOCK_MONOTONIC is the system's, not the process's).
    """
    return time.monotonic()


class SQLiteBroker:
    """Orders and remembers the events of all processes that name the same database and namespace.

    ``sqlite:///relative.db`` or ``sqlite:////absolute.db``. The file and its neighbours (``-wal``, ``-shm``,
    ``.wake``) are made where they are missing; their directory must exist. Not for network file systems, on which
    SQLite's locks and WAL mode do not work.

    The log survives the end of every process. After the machine itself was started anew it begins a new epoch:
    commits are not forced to the disk one by one, so its last ones may be missing.
    """

    remembers = True

    def __init__(self, settings: Settings) -> None:
        scheme, _, path = settings.broker_url.partition("://")
        if not path.startswith("/") or len(path) < 2 or path.endswith("/"):
            raise SettingsError(
                f"SSE_BROKER_URL {settings.broker_url!r} names no file: write {scheme}:///relative.db "
                f"or {scheme}:////absolute.db"
            )
        self._path = os.path.abspath(path[1:])
        self._wake_directory = self._path + ".wake"
        self._namespace = settings.namespace
        self._kept = settings.kept
        self._job_ttl = settings.job_ttl
        self._limit = settings.max_event_bytes
        self._once_ttl = settings.idempotency_ttl
        self._timeout = settings.broker_timeout
        self._deliver: Deliver
        self._free: deque[tuple[int, sqlite3.Connection]] = deque()
        self._starting = threading.Lock()
        self._listener: Listener | None = None
        self._closed = False
        self._boot = ""
        weakref.finalize(self, _close_all, self._free)

    def start(self, deliver: Deliver, idle: Idle = never_idle) -> None:
        """Remember where messages go. Every key is delivered, whether it is needed or not."""
        self._deliver = deliver

    def publish(self, key: str | None, body: bytes, once: str | None = None) -> str:
        """Write the event into the log and wake every process that listens."""
        name = _ALL if key is None else key
        with self._transaction() as connection:
            epoch, head = self._position(connection, create=True)
            seq = head + 1
            identifier = Message(key, epoch, seq, body, 0.0).id
            if once is not None:
                made = self._made(connection, once, identifier)
                if made is not None:
                    return made
            connection.execute("UPDATE log SET head = ? WHERE namespace = ?", (seq, self._namespace))
            connection.execute(  # in the place of what somebody else may have put there
                f"INSERT OR REPLACE INTO {_table(key)} VALUES (?, ?, ?, ?, ?)",  # noqa: S608
                (self._namespace, seq, name, _machine_time(), body),
            )
            if is_job(key):
                connection.execute(
                    "INSERT INTO job VALUES (?, ?, ?) ON CONFLICT (namespace, key) DO UPDATE SET used = excluded.used",
                    (self._namespace, name, _machine_time()),
                )
            # By chance, so that no rhythm of keys leaves one of them untrimmed for ever.
            if random.random() < 1 / _TRIM_EVERY:  # noqa: S311
                self._trim(connection, name)
        wake_all(self._wake_directory)
        return identifier

    def _made(self, connection: sqlite3.Connection, once: str, identifier: str) -> str | None:
        """Give the id of what this idempotency key has made; ``None`` if that is ``identifier`` from now on."""
        now = _machine_time()
        connection.execute("DELETE FROM once WHERE namespace = ? AND until < ?", (self._namespace, now))
        row = connection.execute(
            "SELECT id FROM once WHERE namespace = ? AND key = ?", (self._namespace, once)
        ).fetchone()
        if row is not None:
            return str(row[0])
        until = now + self._once_ttl
        connection.execute("INSERT INTO once VALUES (?, ?, ?, ?)", (self._namespace, once, identifier, until))
        return None

    def lease(self, name: str, holder: str, seconds: float) -> bool:
        """Let one process of the machine have ``name``."""
        now = _machine_time()
        with self._transaction() as connection:
            self._position(connection, create=True)
            row = connection.execute(
                "SELECT holder, until FROM lease WHERE namespace = ? AND name = ?", (self._namespace, name)
            ).fetchone()
            if row is not None and row[0] != holder and row[1] > now:
                return False
            if seconds:
                connection.execute(
                    "INSERT OR REPLACE INTO lease VALUES (?, ?, ?, ?)", (self._namespace, name, holder, now + seconds)
                )
            elif row is not None:
                connection.execute("DELETE FROM lease WHERE namespace = ? AND name = ?", (self._namespace, name))
        return True

    def mark(self, name: str, at: float, seconds: float) -> None:
        """Remember when ``name`` was marked, also when the machine is started anew."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM mark WHERE namespace = ? AND until < ?", (self._namespace, at))
            connection.execute(
                "INSERT INTO mark VALUES (?, ?, ?, ?) ON CONFLICT (namespace, name) "
                "DO UPDATE SET at = MAX(at, excluded.at), until = MAX(until, excluded.until)",
                (self._namespace, name, at, at + seconds),
            )

    def marked(self, names: Sequence[str]) -> float:
        """Give the latest time at which one of ``names`` was marked."""
        wanted = ", ".join("?" * len(names))
        with self._reading() as connection:
            (at,) = connection.execute(
                f"SELECT MAX(at) FROM mark WHERE namespace = ? AND name IN ({wanted})",  # noqa: S608
                (self._namespace, *names),
            ).fetchone()
        return float(at or 0.0)

    def cover(self, keys: Sequence[str | None], fetch: Sequence[str | None], after: str | None) -> Position:
        """Read what the log remembers of ``fetch``; from the first call on, listen."""
        with self._starting:
            if self._listener is None:
                with self._transaction() as connection:
                    epoch, head = self._position(connection, create=True)
                self._listener = Listener(self, self._wake_directory, epoch, head)
        with self._reading() as connection:
            epoch, head = self._position(connection)
            histories = [self._history(connection, key, epoch, head) for key in fetch]
        # A client may come from a process that is ahead of this one by what the listener has yet to read.
        self._listener.catch_up(self)
        for history in histories:
            self._deliver(history)
        return Position(epoch, head)

    def stats(self) -> BrokerStats:
        """Say whether the log can be read."""
        if self._listener is None:
            return BrokerStats()
        listener = self._listener
        return BrokerStats(not listener.broken, gaps=listener.gaps, skipped=listener.skipped, error=listener.broken)

    def close(self) -> None:
        """End the listener and close every connection."""
        self._closed = True
        if self._listener is not None:
            self._listener.stop()
        _close_all(self._free)

    # The log

    def _position(self, connection: sqlite3.Connection, *, create: bool = False) -> tuple[str, int]:
        row = connection.execute("SELECT epoch, head, boot FROM log WHERE namespace = ?", (self._namespace,)).fetchone()
        is_ours = row is not None and _EPOCH.match(str(row[0])) is not None and isinstance(row[1], int)
        if is_ours and (not create or row[2] == self._this_boot()):
            return row[0], row[1]
        return (self._begin_anew(connection), 0) if create else ("", 0)

    def _begin_anew(self, connection: sqlite3.Connection) -> str:
        epoch = secrets.token_hex(6)
        for table in ("event", "job_event", "job", "floor", "once", "lease", "log"):
            connection.execute(f"DELETE FROM {table} WHERE namespace = ?", (self._namespace,))  # noqa: S608
        connection.execute("INSERT INTO log VALUES (?, ?, 0, ?, 0)", (self._namespace, epoch, self._this_boot()))
        return epoch

    def _this_boot(self) -> str:
        # Once: a process that has no descriptor left must not take that for another boot.
        if not self._boot:
            try:
                self._boot = _boot_id()
            except OSError as error:
                raise BrokerError(f"{self._path}: which boot this is cannot be read: {error}") from error
        return self._boot

    def rewound(self, epoch: str) -> None:
        """The file has an older state of a log that this process knows: give it a life of its own."""
        with self._transaction() as connection:
            if self._position(connection)[0] == epoch:  # else another process has done it
                self._begin_anew(connection)

    def _history(self, connection: sqlite3.Connection, key: str | None, epoch: str, head: int) -> History:
        name = _ALL if key is None else key
        row = connection.execute(
            "SELECT seq FROM floor WHERE namespace = :namespace AND key = :key "
            "UNION ALL SELECT floor FROM log WHERE namespace = :namespace",
            {"namespace": self._namespace, "key": name},
        ).fetchone()
        floor = _place(row[0]) if row is not None else 0
        size, ttl, whole = self._kept(key)
        rows = connection.execute(
            f"SELECT seq, key, created, body FROM {_table(key)} "  # noqa: S608
            "WHERE namespace = ? AND key = ? AND typeof(seq) = 'integer' ORDER BY seq DESC LIMIT ?",
            (self._namespace, name, size + 1),
        ).fetchall()
        oldest = _machine_time() - ttl
        kept = [row for row in rows[:size] if _is_number(row[2]) and (row[2] >= oldest or whole)]
        if whole and kept and kept[0][2] < oldest:
            kept = []
        if len(kept) < len(rows):
            floor = max(floor, _place(rows[len(kept)][0]))
        return History(key, epoch, floor, self._messages(epoch, reversed(kept)), head)

    def _messages(self, epoch: str, rows: Iterable[Sequence[Any]]) -> list[Message]:
        """Give the messages that rows are, without those that are none: anybody may have written to the file."""
        found = []
        for seq, name, created, body in rows:
            if not (_place(seq) and isinstance(name, str) and _is_number(created) and isinstance(body, bytes)):
                continue
            if len(body) <= self._limit and is_body(body):
                key = None if name == _ALL else name
                found.append(Message(key, epoch, seq, body, created, resumable=self._kept(key).size > 0))
        return found

    def read_after(self, seq: int) -> Part:
        """Give what comes next after ``seq``."""
        with self._reading() as connection:
            epoch, head = self._position(connection)
            # By names: the first releases of Python 3.12 warn of "?1", which a sequence may very well fill.
            rows = connection.execute(
                "SELECT seq, key, created, body FROM event "
                "WHERE namespace = :namespace AND seq > :seq AND seq <= :head AND typeof(seq) = 'integer' "
                "UNION ALL SELECT seq, key, created, body FROM job_event "
                "WHERE namespace = :namespace AND seq > :seq AND seq <= :head AND typeof(seq) = 'integer' "
                "ORDER BY seq LIMIT :most",
                {"namespace": self._namespace, "seq": seq, "head": head, "most": READ_EVENTS},
            ).fetchall()
            gone = connection.execute(
                "SELECT key, seq FROM floor WHERE namespace = ? AND seq > ?", (self._namespace, seq)
            ).fetchall()
        messages = self._messages(epoch, rows)
        reached = rows[-1][0] if len(rows) == READ_EVENTS else head
        floors = {None if name == _ALL else str(name): _place(floor) for name, floor in gone}
        return Part(epoch, head, messages, reached, floors, len(rows) - len(messages))

    def _trim(self, connection: sqlite3.Connection, name: str) -> None:
        """Delete what no window may hold any more, and remember up to where."""
        # One that is read by nobody yet must still reach the listeners, even without any history.
        surplus = connection.execute(
            f"SELECT seq FROM {_table(name)} WHERE namespace = ? AND key = ? ORDER BY seq DESC LIMIT 1 OFFSET ?",  # noqa: S608
            (self._namespace, name, max(self._kept(name).size, READ_EVENTS)),
        ).fetchone()
        now = _machine_time()
        oldest = now - max(self._kept(None).ttl, 10 * LOOK_SECONDS)
        stale: dict[str, int] = {}
        # The oldest come first, so there is no need to look at them all.
        for key, seq, created in connection.execute(
            "SELECT key, seq, created FROM event WHERE namespace = ? ORDER BY seq LIMIT ?",
            (self._namespace, _TRIM_EVENTS),
        ).fetchall():
            if created >= oldest:
                break
            stale[key] = seq
        if surplus is not None:
            stale[name] = max(surplus[0], stale.get(name, 0))
        stale.update(self._stale_jobs(connection, now))
        for key, seq in stale.items():
            connection.execute(
                f"DELETE FROM {_table(key)} WHERE namespace = ? AND key = ? AND seq <= ?",  # noqa: S608
                (self._namespace, key, seq),
            )
            connection.execute(
                "INSERT INTO floor VALUES (?, ?, ?) "
                "ON CONFLICT (namespace, key) DO UPDATE SET seq = MAX(seq, excluded.seq)",
                (self._namespace, key, seq),
            )
        connection.execute("DELETE FROM lease WHERE namespace = ? AND until < ?", (self._namespace, now))
        self._forget_floors(connection)

    def _stale_jobs(self, connection: sqlite3.Connection, now: float) -> dict[str, int]:
        """Forget jobs that have said nothing for too long; give the last number of each."""
        ttl = max(self._job_ttl, 10 * LOOK_SECONDS)
        found = connection.execute(
            "SELECT key FROM job WHERE namespace = ? AND used < ? ORDER BY used LIMIT ?",
            (self._namespace, now - ttl, _TRIM_JOBS),
        ).fetchall()
        stale: dict[str, int] = {}
        for (key,) in found:
            connection.execute("DELETE FROM job WHERE namespace = ? AND key = ?", (self._namespace, key))
            (last,) = connection.execute(
                "SELECT MAX(seq) FROM job_event WHERE namespace = ? AND key = ?", (self._namespace, key)
            ).fetchone()
            stale[key] = last or 0
        return stale

    def _forget_floors(self, connection: sqlite3.Connection) -> None:
        """Of very many keys, know one floor for all those that were trimmed longest ago."""
        row = connection.execute(
            "SELECT seq FROM floor WHERE namespace = ? ORDER BY seq DESC LIMIT 1 OFFSET ?", (self._namespace, _FLOORS)
        ).fetchone()
        if row is not None:
            connection.execute("DELETE FROM floor WHERE namespace = ? AND seq <= ?", (self._namespace, row[0]))
            connection.execute("UPDATE log SET floor = ? WHERE namespace = ?", (row[0], self._namespace))

    # Connections

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        deadline = time.monotonic() + self._timeout
        with self._connection(deadline) as connection:
            self._patiently(lambda: connection.execute("BEGIN IMMEDIATE"), deadline)
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        deadline = time.monotonic() + self._timeout
        with self._connection(deadline) as connection:
            self._patiently(lambda: self._begin_to_read(connection), deadline)
            try:
                yield connection
            finally:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")

    @staticmethod
    def _begin_to_read(connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN")
        try:
            # The first read takes the snapshot; another process that repairs or closes the log may hold it up.
            connection.execute("SELECT COUNT(*) FROM log").fetchone()
        except BaseException:
            connection.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _connection(self, deadline: float) -> Iterator[sqlite3.Connection]:
        """Lend a connection to one piece of code at a time; a failure is a :class:`BrokerError` with the cure."""
        if self._closed:
            raise BrokerError(f"the broker of {self._path} is closed")
        try:
            inode, connection = self._borrow(deadline)
            try:
                yield connection
            except BaseException:
                connection.close()
                raise
            self._free.append((inode, connection))
        except sqlite3.Error as error:
            raise BrokerError(f"{self._path}: {error}; {_cure(error)}") from error

    def _borrow(self, deadline: float) -> tuple[int, sqlite3.Connection]:
        inode = _inode(self._path)
        while True:
            try:
                known, connection = self._free.pop()
            except IndexError:
                return self._connect(deadline)
            if known == inode:
                return known, connection
            connection.close()  # The file was deleted or replaced since.

    def _connect(self, deadline: float) -> tuple[int, sqlite3.Connection]:
        while True:
            connection = sqlite3.connect(self._path, timeout=0, isolation_level=None, check_same_thread=False)
            try:
                before = _inode(self._path)
                self._patiently(functools.partial(self._prepare, connection), deadline)
            except BaseException:
                connection.close()
                raise
            if before and before == _inode(self._path):
                return before, connection
            connection.close()  # The file was replaced in between: this may be a connection to nowhere.

    def _prepare(self, connection: sqlite3.Connection) -> None:
        # At one moment: another process may be about to make it.
        connection.execute("BEGIN")
        try:
            (magic,) = connection.execute("PRAGMA application_id").fetchone()
            (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        finally:
            connection.execute("ROLLBACK")
        if magic != _MAGIC and tables:
            raise BrokerError(f"{self._path} is another application's database: name a file of its own")
        if magic != _MAGIC or not tables:
            self._create(connection)
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version != _FORMAT:
            raise BrokerError(f"{self._path} has format {version}, not {_FORMAT}: delete it, or name another file")
        connection.execute("PRAGMA synchronous=NORMAL")

    @staticmethod
    def _create(connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id={_MAGIC}")
            connection.execute(f"PRAGMA user_version={_FORMAT}")
            connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise

    @staticmethod
    def _patiently(attempt: Callable[[], Any], deadline: float) -> None:
        """Try again while another process writes. SQLite's own waiting would stop a whole hub of greenlets."""
        while True:
            try:
                attempt()
            except sqlite3.OperationalError as error:
                if not ("locked" in str(error) or "busy" in str(error)) or time.monotonic() > deadline:
                    raise
            else:
                return
            time.sleep(_RETRY_SECONDS)

    # What the listener calls

    def inode(self) -> int:
        """Which file the log is; 0: none. For the listener."""
        return _inode(self._path)

    def deliver(self, delivery: Delivery) -> None:
        """Hand a message on. For the listener."""
        self._deliver(delivery)


def _close_all(connections: deque[tuple[int, sqlite3.Connection]]) -> None:
    while connections:
        connections.popleft()[1].close()


def _table(key: str | None) -> str:
    # Jobs are kept as long as they speak, and would stand in the way of those who look for what is old among the rest.
    return "job_event" if is_job(key) else "event"


def _inode(path: str) -> int:
    """Give the number of the file, 0 where there is none yet."""
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise BrokerError(f"{path}: {error.strerror}; let this user read it") from error


def _cure(error: sqlite3.Error) -> str:
    text = str(error)
    for sign, cure in (
        ("locked", "another process holds it for longer than SSE_BROKER_TIMEOUT: find out which, or raise the setting"),
        ("readonly", "let this user write to the file and to its directory"),
        ("unable to open", "make its directory, and let this user write there"),
        ("full", "make room on its disk"),
        ("malformed", "delete the file: the history is lost, and clients are told to reload"),
        ("not a database", "delete the file, or name another"),
        ("disk I/O", "look at its disk"),
    ):
        if sign in text:
            return cure
    return "see the cause"
