"""``respond`` and the middleware, called as a WSGI server calls them but without one."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
from fakes import shut_down
from support import wait_for

from flask_sse_stream import (
    BrokerError,
    CloseReason,
    Event,
    EventDecoder,
    EventError,
    PoolManager,
    Settings,
    Stream,
    StreamClosed,
)
from flask_sse_stream.brokers.memory import MemoryBroker
from flask_sse_stream.wsgi import SSEMiddleware, accepts_event_stream, last_event_id, respond

ORIGIN = "https://example.org"


def environ_of(query: str = "", method: str = "GET", path: str = "/stream", **more: Any) -> dict[str, Any]:
    environ: dict[str, Any] = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": query,
        **more,
    }
    setup_testing_defaults(environ)
    return environ


class Answer:
    """One request's answer: what ``start_response`` was told, and the body with what was decoded of it."""

    def __init__(self, application: Callable[..., Iterable[bytes]], environ: dict[str, Any]) -> None:
        self._told: list[tuple[str, list[tuple[str, str]]]] = []
        self._decoder = EventDecoder(comments=True)
        self.raw = b""
        self.events: list[Event] = []
        self.body: Any = application(environ, self._start_response)
        [(self.status_line, self.header_list)] = self._told
        self.chunks: Iterator[bytes] = iter(self.body)

    def _start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[..., Any]:
        assert exc_info is None
        self._told.append((status, headers))
        return self._write

    @staticmethod
    def _write(data: bytes) -> None:
        raise AssertionError("a body is returned and not written")

    @property
    def status(self) -> int:
        return int(self.status_line[:3])

    @property
    def headers(self) -> dict[str, str]:
        names = [name.lower() for name, _ in self.header_list]
        assert len(names) == len(set(names)), self.header_list
        return {name.lower(): value for name, value in self.header_list}

    def _feed(self, chunk: bytes) -> None:
        assert chunk, "an empty chunk would end the response"
        self.raw += chunk
        self.events += self._decoder.feed(chunk)

    @property
    def fired(self) -> list[Event]:
        return [event for event in self.events if event.data is not None]

    def until(self, number: int) -> list[Event]:
        """Read until so many events have fired; give these."""
        while len(self.fired) < number:
            self._feed(next(self.chunks))
        return self.fired

    def data(self, number: int) -> list[str | None]:
        return [event.data for event in self.until(number)]

    def to_the_end(self) -> list[Event]:
        for chunk in self.chunks:
            self._feed(chunk)
        return self.fired

    def text(self) -> str:
        return b"".join(self.chunks).decode()

    def close(self) -> None:
        """As a server does; a list has no ``close``."""
        if hasattr(self.body, "close"):
            self.body.close()


