"""A process that is told to stop takes leave of its clients first, whatever serves them, and does not stay for long."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from clients import Raw
from support import ROOT, Server, free_port, python, wait_for
from workers import LEFT_OPEN, LONG

pytestmark = pytest.mark.live

HERE = Path(__file__).parent
RETRY, DRAIN = 2000, 15.0

Start = Callable[..., Server]


def command(kind: str, port: int, *options: str) -> list[str]:
    if kind.startswith("pywsgi"):
        return python(str(HERE / "leaving_app.py"), str(port), *options)
    if kind == "flask run":
        return python("-m", "flask", "--app", "leaving_app", "run", "--port", str(port), "--no-reload", *options)
    worker = kind.removeprefix("gunicorn ")
    threads = ["--threads", "40"] if worker == "gthread" else []
    bind = ["--bind", f"127.0.0.1:{port}", "--backlog", "2048", "--graceful-timeout", "60"]
    return python("-m", "gunicorn", *bind, "-k", worker, *threads, *options, "leaving_app:app")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a server; at its end nothing is in its log that should not be."""
    servers: list[Server] = []
    with contextlib.ExitStack() as stack:

        def start(kind: str, *options: str, **environment: str) -> Server:
            port = free_port()
            settings = {"SSE_RETRY": str(RETRY), "SSE_DRAIN_SECONDS": str(DRAIN), "PYTHONWARNINGS": "error"}
            server = Server(
                command(kind, port, *options),
                port,
                tmp_path / f"log-{len(servers)}",
                {"PYTHONPATH": f"{ROOT}:{HERE}", **settings, **environment},
            )
            servers.append(server)
            stack.callback(server.stop)
            return server.start()

        yield start
    for server in servers:
        said = re.sub(LEFT_OPEN, "", server.log)
        # Ctrl-C is an exception that gevent's own server does not catch.
        said = re.sub(r"(Traceback .*\n(  .*\n)+)?KeyboardInterrupt(\n.*Z)?\n", "", said)
        # gunicorn 21 does not close what it listens on when it is interrupted.
        said = re.sub(
            r"Exception ignored in: <socket.socket .*\nResourceWarning: unclosed <socket.socket .*\n", "", said
        )
        assert "Traceback" not in said, server.log[-5000:]
        assert "Exception ignored" not in said, server.log[-5000:]


def listen(server: Server, stack: contextlib.ExitStack, count: int, *, fed: bool = False) -> list[Raw]:
    """Open streams: of a key, which servers give up, or by POST and fed by a generator, which stay with them."""
    clients = [stack.enter_context(Raw(server.port)) for _ in range(count)]
    for client in clients:
        client.socket.settimeout(LONG)
        if fed:
            client.request("/source", b"Content-Length: 2", method="POST").socket.sendall(b"{}")
        else:
            client.request("/stream")
    for client in clients:
        client.read_until(b"data: one\n\n" if fed else b": open\n\n")
    return clients


def blocks(response: bytes) -> list[bytes]:
    """Give the blocks of a response that was ended as it should: its last chunk came, and its last block is whole."""
    body = response.partition(b"\r\n\r\n")[2]
    data = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        if int(size, 16) == 0:
            break
        data, end, body = data + body[: int(size, 16)], body[int(size, 16) :][:2], body[int(size, 16) + 2 :]
        assert end == b"\r\n"
    assert body == b"\r\n"
    assert data.endswith(b"\n\n")
    return data.split(b"\n\n")[:-1]


def wait(server: Server, status: int) -> None:
    assert server.process is not None
    assert server.process.wait(LONG) == status
    server.process = None


def wait_until_idle(pid: int) -> None:
    """Wait until a process has slept for a while."""

    def look() -> tuple[str, ...]:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], *fields[11:13]  # its state, and its time in user and in system mode

    seen: list[tuple[str, ...]] = []

    def is_idle() -> bool:
        seen.append(look())
        return len(seen) > 10 and set(seen[-10:]) == {("S", *seen[-1][1:])}

    wait_for(is_idle, f"process {pid} does nothing", LONG)


TERM, INT = signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize(
    ("kind", "how", "status"),
    [
        ("pywsgi", TERM, -TERM),
        ("pywsgi", INT, -INT),
        ("pywsgi patched", TERM, -TERM),
        ("flask run", TERM, -TERM),
        ("flask run", INT, 0),
        ("gunicorn gevent", TERM, 0),
        ("gunicorn gevent", INT, 0),
        ("gunicorn gevent_pywsgi", TERM, 0),
        ("gunicorn gthread", TERM, 0),
        ("gunicorn gthread", INT, 0),
        ("gunicorn sync", TERM, 0),
    ],
)
def test_every_client_is_told_its_own_time_to_come_back_and_the_process_ends_as_it_would_have(
    start: Start, kind: str, how: signal.Signals, status: int
) -> None:
    server = start(kind, *(["--patch"] if kind == "pywsgi patched" else []))
    # Where Ctrl-C raises in whatever greenlet runs, that may be one that feeds a stream, which ends of it.
    of_keys, fed = (100, 0) if kind == "gunicorn sync" or (kind, how) == ("pywsgi", INT) else (80, 20)
    with contextlib.ExitStack() as stack:
        clients = listen(server, stack, of_keys) + listen(server, stack, fed, fed=True)
        httpx.post(f"{server.url}/publish", timeout=LONG, trust_env=False).raise_for_status()
        if how == INT:
            # What Ctrl-C raises in a destructor is lost, and gunicorn's thread worker locks itself out if it comes
            # while a request is handed over. Neither happens to a process that does nothing.
            wait_until_idle(httpx.get(f"{server.url}/state", timeout=LONG, trust_env=False).json()["pid"])
        os.kill(server.pid, how)
        waits = set()
        for number, client in enumerate(clients):
            *before, last = blocks(client.read_all())
            assert before[0] == f"retry: {RETRY}".encode()
            assert last.startswith(b"retry: ")
            waits.add(int(last.removeprefix(b"retry: ")))
            if number < of_keys:
                assert before[-1].endswith(b"data: 0 ")
        assert len(waits) == 100
        assert min(waits) >= RETRY
        assert max(waits) < RETRY + 1000 * DRAIN
        wait(server, status)
    assert server.log.count("finally") == fed


