"""The Flask edge: registration, the endpoint, streams of one request, signals."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from typing import Any

import pytest
from fakes import shut_down
from flask import Blueprint, Flask, Response, abort, g, has_app_context, has_request_context, request, session
from flask.json.provider import DefaultJSONProvider, JSONProvider
from support import wait_for
from werkzeug.test import TestResponse

from flask_sse_stream import SSE, AccessDenied, CloseReason, Event, EventDecoder, EventError, PoolManager, SettingsError
from flask_sse_stream.extension import (
    EventStreamResponse,
    event_published,
    events_dropped,
    stream_closed,
    stream_opened,
)


@pytest.fixture
def app() -> Iterator[Flask]:
    app = Flask("an_app")
    app.secret_key = "of a test"
    app.config["SSE_PING_INTERVAL"] = 0
    yield app
    manager = app.extensions.get("sse_stream")
    if manager is not None:
        shut_down(manager)


def manager_of(app: Flask) -> PoolManager:
    manager = app.extensions["sse_stream"]
    assert isinstance(manager, PoolManager)
    return manager


class Reader:
    """Reads a streamed response of Flask's test client."""

    def __init__(self, response: TestResponse) -> None:
        self.response = response
        self.decoder = EventDecoder(comments=True)
        self.chunks: Iterator[bytes] = iter(response.response)
        self.events: list[Event] = []

    def until(self, number: int) -> list[Event]:
        """Read until there are so many events that fire; give these."""
        while len([event for event in self.events if event.data is not None]) < number:
            self.events += self.decoder.feed(next(self.chunks))
        return [event for event in self.events if event.data is not None]

    def to_the_end(self) -> list[Event]:
        for chunk in self.chunks:
            self.events += self.decoder.feed(chunk)
        return [event for event in self.events if event.data is not None]


def read(app: Flask, path: str = "/stream", **arguments: Any) -> Reader:
    response = app.test_client().get(path, **arguments)
    assert response.status_code == 200, response.get_data(as_text=True)
    return Reader(response)


# Registration


def test_two_lines_are_enough(app: Flask) -> None:
    sse = SSE(app)
    reader = read(app, "/stream?connectKey=news")
    sse.publish("news", {"title": "hi"}, event="headline")
    [event] = reader.until(1)
    assert (event.event, json.loads(event.data or "")) == ("headline", {"title": "hi"})
    reader.response.close()
    assert sse.count_all() == 0


def test_init_app_serves_several_apps_with_pools_of_their_own() -> None:
    sse = SSE(ping_interval=0)
    apps = [Flask("one"), Flask("two")]
    for app in apps:
        sse.init_app(app)
    readers = [read(app) for app in apps]
    with apps[1].app_context():
        sse.publish("default", "to two")
        assert sse.count("default") == 1
    manager_of(apps[0]).publish("default", "to one")
    assert [reader.until(1)[0].data for reader in readers] == ["to one", "to two"]
    with pytest.raises(RuntimeError, match="serves 2 apps .* app.extensions"):
        sse.publish("default", "to whom?")
    for app, reader in zip(apps, readers, strict=True):
        reader.response.close()
        manager_of(app).shutdown()


def test_a_second_registration_is_refused_with_the_cure(app: Flask) -> None:
    first = SSE(app)
    for again in (lambda: SSE(app), lambda: first.init_app(app)):
        with pytest.raises(SettingsError, match="'an_app' has an SSE extension already: use that one"):
            again()
    assert first.publish("k", "x")


def test_a_misspelt_setting_is_an_error_at_start_and_leaves_the_app_as_it_was(app: Flask) -> None:
    app.config["SSE_PING_INTERVALL"] = 5
    with pytest.raises(SettingsError, match="did you mean SSE_PING_INTERVAL"):
        SSE(app)
    assert "sse_stream" not in app.extensions
    del app.config["SSE_PING_INTERVALL"]
    SSE(app)


def test_a_path_that_is_taken_is_an_error_at_start(app: Flask) -> None:
    app.add_url_rule("/stream", view_func=lambda: "mine")
    with pytest.raises(SettingsError, match="SSE_PATH '/stream' is another view's route already"):
        SSE(app)


