"""Several real processes on one log, those who publish to it, and clients that come back as browsers do."""

from __future__ import annotations

import contextlib
import functools
import os
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import psutil
from redis_server import RedisServer
from support import ROOT, Server, free_port, python, wait_for

HERE = Path(__file__).parent
LONG = 30.0  # for what every process has a part in, on a machine that is busy with something else

PUBLISHER = """
import sys
from flask_sse_stream import Publisher
with Publisher(*sys.argv[1:3], history_size=int(sys.argv[3])) as publisher:
    for line in sys.stdin:
        key, _, data = line.rstrip("\\n").partition(" ")
        print(publisher.publish(key, data), flush=True)
"""
HISTORY = 5000
# gunicorn leaves the files of its heartbeats open when it ends, and its older versions a socket that is bound no more.
# gevent 23.9 has no greenlet left by then that could take the lock under which logging forgets Flask's handler.
LEFT_OPEN = (
    r"Exception ignored in: <(_io\.FileIO .*|socket\.socket fd=\d+, family=\S+, type=\S+, proto=0>)\n"
    r"ResourceWarning: unclosed (file )?<\1\n"
    r"|Exception ignored in: <function _removeHandlerRef at .*>\n"
    r"Traceback .*\n(  .*\n)+RuntimeError: greenlet is being finalized\n"
)

Command = Callable[..., list[str]]


class Log(NamedTuple):
    """Where the processes of one test meet; ``directory`` has the files of SQLite."""

    url: str
    namespace: str
    directory: Path
    redis: RedisServer | None = None

    @property
    def database(self) -> Path:
        """The file of SQLite."""
        assert self.redis is None
        return self.directory / "log.db"


class Received(NamedTuple):
    id: str
    event: str
    data: str


@functools.lru_cache(maxsize=20_000)
def _read(block: bytes) -> tuple[str | None, Received | None]:
    """Give the id that a block sets and the event that it fires. Once for all clients, who share what it gives."""
    identifier, event, data = None, "message", None
    for line in block.decode().split("\n"):
        name, _, value = line.partition(": ")
        if name == "id":
            identifier = value
        elif name == "event":
            event = value
        elif name == "data":
            data = value
    return identifier, Received(identifier or "", event, data) if data is not None else None


