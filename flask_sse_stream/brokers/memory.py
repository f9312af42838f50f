"""The log of one process. What it remembers are the windows of the pool manager; it gives the order.

Publishing here works from wherever Python code can run: any thread, greenlet or hub callback, ``__del__``, and a
signal handler that has interrupted another publish half-way. So nothing in it waits, and there is no lock whose
holder could be the very frame that was interrupted. What it relies on is that one call into C is one step for
every other thread and for signal handlers, which the global interpreter lock gives.
"""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from ..errors import BrokerError
from ..event import Message
from ..settings import Settings
from .base import BrokerStats, Deliver, Idle, Position, never_idle

__all__ = ["MemoryBroker"]

_FEW_LEASES: Final = 100


class _Entry:
    __slots__ = ("body", "created", "key", "message")

    def __init__(self, key: str | None, body: bytes) -> None:
        self.key = key
        self.body = body
        self.created = time.monotonic()
        self.message: Message | None = None


class MemoryBroker:
    """Orders the events of one process. The log's life is this object's: its epoch is random."""

    remembers = False

    def __init__(self, settings: Settings) -> None:
        self._kept = settings.kept
        self._epoch = secrets.token_hex(6)
        self._numbers = itertools.count(1)
        self._pending: deque[tuple[_Entry, int]] = deque()
        self._turn: deque[None] = deque([None])  # who pops it may deliver; who cannot, need not
        self._head = 0
        self._once: dict[str, _Entry] = {}
        self._once_in_order: deque[tuple[float, str]] = deque()
        self._once_ttl = settings.idempotency_ttl
        self._timeout = settings.broker_timeout
        self._marks: dict[str, tuple[float, float]] = {}
        self._marking = threading.RLock()
        self._leases: dict[str, tuple[str, float]] = {}
        self._leasing = threading.RLock()
        self._many_leases = _FEW_LEASES
        self._deliver: Deliver

    def start(self, deliver: Deliver, idle: Idle = never_idle) -> None:
        """Remember where messages go."""
        self._deliver = deliver

    def publish(self, key: str | None, body: bytes, once: str | None = None) -> str:
        """Number the event, deliver it and return its id. Never waits and, without ``once``, never raises."""
        entry = _Entry(key, body)
        if once is not None:
            first = self._first(once, entry)
            if first is not entry:
                return self._id_of(first, once)
        # Numbered and queued in one step, so the queue is always in the order of the numbers. The entry comes
        # first in zip(): asked the other way round, the counter would lose a number each time.
        self._pending.extend(zip((entry,), self._numbers, strict=False))
        self._drain()
        while (message := entry.message) is None:
            # Somebody else has the turn (or is the frame that we interrupted) and will deliver ours after his
            # own. An entry leaves the queue with its message made, so it is found here or has one by now.
            for queued, seq in self._pending.copy():
                if queued is entry:
                    return self._message(entry, seq).id
        return message.id

    def _first(self, once: str, entry: _Entry) -> _Entry:
        """Give the entry that has this idempotency key: ``entry``, or the one that had it before."""
        while self._once_in_order and self._once_in_order[0][0] < entry.created:
            try:
                oldest = self._once_in_order.popleft()
            except IndexError:
                break  # Another thread has tidied up.
            if oldest[0] >= entry.created:  # It has taken the one that was looked at, and this is the next.
                self._once_in_order.appendleft(oldest)
                break
            self._once.pop(oldest[1], None)
        first = self._once.setdefault(once, entry)  # one step, like everything here
        if first is entry:
            self._once_in_order.append((entry.created + self._once_ttl, once))
        return first

    def _id_of(self, entry: _Entry, once: str) -> str:
        deadline = time.monotonic() + self._timeout
        while entry.message is None:  # The first call is still at it.
            if time.monotonic() > deadline:
                raise BrokerError(f"the publish that first had the idempotency key {once!r} was interrupted")
            time.sleep(0)
        return entry.message.id

    def cover(self, keys: Sequence[str | None], fetch: Sequence[str | None], after: str | None) -> Position:
        """Give the position; the windows hold all that there is."""
        return Position(self._epoch, self._head)

    def lease(self, name: str, holder: str, seconds: float) -> bool:
        """Let one holder of this process have ``name``."""
        now = time.monotonic()
        with self._leasing:
            known, until = self._leases.get(name, (holder, 0.0))
            if known != holder and until > now:
                return False
            self._leases.pop(name, None)
            if seconds:
                self._leases[name] = (holder, now + seconds)
            if len(self._leases) > self._many_leases:
                self._leases = {name: lease for name, lease in self._leases.items() if lease[1] > now}
                self._many_leases = 2 * len(self._leases) + _FEW_LEASES
        return True

    def mark(self, name: str, at: float, seconds: float) -> None:
        """Remember when ``name`` was marked."""
        with self._marking:
            known, until = self._marks.get(name, (at, 0.0))
            self._marks[name] = max(known, at), max(until, at + seconds)
            for other in [other for other, (_, until) in self._marks.items() if until < at]:
                del self._marks[other]

    def marked(self, names: Sequence[str]) -> float:
        """Give the latest time at which one of ``names`` was marked."""
        with self._marking:
            return max((self._marks[name][0] for name in names if name in self._marks), default=0.0)

    def stats(self) -> BrokerStats:
        """There is nothing that it could lose touch with."""
        return BrokerStats()

    def close(self) -> None:
        """There is nothing to let go of."""

    def _message(self, entry: _Entry, seq: int) -> Message:
        return Message(entry.key, self._epoch, seq, entry.body, entry.created, resumable=self._kept(entry.key).size > 0)

    def _drain(self) -> None:
        while self._pending:
            try:
                self._turn.pop()
            except IndexError:
                return  # Who has the turn looks again after giving it back.
            try:
                while self._pending:
                    entry, seq = self._pending[0]
                    entry.message = self._message(entry, seq)
                    self._deliver(entry.message)
                    self._head = seq  # what cover() gives has been delivered
                    # Last: interrupted by an exception before this, it is delivered again, which is harmless.
                    self._pending.popleft()
            finally:
                self._turn.append(None)
