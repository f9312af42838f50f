"""What gives way when a client's queue is full, by policy and key, and what its page is told."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import pytest
from fakes import House
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from flask_sse_stream.event import Event, EventDecoder, Message
from flask_sse_stream.overflow import Hole, HoledQueue, Policies
from flask_sse_stream.settings import Overflow
from flask_sse_stream.stream import CloseReason, Stream

POLICIES: tuple[Overflow, ...] = ("disconnect", "drop_oldest", "drop_newest", "conflate")
Seen = list[str | tuple[int, list[str]]]


def seen(house: House, stream: Stream) -> Seen:
    """What the client gets next: texts, and how many were dropped of which keys."""
    found: Seen = []
    for event in house.events(stream):
        assert event.data is not None
        if event.event == "stream-dropped":
            told = json.loads(event.data)
            found.append((told["count"], told["keys"]))
        else:
            found.append(event.data)
    return found


def crowd(overflow: Any, **options: int) -> tuple[House, Stream]:
    """A stream of "k" whose client has read the head and reads no more, with room for three events."""
    house = House(overflow=overflow, **{"queue_events": 3, **options})
    stream = house.open()
    house.events(stream)
    return house, stream


def publish_six(house: House) -> None:
    for number in range(6):
        house.manager.publish("k", str(number), event="odd" if number % 2 else "even")
        house.flush()


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("drop_oldest", [(3, ["k"]), "3", "4", "5"]),
        ("drop_newest", ["0", "1", "2", (3, ["k"])]),
        ("conflate", [(4, ["k"]), "4", "5"]),
    ],
)
def test_a_policy_drops_what_it_says_and_tells_the_page_where(policy: str, expected: Seen) -> None:
    house, stream = crowd(policy)
    publish_six(house)
    assert stream.waiting <= 4
    assert seen(house, stream) == expected
    assert house.manager.stats().dropped == sum(item[0] for item in expected if isinstance(item, tuple))
    house.manager.publish("k", "6")
    assert seen(house, stream) == ["6"], "nothing more is told of the same hole"


def test_conflate_with_more_names_than_room_drops_the_oldest() -> None:
    house, stream = crowd("conflate", queue_events=1)
    publish_six(house)
    assert seen(house, stream) == [(5, ["k"]), "5"]


def test_conflate_keeps_the_last_of_each_key_and_name() -> None:
    house = House(overflow="conflate", queue_events=4)
    stream = house.open("a", "b")
    house.take(stream)
    for number in range(3):
        for key in ("a", "b"):
            for name in ("price", None):
                house.manager.publish(key, f"{key} {name} {number}", event=name)
                house.flush()
    assert seen(house, stream)[1:] == ["a price 2", "a None 2", "b price 2", "b None 2"]


def test_a_hole_is_told_at_its_place_and_two_of_them_each() -> None:
    house, stream = crowd("drop_newest")
    publish_six(house)
    stream.take_frames()
    assert stream.waiting == 0
    publish_six(house)
    data = [json.loads(event.data or "") for event in house.events(stream)]
    assert data == [0, 1, 2, {"count": 3, "keys": ["k"]}]


def test_what_tells_of_a_loss_carries_no_id_and_does_not_move_the_cursor() -> None:
    house, stream = crowd("drop_newest")
    publish_six(house)
    events = house.events(stream)
    assert events[-1].event == "stream-dropped"
    cursor = house.decoders[stream].last_event_id
    assert cursor == events[-2].id
    # Whose connection breaks there is given what was dropped, and nothing that he has seen.
    again = house.open("k", after=cursor)
    assert seen(house, again) == ["3", "4", "5"]


def test_after_the_events_that_followed_a_hole_nothing_of_it_comes_again() -> None:
    house, stream = crowd("drop_oldest")
    publish_six(house)
    again = house.open("k", after=house.cursor(stream))
    assert seen(house, again) == []


def test_with_disconnect_nothing_is_told_since_nothing_is_lost() -> None:
    house, stream = crowd("disconnect", history_size=100)
    cursor = house.cursor(stream)
    publish_six(house)
    assert stream.reason is CloseReason.SLOW
    assert house.manager.stats().dropped == 0
    assert seen(house, house.open("k", after=cursor)) == list("012345")


def test_room_is_made_in_bytes_too() -> None:
    house, stream = crowd("drop_oldest", queue_events=100, queue_bytes=1000)
    for number in range(10):
        house.manager.publish("k", f"{number}" * 300)
        house.flush()
    assert stream._bytes <= 1000
    assert seen(house, stream) == [(7, ["k"]), "7" * 300, "8" * 300, "9" * 300]


def test_a_queue_of_one_event_still_delivers_with_a_hole_before_it() -> None:
    house, stream = crowd("drop_oldest", queue_events=1)
    publish_six(house)
    assert seen(house, stream) == [(5, ["k"]), "5"]


def test_what_a_stream_sends_itself_is_under_the_policy_of_all_others() -> None:
    house = House(overflow={"k": "drop_newest", "*": "drop_oldest"}, queue_events=2)
    stream = house.attach()
    house.take(stream)
    for number in range(5):
        stream.send(str(number))
    assert seen(house, stream) == [(3, []), "3", "4"]


def test_what_went_to_all_may_be_missing_of_all_keys() -> None:
    house = House(overflow="drop_oldest", queue_events=1)
    stream = house.open("a", "b")
    house.take(stream)
    for number in range(3):
        house.manager.publish_all(str(number))
        house.flush()
    assert seen(house, stream) == [(2, ["a", "b"]), "2"]


def test_a_reset_is_never_dropped() -> None:
    house, stream = crowd("drop_oldest", queue_events=1)
    stream.put_reset(b"event: stream-reset\ndata: {}\n\n", 0)
    publish_six(house)
    assert [event.event for event in house.events(stream)] == ["stream-reset", "stream-dropped"]


def test_the_hook_is_told_all_that_was_dropped_though_nothing_is_published() -> None:
    house, _ = crowd("drop_newest", queue_events=1)
    told: Counter[Stream] = Counter()
    house.manager.hooks.dropped = lambda stream, count: told.update({stream: count})
    stream = house.attach()
    house.take(stream)
    house.runtime.wakes = 0
    for _ in range(10):
        stream.send("x")
    assert house.runtime.wakes > 0
    house.flush()
    assert told == {stream: 9}


def test_an_idle_queue_is_a_plain_list_again() -> None:
    house, stream = crowd("drop_oldest")
    publish_six(house)
    assert type(stream._queue) is HoledQueue
    house.take(stream)
    assert type(stream._queue) is list
    assert stream._bytes == 0


# A policy for each key

MIXED = {"ticker-*": "conflate", "log": "drop_oldest", "chat": "drop_newest", "*": "disconnect"}


def mixed() -> tuple[House, Stream]:
    house = House(overflow=MIXED, queue_events=3)
    stream = house.open("ticker-a", "log", "chat", "orders")
    house.take(stream)
    return house, stream


def test_the_policy_of_the_messages_key_counts() -> None:
    house, stream = mixed()
    for number in range(5):
        house.manager.publish("ticker-a", f"t{number}")
        house.flush()
    for number in range(3):
        house.manager.publish("chat", f"c{number}")
        house.flush()
    # Two of the tickers are superseded by t3, t4 has room; then of chat's three the first two have.
    assert seen(house, stream) == [(3, ["ticker-a"]), "t3", "t4", "c0", (2, ["chat"])]
    assert stream.reason is None


def test_what_must_not_be_dropped_makes_others_give_way() -> None:
    house, stream = mixed()
    for number in range(3):
        house.manager.publish("log", f"l{number}")
    for number in range(3):
        house.manager.publish("orders", f"o{number}")
    assert seen(house, stream) == [(3, ["log"]), "o0", "o1", "o2"]
    assert stream.reason is None


def test_what_must_not_be_dropped_ends_the_stream_where_nothing_gives_way() -> None:
    house, stream = mixed()
    for key in ("orders", "chat", "orders", "orders"):
        house.manager.publish(key, "x")
    house.flush()
    assert stream.reason is CloseReason.SLOW


def test_what_may_be_dropped_goes_itself_where_nothing_gives_way() -> None:
    house, stream = mixed()
    for key in ("orders", "orders", "orders", "log", "ticker-a", "log"):
        house.manager.publish(key, key)
    assert seen(house, stream) == ["orders"] * 3 + [(3, ["log", "ticker-a"])]
    assert stream.reason is None


def test_a_name_is_before_a_pattern_a_pattern_before_all_others_and_the_rest_is_disconnected() -> None:
    policies = Policies({"*": "drop_newest", "a*": "conflate", "ab": "drop_oldest", "*b": "disconnect"})
    asked: list[str | None] = ["ab", "ax", "xb", "x", None]
    expected = ["drop_oldest", "conflate", "disconnect", "drop_newest", "drop_newest"]
    assert [policies.of(key) for key in asked] == expected
    assert Policies({"a": "conflate"}).of("b") == "disconnect"
    assert not Policies("disconnect").lossy
    assert not Policies({"a": "disconnect"}).lossy
    for number in range(5000):
        assert policies.of(f"a{number}") == "conflate"
    assert len(policies._known) <= 1024


# Whatever happens


@hypothesis_settings(deadline=None)  # a machine that is busy with something else is no failure
@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from("abcd"), st.sampled_from(["x", "y", None]), st.integers(0, 60)),
            st.just("take"),
        ),
        max_size=60,
    ),
    st.lists(st.sampled_from(POLICIES), min_size=4, max_size=4),
    st.integers(1, 6),
    st.integers(60, 400),
)
def test_every_event_comes_once_in_order_or_is_counted_in_the_hole_where_it_is_missing(
    steps: list[Any], policies: list[Overflow], queue_events: int, queue_bytes: int
) -> None:
    overflow = dict(zip("abcd", policies, strict=True))
    house = House(overflow=overflow, queue_events=queue_events, queue_bytes=queue_bytes, ping_interval=0)
    stream = house.open(*"abcd")
    decoder = EventDecoder()
    decoder.feed(house.take(stream))
    received: list[Event] = []
    keys: list[str] = []
    for step in [*steps, "take"]:
        if step == "take":
            # Before a closed stream is read: SLOW has thrown its queue away.
            batch = decoder.feed(b"".join(iter(stream.take, b"")))
            names = [event.event for event in batch]
            assert ("stream-dropped", "stream-dropped") not in itertools.pairwise(names), "a hole is told of once"
            received += batch
            continue
        key, name, size = step
        house.manager.publish(key, f"{len(keys)} " + "x" * size, event=name)
        keys.append(key)
        house.flush()
        items = stream._queue[stream._uncounted :]
        messages = [item for item in items if isinstance(item, Message)]
        assert len(messages) <= queue_events
        assert stream._bytes == sum(len(message.frame) for message in messages)
        assert stream._bytes <= max(queue_bytes, *(len(message.frame) for message in messages), 0)
        assert sum(isinstance(item, Hole) for item in items) <= len(messages) + 1
        if stream.reason is not None:
            break
    if stream.reason is not None:
        assert "disconnect" in policies
        return
    number = 0
    missing = 0
    for event in received:
        assert event.data is not None
        if event.event == "stream-dropped":
            told = json.loads(event.data)
            assert set(told["keys"]) == set(keys[number + missing : number + missing + told["count"]])
            missing += told["count"]  # of a hole that went on after it was told
            assert not {policies["abcd".index(key)] for key in told["keys"]} & {"disconnect"}
            continue
        assert int(event.data.split()[0]) == number + missing
        number, missing = number + missing + 1, 0
    assert number + missing == len(keys)
    assert house.manager.stats().dropped == len(keys) - sum(event.event != "stream-dropped" for event in received)
