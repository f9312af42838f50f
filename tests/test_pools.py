"""Pools: who gets what, what a client that comes back gets, and what is left when all have gone."""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
from fakes import Clock, House, RecordingTransport
from hypothesis import settings as hypothesis_settings
from support import wait_for

from flask_sse_stream.brokers.base import BrokerStats, Deliver, History, Idle, Position, never_idle
from flask_sse_stream.brokers.memory import MemoryBroker, _Entry
from flask_sse_stream.errors import BrokerError, EventError, SettingsError, StreamsFull
from flask_sse_stream.event import Event, EventDecoder, Message
from flask_sse_stream.pools import MAX_KEYS, PoolManager, check_key
from flask_sse_stream.settings import Settings
from flask_sse_stream.stream import CloseReason, Stream
from flask_sse_stream.testing.contracts.replay import ReplayMachine

# Publishing


def test_an_event_reaches_the_streams_of_its_key_and_no_others() -> None:
    house = House()
    a, b, both = house.open("a"), house.open("b"), house.open("a", "b")
    house.manager.publish("a", "1")
    house.manager.publish("b", "2")
    house.manager.publish("c", "3")
    assert (house.data(a), house.data(b), house.data(both)) == (["1"], ["2"], ["1", "2"])


def test_publish_all_reaches_every_key_once_and_no_stream_of_one_request() -> None:
    house = House()
    a, both, alone = house.open("a"), house.open("a", "b"), house.attach()
    house.manager.publish_all({"n": 1}, event="all")
    assert house.data(a) == house.data(both) == ['{"n":1}']
    assert house.data(alone) == []


def test_publish_returns_the_id_that_the_client_sees() -> None:
    house = House()
    stream = house.open()
    ids = [house.manager.publish("k", "x"), house.manager.publish_all("y"), house.manager.publish("k", "z", id="own")]
    assert [event.id for event in house.events(stream)] == ids
    assert ids[2] == "own"
    epoch, _, seq = ids[0].rpartition("-")
    assert (epoch.isalnum(), seq, len(ids[0]) < 128) == (True, "1", True)


@pytest.mark.parametrize(
    "arguments",
    [
        {"data": None},
        {"data": "x", "id": ""},
        {"data": "x", "id": "end"},
        {"data": "x", "event": "a\nb"},
        {"data": "x", "retry": -1},
        {"data": {1}},
        {"data": "\ud800"},
        {"data": float("nan")},
        {"data": Event("x"), "event": "y"},
        {"data": Event("x", id="end")},
        {"data": Event()},
        {"data": "x" * 2000},
        {"data": ["x" * 2000]},
    ],
    ids=str,
)
@pytest.mark.parametrize("to_all", [False, True])
def test_a_bad_event_is_refused_before_anyone_is_touched(arguments: dict[str, object], to_all: bool) -> None:
    house = House(max_event_bytes=1000)
    stream = house.open()
    before = house.take(stream)
    assert before
    with pytest.raises(EventError):
        if to_all:
            house.manager.publish_all(**arguments)  # type: ignore[arg-type]
        else:
            house.manager.publish("k", **arguments)  # type: ignore[arg-type]
    assert house.take(stream) == b""
    assert house.manager.publish("k", "x").endswith("-1"), "a refused event takes no number"


@pytest.mark.parametrize("key", ["", "x" * 256, "a\nb", "\0", "a\x85", "\ud800", 5, None, b"k", ("a",)], ids=repr)
def test_a_bad_key_is_refused_by_everything_that_takes_one(key: object) -> None:
    house = House()
    for call in (
        lambda: house.manager.publish(key, "x"),  # type: ignore[arg-type]
        lambda: house.open(key),  # type: ignore[arg-type]
        lambda: house.manager.streams(key),  # type: ignore[arg-type]
        lambda: house.manager.close(key),  # type: ignore[arg-type]
    ):
        with pytest.raises(EventError, match="^key must"):
            call()
    assert house.manager.count_all() == 0


@pytest.mark.parametrize("key", ["*", "?[", "a:b", "ключ", "x" * 255, " ", "\N{COMBINING ACUTE ACCENT}"])
def test_no_character_of_a_key_has_a_meaning(key: str) -> None:
    assert check_key(key) == key
    house = House()
    stream, other = house.open(key), house.open("a")
    house.manager.publish(key, "x")
    assert (house.data(stream), house.data(other)) == (["x"], [])


def test_a_key_in_another_normal_form_is_another_key() -> None:
    house = House()
    composed, decomposed = house.open("\u00e9"), house.open("e\u0301")
    house.manager.publish("\u00e9", "x")
    assert (house.data(composed), house.data(decomposed)) == (["x"], [])


def test_publishing_without_listeners_costs_nothing_but_its_history() -> None:
    house = House(history_size=2)
    for number in range(5):
        house.manager.publish("k", str(number))
    assert house.manager.stats().outbox == 0
    assert house.runtime.started == 0


