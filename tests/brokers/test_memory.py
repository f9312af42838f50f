"""The memory broker keeps the contract, and works from wherever code can run."""

from __future__ import annotations

from collections import deque

import pytest
from fakes import House

from flask_sse_stream.brokers.base import Broker, broker_from_url
from flask_sse_stream.brokers.memory import MemoryBroker
from flask_sse_stream.event import Message
from flask_sse_stream.settings import Settings
from flask_sse_stream.testing.contracts.broker import BrokerContract, body, place
from flask_sse_stream.testing.contracts.jobs import JobContract


class TestMemoryBroker(BrokerContract):
    def make(self, settings: Settings) -> Broker:
        return MemoryBroker(settings)


class TestJobsInMemory(JobContract):
    def house(self, **options: object) -> House:
        return House(**options)


def test_it_is_what_the_default_url_names() -> None:
    assert isinstance(broker_from_url(Settings()), MemoryBroker)


def test_each_log_has_an_epoch_of_its_own() -> None:
    assert MemoryBroker(Settings()).cover([], [], None).epoch != MemoryBroker(Settings()).cover([], [], None).epoch


def test_an_event_has_been_delivered_when_publish_returns() -> None:
    broker, messages = MemoryBroker(Settings()), list[Message]()
    broker.start(messages.append)
    broker.publish("a", body("x"))
    assert len(messages) == 1


def test_a_publish_that_interrupts_another_learns_its_id_and_is_delivered_after_it() -> None:
    broker = MemoryBroker(Settings())
    seen: list[int] = []
    inner: list[str] = []

    def deliver(message: Message) -> None:
        if message.key == "outer":  # as a signal handler would, while the outer one has the turn
            inner.append(broker.publish("inner", body("x")))
        seen.append(message.seq)

    broker.start(deliver)
    outer = broker.publish("outer", body("x"))
    assert [place(outer)[1], place(inner[0])[1]] == seen == [1, 2]


def test_an_interruption_by_an_exception_neither_loses_an_event_nor_stops_the_next() -> None:
    broker = MemoryBroker(Settings())
    seen: list[int] = []
    failures = [KeyboardInterrupt()]

    def deliver(message: Message) -> None:
        if failures:
            raise failures.pop()
        seen.append(message.seq)

    broker.start(deliver)
    with pytest.raises(KeyboardInterrupt):
        broker.publish("a", body("x"))
    broker.publish("a", body("y"))
    assert seen == [1, 2]


def test_publishers_that_tidy_up_at_once_forget_no_idempotency_key_before_its_time() -> None:
    class Racing(deque[tuple[float, str]]):
        """Another thread takes the first one just before whoever looked at it."""

        def popleft(self) -> tuple[float, str]:
            broker._once.pop(super().popleft()[1])
            return super().popleft()

    broker = MemoryBroker(Settings())
    broker.start(lambda message: None)
    first = broker.publish("a", body("x"), "old"), broker.publish("a", body("x"), "new")
    broker._once_in_order = Racing([(0.0, "old"), broker._once_in_order[1]])
    assert broker.publish("a", body("x"), "another") not in first
    assert broker.publish("a", body("x"), "new") == first[1]
