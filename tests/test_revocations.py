"""What is revoked: in the process that says so and in others, for streams that are open, coming, and to come."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import House, RecordingTransport
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from redis_server import RedisServer
from support import wait_for

from flask_sse_stream import AccessDenied, CloseReason, EventError, Publisher, Ticket
from flask_sse_stream.access import CONTROL_KEY, Revocation, mark_names
from flask_sse_stream.brokers.base import Gap, Life
from flask_sse_stream.event import Message
from flask_sse_stream.pools import check_key
from flask_sse_stream.stream import Stream


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["memory", "sqlite", "redis"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Where the log is that the processes of a test share."""
    if request.param == "memory":
        return {}
    if request.param == "sqlite":
        return {"broker_url": f"sqlite:///{tmp_path}/log.db"}
    return {"broker_url": request.getfixturevalue("redis").url, "namespace": f"test-{secrets.token_hex(4)}"}


@pytest.fixture
def houses(where: dict[str, Any]) -> Iterator[list[House]]:
    """Two processes on one log; where it is that of one process, one."""
    houses = [House(**where) for _ in range(2 if where else 1)]
    yield houses
    for house in houses:
        house.manager.shutdown()


def come(house: House, *keys: str, ticket: Ticket | None = None, after: str | None = None) -> Stream:
    return house.manager.open(  # type: ignore[arg-type]
        keys, RecordingTransport(), house.runtime, last_event_id=after, ticket=ticket
    )


def over(house: House, stream: Stream) -> bool:
    house.flush()
    return stream.closed


def test_the_streams_of_a_user_end_everywhere_and_nobody_elses(houses: list[House]) -> None:
    mine, others = [], []
    for house in houses:
        mine.append((house, come(house, "a", "b", ticket=Ticket(["a", "b"], user=7))))
        others.append(come(house, "a", ticket=Ticket("a", user="70")))
        others.append(come(house, "a", ticket=Ticket("a")))
        others.append(come(house, "a"))
        others.append(house.attach())
    houses[0].manager.revoke(user=7)
    for house, stream in mine:
        wait_for(lambda house=house, stream=stream: over(house, stream), "it ends")  # type: ignore[misc]
        last = house.events(stream)[-1]
        assert (last.event, json.loads(str(last.data))) == ("stream-expired", {"reason": "revoked"})
        assert stream.reason is CloseReason.EXPIRED
        assert house.decoders[stream].retry is not None, "they do not all come back at once"
    for house in houses:
        house.flush()
    assert [stream.reason for stream in others] == [None] * len(others)


def test_the_streams_of_a_key_end_everywhere_whether_they_needed_a_ticket_or_not(houses: list[House]) -> None:
    for house in houses:
        ended = [
            come(house, "a", ticket=Ticket("a", user=7)),
            come(house, "b", ticket=Ticket(["a", "b"])),
            come(house, "a", "b"),
        ]
        kept = [come(house, "b"), come(house, "A"), come(house, "b", ticket=Ticket("b", user="a"))]
        houses[-1].manager.revoke(key="a")
        for stream in ended:
            wait_for(lambda house=house, stream=stream: over(house, stream), "it ends")  # type: ignore[misc]
        assert [stream.reason for stream in kept] == [None] * 3


def test_a_user_may_lose_one_key(houses: list[House]) -> None:
    house = houses[-1]
    stream = come(house, "a", ticket=Ticket("a", user=7))
    kept = [come(house, "a", ticket=Ticket("a", user=8)), come(house, "b", ticket=Ticket("b", user=7))]
    houses[0].manager.revoke(user=7, key="a")
    wait_for(lambda: over(house, stream), "it ends")
    assert [stream.reason for stream in kept] == [None, None]


def test_a_ticket_that_was_issued_before_is_refused_everywhere_and_one_from_after_is_not(
    houses: list[House], where: dict[str, Any]
) -> None:
    before = Ticket(["a", "b"], user="ann")
    others = [Ticket(["a", "b"], user="bob"), Ticket("a")]
    houses[0].manager.revoke(user="ann")
    after = Ticket(["a", "b"], user="ann")
    late = [House(**where)] if where else []
    for house in (*houses, *late):
        with pytest.raises(AccessDenied, match="was revoked") as caught:
            come(house, "a", ticket=before)
        assert caught.value.status == 403
        for ticket in (after, *others):
            assert come(house, "a", ticket=ticket).reason is None
        house.flush()
        assert house.manager.count("a") == 3
        assert house.manager.stats().opened == 3
    for house in late:
        house.manager.shutdown()


