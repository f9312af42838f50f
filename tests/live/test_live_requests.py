"""Requests that no client of ours sends, over bare sockets, to every server: a stream as it should be, or a refusal.

Whatever comes, nobody is answered 500, no traceback is logged, no stream stays registered and the next one is served.
FUZZ_EXAMPLES sets how many requests hypothesis makes for each server; ``make fuzz`` makes thousands.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from clients import Raw
from conftest import LiveServer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import ROOT

from flask_sse_stream import EventDecoder

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
QUIET = 0.3  # seconds after which a server waits for more of the request
STREAM = b"GET /stream?connectKey=fuzz HTTP/1.1\r\nHost: x\r\n"

# What is wrong is mixed with what is right, or nothing would get past the server's own reading.
cursors = st.one_of(
    st.sampled_from(
        [b"", b"end", b"0123456789ab-1", b"-1", b"18446744073709551616", b"$", b"-", b"a,b", b"'; DROP TABLE event; --"]
    ),
    st.sampled_from([b"\xff\xfe", b"\xf0\x9f\x92\xa9", b"x" * 200, b"y" * 60_000, b"a\0b", b"(5", b"return 1"]),
    st.binary(max_size=20).filter(lambda value: not set(value) & set(b"\r\n")),
)
header_lines = st.one_of(
    st.just(b"Host: x"),
    cursors.map(lambda value: b"Last-Event-ID: " + value),
    st.sampled_from(
        [
            b"Connection: Upgrade\r\nUpgrade: websocket",
            b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
            b"Connection: close",
            b"Connection: keep-alive",
            b"Expect: 100-continue",
            b"Expect: the-unexpected",
            b"Content-Length: 5",
            b"Content-Length: 0",
            b"Content-Length: -1",
            b"Content-Length: 99999999999999999999",
            b"Content-Length: x",
            b"Transfer-Encoding: chunked",
            b"Transfer-Encoding: gzip, chunked",
            b"Accept-Encoding: gzip, br",
            b"Accept: application/json",
            b"Origin: null",
            b"Origin: https://evil.example",
            b"Cookie: session=\xff; a=b; ;;=",
            b"Range: bytes=0-1",
            b"X-Forwarded-For: \xff",
            b"Folded: a\r\n b",
            b": no name",
            b"no colon",
            b"A b: c",
            b"Nul: \0",
            b"Host: y\nEvil: z",
            b"Long: " + b"x" * 65_536,
            b"\r\n".join(b"H%d: x" % number for number in range(101)),
        ]
    ),
    st.binary(max_size=30),
)
targets = st.one_of(
    st.just(b"/stream?connectKey=fuzz"),
    cursors.map(lambda value: b"/stream?connectKey=fuzz&lastEventId=" + value),
    st.sampled_from(
        [
            b"/stream",
            b"/stream?",
            b"/stream?connectKey=",
            b"/stream?connectKey=%zz&connectKey=%",
            b"/stream?connectKey=%00",
            b"/stream?connectKey=%0d%0aX:%20y",
            b"/stream?connectKey=%ff%fe",
            b"/stream?connectKey=\xff",
            b"/stream?connectKey=" + b"k" * 10_000,
            b"/stream?" + b"&".join(b"connectKey=%d" % number for number in range(500)),
            b"/stream?" + b"a&" * 3000,
            b"/stream#fragment",
            b"//stream",
            b"/stream/../stream",
            b"/%73tream?connectKey=fuzz",
            b"/\xff",
            b"*",
            b"http://x/stream?connectKey=fuzz",
            b"stream",
            b"/" + b"x" * 20_000,
        ]
    ),
    st.binary(max_size=20).map(lambda value: b"/stream?" + value),
)
methods = st.sampled_from(
    [b"GET"] * 6 + [b"HEAD", b"OPTIONS", b"POST", b"PUT", b"CONNECT", b"get", b"", b"G\0T", b"\xff"]
)
versions = st.sampled_from([b" HTTP/1.1"] * 6 + [b" HTTP/1.0", b"", b" HTTP/0.9", b" HTTP/2.0", b" HTTP/9.9", b" x"])
bodies = st.sampled_from(
    [b"", b"", b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"zz\r\n", b"\0" * 70_000, STREAM + b"\r\n"]
)


class Sent(NamedTuple):
    """Bytes that go to a server, where they are cut, and how whoever sent them leaves."""

    data: bytes
    cut: int = 0
    leave: str = "close"


requests = st.builds(
    lambda method, target, version, lines, end, body, cut, leave: Sent(
        method + b" " + target + version + b"\r\n" + b"".join(line + b"\r\n" for line in lines) + end + body, cut, leave
    ),
    *(methods, targets, versions, st.lists(header_lines, max_size=5)),
    *(st.sampled_from([b"\r\n"] * 5 + [b"", b"\n"]), bodies, st.integers(0, 300)),
    st.sampled_from(["close", "reset", "half"]),
)


class Answer(NamedTuple):
    status: int  # 0: none
    head: bytes
    body: bytes
    ended: bool


def dechunk(raw: bytes) -> bytes:
    """Give what is there of a chunked body; anything else but chunks is an error."""
    whole = b""
    while (found := re.match(rb"([0-9a-fA-F]+)\r\n", raw)) is not None:
        size, start = int(found[1], 16), found.end()
        if size == 0:
            break
        whole += raw[start : start + size]
        if len(raw) < start + size + 2:
            break
        assert raw[start + size : start + size + 2] == b"\r\n"
        raw = raw[start + size + 2 :]
    else:
        assert re.fullmatch(rb"[0-9a-fA-F]*\r?", raw), raw[:100]
    return whole


def read(client: socket.socket, *, half: bool) -> bytes:
    """Read until the answer has a beginning of its body, the server closes, or it waits for more of the request."""
    received = b""
    client.settimeout(QUIET)
    for _ in range(2):
        with contextlib.suppress(TimeoutError, ConnectionError):
            while True:
                data = client.recv(1 << 16)
                if not data:
                    return received
                received += data
                head, found, rest = received.partition(b"\r\n\r\n")
                if not found or b"100 Continue" in head:
                    continue
                if b"\n\n" in rest if b"text/event-stream" in head else rest or b"ength: 0" in head or b" 204 " in head:
                    return received
        if received or not half:
            break
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_WR)
    return received


def exchange(server: LiveServer, sent: Sent) -> Answer:
    """Send it, and take the answer to the first request in it."""
    with Raw(server.port) as raw:
        with contextlib.suppress(ConnectionError):  # refused before all of it was read
            for part in (sent.data[: sent.cut], sent.data[sent.cut :]):
                if part:
                    raw.socket.sendall(part)
        received = read(raw.socket, half=sent.leave == "half")
        if sent.leave == "reset":
            raw.reset()
    received = re.sub(rb"\AHTTP/1\.1 100 Continue\r\n(.*\r\n)*?\r\n", b"", received)
    head, found, body = received.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/"):
        # To HTTP/0.9 a server may answer a body alone, which must be no stream either.
        return Answer(0, b"", received, ended=True)
    return Answer(int(head.split(b" ", 2)[1]), head, body, ended=not found)


TRACEBACK = re.compile(r"Traceback \(most recent call last\):\n((?: .*\n)+)(.*)")
# What pywsgi itself logs of requests that it refuses, and of those who leave before they have said what they want.
ITS_OWN = ("http.client.HTTPException: got more than", "ConnectionResetError:", "BrokenPipeError:")
OURS = (f"{ROOT}/flask_sse_stream/", f"{ROOT}/tests/live/live_app.py", "/site-packages/flask/")


@pytest.fixture
def server(running: LiveServer) -> Iterator[LiveServer]:
    """The running server; no traceback may be in its log but those of its own reading of bad requests."""
    yield running
    check_log(running)


def check_log(server: LiveServer) -> None:
    found = TRACEBACK.findall(server.log)
    ours = [error for frames, error in found if not error.startswith(ITS_OWN) or any(place in frames for place in OURS)]
    # Tests of other files count all of them.
    server.tracebacks += len(found) - len(ours) - server.refused
    server.refused = len(found) - len(ours)
    assert len(ours) == server.tracebacks - server.refused, server.log[-5000:]


def check(server: LiveServer, sent: Sent) -> None:
    answer = exchange(server, sent)
    assert answer.status not in (500, 502, 503), (sent, answer)
    check_log(server)
    if answer.status != 200 or b"text/event-stream" not in answer.head:
        return
    raw = answer.body
    body = dechunk(raw) if b"transfer-encoding: chunked" in answer.head.lower() else raw
    if not sent.data.startswith(b"HEAD"):
        assert body.startswith((b"retry: ", b": ", b"event: ", b"id: ")), (sent, answer)
    for event in EventDecoder().feed(body):
        assert event.event in (None, "stream-reset"), (sent, event)


@settings(
    max_examples=EXAMPLES or 25,
    derandomize=not EXAMPLES,  # those of the suite are the same each time
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(sent=requests)
@example(Sent(STREAM + b"Last-Event-ID: a\r\nLast-Event-ID: b\r\n\r\n"))
@example(Sent(STREAM + b"Last-Event-ID: " + b"y" * 60_000 + b"\r\n\r\n"))
@example(Sent(STREAM + b"Last-Event-ID: \xff\xfe\r\n\r\n", leave="reset"))
@example(Sent(b"GET /stream?connectKey=\xff%zz HTTP/1.1\r\nHost: x\r\n\r\n"))
@pytest.mark.timeout(120 + 2 * EXAMPLES)
def test_no_request_at_all_breaks_a_server_or_leaves_a_stream(server: LiveServer, sent: Sent) -> None:
    check(server, sent)


def test_after_all_that_no_stream_is_left_and_the_next_one_is_served(server: LiveServer, key: str) -> None:
    for data in (STREAM + b"Last-Event-ID: \xff\r\n\r\n", b"\0\0\r\n\r\n", b"GET /stream HTTP/1.1\r\nHost"):
        check(server, Sent(data))
    server.wait_for_count("fuzz", 0)
    server.wait_for_count("default", 0)
    with server.listen(key) as client:
        server.publish(key, "still here")
        client.wait_for_data("still here")


@pytest.mark.parametrize(
    ("lines", "body"),
    [
        ([b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"], b""),
        ([b"Expect: 100-continue"], b""),
        ([b"Expect: 100-continue", b"Content-Length: 5"], b"hello"),
        ([b"Content-Length: 5"], b"hello"),
        ([b"Transfer-Encoding: chunked"], b"5\r\nhello\r\n0\r\n\r\n"),
        ([], STREAM + b"\r\n"),
    ],
    ids=["upgrade", "expect", "expect-body", "body", "chunked-body", "pipelined"],
)
def test_a_stream_is_the_same_whatever_else_the_request_asks_for(
    lines: list[bytes], body: bytes, server: LiveServer, key: str
) -> None:
    with server.raw() as client:
        head = [f"GET /stream?connectKey={key} HTTP/1.1".encode(), b"Host: x", *lines, b"", b""]
        client.socket.sendall(b"\r\n".join(head) + body)
        client.read_until(b"text/event-stream", b"retry: ")
        server.publish(key, "an event")
        client.read_until(b"data: an event\n")
        assert b"HTTP/1.1 200" in client.received
        assert client.received.count(b"data: an event") == 1
        assert client.received.count(b"text/event-stream") == 1, "it answered what came behind the request"
        client.leave()
    server.wait_for_count(key, 0)
    server.wait_for_count("fuzz", 0)


def test_a_websocket_is_refused_and_registers_nothing(server: LiveServer, key: str) -> None:
    with server.raw() as client:
        client.request(f"/stream?connectKey={key}", b"Connection: Upgrade", b"Upgrade: websocket")
        assert client.status == 400
    assert server.count(key) == 0


def test_http_0_9_gets_no_stream_or_one_that_ends_with_its_client(server: LiveServer, key: str) -> None:
    with server.raw() as client:
        client.socket.sendall(f"GET /stream?connectKey={key}\r\n\r\n".encode())
        client.received = read(client.socket, half=True)
        assert b" 500 " not in client.received
    server.wait_for_count(key, 0)


@pytest.mark.parametrize(
    "lines",
    [[b"Last-Event-ID: " + b"y" * 65_536], [b"H%d: x" % number for number in range(101)], [b"x" * 65_536]],
    ids=["65-kilobytes", "101-headers", "no-header"],
)
def test_headers_beyond_the_servers_limits_are_refused_or_served_and_leave_nothing(
    lines: list[bytes], server: LiveServer, key: str
) -> None:
    data = b"\r\n".join([f"GET /stream?connectKey={key} HTTP/1.1".encode(), b"Host: x", *lines, b"", b""])
    answer = exchange(server, Sent(data))
    # A refusal may be lost where the server closes with much unread (RST).
    assert answer.status in (0, 200, 400, 413, 414, 431), answer
    check(server, Sent(data))
    server.wait_for_count(key, 0)


def test_headers_that_never_end_register_no_stream_and_keep_nobody_else_waiting(server: LiveServer, key: str) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(server.raw()) for _ in range(20)]
        for client in slow:
            client.socket.sendall(f"GET /stream?connectKey={key} HTTP/1.1\r\nHost: x\r\nX: ".encode())
        for _ in range(3):
            for client in slow:
                client.socket.sendall(b"y")
            assert server.count(key) == 0
        with server.listen(key) as client:
            server.publish(key, "beside them")
            client.wait_for_data("beside them")
        # One that ends its request after all is served like any other.
        slow[0].socket.sendall(b"\r\n\r\n")
        slow[0].read_until(b"retry: ")
        server.wait_for_count(key, 1)
    server.wait_for_count(key, 0)
