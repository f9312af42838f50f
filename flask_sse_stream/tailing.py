"""Follows keys, over the broker as one process more, or over HTTP as one client more."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from .brokers.base import Gap, History, Life
from .errors import BrokerError
from .event import Event, EventDecoder, Message
from .hearing import Hearing
from .reading import Request, ResponseError, Streaming
from .settings import Settings

__all__ = ["Line", "follow_broker", "follow_url"]

_TICK: Final = 0.5
_PATIENCE: Final = 30.0  # for the head of a response
_STOPS: Final = (204, 400, 401, 403, 404, 405, 406, 410)  # answers that another try will not change


class Line(NamedTuple):
    """Something to show: an event, or a notice about the log. ``None`` for both: nothing came for a while."""

    key: str | None = None
    event: Event | None = None
    notice: str | None = None


def follow_broker(settings: Settings, keys: Sequence[str], last: int) -> Iterator[Line]:
    """Give the ``last`` events of the keys and of what goes to all, and then what comes.

    Raises :class:`~flask_sse_stream.BrokerError`.
    """
    with Hearing(settings) as hearing:
        broker, listened = hearing.broker, [*keys, None]
        position = hearing.outside(lambda: broker.cover(listened, listened if last else [], None))
        history = [message for item in hearing.take() if isinstance(item, History) for message in item.messages]
        for message in sorted(history, key=lambda message: message.seq)[-last:] if last else []:
            yield _line(message)
        seen, epoch = position.head, position.epoch
        complaint = ""
        while True:
            hearing.wait(_TICK)
            for item in hearing.take():
                if isinstance(item, Message):
                    if item.epoch != epoch:
                        seen, epoch = 0, item.epoch
                    if item.key in listened and item.seq > seen:
                        seen = item.seq
                        yield _line(item)
                elif isinstance(item, Gap) and item.key in listened:
                    yield Line(key=item.key, notice="events were lost on the way here")
                elif isinstance(item, Life) and item.epoch != epoch:
                    seen, epoch = item.head, item.epoch
                    yield Line(notice="the log began anew")
            error = "" if (stats := broker.stats()).up else stats.error or "the broker is away"
            if error != complaint:
                complaint = error
                yield Line(notice=f"waiting for the broker: {error}" if error else "the broker is back")
            yield Line()


def _line(message: Message) -> Line:
    [event] = EventDecoder(comments=True).feed(message.frame) or [Event(comment="")]
    return Line(message.key, event)


def follow_url(url: str, headers: dict[str, str]) -> Iterator[Line]:
    """Read a stream as a browser does: come back after its end, with the last id, when ``retry`` is over.

    Raises :class:`ResponseError` for an answer at which a browser gives up, and :class:`ValueError` for a bad URL.
    """
    last_id, retry = "", 3000
    while True:
        request = Request(url, {**headers, **({"Last-Event-ID": last_id} if last_id else {})})
        stream: Streaming | None = None
        try:
            stream = Streaming(request, _PATIENCE)
            status, found = stream.head(_PATIENCE)
            if status != 200 and (status in _STOPS or status < 500):
                raise ResponseError(_refused(url, status))
            if status == 200 and not found.get("content-type", "").startswith("text/event-stream"):
                raise ResponseError(f"{url} is no event stream but {found.get('content-type') or 'untyped'}")
            decoder = EventDecoder(comments=True)
            if status == 200:
                for data in stream.bodies(_TICK):
                    for event in decoder.feed(data):
                        if event.data is not None:
                            yield Line(event=event)
                    last_id = decoder.last_event_id or last_id
                    retry = decoder.retry if decoder.retry is not None else retry
                    yield Line()
                why = "the stream ended"
            else:
                why = f"it was answered {status}"
        except (OSError, EOFError) as error:
            why = str(error) or "the connection broke"
        finally:
            if stream is not None:
                stream.close()
        yield Line(notice=f"{why}; trying again in {retry / 1000:g} s")
        due = time.monotonic() + retry / 1000
        while (left := due - time.monotonic()) > 0:
            time.sleep(min(_TICK, left))
            yield Line()


def _refused(url: str, status: int) -> str:
    why = {
        204: "it has ended for good",
        401: "it needs a ticket or a login: give it with --header 'Authorization: Bearer ...'",
        403: "there is no right to these keys",
        404: "there is no such path: SSE_PATH says which",
    }
    return f"{url} was answered {status}" + (f": {why[status]}" if status in why else "")


# Errors that following raises; for whoever shows them.
FAILURES: Final = (BrokerError, ResponseError, ValueError)
