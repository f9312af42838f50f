"""What each supported server lets one know of the client's socket.

The names under which servers publish it differ and are no part of WSGI; whatever is not recognised means that
there is no socket to be had, never an error. Measured with gevent 26.9, gunicorn 27.0 and werkzeug 3.1.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from ..stream import CloseReason

__all__ = ["GivenUp", "PeerWatch", "client_socket", "cut", "give_up", "in_one_piece", "limit_silence", "tune"]

_TCP_CORK: Final = getattr(socket, "TCP_CORK", 3)
_TCP_USER_TIMEOUT: Final = getattr(socket, "TCP_USER_TIMEOUT", 18)
_TCP_ESTABLISHED: Final = 1
# Of struct tcp_info (linux/tcp.h), which only ever grows at its end: tcpi_state, tcpi_unacked, tcpi_last_ack_recv.
_TCP_INFO_HEAD: Final = struct.Struct("=B23xI28xI")
_LOOK_SECONDS: Final = 1.0
# gunicorn's gevent_pywsgi worker says "sock", its other workers "socket".
_KEYS: Final = ("gunicorn.socket", "gunicorn.sock", "werkzeug.socket")


class GivenUp(NamedTuple):
    """A socket that a server can give up, once the head and the first bytes of the response were written."""

    client: Any
    handler: Any
    chunked: str  # the attribute of the handler by which it remembers to end the body
    shuts_down: bool  # whether the server may shut the connection down, and not only close its descriptor

    def let_go(self) -> None:
        """From here on the server writes no end of the response, and nothing it does reaches the connection.

        For whoever has a duplicate of the descriptor.
        """
        setattr(self.handler, self.chunked, False)
        if self.shuts_down:
            # Its number stands for a socket that is connected to nobody, as for one whose client has left: a
            # descriptor of -1, which detach() would leave, gunicorn's gthread takes for an error of its own, and
            # counts the connection twice.
            os.set_blocking(self.client.fileno(), False)  # and with it every duplicate
            os.dup2(_nobody(), self.client.fileno(), inheritable=False)


@functools.cache
def _nobody() -> int:
    return socket.socket(socket.AF_UNIX).detach()


def give_up(environ: Mapping[str, Any], write: Any, socket_type: type) -> GivenUp | None:
    """Say whether the server that returned ``write`` from ``start_response`` can give up its socket, and prepare it.

    ``socket_type`` is what the sockets are that can be served here. ``None``: a server that is not known exactly, a
    wrapped ``write``, TLS, HTTP/1.0, HTTP/2, a request with a body, of which something may be unread, or a system
    that has no epoll. Read in gevent 23.9 to 26.9 and gunicorn 21.2 to 27.0, and shown by tests.
    """
    handler: Any = getattr(write, "__self__", None)
    kind = type(handler)
    if getattr(write, "__func__", None) is not getattr(kind, "write", None):
        return None
    if environ.get("CONTENT_LENGTH", "") not in ("", "0") or "HTTP_TRANSFER_ENCODING" in environ:
        return None
    if _is(kind, "gevent.pywsgi", "WSGIHandler") or _is(kind, "gunicorn.workers.ggevent", "PyWSGIHandler"):
        found = GivenUp(getattr(handler, "socket", None), handler, "response_use_chunked", shuts_down=False)
        plain = handler.request_version == "HTTP/1.1" and type(handler.response_headers) is list
        fits = plain and not handler.headers_sent
    elif _is(kind, "gunicorn.http.wsgi", "Response"):
        # The workers with threads shut a connection down, gevent's do not: its loop may watch the descriptor still.
        in_gevent = _is(socket_type, "gevent.socket", "socket")
        if in_gevent and "gunicorn.workers.ggevent" not in sys.modules:
            return None
        found = GivenUp(handler.sock, handler, "chunked", shuts_down=not in_gevent)
        fits = handler.chunked and not handler.headers_sent
    else:
        return None
    # Not a subclass of a socket: TLS is one.
    if not fits or type(found.client) is not socket_type or sys.platform != "linux":
        return None
    if found.shuts_down:
        try:
            _nobody()
        except OSError:  # out of descriptors
            return None
    if found.chunked == "chunked":
        handler.force_close()  # before the head, which says so then
    else:
        handler.close_connection = True
        # A client that keeps connections must not send its next request over one that is about to be closed.
        handler.response_headers.append((b"Connection", b"close"))
    return found


def _is(kind: type, module: str, name: str) -> bool:
    """Whether this is exactly that class, if its module was imported at all."""
    return kind is getattr(sys.modules.get(module), name, None)


def client_socket(environ: Mapping[str, Any]) -> Any:
    """Give the socket of this request's client (a standard or gevent one, or TLS on top), or ``None``."""
    # One HTTP/2 connection carries many requests: its socket is none of ours.
    if not str(environ.get("SERVER_PROTOCOL", "")).startswith("HTTP/1."):
        return None
    for key in _KEYS:
        if environ.get(key) is not None:
            return environ[key] if hasattr(environ[key], "setsockopt") else None
    # pywsgi publishes no key; its input object reads from a file that was made from the socket.
    raw = getattr(getattr(environ.get("wsgi.input"), "rfile", None), "raw", None)
    found = getattr(raw, "_sock", None)
    return found if hasattr(found, "setsockopt") else None


