"""The public surface as a typed application uses it. Nobody runs this file: mypy and pyright, strict, accept it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, session
from flask.typing import ResponseReturnValue
from sqlalchemy.orm import Session
from typing_extensions import assert_type

import flask_sse_stream
from flask_sse_stream import (
    SSE,
    AccessDenied,
    BrokerError,
    CloseReason,
    Event,
    EventDecoder,
    EventError,
    Job,
    JobClosed,
    JobState,
    PoolManager,
    Publisher,
    Settings,
    SettingsError,
    SSEError,
    Stream,
    StreamClosed,
    StreamsFull,
)
from flask_sse_stream.brokers.base import Broker, BrokerStats, Deliver, Idle, Position, broker_from_url, never_idle
from flask_sse_stream.celery import publish_task_events
from flask_sse_stream.compat.flask_sse import Message as FlaskSSEMessage
from flask_sse_stream.compat.flask_sse import ServerSentEventsBlueprint
from flask_sse_stream.compat.flask_sse import sse as flask_sse
from flask_sse_stream.event import Message
from flask_sse_stream.extension import (
    EventStreamResponse,
    event_published,
    events_dropped,
    stream_closed,
    stream_opened,
)
from flask_sse_stream.pools import Stats
from flask_sse_stream.sqlalchemy import after_commit_stats, publish_after_commit, publish_all_after_commit
from flask_sse_stream.testing import (
    EventReader,
    Publications,
    RecordingBroker,
    record_broker,
    record_published,
    sse_client,
    sse_clock,
)
from flask_sse_stream.wsgi import Source, SSEMiddleware, last_event_id, respond

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

# Registering

app = Flask(__name__)
sse = SSE(app)
assert_type(SSE(app, ping_interval=5, cors_origins=("https://example.org",)), SSE)
assert_type(SSE(app, broker=broker_from_url), SSE)
assert_type(SSE().init_app(app), None)
assert_type(sse.manager, PoolManager)
# Flask is imported by those alone who ask for the extension; type checkers know its class all the same.
assert_type(flask_sse_stream.SSE(app).count("news"), int)

# Publishing, counting, closing

assert_type(sse.publish("news", {"title": "hi"}, event="headline"), str)
assert_type(sse.publish("news", Event("hi")), str)
assert_type(sse.publish("news", None, event="refresh", id=7, retry=500), str)
assert_type(sse.publish_all([1, 2.5, None], id="own"), str)
assert_type(sse.count("news"), int)
assert_type(sse.count_all(), int)
assert_type(sse.url_for_client(), str)
assert_type(sse.streams("news"), list[Stream])
assert_type(sse.close("news"), int)
assert_type(sse.close_all(reconnect=True), int)
assert_type(sse.drain(), int)
assert_type(sse.stats(), Stats)
assert_type(sse.stats().closed, Mapping[str, int])
sse.publish(7, "a key is text")  # type: ignore[arg-type]
sse.publish("news", "a name too", event=7)  # type: ignore[arg-type]


# Who may listen


@sse.authorize
def who(keys: Sequence[str]) -> list[str]:
    if "user" not in session:
        raise AccessDenied("log in first", status=401)
    return [key for key in keys if key.startswith("public-")]


assert_type(who(["a"]), list[str])


@sse.authorize
def nobody(keys: Sequence[str]) -> None:
    return None


@sse.authorize_inspector
def who_looks() -> bool:
    return session.get("role") == "admin"


assert_type(who_looks(), bool)


# Streams of one request


@app.get("/countdown/<int:start>")
@sse.event_stream()
def countdown(start: int) -> Iterator[Event]:
    for number in range(start, 0, -1):
        yield Event(str(number), event="left", id=number)


@sse.event_stream(match_query="live", close_event=None, headers={"X-A": "b"})
def mixed(room: str, *, limit: int = 5) -> Iterator[str | dict[str, int]]:
    yield room
    yield {"limit": limit}


assert_type(mixed("kitchen", limit=3), ResponseReturnValue)
mixed(5)  # type: ignore[arg-type]


def feed(stream: Stream) -> None:
    stream.send({"share": 0.5}, event="progress")


def feed_by_yielding(stream: Stream) -> Iterator[str]:
    yield repr(stream)


@app.post("/feeds")
def feeds() -> Response:
    assert_type(sse.stream(feed), EventStreamResponse)
    sse.stream(feed_by_yielding, close_event="done")
    sse.stream(["one", {"two": 2}, Event("three")], headers={"X-A": "b"})
    response = sse.stream(close_event=None)
    assert_type(response.stream, Stream)
    response.stream.send("hello")
    return response


def all_of_a_stream(stream: Stream) -> None:
    assert_type(stream.send("text"), None)
    assert_type(stream.send(Event("text")), None)
    assert_type(stream.comment("for curl"), None)
    assert_type(stream.send_end({"done": True}, event="done", retry=100), None)
    assert_type(stream.close(), None)
    assert_type(stream.closed, bool)
    assert_type(stream.waiting, int)
    assert_type(stream.keys, tuple[str, ...])
    assert_type(stream.reason, CloseReason | None)
    stream.on_close(lambda stream, reason: print(stream.keys, reason.value))
    stream.on_close(gone)


def gone(stream: Stream, reason: CloseReason) -> int:
    name: str = reason.value
    return len(name)


def text_of(reason: CloseReason) -> str:
    return reason  # a reason is a str


# Signals


@stream_opened.connect_via(app)
def opened(sender: Flask, stream: Stream) -> None: ...


@stream_closed.connect_via(app)
def closed(sender: Flask, stream: Stream, reason: CloseReason) -> None: ...


@event_published.connect_via(app)
def published(sender: Flask, key: str | None, event: Event) -> None: ...


@events_dropped.connect_via(app)
def dropped(sender: Flask, stream: Stream, count: int) -> None: ...


# Events


def events() -> None:
    event = Event({"any": "value"}, event="name", id=7, retry=100, comment="for curl")
    assert_type(event.data, str | None)
    assert_type(event.id, str | None)
    assert_type(event.retry, int | None)
    assert_type(event.encode(), bytes)
    event.data = "frozen"  # type: ignore[misc]
    Event("x", id=1.5)  # type: ignore[arg-type]
    decoder = EventDecoder(max_bytes=1000, comments=True)
    assert_type(decoder.feed(b"data: x\n\n"), list[Event])
    assert_type(decoder.last_event_id, str)
    assert_type(decoder.retry, int | None)


# Settings and errors


def settings() -> None:
    assert_type(Settings(ping_interval=5), Settings)
    assert_type(Settings.from_mapping({"SSE_RETRY": None}, history_size=5), Settings)
    assert_type(Settings().retry, int | None)
    assert_type(Settings().headers, Mapping[str, str])
    Settings(overflow="conflate", when_full="503")
    Settings(overflow={"ticker-*": "conflate", "*": "disconnect"})
    Settings(overflow="block")  # type: ignore[arg-type]
    Settings(ping_intervall=5)  # type: ignore[call-arg]


def errors() -> None:
    try:
        sse.publish("news", "x")
    except StreamClosed as error:
        assert_type(error.reason, str)
    except StreamsFull as error:
        assert_type(error.limit, int)
        assert_type(error.key, str | None)
    except AccessDenied as error:
        assert_type(error.status, int)
    except (BrokerError, EventError, SettingsError) as error:
        assert_type(error, BrokerError | EventError | SettingsError)
    except SSEError:
        raise


# Any WSGI application


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    source: Source = feed
    assert_type(last_event_id(environ), str | None)
    respond(manager, environ, start_response)
    respond(manager, environ, start_response, keys=["a", "b"], headers=[("X-A", "b")])
    respond(manager, environ, start_response, stream=Stream(manager))
    return respond(manager, environ, start_response, source=source)


class OwnBroker:
    """A broker needs no base class."""

    remembers = False

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def start(self, deliver: Deliver, idle: Idle = never_idle) -> None:
        deliver(Message("key", "epoch", 1, b"data: x\n\n", 0.0))

    def publish(self, key: str | None, body: bytes, once: str | None = None) -> str:
        return "epoch-1"

    def lease(self, name: str, holder: str, seconds: float) -> bool:
        return True

    def cover(self, keys: Sequence[str | None], fetch: Sequence[str | None], after: str | None) -> Position:
        return Position(epoch="epoch", head=1)

    def mark(self, name: str, at: float, seconds: float) -> None: ...

    def marked(self, names: Sequence[str]) -> float:
        return 0.0

    def stats(self) -> BrokerStats:
        return BrokerStats(up=True)

    def close(self) -> None: ...


manager = PoolManager(Settings(path="/events"), dumps=str, broker=OwnBroker)
own: Broker = OwnBroker(Settings())
assert_type(manager.publish("news", 5), str)
assert_type(manager.keys(), list[str])
assert_type(manager.shutdown(), None)
served: WSGIApplication = SSEMiddleware(app.wsgi_app, manager)

# Progress

for letter in sse.progress("abc", key="import", total=3, event="row", interval=1):
    assert_type(letter, str)
for number in Publisher("sqlite:///sse.db").progress([1, 2], key="import"):
    assert_type(number, int)

# Jobs


def work(job: Job, rows: int, *, fast: bool = False) -> Iterator[str]:
    assert_type(job.cancelled, bool)
    yield "row"


def jobs() -> Response:
    job = sse.job(ttl=60, stop_when_unread=5)
    assert_type(job.start(work, 3, fast=True), bool)
    assert_type(job.start(["one", {"two": 2}]), bool)
    assert_type(job.send({"n": 1}, event="step"), str)
    assert_type(job.state, JobState | None)
    assert_type((job.done(5), job.failed("no"), job.cancel(), job.open()), tuple[bool, bool, bool, bool])
    with Publisher("sqlite:///sse.db").job("import", ttl=60) as other:
        assert_type(other, Job)
        assert_type(other.run(work, 3), bool)
    try:
        Job(manager, "import").send("x")
    except JobClosed as error:
        assert_type(error.id, str)
        assert_type(error.state, str | None)
    return sse.job("import").response(headers={"X": "y"}, heartbeats=False)


# Tasks and transactions


def tasks_and_transactions(celery: object, session: Session) -> None:
    events = publish_task_events(celery, sse, tasks=["reports.*"], to=lambda task: task.task_id, include=["result"])
    publish_task_events(celery, "sqlite:///sse.db", to=lambda task: sse.job(task.task_id))
    assert_type(events.stats().published, int)
    publish_after_commit(sse, session, "news", {"title": "hi"}, event="headline", on_error=lost)
    publish_all_after_commit(Publisher("sqlite:///sse.db"), session, event="refresh")
    publish_after_commit(app, session, "news", "x")  # type: ignore[arg-type]
    assert_type(after_commit_stats().failed, int)


def lost(error: Exception, key: str | None, event: Event) -> None: ...


# Flask-SSE's interface, and tests


def greet() -> Iterator[str]:
    assert_type(flask_sse, ServerSentEventsBlueprint)
    assert_type(flask_sse.publish({"message": "Hello!"}, type="greeting", channel="users"), str)
    assert_type(flask_sse.manager, PoolManager)
    for message in flask_sse.messages("users", last_event_id="epoch-1"):
        assert_type(message, FlaskSSEMessage)
        yield str(message)


def test() -> None:
    with sse_client(app, timeout=1) as client, sse_clock() as clock:
        stream = client.get("/stream", query_string={"connectKey": "news"})
        assert_type(stream, EventReader)
        assert_type(stream.next(timeout=1), Event)
        assert_type(stream.take(2), list[Event])
        assert_type(stream.reconnect().last_event_id, str)
        assert_type(stream.comment(), str)
        clock.advance(10)
        clock.advance("10")  # type: ignore[arg-type]
    with record_published(app) as published, record_broker(sse) as broker, broker.failing("publish"):
        assert_type(published, Publications)
        assert_type(published.assert_published("news", data={"title": "hi"}), Event)
        assert_type(broker, RecordingBroker)
    assert_type(PoolManager(broker=RecordingBroker), PoolManager)