def test_options_override_the_config_and_none_means_no_route(app: Flask) -> None:
    sse = SSE(app, path=None, retry=77)
    assert app.test_client().get("/stream").status_code == 404
    assert manager_of(app).settings.retry == 77
    assert sse.count_all() == 0


def test_an_app_without_the_extension_says_so(app: Flask) -> None:
    sse = SSE()
    with app.app_context(), pytest.raises(RuntimeError, match="call init_app"):
        sse.publish("k", "x")
    with pytest.raises(RuntimeError, match="serves 0 apps"):
        sse.publish("k", "x")


def test_registering_starts_no_thread(app: Flask) -> None:
    before = threading.active_count()
    SSE(app)
    assert threading.active_count() == before


def test_the_extension_does_not_keep_its_app_alive() -> None:
    sse = SSE()
    app = Flask("short-lived")
    sse.init_app(app)
    reference = weakref.ref(app)
    del app
    wait_for(lambda: gc.collect() is not None and reference() is None, "the app is collected")


def test_publishing_works_before_the_first_request_and_from_a_thread_without_context(app: Flask) -> None:
    sse = SSE(app)
    ids = [sse.publish("k", "early")]
    thread = threading.Thread(target=lambda: ids.append(sse.publish("k", "thread")))
    thread.start()
    thread.join(5)
    reader = read(app, "/stream?connectKey=k", headers={"Last-Event-ID": ids[0]})
    assert [event.data for event in reader.until(1)] == ["thread"]
    reader.response.close()


# JSON


def test_values_are_expressed_by_the_apps_own_json_provider(app: Flask) -> None:
    sse = SSE(app)
    reader = read(app, "/stream?connectKey=k")
    sse.publish("k", {"day": date(2026, 11, 21)})
    assert json.loads(reader.until(1)[0].data or "") == {"day": "Sat, 21 Nov 2026 00:00:00 GMT"}

    class Mine(DefaultJSONProvider):
        def dumps(self, obj: Any, **kwargs: Any) -> str:
            return f'"mine: {obj}"'

    app.json = Mine(app)
    sse.publish("k", [1])
    assert reader.until(2)[1].data == '"mine: [1]"'
    reader.response.close()


def test_a_provider_that_takes_no_options_is_used_as_it_is(app: Flask) -> None:
    class Plain(JSONProvider):
        def dumps(self, obj: Any) -> str:  # type: ignore[override]
            return "plain"

        def loads(self, s: str | bytes, **kwargs: Any) -> Any:
            raise NotImplementedError

    sse = SSE(app)
    reader = read(app, "/stream?connectKey=k")
    app.json = Plain(app)
    sse.publish("k", [1])
    assert reader.until(1)[0].data == "plain"
    reader.response.close()


@pytest.mark.parametrize("bad", [float("nan"), {"x": float("inf")}, {1, 2}, object(), {(1, 2): 3}])
def test_what_the_provider_cannot_express_is_the_publishers_error(app: Flask, bad: object) -> None:
    sse = SSE(app)
    with pytest.raises(EventError, match="cannot be expressed as JSON"):
        sse.publish("k", bad)


# The endpoint


def test_the_endpoint_listens_to_the_keys_of_the_query(app: Flask) -> None:
    app.config.update(SSE_PATH="/events", SSE_KEY_PARAM="pool", SSE_DEFAULT_KEY="lobby")
    sse = SSE(app)
    readers = [read(app, path) for path in ("/events?pool=a&pool=b", "/events")]
    assert (sse.count("a"), sse.count("b"), sse.count("lobby")) == (1, 1, 1)
    sse.publish_all("x")
    assert [reader.until(1)[0].data for reader in readers] == ["x", "x"]
    assert sse.close("b") == 1
    assert readers[0].to_the_end()[-1] == Event("", event="close", id="end")
    assert sse.close_all(reconnect=True) == 1
    assert readers[1].to_the_end()[-1].data == "x"
    assert sse.stats().closed == {"kicked": 1, "rotated": 1}


@pytest.mark.parametrize("query", ["?connectKey=", "?connectKey=a%0Ab", "?connectKey=%00", "?connectKey=" + "x" * 256])
def test_a_bad_key_is_a_400_and_registers_nothing(app: Flask, query: str) -> None:
    sse = SSE(app)
    response = app.test_client().get("/stream" + query)
    assert (response.status_code, sse.count_all()) == (400, 0)
    assert "key must" in response.get_data(as_text=True)


