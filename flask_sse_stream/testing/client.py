"""Reading streams of an application in its tests: no server, no socket, and no wait without a deadline.

The request runs in the test's own thread, as with any test client. The response's body is iterated beside it, in a
thread, or in a greenlet where the test runs under gevent, as fast as it comes: a client that is well reads. One that is
slow is paused.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Final

from werkzeug.datastructures import Headers
from werkzeug.test import Client, TestResponse

from ..event import Event, EventDecoder
from ..transports.base import current_runtime
from .clock import slow_readers

__all__ = ["EventReader", "NoEvent", "SSEClient", "sse_client"]

_LONGEST_TEXT: Final = 500


class NoEvent(AssertionError):
    """There was no event within the deadline, or there will be none: the stream has ended."""


class EventReader:
    """One stream, as a browser's ``EventSource`` would read it.

    ``response``
        the response, with its ``status_code`` and ``headers``.
    ``comments``
        the comments that have come, heartbeats among them.
    ``ended``
        whether all that the stream had to say was read, and no more will come.

    Each ``timeout`` is in seconds, the client's if left out.
    """

    def __init__(self, response: TestResponse, timeout: float, again: Callable[[str], EventReader]) -> None:
        self.response = response
        self.comments: list[str] = []
        self.ended: bool = False
        self._timeout = timeout
        self._again = again
        self._decoder = EventDecoder(comments=True)
        self._events: deque[Event] = deque()
        self._body: Iterator[Any] = iter(response.response)
        self._chunks: deque[bytes] = deque()
        self._error: BaseException | None = None
        self._is_over = self._is_paused = self._is_closed = self._is_body_closed = False
        runtime = current_runtime()
        self._resumed, self._came = runtime.waiter(), runtime.waiter()
        runtime.spawn(self._read, "sse-test-client")

    # What runs beside the test

    def _read(self) -> None:
        try:
            while not self._is_closed:
                chunk = next(self._body)
                while self._is_paused and not self._is_closed:
                    self._resumed.wait()
                self._chunks.append(chunk)
                self._came.wake()
        except StopIteration:
            pass
        except Exception as error:
            self._error = error  # the test's to see
        finally:
            self._is_over = True
            self._came.wake()
            if self._is_closed:
                self._close_body()

    # What the test calls

    def _more(self, deadline: float) -> bool:
        """Take in what the body gives next; ``False``: nothing in time."""
        while not self._chunks:
            if self._is_over and not self._chunks:  # the last ones may have come between the two questions
                self.ended = True
                if self._error is not None:
                    raise self._error
                return False
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._came.wait(left)
        for event in self._decoder.feed(self._chunks.popleft()):
            if event.comment is not None:
                self.comments.append(event.comment)
            if event.data is not None:
                self._events.append(event)
        return True

    def next(self, timeout: float | None = None) -> Event:
        """Give the next event that a browser would fire.

        Raises :class:`NoEvent` (an :class:`AssertionError`) where none comes in time, and what the body raised.
        """
        seconds = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + seconds
        while not self._events:
            if not self._more(deadline):
                if self.ended:
                    raise NoEvent(f"the stream has ended, and there was no further event{self._what_came()}")
                raise NoEvent(f"no event within {seconds:g} s{self._what_came()}")
        return self._events.popleft()

    def take(self, number: int, timeout: float | None = None) -> list[Event]:
        """Give so many events, each of which has ``timeout`` to come."""
        return [self.next(timeout) for _ in range(number)]

    def to_the_end(self, timeout: float | None = None) -> list[Event]:
        """Give all events up to the end of the stream, each of which, and the end, has ``timeout`` to come."""
        events = list(self._events)
        self._events.clear()
        while True:
            seconds = self._timeout if timeout is None else timeout
            if not self._more(time.monotonic() + seconds):
                if self.ended:
                    return events
                raise NoEvent(f"the stream has not ended within {seconds:g} s{self._what_came()}")
            events += self._events
            self._events.clear()

    def comment(self, timeout: float | None = None) -> str:
        """Give the next comment that comes from now on; a heartbeat is ``ping``. Events before it can still be read."""
        seconds = self._timeout if timeout is None else timeout
        deadline, before = time.monotonic() + seconds, len(self.comments)
        while len(self.comments) == before:
            if not self._more(deadline):
                why = "the stream has ended" if self.ended else f"none came within {seconds:g} s"
                raise NoEvent(f"no comment: {why}{self._what_came()}")
        return self.comments[before]

    def assert_silent(self, seconds: float = 0.1) -> None:
        """Raise :class:`AssertionError` if an event comes within so long.

        An event that is published afterwards, and is the next one, shows the same at once and for certain.
        """
        deadline = time.monotonic() + seconds
        while not self._events:
            if not self._more(deadline):
                return
        raise AssertionError(f"there should be no event, and there is {self._events[0]!r}")

    def pause(self) -> None:
        """Stop reading, as a client that is too slow: what comes waits in the stream's queue.

        One piece of the body is on its way, with the event that comes next, or with several that come at once.
        """
        self._is_paused = True
        slow_readers.add(self)

    def resume(self) -> None:
        """Go on reading."""
        self._is_paused = False
        slow_readers.discard(self)
        self._resumed.wake()

    @property
    def last_event_id(self) -> str:
        """What its client would send as ``Last-Event-ID``: the id of the last block that was taken in."""
        return self._decoder.last_event_id

    @property
    def retry(self) -> int | None:
        """The reconnection time that the stream asked for, in milliseconds."""
        return self._decoder.retry

    def reconnect(self) -> EventReader:
        """Leave, and ask again as a browser does: with the id of the last event. Events not read yet are lost here."""
        self.close()
        return self._again(self.last_event_id)

    def __iter__(self) -> Iterator[Event]:
        """Give the events up to the end of the stream, each of which has the client's timeout to come."""
        while True:
            try:
                event = self.next()
            except NoEvent:
                if self.ended:
                    return
                raise
            yield event

    def close(self) -> None:
        """Leave, as a client that closes its connection. May be called twice."""
        if not self._is_closed:
            self._is_closed = True
            self.resume()
            self._close_body()

    def _close_body(self) -> None:
        if self._is_body_closed:
            return
        self._is_body_closed = True
        try:
            self.response.close()
        except ValueError as error:
            # A generator that stands in the middle of something is closed by the code that runs it, when it comes to
            # its next yield.
            if "already executing" not in str(error):
                raise
            self._is_body_closed = False
            if self._is_over:  # which it may just have done
                self._close_body()

    def _what_came(self) -> str:
        comments = f", and {len(self.comments)} comments came" if self.comments else ""
        cursor = f"; the last id was {self.last_event_id!r}" if self.last_event_id else "; no event has come yet"
        return comments + cursor

    def __enter__(self) -> EventReader:  # noqa: PYI034  Self is of Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class SSEClient:
    """Opens streams of ``app``, a Flask app or any other WSGI application, and closes them at the end of its block.

    ``http``
        the test client for all other requests; it has the same cookies.
    ``timeout``
        seconds that readers wait for one event, if they are not told otherwise.
    """

    def __init__(self, app: Any, *, timeout: float = 5.0) -> None:
        self.http: Client = app.test_client() if hasattr(app, "test_client") else Client(app)
        self.timeout = timeout
        self._readers: list[EventReader] = []

    def get(self, path: str, *, last_event_id: str | None = None, **options: Any) -> EventReader:
        """Open the stream at ``path``; ``options`` are those of the test client. See :meth:`open`."""
        return self.open(path, last_event_id=last_event_id, method="GET", **options)

    def open(self, path: str, *, last_event_id: str | None = None, **options: Any) -> EventReader:
        """Open a stream, by any method. When this returns, it listens.

        A view runs in the caller's thread up to its response, without a deadline, as with any test client.

        Raises :class:`AssertionError` for an answer that is no stream, with its status and its text. What is refused
        on purpose is asked for by ``http``.
        """
        headers = Headers(options.pop("headers", None))
        if last_event_id:
            # As browsers send it, and WSGI hands it over.
            headers["Last-Event-ID"] = last_event_id.encode().decode("latin-1")
        response = self.http.open(path, headers=headers, **options)
        if response.status_code != 200 or response.mimetype != "text/event-stream":
            text = response.get_data(as_text=True)[:_LONGEST_TEXT]
            response.close()
            raise AssertionError(f"{path} answered no stream, but {response.status}, {response.mimetype}: {text}")

        def again(cursor: str) -> EventReader:
            return self.open(path, last_event_id=cursor or last_event_id, headers=headers, **options)

        reader = EventReader(response, self.timeout, again)
        self._readers.append(reader)
        return reader

    def close(self) -> None:
        """Leave every stream. May be called twice."""
        for reader in self._readers:
            reader.close()
        self._readers.clear()

    def __enter__(self) -> SSEClient:  # noqa: PYI034  Self is of Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def sse_client(app: Any, *, timeout: float = 5.0) -> SSEClient:
    """Give a client that reads the streams of ``app``; see :class:`SSEClient`.

    ::

        with sse_client(app) as client:
            stream = client.get("/stream?connectKey=news")
            sse.publish("news", "hello")
            assert stream.next(timeout=1).data == "hello"
    """
    return SSEClient(app, timeout=timeout)
