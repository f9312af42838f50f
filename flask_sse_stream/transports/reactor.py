"""Serves sockets that servers have given up: one epoll and one piece of code for all of a loop's streams.

The portable transport costs a parked greenlet or a thread per client. Here a stream is a descriptor, a reference and
the bytes that its socket had no room for. Bytes are sent where the stream is woken, in gevent's flusher as a rule; the
epoll tells which peers have left, and which sockets that were full have room again.

It knows neither WSGI nor gevent: ``servers.py`` says whose socket may be taken over, and it lives in a
:class:`~.base.Loop`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import time
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Final

from ..event import chunk
from ..stream import CloseReason, Stream
from .base import Loop, Task, original

__all__ = ["HandedOff", "Reactor"]

logger: logging.Logger = logging.getLogger("flask_sse_stream")


# gevent's tells greenlets apart.
get_ident: Final[Callable[[], int]] = original("_thread", "get_ident")
# gevent's close waits for the loop's next turn, and its epoll is none.
_close: Final[Callable[[int], None]] = original("os", "close")
_Epoll: Final[Callable[[], select.epoll]] = original("select", "epoll")
# Held for as long as it takes to make a reactor; gevent's would let other greenlets in.
_new_lock: Final[Callable[[], Any]] = original("_thread", "allocate_lock")

_LAST_CHUNK: Final = b"0\r\n\r\n"
_WATCHED: Final = select.EPOLLIN | select.EPOLLRDHUP
_EVENTS: Final = 256  # of one look at the epoll; more would keep the loop from its other sockets


class HandedOff:
    """The transport of one stream whose socket is the reactor's."""

    __slots__ = ("_reactor", "busy", "descriptor", "ended", "posted", "ready", "rest", "room", "stream", "task")

    def __init__(self, reactor: Reactor, stream: Stream, descriptor: int, task: Task | None) -> None:
        self._reactor = reactor
        self.stream: Stream = stream
        self.descriptor: int = descriptor  # -1 when it is closed
        self.task: Task | None = task
        self.rest: bytes = b""  # what the socket had no room for
        self.room: bool = False  # whether the socket had room the last time, and is ours to write to
        self.ready: Reactor | None = None
        self.busy: bool = False
        self.posted: bool = False
        self.ended: bool = False

    def begin(self) -> None:
        """Serve the socket from here on: the server has written what it had to write."""
        self.stream.transport = self
        self._reactor.soon(self._begin)

    def _begin(self) -> None:
        self._reactor.begin(self)

    def wake(self) -> None:
        """Send what the stream has, now if this is the loop's thread, else as soon as that comes to it."""
        reactor = self._reactor
        if get_ident() == reactor.thread:
            reactor.send(self)
        elif not self.posted:
            self.posted = True
            reactor.post(self._send_later)

    def _send_later(self) -> None:
        self.posted = False
        self._reactor.send(self)

    def close(self) -> None:
        """Cut the client off."""
        self._reactor.soon(lambda: self._reactor.drop(self))


class Reactor:
    """All handed-off streams of one loop. What is said to be so is for any thread, all else for the loop's."""

    _all: ClassVar[weakref.WeakSet[Reactor]] = weakref.WeakSet()
    _making: ClassVar[Any] = _new_lock()

    @classmethod
    def of(cls, loop: Loop) -> Reactor:
        """Give a loop's reactor. For any thread."""
        reactor: Reactor | None = loop.guests.get(cls)
        if reactor is None:
            with cls._making:
                reactor = loop.guests.get(cls)
                if reactor is None:
                    reactor = loop.guests[cls] = cls(loop)
        return reactor

    @classmethod
    def forked(cls) -> None:
        """Let go of what is the parent's, in a child: its clients must not be kept waiting for the child's end."""
        cls._making = _new_lock()
        for reactor in list(cls._all):
            reactor._stop_watching()
            reactor._epoll.close()
            for descriptor in reactor._transports:
                with contextlib.suppress(OSError):
                    _close(descriptor)
            reactor._transports.clear()
            reactor._loop.guests.pop(cls, None)
        cls._all = weakref.WeakSet()

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.thread: int = loop.thread
        self.post: Callable[[Callable[[], object]], None] = loop.post
        self._transports: dict[int, HandedOff] = {}
        self._epoll = _Epoll()
        self._frames: list[bytes] = []  # what was joined last, since the next client has the same waiting
        self._joined = b""
        # One descriptor for the loop to watch, whatever the number of streams.
        self._stop_watching = loop.watch(self._epoll.fileno(), self._look)
        self._all.add(self)

    def __len__(self) -> int:
        return len(self._transports)

    def soon(self, call: Callable[[], object]) -> None:
        """Make a call in the loop's thread, now if this is it. For any thread."""
        if get_ident() == self.thread:
            call()
        else:
            self.post(call)

    def adopt(self, stream: Stream, client: socket.socket, task: Task | None) -> HandedOff:
        """Get ready to serve ``stream`` over a duplicate of ``client``, which the server may close; for any thread.

        Raises :class:`OSError`, out of descriptors for instance; then nothing has happened. Nothing is sent before
        :meth:`HandedOff.begin`.
        """
        descriptor = os.dup(client.fileno())
        transport = self._transports[descriptor] = HandedOff(self, stream, descriptor, task)
        return transport

    def begin(self, transport: HandedOff) -> None:
        """Watch its socket, and send what came while the server had it."""
        if transport.descriptor < 0:
            return  # cut off meanwhile
        try:
            self._epoll.register(transport.descriptor, _WATCHED)
        except OSError:
            logger.exception("a socket cannot be watched, so its client is sent away to come back")
            self.peer_left(transport)
            return
        self.has_room(transport)
        self.send(transport)

    def send(self, transport: HandedOff) -> None:
        """Send what the stream has, as far as the socket has room."""
        if not transport.room or transport.busy:
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
        transport.room, transport.ready = False, None
        self._epoll.modify(transport.descriptor, _WATCHED | select.EPOLLOUT)

    def has_room(self, transport: HandedOff) -> None:
        """Note that its socket takes bytes."""
        transport.room = True
        transport.ready = self if self._loop.has_flushers else None

    def push(self, streams: list[Stream], chunk: bytes) -> list[Stream]:
        """Send what all of them get now, without any queue. For the flusher, in whatever thread it runs."""
        if get_ident() != self.thread:
            return streams
        write, size = os.write, len(chunk)
        left = []
        for stream in streams:
            transport = stream.transport
            if type(transport) is not HandedOff or not transport.room or transport.busy:
                left.append(stream)
                continue
            try:
                sent = write(transport.descriptor, chunk)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.peer_left(transport)
                continue
            if sent != size:
                stream.writing_since = time.monotonic()
                self.wait_for_room(transport, chunk[sent:])
        return left

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
        transport.room, transport.ready = False, None
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
                self.has_room(transport)
                self._epoll.modify(transport.descriptor, _WATCHED)
                transport.stream.progressed()
                self.send(transport)


os.register_at_fork(after_in_child=Reactor.forked)