def test_bytes_in_the_query_that_are_no_utf_8_are_replaced(app: Flask) -> None:
    sse = SSE(app, match_query="sse")
    app.after_request(lambda response: response)  # a hook, so that Flask's own way is gone

    @app.get("/view")
    def view() -> Response:
        return sse.stream(["x"])

    reader = read(app, "/stream", environ_overrides={"QUERY_STRING": "connectKey=\xff"})
    sse.publish("\ufffd", "x")
    assert [event.data for event in reader.until(1)] == ["x"]
    assert app.test_client().get("/view", environ_overrides={"QUERY_STRING": "\xff&sse"}).status_code == 200


def test_only_get_opens_a_stream(app: Flask) -> None:
    sse = SSE(app)
    client = app.test_client()
    head = client.head("/stream")
    assert (head.status_code, head.headers["Content-Type"], head.data) == (200, "text/event-stream", b"")
    options = client.options("/stream")
    assert (options.status_code, options.data) == (204, b"")
    assert set(options.allow) == {"GET", "HEAD", "OPTIONS"}
    for method in ("post", "put", "delete", "patch"):
        assert getattr(client, method)("/stream").status_code == 405
    assert (sse.count_all(), sse.stats().opened) == (0, 0)


def test_the_stream_of_a_finished_client_is_a_204(app: Flask) -> None:
    sse = SSE(app)
    response = app.test_client().get("/stream", headers={"Last-Event-ID": "end"})
    assert (response.status_code, response.data, sse.stats().opened) == (204, b"", 0)


def test_headers_are_those_of_an_event_stream_and_the_users_override_them(app: Flask) -> None:
    SSE(app, headers={"X-Mine": "yes", "cache-control": "no-store"})
    response = app.test_client().get("/stream")
    assert response.headers["Content-Type"] == "text/event-stream"
    assert response.headers.getlist("Cache-Control") == ["no-store"]
    assert (response.headers["X-Mine"], response.headers["X-Accel-Buffering"]) == ("yes", "no")
    assert not {"Content-Length", "Connection", "Transfer-Encoding"} & set(response.headers.keys())
    response.close()


def test_hooks_of_the_app_may_add_headers_cookies_and_the_session(app: Flask) -> None:
    SSE(app)

    @app.before_request
    def before() -> None:
        session["seen"] = 1

    @app.after_request
    def after(response: Response) -> Response:
        response.headers["X-After"] = "yes"
        response.headers["Content-Length"] = "5"
        return response

    response = app.test_client().get("/stream")
    assert response.headers["X-After"] == "yes"
    assert "session=" in response.headers["Set-Cookie"]
    assert "Content-Length" not in response.headers
    response.close()


def test_a_hook_that_fails_before_the_stream_began_leaves_nothing_behind(app: Flask) -> None:
    sse = SSE(app)

    @app.after_request
    def after(response: Response) -> Response:
        raise RuntimeError("mine")

    assert app.test_client().get("/stream").status_code == 500
    assert (sse.count_all(), sse.stats().opened) == (0, 0)


def test_no_context_is_held_while_a_stream_is_open(app: Flask) -> None:
    sse = SSE(app)
    torn_down: list[str] = []
    references: list[weakref.ref[object]] = []

    class Session:
        """A database session, say."""

    @app.before_request
    def before() -> None:
        g.session = Session()
        references.append(weakref.ref(g.session))

    app.teardown_request(lambda error: torn_down.append("request"))
    app.teardown_appcontext(lambda error: torn_down.append("app"))
    reader = read(app)
    sse.publish("default", "x")
    reader.until(1)
    assert torn_down == ["request", "app"]
    assert not has_app_context()
    assert not has_request_context()
    wait_for(lambda: gc.collect() is not None and references[0]() is None, "the session is let go")
    assert sse.count_all() == 1
    reader.response.close()


