"""What the broker delivers: into the windows, and to the flusher where somebody listens.

``deliver`` may be called by any thread, greenlet, hub callback or signal handler. It takes the lock only if it is free;
whoever holds it comes back here when letting go. All else is called under the lock.
"""

from __future__ import annotations

import functools
import json
import time
from collections import deque
from collections.abc import Callable, Iterable

from .access import CONTROL_KEY
from .brokers.base import Delivery, Gap, History, Life
from .counts import RESETS, Counts
from .event import Event, Message
from .keys import REPORT_KEY, is_job, shown
from .kicks import Kick
from .listeners import Listeners
from .reports import Inquiry
from .revocations import Revocations
from .rounds import Rounds
from .stream import NOTHING_MORE, CloseReason, Lock, Stream
from .window import Windows

__all__ = ["Intake"]


class Intake:
    """Takes in what was delivered, in its order.

    ``wake``
        is called when there is something for the flusher.
    ``counts``
        what is counted.
    ``asked``
        is called in the flusher with an inquiry.
    ``kicked``
        is called under the lock with the order to end a stream.
    ``reports``
        takes the bodies of what processes say of themselves, while somebody here gathers them.
    """

    def __init__(
        self,
        lock: Lock,
        windows: Windows,
        listeners: Listeners,
        rounds: Rounds,
        revocations: Revocations,
        wake: Callable[[], object],
        counts: Counts,
        asked: Callable[[Inquiry], object],
        kicked: Callable[[Kick], object],
    ) -> None:
        self._lock = lock
        self._windows = windows
        self._listeners = listeners
        self._rounds = rounds
        self._revocations = revocations
        self._wake = wake
        self._inbox: deque[Delivery] = deque()
        self._counts = counts
        self._asked = asked
        self._kicked = kicked
        self.reports: deque[bytes] | None = None

    def deliver(self, delivery: Delivery) -> None:
        """Take the next message of the log. For the broker; never waits, never raises."""
        self._inbox.append(delivery)
        self.absorb()

    def absorb(self) -> None:
        """Take in what was delivered, unless somebody else is about to. Without the lock, from anywhere."""
        work = False
        while self._inbox:
            if not self._lock.try_acquire():
                break  # Who holds the lock comes here when letting go.
            try:
                work = self.take_all() or work
            finally:
                self._lock.release()
        if work:
            self._wake()

    def take_all(self) -> bool:
        """Take in what was delivered; say whether any of it is for somebody."""
        work = False
        while self._inbox:
            # It leaves the inbox last: interrupted by an exception before this, it is taken again, which is harmless.
            work = self._take(self._inbox[0]) or work
            self._inbox.popleft()
        return work

    def _take(self, delivery: Delivery) -> bool:
        if not isinstance(delivery, Message):
            return self._take_news(delivery)
        if delivery.epoch != self._windows.epoch:
            self.enter(Life(delivery.epoch, delivery.seq - 1))
        if delivery.key == CONTROL_KEY:
            return self._take_control(delivery)
        if delivery.key == REPORT_KEY:
            return self._take_report(delivery)
        if not self._windows.add(delivery, time.monotonic(), self._listeners):
            return False  # delivered again, or said after the end of a job
        if delivery.key not in self._listeners:
            return False
        self._rounds.outbox.append(delivery)
        return True

    def _take_control(self, message: Message) -> bool:
        """Take what processes tell each other: it is in no window, and no client ever sees it."""
        if message.seq <= self._windows.head:
            return False  # delivered again
        self._windows.reach(message.seq)
        inquiry = Inquiry.decode(message.frame)
        if inquiry is not None:
            self._rounds.call_soon(functools.partial(self._asked, inquiry))
        elif (kick := Kick.decode(message.frame)) is not None:
            self._kicked(kick)
        else:
            self._revocations.take(message)
        return True

    def _take_report(self, message: Message) -> bool:
        """Keep what a process says of itself for who gathers that. It is read later, not under the lock."""
        if message.seq > self._windows.head:
            self._windows.reach(message.seq)
            if self.reports is not None:
                self.reports.append(message.frame)
        return False

    def _take_news(self, news: Gap | History | Life) -> bool:
        if isinstance(news, Gap):
            return self._tell_gap(news)
        if isinstance(news, Life):
            if not self._windows.live_on(news.epoch, news.earlier):
                self.enter(news)
        elif news.epoch == self._windows.epoch:
            self._windows.reach(news.head)
            self._windows.complete_with(news.key, news.floor, news.messages, time.monotonic())
        return False

    def _tell_gap(self, gap: Gap) -> bool:
        """Tell the streams of a key that it lost events on the way to this process."""
        if gap.epoch != self._windows.epoch or gap.seq <= self._windows.born:
            return False  # Whoever listened to that log, or this one then, has been told already.
        if gap.key == CONTROL_KEY:
            self._revocations.lost()
            return True
        self._windows.lose(gap.key, gap.seq, time.monotonic())
        if is_job(gap.key):
            self._let_come_back(self._listeners.of(gap.key))
            return True
        for stream in self._listeners.of(gap.key):
            keys = stream.keys if gap.key is None else (gap.key,)
            # With the id that it had: of its other keys, what is in the outbox has yet to come.
            stream.put_reset(self.reset("history", keys, stream.cursor), stream.cursor)
            self._rounds.wake_soon(stream)
        return True

    def enter(self, life: Life) -> None:
        """Begin a log's life; after another one, whoever listens has lost what was between."""
        first = self._windows.epoch is None
        self._windows.begin(life.epoch, life.head, life.earlier)
        if first:
            return
        self._rounds.forget_messages()
        self._revocations.lost()
        for stream in self._listeners.of(None):
            stream.put_reset(self.reset("epoch", stream.keys), life.head)
            self._rounds.wake_soon(stream)
        self._let_come_back(self._listeners.of_jobs())
        self._wake()

    def _let_come_back(self, streams: Iterable[Stream]) -> None:
        """End streams of jobs: what is in the log by now, or whether it has the job at all, is asked by a new one."""
        for stream in streams:
            stream.cursor = NOTHING_MORE
            self._rounds.close_soon(stream, CloseReason.ROTATED)

    def reset(self, reason: str, keys: Iterable[str], place: int | None = None) -> bytes:
        """Make the frame that tells a client to load the state of ``keys`` anew, and where it goes on: at the head."""
        self._counts.cells[RESETS] += 1
        place = self._windows.head if place is None else place
        data = json.dumps({"reason": reason, "keys": [shown(key) for key in keys]}, ensure_ascii=False)
        return Event(data, event="stream-reset", id=f"{self._windows.epoch}-{place}").encode()
