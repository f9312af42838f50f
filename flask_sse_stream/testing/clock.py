"""A clock that a test sets forward: heartbeats, ages, expiry and the history, without waiting for them."""

from __future__ import annotations

import math
import sys
import time as real
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final
from weakref import WeakSet

from ..pools import managers_of_this_process

__all__ = ["Clock", "sse_clock"]

_PACKAGE: Final = __name__.partition(".")[0]
# These wait for other processes, for sockets and for threads, which no clock of a test's drives.
_REAL: Final = (
    "testing", "transports", "leaving", "bridge", "celery", "brokers.sqlite", "brokers.listener", "brokers.redis",
    "brokers.redis_link", "brokers.redis_listener", "brokers.redis_scripts", "brokers.redis_errors",
)  # fmt: skip

slow_readers: WeakSet[object] = WeakSet()
"""Those that a test has told not to read for now."""


class Clock:
    """Time as this package sees it in this process: it goes on as always, and :meth:`advance` puts it forward.

    It takes the place of the module ``time`` in the package's own.
    """

    def __init__(self) -> None:
        self.ahead: float = 0.0

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass at once: what has fallen due with it is done by the flusher, as always.

        Clients have read what there was to read before it, unless one of them is told not to
        (:meth:`EventReader.pause`).

        Raises :class:`ValueError` for less than 0.
        """
        if not 0 <= seconds < math.inf:
            raise ValueError(f"time goes forward, by a number of seconds, not by {seconds!r}")
        managers = managers_of_this_process()
        if not slow_readers:
            # One whose thread is just about to come back for more has not been stuck for so long.
            for manager in managers:
                with manager.lock:
                    for stream in manager._rounds.streams:
                        if stream.writing_since:
                            stream.writing_since += seconds
        self.ahead += seconds
        for manager in managers:
            manager._wake_flusher()

    def monotonic(self) -> float:
        """Give the monotonic time."""
        return real.monotonic() + self.ahead

    def time(self) -> float:
        """Give the time of the wall clock, by which tickets expire."""
        return real.time() + self.ahead

    def __getattr__(self, name: str) -> Any:
        return getattr(real, name)


@contextmanager
def sse_clock() -> Iterator[Clock]:
    """Give a clock for as long as the block lasts; after it, time is what it was.

    It drives heartbeats, ages, the expiry of tickets, drains and, over ``memory://``, what is kept how long and leases.
    SQLite and Redis have clocks of their own. A job's producer renews its lease by the real time: one that is put
    forward beyond ``SSE_JOB_LEASE`` finds it dead.
    """
    clock = Clock()
    for name in ("brokers.memory", "keeper"):  # imported when they are needed, which may be in the block
        import_module(f"{_PACKAGE}.{name}")
    changed = []
    for name, module in list(sys.modules.items()):
        part = name.removeprefix(f"{_PACKAGE}.")
        ours = name.startswith(f"{_PACKAGE}.") and not any(part == one or part.startswith(f"{one}.") for one in _REAL)
        if ours and getattr(module, "time", None) is real:
            module.time = clock  # type: ignore[attr-defined]
            changed.append(module)
    try:
        yield clock
    finally:
        for module in changed:
            module.time = real  # type: ignore[attr-defined]
        for manager in managers_of_this_process():
            manager._wake_flusher()
