"""Measures somebody's own endpoint: so many clients, each opened once and held, and what they get.

One thread and one epoll. Nobody reconnects, so there are never more connections than were asked for; what a server ends
is counted. Figures are those of a client in Python on the machine where this runs: how busy it was is one of them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from .errors import EventError, SettingsError
from .event import EventDecoder
from .reading import Request, ResponseError, ResponseReader
from .serving import raise_descriptors

__all__ = ["Bench", "Figures"]

_PENDING: Final = 100  # connections that were begun and not answered yet
_SPARE: Final = 32  # descriptors
_TICK: Final = 0.05
_LAST_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Figures:
    """What came of it. Times are seconds; those of the first byte begin with the connection."""

    asked: int
    opened: int
    failed: Mapping[str, int]  #: why, and how often
    dropped: int  #: streams that the server has ended, or that broke
    opening_seconds: float
    opened_per_second: float
    first_byte_median: float
    first_byte_p99: float
    first_byte_max: float
    listened_seconds: float
    events: int  #: also those that came while others were being opened
    events_per_second: float  #: afterwards
    heartbeats: int
    bytes: int
    client_busy_percent: float  #: of one core; near 100, it is this client that was measured

    @property
    def ok(self) -> bool:
        """Whether every client was answered and kept."""
        return not self.failed and not self.dropped


class _Client:
    __slots__ = ("began", "decoder", "first", "reader", "sent", "socket")

    def __init__(self, client: socket.socket) -> None:
        self.socket = client
        self.began = time.monotonic()
        self.first = 0.0  # when the first byte of the stream came
        self.sent = False
        self.reader = ResponseReader()
        self.decoder = EventDecoder(comments=True)


class Bench:
    """``clients`` of the stream at ``url``, at most ``rate`` new ones a second, each given ``timeout`` to be answered.

    Raises :class:`ValueError` for a URL that it cannot measure, and :class:`~flask_sse_stream.SettingsError` where this
    process may not have so many open files. Close it in the end.
    """

    def __init__(
        self,
        url: str,
        clients: int,
        *,
        rate: float = 500.0,
        timeout: float = 30.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._request = Request(url, {"Accept-Encoding": "identity", **(headers or {})})
        if self._request.secure:
            raise ValueError(f"{url!r}: bench speaks http alone; name the address of the application behind the TLS")
        files = raise_descriptors()
        if clients > files - _SPARE:
            raise SettingsError(
                f"{clients} clients need {clients + _SPARE} open files, and {files} are allowed here: ulimit -n "
                f"{clients + _SPARE}, or fewer --clients"
            )
        try:
            found = socket.getaddrinfo(self._request.host, self._request.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ValueError(f"{url!r}: there is no host {self._request.host!r} ({error})") from error
        self._family: int = found[0][0]
        self._address: Any = found[0][4]
        self._asked, self._rate, self._timeout = clients, rate, timeout
        self._epoll = select.epoll()
        self._clients: dict[int, _Client] = {}
        self._pending: dict[int, _Client] = {}
        self._firsts: list[float] = []
        self._failed: Counter[str] = Counter()
        self._begun = self._dropped = self._events = self._heartbeats = self._bytes = 0
        self._events_before = 0
        self._opening = self._listening = 0.0
        self.stopped: bool = False
        self._busy = time.process_time()
        self._since = time.monotonic()

    def open(self) -> Iterator[int]:
        """Open all of them; give, again and again, how many more were answered or given up."""
        began = time.monotonic()
        told = 0
        while told < self._asked and not self.stopped:
            now = time.monotonic()
            due = min(self._asked, int((now - began) * self._rate) + 1)
            while self._begun < due and len(self._pending) < _PENDING:
                self._begin()
            self._look()
            for client in [client for client in self._pending.values() if now - client.began > self._timeout]:
                self._give_up(client, f"no answer within {self._timeout:g} s")
            settled = self._begun - len(self._pending)
            yield settled - told
            told = settled
        self._opening = time.monotonic() - began
        self._events_before = self._events

    def listen(self, seconds: float) -> Iterator[float]:
        """Hold them for so long, or until none is left; give, again and again, how many more seconds are over."""
        began = told = time.monotonic()
        while self._clients and (now := time.monotonic()) - began < seconds and not self.stopped:
            self._look()
            self._listening = now - began
            yield now - told
            told = now
        while self._look(0) and time.monotonic() - began < seconds + _LAST_SECONDS:
            pass  # what had come by then
        self._listening = time.monotonic() - began

    def stop(self) -> None:
        """End it early. From a signal handler, too."""
        self.stopped = True

    def close(self) -> None:
        """Hang up."""
        for client in self._clients.values():
            client.socket.close()
        self._clients.clear()
        self._epoll.close()

    def figures(self) -> Figures:
        """Say what came of it so far."""
        firsts = sorted(self._firsts) or [0.0]
        events = self._events - self._events_before
        wall = time.monotonic() - self._since
        return Figures(
            asked=self._asked,
            opened=len(self._firsts),
            failed=dict(self._failed),
            dropped=self._dropped,
            opening_seconds=round(self._opening, 3),
            opened_per_second=round(len(self._firsts) / self._opening, 1) if self._opening else 0.0,
            first_byte_median=round(firsts[len(firsts) // 2], 6),
            first_byte_p99=round(firsts[min(len(firsts) - 1, len(firsts) * 99 // 100)], 6),
            first_byte_max=round(firsts[-1], 6),
            listened_seconds=round(self._listening, 3),
            events=self._events,
            events_per_second=round(events / self._listening, 1) if self._listening else 0.0,
            heartbeats=self._heartbeats,
            bytes=self._bytes,
            client_busy_percent=round((time.process_time() - self._busy) / wall * 100, 1) if wall else 0.0,
        )

    def _begin(self) -> None:
        self._begun += 1
        made = socket.socket(self._family, socket.SOCK_STREAM)
        made.setblocking(False)  # noqa: FBT003
        client = _Client(made)
        self._clients[made.fileno()] = self._pending[made.fileno()] = client
        self._epoll.register(made.fileno(), select.EPOLLOUT)
        code = made.connect_ex(self._address)
        if code not in (0, errno.EINPROGRESS):
            self._give_up(client, os.strerror(code))

    def _look(self, seconds: float = _TICK) -> bool:
        """Take what has come; say whether there was anything."""
        found = self._epoll.poll(seconds, 1000)
        for descriptor, _ in found:
            client = self._clients.get(descriptor)
            if client is None:
                continue
            try:
                if not client.sent:
                    self._send(client)
                else:
                    self._receive(client)
            except (OSError, ResponseError, EventError) as error:
                self._give_up(client, getattr(error, "strerror", None) or str(error))
        return bool(found)

    def _send(self, client: _Client) -> None:
        code = client.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        client.socket.sendall(self._request.data)  # a new socket has room for it
        client.sent = True
        self._epoll.modify(client.socket.fileno(), select.EPOLLIN)

    def _receive(self, client: _Client) -> None:
        try:
            data = client.socket.recv(1 << 17)
        except BlockingIOError:
            return
        body = client.reader.feed(data) if data else b""
        head = client.reader
        if head.status and not client.first:
            kind = head.headers.get("content-type", "")
            if head.status != 200:
                raise ResponseError(f"answered {head.status}")
            if not kind.startswith("text/event-stream"):
                raise ResponseError(f"no event stream but {kind or 'untyped'}")
        if body:
            self._bytes += len(body)
            greeting = not client.first  # what a stream begins with is no heartbeat
            if greeting:
                client.first = time.monotonic()
                self._firsts.append(client.first - client.began)
                self._pending.pop(client.socket.fileno(), None)
            for event in client.decoder.feed(body):
                if event.data is not None:
                    self._events += 1
                elif not greeting:
                    self._heartbeats += 1
        if not data or head.ended:
            if client.first:
                self._dropped += 1
                self._forget(client)
            else:
                raise ResponseError("the stream ended before its first byte")

    def _give_up(self, client: _Client, why: str) -> None:
        if client.first:
            self._dropped += 1
        else:
            self._failed[why] += 1
        self._forget(client)

    def _forget(self, client: _Client) -> None:
        descriptor = client.socket.fileno()
        self._clients.pop(descriptor, None)
        self._pending.pop(descriptor, None)
        with contextlib.suppress(OSError):
            self._epoll.unregister(descriptor)
        client.socket.close()
