"""The interface of Flask-SSE 1.0, over pools, windows and brokers.

::

    from flask_sse_stream.compat.flask_sse import sse       # was: from flask_sse import sse

    app.config["REDIS_URL"] = "redis://localhost"
    app.register_blueprint(sse, url_prefix="/stream")
    sse.publish({"message": "Hello!"}, type="greeting")     # in a request, or another context of the app

A channel is a key. Each app that registers the blueprint gets a pool manager, made when it is first needed, since
Flask-SSE too reads an app's config no earlier; an app that has an ``SSE(app)`` lends that one's. The page of the
documentation about coming over says what is different.
"""

from __future__ import annotations

import json as plain_json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

from flask import Blueprint, Flask, current_app, json
from flask.blueprints import BlueprintSetupState
from flask.typing import ResponseReturnValue

from ..errors import SettingsError
from ..event import Event, EventDecoder, to_text
from ..extension import OWNER, SSE, _query
from ..leaving import handle_sigterm
from ..pools import PoolManager
from ..settings import Settings
from ..transports.base import current_runtime
from ..transports.iterator import Body, IteratorTransport

if TYPE_CHECKING:
    from redis import Redis

__all__ = ["Message", "ServerSentEventsBlueprint", "sse"]

logger: logging.Logger = logging.getLogger("flask_sse_stream")

_CHANNEL: Final = "sse"
_MISSING: Final = "set REDIS_URL in the app's config (or SSE_REDIS_URL) to the URL of a Redis"
_first_use = threading.Lock()


class Message:
    """What is published: data, and optionally its type, id and reconnection time (milliseconds).

    ``data`` that is no text becomes JSON by the app's JSON provider. What is false (``""``, ``0``) counts as left out,
    ``data`` excepted. ``str(message)`` is its form on the wire.
    """

    def __init__(self, data: Any, type: Any = None, id: Any = None, retry: Any = None) -> None:
        self.data = data
        self.type = type
        self.id = id
        self.retry = retry

    def _options(self) -> dict[str, Any]:
        return {name: value for name in ("type", "id", "retry") if (value := getattr(self, name))}

    def to_dict(self) -> dict[str, Any]:
        """Give the data, and what else there is, by their names."""
        return {"data": self.data, **self._options()}

    def to_event(self, dumps: Callable[[Any], str] = json.dumps) -> Event:
        """Give the event that is published; ``dumps`` makes JSON of data that is no text.

        Raises :class:`~flask_sse_stream.EventError` for what an event cannot carry.
        """
        text = to_text(self.data, dumps)
        if not isinstance(self.data, str) and text.startswith('"'):
            text = plain_json.loads(text)  # times and such, which Flask expresses as text: it is sent as that
        return Event(text, event=_text(self.type), id=_text(self.id), retry=_number(self.retry))

    def __str__(self) -> str:
        return self.to_event().encode().decode()

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self._options().items())
        return f"{self.__class__.__name__}({self.data!r}{options})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, self.__class__) and vars(self) == vars(other)

    __hash__: ClassVar[None]  # type: ignore[assignment]  # it can be changed


class _Received(Message):
    """A message as it came, whose form on the wire is that of the event."""

    def __init__(self, event: Event) -> None:
        super().__init__(_value(event.data or ""), event.event, event.id, event.retry)
        self._event = event

    def to_event(self, dumps: Callable[[Any], str] = json.dumps) -> Event:
        return self._event

    def __repr__(self) -> str:
        return "Message" + super().__repr__().removeprefix(type(self).__name__)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Message) and self.to_dict() == other.to_dict()

    __hash__ = None


