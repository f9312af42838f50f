"""Clients that come and go, a thousand a second, and a server that is out of descriptors: nothing of it stays."""

from __future__ import annotations

import collections
import contextlib
import os
import random
import re
import resource
import socket
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from clients import Raw
from support import wait_for
from test_live_slow import SlowServer, serving
from workers import LEFT_OPEN, Crowd

pytestmark = pytest.mark.live

# The whole minute on request: CHURN_SECONDS=60.
SECONDS = float(os.environ.get("CHURN_SECONDS", "3"))
RATE = 1000
KEPT = 50
KEYS = 1000  # so many that no two who are there at the same time share one, and what is kept of keys is kept soon
RESET = struct.pack("ii", 1, 0)
WAYS = ("half a head", "head", "first bytes", "event", "unread")


class Visitor:
    """A client with a key of its own as long as it is there. It leaves at one of several moments, with FIN or RST."""

    def __init__(self, port: int, number: int) -> None:
        self.key = f"visitor-{number % KEYS}"
        self.way = WAYS[number % len(WAYS)]
        self.received = b""
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        if number % 2:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        request = f"GET /stream?connectKey={self.key}&connectKey=everybody HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        self.socket.sendall(request[:30] if self.way == "half a head" else request)
        self.socket.setblocking(False)

    def is_done(self) -> bool:
        """Read; say whether it is time to leave."""
        with contextlib.suppress(BlockingIOError):
            while self.way != "unread" and (data := self.socket.recv(65536)):
                self.received += data
        wanted = {"first bytes": b": open\n\n", "event": b"data: everybody"}.get(self.way)
        return wanted is None or wanted in self.received

    def leave(self) -> None:
        self.socket.close()
        # Each event begins with its key: none that was for somebody else came on this connection.
        keys = set(re.findall(rb"data: (\S+) ", self.received))
        assert keys <= {self.key.encode(), b"everybody"}, f"{self.key} received {self.received!r}"


def churn(server: SlowServer, seconds: float, first: int) -> int:
    """Let ``RATE`` clients a second come and go, as far as this machine can; give how many did."""
    visitors: collections.deque[Visitor] = collections.deque()
    began = published = time.monotonic()
    number = first
    while time.monotonic() < began + seconds or visitors:
        now = time.monotonic()
        if now < began + seconds:
            for _ in range(min(50, int((now - began) * RATE) - (number - first))):
                visitors.append(Visitor(server.port, number))
                number += 1
            if now - published > 0.05:
                published = now
                some = random.sample(range(max(first, number - 300), number + 1), min(20, number + 1 - first))
                server.publish("everybody", *(f"visitor-{one % KEYS}" for one in some))
        elif now - published > 0.05:
            published = now
            server.publish("everybody")
        for _ in range(len(visitors)):
            visitor = visitors.popleft()
            if visitor.is_done():
                visitor.leave()
            else:
                visitors.append(visitor)
        assert now < began + seconds + 60, f"{len(visitors)} visitors wait for what they came for"
        time.sleep(0.001)
    return number - first


def settled(server: SlowServer) -> dict[str, Any]:
    wait_for(lambda: server.count() == KEPT, "all who left are gone", 30)
    return server.state()


