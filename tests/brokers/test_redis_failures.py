"""Whatever happens to Redis: a publish makes one event or says in time that it may not have, and no client misses one
without being told."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import House
from history_checker import TOLERANCE, Book, Crowd, Reader, check, remembered, seen
from redis_server import PROGRAMS, RedisCluster, RedisServer, Sentinel
from support import wait_for

from flask_sse_stream.brokers.base import Broker, BrokerStats, Deliver, Idle, broker_from_url, never_idle
from flask_sse_stream.brokers.redis import RedisBroker
from flask_sse_stream.brokers.redis_link import Link
from flask_sse_stream.brokers.redis_listener import Listener
from flask_sse_stream.errors import BrokerError
from flask_sse_stream.pools import PoolManager
from flask_sse_stream.settings import Settings
from flask_sse_stream.testing.contracts.broker import body, place

TIMEOUT = Settings().broker_timeout
BACK_SECONDS = 5.0  # within which everything is as before, once Redis is back
NOTICED_SECONDS = 8.0  # until a silent Redis is called one that is away


@pytest.fixture
def crowd() -> Iterator[Crowd]:
    crowd = Crowd()
    try:
        yield crowd
    finally:
        crowd.close()


@pytest.fixture
def book() -> Book:
    return Book()


@pytest.fixture
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis", program=PROGRAMS[getattr(request, "param", "what the system has")]) as server:
        yield server


@pytest.fixture
def persistent(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis", persistent=True) as server:
        yield server


every_redis = pytest.mark.parametrize("server", PROGRAMS, indirect=True)


def health(house: House) -> BrokerStats:
    return house.manager.stats().broker


def wait_until_down(house: House) -> None:
    wait_for(lambda: not health(house).up and health(house).error, "stats() says that Redis is away", NOTICED_SECONDS)


def wait_until_up(house: House) -> None:
    wait_for(lambda: health(house).up, f"stats() says that Redis is back ({health(house)})", BACK_SECONDS)


def send(server: RedisServer, channel: str, payload: bytes) -> int:
    """Publish a message as anybody can, in every way there is; say how many listen."""
    ways = ("PUBLISH", "SPUBLISH") if server.version >= (7,) else ("PUBLISH",)
    return sum(int(server.cli(way, channel, payload)) for way in ways)


def go_on(crowd: Crowd, book: Book, publisher: House, text: str, *keys: str) -> None:
    """Publish to the keys, and see that within BACK_SECONDS of now all clients know of it. Redis has just come back."""
    begun = time.monotonic()
    for key in keys or ("k",):
        last = book.publish_until_it_works(publisher.manager, key, f"{text} {key}", BACK_SECONDS)
        for reader in crowd.readers:
            if key in reader.keys:
                left = max(0.1, BACK_SECONDS + TOLERANCE - (time.monotonic() - begun))
                reader.wait_until_it_knows(book, last, left)


# Redis goes and comes back


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_redis_that_persists_and_comes_back_has_lost_nothing_and_nobody_is_told_to_begin_anew(
    persistent: RedisServer, crowd: Crowd, book: Book, how: str
) -> None:
    one, two = crowd.house(persistent.url), crowd.house(persistent.url)
    readers = [crowd.reader(one), crowd.reader(two), crowd.reader(two, "k", "other")]
    for number in range(20):
        assert book.publish(one.manager, "k" if number % 3 else None, f"before {number}")
    for reader in readers:
        reader.wait_for("before 19")
    before = readers[0].cursor
    persistent.stop() if how == "stopped" else persistent.kill()
    for number in range(3):
        assert not book.publish(two.manager, "k", f"meanwhile {number}")
    assert "is it running?" in str(book.errors[-1])
    wait_until_down(one)
    persistent.start()
    go_on(crowd, book, two, "after", "k", "other")
    wait_until_up(one)
    assert health(one).reconnects >= 1
    late = crowd.reader(two, after=before)
    late.wait_for(readers[0].texts[-1])
    check(book, *readers)
    assert [reader.resets for reader in (*readers, late)] == [[], [], [], []]
    assert late.texts == [text for text in readers[0].texts if text.startswith("after")]
    assert seen(readers[0]) == remembered(persistent, "k", None)
    assert {reader.opened for reader in readers} == {1}


def test_a_redis_that_comes_back_empty_makes_everybody_begin_anew_within_seconds(
    server: RedisServer, crowd: Crowd, book: Book
) -> None:
    one, two = crowd.house(server.url), crowd.house(server.url)
    readers = [crowd.reader(one), crowd.reader(two, "k", "other")]
    book.publish(one.manager, "k", "before")
    for reader in readers:
        reader.wait_for("before")
    server.kill()
    server.start()
    for reader in readers:
        reset = reader.wait_for_reset(BACK_SECONDS)
        assert json.loads(str(reset.data)) == {"reason": "epoch", "keys": list(reader.keys)}
        assert place(str(reset.id))[0] != place(book.id("before"))[0]
    go_on(crowd, book, one, "after", "k", "other")
    # The id that it was told is one of the new log.
    late = crowd.reader(two, after=str(readers[0].resets[0].id))
    late.wait_for(readers[0].texts[-1])
    returning = crowd.reader(one, after=book.id("before"))
    returning.wait_for_reset()
    check(book, *readers)
    assert late.resets == []
    assert late.texts == readers[0].texts[1:]
    assert [len(reader.resets) for reader in readers] == [1, 1]


def test_a_redis_that_comes_back_with_an_older_state_resets_those_who_saw_more_and_them_alone(
    server: RedisServer, crowd: Crowd, book: Book
) -> None:
    house = crowd.house(server.url)
    ahead = crowd.reader(house)
    book.publish(house.manager, "k", "kept 1")
    book.publish(house.manager, "k", "kept 2")
    server.cli("SAVE")
    book.publish(house.manager, "k", "lost")
    ahead.wait_for("lost")
    lost = book.acknowledged.pop("lost")[1]
    book.unknown.add("lost")
    server.kill()
    server.start()
    ahead.wait_for_reset(BACK_SECONDS)
    go_on(crowd, book, house, "after")
    behind = crowd.reader(house, after=book.id("kept 1"))
    behind.wait_for(ahead.texts[-1])
    assert behind.resets == []
    assert behind.texts == ["kept 2", ahead.texts[-1]]
    too_far = crowd.reader(crowd.house(server.url), after=lost)
    too_far.wait_for_reset()
    check(book, ahead)
    assert seen(ahead)[-1:] == remembered(server, "k")[-1:]


@every_redis
def test_a_log_that_is_flushed_and_published_to_begins_anew_for_everybody(
    server: RedisServer, crowd: Crowd, book: Book
) -> None:
    one, two = crowd.house(server.url), crowd.house(server.url)
    readers = [crowd.reader(one), crowd.reader(two), crowd.reader(two, "quiet")]
    for number in range(5):
        book.publish(one.manager, "k", f"before {number}")
    for reader in readers[:2]:
        reader.wait_for("before 4")
    server.cli("FLUSHALL")
    for number in range(8):  # beyond the number that the old life had come to
        assert book.publish(two.manager, "k", f"after {number}")
    for reader in readers:
        reader.wait_for_reset(BACK_SECONDS)
    go_on(crowd, book, one, "last")
    assert [len(reader.resets) for reader in readers] == [1, 1, 1]
    check(book, *readers)
    assert {place(book.id(f"after {number}"))[0] for number in range(8)}.isdisjoint({place(book.id("before 0"))[0]})
    returning = crowd.reader(two, after=book.id("before 2"))
    returning.wait_for_reset()
    wait_for(lambda: readers[0].texts[-1:] == ["last k 0"], "it is delivered")
    reset = place(str(readers[0].resets[0].id))[1]
    assert seen(readers[0])[5:] == remembered(server, "k")[reset:]


def test_a_log_that_is_flushed_is_missed_even_if_nobody_publishes(
    server: RedisServer, crowd: Crowd, book: Book
) -> None:
    house = crowd.house(server.url)
    reader = crowd.reader(house)
    book.publish(house.manager, "k", "before")
    reader.wait_for("before")
    server.cli("FLUSHALL")
    reset = reader.wait_for_reset(BACK_SECONDS)
    assert json.loads(str(reset.data))["reason"] == "epoch"
    late = crowd.reader(crowd.house(server.url), after=str(reset.id))
    book.publish(house.manager, "k", "after")
    for each in (reader, late):
        each.wait_for("after")
    assert late.resets == []
    check(book, reader)


@pytest.mark.parametrize("name", ["log", "keys", "k:k", "all"])
def test_a_key_of_ours_that_is_evicted_leaves_no_silent_hole(
    server: RedisServer, crowd: Crowd, book: Book, name: str
) -> None:
    house = crowd.house(server.url)
    reader = crowd.reader(house)
    for number in range(3):
        book.publish(house.manager, "k", f"event {number}")
        book.publish(house.manager, None, f"to all {number}")
    reader.wait_for("to all 2")
    cursor = book.id("event 0")
    assert server.cli("DEL", f"{{sse}}:{name}") == 1
    returning = crowd.reader(crowd.house(server.url), after=cursor)
    go_on(crowd, book, house, "after")
    check(book, reader, returning)
    if not returning.resets:
        assert seen(returning) == seen(reader)[1:]
    if name in ("k:k", "all"):
        assert reader.resets == [], "it has missed nothing"


def test_what_the_log_loses_before_a_process_has_heard_it_still_reaches_those_who_listen(
    server: RedisServer, crowd: Crowd, book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    house, publisher = crowd.house(server.url), crowd.house(server.url)
    there = crowd.reader(house)
    assert there.cursor is not None
    hear, may_hear = Listener._hear, threading.Event()

    def hear_late(self: Listener, link: Link, channel: bytes, payload: Any) -> None:
        may_hear.wait(20)
        hear(self, link, channel, payload)

    monkeypatch.setattr(Listener, "_hear", hear_late)
    for text in ("one", "two"):
        assert book.publish(publisher.manager, "k", text)
    server.cli("DEL", "{sse}:k:k")
    beside = crowd.reader(house, after=there.cursor)  # for which the history is read
    may_hear.set()
    for reader in (there, beside):
        reader.wait_for("two")
    check(book, there, beside)
    assert there.resets == beside.resets == []


@pytest.mark.parametrize(
    ("fault", "reasons"),
    # Of a server that was started anew, the log has another run in it.
    [(("HSET", "{sse}:log", "run", "another"), []), (("FLUSHALL",), ["epoch"])],
    ids=["restarted", "lost"],
)
def test_a_life_that_begins_between_the_answer_to_a_subscription_and_the_history_leaves_no_hole(
    server: RedisServer,
    crowd: Crowd,
    book: Book,
    monkeypatch: pytest.MonkeyPatch,
    fault: tuple[str, ...],
    reasons: list[str],
) -> None:
    house, publisher = crowd.house(server.url), crowd.house(server.url)
    crowd.reader(house, "other")
    assert book.publish(publisher.manager, "other", "seen")
    assert book.publish(publisher.manager, "k", "missed")
    read = RedisBroker._read

    def begin_and_read(self: RedisBroker, *arguments: Any) -> Any:
        monkeypatch.undo()
        server.cli(*fault)
        return read(self, *arguments)

    monkeypatch.setattr(RedisBroker, "_read", begin_and_read)
    reader = crowd.reader(house, after=book.id("seen"))
    go_on(crowd, book, publisher, "after")
    check(book, reader)
    assert [json.loads(str(reset.data))["reason"] for reset in reader.resets] == reasons
    assert reader.texts == ([] if reasons else ["missed"]) + ["after k 0"]


# Redis hangs


@pytest.mark.live
def test_a_redis_that_hangs_for_15_seconds_loses_nothing_and_nobody_waits_longer_than_promised(
    tmp_path: Path, crowd: Crowd
) -> None:
    def stop(server: RedisServer) -> Callable[[], object]:
        server.pause()
        return server.resume

    def pause_clients(server: RedisServer) -> Callable[[], object]:
        server.cli("CLIENT PAUSE", 15_000, "ALL")
        return lambda: None

    with contextlib.ExitStack() as stack:
        cases = []
        for how in (stop, pause_clients):
            server = stack.enter_context(RedisServer(tmp_path / how.__name__))
            house, publisher, book = crowd.house(server.url), crowd.house(server.url), Book()
            reader = crowd.reader(house)
            for number in range(10):
                assert book.publish(publisher.manager, "k", f"before {number}")
            cases.append((how, server, house, publisher, book, reader))
        begun = time.monotonic()
        undo = [how(server) for how, server, *_ in cases]

        def work(publisher: House, house: House, book: Book) -> None:
            for number in range(100):
                if time.monotonic() > begun + 14:
                    break
                book.publish(publisher.manager if number % 2 else house.manager, "k", f"meanwhile {number}")
                time.sleep(0.3)

        threads = [
            threading.Thread(target=work, args=(publisher, house, book)) for _, _, house, publisher, book, _ in cases
        ]
        for thread in threads:
            thread.start()
        for _, _, house, _, _, _ in cases:
            wait_until_down(house)
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        wait_for(lambda: time.monotonic() > begun + 15, "15 seconds", 20)
        for each in undo:
            each()
        for _, server, house, publisher, book, reader in cases:
            assert len(book.errors) >= 4
            last = book.publish_until_it_works(publisher.manager, "k", "after", BACK_SECONDS)
            reader.wait_for(last, BACK_SECONDS)
            wait_until_up(house)
            assert health(house).reconnects >= 1
            check(book, reader)
            assert reader.resets == []
            assert seen(reader) == remembered(server, "k")


@pytest.mark.parametrize("how", ["SIGSTOP", "CLIENT PAUSE"])
def test_a_redis_that_hangs_for_less_than_the_timeout_only_takes_longer(
    server: RedisServer, crowd: Crowd, book: Book, how: str
) -> None:
    house = crowd.house(server.url)
    reader = crowd.reader(house)
    book.publish(house.manager, "k", "before")
    if how == "SIGSTOP":
        server.pause()
        threading.Timer(1.0, server.resume).start()
    else:
        server.cli("CLIENT PAUSE", 1000, "ALL")
    assert book.publish(house.manager, "k", "meanwhile")
    reader.wait_for("meanwhile")
    assert book.longest > 0.5
    check(book, reader)
    assert reader.resets == []
    assert (health(house).up, health(house).reconnects, health(house).gaps) == (True, 0, 0)


def test_a_publish_gives_up_after_a_timeout_of_its_own_setting(server: RedisServer, crowd: Crowd, book: Book) -> None:
    house = crowd.house(server.url, broker_timeout=0.3)
    reader = crowd.reader(house)
    book.publish(house.manager, "k", "before")
    with server.paused():
        assert not book.publish(house.manager, "k", "meanwhile")
        with pytest.raises(BrokerError):
            house.open("another key", after=book.id("before"))
    assert "not known" in str(book.errors[0])
    go_on(crowd, book, house, "after")
    check(book, reader, timeout=0.3)
    assert seen(reader) == remembered(server, "k")


# Connections are cut


def test_only_a_publish_that_was_cut_off_speaks_of_an_event(server: RedisServer) -> None:
    manager = House(broker_url=server.url, broker_timeout=0.5).manager
    manager.publish("k", "x")
    with server.paused(), pytest.raises(BrokerError, match="whether the event was taken is not known"):
        manager.publish("k", "y")
    assert manager.lease("clock", 5)
    with server.paused(), pytest.raises(BrokerError) as lease:
        manager.lease("clock", 5)
    assert "event" not in str(lease.value)
    manager.shutdown()


@every_redis
@pytest.mark.parametrize("kind", ["pubsub", "normal"])
def test_connections_that_are_killed_again_and_again_lose_and_double_nothing(
    server: RedisServer, crowd: Crowd, book: Book, kind: str
) -> None:
    one, two = crowd.house(server.url), crowd.house(server.url)
    readers = [crowd.reader(one), crowd.reader(two), crowd.reader(two, "k", "other")]
    finished = threading.Event()

    def work(name: str, house: House, key: str | None) -> None:
        number = 0
        while not finished.wait(0.001):
            book.publish(house.manager, key, f"{name} {number}")
            number += 1

    threads = [
        threading.Thread(target=work, args=arguments)
        for arguments in (("one", one, "k"), ("two", two, "other"), ("all", two, None))
    ]
    for thread in threads:
        thread.start()
    killed = 0
    for _ in range(8):
        so_far = len(book.acknowledged)
        wait_for(lambda: len(book.acknowledged) > so_far + 50, "publishing goes on", 10)  # noqa: B023
        killed += int(server.cli("CLIENT KILL", "TYPE", kind))
    finished.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    go_on(crowd, book, one, "last", "k", "other")
    check(book, *readers)
    assert killed >= 8
    assert [reader.resets for reader in readers] == [[], [], []]
    assert seen(readers[0]) == seen(readers[1]) == remembered(server, "k", None)
    assert seen(readers[2]) == remembered(server, "k", "other", None)
    if kind == "pubsub":
        assert book.errors == [], "a publish does not need that connection"
        assert health(one).reconnects >= 2
    wait_for(lambda: health(one).up, "it listens again")  # who was told by the history may have been sooner
    assert health(one).gaps == health(two).gaps == 0


class HeldUp(House):
    """A process whose listener stands still while the gate is closed."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.manager = PoolManager(Settings(broker_url=url, **options), broker=self._make)

    def _make(self, settings: Settings) -> Broker:
        broker: Any = broker_from_url(settings)
        start = broker.start

        def start_held_up(deliver: Deliver, idle: Idle = never_idle) -> None:
            def late(delivery: Any) -> None:
                self.gate.wait(60)
                deliver(delivery)

            start(late, idle)

        broker.start = start_held_up
        result: Broker = broker
        return result


