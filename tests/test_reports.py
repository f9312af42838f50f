"""What processes say of themselves over the broker, and the reading of what may be anybody's."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fakes import House
from support import wait_for

from flask_sse_stream.access import CONTROL_KEY
from flask_sse_stream.event import Event
from flask_sse_stream.kicks import Kick, stream_name
from flask_sse_stream.reports import REPORT_KEY, Inquiry, Report
from flask_sse_stream.stream import CloseReason


def report(house: House, *of: str) -> Report:
    manager = house.manager
    streams = [stream for key in list(manager.keys()) for stream in manager.streams(key)]
    cells = manager.counts.read()
    return Report.of(dict.fromkeys(streams), cells, process="p", draining=False, broker_up=True, of=of)


def test_a_report_has_the_queues_of_each_key_and_comes_through_the_broker_as_it_was() -> None:
    house = House()
    house.take(house.open("a"))
    house.open("a", "b")
    for number in range(3):
        house.manager.publish("b", str(number))
    house.flush()
    found = report(house)
    assert [(key.key, key.streams, key.longest > 0) for key in found.keys] == [("a", 2, True), ("b", 1, True)]
    assert found.keys[0].waiting == found.keys[1].waiting == found.waiting >= 3
    assert (found.streams, found.more_keys) == (2, 0)
    assert found.lag_median > 0
    assert Report.decode(b"id: e-1\n" + found.encode("token"), "token") == found
    assert Report.decode(found.encode("token"), "another") is None


def test_a_report_of_many_keys_has_those_with_the_most_streams_and_says_how_many_others_there_are() -> None:
    house = House()
    for number in range(220):
        house.open(f"k{number}", "most")
    found = report(house)
    assert (len(found.keys), found.more_keys, found.keys[0].key) == (200, 21, "most")
    assert len(found.encode("t")) < house.manager.settings.max_event_bytes / 10


@pytest.mark.parametrize(
    "body",
    [b"", b"data: ", b"data: []\n\n", b"data: {}\n\n", b"data: 7\n\n", b"data: {" + b"[" * 5000 + b"\n\n", b"\xff\xfe"],
)
def test_what_is_no_report_and_no_inquiry_is_none(body: bytes) -> None:
    assert Report.decode(body, "t") is None
    assert Inquiry.decode(body) is None
    assert Kick.decode(body) is None


def test_a_report_with_wrong_types_is_none() -> None:
    good = json.loads(report(House()).encode("t").removeprefix(b"data: "))
    assert Report.decode(Event(json.dumps(good)).encode(), "t") is not None
    stream = {"name": "n", "seconds": 1, "waiting": 0, "sent": 0, "lag": 0, "user": 7}
    wrong: list[dict[str, Any]] = [
        {"pid": "x"}, {"keys": [{"key": "k"}]}, {"keys": 7}, {"streams": None}, {"more": 1}, {"streams": -1},
        {"seconds": float("nan")}, {"seconds": float("inf")}, {"streams": 10**30}, {"streams": True}, {"version": 2},
        {"host": "x" * 1000}, {"lag_buckets": ["x"]}, {"lag_buckets": [0] * 1000}, {"draining": 1},
        {"listened": [{"key": "k", "more_streams": 0, "streams": [stream]}]}, {"listened": [{"key": "k"}]},
    ]  # fmt: skip
    for change in wrong:
        assert Report.decode(Event(json.dumps({**good, **change})).encode(), "t") is None, change


def test_a_report_has_the_streams_of_the_keys_that_were_asked_for_those_with_the_longest_queues_first() -> None:
    house = House()
    first = house.open("a")
    house.take(first)
    streams = [first, house.open("b", "a"), *(house.open("a") for _ in range(58))]
    for stream in streams:
        house.take(stream)
    house.manager.publish("b", "waits")
    house.flush()
    [a, nobody] = [report(house, "a", "b").listened[0], report(house, "nobody").listened]
    assert nobody == ()
    assert (a.key, len(a.streams), a.more_streams) == ("a", 50, 10)
    assert [stream.waiting for stream in a.streams[:2]] == [1, 0]
    assert a.streams[0].name == stream_name("p", streams[1])
    assert a.streams[1].sent == first.sent > 0
    assert len({stream.name for stream in a.streams}) == 50
    found = report(house, "a")
    assert Report.decode(found.encode("t"), "t") == found


def test_a_report_that_is_too_long_for_the_broker_leaves_keys_out_and_says_how_many() -> None:
    house = House()
    for number in range(100):
        house.open(f"k{number}")
    found = Report.decode(report(house, "k1").encode("t", 3000), "t")
    assert found is not None
    assert 0 < len(found.keys) < 30
    assert len(found.keys) + found.more_keys == 100


def test_an_inquiry_asks_for_a_bounded_number_of_keys() -> None:
    asked = Inquiry("me", ("a", "\x02job", "日" * 255))
    assert Inquiry.decode(asked.encode()) == asked
    assert Inquiry.decode(Event(json.dumps({"inquiry": "me"})).encode()) == Inquiry("me")
    for of in (["k"] * 9, [1], "k", {}, None):
        assert Inquiry.decode(Event(json.dumps({"inquiry": "me", "of": of})).encode()) is None
    assert Inquiry.decode(Event(json.dumps({"inquiry": "x" * 1000})).encode()) is None


def test_one_stream_is_ended_by_its_name_and_no_other_for_good_or_to_come_back() -> None:
    house = House()
    streams = [house.open("k") for _ in range(3)]
    for stream in streams:
        house.take(stream)
    manager = house.manager
    for name in ("", "x", manager.asking.process, stream_name("another", streams[0]), "x" * 90):
        manager.asking.kick(name)
    house.flush()
    assert not any(stream.closed for stream in streams)
    manager.asking.kick(stream_name(manager.asking.process, streams[0]))
    manager.asking.kick(stream_name(manager.asking.process, streams[1]), reconnect=True)
    house.flush()
    assert [stream.reason for stream in streams] == [CloseReason.KICKED, CloseReason.ROTATED, None]
    assert b"id: end\n" in house.take(streams[0])
    back = house.take(streams[1])
    assert back.startswith(b"retry: ")
    assert b"id:" not in back


def test_an_inquiry_is_answered_once_beside_the_flusher_and_reaches_no_stream() -> None:
    house = House()
    stream = house.open("k")
    house.take(stream)
    broker: Any = house.manager._broker
    published: list[tuple[str | None, bytes]] = []
    publish = broker.publish

    def recording(key: str | None, body: bytes, once: str | None = None) -> str:
        published.append((key, body))
        return str(publish(key, body, once))

    broker.publish = recording
    broker.publish(CONTROL_KEY, Event(json.dumps({"inquiry": "me"})).encode())
    assert house.take(stream) == b""
    wait_for(lambda: len(published) == 2, "it has answered")
    key, body = published[1]
    answer = Report.decode(body, "me")
    assert (key, answer is not None and answer.streams) == (REPORT_KEY, 1)
    assert house.take(stream) == b""
