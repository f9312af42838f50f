"""The portable transport where servers use greenlets, patched or not."""

from __future__ import annotations

import threading

import gevent
import gevent.monkey
import gevent.socket
from support import run_unpatched

from flask_sse_stream.testing.contracts.greenlets import InGreenlets, start_native_thread
from flask_sse_stream.testing.contracts.transport import BodyContract
from flask_sse_stream.transports.gevent import GeventRuntime, GeventWaiter, Mailbox, in_gevent


class TestIteratorInGreenlets(InGreenlets, BodyContract):
    pass


def test_code_in_a_greenlet_waits_as_gevent_does() -> None:
    assert gevent.spawn(in_gevent).get(timeout=5)
    assert in_gevent() == gevent.monkey.is_module_patched("threading")


def test_a_hub_has_one_mailbox() -> None:
    assert Mailbox.current() is Mailbox.current()


def test_calls_from_native_threads_are_made_in_the_hub_each_once_and_in_order() -> None:
    mailbox = Mailbox.current()
    seen: list[int] = []

    def post() -> None:
        for number in range(2000):
            mailbox.post(lambda number=number: seen.append(number))  # type: ignore[misc]

    start_native_thread(post, ())
    with gevent.Timeout(10):
        while len(seen) < 2000:
            gevent.sleep(0.002)
    assert seen == list(range(2000))


def test_a_call_that_fails_is_logged_and_the_next_is_made(caplog: object) -> None:
    mailbox = Mailbox.current()
    seen: list[int] = []
    mailbox.post(lambda: 1 // 0)
    mailbox.post(lambda: seen.append(1))
    with gevent.Timeout(10):
        while not seen:
            gevent.sleep(0.002)
    assert "a call from another thread failed" in caplog.text  # type: ignore[attr-defined]


def test_sockets_have_their_turn_between_two_slices_of_the_flusher() -> None:
    ours, theirs = gevent.socket.socketpair()
    slices = 0
    heard_after: list[int] = []

    def flush() -> float | None:
        nonlocal slices
        slices += 1
        if slices == 10:
            theirs.send(b"x")
        return 0.0 if slices < 200 else None

    def listen() -> None:
        ours.recv(1)
        heard_after.append(slices)

    listener = gevent.spawn(listen)
    gevent.sleep(0)
    flusher = GeventRuntime().start_flusher(flush)
    listener.join(15)
    flusher.stop()
    assert heard_after[0] <= 12
    ours.close()
    theirs.close()


def test_a_waiter_that_was_woken_before_does_not_wait() -> None:
    waiter = GeventWaiter()
    waiter.wake()
    waiter.wake()
    with gevent.Timeout(5):
        waiter.wait()
    waiter.wait(0.001)


def test_a_loop_with_nothing_else_to_do_waits_for_what_another_thread_may_bring() -> None:
    woken: list[bool] = []

    def in_thread() -> None:
        # A hub of its own, with no socket and no timer: gevent would say "would block forever" (LoopExit).
        waiter = GeventWaiter()
        ready.append(waiter)
        waiter.wait()
        woken.append(True)

    ready: list[GeventWaiter] = []
    start_native_thread(in_thread, ())
    with gevent.Timeout(10):
        while not ready or not ready[0]._mailbox._waiting:
            gevent.sleep(0.002)
        ready[0].wake()
        while not woken:
            gevent.sleep(0.002)


def test_a_flusher_whose_greenlet_is_over_is_not_alive() -> None:
    flusher = GeventRuntime().start_flusher(lambda: None)
    assert flusher.alive
    flusher.stop()
    with gevent.Timeout(5):
        while flusher.alive:
            gevent.sleep(0.002)


def test_the_flusher_cannot_wait_in_the_hub_and_says_so() -> None:
    flusher = GeventRuntime().start_flusher(lambda: None)
    answers: list[bool] = []
    Mailbox.current().post(lambda: answers.append(flusher.give_turn()))
    with gevent.Timeout(5):
        while not answers:
            gevent.sleep(0.002)
    assert answers == [False]
    assert flusher.give_turn()
    flusher.stop()


def test_a_thread_that_ended_has_taken_its_flusher_along() -> None:
    flushers = []

    def in_thread() -> None:
        flushers.append(GeventRuntime().start_flusher(lambda: None))
        gevent.sleep(0)
        gevent.get_hub().destroy()

    if gevent.monkey.is_module_patched("threading"):
        gevent.get_hub().threadpool.apply(in_thread)
    else:
        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join(5)
    assert not flushers[0].alive


# What waits for a store


def test_a_greenlet_that_waits_for_a_store_holds_up_nobody_but_itself() -> None:
    script = """
        import gevent, time
        from flask_sse_stream.transports.base import current_runtime

        turns = 0
        def others():
            global turns
            while True:
                turns += 1
                gevent.sleep(0.01)

        def wait():
            time.sleep(0.5)  # not gevent's: nothing is patched
            return "done"

        beside = gevent.spawn(others)
        asking = gevent.spawn(lambda: current_runtime().outside(wait))
        assert asking.get() == "done"
        assert turns > 10, turns
        beside.kill()
    """
    run_unpatched(script)


def test_what_a_store_raises_is_raised_in_the_greenlet_and_printed_nowhere() -> None:
    script = """
        import gevent
        from flask_sse_stream import BrokerError
        from flask_sse_stream.transports.base import current_runtime

        def fail():
            raise BrokerError("away")

        def ask():
            try:
                current_runtime().outside(fail)
            except BrokerError as error:
                return str(error)

        assert gevent.spawn(ask).get() == "away"
    """
    assert run_unpatched(script) == ""


def test_a_callback_of_a_patched_hub_is_told_that_it_cannot_wait() -> None:
    script = """
        from gevent import monkey
        monkey.patch_all()
        import gevent
        from flask_sse_stream import BrokerError
        from flask_sse_stream.transports.base import current_runtime

        said = []
        def callback():
            try:
                current_runtime().outside(lambda: None)
            except BrokerError as error:
                said.append(str(error))
        gevent.get_hub().loop.run_callback(callback)
        gevent.sleep(0.01)
        assert "spawn a greenlet" in said[0], said
        assert gevent.spawn(lambda: current_runtime().outside(lambda: 5)).get() == 5
    """
    run_unpatched(script)
