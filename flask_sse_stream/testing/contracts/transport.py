"""The contract of transports, shown through ``respond`` as a server calls it.

A test class inherits it and says how a server's code runs beside the test: in a thread or in a greenlet.
"""

from __future__ import annotations

import contextvars
import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ...errors import StreamClosed
from ...event import Event, EventDecoder
from ...pools import PoolManager
from ...settings import Settings
from ...stream import CloseReason, Stream
from ...wsgi import respond

context_of_request: contextvars.ContextVar[str] = contextvars.ContextVar("context_of_request", default="none")


class Client:
    """One request, answered by code that runs as a server's would."""

    def __init__(self) -> None:
        self.status = ""
        self.bytes: bytes = b""
        self.chunks: int = 0
        self.ended: bool = False
        self.left = False  # set by the test: the server's next write fails
        self.reading = True  # set by the test: while it does not read, the server's write hangs
        self.sleep: Callable[[], None] = lambda: None

    def serve(self, manager: PoolManager, query: str, **arguments: Any) -> None:
        environ = {"REQUEST_METHOD": "GET", "QUERY_STRING": query, "SERVER_PROTOCOL": "HTTP/1.1"}
        token = context_of_request.set("the request's")
        body = respond(manager, environ, lambda status, headers: setattr(self, "status", status), **arguments)
        try:
            for data in body:
                assert data, "an empty chunk would end the response"
                while not self.reading and not self.left:
                    self.sleep()
                if self.left:
                    break
                self.chunks += 1
                self.bytes += data
        finally:
            context_of_request.reset(token)
            if hasattr(body, "close"):
                body.close()
            self.ended = True

    @property
    def events(self) -> list[Event]:
        return EventDecoder(comments=True).feed(self.bytes)

    @property
    def data(self) -> list[str]:
        return [event.data for event in self.events if event.data is not None]


