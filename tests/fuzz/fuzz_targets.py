"""What is fuzzed: functions of any bytes that raise where a promise is broken, and return where all is well.

The seconds of the suite replay the kept inputs of ``corpus/<name of the target>.txt`` and let hypothesis add some
(``test_fuzz_targets.py``). Minutes are had with ``make fuzz``, which follows coverage where atheris is installed
(``__main__.py``). An input that broke something goes into the corpus, with a comment that says what it broke.
"""

from __future__ import annotations

import ast
import re
import sqlite3
import struct
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flask_sse_stream.brokers.base import Gap, Position
from flask_sse_stream.brokers.redis_scripts import Chain, Reading, live_message, message, reading
from flask_sse_stream.brokers.sqlite import SQLiteBroker
from flask_sse_stream.errors import EventError
from flask_sse_stream.event import MAX_RETRY, Event, EventDecoder, Message, is_body
from flask_sse_stream.settings import Settings

CORPUS = Path(__file__).resolve().parent / "corpus"
LIMIT = 4096  # bytes of an event


def kept_inputs(name: str) -> list[bytes]:
    """Give the corpus of a target: a line for each input, as Python writes bytes; ``#`` begins a comment."""
    path = CORPUS / f"{name}.txt"
    lines = path.read_text(encoding="ascii").split("\n") if path.exists() else []
    return [ast.literal_eval(line) for line in lines if line and not line.startswith("#")]


class Input:
    """Bytes to make values of. When they are used up, everything is zero or empty."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        self._at += len(taken)
        return taken

    def number(self) -> int:
        """Give one byte as a number."""
        return int.from_bytes(self.take(1), "big")

    def piece(self) -> bytes:
        """Give some bytes, whose number the first one says."""
        return self.take(self.number())

    def rest(self) -> bytes:
        return self.take(len(self._data))


Fields = tuple[str | None, str | None, str | None, int | None]


def _fields(event: Event) -> Fields:
    return event.event, event.data, event.id, event.retry


def _reference(stream: bytes) -> list[Fields]:
    """Follow the standard's algorithm (HTML, 9.2.6) over a whole stream, as slowly as it is written there."""
    text = stream.decode("utf-8", "replace").removeprefix("\ufeff")
    events: list[Fields] = []
    name, data, identifier, retry = "", "", "", None
    for line in re.split("\r\n|\n|\r", text)[:-1]:
        if not line:
            if data:
                events.append((name or None, data.removesuffix("\n"), identifier or None, retry))
            name, data, retry = "", "", None
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data += value + "\n"
        elif field == "id" and "\0" not in value:
            identifier = value
        elif field == "retry" and re.fullmatch("[0-9]+", value):
            # Ours says the largest number that a script can hold, of all that are larger.
            retry = MAX_RETRY if len(value.lstrip("0")) > 16 else min(int(value), MAX_RETRY)
    return events


def decoder(data: bytes) -> None:
    """Any bytes, cut anywhere, are decoded as by the standard's algorithm, and never raise."""
    given = Input(data)
    sizes = [given.number() for _ in range(given.number() % 8)] or [1]
    stream = given.rest()
    whole = EventDecoder()
    expected = [_fields(event) for event in whole.feed(stream)]
    assert expected == _reference(stream)
    pieces = EventDecoder()
    found: list[Fields] = []
    at = turn = 0
    while at < len(stream):
        size = sizes[turn % len(sizes)] if any(sizes) else 1
        found += map(_fields, pieces.feed(stream[at : at + size]))
        at, turn = at + size, turn + 1
    assert found == expected
    assert (pieces.last_event_id, pieces.retry) == (whole.last_event_id, whole.retry)
    with_comments = [event for event in EventDecoder(comments=True).feed(stream) if event.data is not None]
    assert [_fields(event) for event in with_comments] == expected


