"""The one connection of a process on which it hears what is published, in the order of the log.

Everything that has to be in order goes over this one connection (RESP3 allows commands on one that is subscribed):
what Redis answers here at the log's place N comes after every message up to N and before all later ones. So a reply
says more than what was asked: that everything up to its place has been delivered.

A listener is a thread (a greenlet where threads are patched), which alone uses the connection: TLS allows no more.
Whoever covers keys leaves a request, wakes it, and waits for the answer. After every reconnect, and wherever a message
does not follow the one before it, the listener reads from the history what is missing before it delivers anything
later.
"""

from __future__ import annotations

import logging
import os
import random
import re
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Final, Protocol

from ..errors import BrokerError
from ..settings import Settings
from ..transports.base import Waiter, current_runtime
from .base import BrokerStats, Delivery, Gap, Life, Position
from .redis_errors import NotTaken, broker_error, is_permanent
from .redis_link import Bell, Link, Server
from .redis_scripts import (
    READ_KEYS,
    Chain,
    Entry,
    Names,
    Reading,
    live_message,
    message,
    new_life,
    read_command,
    reading,
)

__all__ = ["Listener", "Log"]

logger: logging.Logger = logging.getLogger("flask_sse_stream")

TICK_SECONDS: Final = 1.0
"""How often Redis is asked for its place: it may hang without a word, or have lost everything."""

SILENCE_SECONDS: Final = 3.0
"""How long a reply may take before the connection is given up."""

_BACKOFF_SECONDS: Final = 0.05, 1.0
_IDLE_KEYS: Final = 1000  # asked for at each tick
_CURSOR: Final = re.compile(r"([0-9a-f]{12})-([0-9]{1,16})\Z")


class Log(Protocol):
    """What a listener delivers to."""

    def deliver(self, delivery: Delivery) -> None:
        """Take a message or news."""

    def idle(self, keys: Sequence[str]) -> Sequence[str]:
        """Give back the keys that nobody needs any more."""


class _Request:
    """Keys to subscribe to, and who waits for it. Without any it asks for the place."""

    __slots__ = ("done", "error", "follow", "sent", "waiters")

    def __init__(self) -> None:
        self.follow: list[str | None] = []
        self.waiters: list[Waiter] = []
        self.sent = self.done = False
        self.error: BrokerError | None = None

    def answer(self, error: BrokerError | None = None) -> None:
        self.error = error
        self.done = True
        for waiter in self.waiters:
            waiter.wake()


