"""The end of all streams of a process: what each client is told, who is waited for, and for how long."""

from __future__ import annotations

import gc
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fakes import Clock, House, RecordingTransport
from support import wait_for

from flask_sse_stream.errors import StreamsFull
from flask_sse_stream.pools import PoolManager
from flask_sse_stream.settings import Settings
from flask_sse_stream.stream import CloseReason, Stream
from flask_sse_stream.transports.base import current_runtime
from flask_sse_stream.wsgi import respond


def let_go(stream: Stream) -> None:
    """What a transport does when the last bytes have left."""
    stream.transport = None


def test_every_client_is_given_its_own_time_to_come_back_spread_evenly() -> None:
    house = House(retry=1000, drain_seconds=4)
    streams = [house.open() for _ in range(400)]
    assert house.manager.drain() == 400
    waits = []
    for stream in streams:
        house.events(stream)
        waits.append(house.decoders[stream].retry or 0)
        assert stream.reason is CloseReason.SHUTDOWN
    assert len(set(waits)) == 400
    for tenth in range(10):  # of 4,000 ms; one on an edge may count to either side
        assert 39 <= sum(1000 + 400 * tenth <= wait < 1400 + 400 * tenth for wait in waits) <= 41
    assert house.manager.stats().closed == {"shutdown": 400}


def test_with_more_clients_than_milliseconds_all_are_within_the_time() -> None:
    house = House(retry=None, drain_seconds=0.01)
    streams = [house.open() for _ in range(50)]
    house.manager.drain()
    waits = []
    for stream in streams:
        house.events(stream)
        waits.append(house.decoders[stream].retry)
    assert set(waits) == set(range(10))


def test_what_was_published_before_comes_before_the_end() -> None:
    house = House(queue_events=20)
    stream = house.open()
    house.take(stream)
    for number in range(15):
        house.manager.publish("k", str(number))
    # Two batches: not all of it is in the stream's queue when the first round comes to the end of streams.
    house.manager.begin_drain()
    while stream.reason is None:
        assert house.manager.flush() is not None
    assert house.data(stream) == [str(number) for number in range(15)]
    assert house.decoders[stream].retry is not None


def test_what_is_published_after_it_began_does_not_put_the_end_off() -> None:
    house = House()
    stream = house.open()
    house.manager.begin_drain()
    house.manager.flush()
    assert stream.reason is CloseReason.SHUTDOWN
    house.manager.publish("k", "late")
    house.flush()
    assert house.data(stream) == []


def test_no_stream_begins_once_it_has_begun() -> None:
    house = House(drain_seconds=60)
    house.open()
    assert not house.manager.stats().draining
    house.manager.begin_drain()
    assert house.manager.stats().draining
    with pytest.raises(StreamsFull, match="this process is about to stop and takes no more streams") as refused:
        house.open()
    assert (refused.value.draining, refused.value.limit) == (True, 0)
    with pytest.raises(StreamsFull):
        house.attach()
    assert house.manager.stats().refused == 2


@pytest.mark.parametrize(("when_full", "status"), [("retry", "200 OK"), ("503", "503 Service Unavailable")])
def test_whoever_asks_meanwhile_is_answered_so_as_to_come_back(when_full: str, status: str) -> None:
    manager = PoolManager(Settings(when_full=when_full, retry=1000))
    manager.begin_drain()
    answers: list[tuple[str, list[tuple[str, str]]]] = []
    environ = {"REQUEST_METHOD": "GET", "QUERY_STRING": "connectKey=k", "SERVER_PROTOCOL": "HTTP/1.1"}
    body = b"".join(respond(manager, environ, lambda status, headers: answers.append((status, headers))))
    assert answers[0][0] == status
    if when_full == "retry":
        assert body.startswith(b"retry: ")
        assert 1000 <= int(body.split()[1]) <= 3000
    else:
        assert ("Retry-After", "1") in answers[0][1]


def test_it_is_done_when_the_last_of_the_bytes_and_the_feeders_have_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    house = House(drain_seconds=5, ping_interval=0)
    quick, slow, fed = house.open(), house.open(), house.attach()
    fed.room = current_runtime().waiter()
    house.manager.begin_drain()
    house.manager.flush()
    let_go(quick)
    let_go(fed)
    clock.now += 1
    house.manager.flush()
    assert house.manager.drain_waits()
    let_go(slow)
    house.manager.flush()
    assert house.manager.drain_waits()
    fed.room = None
    house.manager.flush()
    assert not house.manager.drain_waits()


