"""Who listens during a soak, and who knows what each of them must have.

:class:`Book` is what the publishers know: which numbers of which source were acknowledged, under which id. A
:class:`Client` reads as an EventSource does, comes back with the last id that it saw, and compares: each number of its
sources once and in order, or a ``stream-reset`` in place of what it was not given. :class:`Crowd` drives all clients in
one thread.
"""

from __future__ import annotations

import contextlib
import json
import random
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable

from flask_sse_stream import Event, EventDecoder
from flask_sse_stream.errors import BrokerError

ALL = "all"
CONNECT_SECONDS = 10.0
TURN_SECONDS = 0.05
SLOW_BYTES = 1024  # a slow reader takes so many at each turn
READ_BYTES = 1 << 18
LATE = 1000  # numbers after which one that nobody was sure of comes no more


class Book:
    """What was published: by source, the fate of each number. A number is published once, and by one thread."""

    def __init__(self) -> None:
        self._ids: dict[str, list[str | None]] = {}
        self._begun: dict[str, list[float]] = {}
        self.acknowledged = self.unknown = 0
        self.longest = 0.0

    def publish(self, source: str, call: Callable[[str], str], size: int = 100) -> bool:
        """Publish the source's next number by ``call``; say whether that was acknowledged."""
        begun = time.monotonic()
        number = len(self._ids.setdefault(source, []))
        self._begun.setdefault(source, []).append(begun)
        self._ids[source].append(None)  # until it is known, it may be an event or not
        try:
            self._ids[source][number] = call(f"{source} {number} ".ljust(size, "x"))
        except BrokerError:
            self.unknown += 1
            return False
        finally:
            self.longest = max(self.longest, time.monotonic() - begun)
        self.acknowledged += 1
        return True

    def sources(self) -> list[str]:
        """The sources that anything was published of."""
        return list(self._ids)

    def is_unknown(self, source: str, number: int) -> bool:
        """Whether nobody can say if that number was to become an event."""
        return self._ids[source][number] is None

    def owed(self, source: str, first: int, end: int, reset: Event | None, told: float) -> int:
        """How many numbers from ``first`` to before ``end`` a client must have had that was told of ``reset``."""
        ids = self._ids.get(source, [])
        begun = self._begun.get(source, [])
        return sum(
            ids[number] is not None and not _excuses(reset, told, str(ids[number]), begun[number])
            for number in range(first, min(end, len(ids)))
        )


def _place(identifier: str) -> tuple[str, int]:
    epoch, _, seq = identifier.rpartition("-")
    return epoch, int(seq)


def _excuses(reset: Event | None, told: float, identifier: str, begun: float) -> bool:
    """Whether a client that was told of ``reset`` at that time need not have the event."""
    if reset is None:
        return False
    if json.loads(str(reset.data))["reason"] == "history":
        return begun <= told  # a gap that was found on the way: its id is that of the event before
    (life, head), (epoch, seq) = _place(str(reset.id)), _place(identifier)
    return epoch != life or seq <= head


