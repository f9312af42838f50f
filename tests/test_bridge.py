"""A bridge turns what other software publishes on a channel of Redis's into events of a pool, each once."""

from __future__ import annotations

import functools
import json
import logging
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest
from fakes import House
from redis_server import RedisServer
from support import wait_for

from flask_sse_stream.bridge import Bridge
from flask_sse_stream.errors import EventError, SettingsError
from flask_sse_stream.event import Event


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


MakeHouse = Callable[..., House]


@pytest.fixture
def make_house(server: RedisServer) -> Iterator[MakeHouse]:
    houses: list[House] = []
    namespace = f"test-{secrets.token_hex(4)}"

    def make(**options: Any) -> House:
        house = House(**{"broker_url": server.url, "namespace": namespace, **options})
        houses.append(house)
        return house

    yield make
    for house in houses:
        house.manager.shutdown()


def up(*bridges: Bridge) -> Bridge:
    """Wait until one of the bridges listens, and give that one."""
    return wait_for(lambda: next((bridge for bridge in bridges if bridge.stats().up), None), "one listens")  # type: ignore[return-value]


def say(server: RedisServer, channel: str, *messages: str | bytes) -> None:
    for message in messages:
        server.cli("PUBLISH", channel, message)


def wait_for_events(house: House, stream: Any, number: int) -> list[Event]:
    found: list[Event] = []
    wait_for(lambda: found.extend(house.events(stream)) or len(found) >= number, f"{number} events")
    return found


def test_each_message_of_a_channel_is_an_event_of_the_pool(make_house: MakeHouse, server: RedisServer) -> None:
    house = make_house()
    bridge = Bridge(house.manager, "orders", "news", event="order")
    stream = house.open("news")  # with the first stream it begins
    up(bridge)
    say(server, "orders", '{"number": 7}', "ü\nx", "")
    assert [(event.event, event.data) for event in wait_for_events(house, stream, 3)] == [
        ("order", '{"number": 7}'),
        ("order", "ü\nx"),
        ("order", ""),
    ]
    wait_for(lambda: bridge.stats()[:4] == (True, 3, 0, 0), "they are counted")


def test_what_came_by_a_bridge_is_replayed_as_anything_else(make_house: MakeHouse, server: RedisServer) -> None:
    house = make_house()
    bridge = Bridge(house.manager, "orders", "news")
    stream = house.open("news")
    cursor = house.cursor(stream)
    up(bridge)
    stream.close()
    say(server, "orders", "1", "2")
    wait_for(lambda: bridge.stats().published == 2, "both are published")
    assert house.data(house.open("news", after=cursor)) == ["1", "2"]


def test_a_pattern_and_a_function_choose_the_pool(make_house: MakeHouse, server: RedisServer) -> None:
    def to(channel: str, text: str) -> str | tuple[str, Any] | None:
        if text == "nobody":
            return None
        if text == "raise":
            raise LookupError(text)
        if text == "event":
            return channel, Event("made", event="own")
        if text == "json":
            return channel, {"n": 1}
        return channel

    house = make_house()
    bridge = Bridge(house.manager, "shop:*", to)
    stream = house.open("shop:a", "shop:b")
    up(bridge)
    say(server, "shop:a", "1", "nobody", "raise", b"\xff", "event")
    say(server, "shop:b", "json", "2")
    say(server, "other", "3")
    events = wait_for_events(house, stream, 4)
    assert [(event.event, event.data) for event in events] == [
        (None, "1"),
        ("own", "made"),
        (None, '{"n":1}'),
        (None, "2"),
    ]
    wait_for(lambda: bridge.stats().published == 4, "they are counted")
    assert bridge.stats().skipped == 3


def test_a_backslash_takes_away_what_a_character_means(make_house: MakeHouse, server: RedisServer) -> None:
    house = make_house()
    bridge = Bridge(house.manager, r"what\?", "news")
    stream = house.open("news")
    up(bridge)
    say(server, "whatx", "no")
    say(server, "what?", "yes")
    assert [event.data for event in wait_for_events(house, stream, 1)] == ["yes"]


