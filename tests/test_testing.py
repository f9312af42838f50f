"""The test kit: it reads with a deadline, records, fails on demand, and puts the clock forward."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import shut_down
from flask import Flask, Response, abort, request, session
from support import ROOT

import flask_sse_stream.testing as kit
from flask_sse_stream import SSE, BrokerError, Event, PoolManager, Settings
from flask_sse_stream.testing import (
    ANYTHING,
    EventReader,
    NoEvent,
    Publications,
    RecordingBroker,
    SSEClient,
    record_broker,
    record_published,
    sse_client,
    sse_clock,
    wait_for,
)
from flask_sse_stream.wsgi import SSEMiddleware

LONG = 30.0


@pytest.fixture
def app() -> Iterator[Flask]:
    app = Flask("tested")
    app.secret_key = "of a test"
    SSE(app)
    yield app
    shut_down(app.extensions["sse_stream"])


@pytest.fixture
def manager(app: Flask) -> PoolManager:
    manager: PoolManager = app.extensions["sse_stream"]
    return manager


@pytest.fixture
def client(app: Flask) -> Iterator[SSEClient]:
    with sse_client(app, timeout=LONG) as client:
        yield client


# Reading


def test_events_are_read_as_they_are_published(client: SSEClient, manager: PoolManager) -> None:
    stream = client.get("/stream?connectKey=news")
    assert manager.count("news") == 1
    identifier = manager.publish("news", {"title": "hi"}, event="headline", retry=50)
    assert stream.next() == Event('{"title": "hi"}', event="headline", id=identifier, retry=50)
    assert (stream.last_event_id, stream.retry) == (identifier, 50)
    for number in range(3):
        manager.publish("news", str(number))
    assert [event.data for event in stream.take(3)] == ["0", "1", "2"]
    assert (stream.response.status_code, stream.response.mimetype) == (200, "text/event-stream")


def test_without_an_event_it_says_so_in_time_and_goes_on(client: SSEClient, manager: PoolManager) -> None:
    stream = client.get("/stream?connectKey=news")
    before = time.monotonic()
    with pytest.raises(NoEvent, match=r"no event within 0.05 s, and 1 comments came; the last id was '"):
        stream.next(timeout=0.05)
    assert time.monotonic() - before < LONG
    stream.assert_silent(0.05)
    manager.publish("news", "now")
    assert stream.next().data == "now"
    manager.publish("news", "too much")
    with pytest.raises(AssertionError, match="too much"):
        stream.assert_silent(LONG)


def test_a_stream_that_ends_says_so(client: SSEClient, manager: PoolManager) -> None:
    stream = client.get("/stream?connectKey=news")
    manager.close("news")
    assert [(event.event, event.data) for event in stream.to_the_end()] == [("close", "")]
    assert stream.ended
    with pytest.raises(NoEvent, match="has ended"):
        stream.next()
    with pytest.raises(NoEvent, match="has ended"):
        stream.comment()
    again = client.get("/stream?connectKey=news")
    manager.publish("news", "one")
    events = iter(again)
    assert next(events).data == "one"
    manager.close("news")
    assert [event.data for event in events] == [""]


def test_a_stream_that_does_not_end_is_not_waited_for_for_ever(client: SSEClient, manager: PoolManager) -> None:
    stream = client.get("/stream?connectKey=news")
    with pytest.raises(NoEvent, match="has not ended within"):
        stream.to_the_end(timeout=0.05)
    stream._timeout = 0.05
    with pytest.raises(NoEvent, match="no event within"):
        list(stream)


def test_a_client_that_comes_back_is_given_what_it_missed(client: SSEClient, manager: PoolManager) -> None:
    stream = client.get("/stream", query_string={"connectKey": "news"}, headers={"X-Mine": "1"})
    manager.publish("news", "größe", id="größe")
    assert stream.next().data == "größe"
    manager.publish("news", "missed")
    again = stream.reconnect()
    assert again.next().data == "missed"
    assert manager.count("news") == 1
    from_the_first = client.get("/stream?connectKey=news", last_event_id="größe")
    assert from_the_first.next().data == "missed"


def test_a_paused_client_lets_events_wait_and_is_cut_off_when_it_is_stuck(
    client: SSEClient, manager: PoolManager
) -> None:
    stream = client.get("/stream?connectKey=news")
    [inside] = manager.streams("news")
    assert stream.comment() == "open"

    def publish_on_its_way() -> None:
        before = manager.stats().offered
        manager.publish("news", "on its way")
        wait_for(lambda: manager.stats().offered > before and not inside.waiting, "it is on its way", LONG)

    stream.pause()
    publish_on_its_way()
    for number in range(5):
        manager.publish("news", str(number))
    wait_for(lambda: inside.waiting == 5, "they wait", LONG)
    with pytest.raises(NoEvent):
        stream.next(timeout=0.02)
    stream.resume()
    assert [event.data for event in stream.take(6)] == ["on its way", "0", "1", "2", "3", "4"]
    with sse_clock() as clock:
        clock.advance(manager.settings.send_timeout + 1)
        manager.publish("news", "not stuck")
        assert stream.next().data == "not stuck"
        stream.pause()
        publish_on_its_way()
        clock.advance(manager.settings.send_timeout + 1)
        wait_for(lambda: inside.closed, "it is given up", LONG)
        assert inside.reason == "stalled"


def test_what_is_to_be_done_at_the_end_of_a_response_is_done_once(client: SSEClient, app: Flask) -> None:
    done: list[bool] = []

    @app.after_request
    def when_it_ends(response: Response) -> Response:
        response.call_on_close(lambda: done.append(True))
        return response

    stream = client.get("/stream?connectKey=news")
    stream.close()
    wait_for(lambda: stream._is_over, "the code beside the test has ended", LONG)
    client.close()
    assert done == [True]


def test_leaving_ends_the_stream_at_once(client: SSEClient, manager: PoolManager) -> None:
    with client.get("/stream?connectKey=news"):
        assert manager.count("news") == 1
    assert manager.count("news") == 0
    client.get("/stream?connectKey=news")
    client.close()
    client.close()
    assert manager.count("news") == 0


def test_what_is_no_stream_is_an_error_that_says_what_it_is(client: SSEClient, app: Flask) -> None:
    @app.get("/secret")
    def secret() -> str:
        return abort(403, "not for you") if "user" not in session else "text"

    @app.post("/login")
    def login() -> str:
        session["user"] = "ann"
        return ""

    with pytest.raises(AssertionError, match=r"(?s)/secret answered no stream, but 403 FORBIDDEN, .*not for you"):
        client.get("/secret")
    assert client.http.get("/secret").status_code == 403
    client.http.post("/login")
    with pytest.raises(AssertionError, match="but 200 OK, text/html: text"):
        client.get("/secret")


def test_streams_of_one_request_are_read_and_closed(client: SSEClient, app: Flask) -> None:
    sse = app.extensions["sse_stream_owner"]
    closed: list[bool] = []

    @app.post("/echo")
    @sse.event_stream()
    def echo() -> Iterator[Any]:
        try:
            yield request.get_json()["say"]
            while True:
                time.sleep(0.01)
                yield "more"
        finally:
            closed.append(True)

    stream = client.open("/echo", method="POST", json={"say": "x"})
    assert stream.next().data == "x"
    stream.close()
    wait_for(lambda: closed, "its generator is closed", LONG)


def test_a_generator_that_hangs_does_not_hang_the_test(client: SSEClient, app: Flask) -> None:
    go_on: list[bool] = []
    closed: list[bool] = []

    @app.get("/by-hand")
    def by_hand() -> Response:
        def generate() -> Iterator[str]:
            try:
                yield "data: first\n\n"
                wait_for(lambda: go_on, "it may go on", LONG)
                yield "data: second\n\n"
            finally:
                closed.append(True)

        response = Response(generate(), mimetype="text/event-stream")
        response.call_on_close(lambda: closed.append(False))
        return response

    stream = client.get("/by-hand")
    assert stream.next().data == "first"
    with pytest.raises(NoEvent):
        stream.next(timeout=0.05)
    stream.close()
    go_on.append(True)
    wait_for(lambda: sorted(closed) == [False, True], "it is closed, once", LONG)


def test_what_a_body_raises_the_test_sees(client: SSEClient, app: Flask) -> None:
    @app.get("/by-hand")
    def by_hand() -> Response:
        def generate() -> Iterator[str]:
            yield "data: first\n\n"
            raise RuntimeError("broken")

        return Response(generate(), mimetype="text/event-stream")

    stream = client.get("/by-hand")
    assert stream.next().data == "first"
    with pytest.raises(RuntimeError, match="broken"):
        stream.next()


def test_any_wsgi_application_can_be_read() -> None:
    manager = PoolManager(Settings())
    try:
        with sse_client(SSEMiddleware(Flask("other"), manager)) as client:
            stream: EventReader = client.get("/stream?connectKey=k")
            manager.publish("k", "x")
            assert stream.next(timeout=LONG).data == "x"
    finally:
        manager.shutdown()


# Recording


def test_what_was_published_is_recorded_and_asked_about(app: Flask, manager: PoolManager) -> None:
    other = Flask("other")
    SSE(other)
    with record_published(app) as published:
        published.assert_nothing_published()
        manager.publish("news", {"b": 1, "a": 2}, event="headline", id=7)
        manager.publish("news", "text")
        manager.publish_all("to all")
        other.extensions["sse_stream"].publish("news", "of another app")
    manager.publish("news", "after the block")
    assert len(published) == 3
    assert published.assert_published("news", data={"a": 2, "b": 1}, event="headline", id=7).id == "7"
    assert published.assert_published("news", times=2).data == "text"
    published.assert_published("news", event=None, data="text")
    published.assert_published(None, data="to all")
    published.assert_published(ANYTHING, times=3)
    published.assert_published("room", times=0)
    published.assert_nothing_published("room")
    for wrong in (
        {"key": "room"},
        {"data": "Text"},
        {"key": "news", "data": {"a": 2}},
        {"key": "news", "data": ["text"]},
        {"key": "news", "times": 1},
        {"event": "other"},
        {"id": "8"},
        {"times": 0},
    ):
        with pytest.raises(AssertionError, match=r"(?s)should have been published.*\n  'news': Event\(data='text'"):
            published.assert_published(**wrong)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="published were: nothing"):
        Publications().assert_published("news", data="x")


def test_every_apps_publications_are_recorded_where_none_is_named(app: Flask, manager: PoolManager) -> None:
    other = Flask("other")
    SSE(other)
    with record_published() as published:
        manager.publish("a", "x")
        other.extensions["sse_stream"].publish("b", "y")
    assert [(item.key, item.event.data) for item in published] == [("a", "x"), ("b", "y")]


def test_a_broker_records_what_its_log_took_and_fails_when_it_is_told_to(
    app: Flask, client: SSEClient, manager: PoolManager
) -> None:
    inner = manager._broker
    with record_broker(app) as broker:
        stream = client.get("/stream?connectKey=news")
        manager.publish("news", {"n": 1}, event="e")
        with broker.failing("publish"), pytest.raises(BrokerError, match="told to fail"):
            manager.publish("news", "lost")
        error = BrokerError("away")
        with broker.failing(error=error):
            with pytest.raises(BrokerError, match="away"):
                manager.lease("clock", 1)
            assert b"event" not in client.http.get("/stream?connectKey=other").data
            with pytest.raises(BrokerError, match="away"):
                manager.revoke(user="ann")
        manager.publish("news", "after it")
        assert manager.lease("clock", 1)
        assert [event.data for event in stream.take(2)] == ['{"n": 1}', "after it"]
        broker.published.assert_published("news", data={"n": 1}, event="e", times=1)
        broker.published.assert_published("news", data="lost", times=0)
        assert broker.calls.count("publish") >= 3
        assert manager.stats().broker == inner.stats()
        with pytest.raises(ValueError, match="read: a broker can fail in publish"), broker.failing("read"):
            pass
    assert manager._broker is inner
    with pytest.raises(TypeError, match="no pool manager"), record_broker(Flask("without")):
        pass


def test_a_recording_broker_is_made_as_brokers_are() -> None:
    manager = PoolManager(Settings(), broker=RecordingBroker)
    manager.publish_all("x")
    broker = manager._broker
    assert isinstance(broker, RecordingBroker)
    broker.published.assert_published(None, data="x")
    manager.shutdown()


# The clock


def test_the_clock_brings_heartbeats_ages_and_the_end_of_history(client: SSEClient, app: Flask) -> None:
    aged = Flask("aged")
    SSE(aged, max_age=3600, ping_interval=100, history_ttl=1000, retry=None)
    manager = aged.extensions["sse_stream"]
    try:
        with sse_clock() as clock, sse_client(aged, timeout=LONG) as client:
            stream = client.get("/stream?connectKey=news")
            assert stream.comment() == "open"
            clock.advance(100)
            assert stream.comment() == "ping"
            first = manager.publish("news", "first")
            assert stream.next().data == "first"
            clock.advance(999)
            beginning = f"{first.partition('-')[0]}-0"
            assert client.get("/stream?connectKey=news", last_event_id=beginning).next().data == "first"
            clock.advance(2)
            manager.publish("news", "second")
            late = client.get("/stream?connectKey=news", last_event_id=beginning)
            assert late.next().event == "stream-reset"
            clock.advance(3600)
            assert [event.data for event in stream.to_the_end()] == ["second"]
            assert manager.stats().closed["rotated"] >= 1
            with pytest.raises(ValueError, match="forward"):
                clock.advance(-1)
    finally:
        shut_down(manager)


def test_the_clock_lets_tickets_expire_and_time_is_itself_again_afterwards() -> None:
    app = Flask("ticketed")
    app.secret_key = "of a test"
    sse = SSE(app, tickets=True)
    try:
        with sse_client(app, timeout=LONG) as client:
            with sse_clock() as clock:
                with app.test_request_context():
                    url = sse.url_for_stream("news", ttl=60)
                stream = client.get(url)
                clock.advance(61)
                assert [event.event for event in stream.to_the_end()] == ["stream-expired"]
                assert client.http.get(url).status_code == 401
            client.get(url)  # it was only the test's clock that had gone by
    finally:
        shut_down(app.extensions["sse_stream"])
    assert PoolManager.__init__.__globals__["time"] is time


# The plugin and what is installed

TESTS = """
import pytest
from flask import Flask
from flask_sse_stream import SSE, BrokerError

