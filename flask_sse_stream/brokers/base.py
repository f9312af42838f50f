"""What a broker promises, what it delivers, and how one is found by its URL.

A broker orders events, remembers them and carries them between processes. It knows keys, bodies and its own
store; it never sees a stream or a socket of a client's. The pool manager is its only caller, from any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Final, NamedTuple, Protocol

from ..errors import SettingsError
from ..event import Message
from ..settings import Settings

__all__ = [
    "REDIS_SCHEMES",
    "Broker",
    "BrokerStats",
    "Deliver",
    "Delivery",
    "Gap",
    "History",
    "Idle",
    "Life",
    "Position",
    "broker_from_url",
    "never_idle",
]


class Gap(NamedTuple):
    """Events of ``key`` (``None``: of what went to all) up to ``seq`` were lost on the way to this process."""

    key: str | None
    epoch: str
    seq: int


class History(NamedTuple):
    """What the log remembers of one key: every event after ``floor`` up to ``head``, oldest first.

    Everything of the keys that are covered up to ``head`` has been delivered; what is later will be.
    """

    key: str | None
    epoch: str
    floor: int
    messages: Sequence[Message]
    head: int


class Life(NamedTuple):
    """The log has this life now, and its newest event is ``head``.

    ``earlier``
        lives that this one continues, and the number of the last event that it took over from each. A life that is
        not named here is lost to it, and so is what an earlier one had beyond that number.
    """

    epoch: str
    head: int
    earlier: Mapping[str, int] = {}


Delivery = Message | Gap | History | Life
Deliver = Callable[[Delivery], None]
Idle = Callable[[Sequence[str]], Sequence[str]]


def never_idle(keys: Sequence[str]) -> Sequence[str]:  # noqa: ARG001  its type is what it is for
    """Say that every key is needed."""
    return ()


class Position(NamedTuple):
    """A place in a log: ``epoch`` names its life, ``head`` is a sequence number (0: before the first event)."""

    epoch: str
    head: int


class BrokerStats(NamedTuple):
    """How a process is connected to its log. The numbers only ever grow.

    ``up``
        whether live events reach this process, as far as it knows. Before the first stream nobody looks.
    ``reconnects``
        how often the listening connection was made anew.
    ``gaps``
        how often events of a key were lost on the way here, so that its streams were told.
    ``skipped``
        messages that were no events: somebody else's, or broken.
    ``error``
        why it is not up, or was not when it last was not.
    """

    up: bool = True
    reconnects: int = 0
    gaps: int = 0
    skipped: int = 0
    error: str = ""


class Broker(Protocol):
    """May be called from any thread or greenlet; nothing but :meth:`close` is called before :meth:`start`.

    ``remembers``
        whether the log is kept outside this process. If not, the windows are the history: they are kept for every
        key, and nothing needs to be fetched for them. If it is, a call may wait, at most ``SSE_BROKER_TIMEOUT``.
    """

    remembers: bool

    def start(self, deliver: Deliver, idle: Idle = never_idle) -> None:
        """Remember where messages go. Opens nothing: resources begin with the first publish or cover.

        ``deliver`` takes the messages of one life in the order of their sequence numbers; it never blocks and
        never raises. A repeated message is harmless. A message of another epoch says that the log began anew, as
        a :class:`Life` does.

        ``idle`` takes keys and gives back those that nobody has needed for a while: the broker may stop delivering
        them from that moment on, until they are covered again.
        """

    def publish(self, key: str | None, body: bytes, once: str | None = None) -> str:
        """Give the event its place in the log and return its id. ``key=None`` is for all.

        One call makes at most one event, and so do all calls with the same ``once`` within
        ``SSE_IDEMPOTENCY_TTL``: they return the id of the first. Raises :class:`~flask_sse_stream.BrokerError`, within
        ``SSE_BROKER_TIMEOUT`` where a store is asked, if the event may not have been taken.
        """

    def cover(self, keys: Sequence[str | None], fetch: Sequence[str | None], after: str | None) -> Position:
        """Begin to deliver ``keys``, deliver the :class:`History` of those in ``fetch``, and say where that was.

        ``after`` is the id that a client came with, and may be anything. On return every message of ``keys`` up to
        the position has been delivered, and every later one will be; and if ``after`` was given out by this log,
        it is not beyond the position. With one of this life that is beyond every place, the position is not before
        what the log had come to when it was asked. A broker whose windows are the history need not fetch.
        """

    def lease(self, name: str, holder: str, seconds: float) -> bool:
        """Let ``holder`` have ``name`` for so long, unless another one has it; say whether it does.

        Who has it may have it for longer, or give it back with 0 seconds. Raises as :meth:`publish`.
        """

    def mark(self, name: str, at: float, seconds: float) -> None:
        """Remember for so long that ``name`` was marked at ``at``, a time of the wall clock; the latest one counts.

        Unlike the log, marks outlive it: a new life knows them too. Raises as :meth:`publish`.
        """

    def marked(self, names: Sequence[str]) -> float:
        """Give the latest time at which one of ``names`` was marked; 0.0: none was. Raises as :meth:`publish`."""

    def stats(self) -> BrokerStats:
        """Say how this process is connected to the log."""

    def close(self) -> None:
        """Let go of every resource. May be called twice."""


_BROKERS: Final = {
    "memory": ("memory", "MemoryBroker"),
    "sqlite": ("sqlite", "SQLiteBroker"),
    "redis": ("redis", "RedisBroker"),
    "rediss": ("redis", "RedisBroker"),
    "redis+sentinel": ("redis", "RedisBroker"),
    "rediss+sentinel": ("redis", "RedisBroker"),
}
REDIS_SCHEMES: Final = frozenset(scheme for scheme, (module, _) in _BROKERS.items() if module == "redis")


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