def bounded_decoder(data: bytes) -> None:
    """A decoder with a bound holds no more than it, in whatever pieces the bytes come, or says that it cannot."""
    given = Input(data)
    size, limit = given.number() + 1, given.number()
    stream = given.rest() * 8
    decoder = EventDecoder(max_bytes=limit, comments=True)
    for at in range(0, len(stream), size):
        try:
            decoder.feed(stream[at : at + size])
        except EventError:
            return
        line = sum(map(len, decoder._line))
        block = sum(map(len, (*decoder._data, *decoder._comment)))
        assert line + block <= limit
        assert max(len(decoder._name), len(decoder._id_buffer), len(decoder.last_event_id)) <= limit


def event(data: bytes) -> None:
    """What can be said comes out as it went in; what cannot is refused when the event is made."""
    given = Input(data)
    shape = given.number()
    name, identifier, comment = (given.piece().decode("utf-8", "surrogateescape") for _ in range(3))
    retry = int.from_bytes(given.take(8), "big") if shape & 8 else None
    text = given.rest().decode("utf-8", "surrogateescape")
    try:
        made = Event(
            text if shape & 16 else None,
            event=name if shape & 1 else None,
            id=identifier if shape & 2 else None,
            comment=comment if shape & 4 else None,
            retry=retry,
        )
    except EventError:
        return
    body = made.encode()
    last = EventDecoder(comments=True)
    events = last.feed(body)
    assert len(events) == (made.data is not None or made.comment is not None)
    for found in events:
        assert (found.event, found.id, found.retry) == (made.event, made.id or None, made.retry)
        for one, other in ((found.data, made.data), (found.comment, made.comment)):
            assert one == (None if other is None else re.sub("\r\n?", "\n", other))
    assert last.last_event_id == (made.id or "")
    if body and made.id not in ("", "end"):
        assert is_body(body)
        _check_message(Message("k", "0123456789ab", 7, body, 0.0))


def _check_message(made: Message) -> None:
    """A body that was taken for one is one event at most, and moves no cursor but to its own place."""
    decoder = EventDecoder()
    events = decoder.feed(b"data: before\n\n" + made.frame + b"data: after\n\n")
    assert events[0].data == "before"
    assert events[-1].data == "after", "it swallowed the next one"
    assert len(events) <= 3, "it was more than one"
    if len(events) == 3 or made.own_id:
        assert decoder.last_event_id == made.id != "end"
    else:
        assert decoder.last_event_id == ""
    size, _, rest = made.chunk.partition(b"\r\n")
    assert int(size, 16) == len(made.frame) == len(rest) - 2


def body(data: bytes) -> None:
    """Bytes that are taken for a body are one event that forges nothing."""
    if is_body(data):
        _check_message(Message("k", "0123456789ab", 7, data, 0.0))


def redis_live(data: bytes) -> None:
    """A message of a channel is an event of bounded size at a place, or nothing at all."""
    found = live_message(data, LIMIT)
    if found is None:
        assert live_message(b"1 0123456789ab 7 6\n" + data, LIMIT) is not None
        return
    assert re.fullmatch("[0-9a-f]{12}", found.epoch)
    assert 0 < found.seq < 10**16
    assert 0 <= found.previous < 10**16
    if found.body is not None:
        assert len(found.body) <= LIMIT
        _check_message(Message("k", found.epoch, found.seq, found.body, 0.0))


def _reply(given: Input) -> list[Any]:
    """Make what the script READ replies of a namespace into which somebody else has written."""
    pages = []
    for _ in range(given.number() % 4):
        entries: list[Any] = []
        place = 0
        for _ in range(given.number() % 6):
            shape = given.number()
            previous, place = place, place + 1 + given.number() % 4
            fields = {b"b": given.piece(), b"p": b"%d" % previous, b"t": b"%d" % given.number()}
            for bit, name in ((1, b"b"), (2, b"p"), (4, b"t")):
                if shape & bit:
                    fields[name] = given.piece()
            flat = [part for item in fields.items() for part in item]
            if shape & 8:
                flat = flat[: given.number() % 7]
            identifier = b"%d-%d" % (place, given.number() if shape & 16 else 0)
            # What an entry is that was deleted in the middle of a reading.
            entries.append([identifier, None if shape & 32 else flat])
        pages.append([b"%d" % given.number(), entries, given.number() % 2])
    lives = given.piece() if given.number() % 4 == 1 else b"ba9876543210:7 aaaaaaaaaaaa:3"
    return [b"sse", b"0123456789ab", b"%d" % given.number(), lives, b"1000", pages]


