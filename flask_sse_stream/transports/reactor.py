"""Serves sockets that servers have given up: one epoll and one piece of code for all of a hub's streams.

The portable transport costs a parked greenlet and a queue per client. Here a stream is a descriptor, a reference and
the bytes that its socket had no room for. Bytes are sent where the stream is woken, in the flusher as a rule; the epoll
tells which peers have left, and which sockets that were full have room again.

It is a part of gevent's transport and knows nothing of WSGI: ``servers.py`` says whose socket may be taken over.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Final

import gevent.monkey
from gevent.hub import Hub, get_hub

from ..event import chunk
from ..stream import CloseReason, Stream
from .base import Task
from .gevent import Mailbox

__all__ = ["HandedOff", "Reactor"]

# Not the one that monkey patching leaves in its place, which tells greenlets apart.
get_ident: Final[Callable[[], int]] = gevent.monkey.get_original("_thread", "get_ident")
# gevent's close waits for the loop's next turn, and its epoll is none.
_close: Final[Callable[[int], None]] = gevent.monkey.get_original("os", "close")
_Epoll: Final[Callable[[], select.epoll]] = gevent.monkey.get_original("select", "epoll")

_LAST_CHUNK: Final = b"0\r\n\r\n"
_WATCHED: Final = select.EPOLLIN | select.EPOLLRDHUP
_EVENTS: Final = 256  # of one look at the epoll; more would keep the loop from its other sockets
_TCP_USER_TIMEOUT: Final = getattr(socket, "TCP_USER_TIMEOUT", 18)


class HandedOff:
    """The transport of one stream whose socket is the reactor's."""

    __slots__ = ("_reactor", "busy", "descriptor", "ended", "posted", "ready", "rest", "stream", "task")

    def __init__(self, reactor: Reactor, stream: Stream, descriptor: int, task: Task | None) -> None:
        self._reactor = reactor
        self.stream = stream
        self.descriptor = descriptor  # -1 when it is closed
        self.task = task
        self.rest = b""  # what the socket had no room for
        self.ready = True  # its socket had room the last time
        self.busy = self.posted = self.ended = False

    def push(self, chunk: bytes) -> bool:
        """Send what all clients get now, without any queue."""
        if not self.ready or self.busy or get_ident() != self._reactor.thread:
            return False
        try:
            sent = os.write(self.descriptor, chunk)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._reactor.peer_left(self)
            return True
        if sent != len(chunk):
            self.stream.writing_since = time.monotonic()
            self._reactor.wait_for_room(self, chunk[sent:])
        return True

    def wake(self) -> None:
        """Send what the stream has, now if this is the hub's thread, else as soon as that comes to it."""
        reactor = self._reactor
        if get_ident() == reactor.thread:
            reactor.send(self)
        elif not self.posted:
            self.posted = True
            reactor.mailbox.post(self._send_later)

    def _send_later(self) -> None:
        self.posted = False
        self._reactor.send(self)

    def close(self) -> None:
        """Cut the client off."""
        if get_ident() == self._reactor.thread:
            self._reactor.drop(self)
        else:
            self._reactor.mailbox.post(lambda: self._reactor.drop(self))


