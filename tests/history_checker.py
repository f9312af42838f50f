"""Publishers that keep books, clients that come back, and whether what they saw agrees, whatever happened meanwhile."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable

from fakes import House
from redis_server import RedisServer
from support import wait_for

from flask_sse_stream.errors import BrokerError
from flask_sse_stream.event import Event, EventDecoder
from flask_sse_stream.pools import PoolManager
from flask_sse_stream.stream import CloseReason, Stream
from flask_sse_stream.testing.contracts.broker import place

TOLERANCE = 2.0  # seconds that a busy machine may add to what is promised


class Book:
    """What its publishers know: what is an event, what may be one, and how long a call took at most.

    Every text is published once only, so one that is seen twice was delivered twice or published twice.
    """

    def __init__(self) -> None:
        self.acknowledged: dict[str, tuple[str | None, str]] = {}  # text -> key and id, in the order of one publisher
        self.begun: dict[str, float] = {}  # text -> when the publish began
        self.unknown: set[str] = set()
        self.errors: list[BrokerError] = []
        self.longest = 0.0

    def publish(self, manager: PoolManager, key: str | None, text: str) -> bool:
        """Publish; say whether it was acknowledged."""
        begun = self.begun[text] = time.monotonic()
        try:
            identifier = manager.publish(key, text) if key is not None else manager.publish_all(text)
        except BrokerError as error:
            self.errors.append(error)
            self.unknown.add(text)
            return False
        finally:
            self.longest = max(self.longest, time.monotonic() - begun)
        self.acknowledged[text] = key, identifier
        return True

    def publish_until_it_works(self, manager: PoolManager, key: str | None, text: str, seconds: float) -> str:
        """Publish ``text 0``, ``text 1`` and so on until one is acknowledged, and give that one."""
        attempts = (f"{text} {number}" for number in itertools.count())

        def attempt() -> str:
            name = next(attempts)
            return name if self.publish(manager, key, name) else ""

        return wait_for(attempt, "something can be published again", seconds)

    def id(self, text: str) -> str:
        return self.acknowledged[text][1]


class Reader:
    """A client that reads its stream and, when that ends, comes back with the last id that it saw."""

    def __init__(self, house: House, keys: tuple[str, ...], cursor: str | None) -> None:
        self.house = house
        self.keys = keys
        self.begun = self.cursor = cursor
        self.events: list[Event] = []
        self.times: list[float] = []
        self.opened = 0
        self.refusals: list[BrokerError] = []
        self.next_house: House | None = None
        self._stream: Stream | None = None

    def look(self) -> None:
        """Read what there is."""
        if self.next_house is not None:
            if self._stream is not None:
                self._stream.close(CloseReason.PEER)
            self._stream, self.house, self.next_house = None, self.next_house, None
        if self._stream is None:
            try:
                self._stream = self.house.open(*self.keys, after=self.cursor)
            except BrokerError as error:
                self.refusals.append(error)
                return
            self.opened += 1
            self._decoder = EventDecoder()
        while data := self._stream.take():
            events = self._decoder.feed(data)
            self.times += [time.monotonic()] * len(events)  # before the events: who looks meanwhile has all their times
            self.events += events
            self.cursor = self._decoder.last_event_id or self.cursor
        if data is None:
            self._stream = None

    def hang_up(self, come_back_to: House | None = None) -> None:
        """Leave, and come back to that house, or to the same."""
        self.next_house = come_back_to or self.house

    @property
    def texts(self) -> list[str]:
        return [str(event.data) for event in self.events if event.event != "stream-reset"]

    @property
    def resets(self) -> list[Event]:
        return [event for event in self.events if event.event == "stream-reset"]

    def knows(self, book: Book, text: str) -> bool:
        """Whether it got that event, or was told that it did not get what was there."""
        epoch, seq = place(book.id(text))
        if text in self.texts:
            return True
        for index, (event, told) in enumerate(zip(self.events, self.times, strict=False)):
            if event.event == "stream-reset" and place(str(event.id))[0] == epoch:
                after = self.events[index + 1 : index + 2]
                # The id of one that tells of a gap is that of the last event before the gap.
                # And what was published after it was told is still to come.
                is_late = told > book.begun[text]
                if is_gap(event) and is_late and (not after or place(str(after[0].id))[1] > seq):
                    return True
                if not is_gap(event) and place(str(event.id))[1] >= seq:
                    return True
        return False

    def wait_for(self, text: str, seconds: float = 15.0) -> None:
        self._wait(lambda: text in self.texts, f"{text!r}", seconds)

    def wait_until_it_knows(self, book: Book, text: str, seconds: float = 15.0) -> None:
        self._wait(lambda: self.knows(book, text), f"{text!r} or a reset", seconds)

    def wait_for_reset(self, seconds: float = 15.0) -> Event:
        self._wait(lambda: bool(self.resets), "a reset", seconds)
        return self.resets[-1]

    def _wait(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        try:
            wait_for(condition, what, seconds)
        except AssertionError as error:
            raise AssertionError(f"{self!r}: {error}") from None

    def __repr__(self) -> str:
        seen = [(event.id, (event.data or "")[:40]) for event in self.events[-5:]]
        return f"<Reader of {self.keys}: {len(self.events)} events, the last {seen}, opened {self.opened} times>"


class Crowd:
    """Houses, each as a process would have it, and their clients. One thread reads for all."""

    def __init__(self) -> None:
        self.houses: list[House] = []
        self.readers: list[Reader] = []
        self.failures: list[BaseException] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def house(self, url: str, house: House | None = None, **options: object) -> House:
        house = house or House(broker_url=url, **options)
        self.houses.append(house)
        return house

    def reader(self, house: House, *keys: str, after: str | None = None) -> Reader:
        """Give a client whose stream has begun."""
        reader = Reader(house, keys or ("k",), after)
        reader.look()
        assert not reader.refusals, reader.refusals
        reader.begun = after or reader.cursor
        self.readers.append(reader)
        return reader

    def _run(self) -> None:
        try:
            while not self._stopped.wait(0.005):
                for house in self.houses:
                    while (delay := house.manager.flush()) is not None and delay < 0.02:
                        pass
                for reader in self.readers:
                    reader.look()
        except BaseException as error:
            self.failures.append(error)
            raise

    def close(self) -> None:
        self._stopped.set()
        self._thread.join(20)
        for house in self.houses:
            house.manager.shutdown()
        assert not self._thread.is_alive()
        assert self.failures == []


def is_gap(event: Event) -> bool:
    """Whether a reset says that events were lost within one life of the log."""
    return bool(json.loads(str(event.data))["reason"] == "history")


def check(book: Book, *readers: Reader, timeout: float = 2.0, rewound: bool = False) -> None:
    """Hold each reader to: every acknowledged event of its keys once, in order, or a reset in place of those before.

    ``rewound``: the log may have been put back, so that what nobody had seen yet never happened.
    """
    assert book.longest < timeout + TOLERANCE, book.errors[-3:]
    for reader in readers:
        texts = reader.texts
        assert len(texts) == len(set(texts)), f"twice: {sorted({text for text in texts if texts.count(text) > 1})}"
        assert set(texts) <= {*book.acknowledged, *book.unknown}, "somebody else's"
        runs = [_Run(reader.begun or "-0")]
        for event, now in zip(reader.events, reader.times, strict=True):
            if event.event == "stream-reset":
                runs.append(_Run(str(event.id), now if is_gap(event) else None))
            else:
                runs[-1].events.append(event)
        for run in runs:
            _check_run(book, reader, run, is_last=run is runs[-1], rewound=rewound)


class _Run:
    """What a client saw from one reset to the next.

    ``start``
        the place where it began.
    ``told``
        when it was told of a gap there, if it was: what it lost was published before that.
    """

    def __init__(self, start: str, told: float | None = None) -> None:
        self.start = start
        self.told = told
        self.events: list[Event] = []


def _check_run(book: Book, reader: Reader, run: _Run, *, is_last: bool, rewound: bool) -> None:
    places = [place(str(event.id)) for event in run.events]
    seqs = [seq for _, seq in places]
    assert seqs == sorted(set(seqs)), f"out of order: {seqs}"
    seen = {str(event.data): event for event in run.events}
    places.insert(0, place(run.start))
    lives = {epoch for epoch, _ in places}
    first, last = places[0][1], places[-1][1]
    begins: dict[str, int] = {}
    for _, identifier in book.acknowledged.values():
        epoch, seq = place(identifier)
        begins[epoch] = min(seq, begins.get(epoch, seq))
    if not reader.resets:
        lives |= set(begins)
    missing = []
    for text, (key, identifier) in book.acknowledged.items():
        epoch, seq = place(identifier)
        if text in seen:
            # A continued life may give an event its own name, but not another number.
            assert place(str(seen[text].id))[1] == seq
        elif (
            epoch in lives
            and key in (None, *reader.keys)
            and seq > first
            and (is_last or seq <= last)
            and (run.told is None or book.begun[text] > run.told)
            # Else another life of this run began before the place that the event had: this one was cut short.
            and not (rewound and any(begins.get(life, seq + 1) <= seq for life in lives - {epoch}))
        ):
            missing.append((text[:40], identifier))
    assert not missing, f"{len(missing)} lost, first {missing[:5]}, of {run.start} and then {places}"


def remembered(server: RedisServer, *keys: str | None, namespace: str = "sse") -> list[tuple[int, str]]:
    """What Redis itself has of these keys: numbers and texts, in the order of the numbers."""
    found = []
    for key in keys:
        name = f"{{{namespace}}}:all" if key is None else f"{{{namespace}}}:k:{key}"
        for identifier, fields in server.cli("XRANGE", name, "-", "+"):
            [event] = EventDecoder().feed(fields["b"].encode(errors="surrogateescape"))
            found.append((int(identifier.partition("-")[0]), str(event.data)))
    return sorted(found)


def seen(reader: Reader) -> list[tuple[int, str]]:
    """What a client saw: numbers and texts."""
    return [(place(str(event.id))[1], str(event.data)) for event in reader.events if event.event != "stream-reset"]
