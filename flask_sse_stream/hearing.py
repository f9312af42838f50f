"""A broker by itself, for what has no streams: who asks all processes how they are, and who follows keys in a terminal.

It is used by one thread or greenlet, which takes what came one by one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TypeVar

from .brokers.base import Broker, Delivery, broker_from_url
from .settings import Settings
from .transports.base import current_runtime

__all__ = ["Hearing"]

T = TypeVar("T")


class Hearing:
    """``with Hearing(settings) as hearing``: the broker that ``SSE_BROKER_URL`` names, until the end of the block.

    ``broker``
        it; what waits for it is called by :meth:`outside`.
    """

    def __init__(self, settings: Settings) -> None:
        self._runtime = current_runtime()
        self._waiter = self._runtime.waiter()
        self._inbox: deque[Delivery] = deque()
        self.broker: Broker = broker_from_url(settings)
        self.broker.start(self._deliver)

    def _deliver(self, delivery: Delivery) -> None:
        self._inbox.append(delivery)
        self._waiter.wake()

    def __enter__(self) -> Hearing:  # noqa: PYI034  Self is of Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.outside(self.broker.close)

    def outside(self, function: Callable[[], T]) -> T:
        """Call what waits for the broker. Raises :class:`~flask_sse_stream.BrokerError`, as that does."""
        return self._runtime.outside(function)

    def wait(self, seconds: float) -> None:
        """Return when something has come, or after so many seconds."""
        self._waiter.wait(seconds)

    def take(self) -> Iterator[Delivery]:
        """Give what has come."""
        while self._inbox:
            yield self._inbox.popleft()
