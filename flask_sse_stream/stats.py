"""What a pool manager tells of what goes on: its numbers to whoever asks, and events to a framework's edge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .brokers.base import BrokerStats
from .event import Event
from .stream import CloseReason, Stream

__all__ = ["Hooks", "Stats"]


@dataclass(frozen=True, slots=True)
class Stats:
    """Numbers of one process, at one moment. Those of the second block only ever grow."""

    streams: int
    keys: int
    windows: int
    outbox: int
    draining: bool  #: whether this process takes no more streams, since it is to stop

    opened: int
    closed: Mapping[str, int]  #: by close reason
    refused: int
    published: int
    offered: int
    dropped: int
    replayed: int
    resets: int
    sent_bytes: int  #: of the event stream format, into sockets and to servers

    broker: BrokerStats


@dataclass(slots=True)
class Hooks:
    """What a framework's edge is told; each is a function or ``None``.

    ``published`` runs in the publisher, before anything else happens, and what it raises is the publisher's to
    handle. What the others raise is logged: it concerns no stream.
    """

    opened: Callable[[Stream], object] | None = None
    closed: Callable[[Stream, CloseReason], object] | None = None
    published: Callable[[str | None, Event], object] | None = None
    dropped: Callable[[Stream, int], object] | None = None