@pytest.fixture
def app():
    app = Flask(__name__)
    SSE(app)
    return app

def test_all(app, sse_client, sse_published, sse_broker, sse_clock):
    publish = app.extensions["sse_stream"].publish
    stream = sse_client.get("/stream?connectKey=news")
    publish("news", {"title": "hi"})
    assert stream.next(timeout=30).data == '{"title": "hi"}'
    sse_published.assert_published("news", data={"title": "hi"}, times=1)
    sse_broker.published.assert_published("news", times=1)
    sse_clock.advance(11)
    assert stream.comment(timeout=30) == "ping"
    with sse_broker.failing("publish"), pytest.raises(BrokerError):
        publish("news", "x")

def test_wrong(sse_published):
    sse_published.assert_published("news")
"""


def run(*arguments: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    env.pop("PYTEST_ADDOPTS", None)
    return subprocess.run(
        [sys.executable, *arguments], cwd=directory, env=env, capture_output=True, text=True, timeout=100
    )


def test_the_plugin_has_the_kit_as_fixtures(tmp_path: Path) -> None:
    (tmp_path / "test_app.py").write_text(TESTS)
    plugin = ("-p", "flask_sse_stream.testing.plugin")
    done = run("-m", "pytest", "-q", *plugin, directory=tmp_path, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "'news' should have been published at least once, and was 0 times" in done.stdout


def test_pytest_finds_the_plugin_and_it_imports_nothing_that_is_not_asked_for(tmp_path: Path) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    # Named as its module is, so that pytest does not load it again for who names it with -p.
    assert (
        '[project.entry-points.pytest11]\n"flask_sse_stream.testing.plugin" = "flask_sse_stream.testing.plugin"' in text
    )
    script = """
        import sys
        import flask_sse_stream.testing.plugin
        assert not {"flask", "werkzeug", "gevent", "redis", "hypothesis"} & set(sys.modules)
    """
    done = run("-c", textwrap.dedent(script), directory=tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_name_of_the_kit_can_be_had() -> None:
    assert {name for name in kit.__all__ if getattr(kit, name) is not None} == set(kit.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = kit.nonsense
