"""Streams for any WSGI application: :func:`respond` answers one request, :class:`SSEMiddleware` a path.

It reads a request's environ, decides what to answer, and picks the transport and the runtime for the server that
called. It knows no framework; the Flask extension is one of its users.
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
import logging
from collections.abc import AsyncIterable, Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, Final
from urllib.parse import parse_qs

from .access import Ticket
from .errors import AccessDenied, BrokerError, StreamClosed, StreamsFull
from .event import END_ID, PING
from .jobs import Job
from .pools import PoolManager
from .settings import Settings
from .stream import CloseReason, Stream
from .transports.base import Runtime, Task, current_runtime
from .transports.iterator import Body, IteratorTransport
from .transports.servers import GivenUp, PeerWatch, client_socket, cut, give_up, in_one_piece, limit_silence, tune

__all__ = [
    "LAST_EVENT_ID_PARAM",
    "Environ",
    "SSEMiddleware",
    "Source",
    "accepts_event_stream",
    "check_public",
    "check_source",
    "cors_headers",
    "discard",
    "last_event_id",
    "preflight_headers",
    "query",
    "requested_keys",
    "respond",
]

logger: logging.Logger = logging.getLogger("flask_sse_stream")

Environ = Mapping[str, Any]
StartResponse = Callable[..., Any]
WSGIApplication = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]
Source = Iterable[Any] | Callable[[Stream], Any]
"""What feeds a stream of one request: an iterable of events, or a function that is handed the stream."""

CONTENT_TYPE: Final = "text/event-stream"
LAST_EVENT_ID_PARAM: Final = "lastEventId"
"""The query parameter for a cursor of whoever cannot send the header ``Last-Event-ID``."""

_PREFLIGHT_SECONDS: Final = "86400"
# The server owns the first three (PEP 3333 forbids applications to send hop-by-hop headers); the length is unknown.
_NEVER_SENT: Final = {"connection", "keep-alive", "transfer-encoding", "content-length"}


def respond(
    manager: PoolManager,
    environ: Environ,
    start_response: StartResponse,
    *,
    keys: Sequence[str] | None = None,
    stream: Stream | None = None,
    source: Source | None = None,
    job: Job | None = None,
    headers: Iterable[tuple[str, str]] = (),
    ticket: Ticket | None = None,
    comments: bool = True,
) -> Iterable[bytes]:
    """Answer one request with a stream, as a WSGI application does; return the body.

    Without ``stream`` and ``source``, the stream listens to ``keys``: by default those that the query names, if
    ``SSE_PUBLIC_KEYS`` opens them (else 403), or ``SSE_DEFAULT_KEY``. Keys that are given are not checked again. With
    ``ticket`` it ends when that expires or is revoked; one that was revoked already is a 403.
    It replays what was missed since ``Last-Event-ID`` (or ``?lastEventId=``); only GET opens it, HEAD is answered
    the headers, OPTIONS what CORS needs, other methods 405, bad keys 400.

    With ``source``, or with ``stream`` made by ``Stream(manager)``, it is a stream of this request alone, by any
    method but HEAD and OPTIONS. ``source`` is an iterable of events (text, JSON values,
    :class:`~flask_sse_stream.Event`), which runs beside the response and is closed as soon as the client is known
    to have left; or a function that is handed the stream and may return such an iterable. At its end the stream is
    sent ``SSE_CLOSE_EVENT`` with the id ``end``; if it raises, the stream ends with reason ``error`` and the client
    does not see why.

    With ``job`` it reads that job, from its beginning or from ``Last-Event-ID``, by any method but HEAD and OPTIONS;
    404 where there is none. Who may read it is for the caller to decide.

    Without ``comments``, for clients that cannot read them, there are no heartbeats: a proxy may then take a stream
    that says nothing for one that is dead, and a client that has gone without a word is found later.

    ``headers`` are added to, and override, the stream's own and ``SSE_HEADERS``.

    Raises :class:`EventError` for bad ``keys`` that were given, and :class:`TypeError` for a ``source`` that is
    neither of the two.
    """
    settings = manager.settings
    method = environ.get("REQUEST_METHOD", "GET")
    of_request = stream is not None or source is not None
    any_method = of_request or job is not None
    if source is not None:
        check_source(source)
    if method == "OPTIONS":
        discard(stream, source)
        allowed = preflight_headers(settings, environ, "GET, POST" if any_method else "GET")
        start_response("204 No Content", allowed if any_method else [*allowed, ("Allow", "GET, HEAD, OPTIONS")])
        return []
    if not any_method and method not in ("GET", "HEAD"):
        return _refuse(start_response, "405 Method Not Allowed", "", ("Allow", "GET, HEAD, OPTIONS"))
    cursor = last_event_id(environ)
    if cursor == END_ID:
        # The one answer at which an EventSource stops (HTML standard, 9.2.2): the stream was over for good.
        discard(stream, source, CloseReason.ENDED)
        start_response("204 No Content", cors_headers(settings, environ))
        return []
    if job is not None:
        keys = (job.key,)
        if environ.get("wsgi.multiprocess"):
            manager.warn_of_other_processes()
        try:
            if not job.follow():
                cors = cors_headers(settings, environ)
                return _refuse(start_response, "404 Not Found", "there is no such job, or it is no longer kept", *cors)
        except BrokerError:
            pass  # Opening the stream meets it as well, and answers as for all streams.
    elif keys is not None:
        keys = manager.check_keys(keys)
    elif not of_request:
        try:
            keys = manager.check_keys(_requested_keys(settings, environ))
        except AccessDenied as error:
            return _deny(start_response, error, settings, environ)
        except ValueError as error:
            return _refuse(start_response, "400 Bad Request", str(error), *cors_headers(settings, environ))
    head = _headers(settings, environ, headers)
    if method == "HEAD":
        discard(stream, source)
        start_response("200 OK", head)
        return []

    runtime = current_runtime()
    waiter = runtime.waiter()
    client = client_socket(environ)
    transport = IteratorTransport(waiter, functools.partial(cut, client) if client is not None else None)
    try:
        if of_request:
            if stream is None:
                stream = Stream(manager)
            stream.comments = stream.comments and comments
            manager.attach(stream, transport, runtime)
        else:
            if environ.get("wsgi.multiprocess"):
                manager.warn_of_other_processes()
            stream = manager.open(
                keys or (), transport, runtime, last_event_id=cursor, ticket=ticket, comments=comments
            )
    except AccessDenied as error:  # revoked meanwhile, which is known here alone
        return _deny(start_response, error, settings, environ)
    except (StreamsFull, BrokerError) as error:
        discard(stream, source)
        # That a process stops is no trouble, and nobody who comes back a moment later was refused anything.
        level = logging.DEBUG if isinstance(error, StreamsFull) and error.draining else logging.WARNING
        logger.log(level, "a stream was refused: %s", error)
        if settings.when_full == "503":
            wait = max(1, round((settings.retry or 1000) / 1000))
            return _refuse(
                start_response,
                "503 Service Unavailable",
                str(error),
                ("Retry-After", str(wait)),
                *cors_headers(settings, environ),
            )
        # Any status but 200 would make a browser give up for ever (HTML standard, 9.2.2).
        start_response("200 OK", head)
        return [manager.full_body()]
    verdict = task = None
    if client is not None:
        tune(client, settings.send_buffer)
        verdict = PeerWatch(client, settings.send_timeout, settings.ping_interval).verdict
    if source is not None:
        stream.room = runtime.waiter()
        task = runtime.spawn(_feeder(stream, source))
    body = Body(stream, waiter, task, verdict)
    write = start_response("200 OK", head)
    given_up = give_up(environ, write, runtime.socket_type) if settings.fast_path else None
    if given_up is None:
        return body
    return _hand_off(body, stream, write, given_up, settings.send_timeout, runtime, task)


def _hand_off(
    body: Body,
    stream: Stream,
    write: Callable[[bytes], object],
    given_up: GivenUp,
    send_timeout: float,
    runtime: Runtime,
    task: Task | None,
) -> Iterable[bytes]:
    """Have the server write the head and the first bytes; from there on the reactor serves its socket."""
    try:
        # By name, since there are systems that have no epoll. The first of a process needs descriptors of its own.
        reactor = import_module("flask_sse_stream.transports.reactor").Reactor.of(runtime.loop())
        transport = reactor.adopt(stream, given_up.client, task)
    except OSError as error:
        logger.warning("a stream stays with its server: %s", error)
        return body
    try:
        with in_one_piece(given_up.client):
            write(stream.take() or (PING if stream.comments else b"\n"))
        limit_silence(given_up.client, send_timeout)
        given_up.let_go()
    except BaseException:
        transport.close()
        body.close()
        raise
    body.release()
    transport.begin()
    return []


class SSEMiddleware:
    """A WSGI application that answers ``SSE_PATH`` with streams and leaves everything else to ``application``."""

    def __init__(self, application: WSGIApplication, manager: PoolManager) -> None:
        self.application = application
        self.manager = manager
        # As WSGI hands paths over: UTF-8 that was read as Latin-1. None is equal to no path.
        path = manager.settings.path
        self._path = path.encode().decode("latin-1") if path is not None else None

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request."""
        # PATH_INFO may be left out where it is empty (PEP 3333).
        if environ.get("PATH_INFO", "") == self._path:
            return respond(self.manager, environ, start_response)
        return self.application(environ, start_response)


