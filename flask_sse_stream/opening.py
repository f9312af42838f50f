"""How a stream begins: limits and rights, and then in one step the replay and its place among the others.

The pool manager makes the stream and starts what serves it. What may wait, because a log is asked, is done before that
step; in it, under the lock, no event falls between what is replayed and what is offered.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from .access import CONTROL_KEY, Ticket, mark_names
from .brokers.base import Broker, Life
from .counts import OPENED, REFUSED, REPLAYED, Counts
from .errors import AccessDenied, StreamsFull
from .event import Event, retry_block
from .intake import Intake
from .keys import is_job
from .listeners import Listeners
from .revocations import Revocations
from .rounds import Rounds
from .settings import Settings
from .stream import NOTHING_MORE, Lock, Stream
from .transports.base import Transport
from .window import Windows

__all__ = ["Opening"]

_REVOKED: Final = "the right to this stream was revoked"


class Opening:
    """Lets streams in.

    ``broker``
        gives the broker of the moment, in whose place a test may have put another one.
    ``outside``
        calls what asks a store, so that nobody but the caller waits for it.
    """

    def __init__(
        self,
        settings: Settings,
        lock: Lock,
        broker: Callable[[], Broker],
        windows: Windows,
        listeners: Listeners,
        rounds: Rounds,
        revocations: Revocations,
        intake: Intake,
        counts: Counts,
        outside: Callable[[Callable[[], Any]], Any],
    ) -> None:
        self._settings = settings
        self._lock = lock
        self._broker = broker
        self._windows = windows
        self._listeners = listeners
        self._rounds = rounds
        self._revocations = revocations
        self._intake = intake
        self._counts = counts
        self._outside = outside
        # What every stream begins with: servers send no head before the first bytes of a body.
        self._retry = retry_block(settings.retry) if settings.retry is not None else b""

    def know_the_log(self) -> None:
        """Learn which log this is, before the first window of it is made."""
        if self._windows.epoch is not None:
            return
        position = self._outside(lambda: self._broker().cover((), (), None))
        with self._lock:
            self._intake.take_all()
            if self._windows.epoch is None:
                self._intake.enter(Life(position.epoch, position.head))

    def open(self, stream: Stream, transport: Transport, last_event_id: str | None) -> None:
        """Let a stream of keys in, with what its client missed. Raises as :meth:`PoolManager.open`."""
        self._check_limits(stream.keys)
        self.know_the_log()
        while not self._open(stream, transport, last_event_id):
            pass  # The log began anew meanwhile, or so: what was asked of it is worth nothing any more.

    def attach(self, stream: Stream, transport: Transport) -> None:
        """Let a stream of one request in. Raises :class:`StreamsFull`."""
        self._check_limits(())
        with self._lock:
            stream.put_first([self._first_bytes(stream)])
            if stream.reason is None:
                self._register(stream, transport)
            else:  # It said everything and ended before its response began.
                stream.transport = transport

    def _open(self, stream: Stream, transport: Transport, last_event_id: str | None) -> bool:
        with self._lock:
            # From here on the windows take what is delivered; what was before is asked of the broker.
            epoch = self._windows.epoch
            job = is_job(stream.keys[0])
            followed = stream.keys if job else (*stream.keys, None)  # what goes to all is no part of a job
            wanted = self._windows.incomplete(followed, time.monotonic())
        asked = wanted if last_event_id or self._settings.join_history or job else []
        covered = (*followed, CONTROL_KEY)
        position = self._outside(lambda: self._broker().cover(covered, asked, last_event_id))
        # Only now, when this process hears what is revoked after it has looked.
        revocations = self._revocations.count
        if stream.ticket is not None:
            self._check_marks(stream.ticket)
        with self._lock:
            # In one step, so that no event falls between what is replayed and what is offered.
            self._intake.take_all()
            if epoch != self._windows.epoch:
                return False
            if stream.ticket is not None:
                revoked = self._revocations.since(revocations, stream.ticket)
                if revoked is None:
                    return False
                if revoked:
                    raise AccessDenied(_REVOKED)
            if position.epoch == epoch:
                self._windows.reach(position.head)
            stream.put_first([self._first_bytes(stream), *self._first_frames(stream.keys, last_event_id)])
            stream.cursor = NOTHING_MORE if job and self._windows.is_over(stream.keys[0]) else self._windows.head
            self._register(stream, transport)
        return True

    def _check_marks(self, ticket: Ticket) -> None:
        names = mark_names(ticket)
        if self._outside(lambda: self._broker().marked(names)) >= ticket.issued:
            raise AccessDenied(_REVOKED)

    def _first_bytes(self, stream: Stream) -> bytes:
        if stream.comments:
            return self._retry + b": open\n\n"
        return self._retry or b"\n"  # an empty line ends a block in which there was nothing

    def _check_limits(self, keys: tuple[str, ...]) -> None:
        everywhere, per_key = self._settings.max_clients, self._settings.max_clients_per_key
        full: StreamsFull | None = None
        if self._rounds.drain.deadline is not None:
            full = StreamsFull(0, draining=True)
        elif len(self._rounds.streams) >= everywhere:
            full = StreamsFull(everywhere)
        elif per_key is not None:
            for key in keys:
                if self._listeners.count(key) >= per_key:
                    full = StreamsFull(per_key, key)
        if full is not None:
            self._counts.cells[REFUSED] += 1
            raise full

    def _register(self, stream: Stream, transport: Transport) -> None:
        self._check_limits(stream.keys)
        stream.transport = transport
        stream.opened = stream.last_active = now = time.monotonic()
        self._rounds.join(stream)
        self._listeners.add(stream)
        for key in stream.keys:
            self._windows.touch(key, now)
        self._counts.cells[OPENED] += 1

    def _first_frames(self, keys: tuple[str, ...], last_event_id: str | None) -> list[bytes]:
        """What a client with this cursor gets before anything live. Under the lock."""
        windows, now = self._windows, time.monotonic()
        if is_job(keys[0]):
            return self._frames_of_job(keys[0], last_event_id, now)
        if not self._settings.history_size:
            return []
        if not last_event_id:
            latest = windows.latest(keys, self._settings.join_history, now)
            # And the place where it begins, so that one which is cut off before its first event misses nothing. The
            # latest may not say it: a comment has no id, and one of the user's own is soon forgotten.
            place = Event(id=f"{windows.epoch}-{windows.head}").encode()
            return [*(message.frame for message in latest), place]
        replay = windows.replay(keys, last_event_id, now)
        if replay.reset is not None:
            return [self._intake.reset(replay.reset, replay.keys)]
        self._counts.cells[REPLAYED] += len(replay.messages)
        return [message.frame for message in replay.messages]

    def _frames_of_job(self, key: str, last_event_id: str | None, now: float) -> list[bytes]:
        """What a reader of a job gets first: what it missed, without a cursor everything. Under the lock."""
        windows = self._windows
        messages, place = windows.job(key, now), windows.head
        frames: list[bytes] = []
        if last_event_id:
            replay = windows.replay((key,), last_event_id, now)
            reason, found = replay.reset, replay.messages
        else:
            start, cut = windows.begins(key, now)
            reason, found = ("history" if cut else None), messages
        if reason is not None:
            # What it has is not what is here: it begins anew with all that there is.
            found, (start, _) = messages, windows.begins(key, now)
            frames.append(self._intake.reset(reason, (key,), start))
        over = bool(messages) and messages[-1].last
        if over and not found:
            found = messages[-1:]  # whatever it claims to have, it does not know of the end
        self._counts.cells[REPLAYED] += len(found)
        frames += [message.frame for message in found]
        if not over:
            # One that is cut off before the next event misses nothing. After an end, the id is the end's.
            frames.append(Event(id=f"{windows.epoch}-{place}").encode())
        return frames