class Listener:
    """Hears the keys that it was asked for, and delivers them.

    It holds its log weakly: a thread must not keep an application alive that is otherwise gone.
    """

    def __init__(self, log: Log, server: Server, names: Names, settings: Settings) -> None:
        self._log = weakref.ref(log)
        self._server = server
        self._names = names
        self._kept = settings.kept
        self._limit = settings.max_event_bytes
        self._timeout = settings.broker_timeout
        self._lock = threading.Lock()  # for these four, and never held while anything waits
        # Each key's newest event that was delivered here; None while its subscription has not been answered.
        self._followed: dict[str | None, int | None] = {}
        self._channels: dict[bytes, str | None] = {}
        self._requests: deque[_Request] = deque()
        self._place = Position("", 0)
        self._again = False  # requests that were sent are to be sent again
        self._in_step_at = 0  # the place up to which the history was read
        self._past: set[str] = set()  # lives that are over
        self._up = False
        self._down_since = self._ticked = self._heard = time.monotonic()
        self._reconnects = self._gaps = self._skipped = 0
        self._error = ""
        self._complained = False
        self._stopped = threading.Event()
        self._bell = Bell()
        self._pid = os.getpid()
        self._ended = threading.Event()
        self._thread = threading.get_ident()
        current_runtime().spawn(self._run, "sse-redis")

    def stats(self) -> BrokerStats:
        """Say how the connection is."""
        return BrokerStats(self._up, self._reconnects, self._gaps, self._skipped, self._error)

    def stop(self) -> None:
        """Let the thread end."""
        self._stopped.set()
        self._bell.ring()
        if self._thread != threading.get_ident():
            self._ended.wait(2 * TICK_SECONDS)

    # Asking, from any thread

    def ask(self, keys: Sequence[str | None], after: str | None) -> Position:
        """Follow ``keys``, and be where the id ``after`` is; say where that is."""
        deadline = time.monotonic() + self._timeout
        waiter = current_runtime().waiter()
        # An answer that was on its way already may be older than the client's id; one that is asked for now is not.
        for _ in range(2):
            with self._lock:
                request = self._join(keys, after)
                if request is None:
                    break
                request.waiters.append(waiter)
            self._bell.ring()
            while not request.done:
                left = deadline - time.monotonic()
                if left <= 0:
                    why = f": {self._error}" if self._error else ""
                    raise BrokerError(f"{self._server.where} did not answer within SSE_BROKER_TIMEOUT{why}")
                waiter.wait(left)
            if request.error is not None:
                raise request.error
        return self._place

    def _join(self, keys: Sequence[str | None], after: str | None) -> _Request | None:
        """Give the request whose answer gives all this, one that is under way if there is; ``None``: no need."""
        new = [key for key in keys if key not in self._followed]
        unanswered = any(self._followed.get(key, 0) is None for key in keys)
        if self._place.epoch and not (new or unanswered or self._is_ahead(after)):
            return None
        if not self._requests or (new and self._requests[-1].sent):
            self._requests.append(_Request())
        # Answers come in the order of the questions: with the last one all have come.
        request = self._requests[-1]
        request.follow += new
        self._followed.update(dict.fromkeys(new))
        self._channels.update((self._names.stream(key), key) for key in new)
        return request

    def _is_ahead(self, after: str | None) -> bool:
        """Whether a client's id may be of a place that this process has not come to."""
        match = _CURSOR.match(after or "")
        return match is not None and (match[1] != self._place.epoch or int(match[2]) > self._place.head)

    # The thread

    def _run(self) -> None:
        self._thread = threading.get_ident()
        try:
            self._keep_listening()
        finally:
            self._ended.set()

    def _keep_listening(self) -> None:
        pause = _BACKOFF_SECONDS[0]
        while not self._over():
            try:
                link = self._server.connect(time.monotonic() + max(self._timeout, TICK_SECONDS))
                try:
                    self._listen(link)
                finally:
                    link.close()
            except Exception as error:
                if self._up:
                    pause = _BACKOFF_SECONDS[0]
                self._lost(error)
            self._stopped.wait(pause * random.uniform(0.5, 1.0))  # noqa: S311  only spreads
            pause = min(2 * pause, _BACKOFF_SECONDS[1])
        if self._pid == os.getpid():
            self._stopped.set()
            self._lost(NotTaken("this process is no longer listening"))

    def _over(self) -> bool:
        # A forked child has a copy of its parent's greenlets, which must not touch what is still the parent's.
        return self._stopped.is_set() or self._log() is None or self._pid != os.getpid()

    def _listen(self, link: Link) -> None:
        """Come into step with the log, and stay so until the connection is lost."""
        with self._lock:
            known = [key for key, last in self._followed.items() if last is not None]
            self._ask_again()
        for start in range(0, len(known), READ_KEYS):
            self._send(link, self._subscription(link, known[start : start + READ_KEYS]))
        self._synchronise(link)
        if self._complained:
            self._complained = False
            logger.warning("%s: live events come again", self._server.where)
        self._up = True
        self._ticked = time.monotonic()
        while not self._over():
            self._step(link)

    def _lost(self, error: Exception) -> None:
        """Remember why there is no connection, and tell those who wait if that will not change soon."""
        now = time.monotonic()
        if self._up:
            self._up, self._down_since = False, now
            self._reconnects += 1
        self._error = str(error) or type(error).__name__
        failed = broker_error(self._server.where, error)
        down = now - self._down_since
        with self._lock:
            waited_for = [request for request in self._requests if request.waiters]
            self._requests.clear()
            if is_permanent(error) or down > self._timeout or self._stopped.is_set():
                for request in waited_for:
                    self._give_up(request, failed)
            else:
                self._requests.extend(waited_for)
        if down > TICK_SECONDS and not self._complained and not self._stopped.is_set():
            self._complained = True
            logger.error("live events wait: %s", failed)

    def _give_up(self, request: _Request, error: BrokerError) -> None:
        for key in request.follow:
            if self._followed.get(key, 0) is None:
                del self._followed[key]
                del self._channels[self._names.stream(key)]
        request.answer(error)

    def _step(self, link: Link) -> None:
        """Ask what is to be asked, wait for something to come, and take it."""
        with self._lock:
            # All but the last one have been, but for those that are asked again.
            some = self._requests if self._again else list(self._requests)[-1:]
            unsent = [request for request in some if not request.sent]
            self._again = False
            for request in unsent:
                request.sent = True
        for request in unsent:
            if request.follow:
                self._send(link, self._subscription(link, request.follow))
            self._send(link, read_command(self._names, link.run, dict.fromkeys(request.follow), history=False))
        reply = self._receive(link)
        if reply is None:
            if self._requests and time.monotonic() - self._heard > SILENCE_SECONDS:
                raise NotTaken(f"Redis did not answer for {SILENCE_SECONDS:.0f} seconds")
        elif reply[0] == b"sse":
            self._answer(link, reading(reply, self._limit))
        elif reply[0] in (b"message", b"smessage"):
            self._hear(link, reply[1], reply[2])
        if time.monotonic() - self._ticked >= TICK_SECONDS:
            self._tick(link)

    def _send(self, link: Link, command: Sequence[Any]) -> None:
        link.send(time.monotonic() + SILENCE_SECONDS, command)

    def _receive(self, link: Link) -> Sequence[Any] | None:
        """Give the next message or answer; ``None`` where nothing came before something else is to be done."""
        if not link.wait(self._ticked + TICK_SECONDS - time.monotonic(), self._bell) or self._over():
            return None
        reply = link.receive(time.monotonic() + SILENCE_SECONDS)
        self._heard = time.monotonic()
        return reply if isinstance(reply, list) and reply else [reply]

    def _subscription(self, link: Link, keys: Sequence[str | None], verb: str = "SUBSCRIBE") -> Sequence[Any]:
        return [("S" if link.sharded else "") + verb, *(self._names.stream(key) for key in keys)]

    def _deliver(self, delivery: Delivery) -> None:
        log = self._log()
        if log is not None:
            log.deliver(delivery)

    def _tick(self, link: Link) -> None:
        """Look whether Redis is there and has the same log, and stop hearing what nobody needs."""
        self._ticked = time.monotonic()
        log = self._log()
        if log is None:
            return
        with self._lock:
            if not self._requests:
                self._heard = self._ticked  # until now nobody has waited for an answer
                self._requests.append(_Request())
            # In turn. Under the lock: nobody may rely on a subscription that is about to end.
            asked = [
                key for key, last in islice(self._followed.items(), _IDLE_KEYS) if key is not None and last is not None
            ]
            for key in asked:
                self._followed[key] = self._followed.pop(key)
            idle = log.idle(asked)
            for key in idle:
                del self._followed[key]
                del self._channels[self._names.stream(key)]
        if idle:
            self._send(link, self._subscription(link, idle, "UNSUBSCRIBE"))

    # What comes

    def _ask_again(self) -> int:
        """Have all requests sent once more; give how many had been. Under the lock."""
        self._again = True
        sent = sum(request.sent for request in self._requests)
        for request in self._requests:
            request.sent = False
        return sent

    def _answer(self, link: Link, found: Reading) -> None:
        """Take the answer to the request that was sent first."""
        with self._lock:
            request = self._requests[0]
        if found.epoch != self._place.epoch or found.head < self._place.head:
            request.sent = False
            self._synchronise(link)  # and ask again
            return
        with self._lock:
            self._requests.popleft()
            for key, page in zip(request.follow, found.pages, strict=True):
                self._followed[key] = page.last
            self._place = Position(found.epoch, found.head)
        request.answer()

    def _hear(self, link: Link, channel: bytes, payload: Any) -> None:
        """Take a message that was published: deliver it if it follows what was delivered, else look what is missing."""
        if channel not in self._channels:
            return  # nobody needs it any more
        key = self._channels[channel]
        last = self._followed[key]
        live = live_message(payload, self._limit)
        if live is None:
            self._skip()
        elif last is None:
            pass  # What came before the answer to the subscription was before the stream that is about to begin.
        elif (live.epoch, live.previous) == (self._place.epoch, last) and live.seq > self._place.head and live.body:
            self._deliver(
                message(key, live.epoch, Entry(live.seq, live.previous, live.body, 0.0), self._kept(key).size)
            )
            self._followed[key] = live.seq
            self._place = Position(live.epoch, live.seq)
        elif live.epoch in self._past or (live.epoch == self._place.epoch and live.seq <= self._in_step_at):
            pass  # It was read from the history before it could be heard.
        elif live.epoch == self._place.epoch and live.seq <= last:
            self._skip()
        else:
            self._synchronise(link)
            is_known = live.epoch in self._past or (
                live.epoch == self._place.epoch and live.seq <= (self._followed[key] or 0)
            )
            if live.body is None or not is_known:
                self._skip()  # It cannot be used, or the log does not know it.

    def _skip(self) -> None:
        self._skipped += 1
        if self._skipped == 1:
            logger.warning(
                "%s: somebody publishes what is no event in our namespace; it is skipped", self._server.where
            )

    # Coming into step

    def _synchronise(self, link: Link) -> None:
        """Read what was missed of the keys that are followed, and deliver it in the order of the log.

        Messages that come meanwhile are in what is read. Requests that were sent are asked again afterwards.
        """
        with self._lock:
            stale = self._ask_again()
        # When this is answered the subscriptions hold, so that what is read now meets what is heard later.
        self._send(link, read_command(self._names, link.run, {}, history=False))
        self._read_answer(link, stale)
        # By a connection of its own: Redis bounds what may wait for one that is subscribed.
        beside = self._server.connect(time.monotonic() + SILENCE_SECONDS)
        try:
            if beside.run != link.run:
                raise NotTaken("Redis has another master now")
            found, missed = self._read_missed(beside)
            if found.epoch == self._place.epoch and found.head < self._place.head:
                # It was put back without a new start of the server: give it a life of its own.
                self._send(beside, read_command(self._names, f"{link.run} {new_life()}", {}, history=False))
                found = self._read_answer(beside, 0)
        finally:
            beside.close()
        self._enter(found, missed)

    def _read_missed(self, link: Link) -> tuple[Reading, dict[str | None, Chain]]:
        """Read until one reading, of all keys at one moment, finds nothing that does not fit into it."""
        # A copy, in one step: others add keys at any time.
        missed = {key: Chain(last) for key, last in dict(self._followed).items() if last is not None}
        # Many keys, and many events, are read in parts, and then all keys once more for what came in between.
        together = len(missed) <= READ_KEYS
        while True:
            asked = [key for key, chain in missed.items() if together or chain.more]
            size = max(1, len(asked)) if together else READ_KEYS
            for start in range(0, max(1, len(asked)), size):
                part = {key: missed[key].end for key in asked[start : start + size]}
                history = any(self._kept(key).size for key in part)
                self._send(link, read_command(self._names, link.run, part, history=history))
                found = self._read_answer(link, 0)
                for key, page in zip(part, found.pages, strict=True):
                    missed[key].add(page)
            behind = any(chain.more for chain in missed.values())
            if together and not behind:
                return found, missed
            together = not behind

    def _read_answer(self, link: Link, stale: int) -> Reading:
        deadline = time.monotonic() + SILENCE_SECONDS
        while True:
            reply = link.receive(deadline)
            if isinstance(reply, list) and reply and reply[0] == b"sse":
                self._heard = time.monotonic()
                if not stale:
                    return reading(reply, self._limit)
                stale -= 1

    def _enter(self, found: Reading, missed: Mapping[str | None, Chain]) -> None:
        """Go on from where a reading was made."""
        epoch = self._place.epoch
        if epoch != found.epoch:
            self._deliver(Life(found.epoch, found.head, found.earlier))
            self._past.add(epoch)
        self._past.discard(found.epoch)
        if epoch and (found.epoch == epoch or epoch in found.earlier):
            # Whether streams may go on with this is theirs to say, who know what they were given.
            for key, chain in missed.items():
                if chain.floor is not None:
                    self._gaps += 1
                    self._deliver(Gap(key, found.epoch, chain.floor))
            entries = [(entry, key) for key, chain in missed.items() for entry in chain.entries]
            for entry, key in sorted(entries, key=lambda item: item[0].seq):
                self._deliver(message(key, found.epoch, entry, self._kept(key).size))
        # else nothing is known of what came before, and everybody is told so
        for key, chain in missed.items():
            self._skipped += chain.skipped
            self._followed[key] = chain.reached
        self._in_step_at = found.head
        self._place = Position(found.epoch, found.head)
