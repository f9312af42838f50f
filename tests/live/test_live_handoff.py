"""Real servers give their sockets up to the reactor, whatever is around the app; or nothing changes for the client."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from clients import Raw
from conftest import HERE
from support import ROOT, Server, free_port, python, wait_for
from workers import LEFT_OPEN

pytestmark = pytest.mark.live

IN_THREADS = ("gunicorn-gthread", "gunicorn-sync")
GIVE_UP = ("pywsgi", "pywsgi-patched", "gunicorn-gevent", "gunicorn-gevent_pywsgi", *IN_THREADS)


@contextlib.contextmanager
def serving(kind: str, log: Path, **environment: str) -> Iterator[Server]:
    port = free_port()
    if kind.startswith("pywsgi"):
        command = python(str(HERE / "handoff_app.py"), str(port), *(["--patch"] if kind.endswith("patched") else []))
    else:
        worker = kind.partition("-")[2]
        options = ["--threads", "2"] if worker == "gthread" else []
        command = python(
            "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "-k", worker, *options, "--access-logfile", "-",
            "--graceful-timeout", "5", "handoff_app:app",
        )  # fmt: skip
    path = f"{ROOT}:{HERE}"
    server = Server(command, port, log, {"PYTHONPATH": path, "PYTHONWARNINGS": "error", **environment})
    try:
        yield server.start()
    finally:
        server.stop()
    assert "Traceback" not in re.sub(LEFT_OPEN, "", server.log), server.log


def state(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/state", trust_env=False, headers={"Connection": "close"}).json()
    return found


def publish(server: Server) -> None:
    httpx.post(f"{server.url}/publish", trust_env=False, headers={"Connection": "close"}).raise_for_status()


@pytest.mark.parametrize("kind", GIVE_UP)
def test_a_server_gives_its_sockets_up_and_keeps_nothing_of_the_requests(kind: str, tmp_path: Path) -> None:
    with serving(kind, tmp_path / "log") as server, contextlib.ExitStack() as stack:
        first = stack.enter_context(Raw(server.port))
        first.request("/stream").read_until(b": open\n\n")
        before = wait_for(lambda: (found := state(server))["handed_off"] == 1 and found, "it is handed off")
        clients = [stack.enter_context(Raw(server.port)) for _ in range(30)]
        for client in clients:
            client.request("/stream").read_until(b": open\n\n")
        found = wait_for(lambda: (now := state(server))["handed_off"] == 31 and now, "all are handed off")
        assert isinstance(found, dict)
        assert isinstance(before, dict)
        assert found["greenlets"] <= before["greenlets"] + 2
        assert found["threads"] <= before["threads"] + 2
        assert found["environs"] <= before["environs"] + 1
        publish(server)
        for client in (first, *clients):
            client.read_until(b"data: x\n\n")
            client.read_until(b": ping\n\n")
        clients[0].leave()
        clients[1].reset()
        wait_for(lambda: state(server)["streams"] == 29, "who leaves is gone at once")
        wait_for(lambda: server.log.count("GET /stream") == 31, "each request has its line in the access log")


@pytest.mark.parametrize(("wrap", "handed_off"), [("proxy", 1), ("watching", 1), ("replacing", 0)])
@pytest.mark.parametrize("kind", ["pywsgi", "gunicorn-gevent", "gunicorn-gthread"])
def test_what_is_wrapped_around_the_app_breaks_no_stream(kind: str, wrap: str, handed_off: int, tmp_path: Path) -> None:
    with serving(kind, tmp_path / "log", WRAP=wrap) as server, Raw(server.port) as client:
        client.request("/stream").read_until(b": open\n\n")
        publish(server)
        client.read_until(b"data: x\n\n")
        client.read_until(b": ping\n\n")
        wait_for(lambda: state(server)["handed_off"] == handed_off, "it is where it should be")


def test_the_setting_turns_it_off(tmp_path: Path) -> None:
    with serving("pywsgi", tmp_path / "log", FAST_PATH="no") as server, Raw(server.port) as client:
        client.request("/stream").read_until(b": open\n\n")
        publish(server)
        client.read_until(b"data: x\n\n")
        assert state(server)["handed_off"] == 0


@pytest.mark.parametrize("kind", IN_THREADS)
def test_a_burst_reaches_all_clients_of_a_worker_with_threads_in_order(kind: str, tmp_path: Path) -> None:
    with serving(kind, tmp_path / "log") as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Raw(server.port)) for _ in range(50)]
        for client in clients:
            client.request("/stream").read_until(b": open\n\n")
        httpx.post(f"{server.url}/burst", trust_env=False, headers={"Connection": "close"}).raise_for_status()
        for client in clients:
            received = client.read_until(b"data: 499\n\n")
            places = [received.index(b"data: %d\n" % number) for number in range(500)]
            assert places == sorted(places)


@pytest.mark.parametrize("kind", ["gunicorn-gevent", "gunicorn-gevent_pywsgi", *IN_THREADS])
def test_a_worker_that_is_told_to_stop_does_not_wait_for_what_it_gave_up(kind: str, tmp_path: Path) -> None:
    with serving(kind, tmp_path / "log") as server, Raw(server.port) as client:
        client.request("/stream").read_until(b": open\n\n")
        wait_for(lambda: state(server)["handed_off"] == 1, "it is handed off")
        assert server.process is not None
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(4.5)
