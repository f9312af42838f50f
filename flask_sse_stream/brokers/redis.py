"""One log for any number of machines, in Redis: streams for the history, pub/sub for what is live.

``publish`` runs one script, by any free connection. A process that has streams has one listener besides
(``redis_listener.py``), which delivers what the scripts of all processes publish, its own included. Redis decides the
order: it runs one script at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final

from ..errors import BrokerError
from ..settings import Settings
from ..transports.base import Waiter, current_runtime
from .base import BrokerStats, Deliver, Delivery, History, Idle, Position, never_idle
from .redis_errors import NotTaken, broker_error, is_elsewhere, is_permanent, patiently
from .redis_link import Link, Server
from .redis_listener import Listener
from .redis_scripts import LEASE, MARK, PUBLISH, READ_KEYS, Chain, Names, new_life, read_command, reading

__all__ = ["RedisBroker"]

_CONNECTIONS: Final = 16  # for publishing: more only wait in Redis instead of here
_LONGEST_MILLISECONDS: Final = 10 * 365 * 86_400_000  # a history that is to be kept for ever
_DIGEST: Final = hashlib.sha1(PUBLISH.encode(), usedforsecurity=False).hexdigest()


class _Flight:
    """A reading of histories, for all who wait for it; until it departs, keys come aboard."""

    def __init__(self) -> None:
        self.keys: list[str | None] = []
        self.position = Position("", 0)  # up to which everything has been delivered
        self.epoch = ""  # of the life that was read
        self.error: BrokerError | None = None
        self._landed = False
        self._waiters: deque[Waiter] = deque()

    def reach(self, position: Position) -> None:
        # Everything of the keys that are followed has been delivered up to there, whoever learned of it. The numbers of
        # two lives say nothing of each other.
        if position.epoch != self.position.epoch or position.head > self.position.head:
            self.position = position

    def land(self, error: BrokerError | None) -> None:
        self.error = error
        self._landed = True
        for waiter in list(self._waiters):
            waiter.wake()

    def wait(self, timeout: float) -> None:
        waiter = current_runtime().waiter()
        self._waiters.append(waiter)
        deadline = time.monotonic() + timeout
        while not self._landed:
            left = deadline - time.monotonic()
            if left <= 0:
                raise BrokerError("a history was not read within SSE_BROKER_TIMEOUT")
            waiter.wait(left)
        if self.error is not None:
            raise self.error


class RedisBroker:
    """Orders and remembers the events of all processes that name the same Redis and namespace.

    ``redis://[[user]:password@]host[:port][/db]``; ``rediss://`` for TLS;
    ``redis+sentinel://[[user]:password@]sentinel[:port][,sentinel...]/service[/db]``, and ``rediss+sentinel://``. A
    node of a cluster is found from any other one. Options of redis-py's connections may follow (``?ssl_ca_certs=...``).

    Redis 6.2 or newer. Needs redis-py.
    """

    remembers = True

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._names = Names(settings.namespace)
        self._server = Server(settings.broker_url, self._names)
        self._timeout = settings.broker_timeout
        self._once_ttl = _milliseconds(settings.idempotency_ttl)
        self._deliver: Deliver
        self._idle: Idle
        self._starting = threading.Lock()
        self._listener: Listener | None = None
        self._free: dict[Hashable, deque[Link]] = {}
        self._turns = threading.BoundedSemaphore(_CONNECTIONS)
        self._last_good = -math.inf
        self._skipped = 0  # of what was read
        self._boarding: _Flight | None = None
        self._runway = threading.Lock()
        self._flights: dict[str | None, _Flight] = {}
        self._closed = False

    def start(self, deliver: Deliver, idle: Idle = never_idle) -> None:
        """Remember where messages go."""
        self._deliver = deliver
        self._idle = idle

    def publish(self, key: str | None, body: bytes, once: str | None = None) -> str:
        """Put the event into the log and send it to every process that listens to its key."""
        keys = [self._names.log, self._names.keys, self._names.stream(key)]
        if once is not None:
            keys.append(self._names.once(once))
        own_id = body[4 : body.index(b"\n")] if body.startswith(b"id: ") else b""
        size, ttl, _ = self._settings.kept(key)
        arguments = [self._names.member(key), body, own_id, size, _milliseconds(ttl), self._once_ttl]
        [identifier] = self._run(lambda at, link: self._publish(at, link, keys, arguments), publishes=True)
        return str(identifier.decode())

    @staticmethod
    def _publish(deadline: float, link: Link, keys: Sequence[bytes], arguments: Sequence[Any]) -> Any:
        how = "SPUBLISH" if link.sharded else "PUBLISH"
        return link.script(deadline, _DIGEST, PUBLISH, keys, [link.run, new_life(), *arguments, how])

    def lease(self, name: str, holder: str, seconds: float) -> bool:
        """Let one process of all have ``name``."""
        command = ("EVAL", LEASE, 1, self._names.lease(name), holder, round(seconds * 1000))
        return bool(self._run(lambda at, link: link.call(at, *command)))

    def mark(self, name: str, at: float, seconds: float) -> None:
        """Remember when ``name`` was marked."""
        command = ("EVAL", MARK, 1, self._names.mark(name), repr(at), _milliseconds(seconds))
        self._run(lambda deadline, link: link.call(deadline, *command))

    def marked(self, names: Sequence[str]) -> float:
        """Give the latest time at which one of ``names`` was marked."""
        found = self._run(lambda deadline, link: link.call(deadline, "MGET", *map(self._names.mark, names)))
        # What is not ours to read says that something was revoked at a time that nobody knows.
        return max((_time(at) for at in found if at is not None), default=0.0)

    def cover(self, keys: Sequence[str | None], fetch: Sequence[str | None], after: str | None) -> Position:
        """Listen to ``keys``; the first call connects."""
        if self._closed:
            raise BrokerError(f"the broker of {self._server.where} is closed")
        with self._starting:
            if self._listener is None:
                self._listener = Listener(self, self._server, self._names, self._settings)
        deadline = time.monotonic() + self._timeout
        while True:
            position = self._listener.ask(keys, after)
            others = self._fetch(fetch, position) - {position.epoch} if fetch else set()
            if not others or time.monotonic() > deadline:
                return position
            # The log began another life between the answer and the reading. Come to that one, and read again.
            after = f"{others.pop()}-0"

    def _fetch(self, keys: Sequence[str | None], position: Position) -> set[str]:
        """Deliver the histories of keys that are followed by now; give the lives that they are of.

        While one reading is under way, all keys that are wanted meanwhile gather for the next one: thousands of
        clients may come back to a new process at once, each with a key of its own.
        """
        with self._starting:
            own = [key for key in keys if key not in self._flights]
            first = bool(own) and self._boarding is None
            if self._boarding is None:
                self._boarding = _Flight() if own else None
            if own and self._boarding is not None:
                self._boarding.keys += own
                self._boarding.reach(position)
                self._flights.update(dict.fromkeys(own, self._boarding))
            flights = {self._flights[key] for key in keys}
            own_flight = self._boarding
        if first and own_flight is not None:
            self._fly(own_flight)
        for flight in flights:
            flight.wait(self._timeout)
        return {flight.epoch for flight in flights}

    def _fly(self, flight: _Flight) -> None:
        """Read the histories of all who are aboard when it is this flight's turn."""
        error: BrokerError | None = BrokerError(f"{self._server.where}: the reading of histories was interrupted")
        in_turn = False
        try:
            in_turn = self._runway.acquire(timeout=self._timeout)
            with self._starting:
                self._boarding = None
            histories = self._run(lambda at, link: self._read(at, link, flight.keys, flight.position))
            for history in histories:
                # Of another life than what has been delivered, it says nothing.
                if history.epoch == flight.position.epoch:
                    self._deliver(history)
                flight.epoch = history.epoch
            error = None
        except BrokerError as failed:
            error = failed
        finally:
            if in_turn:
                self._runway.release()
            with self._starting:
                if self._boarding is flight:  # killed before its turn: nobody may board what will not depart
                    self._boarding = None
                for key in flight.keys:
                    self._flights.pop(key, None)
            flight.land(error)

    def _read(self, deadline: float, link: Link, keys: Sequence[str | None], position: Position) -> list[History]:
        chains = {key: Chain(0) for key in keys}
        kept, limit = self._settings.kept, self._settings.max_event_bytes
        epoch = ""
        while behind := [key for key, chain in chains.items() if chain.more]:
            asked = {key: chains[key].end for key in behind[:READ_KEYS]}
            history = any(kept(key).size for key in asked)
            reply = link.call(deadline, *read_command(self._names, link.run, asked, history=history))
            found = reading(reply, limit)
            if epoch not in ("", found.epoch):
                return self._read(deadline, link, keys, position)  # pages of two lives do not go together
            epoch = found.epoch
            for key, page in zip(asked, found.pages, strict=True):
                chains[key].add(page)
        self._skipped += sum(chain.skipped for chain in chains.values())
        # What is later than the position is heard by the listener as well.
        return [chain.history(key, found.epoch, position.head, *kept(key)) for key, chain in chains.items()]

    def stats(self) -> BrokerStats:
        """Say how the listening connection is."""
        if self._listener is None:
            return BrokerStats()
        heard = self._listener.stats()
        return heard._replace(skipped=heard.skipped + self._skipped)

    def close(self) -> None:
        """End the listener and close every connection."""
        self._closed = True
        if self._listener is not None:
            self._listener.stop()
        self._close_free()

    def _close_free(self) -> None:
        for free in list(self._free.values()):
            with contextlib.suppress(IndexError):  # whoever else takes the last one
                while True:
                    free.pop().close()

    # Running scripts

    def _run(self, run: Callable[[float, Link], Any], *, publishes: bool = False) -> Any:
        """Run something once, on the server that has the log. If it certainly was not run, try again for a while.

        ``publishes``: where it fails, whether an event was taken is to be said.
        """
        deadline = time.monotonic() + self._timeout
        if self._closed:
            raise BrokerError(f"the broker of {self._server.where} is closed")
        # A greenlet or thread that waits here waits for others that publish, none of whom waits longer.
        if not self._turns.acquire(timeout=self._timeout):
            raise BrokerError(f"{self._server.where}: {_CONNECTIONS} publishers took longer than SSE_BROKER_TIMEOUT")
        try:
            # An outage that is older than what a caller would wait is waited for by nobody.
            patience = min(deadline, self._last_good + self._timeout)
            reply = patiently(lambda: self._attempt(run, deadline, publishes), patience)
        except NotTaken as error:
            raise broker_error(self._server.where, error.__cause__ or error) from error
        finally:
            self._turns.release()
        self._last_good = time.monotonic()
        return reply

    def _attempt(self, run: Callable[[float, Link], Any], deadline: float, publishes: bool) -> Any:
        home = current_runtime().home()
        link = self._borrow(home, deadline)
        try:
            reply = run(deadline, link)
        except Exception as error:
            link.close()
            if is_elsewhere(error):
                raise NotTaken(str(error)) from error
            doubt = publishes and not is_permanent(error)
            raise broker_error(self._server.where, error, doubt=doubt) from error
        except BaseException:  # a greenlet that was killed in the middle
            link.close()
            raise
        self._free.setdefault(home, deque(maxlen=_CONNECTIONS)).append(link)
        if self._closed:  # meanwhile, and nobody else closes this one
            self._close_free()
        return reply

    def _borrow(self, home: Hashable, deadline: float) -> Link:
        free = self._free.get(home)
        while free:
            try:
                link = free.pop()
            except IndexError:
                break
            if link.is_clean():
                return link
            link.close()
        try:
            return self._server.connect(deadline)
        except NotTaken:
            raise
        except Exception as error:
            raise broker_error(self._server.where, error) from error

    # What the listener calls

    def deliver(self, delivery: Delivery) -> None:
        """Hand on what came. For the listener."""
        self._deliver(delivery)

    def idle(self, keys: Sequence[str]) -> Sequence[str]:
        """Say which keys nobody needs any more. For the listener."""
        return self._idle(keys)


def _time(at: bytes) -> float:
    try:
        seconds = float(at)
    except ValueError:
        return math.inf
    return math.inf if math.isnan(seconds) else seconds


def _milliseconds(seconds: float) -> int:
    return max(1, round(min(seconds * 1000, _LONGEST_MILLISECONDS)))
