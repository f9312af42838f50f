"""The listening connection: what it subscribes to and for how long, what it asks Redis, and how it comes into step."""

from __future__ import annotations

import gc
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from fakes import Clock, House, RecordingTransport
from redis_server import PROGRAMS, RedisServer
from support import wait_for

from flask_sse_stream.brokers.base import BrokerStats, Delivery, Gap, History, Life
from flask_sse_stream.brokers.redis import RedisBroker
from flask_sse_stream.errors import BrokerError
from flask_sse_stream.event import Message
from flask_sse_stream.settings import Settings
from flask_sse_stream.stream import CloseReason
from flask_sse_stream.testing.contracts.broker import body, place


@pytest.fixture(scope="module", params=PROGRAMS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis"), program=PROGRAMS[request.param]) as server:
        yield server


class Process:
    """A broker as one process has it, and everything that it delivered."""

    def __init__(self, url: str, namespace: str, **options: Any) -> None:
        self.broker = RedisBroker(Settings(broker_url=url, namespace=namespace, **options))
        self.delivered: list[Delivery] = []
        self.idle: Callable[[Sequence[str]], Sequence[str]] = lambda keys: ()
        self.broker.start(self.delivered.append, lambda keys: self.idle(keys))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.broker, name)

    @property
    def messages(self) -> list[Message]:
        return [item for item in self.delivered if isinstance(item, Message)]

    def wait(self, last: str) -> None:
        wait_for(lambda: self.messages and self.messages[-1].id == last, f"{last} is delivered")


Start = Callable[..., Process]


@pytest.fixture
def namespace() -> str:
    return f"test-{secrets.token_hex(4)}"


@pytest.fixture
def start(server: RedisServer, namespace: str) -> Iterator[Start]:
    processes: list[Process] = []

    def make(**options: Any) -> Process:
        process = Process(server.url, namespace, **options)
        processes.append(process)
        return process

    yield make
    for process in processes:
        process.broker.close()


def channels(server: RedisServer, namespace: str) -> set[str]:
    sharded = "SHARD" if not server.info("server", "redis_version").startswith("6.") else ""
    found = server.cli(f"PUBSUB {sharded}CHANNELS", f"{{{namespace}}}*")
    return {channel.partition(":")[2] for channel in found}


def count_commands(server: RedisServer, call: Callable[[], object]) -> dict[str, int]:
    """Give how often each command was executed, those within scripts too."""
    server.cli("CONFIG RESETSTAT")
    call()
    found = server.cli("INFO", "commandstats")
    return {name.removeprefix("cmdstat_"): int(values["calls"]) for name, values in found.items()}


def test_a_process_subscribes_to_the_keys_that_it_has_streams_of_and_to_no_others(
    start: Start, server: RedisServer, namespace: str
) -> None:
    one, two = start(), start()
    one.cover(["a", None], [], None)
    assert channels(server, namespace) == {"k:a", "all"}
    two.cover(["b"], [], None)
    assert channels(server, namespace) == {"k:a", "k:b", "all"}


def test_no_character_of_a_key_has_a_meaning(start: Start, server: RedisServer, namespace: str) -> None:
    keys = ["*", "a*", "[a]", "a", "?", "a:b", "{x}", "\\", "all", "k:a", "ü"]
    process = start()
    process.cover(keys, [], None)
    ids = {process.publish(key, body(key)): key for key in keys}
    wait_for(lambda: len(process.messages) == len(keys), "each is delivered once")
    assert {message.id: message.key for message in process.messages} == ids


def test_a_subscription_ends_when_nobody_has_needed_it_for_a_while_and_begins_again_without_loss(
    start: Start, server: RedisServer, namespace: str
) -> None:
    process = start()
    process.cover(["a", "b", None], [], None)
    process.idle = lambda keys: [key for key in keys if key == "a"]
    wait_for(lambda: channels(server, namespace) == {"k:b", "all"}, "it ends")
    process.idle = lambda keys: ()
    missed = process.publish("a", body("1"))
    process.cover(["a"], ["a"], missed)
    history = process.delivered[-1]
    assert isinstance(history, History)
    assert [message.id for message in history.messages] == [missed]
    process.wait(process.publish("a", body("2")))


