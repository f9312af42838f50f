"""One client's stream: a bounded queue and a cursor.

A stream knows its transport and how it may end; it knows no socket, no broker and no other stream. Events come in
by ``offer`` (from the flusher) and ``send`` (from anybody); bytes go out by ``take`` (from its transport). All of
it happens under the lock of its owner, the pool manager, which no one holds while calling foreign code.
"""

from __future__ import annotations

import logging
import sys
import time
from _queue import Empty, SimpleQueue
from collections.abc import Callable
from enum import Enum
from types import TracebackType
from typing import Any, Final, Protocol

from .access import Ticket
from .counts import BYTES, Counts
from .errors import EventError, StreamClosed
from .event import END_ID, PING, Event, Message, to_text
from .overflow import Hole, HoledQueue, Item, Policies, conflate, drop, drop_oldest
from .settings import Settings
from .transports.base import Pusher, Transport, Waiter

__all__ = ["NOTHING_MORE", "CloseReason", "Lock", "Stream", "StreamOwner", "call_foreign"]

logger: logging.Logger = logging.getLogger("flask_sse_stream")

NOTHING_MORE: Final = 2**63
"""The cursor of a stream that is not to be offered anything more: above every number of an event."""

# One write holds at most about so much: a replay of a thousand large events must not be joined into one object.
_WRITE_BYTES: Final = 64 * 1024
_SHORT_WRITE_SECONDS: Final = 0.02
_PATIENCE: Final = 1000  # rests of the flusher, about a second, for a transport that was woken
_PATIENCE_WRITING: Final = 20  # and for one that writes, until it has written everything


class CloseReason(str, Enum):
    """Every way in which a stream can end."""

    PEER = "peer"  #: the client left
    ENDED = "ended"  #: it said all it had to say; the client does not come back
    KICKED = "kicked"  #: closed by the application
    SLOW = "slow"  #: more was waiting than its queue may hold
    STALLED = "stalled"  #: its socket took no byte for ``SSE_SEND_TIMEOUT``
    EXPIRED = "expired"  #: the right to listen ran out, or was revoked
    ROTATED = "rotated"  #: it was asked to come back, by ``reconnect=True`` or ``SSE_MAX_AGE``
    SHUTDOWN = "shutdown"  #: the process is stopping
    ERROR = "error"  #: the code that fed it raised

    def __str__(self) -> str:
        return self.value


# Their transports may hang in a write, and what waits for them would only hold memory.
_CUT: Final = {CloseReason.SLOW, CloseReason.STALLED}
_DISCARD: Final = {*_CUT, CloseReason.PEER}


def call_foreign(complaint: str, function: Callable[..., object], *arguments: Any) -> None:
    """Call code of a user's; what it raises is logged and concerns nobody else.

    gevent's ``Timeout`` too, which is no :class:`Exception` and would end the flusher; but not what means to end the
    greenlet, thread or process that calls.
    """
    try:
        function(*arguments)
    except BaseException as error:
        kill = getattr(sys.modules.get("greenlet"), "GreenletExit", SystemExit)
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit, kill)):
            raise
        logger.exception(complaint)


class Lock:
    """A lock of the operating system's also where gevent has replaced the standard library's.

    It is held for microseconds and never across a wait, so blocking the thread for it is right: gevent's own
    locks would put a native thread's fate into the hands of another thread's hub. ``_queue.SimpleQueue`` is the
    one blocking primitive that monkey patching leaves alone and whose ``put`` may interrupt itself.

    ``after_release`` runs each time the lock has been let go.
    """

    __slots__ = ("_after_release", "_token")

    def __init__(self, after_release: Callable[[], None]) -> None:
        self._token: SimpleQueue[None] = SimpleQueue()
        self._token.put(None)
        self._after_release = after_release

    def try_acquire(self) -> bool:
        """Take the lock if it is free, without waiting."""
        try:
            self._token.get_nowait()
        except Empty:
            return False
        return True

    def release(self) -> None:
        """Let go without the usual look at what happened meanwhile; the caller does that itself."""
        self._token.put(None)

    def __enter__(self) -> None:
        self._token.get()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._token.put(None)
        self._after_release()


class StreamOwner(Protocol):
    """What a stream needs of its pool manager."""

    settings: Settings
    policies: Policies
    lock: Lock
    counts: Counts

    def dumps(self, value: Any) -> str:
        """Express a value as JSON."""

    def leave(self, stream: Stream, reason: CloseReason) -> bool:
        """Take the stream out of everything; say whether it was in. Called under the lock, once."""

    def left(self, stream: Stream, reason: CloseReason) -> None:
        """A stream that was in has left. Called without the lock."""

    def dropped(self, stream: Stream, count: int) -> None:
        """The overflow policy dropped events. Called under the lock."""

    def overflowed(self, stream: Stream) -> None:
        """The stream is to be closed, since its queue is full. Called under the lock."""

    def abandoned(self, stream: Stream) -> None:
        """The stream is to be closed, since nobody will fetch its bytes. May be called from ``__del__``."""


