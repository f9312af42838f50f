"""A window holds the recent events of a key, knows where its knowledge begins, and finds a place in them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_sse_stream.event import Event, Message
from flask_sse_stream.window import Window


def message(seq: int, created: float = 0.0, id: str | None = None) -> Message:
    return Message("k", "ep", seq, Event("x", id=id).encode(), created)


def seqs(window: Window, after: int) -> list[int]:
    return [found.seq for found in window.after(after)]


def test_what_was_added_after_a_place_comes_in_order() -> None:
    window = Window(10, 60.0)
    for seq in (2, 3, 7):
        window.add(message(seq), 0.0)
    assert [seqs(window, after) for after in (0, 1, 2, 3, 6, 7, 99)] == [
        [2, 3, 7],
        [2, 3, 7],
        [3, 7],
        [7],
        [7],
        [],
        [],
    ]
    assert (window.floor, window.head, len(window)) == (0, 7, 3)


def test_a_repetition_is_left_out() -> None:
    window = Window(10, 60.0)
    for seq in (2, 3, 3, 2):
        window.add(message(seq), 0.0)
    assert seqs(window, 0) == [2, 3]


def test_the_floor_rises_to_the_last_event_that_was_dropped_for_size() -> None:
    window = Window(2, 60.0)
    for seq in (5, 6, 9, 12):
        window.add(message(seq), 0.0)
    assert seqs(window, 0) == [9, 12]
    assert window.floor == 6


def test_the_floor_rises_to_the_last_event_that_was_dropped_for_age() -> None:
    window = Window(10, 60.0)
    window.add(message(1, 0.0), 0.0)
    window.add(message(2, 50.0), 50.0)
    window.trim(60.0)
    assert seqs(window, 0) == [1, 2]
    window.trim(60.1)
    assert (seqs(window, 0), window.floor) == ([2], 1)
    window.add(message(3, 200.0), 200.0)
    assert (seqs(window, 0), window.floor) == ([3], 2)


def test_an_own_id_finds_its_newest_place_and_none_once_it_is_gone() -> None:
    window = Window(2, 60.0)
    window.add(message(1, id="a"), 0.0)
    window.add(message(2, id="a"), 0.0)
    assert window.find("a") == 2
    window.add(message(3), 0.0)  # drops the older "a" alone
    assert window.find("a") == 2
    window.add(message(4), 0.0)
    assert window.find("a") is None
    assert window.find("ep-4") is None


def test_a_window_can_begin_above_zero() -> None:
    window = Window(2, 60.0, floor=5)
    window.add(message(5), 0.0)
    assert (len(window), window.head) == (0, 5)


@given(
    st.lists(st.tuples(st.integers(1, 5), st.floats(0, 30), st.sampled_from([None, "a", "b"])), max_size=40),
    st.integers(1, 6),
)
def test_a_window_is_the_tail_of_what_was_added(steps: list[tuple[int, float, str | None]], size: int) -> None:
    window = Window(size, 60.0)
    seq, now, added = 0, 0.0, []
    for gap, wait, own in steps:
        seq, now = seq + gap, now + wait
        added.append(message(seq, now, own))
        window.add(added[-1], now)
    kept = [m for m in added[-size:] if m.created >= now - 60.0]
    assert window.after(0) == kept
    assert window.floor == max([m.seq for m in added if m not in kept], default=0)
    for own in ("a", "b"):
        assert window.find(own) == max([m.seq for m in kept if m.own_id and m.id == own], default=None)
    for place in range(window.floor, seq + 1):
        assert window.after(place) == [m for m in added if m.seq > place]


@pytest.mark.parametrize("size", [1, 3])
def test_a_window_never_holds_more_than_its_size(size: int) -> None:
    window = Window(size, 60.0)
    for seq in range(1, 20):
        window.add(message(seq), 0.0)
        assert len(window) <= size