@pytest.mark.live
@pytest.mark.parametrize("history", [1000, 10], ids=["all of it is remembered", "most of it is forgotten meanwhile"])
def test_a_burst_of_64_megabytes_that_a_listener_cannot_take_is_read_from_the_history_or_told(
    server: RedisServer, crowd: Crowd, book: Book, history: int
) -> None:
    slow = HeldUp(server.url, history_size=history, queue_bytes=1 << 30)
    publisher = House(broker_url=server.url, history_size=history)
    crowd.house("", slow), crowd.house("", publisher)
    reader = crowd.reader(slow)
    book.publish(publisher.manager, "k", "before")
    reader.wait_for("before")
    slow.gate.clear()
    for number in range(67):
        assert book.publish(publisher.manager, "k", f"{number} ".ljust(1_000_000, "x"))
    wait_for(lambda: "overcoming of output buffer limits" in server.log, "Redis gives the listener up")
    slow.gate.set()
    go_on(crowd, book, publisher, "after")
    check(book, reader)
    assert health(slow).up
    assert health(slow).reconnects >= 1
    if history == 1000:
        assert (reader.resets, health(slow).gaps) == ([], 0)
        assert len(reader.texts) == len(book.acknowledged)
        assert seen(reader) == remembered(server, "k")
    else:
        reader.wait_for(list(book.acknowledged)[-1])  # it knew as soon as it was told, before it was given the rest
        [reset] = reader.resets
        assert json.loads(str(reset.data)) == {"reason": "history", "keys": ["k"]}
        assert health(slow).gaps == 1
        after_it = seen(reader)[reader.events.index(reset) :]
        assert after_it
        assert after_it == remembered(server, "k")[-len(after_it) :]