class Site:
    """A pool manager, and requests to it."""

    def __init__(self, manager: PoolManager) -> None:
        self.manager = manager
        self.ended: list[CloseReason] = []
        manager.hooks.closed = lambda _, reason: self.ended.append(reason)

    def ask(
        self,
        query: str = "",
        method: str = "GET",
        *,
        cursor: str | None = None,
        origin: str | None = None,
        environ: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> Answer:
        """Have ``respond`` answer; ``arguments`` are its."""
        asked = environ_of(query, method, **(environ or {}))
        if cursor is not None:
            asked["HTTP_LAST_EVENT_ID"] = cursor
        if origin is not None:
            asked["HTTP_ORIGIN"] = origin
        return Answer(lambda env, start: respond(self.manager, env, start, **arguments), asked)

    def keys(self) -> list[str]:
        return sorted(self.manager.keys())


MakeSite = Callable[..., Site]


@pytest.fixture
def make_site() -> Iterator[MakeSite]:
    """Give a function that makes a site; at the end every stream of it is ended, and none is left."""
    made: list[Site] = []

    def make_site(*, broker: Any = None, **options: Any) -> Site:
        settings = Settings(**{"ping_interval": 0, **options})
        manager = PoolManager(settings, broker=broker) if broker is not None else PoolManager(settings)
        made.append(Site(manager))
        return made[-1]

    yield make_site
    for site in made:
        shut_down(site.manager)
        assert site.manager.count_all() == 0


@pytest.fixture
def site(make_site: MakeSite) -> Site:
    return make_site()


class Source:
    """A generator of numbers that goes on until it is closed, and says whether it was."""

    def __init__(self) -> None:
        self.given = 0
        self.ended = False

    def numbers(self) -> Iterator[str]:
        try:
            while True:
                yield str(self.given)
                self.given += 1
                time.sleep(0.005)
        finally:
            self.ended = True


def no_generator_begun() -> tuple[Iterator[str], list[str]]:
    """Give a generator, and a list that gets an item if anybody lets it run."""
    ran: list[str] = []

    def generator() -> Iterator[str]:
        ran.append("ran")
        yield "never read"

    return generator(), ran


# Methods


def test_get_opens_a_stream_that_hears_what_is_published(site: Site) -> None:
    answer = site.ask("connectKey=news")
    assert answer.status == 200
    identifier = site.manager.publish("news", {"title": "hi"}, event="headline")
    [event] = answer.until(1)
    assert (event.event, event.data, event.id) == ("headline", '{"title":"hi"}', identifier)


def test_the_first_bytes_are_there_before_anything_is_published(site: Site) -> None:
    answer = site.ask()
    assert next(answer.chunks).startswith(b"retry: 3000\n\n: open\n\n")


def test_head_gets_the_headers_of_get_and_opens_nothing(make_site: MakeSite) -> None:
    site = make_site(cors_origins=ORIGIN)
    head = site.ask("connectKey=news", "HEAD", origin=ORIGIN)
    assert site.manager.count_all() == 0
    assert head.text() == ""
    get = site.ask("connectKey=news", origin=ORIGIN)
    assert (head.status_line, head.header_list) == (get.status_line, get.header_list)


def test_options_lets_a_listed_origin_send_its_cursor(make_site: MakeSite) -> None:
    site = make_site(cors_origins=ORIGIN)
    answer = site.ask("connectKey=news", "OPTIONS", origin=ORIGIN)
    assert (answer.status, answer.text()) == (204, "")
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert answer.headers["access-control-allow-methods"] == "GET"
    assert "last-event-id" in answer.headers["access-control-allow-headers"].lower()
    assert int(answer.headers["access-control-max-age"]) > 0
    assert answer.headers["vary"] == "Origin"
    assert answer.headers["allow"] == "GET, HEAD, OPTIONS"
    assert site.manager.count_all() == 0


@pytest.mark.parametrize(
    ("origins", "origin", "rest"),
    [((), ORIGIN, {}), (ORIGIN, "https://evil.example", {"vary": "Origin"}), (ORIGIN, None, {"vary": "Origin"})],
)
def test_options_allows_other_origins_nothing(
    origins: Any, origin: str | None, rest: dict[str, str], make_site: MakeSite
) -> None:
    answer = make_site(cors_origins=origins).ask("", "OPTIONS", origin=origin)
    assert answer.status == 204
    assert answer.headers == {"allow": "GET, HEAD, OPTIONS", **rest}


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE", "get"])
def test_other_methods_open_no_pool_stream_and_are_told_which_do(method: str, site: Site) -> None:
    answer = site.ask("connectKey=news", method)
    assert answer.status == 405
    assert answer.headers["allow"] == "GET, HEAD, OPTIONS"
    assert answer.headers["content-length"] == str(len(answer.text()))
    assert site.manager.count_all() == 0


def test_a_stream_of_one_request_answers_any_method(site: Site) -> None:
    assert [event.data for event in site.ask("", "POST", source=["a"]).to_the_end()] == ["a", ""]


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST"])
@pytest.mark.parametrize("query", ["connectKey=news", "connectKey=", "connectKey=secret", "lastEventId=end"])
def test_every_answer_keeps_to_pep_3333(method: str, query: str, make_site: MakeSite) -> None:
    site = make_site(public_keys="news")
    environ = environ_of(query, method, SERVER_PROTOCOL="HTTP/1.1")
    answer = Answer(validator(lambda env, start: respond(site.manager, env, start)), environ)
    if answer.status == 200 and method == "GET":
        next(answer.chunks)
    else:
        answer.text()
    answer.close()


# Keys


@pytest.mark.parametrize(
    ("query", "keys"),
    [
        ("", ["default"]),
        ("other=1", ["default"]),
        ("connectKey=a", ["a"]),
        ("connectKey=b&x=1&connectKey=a&connectKey=b", ["a", "b"]),
        ("connectKey=a+b%20c", ["a b c"]),
        ("connectKey=gr%C3%BC%C3%9Fe", ["grüße"]),
        ("connectKey=gr\xc3\xbc\xc3\x9fe", ["grüße"]),  # raw UTF-8, as WSGI hands it over
        ("connectKey=%F0%9F%8E%88", ["🎈"]),
        ("connectKey=%FF", ["\ufffd"]),
        ("connectKey=\xff", ["\ufffd"]),
        ("connectKey=a;b", ["a;b"]),
        ("connectKey=a,b", ["a,b"]),
        ("connectKey=" + "k" * 255, ["k" * 255]),
        ("&".join(f"connectKey=k{number:02}" for number in range(100)), [f"k{number:02}" for number in range(100)]),
        ("&".join(["connectKey=a"] * 101), ["a"]),
    ],
)
def test_the_query_names_the_keys(query: str, keys: list[str], site: Site) -> None:
    answer = site.ask(query)
    assert answer.status == 200
    assert site.keys() == keys


def test_the_parameter_and_the_default_key_have_the_names_that_were_set(make_site: MakeSite) -> None:
    site = make_site(key_param="room", default_key="lobby")
    answers = [site.ask("connectKey=a"), site.ask("room=b")]
    assert all(answer.status == 200 for answer in answers)
    assert site.keys() == ["b", "lobby"]


@pytest.mark.parametrize(
    "query",
    [
        "connectKey=",
        "connectKey=a&connectKey=",
        "connectKey=%00",
        "connectKey=a\x00",
        "connectKey=a%0D%0Ab",
        "connectKey=" + "k" * 256,
        "&".join(f"connectKey={number}" for number in range(101)),
        "&".join(["x="] * 1001),
    ],
)
def test_a_bad_key_is_a_400_that_says_why_and_registers_nothing(query: str, make_site: MakeSite) -> None:
    site = make_site(cors_origins=ORIGIN)
    answer = site.ask(query, origin=ORIGIN)
    assert answer.status == 400
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    text = answer.text()
    assert len(text) > 10
    assert answer.headers["content-length"] == str(len(text.encode()))
    assert site.manager.stats().opened == 0


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("connectKey=news", 200),
        ("connectKey=room-1", 200),
        ("connectKey=news&connectKey=room-2", 200),
        ("connectKey=secret", 403),
        ("connectKey=news&connectKey=secret", 403),
        ("connectKey=NEWS", 403),
        ("", 403),
    ],
)
def test_a_key_that_is_not_public_is_a_403(query: str, status: int, make_site: MakeSite) -> None:
    site = make_site(public_keys=("news", "room-*"), cors_origins=ORIGIN)
    answer = site.ask(query, origin=ORIGIN)
    assert answer.status == status
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert site.manager.stats().opened == (status == 200)