# What feeds a stream of one request


def _feeder(stream: Stream, source: Source) -> Callable[[], None]:
    def run() -> None:
        try:
            _exhaust(stream, source)
        except Exception as error:
            if isinstance(error, StreamClosed) and stream.closed:
                return  # The client left, or somebody ended the stream: what the source has to say, nobody reads.
            logger.exception("the source of a stream raised; its client is not told why")
            stream.close(CloseReason.ERROR)
        except BaseException:  # gevent's Timeout among others: whatever ends this code ends the stream
            stream.close(CloseReason.ERROR)
            raise
        finally:
            stream.room = None

    return run


def _exhaust(stream: Stream, source: Source) -> None:
    if callable(source):
        events = source(stream)
        if events is None:
            events = ()  # it has sent what it had to say
        check_source(events)
    else:
        events = source
    try:
        for item in events:
            stream.send(item)
    finally:
        # Before the stream's end is sent, for after that this code may be stopped anywhere.
        _close_source(events)
    if not stream.closed:
        stream.send_end()


def check_source(source: Any) -> None:
    """Raise :class:`TypeError` for what cannot feed a stream, though it can be iterated or called."""
    if isinstance(source, (str, bytes, bytearray, Mapping)):
        raise TypeError(f"a source gives events one after the other; put this {type(source).__name__} into a list")
    if inspect.iscoroutinefunction(source) or inspect.isasyncgenfunction(source) or isinstance(source, AsyncIterable):
        raise TypeError("a source runs in a greenlet or thread, not in an event loop: make it a plain function")
    if not callable(source) and not isinstance(source, Iterable):
        raise TypeError(f"a source is an iterable of events or a function, not {type(source).__name__}")


