"""The contract of brokers. A test class inherits it and says how a broker is made."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from ...brokers.base import Broker, Delivery, Gap, History
from ...event import Event, Message
from ...keys import JobKey
from ...settings import Settings
from ..waiting import wait_for

Start = Callable[..., tuple[Broker, list[Message]]]
KEYS = ("a", "b", "c", None)


def place(identifier: str) -> tuple[str, int]:
    epoch, _, seq = identifier.rpartition("-")
    return epoch, int(seq)


def body(data: str, **fields: str) -> bytes:
    return Event(data, **fields).encode()  # type: ignore[arg-type]


class BrokerContract:
    """Inherit it and override ``make``."""

    def make(self, settings: Settings) -> Broker:
        raise NotImplementedError

    def settings(self, **options: object) -> Settings:
        """Override it where a broker needs a URL of its own."""
        return Settings(**options)  # type: ignore[arg-type]

    @pytest.fixture
    def started(self) -> Iterator[Start]:
        brokers: list[Broker] = []
        gaps: list[Gap] = []
        self.histories: dict[str | None, History] = {}

        def start(**options: object) -> tuple[Broker, list[Message]]:
            broker = self.make(self.settings(**options))
            brokers.append(broker)
            messages: list[Message] = []

            def deliver(delivery: Delivery) -> None:
                if isinstance(delivery, Message):
                    messages.append(delivery)
                elif isinstance(delivery, Gap):
                    gaps.append(delivery)
                elif isinstance(delivery, History):
                    self.histories[delivery.key] = delivery

            broker.start(deliver)
            broker.cover(KEYS, [], None)
            return broker, messages

        yield start
        for broker in brokers:
            broker.close()
        assert gaps == []

    def test_every_event_is_delivered_with_the_id_that_publish_returned(self, started: Start) -> None:
        broker, messages = started()
        ids = [broker.publish(key, body(str(key))) for key in ("a", "b", None, "a")]
        wait_for(lambda: len(messages) == 4, "all are delivered")
        assert [message.id for message in messages] == ids
        assert [message.key for message in messages] == ["a", "b", None, "a"]

    def test_one_sequence_numbers_all_keys_of_one_epoch(self, started: Start) -> None:
        broker, _ = started()
        places = [place(broker.publish(key, body("x"))) for key in ("a", None, "b", "a", "never listened to")]
        assert len({epoch for epoch, _ in places}) == 1
        seqs = [seq for _, seq in places]
        assert seqs == sorted(set(seqs))

    def test_a_body_arrives_as_it_was_published(self, started: Start) -> None:
        broker, messages = started(max_event_bytes=2 * 1024 * 1024)
        for data in ("", "ü\u2028\0", "x" * 1024 * 1024, "a\nb"):
            sent = body(data, event="e")
            identifier = broker.publish("a", sent)
            wait_for(lambda wanted=identifier: messages and messages[-1].id == wanted, "it is delivered")  # type: ignore[misc]
            assert messages[-1].frame == b"id: " + identifier.encode() + b"\n" + sent

    def test_an_id_of_the_users_own_is_returned_and_kept(self, started: Start) -> None:
        broker, messages = started()
        assert broker.publish("a", body("x", id="own")) == "own"
        wait_for(lambda: messages, "it is delivered")
        assert (messages[0].id, messages[0].own_id, messages[0].seq > 0) == ("own", True, True)

    def test_without_history_a_frame_has_no_id(self, started: Start) -> None:
        broker, messages = started(history_size=0)
        assert broker.publish("a", body("x"))
        wait_for(lambda: messages, "it is delivered")
        assert messages[0].frame == body("x")

    def test_cover_gives_the_position_of_the_newest_event(self, started: Start) -> None:
        broker, _ = started()
        before = broker.cover(["a"], ["a"], None)
        identifier = broker.publish("b", body("x"))
        assert broker.cover(["a"], [], identifier) == place(identifier)
        assert before.epoch == place(identifier)[0]

    def test_publishers_at_once_make_each_event_once_and_in_the_order_of_the_numbers(self, started: Start) -> None:
        broker, messages = started()
        ids: list[list[str]] = [[] for _ in range(4)]

        def work(own: list[str], key: str) -> None:
            for number in range(300):
                own.append(broker.publish(key, body(f"{key} {number}")))

        threads = [threading.Thread(target=work, args=(own, key)) for own, key in zip(ids, "abca", strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        wait_for(lambda: len(messages) == 1200, "all are delivered")
        assert [message.seq for message in messages] == sorted(message.seq for message in messages)
        assert sorted(place(identifier)[1] for own in ids for identifier in own) == [m.seq for m in messages]
        for own in ids:
            assert [place(identifier)[1] for identifier in own] == sorted(place(identifier)[1] for identifier in own)

    def test_publishing_while_an_event_is_delivered_comes_after_it(self) -> None:
        broker = self.make(self.settings())
        seen: list[int] = []

        def deliver(message: Delivery) -> None:
            if not isinstance(message, Message):
                return
            if message.key == "a":
                broker.publish("b", body("from inside"))
            seen.append(message.seq)

        broker.start(deliver)
        broker.cover(["a", "b"], [], None)
        try:
            broker.publish("a", body("x"))
            wait_for(lambda: len(seen) == 2, "both are delivered")
            assert seen == sorted(seen)
        finally:
            broker.close()

    def test_calls_with_one_idempotency_key_make_one_event(self, started: Start) -> None:
        (broker, messages), (other, _) = started(), started()
        others = [broker, other] if broker.remembers else [broker]
        ids = {some.publish(key, body("x"), "task 7") for some in others * 3 for key in ("a", None)}
        assert len(ids) == 1
        assert broker.publish("a", body("x"), "task 8") not in ids
        wait_for(lambda: len(messages) == 2, "both are delivered")

    def test_an_event_with_an_id_of_its_own_and_an_idempotency_key_is_made_once(self, started: Start) -> None:
        broker, messages = started()
        assert broker.publish("a", body("x", id="own"), "task") == "own"
        assert broker.publish("a", body("x", id="own"), "task") == "own"
        last = broker.publish("a", body("y"))
        wait_for(lambda: messages and messages[-1].id == last, "all are delivered")
        assert [message.id for message in messages] == ["own", last]

    def test_an_idempotency_key_is_forgotten_after_its_time(self, started: Start) -> None:
        broker, _ = started(idempotency_ttl=0.05)
        first = broker.publish("a", body("x"), "task")
        wait_for(lambda: broker.publish("a", body("x"), "task") != first, "it makes another event")

    def test_publishers_at_once_with_one_idempotency_key_get_one_id(self, started: Start) -> None:
        broker, messages = started(broker_timeout=30)  # eighty at once, each with a connection of its own
        ids: list[str] = []
        threads = [
            threading.Thread(target=lambda number=number: ids.append(broker.publish("a", body("x"), f"task {number}")))
            for number in range(20)
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert (len(ids), len(set(ids))) == (80, 20)
        wait_for(lambda: len(messages) == 20, "all are delivered")

    def test_a_lease_is_held_by_one_and_handed_on_when_it_ends(self, started: Start) -> None:
        (broker, _), (other, _) = started(), started()
        if not broker.remembers:
            assert broker.lease("clock", "one", 10)
            assert other.lease("clock", "two", 10), "another log, which is another process's"
            return
        assert broker.lease("clock", "one", 0.3)
        assert not other.lease("clock", "two", 10)
        assert other.lease("something else", "two", 10)
        assert broker.lease("clock", "one", 0.2), "it may be held for longer"
        wait_for(lambda: other.lease("clock", "two", 10), "it ends")
        assert not broker.lease("clock", "one", 10)
        other.lease("clock", "two", 0)
        assert broker.lease("clock", "one", 10), "it was given back"

    def test_a_mark_is_remembered_by_all_at_its_latest_time_and_names_are_told_apart(self, started: Start) -> None:
        (broker, _), (other, _) = started(), started()
        names = ["one", "One", "one ", "*", "o?e", "\u00e9", "e\u0301"]
        assert broker.marked(names) == 0.0
        for at, name in enumerate(names, 1_700_000_000):
            broker.mark(name, at + 0.123456, 60)
        for who in (broker, other) if broker.remembers else (broker,):
            assert [who.marked([name]) for name in names] == [1_700_000_000.123456 + n for n in range(len(names))]
            assert who.marked([*names, "never"]) == 1_700_000_006.123456
            assert who.marked(["never"]) == 0.0
        other.mark("one", 1_600_000_000.0, 60)
        broker.mark("one", 1_600_000_000.0, 60)
        assert broker.marked(["one"]) == 1_700_000_000.123456, "an earlier one, told later, takes nothing back"

    def test_a_mark_is_there_for_who_comes_later_and_in_a_new_life(self, started: Start) -> None:
        broker, _ = started()
        if not broker.remembers:
            return
        broker.mark("one", 1_700_000_000.0, 60)
        broker.close()
        assert started()[0].marked(["one"]) == 1_700_000_000.0

    def test_a_mark_is_forgotten_after_its_time(self, started: Start) -> None:
        broker, _ = started()
        broker.mark("one", 1_700_000_000.0, 0.05)

        def is_gone() -> bool:
            broker.mark("two", 1_700_000_001.0, 60)  # some tidy up when there is something to do
            return broker.marked(["one"]) == 0.0

        wait_for(is_gone, "it is forgotten")

    def test_closing_twice_does_nothing(self, started: Start) -> None:
        broker, _ = started()
        broker.publish("a", body("x"))
        broker.close()
        broker.close()

    def test_a_broker_that_remembers_gives_what_a_key_has_and_where_its_knowledge_begins(self, started: Start) -> None:
        broker, _ = started(history_size=3)
        ids = [
            broker.publish(key, body(str(number))) for number, key in enumerate(("a", "b", "a", None, "a", "a", "a"))
        ]
        keys = ("a", "b", None, "never")
        assert broker.cover(keys, keys, ids[0]) == place(ids[-1])
        found = {key: (history.floor, [m.id for m in history.messages]) for key, history in self.histories.items()}
        if not broker.remembers:
            assert found == {}
            return
        assert found == {
            "a": (place(ids[2])[1], [ids[4], ids[5], ids[6]]),
            "b": (0, [ids[1]]),
            None: (0, [ids[3]]),
            "never": (0, []),
        }

    def test_a_job_is_kept_by_its_own_bounds_however_much_is_said_elsewhere(self, started: Start) -> None:
        broker, messages = started(history_size=2, history_ttl=0.001, job_events=20)
        job = JobKey.of("work")
        broker.cover([job], [job], None)
        sent = [broker.publish(job, body(str(number))) for number in range(30)]
        for _ in range(20):
            broker.publish("a", body("x"))
        wait_for(lambda: len(messages) == 50, "all are delivered")
        assert [message.id for message in messages if message.key == job] == sent
        (late, _) = started(history_size=2, history_ttl=0.001, job_events=20)
        if late.remembers:
            late.cover([job], [job], None)
            kept = self.histories[job]
            assert (kept.floor, [message.id for message in kept.messages]) == (place(sent[9])[1], sent[10:])

    def test_the_end_of_a_job_is_told_apart_and_has_the_id_that_ends_a_stream(self, started: Start) -> None:
        for options in ({}, {"history_size": 0}):
            broker, messages = started(**options)
            job = JobKey.of("work")
            broker.cover([job], [job], None)
            broker.publish(job, body("half"))
            broker.publish("a", body("x", event="done"))
            broker.publish(job, body("all", event="done"))
            wait_for(lambda messages=messages: len(messages) == 3, "all are delivered")  # type: ignore[misc]
            assert [message.last for message in messages] == [False, False, True]
            assert messages[2].frame == b"id: end\nevent: done\ndata: all\n\n"
            assert messages[0].frame.startswith(b"id: " + messages[0].id.encode())

    def test_a_lease_that_is_asked_after_is_not_taken(self, started: Start) -> None:
        broker, _ = started()
        assert broker.lease("work", "me", 0), "nobody has it"
        assert broker.lease("work", "one", 10)
        assert not broker.lease("work", "me", 0)
        assert not broker.lease("work", "two", 10)
        assert broker.lease("work", "one", 0), "it gives it back"
        assert broker.lease("work", "two", 10)