# Redis refuses


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_redis_that_is_full_refuses_and_neither_the_history_nor_the_clients_have_what_it_refused(
    tmp_path: Path, crowd: Crowd, book: Book, program: str
) -> None:
    options: dict[str, Any] = {"maxmemory": "6mb", "maxmemory_policy": "noeviction"}
    with RedisServer(tmp_path / "redis", program=PROGRAMS[program], **options) as server:
        house = crowd.house(server.url)
        reader = crowd.reader(house)
        number = 0
        while len(book.errors) < 20:
            book.publish(house.manager, "k", f"{number} ".ljust(200_000 if number % 2 else 1000, "x"))
            number += 1
            assert number < 200
        assert len(book.acknowledged) > 5
        assert "Redis is full: raise its maxmemory" in str(book.errors[-1])
        assert book.longest < TOLERANCE, "there is nothing to wait for"
        server.cli("CONFIG SET", "maxmemory", 0)
        assert book.publish(house.manager, "k", "after")
        reader.wait_for("after")
        assert len(reader.texts) == len(book.acknowledged), "what was refused is no event"
        check(book, reader)
        assert reader.resets == []
        assert seen(reader) == remembered(server, "k", None)
        assert health(house).up


@every_redis
def test_a_replica_refuses_within_the_timeout_and_names_the_cure(server: RedisServer, tmp_path: Path) -> None:
    program = server.command[0]
    with RedisServer(tmp_path / "replica", program=program, replicaof=f"127.0.0.1 {server.port}") as replica:
        replica.wait_for_link()
        book, house = Book(), House(broker_url=replica.url)
        for number in range(2):
            assert not book.publish(house.manager, "k", f"event {number}")
        assert "this is a replica, which takes no writes: name the master" in str(book.errors[-1])
        assert book.longest < TIMEOUT + TOLERANCE
        assert replica.cli("DBSIZE") == 0
        house.manager.shutdown()


