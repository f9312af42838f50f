"""What an app's streams tell whoever wants to know, as signals of Flask's kind."""

from __future__ import annotations

import weakref

from blinker import NamedSignal, Namespace
from flask import Flask, current_app, has_app_context

from .event import Event
from .pools import PoolManager
from .stream import CloseReason, Stream

__all__ = ["begins_unheard", "connect_signals", "event_published", "events_dropped", "stream_closed", "stream_opened"]

_signals = Namespace()
#: Sent after a stream began: ``(app, stream)``.
stream_opened: NamedSignal = _signals.signal("stream-opened")
#: Sent after a stream ended: ``(app, stream, reason)``.
stream_closed: NamedSignal = _signals.signal("stream-closed")
#: Sent in the publisher before an event is published: ``(app, key, event)``; what a receiver raises, it raises.
event_published: NamedSignal = _signals.signal("event-published")
#: Sent when an overflow policy dropped events of a stream: ``(app, stream, count)``.
events_dropped: NamedSignal = _signals.signal("events-dropped")


def begins_unheard() -> bool:
    """Whether nobody is told when a stream of the current application begins."""
    if not stream_opened.receivers or not has_app_context():
        return not stream_opened.receivers
    app = current_app._get_current_object()  # type: ignore[attr-defined]
    return not stream_opened.has_receivers_for(app)


def connect_signals(app: weakref.ref[Flask], manager: PoolManager) -> None:
    """Have the manager send the signals of its app."""

    def opened(stream: Stream) -> None:
        if stream_opened.receivers:
            stream_opened.send(app(), stream=stream)

    def closed(stream: Stream, reason: CloseReason) -> None:
        if stream_closed.receivers:
            stream_closed.send(app(), stream=stream, reason=reason)

    def published(key: str | None, event: Event) -> None:
        if event_published.receivers:
            event_published.send(app(), key=key, event=event)

    def dropped(stream: Stream, count: int) -> None:
        if events_dropped.receivers:
            events_dropped.send(app(), stream=stream, count=count)

    manager.hooks.opened = opened
    manager.hooks.closed = closed
    manager.hooks.published = published
    manager.hooks.dropped = dropped
