"""The recent events of one key: what a client that comes back can be given.

A window knows messages and their order; it knows no key's name, no stream and no broker, takes the time as an
argument, and does no locking: its pool manager calls it under its lock.
"""

from __future__ import annotations

from collections import deque

from .event import Message

__all__ = ["Window"]


class Window:
    """At most ``size`` messages, none older than ``ttl`` seconds, contiguous from ``floor`` to ``head``.

    ``floor``
        every event of the key after this sequence number is here; what is at or below it is gone.
    ``head``
        the number of the newest event that ever was here, at least ``floor``.
    ``used``
        the monotonic time of the last publish, or when the last stream of the key left.
    """

    __slots__ = ("_messages", "_own_ids", "_size", "_ttl", "floor", "head", "used")

    def __init__(self, size: int, ttl: float, *, floor: int = 0, now: float = 0.0) -> None:
        self._size = size
        self._ttl = ttl
        self._messages: deque[Message] = deque()
        self._own_ids: dict[str, int] | None = None  # most keys never have one
        self.floor = floor
        self.head = floor
        self.used = now

    def __len__(self) -> int:
        return len(self._messages)

    def add(self, message: Message, now: float) -> None:
        """Take the next message. One that is not after the head is a repetition and is left out."""
        if message.seq <= self.head:
            return
        self._messages.append(message)
        self.head = message.seq
        self.used = now
        if message.own_id:
            if self._own_ids is None:
                self._own_ids = {}
            self._own_ids[message.id] = message.seq
        if len(self._messages) > self._size:
            self._drop()
        self.trim(now)

    def trim(self, now: float) -> None:
        """Drop what is too old."""
        oldest = now - self._ttl
        while self._messages and self._messages[0].created < oldest:
            self._drop()

    def _drop(self) -> None:
        message = self._messages.popleft()
        self.floor = message.seq
        # The same id may have been used again by a newer event, which keeps its place.
        if message.own_id and self._own_ids and self._own_ids.get(message.id) == message.seq:
            del self._own_ids[message.id]

    def find(self, own_id: str) -> int | None:
        """Give the sequence number of the newest event that was published with this id of the user's own."""
        return self._own_ids.get(own_id) if self._own_ids else None

    def after(self, seq: int) -> list[Message]:
        """Give the messages after ``seq``, oldest first; complete if ``seq >= floor``."""
        found = []
        for message in reversed(self._messages):  # what a client missed is at the end
            if message.seq <= seq:
                break
            found.append(message)
        found.reverse()
        return found
