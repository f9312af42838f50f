"""Every error this library raises, so that a caller can catch all of them, or exactly one.

::

    SSEError
     |- SettingsError(ValueError)   a setting that is unknown or has a value it may not have; raised at start
     |- EventError(ValueError)      an event that cannot be put on the wire; raised in the publisher
     |- StreamClosed                something was sent to a stream that has ended; carries its reason
     |- StreamsFull                 one stream more than a limit allows; nothing was registered
     |- JobClosed                   a job has ended, or somebody else works on it; carries its state
     |- AccessDenied                no right to a key; carries the HTTP status to answer
     '- BrokerError                 the broker could not do its work; the cause is chained

This module imports nothing of the package: every other one may import it.
"""

from __future__ import annotations

__all__ = [
    "AccessDenied",
    "BrokerError",
    "EventError",
    "JobClosed",
    "SSEError",
    "SettingsError",
    "StreamClosed",
    "StreamsFull",
]


class SSEError(Exception):
    """The root of all errors of this package."""


class SettingsError(SSEError, ValueError):
    """A setting is unknown or has a value that it may not have. Names the setting and what it may be."""


class EventError(SSEError, ValueError):
    """An event cannot be put on the wire. Names the field and what it may hold.

    Raised where the event is made or published, before any stream or broker is touched.
    """


class StreamClosed(SSEError):
    """Something was sent to a stream that has ended.

    ``reason`` is the :class:`~flask_sse_stream.CloseReason` (a ``str``) it ended with.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"the stream has ended (reason: {reason}); nothing more can be sent to it")
        self.reason = reason


class StreamsFull(SSEError):
    """One stream more than ``SSE_MAX_CLIENTS`` or ``SSE_MAX_CLIENTS_PER_KEY`` allows; nothing was registered.

    ``limit`` is the number that was reached and ``key`` the key it counts, or ``None`` for the whole process.
    ``draining`` says that the process is to stop, and takes no stream at all any more: the limit is 0.
    """

    def __init__(self, limit: int, key: str | None = None, *, draining: bool = False) -> None:
        where = "this process" if key is None else f"key {key!r}"
        setting = "SSE_MAX_CLIENTS" if key is None else "SSE_MAX_CLIENTS_PER_KEY"
        full = f"{where} has all the {limit} streams that {setting} allows"
        super().__init__("this process is about to stop and takes no more streams" if draining else full)
        self.limit = limit
        self.key = key
        self.draining = draining


class JobClosed(SSEError):
    """Nothing more can be sent to a job: it has ended, or another producer works on it.

    ``state`` is the :class:`~flask_sse_stream.JobState` (a ``str``) it has; ``None``: it is over, however it ended.
    """

    def __init__(self, id: str, state: str | None = None) -> None:
        what = "has another producer" if state == "running" else f"is over ({state})" if state else "is over"
        super().__init__(f"the job {id!r} {what}")
        self.id = id
        self.state = state


class AccessDenied(SSEError):
    """The request has no right to a key. ``status`` is the HTTP status to answer: 401, 403 (default) or 404."""

    def __init__(self, message: str = "no right to this stream", *, status: int = 403) -> None:
        if status not in (401, 403, 404):
            raise ValueError(f"AccessDenied(status={status!r}): must be 401, 403 or 404")
        super().__init__(message)
        self.status = status


class BrokerError(SSEError):
    """The broker could not do what was asked; the cause is chained as ``__cause__``."""