def test_a_broker_that_reaches_no_other_process_may_have_a_bridge_too(
    make_house: MakeHouse, server: RedisServer
) -> None:
    house = make_house(broker_url="memory://")
    bridge = Bridge(house.manager, "orders", "news", url=server.url)
    stream = house.open("news")
    up(bridge)
    say(server, "orders", "1")
    assert [event.data for event in wait_for_events(house, stream, 1)] == ["1"]


def test_one_process_of_several_listens_and_another_takes_over_when_it_stops(
    make_house: MakeHouse, server: RedisServer
) -> None:
    houses = [make_house() for _ in range(3)]
    bridges = {Bridge(house.manager, "orders", "news"): house for house in houses}
    streams = {house: house.open("news") for house in houses}
    holder = up(*bridges)
    say(server, "orders", "1", "2")
    for house, stream in streams.items():
        assert [event.data for event in wait_for_events(house, stream, 2)] == ["1", "2"]
    holder.stop()
    other = up(*bridges)
    assert other is not holder
    say(server, "orders", "3")
    for house, stream in streams.items():
        assert [event.data for event in wait_for_events(house, stream, 1)] == ["3"]


def test_the_lease_of_a_process_that_was_killed_goes_to_another(
    make_house: MakeHouse, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_sse_stream.bridge.LEASE_SECONDS", 1.5)
    dead, alive = make_house(), make_house()
    bridge = Bridge(alive.manager, "orders", "news")
    assert dead.manager.lease(bridge._lease, 1.5)  # and is never heard of again
    bridge.start()
    up(bridge)


def to_its_own(channel: str, text: str) -> str:
    return channel


def to_news(channel: str, text: str) -> str:
    return "news"


class Shop:
    def to(self, channel: str, text: str) -> str:
        return "shop"

    def __call__(self, channel: str, text: str) -> str:
        return "shop"


def test_bridges_that_differ_do_not_wait_for_each_other(make_house: MakeHouse, server: RedisServer) -> None:
    elsewhere = server.url.replace("127.0.0.1", "localhost")
    some: list[dict[str, Any]] = [
        {"channel": "orders", "to": "news"},
        {"channel": "orders", "to": "other"},
        {"channel": "orders", "to": "news", "event": "order"},
        {"channel": "orders", "to": "news", "url": elsewhere},
        {"channel": "orders", "to": to_its_own},
        {"channel": "orders", "to": to_news},
        {"channel": "x" * 254 + "y", "to": "news"},
        {"channel": "x" * 254 + "z", "to": "news"},
    ]
    bridges = [Bridge(make_house().manager, **arguments) for arguments in some]
    for bridge in bridges:
        bridge.start()
    wait_for(lambda: all(bridge.stats().up for bridge in bridges), "each listens in its own process")


def leases() -> list[str]:
    manager = House().manager
    targets = ["news", to_its_own, functools.partial(to_its_own), lambda channel, text: None, Shop(), Shop().to]
    made = [Bridge(manager, "orders", to, url="redis://localhost")._lease for to in targets]
    urls = [
        "redis://localhost:6379/0",
        "redis+sentinel://one,two/news/0",
        "redis+sentinel://:secret@two,one:26379/news",
    ]
    return made + [Bridge(manager, "orders", "news", url=url)._lease for url in urls]


def test_a_bridge_is_the_same_in_every_process() -> None:
    here = leases()
    found = subprocess.run(
        [sys.executable, "-c", "import json, test_bridge; print(json.dumps(test_bridge.leases()))"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "1"},
        check=True,
        capture_output=True,
    )
    assert json.loads(found.stdout) == here
    news, own, partial, anonymous, shop, bound, written_out, sentinels, other_order = here
    assert own == partial
    assert news == written_out
    assert sentinels == other_order
    assert len({news, own, anonymous, shop, bound, sentinels}) == 6


def test_a_bridge_listens_again_after_its_connection_was_cut(make_house: MakeHouse, server: RedisServer) -> None:
    house = make_house()
    bridge = Bridge(house.manager, "orders", "news")
    stream = house.open("news")
    up(bridge)
    server.cli("CLIENT", "KILL", "TYPE", "pubsub")
    wait_for(lambda: not bridge.stats().up, "it notices")
    up(bridge)
    say(server, "orders", "1")
    assert [event.data for event in wait_for_events(house, stream, 1)] == ["1"]


def test_a_redis_that_hangs_is_noticed(make_house: MakeHouse, server: RedisServer, tmp_path: Any) -> None:
    with RedisServer(tmp_path / "foreign") as foreign:
        house = make_house(broker_url="memory://")
        bridge = Bridge(house.manager, "orders", "news", url=foreign.url)
        bridge.start()
        up(bridge)
        with foreign.paused():
            wait_for(lambda: "did not answer" in bridge.stats().error, "it is noticed")
        up(bridge)


def test_a_bridge_that_is_told_to_runs_without_any_stream_until_it_is_stopped(
    make_house: MakeHouse, server: RedisServer
) -> None:
    house = make_house()
    bridge = Bridge(house.manager, "orders", "news")
    assert bridge.stats() == (False, 0, 0, 0, "")
    bridge.start()
    bridge.start()
    up(bridge)
    bridge.stop()
    assert not bridge.stats().up


def test_no_greenlet_waits_for_what_a_bridge_waits_for(make_house: MakeHouse, server: RedisServer) -> None:
    house = make_house()
    threads: list[int] = []  # greenlets, where threads are patched

    def to(channel: str, text: str) -> str:
        threads.append(threading.get_ident())
        return "news"

    bridge = Bridge(house.manager, "orders", to)

    def listen() -> None:
        bridge.start()
        with gevent.Timeout(20):
            while not threads:
                say(server, "orders", "1")
                gevent.sleep(0.05)

    gevent.spawn(listen).get()
    assert threading.get_ident() not in threads


def test_messages_that_the_log_does_not_take_are_counted_and_said(
    make_house: MakeHouse, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    house = make_house()
    bridge = Bridge(house.manager, "orders", "broken")
    server.cli("SET", f"{{{house.manager.settings.namespace}}}:k:broken", "somebody else's")
    bridge.start()
    up(bridge)
    with caplog.at_level(logging.ERROR):
        say(server, "orders", "1")
        wait_for(lambda: bridge.stats().failed == 1, "it is counted")
    assert "a message of 'orders' was lost" in caplog.text
    assert "WRONGTYPE" in bridge.stats().error
    deadline = time.monotonic() + 1
    wait_for(lambda: time.monotonic() > deadline or not bridge.stats().up, "it goes on")
    assert bridge.stats().up


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"channel": "", "to": "news"}, EventError, "the channel of a bridge must have 1 to 255"),
        ({"channel": "a", "to": ""}, EventError, "key must have 1 to 255"),
        ({"channel": "a", "to": "news", "event": "x\ny"}, EventError, "event must not contain"),
        ({"channel": "a", "to": "news", "url": None}, SettingsError, "which 'memory://' is not: give its url="),
        ({"channel": "a", "to": "news", "url": "redis:/localhost"}, SettingsError, "which 'redis:/localhost' is not"),
        (
            {"channel": "a", "to": "news", "url": "redis+sentinel://"},
            SettingsError,
            "^the url of a bridge 'redis.sentinel://': write redis.sentinel://host",
        ),
    ],
)
def test_a_bridge_that_cannot_be_is_refused_at_once(arguments: Any, error: type[Exception], text: str) -> None:
    house = House()
    with pytest.raises(error, match=text):
        Bridge(house.manager, **{"url": "redis://localhost", **arguments})