def test_a_publisher_revokes_too(where: dict[str, Any], houses: list[House]) -> None:
    if not where:
        return
    stream = come(houses[0], "a", ticket=Ticket("a", user="ann"))
    with Publisher(where["broker_url"], where.get("namespace", "sse")) as publisher:
        publisher.revoke(user="ann")
    wait_for(lambda: over(houses[0], stream), "it ends")


def test_no_client_ever_sees_what_processes_tell_each_other(houses: list[House]) -> None:
    house = houses[-1]
    stream = come(house, "k")
    ids = [house.manager.publish("k", "1")]
    houses[0].manager.revoke(user="ann")
    ids.append(house.manager.publish_all("2"))
    assert [event.data for event in house.events(stream)] == ["1", "2"]
    for after in ids[:1]:
        for each in houses:
            again = come(each, "k", after=after)
            assert [(event.event, event.data) for event in each.events(again)] == [(None, "2")]
    # A cursor of the message's own number is a place like any other.
    epoch, _, seq = ids[0].rpartition("-")
    again = come(house, "k", after=f"{epoch}-{int(seq) + 1}")
    assert [event.data for event in house.events(again)] == ["2"]
    with pytest.raises(EventError):
        house.manager.publish(CONTROL_KEY, "x")
    with pytest.raises(EventError):
        come(house, CONTROL_KEY)


def test_a_process_goes_on_listening_for_it_when_no_stream_is_left() -> None:
    assert House().manager._idle([CONTROL_KEY, "gone"]) == ["gone"]


def test_a_publish_by_somebody_else_to_that_key_is_no_revocation(houses: list[House]) -> None:
    house = houses[0]
    stream = come(house, "k", ticket=Ticket("k", user="ann"))
    for body in (b"data: x\n\n", b'data: {"revoke": [null, null, 5]}\n\n', b'data: {"revoke": ["ann"]}\n\n'):
        house.manager._broker.publish(CONTROL_KEY, body)
    house.manager.publish("k", "after")
    wait_for(lambda: house.data(stream) == ["after"] or stream.closed, "it goes on")
    assert not stream.closed


@pytest.mark.parametrize("bad", [{}, {"user": ""}, {"user": True}, {"key": ""}, {"key": "a\n"}, {"user": 1, "key": 5}])
def test_what_cannot_be_revoked_is_the_callers_error(bad: dict[str, Any]) -> None:
    house = House()
    with pytest.raises(ValueError, match="revoke\\(\\) needs|must"):
        house.manager.revoke(**bad)


@pytest.mark.parametrize("moment", ["before it listens", "after it has looked into the store"])
def test_a_revocation_in_the_middle_of_an_opening_is_not_missed(houses: list[House], moment: str) -> None:
    house = houses[-1]
    come(house, "other")  # it is listening already
    ticket = Ticket("k", user="ann")
    broker, heard = house.manager._broker, house.manager._revocations
    cover, marked = broker.cover, broker.marked
    times: list[int] = []

    def revoke() -> None:
        times.append(1)
        houses[0].manager.revoke(user="ann")
        # The news is here, and has found nothing to end yet.
        wait_for(lambda: heard.count, "it is heard")
        house.flush()

    def covering(*arguments: Any) -> Any:
        if moment == "before it listens" and not times and "k" in arguments[0]:
            revoke()
        return cover(*arguments)

    def looking(names: Any) -> float:
        found = marked(names)
        if moment != "before it listens" and not times:
            revoke()
        return found

    broker.cover, broker.marked = covering, looking  # type: ignore[method-assign]
    with pytest.raises(AccessDenied, match="was revoked"):
        come(house, "k", ticket=ticket)
    assert (house.manager.count("k"), times) == (0, [1])


def test_revoking_while_streams_come_leaves_none_that_should_not_be(houses: list[House]) -> None:
    house, failures = houses[-1], []
    barrier = threading.Barrier(2)
    streams: list[Stream] = []

    def arrive() -> None:
        barrier.wait(10)
        for _ in range(60):
            try:
                streams.append(come(house, "k", ticket=ticket))
            except AccessDenied:
                failures.append(1)

    ticket = Ticket("k", user="ann")
    thread = threading.Thread(target=arrive)
    thread.start()
    barrier.wait(10)
    wait_for(lambda: len(streams) > 5 or not thread.is_alive(), "some have come")
    houses[0].manager.revoke(user="ann")
    thread.join(30)
    assert not thread.is_alive()
    assert len(streams) + len(failures) == 60
    wait_for(lambda: all(over(house, stream) for stream in streams), "all have ended")


def test_a_store_that_does_not_answer_lets_nobody_in(houses: list[House], monkeypatch: pytest.MonkeyPatch) -> None:
    house = houses[0]

    def fail(names: Any) -> float:
        raise OSError("no answer")

    monkeypatch.setattr(house.manager._broker, "marked", fail)
    with pytest.raises(OSError, match="no answer"):
        come(house, "k", ticket=Ticket("k"))
    assert come(house, "k").reason is None, "who needs no ticket needs no store either"


