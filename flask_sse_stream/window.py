"""What a client that comes back can be given: the recent events of each key, and the place that an id stands for.

A window holds messages in their order; :class:`Windows` has all of this process's and answers a cursor. Neither
knows a stream or a broker; both take the time as an argument and do no locking: the pool manager calls them under
its lock.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict, deque
from collections.abc import Container, Mapping, Sequence
from typing import Final, NamedTuple

from .event import Message
from .keys import JOB_MARK, Kept, is_job

__all__ = ["Replay", "Window", "Windows"]

_CURSOR: Final = re.compile(r"([A-Za-z0-9._]{1,64})-([0-9]{1,19})\Z")
_EMPTY_WINDOW_SECONDS: Final = 60.0
_JOBS: Final = Kept(10_000, 3600.0, whole=True)


class Window:
    """At most ``size`` messages, none older than ``ttl`` seconds, contiguous from ``floor`` to ``head``.

    ``floor``
        every event of the key after this sequence number is here; what is at or below it is gone.
    ``head``
        the number of the newest event that ever was here, at least ``floor``.
    ``used``
        the monotonic time of the last publish, or when the last stream of the key left.
    ``born``
        the floor with which this window was made. While nothing has been dropped, that is its floor.
    ``complete``
        whether what the log remembers from before this window was made has been put in.
    ``over``
        whether it has the last message of a job, after which nothing is taken.

    A ``whole`` one is kept, or dropped, with all that is in it, ``ttl`` seconds after its newest message.
    """

    __slots__ = (
        "_messages", "_own_ids", "_size", "_ttl", "_whole", "born", "complete", "floor", "head", "over", "used"
    )  # fmt: skip

    def __init__(self, size: int, ttl: float, whole: bool = False, *, floor: int = 0, now: float = 0.0) -> None:
        self._size = size
        self._ttl = ttl
        self._whole = whole
        self._messages: deque[Message] = deque()
        self._own_ids: dict[str, int] | None = None  # most keys never have one
        self.born: int = floor
        self.floor: int = floor
        self.head: int = floor
        self.used: float = now
        self.complete: bool = False
        self.over: bool = False

    def __len__(self) -> int:
        return len(self._messages)

    def add(self, message: Message, now: float) -> bool:
        """Take the next message. One that is not after the head, or after the end of a job, is left out: ``False``."""
        if message.seq <= self.head or self.over:
            return False
        self._messages.append(message)
        self.over = message.last
        self.head = message.seq
        self.used = now
        if message.own_id:
            if self._own_ids is None:
                self._own_ids = {}
            self._own_ids[message.id] = message.seq
        if len(self._messages) > self._size:
            self._drop()
        self.trim(now)
        return True

    def complete_with(self, floor: int, messages: Sequence[Message], now: float) -> None:
        """Put in what the log remembers from before this window's own messages.

        The two overlap, or meet: what the log remembers goes on to when this window was taking messages already.
        """
        if self.complete:
            return
        self.complete = True
        if self.floor != self.born:
            return  # Newer events have been dropped already, so older ones are no use.
        first = self._messages[0].seq if self._messages else math.inf
        older = [message for message in messages if message.seq < first]
        self._messages.extendleft(reversed(older))
        # A history that was cut short may begin after this window does.
        self.floor = floor if floor < first else int(first) - 1
        self.head = max(self.head, self.floor, self._messages[-1].seq if self._messages else 0)
        for message in older:
            if message.own_id:
                if self._own_ids is None:
                    self._own_ids = {}
                # A newer event with the same id keeps its place.
                self._own_ids[message.id] = max(message.seq, self._own_ids.get(message.id, 0))
        if self._whole:
            self._end_at_the_first_end()
        while len(self._messages) > self._size:
            self._drop()
        self.trim(now)

    def _end_at_the_first_end(self) -> None:
        # A producer that did not know yet may have gone on.
        for place, message in enumerate(self._messages):
            if message.last:
                self.over = True
                while len(self._messages) > place + 1:
                    self._messages.pop()
                return

    def trim(self, now: float) -> None:
        """Drop what is too old."""
        oldest = now - self._ttl
        if self._whole:
            if self._messages and self._messages[-1].created < oldest:
                while self._messages:
                    self._drop()
                self.over = False  # the same job may be begun again
            return
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


class Replay(NamedTuple):
    """The answer to a cursor: ``messages`` it has not seen; or why it has to start over, and for which ``keys``."""

    messages: list[Message]
    reset: str | None = None
    keys: tuple[str, ...] = ()


class Windows:
    """The windows of a process by key; ``None`` is the key of what went to all.

    ``epoch``
        the life of the log that they are of, ``None`` before it is known.
    ``earlier``
        lives that this one continues, and up to which number.
    ``head``
        the sequence number of the newest event that this process knows of, whatever its key.
    ``born``
        the head when this process learned of the log: of what was before, it knows nothing by itself.

    A ``size`` of 0 keeps nothing, and every cursor is answered with nothing. With ``fetched`` the history is the
    log's: there are windows for keys that have, or just had, streams, and they are completed from the log; where
    there is a window, the log delivers every message of its key. ``jobs`` is what is kept of a job's key.
    """

    def __init__(self, size: int, ttl: float, *, fetched: bool = False, jobs: Kept = _JOBS) -> None:
        self._kept = Kept(size, ttl)
        self._jobs = jobs
        self._fetched = fetched
        self._windows: OrderedDict[str | None, Window] = OrderedDict()
        self._floor = 0  # the highest floor of the windows that were forgotten
        self.born: int = 0
        self.epoch: str | None = None
        self.earlier: Mapping[str, int] = {}
        self.head: int = 0

    def __len__(self) -> int:
        return len(self._windows)

    def begin(self, epoch: str, head: int, earlier: Mapping[str, int]) -> None:
        """Begin anew with a log's life, of which nothing up to ``head`` is known."""
        self._windows.clear()
        self.epoch = epoch
        self.earlier = earlier
        self.head = self._floor = self.born = head

    def live_on(self, epoch: str, earlier: Mapping[str, int]) -> bool:
        """Go over into a life that continues this one, with everything that is known; say whether it does."""
        if epoch != self.epoch and (self.epoch is None or earlier.get(self.epoch, -1) < self.head):
            return False
        self.epoch, self.earlier = epoch, earlier
        return True

    def reach(self, head: int) -> None:
        """Every event up to ``head`` that this process is to know of has been taken in."""
        self.head = max(self.head, head)

    def add(self, message: Message, now: float, in_use: Container[str | None]) -> bool:
        """Take the next message in; ``False`` for one that nobody is to have. ``in_use``: keys that have streams."""
        if message.seq <= self.head:
            return False
        self.head = message.seq
        taken = True
        if self._fetched:
            window = self._windows.get(message.key)
            if window is not None:
                taken = window.add(message, now)
            self._sweep(now, in_use)
        elif self._size_of(message.key):
            taken = self._window(message.key, now).add(message, now)
            self._sweep(now, in_use)
        return taken

    def _size_of(self, key: str | None) -> int:
        return (self._jobs if is_job(key) else self._kept).size

    def incomplete(self, keys: Sequence[str | None], now: float) -> list[str | None]:
        """Make windows for ``keys`` where there are none; give the keys of those that lack what the log remembers."""
        if not self._fetched:
            return []
        return [key for key in keys if not self._window(key, now).complete]

    def complete_with(self, key: str | None, floor: int, messages: Sequence[Message], now: float) -> None:
        """Put what the log remembered of a key into the key's window."""
        window = self._windows.get(key)
        if window is not None:
            window.complete_with(floor, messages, now)

    def lose(self, key: str | None, seq: int, now: float) -> None:
        """Events of a key up to ``seq`` never reached this process."""
        if is_job(key):
            self._windows.pop(key, None)  # whoever reads it comes back, and has it from the log
        elif key in self._windows:
            window = self._windows[key] = Window(*self._kept, floor=seq, now=now)
            window.complete = True

    def touch(self, key: str, now: float) -> None:
        """A stream of ``key`` begins or ends: from here on, its history is to be kept even if it is empty."""
        if self._size_of(key) or self._fetched:
            self._window(key, now).used = now

    def _window(self, key: str | None, now: float) -> Window:
        window = self._windows.get(key)
        if window is None:
            # Whatever this key may have had before is at or below the floor of what was forgotten, or in the log.
            floor = self.head if self._fetched else self._floor
            kept = self._jobs if is_job(key) else self._kept
            window = self._windows[key] = Window(*kept, floor=floor, now=now)
        return window

    def forget_idle(self, keys: Sequence[str], now: float, in_use: Container[str | None]) -> list[str]:
        """Forget the windows of those of ``keys`` that nobody has used for a while; give all that have none."""
        idle = []
        for key in keys:
            window = self._windows.get(key)
            if key in in_use or (window is not None and now - window.used < _EMPTY_WINDOW_SECONDS):
                continue
            self._windows.pop(key, None)
            idle.append(key)
        return idle

    def _sweep(self, now: float, in_use: Container[str | None]) -> None:
        """Look at two windows, in turn, and forget those that are empty and that nobody has used for a while.

        Not at once: a client of a quiet key that is back within a minute shall find that it missed nothing.
        """
        for _ in range(min(2, len(self._windows))):
            key, window = next(iter(self._windows.items()))
            window.trim(now)
            kept = len(window) and not self._fetched
            if kept or key is None or key in in_use or now - window.used < _EMPTY_WINDOW_SECONDS:
                self._windows.move_to_end(key)
            else:
                self._floor = max(self._floor, window.floor)
                del self._windows[key]

    def latest(self, keys: Sequence[str], number: int, now: float) -> list[Message]:
        """Give the latest ``number`` messages of each key, and of what went to all, in their order."""
        if not number:
            return []
        return _in_order([window.after(0)[-number:] for window in self._trimmed(keys, now)])

    def job(self, key: str, now: float) -> list[Message]:
        """Give what is known of a job, oldest first."""
        return [message for window in self._trimmed((key,), now) for message in window.after(0)]

    def is_over(self, key: str) -> bool:
        """Say whether a job has ended."""
        window = self._windows.get(key)
        return window is not None and window.over

    def begins(self, key: str, now: float) -> tuple[int, bool]:
        """Give the place before the first message that is known of a job, and whether earlier ones are gone."""
        messages = self.job(key, now)
        if not messages:
            return self.head, False
        # A job begins with a mark, of which it may have others later; which these are is for whoever made them.
        begins = messages[0].own_id and messages[0].id.startswith(JOB_MARK) and ".still" not in messages[0].id
        return messages[0].seq - 1, not begins

    def replay(self, keys: Sequence[str], last_event_id: str, now: float) -> Replay:
        """Answer the cursor of a client that listens to ``keys``.

        Reasons to start over: ``"epoch"``, the id is of another life of the log; ``"history"``, it is older than
        what is kept of some ``keys``; ``"unknown"``, it stands for no place. Whatever the id says, only what is
        in the windows of ``keys`` is looked at: an id of another pool leads nowhere.
        """
        windows = self._trimmed(keys, now)
        match = _CURSOR.match(last_event_id)
        if match is not None and self._is_place(match[1], int(match[2])):
            place = int(match[2])
            if place > self.head:
                return Replay([], "unknown", tuple(keys))
        else:
            places = [found for window in windows if (found := window.find(last_event_id)) is not None]
            if not places:
                return Replay([], "unknown" if match is None else "epoch", tuple(keys))
            place = max(places)
        if not is_job(keys[0]) and self._floor_of(None) > place:
            return Replay([], "history", tuple(keys))
        missed = _in_order([window.after(place) for window in windows])
        if any(self._floor_of(key) > place for key in keys):
            # It goes on at the head: what it missed of its other keys is not sent either.
            also = {message.key for message in missed}
            lost = [key for key in keys if None in also or key in also or self._floor_of(key) > place]
            return Replay([], "history", tuple(lost))
        return Replay(missed)

    def _is_place(self, epoch: str, seq: int) -> bool:
        return epoch == self.epoch or seq <= self.earlier.get(epoch, -1)

    def _floor_of(self, key: str | None) -> int:
        window = self._windows.get(key)
        if self._fetched and (window is None or not window.complete):
            # The log has not been asked yet, or what it said was of another life, so nothing is known of this key. That
            # it has a window says little: what is published is heard only some time after that was made.
            return self.head
        if window is not None:
            return window.floor
        # The window of what goes to all is never forgotten: without one, nothing ever did in this log.
        return self._floor if key is not None else self.born

    def _trimmed(self, keys: Sequence[str], now: float) -> list[Window]:
        # What goes to all is no part of a job.
        wanted = keys if is_job(keys[0]) else (*keys, None)
        windows = [self._windows[key] for key in wanted if key in self._windows]
        for window in windows:
            window.trim(now)
        return windows


def _in_order(runs: list[list[Message]]) -> list[Message]:
    found = [message for run in runs for message in run]
    found.sort(key=lambda message: message.seq)
    return found