def test_a_reload_of_the_page_changes_no_subscription(
    server: RedisServer, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(broker_url=server.url, namespace=namespace)
    stream = house.open("k")
    cursor = house.cursor(stream)
    stream.close(CloseReason.PEER)
    broker = house.manager._broker
    assert house.manager._idle(["k"]) == []  # the next one comes in a moment
    commands = count_commands(server, lambda: house.open("k", after=cursor))
    assert not {"subscribe", "ssubscribe"} & set(commands)
    assert isinstance(broker, RedisBroker)
    for stream in house.manager.streams("k"):
        stream.close(CloseReason.PEER)
    clock = Clock(monkeypatch)
    clock.now = 10**9
    wait_for(lambda: channels(server, namespace) == {"all", "k:\x01"}, "after a minute without one it ends")
    assert house.manager.stats().windows == 1
    house.manager.shutdown()


def test_clients_that_come_back_at_once_share_one_reading_of_each_key(server: RedisServer, namespace: str) -> None:
    house = House(broker_url=server.url, namespace=namespace)
    first = house.manager.publish("k", "0")
    for number in range(20):
        house.manager.publish("k", str(number))
    fresh = House(broker_url=server.url, namespace=namespace)
    threads = [threading.Thread(target=fresh.open, args=("k",), kwargs={"after": first}) for _ in range(200)]

    def come_back() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)

    commands = count_commands(server, come_back)
    assert fresh.manager.count("k") == 200
    assert commands["xrange"] <= 6, "the key is read once, in two steps, and perhaps again by some that came since"
    assert commands.get("ssubscribe", 0) + commands.get("subscribe", 0) <= 3
    for stream in fresh.manager.streams("k"):
        assert len(fresh.events(stream)) == 20
    house.manager.shutdown(), fresh.manager.shutdown()


def test_a_client_whose_keys_are_known_costs_redis_nothing(server: RedisServer, namespace: str) -> None:
    house = House(broker_url=server.url, namespace=namespace)
    last = house.manager.publish("k", "0")
    house.open("k", after=last)

    def come_back() -> None:
        for _ in range(50):
            house.open("k", after=last)

    assert count_commands(server, come_back).get("zscore", 0) == 0
    house.manager.shutdown()


def test_an_id_that_nobody_has_given_out_is_asked_for_once_and_leads_nowhere(start: Start) -> None:
    process = start()
    process.publish("a", body("x"))
    here = process.cover(["a"], [], None)
    assert process.cover(["a"], [], f"{here.epoch}-{here.head + 10**9}") == here
    assert process.cover(["a"], [], "0123456789ab-5") == here
    assert process.cover(["a"], [], "own id") == here


def test_a_cut_connection_is_made_anew_and_what_was_missed_comes_first(start: Start, server: RedisServer) -> None:
    process, other = start(), start()
    process.cover(["a", "b", None], [], None)
    ids = [other.publish("a", body("1"))]
    for _ in range(5):
        server.cli("CLIENT", "KILL", "TYPE", "pubsub")
        ids += [other.publish(key, body("x")) for key in ("a", "b", None, "never asked for", "a")]
        del ids[-2]
    process.wait(ids[-1])
    assert [message.id for message in process.messages] == ids
    assert process.stats() == BrokerStats(True, process.stats().reconnects, 0, 0, process.stats().error)
    assert process.stats().reconnects >= 1


def test_what_was_trimmed_before_it_could_be_read_is_told_as_a_gap(start: Start, server: RedisServer) -> None:
    process, other = start(history_size=5), start(history_size=5)
    process.cover(["a", "b", None], [], None)
    first = other.publish("a", body("1"))
    process.wait(first)
    seen = len(process.delivered)
    # Held up, so that it comes back after everything.
    release = threading.Event()
    connect = process.broker._server.connect

    def held_up(deadline: float) -> Any:
        release.wait(10)
        return connect(deadline)

    process.broker._server.connect = held_up
    server.cli("CLIENT", "KILL", "TYPE", "pubsub")
    wait_for(lambda: not process.stats().up, "it notices")
    ids = [other.publish("a", body(str(number))) for number in range(300)]
    whole = other.publish("b", body("x"))
    release.set()
    process.wait(whole)
    news = process.delivered[seen:]
    gaps = [item for item in news if isinstance(item, Gap)]
    assert [gap.key for gap in gaps] == ["a"]
    after_it = [identifier for identifier in ids if place(identifier)[1] > gaps[0].seq]
    assert 5 <= len(after_it) < 300
    assert [item.id for item in news if isinstance(item, Message)] == [*after_it, whole]
    assert process.stats().gaps == 1


