"""What gives way when a client's queue is full, and what the client is told of it.

It knows policies and queues, and no stream, transport or lock: a stream calls it for its own queue. An item of a
queue is a :class:`~.event.Message`, which a policy may drop; a :class:`Hole`, where some were dropped; or bytes, which
nothing drops: the replay, ``stream-reset``, a heartbeat, the last bytes.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from .event import Event, Message
from .settings import DEFAULT_POLICY, Overflow

__all__ = ["DROPPED_EVENT", "Hole", "HoledQueue", "Item", "Policies", "conflate", "drop", "drop_oldest"]

DROPPED_EVENT: Final = "stream-dropped"
"""The name of the event that tells a client how many others were dropped at its place."""

_REMEMBERED: Final = 1024  # keys whose policy is known; there may be as many keys as users
_GIVES_WAY: Final = {"drop_oldest", "conflate"}


class Policies:
    """Which policy counts for a key.

    ``lossy``
        whether any of them drops events.
    ``conflates``
        whether any of them is ``"conflate"``.
    """

    __slots__ = ("_default", "_exact", "_known", "_patterns", "conflates", "lossy")

    def __init__(self, overflow: Overflow | Mapping[str, Overflow]) -> None:
        named: Mapping[str, Overflow] = {"*": overflow} if isinstance(overflow, str) else overflow
        self._exact = dict(named)
        self._patterns = [(pattern, policy) for pattern, policy in named.items() if pattern != "*"]
        self._default = named.get("*", DEFAULT_POLICY)
        self._known: dict[str, Overflow] = {}
        policies = {self._default, *named.values()}
        self.lossy: bool = policies != {"disconnect"}
        self.conflates: bool = "conflate" in policies

    def of(self, key: str | None) -> Overflow:
        """Give a key's policy: that of its own name, else of the first pattern that it matches, else of ``*``.

        What has no key, an event for all or one of :meth:`Stream.send`, has that of ``*``.
        """
        if key is None or not self._patterns:
            return self._default
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            known = self._known[key] = self._look_up(key)
        return known

    def _look_up(self, key: str) -> Overflow:
        if key in self._exact:
            return self._exact[key]
        return next((policy for pattern, policy in self._patterns if fnmatch.fnmatchcase(key, pattern)), self._default)


class Hole:
    """Where events were dropped one after the other.

    What is told of it has no id: a client whose connection breaks here comes back with the id of the last event that it
    has seen, and gets nothing twice.
    """

    __slots__ = ("count", "keys")

    def __init__(self) -> None:
        self.count: int = 0
        self.keys: dict[str, None] = {}

    def add(self, count: int, keys: Iterable[str]) -> None:
        """So many more are missing here."""
        self.count += count
        self.keys.update(dict.fromkeys(keys))

    @property
    def frame(self) -> bytes:
        """What the client is told."""
        data = json.dumps({"count": self.count, "keys": list(self.keys)}, ensure_ascii=False)
        return Event(data, event=DROPPED_EVENT).encode()


Item = bytes | Message | Hole


class HoledQueue(list[Item]):
    """A queue in which there are holes. They are counted against no bound: what tells of a loss causes none."""

    __slots__ = ("holes",)

    def __init__(self, items: Iterable[Item]) -> None:
        super().__init__(items)
        self.holes: int = 0


def drop(queue: HoledQueue, start: int, message: Message, keys: Sequence[str]) -> None:
    """Leave out a message that was to be the last. Nothing before ``start`` is touched; ``keys`` are the stream's."""
    last = queue[-1] if len(queue) > start else None
    if type(last) is not Hole:
        last = Hole()
        queue.append(last)
        queue.holes += 1
    last.add(1, _keys(message, keys))


def drop_oldest(queue: HoledQueue, start: int, keys: Sequence[str], policies: Policies) -> int:
    """Drop the oldest message that may give way to others; give its size, 0 if there is none."""
    for index in range(start, len(queue)):
        item = queue[index]
        if type(item) is Message and policies.of(item.key) in _GIVES_WAY:
            hole = Hole()
            hole.add(1, _keys(item, keys))
            first, end = index, index + 1
            if index > start and type(before := queue[index - 1]) is Hole:
                first = index - 1
                hole = _joined(before, hole)
            if end < len(queue) and type(after := queue[end]) is Hole:
                end += 1
                hole = _joined(hole, after)
            queue.holes += 2 - (end - first)
            queue[first:end] = [hole]
            return len(item.frame)
    return 0


def conflate(
    queue: HoledQueue, start: int, newest: Message, keys: Sequence[str], policies: Policies
) -> tuple[int, int]:
    """Keep the last message of each key and event name where that is the policy; ``newest`` is about to follow.

    Give how many were dropped, and their size.
    """
    seen = {(newest.key, newest.name)} if policies.of(newest.key) == "conflate" else set()
    superseded = set()
    for index in range(len(queue) - 1, start - 1, -1):
        item = queue[index]
        if type(item) is Message and policies.of(item.key) == "conflate":
            what = item.key, item.name
            if what in seen:
                superseded.add(index)
            seen.add(what)
    if not superseded:
        return 0, 0
    size = holes = 0
    kept: list[Item] = []
    for index in range(start, len(queue)):
        item = queue[index]
        hole = item if type(item) is Hole else None
        if index in superseded and type(item) is Message:
            size += len(item.frame)
            hole = Hole()
            hole.add(1, _keys(item, keys))
        if hole is None:
            kept.append(item)
        elif kept and type(before := kept[-1]) is Hole:
            _joined(before, hole)
        else:
            kept.append(hole)
            holes += 1
    queue[start:] = kept
    queue.holes = holes
    return len(superseded), size


def _joined(first: Hole, second: Hole) -> Hole:
    first.add(second.count, second.keys)
    return first


def _keys(message: Message, keys: Sequence[str]) -> Sequence[str]:
    """Of which of a stream's keys a message is."""
    return keys if message.key is None else (message.key,)