class Follower:
    """A client that comes back as a browser does: at once, with the last id it saw. A crowd drives it.

    An answer other than 200 is an error: an EventSource gives up for good at one.
    """

    def __init__(self, port: int, key: str, last_id: str) -> None:
        self.events: list[Received] = []
        self.errors: list[str] = []
        self.port = port  # where it goes the next time
        self.last_id = last_id
        self.process = 0  # whose stream it is reading; 0 while it reads none
        self.connections = 0
        self.due = 0.0  # when it connects, while it has no connection
        self.socket: socket.socket | None = None
        self._key = key
        self._answered_by = 0
        self._received = self._body = b""

    def connect(self) -> None:
        """Ask for the stream. Raises :class:`OSError`."""
        self._answered_by = 0
        self._received = self._body = b""
        self.socket = self.open()
        cursor = f"Last-Event-ID: {self.last_id}\r\n" if self.last_id else ""
        host = f"Host: 127.0.0.1:{self.port}\r\n"
        self.socket.sendall(f"GET /stream?connectKey={self._key} HTTP/1.1\r\n{host}{cursor}\r\n".encode())
        self.socket.setblocking(False)

    def open(self) -> socket.socket:
        """Connect. For those who do it in another way."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=LONG)

    def receive(self) -> bytes:
        """Take what is there. For those who take it in another way."""
        assert self.socket is not None
        return self.socket.recv(1 << 18)

    def read(self) -> bool:
        """Take in what came; say whether there may be more."""
        try:
            data = self.receive()
        except BlockingIOError:
            return True
        except OSError:  # a process that was killed with something unread
            return False
        if not data:
            return False
        self._received += data
        if not self._answered_by and not self._read_head():
            return True
        return self._read_chunks()

    def _read_head(self) -> bool:
        head, found, rest = self._received.partition(b"\r\n\r\n")
        if not found:
            return False
        self._received = rest
        status, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if status.split()[1] != "200" or headers["transfer-encoding"] != "chunked":
            raise AssertionError(f"{head!r}{rest!r}")
        self._answered_by = int(headers.get("x-process", "1"))  # an app of another test's does not say it
        return True

    def _read_chunks(self) -> bool:
        received, place = self._received, 0
        chunks = [self._body]
        goes_on = True
        while (end := received.find(b"\r\n", place)) >= 0:
            size = int(received[place:end], 16)
            if size == 0:
                goes_on = False
                break
            if len(received) < end + size + 4:
                break
            chunks.append(received[end + 2 : end + 2 + size])
            place = end + size + 4
        self._received = received[place:]
        *blocks, self._body = b"".join(chunks).split(b"\n\n")  # what is incomplete at the end is no event
        for block in blocks:
            identifier, event = _read(block)
            if identifier is not None:
                self.last_id = identifier
            if event is not None:
                self.events.append(event)
        if blocks and not self.process:
            self.process = self._answered_by
            self.connections += 1
        return goes_on

    # What tests ask

    def hang_up(self) -> None:
        """Cut the connection, if there is one, as a network does; it comes back."""
        if (connection := self.socket) is not None:
            with contextlib.suppress(OSError):  # closed meanwhile
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def data(self) -> list[str]:
        return [event.data for event in self.events]

    @property
    def ids(self) -> list[str]:
        return [event.id for event in self.events]

    def wait_until_it_reads(self) -> Follower:
        wait_for(lambda: self.process or self.errors, "a stream begins", LONG)
        assert not self.errors, self.errors
        return self

    def wait_for_data(self, last: str, seconds: float = LONG) -> None:
        wait_for(lambda: self.errors or last in [e.data for e in self.events[-1:]], f"{last!r} comes", seconds)
        assert not self.errors, self.errors


class Crowd:
    """Any number of followers, all of them in one thread."""

    def __init__(self) -> None:
        self.followers: list[Follower] = []
        self._away: list[Follower] = []
        self._selector = selectors.DefaultSelector()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Crowd:  # noqa: PYI034  Self is of Python 3.11
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join(LONG)
        assert not self._thread.is_alive()
        for follower in self.followers:
            if follower.socket is not None:
                follower.socket.close()
        self._selector.close()
        if kind is None:
            assert self.errors == [], self.errors

    @property
    def errors(self) -> list[str]:
        return [error for follower in self.followers for error in follower.errors]

    def follow(self, port: int, key: str, last_id: str = "", kind: type[Follower] = Follower) -> Follower:
        """Let one more client listen to a key."""
        follower = kind(port, key, last_id)
        self.followers.append(follower)
        self._away.append(follower)
        return follower

    def follow_on_each(self, servers: list[Workers], count: int, key: str) -> list[Follower]:
        """Open streams, at least ``count``, until every process of the servers has some."""
        followers = [self.follow(servers[index % len(servers)].port, key) for index in range(count)]
        for follower in followers:
            follower.wait_until_it_reads()
        # Who accepts is the kernel's choice, and it may favour one for long: those that have some wait for the others.
        for server in servers:
            while server.workers() - {follower.process for follower in followers}:
                having = server.workers() & {follower.process for follower in followers}
                for process in having:
                    os.kill(process, signal.SIGSTOP)
                try:
                    followers.append(self.follow(server.port, key).wait_until_it_reads())
                finally:
                    for process in having:
                        os.kill(process, signal.SIGCONT)
        return followers

    def _run(self) -> None:
        while not self._stopped.is_set():
            now = time.monotonic()
            for follower in self._away[:]:
                if follower.due <= now:
                    self._away.remove(follower)
                    self._attempt(follower, lambda follower=follower: self._connect(follower))  # type: ignore[misc]
            for key, _ in self._selector.select(0.02):
                follower = key.data
                if not self._attempt(follower, follower.read):
                    self._selector.unregister(key.fileobj)
                    self._hang_up(follower)

    def _connect(self, follower: Follower) -> bool:
        try:
            follower.connect()
        except OSError:
            self._hang_up(follower)
            return False
        assert follower.socket is not None
        self._selector.register(follower.socket, selectors.EVENT_READ, follower)
        return True

    def _hang_up(self, follower: Follower) -> None:
        if follower.socket is not None:
            follower.socket.close()
            follower.socket = None
        follower.process = 0
        if not follower.errors:
            follower.due = time.monotonic() + 0.02
            self._away.append(follower)

    @staticmethod
    def _attempt(follower: Follower, action: Callable[[], bool]) -> bool:
        try:
            return action()
        except Exception as error:
            follower.errors.append(repr(error))
            return False


class PublishingProcess:
    """A process without a server that publishes."""

    def __init__(self, log: Log) -> None:
        self._process = subprocess.Popen(
            python("-W", "error", "-c", PUBLISHER, log.url, log.namespace, str(HISTORY)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def publish(self, key: str, data: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{key} {data}\n")
        self._process.stdin.flush()
        identifier = self._process.stdout.readline().strip()
        assert identifier, "the publisher failed"
        return identifier

    def __enter__(self) -> PublishingProcess:  # noqa: PYI034  Self is of Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.communicate()
        if kind is None:
            assert self._process.returncode == 0


def gunicorn(port: int, *options: str) -> list[str]:
    """Give the command that runs gunicorn with these options."""
    return python(
        "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--graceful-timeout", "1", "--backlog", "2048", *options
    )


def pywsgi(port: int, *options: str) -> list[str]:
    """Give the command that runs gevent's own server, in one process."""
    return python(str(HERE / "workers_app.py"), str(port), *options)


class Workers(Server):
    """The processes of one server, on one log."""

    def __init__(self, command: Command, options: tuple[str, ...], output: Path, log: Log, **environment: str) -> None:
        port = free_port()
        super().__init__(
            command(port, *options),
            port,
            output,
            {
                "PYTHONPATH": f"{ROOT}:{HERE}",
                "PYTHONWARNINGS": "error",
                "SSE_BROKER_URL": log.url,
                "SSE_NAMESPACE": log.namespace,
                "SSE_PING_INTERVAL": "1",
                "SSE_HISTORY_SIZE": str(HISTORY),
                **environment,
            },
        )

    def workers(self) -> set[int]:
        """Give the ids of the processes that serve."""
        children = set()
        for child in psutil.Process(self.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.status() != psutil.STATUS_ZOMBIE:
                    children.add(child.pid)
        return children or {self.pid}

    def wait_for_workers(self, count: int) -> set[int]:
        """Wait until there are so many processes; give their ids."""
        wait_for(lambda: len(self.workers()) == count, f"{count} workers", LONG)
        return self.workers()

    def post(self, key: str, data: str, once: str = "") -> tuple[str, int]:
        """Publish, with ``once`` as the idempotency key; give the event's id and the process it was published in."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=LONG)
        try:
            headers = {"Connection": "close", **({"Idempotency-Key": once} if once else {})}
            connection.request("POST", f"/publish/{key}", data.encode(), headers)
            response = connection.getresponse()
            body = response.read().decode()
            assert response.status == 200, (response.status, body)
            return body, int(response.headers["X-Process"])
        finally:
            connection.close()


def number(identifier: str) -> int:
    """Give an id's place in the log."""
    return int(identifier.rpartition("-")[2])