def test_a_log_that_was_deleted_is_told_as_a_new_life_within_seconds(
    start: Start, server: RedisServer, namespace: str
) -> None:
    process = start()
    process.cover(["a"], [], None)
    old = process.publish("a", body("x"))
    process.wait(old)
    server.cli("DEL", f"{{{namespace}}}:log")
    lives = wait_for(lambda: [item for item in process.delivered if isinstance(item, Life)][1:], "it is told")
    assert (lives[0].head, lives[0].earlier) == (0, {})
    new = process.publish("a", body("y"))
    process.wait(new)
    assert (place(new)[1], place(new)[0] == place(old)[0]) == (1, False)


def test_a_life_that_continues_keeps_everything(start: Start, server: RedisServer, namespace: str) -> None:
    process, other = start(), start()
    process.cover(["a"], [], None)
    old = other.publish("a", body("x"))
    process.wait(old)
    # As a server that was started anew with all its data finds it.
    server.cli("HSET", f"{{{namespace}}}:log", "run", "another")
    new = other.publish("a", body("y"))
    process.wait(new)
    life = [item for item in process.delivered if isinstance(item, Life)][-1]
    assert life.earlier == {place(old)[0]: place(old)[1]}
    assert (place(new)[1], place(new)[0]) == (place(old)[1] + 1, life.epoch)
    assert process.stats().gaps == 0


def test_a_log_that_lost_its_latest_events_is_another_life(start: Start, server: RedisServer, namespace: str) -> None:
    process, other = start(), start()
    process.cover(["a"], [], None)
    ids = [other.publish("a", body(str(number))) for number in range(5)]
    process.wait(ids[-1])
    # As a replica that was promoted before it had the last two.
    log, keys, stream = (f"{{{namespace}}}:{name}" for name in ("log", "keys", "k:a"))
    server.cli("XTRIM", stream, "MAXLEN", "0")
    server.cli("ZADD", keys, 3, "k:a")
    server.cli("HSET", log, "seq", 3, "run", "another")
    new = other.publish("a", body("new"))
    [life] = wait_for(lambda: [item for item in process.delivered if isinstance(item, Life)][1:], "it is told")
    # Everybody is told to start over, from behind the first event of the new life.
    assert life == (place(new)[0], 4, {place(ids[0])[0]: 3})
    process.wait(other.publish("a", body("newer")))


def test_an_older_state_is_no_silent_hole_for_keys_that_lost_nothing(server: RedisServer, namespace: str) -> None:
    house, other = (House(broker_url=server.url, namespace=namespace) for _ in range(2))
    stream = house.open("quiet")
    other.manager.publish("quiet", "first")
    assert house.data(stream) == ["first"]
    other.manager.publish("busy", "of no interest here")
    listener = house.manager._broker._listener  # type: ignore[attr-defined]
    wait_for(lambda: listener._place.head == 2, "a look at the log has gone past it")
    # As a replica that was promoted before it had the second event; and somebody publishes before we look.
    log, keys = f"{{{namespace}}}:log", f"{{{namespace}}}:keys"
    with server.client() as client, client.pipeline(transaction=True) as pipe:
        pipe.zrem(keys, "k:busy")
        pipe.hset(log, mapping={"seq": 1, "run": "another"})
        pipe.execute()
    other.manager.publish("quiet", "second")
    other.manager.publish("quiet", "third")
    seen: list[Any] = []
    wait_for(lambda: seen.extend(house.events(stream)) or "third" in [e.data for e in seen], "it goes on")
    assert [event.data for event in seen] == ["second", "third"]
    late = house.open("quiet")
    other.manager.publish("quiet", "fourth")
    wait_for(lambda: house.data(late) == ["fourth"], "for new streams too")
    house.manager.shutdown(), other.manager.shutdown()


def test_a_log_that_begins_anew_while_a_history_is_read_hides_none_of_its_events(
    server: RedisServer, namespace: str
) -> None:
    house, other = (House(broker_url=server.url, namespace=namespace) for _ in range(2))
    first = other.manager.publish("k", "0")
    for number in range(1, 30):
        other.manager.publish("k", str(number))
    broker = house.manager._broker
    assert isinstance(broker, RedisBroker)
    fly, turns = broker._fly, [True]

    def fly_late(flight: Any) -> None:
        if turns:  # where it was asked for is known, and what is read then is of another life
            turns.clear()
            server.cli("DEL", f"{{{namespace}}}:log")
            other.manager.publish("k", "new 0")
        fly(flight)

    broker._fly = fly_late  # type: ignore[method-assign]
    stream = house.open("k", after=first)
    seen: list[Any] = []
    wait_for(lambda: seen.extend(house.events(stream)) or "stream-reset" in [e.event for e in seen], "it is told")
    wait_for(lambda: house.manager._windows.epoch != place(first)[0], "the new life has begun here")
    house.settle()
    ids = [other.manager.publish("k", f"new {number}") for number in range(1, 20)]
    wait_for(lambda: seen.extend(house.events(stream)) or (seen and seen[-1].id == ids[-1]), "it goes on")
    assert [event.data for event in seen][-19:] == [f"new {number}" for number in range(1, 20)]
    house.manager.shutdown(), other.manager.shutdown()


