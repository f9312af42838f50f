"""The responses that Flask's views give: a stream as the body of each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flask import Response, after_this_request, request
from werkzeug.exceptions import NotFound
from werkzeug.wsgi import ClosingIterator

from .access import Ticket
from .errors import BrokerError
from .event import END_ID
from .jobs import Job
from .pools import PoolManager
from .settings import Settings
from .signals import begins_unheard
from .stream import Stream
from .wsgi import Source, cors_headers, discard, last_event_id, respond

__all__ = ["EventStreamResponse", "StreamedJob", "add_cors"]


class EventStreamResponse(Response):
    """A response whose body is a stream; it begins when the server calls it, after every ``after_request`` hook.

    ``stream`` is the :class:`~flask_sse_stream.Stream` of a response that ``sse.stream()`` made: it may be sent to
    before the response is returned, and from anywhere afterwards.
    """

    # A werkzeug response's own ``stream`` is a way to write its body, which this body has no use for.
    stream: Stream  # type: ignore[assignment]

    def __init__(
        self,
        manager: PoolManager,
        *,
        keys: Sequence[str] | None = None,
        stream: Stream | None = None,
        source: Source | None = None,
        job: Job | None = None,
        headers: Mapping[str, str] | None = None,
        ticket: Ticket | None = None,
        comments: bool = True,
    ) -> None:
        # An iterator without a length, passed through: hooks that measure or rewrite bodies leave it alone.
        self._nothing: Iterable[bytes] = iter(())
        super().__init__(self._nothing, content_type="text/event-stream", headers=headers, direct_passthrough=True)
        self._manager = manager
        self._keys = keys
        self._ticket = ticket
        self._source = source
        self._job = job
        self._comments = comments
        if stream is not None:
            self.stream = stream

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        """Begin the stream, when the server asks for the body: Flask has let go of the request's context by then."""
        stream, source = self.__dict__.get("stream"), self._source
        self._source = None
        unwanted = {"content-type"}
        if self.response is not self._nothing:
            # A hook took it for a body that it can encode, as Flask-Compress does where it is told to.
            unwanted.add("content-encoding")
        begin = functools.partial(
            respond,
            self._manager,
            environ,
            start_response,
            keys=self._keys,
            stream=stream,
            source=source,
            job=self._job,
            comments=self._comments,
            headers=[item for item in self.headers.to_wsgi_list() if item[0].lower() not in unwanted],
            ticket=self._ticket,
        )
        # A receiver of the signal may ask for the request.
        discard_it = functools.partial(discard, stream, source)
        body = _Beginning(begin, discard_it) if begins_unheard() else begin()
        # Only where a hook asked to be called at the end: otherwise nothing of the request is kept for so long.
        return ClosingIterator(body, self.close) if self._on_close else body


class _Beginning:
    """The body of a stream that begins when its server first asks for it.

    What is released with a request's context, such as a database's session, is so before anything is waited for: a
    broker's answer, or a client that is slow to take its first bytes. A server must not expect ``start_response`` to be
    called before (PEP 3333, "The start_response() Callable").
    """

    def __init__(self, begin: Callable[[], Iterable[bytes]], discard: Callable[[], None]) -> None:
        self._begin: Callable[[], Iterable[bytes]] | None = begin
        self._close = discard

    def __iter__(self) -> Iterator[bytes]:
        begin, self._begin = self._begin, None
        if begin is None:
            return iter(())
        self._close = _do_nothing  # what the server's next words are for is respond()'s to close
        body = begin()
        self._close = getattr(body, "close", _do_nothing)
        return iter(body)

    def close(self) -> None:
        self._begin = None
        self._close()


class StreamedJob(Job):
    """A job that the current request may be answered with."""

    def response(self, *, headers: Mapping[str, str] | None = None, heartbeats: bool = True) -> EventStreamResponse:
        """Give the response that reads this job: from its beginning, or from where its client was.

        Who may read it is for the view to decide. A job that has ended is replayed to its end; the next reconnect is
        answered 204, at which an EventSource stops. Without ``heartbeats`` there is no comment in the stream, for
        clients that cannot read one.

        Raises :class:`werkzeug.exceptions.NotFound` (404) for a job that never was or is no longer kept.
        """
        if last_event_id(request.environ) != END_ID:
            if request.environ.get("wsgi.multiprocess"):
                self._manager.warn_of_other_processes()  # A job of another one's is not found here.
            try:
                known = self.follow()
            except BrokerError:
                known = True  # The stream will ask again, and answer as all streams do.
            if not known:
                add_cors(self._manager.settings)
                raise NotFound("There is no such job, or it is no longer kept.")
        return EventStreamResponse(self._manager, job=self, headers=headers, comments=heartbeats)


def add_cors(settings: Settings) -> None:
    """Let a listed origin's page read why it was refused, whoever words that."""
    headers = cors_headers(settings, request.environ)

    def add(response: Response) -> Response:
        response.headers.extend(headers)
        return response

    if headers:
        after_this_request(add)


def _do_nothing() -> None:
    """There is nothing to close."""
