"""What tests of applications, brokers and transports stand on.

* ``client``: reads streams through a test client, with a deadline for each event.
* ``recording``: what was published, and a broker that fails when it is told to.
* ``clock``: time that is put forward.
* ``contracts``: what every broker and every transport must do, for those who write their own.
* ``plugin``: the same as fixtures of pytest.
* ``house``, ``waiting``: a pool manager whose flusher is the test, and conditions with a deadline.

Nothing of the package itself imports any of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from .client import EventReader, NoEvent, SSEClient, sse_client
    from .clock import Clock, sse_clock
    from .recording import (
        ANYTHING,
        Publications,
        Published,
        RecordingBroker,
        record_broker,
        record_published,
    )
    from .waiting import wait_for

__all__ = [
    "ANYTHING",
    "Clock",
    "EventReader",
    "NoEvent",
    "Publications",
    "Published",
    "RecordingBroker",
    "SSEClient",
    "record_broker",
    "record_published",
    "sse_client",
    "sse_clock",
    "wait_for",
]

_PLACES: Final = {
    **dict.fromkeys(("EventReader", "NoEvent", "SSEClient", "sse_client"), "client"),
    **dict.fromkeys(("Clock", "sse_clock"), "clock"),
    "wait_for": "waiting",
}


def __getattr__(name: str) -> Any:
    # Each part when it is needed: pytest loads its plugin, which is beside this, in every run.
    if name in __all__:
        return getattr(import_module(f"{__name__}.{_PLACES.get(name, 'recording')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