def test_a_request_has_let_go_of_everything_when_its_stream_begins(app: Flask) -> None:
    """Also of a database's session, which must not be held while a broker or a client is waited for."""
    sse = SSE(app)
    happened: list[str] = []

    @sse.authorize
    def with_a_session(keys: Any) -> Any:
        happened.append("session")
        return keys

    app.teardown_appcontext(lambda error: happened.append("released"))
    manager = manager_of(app)
    opened = manager.open

    def begin(*arguments: Any, **options: Any) -> Any:
        happened.append("begun")
        return opened(*arguments, **options)

    manager.open = begin  # type: ignore[method-assign]
    read(app).response.close()
    assert happened == ["session", "released", "begun"]


def test_a_teardown_that_fails_leaves_no_stream_behind(app: Flask) -> None:
    sse = SSE(app)

    @app.teardown_appcontext
    def fail(error: BaseException | None) -> None:
        raise RuntimeError("mine")

    sse.authorize(lambda keys: keys)
    with pytest.raises(RuntimeError, match="mine"):
        app.test_client().get("/stream")
    assert (sse.count_all(), sse.stats().opened) == (0, 0)


def test_a_stream_of_one_request_that_never_begins_closes_its_source(app: Flask) -> None:
    sse = SSE(app)
    closed: list[int] = []

    def source() -> Iterator[str]:
        try:
            yield "x"
        finally:
            closed.append(1)

    with app.test_request_context():
        running = source()
        assert next(running) == "x"
        response = sse.stream(running)
        body = response(request.environ, lambda *arguments: None)
        body.close()  # type: ignore[attr-defined]
        assert (closed, response.stream.reason) == ([1], CloseReason.PEER)
        assert list(body) == []


def test_what_a_hook_wants_done_at_the_end_is_done_at_the_end(app: Flask) -> None:
    sse = SSE(app)
    closed: list[int] = []

    @app.after_request
    def after(response: Response) -> Response:
        response.call_on_close(lambda: closed.append(sse.count_all()))
        return response

    reader = read(app)
    sse.publish("default", "x")
    reader.until(1)
    assert closed == []
    reader.response.close()
    assert closed == [0]


def test_blueprints_publish_through_the_same_instance(app: Flask) -> None:
    sse = SSE()
    blueprint = Blueprint("news", __name__)

    @blueprint.post("/news")
    def news() -> str:
        return sse.publish("news", request.get_json())

    app.register_blueprint(blueprint, url_prefix="/api")
    sse.init_app(app)
    reader = read(app, "/stream?connectKey=news")
    identifier = app.test_client().post("/api/news", json={"n": 1}).get_data(as_text=True)
    [event] = reader.until(1)
    assert (event.id, event.data) == (identifier, '{"n": 1}')
    reader.response.close()


# Who may listen


def test_public_keys_bound_what_is_open_to_everybody(app: Flask) -> None:
    sse = SSE(app, public_keys=["news", "room-*"])
    client = app.test_client()
    for path, status in (
        ("?connectKey=news&connectKey=room-5", 200),
        ("?connectKey=news&connectKey=secret", 403),
        ("?connectKey=room-*", 200),
        ("", 403),
    ):
        response = client.get("/stream" + path)
        assert response.status_code == status, path
        response.close()
    assert sse.stats().opened == 2


def test_authorize_decides_in_the_request_and_may_narrow(app: Flask) -> None:
    sse = SSE(app, public_keys=[])

    @sse.authorize
    def allowed(keys: Any) -> Any:
        user = request.args.get("user")
        if user is None:
            raise AccessDenied("log in first", status=401)
        if user == "nobody":
            return []
        if user == "lost":
            abort(404)
        return [key for key in keys if key.startswith(user)]

    client = app.test_client()
    for user, status in (("", 401), ("&user=nobody", 403), ("&user=lost", 404)):
        assert client.get(f"/stream?connectKey=ann-1{user}").status_code == status
    assert sse.stats().opened == 0
    reader = read(app, "/stream?connectKey=ann-1&connectKey=bob-1&user=ann")
    assert (sse.count("ann-1"), sse.count("bob-1")) == (1, 0)
    reader.response.close()


