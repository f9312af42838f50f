"""A loop says how far it is, and nothing that it says or cannot say gets in its way."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import House
from flask import Flask

from flask_sse_stream import SSE, BrokerError, EventError, Publisher
from flask_sse_stream.progress import progress


class Loop:
    """Records what a loop publishes, by a clock that is set by hand; a publish may take its time, or fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.told: list[dict[str, Any]] = []
        self.takes = 0.0
        self.fails: Exception | None = None
        self.tries = 0
        monkeypatch.setattr("flask_sse_stream.progress.time", self)

    def monotonic(self) -> float:
        return self.now

    def publish(self, key: str, data: dict[str, Any], *, event: str) -> str:
        assert (key, event) == ("import", "progress")
        self.now += self.takes
        self.tries += 1
        if self.fails is not None:
            raise self.fails
        self.told.append(data)
        return "id"

    def over(self, items: Iterable[Any], seconds: float = 0.05, **options: Any) -> None:
        for _ in progress(self.publish, items, key="import", **options):
            self.now += seconds

    def all(self, name: str) -> list[Any]:
        return [data[name] for data in self.told]


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    return Loop(monkeypatch)


def test_it_gives_the_items_and_says_how_many_are_done(loop: Loop) -> None:
    assert list(progress(loop.publish, "abcd", key="import", interval=0)) == ["a", "b", "c", "d"]
    assert loop.all("count") == [0, 1, 2, 3, 4, 4]
    assert loop.all("fraction") == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert set(loop.all("total")) == {4}
    assert loop.all("state") == ["running"] * 5 + ["done"]


def test_nothing_is_worked_at_before_the_first_event_was_told(loop: Loop) -> None:
    items = progress(loop.publish, (len(loop.told) for _ in range(2)), key="import")
    assert loop.told == []
    assert next(items) == 1


def test_it_speaks_at_most_once_in_an_interval_and_always_first_and_last(loop: Loop) -> None:
    loop.over(range(10), 0.0625, interval=0.25)
    assert loop.all("count") == [0, 4, 8, 10]
    loop.told.clear()
    loop.over(range(3), 0.001)
    assert loop.all("count") == [0, 3]


def test_the_interval_begins_when_an_event_has_been_published(loop: Loop) -> None:
    loop.takes = 0.5
    loop.over(range(8), 0.0625, interval=0.25)
    assert loop.all("count") == [0, 4, 8, 8]


def test_rate_and_remaining_time_are_those_of_late(loop: Loop) -> None:
    def items() -> Iterator[int]:
        yield from range(10)
        loop.now += 0.9  # the next ones are ten times slower
        for number in range(10, 50):
            yield number
            loop.now += 0.9

    loop.over(items(), 0.1, total=100, interval=0)
    assert loop.told[0]["rate"] is loop.told[0]["remaining"] is None
    assert [loop.told[5][name] for name in ("count", "rate", "remaining")] == [5, 10.0, 9.5]
    before_the_end = loop.told[-2]
    assert before_the_end["count"] == 50
    assert before_the_end["rate"] == pytest.approx(1, abs=0.01)
    assert before_the_end["remaining"] == pytest.approx(50, abs=0.5)
    assert loop.told[-1]["remaining"] == 0


@pytest.mark.parametrize(
    ("items", "options", "total"),
    [([1, 2], {}, 2), (iter([1, 2]), {}, 2), (range(2), {"total": 7}, 7), ((x for x in (1, 2)), {}, None)],
)
def test_the_total_is_the_length_if_there_is_one_and_none_is_given(
    loop: Loop, items: Iterable[int], options: dict[str, Any], total: int | None
) -> None:
    loop.over(items, **options)
    first, last = loop.told[0], loop.told[-1]
    assert (first["total"], first["fraction"]) == (total, None if total is None else 0.0)
    assert (last["total"], last["fraction"], last["state"]) == (2, 1.0, "done")


def test_a_total_that_was_too_low_is_no_total(loop: Loop) -> None:
    loop.over(range(3), total=2, interval=0)
    assert loop.all("total") == [2, 2, 2, None, 3]
    assert loop.all("fraction") == [0.0, 0.5, 1.0, None, 1.0]


def test_a_loop_over_nothing_is_done(loop: Loop) -> None:
    loop.over([])
    assert [(data["state"], data["count"], data["fraction"]) for data in loop.told] == [
        ("running", 0, 0.0),
        ("done", 0, 1.0),
    ]


