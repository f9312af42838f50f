"""Pools of streams by key, and the way of an event from its publisher to them.

``publish`` hands an encoded body to the broker; the broker gives it its place and calls ``deliver``; ``deliver``
puts it into the key's window and, if somebody listens, into the outbox, and wakes the flusher, which makes its
rounds (``rounds.py``) and offers it to the streams. So publishing costs the same whatever the number of streams,
and never waits for one.

Who runs what:

* ``publish`` and ``deliver``: any thread, greenlet, hub callback or signal handler. They take the lock only if it
  is free; whoever holds it looks at the inbox again when letting go.
* ``flush``: the flusher, a greenlet or a thread that begins with the first stream.
* everything else: any thread or greenlet.

No code of a user's, and nothing that could wait, runs under the lock. This module knows no socket, no server and
no framework.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

from .access import CONTROL_KEY, Revocation, Ticket, now, user_name
from .asking import Asking
from .brokers.base import Broker, Delivery, broker_from_url
from .counts import (
    BROKER_GAPS,
    BROKER_RECONNECTS,
    BROKER_SKIPPED,
    BROKER_UP,
    BYTES,
    CLOSED,
    DELIVERED,
    DRAINING,
    DROPPED,
    KEYS,
    OPENED,
    OUTBOX,
    PUBLISHED,
    REFUSED,
    REPLAYED,
    RESETS,
    Counts,
)
from .errors import BrokerError, EventError
from .event import END_ID, Event, Message, encode_json, retry_block, to_text
from .intake import Intake
from .keys import MAX_KEYS, REPORT_KEY, JobKey, Kept, check_key, check_keys
from .leaving import attend, give_up_at_exit
from .listeners import Listeners
from .opening import Opening
from .overflow import Policies
from .revocations import Revocations
from .rounds import Rounds
from .settings import Settings
from .stats import Hooks, Stats
from .stream import NOTHING_MORE, CloseReason, Lock, Stream, call_foreign
from .transports.base import Flusher, Runtime, Transport, current_runtime
from .window import Windows

__all__ = ["MAX_KEYS", "Hooks", "PoolManager", "Stats", "check_key", "check_keys"]

logger: logging.Logger = logging.getLogger("flask_sse_stream")

T = TypeVar("T")

_OUTBOX_LIMIT: Final = 256  # a publisher that is so far ahead gives the flusher its turn
_FARTHEST: Final = 10**16 - 1  # no log comes so far
_TURN_SECONDS: Final = 0.1  # and goes on if nothing moves: a flusher that hangs must not hang publishers
_DRAIN_GRACE: Final = 1.0  # for servers to see that clients were cut off
_DRAIN_POLL: Final = 0.01
_CLOSED: Final = {reason: CLOSED + place for place, reason in enumerate(CloseReason)}


class PoolManager:
    """All pools of one application in this process: publish, publish_all, open, close, count, heartbeat, drain.

    ``settings``
        the options; the defaults if left out.
    ``dumps``
        how a value that is not text becomes JSON; compact JSON by the standard library if left out.
    ``broker``
        makes the broker from the settings; ``SSE_BROKER_URL`` decides if left out. A function, because a forked
        process makes its own.

    Nothing starts before the first publish or the first stream.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        dumps: Callable[[Any], str] | None = None,
        broker: Callable[[Settings], Broker] = broker_from_url,
    ) -> None:
        self.settings: Settings = settings if settings is not None else Settings()
        self.policies: Policies = Policies(self.settings.overflow)
        self.hooks: Hooks = Hooks()
        self._dumps = dumps or encode_json
        self._broker_factory = broker
        self.starting: list[Callable[[], object]] = []  # called with the first stream of a process
        self.stopping: list[Callable[[], object]] = []  # called when this process gives up what it holds
        self.begun: list[Callable[[], object]] = []  # called in a forked child, where all counts begin anew
        self._begin()
        _managers.add(self)

    def _begin(self) -> None:
        """Set up the state of this process; a forked child begins anew, with nothing of its parent's."""
        self.lock: Lock = Lock(self._absorb)
        self._broker = self._broker_factory(self.settings)
        self._broker.start(self.deliver, self._idle)
        size, ttl = self.settings.history_size, self.settings.history_ttl
        jobs = Kept(self.settings.job_events, self.settings.job_ttl, whole=True)
        self._windows = Windows(size, ttl, fetched=self._broker.remembers, jobs=jobs)
        self._listeners = Listeners()
        self.counts: Counts = Counts()
        self._rounds = Rounds(self.settings, self.lock, self._listeners.of, self._tell_dropped, self.counts)
        self._revocations = Revocations(self._rounds, lambda: self._jittered_retry(0.5, 1.5))
        self._intake = Intake(
            self.lock,
            self._windows,
            self._listeners,
            self._rounds,
            self._revocations,
            self._wake_flusher,
            self.counts,
            lambda inquiry: self.asking.asked(inquiry),
            lambda kick: self.asking.kicked(kick),
        )
        self._opening = Opening(
            self.settings,
            self.lock,
            lambda: self._broker,
            self._windows,
            self._listeners,
            self._rounds,
            self._revocations,
            self._intake,
            self.counts,
            self._outside,
        )
        self.asking: Asking = Asking(
            self.settings,
            self.lock,
            self._broker,
            self._windows,
            self._rounds,
            self._intake,
            self._opening,
            self.counts,
            self._outside,
            self._ending,
        )
        self._flusher: Flusher | None = None
        self._flusher_lock = Lock(lambda: None)
        self._warned = False
        self._leases: set[str] = set()
        for call in self.begun:
            call()

    @property
    def reaches_other_processes(self) -> bool:
        """Whether what is published here reaches the streams of other processes."""
        return self._broker.remembers

    def warn_of_other_processes(self) -> None:
        """Say once that the streams of this application's other processes will not hear what is published here."""
        if not self.reaches_other_processes and not self._warned:
            self._warned = True
            logger.warning(
                "this application runs in several processes, and SSE_BROKER_URL is %s: an event reaches the streams "
                "of the process that publishes it alone. Use sqlite:///path, which the processes of one machine share, "
                "or redis://host:6379/0, which those of any number of machines do",
                self.settings.broker_url,
            )

    # Publishing

    def publish(
        self,
        key: str,
        data: Any = None,
        *,
        event: str | None = None,
        id: str | int | None = None,
        retry: int | None = None,
        idempotency_key: str | None = None,
    ) -> str:
        """Send an event to every stream of ``key``, now and, within the history, later; return its id.

        ``data`` is text as it is, any other value as JSON, or an :class:`~flask_sse_stream.Event` (then without
        the other arguments). ``None`` with an ``event`` name is an event with empty data. An ``id`` of one's own
        replaces the one of the log; ``""`` and ``"end"`` are refused. ``retry`` is in milliseconds.

        Of all calls with the same ``idempotency_key`` (text of 1 to 255 characters, for the whole namespace) within
        ``SSE_IDEMPOTENCY_TTL``, in whatever process, the first makes the event, and the others return its id. So what
        is tried again, a task of Celery's or a publish that raised :class:`BrokerError`, speaks once.

        Raises :class:`EventError` for a bad key or event, or one larger than ``SSE_MAX_EVENT_BYTES``, before
        anything is touched, and :class:`BrokerError` if the broker may not have taken it. Never waits for a
        reader; may be called from any thread or greenlet and, with ``memory://``, from a signal handler.
        """
        return self._publish(check_key(key), data, event, id, retry, idempotency_key)

    def publish_all(
        self,
        data: Any = None,
        *,
        event: str | None = None,
        id: str | int | None = None,
        retry: int | None = None,
        idempotency_key: str | None = None,
    ) -> str:
        """Send an event to every stream of every key; as :meth:`publish` in everything else."""
        return self._publish(None, data, event, id, retry, idempotency_key)

    def _publish(
        self,
        key: str | None,
        data: Any,
        event: str | None,
        id: str | int | None,
        retry: int | None,
        idempotency_key: str | None,
    ) -> str:
        once = check_key(idempotency_key, "idempotency_key") if idempotency_key is not None else None
        value, body = self._checked(data, event, id, retry)
        if self.hooks.published is not None:
            self.hooks.published(key, value)
        identifier = self._outside(lambda: self._broker.publish(key, body, once))
        self.counts.cells[PUBLISHED] += 1
        if len(self._rounds.outbox) > _OUTBOX_LIMIT:
            self._give_turn()
        return identifier

    def make_event(
        self, data: Any = None, *, event: str | None = None, id: str | int | None = None, retry: int | None = None
    ) -> Event:
        """Give the event that :meth:`publish` would send, as these arguments are now; for what publishes it later.

        Raises :class:`EventError`, as :meth:`publish` does.
        """
        return self._checked(data, event, id, retry)[0]

    def _checked(self, data: Any, event: str | None, id: str | int | None, retry: int | None) -> tuple[Event, bytes]:
        limit = self.settings.max_event_bytes
        if isinstance(data, Event):
            if (event, id, retry) != (None, None, None):
                raise EventError("event, id and retry belong into the Event that was given as data")
            value = data
        else:
            if isinstance(data, str) and len(data) > limit:  # before it is copied
                raise EventError(f"data has {len(data)} characters, more than SSE_MAX_EVENT_BYTES={limit}")
            value = Event(None if data is None else to_text(data, self.dumps), event=event, id=id, retry=retry)
        if value.id in ("", END_ID):
            cure = "it would make clients forget their cursor" if value.id == "" else "it ends a stream for good"
            raise EventError(f"id must not be {value.id!r}: {cure}")
        body = value.encode()
        if not body:
            raise EventError("nothing to publish: data is None; give data, or an event, id, retry or comment")
        if len(body) > limit:
            raise EventError(f"the event has {len(body)} bytes, more than SSE_MAX_EVENT_BYTES={limit}")
        return value, body

    def lease(self, name: str, seconds: float) -> bool:
        """Let this process have ``name`` for so many seconds, unless another one has it; say whether it does.

        For what one process of many is to do, a clock's ticks or a clean-up: each asks before it does it, the same one
        is told yes every time, and when it dies another one is, after at most ``seconds``. With ``memory://`` every
        process is alone, and always told yes.

        A process that hangs between the answer and what it does may do it when another one has the lease already;
        where that must not be, publish with an ``idempotency_key`` as well.

        Raises :class:`EventError` for a bad name, :class:`ValueError` for a time that is not positive, and
        :class:`BrokerError`.
        """
        check_key(name, "the name of a lease")
        if not 0.01 <= seconds <= 86_400:
            raise ValueError(f"a lease is for 0.01 to 86400 seconds, not {seconds!r}")
        held = self._outside(lambda: self._broker.lease(name, self.asking.process, seconds))
        (self._leases.add if held else self._leases.discard)(name)
        if held:
            give_up_at_exit(self)
        return held

    def give_back(self, name: str) -> None:
        """End a lease that this process has before its time. Raises :class:`BrokerError`."""
        if name in self._leases:
            self._leases.discard(name)
            self._outside(lambda: self._broker.lease(name, self.asking.process, 0))

    def hold(self, name: str, holder: str, seconds: float) -> bool:
        """Let ``holder``, who need not be this process, have a lease; with 0 seconds, give it back. See :meth:`lease`.

        With 0 seconds, and for whoever does not have it, it says whether nobody has.
        """
        return self._outside(lambda: self._broker.lease(name, holder, seconds))

    def look(self, key: JobKey) -> list[Message]:
        """Give what the log has of a job, oldest first; what is said from now on is delivered to this process.

        Raises :class:`BrokerError`.
        """
        self._opening.know_the_log()
        while True:
            with self.lock:
                epoch, now = self._windows.epoch, time.monotonic()
                wanted = self._windows.incomplete((key,), now)
                self._windows.touch(key, now)
            # What another process has said before this was asked must not be missing, though it may be on its way.
            newest = f"{epoch}-{_FARTHEST}"
            self._outside(lambda wanted=wanted, at=newest: self._broker.cover((key,), wanted, at))  # type: ignore[misc]
            with self.lock:
                self._intake.take_all()
                if epoch == self._windows.epoch:
                    return self._windows.job(key, time.monotonic())

    def dumps(self, value: Any) -> str:
        """Express a value as JSON."""
        return self._dumps(value)

    def _outside(self, function: Callable[[], T]) -> T:
        """Call what asks a store, so that nobody but the caller waits for it."""
        return current_runtime().outside(function) if self._broker.remembers else function()

    def _idle(self, keys: Sequence[str]) -> Sequence[str]:
        """Say which keys nobody here has needed for a while. For the broker."""
        needed = {CONTROL_KEY} if self._intake.reports is None else {CONTROL_KEY, REPORT_KEY}
        keys = [key for key in keys if key not in needed]
        with self.lock:
            return self._windows.forget_idle(keys, time.monotonic(), self._listeners)

    def _give_turn(self) -> None:
        best, since = len(self._rounds.outbox), time.monotonic()
        while len(self._rounds.outbox) > _OUTBOX_LIMIT:
            # If the lock is not free it may be held by the very frame that this one has interrupted (a signal
            # handler, a __del__), and the flusher, let go now, would wait for it in vain.
            if self._flusher is None or not self.lock.try_acquire():
                return
            self.lock.release()
            self._absorb()
            if not self._flusher.give_turn():
                return
            if len(self._rounds.outbox) < best:
                best, since = len(self._rounds.outbox), time.monotonic()
            elif time.monotonic() - since > _TURN_SECONDS:
                return

    # From the broker to the outbox

    def deliver(self, delivery: Delivery) -> None:
        """Take the next message of the log. For the broker; from any thread, never waits, never raises."""
        self._intake.deliver(delivery)

    def _absorb(self) -> None:
        self._intake.absorb()

    def _wake_flusher(self) -> None:
        if self._flusher is not None:
            self._flusher.wake()

    def flush(self) -> float | None:
        """Do a slice of what there is to do for the streams. For the flusher alone; see :meth:`Rounds.flush`."""
        return self._rounds.flush()

    # Opening and ending streams

    def check_keys(self, keys: Iterable[str]) -> tuple[str, ...]:
        """Give the keys of one stream, each once; :class:`EventError` for a bad one or more than :data:`MAX_KEYS`."""
        return check_keys(keys)

    def open(
        self,
        keys: Iterable[str],
        transport: Transport,
        runtime: Runtime,
        *,
        last_event_id: str | None = None,
        ticket: Ticket | None = None,
        comments: bool = True,
    ) -> Stream:
        """Begin a stream that listens to ``keys``, and put what its client missed since ``last_event_id`` into it.

        Raises :class:`StreamsFull` over a limit, :class:`EventError` for bad keys and :class:`BrokerError`; then
        nothing is registered. An id that leads nowhere is no error: the stream begins with ``stream-reset``.

        With a ``ticket`` it ends when that expires or is revoked; one that was revoked already is
        :class:`AccessDenied`. Without ``comments`` it has no heartbeats.
        """
        stream = Stream(self, self.check_keys(keys), ticket)
        stream.comments = comments
        self._opening.open(stream, transport, last_event_id)
        self._start_flusher(runtime, ends=ticket is not None)
        self._announce(stream)
        if stream.cursor == NOTHING_MORE:  # the replay had the end of a job
            stream.close(CloseReason.ENDED)
        return stream

    def attach(self, stream: Stream, transport: Transport, runtime: Runtime) -> None:
        """Begin a stream of one request, made by ``Stream(manager)``. Raises :class:`StreamsFull`."""
        self._opening.attach(stream, transport)
        self._start_flusher(runtime)
        self._announce(stream)

    def _start_flusher(self, runtime: Runtime, *, ends: bool = False) -> None:
        first: list[Callable[[], object]] = []
        with self._flusher_lock:
            if self._flusher is None or not self._flusher.alive:
                # Weakly: a thread or greenlet that waits must not keep an app alive that is otherwise gone.
                weak_flush = weakref.WeakMethod(self.flush)

                def flush() -> float | None:
                    strong = weak_flush()
                    return strong() if strong is not None else None

                self._flusher = runtime.start_flusher(flush)
                weakref.finalize(self, self._flusher.stop).atexit = False
                self._flusher.wake()
                first = self.starting
                if self.settings.drain_seconds:
                    attend(self, runtime)
        for call in first:
            call()
        # The newest stream is the last to be silent for too long; so only the first one brings a date forward.
        if len(self._rounds.streams) == 1 or self.settings.max_age is not None or ends:
            self._flusher.wake()

    def _announce(self, stream: Stream) -> None:
        if self.hooks.opened is not None:
            self._call(self.hooks.opened, stream)

    def _call(self, hook: Callable[..., object], *arguments: Any) -> None:
        call_foreign("a hook raised; the stream it was told of goes on", hook, *arguments)

    def leave(self, stream: Stream, reason: CloseReason) -> bool:
        """Take a stream out of everything, and say whether it was in. For the stream, under the lock."""
        if not self._rounds.leave(stream, reason):
            return False  # its response never began
        self._listeners.discard(stream)
        self.counts.cells[_CLOSED[reason]] += 1
        now = time.monotonic()
        for key in stream.keys:
            self._windows.touch(key, now)
        return True

    def left(self, stream: Stream, reason: CloseReason) -> None:
        """Tell who wants to know that a stream has ended. For the stream."""
        logger.debug("a stream of %s ended: %s", list(stream.keys), reason)
        if self._flusher is not None and reason is not CloseReason.PEER:
            self._flusher.wake()  # to look after it until its transport has let go
        if self.hooks.closed is not None:
            self._call(self.hooks.closed, stream, reason)

    def dropped(self, stream: Stream, count: int) -> None:
        """Remember what an overflow policy dropped. For the stream, under the lock."""
        self._rounds.dropped(stream, count)
        self._wake_flusher()  # which tells of it; what dropped may be a view that sends to its own stream

    def _tell_dropped(self, stream: Stream, count: int) -> None:
        if self.hooks.dropped is not None:
            self._call(self.hooks.dropped, stream, count)

    def overflowed(self, stream: Stream) -> None:
        """Remember to close a stream that is too slow. For the stream, under the lock."""
        self._rounds.close_soon(stream, CloseReason.SLOW)

    def abandoned(self, stream: Stream) -> None:
        """Remember to close a stream whose body was thrown away. From ``__del__``, so maybe under the lock."""
        self._rounds.close_soon(stream, CloseReason.PEER)
        self._wake_flusher()

    # Looking and closing

    def count(self, key: str) -> int:
        """How many streams of this process listen to ``key``."""
        return self._listeners.count(check_key(key))

    def count_all(self) -> int:
        """How many streams this process has, those of one request included."""
        return len(self._rounds.streams)

    def keys(self) -> list[str]:
        """The keys that have streams in this process."""
        with self.lock:
            return self._listeners.keys()

    def streams(self, key: str) -> list[Stream]:
        """The streams of this process that listen to ``key``."""
        with self.lock:
            return list(self._listeners.of(check_key(key)))

    def close(self, key: str, *, reconnect: bool = False) -> int:
        """End every stream of this process that listens to ``key``, whatever else it listens to; say how many.

        For good: the client gets the event ``SSE_CLOSE_EVENT`` with the id ``end``, and its next request is
        answered 204, at which an EventSource stops. With ``reconnect=True`` it comes back after a jittered
        ``SSE_RETRY`` and gets what it missed.

        What was published before, in whatever process, comes before the end. So where the log is shared it is asked
        how far it is, which takes at most ``SSE_BROKER_TIMEOUT``; if it does not answer, the streams end all the same.
        """
        return self._end(lambda: self._listeners.of(check_key(key)), reconnect)

    def close_all(self, *, reconnect: bool = False) -> int:
        """End every stream of this process; as :meth:`close` in everything else."""
        return self._end(lambda: tuple(self._rounds.streams), reconnect)

    def _end(self, find: Callable[[], tuple[Stream, ...]], reconnect: bool) -> int:
        with self.lock:
            epoch, streams = self._windows.epoch, find()
        if streams and self._broker.remembers:
            with contextlib.suppress(BrokerError):
                self._outside(lambda: self._broker.cover((), (), f"{epoch}-{_FARTHEST}"))
        with self.lock:
            self._intake.take_all()
            streams = find()
            self._rounds.catch_up(streams)
        for stream in streams:
            stream.close(*self._ending(stream, reconnect))
        return len(streams)

    def _ending(self, stream: Stream, reconnect: bool) -> tuple[CloseReason, bytes]:
        if reconnect:
            return CloseReason.ROTATED, self._jittered_retry(0.5, 1.5)
        name = stream.close_event
        return CloseReason.KICKED, Event("" if name is not None else None, event=name, id=END_ID).encode()

    def _jittered_retry(self, low: float, high: float) -> bytes:
        base = self.settings.retry or 1000
        return retry_block(round(base * random.uniform(low, high)))  # noqa: S311  only spreads

    def full_body(self) -> bytes:
        """What a browser is answered over a limit: it comes back between once and three times ``SSE_RETRY`` later."""
        return self._jittered_retry(1.0, 3.0) + b": full\n\n"

    def drain(self, timeout: float | None = None) -> int:
        """End every stream with reason ``shutdown`` and its own ``retry:``, and take no more; say how many there were.

        Returns when the last bytes of all have left and the code that feeds streams has ended, as a rule at once; or
        after ``timeout`` seconds (``SSE_DRAIN_SECONDS`` if left out) and a moment, when those who did not read are cut
        off. In a callback of gevent's hub, where nothing may wait, it returns at once and goes on by itself.

        The clients come back spread over ``SSE_DRAIN_SECONDS`` and get what they missed, if the broker outlives
        this process. Whoever asks for a stream meanwhile is answered as ``SSE_WHEN_FULL`` says.

        From any thread or greenlet; not in a signal handler, where :meth:`begin_drain` is for. It happens by itself
        when a process that has streams is to stop. Raises :class:`ValueError` for a time that is negative.
        """
        count = self.begin_drain(timeout)
        while self.drain_waits():
            flusher = self._flusher
            if flusher is None or not flusher.alive:
                # Without streams, or with what a thread has left behind that had its hub.
                while self.flush() == 0.0:
                    pass
                break
            if not flusher.rest(_DRAIN_POLL):
                break
        return count

    def begin_drain(self, timeout: float | None = None) -> int:
        """Begin what :meth:`drain` does, and do not wait for it. From signal handlers and callbacks, too."""
        seconds = self.settings.drain_seconds if timeout is None else timeout
        if not 0 <= seconds < math.inf:
            raise ValueError(f"the timeout of a drain is a number of seconds from 0 up, not {timeout!r}")
        count = len(self._rounds.streams)
        self._rounds.drain.ask(time.monotonic() + seconds)
        self._wake_flusher()
        return count

    def drain_waits(self) -> bool:
        """Whether a drain has begun, is not done, and has time left."""
        drain = self._rounds.drain
        return drain.deadline is not None and not drain.done and time.monotonic() < drain.deadline + _DRAIN_GRACE

    def revoke(self, *, user: str | int | None = None, key: str | None = None) -> None:
        """Take the right to listen away that ``user`` has, or all have to ``key``, or this user to this key.

        In every process, the streams that it concerns end with the event ``stream-expired``
        (``{"reason": "revoked"}``) and reason ``expired``, and each :class:`Ticket` that was issued before is refused
        from now on, for ``SSE_TICKET_MAX_TTL`` seconds, longer than which no ticket lives. One that is issued
        afterwards is as good as any. ``key`` ends the streams that needed no ticket as well; those may come back.

        Raises :class:`ValueError` for neither, or a bad user, :class:`EventError` for a bad key, and
        :class:`BrokerError`: then it may or may not have been done, and doing it again is harmless.
        """
        name = user_name(user)
        if name is None and key is None:
            raise ValueError("revoke() needs a user, a key, or both")
        revocation = Revocation(name, check_key(key) if key is not None else None, now())
        seconds = self.settings.ticket_max_ttl
        # In this order: who looks too early for the first will hear the second.
        self._outside(lambda: self._broker.mark(revocation.mark_name(), revocation.at, seconds))
        self._outside(lambda: self._broker.publish(CONTROL_KEY, revocation.encode()))

    def stats(self) -> Stats:
        """The numbers of this process at this moment."""
        with self.lock:
            cells = self.counts.cells
            return Stats(
                streams=len(self._rounds.streams),
                keys=len(self._listeners),
                windows=len(self._windows),
                outbox=len(self._rounds.outbox),
                draining=self._rounds.drain.deadline is not None,
                opened=cells[OPENED],
                closed={reason.value: cells[cell] for reason, cell in _CLOSED.items() if cells[cell]},
                refused=cells[REFUSED],
                published=cells[PUBLISHED],
                offered=cells[DELIVERED],
                dropped=cells[DROPPED],
                replayed=cells[REPLAYED],
                resets=cells[RESETS],
                sent_bytes=cells[BYTES],
                broker=self._broker.stats(),
            )

    def sample(self) -> None:
        """Note in ``counts`` how things are at this moment, for whoever reads them."""
        with self.lock:
            streams = list(self._rounds.streams)
            keys, outbox = len(self._listeners), len(self._rounds.outbox)
        broker = self._broker.stats()
        state = {
            KEYS: keys,
            OUTBOX: outbox,
            DRAINING: int(self._rounds.drain.deadline is not None),
            BROKER_UP: int(broker.up),
            BROKER_RECONNECTS: broker.reconnects,
            BROKER_GAPS: broker.gaps,
            BROKER_SKIPPED: broker.skipped,
        }
        self.counts.sample(state.items(), [stream.waiting for stream in streams])

    def reach_broker(self) -> None:
        """Ask the store for next to nothing. Raises :class:`BrokerError` within ``SSE_BROKER_TIMEOUT``."""
        self._outside(lambda: self._broker.marked(["reachable"]))

    def give_up(self) -> None:
        """Let other processes have what this one holds: its jobs fail, and its leases are free.

        It happens by itself at a process's end, unless that is killed: then leases end when their time is over.
        """
        for stop in self.stopping:
            stop()
        with contextlib.suppress(BrokerError):  # Then they end by themselves.
            for name in list(self._leases):
                self.give_back(name)

    def shutdown(self) -> None:
        """End every stream, the flusher and the broker. The manager is of no further use."""
        self.drain()
        if self._flusher is not None:
            self._flusher.stop()
        self.give_up()
        self._broker.close()


_managers: weakref.WeakSet[PoolManager] = weakref.WeakSet()


def managers_of_this_process() -> list[PoolManager]:
    """Give all that there are."""
    return list(_managers)


def _forked() -> None:
    for manager in list(_managers):
        manager._begin()


# A child shares no lock, thread, greenlet or log with its parent: two processes that number their own events must
# not do so under one epoch.
os.register_at_fork(after_in_child=_forked)
