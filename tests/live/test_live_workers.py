"""Several processes on one log in SQLite: whoever publishes, every client of every process gets it, whatever dies."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import httpx
import psutil
import pytest
from clients import DEADLINE
from conftest import HERE
from support import ROOT, Server, free_port, python, wait_for

pytestmark = pytest.mark.live

LONG = 20.0  # for what every process has a part in, on a machine that is busy with something else

PUBLISHER = """
import sys
from flask_sse_stream import PoolManager, Settings
manager = PoolManager(Settings(broker_url=sys.argv[1]))
for line in sys.stdin:
    key, _, data = line.rstrip("\\n").partition(" ")
    print(manager.publish(key, data), flush=True)
"""


class Received(NamedTuple):
    id: str
    event: str
    data: str


class Follower:
    """A client that comes back as a browser does: at once, with the last id it saw.

    An answer other than 200 is an error: an EventSource gives up for good at one.
    """

    def __init__(self, port: int, key: str, last_id: str = "") -> None:
        self.events: list[Received] = []
        self.errors: list[str] = []
        self.last_id = last_id
        self.process = 0  # whose stream it is reading; 0 while it reads none
        self.connections = 0
        self._port, self._key = port, key
        self._stopped = threading.Event()
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Follower:  # noqa: PYI034  Self is of Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                with socket.create_connection(("127.0.0.1", self._port)) as self._socket:
                    self._follow(self._socket)
            except ConnectionRefusedError:
                self._stopped.wait(0.02)
            except OSError:  # a process that was killed with something unread
                pass
            except Exception as error:
                self.errors.append(repr(error))
                return
            finally:
                self.process = 0

    def _follow(self, connection: socket.socket) -> None:
        cursor = f"Last-Event-ID: {self.last_id}\r\n" if self.last_id else ""
        connection.sendall(f"GET /stream?connectKey={self._key} HTTP/1.1\r\nHost: localhost\r\n{cursor}\r\n".encode())
        received = b""
        while b"\r\n\r\n" not in received:
            data = connection.recv(65536)
            if not data:
                return  # killed before it answered
            received += data
        head, _, received = received.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if status.split()[1] != "200" or headers["transfer-encoding"] != "chunked":
            raise AssertionError(f"{head!r}{received!r}")
        process = int(headers["x-process"])
        body = b""
        while True:
            place = 0
            while (end := received.find(b"\r\n", place)) >= 0:
                size = int(received[place:end], 16)
                if size == 0:
                    return
                if len(received) < end + size + 4:
                    break
                body += received[end + 2 : end + 2 + size]
                place = end + size + 4
            received = received[place:]
            *blocks, body = body.split(b"\n\n")  # what is incomplete at the end is no event
            for block in blocks:
                self._take(block.decode())
            if blocks and not self.process:
                self.process = process
                self.connections += 1
            data = connection.recv(65536)
            if not data:
                return
            received += data

    def _take(self, block: str) -> None:
        event, data = "message", None
        for line in block.split("\n"):
            name, _, value = line.partition(": ")
            if name == "id":
                self.last_id = value
            elif name == "event":
                event = value
            elif name == "data":
                data = value
        if data is not None:
            self.events.append(Received(self.last_id, event, data))

    @property
    def data(self) -> list[str]:
        return [event.data for event in self.events]

    @property
    def ids(self) -> list[str]:
        return [event.id for event in self.events]

    def wait_until_it_reads(self) -> Follower:
        wait_for(lambda: self.process or self.errors, "a stream begins", LONG)
        assert not self.errors
        return self

    def wait_for_data(self, last: str) -> None:
        wait_for(lambda: self.errors or last in self.data[-1:], f"{last!r} comes", LONG)
        assert not self.errors


class Publisher:
    """A process without a server that publishes."""

    def __init__(self, url: str) -> None:
        self._process = subprocess.Popen(
            python("-W", "error", "-c", PUBLISHER, url),
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

    def __enter__(self) -> Publisher:  # noqa: PYI034  Self is of Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.communicate()
        if kind is None:
            assert self._process.returncode == 0


class Workers(Server):
    """gunicorn with several workers, or one process of pywsgi: ``options`` are gunicorn's, none mean pywsgi."""

    def __init__(self, options: list[str], log: Path, broker_url: str, **environment: str) -> None:
        port = free_port()
        gunicorn = python(
            "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--graceful-timeout", "1", "--backlog", "2048"
        )
        super().__init__(
            [*gunicorn, *options, "workers_app:app"] if options else python(str(HERE / "workers_app.py"), str(port)),
            port,
            log,
            {
                "PYTHONPATH": f"{ROOT}:{HERE}",
                "PYTHONWARNINGS": "error",
                "SSE_BROKER_URL": broker_url,
                "SSE_PING_INTERVAL": "1",
                "SSE_HISTORY_SIZE": "5000",
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

    def post(self, key: str, data: str) -> tuple[str, int]:
        """Publish; give the event's id and the process that it was published in."""
        response = httpx.post(
            f"{self.url}/publish/{key}", content=data, timeout=LONG, trust_env=False, headers={"Connection": "close"}
        )
        response.raise_for_status()
        return response.text, int(response.headers["X-Process"])


@pytest.fixture
def database(tmp_path: Path) -> Path:
    directory = tmp_path / "data"
    directory.mkdir()
    return directory / "log.db"


@pytest.fixture
def url(database: Path) -> str:
    return f"sqlite:///{database}"


@pytest.fixture
def serve(tmp_path: Path, url: str) -> Iterator[Callable[..., Workers]]:
    """Start gunicorn with these options, or pywsgi without any; no server may log a traceback."""
    servers: list[Workers] = []
    with contextlib.ExitStack() as stack:

        def start(*options: str, broker_url: str = url, **environment: str) -> Workers:
            server = Workers([*options], tmp_path / f"log-{len(servers)}", broker_url, **environment)
            servers.append(server)
            stack.callback(server.stop)
            server.start()
            return server

        yield start
    for server in servers:
        # gunicorn leaves the files of its heartbeats open when it ends.
        log = re.sub(
            r"Exception ignored in: <_io.FileIO .*\nResourceWarning: unclosed file <_io.FileIO .*\n", "", server.log
        )
        for sign in ("Traceback", "Exception ignored", "Warning", "live events wait"):
            assert sign not in log, log[-5000:]


def sockets(database: Path) -> set[int]:
    """Give the ids of the processes that want to be woken."""
    directory = Path(f"{database}.wake")
    return {int(name.partition("-")[0]) for name in os.listdir(directory)} if directory.exists() else set()


def number(identifier: str) -> int:
    """Give an id's place in the log."""
    return int(identifier.rpartition("-")[2])


def follow_on_each(stack: contextlib.ExitStack, servers: list[Workers], count: int, key: str) -> list[Follower]:
    """Open streams, at least ``count``, until every process of the servers has some."""
    followers: list[Follower] = []

    def follow(server: Workers) -> None:
        followers.append(stack.enter_context(Follower(server.port, key)).wait_until_it_reads())

    for index in range(count):
        follow(servers[index % len(servers)])
    # Who accepts is the kernel's choice, and it may favour one for long: those that have some wait for the others.
    for server in servers:
        while server.workers() - {follower.process for follower in followers}:
            having = server.workers() & {follower.process for follower in followers}
            for process in having:
                os.kill(process, signal.SIGSTOP)
            try:
                follow(server)
            finally:
                for process in having:
                    os.kill(process, signal.SIGCONT)
    return followers


TWO_WORKERS = {
    "gevent": ("-k", "gevent", "-w", "2"),
    "gthread": ("-k", "gthread", "-w", "2", "--threads", "40"),
    "two unpatched pywsgi": (),
}


@pytest.mark.parametrize("kind", TWO_WORKERS)
def test_an_event_streams_on_every_worker_once_and_in_order_whichever_published_it(
    serve: Callable[..., Workers], kind: str
) -> None:
    servers = [serve(*TWO_WORKERS[kind]) for _ in range(1 if TWO_WORKERS[kind] else 2)]
    wait_for(lambda: sum(len(server.workers()) for server in servers) == 2, "two processes", LONG)
    with contextlib.ExitStack() as stack:
        followers = follow_on_each(stack, servers, 20, "news")
        published: list[str] = []
        processes: set[int] = set()
        while len(published) < 50 or len(processes) < 2:
            assert len(published) < 1000, "one process gets all the requests"
            identifier, process = servers[len(published) % len(servers)].post("news", f"news {len(published)}")
            published.append(identifier)
            processes.add(process)
        for follower in followers:
            follower.wait_for_data(f"news {len(published) - 1}")
            assert follower.ids == published
            assert follower.data == [f"news {index}" for index in range(len(published))]
            assert follower.connections == 1
        assert published == sorted(published, key=number)


def test_workers_that_are_killed_again_and_again_lose_and_double_nothing(
    serve: Callable[..., Workers], url: str, database: Path
) -> None:
    server = serve("-k", "gevent", "-w", "4")
    wait_for(lambda: len(server.workers()) == 4, "four workers", LONG)
    acknowledged: list[str] = []
    attempts: set[str] = set()
    finished = threading.Event()
    failures: list[str] = []

    def post(name: str) -> None:
        index = 0
        while not finished.is_set():
            index += 1
            attempts.add(f"{name} {index}")
            try:
                acknowledged.append(server.post("news", f"{name} {index}")[0])
            except httpx.TransportError:
                pass  # Killed meanwhile: it was published or was not, and everybody must agree on which.
            except Exception as error:
                failures.append(repr(error))
                return

    def publish(publisher: Publisher) -> None:
        index = 0
        while not finished.wait(0.002):
            index += 1
            attempts.add(f"process {index}")
            acknowledged.append(publisher.publish("news", f"process {index}"))

    with contextlib.ExitStack() as stack:
        followers = [stack.enter_context(Follower(server.port, "news")) for _ in range(60)]
        for follower in followers:
            follower.wait_until_it_reads()
        publisher = stack.enter_context(Publisher(url))
        threads = [threading.Thread(target=post, args=(f"post {name}",), daemon=True) for name in "ab"]
        threads.append(threading.Thread(target=publish, args=(publisher,), daemon=True))
        for thread in threads:
            thread.start()
        kills = 0
        dice = random.Random(1)
        while kills < 20 or len(acknowledged) < 2500:
            victims = dice.sample(sorted({follower.process for follower in followers} - {0}), 1)
            if kills % 3:  # and perhaps one that has no stream yet
                victims = list({*victims, dice.choice(sorted(server.workers()))})
            before = len(acknowledged)
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
            kills += len(victims)
            wait_for(lambda: len(acknowledged) > before + 20 or failures, "publishing goes on", LONG)  # noqa: B023
            wait_for(lambda: len(server.workers()) == 4, "there are four workers again", LONG)
            wait_for(
                lambda: all(f.errors or f.process not in {0, *victims} for f in followers),  # noqa: B023
                "all read again",
                LONG,
            )
            assert not [error for follower in followers for error in follower.errors]
        finished.set()
        for thread in threads:
            thread.join(LONG)
            assert not thread.is_alive()
        assert failures == []
        last, _ = server.post("news", "last")
        for follower in followers:
            follower.wait_for_data("last")
        first = followers[0].events
        assert {event.event for follower in followers for event in follower.events} == {"message"}
        for follower in followers:
            assert follower.events == first
        places = [number(event.id) for event in first]
        assert places == sorted(set(places))
        assert set(acknowledged) | {last} <= {event.id for event in first}
        data = [event.data for event in first]
        assert len(set(data)) == len(data)
        assert set(data) <= attempts | {"last"}
        assert sum(follower.connections for follower in followers) > len(followers)
        wait_for(lambda: sockets(database) <= server.workers(), "the sockets of the dead are gone", DEADLINE)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["ended", "killed"])
def test_a_client_of_a_server_that_was_away_gets_what_another_process_published_meanwhile(
    serve: Callable[..., Workers], url: str, how: signal.Signals
) -> None:
    server = serve("-k", "gevent", "-w", "2")
    with Publisher(url) as publisher, Follower(server.port, "news") as follower:
        follower.wait_until_it_reads()
        published = [publisher.publish("news", "before")]
        follower.wait_for_data("before")
        server.stop(how)
        wait_for(lambda: not follower.process, "the stream ends", LONG)
        for index in range(200):
            published.append(publisher.publish("news", f"meanwhile {index}"))
            publisher.publish("other", "of no concern")
        server.start()
        follower.wait_until_it_reads()
        published.append(publisher.publish("news", "after"))
        follower.wait_for_data("after")
        assert follower.ids == published
        assert {event.event for event in follower.events} == {"message"}


@pytest.mark.parametrize("also", ["the wake directory", "nothing else"])
def test_a_database_that_is_deleted_makes_every_client_begin_anew_and_go_on(
    serve: Callable[..., Workers], url: str, database: Path, also: str
) -> None:
    server = serve("-k", "gevent", "-w", "2")
    wait_for(lambda: len(server.workers()) == 2, "two workers", LONG)
    with contextlib.ExitStack() as stack:
        followers = follow_on_each(stack, [server], 8, "news")
        publisher = stack.enter_context(Publisher(url))
        publisher.publish("news", "before")
        for follower in followers:
            follower.wait_for_data("before")
        for path in database.parent.glob("log.db*"):
            if not path.is_dir():
                path.unlink()
            elif also == "the wake directory":
                shutil.rmtree(path)
        published = [server.post("news", "new 0")[0]]
        for index in range(1, 40):
            data = f"new {index}"
            published.append(publisher.publish("news", data) if index % 2 else server.post("news", data)[0])
        for follower in followers:
            follower.wait_for_data("new 39")
            before, reset, *after = follower.events
            assert before.data == "before"
            assert reset.event == "stream-reset"
            assert json.loads(reset.data) == {"reason": "epoch", "keys": ["news"]}
            assert [event.id for event in after] == published
            assert follower.connections == 1
        # What it was told is a place in the new log.
        with Follower(server.port, "news", published[0]) as late:
            late.wait_for_data("new 39")
            assert late.ids == published[1:]


def _open_files(process: int) -> set[str]:
    found = set()
    for path in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.add(str(path.readlink()))
    return found


def test_workers_share_no_connection_with_a_parent_that_published_before_it_forked(
    serve: Callable[..., Workers], database: Path
) -> None:
    server = serve("-k", "gevent", "-w", "2", "--preload", PUBLISH_AT_IMPORT="news", SSE_JOIN_HISTORY="10")
    wait_for(lambda: len(server.workers()) == 2 and server.pid not in server.workers(), "two workers", LONG)
    wait_for(lambda: server.log.count("Booting worker") == 2, "both have begun", LONG)
    for worker in server.workers():
        wait_for(lambda worker=worker: not [f for f in _open_files(worker) if str(database) in f], "no file", DEADLINE)  # type: ignore[misc]
    with contextlib.ExitStack() as stack:
        followers = follow_on_each(stack, [server], 8, "news")
        published = [server.post("news", f"news {index}")[0] for index in range(20)]
        for follower in followers:
            follower.wait_for_data("news 19")
            assert follower.data == [f"imported by {server.pid}", *(f"news {index}" for index in range(20))]
            assert follower.ids[1:] == published
            assert number(follower.ids[0]) == 1


def test_without_a_common_log_each_forked_worker_has_an_epoch_of_its_own(serve: Callable[..., Workers]) -> None:
    server = serve("-k", "gevent", "-w", "2", "--preload", broker_url="memory://", PUBLISH_AT_IMPORT="news")
    wait_for(lambda: len(server.workers()) == 2, "two workers", LONG)
    epochs: dict[int, set[str]] = {}
    requests = 0
    while len(epochs) < 2:
        assert requests < 5000, "one process gets all the requests"
        requests += 1
        identifier, process = server.post("news", "here")
        epochs.setdefault(process, set()).add(identifier.partition("-")[0])
    one, other = epochs.values()
    assert len(one) == len(other) == 1
    assert one != other


def test_nothing_stays_of_workers_that_ended_or_were_killed_but_the_database_and_its_wake_directory(
    serve: Callable[..., Workers], url: str, database: Path
) -> None:
    server = serve("-k", "gevent", "-w", "2")
    wait_for(lambda: len(server.workers()) == 2, "two workers", LONG)
    with contextlib.ExitStack() as stack, Publisher(url) as publisher:
        follow_on_each(stack, [server], 8, "news")
        workers = server.workers()
        assert sockets(database) == workers
        victim = min(workers)
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: victim not in server.workers(), "it is gone", LONG)
        assert victim in sockets(database)
        publisher.publish("news", "to the living")
        assert victim not in sockets(database)
        server.stop()
        publisher.publish("news", "to nobody")
        assert sockets(database) == set()
    left = {path.name for path in database.parent.iterdir()}
    assert {"log.db", "log.db.wake"} <= left <= {"log.db", "log.db-wal", "log.db-shm", "log.db.wake"}
