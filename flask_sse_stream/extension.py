"""The Flask edge: ``SSE(app)``, the endpoint, streams of one request, and signals.

Everything that Flask knows (request, config, JSON provider, URL rules) is read here and handed down; the work is
done by the app's :class:`~flask_sse_stream.PoolManager`, which is ``app.extensions["sse_stream"]``. No request or
application context is held while a stream is open.
"""

from __future__ import annotations

import functools
import secrets
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, Final, ParamSpec, TypeVar
from urllib.parse import parse_qsl

from flask import Flask, Response, current_app, has_app_context, request, url_for
from flask.json.provider import DefaultJSONProvider
from flask.typing import ResponseReturnValue
from werkzeug.datastructures import MultiDict, WWWAuthenticate
from werkzeug.exceptions import Forbidden, HTTPException, NotAcceptable, NotFound, Unauthorized

from .access import Ticket, now
from .bridge import Bridge, Target
from .brokers.base import Broker, broker_from_url
from .client import add_client, url_for_client
from .errors import AccessDenied, SettingsError
from .event import END_ID, Event
from .health import Health, health
from .inspector import Admit, Inspector
from .leaving import handle_sigterm
from .pools import PoolManager, Stats
from .progress import progress
from .responses import EventStreamResponse, StreamedJob, add_cors
from .settings import Settings
from .shortcut import Shortcut
from .signals import connect_signals, event_published, events_dropped, stream_closed, stream_opened
from .stream import Stream
from .tickets import Tickets, bearer
from .wsgi import (
    LAST_EVENT_ID_PARAM,
    Source,
    accepts_event_stream,
    check_public,
    check_source,
    last_event_id,
    preflight_headers,
)

__all__ = [
    "SSE",
    "EventStreamResponse",
    "StreamedJob",
    "event_published",
    "events_dropped",
    "stream_closed",
    "stream_opened",
]

_NAME: Final = "sse_stream"
OWNER: Final = "sse_stream_owner"
"""Where ``app.extensions`` has the :class:`SSE` of an app, beside its pool manager."""
_UNSET: Final[Any] = object()

P = ParamSpec("P")
T = TypeVar("T")
Authorize = Callable[[Sequence[str]], Iterable[str] | Ticket | None]
_A = TypeVar("_A", bound=Authorize)
_I = TypeVar("_I", bound=Admit)

_DENIED: Final[dict[int, type[HTTPException]]] = {401: Unauthorized, 403: Forbidden, 404: NotFound}