@pytest.mark.parametrize("how", ["denied", "aborted", "a bad key", "handled"])
def test_a_listed_origins_page_may_read_why_it_was_refused(app: Flask, how: str) -> None:
    sse = SSE(app, cors_origins=["https://a.example"], cors_credentials=True)

    @sse.authorize
    def refuse(keys: Any) -> Any:
        if how == "aborted":
            abort(404)
        raise AccessDenied("no", status=401)

    if how == "handled":
        app.register_error_handler(401, lambda error: ("worded otherwise", 401))
    path = "/stream?connectKey=" + ("" if how == "a bad key" else "a")
    for origin, allowed in (("https://a.example", True), ("https://b.example", False), ("null", False)):
        response = app.test_client().get(path, headers={"Origin": origin})
        assert response.status_code == {"aborted": 404, "a bad key": 400}.get(how, 401)
        assert response.headers.getlist("Access-Control-Allow-Origin") == ([origin] if allowed else [])
        assert response.headers.getlist("Access-Control-Allow-Credentials") == (["true"] if allowed else [])
        assert response.headers.getlist("Vary") == ["Origin"]


@pytest.mark.parametrize("way", ["Flask's way", "the short way"])
def test_credentials_are_allowed_where_they_were_asked_for_and_to_listed_origins_alone(app: Flask, way: str) -> None:
    if way == "Flask's way":
        app.before_request(lambda: None)
    SSE(app, cors_origins=["https://a.example"], cors_credentials=True, tickets=True)
    client = app.test_client()
    for origin, allowed in (("https://a.example", ["true"]), ("https://a.example.evil", []), ("null", []), ("", [])):
        for response in (
            client.get("/stream", headers={"Origin": origin}),
            client.options("/stream", headers={"Origin": origin, "Access-Control-Request-Method": "GET"}),
        ):
            assert response.headers.getlist("Access-Control-Allow-Credentials") == allowed
            assert response.headers["Vary"] == "Origin"
            response.close()
    preflight = client.options("/stream", headers={"Origin": "https://a.example"})
    assert {"Last-Event-ID", "Authorization"} <= set(preflight.headers["Access-Control-Allow-Headers"].split(", "))


def test_without_being_asked_for_nothing_is_allowed_to_other_origins(app: Flask) -> None:
    SSE(app)
    for method in ("GET", "OPTIONS"):
        response = app.test_client().open("/stream", method=method, headers={"Origin": "https://a.example"})
        assert not [name for name in dict(response.headers) if name.startswith("Access-Control")]
        response.close()


def test_cors_names_listed_origins_alone(app: Flask) -> None:
    SSE(app, cors_origins=["https://a.example"])
    client = app.test_client()
    good = client.get("/stream", headers={"Origin": "https://a.example"})
    assert (good.headers["Access-Control-Allow-Origin"], good.headers["Vary"]) == ("https://a.example", "Origin")
    good.close()
    for origin in ("https://b.example", "null", "https://a.example.evil"):
        bad = client.get("/stream", headers={"Origin": origin})
        assert "Access-Control-Allow-Origin" not in bad.headers
        assert bad.headers["Vary"] == "Origin"
        bad.close()
    preflight = client.options("/stream", headers={"Origin": "https://a.example"})
    assert "Last-Event-ID" in preflight.headers["Access-Control-Allow-Headers"]


# Streams of one request


def test_a_generator_view_is_an_ordinary_view_up_to_its_first_yield(app: Flask) -> None:
    sse = SSE(app)
    contexts: list[bool] = []

    @app.get("/count")
    @sse.event_stream()
    def count() -> Iterator[Any]:
        number = request.args.get("from", type=int)
        if number is None:
            abort(403)
        if number < 0:
            return "no stream", 400
        contexts.append(has_request_context())
        yield Event(str(number), event="tick")
        contexts.append(has_request_context() or has_app_context())
        yield {"last": True}

    client = app.test_client()
    assert client.get("/count").status_code == 403
    refused = client.get("/count?from=-1")
    assert (refused.status_code, refused.data) == (400, b"no stream")
    reader = read(app, "/count?from=3")
    events = reader.to_the_end()
    assert [(event.event, event.data) for event in events] == [
        ("tick", "3"),
        (None, '{"last": true}'),
        ("close", ""),
    ]
    assert events[-1].id == "end"
    assert contexts == [True, False]
    assert sse.count_all() == 0


