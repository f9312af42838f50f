"""Following keys over a broker that repeats itself, breaks and begins anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from flask_sse_stream.brokers.base import BrokerStats, Deliver, Gap, History, Life, Position
from flask_sse_stream.event import Message
from flask_sse_stream.settings import Settings
from flask_sse_stream.tailing import Line, follow_broker


def message(seq: int, key: str | None = "k", epoch: str = "e") -> Message:
    return Message(key, epoch, seq, b"data: %d\n\n" % seq, 0.0)


class Log:
    """Delivers what the test says, when it says it."""

    def __init__(self) -> None:
        self.closed = False
        self.state = BrokerStats()
        self.deliver: Deliver

    def start(self, deliver: Deliver) -> None:
        self.deliver = deliver

    def cover(self, keys: Sequence[str | None], fetch: Sequence[str | None], after: str | None) -> Position:
        for key in fetch:
            self.deliver(History(key, "e", 0, [message(seq, key) for seq in ((1, 3) if key else (2,))], 3))
        return Position("e", 3)

    def stats(self) -> BrokerStats:
        return self.state

    def close(self) -> None:
        self.closed = True


def shown(lines: Any) -> list[Any]:
    """What comes until nothing does."""
    found = []
    for line in lines:
        if line == Line():
            return found
        found.append(line.notice or (line.key, line.event.data, line.event.id))
    raise AssertionError


def test_the_latest_of_the_history_and_then_each_event_once(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log()
    monkeypatch.setattr("flask_sse_stream.hearing.broker_from_url", lambda settings: log)
    monkeypatch.setattr("flask_sse_stream.tailing._TICK", 0.02)
    lines = follow_broker(Settings(), ["k"], 2)
    assert shown(lines) == [(None, "2", "e-2"), ("k", "3", "e-3")]
    for item in (message(3), message(4), message(4), message(5, "of nobody"), message(6, None), message(4)):
        log.deliver(item)
    assert shown(lines) == [("k", "4", "e-4"), (None, "6", "e-6")]
    log.deliver(Gap("k", "e", 7))
    log.deliver(Life("f", 1))
    log.deliver(message(2, epoch="f"))
    log.deliver(message(1, epoch="g"))
    assert shown(lines) == [
        "events were lost on the way here",
        "the log began anew",
        ("k", "2", "f-2"),
        ("k", "1", "g-1"),
    ]
    log.state = BrokerStats(up=False, error="gone")
    assert shown(lines) == ["waiting for the broker: gone"]
    assert shown(lines) == []
    log.state = BrokerStats()
    assert shown(lines) == ["the broker is back"]
    lines.close()  # type: ignore[attr-defined]
    assert log.closed