@pytest.mark.parametrize("handler", ["before", "after", "gevent"])
def test_a_programs_own_handler_ends_it_as_it_says_and_its_clients_are_told_on_the_way_out(
    start: Start, handler: str
) -> None:
    server = start("pywsgi", HANDLER=handler)
    with contextlib.ExitStack() as stack:
        clients = listen(server, stack, 5) + listen(server, stack, 5, fed=True)
        os.kill(server.pid, signal.SIGTERM)
        assert len({blocks(client.read_all())[-1] for client in clients}) == 10
        wait(server, 7)
    assert server.log.count("the handler ran") == 1
    assert server.log.count("finally") == 5


def frozen(server: Server, stack: contextlib.ExitStack, *, fed: bool = False) -> Raw:
    """A client that has its stream, and reads nothing of what is published then."""
    client = stack.enter_context(Raw(server.port))
    client.socket.close()
    client.socket = socket.socket()
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.socket.settimeout(LONG)
    client.socket.connect(("127.0.0.1", server.port))
    if fed:
        client.request("/stream", b"Content-Length: 2").socket.sendall(b"{}")
    else:
        client.request("/stream")
    client.read_until(b": open\n\n")
    return client


@pytest.mark.parametrize("kind", ["pywsgi", "flask run", "gunicorn gevent", "gunicorn gthread"])
def test_those_who_do_not_read_are_given_up_after_the_time_and_the_others_do_not_wait_for_it(
    start: Start, kind: str
) -> None:
    server = start(kind, SSE_DRAIN_SECONDS="1")
    with contextlib.ExitStack() as stack:
        frozen(server, stack), frozen(server, stack, fed=True)
        reader = listen(server, stack, 1)[0]
        httpx.post(f"{server.url}/publish?times=40&size=20000", timeout=LONG, trust_env=False).raise_for_status()
        reader.read_until(b"data: 39 ")
        pid = httpx.get(f"{server.url}/state", timeout=LONG, trust_env=False).json()["pid"]
        begun = time.monotonic()
        os.kill(server.pid, signal.SIGTERM)
        assert blocks(reader.read_all())[-1].startswith(b"retry: ")
        assert Path(f"/proc/{pid}").exists()  # it waits for the other two, which take their time
        wait(server, 0 if kind.startswith("gunicorn") else -signal.SIGTERM)
        assert time.monotonic() - begun > 0.9


def test_meanwhile_others_are_sent_elsewhere_and_a_second_signal_ends_it_at_once(start: Start) -> None:
    server = start("pywsgi", SSE_DRAIN_SECONDS="300")
    with contextlib.ExitStack() as stack, httpx.Client(base_url=server.url, timeout=LONG, trust_env=False) as http:
        frozen(server, stack)
        http.post("/publish?times=40&size=20000").raise_for_status()
        os.kill(server.pid, signal.SIGTERM)
        wait_for(lambda: http.get("/state").json()["draining"], "it drains", LONG)
        answer = http.get("/stream")
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, "text/event-stream")
        assert RETRY <= int(answer.text.split()[1]) <= 3 * RETRY
        assert server.process is not None
        assert server.process.poll() is None
        os.kill(server.pid, signal.SIGTERM)
        wait(server, -signal.SIGTERM)


def test_with_no_drain_a_signal_ends_the_process_and_its_streams(start: Start) -> None:
    server = start("pywsgi", SSE_DRAIN_SECONDS="0")
    with contextlib.ExitStack() as stack:
        client = listen(server, stack, 1)[0]
        os.kill(server.pid, signal.SIGTERM)
        wait(server, -signal.SIGTERM)
        assert client.read_all().count(b"retry: ") == 1


@pytest.mark.parametrize("kind", ["gunicorn gevent", "gunicorn gthread"])
def test_a_worker_that_is_recycled_sends_its_clients_to_the_next(start: Start, kind: str) -> None:
    server = start(kind, "--max-requests", "6")
    with contextlib.ExitStack() as stack, httpx.Client(base_url=server.url, timeout=LONG, trust_env=False) as http:
        clients = listen(server, stack, 2) + listen(server, stack, 2, fed=True)
        first = http.get("/state", headers={"Connection": "close"}).json()["pid"]
        http.get("/state", headers={"Connection": "close"})  # the sixth
        assert len({blocks(client.read_all())[-1] for client in clients}) == 4
        wait_for(lambda: not Path(f"/proc/{first}").exists(), "it is gone", LONG)
        listen(server, stack, 1)
        assert http.get("/state", headers={"Connection": "close"}).json()["pid"] != first
