"""What publishers do that they should not: it is their error, and no stream notices."""

from __future__ import annotations

import gc
import threading
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from fakes import House
from support import wait_for

from flask_sse_stream import CloseReason, EventError, PoolManager, Settings, Stream
from flask_sse_stream.transports.base import current_runtime


class Unspeakable:
    """Raises whatever one asks of it."""

    def _raise(self, *_: Any) -> Any:
        raise KeyError("mine")

    __str__ = __repr__ = __hash__ = __eq__ = __bool__ = __len__ = __iter__ = __format__ = _raise  # type: ignore[assignment]


def deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(200_000):
        value = [value]
    return value


def cyclic() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["itself"] = {"a": [value]}
    return value


ARGUMENTS: dict[str, dict[str, Any]] = {
    "data that is deep": {"data": deep()},
    "data that is its own part": {"data": cyclic()},
    "data that raises": {"data": Unspeakable()},
    "data with a part that raises": {"data": {"a": [Unspeakable()]}},
    "a key of a dict that is no text": {"data": {(1, 2): 3}},
    "a number without end": {"data": 10**5000},
    "an event that raises": {"data": "x", "event": Unspeakable()},
    "an id that raises": {"data": "x", "id": Unspeakable()},
    "a retry that raises": {"data": "x", "retry": Unspeakable()},
    "a set": {"data": {1, 2}},
    "too much": {"data": "x" * 2_000_000},
    "too much JSON": {"data": ["x" * 1000] * 2000},
}


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("way", ["publish", "publish_all", "send"])
def test_what_cannot_be_sent_is_the_callers_error_and_no_stream_is_touched(name: str, way: str) -> None:
    house = House()
    stream, own = house.open(), house.attach()
    house.take(stream), house.take(own)
    before = house.manager.stats()
    call: Callable[..., object] = own.send if way == "send" else getattr(house.manager, way)
    with pytest.raises((EventError, KeyError)):
        call(*(["k"] if way == "publish" else []), **ARGUMENTS[name])
    assert house.manager.stats() == before
    assert (house.take(stream), house.take(own)) == (b"", b"")
    house.manager.publish("k", "fine")
    assert house.data(stream) == ["fine"]


def test_what_the_applications_own_encoder_raises_is_the_callers() -> None:
    class Mine(Exception):
        pass

    def dumps(value: Any) -> str:
        raise Mine

    manager = PoolManager(Settings(), dumps=dumps)
    with pytest.raises(Mine):
        manager.publish("k", {})
    assert manager.stats().published == 0


def test_a_text_that_is_too_large_is_refused_before_it_is_copied() -> None:
    house = House(max_event_bytes=1000)
    text = "x" * 50_000_000
    tracemalloc.start()
    try:
        with pytest.raises(EventError, match="SSE_MAX_EVENT_BYTES=1000"):
            house.manager.publish("k", text)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


# Streams that change while something is sent to all of them


def test_hooks_may_publish_close_and_open_in_the_midst_of_a_publish_to_all() -> None:
    house = House(queue_events=2)
    streams = [house.open(f"key-{number}", "all") for number in range(20)]
    for stream in streams:
        house.take(stream)
    opened: list[Stream] = []

    def closed(stream: Stream, reason: CloseReason) -> None:
        house.manager.publish("all", f"{stream.keys[0]} has left")
        house.manager.publish_all("told to all")
        if len(opened) < 5:
            opened.append(house.open("all"))
        house.manager.close("key-7")

    house.manager.hooks.closed = closed
    for number in range(3):  # more than a queue holds, so that all of those who do not read are closed
        house.manager.publish_all(str(number))
    house.flush()
    assert [stream.reason for stream in streams if stream.keys[0] != "key-7"] == [CloseReason.SLOW] * 19
    assert streams[7].reason in (CloseReason.SLOW, CloseReason.KICKED)
    late = house.open("all")
    house.take(late)
    house.manager.publish_all("goes on")
    assert house.data(late) == ["goes on"]


def test_a_stream_that_is_closed_by_what_it_is_told_closes_once() -> None:
    house = House()
    stream = house.open()
    reasons: list[CloseReason] = []

    def on_close(stream: Stream, reason: CloseReason) -> None:
        reasons.append(reason)
        stream.close()
        house.manager.close_all()

    stream.on_close(on_close)
    house.manager.close_all()
    assert reasons == [CloseReason.KICKED]
    assert house.manager.count_all() == 0


# Before there is anything, and after the end


@pytest.mark.parametrize("where", ["here", "in a thread", "in __del__"])
def test_publishing_after_the_end_neither_hangs_nor_harms(where: str) -> None:
    manager = PoolManager(Settings())
    manager.publish("k", "before any stream")
    manager.shutdown()
    done: list[str] = []

    class Garbage:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            done.append(manager.publish("k", "late"))

    if where == "here":
        done.append(manager.publish("k", "late"))
    elif where == "in a thread":
        threading.Thread(target=lambda: done.append(manager.publish("k", "late"))).start()
    else:
        Garbage()
        gc.collect()
    wait_for(lambda: done, "it has its number")
    assert manager.count_all() == 0


def test_managers_that_come_and_go_in_one_process_leave_no_thread_and_no_greenlet() -> None:
    def once() -> None:
        manager = PoolManager(Settings())
        runtime = current_runtime()

        class Transport:
            ready = None

            def wake(self) -> None: ...

            def close(self) -> None: ...

        for number in range(3):
            manager.open([f"k-{number}"], Transport(), runtime)
        manager.publish_all("x")
        manager.shutdown()

    def alive() -> int:
        gc.collect()
        threads = sum("sse" in thread.name for thread in threading.enumerate())
        return threads + sum(type(item).__name__ == "GeventFlusher" for item in gc.get_objects())

    once()
    time.sleep(0)
    before = alive()
    for _ in range(20):
        once()
    wait_for(lambda: alive() <= before, "their flushers have ended")
