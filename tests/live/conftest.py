"""Every supported server as a subprocess, with its log kept and read.

One server of each kind lives as long as the session; tests do not disturb one another since each uses keys of its
own. What has to kill its server starts one with ``fresh``.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from clients import DEADLINE, Curl, Listener, Raw
from redis_server import RedisServer
from support import ROOT, Server, free_port, python, wait_for
from workers import LEFT_OPEN, Command, Crowd, Log, Workers, gunicorn

HERE = Path(__file__).parent
PING = 0.4

GREENLETS = ("pywsgi", "pywsgi-patched", "gunicorn-gevent")
THREADS = ("gunicorn-gthread", "werkzeug")
SERVERS = (*GREENLETS, *THREADS)


def command(kind: str, port: int) -> list[str]:
    """Give the command that serves the app on ``port``."""
    gunicorn = python("-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--graceful-timeout", "1", "--backlog", "2048")
    return {
        "pywsgi": python(str(HERE / "serve_pywsgi.py"), str(port)),
        "pywsgi-patched": python(str(HERE / "serve_pywsgi.py"), str(port), "--patch"),
        "gunicorn-gevent": [*gunicorn, "-k", "gevent", "--worker-connections", "3000", "live_app:create_app()"],
        "gunicorn-gthread": [*gunicorn, "-k", "gthread", "--threads", "32", "live_app:create_app()"],
        "werkzeug": python("-m", "flask", "--app", "live_app", "run", "--port", str(port), "--no-reload"),
    }[kind]


class LiveServer(Server):
    """A server of the suite's app, and the clients that talk to it."""

    def __init__(self, kind: str, log: Path, **environment: str) -> None:
        port = free_port()
        path = f"{ROOT}:{HERE}"
        super().__init__(command(kind, port), port, log, {"PYTHONPATH": path, "PYTHONWARNINGS": "error", **environment})
        self.kind = kind
        self.in_greenlets = kind in GREENLETS
        self.tracebacks = 0  # those that tests are known to have caused
        self.refused = 0  # and how many of them are the server's own, of requests that it refused
        self.client = self._new_client()

    def _new_client(self) -> httpx.Client:
        # A connection for each request: on one that is kept, pywsgi's two writes for an answer and the kernel's
        # delayed acknowledgement cost 40 ms each time.
        return httpx.Client(base_url=self.url, timeout=DEADLINE, trust_env=False, headers={"Connection": "close"})

    # Clients

    def stream_url(self, *keys: str, path: str = "/stream", **query: str) -> str:
        return str(httpx.URL(self.url + path, params={"connectKey": keys, **query}))

    def listen(self, *keys: str, path: str = "/stream", headers: Any = None, **query: str) -> Listener:
        """httpx-sse on ``keys``."""
        return Listener(self.stream_url(*keys, path=path, **query), headers=headers or {})

    def curl(self, *keys: str, options: tuple[str, ...] = (), **query: str) -> Curl:
        return Curl(self.stream_url(*keys, **query), *options)

    def raw(self) -> Raw:
        return Raw(self.port)

    def kill_and_restart(self) -> None:
        """SIGKILL, and another process on the same port."""
        self.stop(signal.SIGKILL)
        self.client.close()
        wait_for(lambda: not self._answers(), "workers that were killed let go of the port", DEADLINE)
        self.start()
        self.client = self._new_client()

    def _answers(self) -> bool:
        with contextlib.suppress(ConnectionRefusedError), self.raw():
            return True
        return False

    # What the app shows and does

    def get(self, path: str, **query: str) -> Any:
        response = self.client.get(path, params=query)
        response.raise_for_status()
        return response.json()

    def post(self, path: str, json: Any = None, **query: str) -> httpx.Response:
        response = self.client.post(path, params=query, json=json)
        response.raise_for_status()
        return response

    def publish(self, key: str | None, data: Any = None, **event: Any) -> str:
        """Publish in a view; give the id."""
        return str(self.post("/publish", {"key": key, "data": data, **event}).json()["id"])

    def count(self, key: str) -> int:
        return int(self.get("/count", key=key)["count"])

    def wait_for_count(self, key: str, count: int, seconds: float = DEADLINE) -> None:
        wait_for(lambda: self.count(key) == count, f"{count} streams of {key!r} (log: {self.log[-3000:]})", seconds)

    def requests(self, key: str) -> list[dict[str, Any]]:
        """Give the requests for streams of ``key``, or to the path ``key``, that were answered so far."""
        return [request for request in self.get("/requests") if key in request["keys"] or request["path"] == key]


@pytest.fixture(scope="session", autouse=True)
def _many_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192
    if 0 <= soft < wanted:  # the servers inherit it
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))


@contextlib.contextmanager
def _running(server: LiveServer) -> Iterator[LiveServer]:
    try:
        server.start()
        yield server
    finally:
        server.client.close()
        server.stop()


@pytest.fixture(scope="session", params=SERVERS)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server of each kind for the session."""
    kind = request.param
    with _running(LiveServer(kind, tmp_path_factory.mktemp(kind) / "log", SSE_PING_INTERVAL=str(PING))) as server:
        yield server


@pytest.fixture
def server(running: LiveServer) -> Iterator[LiveServer]:
    """The running server; a traceback in its log that the test has not announced is a failure."""
    yield running
    assert running.log.count("Traceback") == running.tracebacks, running.log[-5000:]


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Callable[..., LiveServer]]:
    """Start a server of one's own: ``fresh(kind, SSE_RETRY="100")``."""
    servers: list[LiveServer] = []
    with contextlib.ExitStack() as stack:

        def start(kind: str, **environment: str) -> LiveServer:
            server = LiveServer(kind, tmp_path / f"log-{len(servers)}", **environment)
            servers.append(server)
            return stack.enter_context(_running(server))

        yield start
        for server in servers:
            assert "Traceback" not in server.log, server.log[-5000:]


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    """A key that no other test uses."""
    return f"{request.node.name}-{time.monotonic_ns()}"


# Several processes on one log


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server that the tests of a module share, each with a namespace of its own."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["sqlite", "redis"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Log:
    """A log that no other test uses."""
    directory = tmp_path / "data"
    directory.mkdir()
    if request.param == "sqlite":
        return Log(f"sqlite:///{directory}/log.db", "sse", directory)
    redis: RedisServer = request.getfixturevalue("redis")
    return Log(redis.url, f"test-{os.urandom(8).hex()}", directory, redis)


@pytest.fixture
def serve(tmp_path: Path, log: Log) -> Iterator[Callable[..., Workers]]:
    """Start gunicorn with these options, or what another command makes of them; no server may log a traceback."""
    servers: list[Workers] = []
    with contextlib.ExitStack() as stack:

        def start(
            *options: str,
            command: Command = gunicorn,
            app: str = "workers_app:app",
            **environment: str,
        ) -> Workers:
            options = (*options, app) if command is gunicorn else options
            server = Workers(command, options, tmp_path / f"log-{len(servers)}", log, **environment)
            servers.append(server)
            stack.callback(server.stop)
            server.start()
            return server

        yield start
    for server in servers:
        said = re.sub(LEFT_OPEN, "", server.log)
        for sign in ("Traceback", "Exception ignored", "Warning", "live events wait"):
            assert sign not in said, said[-5000:]


@pytest.fixture
def crowd() -> Iterator[Crowd]:
    """Clients, none of which may ever be answered something other than a stream."""
    with Crowd() as crowd:
        yield crowd
