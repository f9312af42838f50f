"""A stream is a bounded queue with a cursor, and has one end."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
from fakes import Clock, House, RecordingTransport
from greenlet import GreenletExit

from flask_sse_stream.errors import EventError, StreamClosed
from flask_sse_stream.event import Event
from flask_sse_stream.stream import CloseReason, Lock, Stream


def test_what_is_sent_comes_out_in_order_and_in_one_piece() -> None:
    house = House()
    stream = house.attach()
    stream.send("a")
    stream.send({"n": 1}, event="e", id=0, retry=5)
    stream.send(Event("c"))
    stream.comment("aside\nmore")
    taken = stream.take()
    assert taken is not None
    assert taken.endswith(b'data: a\n\nid: 0\nevent: e\nretry: 5\ndata: {"n":1}\n\ndata: c\n\n: aside\n: more\n\n')
    assert stream.take() == b""


@pytest.mark.parametrize(
    "bad", [{}, {"data": b"x"}, {"data": "x", "id": "a\n"}, {"data": {1, 2}}, {"data": Event("x"), "id": 5}]
)
def test_a_bad_event_is_refused_in_the_sender_and_the_stream_goes_on(bad: dict[str, object]) -> None:
    house = House()
    stream = house.attach()
    with pytest.raises(EventError):
        stream.send(**bad)  # type: ignore[arg-type]
    stream.send("fine")
    assert house.data(stream) == ["fine"]


def test_an_event_that_is_too_large_is_refused() -> None:
    house = House(max_event_bytes=100)
    stream = house.attach()
    with pytest.raises(EventError, match="SSE_MAX_EVENT_BYTES=100"):
        stream.send("x" * 100)


def test_send_end_sends_the_last_event_with_the_id_end_and_ends_the_stream() -> None:
    house = House(close_event="bye")
    stream = house.attach()
    stream.send("a")
    stream.send_end("done", retry=9)
    assert house.events(stream)[-1] == Event("done", event="bye", id="end", retry=9)
    assert stream.take() is None
    assert (stream.closed, stream.reason) == (True, CloseReason.ENDED)


def test_send_end_without_a_name_fires_nothing_and_still_carries_the_id() -> None:
    house = House()
    stream = house.attach()
    stream.close_event = None
    stream.send_end()
    assert house.take(stream).endswith(b"\n\nid: end\n\n")
    assert house.manager.count_all() == 0


def test_the_id_end_is_for_send_end_alone() -> None:
    house = House()
    stream = house.attach()
    for bad in ({"data": "x", "id": "end"}, {"data": Event("x", id="end")}):
        with pytest.raises(EventError, match="send_end"):
            stream.send(**bad)  # type: ignore[arg-type]
    assert house.data(stream) == []


@pytest.mark.parametrize("call", ["send", "comment", "send_end"])
def test_after_the_end_every_way_to_send_raises_with_the_reason(call: str) -> None:
    stream = House().attach()
    stream.close(CloseReason.ROTATED)
    with pytest.raises(StreamClosed, match="rotated") as caught:
        getattr(stream, call)("x")
    assert caught.value.reason is CloseReason.ROTATED


def test_a_stream_ends_once_and_keeps_its_first_reason() -> None:
    house = House()
    stream = house.open("a", "b")
    stream.close(CloseReason.ROTATED, b": bye\n\n")
    stream.close(CloseReason.ERROR, b": never\n\n")
    assert stream.reason is CloseReason.ROTATED
    assert house.take(stream).endswith(b": bye\n\n")
    assert house.manager.stats().closed == {"rotated": 1}


def test_what_was_waiting_is_sent_before_the_end() -> None:
    house = House()
    stream = house.attach()
    stream.send("a")
    stream.close()
    assert house.data(stream) == ["a"]
    assert stream.take() is None


@pytest.mark.parametrize("reason", [CloseReason.SLOW, CloseReason.STALLED])
def test_a_client_that_does_not_read_is_cut_off_and_holds_nothing(reason: CloseReason) -> None:
    house = House()
    stream = house.attach()
    stream.send("a")
    transport = stream.transport
    assert isinstance(transport, RecordingTransport)
    stream.close(reason)
    assert stream.waiting == 0
    assert transport.closes == 1


def test_callbacks_are_called_once_with_the_reason_and_one_that_raises_does_not_stop_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stream = House().attach()
    seen: list[object] = []

    def bad(stream: Stream, reason: CloseReason) -> None:
        raise RuntimeError("mine")

    stream.on_close(bad)
    stream.on_close(lambda *arguments: seen.append(arguments))
    stream.close(CloseReason.KICKED)
    stream.close(CloseReason.KICKED)
    stream.on_close(lambda *arguments: seen.append("at once"))
    assert seen == [(stream, CloseReason.KICKED), "at once"]
    assert "a callback of on_close raised" in caplog.text


def test_what_a_callback_raises_beyond_exception_is_logged_unless_it_means_to_end_us(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Timeout(BaseException):
        """As gevent's."""

    def raising(error: BaseException) -> None:
        raise error

    house = House()
    first = house.open()
    first.on_close(lambda stream, reason: raising(Timeout("mine")))
    first.close()
    assert "a callback of on_close raised" in caplog.text
    for kill in (SystemExit, KeyboardInterrupt, GreenletExit):
        stream = house.open()
        stream.on_close(lambda stream, reason, kill=kill: raising(kill()))  # type: ignore[misc]
        with pytest.raises(kill):
            stream.close()
    assert house.manager.count_all() == 0


