"""The flusher's rounds: what there is to do for the streams, in slices.

The pool manager leaves work here (messages in the outbox, streams to wake or to close) and knows who listens; the
flusher, one greenlet or thread of each process, calls :meth:`Rounds.flush` again and again. In between others have
their turn, so no publisher, no view and no other stream waits for a long list of listeners.

Nothing here waits, and no hook, callback or transport is called under the lock.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import random
import time
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from .access import expiry_notice
from .counts import BYTES, DELIVERED, DROPPED, FLUSH, LAG, Counts
from .draining import Drain
from .event import PING, Message, chunk
from .settings import Settings
from .stream import CloseReason, Lock, Stream
from .transports.base import Pusher

__all__ = ["Rounds"]

logger: logging.Logger = logging.getLogger("flask_sse_stream")

_SLICE_SECONDS: Final = 0.001
_SLICE_STREAMS: Final = 64  # between two looks at the clock
_PASS_MESSAGES: Final = 64  # offered before their streams are woken
_PASS_BYTES: Final = 256 * 1024
_SHORTEST_REST: Final = 0.02
_LONGEST_REST: Final = 0.1
_PING_CHUNK: Final = chunk(PING)
_ABSENT: Final = object()


class Rounds:
    """Offers messages to streams, wakes their transports, and sees to what falls due with time.

    ``streams``
        every stream of this process.
    ``outbox``
        messages that somebody listens to and nobody was offered yet.
    ``drain``
        how far the end of all streams has come.
    ``listeners``
        gives the streams that a message of a key is for; called under the lock.
    ``tell_dropped``
        is told what an overflow policy dropped, outside the lock.
    ``counts``
        what is counted.
    """

    def __init__(
        self,
        settings: Settings,
        lock: Lock,
        listeners: Callable[[str | None], tuple[Stream, ...]],
        tell_dropped: Callable[[Stream, int], object],
        counts: Counts,
    ) -> None:
        self._settings = settings
        self._counts = counts
        self._lock = lock
        self._listeners = listeners
        self._tell_dropped = tell_dropped
        self.streams: dict[Stream, None] = {}
        self.outbox: deque[Message] = deque()
        self.drain: Drain = Drain(settings, lock, self.streams, self._last_waiting, self._is_offered)
        self._life = 0  # counts the lives of the log
        self._batch: list[Message] = []  # messages that are being offered now
        self._to_wake: deque[Stream] = deque()
        self._to_close: deque[tuple[Stream, CloseReason, bytes]] = deque()
        self._searches: deque[Callable[[Stream], tuple[CloseReason, bytes] | None]] = deque()
        self._calls: deque[Callable[[], object]] = deque()
        self._drops: dict[Stream, int] = {}
        # Without heartbeats, clients that are stuck have to be found all the same.
        self._interval = settings.ping_interval or settings.send_timeout
        # When each stream is to be looked at for its silence; it may have said something since that was written down.
        # The number decides between equal times, since references cannot be compared.
        self._silences: list[tuple[float, int, weakref.ref[Stream]]] = []
        # When each stream is to end, and why.
        self._ages: list[tuple[float, int, weakref.ref[Stream], CloseReason]] = []
        self._numbers = itertools.count()
        self._lingering: deque[tuple[float, weakref.ref[Stream]]] = deque()  # ended; their last bytes may be stuck
        self._round: Iterator[float] | None = None

    # What the pool manager calls, under the lock

    def join(self, stream: Stream) -> None:
        """Take a stream in."""
        self.streams[stream] = None
        heapq.heappush(self._silences, (stream.opened + self._interval, next(self._numbers), weakref.ref(stream)))
        if self._settings.max_age is not None:
            age = self._settings.max_age * random.uniform(0.8, 1.0)  # noqa: S311  only spreads
            self._end_at(stream.opened + age, stream, CloseReason.ROTATED)
        left = stream.ticket.left() if stream.ticket is not None else None
        if left is not None:
            # From here on by the clock that nobody can set.
            self._end_at(stream.opened + left, stream, CloseReason.EXPIRED)

    def _end_at(self, when: float, stream: Stream, reason: CloseReason) -> None:
        if len(self._ages) > 4 * len(self.streams) + _SLICE_STREAMS:
            # Most of those that are written down have left long before their time.
            self._ages = [item for item in self._ages if item[2]() in self.streams]
            heapq.heapify(self._ages)
        heapq.heappush(self._ages, (when, next(self._numbers), weakref.ref(stream), reason))

    def leave(self, stream: Stream, reason: CloseReason) -> bool:
        """Let a stream go; say whether it was here."""
        if self.streams.pop(stream, _ABSENT) is _ABSENT:
            return False
        if reason is not CloseReason.PEER:
            self._lingering.append((time.monotonic() + self._settings.send_timeout, weakref.ref(stream)))
        return True

    def forget_messages(self) -> None:
        """The log began anew: nothing of the old one is to be offered any more."""
        self.outbox.clear()
        self._batch = []
        self._life += 1

    def catch_up(self, streams: Iterable[Stream]) -> None:
        """Offer streams that are about to end what was published for them before."""
        for message in (*self._batch, *self.outbox):
            for stream in streams:
                if (message.key is None and stream.keys) or message.key in stream.keys:
                    stream.offer_last(message)

    def dropped(self, stream: Stream, count: int) -> None:
        """Count what was dropped, and tell of it later."""
        self._counts.cells[DROPPED] += count
        self._drops[stream] = self._drops.get(stream, 0) + count

    # What anybody calls, from anywhere

    def wake_soon(self, stream: Stream) -> None:
        """Wake the stream's transport in the next round."""
        self._to_wake.append(stream)

    def close_soon(self, stream: Stream, reason: CloseReason) -> None:
        """Close the stream in the next round."""
        self._to_close.append((stream, reason, b""))

    def search_soon(self, end: Callable[[Stream], tuple[CloseReason, bytes] | None]) -> None:
        """Ask of every stream in the next round how it is to end, and what its last bytes are; ``None``: not at all."""
        self._searches.append(end)

    def call_soon(self, call: Callable[[], object]) -> None:
        """Have ``call``, which must not wait, made in the next round, where the flusher runs."""
        self._calls.append(call)

    # What the flusher calls

    def flush(self) -> float | None:
        """Work for about a millisecond; return after how many seconds to come back, ``None``: when woken.

        For the flusher alone. 0 means that there is more to do, after others had their turn.
        """
        begun = time.monotonic()
        if self._round is None:
            self._round = self._make_a_round()
        try:
            for pause in self._round:
                took = time.monotonic() - begun
                if pause or took >= _SLICE_SECONDS:
                    FLUSH.add(self._counts.cells, took)
                    return pause
        except Exception:
            logger.exception("the flusher failed in a round and goes on with the next")
        FLUSH.add(self._counts.cells, time.monotonic() - begun)
        self._round = None
        return 0.0 if self.outbox else self._next_due()

    def _make_a_round(self) -> Iterator[float]:
        """See to everything once. Yields where others may run; more than 0: seconds of rest."""
        if self.outbox:
            yield from self._fan_out()
        yield from self._heartbeat()
        yield from self._end_the_old()
        yield from self._search()
        yield from self._cut_off_the_stuck()
        yield from self.drain.steps(self._lingering)
        yield from self._wake()
        while self._calls:
            self._calls.popleft()()
            yield 0.0

    def _fan_out(self) -> Iterator[float]:
        batch: list[Message] = []
        size = 0
        # Half a queue at the most: a client that keeps up has room for all of it.
        most = min(_PASS_MESSAGES, max(1, self._settings.queue_events // 2))
        most_bytes = min(_PASS_BYTES, self._settings.queue_bytes // 2)
        with self._lock:
            life = self._life
            while self.outbox and len(batch) < most and (not batch or size + len(self.outbox[0].frame) <= most_bytes):
                batch.append(self.outbox.popleft())
                size += len(batch[-1].frame)
            self._batch = batch
        touched: dict[Stream, None] = {}
        # What is the only news for its streams is sent at once; several events are joined, which costs less.
        alone = len(batch) == 1 and not self.outbox
        counts = Counter(message.key for message in batch)
        for message in batch:
            alone_for_key = alone or (counts[message.key] == 1 and None not in counts)
            with self._lock:
                streams = self._listeners(message.key)
            for start in range(0, len(streams), _SLICE_STREAMS):
                now, offered = time.monotonic(), 0
                pushes: defaultdict[Pusher, list[Stream]] = defaultdict(list)
                with self._lock:
                    if life != self._life:
                        break  # The log began anew: an event of the old one would spoil the cursor of the new.
                    for stream in streams[start : start + _SLICE_STREAMS]:
                        pusher = None
                        if alone_for_key and (alone or len(stream.keys) == 1) and not message.last:
                            pusher = stream.pass_by(message)
                        if pusher is not None:
                            pushes[pusher].append(stream)
                        elif stream.offer(message):
                            touched[stream] = None
                        else:
                            continue
                        stream.last_active = now
                        offered += 1
                        if message.last:
                            self.close_soon(stream, CloseReason.ENDED)
                for pusher, at_once in pushes.items():
                    left = pusher.push(at_once, message.chunk)
                    self._counts.cells[BYTES] += (len(at_once) - len(left)) * len(message.frame)
                    if left:
                        touched.update(dict.fromkeys(self._put_back(message, left, life)))
                self._counts.cells[DELIVERED] += offered
                yield 0.0
        self._batch = []
        self._to_wake.extend(touched)
        yield from self._wake()
        now = time.monotonic()
        LAG.add_all(self._counts.cells, [max(0.0, now - message.created) for message in batch])
        if self.outbox:
            # Threads that write need the interpreter's lock; without a rest they would overflow, not being slow.
            # All are asked each time, so that those whose transports do not come lose patience together.
            while [stream for stream in touched if stream.crowded(time.monotonic())]:
                yield 0.001

    def _last_waiting(self) -> int:
        return self.outbox[-1].seq if self.outbox else 0

    def _is_offered(self, seq: int) -> bool:
        try:
            return self.outbox[0].seq > seq
        except IndexError:
            return True

    def _put_back(self, message: Message, streams: list[Stream], life: int) -> list[Stream]:
        """Put what could not be pushed into the queues after all; give the streams that have it."""
        with self._lock:
            if life != self._life:
                return []  # They have been told that the log began anew.
            for stream in streams:
                stream.put_back(message)
        return streams

    def _wake(self) -> Iterator[float]:
        while self._to_wake:
            transport = self._to_wake.popleft().transport
            if transport is not None:
                transport.wake()
            if len(self._to_wake) % _SLICE_STREAMS == 0:
                yield 0.0
        while self._to_close:
            stream, reason, last = self._to_close.popleft()
            stream.close(reason, last)
            yield 0.0
        while self._drops:
            with self._lock:
                stream = next(iter(self._drops))
                count = self._drops.pop(stream)
            self._tell_dropped(stream, count)
            yield 0.0

    def _heartbeat(self) -> Iterator[float]:
        interval, patience = self._interval, self._settings.send_timeout
        pings = self._settings.ping_interval > 0
        now = time.monotonic()
        while self._silences and self._silences[0][0] <= now:
            pushes: defaultdict[Pusher, list[Stream]] = defaultdict(list)
            with self._lock:
                for _ in range(_SLICE_STREAMS):
                    if not self._silences or self._silences[0][0] > now:
                        break
                    _, number, reference = self._silences[0]
                    stream = reference()
                    if stream is None or stream not in self.streams:
                        heapq.heappop(self._silences)
                        continue
                    due = stream.last_active + interval
                    # Also where events keep coming: they may be dropped for ever.
                    stuck = bool(stream.writing_since) and now - stream.writing_since > patience
                    if stuck:
                        self._to_close.append((stream, CloseReason.STALLED, b""))
                    if due <= now:
                        due = now + interval
                        if pings and stream.comments and not stuck:
                            if (pusher := stream.pusher()) is not None:
                                pushes[pusher].append(stream)
                                stream.sent += len(PING)
                            elif stream.put_ping():
                                self._to_wake.append(stream)
                            stream.last_active = now
                    heapq.heapreplace(self._silences, (due, number, reference))
            for pusher, streams in pushes.items():
                left = pusher.push(streams, _PING_CHUNK)
                self._counts.cells[BYTES] += (len(streams) - len(left)) * len(PING)
                with self._lock:
                    for stream in left:
                        stream.sent -= len(PING)
                        if stream.put_ping():
                            self._to_wake.append(stream)
            yield 0.0

    def _end_the_old(self) -> Iterator[float]:
        now = time.monotonic()
        while self._ages and self._ages[0][0] <= now:
            with self._lock:
                _, _, reference, reason = heapq.heappop(self._ages)
            stream = reference()
            if stream is not None:
                last = expiry_notice("expired") if reason is CloseReason.EXPIRED else b""
                self._to_close.append((stream, reason, last))
            yield 0.0

    def _search(self) -> Iterator[float]:
        while self._searches:
            end = self._searches.popleft()
            with self._lock:
                streams = tuple(self.streams)
            for start in range(0, len(streams), _SLICE_STREAMS):
                for stream in streams[start : start + _SLICE_STREAMS]:
                    how = end(stream)
                    if how is not None:
                        self._to_close.append((stream, *how))
                yield 0.0

    def _cut_off_the_stuck(self) -> Iterator[float]:
        """Free the server's code that hangs in a write of the last bytes of a stream that has ended."""
        patience = self._settings.send_timeout
        now = time.monotonic()
        while self._lingering and self._lingering[0][0] <= now:
            stream = self._lingering.popleft()[1]()
            transport = stream.transport if stream is not None else None
            if stream is None or transport is None:
                continue
            if stream.writing_since and now - stream.writing_since < patience:
                self._lingering.append((now + patience, weakref.ref(stream)))  # slow, but it takes bytes
            else:
                transport.close()
            yield 0.0

    def _next_due(self) -> float | None:
        due = []
        with self._lock:
            if self._silences and self.streams:
                due.append(self._silences[0][0])
            if self._ages:
                due.append(self._ages[0][0])
            if self._lingering:
                due.append(self._lingering[0][0])
        if (drain := self.drain.next_due()) is not None:
            due.append(drain)
        # Thousands of streams would have a moment each: what falls due within a hundredth of the interval is done
        # together.
        rest = min(max(self._interval / 100, _SHORTEST_REST), _LONGEST_REST)
        return max(min(due) - time.monotonic(), rest) if due else None
