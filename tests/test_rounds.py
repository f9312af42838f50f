"""The flusher's rounds: events that are sent ahead of the queues, and transports that do not take them after all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fakes import Clock, House, RecordingTransport

from flask_sse_stream.brokers.base import Life
from flask_sse_stream.stream import CloseReason, Stream


class PushTransport(RecordingTransport):
    """Has room; what it is pushed it takes, or refuses after ``meanwhile`` has happened."""

    def __init__(self) -> None:
        super().__init__()
        self.ready = self  # type: ignore[assignment]
        self.pushed: list[bytes] = []
        self.takes = True
        self.meanwhile: Callable[[], object] = lambda: None

    def push(self, streams: list[Stream], chunk: bytes) -> list[Stream]:
        self.meanwhile()
        if self.takes:
            self.pushed += [chunk] * len(streams)
        return [] if self.takes else streams


@pytest.fixture
def house() -> House:
    return House()


def listen(house: House, *keys: str) -> tuple[Stream, PushTransport]:
    """A stream that has sent what it began with."""
    transport = PushTransport()
    stream = house.manager.open(keys or ["k"], transport, house.runtime)  # type: ignore[arg-type]
    house.data(stream)
    return stream, transport


def test_a_single_event_is_sent_ahead_of_an_empty_queue(house: House) -> None:
    stream, transport = listen(house)
    house.manager.publish("k", "x")
    assert house.data(stream) == []
    assert [b"data: x\n" in chunk for chunk in transport.pushed] == [True]
    assert stream.cursor == 1


def test_what_was_sent_to_each_stream_is_counted_whichever_way_it_went(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    house = House(ping_interval=10)
    stream, transport = listen(house)
    assert stream.sent == house.manager.stats().sent_bytes > 0
    for takes in (True, False):
        transport.takes = takes
        for happens in (lambda: house.manager.publish("k", "x"), lambda: setattr(clock, "now", clock.now + 11)):
            before = stream.sent
            happens()
            house.flush()
            assert (stream.sent > before) is takes
            house.take(stream)
            assert stream.sent == house.manager.stats().sent_bytes > before


def test_several_events_go_through_the_queue_and_are_joined(house: House) -> None:
    stream, transport = listen(house)
    house.manager.publish("k", "x")
    house.manager.publish("k", "y")
    assert house.data(stream) == ["x", "y"]
    assert transport.pushed == []


def test_events_of_different_keys_are_each_sent_ahead_of_the_queues(house: House) -> None:
    streams = {key: listen(house, key) for key in "abc"}
    for key in "abc":
        house.manager.publish(key, key)
    for key, (stream, transport) in streams.items():
        assert house.data(stream) == []
        assert [f"data: {key}\n".encode() in chunk for chunk in transport.pushed] == [True]


def test_a_stream_of_several_keys_gets_their_events_joined_and_in_order(house: House) -> None:
    both, transport = listen(house, "a", "b")
    _, other = listen(house, "b")
    house.manager.publish("a", "1")
    house.manager.publish("b", "2")
    assert house.data(both) == ["1", "2"]
    assert (len(transport.pushed), len(other.pushed)) == (0, 1)


def test_what_goes_to_all_is_joined_with_what_goes_to_a_key(house: House) -> None:
    stream, transport = listen(house)
    house.manager.publish("k", "1")
    house.manager.publish_all("2")
    assert house.data(stream) == ["1", "2"]
    assert transport.pushed == []


def test_an_event_that_the_transport_does_not_take_comes_before_what_was_sent_meanwhile(house: House) -> None:
    stream, transport = listen(house)
    transport.takes = False
    transport.meanwhile = lambda: stream.send("later")
    house.manager.publish("k", "x")
    assert house.data(stream) == ["x", "later"]


def test_an_event_that_the_transport_does_not_take_comes_before_the_end(house: House) -> None:
    stream, transport = listen(house)
    transport.takes = False
    transport.meanwhile = lambda: stream.send_end("over")
    house.manager.publish("k", "x")
    assert house.data(stream) == ["x", "over"]


def test_an_event_that_the_transport_does_not_take_is_no_burden_to_a_stream_that_was_cut_off(house: House) -> None:
    stream, transport = listen(house)
    transport.takes = False
    transport.meanwhile = lambda: stream.close(CloseReason.STALLED)
    house.manager.publish("k", "x")
    house.flush()
    assert stream.waiting == 0


def test_an_event_of_the_old_log_does_not_follow_the_news_of_the_new_one(house: House) -> None:
    stream, transport = listen(house)
    transport.takes = False
    transport.meanwhile = lambda: house.manager.deliver(Life("anew", 7))
    house.manager.publish("k", "x")
    assert [event.event for event in house.events(stream)] == ["stream-reset"]
    assert house.cursor(stream) == "anew-7"
    assert stream.cursor == 7


def test_a_heartbeat_is_sent_ahead_of_an_empty_queue_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    house = House(ping_interval=10.0)
    stream, transport = listen(house)
    clock.now += 10.0
    house.flush()
    assert transport.pushed == [b"8\r\n: ping\n\n\r\n"]
    transport.takes = False
    transport.meanwhile = lambda: stream.send("x")
    clock.now += 10.0
    assert house.data(stream) == ["x"], "who has something to say needs no heartbeat"
    transport.meanwhile = lambda: None
    clock.now += 10.0
    assert house.take(stream) == b": ping\n\n"


def test_streams_that_fall_due_at_the_same_moment_all_get_their_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    house = House(ping_interval=10.0, max_age=None)
    streams = [house.open() for _ in range(200)]
    for stream in streams:
        house.data(stream)
    clock.now += 10.0
    assert all(house.take(stream) == b": ping\n\n" for stream in streams)