def discard(stream: Stream | None, source: Source | None, reason: CloseReason = CloseReason.PEER) -> None:
    """Let go of what will not be sent."""
    if stream is not None:
        stream.close(reason)
    _close_source(source)


def _close_source(source: Source | None) -> None:
    close = getattr(source, "close", None)
    if close is not None:
        close()


# Reading the request


def last_event_id(environ: Environ) -> str | None:
    """Give the request's cursor: the header ``Last-Event-ID``, else the query's ``lastEventId``, else ``None``.

    WSGI hands headers over as Latin-1; browsers send UTF-8. What is neither is some text that no event has as id.
    """
    header = environ.get("HTTP_LAST_EVENT_ID")
    if header:
        return str(header).encode("latin-1", "replace").decode("utf-8", "replace")
    if LAST_EVENT_ID_PARAM not in environ.get("QUERY_STRING", ""):
        return None
    try:
        found = query(environ).get(LAST_EVENT_ID_PARAM)
    except ValueError:
        return None
    return (found[-1] or None) if found else None


def query(environ: Environ) -> dict[str, list[str]]:
    """Give the parameters of a request's query; :class:`ValueError` for one that is too wild."""
    raw = str(environ.get("QUERY_STRING", "")).encode("latin-1", "replace").decode("utf-8", "replace")
    return parse_qs(raw, keep_blank_values=True, max_num_fields=1000)


def _requested_keys(settings: Settings, environ: Environ) -> list[str]:
    keys = requested_keys(settings, environ)
    check_public(settings, keys)
    return keys