@pytest.mark.parametrize(("kind", "fast"), [("pywsgi", True), ("pywsgi", False), ("gunicorn-gevent", True)])
def test_clients_that_come_and_go_leave_nothing_behind(kind: str, fast: bool, tmp_path: Path) -> None:
    with serving(kind, fast, tmp_path / "log", ping_interval=0.5, history_size=1) as server, Crowd() as crowd:
        kept = [crowd.follow(server.port, f"kept-{number}") for number in range(KEPT)]
        for follower in kept:
            follower.wait_until_it_reads()
        warm = churn(server, min(SECONDS, 5), 0)  # what is made once, and what the allocator keeps
        before = settled(server)
        count = churn(server, SECONDS, warm)
        after = wait_for(
            lambda: (
                (now := settled(server))
                and now["greenlets"] <= before["greenlets"] + 2
                and now["descriptors"] <= before["descriptors"] + 2
                and now
            ),
            "no greenlet and no descriptor is left",
            30,
        )
        assert isinstance(after, dict)
        print(kind, fast, f"{count} visitors, {count / SECONDS:.0f} a second; before {before}, after {after}")
        assert after["streams"] == after["keys"] == KEPT
        assert after["handed_off"] == (KEPT if fast else 0)
        assert after["outbox"] == 0
        assert after["threads"] <= before["threads"]
        assert sum(after["closed"].values()) == after["opened"] - KEPT
        assert set(after["closed"]) == {"peer"}
        assert after["resident"] < 1.05 * before["resident"] + 2_000_000
        server.publish(*(f"kept-{number}" for number in range(KEPT)))
        for number, follower in enumerate(kept):
            wait_for(lambda follower=follower: follower.events, "those who stayed are served", 30)  # type: ignore[misc]
            assert [event.data.split()[0] for event in follower.events] == [f"kept-{number}"]
            assert follower.connections == 1


@pytest.mark.parametrize(("kind", "fast"), [("pywsgi", True), ("gunicorn-gevent", True), ("pywsgi", False)])
def test_out_of_descriptors_streams_live_on_and_accepting_recovers(kind: str, fast: bool, tmp_path: Path) -> None:
    server = SlowServer(kind, fast, tmp_path / "log", ping_interval=0.5)
    try:
        server.start()
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Raw(server.port)) for _ in range(5)]
            for number, client in enumerate(clients):
                client.request(f"/stream?connectKey=early-{number}").read_until(b": open\n\n")
            wait_for(lambda: server.count() == 5, "five streams")
            serving_pid = find_worker(server)
            used = len(os.listdir(f"/proc/{serving_pid}/fd"))
            _, hard = resource.prlimit(serving_pid, resource.RLIMIT_NOFILE)
            resource.prlimit(serving_pid, resource.RLIMIT_NOFILE, (used + 12, hard))
            # Of what accept() gets, an odd one may be left for dup(), so that some stay with their server.
            crowd = [stack.enter_context(Raw(server.port)) for _ in range(40)]
            for client in crowd:
                client.request("/stream?connectKey=crowd")
            wait_for(lambda: len(os.listdir(f"/proc/{serving_pid}/fd")) >= used + 10, "it is out of descriptors", 30)
            wait_for(lambda: "Too many open files" in server.log, "it says so", 30)
            # Those who were there get heartbeats all the time.
            for client in clients:
                pings = client.received.count(b": ping\n\n")
                while client.received.count(b": ping\n\n") < pings + 3:
                    client.read_more()
            lines = server.log.count("\n")
            time_of_flood = time.monotonic()
            while time.monotonic() < time_of_flood + 2:
                clients[0].read_more()
            # gevent's own server prints a traceback for a failed accept, and waits for up to a second after it.
            assert server.log.count("\n") - lines < 2 * 40
            for client in crowd:
                client.reset()
            with server.raw() as late:
                late.request("/stream?connectKey=late").read_until(b": open\n\n")
                resource.prlimit(serving_pid, resource.RLIMIT_NOFILE, (hard, hard))
                server.publish("late", *(f"early-{number}" for number in range(5)))
                late.read_until(b"data: late 0")
                for number, client in enumerate(clients):
                    client.read_until(b"data: early-%d 0" % number)
        wait_for(lambda: server.count() == 0, "all are gone", 30)
        assert server.state()["handed_off"] == 0
    finally:
        server.stop()
    tracebacks = re.findall(r"Traceback .*\n(?:  .*\n)+.*\n", re.sub(LEFT_OPEN, "", server.log))
    assert not [text for text in tracebacks if "Too many open files" not in text], server.log[-5000:]
    assert "flask_sse_stream" not in "".join(tracebacks), "what is ours says it in a line"


def find_worker(server: SlowServer) -> int:
    """The process that serves: gunicorn's only worker, or the server itself."""
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    return int(children[0]) if children else server.pid
