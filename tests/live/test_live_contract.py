"""What every server carries to every client: heads, events, publishing from anywhere, methods, heartbeats, limits."""

from __future__ import annotations

import time

import httpx
import pytest
from clients import DEADLINE, Listener
from conftest import PING, LiveServer
from support import wait_for

from flask_sse_stream import PoolManager, Settings
from flask_sse_stream.probing import look_at_url

pytestmark = pytest.mark.live

PLACES = (
    "view", "greenlet", "native-thread", "threadpool", "hub-callback", "executor", "asyncio", "thread", "finalizer",
    "signal",
)  # fmt: skip


# The head and the events


def test_the_head_and_the_first_bytes_come_before_any_event_and_any_heartbeat(server: LiveServer, key: str) -> None:
    with server.raw() as client:
        client.request(f"/stream?connectKey={key}").read_until(b": open\n\n")
        head, _, body = client.received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        # Behind the size of a chunk.
        assert body.partition(b"\r\n")[2].startswith(b"retry: 300\n\n: open\n\n")


def test_the_headers_are_those_of_an_event_stream(server: LiveServer, key: str) -> None:
    with server.listen(key) as listener:
        assert listener.headers.get_list("Content-Type") == ["text/event-stream"]
        assert listener.headers.get_list("Cache-Control") == ["no-cache, no-transform"]
        assert listener.headers["X-Accel-Buffering"] == "no"
        assert listener.headers.get_list("Transfer-Encoding") == ["chunked"]
        assert "Content-Length" not in listener.headers
        assert "Content-Encoding" not in listener.headers