class ServerSentEventsBlueprint(Blueprint):
    """A blueprint that publishes to channels and streams them. ``sse`` is one, with its view at its root."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Its endpoint is this blueprint's view, which has an app's hooks around it.
        self._extension = _Extension(path=None, client_path=None)
        self.record(_prepare)

    @property
    def manager(self) -> PoolManager:
        """The pool manager of the current app, with all that Flask-SSE has not: counts, statistics, closing.

        Raises :class:`~flask_sse_stream.SettingsError` for bad settings, when it is asked for the first time.
        """
        app = current_app._get_current_object()  # type: ignore[attr-defined]
        if OWNER not in app.extensions:
            with _first_use:  # two first requests at once
                if OWNER not in app.extensions:
                    self._extension.init_app(app)
        manager: PoolManager = app.extensions["sse_stream"]
        return manager

    @property
    def redis(self) -> Redis:
        """A client of redis-py's for the app's Redis, with which nothing here is done.

        Raises :class:`KeyError` where the app has no URL of a Redis.
        """
        url = _redis_url(current_app.config)
        if not url:
            raise KeyError(f"there is no Redis: {_MISSING}")
        try:
            from redis import Redis
        except ImportError as error:
            raise SettingsError("sse.redis needs redis-py: pip install 'flask-sse-stream[redis]'") from error
        return Redis.from_url(url)

    def publish(self, data: Any, type: Any = None, id: Any = None, retry: Any = None, channel: str = _CHANNEL) -> str:
        """Send an event to every stream of ``channel``, now and, within the history, later; return its id.

        ``data``
            text as it is, any other value as JSON by the app's JSON provider; ``None`` as ``null``.
        ``type``
            its name; ``message`` for a browser if left out.
        ``id``
            takes the place of the log's own, by which a client that comes back is given what it missed.
        ``retry``
            the reconnection time of its clients in milliseconds.

        Raises :class:`~flask_sse_stream.EventError` for what cannot be sent, and
        :class:`~flask_sse_stream.BrokerError` if the broker may not have taken it.
        """
        manager = self.manager
        return manager.publish(channel, Message(data, type=type, id=id, retry=retry).to_event(manager.dumps))

    def messages(self, channel: str = _CHANNEL, *, last_event_id: str | None = None) -> Iterator[Message]:
        """Give the messages of ``channel`` from now on, as they come; or from after ``last_event_id``.

        ``data`` that is the JSON of an object or a list is given as such, and everything else as text. Events that tell
        clients of their stream, such as ``stream-reset``, are among them. It ends when the process stops.

        Raises :class:`~flask_sse_stream.StreamsFull`, :class:`~flask_sse_stream.EventError` for a bad channel, and
        :class:`~flask_sse_stream.BrokerError`.
        """
        runtime = current_runtime()
        waiter = runtime.waiter()
        stream = self.manager.open([channel], IteratorTransport(waiter), runtime, last_event_id=last_event_id)
        return _read(Body(stream, waiter))

    def stream(self) -> ResponseReturnValue:
        """Answer the current request with the stream of the query's ``channel``, or of the channel ``sse``.

        Of several channels it takes the first, which is the one that ``request.args.get("channel")`` gives a
        ``before_request`` that asks who may listen. ``SSE_PUBLIC_KEYS``, ``SSE_TICKETS`` and the ``authorize`` of an
        ``SSE(app)`` count too.
        """
        manager = self.manager
        extension: SSE = current_app.extensions[OWNER]
        return extension._answer(manager, [_query().get("channel") or _CHANNEL])


class _Extension(SSE):
    """Reads what Flask-SSE reads: the URL of a Redis."""

    def _read_settings(self, app: Flask) -> Settings:
        config = dict(app.config)
        url = _redis_url(config)
        config.pop("SSE_REDIS_URL", None)
        if not config.get("SSE_BROKER_URL"):
            if not url:
                logger.warning(
                    "the app %r has no Redis, so its events stay in this process: %s", app.import_name, _MISSING
                )
            config["SSE_BROKER_URL"] = url or "memory://"
        return Settings.from_mapping(config, **self._options)


def _redis_url(config: Mapping[str, Any]) -> Any:
    return config.get("SSE_REDIS_URL") or config.get("REDIS_URL")


def _prepare(state: BlueprintSetupState) -> None:
    """Do what is possible only while an app is set up, in the main thread; its config may not be complete yet."""
    if state.app.config.get("SSE_DRAIN_SECONDS", True):
        handle_sigterm()


def _text(value: Any) -> str | None:
    """Give a type or an id as Flask-SSE sends it, which has it go through JSON."""
    if not value:
        return None
    return value if value.__class__ is str else str(plain_json.loads(json.dumps(value)))


def _number(value: Any) -> Any:
    if not value:
        return None
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value


def _value(data: str) -> Any:
    if data.startswith(("{", "[")):
        try:
            return plain_json.loads(data)
        except (ValueError, RecursionError):
            return data
    return data


def _read(body: Body) -> Iterator[Message]:
    decoder = EventDecoder()
    try:
        for chunk in body:
            for event in decoder.feed(chunk):
                yield _Received(event)
    finally:
        body.close()


sse: ServerSentEventsBlueprint = ServerSentEventsBlueprint("sse", __name__)
"""The blueprint that most apps register as it is."""
sse.add_url_rule("", endpoint="stream", view_func=sse.stream)
