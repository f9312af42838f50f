"""Stand-ins for what is not being tested: a clock that is set by hand, a transport and a runtime that only record."""

from __future__ import annotations

import time

import pytest
from support import wait_for

from flask_sse_stream.pools import PoolManager
from flask_sse_stream.testing.house import House, ManualRuntime, RecordingTransport

__all__ = ["Clock", "House", "ManualRuntime", "RecordingTransport", "shut_down"]


class Clock:
    """Takes the place of the ``time`` module where the package asks for monotonic time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for module in ("pools", "opening", "rounds", "draining", "intake", "stream", "brokers.memory"):
            monkeypatch.setattr(f"flask_sse_stream.{module}.time", self)

    def monotonic(self) -> float:
        return self.now


def shut_down(manager: PoolManager) -> None:
    """Shut a manager down without the time that its clients have to read, for here nobody does any more."""
    manager._rounds.drain.ask(time.monotonic() - 10)
    manager.begin_drain()
    wait_for(lambda: manager.count_all() == 0, "every stream has ended")
    manager.shutdown()
