"""What was published, and a broker that fails when it is told to."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from ..brokers.base import Broker, BrokerStats, Deliver, Idle, Position, broker_from_url, never_idle
from ..errors import BrokerError
from ..event import Event, EventDecoder
from ..pools import PoolManager
from ..settings import Settings

__all__ = [
    "ANYTHING",
    "OPERATIONS",
    "Publications",
    "Published",
    "RecordingBroker",
    "record_broker",
    "record_published",
]

T = TypeVar("T")


class _Anything:
    def __repr__(self) -> str:
        return "ANYTHING"


ANYTHING: Final[Any] = _Anything()
"""Stands for what an assertion does not ask about."""


class Published(NamedTuple):
    """One event, and whom it was published to: ``None`` for ``publish_all``."""

    key: str | None
    event: Event


class Publications(list[Published]):
    """What was published, oldest first."""

    def matching(
        self, key: Any = ANYTHING, *, data: Any = ANYTHING, event: Any = ANYTHING, id: Any = ANYTHING
    ) -> list[Published]:
        """Give those that have all that is asked for; see :meth:`assert_published`."""
        return [item for item in self if _matches(item, key, data, event, id)]

    def assert_published(
        self,
        key: Any = ANYTHING,
        *,
        data: Any = ANYTHING,
        event: Any = ANYTHING,
        id: Any = ANYTHING,
        times: int | None = None,
    ) -> Event:
        """Raise :class:`AssertionError` unless such an event was published; give the last one.

        ``key``
            to whom; ``None`` for what was published to all.
        ``data``
            text as it is; any other value is compared with what the event's JSON says.
        ``event``, ``id``
            its name and its own id; ``None`` for none.
        ``times``
            exactly so often, which may be 0; at least once if left out.
        """
        found = self.matching(key, data=data, event=event, id=id)
        if (not found) if times is None else len(found) != times:
            asked = {"key": key, "data": data, "event": event, "id": id}
            wanted = ", ".join(f"{name}={value!r}" for name, value in asked.items() if value is not ANYTHING)
            often = "at least once" if times is None else f"{times} times"
            lines = "".join(f"\n  {item.key!r}: {item.event!r}" for item in self) or " nothing"
            raise AssertionError(
                f"{wanted or 'something'} should have been published {often}, and was {len(found)} "
                f"times; published were:{lines}"
            )
        return found[-1].event if found else Event()

    def assert_nothing_published(self, key: Any = ANYTHING) -> None:
        """Raise :class:`AssertionError` if anything was published, to ``key`` or at all."""
        self.assert_published(key, times=0)


def _matches(item: Published, key: Any, data: Any, event: Any, id: Any) -> bool:
    pairs = ((key, item.key), (event, item.event.event), (str(id) if isinstance(id, int) else id, item.event.id))
    if any(wanted is not ANYTHING and wanted != given for wanted, given in pairs):
        return False
    if data is ANYTHING or isinstance(data, str) or item.event.data is None:
        return data is ANYTHING or bool(data == item.event.data)
    try:
        return bool(json.loads(item.event.data) == data)
    except ValueError:
        return False


@contextlib.contextmanager
def record_published(app: Any = None) -> Iterator[Publications]:
    """Record what ``app`` publishes in this process while the block lasts; what every Flask app does if left out.

    It is recorded when ``publish`` is called and has found nothing wrong with the event, whatever the broker makes of
    it. What a :class:`~flask_sse_stream.Publisher` says goes past it, as nothing says which app that is for.
    """
    from ..signals import event_published  # here alone: a broker is recorded without Flask

    found = Publications()

    def take(_sender: Any, key: str | None, event: Event) -> None:
        found.append(Published(key, event))

    with event_published.connected_to(take, sender=app) if app is not None else event_published.connected_to(take):
        yield found


OPERATIONS: Final = ("publish", "cover", "lease", "mark", "marked")
"""What a :class:`RecordingBroker` can be told to fail in."""


class RecordingBroker:
    """A broker around another one, which remembers what its log took, and fails when it is told to.

    It is made from settings, as brokers are, so that its class can be given where a broker is made::

        manager = PoolManager(settings, broker=RecordingBroker)

    :func:`record_broker` puts it around the broker of an app that is there already.

    ``published``
        what the log took. What is published again with the same ``idempotency_key`` is here again.
    ``calls``
        the names of all calls, in their order, those that failed too.
    """

    def __init__(self, settings: Settings, inner: Callable[[Settings], Broker] = broker_from_url) -> None:
        self.inner: Broker = inner(settings)
        self.remembers: bool = self.inner.remembers
        self.published: Publications = Publications()
        self.calls: list[str] = []
        self._failures: dict[str, list[Exception]] = {}

    @contextlib.contextmanager
    def failing(self, *operations: str, error: Exception | None = None) -> Iterator[None]:
        """Let these fail (all if none is named) while the block lasts, without a word to the log.

        ``operations`` are names of :data:`OPERATIONS`: ``publish``; ``cover``, which opening a stream needs; ``lease``;
        ``mark`` and ``marked``, which are about what was revoked. ``error`` is a
        :class:`~flask_sse_stream.BrokerError` if left out.

        Raises :class:`ValueError` for another name.
        """
        unknown = set(operations) - set(OPERATIONS)
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: a broker can fail in {', '.join(OPERATIONS)}")
        failure = error if error is not None else BrokerError("the broker was told to fail")
        names = operations or OPERATIONS
        for name in names:
            self._failures.setdefault(name, []).append(failure)
        try:
            yield
        finally:
            for name in names:
                self._failures[name].remove(failure)

    def _call(self, name: str, call: Callable[[], T]) -> T:
        self.calls.append(name)
        if failures := self._failures.get(name):
            raise failures[-1]
        return call()

    # The protocol of brokers

    def start(self, deliver: Deliver, idle: Idle = never_idle) -> None:
        """Remember where messages go."""
        self.inner.start(deliver, idle)

    def publish(self, key: str | None, body: bytes, once: str | None = None) -> str:
        """Publish, and record what was taken."""
        identifier = self._call("publish", lambda: self.inner.publish(key, body, once))
        # A decoder's event, so that it is what clients will see; those without data are none to it.
        for event in EventDecoder(comments=True).feed(body):
            self.published.append(Published(key, event))
        return identifier

    def cover(self, keys: Sequence[str | None], fetch: Sequence[str | None], after: str | None) -> Position:
        """Begin to deliver these keys."""
        return self._call("cover", lambda: self.inner.cover(keys, fetch, after))

    def lease(self, name: str, holder: str, seconds: float) -> bool:
        """Let somebody have a lease."""
        return self._call("lease", lambda: self.inner.lease(name, holder, seconds))

    def mark(self, name: str, at: float, seconds: float) -> None:
        """Remember a revocation."""
        self._call("mark", lambda: self.inner.mark(name, at, seconds))

    def marked(self, names: Sequence[str]) -> float:
        """Say when something was revoked."""
        return self._call("marked", lambda: self.inner.marked(names))

    def stats(self) -> BrokerStats:
        """Give the numbers of the broker within."""
        return self.inner.stats()

    def close(self) -> None:
        """Close the broker within."""
        self.inner.close()


@contextlib.contextmanager
def record_broker(app: Any) -> Iterator[RecordingBroker]:
    """Put a :class:`RecordingBroker` around the broker of ``app`` while the block lasts.

    ``app`` is a Flask app with the extension, an :class:`~flask_sse_stream.SSE`, a
    :class:`~flask_sse_stream.Publisher`, or a :class:`~flask_sse_stream.PoolManager`.
    """
    manager = _manager_of(app)
    inner = manager._broker
    broker = RecordingBroker(manager.settings, lambda _: inner)
    manager._broker = broker
    try:
        yield broker
    finally:
        manager._broker = inner


def _manager_of(app: Any) -> PoolManager:
    if isinstance(app, PoolManager):
        return app
    extensions = getattr(app, "extensions", None)
    manager = extensions.get("sse_stream") if isinstance(extensions, dict) else getattr(app, "manager", None)
    if not isinstance(manager, PoolManager):
        raise TypeError(f"{app!r} has no pool manager: give the Flask app after SSE(app), the SSE, or a PoolManager")
    return manager