def test_the_doctor_finds_nothing_wrong_with_it(server: LiveServer, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flask_sse_stream.probing._LATE", DEADLINE)  # this machine may be busy
    findings = list(look_at_url(PoolManager(Settings(ping_interval=PING)), server.stream_url(key), {}))
    assert {finding.check: finding.level for finding in findings} == {
        "compression": "ok",
        "first bytes": "ok",
        "heartbeats": "ok",
    }


def test_events_arrive_as_they_were_published(server: LiveServer, key: str) -> None:
    with server.listen(key) as listener:
        first = server.publish(key, "hello")
        second = server.publish(key, {"title": "grüße"}, event="headline")
        server.publish(key, " two\r\nlines \u2028 – 日本", id="größe 7")
        server.publish(key, event="empty")
        listener.wait_for_data("hello", '{"title": "gr\\u00fc\\u00dfe"}', " two\nlines \u2028 – 日本", "")
        assert [event.event for event in listener.events] == ["message", "headline", "message", "empty"]
        assert [event.id for event in listener.events][:3] == [first, second, "größe 7"]


def test_curl_prints_events_as_they_come_and_ends_when_the_stream_does(server: LiveServer, key: str) -> None:
    with server.curl(key, options=("--include",)) as curl:
        curl.wait_for(b"text/event-stream", b": open\n\n")
        identifier = server.publish(key, "one")
        curl.wait_for(f"id: {identifier}\ndata: one\n\n".encode())
        server.publish(key, "two")
        curl.wait_for(b"data: two\n\n")
        server.post("/close", key=key)
        assert curl.wait_for_end().endswith(b"id: end\nevent: close\ndata: \n\n")


def test_a_client_of_http_1_0_is_served_without_chunks(server: LiveServer, key: str) -> None:
    with server.curl(key, options=("--http1.0", "--include")) as curl:
        curl.wait_for(b"\r\n\r\nretry: 300\n\n: open\n\n")
        if server.kind != "werkzeug":  # It goes by its own version; curl takes the chunks apart all the same.
            assert b"transfer-encoding" not in curl.output.lower()
        server.publish(key, "old")
        curl.wait_for(b"data: old\n\n")
        server.post("/close", key=key)
        assert curl.wait_for_end().endswith(b"data: \n\n")


def test_one_connection_listens_to_several_keys_and_to_no_other(server: LiveServer, key: str) -> None:
    with server.listen(f"{key}-a", f"{key}-b") as both, server.listen(f"{key}-c") as other:
        server.publish(f"{key}-a", "1")
        server.publish(f"{key}-c", "2")
        server.publish(f"{key}-b", "3")
        server.publish(f"{key}-c", "4")
        both.wait_for_data("1", "3")
        other.wait_for_data("2", "4")


def test_publish_all_reaches_every_stream_once_and_in_order(server: LiveServer, key: str) -> None:
    with server.listen(f"{key}-a", f"{key}-b") as both, server.listen(f"{key}-c") as other:
        server.publish(f"{key}-a", "before")
        server.publish(None, f"to all of {key}")
        server.publish(f"{key}-b", "after")
        both.wait_for_data("before", f"to all of {key}", "after")
        other.wait_for_data(f"to all of {key}")


def test_a_large_event_arrives_whole(server: LiveServer, key: str) -> None:
    text = "0123456789abcdef" * 50_000
    with server.listen(key) as listener:
        server.publish(key, text)
        server.publish(key, "after")
        listener.wait_for_data(text, "after")


def test_a_burst_arrives_in_the_order_of_its_ids(server: LiveServer, key: str) -> None:
    with server.listen(key) as listener:
        identifiers = server.post("/burst", key=key, times="500").json()
        listener.wait_for_data(*map(str, range(500)))
        assert [event.id for event in listener.events] == identifiers


# Publishing from anywhere


@pytest.mark.parametrize("place", PLACES)
def test_an_event_published_from_anywhere_arrives(server: LiveServer, key: str, place: str) -> None:
    with server.listen(key) as listener:
        server.post(f"/publish-from/{place}", key=key)
        listener.wait_for_data(place)
        # And the way is still open.
        server.post(f"/publish-from/{place}", key=key)
        server.post("/publish-from/view", key=key)
        wait_for(lambda: sorted(listener.data) == sorted([place, place, "view"]), f"three: {listener.data}", DEADLINE)


def test_what_was_published_before_the_first_request_can_be_replayed(server: LiveServer) -> None:
    first, second = server.get("/state")["startup"]
    with server.listen("startup", lastEventId=first) as listener:
        wait_for(lambda: listener.events, "a replay", DEADLINE)
        # What other tests have published to all may follow.
        assert (listener.data[0], listener.events[0].id) == ("start 2", second)


# Methods


def test_head_gives_the_headers_and_registers_nothing(server: LiveServer, key: str) -> None:
    before = server.get("/state")["stats"]["opened"]
    response = httpx.head(server.stream_url(key), timeout=DEADLINE, trust_env=False)
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "text/event-stream"
    assert server.count(key) == 0
    assert server.get("/state")["stats"]["opened"] == before


def test_options_says_what_is_allowed_and_registers_nothing(server: LiveServer, key: str) -> None:
    before = server.get("/state")["stats"]["opened"]
    response = httpx.options(server.stream_url(key), timeout=DEADLINE, trust_env=False)
    assert response.status_code == 204
    assert {method.strip() for method in response.headers["Allow"].split(",")} == {"GET", "HEAD", "OPTIONS"}
    assert server.get("/state")["stats"]["opened"] == before


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_other_methods_are_not_allowed(server: LiveServer, key: str, method: str) -> None:
    response = httpx.request(method, server.stream_url(key), timeout=DEADLINE, trust_env=False)
    assert response.status_code == 405
    assert server.count(key) == 0


def test_a_stream_that_was_over_for_good_is_answered_204(server: LiveServer, key: str) -> None:
    for url in (server.stream_url(key), f"{server.url}/countdown/{key}"):
        response = httpx.get(url, headers={"Last-Event-ID": "end"}, timeout=DEADLINE, trust_env=False)
        assert (response.status_code, response.content) == (204, b"")
        assert response.headers.get("Content-Length", "0") == "0"
    assert server.count(key) == 0
    assert server.get(f"/noted/{key}") == []


# Heartbeats


def test_a_stream_that_is_silent_gets_heartbeats(server: LiveServer, key: str) -> None:
    with server.raw() as client:
        client.request(f"/stream?connectKey={key}").read_until(b": open\n\n")
        while client.received.count(b": ping\n\n") < 3:
            client.read_more()


def test_a_stream_that_has_something_to_say_gets_no_heartbeats(server: LiveServer, key: str) -> None:
    with server.raw() as client:
        client.request(f"/stream?connectKey={key}").read_until(b": open\n\n")
        number, start, deadline = 0, len(client.received), time.monotonic() + 60
        began = before = time.monotonic()
        while before < began + 3 * PING:
            assert before < deadline, f"this machine had no time to publish every {PING / 2} s"
            server.publish(key, f"number {number}")
            client.read_until(b"data: number %d\n\n" % number)
            number += 1
            now = time.monotonic()
            if now - before > PING / 2:  # The machine was so busy that there may have been silence.
                began, start = now, len(client.received)
            before = now
            time.sleep(PING / 8)  # A pace at which a heartbeat could come in between.
        assert b": ping" not in client.received[start:]


def test_heartbeats_go_on_while_a_generator_thinks(server: LiveServer, key: str) -> None:
    with server.raw() as client:
        client.request(f"/thinking/{key}").read_until(b"data: wait\n\n", b": ping\n\n")
        server.post(f"/release/{key}")
        client.read_until(b"data: answer\n\n", b"id: end\n")


# Streams of one request


def test_a_countdown_is_streamed_and_ended(server: LiveServer, key: str) -> None:
    with server.listen(path=f"/countdown/{key}") as listener:
        listener.wait_for_end()
        assert listener.error is None
        assert listener.data == ['{"left": 3}', '{"left": 2}', '{"left": 1}', ""]
        assert listener.events[-1].event == "close"
        assert listener.events[-1].id == "end"
        assert listener.headers.get_list("Content-Type") == ["text/event-stream"]


def test_a_function_may_feed_a_stream(server: LiveServer) -> None:
    with server.listen(path="/function") as listener:
        listener.wait_for_end()
        assert [(event.event, event.data, event.id) for event in listener.events] == [
            ("message", "one", ""),
            ("second", '{"two": 2}', "2"),
            ("done", '{"total": 2}', "end"),
        ]


def test_a_response_may_be_sent_to_before_and_after_it_was_returned(server: LiveServer) -> None:
    with server.listen(path="/pushed") as listener:
        listener.wait_for_end()
        assert listener.data == ["before the response", "after it", ""]


def test_a_post_may_be_answered_with_a_stream(server: LiveServer) -> None:
    with Listener(f"{server.url}/echo", method="POST", json={"parts": ["a", "b\nc"]}) as listener:
        listener.wait_for_end()
        assert [(event.event, event.data) for event in listener.events] == [
            ("part", "a"),
            ("part", "b\nc"),
            ("close", ""),
        ]


def test_a_view_may_abort_before_its_first_event(server: LiveServer) -> None:
    with server.listen(path="/forbidden") as listener:
        assert listener.status == 403
        assert "html" in listener.headers["Content-Type"]


def test_a_generator_that_raises_ends_its_stream_and_is_logged_once(server: LiveServer) -> None:
    server.tracebacks += 1
    with server.listen(path="/raising") as listener:
        listener.wait_for_end()
        assert listener.error is None
        assert listener.data == ["before"]
        # It may come again: what it had to say was not all said.
        assert listener.events[-1].id != "end"
    wait_for(lambda: server.log.count("Traceback") == server.tracebacks, "the log has its traceback", DEADLINE)
    assert server.log.count("RuntimeError: the secret of the source") == 1


def test_a_generator_is_closed_when_its_client_leaves(server: LiveServer, key: str) -> None:
    with server.raw() as client:
        client.request(f"/ticking/{key}").read_until(b'"tick": 3')
        client.leave()
    wait_for(lambda: server.get(f"/noted/{key}") == ["closed"], "the generator is closed", 2 * PING + DEADLINE)


def test_a_generator_that_waits_is_closed_when_its_client_leaves(server: LiveServer, key: str) -> None:
    with server.raw() as client:
        client.request(f"/thinking/{key}").read_until(b"data: wait")
        client.leave()
    if not server.in_greenlets:
        # Threads cannot be interrupted: it ends when it next has something to say.
        server.post(f"/release/{key}")
    wait_for(lambda: server.get(f"/noted/{key}") == ["closed"], "the generator is closed", 2 * PING + DEADLINE)


# Limits


def test_over_the_limit_a_browser_is_asked_to_come_back(server: LiveServer) -> None:
    with server.listen(path="/full-retry/stream") as one, server.listen(path="/full-retry/stream"):
        with server.listen(path="/full-retry/stream") as third:
            assert third.status == 200
            assert third.headers["Content-Type"] == "text/event-stream"
            third.wait_for_end()
            assert third.error is None
            assert third.events == []
        body = httpx.get(f"{server.url}/full-retry/stream", timeout=DEADLINE, trust_env=False).text
        retry = int(body.removeprefix("retry: ").partition("\n")[0])
        assert 300 <= retry <= 900
        assert server.get("/full-retry/count")["streams"] == 2
        one.leave()
        wait_for(lambda: server.get("/full-retry/count")["streams"] == 1, "one has left", 2 * PING + DEADLINE)
        with server.raw() as fourth:
            fourth.request("/full-retry/stream").read_until(b": open\n\n")
    wait_for(lambda: server.get("/full-retry/count")["streams"] == 0, "all have left", 2 * PING + DEADLINE)


def test_over_the_limit_an_api_client_is_answered_503(server: LiveServer) -> None:
    with server.listen(path="/full-503/stream"), server.listen(path="/full-503/stream"):
        response = httpx.get(f"{server.url}/full-503/stream", timeout=DEADLINE, trust_env=False)
        assert response.status_code == 503
        assert int(response.headers["Retry-After"]) >= 1
        assert server.get("/full-503/count") == {"streams": 2, "refused": 1}
    wait_for(lambda: server.get("/full-503/count")["streams"] == 0, "all have left", 2 * PING + DEADLINE)
