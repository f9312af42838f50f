"""Coming back: what a client missed, what it is told when that is unknown, and every cursor that is none."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from clients import DEADLINE, reset_reason
from conftest import SERVERS, LiveServer
from support import wait_for

pytestmark = pytest.mark.live


def _position(server: LiveServer) -> tuple[str, int]:
    epoch, _, number = server.publish("position", "here").partition("-")
    return epoch, int(number)


# What was missed


@pytest.mark.parametrize("way", ["header", "query"])
def test_a_client_that_comes_back_gets_exactly_what_it_missed(server: LiveServer, key: str, way: str) -> None:
    with server.listen(key) as listener:
        server.publish(key, "seen")
        listener.wait_for_data("seen")
        last = listener.events[-1].id
    missed = []
    for number in range(20):
        server.publish(f"{key}-other", "of another key")
        missed.append(server.publish(key, f"missed {number}"))
    again = (
        server.listen(key, headers={"Last-Event-ID": last}) if way == "header" else server.listen(key, lastEventId=last)
    )
    with again as listener:
        live = server.publish(key, "live")
        listener.wait_for_data(*(f"missed {number}" for number in range(20)), "live")
        assert [event.id for event in listener.events] == [*missed, live]


def test_a_client_that_missed_nothing_gets_nothing_again(server: LiveServer, key: str) -> None:
    last = server.publish(key, "seen")
    with server.listen(key, headers={"Last-Event-ID": last}) as listener:
        server.publish(key, "live")
        listener.wait_for_data("live")


def test_a_client_that_left_before_its_first_event_comes_back_to_all_it_missed(server: LiveServer, key: str) -> None:
    server.publish(key, "before it came")
    with server.raw() as client:
        received = client.request(f"/stream?connectKey={key}").read_until(b": open\n\n", b"id: ", b"\n\n")
        place = received.rpartition(b"id: ")[2].partition(b"\n")[0].decode()
        client.leave()
    server.publish(key, "missed")
    with server.listen(key, headers={"Last-Event-ID": place}) as listener:
        listener.wait_for_data("missed")


def test_one_cursor_means_something_for_several_keys_at_once(server: LiveServer, key: str) -> None:
    keys = [f"{key}-{name}" for name in "abc"]
    last = server.publish(keys[0], "seen")
    for number in range(12):
        server.publish(keys[number % 3], str(number))
    with server.listen(*keys[:2], headers={"Last-Event-ID": last}) as listener:
        expected = [str(number) for number in range(12) if number % 3 != 2]
        listener.wait_for_data(*expected)
        server.publish(None, f"to all of {key}")
        listener.wait_for_data(*expected, f"to all of {key}")


def test_ids_of_ones_own_lead_back_to_their_places(server: LiveServer, key: str) -> None:
    server.publish(key, "a", id="номер 1")
    server.publish(key, "b", id="номер 2")
    server.publish(key, "c")
    # As a browser sends it.
    with server.listen(key, headers={"Last-Event-ID": "номер 1".encode()}) as listener:
        listener.wait_for_data("b", "c")
    with server.listen(key, lastEventId="номер 2") as listener:
        listener.wait_for_data("c")


def test_a_client_that_comes_back_while_events_are_published_misses_none_and_gets_none_twice(
    server: LiveServer, key: str
) -> None:
    last = server.publish(key, "begin")
    got: list[str] = []
    for _ in range(5):
        with server.listen(key, headers={"Last-Event-ID": last}) as listener:
            expected = server.post("/burst", key=key, times="50").json()[-1]
            # Leave in the midst of it, wherever that is.
            wait_for(lambda listener=listener: listener.events, "an event", DEADLINE)  # type: ignore[misc]
            listener.leave()
            got += listener.data
            last = listener.events[-1].id
    with server.listen(key, headers={"Last-Event-ID": last}) as listener:
        end = server.publish(key, "end")
        assert expected != end
        wait_for(lambda: listener.data[-1:] == ["end"], "the end", DEADLINE)
        got += listener.data
    assert got == [*map(str, range(50))] * 5 + ["end"]


def test_closed_to_come_back_a_client_does_so_and_misses_nothing(server: LiveServer, key: str) -> None:
    with server.curl(key) as curl:
        curl.wait_for(b": open\n\n")
        last = server.publish(key, "seen")
        curl.wait_for(b"data: seen\n\n")
        server.post("/close", key=key, reconnect="1")
        output = curl.wait_for_end()
        assert b"id: end" not in output
        assert output.rpartition(b"retry: ")[2].strip().isdigit()
    server.publish(key, "missed")
    with server.listen(key, headers={"Last-Event-ID": last}) as listener:
        listener.wait_for_data("missed")


# Cursors that lead nowhere

NOWHERE: dict[str, Callable[[str, int], str]] = {
    "future": lambda epoch, head: f"{epoch}-{head + 1_000_000}",
    "huge number": lambda epoch, head: f"{epoch}-9999999999999999999",
    "beyond 64 bits": lambda epoch, head: f"{epoch}-{'9' * 40}",
    "negative": lambda epoch, head: f"{epoch}--1",
    "spaces": lambda epoch, head: f"{epoch}- {head}",
    "digits of another script": lambda epoch, head: f"{epoch}-٣",
    "another epoch": lambda epoch, head: f"0123456789ab-{head}",
    "no number": lambda epoch, head: f"{epoch}-",
    "no epoch": lambda epoch, head: f"-{head}",
    "number alone": lambda epoch, head: str(head),
    "redis": lambda epoch, head: "$",
    "range": lambda epoch, head: "(1-0",
    "sql": lambda epoch, head: "' OR 1=1; --",
    "format": lambda epoch, head: "%s%n{0}{epoch}",
    "path": lambda epoch, head: "../../etc/passwd",
    "json": lambda epoch, head: '[{"topic":"a","offset":1}]',
    "emoji": lambda epoch, head: "🦊" * 10,
    "2 KB": lambda epoch, head: "x" * 2048,  # gunicorn refuses a request line of 4 KB
    "End": lambda epoch, head: "End",
}


@pytest.mark.parametrize("name", NOWHERE)
def test_a_cursor_that_leads_nowhere_is_told_so_and_goes_on_live(server: LiveServer, key: str, name: str) -> None:
    server.publish(f"{key}-secret", "of another pool", id=f"secret {key}")
    server.publish(key, "old")
    epoch, head = _position(server)
    cursor = NOWHERE[name](epoch, head)
    ways: list[tuple[dict[str, bytes], dict[str, str]]] = [
        ({"Last-Event-ID": cursor.encode()}, {}),
        ({}, {"lastEventId": cursor}),
    ]
    for headers, query in ways:
        with server.listen(key, headers=headers, **query) as listener:
            assert listener.status == 200
            server.publish(f"{key}-secret", "of another pool")
            last = server.publish(key, "live")
            wait_for(lambda listener=listener: len(listener.events) >= 2, "two events", DEADLINE)  # type: ignore[misc]
            reset, live = listener.events
            assert (live.data, live.id) == ("live", last)
            assert reset.event == "stream-reset"
            assert json.loads(reset.data)["keys"] == [key]
            assert reset_reason(reset.data) == ("epoch" if name == "another epoch" else "unknown")
            # It may come back with the id it was given now.
        with server.listen(key, headers={"Last-Event-ID": reset.id}) as listener:
            listener.wait_for_data("live")


def test_an_id_of_another_pool_is_unknown_here(server: LiveServer, key: str) -> None:
    server.publish(f"{key}-secret", "of another pool", id=f"secret {key}")
    server.publish(f"{key}-secret", "of another pool")
    server.publish(key, "old")
    with server.listen(key, lastEventId=f"secret {key}") as listener:
        server.publish(key, "live")
        wait_for(lambda: len(listener.events) >= 2, "two events", DEADLINE)
        assert [event.event for event in listener.events] == ["stream-reset", "message"]
        assert "secret" not in "".join(listener.data).replace(f"{key}-secret", "")


def test_a_place_in_the_log_of_another_pool_gives_nothing_of_that_pool(server: LiveServer, key: str) -> None:
    place = server.publish(f"{key}-secret", "of another pool")
    server.publish(f"{key}-secret", "of another pool")
    server.publish(key, "mine")
    with server.listen(key, headers={"Last-Event-ID": place}) as listener:
        listener.wait_for_data("mine")


# Requests that no client sends

# What the server itself refuses never reaches the app: gunicorn takes headers of up to 8,190 bytes and werkzeug of up
# to 64 KiB, and NUL in a header is for gunicorn a bad request. That is as good an answer as a reset.
REFUSED_BY_SERVERS = (400, 431)

RAW: dict[str, list[bytes]] = {
    "60 KB": [b"Last-Event-ID: " + b"x" * 60_000],
    "60 KB of digits": [b"Last-Event-ID: 0123456789ab-" + b"9" * 60_000],
    "7 KB": [b"Last-Event-ID: " + b"-1" * 3500],
    "NUL": [b"Last-Event-ID: a\0b"],
    "NUL alone": [b"Last-Event-ID: \0"],
    "control characters": [b"Last-Event-ID: \x01\x1b[31m\x7f"],
    "invalid UTF-8": [b"Last-Event-ID: \xff\xfe\x80"],
    "half a character": [b"Last-Event-ID: \xe6\x97"],
    "a surrogate": [b"Last-Event-ID: \xed\xa0\x80"],
    "two headers": [b"Last-Event-ID: 1", b"Last-Event-ID: 2"],
    "end and another": [b"Last-Event-ID: end", b"Last-Event-ID: 2"],
}


@pytest.mark.parametrize("name", RAW)
def test_a_header_that_no_client_sends_is_no_error_of_the_server(server: LiveServer, key: str, name: str) -> None:
    server.publish(f"{key}-secret", "of another pool")
    with server.raw() as client:
        client.request(f"/stream?connectKey={key}".replace(" ", "%20"), *RAW[name])
        if client.status == 200:
            assert b"\r\nContent-Type: text/event-stream\r\n" in client.head + b"\r\n"
            server.publish(key, "live")
            client.read_until(b"event: stream-reset\n", b'"unknown"', b"data: live\n\n")
            assert b"of another pool" not in client.received
        elif "end" in name and client.status == 204:
            pass  # werkzeug's last header of a name is the one that counts, or its first
        else:
            assert client.status in REFUSED_BY_SERVERS
            assert server.kind in ("gunicorn-gevent", "gunicorn-gthread", "werkzeug") or "NUL" in name


@pytest.mark.parametrize("query", ["%00", "%ff%fe", "%", "%ED%A0%80", "&lastEventId=2", "x" * 4000, "%0D%0Aid:+9"])
def test_a_query_that_no_client_sends_is_no_error_of_the_server(server: LiveServer, key: str, query: str) -> None:
    with server.raw() as client:
        client.request(f"/stream?connectKey=raw-query&lastEventId=1{query}")
        assert client.status == 200
        server.publish("raw-query", "live")
        client.read_until(b"event: stream-reset\n", b'"unknown"', b"data: live\n\n")
        assert b"\nid:+9" not in client.received


@pytest.mark.parametrize("query", ["connectKey=", "connectKey=%00", "connectKey=a%0Ab", "connectKey=" + "k" * 256])
def test_a_key_that_cannot_be_is_a_bad_request(server: LiveServer, query: str) -> None:
    with server.raw() as client:
        assert client.request(f"/stream?{query}").status == 400


def test_more_keys_than_one_stream_may_have_are_a_bad_request(server: LiveServer) -> None:
    with server.raw() as client:
        assert client.request("/stream?" + "&".join(f"connectKey={number}" for number in range(101))).status == 400


# The server's death


@pytest.mark.parametrize("kind", SERVERS)
def test_after_the_servers_death_a_client_is_told_to_begin_anew(
    fresh: Callable[..., LiveServer], kind: str, key: str
) -> None:
    server = fresh(kind)
    last = server.publish(key, "before")
    server.kill_and_restart()
    server.publish(key, "meanwhile")
    with server.listen(key, headers={"Last-Event-ID": last}) as listener:
        server.publish(key, "live")
        wait_for(lambda: len(listener.events) >= 2, "two events", DEADLINE)
        assert [event.event for event in listener.events] == ["stream-reset", "message"]
        assert reset_reason(listener.data[0]) == "epoch"