def test_every_send_and_the_end_wake_the_transport() -> None:
    stream = House().attach()
    transport = stream.transport
    assert isinstance(transport, RecordingTransport)
    stream.send("a")
    stream.comment()
    stream.close()
    assert transport.wakes == 3


# The bounds of the queue


def test_a_queue_that_is_full_of_events_ends_the_stream_by_default() -> None:
    house = House(queue_events=2)
    stream = house.open()
    house.take(stream)
    house.manager.publish("k", "1")
    house.manager.publish("k", "2")
    house.flush()
    assert stream.reason is None
    house.manager.publish("k", "3")
    house.flush()
    assert stream.reason is CloseReason.SLOW
    assert house.manager.count_all() == 0


def test_a_queue_that_is_full_of_bytes_ends_the_stream() -> None:
    house = House(queue_bytes=500)
    stream = house.open()
    house.take(stream)
    for _ in range(2):
        house.manager.publish("k", "x" * 300)
    house.flush()
    assert stream.reason is CloseReason.SLOW


def test_an_event_larger_than_the_whole_queue_is_sent_alone() -> None:
    house = House(queue_bytes=10)
    stream = house.open()
    house.take(stream)
    house.manager.publish("k", "x" * 300)
    assert house.data(stream) == ["x" * 300]


def test_bytes_that_were_taken_make_room_again() -> None:
    house = House(queue_events=2, queue_bytes=200)
    stream = house.open()
    for number in range(50):
        house.manager.publish("k", "x" * 60)
        assert len(house.events(stream)) == 1, number


def test_the_replay_does_not_count_against_the_queue() -> None:
    house = House(queue_events=5)
    first = house.open()
    cursor = house.cursor(first)
    for number in range(100):
        house.manager.publish("k", str(number))
        house.take(first)
    second = house.open(after=cursor)
    for number in range(100, 105):
        house.manager.publish("k", str(number))
    assert house.data(second) == [str(number) for number in range(105)]


def test_a_sender_that_overflows_its_own_stream_is_told() -> None:
    house = House(queue_events=1)
    stream = house.attach()
    stream.send("1")
    with pytest.raises(StreamClosed, match="slow"):
        stream.send("2")


def test_a_large_queue_leaves_in_pieces_of_bounded_size() -> None:
    house = House()
    stream = house.attach()
    for _ in range(10):
        stream.send("x" * 30_000)
    sizes = []
    while data := stream.take():
        sizes.append(len(data))
    assert max(sizes) <= 64 * 1024
    assert len(sizes) == 5


def test_a_ping_is_put_only_where_nothing_waits() -> None:
    house = House()
    stream = house.attach()
    house.take(stream)
    assert stream.put_ping()
    assert not stream.put_ping()
    assert stream.take() == b": ping\n\n"


def test_the_time_of_a_write_is_kept_until_the_transport_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    stream = House().attach()
    assert stream.take()
    assert stream.writing_since == clock.now
    assert stream.take() == b""
    assert stream.writing_since == 0.0


# The lock


def test_the_lock_keeps_other_threads_out_until_it_is_let_go() -> None:
    lock = Lock(lambda: None)
    found: list[bool] = []

    def look() -> None:
        thread = threading.Thread(target=lambda: found.append(lock.try_acquire()))
        thread.start()
        thread.join(5)

    with lock:
        look()
    look()
    assert found == [False, True]


def test_the_lock_is_native_where_the_standard_library_is_patched_too() -> None:
    assert type(Lock(lambda: None)._token).__module__ == "_queue"


def test_letting_the_lock_go_looks_at_what_happened_meanwhile() -> None:
    seen: list[bool] = []
    lock = Lock(lambda: seen.append(lock.try_acquire()))
    with lock:
        assert seen == []
    assert seen == [True]


def test_a_stream_that_ended_is_not_kept_alive_by_its_manager() -> None:
    house = House(max_age=60)
    stream = house.open("a", "b")
    house.take(stream)
    house.decoders.clear()
    reference = weakref.ref(stream)
    stream.close()
    house.flush()
    del stream
    gc.collect()
    assert reference() is None


def test_a_stream_shows_what_it_is() -> None:
    stream = House().open("a")
    assert repr(stream) == "<Stream keys=['a'] open, 2 waiting>"
    stream.close()
    assert "kicked" in repr(stream)