def test_a_publisher_that_outruns_the_flusher_gives_it_its_turn() -> None:
    house = House(queue_events=10_000)
    stream = house.open()
    house.runtime.on_turn = house.manager.flush
    for number in range(2000):
        house.manager.publish("k", str(number))
    assert house.runtime.turns > 0
    assert house.manager.stats().outbox <= 256
    assert house.data(stream) == [str(number) for number in range(2000)]


def test_the_flusher_gives_the_loop_back_in_between() -> None:
    house = House()
    streams = [house.open() for _ in range(3000)]
    for _ in range(20):
        house.manager.publish("k", "x")
    slices = 1
    while house.manager.flush() == 0.0:
        slices += 1
    assert slices > 5
    assert all(len(house.data(stream)) == 20 for stream in streams)


def test_a_stream_that_comes_or_goes_during_a_pass_gets_each_event_once_or_not_at_all() -> None:
    house = House()
    streams = [house.open() for _ in range(3000)]
    house.manager.publish("k", "x")
    assert house.manager.flush() == 0.0, "the pass is under way"
    streams[-1].close()
    late = house.open()
    house.manager.publish("k", "y")
    assert house.data(late) == ["y"]
    assert all(house.data(stream) == ["x", "y"] for stream in streams[:-1])


def test_publishing_from_a_callback_of_a_stream_that_ends_keeps_the_order() -> None:
    house = House(queue_events=2)
    slow, fine = house.open(), house.open()
    house.take(slow)
    slow.on_close(lambda stream, reason: house.manager.publish("k", "from the callback"))
    got = []
    for number in range(4):
        house.manager.publish("k", str(number))
        got += house.data(fine)
    assert slow.reason is CloseReason.SLOW
    assert sorted(got, key=got.index) == got
    assert [*got, *house.data(fine)] == ["0", "1", "2", "from the callback", "3"]