def requested_keys(settings: Settings, environ: Environ) -> list[str]:
    """Give the keys that a request's query names, or ``SSE_DEFAULT_KEY``; :class:`ValueError` for a wild query."""
    return query(environ).get(settings.key_param) or [settings.default_key]


def check_public(settings: Settings, keys: Iterable[str]) -> None:
    """Raise :class:`AccessDenied` if a key matches none of ``SSE_PUBLIC_KEYS``, or tickets are needed."""
    if settings.tickets:
        raise AccessDenied("this stream needs a ticket", status=401)
    for key in keys:
        if not any(fnmatch.fnmatchcase(key, pattern) for pattern in settings.public_keys):
            raise AccessDenied(f"the key {key!r:.80} is not open to everybody")


def accepts_event_stream(accept: str) -> bool:
    """Say whether an ``Accept`` header admits ``text/event-stream`` (RFC 9110, section 12.5.1); an empty one does."""
    best = (-1, 0.0)  # the most specific range that matches decides
    for part in accept.split(","):
        media, *parameters = (piece.strip().lower() for piece in part.split(";"))
        if media not in ("*/*", "text/*", CONTENT_TYPE):
            continue
        quality = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                try:
                    quality = float(value)
                except ValueError:
                    quality = 0.0
        best = max(best, (("*/*", "text/*", CONTENT_TYPE).index(media), quality))
    return not accept.strip() or best[1] > 0


# Writing the answer


def _headers(settings: Settings, environ: Environ, extra: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    ours = [
        ("Content-Type", CONTENT_TYPE),
        # no-transform: a proxy that compresses would hold events back until its buffer is full.
        ("Cache-Control", "no-cache, no-transform"),
        ("X-Accel-Buffering", "no"),  # nginx
        *cors_headers(settings, environ),
    ]
    return _merged(ours, _merged(list(settings.headers.items()), extra))


def _merged(base: Iterable[tuple[str, str]], over: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    over = [item for item in over if item[0].lower() not in _NEVER_SENT]
    names = {name.lower() for name, _ in over} - {"vary"}
    return [item for item in base if item[0].lower() not in names] + over


def cors_headers(settings: Settings, environ: Environ) -> list[tuple[str, str]]:
    """Give the headers that let a listed origin's page read the answer; none by default."""
    if not settings.cors_origins:
        return []
    if "*" in settings.cors_origins:
        return [("Access-Control-Allow-Origin", "*")]
    vary = ("Vary", "Origin")
    origin = environ.get("HTTP_ORIGIN")
    if origin not in settings.cors_origins:
        return [vary]
    cookies = [("Access-Control-Allow-Credentials", "true")] if settings.cors_credentials else []
    return [("Access-Control-Allow-Origin", origin), *cookies, vary]


def preflight_headers(settings: Settings, environ: Environ, methods: str = "GET") -> list[tuple[str, str]]:
    """Give what a browser asks before it reconnects across origins with an unusual ``Last-Event-ID``, or posts."""
    allowed = cors_headers(settings, environ)
    if not any(name == "Access-Control-Allow-Origin" for name, _ in allowed):
        return allowed
    unusual = "Last-Event-ID, Cache-Control, Content-Type" + (", Authorization" if settings.tickets else "")
    return [
        *allowed,
        ("Access-Control-Allow-Methods", methods),
        ("Access-Control-Allow-Headers", unusual),
        ("Access-Control-Max-Age", _PREFLIGHT_SECONDS),
    ]


def _deny(start_response: StartResponse, error: AccessDenied, settings: Settings, environ: Environ) -> list[bytes]:
    status = {401: "401 Unauthorized", 403: "403 Forbidden", 404: "404 Not Found"}[error.status]
    # A 401 says what would be accepted (RFC 9110, section 11.6.1).
    asked = [("WWW-Authenticate", "Bearer")] if error.status == 401 and settings.tickets else []
    return _refuse(start_response, status, str(error), *asked, *cors_headers(settings, environ))


def _refuse(start_response: StartResponse, status: str, message: str, *headers: tuple[str, str]) -> list[bytes]:
    body = (message or status[4:]).encode() + b"\n"
    start_response(
        status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body))), *headers]
    )
    return [body]