class Client:
    """One listener of a key."""

    def __init__(self, book: Book, port: int, key: str, *, slow: bool, stays: float) -> None:
        self.book = book
        self.port = port
        self.key = key
        self.slow = slow
        self.stays = stays  # seconds until it leaves and comes back, on average; 0: it stays
        self.last: dict[str, int] = {}  # by source, the newest number
        self.late: dict[str, set[int]] = {}  # numbers nobody was sure of, which may come in any order
        self.cursor = ""
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.reads = False
        self.socket: socket.socket | None = None
        self.due = 0.0  # when it connects, while it has no connection
        self.leaves = float("inf")
        self._reset: dict[str, tuple[Event, float]] = {}
        self._begin()

    def _begin(self) -> None:
        self._head = b""
        self._raw = b""
        self._status = 0
        self._decoder = EventDecoder()
        self.reads = False

    def connect(self) -> None:
        """Ask for the stream. Raises :class:`OSError`."""
        self._begin()
        self.socket = socket.socket()
        if self.slow:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(CONNECT_SECONDS)
        self.socket.connect(("127.0.0.1", self.port))
        cursor = f"Last-Event-ID: {self.cursor}\r\n" if self.cursor else ""
        self.socket.sendall(f"GET /stream?connectKey={self.key} HTTP/1.1\r\nHost: soak\r\n{cursor}\r\n".encode())
        self.socket.settimeout(0)
        self.leaves = time.monotonic() + random.expovariate(1 / self.stays) if self.stays else float("inf")

    def read(self) -> bool:
        """Take in what came; say whether there may be more."""
        assert self.socket is not None
        try:
            data = self.socket.recv(SLOW_BYTES if self.slow else READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not data:
            return False
        if not self._status:
            self._head += data
            head, found, data = self._head.partition(b"\r\n\r\n")
            if not found:
                return True
            self._status = int(head.split(b" ", 2)[1])
            if self._status != 200:
                # At any other status an EventSource stops for ever, so this is as bad as a loss.
                self.problems.append(f"answered {self._status}: {data[:100]!r}")
                return False
        return self._take_chunks(data)

    def _take_chunks(self, data: bytes) -> bool:
        raw, place = self._raw + data, 0
        goes_on = True
        while (end := raw.find(b"\r\n", place)) >= 0:
            size = int(raw[place:end], 16)
            if size == 0:
                goes_on = False
                break
            if len(raw) < end + size + 4:
                break
            for event in self._decoder.feed(raw[end + 2 : end + 2 + size]):
                self.take(event)
            self.cursor = self._decoder.last_event_id or self.cursor
            self.reads = True
            place = end + size + 4
        self._raw = raw[place:]
        return goes_on

    def take(self, event: Event) -> None:
        """Compare an event with what is due."""
        if event.event == "stream-reset":
            self.counts["resets"] += 1
            reset = event, time.monotonic()
            self._reset = dict.fromkeys((self.key, ALL), reset)
            return
        source, number = str(event.data).split(" ", 2)[:2]
        self._take_number(source, int(number))

    def _take_number(self, source: str, number: int) -> None:
        self.counts["delivered"] += 1
        if source not in (self.key, ALL):
            self.problems.append(f"an event of {source!r}, though it listens to {self.key!r}")
            return
        late = self.late.setdefault(source, set())
        last = self.last.setdefault(source, number - 1)
        if self.book.is_unknown(source, number) and number not in late:
            late.add(number)  # of most it will be known in a moment
            if len(late) > 2 * LATE:
                self.late[source] = {one for one in late if one > number - LATE}
            self.last[source] = max(last, number)
        elif number <= last:
            self.counts["doubled"] += 1
            self.problems.append(f"{source} {number} again, after {last}")
        else:
            self.last[source] = number
        if number > last + 1:
            self._miss(source, last + 1, number)
        self._reset.pop(source, None)

    def _miss(self, source: str, first: int, end: int) -> None:
        reset, told = self._reset.get(source, (None, 0.0))
        late = self.late.get(source, set())
        lost = self.book.owed(source, first, end, reset, told)
        if lost:
            self.counts["lost"] += lost
            self.problems.append(f"{lost} of {source} {first} to {end - 1}, told {reset!r}, late {sorted(late)[-3:]}")

    def missing(self) -> int:
        """How many acknowledged numbers it must yet be given."""
        missing = 0
        for source, last in self.last.items():
            reset, told = self._reset.get(source, (None, 0.0))
            missing += self.book.owed(source, last + 1, 1 << 62, reset, told)
        return missing

    def settle(self) -> None:
        """Count as lost what has not come by now."""
        for source, last in self.last.items():
            self._miss(source, last + 1, 1 << 62)


class Crowd:
    """All clients, in one thread; a context manager that leaves no connection behind."""

    def __init__(self, clients: list[Client]) -> None:
        self.clients = clients
        self.failure: BaseException | None = None
        self._away = list(clients)
        self._selector = selectors.DefaultSelector()
        self._stopped = threading.Event()
        self._cut = False
        self.churning = True
        self.connections = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Crowd:  # noqa: PYI034  Self is of Python 3.11
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(30)
        for client in self.clients:
            if client.socket is not None:
                client.socket.close()
        self._selector.close()

    def reading(self) -> int:
        """How many streams have begun and not ended."""
        return sum(client.reads for client in self.clients)

    def cut_all(self) -> None:
        """Have all clients leave at once; they come back at once."""
        self._cut = True

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                self._turn()
        except BaseException as error:
            self.failure = error
            raise

    def _turn(self) -> None:
        now = time.monotonic()
        cut, self._cut = self._cut, False
        for client in self._away[:]:
            if client.due <= now:
                self._away.remove(client)
                self._connect(client)
        slow = []
        for key, _ in self._selector.select(TURN_SECONDS):
            client = key.data
            if client.slow:
                slow.append(client)
            if not client.read():
                self._hang_up(client)
        now = time.monotonic()
        for client in self.clients:
            if client.socket is not None and (cut or (self.churning and now > client.leaves)):
                self._hang_up(client)
        if slow:
            self._stopped.wait(TURN_SECONDS / 2)  # they are always ready, and would be asked at once

    def _connect(self, client: Client) -> None:
        try:
            client.connect()
        except OSError:
            self._hang_up(client)
            return
        assert client.socket is not None
        self.connections += 1
        self._selector.register(client.socket, selectors.EVENT_READ, client)

    def _hang_up(self, client: Client) -> None:
        if client.socket is not None:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(client.socket)
            client.socket.close()
            client.socket = None
        client.reads = False
        client.due = time.monotonic() + random.uniform(0.05, 0.5)
        self._away.append(client)
