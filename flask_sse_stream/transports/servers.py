"""What each supported server lets one know of the client's socket.

The names under which servers publish it differ and are no part of WSGI; whatever is not recognised means that
there is no socket to be had, never an error. Measured with gevent 26.9, gunicorn 27.0 and werkzeug 3.1.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

__all__ = ["client_socket", "cut", "give_up", "tune"]

# gunicorn's gevent_pywsgi worker says "sock", its other workers "socket".
_KEYS: Final = ("gunicorn.socket", "gunicorn.sock", "werkzeug.socket")


def give_up(write: Any) -> tuple[Any, Callable[[], None]] | None:
    """Say whether the server that returned ``write`` from ``start_response`` can give up its socket.

    If so, give the socket, and what to call once the head and the first bytes were written by ``write``: from then on
    the server writes no end of the response, and its own descriptor is closed when the application returns. Else
    ``None``: a server that is not known exactly, a wrapped ``write``, TLS, HTTP/1.0, HTTP/2.

    Read in gevent 23.9 to 26.9 and gunicorn 21.2 to 27.0, and shown by tests.
    """
    handler: Any = getattr(write, "__self__", None)
    kind = type(handler)
    if getattr(write, "__func__", None) is not getattr(kind, "write", None):
        return None
    gevent_socket = sys.modules.get("gevent.socket")
    if gevent_socket is None:
        return None
    if _is(kind, "gevent.pywsgi", "WSGIHandler") or _is(kind, "gunicorn.workers.ggevent", "PyWSGIHandler"):
        client = getattr(handler, "socket", None)
        fits = handler.request_version == "HTTP/1.1" and not handler.headers_sent

        def let_go() -> None:
            handler.response_use_chunked = False
            handler.close_connection = True

    elif _is(kind, "gunicorn.http.wsgi", "Response"):
        client = handler.sock
        fits = handler.chunked and not handler.headers_sent

        def let_go() -> None:
            handler.chunked = False
            handler.force_close()

    else:
        return None
    # Not a subclass: TLS is one.
    return (client, let_go) if fits and type(client) is gevent_socket.socket else None


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


def cut(client: Any) -> None:
    """End a connection from outside; a server's thread that hangs in a write to it gets ``EPIPE``."""
    with contextlib.suppress(OSError):
        # gevent's own shutdown is for its hub's thread alone, and raises EBADF in the greenlet that writes, which
        # pywsgi logs as an application's error. The socket beneath it can be shut down from anywhere.
        getattr(client, "_sock", client).shutdown(socket.SHUT_RDWR)
