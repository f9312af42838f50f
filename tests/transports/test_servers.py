"""What the kernel says of a client to which a server writes."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest
from support import drop_what_comes, wait_for

from flask_sse_stream.stream import CloseReason
from flask_sse_stream.transports.servers import PeerWatch


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A server's end of a connection, and its client's."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        with server:
            yield server, client


def test_a_client_that_reads_or_just_waits_is_there(pair: tuple[socket.socket, socket.socket]) -> None:
    server, client = pair
    watch = PeerWatch(server, 0.05, 0.001)
    for _ in range(20):
        server.sendall(b"x")
        assert client.recv(1) == b"x"
        time.sleep(0.01)
        assert watch.verdict() is None


def test_a_client_that_takes_nothing_more_but_answers_is_there(pair: tuple[socket.socket, socket.socket]) -> None:
    server, _ = pair
    server.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            server.send(bytes(65536))
    watch = PeerWatch(server, 0.05, 0.001)
    assert watch.verdict() is None


@pytest.mark.parametrize("how", ["closes", "shuts its side", "resets"])
def test_a_client_that_left_is_seen_before_anything_is_written_to_it(
    how: str, pair: tuple[socket.socket, socket.socket]
) -> None:
    server, client = pair
    watch = PeerWatch(server, 30, 0.001)
    if how == "shuts its side":
        client.shutdown(socket.SHUT_WR)
    else:
        if how == "resets":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
    assert wait_for(watch.verdict, "it is seen") is CloseReason.PEER


def test_a_client_that_acknowledges_nothing_is_stalled(pair: tuple[socket.socket, socket.socket]) -> None:
    server, client = pair
    watch = PeerWatch(server, 0.2, 0.001)
    server.sendall(b"x")
    assert client.recv(1) == b"x"
    assert watch.verdict() is None
    drop_what_comes(client)
    server.sendall(b"x")
    began = time.monotonic()
    assert wait_for(watch.verdict, "it is noticed") is CloseReason.STALLED
    assert time.monotonic() - began > 0.2


def test_where_the_kernel_is_asked_rarely_it_is_asked_rarely(pair: tuple[socket.socket, socket.socket]) -> None:
    server, client = pair
    watch = PeerWatch(server, 30, 3600)
    assert watch.verdict() is None
    client.close()
    wait_for(lambda: PeerWatch(server, 30, 0).verdict(), "another one sees it")
    assert watch.verdict() is None


def test_a_socket_that_is_none_of_tcps_says_nothing() -> None:
    server, client = socket.socketpair()
    client.close()
    assert PeerWatch(server, 0.0, 0.001).verdict() is None
    assert PeerWatch(object(), 0.0, 0.001).verdict() is None
    server.close()
