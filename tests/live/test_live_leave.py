"""Clients that go away, one or a thousand, however they do it: nothing of them stays."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest
from clients import DEADLINE
from conftest import PING, LiveServer
from support import wait_for

pytestmark = pytest.mark.live

# A FIN is noticed at the second write after it. A busy machine may take its time for the rest.
NOTICED = 2 * PING + 2.0


@pytest.mark.parametrize("way", ["leave", "reset"])
def test_a_client_that_leaves_is_noticed_within_two_heartbeats(server: LiveServer, key: str, way: str) -> None:
    with server.raw() as client:
        client.request(f"/stream?connectKey={key}").read_until(b": open\n\n")
        assert server.count(key) == 1
        getattr(client, way)()
        server.wait_for_count(key, 0, NOTICED)


@pytest.mark.parametrize("way", ["leave", "reset"])
def test_a_client_that_leaves_in_the_midst_of_a_burst_is_noticed(server: LiveServer, key: str, way: str) -> None:
    with server.raw() as client:
        client.request(f"/stream?connectKey={key}").read_until(b": open\n\n")
        server.post("/burst", key=key, times="300")
        client.read_more()
        getattr(client, way)()
        server.post("/burst", key=key, times="300")
        server.wait_for_count(key, 0, NOTICED)


@pytest.mark.parametrize("way", ["leave", "reset"])
def test_a_client_that_leaves_at_once_is_noticed(server: LiveServer, key: str, way: str) -> None:
    opened = server.get("/state")["stats"]["opened"]
    with server.raw() as client:
        client.request(f"/stream?connectKey={key}")
        getattr(client, way)()
    # A reset may overtake the request: then there never was one.
    with contextlib.suppress(AssertionError):
        wait_for(lambda: server.get("/state")["stats"]["opened"] > opened, "a stream", 1.0)
    server.wait_for_count(key, 0, NOTICED)


def test_killed_curl_is_noticed(server: LiveServer, key: str) -> None:
    with server.curl(key) as curl:
        curl.wait_for(b": open\n\n")
        assert server.count(key) == 1
        curl.process.kill()
        server.wait_for_count(key, 0, NOTICED)


def test_a_reader_that_reads_nothing_costs_the_others_nothing(server: LiveServer, key: str) -> None:
    with server.raw() as frozen, server.listen(key) as listener:
        frozen.request(f"/stream?connectKey={key}").read_until(b": open\n\n")
        for number in range(20):  # more than the queue and the kernel's buffers together hold
            server.publish(key, "x" * 500_000)
            wait_for(lambda number=number: len(listener.events) > number, f"event {number}", DEADLINE)  # type: ignore[misc]
        # It is cut off, for it can come back and be given what it missed.
        server.wait_for_count(key, 1)
        assert server.get("/state")["stats"]["closed"]["slow"] >= 1
    server.wait_for_count(key, 0, NOTICED)


MEASURED = ("greenlets", "threads", "files")


def _come_and_go(server: LiveServer, key: str, clients: int) -> None:
    """``clients`` listeners at once; a third leaves, a third resets, a third is closed by the server."""
    with contextlib.ExitStack() as stack:
        raws = [stack.enter_context(server.raw()) for _ in range(clients)]
        for number, client in enumerate(raws):
            part = f"{key}-{number % 3}"
            client.request(f"/stream?connectKey={part}&connectKey={key}&connectKey={key}-{number}")
        for client in raws:
            client.read_until(b": open\n\n")
        assert server.count(key) == clients
        server.publish(key, "to all of them")
        for client in raws:
            client.read_until(b"data: to all of them\n\n")
        server.post("/close", key=f"{key}-2")
        for number, client in enumerate(raws):
            if number % 3 == 0:
                client.leave()
            elif number % 3 == 1:
                client.reset()
            else:
                client.read_until(b"id: end\n")
        server.wait_for_count(key, 0, NOTICED + DEADLINE)


def test_a_crowd_of_listeners_leaves_nothing_behind(server: LiveServer, key: str) -> None:
    clients = 1000 if server.in_greenlets else 27  # each has a thread of its own there, of 32
    # Once for what stays by design, such as a pool of threads.
    _come_and_go(server, f"{key}-warm", clients)
    before = _settled(server, None, *MEASURED)
    _come_and_go(server, key, clients)
    after = _settled(server, before, *MEASURED)
    assert after["count_all"] == 0
    assert after["stats"]["streams"] == after["stats"]["keys"] == after["stats"]["outbox"] == 0
    assert server.get("/state")["pid"] == before["pid"]


def _settled(server: LiveServer, wanted: dict[str, Any] | None, *names: str) -> dict[str, Any]:
    """Give a state with no streams whose numbers are at most those wanted, or at rest for a while."""
    seen: list[dict[str, Any]] = []

    def look() -> bool:
        seen.append(server.get("/state"))
        if seen[-1]["count_all"]:
            return False
        if wanted is not None:
            return all(seen[-1][name] <= wanted[name] for name in names)
        time.sleep(0.1)
        return len(seen) > 5 and all(state[name] == seen[-1][name] for state in seen[-5:] for name in names)

    def numbers(state: dict[str, Any]) -> dict[str, int]:
        return {name: state[name] for name in names}

    try:
        wait_for(look, "a state", 15)
    except AssertionError:
        wanted_numbers = numbers(wanted) if wanted is not None else "rest"
        raise AssertionError(f"wanted {wanted_numbers}, last {numbers(seen[-1])}, {seen[-1]}") from None
    return seen[-1]
