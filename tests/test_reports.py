"""What processes say of themselves over the broker, and the reading of what may be anybody's."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fakes import House
from support import wait_for

from flask_sse_stream.access import CONTROL_KEY
from flask_sse_stream.event import Event
from flask_sse_stream.reports import REPORT_KEY, Report, inquiry_token


def report(house: House) -> Report:
    manager = house.manager
    streams = [stream for key in list(manager.keys()) for stream in manager.streams(key)]
    return Report.of(dict.fromkeys(streams), manager.counts.read(), draining=False, broker_up=True)


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
    assert inquiry_token(body) is None


def test_a_report_with_wrong_types_is_none() -> None:
    good = json.loads(report(House()).encode("t").removeprefix(b"data: "))
    assert Report.decode(Event(json.dumps(good)).encode(), "t") is not None
    wrong: list[dict[str, Any]] = [{"pid": "x"}, {"keys": [{"key": "k"}]}, {"keys": 7}, {"streams": None}, {"more": 1}]
    for change in wrong:
        assert Report.decode(Event(json.dumps({**good, **change})).encode(), "t") is None, change


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