def test_a_finished_stream_is_answered_204_before_the_view_is_called(app: Flask) -> None:
    sse = SSE(app)
    called: list[int] = []

    @app.get("/count")
    @sse.event_stream()
    def count() -> Iterator[Any]:
        called.append(1)
        yield "x"

    assert app.test_client().get("/count?lastEventId=end").status_code == 204
    assert called == []


def test_a_view_that_is_no_generator_is_left_alone(app: Flask) -> None:
    sse = SSE(app)
    app.add_url_rule("/plain", view_func=sse.event_stream()(lambda: ("hello", 201)), endpoint="plain")
    response = app.test_client().get("/plain")
    assert (response.status_code, response.data) == (201, b"hello")


def test_a_generator_that_yields_nothing_is_a_stream_that_ends_at_once(app: Flask) -> None:
    sse = SSE(app)

    @app.get("/nothing")
    @sse.event_stream(close_event="done")
    def nothing() -> Iterator[Any]:
        yield from ()

    assert [event.event for event in read(app, "/nothing").to_the_end()] == ["done"]


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream;q=0", "text/html, application/xml"])
def test_a_request_that_accepts_no_stream_is_a_406_and_the_generator_is_closed(app: Flask, accept: str) -> None:
    sse = SSE(app)
    closed: list[int] = []

    @app.get("/count")
    @sse.event_stream()
    def count() -> Iterator[Any]:
        try:
            yield "x"
        finally:
            closed.append(1)

    response = app.test_client().get("/count", headers={"Accept": accept})
    assert (response.status_code, closed) == (406, [1])


def test_match_query_makes_a_stream_only_where_the_parameter_is_present(app: Flask) -> None:
    sse = SSE(app, match_query="sse")

    @app.get("/either")
    @sse.event_stream()
    def either() -> Iterator[Any]:
        if "sse" not in request.args:
            return {"ordinary": True}
        yield "stream"

    @app.get("/always")
    @sse.event_stream(match_query=None)
    def always() -> Iterator[Any]:
        yield "stream"

    @app.get("/only")
    def only() -> Response:
        return sse.stream(["stream"])

    client = app.test_client()
    assert client.get("/either").json == {"ordinary": True}
    assert [event.data for event in read(app, "/either?sse").to_the_end()] == ["stream", ""]
    assert [event.data for event in read(app, "/always").to_the_end()] == ["stream", ""]
    assert client.get("/only").status_code == 406
    assert [event.data for event in read(app, "/only?sse=1").to_the_end()] == ["stream", ""]


def test_a_stream_answers_post_too(app: Flask) -> None:
    sse = SSE(app)

    @app.post("/echo")
    def echo() -> Response:
        return sse.stream([request.get_json(), "done"], headers={"X-Mine": "yes"}, close_event=None)

    response = app.test_client().post("/echo", json=[1])
    assert response.headers["X-Mine"] == "yes"
    assert [event.data for event in Reader(response).to_the_end()] == ["[1]", "done"]


async def coroutine(stream: object) -> None:
    """Nobody awaits it."""


@pytest.mark.parametrize("bad", ["text", b"bytes", {"a": 1}, 5, coroutine])
def test_what_cannot_feed_a_stream_is_refused_where_it_is_given(app: Flask, bad: Any) -> None:
    sse = SSE(app)
    with app.test_request_context(), pytest.raises(TypeError, match="a source "):
        sse.stream(bad)


def test_a_source_function_may_return_its_events(app: Flask) -> None:
    sse = SSE(app)
    app.add_url_rule("/list", view_func=lambda: sse.stream(lambda stream: ["a", "b"]), endpoint="list")
    assert [event.data for event in read(app, "/list").to_the_end()] == ["a", "b", ""]


def test_an_empty_stream_is_sent_to_through_its_response(app: Flask) -> None:
    sse = SSE(app)
    streams: list[Any] = []

    @app.get("/push")
    def push() -> EventStreamResponse:
        response = sse.stream()
        streams.append(response.stream)
        response.stream.send({"day": date(2026, 1, 1)})
        return response

    reader = read(app, "/push")
    assert "2026" in (reader.until(1)[0].data or "")
    streams[0].send("later")
    streams[0].send_end("over")
    assert [event.data for event in reader.to_the_end()][1:] == ["later", "over"]
    assert streams[0].reason is CloseReason.ENDED


