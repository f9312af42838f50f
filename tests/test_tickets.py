"""Tickets: what they are bound to, what is refused, how a stream that has one ends, and who never gets to see one."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
from fakes import Clock, House, RecordingTransport
from flask import Flask, abort
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from itsdangerous import TimestampSigner, URLSafeSerializer, URLSafeTimedSerializer
from support import wait_for
from werkzeug.test import EnvironBuilder, TestResponse, run_wsgi_app

from flask_sse_stream import SSE, AccessDenied, CloseReason, EventDecoder, EventError, Settings, SettingsError, Ticket
from flask_sse_stream.extension import stream_opened
from flask_sse_stream.stream import Stream
from flask_sse_stream.tickets import Tickets
from flask_sse_stream.wsgi import respond

SECRET = "the secret of a test"
ON = Settings(tickets=True)
Get = Callable[..., TestResponse]


@pytest.fixture
def app() -> Iterator[Flask]:
    app = Flask("an_app")
    app.secret_key = SECRET
    app.config.update(SSE_TICKETS=True, SSE_PING_INTERVAL=0)
    yield app
    manager = app.extensions.get("sse_stream")
    if manager is not None:
        manager.shutdown()


@pytest.fixture(params=["Flask's way", "the short way"])
def get(app: Flask, request: pytest.FixtureRequest) -> Iterator[Get]:
    """Ask for a stream; its response is closed after the test."""
    responses: list[TestResponse] = []
    if request.param == "Flask's way":
        app.before_request(lambda: None)

    def get(path: str = "/stream", **options: Any) -> TestResponse:
        request = EnvironBuilder(path, **options).get_request()
        response = TestResponse(*run_wsgi_app(app, request.environ), request=request)
        responses.append(response)
        return response

    yield get
    for response in responses:
        response.close()


def streams(app: Flask) -> list[Stream]:
    return list(app.extensions["sse_stream"]._rounds.streams)


# What a ticket is good for


def test_without_a_ticket_nothing_is_open(app: Flask, get: Get) -> None:
    sse = SSE(app, public_keys=["*", "news"])
    for query in ("", "?connectKey=news", "?ticket=", "?ticket=x&connectKey=news"):
        response = get("/stream" + query)
        assert (response.status_code, response.headers["WWW-Authenticate"].strip()) == (401, "Bearer"), query
    assert (sse.count_all(), sse.stats().opened) == (0, 0)


def test_a_ticket_opens_its_keys_and_no_others(app: Flask, get: Get) -> None:
    sse = SSE(app)
    ticket = sse.ticket(["a", "b"], user=7)
    for query, expected in (
        ("", ("a", "b")),
        ("&connectKey=b", ("b",)),
        ("&connectKey=b&connectKey=a", ("b", "a")),
    ):
        response = get(f"/stream?ticket={ticket}{query}")
        assert response.status_code == 200
        assert streams(app)[-1].keys == expected
    for query in ("&connectKey=c", "&connectKey=a&connectKey=c", "&connectKey=ab", "&connectKey=A", "&connectKey=*"):
        assert get(f"/stream?ticket={ticket}{query}").status_code == 403, query
    assert get(f"/stream?ticket={ticket}&connectKey=").status_code == 400
    assert sse.stats().opened == 3


def test_a_ticket_comes_in_a_header_too_and_that_one_counts(app: Flask, get: Get) -> None:
    sse = SSE(app)
    good, bad = sse.ticket("a"), sse.ticket("b") + "x"
    for scheme in ("Bearer", "bearer", "BEARER"):
        response = get(f"/stream?ticket={bad}", headers={"Authorization": f"{scheme}  {good} "})
        assert (response.status_code, streams(app)[-1].keys) == (200, ("a",))
    assert get(f"/stream?ticket={good}", headers={"Authorization": f"Bearer {bad}"}).status_code == 401
    # What belongs to something else on the way leaves the query to count.
    assert get(f"/stream?ticket={good}", headers={"Authorization": "Basic dTpw"}).status_code == 200


def test_a_ticket_needs_no_escaping_in_a_url(app: Flask) -> None:
    sse = SSE(app)
    for keys in (["a"], ["größe – 日本 🦊", "a&b=c?d#e%f+g h/i"], [str(number) * 50 for number in range(100)]):
        assert set(sse.ticket(keys, user="ü")) <= set(
            "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_."
        )


def test_the_url_of_a_stream_has_all_it_needs(app: Flask, get: Get) -> None:
    sse = SSE(app, ticket_param="t", path="/events")
    with app.test_request_context():
        url = sse.url_for_stream(["a", "b"], user="ann", ttl=60, last_event_id="place-5")
        assert sse.url_for_stream("a", _external=True, theme="dark").startswith("http://localhost/events?t")
    response = get(url)
    assert b"stream-reset" in next(response.response), "it came with the cursor, which leads nowhere"  # type: ignore[call-overload]
    [stream] = streams(app)
    assert (stream.keys, stream.ticket.user if stream.ticket else None) == (("a", "b"), "ann")


def test_where_there_are_no_tickets_a_url_names_its_keys(app: Flask) -> None:
    sse = SSE(app, tickets=False)
    with app.test_request_context():
        assert sse.url_for_stream(["a", "b b"]) == "/stream?connectKey=a&connectKey=b+b"
        for options in ({"user": "ann"}, {"ttl": 5}):
            with pytest.raises(SettingsError, match="protect nothing .* set SSE_TICKETS = True"):
                sse.url_for_stream("a", **options)  # type: ignore[arg-type]
    with app.app_context(), pytest.raises(SettingsError, match="protect nothing"):
        sse.ticket("a")


def test_without_an_endpoint_there_is_no_url(app: Flask) -> None:
    sse = SSE(app, path=None)
    with app.test_request_context(), pytest.raises(SettingsError, match="SSE_PATH is None"):
        sse.url_for_stream("a")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keys": []}, EventError, "1 to 100 keys, not 0"),
        ({"keys": [""]}, EventError, "key must have 1 to 255"),
        ({"keys": ["a\n"]}, EventError, "key must not contain"),
        ({"keys": [str(number) for number in range(101)]}, EventError, "1 to 100 keys, not 101"),
        ({"keys": "a", "user": ""}, ValueError, "user must be a whole number or 1 to 255"),
        ({"keys": "a", "user": "a\nb"}, ValueError, "user must be"),
        ({"keys": "a", "user": True}, ValueError, "user must be"),
        ({"keys": "a", "ttl": 0}, ValueError, "ttl must be seconds above 0"),
        ({"keys": "a", "ttl": -1}, ValueError, "ttl must be"),
        ({"keys": "a", "ttl": float("nan")}, ValueError, "ttl must be"),
        ({"keys": "a", "ttl": float("inf")}, ValueError, "ttl must be"),
        ({"keys": "a", "ttl": True}, ValueError, "ttl must be"),
        ({"keys": "a", "ttl": "60"}, ValueError, "ttl must be"),
        ({"keys": "a", "ttl": 86_401}, ValueError, "at most SSE_TICKET_MAX_TTL=86400"),
    ],
)
def test_a_ticket_that_cannot_be_is_the_callers_error(
    app: Flask, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    sse = SSE(app)
    with pytest.raises(error, match=message):
        sse.ticket(**options)


def test_without_a_secret_the_caller_is_told_what_to_do(app: Flask) -> None:
    app.secret_key = None
    sse = SSE(app)
    with pytest.raises(SettingsError, match="SECRET_KEY, which is not set: set app.config"):
        sse.ticket("a")
    app.config["SECRET_KEY"] = "set later"
    assert sse.ticket("a")


# What is refused


class Book:
    """Tickets as this application makes them, and what a stranger or an attacker would."""

    def __init__(self, namespace: str = "sse", secret: str = SECRET) -> None:
        self.tickets = Tickets(Settings(tickets=True, namespace=namespace), secret)
        self.payload = URLSafeSerializer("any").loads_unsafe(self.tickets.make("a"))[1]

    def signed(self, payload: Any) -> str:
        """Sign anything with the right secret and salt."""
        return str(self.tickets._serializer().dumps(payload))


def foreign() -> dict[str, str]:
    book = Book()
    good, other = book.tickets.make("a"), book.tickets.make("b")
    body, _, signature = good.rpartition(".")
    form, keys, user, issued, expires = book.payload
    return {
        "another secret": Book(secret="another").tickets.make("a"),
        "another namespace": Book(namespace="other").tickets.make("a"),
        "the right secret, no salt": str(URLSafeSerializer(SECRET).dumps(book.payload)),
        "Flask's session salt": str(URLSafeTimedSerializer(SECRET, salt="cookie-session").dumps(book.payload)),
        "no signature": body,
        "an empty signature": body + ".",
        "a signature of another ticket": body + "." + other.rpartition(".")[2],
        "a body of another ticket": other.rpartition(".")[0] + "." + signature,
        "truncated": good[:-1],
        "half of it": good[: len(good) // 2],
        "with something behind": good + "A",
        "alg none": "eyJhbGciOiJub25lIn0.eyJrZXlzIjpbImEiXX0.",
        "a time signature": str(TimestampSigner(SECRET).sign(body).decode()),
        "another form": book.signed([99, keys, user, issued, expires]),
        "too short": book.signed([form, keys]),
        "no list": book.signed({"keys": ["a"]}),
        "no end": book.signed([form, keys, user, issued, None]),
        "a time that is none": book.signed([form, keys, user, issued, "never"]),
        "keys that are none": book.signed([form, 5, user, issued, expires]),
        "expired": book.signed([form, keys, user, issued - 100, issued - 50]),
        "longer than any may": book.signed([form, keys, user, issued, issued + 100_000]),
        "not ASCII": "ü" * 10,
        "NUL": "\0",
        "64 KB": "A" * 65_537,
    }


@pytest.mark.parametrize("what", foreign())
def test_what_is_no_ticket_of_ours_is_a_401_before_a_byte_of_the_stream(app: Flask, get: Get, what: str) -> None:
    sse = SSE(app)
    response = get("/stream", query_string={"ticket": foreign()[what]})
    assert response.status_code == 401
    assert not response.headers["Content-Type"].startswith("text/event-stream")
    assert sse.stats().opened == 0


def test_a_ticket_is_good_until_its_time_and_not_longer(app: Flask, get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    sse = SSE(app)
    ticket = sse.ticket("a", ttl=50)
    real = Ticket("a").issued
    monkeypatch.setattr("flask_sse_stream.access.now", lambda: real + 49)
    assert get(f"/stream?ticket={ticket}").status_code == 200
    monkeypatch.setattr("flask_sse_stream.access.now", lambda: real + 51)
    assert get(f"/stream?ticket={ticket}").status_code == 401


def test_an_older_secret_is_accepted_while_it_is_a_fallback_and_not_signed_with(app: Flask, get: Get) -> None:
    sse = SSE(app)
    old = sse.ticket("a")
    app.config.update(SECRET_KEY="a new one", SECRET_KEY_FALLBACKS=[SECRET, "an even older one"])
    new = sse.ticket("a")
    assert [get(f"/stream?ticket={ticket}").status_code for ticket in (old, new)] == [200, 200]
    app.config["SECRET_KEY_FALLBACKS"] = []
    assert [get(f"/stream?ticket={ticket}").status_code for ticket in (old, new)] == [401, 200]


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
key_lists = st.lists(st.one_of(texts, st.sampled_from(["a", "b", "a:b", 'a","b', "é", "e\u0301", "*"])), min_size=1)


@hypothesis_settings(deadline=None)
@given(one=key_lists, other=key_lists)
def test_a_ticket_is_bound_to_exactly_its_keys(one: list[str], other: list[str]) -> None:
    tickets = Tickets(ON, SECRET)
    text = tickets.make(one)
    assert tickets.read(text).keys == tuple(dict.fromkeys(one))
    if set(other) <= set(one):
        assert tickets.admit(other, text)[0] == tuple(dict.fromkeys(other))
    else:
        with pytest.raises(AccessDenied) as caught:
            tickets.admit(other, text)
        assert caught.value.status == 403


@hypothesis_settings(deadline=None)
@given(st.text(max_size=200), st.integers(0, 150), st.sampled_from(["ticket", "replace", "insert"]))
def test_whatever_is_sent_is_denied_unless_it_is_a_ticket_that_was_made(text: str, place: int, how: str) -> None:
    tickets = Tickets(ON, SECRET)
    good = tickets.make(["a", "b"])
    tried = {"ticket": text, "replace": good[:place] + text[:1] + good[place + 1 :], "insert": good[:place] + text}[how]
    if tried[:-1] == good[:-1] and len(tried) == len(good):
        return  # The last character of Base64 has bits that mean nothing.
    with pytest.raises(AccessDenied) as caught:
        tickets.read(tried)
    assert caught.value.status == 401


# Whoever may not see one


def test_a_ticket_is_in_no_log_no_answer_and_no_repr(
    app: Flask, get: Get, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    sse = SSE(app)
    good = sse.ticket("a", user="ann")
    tried = [good, good[:-2], good + "x", Book(secret="another").tickets.make("a")]
    said = []
    for text in tried:
        response = get(f"/stream?ticket={text}&connectKey=a")
        said.append(next(iter(response.response), b"").decode() + str(response.headers))  # type: ignore[call-overload]
        said.append(next(iter(get(f"/stream?ticket={text}&connectKey=b").response), b"").decode())  # type: ignore[call-overload]
    [stream] = streams(app)
    said += [repr(stream), repr(stream.ticket)]
    sse.revoke(user="ann")
    wait_for(lambda: stream.closed, "it is over")
    monkeypatch.setattr("flask_sse_stream.brokers.memory.MemoryBroker.marked", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        get(f"/stream?ticket={good}")
    said.append(caplog.text)
    for text in tried:
        for part in (text, text[:30], text.rpartition(".")[2]):
            assert all(part not in some for some in said)


def test_what_goes_wrong_does_not_quote_a_ticket() -> None:
    tickets = Tickets(ON, SECRET)
    text = tickets.make("a")[:-3]
    with pytest.raises(AccessDenied) as caught:
        tickets.read(text)
    error: BaseException | None = caught.value
    while error is not None:
        assert text[-10:] not in str(error)
        error = error.__cause__ or error.__context__


# How a stream ends with its ticket


def test_a_stream_ends_when_its_ticket_does_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    house = House(ping_interval=0)
    wall = 1_700_000_000.0
    monkeypatch.setattr("flask_sse_stream.access.now", lambda: wall + clock.now - 1000.0)

    def opened(expires: float | None) -> Stream:
        ticket = Ticket(["k"], expires=expires, issued=wall)
        return house.manager.open(["k"], RecordingTransport(), house.runtime, ticket=ticket)  # type: ignore[arg-type]

    long, short, endless = opened(wall + 100), opened(wall + 10), opened(None)
    assert 9 <= (house.flush() or 0) <= 10, "the flusher comes back for the first of them"
    clock.now += 9.9
    house.flush()
    assert [stream.reason for stream in (long, short, endless)] == [None, None, None]
    identifier = house.manager.publish("k", "before")
    clock.now += 0.2
    events = house.events(short)
    assert [(event.event, event.data) for event in events] == [
        (None, "before"),
        ("stream-expired", '{"reason": "expired"}'),
    ]
    assert (short.reason, house.decoders[short].last_event_id) == (CloseReason.EXPIRED, identifier)
    assert (long.reason, endless.reason) == (None, None)
    clock.now += 100
    house.flush()
    assert (long.reason, endless.reason) == (CloseReason.EXPIRED, None)


def test_those_who_leave_before_their_time_leave_nothing_behind() -> None:
    house = House(ping_interval=0)
    for _ in range(1000):
        ticket = Ticket(["k"], expires=Ticket("k").issued + 1000)
        house.manager.open(["k"], RecordingTransport(), house.runtime, ticket=ticket).close(CloseReason.PEER)  # type: ignore[arg-type]
    assert len(house.manager._rounds._ages) < 100


def test_a_page_goes_on_with_a_new_ticket_from_where_it_was(app: Flask, get: Get) -> None:
    sse = SSE(app)
    with app.test_request_context():
        first = get(sse.url_for_stream("a", ttl=0.3))
    seen = sse.publish("a", "seen")
    decoder = EventDecoder()
    events = [event for chunk in first.response for event in decoder.feed(chunk)]  # type: ignore[arg-type]
    assert [(event.event, event.data, event.id) for event in events] == [
        (None, "seen", seen),
        ("stream-expired", '{"reason": "expired"}', seen),
    ]
    assert sse.stats().closed == {"expired": 1}
    sse.publish("a", "missed")
    with app.test_request_context():
        again = get(sse.url_for_stream("a", last_event_id=decoder.last_event_id))
    assert [event.data for event in EventDecoder().feed(next(iter(again.response)))] == ["missed"]  # type: ignore[arg-type]
    # The header is the browser's own and newer.
    with app.test_request_context():
        newer = get(sse.url_for_stream("a", last_event_id="elsewhere-1"), headers={"Last-Event-ID": seen})
    assert [event.data for event in EventDecoder().feed(next(iter(newer.response)))] == ["missed"]  # type: ignore[arg-type]


# Together with a function that decides


def test_the_function_sees_the_tickets_keys_and_may_only_narrow_them(app: Flask, get: Get) -> None:
    sse = SSE(app)
    asked: list[Any] = []
    answer: list[Any] = []

    @sse.authorize
    def decide(keys: Any) -> Any:
        asked.append(keys)
        if answer == ["lost"]:
            abort(404)
        return answer[0] if answer and isinstance(answer[0], Ticket) else answer

    url = "/stream?ticket=" + sse.ticket(["a", "b"], user="ann", ttl=100)
    for keys, status in ((["a"], 200), (["a", "b"], 200), ([], 403), (["a", "c"], 403), (["lost"], 404)):
        answer[:] = keys
        assert get(url).status_code == status, keys
    assert asked == [("a", "b")] * 5
    answer[:] = ["b"]
    assert get(url + "&connectKey=b").status_code == 200
    assert asked[-1] == ("b",)
    assert get("/stream").status_code == 401
    assert len(asked) == 6, "without a ticket nobody is asked"
    answer[:] = [Ticket("a", user="bob", expires=Ticket("a").issued + 5)]
    assert get(url).status_code == 200
    ticket = streams(app)[-1].ticket
    assert ticket is not None
    assert (ticket.user, 0 < (ticket.left() or 0) <= 5) == ("bob", True), "the earlier end counts"


def test_a_function_may_say_whose_stream_it_is_and_when_it_ends(app: Flask, get: Get) -> None:
    sse = SSE(app, tickets=False)
    ends: list[float | None] = [None]

    @sse.authorize
    def decide(keys: Any) -> Ticket:
        return Ticket(keys, user=5, expires=ends[0])

    assert get("/stream?connectKey=a").status_code == 200
    [stream] = streams(app)
    assert stream.ticket is not None
    assert (stream.keys, stream.ticket.user, stream.ticket.expires) == (("a",), "5", None)
    sse.revoke(user=5)
    wait_for(lambda: stream.reason is CloseReason.EXPIRED, "it is ended")
    ends[0] = Ticket("a").issued + 0.2
    assert get("/stream?connectKey=a").status_code == 200, "who is asked again may say yes again"
    wait_for(lambda: sse.stats().closed == {"expired": 2}, "it expires")


@pytest.mark.parametrize("bad", [{"expires": "tomorrow"}, {"expires": float("nan")}, {"issued": True}, {"user": 1.5}])
def test_a_ticket_that_makes_no_sense_cannot_be_made(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Ticket("a", **bad)


# Without Flask


def test_a_bare_application_reads_tickets_itself() -> None:
    house = House(tickets=True, ping_interval=0)
    tickets = Tickets(house.manager.settings, [b"new", b"old"])

    def application(environ: Any, start_response: Any) -> Any:
        try:
            keys, ticket = tickets.of(environ)
        except AccessDenied as error:
            start_response(f"{error.status} No", [])
            return []
        return respond(house.manager, environ, start_response, keys=keys, ticket=ticket)

    def ask(text: str) -> str:
        return run_wsgi_app(application, EnvironBuilder("/", query_string={"ticket": text}).get_environ())[1]

    assert ask(Tickets(house.manager.settings, "old").make("a")) == "200 OK"
    assert ask(tickets.make("a")) == "200 OK"
    assert ask("no") == "401 No"
    _, status, headers = run_wsgi_app(
        lambda environ, start_response: respond(house.manager, environ, start_response),
        EnvironBuilder("/").get_environ(),
    )
    assert (status, headers["WWW-Authenticate"]) == ("401 Unauthorized", "Bearer"), "nothing is open by mistake"
    house.manager.shutdown()


def test_a_receiver_that_asks_for_the_request_has_it_with_a_ticket_too(app: Flask, get: Get) -> None:
    sse = SSE(app)
    users: list[str | None] = []

    def receive(sender: Flask, stream: Stream) -> None:
        users.append(stream.ticket.user if stream.ticket else None)

    with stream_opened.connected_to(receive, app):
        assert get("/stream?ticket=" + sse.ticket("a", user="ann")).status_code == 200
    assert users == ["ann"]
    assert json.loads('{"reason": "expired"}')["reason"] == CloseReason.EXPIRED.value