@every_redis
def test_a_master_that_is_made_a_replica_for_a_while_loses_nothing(
    server: RedisServer, crowd: Crowd, book: Book
) -> None:
    house = crowd.house(server.url)
    reader = crowd.reader(house)
    book.publish(house.manager, "k", "before")
    server.cli("REPLICAOF", "127.0.0.1", 1)  # nobody is there, so its data stay
    for number in range(2):
        assert not book.publish(house.manager, "k", f"meanwhile {number}")
    assert "replica" in str(book.errors[-1])
    server.cli("REPLICAOF", "NO", "ONE")
    go_on(crowd, book, house, "after")
    wait_until_up(house)
    check(book, reader)
    assert reader.resets == []
    assert seen(reader) == remembered(server, "k")
    assert not any("meanwhile" in text for text in reader.texts)


@every_redis
def test_too_few_replicas_are_named_and_nothing_is_published(server: RedisServer, crowd: Crowd, book: Book) -> None:
    house = crowd.house(server.url)
    reader = crowd.reader(house)
    book.publish(house.manager, "k", "before")
    server.cli("CONFIG SET", "min-replicas-to-write", 1)
    assert not book.publish(house.manager, "k", "meanwhile")
    assert "too few replicas are connected" in str(book.errors[-1])
    late = crowd.reader(house, "k", "other", after=book.id("before"))
    server.cli("CONFIG SET", "min-replicas-to-write", 0)
    assert book.publish(house.manager, "k", "after")
    for each in (reader, late):
        each.wait_for("after")
    check(book, reader, late)
    assert (reader.texts, late.texts) == (["before", "after"], ["after"])
    assert seen(reader) == remembered(server, "k")
    assert (health(house).up, health(house).reconnects) == (True, 0)


def connections(server: RedisServer) -> int:
    return int(server.info("stats", "total_connections_received"))


