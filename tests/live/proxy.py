"""A TCP proxy that a test can cut: what a mobile network does to a browser's connections."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from types import TracebackType


class Proxy:
    """Forwards every connection to ``port`` until :meth:`cut`, which resets all, and new ones until :meth:`mend`."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._swallowing: list[threading.Event] = []
        self._is_cut = False
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Proxy:  # noqa: PYI034  Self is of Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # wakes the thread that accepts
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with self._lock:
                    if self._is_cut:
                        _reset(client)
                        continue
                    server = socket.create_connection(("127.0.0.1", self._port))
                    self._open += [client, server]
                swallowing = threading.Event()
                self._swallowing.append(swallowing)
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=_forward, args=(source, target, swallowing), daemon=True).start()

    def cut(self) -> None:
        """Reset every connection, on both sides."""
        with self._lock:
            self._is_cut = True
            for end in self._open:
                _reset(end)
            self._open.clear()

    def swallow(self) -> None:
        """Keep every connection, and let nothing more through: what becomes of them when a router forgets them."""
        with self._lock:
            for connection in self._swallowing:
                connection.set()

    def mend(self) -> None:
        """Let clients through again."""
        with self._lock:
            self._is_cut = False


def _forward(source: socket.socket, target: socket.socket, swallowing: threading.Event) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            if not swallowing.is_set():
                target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.shutdown(socket.SHUT_RD)  # a thread in recv would otherwise keep the connection alive
    end.close()