def test_keys_that_the_application_gives_are_not_checked_against_the_public_ones(make_site: MakeSite) -> None:
    site = make_site(public_keys="news")
    answer = site.ask("connectKey=other", keys=["user-7", "news"])
    assert answer.status == 200
    assert site.keys() == ["news", "user-7"]


@pytest.mark.parametrize("keys", [(), [""], ["a\n"], [str(number) for number in range(101)]])
def test_bad_keys_that_the_application_gives_are_its_own_error(keys: list[str], site: Site) -> None:
    with pytest.raises(EventError):
        site.ask(keys=keys)
    assert site.manager.stats().opened == 0


# The cursor


@pytest.mark.parametrize(
    ("header", "query", "cursor"),
    [
        (None, "", None),
        (None, "lastEventId=", None),
        (None, "lastEventId=a-1", "a-1"),
        (None, "lastEventId=a-1&lastEventId=b-2", "b-2"),
        ("a-1", "lastEventId=b-2", "a-1"),
        ("", "lastEventId=b-2", "b-2"),
        ("", "", None),
        ("gr\xc3\xbc\xc3\x9fe", "", "grüße"),  # UTF-8, as a browser sends it and WSGI hands it over
        ("gr\xfc\xdfe", "", "gr\ufffd\ufffde"),  # Latin-1: no id of ours
        (None, "lastEventId=gr%C3%BC%C3%9Fe", "grüße"),
        (None, "lastEventId=gr\xc3\xbc\xc3\x9fe", "grüße"),
        (None, "&".join(["x="] * 1001), None),
    ],
)
def test_the_cursor_is_the_header_or_else_the_parameter(header: str | None, query: str, cursor: str | None) -> None:
    environ = environ_of(query)
    if header is not None:
        environ["HTTP_LAST_EVENT_ID"] = header
    assert last_event_id(environ) == cursor


