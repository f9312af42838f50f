"""What each supported server lets one know of the client's socket.

The names under which servers publish it differ and are no part of WSGI; whatever is not recognised means that
there is no socket to be had, never an error. Measured with gevent 26.9, gunicorn 27.0 and werkzeug 3.1.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from typing import Any, Final

__all__ = ["client_socket", "cut", "tune"]

# gunicorn's gevent_pywsgi worker says "sock", its other workers "socket".
_KEYS: Final = ("gunicorn.socket", "gunicorn.sock", "werkzeug.socket")


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