def test_a_loop_that_is_left_says_so_at_once(loop: Loop) -> None:
    for number in progress(loop.publish, range(10), key="import"):
        if number == 3:
            break
    assert loop.all("state") == ["running", "stopped"]
    assert (loop.told[-1]["count"], loop.told[-1]["fraction"]) == (3, 0.3)


def test_an_error_in_the_loop_or_of_the_iterable_ends_it_with_the_same_words(loop: Loop) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("of the iterable")

    with pytest.raises(KeyError, match="of the iterable"):
        loop.over(items())
    with contextlib.suppress(ZeroDivisionError):
        for _ in progress(loop.publish, range(3), key="import"):
            1 / 0  # noqa: B018
    assert loop.all("state") == ["running", "stopped"] * 2
    assert loop.all("count") == [0, 1, 0, 0]


def test_a_generator_that_is_kept_is_closed_by_who_keeps_it(loop: Loop) -> None:
    with contextlib.closing(progress(loop.publish, range(3), key="import")) as kept:
        for _ in kept:
            break
        assert loop.all("state") == ["running"]
    assert loop.all("state") == ["running", "stopped"]


@pytest.mark.parametrize("error", [BrokerError("the broker is away"), EventError("too large")])
def test_what_cannot_be_published_does_not_stop_the_loop(
    loop: Loop, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    loop.fails = error
    assert list(progress(loop.publish, range(5), key="import", interval=0)) == [0, 1, 2, 3, 4]
    assert caplog.record_tuples == [
        ("flask_sse_stream", logging.WARNING, f"nobody is told how far 'import' is: {error}")
    ]


def test_a_broker_that_hangs_does_not_hold_up_every_item(loop: Loop) -> None:
    loop.fails = BrokerError("away")
    loop.takes = 2.0
    began = loop.now
    loop.over(range(100), 0.1)
    # Ten seconds of work. One publish each time that five seconds have gone by, the first and the last.
    assert loop.tries == 4
    assert loop.now - began == pytest.approx(10 + 4 * 2.0)


def test_it_speaks_again_when_the_broker_is_back(loop: Loop) -> None:
    loop.fails = BrokerError("away")
    for number in progress(loop.publish, range(100), key="import"):
        loop.now += 0.1
        if number == 10:
            loop.fails = None
    assert loop.told[0]["count"] == 50
    assert loop.told[-1]["state"] == "done"


def test_what_is_wrong_is_told_at_the_call(loop: Loop) -> None:
    def call(items: Any = (), **options: Any) -> None:
        progress(loop.publish, items, **{"key": "import", **options})

    with pytest.raises(EventError, match="key must have 1 to 255 characters"):
        call(key="")
    with pytest.raises(EventError, match="event"):
        call(event="a\nb")
    for total in (-1, 1.5, True, "3"):
        with pytest.raises(ValueError, match="total must be a whole number from 0, or None"):
            call(total=total)
    for interval in (-1, "1", None, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="interval must be a number of seconds from 0"):
            call(interval=interval)
    with pytest.raises(TypeError, match="not iterable"):
        call(5)
    assert loop.tries == 0


# Where it can be had


def test_a_loop_beside_an_app_is_heard_by_its_streams() -> None:
    app = Flask(__name__)
    sse = SSE(app)
    house = House()
    house.manager = app.extensions["sse_stream"]
    stream = house.open("import")
    assert list(sse.progress("ab", key="import", event="row", interval=60)) == ["a", "b"]
    events = house.events(stream)
    assert [event.event for event in events] == ["row", "row"]
    assert json.loads(str(events[-1].data))["state"] == "done"
    house.manager.shutdown()


def test_which_app_is_meant_is_decided_at_the_call() -> None:
    sse, apps = SSE(), [Flask("one"), Flask("two")]
    for app in apps:
        sse.init_app(app)
    with apps[1].app_context():
        rows = sse.progress("ab", key="import", interval=60)
    assert list(rows) == ["a", "b"]
    assert [app.extensions["sse_stream"].stats().published for app in apps] == [0, 2]


def test_a_loop_in_another_process_is_heard(tmp_path: Path) -> None:
    house = House(broker_url=f"sqlite:///{tmp_path}/log.db")
    stream = house.open("import")
    with Publisher(house.manager.settings.broker_url) as live:
        assert sum(live.progress(range(4), key="import", interval=60)) == 6
    counts = [json.loads(str(event.data))["count"] for event in house.events(stream)]
    assert counts == [0, 4]
    house.manager.shutdown()