@pytest.mark.parametrize("how", ["header", "query"])
def test_a_client_that_comes_back_gets_exactly_what_it_missed(how: str, site: Site) -> None:
    ids = [site.manager.publish("news", str(number)) for number in range(4)]
    site.manager.publish("other", "of another key")
    back = site.ask("connectKey=news", cursor=ids[1]) if how == "header" else site.ask(
        f"connectKey=news&lastEventId={ids[1]}"
    )  # fmt: skip
    site.manager.publish("news", "live")
    assert back.data(3) == ["2", "3", "live"]


def test_an_id_of_ones_own_that_is_not_ascii_finds_its_place(site: Site) -> None:
    site.manager.publish("news", "before", id="größe")
    site.manager.publish("news", "after")
    back = site.ask("connectKey=news", cursor="größe".encode().decode("latin-1"))
    assert back.data(1) == ["after"]


@pytest.mark.parametrize("cursor", ["nonsense", "\xff\xfe", "0" * 10_000, "abc-1", "abc-" + "9" * 5000])
def test_a_cursor_that_leads_nowhere_is_told_to_reload_and_goes_on_live(cursor: str, site: Site) -> None:
    site.manager.publish("news", "old")
    answer = site.ask("connectKey=news", cursor=cursor)
    site.manager.publish("news", "live")
    reset, live = answer.until(2)
    assert reset.event == "stream-reset"
    assert json.loads(reset.data or "")["keys"] == ["news"]
    assert live.data == "live"


