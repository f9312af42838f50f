"""How far a loop is, as events of a key: ``for row in sse.progress(rows, key="import")``.

It knows a way to publish and nothing of streams, brokers or frameworks. It runs where the loop runs, without a thread
or a timer, and never stops the loop: what cannot be published is left out.
"""

from __future__ import annotations

import logging
import math
import operator
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Final, TypeVar

from .errors import SSEError
from .event import Event
from .keys import check_key

__all__ = ["progress"]

logger: logging.Logger = logging.getLogger("flask_sse_stream")

T = TypeVar("T")

_SMOOTHING: Final = 0.3  # the weight of what was just measured; tqdm's default too
_PAUSE_SECONDS: Final = 5.0  # a broker that hangs costs each publish SSE_BROKER_TIMEOUT: not ten times a second


def progress(
    publish: Callable[..., object],
    iterable: Iterable[T],
    *,
    key: str,
    total: int | None = None,
    event: str = "progress",
    interval: float = 0.1,
) -> Generator[T, None, None]:
    """Give the items of ``iterable``, and publish to ``key`` how many of them are done.

    ``total``
        how many there are; the iterable's length if left out, as far as it has one.
    ``event``
        the name of the events.
    ``interval``
        the fewest seconds between two events. The first and the last are always published. Nothing is published
        while an item is worked at, however long that takes.

    The data is JSON: ``count`` and ``total``, the ``fraction`` from 0 to 1, the ``rate`` in items per second, smoothed,
    the ``remaining`` seconds, and the ``state``: ``"running"``, then ``"done"``, or ``"stopped"`` where the loop was
    left before its end, by ``break``, ``return`` or an error. What is not known is ``null``.

    An event that cannot be published does not stop the loop: the first one is logged, and after each, nothing but the
    last event is tried for five seconds. What a receiver of ``event_published`` raises, the loop raises.

    The loop is known to be left when nothing refers to its generator any more, in CPython at once. Who keeps the
    generator closes it: ``with contextlib.closing(sse.progress(...)) as rows``.

    Raises, at the call and not in the loop, :class:`EventError` for a bad key or event name, :class:`TypeError` for
    what is not iterable, and :class:`ValueError` for a bad ``total`` or ``interval``.
    """
    check_key(key)
    Event("", event=event)  # its name is checked here, and not in the loop
    _check(total, interval)
    if total is None:
        hint = operator.length_hint(iterable, -1)
        total = hint if hint >= 0 else None

    def say(data: dict[str, Any]) -> object:
        return publish(key, data, event=event)

    return _run(iter(iterable), _Meter(say, f"how far {key!r} is", total), interval)


def _check(total: Any, interval: Any) -> None:
    if total is not None and (isinstance(total, bool) or not isinstance(total, int) or total < 0):
        raise ValueError(f"total must be a whole number from 0, or None where it is not known, not {total!r}")
    if not isinstance(interval, (int, float)) or not 0 <= interval < math.inf:
        raise ValueError(f"interval must be a number of seconds from 0, not {interval!r}")


def _run(items: Iterator[T], meter: _Meter, interval: float) -> Generator[T, None, None]:
    state = "stopped"
    try:
        meter.tell("running")
        for item in items:
            yield item
            meter.count += 1
            if time.monotonic() >= meter.told + interval:
                meter.tell("running")
        state = "done"
    finally:
        meter.tell(state)


class _Meter:
    """Counts, measures how fast, and says so."""

    def __init__(self, say: Callable[[dict[str, Any]], object], what: str, total: int | None) -> None:
        self.count = 0
        self.told = 0.0  # when it was told last
        self._say = say
        self._what = what
        self._total = total
        self._measured, self._when = 0, math.nan  # the count when it was measured last, and the time
        self._items = self._seconds = 0.0  # of late; their ratio is the rate
        self._silent_until = -math.inf
        self._logged = False

    def tell(self, state: str) -> None:
        if state != "running" or time.monotonic() >= self._silent_until:
            self._measure()
            try:
                self._say(self._data(state))
            except SSEError as error:
                self._silent_until = time.monotonic() + _PAUSE_SECONDS
                if not self._logged:
                    self._logged = True
                    logger.warning("nobody is told %s: %s", self._what, error)
        self.told = time.monotonic()

    def _measure(self) -> None:
        now = time.monotonic()
        if self.count > self._measured:
            self._items += _SMOOTHING * (self.count - self._measured - self._items)
            self._seconds += _SMOOTHING * (now - self._when - self._seconds)
            self._measured, self._when = self.count, now
        elif math.isnan(self._when):
            self._when = now

    def _data(self, state: str) -> dict[str, Any]:
        count, total = self.count, self._total
        if state == "done":
            total = count  # whatever was foretold
        elif total is not None and count > total:
            total = None
        rate = self._items / self._seconds if self._seconds else None
        if state == "done":
            remaining: float | None = 0.0
        else:
            remaining = (total - count) / rate if total is not None and rate else None
        fraction = None if total is None else count / total if total else float(state == "done")
        return {
            "state": state,
            "count": count,
            "total": total,
            "fraction": _rounded(fraction, 4),
            "rate": _rounded(rate, 3),
            "remaining": _rounded(remaining, 1),
        }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
