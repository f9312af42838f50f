"""Keys and cursors are data: in no broker has a character a meaning, and no cursor leads to another key's events."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from fakes import House
from flask import Flask
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from redis_server import RedisServer
from werkzeug.test import EnvironBuilder, run_wsgi_app

from flask_sse_stream import SSE, EventDecoder, EventError
from flask_sse_stream.brokers.redis_scripts import Names
from flask_sse_stream.pools import MAX_KEYS
from flask_sse_stream.stream import CloseReason

# All of them are keys, no two of them the same one.
HOSTILE = (
    "*", "?", "?[", "[a]", "a*", "\\", "a", "A", "a ", " a", "a:b", "a_b", "b_c", "a_b_c", "k:a", "k:k:a",
    "all", "None",
    "log", "keys", "once:a", "lease:a", "mark:a", "{sse}:all", "{a}", "}{", "%2A", "%00", "\\0", "a,b",
    '["a"]', "a\u2028b",
    "\u00e9", "e\u0301", "\u00c5", "\u212b", "\uff41", "\u0430", "\u202ea", "\u200b", "\ufeff", "\ufffd", "日本",
    "🦊", "0", "00",
    "' OR 1=1 --", "'; DROP TABLE event; --", 'redis.call("FLUSHALL")', "return KEYS[1]", "../../etc/passwd", "$(id)",
    "x" * 255, "🦊" * 255, "end", "default", "-", "+", "$", "(5",
)  # fmt: skip
NO_KEYS: tuple[Any, ...] = (
    "", "x" * 256, "x" * 10_240, "a\0", "\0", "a\nb", "a\r", "\x01", "\x1f", "a\x7f", "\x85", "\ud800", "a\udfff",
    None, 5, b"a", ("a", "b"), {"a": 1}, ["a"],
)  # fmt: skip


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["memory", "sqlite", "redis"])
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[House]:
    options: dict[str, Any] = {}
    if request.param == "sqlite":
        options = {"broker_url": f"sqlite:///{tmp_path}/log.db"}
    elif request.param == "redis":
        options = {"broker_url": request.getfixturevalue("redis").url, "namespace": f"test-{secrets.token_hex(4)}"}
    house = House(ping_interval=0, **options)
    yield house
    house.manager.shutdown()


# Keys


def test_each_key_gets_its_own_events_live_and_again(house: House) -> None:
    assert len(set(HOSTILE)) == len(HOSTILE)
    streams = {key: house.open(key) for key in HOSTILE}
    places = {key: house.cursor(stream) for key, stream in streams.items()}
    for number, key in enumerate(HOSTILE):
        house.manager.publish(key, f"event {number}")
    house.manager.publish_all("for all")
    for number, key in enumerate(HOSTILE):
        assert house.data(streams[key]) == [f"event {number}", "for all"], key
    for number, key in enumerate(HOSTILE):
        streams[key].close(CloseReason.PEER)
        assert house.data(house.open(key, after=places[key])) == [f"event {number}", "for all"], key


def test_a_key_ends_its_own_streams_and_no_others(house: House) -> None:
    streams = {key: house.open(key) for key in HOSTILE}
    for key in HOSTILE:
        assert house.manager.count(key) == 1
        assert house.manager.close(key) == 1
        assert streams.pop(key).closed
        assert not any(stream.closed for stream in streams.values())


def test_names_of_leases_and_idempotency_keys_are_told_apart_too(house: House) -> None:
    ids = {house.manager.publish("k", "x", idempotency_key=key) for key in HOSTILE}
    assert len(ids) == len(HOSTILE)
    assert all(house.manager.lease(key, 60) for key in HOSTILE)
    assert ids == {house.manager.publish("k", "x", idempotency_key=key) for key in HOSTILE}


@pytest.mark.parametrize("bad", NO_KEYS, ids=lambda bad: f"{bad!r:.20}")
def test_what_is_no_key_is_refused_before_anything_is_touched(bad: Any) -> None:
    house = House()
    stream = house.open("a")
    for refused in (
        lambda: house.manager.publish(bad, "x"),
        lambda: house.manager.close(bad),
        lambda: house.manager.count(bad),
        lambda: house.manager.open(["a", bad], stream.transport, house.runtime),  # type: ignore[arg-type]
    ):
        with pytest.raises(EventError, match="key must"):
            refused()
    assert house.data(stream) == []
    assert house.manager.stats().opened == 1


@pytest.mark.parametrize("way", ["Flask's way", "the short way"])
def test_what_is_no_key_is_a_bad_request_and_what_is_one_is_taken_as_it_is(way: str) -> None:
    app = Flask("an_app")
    sse = SSE(app, ping_interval=0)
    if way == "Flask's way":
        app.before_request(lambda: None)

    def ask(keys: list[Any]) -> int:
        environ = EnvironBuilder("/stream", query_string={"connectKey": keys}).get_environ()
        body, status, _ = run_wsgi_app(app, environ)
        bodies.append(body)
        return int(status[:3])

    bodies: list[Any] = []
    for key in HOSTILE:
        assert ask([key]) == 200
        assert sse.count(key) == 1, key
    for bad in NO_KEYS:
        if isinstance(bad, str) and bad.isprintable():
            assert ask(["a", bad]) == 400, bad
    assert ask([str(number) for number in range(MAX_KEYS + 1)]) == 400
    assert ask([str(number) for number in range(5000)]) == 400
    assert sse.count_all() == len(HOSTILE)
    for body in bodies:
        getattr(body, "close", int)()
    app.extensions["sse_stream"].shutdown()


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
keys = st.one_of(texts, st.sampled_from(HOSTILE))
namespaces = st.from_regex(r"[A-Za-z0-9._-]{1,8}", fullmatch=True)
kinds = st.sampled_from(["stream", "once", "lease", "mark"])


@hypothesis_settings(deadline=None)
@given(one=st.tuples(namespaces, kinds, keys), other=st.tuples(namespaces, kinds, keys))
def test_no_two_things_have_one_name_in_redis(one: tuple[str, str, str], other: tuple[str, str, str]) -> None:
    def names(namespace: str, kind: str, key: str) -> set[bytes]:
        given = Names(namespace)
        return {getattr(given, kind)(key), given.log, given.keys, given.stream(None)}

    assert len(names(*one)) == 4
    common = names(*one) & names(*other)
    if one[0] != other[0]:
        assert not common
    elif one != other:
        assert len(common) == 3


@hypothesis_settings(max_examples=50, deadline=None)
@given(one=keys, other=keys)
def test_no_two_keys_are_one_in_sqlite(one: str, other: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    if one == other:
        return
    house = House(broker_url=f"sqlite:///{tmp_path_factory.getbasetemp()}/{secrets.token_hex(8)}.db", join_history=9)
    try:
        house.manager.publish(one, "for one")
        house.manager.publish(other, "for another")
        assert house.data(house.open(one)) == ["for one"]
        assert house.data(house.open(other)) == ["for another"]
    finally:
        house.manager.shutdown()


# Cursors


def cursors(epoch: str) -> list[str]:
    """What an attacker would try, who has seen ids of other pools."""
    numbers = (-1, 0, 1, 2, 3, 4, 5, 10**15, 2**63, 2**64, 10**30)
    return [
        *(f"{epoch}-{number}" for number in numbers),
        *(f"{'0' * 12}-{number}" for number in (0, 3, 2**64)),
        f"{epoch}-00003", f"{epoch}-3 ", f" {epoch}-3", f"{epoch}-3,{epoch}-1", f"{epoch}-1, secret id",
        f"{epoch}-\u0663",
        f"{epoch}-3-1", f"{epoch.upper()}-3", f"{epoch}.3", f"{epoch}:3", f"{epoch}-*", "*-*", f"{epoch}-+",
        f"-{epoch}-3",
        "secret id", "secret  id", "SECRET ID", "id for all", "$", "-", "+", "*", "(", "(5", "0-0", "0", "1-1",
        "secret", "\0",
        "' OR 1=1 --", "'; DROP TABLE event; --", "return redis.call('KEYS', '*')", "\ud800", "🦊", "A" * 61_440,
        "end ",
        "END", "%00", "null", "undefined", "NaN", "[]", "{}",
    ]  # fmt: skip


def publish_some(house: House) -> str:
    """Let there be events of another's, some with ids of their own, and give the epoch."""
    house.manager.publish("secret", "SECRET 1")
    house.manager.publish("secret", "SECRET 2", id="secret id")
    house.manager.publish("mine", "mine 1")
    house.manager.publish_all("all 1", id="id for all")
    return house.manager.publish("secret", "SECRET 3").rpartition("-")[0]


