"""Threads as a runtime: waiting, flushing, and the one thread that serves what servers have given up."""

from __future__ import annotations

import threading
import time

from support import run_unpatched

from flask_sse_stream.transports.threads import ThreadRuntime, ThreadWaiter


def test_a_waiter_that_was_woken_before_does_not_wait() -> None:
    waiter = ThreadWaiter()
    waiter.wake()
    waiter.wake()
    waiter.wait()
    waiter.wait(0.001)  # and the second wake is not left over: this one runs out


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


def test_calls_from_other_threads_are_made_each_once_and_in_order_whatever_one_of_them_raises() -> None:
    complaints = run_unpatched(
        """
        import threading
        from flask_sse_stream.transports.threads import ThreadLoop

        loop, seen, done = ThreadLoop.current(), [], threading.Event()
        assert ThreadLoop.current() is loop
        for number in range(5000):
            loop.post(lambda number=number: seen.append((number, threading.get_ident())))
            if number == 2500:
                loop.post(lambda: 1 // 0)
        loop.post(done.set)
        assert done.wait(15)
        assert seen == [(number, loop.thread) for number in range(5000)]
        """
    )
    assert complaints.count("ZeroDivisionError") == 1


def test_a_forked_child_holds_no_client_of_its_parents_and_serves_its_own() -> None:
    run_unpatched(
        """
        import os, socket, threading, time
        from flask_sse_stream.pools import PoolManager
        from flask_sse_stream.settings import Settings
        from flask_sse_stream.stream import Stream
        from flask_sse_stream.transports.reactor import Reactor
        from flask_sse_stream.transports.threads import ThreadRuntime
        from flask_sse_stream.transports.iterator import IteratorTransport

        manager = PoolManager(Settings(ping_interval=0))

        def serve():
            runtime = ThreadRuntime()
            server, client = socket.socketpair()
            client.settimeout(15)
            stream = manager.open(["k"], IteratorTransport(runtime.waiter()), runtime)
            reactor = Reactor.of(runtime.loop())
            reactor.adopt(stream, server, None).begin()
            server.close()
            assert b": open" in client.recv(65536)
            return reactor, client

        reactor, client = serve()
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            own, mine = serve()
            assert own is not reactor and len(own) == 1 and len(reactor) == 0
            manager.publish("k", "to the child")
            assert b"to the child" in mine.recv(65536)
            os.read(reading, 1)
            os._exit(0)
        manager.publish("k", "to the parent")
        assert b"to the parent" in client.recv(65536)
        manager.close("k")
        while client.recv(65536):
            pass  # it ends while the child still runs
        os.write(writing, b"!")
        assert os.waitpid(pid, 0)[1] == 0
        """
    )
