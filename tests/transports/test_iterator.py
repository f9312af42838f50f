"""The portable transport where servers use threads."""

from __future__ import annotations

from flask_sse_stream.testing.contracts.threads import InThreads
from flask_sse_stream.testing.contracts.transport import BodyContract
from flask_sse_stream.transports.iterator import IteratorTransport
from flask_sse_stream.transports.threads import ThreadWaiter


class TestIteratorInThreads(InThreads, BodyContract):
    """All of it."""


def test_closing_a_transport_cuts_its_client_off_once() -> None:
    cuts: list[int] = []
    transport = IteratorTransport(ThreadWaiter(), lambda: cuts.append(1))
    transport.close()
    transport.close()
    assert cuts == [1]
    IteratorTransport(ThreadWaiter()).close()