def test_those_who_do_not_read_are_cut_off_at_the_end_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    house = House(drain_seconds=5, ping_interval=0)
    before = house.open()
    before.close(CloseReason.KICKED)  # its last bytes do not leave either
    streams = [before, *(house.open() for _ in range(3))]
    transports = [stream.transport for stream in streams]
    fed = streams[-1]
    fed.room = current_runtime().waiter()  # somebody sleeps in the code that feeds it
    house.manager.begin_drain()
    clock.now += 4.9
    house.flush()
    assert [transport.closes for transport in transports] == [0] * 4  # type: ignore[union-attr]
    clock.now += 0.2
    house.flush()
    assert [transport.closes for transport in transports] == [1] * 4  # type: ignore[union-attr]
    house.flush()
    assert [transport.closes for transport in transports] == [1] * 4  # type: ignore[union-attr]
    assert house.manager.drain_waits()  # for their servers to notice
    for stream in streams:
        let_go(stream)
    house.flush()
    assert not house.manager.drain_waits()


def test_nobody_waits_for_ever_for_a_server_that_does_not_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    house = House(drain_seconds=5)
    kept = house.open()
    house.manager.begin_drain()
    house.flush()
    clock.now += 5.9
    house.flush()
    assert house.manager.drain_waits()
    clock.now += 0.2
    assert not house.manager.drain_waits()
    assert kept.transport is not None


def test_a_second_call_cannot_put_the_end_off_but_bring_it_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    house = House(drain_seconds=5, ping_interval=0)
    stream = house.open()
    transport = stream.transport
    assert isinstance(transport, RecordingTransport)
    house.manager.begin_drain()
    house.manager.begin_drain(60)
    clock.now += 1
    house.manager.begin_drain(1)
    house.flush()
    assert transport.closes == 0
    clock.now += 1.1
    house.flush()
    assert transport.closes == 1


def test_a_stream_that_nobody_has_any_more_is_not_waited_for() -> None:
    house = House(drain_seconds=60)
    house.open()
    house.manager.begin_drain()
    house.flush()
    gc.collect()
    house.flush()
    assert not house.manager.drain_waits()


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused_before_anything_happens(timeout: float) -> None:
    house = House()
    with pytest.raises(ValueError, match="timeout of a drain is a number of seconds from 0 up, not"):
        house.manager.drain(timeout)
    assert not house.manager.stats().draining


def test_without_streams_it_is_over_at_once() -> None:
    manager = PoolManager()
    assert manager.drain(60) == 0
    assert not manager.drain_waits()


def test_any_thread_may_wait_for_it_and_several_do() -> None:
    manager = PoolManager(Settings(drain_seconds=30))
    stream = manager.open(("k",), RecordingTransport(), current_runtime())
    with ThreadPoolExecutor(2) as executor:
        waiting = [executor.submit(manager.drain) for _ in range(2)]
        wait_for(lambda: stream.closed, "the flusher ends it")
        assert not any(future.done() for future in waiting)
        let_go(stream)
        assert sorted(future.result(10) for future in waiting) in ([0, 1], [1, 1])


def test_a_hook_that_the_flusher_calls_does_not_wait_for_itself() -> None:
    manager = PoolManager(Settings(drain_seconds=30))
    done = threading.Event()

    def closed(*_: object) -> None:
        manager.drain()
        done.set()

    manager.hooks.closed = closed
    stream = manager.open(("k",), RecordingTransport(), current_runtime())
    manager.begin_drain()
    assert done.wait(10)
    let_go(stream)


def test_others_have_their_turn_while_many_streams_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    house = House()
    for _ in range(100):
        house.open()

    def takes_a_while(*_: object) -> None:
        clock.now += 0.0003

    house.manager.hooks.closed = takes_a_while
    house.manager.begin_drain()
    ended = [0]
    while ended[-1] < 100:
        assert house.manager.flush() is not None
        ended.append(house.manager.stats().closed.get("shutdown", 0))
    # A slice is a millisecond, which the fourth of them exceeds.
    assert max(after - before for before, after in itertools.pairwise(ended)) <= 4