class TransportContract:
    """Inherit it and override ``run``, ``sleep`` and, where it is another place, ``in_native_thread``."""

    client: type[Client] = Client

    def run(self, function: Callable[[], None]) -> None:
        """Run a server's code beside the test."""
        raise NotImplementedError

    def sleep(self) -> None:
        """Let everything else go on for a moment."""
        raise NotImplementedError

    def in_native_thread(self, function: Callable[[], object]) -> None:
        """Run in another thread of the operating system and return when it is done."""
        thread = threading.Thread(target=function)
        thread.start()
        while thread.is_alive():
            self.sleep()

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = 15.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
            self.sleep()

    @pytest.fixture
    def manager(self) -> Iterator[PoolManager]:
        manager = PoolManager(Settings(ping_interval=0))
        yield manager
        manager.shutdown()

    def open(self, manager: PoolManager, query: str = "connectKey=k", **arguments: Any) -> Client:
        client = self.client()
        client.sleep = self.sleep
        self.run(lambda: client.serve(manager, query, **arguments))
        self.wait_for(lambda: client.bytes or client.ended, "the first bytes arrive")
        return client

    def test_the_first_bytes_come_at_once(self, manager: PoolManager) -> None:
        client = self.open(manager)
        assert (client.status, client.chunks) == ("200 OK", 1)
        assert client.bytes.startswith(b"retry: 3000\n\n: open\n\n")

    def test_events_arrive_in_order(self, manager: PoolManager) -> None:
        clients = [self.open(manager) for _ in range(5)]
        for number in range(300):
            manager.publish("k", str(number))
        for client in clients:
            self.wait_for(lambda client=client: len(client.data) == 300, "all arrive")  # type: ignore[misc]
            assert client.data == [str(number) for number in range(300)]

    def test_an_event_arrives_whatever_thread_it_was_published_from(self, manager: PoolManager) -> None:
        client = self.open(manager)
        self.in_native_thread(lambda: manager.publish("k", "native thread"))
        self.wait_for(lambda: client.data == ["native thread"], "it arrives from a native thread")
        with ThreadPoolExecutor(1) as executor:
            future = executor.submit(manager.publish, "k", "executor")
            self.wait_for(future.done, "it is published")
        self.wait_for(lambda: client.data[1:] == ["executor"], "it arrives from an executor")

    def test_a_burst_from_another_thread_arrives_whole_and_in_order(self, manager: PoolManager) -> None:
        client = self.open(manager)

        def burst() -> None:
            for number in range(5000):
                manager.publish("k", str(number))

        self.in_native_thread(burst)
        self.wait_for(lambda: len(client.data) >= 5000 or client.ended, "all arrive", 60)
        assert client.data == [str(number) for number in range(5000)]

    def test_a_stream_that_is_ended_elsewhere_ends_for_the_server_too(self, manager: PoolManager) -> None:
        client = self.open(manager)
        self.in_native_thread(lambda: manager.close("k"))
        self.wait_for(lambda: client.ended, "the body ends")
        assert client.events[-1] == Event("", event="close", id="end")

    def test_a_silent_stream_gets_heartbeats(self) -> None:
        manager = PoolManager(Settings(ping_interval=0.05))
        try:
            client = self.open(manager)
            self.wait_for(lambda: client.bytes.count(b": ping\n\n") >= 3, "heartbeats arrive")
            assert client.data == []
        finally:
            manager.shutdown()

    def test_a_server_that_closes_the_body_leaves_nothing_behind(self, manager: PoolManager) -> None:
        client = self.open(manager)
        [stream] = manager.streams("k")
        client.left = True
        manager.publish("k", "the write that fails")
        self.wait_for(lambda: client.ended and stream.closed, "the server gives up")
        assert (stream.reason, manager.count_all(), manager.keys()) == (CloseReason.PEER, 0, [])

    def test_a_source_runs_beside_without_the_context_of_the_request(self, manager: PoolManager) -> None:
        def source() -> Iterator[Any]:
            yield context_of_request.get()
            yield {"n": 1}
            yield Event("x", event="e", id="7")

        client = self.open(manager, source=source())
        self.wait_for(lambda: client.ended, "the source is done")
        assert client.data == ["none", '{"n":1}', "x", ""]
        assert client.events[-1] == Event("", event="close", id="end")

    def test_a_function_is_handed_the_stream_and_may_be_a_generator(self, manager: PoolManager) -> None:
        def plain(stream: Stream) -> None:
            stream.send("a")
            stream.comment("b")

        def generator(stream: Stream) -> Iterator[Any]:
            stream.send("c")
            yield "d"

        for source, data in ((plain, ["a", ""]), (generator, ["c", "d", ""])):
            client = self.open(manager, source=source)
            self.wait_for(lambda client=client: client.ended, "the source is done")  # type: ignore[misc]
            assert client.data == data

    def test_a_source_that_is_faster_than_its_client_waits_and_loses_nothing(self) -> None:
        manager = PoolManager(Settings(ping_interval=0, queue_events=3))
        try:
            client = self.open(manager, source=(str(number) for number in range(500)))
            self.wait_for(lambda: client.ended, "the source is done", 30)
            assert client.data == [*map(str, range(500)), ""]
        finally:
            manager.shutdown()

    def test_a_source_that_raises_ends_the_stream_and_its_text_is_not_shown(
        self, manager: PoolManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        reasons: list[CloseReason] = []

        def source(stream: Stream) -> Iterator[Any]:
            stream.on_close(lambda stream, reason: reasons.append(reason))
            yield "a"
            raise RuntimeError("the password is swordfish")

        client = self.open(manager, source=source)
        # Callbacks run where the stream is ended, and its last bytes may be out before they have.
        self.wait_for(lambda: client.ended and reasons, "the stream ends")
        assert (client.data, reasons) == (["a"], [CloseReason.ERROR])
        assert b"swordfish" not in client.bytes
        assert caplog.text.count("the source of a stream raised") == 1
        assert caplog.text.count("swordfish") >= 1

    def test_a_source_that_gives_a_bad_event_ends_the_stream(
        self, manager: PoolManager, caplog: pytest.LogCaptureFixture
    ) -> None:
        client = self.open(manager, source=iter(["a", b"bytes"]))
        self.wait_for(lambda: client.ended, "the stream ends")
        assert client.data == ["a"]
        assert "decode it first" in caplog.text

    def test_a_source_is_closed_when_its_client_has_left(self, manager: PoolManager) -> None:
        closed: list[bool] = []

        def source() -> Iterator[Any]:
            try:
                while True:
                    yield "x"
                    self.sleep()
            finally:
                closed.append(True)

        client = self.open(manager, source=source())
        client.left = True
        self.wait_for(lambda: closed and manager.count_all() == 0, "the generator is closed")

    def test_heartbeats_go_on_while_the_source_thinks(self) -> None:
        manager = PoolManager(Settings(ping_interval=0.05))
        think = True

        def source() -> Iterator[Any]:
            while think:
                self.sleep()
            yield "thought"

        try:
            client = self.open(manager, source=source())
            self.wait_for(lambda: client.bytes.count(b": ping\n\n") >= 3, "heartbeats arrive")
            think = False
            self.wait_for(lambda: client.ended, "the source is done")
            assert client.data == ["thought", ""]
        finally:
            think = False
            manager.shutdown()

    def test_a_stream_may_be_sent_to_from_anywhere_and_refuses_after_its_end(self, manager: PoolManager) -> None:
        stream = Stream(manager)
        stream.send("before the response began")
        client = self.open(manager, stream=stream)
        self.in_native_thread(lambda: stream.send("thread"))
        stream.send_end("bye")
        self.wait_for(lambda: client.ended, "the stream ends")
        assert client.data == ["before the response began", "thread", "bye"]
        with pytest.raises(StreamClosed):
            stream.send("late")

    @pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest", "conflate", "per key"])
    def test_a_client_that_does_not_keep_up_gets_what_its_policy_says_and_is_told_the_rest(self, policy: Any) -> None:
        overflow: Any = {"k": "drop_oldest", "*": "disconnect"} if policy == "per key" else policy
        manager = PoolManager(Settings(ping_interval=0, queue_events=10, send_buffer=4096, overflow=overflow))
        try:
            client = self.open(manager)
            other = self.open(manager, "connectKey=other")
            client.reading = False
            self.publish_much(manager, "k")
            manager.publish("other", "is not held up")
            self.wait_for(lambda: other.data == ["is not held up"], "the other's event comes")
            [stream] = manager.streams("k")
            assert stream.waiting <= 11
            client.reading = True
            self.wait_for(lambda: not stream.waiting, "it catches up", 30)
            manager.publish("k", f"{MUCH} after it")
            self.wait_for(lambda: client.data and client.data[-1].endswith("after it"), "and goes on", 30)
            dropped = manager.stats().dropped
            assert dropped > 0
            assert account(client.events) == (MUCH + 1, dropped)
        finally:
            manager.shutdown()

    def test_with_disconnect_a_client_that_does_not_keep_up_loses_nothing_by_coming_back(self) -> None:
        manager = PoolManager(Settings(ping_interval=0, queue_events=10, send_buffer=4096))
        try:
            client = self.open(manager)
            client.reading = False
            [stream] = manager.streams("k")
            self.publish_much(manager, "k")
            self.wait_for(lambda: stream.closed, "it is cut off")
            assert (stream.reason, stream.waiting) == (CloseReason.SLOW, 0)
            client.reading = True
            self.wait_for(lambda: client.ended, "it sees the end", 30)
            again = self.open(manager, f"connectKey=k&lastEventId={client.events[-1].id}")
            self.wait_for(lambda: len(client.data) + len(again.data) >= MUCH, "the rest comes", 30)
            assert account(client.events + again.events) == (MUCH, 0)
            assert again.data, "nothing was left to be replayed, so this shows nothing"
        finally:
            manager.shutdown()

    def publish_much(self, manager: PoolManager, key: str) -> None:
        """More than a queue and a connection's buffers hold; return when all of it was offered."""
        before = manager.stats().offered + manager.stats().closed.get("slow", 0)
        for number in range(MUCH):
            manager.publish(key, f"{number} " + "x" * 20_000)

        def offered() -> bool:
            stats = manager.stats()
            return stats.closed.get("slow", 0) > 0 or stats.offered - before == MUCH

        self.wait_for(offered, "all were offered")


MUCH = 100


def account(events: list[Event]) -> tuple[int, int]:
    """Give how many events a client knows of, and how many of these it was told were dropped; all in their order."""
    number = dropped = 0
    for event in events:
        if event.event == "stream-dropped":
            count = json.loads(event.data or "")["count"]
            number, dropped = number + count, dropped + count
        elif event.data is not None:
            assert int(event.data.split()[0]) == number
            number += 1
    return number, dropped


class BodyContract(TransportContract):
    """What is more to be held where the response is a body that the server iterates."""

    def test_a_body_that_is_thrown_away_unread_leaves_nothing_behind(self, manager: PoolManager) -> None:
        def forget() -> None:
            environ = {"REQUEST_METHOD": "GET", "QUERY_STRING": "connectKey=k", "SERVER_PROTOCOL": "HTTP/1.1"}
            respond(manager, environ, lambda status, headers: None)

        self.run(forget)
        self.wait_for(lambda: manager.stats().opened == 1, "it was opened")
        gc.collect()
        self.wait_for(lambda: manager.count_all() == 0, "it is gone")
