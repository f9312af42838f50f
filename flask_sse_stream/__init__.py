"""Server-sent events for Flask and any WSGI app under gevent.

The way of an event, and where each part of it lives:

* ``errors``, ``settings``: what can go wrong and what can be set.
"""

from __future__ import annotations

from .errors import AccessDenied, BrokerError, EventError, SettingsError, SSEError, StreamClosed, StreamsFull

__all__ = [
    "AccessDenied",
    "BrokerError",
    "EventError",
    "SSEError",
    "SettingsError",
    "StreamClosed",
    "StreamsFull",
]
