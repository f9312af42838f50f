"""What the scripts leave in Redis, what they refuse, and what is taken for an event when it comes out again."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from redis_server import PROGRAMS, RedisServer

from flask_sse_stream.brokers.redis_scripts import (
    LEASE,
    PUBLISH,
    Chain,
    Live,
    Names,
    Reading,
    live_message,
    read_command,
    reading,
)
from flask_sse_stream.event import Event, is_body

BODY = b"data: x\n\n"


@pytest.fixture(scope="module", params=PROGRAMS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis"), program=PROGRAMS[request.param]) as server:
        yield server


class Scripts:
    def __init__(self, server: RedisServer) -> None:
        self.names = Names(f"test-{secrets.token_hex(4)}")
        self._client = server.client()
        self._client.connection_pool.connection_kwargs["decode_responses"] = False
        self.run = "run"

    def command(self, *command: Any) -> Any:
        return self._client.execute_command(*command)

    def publish(self, key: str | None = "a", body: bytes = BODY, size: int = 10, ttl: int = 100_000) -> bytes:
        keys = [self.names.log, self.names.keys, self.names.stream(key)]
        arguments = [self.run, secrets.token_hex(6), self.names.member(key), body, b"", size, ttl, 1000, "PUBLISH"]
        [identifier] = self.command("EVAL", PUBLISH, len(keys), *keys, *arguments)
        return bytes(identifier)

    def read(
        self, *keys: str | None, after: int | None = 0, history: bool = True, limit: int = 10**6
    ) -> tuple[Reading, list[Chain]]:
        """Read all that there is of some keys, in as many pages as it takes."""
        chains = {key: Chain(after or 0) for key in keys}
        self.replies = 0
        while True:
            asked = {key: chain.end if after is not None else None for key, chain in chains.items() if chain.more}
            found = reading(self.command(*read_command(self.names, self.run, asked, history=history)), limit)
            self.replies += 1
            for key, page in zip(asked, found.pages, strict=True):
                chains[key].add(page)
            if not any(chain.more for chain in chains.values()):
                return found, list(chains.values())

    def close(self) -> None:
        self._client.close()


@pytest.fixture
def scripts(server: RedisServer) -> Iterator[Scripts]:
    scripts = Scripts(server)
    yield scripts
    scripts.close()


def test_everything_of_a_namespace_is_in_one_hash_slot(scripts: Scripts) -> None:
    names = scripts.names
    for name in (names.log, names.keys, names.stream("a}b{"), names.stream(None), names.once("x"), names.lease("y")):
        assert name.startswith(b"{test-")
        assert name.index(b"}") == len("{test-12345678")


def test_each_event_knows_the_one_before_it_of_its_key(scripts: Scripts) -> None:
    for key in ("a", "b", "a", None, "a"):
        scripts.publish(key)
    found, chains = scripts.read("a", "b", None, "never")
    assert found.head == 5
    assert [[(entry.previous, entry.seq) for entry in chain.entries] for chain in chains] == [
        [(0, 1), (1, 3), (3, 5)],
        [(0, 2)],
        [(0, 4)],
        [],
    ]
    assert [(chain.reached, chain.floor) for chain in chains] == [(5, None), (2, None), (4, None), (0, None)]


def test_a_reading_begins_after_a_number_and_says_so_where_something_is_missing(scripts: Scripts) -> None:
    for _ in range(9):
        scripts.publish("a")
    _, [chain] = scripts.read("a", after=6)
    assert ([entry.seq for entry in chain.entries], chain.floor) == ([7, 8, 9], None)
    _, [chain] = scripts.read("a", after=None, history=False)
    assert (chain.reached, chain.entries) == (9, [])
    scripts.command("XDEL", scripts.names.stream("a"), "4-0")
    _, [chain] = scripts.read("a", after=2)
    assert ([entry.seq for entry in chain.entries], chain.floor) == ([5, 6, 7, 8, 9], 4)
    scripts.command("XDEL", scripts.names.stream("a"), "9-0")
    _, [chain] = scripts.read("a", after=2)
    assert (chain.entries, chain.floor, chain.reached) == ([], 9, 9)


def test_what_the_log_has_not_although_it_was_heard_is_a_gap(scripts: Scripts) -> None:
    scripts.publish("a")
    _, [chain] = scripts.read("a", after=7)
    assert (chain.entries, chain.floor, chain.reached) == ([], 1, 1)


def test_much_is_read_in_replies_of_about_a_megabyte(scripts: Scripts) -> None:
    for _ in range(8):
        for key in ("a", "b", "c"):
            scripts.publish(key, body=b"data: " + b"x" * 500_000 + b"\n\n", size=100)
    _, chains = scripts.read("a", "b", "c")
    assert [len(chain.entries) for chain in chains] == [8, 8, 8]
    assert [chain.floor for chain in chains] == [None] * 3
    assert scripts.replies >= 3
    reply = scripts.command(*read_command(scripts.names, scripts.run, {"a": 0, "b": 0, "c": 0}, history=True))
    assert sum(len(part) for _, events, _ in reply[-1] for _, fields in events for part in fields) < 5_000_000


def test_a_history_is_cut_to_its_size_its_time_and_what_has_been_delivered(scripts: Scripts) -> None:
    for _ in range(9):
        scripts.publish("a")
    _, [chain] = scripts.read("a")

    def cut(head: int, size: int, ttl: float = 100.0) -> tuple[int, list[int]]:
        history = chain.history("a", "epoch", head, size, ttl)
        return history.floor, [message.seq for message in history.messages]

    assert cut(9, 100) == (0, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert cut(9, 3) == (6, [7, 8, 9])
    assert cut(7, 3) == (4, [5, 6, 7])
    assert cut(9, 0) == (9, [])
    assert cut(9, 3, ttl=-1.0) == (9, [])
    assert cut(0, 3) == (0, [])

    # What is later is heard as well, whatever has become of it in the log.
    scripts.command("XTRIM", scripts.names.stream("a"), "MAXLEN", 2)
    _, [chain] = scripts.read("a")
    assert (cut(9, 100), cut(5, 100)) == ((7, [8, 9]), (5, []))
    scripts.command("DEL", scripts.names.stream("a"))
    _, [chain] = scripts.read("a")
    assert (cut(9, 100), cut(7, 100)) == ((9, []), (7, []))


def test_a_history_does_not_grow_without_end_and_ends_with_its_time(scripts: Scripts) -> None:
    for _ in range(1000):
        scripts.publish("a", size=5, ttl=5000)
    stream = scripts.names.stream("a")
    assert scripts.command("XLEN", stream) <= 200
    assert 4000 < scripts.command("PTTL", stream) <= 5000
    scripts.command("DEL", stream)  # as if its time were over
    _, [chain] = scripts.read("a")
    assert (chain.reached, chain.floor, chain.entries) == (1000, 1000, [])


def test_without_a_history_nothing_is_kept_but_the_place(scripts: Scripts) -> None:
    scripts.publish("a", size=0)
    assert not scripts.command("EXISTS", scripts.names.stream("a"))
    _, [chain] = scripts.read("a", history=False)
    assert (chain.reached, chain.floor) == (1, 1)


def test_what_a_lost_life_left_behind_is_not_taken_for_this_ones(scripts: Scripts) -> None:
    old = [scripts.publish("a") for _ in range(5)]
    scripts.command("DEL", scripts.names.log)
    assert scripts.read("a")[1][0].entries == []
    new = scripts.publish("a")
    assert new.endswith(b"-1")
    assert new.partition(b"-")[0] != old[0].partition(b"-")[0]
    assert [entry.seq for entry in scripts.read("a")[1][0].entries] == [1]


def test_a_log_without_its_keys_is_a_lost_one(scripts: Scripts) -> None:
    epoch = scripts.publish("a").partition(b"-")[0]
    scripts.command("DEL", scripts.names.keys)
    found, _ = scripts.read("a")
    assert (found.head, found.earlier) == (0, {})
    assert found.epoch.encode() != epoch


@pytest.mark.parametrize(
    ("field", "value"),
    [("epoch", b"\xff"), ("epoch", b"a\nb"), ("epoch", b""), ("seq", b"x"), ("seq", b"nan"), ("seq", b"-1")],
)
def test_a_log_that_somebody_else_has_written_to_is_a_lost_one(field: str, value: bytes, scripts: Scripts) -> None:
    old = scripts.publish("a").partition(b"-")[0].decode()
    scripts.command("HSET", scripts.names.log, field, value)
    found, [chain] = scripts.read("a")
    assert (found.head, found.earlier, chain.entries) == (0, {}, [])
    assert found.epoch != old
    assert scripts.publish("a") == found.epoch.encode() + b"-1"


def test_what_is_no_life_is_not_taken_for_one_and_what_is_no_floor_is_none(scripts: Scripts) -> None:
    scripts.publish("a")
    scripts.command("HSET", scripts.names.log, "lives", b"\xff:1 0123456789ab:x : 0123456789ab:7 0", "floor", b"\xff")
    found, [_, never] = scripts.read("a", "never")
    assert (found.head, found.earlier, never.reached) == (1, {"0123456789ab": 7}, 0)


def test_a_new_server_begins_a_life_that_knows_those_before_it(scripts: Scripts) -> None:
    epochs = []
    for number in range(40):
        scripts.run = f"run {number}"
        epochs.append(scripts.publish("a").partition(b"-")[0].decode())
    found, [chain] = scripts.read("a")
    assert found.epoch == epochs[-1]
    assert found.earlier == {epoch: number for number, epoch in enumerate(epochs[:-1], 1) if number > 7}
    assert [entry.seq for entry in chain.entries] == list(range(1, 41))


def test_of_very_many_keys_those_whose_history_is_gone_share_a_floor(scripts: Scripts) -> None:
    for number in range(10_100):
        scripts.publish(f"key {number}", ttl=1 if number < 200 else 100_000)
    kept = scripts.command("ZCARD", scripts.names.keys)
    assert 9_990 <= kept <= 10_000
    _, chains = scripts.read("key 0", "key 10050", "never")
    floor = chains[0].floor
    assert floor is not None
    assert 50 <= floor <= 200
    assert chains[1].floor is None or chains[1].floor <= floor, "what there was when it was first published to"
    assert chains[2].floor == floor
    scripts.publish("never")
    [entry] = scripts.read("never")[1][0].entries
    assert (entry.previous, entry.seq) == (floor, 10_101)


@pytest.mark.parametrize("which", ["log", "keys", "stream"])
def test_a_key_of_another_type_is_an_error_and_nothing_is_sent_or_counted(which: str, scripts: Scripts) -> None:
    scripts.publish("a")
    name = scripts.names.stream("b") if which == "stream" else getattr(scripts.names, which)
    scripts.command("SET", name, "somebody else's")
    from redis import ResponseError

    with pytest.raises(ResponseError, match="WRONGTYPE"):
        scripts.publish("b")
    assert scripts.command("GET", name) == b"somebody else's"
    if which == "stream":
        found, chains = scripts.read("a", "b")
        assert (found.head, chains[1].reached, chains[1].entries) == (1, 0, [])


def test_a_stream_that_somebody_else_wrote_to_is_given_up_and_publishing_goes_on(scripts: Scripts) -> None:
    scripts.publish("a")
    scripts.command("XADD", scripts.names.stream("a"), "99999-0", "anything", "at all")
    assert scripts.publish("a").endswith(b"-2")
    _, [chain] = scripts.read("a")
    assert (chain.reached, chain.floor) == (2, 1), "the first one went with the foreign one"


def test_a_lease_ends_by_itself_or_when_it_is_given_back(scripts: Scripts) -> None:
    def lease(holder: str, milliseconds: int) -> int:
        return int(scripts.command("EVAL", LEASE, 1, scripts.names.lease("clock"), holder, milliseconds))

    assert [lease("a", 60_000), lease("b", 60_000), lease("a", 60_000), lease("b", 0)] == [1, 0, 1, 0]
    assert 50_000 < scripts.command("PTTL", scripts.names.lease("clock")) <= 60_000
    assert [lease("a", 0), lease("b", 60_000)] == [1, 1]


# What comes out of Redis is anybody's


@given(
    data=st.none() | st.text(st.characters(exclude_categories=["Cs"])),
    event=st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0")),
    retry=st.none() | st.integers(0, 2**53 - 1),
    comment=st.none() | st.text(st.characters(exclude_categories=["Cs"])),
    id=st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"), min_size=1),
)
def test_every_body_of_ours_is_taken_for_one(**fields: Any) -> None:
    body = Event(fields.pop("data"), **fields).encode()
    if body and fields["id"] != "end":
        assert is_body(body)
        live = live_message(b"1 0123456789ab 7 6\n" + body, len(body))
        assert live == Live("0123456789ab", 7, 6, body)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"1",
        b"1 0123456789ab 7 6",
        b"2 0123456789ab 7 6\ndata: x\n\n",
        b"1 0123456789AB 7 6\ndata: x\n\n",
        b"1 0123456789ab -7 6\ndata: x\n\n",
        b"1 0123456789ab 07 6\ndata: x\n\n",
        b"1 0123456789ab " + b"7" * 100 + b" 6\ndata: x\n\n",
        b'{"v": 1}',
        b"[" * 100_000,
        b"\x80\x04\x95cos\nsystem\n",
        5,
        None,
    ],
)
def test_what_is_no_message_is_none(payload: Any) -> None:
    assert live_message(payload, 1000) is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\n",
        b"\n\n",
        b"data: x",
        b"data: x\n",
        b"data: x\n\ndata: y\n\n",
        b"data: x\r\n\n",
        b"event: a\nb\ndata: x\n\n",
        b"data: x\nid: 4\n\n",
        b"id: end\ndata: x\n\n",
        b"id: a\0\ndata: x\n\n",
        b"retry: -1\n\n",
        b"data: \xff\n\n",
        b"\xef\xbb\xbfdata: x\n\n",
        b"x" * 2000 + b"\n\n",
        b"data: " + b"x" * 2000 + b"\n\n",
    ],
)
def test_a_message_whose_body_is_no_event_or_too_large_has_none(body: bytes) -> None:
    assert live_message(b"1 0123456789ab 7 6\n" + body, 1000) == Live("0123456789ab", 7, 6, None)


@given(st.binary(max_size=200))
def test_no_bytes_at_all_break_what_reads_them(payload: bytes) -> None:
    live_message(payload, 1000)
    live_message(b"1 0123456789ab 7 6\n" + payload, 1000)
    is_body(payload)


def test_an_entry_that_is_no_event_ends_what_is_known_and_is_counted(scripts: Scripts) -> None:
    scripts.publish("a")
    scripts.publish("a", body=b"no event")
    scripts.publish("a")
    _, [chain] = scripts.read("a")
    assert ([entry.seq for entry in chain.entries], chain.floor, chain.skipped) == ([3], 2, 1)


@pytest.mark.parametrize("fields", [["b", BODY], ["b", BODY, "p", "x", "t", "1"], ["x", "y"]])
def test_an_entry_with_other_fields_is_skipped(fields: list[Any], scripts: Scripts) -> None:
    scripts.publish("a")
    stream = scripts.names.stream("a")
    scripts.command("DEL", stream)
    scripts.command("XADD", stream, "1-0", *fields)
    _, [chain] = scripts.read("a")
    assert (chain.reached, chain.floor, chain.entries, chain.skipped) == (1, 1, [], 1)


def test_a_stream_of_somebody_elses_is_not_read_for_ever(scripts: Scripts) -> None:
    scripts.publish("a")
    scripts.publish("a")
    stream = scripts.names.stream("a")
    scripts.command("DEL", stream)
    for number in range(1, 40):
        scripts.command("XADD", stream, f"1-{number}", "b", b"x" * 100_000)
    _, [chain] = scripts.read("a")
    assert (chain.reached, chain.floor, chain.entries) == (2, 2, [])