def redis_reading(data: bytes) -> None:
    """What a history is made of holds events alone, each of them where it says it is."""
    reply = _reply(Input(data))
    found = reading(reply, LIMIT)
    assert isinstance(found, Reading)
    for page in found.pages:
        chain = Chain(0)
        chain.add(page)
        assert page.skipped + len(page.entries) <= 6
        assert len(chain.entries) <= len(page.entries)
        for head in (0, found.head, 10**6):
            history = chain.history("k", found.epoch, head, 3, 1e9)
            assert len(history.messages) <= 3
            seqs = [made.seq for made in history.messages]
            assert seqs == sorted(set(seqs))
            assert not seqs or history.floor < seqs[0]
            for made in history.messages:
                _check_message(made)
        for entry in page.entries:
            _check_message(message("k", found.epoch, entry, 3))


class _Database:
    """A log of SQLite's into which anybody has written rows."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="fuzz-")
        path = f"{self._directory.name}/log.db"
        self.broker = SQLiteBroker(Settings(broker_url=f"sqlite:///{path}", max_event_bytes=LIMIT))
        self.delivered: list[Any] = []
        self.broker.start(self.delivered.append)
        self.broker.publish("k", b"data: x\n\n")
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute("PRAGMA synchronous=OFF")

    def fill(self, rows: Sequence[tuple[Any, ...]], floors: Sequence[tuple[Any, ...]]) -> None:
        self._connection.execute("BEGIN")
        self._connection.execute("DELETE FROM event")
        self._connection.execute("DELETE FROM floor")
        self._connection.executemany("INSERT OR REPLACE INTO event VALUES ('sse', ?, ?, ?, ?)", rows)
        self._connection.executemany("INSERT OR REPLACE INTO floor VALUES ('sse', ?, ?)", floors)
        self._connection.execute("COMMIT")


def _sqlite_value(given: Input) -> Any:
    kind = given.number() % 6
    if kind == 0:
        return given.number()
    if kind == 1:
        return given.piece()
    if kind == 2:
        return given.piece().decode("utf-8", "replace")
    if kind == 3:
        value = struct.unpack("<d", given.take(8).ljust(8, b"\0"))[0]
        return value if value == value else 0.0  # SQLite takes NaN for NULL, which the schema refuses
    if kind == 4:
        return -given.number()
    return int.from_bytes(given.take(7), "big", signed=True)


_database: list[_Database] = []


def sqlite_rows(data: bytes) -> None:
    """Rows that anybody wrote are read without an error, and what is no event is left out."""
    if not _database:
        _database.append(_Database())
    broker = _database[0].broker
    given = Input(data)
    rows: list[tuple[Any, ...]] = []
    for number in range(given.number() % 6):
        shape = given.number()
        row: list[Any] = [number + 1, "k", 1.0, b"data: %d\n\n" % number]
        for column in range(4):
            if shape & (1 << column):
                row[column] = _sqlite_value(given)
        rows.append(tuple(row))
    floors = [(given.piece().decode("utf-8", "replace"), _sqlite_value(given)) for _ in range(given.number() % 3)]
    _database[0].fill(rows, floors)
    found = broker.read_after(0)
    with broker._reading() as connection:
        epoch, head = broker._position(connection)
        histories = [broker._history(connection, key, epoch, head) for key in ("k", None)]
    messages = [*found.messages, *(made for history in histories for made in history.messages)]
    for made in messages:
        assert isinstance(made.seq, int)
        assert made.seq > 0
        assert made.key is None or isinstance(made.key, str)
        assert len(made.frame) <= LIMIT + 200
        _check_message(made)
    for key, floor in found.gone.items():
        Gap(key, epoch, floor + 0)
        assert isinstance(floor, int)
    for history in histories:
        assert isinstance(history.floor, int)
        seqs = [made.seq for made in history.messages]
        assert seqs == sorted(set(seqs))
    assert isinstance(Position(epoch, head).head, int)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (decoder, bounded_decoder, event, body, redis_live, redis_reading, sqlite_rows)
}