def test_a_reader_that_is_killed_while_it_waits_for_its_turn_keeps_nobody_waiting(start: Start) -> None:
    class Killed(BaseException):
        pass

    class Runway:
        """Where the first one is killed, as gevent kills a greenlet wherever it waits."""

        def acquire(self, timeout: float) -> bool:
            broker._runway = runway
            another.start()
            wait_for(lambda: broker._boarding is not None and broker._boarding.keys == ["a", "b"], "another boards")
            raise Killed

    def board() -> None:
        with pytest.raises(BrokerError, match="interrupted"):
            broker.cover(["b"], ["b"], None)
        told.append("b")

    process = start(broker_timeout=10)
    broker = process.broker
    told: list[str] = []
    process.cover(["a", "b"], [], None)
    process.publish("a", body("x"))
    another = threading.Thread(target=board)
    runway, broker._runway = broker._runway, Runway()  # type: ignore[assignment]
    with pytest.raises(Killed):
        process.cover(["a"], ["a"], None)
    another.join(5)
    assert told == ["b"], "who was aboard is told at once"
    process.cover(["a", "b"], ["a", "b"], None)
    assert {item.key for item in process.delivered if isinstance(item, History)} == {"a", "b"}


def test_several_hundred_keys_are_brought_up_to_date_in_the_order_of_the_log(start: Start, server: RedisServer) -> None:
    process, other = start(), start()
    keys = [f"key {number}" for number in range(1200)]
    process.cover(keys[:50], [], None)
    process.cover(keys, [], None)
    server.cli("CLIENT", "KILL", "TYPE", "pubsub")
    ids = [other.publish(key, body("x")) for key in keys[::3] * 2]
    process.wait(ids[-1])
    assert [message.id for message in process.messages] == ids


def test_without_a_history_what_was_missed_is_told(start: Start, server: RedisServer) -> None:
    process, other = start(history_size=0), start(history_size=0)
    process.cover(["a", "b"], [], None)
    other.publish("a", body("1"))
    wait_for(lambda: len(process.messages) == 1, "it is delivered")
    for _ in range(100):
        server.cli("CLIENT", "KILL", "TYPE", "pubsub")
        before = len(process.messages)
        other.publish("a", body("2"))
        wait_for(lambda before=before: process.stats().gaps or len(process.messages) > before, "it is told, or here")  # type: ignore[misc]
        if process.stats().gaps:
            break
    assert [item.key for item in process.delivered if isinstance(item, Gap)] == ["a"]


def test_a_stream_cannot_begin_while_redis_is_away_unless_all_is_known(tmp_path: Any) -> None:
    with RedisServer(tmp_path / "redis") as server:
        house = House(broker_url=server.url, broker_timeout=0.5)
        last = house.manager.publish("k", "x")
        house.open("k", after=last)
        server.kill()
        wait_for(lambda: not house.manager.stats().broker.up, "it notices")
        house.manager.open(["k"], *_parts(house), last_event_id=last)
        with pytest.raises(BrokerError, match=r"redis://127\.0\.0\.1"):
            house.manager.open(["other"], *_parts(house))
        assert house.manager.keys() == ["k"]
        house.manager.shutdown()


def _parts(house: House) -> Any:
    return RecordingTransport(), house.runtime


def test_an_application_that_is_thrown_away_leaves_no_thread_and_no_connection(
    server: RedisServer, namespace: str
) -> None:
    house = House(broker_url=server.url, namespace=namespace)
    house.open("k").close()
    assert isinstance(house.manager._broker, RedisBroker)
    listener = house.manager._broker._listener
    assert listener is not None
    ended = listener._ended
    assert not ended.is_set()
    del house, listener
    wait_for(lambda: gc.collect() is not None and ended.is_set(), "its thread ends")
    assert channels(server, namespace) == set()