@pytest.mark.parametrize("how", ["header", "query"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_client_of_a_finished_stream_is_answered_204(how: str, method: str, make_site: MakeSite) -> None:
    site = make_site(cors_origins=ORIGIN, headers={"X-Ours": "1"})
    query, cursor = ("", "end") if how == "header" else ("lastEventId=end", None)
    answer = site.ask(query, method, cursor=cursor, origin=ORIGIN)
    assert (answer.status, answer.text()) == (204, "")
    assert answer.headers == {"access-control-allow-origin": ORIGIN, "vary": "Origin"}
    assert site.manager.stats().opened == 0


def test_a_204_closes_the_source_and_the_stream_that_nobody_will_read(site: Site) -> None:
    source, ran = no_generator_begun()
    stream = Stream(site.manager)
    assert site.ask(cursor="end", stream=stream, source=source).status == 204
    assert next(source, "closed") == "closed"
    assert ran == []
    assert stream.reason == CloseReason.ENDED


# Headers


def test_the_headers_are_those_that_keep_a_stream_flowing(site: Site) -> None:
    assert site.ask().header_list == [
        ("Content-Type", "text/event-stream"),
        ("Cache-Control", "no-cache, no-transform"),
        ("X-Accel-Buffering", "no"),
    ]


def test_settings_override_the_streams_headers_and_the_call_overrides_both(make_site: MakeSite) -> None:
    site = make_site(headers={"cache-control": "no-store", "X-Ours": "setting", "X-Other": "setting"})
    answer = site.ask(headers=[("x-ours", "call"), ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")])
    assert answer.header_list == [
        ("Content-Type", "text/event-stream"),
        ("X-Accel-Buffering", "no"),
        ("cache-control", "no-store"),
        ("X-Other", "setting"),
        ("x-ours", "call"),
        ("Set-Cookie", "a=1"),
        ("Set-Cookie", "b=2"),
    ]


@pytest.mark.parametrize("name", ["Connection", "keep-alive", "TRANSFER-ENCODING", "Content-Length"])
def test_what_the_server_owns_is_never_sent(name: str, site: Site) -> None:
    answer = site.ask(headers=[(name, "1"), ("X-Ours", "1")])
    assert name.lower() not in answer.headers
    assert answer.headers["x-ours"] == "1"


@pytest.mark.parametrize(
    ("origins", "origin", "headers"),
    [
        ((), ORIGIN, {}),
        (ORIGIN, ORIGIN, {"access-control-allow-origin": ORIGIN, "vary": "Origin"}),
        ((ORIGIN, "http://localhost:3000"), "http://localhost:3000",
         {"access-control-allow-origin": "http://localhost:3000", "vary": "Origin"}),
        (ORIGIN, "https://example.org.evil.example", {"vary": "Origin"}),
        (ORIGIN, "null", {"vary": "Origin"}),
        (ORIGIN, None, {"vary": "Origin"}),
        ("*", ORIGIN, {"access-control-allow-origin": "*"}),
        ("*", None, {"access-control-allow-origin": "*"}),
    ],
)  # fmt: skip
def test_cors_names_listed_origins_alone(
    origins: Any, origin: str | None, headers: dict[str, str], make_site: MakeSite
) -> None:
    sent = make_site(cors_origins=origins).ask(origin=origin).headers
    assert {name: value for name, value in sent.items() if name.startswith(("access-", "vary"))} == headers


def test_a_vary_of_ones_own_stands_beside_the_one_for_origins(make_site: MakeSite) -> None:
    answer = make_site(cors_origins=ORIGIN).ask(origin=ORIGIN, headers=[("Vary", "Cookie")])
    assert [value for name, value in answer.header_list if name == "Vary"] == ["Origin", "Cookie"]


# Limits


def test_over_a_limit_a_browser_is_told_to_come_back_later(
    make_site: MakeSite, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site(max_clients=1)
    first = site.ask()
    waits = set()
    for _ in range(5):
        refused = site.ask()
        assert (refused.status_line, refused.header_list) == (first.status_line, first.header_list)
        assert refused.to_the_end() == []
        assert refused._decoder.retry is not None
        waits.add(refused._decoder.retry)
    assert all(3000 <= wait <= 9000 for wait in waits)
    assert len(waits) > 1
    assert site.manager.stats().refused == 5
    assert "SSE_MAX_CLIENTS" in caplog.text


def test_over_a_limit_a_503_says_when_to_come_back(make_site: MakeSite) -> None:
    site = make_site(max_clients_per_key=1, when_full="503", cors_origins=ORIGIN)
    first = site.ask("connectKey=a")
    refused = site.ask("connectKey=b&connectKey=a", origin=ORIGIN)
    assert refused.status == 503
    assert refused.headers["retry-after"] == "3"
    assert refused.headers["access-control-allow-origin"] == ORIGIN
    assert "SSE_MAX_CLIENTS_PER_KEY" in refused.text()
    assert site.keys() == ["a"]
    first.close()
    assert site.ask("connectKey=a").status == 200


@pytest.mark.parametrize(("when_full", "status"), [("retry", 200), ("503", 503)])
def test_a_stream_of_one_request_that_is_refused_closes_its_source(
    when_full: str, status: int, make_site: MakeSite
) -> None:
    site = make_site(max_clients=1, when_full=when_full)
    first = site.ask()
    source, ran = no_generator_begun()
    stream = Stream(site.manager)
    assert site.ask(stream=stream, source=source).status == status
    assert next(source, "closed") == "closed"
    assert ran == []
    assert stream.closed
    first.close()


@pytest.mark.parametrize(("when_full", "status"), [("retry", 200), ("503", 503)])
def test_a_broker_that_fails_is_answered_as_a_full_house(when_full: str, status: int, make_site: MakeSite) -> None:
    class Failing(MemoryBroker):
        def cover(self, keys: Any, fetch: Any, after: Any) -> Any:
            raise BrokerError("no broker today")

    site = make_site(broker=Failing, when_full=when_full)
    answer = site.ask()
    assert answer.status == status
    answer.text()
    assert site.manager.count_all() == 0


# Sources


def as_list(_: list[str]) -> Any:
    return ["a", {"b": 1}, Event("c", event="named", id="3")]


def as_generator(_: list[str]) -> Any:
    return (item for item in as_list([]))


def as_function(closed: list[str]) -> Any:
    def feed(stream: Stream) -> None:
        stream.send("a")
        stream.send({"b": 1})
        stream.send("c", event="named", id=3)

    return feed


def as_generator_function(closed: list[str]) -> Any:
    def feed(stream: Stream) -> Iterator[Any]:
        try:
            stream.send("a")
            yield {"b": 1}
            stream.send("c", event="named", id=3)
        finally:
            closed.append("closed")

    return feed


@pytest.mark.parametrize("make", [as_list, as_generator, as_function, as_generator_function])
def test_a_source_is_sent_to_its_end_and_the_client_does_not_come_back(
    make: Callable[[list[str]], Any], site: Site
) -> None:
    closed: list[str] = []
    answer = site.ask(source=make(closed))
    assert answer.status == 200
    events = [(event.event, event.data, event.id) for event in answer.to_the_end()]
    assert events == [(None, "a", None), (None, '{"b":1}', None), ("named", "c", "3"), ("close", "", "end")]
    wait_for(lambda: site.ended, "the end is told of")  # by the source's thread, when the body has its last bytes
    assert site.ended == [CloseReason.ENDED]
    if make is as_generator_function:
        assert closed == ["closed"]


def test_a_source_that_said_its_own_end_gets_no_second_one(site: Site) -> None:
    def feed(stream: Stream) -> None:
        stream.send("a")
        stream.send_end("bye", event="done")

    events = site.ask(source=feed).to_the_end()
    assert [(event.event, event.data, event.id) for event in events] == [(None, "a", None), ("done", "bye", "end")]


def test_the_last_event_has_the_name_that_was_set(make_site: MakeSite) -> None:
    [last] = make_site(close_event="fin").ask(source=[]).to_the_end()
    assert (last.event, last.data, last.id) == ("fin", "", "end")


def test_a_stream_that_is_given_may_be_sent_to_before_and_after_its_response_begins(site: Site) -> None:
    stream = Stream(site.manager)
    stream.send("before")
    answer = site.ask(stream=stream)
    assert answer.data(1) == ["before"]
    stream.send("after")
    assert answer.data(2) == ["before", "after"]
    stream.send_end()
    assert [event.data for event in answer.to_the_end()] == ["before", "after", ""]
    with pytest.raises(StreamClosed):
        stream.send("late")


def test_a_stream_of_one_request_hears_no_pool(site: Site) -> None:
    stream = Stream(site.manager)
    answer = site.ask("connectKey=news", stream=stream)
    site.manager.publish("news", "to the key")
    site.manager.publish_all("to all")
    listener = site.ask("connectKey=news")
    site.manager.publish("news", "flushed")
    listener.until(1)
    stream.send("to this one")
    assert answer.data(1) == ["to this one"]


def test_a_source_runs_in_a_context_of_its_own(site: Site) -> None:
    variable: ContextVar[str] = ContextVar("variable", default="nothing")
    variable.set("the request's")
    [first, _] = site.ask(source=lambda stream: stream.send(variable.get())).to_the_end()
    assert first.data == "nothing"


def raise_from_a_generator() -> Any:
    def generator() -> Iterator[str]:
        yield "a"
        raise RuntimeError("the password is swordfish")

    return generator()


def raise_from_a_function() -> Any:
    def feed(stream: Stream) -> None:
        stream.send("a")
        raise RuntimeError("the password is swordfish")

    return feed


def send_what_is_no_event() -> Any:
    return ["a", {"swordfish"}]  # JSON knows no sets


@pytest.mark.parametrize("make", [raise_from_a_generator, raise_from_a_function, send_what_is_no_event])
def test_what_a_source_raises_is_logged_once_and_not_shown_to_the_client(
    make: Callable[[], Any], site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    answer = site.ask(source=make())
    assert [event.data for event in answer.to_the_end()] == ["a"]
    assert site.ended == [CloseReason.ERROR]
    assert b"swordfish" not in answer.raw
    assert b"id: end" not in answer.raw  # it was no end for good: the client may come back
    wait_for(lambda: caplog.records, "the error is logged")
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.exc_info is not None


def test_the_end_of_another_stream_is_an_error_of_the_source_that_sends_to_it(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    other = Stream(site.manager)
    other.close()
    assert site.ask(source=lambda _: other.send("too late")).to_the_end() == []
    assert site.ended == [CloseReason.ERROR]


def test_a_source_that_is_told_to_exit_ends_its_stream(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(BaseException):
        """As gevent's Timeout and GreenletExit are, it is no Exception."""

    def feed(stream: Stream) -> None:
        stream.send("a")
        raise Stop

    # The runtime tells of it in its own way: a thread by this hook.
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    assert [event.data for event in site.ask(source=feed).to_the_end()] == ["a"]
    assert site.ended == [CloseReason.ERROR]
    threads = threading.enumerate
    wait_for(lambda: "sse-source" not in [thread.name for thread in threads()], "the source's thread has ended")


def test_a_source_ends_when_its_client_leaves(site: Site) -> None:
    source = Source()
    answer = site.ask(source=source.numbers())
    answer.until(2)
    assert not source.ended
    answer.close()
    wait_for(lambda: source.ended, "the generator is closed")
    assert site.ended == [CloseReason.PEER]


def test_a_function_that_sends_is_told_when_its_client_has_left(site: Site) -> None:
    told: list[str] = []

    def feed(stream: Stream) -> None:
        try:
            while True:
                stream.send("more")
                time.sleep(0.005)
        finally:
            told.append("over")

    answer = site.ask(source=feed)
    answer.until(2)
    answer.close()
    wait_for(lambda: told, "the function ends")
    assert site.ended == [CloseReason.PEER]


def test_a_source_waits_for_a_reader_that_is_slower(make_site: MakeSite) -> None:
    site = make_site(queue_events=5)
    taken: list[int] = []

    def numbers() -> Iterator[str]:
        for number in range(100):
            taken.append(number)
            yield str(number)

    answer = site.ask(source=numbers())
    wait_for(lambda: len(taken) == 6, "five wait in the queue and one outside")
    time.sleep(0.05)
    assert len(taken) == 6
    assert [event.data for event in answer.to_the_end()] == [*map(str, range(100)), ""]


# The end of a body


def test_a_body_that_is_closed_before_it_is_read_leaves_no_stream(site: Site) -> None:
    answer = site.ask()
    assert site.manager.count_all() == 1
    answer.close()
    assert site.manager.count_all() == 0
    assert site.ended == [CloseReason.PEER]
    answer.close()  # twice is once
    assert list(answer.chunks) == []


@pytest.mark.parametrize("with_source", [False, True])
def test_a_body_that_is_thrown_away_leaves_no_stream(with_source: bool, site: Site) -> None:
    source = Source()
    answer = site.ask(source=source.numbers()) if with_source else site.ask()
    assert site.manager.count_all() == 1
    del answer
    gc.collect()
    wait_for(lambda: site.manager.count_all() == 0, "the stream is gone")
    assert site.ended == [CloseReason.PEER]
    assert not with_source or wait_for(lambda: source.ended, "the generator is closed")


def test_a_start_response_that_raises_leaves_no_stream(site: Site) -> None:
    def start_response(*_: Any) -> Any:
        raise OSError("the server had enough")

    with pytest.raises(OSError, match="enough"):
        respond(site.manager, environ_of(), start_response)
    gc.collect()
    wait_for(lambda: site.manager.count_all() == 0, "the stream is gone")


def test_a_head_request_closes_the_source_and_the_stream(site: Site) -> None:
    source, ran = no_generator_begun()
    stream = Stream(site.manager)
    answer = site.ask("", "HEAD", stream=stream, source=source)
    assert (answer.status, answer.text()) == (200, "")
    assert next(source, "closed") == "closed"
    assert ran == []
    assert stream.closed
    assert site.manager.stats().opened == 0


def test_a_reader_that_waits_is_woken_by_another_thread(site: Site) -> None:
    answer = site.ask("connectKey=news")
    next(answer.chunks)
    thread = threading.Timer(0.02, site.manager.publish, ("news", "from a thread"))
    thread.start()
    assert answer.data(1) == ["from a thread"]
    thread.join()


def test_a_reader_that_waits_is_told_when_the_application_closes_its_key(site: Site) -> None:
    answer = site.ask("connectKey=news")
    next(answer.chunks)
    thread = threading.Timer(0.02, site.manager.close, ("news",))
    thread.start()
    [last] = answer.to_the_end()
    assert (last.event, last.id) == ("close", "end")
    thread.join()
    assert site.ended == [CloseReason.KICKED]


# The middleware


def rest(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"the application"]


@pytest.mark.parametrize("path", ["/", "", "/stream/", "/stream/more", "/STREAM", "/streams"])
def test_the_middleware_leaves_other_paths_to_the_application(path: str, site: Site) -> None:
    answer = Answer(SSEMiddleware(rest, site.manager), environ_of(path=path))
    assert answer.text() == "the application"
    assert site.manager.count_all() == 0


@pytest.mark.parametrize("path", ["/stream", "/events/live", "/größe"])
def test_the_middleware_answers_its_path_with_streams(path: str, make_site: MakeSite) -> None:
    site = make_site(path=path)
    # WSGI hands a path over as Latin-1, whatever it is.
    environ = environ_of("connectKey=news", path=path.encode().decode("latin-1"))
    answer = Answer(SSEMiddleware(rest, site.manager), environ)
    assert answer.headers["content-type"] == "text/event-stream"
    site.manager.publish("news", "hi")
    assert answer.data(1) == ["hi"]


def test_the_middleware_without_a_path_leaves_everything_to_the_application(make_site: MakeSite) -> None:
    site = make_site(path=None)
    middleware = SSEMiddleware(rest, site.manager)
    environ = environ_of(path="/")
    del environ["PATH_INFO"]  # A server may leave out what is empty (PEP 3333).
    assert Answer(middleware, environ).text() == "the application"
    assert Answer(middleware, environ_of(path="/stream")).text() == "the application"


# Accept


@pytest.mark.parametrize(
    ("accept", "accepted"),
    [
        ("", True),
        ("  ", True),
        ("text/event-stream", True),
        ("Text/Event-Stream", True),
        ("text/event-stream; charset=utf-8", True),
        ("text/*", True),
        ("*/*", True),
        ("text/html, */*;q=0.1", True),
        ("text/html,text/event-stream ; q=0.5", True),
        ("text/html", False),
        ("application/json, text/plain", False),
        ("text/event-stream;q=0", False),
        ("text/event-stream;q=0, */*", False),
        ("*/*, text/event-stream;q=0.0", False),
        ("text/*;q=0, */*", False),
        ("text/*;q=0, text/event-stream", True),
        ("*/*;q=0", False),
        ("text/event-stream;q=high", False),
        ("text/event-streams", False),
        ("*", False),
    ],
)
def test_the_most_specific_range_of_an_accept_header_decides(accept: str, accepted: bool) -> None:
    assert accepts_event_stream(accept) is accepted


# The client's socket


class RecordingSocket:
    def __init__(self) -> None:
        self.options: list[tuple[int, int, int]] = []
        self.shut = threading.Event()

    def setsockopt(self, level: int, option: int, value: int) -> None:
        self.options.append((level, option, value))

    def shutdown(self, how: int) -> None:
        self.shut.set()


@pytest.mark.parametrize("key", ["gunicorn.socket", "gunicorn.sock", "werkzeug.socket"])
def test_a_client_that_does_not_read_is_cut_off_where_the_server_shows_its_socket(
    key: str, make_site: MakeSite
) -> None:
    site = make_site(queue_events=3, send_buffer=65536)
    client = RecordingSocket()
    answer = site.ask("connectKey=news", environ={key: client, "SERVER_PROTOCOL": "HTTP/1.1"})
    assert 65536 in [value for _, _, value in client.options]
    next(answer.chunks)
    for number in range(10):
        site.manager.publish("news", str(number))
    wait_for(client.shut.is_set, "the connection is cut")
    assert site.ended == [CloseReason.SLOW]
    with contextlib.suppress(StopIteration):
        raise AssertionError(next(answer.chunks))


def test_a_refused_client_keeps_its_socket_as_it_was(make_site: MakeSite) -> None:
    client = RecordingSocket()
    site = make_site(public_keys="news")
    assert site.ask("connectKey=secret", environ={"werkzeug.socket": client}).status == 403
    assert client.options == []


def test_several_processes_with_a_log_in_memory_are_warned_of_once(
    make_site: MakeSite, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def open_one(site: Site, several: bool) -> None:
        environ = {"REQUEST_METHOD": "GET", "QUERY_STRING": "", "wsgi.multiprocess": several}
        body = respond(site.manager, environ, lambda status, headers: None)
        body.close()  # type: ignore[attr-defined]

    site = make_site()
    open_one(site, False)
    assert caplog.text == ""
    open_one(site, True)
    open_one(site, True)
    assert caplog.text.count("SSE_BROKER_URL is memory://") == 1
    assert "sqlite:///path" in caplog.text
    caplog.clear()
    open_one(make_site(broker_url=f"sqlite:///{tmp_path}/log.db"), True)
    assert caplog.text == ""