# What may have been missed


@pytest.mark.parametrize("how", ["gap", "life"])
def test_where_a_revocation_may_have_been_lost_who_had_to_be_let_in_is_asked_to_come_back(how: str) -> None:
    house = House()
    guarded, free = come(house, "k", ticket=Ticket("k")), come(house, "k")
    epoch, _, seq = house.manager.publish("k", "1").rpartition("-")
    house.manager.deliver(Gap(CONTROL_KEY, epoch, int(seq) + 5) if how == "gap" else Life("another", 3))
    house.flush()
    assert (guarded.reason, free.reason) == (CloseReason.ROTATED, None)
    events = house.events(guarded)
    assert house.decoders[guarded].retry is not None
    assert [event.event for event in events] == [None] if how == "gap" else ["stream-reset"]


def test_a_revocation_while_redis_is_away_ends_the_stream_when_it_is_back(redis: RedisServer) -> None:
    """This process was cut off; the message is in the history, or else everybody is looked at again."""
    for history in (1000, 0):
        where = {"broker_url": redis.url, "namespace": f"test-{secrets.token_hex(4)}", "history_size": history}
        here, there = House(**where), House(**where)
        stream = come(here, "k", ticket=Ticket("k", user="ann"))
        listener = here.manager._broker._listener  # type: ignore[attr-defined]
        in_step, redis_is_back = listener._synchronise, threading.Event()

        def late(link: Any, in_step: Any = in_step, redis_is_back: Any = redis_is_back) -> None:
            redis_is_back.wait(20)
            in_step(link)

        listener._synchronise = late
        redis.cli("CLIENT KILL", "TYPE", "pubsub")
        there.manager.revoke(user="ann")
        redis_is_back.set()
        wait_for(lambda here=here, stream=stream: over(here, stream), "it ends")  # type: ignore[misc]
        assert stream.reason is (CloseReason.EXPIRED if history else CloseReason.ROTATED)
        for house in (here, there):
            house.manager.shutdown()


# The values

texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=255)
users = texts.filter(str.isprintable)


@hypothesis_settings(deadline=None)
@given(user=st.none() | users, key=st.none() | texts, at=st.floats(0, 2e10))
def test_a_revocation_comes_through_as_it_was_and_is_never_a_clients_event(
    user: str | None, key: str | None, at: float
) -> None:
    revocation = Revocation(user, key, at)
    frame = Message(CONTROL_KEY, "epoch", 1, revocation.encode(), 0.0).frame
    assert Revocation.decode(frame) == (revocation if (user, key) != (None, None) else None)
    with pytest.raises(EventError):
        check_key(CONTROL_KEY)


@hypothesis_settings(deadline=None)
@given(
    st.binary(max_size=300)
    | st.text(max_size=100).map(lambda text: b'data: {"revoke": ' + text.encode(errors="replace"))
)
def test_whatever_is_in_a_store_is_a_revocation_or_nothing(body: bytes) -> None:
    found = Revocation.decode(body)
    assert found is None or isinstance(found, Revocation)


def test_deep_and_long_messages_are_nothing() -> None:
    assert Revocation.decode(b"data: " + b"[" * 8000) is None
    assert Revocation.decode(b'data: {"revoke": [null, "' + b"a" * 10_000 + b'", 5]}') is None


pairs = st.tuples(st.none() | users, st.none() | texts).filter(lambda pair: pair != (None, None))


@hypothesis_settings(deadline=None)
@given(one=pairs, other=pairs)
def test_different_revocations_have_different_marks(
    one: tuple[str | None, str | None], other: tuple[str | None, str | None]
) -> None:
    names = [Revocation(*pair, 0.0).mark_name() for pair in (one, other)]
    assert (names[0] == names[1]) is (one == other)


@hypothesis_settings(deadline=None)
@given(user=st.none() | st.sampled_from(["ann", "bob"]), key=st.none() | st.sampled_from("abc"), earlier=st.booleans())
def test_what_the_store_refuses_is_what_the_message_ends(user: str | None, key: str | None, earlier: bool) -> None:
    if (user, key) == (None, None):
        return
    revocation = Revocation(user, key, 100.0)
    for ticket in (Ticket(["a", "b"], user="ann", issued=99.0 + 2 * earlier), Ticket("a", issued=99.0 + 2 * earlier)):
        marked = revocation.mark_name() in mark_names(ticket) and revocation.at >= ticket.issued
        assert revocation.covers(ticket, ticket.keys) is marked
