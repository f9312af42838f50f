"""Clients that are slow, stopped, half gone or out of reach, beside healthy ones that must not notice."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from clients import Curl, Raw
from conftest import HERE
from support import ROOT, Server, drop_what_comes, free_port, python, wait_for
from workers import LEFT_OPEN, Crowd, Follower

pytestmark = pytest.mark.live

# The kind of the server, and whether it gives its sockets up.
KINDS = [
    ("pywsgi", True),
    ("pywsgi", False),
    ("gunicorn-gevent", True),
    ("gunicorn-gevent", False),
    ("gunicorn-gthread", True),
    ("gunicorn-gthread", False),
]
HEALTHY = 20
SEND_TIMEOUT = 1.5
PING = 0.3


class Slow(Follower):
    """One that takes a little at a time, with pauses."""

    def open(self) -> socket.socket:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)  # before it connects, so that the window is small
        client.settimeout(30)
        client.connect(("127.0.0.1", self.port))
        return client

    def receive(self) -> bytes:
        assert self.socket is not None
        time.sleep(0.004)
        return self.socket.recv(4096)


class SlowServer(Server):
    def __init__(self, kind: str, fast: bool, log: Path, host: str = "127.0.0.1", **settings: Any) -> None:
        port = free_port()
        if kind == "pywsgi":
            command = python(str(HERE / "slow_app.py"), str(port), host)
        else:
            options = ["--worker-connections", "3000"] if kind.endswith("gevent") else ["--threads", "40"]
            command = python(
                "-m", "gunicorn", "--bind", f"{host}:{port}", "-k", kind.removeprefix("gunicorn-"), *options,
                "--graceful-timeout", "1", "--backlog", "4096", "slow_app:app",
            )  # fmt: skip
        environment = {
            f"SSE_{name.upper()}": json.dumps(value) for name, value in {"fast_path": fast, **settings}.items()
        }
        super().__init__(command, port, log, {"PYTHONPATH": f"{ROOT}:{HERE}", "PYTHONWARNINGS": "error", **environment})

    def raw(self) -> Raw:
        return Raw(self.port)

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self._ask("GET", "/state").json()
        return found

    def count(self, key: str | None = None) -> int:
        return int(self._ask("GET", "/count", params={"key": key} if key else {}).json()["streams"])

    def publish(self, *keys: str, times: int = 1, first: int = 0, size: int = 0) -> None:
        self._ask("POST", "/publish", json={"keys": keys, "times": times, "first": first, "size": size})

    def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        response = httpx.request(
            method, self.url + path, trust_env=False, timeout=30, headers={"Connection": "close"}, **options
        )
        return response.raise_for_status()


@contextlib.contextmanager
def serving(kind: str, fast: bool, log: Path, **settings: Any) -> Iterator[SlowServer]:
    server = SlowServer(kind, fast, log, **settings)
    try:
        server.start()
        yield server
    finally:
        server.stop()
    assert "Traceback" not in re.sub(LEFT_OPEN, "", server.log), server.log[-5000:]


@pytest.mark.parametrize(("kind", "fast"), KINDS)
def test_with_disconnect_a_slow_client_loses_nothing_and_sees_nothing_twice(
    kind: str, fast: bool, tmp_path: Path
) -> None:
    with (
        serving(
            kind, fast, tmp_path / "log", queue_events=20, send_buffer=4096, history_size=10_000, retry=10
        ) as server,
        Crowd() as slow_ones,
        Crowd() as crowd,
    ):
        slow, healthy = slow_ones.follow(server.port, "k", kind=Slow), crowd.follow(server.port, "healthy")
        for follower in (slow, healthy):
            follower.wait_until_it_reads()
        for batch in range(4):
            before = slow.connections
            server.publish("k", times=80, first=80 * batch, size=4000)
            server.publish("healthy", first=batch)
            wait_for(lambda batch=batch: server.state()["closed"].get("slow", 0) > batch, "it is cut off", 30)  # type: ignore[misc]
            wait_for(lambda before=before: slow.connections > before, "it is back", 30)  # type: ignore[misc]
        wait_for(lambda: len(slow.events) >= 320, "it has everything", 60)
        assert [event.data.split()[1] for event in slow.events] == [str(number) for number in range(320)]
        assert slow.connections == 5
        wait_for(lambda: len(healthy.events) == 4, "the other has its events")
        assert healthy.connections == 1
        assert server.state()["dropped"] == 0


class Stopped(Curl):
    """A client whose process is stopped: its kernel goes on to answer."""

    def __enter__(self) -> Curl:
        super().__enter__()
        self.wait_for(b": open\n\n")
        self.process.send_signal(signal.SIGSTOP)
        return self


class Trickle(Follower):
    """A reader of 100 bytes a second."""

    open = Slow.open

    def receive(self) -> bytes:
        assert self.socket is not None
        time.sleep(0.1)
        return self.socket.recv(10)


def narrow(server: Server, keys: str) -> Raw:
    """A client with a small window that has seen its stream begin, and reads no more."""
    client = Raw(server.port)
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    client.request(f"/stream?connectKey={keys}").read_until(b": open\n\n")
    return client


@pytest.mark.parametrize(("kind", "fast"), KINDS)
def test_bad_clients_end_in_time_and_healthy_ones_get_everything(kind: str, fast: bool, tmp_path: Path) -> None:
    settings = {
        "send_timeout": SEND_TIMEOUT, "ping_interval": PING, "send_buffer": 8192, "queue_events": 50,
        "history_size": 10, "overflow": {"lossy": "drop_oldest", "*": "disconnect"},
    }  # fmt: skip
    with (
        serving(kind, fast, tmp_path / "log", **settings) as server,
        Crowd() as crowd,
        Crowd() as trickling,
        contextlib.ExitStack() as stack,
    ):
        healthy = [crowd.follow(server.port, "healthy") for _ in range(HEALTHY)]
        for follower in healthy:
            follower.wait_until_it_reads()
        bad = ["stopped", "stopped-lossy", "trickle", "half-closed", "out-of-reach", "reset"]
        streams = f"http://127.0.0.1:{server.port}/stream"
        stack.enter_context(Stopped(f"{streams}?connectKey=big&connectKey=stopped"))
        stack.enter_context(Stopped(f"{streams}?connectKey=lossy&connectKey=stopped-lossy"))
        trickling.follow(server.port, "big&connectKey=trickle", kind=Trickle)
        half_closed = stack.enter_context(narrow(server, "half-closed"))
        out_of_reach = stack.enter_context(narrow(server, "out-of-reach"))
        reset = stack.enter_context(narrow(server, "reset"))
        wait_for(lambda: server.count() == HEALTHY + len(bad), "all have their streams", 30)
        before = server.state()
        assert before["handed_off"] == (before["streams"] if fast else 0)

        half_closed.socket.shutdown(socket.SHUT_WR)
        drop_what_comes(out_of_reach.socket)
        server.publish("reset", times=3, size=100_000)  # more than its connection holds, less than its queue
        reset.reset()
        began = time.monotonic()
        published, ends = 0, {}
        while len(ends) < len(bad):
            assert time.monotonic() - began < 60, f"only {ends} have ended: {server.state()}"
            server.publish("healthy", first=published)
            published += 1
            server.publish("big", "lossy", times=10, first=published, size=100_000)
            for key in bad:
                if key not in ends and server.count(key) == 0:
                    ends[key] = round(time.monotonic() - began, 1)
        print(kind, fast, ends, server.state()["closed"])
        wait_for(lambda: all(len(follower.events) == published for follower in healthy), "the healthy have all", 30)
        for follower in healthy:
            assert [event.data.split()[1] for event in follower.events] == [str(number) for number in range(published)]
            assert follower.connections == 1
        after = server.state()
        assert after["streams"] == HEALTHY
        assert after["resident"] - before["resident"] < 40_000_000, "what bad clients did not read is kept"
        assert after["handed_off"] == (HEALTHY if fast else 0)
        wait_for(lambda: server.state()["threads"] <= before["threads"] + 1, "no thread hangs in a write", 30)
        wait_for(lambda: server.state()["descriptors"] < before["descriptors"], "their sockets are closed", 30)


OUT_OF_REACH = (["unshare", "--net"], ["unshare", "--user", "--map-root-user", "--net"])


@pytest.mark.parametrize("fast", [True, False])
def test_a_client_behind_a_dropped_route_is_let_go(fast: bool, tmp_path: Path) -> None:
    """The server and its client in namespaces of their own; where there is no right to that, a filter drops all."""
    way: list[str] = next((way for way in OUT_OF_REACH if can_route_in(way)), [])
    done = subprocess.run(
        [*way, *python(str(HERE / "far_away.py"), "namespaces" if way else "filter", str(fast), str(tmp_path / "log"))],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{HERE}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["closed"] == {"peer" if fast else "stalled": 1}
    assert found["seconds"] >= 0.8 * SEND_TIMEOUT


def can_route_in(way: list[str]) -> bool:
    if None in (shutil.which("ip"), shutil.which("unshare")):
        return False
    script = "ip link set lo up && ip link add name near type veth peer name far && unshare --net true"
    return subprocess.run([*way, "sh", "-c", script], capture_output=True).returncode == 0
