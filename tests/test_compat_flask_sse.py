"""The interface of Flask-SSE: beside Flask-SSE itself where both do the same, and what is promised besides."""

from __future__ import annotations

import enum
import threading
import uuid
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import flask_sse
import pytest
from fakes import shut_down
from flask import Flask, abort, request, url_for
from support import wait_for

from flask_sse_stream import SSE, AccessDenied, Event, EventDecoder, EventError, PoolManager, SettingsError
from flask_sse_stream.compat.flask_sse import Message, ServerSentEventsBlueprint, sse
from flask_sse_stream.testing import EventReader, sse_client


class Kind(str, enum.Enum):
    GREETING = "greeting"


def new_app(name: str = "an_app", **config: Any) -> Flask:
    app = Flask(name)
    app.config.update({"SSE_BROKER_URL": "memory://", "SSE_PING_INTERVAL": 0, **config})
    app.register_blueprint(sse, url_prefix="/stream")
    return app


@pytest.fixture
def app(made: list[PoolManager]) -> Flask:
    return new_app()


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[PoolManager]]:
    managers: list[PoolManager] = []
    begin = PoolManager.__init__

    def recording(manager: PoolManager, *arguments: Any, **options: Any) -> None:
        begin(manager, *arguments, **options)
        managers.append(manager)

    monkeypatch.setattr(PoolManager, "__init__", recording)
    yield managers
    for manager in managers:
        shut_down(manager)


def listen(app: Flask, query: str = "", last_event_id: str | None = None) -> EventReader:
    return sse_client(app, timeout=30).get(f"/stream?{query}", last_event_id=last_event_id)


MESSAGES: list[dict[str, Any]] = [
    {"data": "text"},
    {"data": "two\nlines"},
    {"data": {"b": [1, None, "ü"], "a": 2.5}},
    {"data": [1, 2]},
    {"data": 7},
    {"data": None},
    {"data": True},
    {"data": datetime(2026, 1, 2, tzinfo=timezone.utc)},
    {"data": "x", "type": "greeting"},
    {"data": "x", "type": Kind.GREETING},
    {"data": "x", "type": ""},
    {"data": "x", "id": 7, "retry": 500},
    {"data": "x", "id": uuid.UUID(int=7)},
    {"data": "x", "id": 0, "retry": 0},
    {"data": "x", "retry": "500"},
]


def on_the_wire(text: str) -> Event:
    [event] = EventDecoder().feed(text.encode())
    return event


@pytest.mark.parametrize("fields", MESSAGES, ids=str)
def test_what_flask_sse_sends_is_sent(app: Flask, fields: dict[str, Any]) -> None:
    with app.app_context():
        # There, a message goes through Redis as JSON before it is written.
        theirs = flask_sse.Message(**flask_sse.json.loads(flask_sse.json.dumps(flask_sse.Message(**fields).to_dict())))
        wanted = on_the_wire(str(theirs))
        reader = listen(app)
        identifier = sse.publish(**fields)
    [event] = reader.take(1)
    assert (event.data, event.event, event.retry) == (wanted.data, wanted.event, wanted.retry)
    assert event.id == identifier
    assert wanted.id in (None, identifier)
    reader.close()


@pytest.mark.parametrize("fields", MESSAGES, ids=str)
def test_a_message_is_flask_sses(app: Flask, fields: dict[str, Any]) -> None:
    ours, theirs = Message(**fields), flask_sse.Message(**fields)
    assert (ours.to_dict(), repr(ours)) == (theirs.to_dict(), repr(theirs))
    assert ours == Message(**fields)
    assert ours != Message("something else")
    assert ours != theirs
    if not isinstance(fields["data"], datetime):
        with app.app_context():
            assert on_the_wire(str(ours)).data == on_the_wire(str(theirs)).data
    with pytest.raises(TypeError):
        hash(ours)


@pytest.mark.parametrize(
    "fields", [{"data": b"bytes"}, {"data": float("nan")}, {"data": "x", "type": "a\nb"}, {"data": "x", "id": "end"}]
)
def test_what_cannot_be_sent_is_the_publishers_error(app: Flask, fields: dict[str, Any]) -> None:
    with app.app_context(), pytest.raises(EventError):
        sse.publish(**fields)


def test_arguments_may_be_given_by_their_places_and_are_for_their_channel_alone(app: Flask) -> None:
    reader, other = listen(app, "channel=users.social"), listen(app)
    with app.app_context():
        sse.publish("x", "greeting", 7, 500, "users.social")
        sse.publish("for the others")
    [event] = reader.take(1)
    assert (event.data, event.event, event.id, event.retry) == ("x", "greeting", "7", 500)
    assert [event.data for event in other.take(1)] == ["for the others"]
    for each in (reader, other):
        each.close()


def test_a_client_that_comes_back_is_given_what_it_missed(app: Flask) -> None:
    reader = listen(app, "channel=")
    with app.app_context():
        seen = sse.publish("seen")
        reader.close()
        sse.publish("missed")
    again = listen(app, last_event_id=seen)
    assert [event.data for event in again.take(1)] == ["missed"]
    again.close()


