"""The inspector's gate, what it does when it is asked to, and what its pages are sent."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import House, shut_down
from flask import Flask, abort, redirect
from redis_server import RedisServer
from support import wait_for
from werkzeug.test import TestResponse

from flask_sse_stream import SSE, BrokerError, SettingsError, inspecting
from flask_sse_stream.access import Ticket
from flask_sse_stream.event import Event
from flask_sse_stream.inspecting import Sampler
from flask_sse_stream.inspector import _is_loopback_name
from flask_sse_stream.keys import REPORT_KEY, JobKey
from flask_sse_stream.reports import Inquiry, KeyReport, Report
from flask_sse_stream.testing import SSEClient, sse_client

PATH = "/sse-inspector"
GETS = ("", "/inspector.js", "/inspector.css", "/inspector.svg", "/events")
POSTS = ("/publish", "/end")
MARKED = {"X-SSE-Inspector": "1"}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PURGE")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("_TICK_SECONDS", 0.05), ("_ANSWER_SECONDS", 0.01), ("_LINGER_SECONDS", 0.05)):
        monkeypatch.setattr(inspecting, name, seconds)


@contextlib.contextmanager
def making(*, debug: bool = True, **options: Any) -> Iterator[tuple[Flask, SSE]]:
    app = Flask("an_app")
    app.debug = debug
    sse = SSE(app, **{"inspector": PATH, **options})
    yield app, sse
    shut_down(app.extensions["sse_stream"])


@pytest.fixture
def made() -> Iterator[tuple[Flask, SSE]]:
    with making() as made:
        yield made


def ask(app: Flask, path: str, method: str = "GET", **options: Any) -> TestResponse:
    """Send a request as somebody at this machine does, save for what the options say."""
    base = {"REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": "localhost:5000", **options.pop("environ_overrides", {})}
    if options.get("json") is not None:
        options["headers"] = {**MARKED, **options.get("headers", {})}
    return app.test_client().open(PATH + path, method=method, environ_overrides=base, **options)


def is_let_in(response: TestResponse) -> bool:
    response.close()
    if response.status_code == 404:
        assert b"Not Found" in response.data
        assert "Content-Security-Policy" not in response.headers
    return response.status_code != 404


# The gate

STRANGERS: list[tuple[str, dict[str, Any]]] = [
    ("an address of a network", {"environ_overrides": {"REMOTE_ADDR": "192.168.1.7"}}),
    ("an address of the internet", {"environ_overrides": {"REMOTE_ADDR": "2001:db8::1"}}),
    ("a socket of a file", {"environ_overrides": {"REMOTE_ADDR": ""}}),
    ("no address", {"environ_overrides": {"REMOTE_ADDR": "localhost"}}),
    ("a name that leads here", {"environ_overrides": {"HTTP_HOST": "rebound.example.org"}}),
    ("a name that begins as this machine's", {"environ_overrides": {"HTTP_HOST": "localhost.example.org:5000"}}),
    ("a name that looks like an address", {"environ_overrides": {"HTTP_HOST": "127.0.0.1.example.org"}}),
    ("no host", {"environ_overrides": {"HTTP_HOST": ""}}),
    ("a proxy that knows no HTTP/1.1", {"environ_overrides": {"SERVER_PROTOCOL": "HTTP/1.0"}}),
    ("a page of another site", {"headers": {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}}),
    ("a page of another port", {"headers": {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"}}),
    ("another origin", {"headers": {"Origin": "http://localhost:8000"}}),
    ("an origin that nobody knows", {"headers": {"Origin": "null"}}),
    ("an origin that is none", {"headers": {"Origin": "http://[localhost:5000"}}),
    ("an origin of another scheme", {"headers": {"Origin": "ftp://localhost:5000"}}),
    (
        "a frame in a page of another site",
        {"headers": {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}},
    ),
    *(
        (name, {"headers": {name: value}})
        for name, value in (
            ("Forwarded", "for=1.2.3.4"),
            ("X-Forwarded-For", "127.0.0.1"),
            ("X-Forwarded-Host", "localhost"),
            ("X-Real-IP", "127.0.0.1"),
            ("Via", "1.1 proxy"),
            ("CF-Connecting-IP", "1.2.3.4"),
        )
    ),
]


@pytest.mark.parametrize("route", [*GETS, *POSTS])
def test_in_debug_mode_this_machine_is_let_in_and_nobody_else(route: str, made: tuple[Flask, SSE]) -> None:
    app, _ = made
    method = "POST" if route in POSTS else "GET"
    assert is_let_in(ask(app, route, method))
    for host in ("127.0.0.1:5000", "[::1]:5000", "LOCALHOST", "app.localhost:80", "127.8.9.1"):
        assert is_let_in(ask(app, route, method, environ_overrides={"HTTP_HOST": host})), host
    for address in ("127.0.0.5", "::1", "::ffff:127.0.0.1"):
        assert is_let_in(ask(app, route, method, environ_overrides={"REMOTE_ADDR": address})), address
    for who, request in STRANGERS:
        assert not is_let_in(ask(app, route, method, **request)), who
    app.debug = False
    assert not is_let_in(ask(app, route, method))


def test_a_host_that_is_none_is_not_this_machine() -> None:
    # Whether a server or Werkzeug refuses it before is theirs.
    assert not any(map(_is_loopback_name, ("[::1", "localhost]", "::1", "", ":80", "loc alhost", "http://localhost")))
    assert all(map(_is_loopback_name, ("[::1]:80", "localhost", "127.0.0.1:1", "a.localhost")))


@pytest.mark.parametrize("route", [*GETS, *POSTS])
def test_a_hook_decides_everywhere(route: str) -> None:
    with making(debug=False) as (app, sse):
        answers: list[Any] = [False]

        @sse.authorize_inspector
        def admit() -> Any:
            answer = answers[0]
            return answer() if callable(answer) else answer

        method = "POST" if route in POSTS else "GET"
        far_away = {"environ_overrides": {"REMOTE_ADDR": "192.0.2.1", "HTTP_HOST": "example.org"}}
        for refusal in (False, None, 0, ""):
            answers[0] = refusal
            app.debug = not app.debug
            assert not is_let_in(ask(app, route, method)), refusal
            assert not is_let_in(ask(app, route, method, **far_away)), refusal
        answers[0] = True
        assert is_let_in(ask(app, route, method, **far_away))
        assert is_let_in(ask(app, route, method, headers={"X-Forwarded-For": "192.0.2.1"}))
        # What a browser says of another site's page counts all the same.
        assert not is_let_in(ask(app, route, method, headers={"Sec-Fetch-Site": "cross-site"}))
        assert not is_let_in(ask(app, route, method, headers={"Origin": "https://evil.example"}))
        answers[0] = lambda: abort(403)
        assert ask(app, route, method).status_code == 403
        app.testing = True
        answers[0] = lambda: redirect("/login")
        with pytest.raises(TypeError, match="gives True or False, or aborts"):
            ask(app, route, method)


def test_a_hook_may_be_a_coroutine_function() -> None:
    pytest.importorskip("asgiref")
    with making(debug=False) as (app, sse):

        @sse.authorize_inspector
        async def admit() -> bool:
            return True

        assert ask(app, "").status_code == 200


@pytest.mark.parametrize("method", METHODS)
def test_to_others_it_is_as_any_path_that_does_not_exist(method: str, made: tuple[Flask, SSE]) -> None:
    app, _ = made
    client = app.test_client()

    def answer(path: str) -> tuple[int, Any, bytes]:
        response = client.open(path, method=method)
        return response.status_code, sorted(response.headers), response.data

    app.debug = False
    for route in (*GETS, *POSTS):
        assert answer(PATH + route) == answer("/nothing"), route
        # Nor may a redirect to the tidy path tell.
        assert answer(PATH + route.replace("/", "//")) == answer("/nothing"), route
    assert answer(PATH + "/") == answer("/nothing/")


def test_only_the_methods_that_are_of_use_are_answered(made: tuple[Flask, SSE]) -> None:
    app, _ = made
    for method in METHODS:
        for route in GETS:
            response = ask(app, route, method)
            response.close()
            assert response.status_code == (200 if method in ("GET", "HEAD") else 405), (route, method)
        for route in POSTS:
            assert ask(app, route, method).status_code == (403 if method == "POST" else 405), (route, method)


def test_a_link_of_another_site_leads_to_the_page_and_to_nothing_else(made: tuple[Flask, SSE]) -> None:
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    app, _ = made
    assert ask(app, "", headers=link).status_code == 200
    for route in GETS[1:]:
        assert not is_let_in(ask(app, route, headers=link)), route
    for route in POSTS:
        assert not is_let_in(ask(app, route, "POST", headers=link)), route


def test_who_is_not_let_in_is_written_into_the_log_once_with_the_cure(
    made: tuple[Flask, SSE], caplog: pytest.LogCaptureFixture
) -> None:
    app, _ = made
    with caplog.at_level(logging.WARNING, "flask_sse_stream"):
        for _number in range(3):
            ask(app, "", environ_overrides={"REMOTE_ADDR": "192.0.2.1\nforged"})
    [record] = caplog.records
    assert "@sse.authorize_inspector" in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ({"environ_overrides": {"REMOTE_ADDR": "192.0.2.1"}}, "its address is not this machine's"),
        ({"environ_overrides": {"HTTP_HOST": "me.example.org"}}, "its URL does not say localhost"),
        ({"environ_overrides": {"SERVER_PROTOCOL": "HTTP/1.0"}}, "HTTP/1.0"),
        ({"headers": {"x-forwarded-for": "127.0.0.1"}}, "a proxy says for whom it speaks (X-Forwarded-For)"),
        (None, "not in debug mode"),
    ],
)
def test_the_log_says_why(request_: Any, why: str, made: tuple[Flask, SSE], caplog: pytest.LogCaptureFixture) -> None:
    made[0].debug = request_ is not None
    with caplog.at_level(logging.WARNING, "flask_sse_stream"):
        ask(made[0], "", **(request_ or {}))
    assert why in caplog.text.partition("not shown, since ")[2]


@pytest.mark.parametrize("route", [*GETS, *POSTS])
def test_every_answer_keeps_other_sites_and_caches_out(route: str, made: tuple[Flask, SSE]) -> None:
    app, _ = made
    response = ask(app, route, "POST" if route in POSTS else "GET")
    response.close()
    policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert response.headers["X-Frame-Options"] == "DENY"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Referrer-Policy"] == "no-referrer"
    assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "no-store" in response.headers["Cache-Control"]
    assert "Access-Control-Allow-Origin" not in response.headers


def test_the_page_finds_its_files_wherever_the_application_is_mounted(made: tuple[Flask, SSE]) -> None:
    app, _ = made
    page = ask(app, "", environ_overrides={"SCRIPT_NAME": "/shop"}).text
    assert 'src="sse-inspector/inspector.js"' in page
    assert "{{" not in page
    assert "http://" not in page
    assert "https://" not in page
    assert "style=" not in page
    assert "<style" not in page
    assert "<script>" not in page


def test_it_is_off_by_default_and_its_path_must_be_free() -> None:
    app = Flask("an_app")
    SSE(app)
    assert not [rule for rule in app.url_map.iter_rules() if "inspector" in rule.endpoint]
    taken = Flask("another")
    taken.add_url_rule("/look/publish", endpoint="mine", view_func=lambda: "mine")
    with pytest.raises(SettingsError, match="'/look/publish' is another view's route already"):
        SSE(taken, inspector="/look")


@pytest.mark.parametrize(
    "path", ["", "/", "look", "/look/", "//look", "/<key>", "/a b", "/../x", "/lööк", "/a?b", 7, True]
)
def test_a_path_that_is_none_is_refused(path: Any) -> None:
    with pytest.raises(SettingsError, match=r"^SSE_INSPECTOR .* must be a path such as '/sse-inspector'"):
        SSE(Flask("an_app"), inspector=path)


def test_the_methods_of_the_application_are_asked_as_for_any_request(made: tuple[Flask, SSE]) -> None:
    app, _ = made
    app.before_request(lambda: abort(401))
    assert ask(app, "").status_code == 401


# What is done


def test_an_event_is_published_as_text_as_json_and_to_all(made: tuple[Flask, SSE]) -> None:
    app, sse = made
    client = sse_client(app)
    with client.open("/stream?connectKey=news") as reader:
        answer = ask(app, "/publish", "POST", json={"key": "news", "data": "<b>hi</b>\nthere", "event": "headline"})
        assert answer.status_code == 200
        event = reader.next()
        assert (event.data, event.event, event.id) == ("<b>hi</b>\nthere", "headline", answer.get_json()["id"])
        ask(app, "/publish", "POST", json={"key": "news", "data": '{ "größe": [1.5] }', "json": True, "event": ""})
        assert reader.next().data == '{"größe":[1.5]}'
        ask(app, "/publish", "POST", json={"all": True, "key": "", "data": "everybody"})
        assert reader.next().data == "everybody"
    assert sse.stats().published == 3


@pytest.mark.parametrize(
    ("given", "status", "why"),
    [
        ({"data": "x"}, 400, "key must be text"),
        ({"key": "", "data": "x"}, 400, "1 to 255"),
        ({"key": "a\nb", "data": "x"}, 400, "must not contain"),
        ({"key": "\x02job", "data": "x"}, 400, "must not contain"),
        ({"key": ["k"], "data": "x"}, 400, "key must be text"),
        ({"key": "k", "data": 7}, 400, "are text"),
        ({"key": "k", "data": "x", "event": ["e"]}, 400, "are text"),
        ({"key": "k", "data": "x", "event": "a\nb"}, 400, "event must not contain"),
        ({"key": "k", "data": "{", "json": True}, 400, "no JSON"),
        ({"key": "k", "data": "NaN", "json": True}, 400, "no JSON"),
        ({"key": "k", "data": "[" * 15_000, "json": True}, 400, "no JSON"),
        ({"key": "k", "data": "x" * 2000}, 400, "SSE_MAX_EVENT_BYTES"),
        ({"key": "k", "data": "x" * 20_000}, 413, "Content-Length"),
        ([1], 400, "a JSON object"),
    ],
)
def test_what_cannot_be_published_is_refused_with_the_reason(given: Any, status: int, why: str) -> None:
    with making(max_event_bytes=1000) as (app, sse):
        answer = ask(app, "/publish", "POST", json=given)
        assert answer.status_code == status
        assert why in answer.get_json()["error"]
        assert sse.stats().published == 0


@pytest.mark.parametrize("route", POSTS)
def test_nothing_is_done_for_what_a_page_of_another_site_could_send(route: str, made: tuple[Flask, SSE]) -> None:
    app, sse = made
    body = json.dumps({"key": "k", "data": "x", "stream": "s"})
    for headers, kind in (
        ({}, "application/json"),
        (MARKED, "text/plain"),
        (MARKED, "application/x-www-form-urlencoded"),
        ({"X-SSE-Inspector": "0"}, "application/json"),
    ):
        assert ask(app, route, "POST", data=body, headers=headers, content_type=kind).status_code == 403
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        headers = {**MARKED, **headers}
        assert ask(app, route, "POST", data=body, headers=headers, content_type="application/json").status_code == 404
    own = {**MARKED, "Origin": "http://localhost:5000", "Sec-Fetch-Site": "same-origin"}
    done = ask(app, route, "POST", data=body, headers=own, content_type="application/json")
    assert done.status_code in (200, 409)
    assert sse.stats().published == (route == "/publish")
    for body in ("{", "[" * 100_000, "nonsense", "7"):
        answer = ask(app, route, "POST", data=body, headers=MARKED, content_type="application/json")
        assert answer.status_code == 400, body


@pytest.mark.parametrize(
    "given", [{}, {"stream": 7}, {"stream": ""}, {"stream": "x" * 200}, {"stream": "x", "reconnect": 1}]
)
def test_what_names_no_stream_is_refused(given: Any, made: tuple[Flask, SSE]) -> None:
    assert ask(made[0], "/end", "POST", json=given).status_code == 400


def test_a_stream_of_another_process_cannot_be_reached_in_memory(made: tuple[Flask, SSE]) -> None:
    answer = ask(made[0], "/end", "POST", json={"stream": "another-1-2"})
    assert answer.status_code == 409
    assert "memory://" in answer.get_json()["error"]


def test_a_broker_that_is_away_is_said(made: tuple[Flask, SSE], monkeypatch: pytest.MonkeyPatch) -> None:
    app, sse = made

    def fail(*arguments: Any) -> str:
        raise BrokerError("no answer")

    monkeypatch.setattr(sse.manager._broker, "publish", fail)
    for route, given in (
        ("/publish", {"key": "k", "data": "x"}),
        ("/end", {"stream": sse.manager.asking.process + "-1-2"}),
    ):
        answer = ask(app, route, "POST", json=given)
        assert (answer.status_code, answer.get_json()) == (503, {"error": "no answer"})


# What a page is sent


class Reader:
    """Reads the stream of one page, in the test's own thread."""

    def __init__(self, client: SSEClient, query: str = "") -> None:
        self._opened = client.open(f"{PATH}/events{query}")
        self._reader = self._opened.__enter__()
        assert self._reader.response.status_code == 200

    def __enter__(self) -> Reader:  # noqa: PYI034  Self is of Python 3.11
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.__exit__(None, None, None)

    def next(self, name: str, fits: Callable[[Any], object] = lambda found: True) -> Any:
        """Give the next event of this name that fits."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            event = self._reader.next(20)
            found = json.loads(event.data or "null")
            if event.event == name and fits(found):
                return found
        raise AssertionError(f"no {name} that fits")


@pytest.fixture
def local(made: tuple[Flask, SSE]) -> SSEClient:
    app, _ = made
    app.wsgi_app = _from_here(app.wsgi_app)  # type: ignore[method-assign]
    return sse_client(app)


def _from_here(inner: Any) -> Any:
    def call(environ: dict[str, Any], start_response: Any) -> Any:
        return inner({**environ, "REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": "localhost"}, start_response)

    return call


def test_a_page_sees_streams_keys_and_rates_and_not_itself(made: tuple[Flask, SSE], local: SSEClient) -> None:
    app, sse = made
    with (
        Reader(local) as page,
        local.open("/stream?connectKey=a&connectKey=b"),
        local.open("/stream?connectKey=a") as b,
    ):
        found = page.next("sample", lambda found: found["totals"]["streams"] == 2)
        assert [(key["key"], key["streams"], key["processes"]) for key in found["keys"]] == [("a", 2, 1), ("b", 1, 1)]
        [process] = found["processes"]
        assert (process["own"], process["streams"], found["shared"], found["trouble"]) == (True, 2, False, "")
        sse.publish("a", "x")
        assert b.next().data == "x"
        moved = page.next("sample", lambda found: found["totals"]["delivered"] > 0)["totals"]
        assert moved["published"] > 0
        assert moved["sent_bytes"] > 0
        assert moved["lag_p99"] > 0
        page.next("sample", lambda found: found["totals"]["delivered"] == 0)
        # A page is no stream of the application's.
        assert (sse.count_all(), sse.stats().opened, sse.stats().streams) == (2, 2, 2)
    with Reader(local) as again:
        assert len(again.next("history")["totals"]) <= 120


def test_a_page_that_opens_a_key_has_its_streams_and_events_as_they_come(
    made: tuple[Flask, SSE], local: SSEClient
) -> None:
    app, sse = made

    @sse.authorize
    def authorize(keys: Any) -> Ticket:
        return Ticket(keys, user="ada")

    for number in range(60):
        sse.publish("news", str(number), event="e")
    sse.publish_all("to all")
    with Reader(local, "?key=news") as page, local.open("/stream?connectKey=news") as reader:
        first = page.next("key")
        assert (first["key"], first["fresh"], first["job"], first["history"]) == ("news", True, False, 1000)
        assert [event["data"] for event in first["events"]] == [*map(str, range(11, 60)), "to all"]
        assert [event["all"] for event in first["events"][-2:]] == [False, True]
        listened = page.next("key", lambda found: found.get("streams"))
        [stream] = listened["streams"]
        assert (stream["user"], listened["fresh"], listened["events"]) == ("ada", False, [])
        identifier = sse.publish("news", "live")
        new = page.next("key", lambda found: found["events"])
        [event] = new["events"]
        assert (event["id"], event["data"], new["fresh"]) == (identifier, "live", False)
        assert reader.next().data == "live"
        answer = ask(app, "/end", "POST", json={"stream": stream["name"]})
        assert answer.status_code == 202
        assert reader.next().event == "close"
        page.next("key", lambda found: found["streams"] == [])
    wait_for(lambda: sse.stats().closed == {"kicked": 1}, "it was kicked")


def test_a_jobs_events_and_readers_are_seen(made: tuple[Flask, SSE], local: SSEClient) -> None:
    app, sse = made
    with app.app_context():
        job = sse.job()

    @app.get("/job")
    def read() -> Any:
        return sse.job(job.id).response()

    job.send("half", event="progress")
    with Reader(local, f"?key={job.id}&job=1") as page, local.open("/job"):
        found = page.next("key")
        assert found["job"]
        assert "half" in [event["data"] for event in found["events"]]
        page.next("key", lambda found: len(found.get("streams", ())) == 1)
        keys = page.next("sample", lambda found: found["keys"])["keys"]
        assert [(key["key"], key["job"]) for key in keys] == [(job.id, True)]


@pytest.mark.parametrize("key", ["", "x" * 256, "a%0Ab", "%02job", "%00"])
def test_a_key_that_is_none_is_refused(key: str, made: tuple[Flask, SSE]) -> None:
    for job in ("", "&job=1"):
        assert ask(made[0], f"/events?key={key}{job}").status_code == 400


def test_a_hostile_event_is_shortened_and_does_not_break_what_is_sent(
    made: tuple[Flask, SSE], local: SSEClient
) -> None:
    _, sse = made
    name = "<img src=x onerror=alert(1)>\u202e\u2028'\"&"
    sse.publish(name, "日" * 300_000, event="</script>", id="\x7fü" * 400)
    sse.publish(name, "\x00\x1b[31m\r\nevent: forged\n\ndata: x")
    sse.manager._broker.publish(name, Event(comment="only a comment").encode())
    with Reader(local, f"?key={name.replace('&', '%26').replace('#', '%23')}") as page:
        large, forged, comment = page.next("key")["events"]
        assert large["cut"]
        assert large["bytes"] > 900_000
        assert set(large["data"]) == {"日"}
        assert len(large["data"]) <= 4000
        assert len(large["id"]) == 300
        assert (large["event"], forged["event"]) == ("</script>", "")
        assert forged["data"] == "\x00\x1b[31m\nevent: forged\n\ndata: x"
        assert (comment["comment"], comment["data"]) == (True, "only a comment")


def test_many_keys_are_left_out_and_counted(made: tuple[Flask, SSE]) -> None:
    manager = made[1].manager
    sampler = Sampler(manager)
    own = manager.asking.report()
    for number in range(300):  # processes, of a store that somebody else has written to
        keys = tuple(KeyReport(f"{number}-{key}", 1, 0, 0, 0.0, job=False) for key in range(2))
        other = replace(own, process=f"p{number}", keys=keys, more_keys=3)
        sampler._hear(other, time.monotonic())
    sampler._look((), "t", inspecting.deque())
    found = json.loads(sampler._sample)
    assert len(found["processes"]) == 200
    assert len(found["keys"]) == 200
    assert found["more_keys"] == 200 + 600


def test_rates_survive_a_process_that_begins_anew_and_one_that_is_late(made: tuple[Flask, SSE]) -> None:
    manager = made[1].manager
    sampler = Sampler(manager)
    token, now = "t", time.monotonic()

    def look(*reports: Report) -> Any:
        sampler._look((), token, inspecting.deque(report.encode(token) for report in reports))
        return json.loads(sampler._sample)["totals"]

    other = replace(manager.asking.report(), process="other", seconds=10.0, delivered=1000, sent_bytes=5)
    assert look(other)["delivered"] == 0  # nobody knows when it delivered them
    assert look(replace(other, seconds=12.0, delivered=1200))["delivered"] == 100
    assert look()["delivered"] == 100  # late, so as before
    assert look(replace(other, seconds=12.0, delivered=1200))["delivered"] == 100  # the same answer again
    fresh = replace(other, process="anew", seconds=0.5, delivered=3)
    assert look(fresh)["delivered"] == 100
    assert look(replace(fresh, seconds=1.5, delivered=53))["delivered"] == 150
    assert look(replace(fresh, seconds=2.5, delivered=0))["delivered"] == 100  # counts never go back
    for known in sampler._known.values():
        known.heard = now - 100
    assert look()["delivered"] == 0
    assert list(sampler._known) == [manager.asking.process]


def test_a_look_that_fails_is_not_the_last(
    made: tuple[Flask, SSE], local: SSEClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failed: list[object] = []
    look = Sampler._look

    def fail_once(self: Sampler, *rest: Any) -> None:
        if not failed:
            failed.append(self)
            raise RuntimeError("once")
        look(self, *rest)

    monkeypatch.setattr(Sampler, "_look", fail_once)
    with Reader(local) as page:
        page.next("sample")
    assert failed
    assert "could not look" in caplog.text


def test_nothing_is_asked_and_nothing_runs_while_no_page_is_open(
    made: tuple[Flask, SSE], local: SSEClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Sampler] = []
    look = Sampler._look
    monkeypatch.setattr(Sampler, "_look", lambda self, *rest: (looks.append(self), look(self, *rest))[1])
    ask(made[0], "")
    assert [found for found in looks if found._manager is made[1].manager] == []
    with Reader(local) as one, Reader(local) as two:
        one.next("sample")
        two.next("sample")
        [sampler] = [found for found in set(looks) if found._manager is made[1].manager]
        assert sampler.runs
    wait_for(lambda: not sampler.runs, "the last page has gone, and nobody looks any more")
    seen = looks.count(sampler)
    assert (sampler._known, sampler._sample, list(sampler._past)) == ({}, "", [])
    with Reader(local) as page:
        page.next("sample")
    assert looks.count(sampler) > seen


# Over a shared log


@pytest.fixture(params=["sqlite", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/log.db"
    else:
        with RedisServer(tmp_path) as server:
            yield server.url


def test_all_processes_are_asked_and_their_numbers_are_together(url: str) -> None:
    house = House(broker_url=url)
    with making(broker_url=url) as (app, sse):
        app.wsgi_app = _from_here(app.wsgi_app)  # type: ignore[method-assign]
        local = sse_client(app)
        theirs = [house.open("k"), house.open("k", "other")]
        with Reader(local, "?key=k") as page, local.open("/stream?connectKey=k"):

            def there(found: Any) -> bool:
                house.flush()  # which lets the other one answer
                return bool(found["totals"]["streams"] == 3)

            found = page.next("sample", there)
            assert [(key["key"], key["streams"], key["processes"]) for key in found["keys"]] == [
                ("k", 3, 2),
                ("other", 1, 1),
            ]
            assert sorted(process["own"] for process in found["processes"]) == [False, True]
            assert found["shared"]

            def all_three(found: Any) -> bool:
                house.flush()
                return len(found.get("streams", ())) == 3

            streams = page.next("key", all_three)["streams"]
            [name] = [
                one["name"]
                for one in streams
                if one["name"].startswith(f"{house.manager.asking.process}-{id(theirs[0]):x}-")
            ]
            assert ask(app, "/end", "POST", json={"stream": name, "reconnect": True}).status_code == 202
            wait_for(lambda: (house.flush(), theirs[0].closed)[1], "it was told to come back")
            assert [str(stream.reason) for stream in theirs] == ["rotated", "None"]
            # What is in the store and is no answer is left alone.
            broker: Any = sse.manager._broker
            for body in (b"data: {}\n\n", b"data: nonsense\n\n", Event(json.dumps({"report": "x"})).encode()):
                broker.publish(REPORT_KEY, body)
            page.next("sample", there)
            page.next("sample", lambda found: (house.flush(), len(found["processes"]) == 2)[1])
    house.manager._broker.close()


def test_a_broker_that_is_away_is_shown_and_this_process_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with making(broker_url=f"sqlite:///{tmp_path}/log.db") as (app, sse):
        app.wsgi_app = _from_here(app.wsgi_app)  # type: ignore[method-assign]
        broken = [True]
        ask_them = sse.manager.asking.ask

        def fail(inquiry: Inquiry) -> None:
            if broken[0]:
                raise BrokerError("the disk is full")
            ask_them(inquiry)

        monkeypatch.setattr(sse.manager.asking, "ask", fail)
        with Reader(sse_client(app)) as page:
            found = page.next("sample")
            assert found["trouble"] == "the disk is full"
            assert [process["own"] for process in found["processes"]] == [True]
            broken[0] = False
            page.next("sample", lambda found: found["trouble"] == "")


def test_answers_are_kept_for_a_minute_at_most_in_the_store(made: tuple[Flask, SSE]) -> None:
    settings = made[1].manager.settings
    assert settings.kept(REPORT_KEY) == (20, 60.0, False)
    assert settings.kept("news") == (1000, 3600.0, False)
    assert settings.kept(JobKey.of("x")).whole
