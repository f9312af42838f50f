"""Server-sent events for Flask and any WSGI app under gevent.

The way of an event, and where each part of it lives:

* ``event``: an event as a value, and its bytes on the wire, both directions.
* ``brokers``: give it its place in the log, and carry it between processes.
* ``window``: the recent events of a key, for clients that come back.
* ``pools``, ``rounds``: the streams by key; from a publisher to every stream, and what falls due.
* ``stream``: one client's queue and cursor, and how it may end.
* ``transports``: move a stream's bytes to its client.
* ``wsgi``, ``extension``: answer requests, for any WSGI app and for Flask.
* ``client``, ``static/sse.js``: the browser's side, and how it gets there.
* ``access``, ``tickets``, ``revocations``: who may listen, on what text's word, and until when.
* ``publisher``, ``bridge``: publish from processes that have no streams, and what other software says.
* ``jobs``, ``keeper``, ``keys``: one piece of work that any number of readers follow.
* ``progress``, ``celery``, ``sqlalchemy``: how far a loop is, what becomes of a task, and what a transaction has to say
  once it is committed.
* ``counts``, ``reports``, ``asking``, ``metrics``, ``health``: what a process counts, and says of itself when asked.
* ``inspector``, ``inspecting``, ``kicks``: the page that shows it, live, and ends streams.
* ``cli``, ``serving``, ``tailing``, ``hearing``, ``doctor``, ``bench``: the commands.
* ``settings``, ``errors``: what can be set, and what can go wrong.
* ``testing``: what tests of applications, brokers and transports stand on.
* ``compat``: the interfaces of other packages, for those who come over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .access import Ticket
from .errors import AccessDenied, BrokerError, EventError, JobClosed, SettingsError, SSEError, StreamClosed, StreamsFull
from .event import Event, EventDecoder
from .jobs import Job, JobState
from .pools import PoolManager
from .publisher import Publisher
from .settings import Settings
from .stream import CloseReason, Stream

if TYPE_CHECKING:
    from .extension import SSE

__all__ = [
    "SSE",
    "AccessDenied",
    "BrokerError",
    "CloseReason",
    "Event",
    "EventDecoder",
    "EventError",
    "Job",
    "JobClosed",
    "JobState",
    "PoolManager",
    "Publisher",
    "SSEError",
    "Settings",
    "SettingsError",
    "Stream",
    "StreamClosed",
    "StreamsFull",
    "Ticket",
]


def __getattr__(name: str) -> Any:
    # The core is of use without Flask, so Flask is imported by those alone who ask for its extension.
    if name == "SSE":
        from .extension import SSE

        return SSE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