class SSE:
    """Server-sent events for Flask apps.

    ::

        sse = SSE(app)                              # or sse = SSE(); sse.init_app(app)
        sse.publish("news", {"title": "hi"}, event="headline")

    Keyword arguments are the settings without their prefix (``ping_interval=5``) and override ``app.config``.
    One instance may serve several apps; each app has pools of its own.

    ``broker``
        makes the broker of an app from its settings, in each process anew; by default the one that
        ``SSE_BROKER_URL`` names. For a broker of your own.
    """

    def __init__(
        self, app: Flask | None = None, *, broker: Callable[[Settings], Broker] = broker_from_url, **options: Any
    ) -> None:
        self._options = options
        self._broker = broker
        self._authorize: Authorize | None = None
        self._admit_to_inspector: Admit | None = None
        self._managers: list[weakref.ref[PoolManager]] = []
        self._tickets: weakref.WeakKeyDictionary[PoolManager, Tickets] = weakref.WeakKeyDictionary()
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Read the app's settings, make its pool manager and add its endpoint. Starts nothing.

        Raises :class:`SettingsError` for bad or misspelt settings, for an app that has a registration already,
        and for an endpoint whose path is taken.
        """
        if _NAME in app.extensions:
            raise SettingsError(
                f"the app {app.import_name!r} has an SSE extension already: use that one, "
                "or give a second one an app of its own"
            )
        settings = self._read_settings(app)
        manager = PoolManager(settings, dumps=functools.partial(_dumps, app), broker=self._broker)
        tickets = Tickets(settings, functools.partial(_secrets, weakref.ref(app)))
        if settings.path is not None:
            if any(rule.rule == settings.path and "GET" in (rule.methods or ()) for rule in app.url_map.iter_rules()):
                raise SettingsError(f"SSE_PATH {settings.path!r} is another view's route already: choose another path")
            app.add_url_rule(
                settings.path,
                endpoint=_NAME,
                view_func=functools.partial(self._endpoint, manager),
                methods=["GET", "OPTIONS"],
                provide_automatic_options=False,
            )
            is_free = functools.partial(_has_nobody_to_ask, weakref.ref(self), weakref.ref(app))
            app.wsgi_app = Shortcut(app, manager, tickets, _NAME, is_free)  # type: ignore[method-assign]
        if settings.client_path is not None:
            add_client(app, settings.client_path)
        if settings.inspector is not None:
            Inspector(app, manager, settings.inspector, lambda: self._admit_to_inspector)
        if settings.drain_seconds:
            # Now, since the requests of Flask's own server run in threads, which may not do it.
            handle_sigterm()
        connect_signals(weakref.ref(app), manager)
        app.extensions[_NAME] = manager
        app.extensions[OWNER] = self
        self._tickets[manager] = tickets
        self._managers.append(weakref.ref(manager))

    def _read_settings(self, app: Flask) -> Settings:
        return Settings.from_mapping(app.config, **self._options)

    @property
    def manager(self) -> PoolManager:
        """The pool manager of the current app; outside any app context, of the only app this instance serves.

        Raises :class:`RuntimeError` where that is none or more than one.
        """
        if has_app_context():
            manager = current_app.extensions.get(_NAME)
            if isinstance(manager, PoolManager):
                return manager
            raise RuntimeError(f"the app {current_app.import_name!r} has no SSE extension: call init_app(app) first")
        managers = [manager for ref in self._managers if (manager := ref()) is not None]
        if len(managers) == 1:
            return managers[0]
        raise RuntimeError(
            f"this SSE serves {len(managers)} apps and there is no app context to say which is meant: "
            'use app.extensions["sse_stream"], or "with app.app_context():"'
        )

    def url_for_client(self) -> str:
        """Give the URL of ``sse.js``, the browser's client, in the current app; with a hash, so that it may be kept.

        Raises :class:`SettingsError` where ``SSE_CLIENT_PATH`` is ``None``.
        """
        return url_for_client()

    # Pools

    def publish(
        self,
        key: str,
        data: Any = None,
        *,
        event: str | None = None,
        id: str | int | None = None,
        retry: int | None = None,
        idempotency_key: str | None = None,
    ) -> str:
        """Send an event to every stream of ``key``; return its id. See :meth:`PoolManager.publish`."""
        return self.manager.publish(key, data, event=event, id=id, retry=retry, idempotency_key=idempotency_key)

    def publish_all(
        self,
        data: Any = None,
        *,
        event: str | None = None,
        id: str | int | None = None,
        retry: int | None = None,
        idempotency_key: str | None = None,
    ) -> str:
        """Send an event to every stream of every key; return its id. See :meth:`PoolManager.publish_all`."""
        return self.manager.publish_all(data, event=event, id=id, retry=retry, idempotency_key=idempotency_key)

    def progress(
        self,
        iterable: Iterable[T],
        *,
        key: str,
        total: int | None = None,
        event: str = "progress",
        interval: float = 0.1,
    ) -> Generator[T, None, None]:
        """Give the items of ``iterable``, and publish how many are done; see :func:`.progress.progress`.

        Which app's pool it is for is decided at the call: the loop may run in a thread without an app context.
        """
        return progress(self.manager.publish, iterable, key=key, total=total, event=event, interval=interval)

    def lease(self, name: str, seconds: float) -> bool:
        """Let this process have ``name`` for so long, unless another one has it. See :meth:`PoolManager.lease`."""
        return self.manager.lease(name, seconds)

    def job(
        self, id: str | None = None, *, ttl: float | None = None, stop_when_unread: float | None = None
    ) -> StreamedJob:
        """Give the job with this id; without one, a new job that can be read from now on, with an id of its own.

        ``ttl``
            seconds that it is kept after its last event, at most ``SSE_JOB_TTL``, which is the default.
        ``stop_when_unread``
            seconds after which what this call's job starts is cancelled if nobody reads it; ``None``: it goes on.

        See :class:`~flask_sse_stream.Job`. Raises :class:`BrokerError` without an id, and :class:`ValueError` for a bad
        ``ttl`` or ``stop_when_unread``.
        """
        manager = self.manager
        if id is not None:
            return StreamedJob(manager, id, ttl, stop_when_unread)
        job = StreamedJob(manager, secrets.token_urlsafe(16), ttl, stop_when_unread)
        job.open()
        return job

    def bridge(self, channel: str, to: Target, *, event: str | None = None, url: str | None = None) -> Bridge:
        """Publish what other software publishes on a channel of Redis's. See :class:`~flask_sse_stream.bridge.Bridge`.

        Call it after ``init_app``. It listens from the first stream of a process on.
        """
        return Bridge(self.manager, channel, to, event=event, url=url)

    def count(self, key: str) -> int:
        """How many streams of this process listen to ``key``."""
        return self.manager.count(key)

    def count_all(self) -> int:
        """How many streams this process has, those of one request included."""
        return self.manager.count_all()

    def streams(self, key: str) -> list[Stream]:
        """The streams of this process that listen to ``key``."""
        return self.manager.streams(key)

    def close(self, key: str, *, reconnect: bool = False) -> int:
        """End every stream of ``key`` in this process; see :meth:`PoolManager.close`."""
        return self.manager.close(key, reconnect=reconnect)

    def close_all(self, *, reconnect: bool = False) -> int:
        """End every stream of this process; see :meth:`PoolManager.close_all`."""
        return self.manager.close_all(reconnect=reconnect)

    def stats(self) -> Stats:
        """The numbers of this process at this moment."""
        return self.manager.stats()

    def health(self) -> Health:
        """Say whether this process is ready: its broker answers, and it is not about to stop. See :mod:`.health`."""
        return health(self.manager)

    def drain(self, timeout: float | None = None) -> int:
        """End every stream of this process, each to come back at its own time; see :meth:`PoolManager.drain`."""
        return self.manager.drain(timeout)

    # Who may listen

    def authorize(self, function: _A) -> _A:
        """Register ``f(keys) -> keys``, which decides for the current request who listens to what.

        It gives back the keys that are allowed, raises :class:`AccessDenied` (401, 403 or 404) or aborts; giving
        none is 403. With it, ``SSE_PUBLIC_KEYS`` no longer counts. It runs in the request, before anything is
        registered.

        Instead of keys it may give a :class:`~flask_sse_stream.Ticket`, which says besides whose stream it is, for
        :meth:`revoke`, and when it ends. With ``SSE_TICKETS`` it is handed the keys of the request's ticket, or those
        of them that were asked for, and may give fewer, not others.
        """
        self._authorize = function
        return function

    def authorize_inspector(self, function: _I) -> _I:
        """Register ``f() -> bool``, which decides for the current request who sees the inspector (``SSE_INSPECTOR``).

        Who does may read every event, publish to every key and end every stream. All others are answered 404, unless it
        aborts with something else. Without it the inspector is for requests from this machine, in debug mode alone.
        """
        self._admit_to_inspector = function
        return function

    def ticket(self, keys: str | Iterable[str], *, user: str | int | None = None, ttl: float | None = None) -> str:
        """Make a ticket, with which whoever has it may listen to ``keys`` (1 to 100, or one as text) and to no others.

        ``user``
            whose it is, for :meth:`revoke`.
        ``ttl``
            seconds that it is good for, at most ``SSE_TICKET_MAX_TTL``; ``SSE_TICKET_TTL`` if left out. A stream that
            was opened with it ends then too, with the event ``stream-expired`` and reason ``expired``.

        The text is for the query parameter ``SSE_TICKET_PARAM``, in which no character needs escaping, or for the
        header ``Authorization: Bearer``. It is signed with the app's ``SECRET_KEY``; those of ``SECRET_KEY_FALLBACKS``
        are accepted.

        Raises :class:`EventError` for bad keys, :class:`ValueError` for a bad ``user`` or ``ttl``, and
        :class:`SettingsError` where ``SECRET_KEY`` is missing or ``SSE_TICKETS`` is off.
        """
        return self._tickets[self.manager].make(keys, user=user, ttl=ttl)

    def url_for_stream(
        self,
        keys: str | Iterable[str],
        *,
        user: str | int | None = None,
        ttl: float | None = None,
        last_event_id: str | None = None,
        **values: Any,
    ) -> str:
        """Give the URL at which to listen to ``keys``: with a ticket of :meth:`ticket` where ``SSE_TICKETS`` is on.

        ``last_event_id`` lets the stream go on after that event, as when a page renews its ticket. Other arguments are
        for :func:`flask.url_for` (``_external=True``). Raises as :meth:`ticket`, and :class:`SettingsError` for an
        app without the endpoint.
        """
        manager = self.manager
        settings = manager.settings
        if settings.path is None:
            raise SettingsError("SSE_PATH is None, so there is no endpoint to give the URL of: build that of your view")
        if settings.tickets or user is not None or ttl is not None:
            values[settings.ticket_param] = self.ticket(keys, user=user, ttl=ttl)
        else:
            values[settings.key_param] = list(manager.check_keys([keys] if isinstance(keys, str) else keys))
        if last_event_id is not None:
            values[LAST_EVENT_ID_PARAM] = last_event_id
        return url_for(_NAME, **values)

    def revoke(self, *, user: str | int | None = None, key: str | None = None) -> None:
        """End the streams of ``user``, of ``key``, or of this user for this key, in every process.

        Tickets that were made before are refused. See :meth:`PoolManager.revoke`.
        """
        self.manager.revoke(user=user, key=key)

    def _endpoint(self, manager: PoolManager) -> ResponseReturnValue:
        settings = manager.settings
        if request.method == "OPTIONS":
            response = Response(status=204, headers=preflight_headers(settings, request.environ))
            response.allow.update(["GET", "HEAD", "OPTIONS"])
            return response
        return self._answer(manager, _query().getlist(settings.key_param))

    def _answer(self, manager: PoolManager, asked: list[str]) -> ResponseReturnValue:
        """Answer the current request, which asks for the keys ``asked``, as the endpoint does. For other endpoints."""
        settings, tickets = manager.settings, self._tickets[manager]
        if last_event_id(request.environ) == END_ID:
            return EventStreamResponse(manager)
        try:
            keys, ticket = self._admit(manager, tickets, asked)
        except AccessDenied as error:
            add_cors(settings)
            refusal = _DENIED[error.status](str(error))
            if isinstance(refusal, Unauthorized) and settings.tickets:
                # What would be accepted (RFC 9110, section 11.6.1).
                refusal = Unauthorized(str(error), www_authenticate=WWWAuthenticate("bearer"))
            raise refusal from error
        except ValueError as error:
            add_cors(settings)
            return Response(f"{error}\n", 400, content_type="text/plain; charset=utf-8")
        except BaseException:  # what the hook aborts with
            add_cors(settings)
            raise
        return EventStreamResponse(manager, keys=keys, ticket=ticket)

    def _admit(self, manager: PoolManager, tickets: Tickets, asked: list[str]) -> tuple[tuple[str, ...], Ticket | None]:
        """Give what the current request listens to, and what it was let in with."""
        settings = manager.settings
        ticket: Ticket | None = None
        if settings.tickets:
            text = bearer(request.environ) or _query().get(settings.ticket_param)
            keys, ticket = tickets.admit(asked, text)
        else:
            keys = manager.check_keys(asked or [settings.default_key])
            if self._authorize is None:
                check_public(settings, keys)
        if self._authorize is None:
            return keys, ticket
        since = now() if ticket is None else ticket.issued  # what is revoked while it is asked counts
        answer = self._authorize(keys) or _nothing()
        allowed = answer if isinstance(answer, Ticket) else Ticket(answer)
        granted = manager.check_keys(allowed.keys or _nothing())
        if ticket is None:
            return granted, Ticket(granted, user=allowed.user, expires=allowed.expires, issued=since)
        if not set(granted) <= set(keys):
            raise AccessDenied("this ticket is for other keys")
        ends = [expires for expires in (ticket.expires, allowed.expires) if expires is not None]
        user = allowed.user if allowed.user is not None else ticket.user
        return granted, Ticket(ticket.keys, user=user, expires=min(ends, default=None), issued=since)

    # Streams of one request

    def stream(
        self,
        source: Source | None = None,
        *,
        close_event: str | None = _UNSET,
        headers: Mapping[str, str] | None = None,
        heartbeats: bool = True,
    ) -> EventStreamResponse:
        """Give the response that answers the current request with a stream of its own.

        ``source``
            an iterable or generator of events: text, JSON values, :class:`~flask_sse_stream.Event`. It runs
            beside the response, without the request's context, and is closed when its client leaves. Or a
            function that is handed the :class:`~flask_sse_stream.Stream` and runs beside it. When it is done the
            stream ends for good. Without one, use ``response.stream.send(...)`` and ``response.stream.send_end()``.
        ``close_event``
            the name of the last event; ``SSE_CLOSE_EVENT`` if left out; ``None``: none is fired.
        ``headers``
            of the response.
        ``heartbeats``
            without them there is no comment in the stream, for clients that cannot read one.

        Raises :class:`werkzeug.exceptions.NotAcceptable` (406) if the request's ``Accept`` excludes event streams or
        the parameter that ``SSE_MATCH_QUERY`` names is absent, and :class:`TypeError` for a source that is no source.
        """
        manager = self.manager
        if source is not None:
            check_source(source)
        response = self._stream(manager, source, close_event, headers, manager.settings.match_query)
        response.stream.comments = heartbeats
        return response

    def _stream(
        self,
        manager: PoolManager,
        source: Source | None,
        close_event: str | None,
        headers: Mapping[str, str] | None,
        match_query: str | None,
    ) -> EventStreamResponse:
        if not accepts_event_stream(request.headers.get("Accept", "")):
            raise NotAcceptable("This resource is an event stream; the request's Accept header excludes it.")
        if match_query is not None and match_query not in _query():
            raise NotAcceptable(f"This resource is an event stream; ask for it with the query parameter {match_query}.")
        stream = Stream(manager)
        if close_event is not _UNSET:
            stream.close_event = Event(event=close_event).event
        return EventStreamResponse(manager, stream=stream, source=source, headers=headers)

    def event_stream(
        self,
        *,
        match_query: str | None = _UNSET,
        close_event: str | None = _UNSET,
        headers: Mapping[str, str] | None = None,
    ) -> Callable[[Callable[P, Any]], Callable[P, ResponseReturnValue]]:
        """Make a generator view a stream of its request.

        Up to its first ``yield`` it is an ordinary view: it has the request's context, may ``abort``, and what it
        returns before any ``yield`` is the response. After it no context is held and the rest runs beside the
        response. Who needs the response's head at once yields ``Event(comment="")`` first.

        ``match_query`` (default: ``SSE_MATCH_QUERY``)
            a stream is made only where this query parameter is present; a view that yields all the same is
            answered 406.

        ``close_event`` and ``headers`` as for :meth:`stream`. A request with ``Last-Event-ID: end`` is answered 204
        and does not reach the view.
        """

        def decorate(view: Callable[P, Any]) -> Callable[P, ResponseReturnValue]:
            @functools.wraps(view)
            def wrapped(*args: P.args, **kwargs: P.kwargs) -> ResponseReturnValue:
                manager = self.manager
                if last_event_id(request.environ) == END_ID:
                    return EventStreamResponse(manager)
                result = current_app.ensure_sync(view)(*args, **kwargs)
                if not isinstance(result, Generator):
                    return result  # type: ignore[no-any-return]
                wanted = manager.settings.match_query if match_query is _UNSET else match_query
                try:
                    first = next(result)
                except StopIteration as stop:
                    if stop.value is not None:
                        return stop.value  # type: ignore[no-any-return]
                    return self._stream(manager, (), close_event, headers, wanted)
                try:
                    return self._stream(manager, _Resumed(first, result), close_event, headers, wanted)
                except HTTPException:
                    result.close()
                    raise

            return wrapped

        return decorate


class _Resumed:
    """A generator whose first item was already taken."""

    def __init__(self, first: Any, rest: Generator[Any, Any, Any]) -> None:
        self._first = [first]
        self._rest = rest

    def __iter__(self) -> _Resumed:
        return self

    def __next__(self) -> Any:
        return self._first.pop() if self._first else next(self._rest)

    def close(self) -> None:
        self._rest.close()


def _has_nobody_to_ask(sse: weakref.ref[SSE], app: weakref.ref[Flask]) -> bool:
    extension = sse()
    return extension is not None and extension._authorize is None and not stream_opened.has_receivers_for(app())


def _query() -> MultiDict[str, str]:
    """Give the current request's query, of which Werkzeug raises what is an answer 500 where a byte is no UTF-8."""
    try:
        return request.args
    except UnicodeDecodeError:
        return MultiDict(parse_qsl(request.query_string.decode("utf-8", "replace"), keep_blank_values=True))


def _nothing() -> Sequence[str]:
    raise AccessDenied("no right to any of these keys")


def _secrets(app: weakref.ref[Flask]) -> list[str | bytes]:
    """Give what Flask signs with, the current secret first; read each time, since it may be set or changed later."""
    strong = app()
    if strong is None or not strong.secret_key:
        return []
    return [strong.secret_key, *(strong.config.get("SECRET_KEY_FALLBACKS") or ())]


def _dumps(app: Flask, value: Any) -> str:
    provider = app.json
    if isinstance(provider, DefaultJSONProvider):
        return provider.dumps(value, allow_nan=False)  # NaN is no JSON: a browser's parser would fail on it
    return provider.dumps(value)