class Stream:
    """One client, from its request to its :class:`CloseReason`.

    ``keys``
        the keys it listens to; none for a stream of one request.
    ``ticket``
        what it was let in with, ``None`` where nothing was asked for.
    ``cursor``
        the sequence number of the last event it was offered.
    ``reason``
        how it ended, or ``None`` while it is open.
    ``comments``
        whether it may be sent comments: heartbeats, and the one that it begins with. Set it before it is opened.
    ``sent``
        bytes of the event stream format that its transport took.
    ``opened``, ``last_active``
        monotonic times.

    May be used from any thread. A request opens it; ``sse.stream()`` makes one for its response, and without Flask
    ``Stream(manager)`` does, for :func:`~flask_sse_stream.wsgi.respond`.
    """

    __slots__ = (
        "__weakref__", "_bytes", "_callbacks", "_owner", "_patience", "_queue", "_uncounted", "close_event",
        "comments", "cursor", "keys", "last_active", "opened", "reason", "room", "sent", "ticket", "transport",
        "writing_since",
    )  # fmt: skip

    def __init__(self, owner: StreamOwner, keys: tuple[str, ...] = (), ticket: Ticket | None = None) -> None:
        self._owner = owner
        self.keys: tuple[str, ...] = keys
        self.ticket: Ticket | None = ticket
        self.cursor: int = 0
        self.sent: int = 0
        self.comments: bool = True
        self.reason: CloseReason | None = None
        self.transport: Transport | None = None
        self.close_event: str | None = owner.settings.close_event
        self.room: Waiter | None = None  # where its own producer waits while the queue is full; None: it has none
        self.opened: float = time.monotonic()
        self.last_active: float = self.opened
        self.writing_since: float = 0.0  # when its transport took bytes that it has not come back from; 0.0: it waits
        self._queue: list[Item] = []  # an empty deque takes 700 bytes more, and most queues are empty
        self._bytes = 0
        self._uncounted = 0  # frames at the queue's head that the bounds do not count: the replay
        self._patience = _PATIENCE
        self._callbacks: list[Callable[[Stream, CloseReason], object]] | None = None

    def __repr__(self) -> str:
        return f"<Stream keys={list(self.keys)} {self.reason or 'open'}, {len(self._queue)} waiting>"

    # What users call

    @property
    def closed(self) -> bool:
        """Whether it has ended; what was sent before may still be on its way."""
        return self.reason is not None

    @property
    def waiting(self) -> int:
        """How many frames wait for the client."""
        return len(self._queue)

    @property
    def lag(self) -> float:
        """For how many seconds the oldest event has waited for the client to read; 0.0 where none does."""
        since = self.writing_since  # what its socket has no room for is in no queue any more
        if not since and self._queue:
            ages = (item.created for item in self._queue if type(item) is Message)
            since = next(ages, 0.0) or self.last_active
        return max(0.0, time.monotonic() - since) if since else 0.0

    def send(
        self, data: Any = None, *, event: str | None = None, id: str | int | None = None, retry: int | None = None
    ) -> None:
        """Send one event to this client alone. It is in no history: whoever wants it replayed publishes it.

        ``data`` is text, any value that JSON can express, or an :class:`~flask_sse_stream.Event`.

        A stream that is fed by a source (``sse.stream(source)``) lets whoever sends wait while the client has not
        read what is waiting; any other never waits, and a queue that is full takes the way of ``SSE_OVERFLOW``.
        Raises :class:`StreamClosed` after the end and :class:`EventError` for a bad event; the id ``end`` is
        :meth:`send_end`'s.
        """
        value = self._event(data, event, id, retry)
        if value.id == END_ID:
            raise EventError(f"id must not be {END_ID!r}, which ends a stream for good: that is what send_end() is for")
        self._send(value)

    def comment(self, text: str = "") -> None:
        """Send a comment, which clients ignore. Raises as :meth:`send`."""
        self._send(Event(comment=text))

    def send_end(self, data: Any = None, *, event: str | None = None, retry: int | None = None) -> None:
        """Send the last event and end the stream for good, with reason ``ended``.

        The event is called ``SSE_CLOSE_EVENT`` unless ``event`` names another. It carries the id ``end``; a
        browser comes back with that as its ``Last-Event-ID`` once, is answered 204, and stops.
        """
        if self.reason is not None:
            raise StreamClosed(self.reason)
        name = event if event is not None else self.close_event
        if name is None and data is None:
            last = Event(id=END_ID, retry=retry)
        else:
            last = self._event("" if data is None else data, name, END_ID, retry)
        self.close(CloseReason.ENDED, last.encode())

    def close(self, reason: CloseReason = CloseReason.KICKED, last: bytes = b"") -> None:
        """End the stream after what is waiting was sent, and after ``last``. Ending it twice does nothing.

        An EventSource that sees a stream end comes back; :meth:`send_end` tells it not to.
        """
        with self._owner.lock:
            if self.reason is not None:
                return
            # In one step: a transport that sees the end has seen the last bytes.
            self.reason = reason
            if reason in _DISCARD:
                self._queue.clear()
                self._bytes = self._uncounted = 0
            elif last:
                self._queue.append(last)
            was_in = self._owner.leave(self, reason)
            callbacks, self._callbacks = self._callbacks or [], None
        transport, room = self.transport, self.room
        if room is not None:
            room.wake()
        if transport is not None:
            transport.wake()
            if reason in _CUT:
                transport.close()
        if was_in:
            self._owner.left(self, reason)
        for callback in callbacks:
            self._call(callback, reason)

    def on_close(self, callback: Callable[[Stream, CloseReason], object]) -> None:
        """Call ``callback(stream, reason)`` when the stream ends; at once if it has.

        It runs in the thread that ended the stream and must not block. What it raises is logged.
        """
        with self._owner.lock:
            if self.reason is None:
                if self._callbacks is None:
                    self._callbacks = []
                self._callbacks.append(callback)
                return
            reason = self.reason
        self._call(callback, reason)

    def _call(self, callback: Callable[[Stream, CloseReason], object], reason: CloseReason) -> None:
        call_foreign("a callback of on_close raised", callback, self, reason)

    def _event(self, data: Any, event: str | None, id: str | int | None, retry: int | None) -> Event:
        if isinstance(data, Event):
            if (event, id, retry) != (None, None, None):
                raise EventError("event, id and retry belong into the Event that was given as data")
            return data
        return Event(None if data is None else to_text(data, self._owner.dumps), event=event, id=id, retry=retry)

    def _send(self, event: Event) -> None:
        frame = event.encode()
        if not frame:
            raise EventError("nothing to send: give data, or an event, id, retry or comment")
        limit = self._owner.settings.max_event_bytes
        if len(frame) > limit:
            raise EventError(f"the event has {len(frame)} bytes, more than SSE_MAX_EVENT_BYTES={limit}")
        while (room := self.room) is not None and self.reason is None and not self._has_room(len(frame)):
            room.wait()
        with self._owner.lock:
            if self.reason is not None:
                raise StreamClosed(self.reason)
            fits = self._put(Message(None, "", 0, frame, 0.0, resumable=False))
            if fits:
                self.last_active = time.monotonic()
        if not fits:
            self.close(CloseReason.SLOW)
            raise StreamClosed(CloseReason.SLOW)
        if self.transport is not None:
            self.transport.wake()

    # What the pool manager calls, under the lock

    def offer(self, message: Message) -> bool:
        """Put a message into the queue, unless it is at or below the cursor; say whether the client has it coming."""
        if message.seq <= self.cursor or self.reason is not None:
            return False
        if not self._put(message):
            # Its client may make room before it is closed, and must not be given what is beyond the hole.
            self.cursor = NOTHING_MORE
            self._owner.overflowed(self)
            return False
        self.cursor = message.seq
        return True

    def offer_last(self, message: Message) -> None:
        """Put a message into the queue of a stream that is about to end, where the bounds are of no more use."""
        if message.seq > self.cursor and self.reason is None:
            self._queue.append(message)
            self._bytes += len(message.frame)
            self.cursor = message.seq

    def pusher(self) -> Pusher | None:
        """Give who can send to the client now, since nothing is waiting."""
        transport = self.transport
        return None if self._queue or transport is None or self.reason is not None else transport.ready

    def pass_by(self, message: Message) -> Pusher | None:
        """Count a message as offered, and give who is to push it to the client now; ``None``: offer it."""
        pusher = self.pusher() if message.seq > self.cursor else None
        if pusher is not None:
            self.cursor = message.seq
            self.sent += len(message.frame)
        return pusher

    def put_back(self, message: Message) -> None:
        """Put a message that was passed by, and that could not be pushed, before what has come since."""
        if self.reason not in _DISCARD:
            self._queue.insert(0, message)
            self._bytes += len(message.frame)
            self.sent -= len(message.frame)

    def put_first(self, frames: list[bytes]) -> None:
        """Put what a stream begins with before anything else; the bounds do not count it.

        Its frames are shared with the windows, and a client that has a long history to catch up on is not slow.
        """
        self._queue[:0] = frames
        self._uncounted = len(frames)

    def put_reset(self, frame: bytes, head: int) -> None:
        """Put the news that the log began anew; nothing of the old one follows."""
        self.cursor = head
        self._queue.append(frame)
        self._bytes += len(frame)

    def put_ping(self) -> bool:
        """Put a heartbeat, unless something waits anyway. Says whether it did."""
        if self._queue or self.reason is not None:
            return False
        self._queue.append(PING)
        self._bytes += len(PING)
        return True

    def crowded(self, now: float) -> bool:
        """Whether its queue is more than half full though its client may well be one that keeps up.

        That is so while its transport was woken and has not come yet (there are more threads than processors), or
        is in a write that may still be a short one. A client that does not read holds nobody up for longer, nor does
        one that reads steadily and slowly: until it has caught up, it is waited for once.
        """
        settings = self._owner.settings
        if 2 * len(self._queue) <= settings.queue_events and 2 * self._bytes <= settings.queue_bytes:
            return False
        if self.writing_since:
            if now - self.writing_since >= _SHORT_WRITE_SECONDS:
                return False
            self._patience -= _PATIENCE // _PATIENCE_WRITING
        else:
            self._patience -= 1
        return self._patience >= 0

    def _has_room(self, size: int) -> bool:
        settings, queue = self._owner.settings, self._queue
        waiting = len(queue) - self._uncounted
        if type(queue) is HoledQueue:
            waiting -= queue.holes
        # An event that is larger than the whole queue may still be sent, alone.
        return waiting < settings.queue_events and (not self._bytes or self._bytes + size <= settings.queue_bytes)

    def _put(self, message: Message) -> bool:
        """Put a message into the queue, or what tells of its loss; ``False``: the stream is to be closed."""
        size = len(message.frame)
        if not self._has_room(size):
            return self._owner.policies.lossy and self._overflow(message, size)
        self._queue.append(message)
        self._bytes += size
        return True

    def _overflow(self, message: Message, size: int) -> bool:
        policies, start = self._owner.policies, self._uncounted
        policy = policies.of(message.key)
        if type(self._queue) is not HoledQueue:
            self._queue = HoledQueue(self._queue)
        queue = self._queue
        dropped = 0
        # One that must not be dropped makes those that may be give way too.
        if policy != "drop_newest":
            if policies.conflates:
                dropped, freed = conflate(queue, start, message, self.keys, policies)
                self._bytes -= freed
            while not self._has_room(size) and (freed := drop_oldest(queue, start, self.keys, policies)):
                self._bytes -= freed
                dropped += 1
        fits = self._has_room(size)
        if fits:
            queue.append(message)
            self._bytes += size
        elif policy != "disconnect":
            drop(queue, start, message, self.keys)
            dropped += 1
        if dropped:
            self._owner.dropped(self, dropped)
        return fits or policy != "disconnect"

    # What the transport calls

    def abandon(self) -> None:
        """End it soon, from where nothing may wait, not even for the lock: the body was thrown away."""
        self._owner.abandoned(self)

    def take(self) -> bytes | None:
        """Give the next bytes for the client; ``b""``: nothing now; ``None``: nothing any more.

        Several waiting frames come as one, up to about 64 KiB.
        """
        frames = self.take_frames()
        if not frames:
            return frames if frames is None else b""
        return frames[0] if len(frames) == 1 else b"".join(frames)

    def take_frames(self) -> list[bytes] | None:
        """Give the next frames for the client, as :meth:`take`; ``[]``: nothing now; ``None``: nothing any more."""
        with self._owner.lock:
            queue = self._queue
            if not queue:
                self.writing_since = 0.0
                self._patience = _PATIENCE
                return [] if self.reason is None else None
            frames: list[bytes] = []
            size = 0
            for item in queue:
                frame = item if isinstance(item, bytes) else item.frame
                if frames and size + len(frame) > _WRITE_BYTES:
                    break
                frames.append(frame)
                size += len(frame)
            self._owner.counts.cells[BYTES] += size
            self.sent += size
            counted = frames[self._uncounted :] if self._uncounted else frames
            self._bytes -= sum(map(len, counted))
            self._uncounted -= len(frames) - len(counted)
            if type(queue) is HoledQueue:
                self._fill_holes(queue, frames)
            del queue[: len(frames)]
            self.writing_since = time.monotonic()
        room = self.room
        if room is not None:
            room.wake()
        return frames

    def _fill_holes(self, queue: HoledQueue, frames: list[bytes]) -> None:
        """Those among what is taken were not counted; and with the last of them, the queue is as others are again."""
        for item, frame in zip(queue, frames, strict=False):
            if type(item) is Hole:
                self._bytes += len(frame)
                queue.holes -= 1
        if not queue.holes:
            self._queue = queue[len(frames) :]

    def progressed(self) -> None:
        """The client took some of the bytes that it was given."""
        if self.writing_since:
            self.writing_since = time.monotonic()
