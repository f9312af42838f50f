"""The portable transport where servers use threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from contracts.transport import BodyContract

from flask_sse_stream.transports.iterator import IteratorTransport, ThreadRuntime, ThreadWaiter


class TestIteratorInThreads(BodyContract):
    def run(self, function: Callable[[], None]) -> None:
        threading.Thread(target=function, daemon=True).start()

    def sleep(self) -> None:
        time.sleep(0.002)


def test_a_waiter_that_was_woken_before_does_not_wait() -> None:
    waiter = ThreadWaiter()
    waiter.wake()
    waiter.wake()
    waiter.wait()
    waiter.wait(0.001)  # and the second wake is not left over: this one runs out


def test_closing_a_transport_cuts_its_client_off_once() -> None:
    cuts: list[int] = []
    transport = IteratorTransport(ThreadWaiter(), lambda: cuts.append(1))
    transport.close()
    transport.close()
    assert cuts == [1]
    IteratorTransport(ThreadWaiter()).close()


def test_the_flusher_gives_no_turn_to_itself() -> None:
    answers: list[bool] = []
    ready = threading.Event()

    def flush() -> float | None:
        ready.wait(5)
        answers.append(flusher.give_turn())
        flusher.stop()
        return 0.0

    flusher = ThreadRuntime().start_flusher(flush)
    assert flusher.give_turn()
    ready.set()
    deadline = time.monotonic() + 5
    while flusher.alive:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert answers == [False]
