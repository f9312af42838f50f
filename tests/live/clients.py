"""Clients for the live suite: httpx-sse and curl as they are, and bare sockets for what no client would send."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import subprocess
import threading
import time
from types import TracebackType
from typing import Any

import httpx
from httpx_sse import ServerSentEvent, connect_sse
from support import wait_for

DEADLINE = 20.0  # for what takes milliseconds, on a machine that is busy with much else


class Listener:
    """httpx-sse in a thread of its own; what it got is in ``events``."""

    def __init__(self, url: str, *, method: str = "GET", **request: Any) -> None:
        self.events: list[ServerSentEvent] = []
        self.response: httpx.Response | None = None
        self.ended = threading.Event()
        self.error: Exception | None = None
        self._url, self._method, self._request = url, method, request
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            with (
                httpx.Client(timeout=30, trust_env=False) as client,
                connect_sse(client, self._method, self._url, **self._request) as source,
            ):
                self.response = source.response
                if source.response.status_code != 200:
                    source.response.read()
                    return
                for event in source.iter_sse():
                    # Once it has seen an id, httpx-sse 0.4 gives an event for every block, also for a lone comment
                    # or retry. By the standard, nothing is dispatched without data.
                    if event.data or event.event != "message":
                        self.events.append(event)
        except httpx.HTTPError as error:
            self.error = error
        finally:
            self.ended.set()

    def __enter__(self) -> Listener:  # noqa: PYI034  Self is of Python 3.11
        self._thread.start()
        wait_for(lambda: self.response or self.ended.is_set(), f"a response to {self._url}", DEADLINE)
        if self.response is None:
            raise AssertionError(f"no response to {self._url}: {self.error!r}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.leave()

    def leave(self) -> None:
        """Hang up, as a closed browser tab does."""
        assert self.response is not None
        stream = self.response.extensions["network_stream"]
        with contextlib.suppress(OSError):
            stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()

    @property
    def headers(self) -> httpx.Headers:
        assert self.response is not None
        return self.response.headers

    @property
    def status(self) -> int:
        assert self.response is not None
        return self.response.status_code

    @property
    def data(self) -> list[str]:
        return [event.data for event in self.events]

    def wait_for_data(self, *expected: str) -> None:
        """Wait until as many events came as are expected, and compare them."""
        wait_for(lambda: len(self.events) >= len(expected) or self.ended.is_set(), f"{expected}", DEADLINE)
        assert self.data == list(expected)

    def wait_for_end(self) -> None:
        wait_for(self.ended.is_set, "the stream ends", DEADLINE)


class Raw:
    """A socket and the bytes that came from it. For requests that no client sends, and for ways to leave."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)
        self.received = b""

    def __enter__(self) -> Raw:  # noqa: PYI034  Self is of Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.socket.close()

    def request(self, target: str, *headers: bytes, method: str = "GET", version: str = "HTTP/1.1") -> Raw:
        """Send a request; ``headers`` are lines as they are."""
        lines = [f"{method} {target} {version}".encode(), b"Host: localhost", *headers, b"", b""]
        self.socket.sendall(b"\r\n".join(lines))
        return self

    def read_until(self, *wanted: bytes) -> bytes:
        """Read until all of ``wanted`` came; give everything that came so far."""
        deadline = time.monotonic() + DEADLINE
        while not all(part in self.received for part in wanted):
            if time.monotonic() > deadline:  # heartbeats keep coming
                raise AssertionError(f"no {wanted!r} in {self.received!r:.3000}")
            self.read_more(f"no {wanted!r}")
        return self.received

    def read_more(self, complaint: str = "no more") -> None:
        """Read what comes next; fail if that takes too long or is the end."""
        try:
            data = self.socket.recv(65536)
        except TimeoutError:
            data = b""
        if not data:
            raise AssertionError(f"{complaint} in {self.received!r:.3000}")
        self.received += data

    def read_all(self) -> bytes:
        """Read until the server closes."""
        while data := self.socket.recv(65536):
            self.received += data
        return self.received

    @property
    def status(self) -> int:
        return int(self.read_until(b"\r\n").split(b" ", 2)[1])

    @property
    def head(self) -> bytes:
        return self.read_until(b"\r\n\r\n").partition(b"\r\n\r\n")[0]

    def leave(self) -> None:
        """Close as most do: what was received is read, so that the kernel sends FIN."""
        self.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while self.socket.recv(65536):
                pass
        self.socket.close()

    def reset(self) -> None:
        """Close with RST, as a client that crashed with unread bytes does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


class Curl:
    """``curl --no-buffer`` on one URL; what it printed is in ``output``."""

    def __init__(self, url: str, *options: str) -> None:
        self.process = subprocess.Popen(
            ["curl", "--silent", "--show-error", "--no-buffer", "--noproxy", "*", *options, url],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.output = b""
        self._thread = threading.Thread(target=self._read, daemon=True)

    def _read(self) -> None:
        assert self.process.stdout is not None
        while data := self.process.stdout.read1(65536):  # type: ignore[attr-defined]
            self.output += data

    def __enter__(self) -> Curl:  # noqa: PYI034  Self is of Python 3.11
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        self._thread.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def wait_for(self, *wanted: bytes) -> bytes:
        wait_for(lambda: all(part in self.output for part in wanted), f"curl prints {wanted!r}", DEADLINE)
        return self.output

    def wait_for_end(self) -> bytes:
        """Give everything that curl printed until the server ended the response as it should."""
        assert self.process.wait(DEADLINE) == 0, self.output
        self._thread.join()
        return self.output


def reset_reason(data: str) -> str:
    """Give the reason that a ``stream-reset`` tells."""
    return str(json.loads(data)["reason"])