def tune(client: Any, send_buffer: int) -> None:
    """Set a stream's socket up: small writes leave at once, and a reader that froze cannot fill megabytes.

    Without a bounded ``SO_SNDBUF`` the kernel takes about 3.9 MB for a client that never reads.
    """
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer),
    ):
        with contextlib.suppress(OSError):  # a Unix socket behind a proxy has no TCP options
            client.setsockopt(level, option, value)


def limit_silence(client: Any, seconds: float) -> None:
    """Have the kernel end a connection whose peer acknowledges nothing for so long.

    Not where a server writes, which may report the error as an application's.
    """
    with contextlib.suppress(OSError):
        client.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, round(seconds * 1000))


class PeerWatch:
    """Asks the kernel what has become of a client to which a server writes.

    A write says nothing of it: the kernel takes bytes for a client that has left, or that no packet reaches any more,
    until its buffer is full. ``patience`` is how many seconds what was sent may stay unacknowledged, and ``interval``
    between two times that it is asked, at most a second.
    """

    __slots__ = ("_client", "_interval", "_next", "_patience", "_silent_since")

    def __init__(self, client: Any, patience: float, interval: float) -> None:
        self._client = client
        self._patience = patience
        self._interval = min(interval or _LOOK_SECONDS, _LOOK_SECONDS)
        self._next = 0.0
        self._silent_since: float | None = None

    def verdict(self) -> CloseReason | None:
        """Say why the stream is over, before something is written to it; ``None``: it is not, for all that is known."""
        now = time.monotonic()
        if now < self._next or sys.platform != "linux":
            return None
        self._next = now + self._interval
        try:
            info = self._client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_HEAD.size)
            state, unacknowledged, since_ack = _TCP_INFO_HEAD.unpack(info)
        except (
            AttributeError,
            OSError,
            struct.error,
        ):  # a Unix socket, or a server's own kind of one
            return None
        if state != _TCP_ESTABLISHED:
            return CloseReason.PEER  # It has closed its side at least: a client of a stream has nothing more to say.
        if not unacknowledged:
            self._silent_since = None
        elif self._silent_since is None or now - since_ack / 1000 > self._silent_since:
            self._silent_since = now
        elif now - self._silent_since > self._patience:
            return CloseReason.STALLED
        return None


@contextlib.contextmanager
def in_one_piece(client: Any) -> Iterator[None]:
    """Have leave together what is written meanwhile, a response's head and its first bytes: servers send them apart.

    It spares both sides the other packet. And a client whose connection is reset between the two would have fired
    ``open`` and not know from where to go on.
    """
    try:
        client.setsockopt(socket.IPPROTO_TCP, _TCP_CORK, 1)
    except OSError:  # a Unix socket
        yield
        return
    yield
    client.setsockopt(socket.IPPROTO_TCP, _TCP_CORK, 0)


def cut(client: Any, how: int = socket.SHUT_RDWR) -> None:
    """End a connection from outside; a server's thread that hangs in a write to it gets ``EPIPE``."""
    with contextlib.suppress(OSError):
        # gevent's own shutdown is for its hub's thread alone, and raises EBADF in the greenlet that writes, which
        # pywsgi logs as an application's error. The socket beneath it can be shut down from anywhere.
        getattr(client, "_sock", client).shutdown(how)
