"""What a broker promises, and how one is found by its URL.

A broker orders events, remembers them and carries them between processes. It knows keys, bodies and its own
store; it never sees a stream or a socket. The pool manager is its only caller, from any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Final, NamedTuple, Protocol

from ..errors import SettingsError
from ..event import Gap, Message
from ..settings import Settings

__all__ = ["Broker", "History", "Position", "broker_from_url"]


class History(NamedTuple):
    """What a log remembers of one key: every event after ``floor``, oldest first."""

    floor: int
    messages: Sequence[Message]


class Position(NamedTuple):
    """A place in a log: ``epoch`` names its life, ``head`` is the sequence number of its newest event (0: none)."""

    epoch: str
    head: int
    histories: Mapping[str | None, History] = {}


class Broker(Protocol):
    """Four methods. All may be called from any thread or greenlet; none is called before :meth:`start`.

    ``remembers``
        whether the log is kept outside this process. If not, the windows are the history: they are kept for every
        key, and nothing needs to be fetched for them.
    """

    remembers: bool

    def start(self, deliver: Callable[[Message | Gap], None]) -> None:
        """Remember where messages go. Opens nothing: resources begin with the first publish or cover.

        ``deliver`` takes the messages of one epoch in the order of their sequence numbers; it never blocks and
        never raises. A repeated message is harmless. A message of another epoch says that the log began anew. A
        :class:`~flask_sse_stream.event.Gap` says that events of a key were lost on the way to this process.
        """

    def publish(self, key: str | None, body: bytes) -> str:
        """Give the event its place in the log and return its id. ``key=None`` is for all.

        One call makes at most one event. Raises :class:`~flask_sse_stream.BrokerError`, within
        ``SSE_BROKER_TIMEOUT`` where a store is asked, if the event may not have been taken.
        """

    def cover(self, keys: Sequence[str | None], after: str | None) -> Position:
        """Give the log's position and what it remembers of ``keys``, which a client with the id ``after`` needs.

        ``after`` comes from a client and may be anything. On return every message up to the position's head that
        this process had not yet been delivered has been, and every later one will be.
        """

    def close(self) -> None:
        """Let go of every resource. May be called twice."""


_BROKERS: Final = {"memory": ("memory", "MemoryBroker"), "sqlite": ("sqlite", "SQLiteBroker")}


def broker_from_url(settings: Settings) -> Broker:
    """Make the broker that ``settings.broker_url`` names.

    Raises :class:`~flask_sse_stream.SettingsError` for a scheme that no broker has.
    """
    scheme = settings.broker_url.partition("://")[0]
    try:
        module, name = _BROKERS[scheme]
    except KeyError:
        raise SettingsError(
            f"SSE_BROKER_URL must begin with one of {', '.join(f'{known}://' for known in _BROKERS)}, not {scheme!r}://"
        ) from None
    # By name, since implementations are above this protocol and bring packages that others need not have.
    broker: Broker = getattr(import_module(f"flask_sse_stream.brokers.{module}"), name)(settings)
    return broker