def test_the_blueprint_has_its_name_and_its_endpoint(app: Flask) -> None:
    with app.test_request_context():
        assert url_for("sse.stream", channel="users.social") == "/stream?channel=users.social"
    head = app.test_client().head("/stream")
    assert (head.status_code, head.mimetype) == (200, "text/event-stream")
    assert app.test_client().post("/stream").status_code == 405
    assert app.test_client().get("/stream", headers={"Last-Event-ID": "end"}).status_code == 204
    assert app.test_client().get(f"/stream?channel={'x' * 300}").status_code == 400


def test_a_second_channel_is_no_way_around_a_hook_that_asks_about_the_first() -> None:
    guarded = ServerSentEventsBlueprint("sse", __name__)
    guarded.add_url_rule("", endpoint="stream", view_func=guarded.stream)

    @guarded.before_request
    def check() -> None:
        if request.args.get("channel") == "secret":
            abort(403)

    app = Flask("guarded")
    app.config.update(SSE_BROKER_URL="memory://")
    app.register_blueprint(guarded, url_prefix="/stream")
    assert app.test_client().get("/stream?channel=secret").status_code == 403
    reader = listen(app, "channel=open&channel=secret")
    with app.app_context():
        guarded.publish("not for it", channel="secret")
        guarded.publish("for it", channel="open")
    assert [event.data for event in reader.take(1)] == ["for it"]
    reader.close()


def test_settings_of_ours_count(app: Flask, made: list[PoolManager]) -> None:
    app.config.update(SSE_PUBLIC_KEYS=["open-*"], SSE_RETRY=77)
    client = app.test_client()
    assert client.get("/stream?channel=closed").status_code == 403
    with listen(app, "channel=open-1") as stream:
        assert (stream.comment(), stream.retry) == ("open", 77)
    with new_app(SSE_MISSPELT=1).app_context(), pytest.raises(SettingsError, match="SSE_MISSPELT"):
        sse.publish("x")


def test_an_extension_of_the_apps_own_lends_its_pools_and_its_say(app: Flask) -> None:
    ours = SSE(app, path="/ours")

    @ours.authorize
    def nobody_hears_secrets(keys: Any) -> list[str]:
        if "secret" in keys:
            raise AccessDenied("no")
        return list(keys)

    assert app.test_client().get("/stream?channel=secret").status_code == 403
    reader = listen(app, "channel=news")
    ours.publish("news", "one")
    with app.app_context():
        sse.publish("two", channel="news")
        assert sse.manager is app.extensions["sse_stream"]
    assert [event.data for event in reader.take(2)] == ["one", "two"]
    reader.close()


def test_each_app_has_pools_of_its_own_and_two_first_requests_make_one() -> None:
    apps = [new_app("one"), new_app("two")]
    readers = [listen(app) for app in apps]
    with apps[0].app_context():
        sse.publish("for one")
    with apps[1].app_context():
        sse.publish("for two")
    assert [reader.take(1)[0].data for reader in readers] == ["for one", "for two"]
    for reader in readers:
        reader.close()
    app = new_app("three")
    found: list[PoolManager] = []

    def ask() -> None:
        with app.app_context():
            found.append(sse.manager)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 8
    assert len(set(found)) == 1


def test_the_redis_is_that_of_the_config_however_late_it_is_set() -> None:
    app = Flask("late")
    app.register_blueprint(sse, url_prefix="/stream")
    with app.app_context(), pytest.raises(KeyError, match="REDIS_URL"):
        _ = sse.redis
    app.config["REDIS_URL"] = "redis://localhost:6379/1"
    app.config["SSE_REDIS_URL"] = "redis://localhost:6379/2"
    with app.app_context():
        assert sse.manager.settings.broker_url == "redis://localhost:6379/2"
        assert sse.redis.connection_pool.connection_kwargs["db"] == 2
    app = new_app(REDIS_URL="redis://localhost:6379/1")
    with app.app_context():
        assert sse.manager.settings.broker_url == "memory://", "which was set for this package alone"


def test_without_a_redis_events_stay_in_the_process_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    app = Flask("without")
    app.register_blueprint(sse, url_prefix="/stream")
    reader = listen(app)
    with app.app_context():
        sse.publish("x")
    assert reader.take(1)[0].data == "x"
    reader.close()
    assert caplog.text.count("set REDIS_URL") == 1


def test_outside_of_a_context_there_is_no_app() -> None:
    with pytest.raises(RuntimeError, match="application context"):
        sse.publish("x")


def test_messages_come_as_they_are_published_and_the_stream_ends_with_the_generator(app: Flask) -> None:
    with app.app_context():
        manager = sse.manager
        messages = sse.messages("news")
        published = [{"a": [1]}, [1], "text", "{no json", 7]
        ids = [sse.publish(data, type="greeting", channel="news") for data in published]
        got = [next(messages) for _ in published]
        assert [message.data for message in got] == [{"a": [1]}, [1], "text", "{no json", "7"]
        assert [(message.type, message.id) for message in got] == [("greeting", each) for each in ids]
        assert on_the_wire(str(got[0])) == Event('{"a": [1]}', event="greeting", id=ids[0])
        assert got[0] == Message({"a": [1]}, "greeting", ids[0])
        assert repr(got[2]) == repr(Message("text", "greeting", ids[2]))
        assert manager.count("news") == 1
        messages.close()  # type: ignore[attr-defined]
        wait_for(lambda: manager.count("news") == 0, "it has left")
        later = sse.messages("news", last_event_id=ids[2])
        assert [next(later).data for _ in range(2)] == ["{no json", "7"]
        later.close()  # type: ignore[attr-defined]
