"""A window holds the recent events of a key, knows where its knowledge begins, and finds a place in them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_sse_stream.event import Event, Message
from flask_sse_stream.window import Replay, Window, Windows


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


def windows(**options: float) -> Windows:
    made = Windows(int(options.get("size", 10)), options.get("ttl", 60.0))
    made.begin("ep", 0, {})
    return made


def put(into: Windows, key: str | None, seq: int, now: float = 0.0, id: str | None = None) -> Message:
    message = Message(key, "ep", seq, Event("x", id=id).encode(), now)
    into.add(message, now, ())
    return message


def test_a_cursor_is_answered_with_what_follows_it_in_its_keys_and_in_what_went_to_all() -> None:
    some = windows()
    one, _, three, four = put(some, "a", 1), put(some, "b", 2), put(some, None, 3), put(some, "a", 4)
    assert some.replay(["a"], "ep-0", 0.0) == Replay([one, three, four])
    assert some.replay(["a"], "ep-1", 0.0) == Replay([three, four])
    assert some.replay(["nothing yet"], "ep-1", 0.0) == Replay([three])
    assert some.replay(["a"], "ep-4", 0.0) == Replay([])


@pytest.mark.parametrize(
    ("cursor", "reason"), [("other-1", "epoch"), ("ep-5", "unknown"), ("x", "unknown"), ("of b", "unknown")]
)
def test_a_cursor_that_stands_for_no_place_is_told_why(cursor: str, reason: str) -> None:
    some = windows()
    put(some, "a", 1)
    put(some, "b", 2, id="of b")
    assert some.replay(["a"], cursor, 0.0) == Replay([], reason, ("a",))


def test_a_message_is_known_once() -> None:
    some = windows()
    message = put(some, "a", 1)
    assert not some.add(message, 0.0, ())
    assert (some.head, len(some)) == (1, 1)


def test_the_latest_of_each_key_come_in_their_order() -> None:
    some = windows()
    put(some, "a", 1)
    kept = [put(some, "a", 2), put(some, "b", 3), put(some, None, 4)]
    assert some.latest(["a", "b"], 1, 0.0) == kept
    assert some.latest(["a", "b"], 0, 0.0) == []


def test_an_empty_window_is_forgotten_after_a_while_unless_its_key_is_in_use() -> None:
    some = windows(ttl=5.0)
    for seq, key in enumerate(("used", "unused"), 1):
        put(some, key, seq)
    for seq in range(3, 9):
        some.add(Message("busy", "ep", seq, b"data: x\n\n", 100.0), 100.0, {"used"})
    assert len(some) == 2
    assert some.replay(["used"], "ep-1", 100.0) == Replay([])
    assert some.replay(["unused"], "ep-1", 100.0) == Replay([], "history", ("unused",))


def test_without_a_size_nothing_is_kept() -> None:
    some = windows(size=0)
    put(some, "a", 1)
    some.touch("a", 0.0)
    assert (len(some), some.head) == (0, 1)


def test_a_log_that_begins_anew_leaves_nothing_of_the_old_one() -> None:
    some = windows()
    put(some, "a", 1)
    some.begin("new", 7, {})
    assert (some.epoch, some.head, len(some)) == ("new", 7, 0)
    assert some.replay(["a"], "new-6", 0.0) == Replay([], "history", ("a",))
    assert some.replay(["a"], "new-7", 0.0) == Replay([])


def test_of_a_log_that_is_fetched_nothing_is_taken_for_complete_before_it_was_asked() -> None:
    some = Windows(10, 60.0, fetched=True)
    some.begin("ep", 3, {})
    for seq in (4, 5):
        put(some, "a", seq)  # nobody listens to it here, so nothing keeps it
    assert some.replay(["a"], "ep-3", 0.0) == Replay([], "history", ("a",))
    assert some.replay(["a"], "ep-5", 0.0) == Replay([])


def test_a_window_that_the_log_has_not_completed_says_nothing_of_what_was_before_the_head() -> None:
    some = Windows(10, 60.0, fetched=True)
    some.begin("ep", 3, {})
    some.incomplete(["a", None], 0.0)
    some.complete_with(None, 0, [], 0.0)
    put(some, "a", 7)  # there may have been a 5 before it was listened to
    assert some.replay(["a"], "ep-4", 0.0) == Replay([], "history", ("a",))
    assert some.replay(["a"], "ep-7", 0.0) == Replay([])


def test_a_window_is_completed_with_what_was_before_it_and_not_with_what_came_since() -> None:
    some = Windows(10, 60.0, fetched=True)
    some.begin("ep", 3, {})
    assert some.incomplete(["a", None], 0.0) == ["a", None]
    since = put(some, "a", 4)
    before = [Message("a", "ep", seq, b"data: x\n\n", 0.0) for seq in (2, 3)]
    some.complete_with("a", 1, [*before, since], 0.0)
    some.complete_with(None, 0, [], 0.0)
    assert some.incomplete(["a", None], 0.0) == []
    assert some.replay(["a"], "ep-1", 0.0) == Replay([*before, since])
    assert some.replay(["a"], "ep-0", 0.0) == Replay([], "history", ("a",))


def test_a_window_is_completed_with_what_was_published_between_its_making_and_its_first_message() -> None:
    some = Windows(10, 60.0, fetched=True)
    some.begin("ep", 3, {})
    some.incomplete(["a", None], 0.0)
    some.reach(9)  # a log that delivers what it is asked for alone: 5 and 6 were before it was asked
    live = put(some, "a", 10)
    earlier = [Message("a", "ep", seq, b"data: x\n\n", 0.0) for seq in (2, 5, 6)]
    some.complete_with("a", 0, [*earlier, live], 0.0)
    some.complete_with(None, 0, [], 0.0)
    assert some.replay(["a"], "ep-2", 0.0) == Replay([*earlier[1:], live])


def test_a_history_that_was_cut_short_after_a_window_began_leaves_no_hole() -> None:
    some = Windows(10, 60.0, fetched=True)
    some.begin("ep", 3, {})
    some.incomplete(["a", None], 0.0)
    live = [put(some, "a", seq) for seq in (5, 6, 7)]
    some.complete_with("a", 6, [live[-1]], 0.0)
    some.complete_with(None, 0, [], 0.0)
    assert some.replay(["a"], "ep-4", 0.0) == Replay(live)
    assert some.replay(["a"], "ep-3", 0.0) == Replay([], "history", ("a",))


def test_a_life_that_continues_another_keeps_its_events_and_its_ids() -> None:
    some = windows()
    message = put(some, "a", 1)
    assert some.live_on("next", {"ep": 1})
    assert some.replay(["a"], "ep-0", 0.0) == some.replay(["a"], "next-0", 0.0) == Replay([message])
    assert some.replay(["a"], "ep-2", 0.0) == Replay([], "epoch", ("a",))


def test_a_life_that_lost_the_latest_events_of_another_does_not_continue_it() -> None:
    some = windows()
    put(some, "a", 1)
    put(some, "a", 2)
    assert not some.live_on("next", {"ep": 1})
    assert not some.live_on("foreign", {})
    assert some.live_on("ep", {})


def test_an_idle_key_is_forgotten_when_nobody_has_used_it_for_a_minute() -> None:
    some = Windows(10, 60.0, fetched=True)
    some.begin("ep", 0, {})
    some.incomplete(["used", "quiet", "listened to"], 0.0)
    some.touch("used", 50.0)
    keys = ["used", "quiet", "listened to", "never asked for"]
    assert some.forget_idle(keys, 70.0, {"listened to"}) == ["quiet", "never asked for"]
    assert len(some) == 2