def test_events_of_many_threads_arrive_once_and_in_each_ones_order() -> None:
    house = House(queue_events=100_000, history_size=100_000)
    stream = house.open()
    flushing = threading.Lock()

    def turn() -> None:
        if flushing.acquire(blocking=False):
            house.manager.flush()
            flushing.release()

    house.runtime.on_turn = turn

    def work(name: int) -> None:
        for number in range(500):
            house.manager.publish("k", {"who": name, "n": number})

    threads = [threading.Thread(target=work, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    events = house.events(stream)
    got = [json.loads(event.data or "") for event in events]
    assert [int((event.id or "").rpartition("-")[2]) for event in events] == list(range(1, 3001))
    for name in range(6):
        assert [item["n"] for item in got if item["who"] == name] == list(range(500))


def test_a_signal_handler_that_interrupts_a_publish_may_publish_itself() -> None:
    house = House(queue_events=1_000_000, history_size=10)
    stream = house.open()
    house.take(stream)
    fired: list[str] = []
    previous = signal.signal(signal.SIGVTALRM, lambda *_: fired.append(house.manager.publish("k", "signal")))
    own: list[str] = []
    data: list[str | None] = []
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0003, 0.0003)
        while len(fired) < 200:
            own.append(house.manager.publish("k", "view"))
            if len(own) % 100 == 0:
                data += house.data(stream)  # opens and takes hold the lock that the handler must do without
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
    data += house.data(stream)
    assert len(set(own + fired)) == len(own) + len(fired) == len(data)
    assert data.count("signal") == len(fired)


def test_an_object_that_is_collected_may_publish() -> None:
    house = House()
    stream = house.open()

    class Farewell:
        def __del__(self) -> None:
            house.manager.publish("k", "gone")

    with house.manager.lock:  # the collector runs anywhere
        Farewell()
    assert house.data(stream) == ["gone"]


def test_what_the_published_hook_raises_is_the_publishers_and_nothing_is_published() -> None:
    house = House()
    stream = house.open()
    house.take(stream)

    def hook(key: str | None, event: Event) -> None:
        raise RuntimeError(f"{key} {event.data}")

    house.manager.hooks.published = hook
    with pytest.raises(RuntimeError, match="k x"):
        house.manager.publish("k", "x")
    assert house.take(stream) == b""


def test_what_other_hooks_raise_is_logged_and_concerns_no_stream(caplog: pytest.LogCaptureFixture) -> None:
    house = House()

    def hook(*arguments: object) -> None:
        raise RuntimeError("mine")

    house.manager.hooks.opened = house.manager.hooks.closed = hook
    stream = house.open()
    house.manager.publish("k", "x")
    assert house.data(stream) == ["x"]
    stream.close()
    assert caplog.text.count("a hook raised") == 2


# Opening


def test_a_stream_says_at_once_what_the_client_needs_to_come_back() -> None:
    house = House(retry=1234)
    house.manager.publish("k", "before")
    stream = house.open()
    assert house.data(stream) == []
    assert house.decoders[stream].retry == 1234
    house.manager.publish("k", "missed")
    assert house.data(house.open(after=house.decoders[stream].last_event_id)) == ["missed"]


def test_without_retry_the_first_bytes_are_a_comment() -> None:
    house = House(retry=None, history_size=0)
    assert house.take(house.open()) == b": open\n\n"


def test_keys_named_twice_count_once() -> None:
    house = House()
    stream = house.open("a", "a")
    house.manager.publish("a", "x")
    assert house.data(stream) == ["x"]
    assert house.manager.count("a") == 1


@pytest.mark.parametrize("number", [0, MAX_KEYS + 1])
def test_the_number_of_keys_of_one_stream_is_bounded(number: int) -> None:
    house = House()
    with pytest.raises(EventError, match=f"1 to {MAX_KEYS} keys, not {number}"):
        house.manager.open([str(n) for n in range(number)], RecordingTransport(), house.runtime)  # type: ignore[arg-type]


def test_a_limit_is_answered_before_anything_is_registered() -> None:
    house = House(max_clients=2)
    first = house.open("a")
    house.attach()
    for full in (lambda: house.open("b"), house.attach):
        with pytest.raises(StreamsFull, match="SSE_MAX_CLIENTS ") as caught:
            full()
        assert (caught.value.limit, caught.value.key) == (2, None)
    assert (house.manager.count_all(), house.manager.count("b"), house.manager.stats().refused) == (2, 0, 2)
    first.close()
    house.open("b")


def test_a_limit_of_one_key_leaves_the_others_open() -> None:
    house = House(max_clients_per_key=1)
    house.open("a")
    with pytest.raises(StreamsFull, match="'a' .* SSE_MAX_CLIENTS_PER_KEY") as caught:
        house.open("b", "a")
    assert caught.value.key == "a"
    house.open("b")
    assert (house.manager.count("a"), house.manager.count("b")) == (1, 1)


def test_the_flusher_is_started_once_and_again_when_its_thread_has_died() -> None:
    house = House()
    house.open()
    house.open()
    assert house.runtime.started == 1
    house.runtime.alive = False
    house.open()
    assert house.runtime.started == 2


# Replay


def test_a_client_that_comes_back_gets_exactly_what_it_missed() -> None:
    house = House()
    first = house.open("a", "b")
    house.manager.publish("a", "1")
    cursor = house.cursor(first)
    first.close(CloseReason.PEER)
    for key, data in (("b", "2"), ("c", "not mine"), ("a", "3"), (None, "4")):
        house.manager.publish(key, data) if key else house.manager.publish_all(data)
    second = house.open("a", "b", after=cursor)
    house.manager.publish("a", "5")
    assert house.data(second) == ["2", "3", "4", "5"]
    assert house.manager.stats().replayed == 3


def test_a_cursor_of_one_key_is_good_for_others() -> None:
    house = House()
    cursor = house.manager.publish("a", "1")
    house.manager.publish("b", "2")
    assert house.data(house.open("b", after=cursor)) == ["2"]


def test_an_id_of_the_users_own_finds_its_place() -> None:
    house = House()
    house.manager.publish("k", "1", id="größe")
    house.manager.publish("k", "2")
    house.manager.publish("k", "3", id="größe")
    house.manager.publish("k", "4", id=0)
    assert house.data(house.open(after="größe")) == ["4"], "the newest use of an id counts"
    house.manager.publish("k", "5")
    assert house.data(house.open(after="0")) == ["5"]


def reset_of(house: House, stream: Stream) -> dict[str, object]:
    [event] = house.events(stream)
    assert event.event == "stream-reset"
    assert event.id == f"{house.manager._windows.epoch}-{house.manager._windows.head}"
    found: dict[str, object] = json.loads(event.data or "")
    return found


@pytest.mark.parametrize(
    ("cursor", "reason"),
    [
        ("0123456789ab-1", "epoch"),
        ("x", "unknown"),
        ("-", "unknown"),
        ("$", "unknown"),
        ("-1", "unknown"),
        ("{epoch}-", "unknown"),
        ("{epoch}--1", "unknown"),
        ("{epoch}-99", "unknown"),
        ("{epoch}-18446744073709551616", "unknown"),
        ("{epoch}-\u0661", "unknown"),
        ("{epoch}-1,{epoch}-2", "unknown"),
        ("{epoch}-1\0", "unknown"),
        ("x" * 60_000, "unknown"),
        ("own of another pool", "unknown"),
        ("'; DROP TABLE events; --", "unknown"),
    ],
)
def test_a_cursor_that_leads_nowhere_is_told_to_reload_and_goes_on_live(cursor: str, reason: str) -> None:
    house = House()
    house.manager.publish("k", "1")
    house.manager.publish("other", "secret", id="own of another pool")
    epoch = str(house.manager._windows.epoch)
    stream = house.open(after=cursor.replace("{epoch}", epoch))
    assert reset_of(house, stream) == {"reason": reason, "keys": ["k"]}
    house.manager.publish("k", "2")
    assert house.data(stream) == ["2"]
    assert house.manager.stats().resets == 1


def test_a_cursor_older_than_the_history_is_told_which_keys_lost_something() -> None:
    house = House(history_size=2)
    keys = ("a", "b", "c")
    cursor = house.manager.publish("a", "0")
    for number in range(4):
        house.manager.publish("a", str(number))
    assert reset_of(house, house.open(*keys, after=cursor)) == {"reason": "history", "keys": ["a"]}
    # It goes on at the head, so of the others it does not get what it missed either, although that is there.
    house.manager.publish("b", "kept")
    assert reset_of(house, house.open(*keys, after=cursor)) == {"reason": "history", "keys": ["a", "b"]}
    assert house.data(house.open("b", after=cursor)) == ["kept"]
    house.manager.publish_all("kept for all")
    assert reset_of(house, house.open(*keys, after=cursor)) == {"reason": "history", "keys": ["a", "b", "c"]}


def test_a_cursor_at_the_very_edge_of_the_history_loses_nothing() -> None:
    house = House(history_size=2)
    ids = [house.manager.publish("k", str(number)) for number in range(4)]
    assert house.data(house.open(after=ids[1])) == ["2", "3"]
    assert reset_of(house, house.open(after=ids[0]))["reason"] == "history"


def test_events_older_than_the_history_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    house = House(history_ttl=60.0)
    first = house.manager.publish("k", "1")
    clock.now += 40
    second = house.manager.publish("k", "2")
    clock.now += 30
    assert house.data(house.open(after=first)) == ["2"]
    clock.now += 40
    assert house.data(house.open(after=second)) == []
    assert reset_of(house, house.open(after=first))["reason"] == "history"


def test_what_went_to_all_is_part_of_every_history() -> None:
    house = House(history_size=1)
    cursor = house.manager.publish("k", "1")
    house.manager.publish_all("2")
    assert house.data(house.open(after=cursor)) == ["2"]
    house.manager.publish_all("3")
    assert reset_of(house, house.open("k", "j", after=cursor)) == {"reason": "history", "keys": ["k", "j"]}


def test_the_cursor_of_a_reset_is_good_for_the_next_time() -> None:
    house = House()
    house.manager.publish("k", "1")
    cursor = house.cursor(house.open(after="lost"))
    house.manager.publish("k", "2")
    assert house.data(house.open(after=cursor)) == ["2"]


def test_a_new_client_gets_the_latest_events_only_where_that_is_wanted() -> None:
    plain, wanted = House(), House(join_history=2)
    for house in (plain, wanted):
        for data, key in enumerate("abaac"):
            house.manager.publish(key, str(data))
        house.manager.publish_all("5")
    assert plain.data(plain.open("a", "b")) == []
    assert wanted.data(wanted.open("a", "b")) == ["1", "2", "3", "5"], "the latest two of each, in order"
    stream = wanted.open("nothing of its own")
    assert wanted.data(stream) == ["5"]
    assert wanted.cursor(stream)


def test_a_new_client_has_a_place_even_if_the_latest_events_have_no_id() -> None:
    house = House(join_history=1)
    house.manager.publish("k", Event(comment="only a comment"))
    cursor = house.cursor(house.open())
    house.manager.publish("k", "missed")
    assert house.data(house.open(after=cursor)) == ["missed"]


def test_without_history_there_are_no_ids_and_no_replay() -> None:
    house = House(history_size=0)
    identifier = house.manager.publish("k", "1")
    stream = house.open(after=identifier)
    house.manager.publish("k", "2")
    assert house.events(stream) == [Event("2")]
    assert house.manager.stats().windows == 0


def test_an_event_between_replay_and_live_is_neither_lost_nor_doubled() -> None:
    house = House()
    cursor = house.manager.publish("k", "0")
    house.manager.publish("k", "1")
    witness = house.open()
    house.manager.publish("k", "in the outbox while the next one opens")
    stream = house.open(after=cursor)
    house.manager.publish("k", "2")
    assert house.data(stream) == ["1", "in the outbox while the next one opens", "2"]
    assert house.data(witness) == ["in the outbox while the next one opens", "2"]


def test_a_log_that_begins_anew_is_told_to_every_listener() -> None:
    house = House()
    stream, alone = house.open("k"), house.attach()
    old = house.manager.publish("k", "1")
    house.take(stream), house.take(alone)
    broker = house.manager._broker
    assert isinstance(broker, MemoryBroker)
    broker._epoch, broker._numbers = "another", itertools.count(41)
    house.manager.publish("k", "2")
    reset, event = house.events(stream)
    assert json.loads(reset.data or "") == {"reason": "epoch", "keys": ["k"]}
    assert (reset.event, reset.id, event.data, event.id) == ("stream-reset", "another-40", "2", "another-41")
    assert house.take(alone) == b""
    assert json.loads(house.events(house.open(after=old))[0].data or "")["reason"] == "epoch"


def test_an_event_of_the_old_log_is_not_offered_after_the_news_of_the_new_one() -> None:
    house = House(queue_events=100)
    streams = [house.open() for _ in range(2000)]
    for _ in range(40):
        house.manager.publish("k", "old")
    assert house.manager.flush() == 0.0, "a round is under way"
    broker = house.manager._broker
    assert isinstance(broker, MemoryBroker)
    broker._epoch, broker._numbers = "another", itertools.count(1)
    house.manager.publish("k", "new")
    for stream in streams:
        seen = [event.event or event.data for event in house.events(stream)]
        assert seen[-2:] == ["stream-reset", "new"]
        assert set(seen[:-2]) <= {"old"}


def test_heartbeats_go_on_while_the_outbox_never_becomes_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    house = House(ping_interval=10.0, queue_events=100_000)
    house.runtime.give_turn = lambda: False  # type: ignore[method-assign]
    silent, _ = house.open("silent"), house.open("busy")
    house.take(silent)
    for _ in range(20):
        for _ in range(200):  # more than one round offers
            house.manager.publish("busy", "x")
        clock.now += 1
        house.manager.flush()
        assert house.manager.stats().outbox > 0
    assert silent.take() == b": ping\n\n"


def test_a_message_that_is_delivered_twice_is_offered_once() -> None:
    house = House()
    stream = house.open()
    house.manager.publish("k", "1")
    message = house.manager._windows.latest(["k"], 1, 0.0)[0]
    house.manager.deliver(message)
    assert house.data(stream) == ["1"]


class TurningLog:
    """A broker outside the process whose log begins anew while a stream is being opened."""

    remembers = True

    def __init__(self, settings: Settings) -> None:
        self.asked = 0
        self.log = [Message("k", "new", seq, Event(str(seq)).encode(), time.monotonic()) for seq in range(1, 6)]

    def start(self, deliver: Deliver, idle: Idle = never_idle) -> None:
        self.deliver = deliver

    def publish(self, key: str | None, body: bytes, once: str | None = None) -> str:
        raise NotImplementedError

    def lease(self, name: str, holder: str, seconds: float) -> bool:
        raise NotImplementedError

    def cover(self, keys: Sequence[str | None], fetch: Sequence[str | None], after: str | None) -> Position:
        self.asked += 1
        if self.asked == 1:
            return Position("old", 7)
        if self.asked == 2:
            for key in fetch:
                self.deliver(History(key, "old", 0, [], 7))
            for message in self.log:
                self.deliver(message)
            return Position("old", 7)
        for key in fetch:
            self.deliver(History(key, "new", 0, [m for m in self.log if m.key == key], 5))
        return Position("new", 5)

    def stats(self) -> BrokerStats:
        return BrokerStats()

    def close(self) -> None:
        pass


def test_a_log_that_begins_anew_while_a_stream_is_opened_is_asked_again() -> None:
    house = House()
    house.manager = PoolManager(Settings(), broker=TurningLog)
    stream = house.manager.open(["k"], RecordingTransport(), house.runtime, last_event_id="new-3")  # type: ignore[arg-type]
    taken = stream.take() or b""
    assert [event.data for event in EventDecoder().feed(taken)] == ["4", "5"]


# What is left over


def test_pools_vanish_with_their_last_stream() -> None:
    house = House()
    first, second = house.open("a", "b"), house.open("b")
    assert (sorted(house.manager.keys()), house.manager.count("b")) == (["a", "b"], 2)
    first.close()
    assert (house.manager.keys(), house.manager.streams("b"), house.manager.streams("a")) == (["b"], [second], [])
    second.close()
    assert (house.manager.keys(), house.manager.count_all(), house.manager.count("b")) == ([], 0, 0)


def test_windows_that_nobody_uses_are_forgotten_and_no_gap_is_hidden_by_that(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    house = House(history_ttl=100.0)
    old = house.manager.publish("forgotten", "x")
    for number in range(50):
        house.manager.publish(f"other {number}", "x")
    clock.now += 200
    for _ in range(60):
        house.manager.publish("busy", "x")
    assert house.manager.stats().windows <= 2
    assert reset_of(house, house.open("forgotten", after=old))["reason"] == "history"


def test_a_quiet_key_keeps_its_place_while_others_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    house = House(history_ttl=100.0)
    stream = house.open("quiet")
    cursor = house.cursor(stream)
    for round_number in range(10):
        for number in range(20):
            house.manager.publish(f"other {round_number} {number}", "x")
        clock.now += 150
    stream.close(CloseReason.PEER)
    house.manager.publish("busy", "x")
    clock.now += 5
    house.manager.publish("quiet", "news")
    assert house.data(house.open("quiet", after=cursor)) == ["news"]


def test_a_thousand_streams_that_leave_leave_nothing_behind() -> None:
    house = House(max_age=100)
    gc.collect()
    references = []
    for number in range(1000):
        stream = house.open(f"key {number % 7}", "all")
        references.append(weakref.ref(stream))
        stream.close(CloseReason.PEER)
    del stream
    house.flush()
    gc.collect()
    stats = house.manager.stats()
    assert (stats.streams, stats.keys, stats.opened, stats.closed) == (0, 0, 1000, {"peer": 1000})
    assert [reference() for reference in references] == [None] * 1000


# The heartbeat and other ends


def test_only_a_stream_that_was_silent_gets_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    house = House(ping_interval=10.0)
    silent, busy, alone = house.open("silent"), house.open("busy"), house.attach()
    for stream in (silent, busy, alone):
        house.take(stream)
    clock.now += 6
    house.manager.publish("busy", "x")
    house.take(busy)
    assert house.flush() == pytest.approx(4.0)
    clock.now += 4
    assert (house.take(silent), house.take(busy), house.take(alone)) == (b": ping\n\n", b"", b": ping\n\n")
    clock.now += 6
    assert (house.take(silent), house.take(busy)) == (b"", b": ping\n\n")
    clock.now += 4
    assert house.take(silent) == b": ping\n\n"


def test_a_ping_interval_of_zero_means_none(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    house = House(ping_interval=0)
    stream = house.open()
    house.take(stream)
    clock.now += 100_000
    assert house.flush() == house.manager.settings.send_timeout  # to see who is stuck
    assert house.take(stream) == b""


def test_a_transport_that_hangs_in_a_write_is_cut_off_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    house = House(ping_interval=10.0, send_timeout=15.0)
    stream = house.open()
    assert stream.take()  # and never comes back
    for _ in range(3):
        clock.now += 10
        house.flush()
    assert stream.reason is CloseReason.STALLED
    assert isinstance(transport := stream.transport, RecordingTransport)
    assert transport.closes == 1


@pytest.mark.parametrize("ping_interval", [0, 10.0])
def test_a_transport_that_hangs_is_cut_off_also_where_events_keep_coming_and_are_dropped(
    ping_interval: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    house = House(ping_interval=ping_interval, send_timeout=15.0, overflow="drop_oldest", queue_events=3)
    stream, healthy = house.open(), house.open()
    assert stream.take()  # and never comes back
    began = clock.now
    while stream.reason is None:
        clock.now += 1
        house.manager.publish("k", "x")
        house.take(healthy)
        assert clock.now - began <= 2 * 15 + ping_interval, "it goes on for ever"
    assert stream.reason is CloseReason.STALLED
    assert healthy.reason is None


def test_a_client_that_reads_steadily_and_slowly_holds_the_others_up_once_until_it_has_caught_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    house = House(overflow="drop_oldest", queue_events=10, ping_interval=0)
    slow, healthy = house.open(), house.open("k", "other")
    for stream in (slow, healthy):
        house.take(stream)

    def rests_in_a_burst() -> int:
        rests = 0
        for _ in range(200):
            house.manager.publish("k", "x" * 40_000)  # each of them is a write of its own
        while (delay := house.manager.flush()) is not None and delay < 0.02:
            while healthy.take():
                pass
            if delay:
                rests += 1
                clock.now += delay
                assert slow.take()  # it takes bytes all the time
                slow.progressed()
        return rests

    assert 0 < rests_in_a_burst() <= 25
    assert slow.waiting > 5
    assert rests_in_a_burst() < 5, "it has not caught up"  # the few are for the healthy one, who comes at once
    while slow.take():
        pass
    assert 0 < rests_in_a_burst() <= 25


def test_a_stream_is_rotated_between_80_and_100_percent_of_its_age(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    house = House(max_age=100.0, ping_interval=0)
    streams = [house.open() for _ in range(50)]
    clock.now += 79.9
    house.flush()
    assert house.manager.count_all() == 50
    clock.now += 10
    house.flush()
    assert 0 < house.manager.count_all() < 50
    clock.now += 10.2
    house.flush()
    assert {stream.reason for stream in streams} == {CloseReason.ROTATED}


def test_close_ends_the_streams_of_a_key_for_good() -> None:
    house = House()
    mine, both, other = house.open("a"), house.open("b", "a"), house.open("b")
    assert house.manager.close("a") == 2
    for stream in (mine, both):
        assert house.events(stream) == [Event("", event="close", id="end")]
        assert (stream.reason, stream.take()) == (CloseReason.KICKED, None)
    assert other.reason is None
    assert house.manager.close("a") == 0


def test_what_was_published_before_a_close_comes_before_the_end_however_far_the_flusher_is() -> None:
    house = House()
    streams = [house.open("k") for _ in range(200)]
    other = house.open("other")
    for number in range(3):
        house.manager.publish("k", str(number))
    house.manager.publish_all("all")
    a_round = house.manager._rounds._make_a_round()
    next(a_round)  # the first event was offered to some of them
    house.manager.publish("k", "bye")
    assert house.manager.close("k") == 200
    for _ in a_round:
        pass
    for stream in streams:
        assert house.data(stream) == ["0", "1", "2", "all", "bye", ""]
    assert house.data(other) == ["all"]


def test_what_was_published_before_a_close_comes_whatever_the_queue_may_hold() -> None:
    house = House(queue_events=2)
    stream = house.open()
    for number in range(5):
        house.manager.publish("k", str(number))
    house.manager.close("k", reconnect=True)
    assert house.data(stream) == ["0", "1", "2", "3", "4"]
    assert stream.reason is CloseReason.ROTATED


def test_a_stream_that_overflowed_is_given_nothing_beyond_the_hole() -> None:
    house = House(queue_events=2)
    stream = house.open()
    assert house.events(stream) == []
    messages = [Message("k", "e", number, b"data: x\n\n", 0.0) for number in range(1, 5)]
    with house.manager.lock:
        for message in messages[:3]:
            stream.offer(message)
    assert stream.take() == messages[0].frame + messages[1].frame, "its client makes room before it is closed"
    with house.manager.lock:
        stream.offer(messages[3])
    assert (stream.waiting, stream.reason) == (0, None)
    house.flush()
    assert stream.reason is CloseReason.SLOW


def test_close_with_reconnect_asks_the_clients_to_come_back() -> None:
    house = House(retry=1000)
    streams = [house.open() for _ in range(20)]
    house.attach()
    assert house.manager.close_all(reconnect=True) == 21
    waits = set()
    for stream in streams:
        assert house.events(stream) == []
        assert stream.reason is CloseReason.ROTATED
        waits.add(house.decoders[stream].retry)
        assert house.decoders[stream].last_event_id not in ("", "end")
    assert len(waits) > 5
    assert all(wait is not None and 500 <= wait <= 1500 for wait in waits)


def test_drain_gives_every_client_its_own_time_to_come_back() -> None:
    house = House(retry=1000, drain_seconds=4)
    streams = [house.open() for _ in range(20)]
    assert house.manager.drain() == 20
    waits = set()
    for stream in streams:
        house.events(stream)
        waits.add(house.decoders[stream].retry)
    assert len(waits) > 10
    assert all(wait is not None and 1000 <= wait <= 5000 for wait in waits)
    assert house.manager.stats().closed == {"shutdown": 20}


def test_a_dropped_event_is_told_to_the_hook_outside_the_lock() -> None:
    house = House(overflow="drop_oldest", queue_events=1)
    stream = house.open()
    house.take(stream)
    told: list[tuple[Stream, int, bool]] = []

    def hook(stream: Stream, count: int) -> None:
        free = house.manager.lock.try_acquire()
        if free:
            house.manager.lock.release()
        told.append((stream, count, free))

    house.manager.hooks.dropped = hook
    house.manager.publish("k", "1")
    house.manager.publish("k", "2")
    house.flush()
    assert told == [(stream, 1, True)]


# The process


def test_nothing_starts_before_the_first_stream() -> None:
    before = threading.active_count()
    manager = PoolManager()
    manager.publish("k", "x")
    assert threading.active_count() == before
    assert manager._flusher is None


def test_an_unknown_broker_is_refused_at_once_with_those_there_are() -> None:
    with pytest.raises(
        SettingsError,
        match="SSE_BROKER_URL must begin with one of memory://, sqlite://, redis://.*, not 'carrier-pigeon'",
    ):
        PoolManager(Settings(broker_url="carrier-pigeon://"))


def test_a_forked_child_has_a_log_of_its_own_and_none_of_its_parents_streams() -> None:
    house = House()
    house.open()
    parents = house.manager.publish("k", "x")
    pid = os.fork()
    if pid == 0:  # the child: nothing of the test runner may run in it
        ok = False
        try:
            own = house.manager.publish("k", "y")
            ok = own.split("-")[0] != parents.split("-")[0] and own.endswith("-1")
            child_stream = house.open()
            house.manager.publish("k", "z")
            ok = ok and house.data(child_stream) == ["z"] and house.manager.count_all() == 1
        finally:
            os._exit(0 if ok else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert house.manager.count_all() == 1


def test_shutdown_ends_everything() -> None:
    house = House()
    stream = house.open()
    house.manager.shutdown()
    assert (stream.reason, house.runtime.alive) == (CloseReason.SHUTDOWN, False)


def test_the_manager_itself_is_not_kept_alive() -> None:
    manager = PoolManager()
    manager.publish("k", "x")
    reference = weakref.ref(manager)
    del manager
    wait_for(lambda: gc.collect() is not None and reference() is None, "the manager is collected")


def test_a_flusher_does_not_keep_its_manager_alive_and_ends_with_it() -> None:
    house = House()
    runtime = house.runtime
    house.open().close()
    house.flush()
    reference = weakref.ref(house.manager)
    del house
    wait_for(lambda: gc.collect() is not None and reference() is None, "the manager is collected")
    assert not runtime.alive


def test_a_publisher_inside_a_locked_section_does_not_wait_for_the_flusher() -> None:
    house = House(queue_events=10_000)
    stream = house.open()
    for _ in range(255):
        house.manager.publish("k", "x")
    turns = house.runtime.turns
    with house.manager.lock:  # as a signal handler would that interrupted it here
        for _ in range(300):
            house.manager.publish("k", "x")
    assert house.runtime.turns == turns
    assert len(house.data(stream)) == 555


def test_the_last_bytes_of_a_stream_that_ended_may_not_hang_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    house = House(ping_interval=0, send_timeout=20.0)
    stuck, slow, done = house.open(), house.open(), house.open()
    transports = [stream.transport for stream in (stuck, slow, done)]
    for stream in (stuck, slow, done):
        stream.take()
    house.manager.close("k")
    done.take()
    done.transport = None  # its body was closed
    clock.now += 19
    slow.take()
    assert house.flush() == pytest.approx(1.0)
    clock.now += 2
    house.flush()
    closes = [transport.closes for transport in transports if isinstance(transport, RecordingTransport)]
    assert closes == [1, 0, 0], "only who took no byte for so long is cut off"
    clock.now += 20
    house.flush()
    assert [t.closes for t in transports if isinstance(t, RecordingTransport)] == [1, 1, 0]
    assert house.flush() is None


def test_a_transport_that_sees_the_end_has_seen_the_last_bytes() -> None:
    for _ in range(200):
        house = House()
        stream = house.open()
        seen: list[bytes] = []

        def drain(stream: Stream = stream, seen: list[bytes] = seen) -> None:
            while (data := stream.take()) is not None:
                seen.append(data)
                time.sleep(0)

        thread = threading.Thread(target=drain)
        thread.start()
        stream.close(CloseReason.KICKED, b": last\n\n")
        thread.join(10)
        assert b"".join(seen).endswith(b": last\n\n")


def test_a_runtime_that_cannot_wait_lets_the_publisher_go_on() -> None:
    house = House(queue_events=10_000)
    house.open()
    runtime = house.runtime
    runtime.give_turn = lambda: False  # type: ignore[method-assign]
    for _ in range(1000):
        house.manager.publish("k", "x")
    assert house.manager.stats().outbox > 256


@pytest.mark.parametrize("url", ["memory://", "sqlite:///{path}/log.db"])
def test_a_wall_clock_that_jumps_an_hour_changes_neither_order_nor_history_nor_heartbeats(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(broker_url=url.format(path=tmp_path), history_ttl=600.0, ping_interval=1000.0)
    first, stream, expected = house.manager.publish("k", "0"), house.open(), []
    real = time.time
    for number, jump in enumerate((3600, -3600, 0, 86_400, -86_400), 1):
        monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
        house.manager.publish("k", str(number))
        expected.append(str(number))
        assert house.data(house.open(after=first)) == expected
    assert house.data(stream) == expected
    assert house.take(stream) == b"", "no heartbeat was due"
    house.manager.shutdown()


# Once, and by one


@pytest.mark.parametrize("bad", ["", "x" * 256, "a\nb", 5])
def test_a_bad_idempotency_key_is_refused_by_its_name_before_anything_is_published(bad: object) -> None:
    house = House()
    stream = house.open()
    with pytest.raises(EventError, match="idempotency_key must"):
        house.manager.publish("k", "x", idempotency_key=bad)  # type: ignore[arg-type]
    assert house.data(stream) == []


def test_a_publish_that_is_tried_again_with_its_idempotency_key_speaks_once() -> None:
    house = House()
    stream = house.open()
    ids = {house.manager.publish("k", "x", idempotency_key="order 7") for _ in range(3)}
    ids |= {house.manager.publish_all("x", idempotency_key="order 7")}
    assert len(ids) == 1
    assert house.data(stream) == ["x"]


def test_an_idempotency_key_whose_first_call_was_interrupted_is_an_error_and_no_endless_wait() -> None:
    broker = MemoryBroker(Settings(broker_timeout=0.05))
    broker._once["task"] = _Entry("k", b"data: x\n\n")  # as if the first call had been killed right here
    with pytest.raises(BrokerError, match="'task' was interrupted"):
        broker.publish("k", b"data: x\n\n", "task")


def test_a_lease_is_given_back_when_its_holder_shuts_down(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/log.db"
    one, other = PoolManager(Settings(broker_url=url)), PoolManager(Settings(broker_url=url))
    assert one.lease("clock", 1000)
    assert one.lease("clock", 1000)
    assert not other.lease("clock", 1000)
    one.shutdown()
    assert other.lease("clock", 1000)
    other.shutdown()


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), 1e9])
def test_a_lease_for_no_sensible_time_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"a lease is for 0\.01 to 86400 seconds, not"):
        PoolManager().lease("clock", seconds)


# Every client against a model

TestReplay = ReplayMachine.TestCase
TestReplay.settings = hypothesis_settings(max_examples=100, stateful_step_count=40, deadline=None)
