"""What the scripts leave in Redis, what they refuse, and what is taken for an event when it comes out again."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from redis_server import PROGRAMS, RedisServer

from flask_sse_stream.brokers.redis_scripts import LEASE, PUBLISH, READ, Live, Names, Reading, live_message, reading
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

    def read(self, *keys: str | None, after: str = "0", size: int = 10, limit: int = 1000) -> Reading:
        names = [self.names.log, self.names.keys, *(self.names.stream(key) for key in keys)]
        arguments: list[Any] = [self.run, secrets.token_hex(6), size]
        for key in keys:
            arguments += [self.names.member(key), after]
        return reading(self.command("EVAL", READ, len(names), *names, *arguments), limit)

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
    found = scripts.read("a", "b", None, "never")
    assert found.head == 5
    chains = [[(entry.previous, entry.seq) for entry in one.entries] for one in found.found]
    assert chains == [[(0, 1), (1, 3), (3, 5)], [(0, 2)], [(0, 4)], []]
    assert [(one.last, one.floor) for one in found.found] == [(5, 0), (2, 0), (4, 0), (0, 0)]


def test_a_reading_begins_after_a_number_and_says_so_where_more_is_missing(scripts: Scripts) -> None:
    for _ in range(9):
        scripts.publish("a")
    [found] = scripts.read("a", after="6").found
    assert ([entry.seq for entry in found.entries], found.floor) == ([7, 8, 9], 6)
    [found] = scripts.read("a", after="2", size=3).found
    assert ([entry.seq for entry in found.entries], found.floor) == ([7, 8, 9], 6)
    [found] = scripts.read("a", after="-").found
    assert (found.last, found.entries) == (9, [])


def test_a_history_does_not_grow_without_end_and_ends_with_its_time(scripts: Scripts) -> None:
    for _ in range(1000):
        scripts.publish("a", size=5, ttl=5000)
    stream = scripts.names.stream("a")
    assert scripts.command("XLEN", stream) <= 200
    assert 4000 < scripts.command("PTTL", stream) <= 5000
    scripts.command("DEL", stream)  # as if its time were over
    assert scripts.read("a").found[0][:3] == (1000, 1000, [])


def test_without_a_history_nothing_is_kept_but_the_place(scripts: Scripts) -> None:
    scripts.publish("a", size=0)
    assert not scripts.command("EXISTS", scripts.names.stream("a"))
    assert scripts.read("a", size=0).found[0][:2] == (1, 1)


def test_what_a_lost_life_left_behind_is_not_taken_for_this_ones(scripts: Scripts) -> None:
    old = [scripts.publish("a") for _ in range(5)]
    scripts.command("DEL", scripts.names.log)
    assert scripts.read("a").found[0][:3] == (0, 0, [])
    new = scripts.publish("a")
    assert new.endswith(b"-1")
    assert new.partition(b"-")[0] != old[0].partition(b"-")[0]
    assert [entry.seq for entry in scripts.read("a").found[0].entries] == [1]


def test_a_log_without_its_keys_is_a_lost_one(scripts: Scripts) -> None:
    epoch = scripts.publish("a").partition(b"-")[0]
    scripts.command("DEL", scripts.names.keys)
    found = scripts.read("a")
    assert (found.head, found.earlier) == (0, {})
    assert found.epoch.encode() != epoch


def test_a_new_server_begins_a_life_that_knows_those_before_it(scripts: Scripts) -> None:
    epochs = []
    for number in range(40):
        scripts.run = f"run {number}"
        epochs.append(scripts.publish("a").partition(b"-")[0].decode())
    found = scripts.read("a")
    assert found.epoch == epochs[-1]
    assert found.earlier == {epoch: number for number, epoch in enumerate(epochs[:-1], 1) if number > 7}
    assert [entry.seq for entry in found.found[0].entries] == list(range(31, 41))


def test_of_very_many_keys_those_whose_history_is_gone_share_a_floor(scripts: Scripts) -> None:
    for number in range(10_100):
        scripts.publish(f"key {number}", ttl=1 if number < 200 else 100_000)
    kept = scripts.command("ZCARD", scripts.names.keys)
    assert 9_990 <= kept <= 10_000
    found = scripts.read("key 0", "key 10050", "never")
    floor = found.found[0].floor
    assert 50 <= floor <= 200
    assert found.found[1].floor <= floor, "what there was when it was first published to"
    assert found.found[2].floor == floor
    scripts.publish("never")
    assert [(entry.previous, entry.seq) for entry in scripts.read("never").found[0].entries] == [(floor, 10_101)]


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
        assert scripts.read("a", "b").head == 1
        assert scripts.read("b").found[0][:3] == (0, 0, [])


def test_a_stream_that_somebody_else_wrote_to_is_given_up_and_publishing_goes_on(scripts: Scripts) -> None:
    scripts.publish("a")
    scripts.command("XADD", scripts.names.stream("a"), "99999-0", "anything", "at all")
    assert scripts.publish("a").endswith(b"-2")
    assert scripts.read("a").found[0][:2] == (2, 1), "the first one went with the foreign one"


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
    [found] = scripts.read("a").found
    assert ([entry.seq for entry in found.entries], found.floor, found.skipped) == ([3], 2, 1)


@pytest.mark.parametrize("fields", [["b", BODY], ["b", BODY, "p", "x", "t", "1"], ["x", "y"]])
def test_an_entry_with_other_fields_is_skipped(fields: list[Any], scripts: Scripts) -> None:
    scripts.publish("a")
    stream = scripts.names.stream("a")
    scripts.command("DEL", stream)
    scripts.command("XADD", stream, "1-0", *fields)
    assert scripts.read("a").found[0] == (1, 1, [], 1)
