"""Turns what other software publishes on a Redis channel into events of a pool.

Of all processes that share the log, one does it at a time: the one that holds the bridge's lease. So every message
becomes one event, which is in the history and reaches every process. It happens in a thread (a greenlet where threads
are patched) that begins with the first stream of a process, or when it is told to.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from .brokers.base import REDIS_SCHEMES
from .errors import BrokerError, SettingsError
from .event import Event
from .keys import check_key
from .pools import PoolManager

__all__ = ["Bridge", "BridgeStats", "Target"]

logger: logging.Logger = logging.getLogger("flask_sse_stream")

Target = str | Callable[[str, str], "str | tuple[str, Any] | None"]

LEASE_SECONDS: Final = 6.0
_TICK_SECONDS: Final = 1.0
_SILENCE_SECONDS: Final = 3.0
_TRIES: Final = 3
_PATTERN: Final = frozenset("*?[\\")


class BridgeStats(NamedTuple):
    """What a bridge does and has done in this process.

    ``up``
        whether this is the process that listens.
    ``published``, ``skipped``, ``failed``
        messages that became events; that were no events, or that ``to`` did not want; that the broker did not take.
    ``error``
        what went wrong last.
    """

    up: bool
    published: int
    skipped: int
    failed: int
    error: str


class Bridge:
    """Listens to ``channel`` and publishes each message to the pool ``to``.

    ``channel``
        its name, or a pattern as of Redis's ``PSUBSCRIBE`` if it has one of ``* ? [``; a backslash takes their meaning
        away.
    ``to``
        a key; or a function that is given the channel and the message, both text, and returns a key, a pair of a key
        and the data (an :class:`~flask_sse_stream.Event` too), or ``None`` for none. It runs in the bridge's thread.
    ``event``
        the name of the events that are made of plain messages.
    ``url``
        where the channel is; ``SSE_BROKER_URL`` if left out.

    Redis keeps no message of a channel: what is published while no process listens is gone. That is for up to six
    seconds after the process that listened was killed, and as long as no process has had a stream or was told to
    :meth:`start`.

    Of all processes that have the same bridge, one listens at a time. It is the same if ``channel``, ``to``, ``event``
    and the hosts and ports of the URL are. A function is known by its module's name and its own, so let it have a name,
    and be imported from the same module everywhere: in the script that is started, a module has another name. Lambdas
    of one place, and functions that one function makes, are not told apart.

    Raises :class:`SettingsError` for a URL that is not Redis's, and :class:`EventError` for a bad key.
    """

    def __init__(
        self, manager: PoolManager, channel: str, to: Target, *, event: str | None = None, url: str | None = None
    ) -> None:
        where = url if url is not None else manager.settings.broker_url
        if where.partition("://")[0] not in REDIS_SCHEMES:
            raise SettingsError(f"a bridge is to a Redis, which {where!r} is not: give its url='redis://host:6379/0'")
        check_key(channel, "the channel of a bridge")
        if not callable(to):
            check_key(to)
        Event("", event=event)  # its name is checked here, and not with every message
        from .brokers.redis_link import Bell, Server
        from .brokers.redis_scripts import Names

        self.channel = channel
        self._to = to
        self._event = event
        what = "SSE_BROKER_URL" if url is None else "the url of a bridge"
        self._server = Server(where, Names(manager.settings.namespace), what)
        self._lease = _lease_name(self._server.address, channel, to, event)
        self._manager = weakref.ref(manager)
        self._starting = threading.Lock()
        self._pid = 0
        self._stopped = threading.Event()
        self._ended = threading.Event()
        self._bell = Bell()
        self._up = False
        self._published = self._skipped = self._failed = 0
        self._error = ""
        manager.starting.append(self.start)
        manager.stopping.append(self.stop)

    def start(self) -> None:
        """Begin to listen, unless it does; also without any stream."""
        if self._pid != os.getpid():  # A child has neither its parent's thread nor the use of its locks.
            self._pid = os.getpid()
            self._starting, self._stopped, self._ended = threading.Lock(), threading.Event(), threading.Event()
            self._ended.set()
            self._bell, self._up = type(self._bell)(), False
        with self._starting:
            if self._ended.is_set():
                self._stopped.clear()
                self._ended.clear()
                # Not in a greenlet where sockets are not gevent's: whatever it waits for, the hub would wait for.
                threading.Thread(target=self._run, name="sse-bridge", daemon=True).start()

    def run(self) -> None:
        """Listen until :meth:`stop`: for a process that does nothing else."""
        self.start()
        self._ended.wait()

    def stop(self) -> None:
        """Listen no more, and let another process do it."""
        self._stopped.set()
        self._bell.ring()
        if self._pid == os.getpid():
            self._ended.wait(2 * _SILENCE_SECONDS)

    def stats(self) -> BridgeStats:
        """Say what it does and has done in this process."""
        return BridgeStats(self._up, self._published, self._skipped, self._failed, self._error)

    # The thread

    def _run(self) -> None:
        from .brokers.redis_errors import FAILURES, NotTaken

        pid = os.getpid()
        try:
            # A forked child has a copy of its parent's greenlets, and begins its own.
            while not self._stopped.is_set() and pid == os.getpid():
                try:
                    if self._holds_lease():
                        self._listen()
                except Exception as error:
                    why = str(error) or type(error).__name__
                    if why != self._error and not self._stopped.is_set():
                        known = isinstance(error, (BrokerError, NotTaken, *FAILURES))
                        logger.error("the bridge to %r waits: %s", self.channel, why, exc_info=None if known else error)
                    self._error = why
                self._up = False
                if self._manager() is None:
                    return
                self._stopped.wait(_TICK_SECONDS)
        finally:
            manager = self._manager()
            if manager is not None and pid == os.getpid():
                with contextlib.suppress(BrokerError):
                    manager.give_back(self._lease)
            if pid == os.getpid():
                self._ended.set()

    def _holds_lease(self) -> bool:
        manager = self._manager()
        return manager is not None and manager.lease(self._lease, LEASE_SECONDS)

    def _listen(self) -> None:
        link = self._server.connect(time.monotonic() + _SILENCE_SECONDS)
        try:
            verb = "PSUBSCRIBE" if _PATTERN.intersection(self.channel) else "SUBSCRIBE"
            link.send(time.monotonic() + _SILENCE_SECONDS, (verb, self.channel))
            heard = ticked = time.monotonic()
            while not self._stopped.is_set():
                if link.wait(ticked + _TICK_SECONDS - time.monotonic(), self._bell):
                    self._take(link.receive(time.monotonic() + _SILENCE_SECONDS))
                    heard = time.monotonic()
                now = time.monotonic()
                if now - heard > _SILENCE_SECONDS:
                    raise BrokerError(f"{self._server.where} did not answer for {_SILENCE_SECONDS:.0f} seconds")
                if now - ticked >= _TICK_SECONDS:
                    ticked = now
                    link.send(now + _SILENCE_SECONDS, ("PING",))
                    if not self._holds_lease():
                        return
        finally:
            link.close()

    def _take(self, reply: Any) -> None:
        kind = reply[0] if isinstance(reply, list) and reply else None
        if kind in (b"subscribe", b"psubscribe"):
            self._up, self._error = True, ""
        elif kind in (b"message", b"pmessage"):
            self._publish(*reply[-2:])

    def _publish(self, channel: bytes, payload: Any) -> None:
        manager = self._manager()
        if manager is None:
            return
        try:
            found = self._target(channel.decode(), payload.decode())
            if found is None:
                self._skipped += 1
                return
            key, data = found
            plain = None if isinstance(data, Event) else self._event
            self._insist(manager, key, data, plain)
        except BrokerError as error:
            self._failed += 1
            self._error = str(error)
            logger.error("a message of %r was lost: %s", self.channel, error)
        except Exception as error:  # what ``to`` raises, and what is no event
            self._skipped += 1
            if self._skipped == 1:
                logger.warning("a message of %r was skipped", self.channel, exc_info=error)

    def _target(self, channel: str, text: str) -> tuple[str, Any] | None:
        found = self._to(channel, text) if callable(self._to) else self._to
        return (found, text) if isinstance(found, str) else found

    def _insist(self, manager: PoolManager, key: str, data: Any, event: str | None) -> None:
        """Publish, again if it is not known whether it was done."""
        once = f"bridge {secrets.token_hex(8)}"
        for left in reversed(range(_TRIES)):
            try:
                manager.publish(key, data, event=event, idempotency_key=once)
                self._published += 1
            except BrokerError:
                if not left:
                    raise
            else:
                return


def _lease_name(address: tuple[str, ...], channel: str, to: Target, event: str | None) -> str:
    """Name the lease of a bridge: in every process alike, and unlike any other bridge's."""
    # Of a function, what is the same in other processes, unlike its place in memory.
    function: Any = to
    while isinstance(function, functools.partial):
        function = function.func
    if not isinstance(function, str) and not hasattr(function, "__qualname__"):
        function = type(function)
    target = function if isinstance(function, str) else (function.__module__, function.__qualname__)
    digest = hashlib.sha256(repr((address, channel, target, event)).encode()).hexdigest()
    # The channel is there for who looks into Redis; a lease's name may have 255 characters.
    return f"bridge {digest[:32]} {channel}"[:255]
