"""The end of all streams of a process, as a part of the flusher's rounds.

Each client gets what was waiting for it and a ``retry:`` of its own, so that they do not all come back at once. Those
that do not read are given up at a deadline.
"""

from __future__ import annotations

import random
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import Final

from .event import retry_block
from .settings import Settings
from .stream import CloseReason, Lock, Stream

__all__ = ["Drain"]

_LOOK_SECONDS: Final = 0.02  # between two looks at whether the last bytes have left


class Drain:
    """Not begun, going on, or done.

    ``streams``
        every stream of this process; looked at under the lock.
    ``last_published``
        the number of the newest message that the streams are to be offered before they end, under the lock.
    ``is_offered``
        says whether everything up to a message's number was offered.
    ``deadline``
        the monotonic time at which whoever has not read is cut off; ``None``: it has not begun, and new streams are
        welcome.
    ``done``
        whether nothing is left to do: the servers, the reactor and the code that feeds streams have let go of them.
    """

    def __init__(
        self,
        settings: Settings,
        lock: Lock,
        streams: Collection[Stream],
        last_published: Callable[[], int],
        is_offered: Callable[[int], bool],
    ) -> None:
        self._settings = settings
        self._lock = lock
        self._streams = streams
        self._last_published = last_published
        self._is_offered = is_offered
        self.deadline: float | None = None
        self.done: bool = False
        self._staying: deque[Stream] | None = None
        self._count = self._last = 0
        # Weakly: a source that was stopped before it began leaves nothing but a stream that nobody has.
        self._leaving: deque[weakref.ref[Stream]] = deque()
        self._cut_off = False

    def ask(self, deadline: float) -> None:
        """Have it begin, and be over at ``deadline`` or an earlier one. From anywhere, a signal handler too."""
        self.deadline = deadline if self.deadline is None else min(self.deadline, deadline)

    def next_due(self) -> float | None:
        """When the flusher is to look again."""
        return None if self.deadline is None or self.done else time.monotonic() + _LOOK_SECONDS

    def steps(self, lingering: Collection[tuple[float, weakref.ref[Stream]]]) -> Iterator[float]:
        """Do what is to be done now; yield where others may run. For the flusher.

        ``lingering``: streams that had ended before, and whose last bytes may still be on their way.
        """
        if self.deadline is None or self.done:
            return
        if self._staying is None:
            with self._lock:
                # No stream joins from here on: whoever takes one in looks at the deadline, under the lock.
                self._staying = deque(self._streams)
                self._last = self._last_published()
                self._leaving.extend(reference for _, reference in lingering)
            self._count = len(self._staying)
        if not self._is_offered(self._last) and time.monotonic() < self.deadline:
            return
        while self._staying:
            stream = self._staying.popleft()
            stream.close(CloseReason.SHUTDOWN, self._retry(len(self._staying)))
            self._leaving.append(weakref.ref(stream))
            yield 0.0
        if time.monotonic() >= self.deadline and not self._cut_off:
            self._cut_off = True
            for reference in list(self._leaving):
                transport = getattr(reference(), "transport", None)
                if transport is not None:
                    transport.close()
                    yield 0.0
        while self._leaving:
            if not self._has_gone(self._leaving[0]()):
                return
            self._leaving.popleft()
            yield 0.0
        self.done = True

    def _has_gone(self, stream: Stream | None) -> bool:
        if stream is None:
            return True
        # Whoever feeds it is waited for, since its code has something to put in order; but not for longer than that.
        return stream.transport is None and (stream.room is None or self._cut_off)

    def _retry(self, place: int) -> bytes:
        """Give a client its time to come back: ``SSE_RETRY`` and a share of ``SSE_DRAIN_SECONDS`` of its own.

        Spread evenly and at random within each share, so that there are neither waves nor two that are the same,
        unless there are more clients than milliseconds.
        """
        share = self._settings.drain_seconds * 1000 / self._count
        wait = place * share + random.random() * (share - 1 if share >= 2 else share)  # noqa: S311  only spreads
        return retry_block((self._settings.retry or 0) + int(wait))