@pytest.mark.parametrize("password", ["wrong", None])
def test_a_wrong_password_is_an_error_at_once_and_no_storm_of_attempts(
    tmp_path: Path, password: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer(tmp_path / "redis", password="right") as server:
        login = "" if password is None else f":{password}@"
        house, book = House(broker_url=f"redis://{login}127.0.0.1:{server.port}/0"), Book()
        try:
            for number in range(5):
                assert not book.publish(house.manager, "k", f"event {number}")
            cure = "SSE_BROKER_URL needs a password" if password is None else "the password in SSE_BROKER_URL is wrong"
            assert cure in str(book.errors[-1])
            assert "right" not in str(book.errors[-1])
            assert "wrong@" not in str(book.errors[-1])
            begun = time.monotonic()
            with pytest.raises(BrokerError, match=cure):
                house.open("k")
            assert max(book.longest, time.monotonic() - begun) < TOLERANCE
            before, begun = connections(server), time.monotonic()
            wait_for(lambda: time.monotonic() - begun > 2, "two seconds")
            assert connections(server) - before < 20
            wait_until_down(house)
            assert len([r for r in caplog.records if r.levelno >= logging.ERROR]) <= 1, "it is said once"
        finally:
            house.manager.shutdown()


def test_a_password_that_is_changed_and_changed_back_stops_the_events_for_as_long(
    tmp_path: Path, crowd: Crowd, book: Book, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer(tmp_path / "redis", password="one") as server:
        house = crowd.house(server.url)
        reader = crowd.reader(house)
        book.publish(house.manager, "k", "before")
        with server.client() as admin:
            admin.execute_command("CONFIG SET", "requirepass", "two")
            admin.execute_command("CLIENT KILL", "TYPE", "pubsub")
            admin.execute_command("CLIENT KILL", "TYPE", "normal", "SKIPME", "yes")
            wait_for(lambda: not book.publish(house.manager, "k", f"meanwhile {time.monotonic()}"), "it is refused")
            wait_until_down(house)
            assert "the password in SSE_BROKER_URL is wrong" in str(book.errors[-1])
            admin.execute_command("CONFIG SET", "requirepass", "one")
        go_on(crowd, book, house, "after")
        wait_until_up(house)
        check(book, reader)
        assert reader.resets == []
        assert caplog.text.count("live events wait") <= 1


@every_redis
def test_a_user_without_the_right_to_publish_is_told_which_rights_it_takes(server: RedisServer) -> None:
    server.cli("ACL SETUSER", "reader", "on", ">secret", "~*", "&*", "+@read", "+info", "+hello", "+ping")
    house, book = House(broker_url=f"redis://reader:secret@127.0.0.1:{server.port}/0"), Book()
    assert not book.publish(house.manager, "k", "event")
    assert "let this user run EVAL" in str(book.errors[-1])
    assert "secret" not in str(book.errors[-1])
    assert book.longest < TOLERANCE
    assert server.cli("DBSIZE") == 0
    house.manager.shutdown()


@every_redis
def test_a_redis_that_has_too_many_clients_is_an_error_within_the_timeout(server: RedisServer, book: Book) -> None:
    with server.client() as admin:
        admin.ping()
        admin.execute_command("CONFIG SET", "maxclients", 1)
        house = House(broker_url=server.url)
        assert not book.publish(house.manager, "k", "too many")
        assert book.longest < TIMEOUT + TOLERANCE
        assert "max number of clients" in str(book.errors[-1])
        admin.execute_command("CONFIG SET", "maxclients", 100)
        assert book.publish_until_it_works(house.manager, "k", "after", BACK_SECONDS)
        house.manager.shutdown()


@every_redis
@pytest.mark.parametrize(
    ("name", "key"), [("log", "k"), ("keys", "k"), ("k:k", "k"), ("all", None)], ids=["log", "keys", "k:k", "all"]
)
def test_a_key_of_another_type_in_place_of_ours_is_refused_with_the_cure_until_it_is_deleted(
    server: RedisServer, crowd: Crowd, book: Book, name: str, key: str | None
) -> None:
    house = crowd.house(server.url)
    reader = crowd.reader(house)
    book.publish(house.manager, key, "before")
    reader.wait_for("before")
    server.cli("SET", f"{{sse}}:{name}", "something else")
    for number in range(3):
        assert not book.publish(house.manager, key, f"meanwhile {number}")
    assert "something else writes under this namespace: delete its key" in str(book.errors[-1])
    assert book.longest < TOLERANCE
    assert server.cli("GET", f"{{sse}}:{name}") == "something else"
    server.cli("DEL", f"{{sse}}:{name}")
    begun = time.monotonic()
    last = book.publish_until_it_works(house.manager, key, "after", BACK_SECONDS)
    reader.wait_until_it_knows(book, last, BACK_SECONDS - (time.monotonic() - begun))
    wait_until_up(house)
    check(book, reader)
    assert not any("meanwhile" in text for text in reader.texts)
    late = crowd.reader(crowd.house(server.url), after=book.id(last))
    book.publish(house.manager, key, "last")
    for each in (reader, late):
        each.wait_for("last")
    assert (late.texts, late.resets) == (["last"], [])
    assert seen(reader)[-1:] == remembered(server, key)[-1:]


@every_redis
def test_scripts_that_redis_forgets_are_sent_again(server: RedisServer, crowd: Crowd, book: Book) -> None:
    house = crowd.house(server.url)
    reader = crowd.reader(house)
    for number in range(5):
        assert book.publish(house.manager, "k", f"event {number}")
        server.cli("SCRIPT FLUSH")
    late = crowd.reader(house, after=book.id("event 1"))
    late.wait_for("event 4")
    reader.wait_for("event 4")
    check(book, reader, late)
    assert (late.texts, reader.resets, late.resets) == (["event 2", "event 3", "event 4"], [], [])
    assert health(house).reconnects == 0


# Failover


@pytest.mark.live
@pytest.mark.parametrize("how", ["hung", "killed"])
def test_when_a_replica_is_promoted_all_goes_on_there(tmp_path: Path, crowd: Crowd, book: Book, how: str) -> None:
    with Sentinel(tmp_path, sentinels=3 if how == "hung" else 1) as servers:
        one, two = crowd.house(servers.url), crowd.house(servers.url)
        readers = [crowd.reader(one), crowd.reader(two, "k", "other")]
        for number in range(50):
            assert book.publish((one, two)[number % 2].manager, "k", f"before {number}")
        assert book.publish(one.manager, "other", "the last before")
        # Replication is asynchronous, and this is not about what it may lose.
        wait_for(lambda: _is_in_step(servers), "the replica has it all")
        for reader in readers:
            reader.wait_for("before 49")
        servers.master.pause() if how == "hung" else servers.master.kill()
        finished = threading.Event()

        def work() -> None:
            number = 0
            while not finished.is_set():
                book.publish(two.manager, "k", f"meanwhile {number}")
                number += 1
                finished.wait(0.02)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            servers.wait_for_promotion()
            begun = time.monotonic()
            last = book.publish_until_it_works(one.manager, "k", "after", BACK_SECONDS)
            for reader in readers:
                reader.wait_for(last, max(0.1, BACK_SECONDS + TOLERANCE - (time.monotonic() - begun)))
            if how == "hung":
                servers.master.resume()  # It takes itself for the master still.
                so_far = len(book.acknowledged)
                wait_for(lambda: len(book.acknowledged) > so_far + 20, "publishing goes on")
        finally:
            finished.set()
            thread.join(10)
        assert not thread.is_alive()
        go_on(crowd, book, two, "last", "k", "other")
        for house in (one, two):
            wait_until_up(house)
            assert health(house).reconnects >= 1
        check(book, *readers)
        assert [reader.resets for reader in readers] == [[], []], "the replica had everything"
        assert seen(readers[0]) == remembered(servers.replica, "k")
        late = crowd.reader(two, after=book.id("before 10"))
        late.wait_for(readers[0].texts[-1])
        assert late.resets == []
        assert seen(late) == seen(readers[0])[11:]


@pytest.mark.live
def test_without_a_master_or_a_sentinel_that_answers_a_publish_gives_up_in_time(
    tmp_path: Path, crowd: Crowd, book: Book
) -> None:
    with Sentinel(tmp_path, sentinels=3) as servers:
        house = crowd.house(servers.url)
        reader = crowd.reader(house)
        assert book.publish(house.manager, "k", "before")
        for sentinel in servers.sentinels:
            sentinel.pause()
        with servers.master.paused():
            for number in range(2):
                assert not book.publish(house.manager, "k", f"meanwhile {number}")
            wait_until_down(house)
        # The first of them alone is back.
        servers.sentinels[0].resume()
        go_on(crowd, book, house, "after")
        check(book, reader)
        assert reader.resets == []
        assert seen(reader) == remembered(servers.master, "k")
        for sentinel in servers.sentinels[1:]:
            sentinel.resume()


@pytest.mark.live
def test_when_a_cluster_gives_the_log_to_another_node_all_goes_on_there(
    tmp_path: Path, crowd: Crowd, book: Book
) -> None:
    with RedisCluster(tmp_path) as cluster:
        old, new = cluster.owner("{sse}:log"), cluster.stranger("{sse}:log")
        house, publisher = crowd.house(old.url), crowd.house(new.url)
        reader = crowd.reader(house)
        for number in range(20):
            assert book.publish(publisher.manager, "k", f"before {number}")
        slot = int(old.cli("CLUSTER KEYSLOT", "{sse}:log"))
        names = {node: node.cli("CLUSTER MYID") for node in cluster.nodes}
        new.cli("CLUSTER SETSLOT", slot, "IMPORTING", names[old])
        old.cli("CLUSTER SETSLOT", slot, "MIGRATING", names[new])
        keys = old.cli("CLUSTER GETKEYSINSLOT", slot, 100)
        assert len(keys) == 3
        # One by one, as its tools do it: meanwhile some are here and some are there.
        for number, key in enumerate(keys):
            book.publish(publisher.manager, "k", f"meanwhile {number}")
            old.cli("MIGRATE", "127.0.0.1", new.port, key, 0, 5000)
        book.publish(publisher.manager, "k", "meanwhile 4")
        for node in (new, old):
            node.cli("CLUSTER SETSLOT", slot, "NODE", names[new])
        go_on(crowd, book, publisher, "after")
        wait_until_up(house)
        check(book, reader)
        assert reader.resets == []
        assert seen(reader) == remembered(new, "k")


def _is_in_step(servers: Sentinel) -> bool:
    offset = servers.master.info("replication", "master_repl_offset")
    return bool(servers.replica.info("replication", "slave_repl_offset") >= offset)


# Somebody else writes where we do

FORGED = {
    "nothing": b"",
    "a version alone": b"1",
    "no place": b"1 \n",
    "cut off in its head": b"1 {epoch} 3",
    "cut off before its body": b"1 {epoch} {next} {last}\n",
    "another version": b"2 {epoch} {next} {last}\ndata: forged\n\n",
    "a negative number": b"1 {epoch} -5 {last}\ndata: forged\n\n",
    "a number without end": b"1 {epoch} " + b"9" * 5000 + b" {last}\ndata: forged\n\n",
    "digits of another script": "1 {epoch} ٣ {last}\ndata: forged\n\n".encode(),
    "another life": b"1 000000000000 {next} {last}\ndata: forged\n\n",
    "a place of another life that was passed": b"1 000000000000 {last} {last}\ndata: forged\n\n",
    "an epoch with a line break": b"1 a\nb {next} {last}\ndata: forged\n\n",
    "deep nesting": b"[" * 100_000,
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix",
    "a body without end": b"1 {epoch} {next} {last}\ndata: forged",
    "a body with half an end": b"1 {epoch} {next} {last}\ndata: forged\n",
    "two events in one": b"1 {epoch} {next} {last}\ndata: forged\n\ndata: forged\n\n",
    "a line break in an event's name": b"1 {epoch} {next} {last}\nevent: a\rid: forged\ndata: forged\n\n",
    "another line break in it": b"1 {epoch} {next} {last}\nevent: a\r\nid: forged\r\ndata: forged\n\n",
    "an id in its middle": b"1 {epoch} {next} {last}\ndata: forged\nid: forged\n\n",
    "an end": b"1 {epoch} {next} {last}\nid: end\ndata: forged\n\n",
    "an end without a space": b"1 {epoch} {next} {last}\nid:end\ndata: forged\n\n",
    "a field of no standard": b"1 {epoch} {next} {last}\nforged: forged\n\n",
    "bytes that are no text": b"1 {epoch} {next} {last}\ndata: \xff\xfe\n\n",
    "an id of the log": b"1 {epoch} {next} {last}\nid: {epoch}-99999\ndata: forged\n\n",
    "an event that is in no history": b"1 {epoch} {next} {last}\ndata: forged\n\n",
    "an event before all others": b"1 {epoch} 1 0\ndata: forged\n\n",
    "too large an event": b"1 {epoch} {next} {last}\ndata: " + b"x" * 2 * 1024 * 1024 + b"\n\n",
}
# What nobody can tell from an event that the script published: it is well made, and follows the last one.
PLAUSIBLE = {"an event that is in no history", "an id of the log"}


@pytest.mark.parametrize("name", sorted(set(FORGED) - PLAUSIBLE))
def test_a_message_on_our_channel_that_is_no_event_is_counted_and_nobody_sees_it(
    server: RedisServer, crowd: Crowd, book: Book, name: str
) -> None:
    house = crowd.house(server.url)
    reader = crowd.reader(house)
    book.publish(house.manager, "k", "one")
    book.publish(house.manager, "k", "two")
    reader.wait_for("two")
    epoch, last = place(book.id("two"))
    values = {b"{epoch}": epoch.encode(), b"{next}": b"%d" % (last + 1), b"{last}": b"%d" % last}
    payload = FORGED[name]
    for placeholder, value in values.items():
        payload = payload.replace(placeholder, value)
    for _ in range(2):
        assert send(server, "{sse}:k:k", payload) == 1
    assert book.publish(house.manager, "k", "three")
    reader.wait_for("three")
    wait_for(lambda: health(house).skipped, "it is counted")
    for _ in range(2):
        send(server, "{sse}:all", payload)
    assert book.publish(house.manager, None, "four")
    reader.wait_for("four")
    assert reader.texts == ["one", "two", "three", "four"]
    check(book, reader)
    assert (reader.resets, reader.opened, health(house).gaps) == ([], 1, 0)
    assert health(house).up
    assert seen(reader) == remembered(server, "k", None)
    assert "forged" not in repr(reader.events)


@pytest.mark.live
def test_a_message_of_100_megabytes_is_skipped_whether_redis_passes_it_on_or_not(
    server: RedisServer, crowd: Crowd, book: Book
) -> None:
    house, publisher = crowd.house(server.url), crowd.house(server.url)
    reader = crowd.reader(house)
    book.publish(publisher.manager, "k", "before")
    # By default Redis cuts off a listener for which so much waits.
    assert send(server, "{sse}:k:k", b"x" * 100_000_000) == 1
    go_on(crowd, book, publisher, "meanwhile")
    assert health(house).reconnects == 1
    server.cli("CONFIG SET", "client-output-buffer-limit", "pubsub 0 0 0")
    skipped = health(house).skipped
    assert send(server, "{sse}:k:k", b"x" * 100_000_000) == 1
    go_on(crowd, book, publisher, "after")
    wait_for(lambda: health(house).skipped > skipped, "it is counted")
    check(book, reader)
    assert reader.resets == []
    assert seen(reader) == remembered(server, "k")
    assert health(house).reconnects == 1


POISON: dict[str, list[bytes]] = {
    "no body": [b"p", b"2", b"t", b"0"],
    "no number of the one before": [b"b", b"data: forged\n\n", b"t", b"0"],
    "another number": [b"b", b"data: forged\n\n", b"p", b"-7", b"t", b"x"],
    "no fields of ours": [b"forged", b"forged"],
    "an end": [b"b", b"id: end\ndata: forged\n\n", b"p", b"2", b"t", b"0"],
    "a line break": [b"b", b"event: a\rdata: forged\n\n", b"p", b"2", b"t", b"0"],
    "two events": [b"b", b"data: forged\n\ndata: forged\n\n", b"p", b"2", b"t", b"0"],
    "no end": [b"b", b"data: forged", b"p", b"2", b"t", b"0"],
    "no text": [b"b", b"data: \xff\n\n", b"p", b"2", b"t", b"0"],
    "an event": [b"b", b"data: forged\n\n", b"p", b"2", b"t", b"0"],
}


@pytest.mark.parametrize("name", POISON)
@pytest.mark.parametrize("stream", ["k:k", "all"])
def test_an_entry_of_our_history_that_is_no_event_is_counted_and_nobody_is_given_it(
    server: RedisServer, crowd: Crowd, book: Book, name: str, stream: str
) -> None:
    key = "k" if stream == "k:k" else None
    house = crowd.house(server.url)
    reader = crowd.reader(house)
    for text in ("one", "two", "three"):
        book.publish(house.manager, key, text)
    _, last = place(book.id("three"))
    server.cli("XADD", f"{{sse}}:{stream}", f"{last}-1", *POISON[name])
    for text in ("four", "five"):
        assert book.publish(house.manager, key, text)
    server.cli("XADD", f"{{sse}}:{stream}", f"{last + 2}-1", *POISON[name])
    fresh = crowd.house(server.url)
    returning = crowd.reader(fresh, after=book.id("one"))
    for each in (reader, returning):
        each.wait_for("five")
    assert returning.texts == ["two", "three", "four", "five"]
    assert health(fresh).skipped > 0
    assert book.publish(house.manager, key, "six")
    for each in (reader, returning):
        each.wait_for("six")
    check(book, reader, returning)
    assert (reader.resets, returning.resets) == ([], [])
    assert "forged" not in repr([*reader.events, *returning.events])


@every_redis
def test_an_entry_that_takes_the_place_of_later_events_does_not_stop_publishing(
    server: RedisServer, crowd: Crowd, book: Book
) -> None:
    house = crowd.house(server.url)
    reader = crowd.reader(house)
    book.publish(house.manager, "k", "one")
    book.publish(house.manager, "k", "two")
    server.cli("XADD", "{sse}:k:k", "999999-0", "b", "data: forged\n\n", "p", 2, "t", 0)
    fresh = crowd.house(server.url)
    joined = crowd.reader(fresh, after=book.id("one"))
    assert book.publish(house.manager, "k", "three")
    assert book.publish(house.manager, "k", "four")
    returning = crowd.reader(crowd.house(server.url), after=book.id("one"))
    for each in (reader, joined):
        each.wait_for("four")
    if not returning.resets:  # it may be told so, but not given less
        returning.wait_for("four")
        assert returning.texts == ["two", "three", "four"]
    assert (reader.texts, reader.resets) == (["one", "two", "three", "four"], [])
    check(book, reader, joined)
    assert "forged" not in repr([*reader.events, *joined.events, *returning.events])


def test_keys_that_are_forged_in_the_index_are_nobodys_business(server: RedisServer, crowd: Crowd, book: Book) -> None:
    house = crowd.house(server.url)
    reader = crowd.reader(house)
    book.publish(house.manager, "k", "one")
    for member in (b"", b"all", b"k:", b"k:\xff\xfe", b"k:a\nb", b"nonsense", b"k:" + b"x" * 10_000):
        server.cli("ZADD", "{sse}:keys", 0, member)
    book.publish(house.manager, "k", "two")
    book.publish(house.manager, None, "three")
    returning = crowd.reader(crowd.house(server.url), after=book.id("one"))
    for each in (reader, returning):
        each.wait_for("three")
    assert (returning.texts, returning.resets) == (["two", "three"], [])
    check(book, reader)


def test_a_key_may_be_whatever_a_key_may_be(server: RedisServer, crowd: Crowd, book: Book) -> None:
    house, publisher = crowd.house(server.url), crowd.house(server.url)
    keys = ("all", "log", "keys", "k:k", "*", "a*", "[a]", "{a}", "}{", "a b", "ü\u2028", "\U0001f4a5" * 60, "x" * 255)
    readers = {key: crowd.reader(house, key) for key in keys}
    for key in keys:
        assert book.publish(publisher.manager, key, f"to {key}")
    book.publish(publisher.manager, None, "to everybody")
    for key, reader in readers.items():
        reader.wait_for("to everybody")
        assert reader.texts == [f"to {key}", "to everybody"]
        late = crowd.reader(publisher, key, after=book.id(f"to {key}"))
        late.wait_for("to everybody")
        assert (late.texts, late.resets) == (["to everybody"], [])


# Processes


@every_redis
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # it is what this is about
def test_a_forked_child_publishes_on_connections_of_its_own(
    server: RedisServer, crowd: Crowd, book: Book, capfd: pytest.CaptureFixture[str]
) -> None:
    house = crowd.house(server.url)
    reader = crowd.reader(house)
    for number in range(3):
        book.publish(house.manager, "k", f"parent {number}")
    before = health(house)
    pid = os.fork()
    if pid == 0:  # the child: nothing of the test runner may run in it
        ok = False
        try:
            # For as long as the parent's listener, if it went on here, would take to say something.
            for number in range(30):
                house.manager.publish("k", f"child {number}")
                time.sleep(0.05)
            ok = house.manager.stats().broker.error == ""
        finally:
            os._exit(0 if ok else 1)
    book.unknown |= {f"child {number}" for number in range(30)}
    statuses: list[int] = []
    while not statuses:
        assert book.publish(house.manager, "k", f"parent meanwhile {len(book.acknowledged)}")
        ended, status = os.waitpid(pid, os.WNOHANG)
        statuses += [status] * bool(ended)
        time.sleep(0.01)
    assert statuses == [0]
    assert book.publish(house.manager, "k", "parent again")
    reader.wait_for("parent again")
    assert [text for text in reader.texts if "child" in text] == [f"child {number}" for number in range(30)]
    check(book, reader)
    assert reader.resets == []
    assert health(house) == before, "the parent's listener noticed nothing"
    assert capfd.readouterr().err == "", "and the child had nothing to complain of"


def test_nothing_is_left_of_a_process_that_closes(server: RedisServer) -> None:
    threads = set(threading.enumerate())
    house = House(broker_url=server.url)
    house.open("k")
    house.manager.publish("k", "event")
    assert len(server.cli("CLIENT LIST")) >= 3
    house.manager.shutdown()
    wait_for(lambda: len(server.cli("CLIENT LIST")) == 1, "its connections are gone")
    wait_for(lambda: set(threading.enumerate()) <= threads, "its threads are gone")
    with pytest.raises(BrokerError, match="is closed"):
        house.manager.publish("k", "event")


def test_nothing_is_left_of_a_publish_that_ends_after_its_process_has_closed(server: RedisServer) -> None:
    broker = broker_from_url(Settings(broker_url=server.url))
    assert isinstance(broker, RedisBroker)
    broker.publish("k", body("first"))
    published: list[str] = []
    publisher = threading.Thread(target=lambda: published.append(broker.publish("k", body("last"))))
    with server.paused():
        publisher.start()
        wait_for(lambda: not any(broker._free.values()), "it is on its way")
        broker.close()
    publisher.join(10)
    assert published
    wait_for(lambda: len(server.cli("CLIENT LIST")) == 1, "its connection is gone")


def test_a_redis_that_was_never_there_is_an_error_with_the_cure_and_one_that_comes_is_used(
    tmp_path: Path, crowd: Crowd, book: Book
) -> None:
    server = RedisServer(tmp_path / "redis")
    house = crowd.house(server.url)
    assert not book.publish(house.manager, "k", "too early")
    assert "is it running?" in str(book.errors[0])
    begun = time.monotonic()
    with pytest.raises(BrokerError):
        house.open("k")
    assert max(book.longest, time.monotonic() - begun) < TIMEOUT + TOLERANCE
    with server:
        reader = crowd.reader(house)
        go_on(crowd, book, house, "after")
        check(book, reader)
        assert reader.resets == []
        crowd.readers.clear()


# Everything at once


class Disorder:
    """Publishers that never rest, clients that change houses, and faults, all as the dice fall."""

    def __init__(self, book: Book, readers: list[Reader], seed: int) -> None:
        self.finished = threading.Event()
        self._book = book
        self._readers = readers
        self._seed = seed
        self._dice = random.Random(seed)

    def reign(
        self,
        publishers: Sequence[House],
        keys: Sequence[str | None],
        faults: Sequence[Callable[[], object]],
        *,
        more: int,
        moves: int,
        between: Sequence[int],
    ) -> None:
        """Let every fault happen, and ``more`` of them again.

        Before each, ``moves`` clients go to any house that has some. After it, one of ``between`` says how many events
        are published before the next.
        """
        dice, book = self._dice, self._book
        houses = list(dict.fromkeys(reader.house for reader in self._readers))
        threads = [
            threading.Thread(target=self._publish, args=(f"publisher {index}", house, keys, self._seed + index))
            for index, house in enumerate(publishers)
        ]
        for thread in threads:
            thread.start()
        try:
            for fault in [*dice.sample(faults, len(faults)), *dice.choices(faults, k=more)]:
                for _ in range(moves):
                    dice.choice(self._readers).hang_up(dice.choice(houses))
                fault()
                wanted = len(book.acknowledged) + dice.choice(between)
                wait_for(lambda wanted=wanted: len(book.acknowledged) > wanted, "publishing goes on", 10)  # type: ignore[misc]
        finally:
            self.finished.set()
            for thread in threads:
                thread.join(10)
        assert not any(thread.is_alive() for thread in threads)

    def _publish(self, name: str, house: House, keys: Sequence[str | None], seed: int) -> None:
        own = random.Random(seed)
        number = 0
        while not self.finished.wait(own.choice((0, 0.001, 0.01))):
            self._book.publish(house.manager, own.choice(keys), f"{name} {number}")
            number += 1


@pytest.mark.live
@pytest.mark.parametrize("seed", [1])
def test_whatever_happens_at_random_every_client_gets_every_event_once_and_in_the_order_of_the_log(
    persistent: RedisServer, crowd: Crowd, book: Book, seed: int
) -> None:
    options: dict[str, Any] = {"history_size": 100_000, "queue_events": 100_000}
    houses = [crowd.house(persistent.url, **options) for _ in range(2)]
    elsewhere = crowd.house(persistent.url, **options)
    keys = [("a",), ("b",), ("a", "b"), ("a", "c"), ("c",)]
    readers = [crowd.reader(house, *some) for house in houses for some in keys]
    disorder = Disorder(book, readers, seed)

    def pause() -> None:
        with persistent.paused():
            disorder.finished.wait(1)

    def crash() -> None:
        persistent.kill()
        persistent.start()

    faults: list[Callable[[], object]] = [
        lambda: persistent.cli("CLIENT KILL", "TYPE", "pubsub"),
        lambda: persistent.cli("CLIENT KILL", "TYPE", "normal"),
        lambda: persistent.cli("SCRIPT FLUSH"),
        persistent.restart,
        crash,
        pause,
        lambda: persistent.cli("CLIENT PAUSE", 1000, "ALL"),
    ]
    publishers = [*houses, elsewhere, elsewhere]
    disorder.reign(publishers, ("a", "b", "c", None), faults, more=7, moves=4, between=(1, 20, 100))
    go_on(crowd, book, elsewhere, "last", "a", "b", "c")
    check(book, *readers)
    assert [reader.resets for reader in readers] == [[] for _ in readers], "nothing was lost"
    for reader in readers:
        assert seen(reader) == remembered(persistent, *reader.keys, None)
    assert sum(reader.opened for reader in readers) > len(readers)
    assert len(book.acknowledged) > 150
    for house in houses:
        assert health(house).up
        assert health(house).gaps == 0


@every_redis
@pytest.mark.live
@pytest.mark.parametrize("seed", [1])
def test_whatever_is_lost_at_random_every_client_is_told_where_it_begins_anew(
    server: RedisServer, crowd: Crowd, book: Book, seed: int
) -> None:
    houses = [crowd.house(server.url, history_size=20) for _ in range(2)]
    keys = [("a",), ("b",), ("a", "b")]
    readers = [crowd.reader(house, *some) for house in houses for some in keys]

    def come_back(*, empty: bool) -> None:
        if empty:
            (server.directory / "dump.rdb").unlink(missing_ok=True)
        server.kill()
        server.start()

    faults: list[Callable[[], object]] = [
        lambda: server.cli("FLUSHALL"),
        lambda: server.cli("SAVE"),
        lambda: come_back(empty=True),
        lambda: come_back(empty=False),
        lambda: server.cli("CLIENT KILL", "TYPE", "pubsub"),
        *(lambda name=name: server.cli("DEL", f"{{sse}}:{name}") for name in ("log", "keys", "k:a", "all")),
        lambda: server.cli("XTRIM", "{sse}:k:a", "MAXLEN", 3),
    ]
    disorder = Disorder(book, readers, seed)
    disorder.reign(houses, ("a", "b", None), faults, more=20, moves=3, between=(1, 5, 30))
    go_on(crowd, book, houses[0], "last", "a", "b")
    check(book, *readers, rewound=True)
    for reader in readers:
        assert 0 < len(reader.resets) < 60, "told, but not all the time"
    assert all(health(house).up for house in houses)


@every_redis
def test_a_process_that_follows_very_many_keys_misses_nothing_when_it_is_cut_off(
    server: RedisServer, crowd: Crowd, book: Book
) -> None:
    house, publisher = crowd.house(server.url), crowd.house(server.url)
    keys = [f"key {number}" for number in range(1200)]
    readers = [crowd.reader(house, *keys[start : start + 100]) for start in range(0, len(keys), 100)]
    for cut in range(4):
        for key in random.Random(cut).sample(keys, 100):
            assert book.publish(publisher.manager, key, f"{cut} to {key}")
        assert server.cli("CLIENT KILL", "TYPE", "pubsub") == 1
        for key in random.Random(cut).sample(keys, 100):
            assert book.publish(publisher.manager, key, f"{cut} again to {key}")
        go_on(crowd, book, publisher, f"cut {cut}", *(keys[start] for start in range(0, len(keys), 100)))
    check(book, *readers)
    assert sum(len(reader.texts) for reader in readers) == len(book.acknowledged)
    assert [reader.resets for reader in readers] == [[]] * len(readers)
    assert (health(house).reconnects, health(house).gaps) == (4, 0)


def test_without_a_history_what_was_missed_is_told(server: RedisServer, crowd: Crowd, book: Book) -> None:
    house, publisher = crowd.house(server.url, history_size=0), crowd.house(server.url, history_size=0)
    reader = crowd.reader(house)
    published = []
    for number in range(10):
        wait_for(lambda: server.cli("CLIENT KILL", "TYPE", "pubsub") == 1, "there is somebody to kill")
        for some in range(3):
            published.append(f"{number} {some}")
            assert book.publish(publisher.manager, "k", published[-1])
        wait_for(lambda number=number: health(house).reconnects == number + 1 and health(house).up, "it is in step")  # type: ignore[misc]
        reader.wait_until_it_knows(book, published[-1])
    assert book.publish(publisher.manager, "k", "after")
    reader.wait_for("after")
    assert 0 < len(reader.resets) == health(house).gaps <= 10
    assert reader.texts == [text for text in [*published, "after"] if text in reader.texts]


def test_what_is_too_old_for_the_history_is_told_to_who_comes_back(
    server: RedisServer, crowd: Crowd, book: Book
) -> None:
    house = crowd.house(server.url, history_ttl=0.5)
    for text in ("one", "two"):
        assert book.publish(house.manager, "k", text)
    wait_for(lambda: not server.cli("EXISTS", "{sse}:k:k"), "it is gone")
    behind = crowd.reader(house, after=book.id("one"))
    assert json.loads(str(behind.wait_for_reset().data))["reason"] == "history"
    there = crowd.reader(crowd.house(server.url, history_ttl=0.5), after=book.id("two"))
    assert book.publish(house.manager, "k", "three")
    for reader in (behind, there):
        reader.wait_for("three")
    assert (there.texts, there.resets) == (["three"], [])


def test_a_body_in_redis_is_the_body_that_was_published(server: RedisServer, crowd: Crowd) -> None:
    house = crowd.house(server.url)
    identifier = house.manager.publish("k", "text")
    [(entry, fields)] = server.cli("XRANGE", "{sse}:k:k", "-", "+")
    assert entry == f"{place(identifier)[1]}-0"
    assert fields["b"].encode() == body("text")