def test_a_head_request_begins_no_stream_and_closes_the_generator(app: Flask) -> None:
    sse = SSE(app)
    closed: list[int] = []

    @app.get("/count")
    @sse.event_stream()
    def count() -> Iterator[Any]:
        try:
            yield "x"
        finally:
            closed.append(1)

    response = app.test_client().head("/count")
    assert (response.status_code, response.data, closed, sse.stats().opened) == (200, b"", [1], 0)


@pytest.mark.parametrize(("policy", "status"), [("retry", 200), ("503", 503)])
def test_a_full_house_answers_as_it_was_told(app: Flask, policy: str, status: int) -> None:
    sse = SSE(app, max_clients=1, when_full=policy, retry=2000)
    reader = read(app)
    response = app.test_client().get("/stream")
    assert response.status_code == status
    if policy == "503":
        assert int(response.headers["Retry-After"]) >= 1
    else:
        decoder = EventDecoder()
        assert decoder.feed(response.data) == []
        assert 2000 <= (decoder.retry or 0) <= 6000
    assert (sse.count_all(), sse.stats().refused) == (1, 1)
    reader.response.close()


# Signals


def test_signals_tell_of_streams_and_events(app: Flask) -> None:
    sse = SSE(app)
    seen: list[tuple[object, ...]] = []

    def opened(sender: Flask, stream: Any) -> None:
        seen.append((sender, "opened", stream.keys))

    def closed(sender: Flask, stream: Any, reason: CloseReason) -> None:
        seen.append((sender, "closed", reason))

    def published(sender: Flask, key: str | None, event: Event) -> None:
        seen.append((sender, "published", key, event.data))

    with (
        stream_opened.connected_to(opened, app),
        stream_closed.connected_to(closed, app),
        event_published.connected_to(published, app),
    ):
        reader = read(app)
        sse.publish("default", "x")
        sse.publish_all("y")
        reader.until(2)
        reader.response.close()
    assert seen == [
        (app, "opened", ("default",)),
        (app, "published", "default", "x"),
        (app, "published", None, "y"),
        (app, "closed", CloseReason.PEER),
    ]


def test_a_receiver_of_event_published_may_refuse_an_event(app: Flask) -> None:
    sse = SSE(app)

    def refuse(sender: Flask, key: str | None, event: Event) -> None:
        raise ValueError("not this one")

    with event_published.connected_to(refuse, app), pytest.raises(ValueError, match="not this one"):
        sse.publish("k", "x")
    assert sse.stats().published == 0


def test_dropped_events_are_told(app: Flask) -> None:
    sse = SSE(app, overflow="drop_newest", queue_events=1)
    dropped: list[int] = []
    done = threading.Event()

    def tell(sender: Flask, stream: Any, count: int) -> None:
        dropped.append(count)
        done.set()

    with events_dropped.connected_to(tell, app):
        reader = read(app)
        sse.publish("default", "1")
        sse.publish("default", "2")
        assert done.wait(10)
    reader.response.close()
    assert sum(dropped) == sse.stats().dropped >= 1


def test_drain_ends_every_stream_with_a_time_to_come_back(app: Flask) -> None:
    sse = SSE(app)
    reader = read(app)
    assert [stream.keys for stream in sse.streams("default")] == [("default",)]

    def be_the_server() -> None:
        assert reader.to_the_end() == []
        reader.response.close()

    with ThreadPoolExecutor(1) as executor:
        served = executor.submit(be_the_server)
        assert sse.drain(timeout=20) == 1
        assert served.done()
        served.result()
    assert sse.stats().draining
    assert (reader.decoder.retry or 0) >= 3000


def test_a_hook_that_believes_to_have_encoded_the_body_does_not_say_so(app: Flask) -> None:
    sse = SSE(app)

    @app.after_request
    def encode(response: Response) -> Response:
        response.response = (part for part in response.response)  # type: ignore[union-attr]
        response.headers["Content-Encoding"] = "br"
        return response

    @app.get("/one")
    def one() -> EventStreamResponse:
        return sse.stream(["x"])

    with app.test_client().get("/one") as response:
        assert "Content-Encoding" not in response.headers
        assert b"data: x\n" in b"".join(response.response)  # type: ignore[arg-type]