def check(house: House, cursor: str) -> None:
    """Come with a cursor: what a client gets is its own, or it is told to begin anew, and in any case goes on."""
    stream = house.open("mine", after=cursor)
    house.manager.publish("secret", "SECRET live")
    house.manager.publish("mine", "live")
    events = house.events(stream)
    named = {event.event for event in events if event.event is not None}
    assert named <= {"stream-reset"}, cursor
    data = [event.data for event in events if event.event is None]
    assert data[-1:] == ["live"], cursor
    assert set(data) <= {"mine 1", "all 1", "live"}, cursor
    stream.close(CloseReason.PEER)


def test_no_cursor_opens_another_pool(house: House) -> None:
    for cursor in cursors(publish_some(house)):
        check(house, cursor)


SHARED = House(ping_interval=0)
EPOCH = publish_some(SHARED)
APP = Flask("an_app")
SSE(APP, ping_interval=0).publish("secret", "SECRET", id="secret id")


@hypothesis_settings(deadline=None)
@given(
    st.one_of(
        st.text(max_size=300), st.from_regex(rf"{EPOCH}-.{{0,20}}", fullmatch=True), st.sampled_from(cursors(EPOCH))
    )
)
def test_no_text_whatever_opens_another_pool(cursor: str) -> None:
    check(SHARED, cursor)


@hypothesis_settings(deadline=None)
@given(header=st.binary(max_size=200) | st.sampled_from(cursors(EPOCH)).map(lambda text: text.encode(errors="replace")))
def test_no_header_whatever_is_an_error_of_the_server(header: bytes) -> None:
    environ = EnvironBuilder("/stream?connectKey=mine").get_environ()
    environ["HTTP_LAST_EVENT_ID"] = header.decode("latin-1")
    body, status, _ = run_wsgi_app(APP, environ)
    first = next(iter(body), b"")
    getattr(body, "close", int)()
    if header == b"end":
        assert (status, first) == ("204 No Content", b"")
        return
    assert status == "200 OK"
    assert [event.event for event in EventDecoder().feed(first)] in ([], ["stream-reset"])
    assert b"SECRET" not in first
