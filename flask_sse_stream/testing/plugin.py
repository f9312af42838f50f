"""The fixtures of pytest's plugin, which pytest finds by itself where this package is installed.

Nothing of the kit is imported before a test asks for a fixture.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .client import SSEClient
    from .clock import Clock
    from .recording import Publications, RecordingBroker

__all__ = ["sse_broker", "sse_client", "sse_clock", "sse_published"]


@pytest.fixture
def sse_client(app: Any) -> Iterator[SSEClient]:
    """Reads the streams of your fixture ``app``, and leaves them when the test ends."""
    from .client import SSEClient

    with SSEClient(app) as client:
        yield client


@pytest.fixture
def sse_published() -> Iterator[Publications]:
    """What the test's Flask apps publish."""
    from .recording import record_published

    with record_published() as published:
        yield published


@pytest.fixture
def sse_broker(app: Any) -> Iterator[RecordingBroker]:
    """Stands around the broker of your fixture ``app``, and fails when it is told to."""
    from .recording import record_broker

    with record_broker(app) as broker:
        yield broker


@pytest.fixture
def sse_clock() -> Iterator[Clock]:
    """Time as this package sees it, which the test puts forward."""
    from .clock import sse_clock

    with sse_clock() as clock:
        yield clock