class Reactor:
    """All handed-off streams of one hub. Everything but the transports' own methods is for the hub's thread."""

    _of_hub: ClassVar[weakref.WeakKeyDictionary[Hub, Reactor]] = weakref.WeakKeyDictionary()

    @classmethod
    def current(cls) -> Reactor:
        """Give the reactor of the current thread's hub."""
        hub = get_hub()
        reactor = cls._of_hub.get(hub)
        if reactor is None:
            reactor = cls._of_hub[hub] = cls(hub)
        return reactor

    @classmethod
    def forked(cls) -> None:
        """Let go of what is the parent's, in a child: its clients must not be kept waiting for the child's end."""
        for reactor in list(cls._of_hub.values()):
            reactor._watcher.stop()
            reactor._epoll.close()
            for descriptor in reactor._transports:
                with contextlib.suppress(OSError):
                    _close(descriptor)
            reactor._transports.clear()
        cls._of_hub = weakref.WeakKeyDictionary()

    def __init__(self, hub: Hub) -> None:
        self.thread = get_ident()
        self.mailbox = Mailbox.current()
        self._transports: dict[int, HandedOff] = {}
        self._epoll = _Epoll()
        self._frames: list[bytes] = []  # what was joined last, since the next client has the same waiting
        self._joined = b""
        # One descriptor for the hub to watch, whatever the number of streams. ref=False: see Mailbox.
        self._watcher: Any = hub.loop.io(self._epoll.fileno(), 1, ref=False)
        self._watcher.start(self._look)

    def __len__(self) -> int:
        return len(self._transports)

    def adopt(self, stream: Stream, client: socket.socket, send_timeout: float, task: Task | None) -> None:
        """Serve ``stream`` over a duplicate of ``client`` from now on; the server may close its own."""
        descriptor = os.dup(client.fileno())
        try:
            with contextlib.suppress(OSError):  # a Unix socket has no such option
                client.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, round(send_timeout * 1000))
            transport = HandedOff(self, stream, descriptor, task)
            self._epoll.register(descriptor, _WATCHED)
        except BaseException:
            _close(descriptor)
            raise
        self._transports[descriptor] = transport
        stream.transport = transport
        self.send(transport)  # what came while the server had it

    def send(self, transport: HandedOff) -> None:
        """Send what the stream has, as far as the socket has room."""
        if not transport.ready or transport.busy or transport.descriptor < 0:
            return  # Whoever is at it, or the epoll, sees to what comes meanwhile.
        transport.busy = True
        try:
            while self._send_some(transport):
                pass
        finally:
            transport.busy = False

    def _send_some(self, transport: HandedOff) -> bool:
        """Send one piece; say whether there may be more."""
        data = transport.rest or self._next(transport)
        if not data:
            if data is None:
                self.drop(transport)
            return False
        try:
            sent = os.write(transport.descriptor, data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.peer_left(transport)
            return False
        if sent == len(data):
            transport.rest = b""
            return True
        self.wait_for_room(transport, data[sent:])
        return False

    def wait_for_room(self, transport: HandedOff, rest: bytes) -> None:
        """Send ``rest``, and what comes after it, when the socket has room again."""
        transport.rest = rest
        transport.ready = False
        self._epoll.modify(transport.descriptor, _WATCHED | select.EPOLLOUT)

    def _next(self, transport: HandedOff) -> bytes | None:
        """Give the next bytes of the response; ``b""``: nothing now; ``None``: that was the end."""
        frames = transport.stream.take_frames()
        if frames is None:
            if transport.ended:
                return None
            transport.ended = True
            return _LAST_CHUNK
        if not frames:
            return b""
        if frames != self._frames:  # the very same objects, as a rule
            self._joined = chunk(frames[0] if len(frames) == 1 else b"".join(frames))
            self._frames = frames
        return self._joined

    def drop(self, transport: HandedOff) -> None:
        """Close the socket."""
        descriptor, transport.descriptor = transport.descriptor, -1
        if descriptor < 0:
            return
        transport.ready = False
        del self._transports[descriptor]
        # Before it is closed: what the server may still hold of the same connection would keep it in the epoll, and
        # a number that is used again must not get what is meant for this one.
        with contextlib.suppress(OSError):
            self._epoll.unregister(descriptor)
        _close(descriptor)
        transport.rest = b""
        stream, task = transport.stream, transport.task
        if stream.transport is transport:
            stream.transport = None  # whoever keeps the stream shall not keep the socket
        if task is not None:
            transport.task = None
            task.stop()

    def peer_left(self, transport: HandedOff) -> None:
        """Nobody is at the other end any more."""
        self.drop(transport)
        transport.stream.close(CloseReason.PEER)

    def _look(self) -> None:
        """See which sockets have room again, and whose peers have left. The loop's callback: nothing here waits."""
        found = [(self._transports.get(descriptor), events) for descriptor, events in self._epoll.poll(0, _EVENTS)]
        for transport, events in found:
            if transport is None or transport.descriptor < 0:
                continue
            if events & ~select.EPOLLOUT:
                # An end, an error, or bytes that nobody asked for: a client of a stream has nothing more to say.
                self.peer_left(transport)
            else:
                transport.ready = True
                self._epoll.modify(transport.descriptor, _WATCHED)
                transport.stream.progressed()
                self.send(transport)


os.register_at_fork(after_in_child=Reactor.forked)
