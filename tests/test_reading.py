"""Reading one HTTP response, however its bytes are cut."""

from __future__ import annotations

import pytest

from flask_sse_stream.reading import Request, ResponseError, ResponseReader

CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
def test_a_body_in_chunks_is_joined_however_it_is_cut(size: int) -> None:
    data = CHUNKED + b"5\r\nhello\r\n6;x=y\r\n world\r\n1\r\n\r\r\n0\r\n\r\n"
    reader = ResponseReader()
    body = b"".join(reader.feed(data[start : start + size]) for start in range(0, len(data), size))
    assert (reader.status, reader.headers["content-type"], body) == (200, "text/event-stream", b"hello world\r")
    assert reader.ended


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_a_body_that_ends_with_its_connection_is_given_as_it_is(size: int) -> None:
    data = b"HTTP/1.0 200 OK\r\n\r\nretry: 1\n\n"
    reader = ResponseReader()
    body = b"".join(reader.feed(data[start : start + size]) for start in range(0, len(data), size))
    assert (body, reader.ended) == (b"retry: 1\n\n", False)


@pytest.mark.parametrize(
    "data",
    [b"SSH-2.0-OpenSSH\r\n", b"HTTP/2 200\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1\r\n\r\n", CHUNKED + b"x\r\n"],
)
def test_what_is_no_response_is_an_error_that_shows_it(data: bytes) -> None:
    with pytest.raises(ResponseError):
        ResponseReader().feed(data)


def test_a_request_asks_for_what_the_url_names() -> None:
    request = Request("https://user@example.org:8443/stream?connectKey=a", {"Last-Event-ID": "7"})
    assert (request.secure, request.host, request.port) == (True, "example.org", 8443)
    assert request.data.startswith(b"GET /stream?connectKey=a HTTP/1.1\r\nHost: example.org:8443\r\n")
    assert b"\r\nLast-Event-ID: 7\r\n" in request.data
    for bad in ("ftp://x/", "http://", "x"):
        with pytest.raises(ValueError, match="is no URL such as"):
            Request(bad)
    with pytest.raises(ValueError, match="one line each"):
        Request("http://x/", {"A": "b\r\nC: d"})
