"""A client's side of one HTTP response: bytes in, body out.

For the tools that look at somebody's endpoint from outside. It knows of HTTP/1.1 what a stream needs; it owns no
socket, so that one loop may read a thousand of them.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from typing import Final
from urllib.parse import urlsplit

from .errors import SSEError

__all__ = ["Request", "ResponseError", "ResponseReader", "Streaming"]

_LONGEST_HEAD: Final = 64 * 1024


class ResponseError(SSEError):
    """What came is no answer to go on with; says what it was."""


class Request:
    """A GET of one URL, in bytes. Raises :class:`ValueError` for a URL of another kind than http and https."""

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no URL such as http://127.0.0.1:8000/stream?connectKey=news")
        self.secure: bool = parts.scheme == "https"
        self.host: str = parts.hostname
        self.port: int = parts.port or (443 if self.secure else 80)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        fields = {
            "Host": parts.netloc.rpartition("@")[2],
            "Accept": "text/event-stream",
            # As browsers do: what is compressed on the way is held back.
            "Accept-Encoding": "gzip, deflate",
            "Cache-Control": "no-cache",
            "User-Agent": "flask_sse_stream",
            **(headers or {}),
        }
        lines = [f"GET {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        if any("\r" in line or "\n" in line or not line.isascii() for line in lines):
            raise ValueError("the URL and the headers must be ASCII on one line each: escape what is not")
        self.data: bytes = ("\r\n".join(lines) + "\r\n\r\n").encode()

    def connect(self, timeout: float) -> socket.socket:
        """Connect and send it. Raises :class:`OSError`."""
        client = socket.create_connection((self.host, self.port), timeout)
        try:
            if self.secure:
                client = ssl.create_default_context().wrap_socket(client, server_hostname=self.host)
            client.sendall(self.data)
        except BaseException:
            client.close()
            raise
        return client


class ResponseReader:
    """Takes bytes as they come. ``status`` and ``headers`` (lower case) are there when the head is: 0 before."""

    def __init__(self) -> None:
        self.status: int = 0
        self.headers: dict[str, str] = {}
        self.ended: bool = False
        self._rest = b""
        self._chunked = False
        self._left = 0  # of the current chunk

    def feed(self, data: bytes) -> bytes:
        """Give the next bytes of the body. Raises :class:`ResponseError` for what is no HTTP response."""
        self._rest += data
        if not self.status and not self._take_head():
            return b""
        if not self._chunked:
            body, self._rest = self._rest, b""
            return body
        pieces = []
        while self._rest and not self.ended:
            if self._left:
                piece = self._rest[: self._left]
                self._rest = self._rest[len(piece) :]
                self._left -= len(piece)
                pieces.append(piece)
                continue
            line, found, rest = self._rest.removeprefix(b"\r\n").partition(b"\r\n")
            if not found or self._rest in (b"\r", b"\r\n"):
                break
            try:
                self._left = int(line.partition(b";")[0], 16)
            except ValueError:
                raise ResponseError(f"the body is not in chunks, as its head says: {line[:40]!r}") from None
            self._rest = rest
            self.ended = self._left == 0
        return b"".join(pieces)

    def _take_head(self) -> bool:
        head, found, rest = self._rest.partition(b"\r\n\r\n")
        if not found:
            if len(self._rest) > _LONGEST_HEAD or not b"HTTP/1.".startswith(self._rest[:7]):
                raise ResponseError(f"this is no HTTP/1.1 response: {self._rest[:40]!r}")
            return False
        first, *lines = head.decode("latin-1").split("\r\n")
        words = first.split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdecimal():
            raise ResponseError(f"this is no HTTP/1.1 response: {first[:40]!r}")
        self.status = int(words[1])
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        self._chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        self._rest = rest
        return True


class Streaming:
    """One response that is read as it comes, in one thread.

    Raises :class:`ResponseError` for what is no HTTP response, and :class:`OSError`.
    """

    def __init__(self, request: Request, timeout: float) -> None:
        self._socket = request.connect(timeout)
        self._reader = ResponseReader()
        self._begin = b""

    def head(self, timeout: float) -> tuple[int, dict[str, str]]:
        """Wait for the head. Raises :class:`TimeoutError`."""
        deadline = time.monotonic() + timeout
        while not self._reader.status:
            self._begin += self._receive(deadline)
        return self._reader.status, self._reader.headers

    def read(self, timeout: float) -> bytes | None:
        """Give what came within so many seconds, ``b""`` for nothing, ``None`` at the end."""
        if self._begin:
            begin, self._begin = self._begin, b""
            return begin
        if self._reader.ended:
            return None
        try:
            return self._receive(time.monotonic() + timeout)
        except TimeoutError:
            return b""
        except EOFError:
            return None

    def bodies(self, timeout: float) -> Iterator[bytes]:
        """Give what comes, ``b""`` after each so many seconds without anything, until the end."""
        while (data := self.read(timeout)) is not None:
            yield data

    def _receive(self, deadline: float) -> bytes:
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        data = self._socket.recv(65536)
        if not data:
            if not self._reader.status:
                raise ResponseError("the connection was closed before there was an answer")
            raise EOFError
        return self._reader.feed(data)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()
