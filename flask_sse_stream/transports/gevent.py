"""gevent: how to wait and to run code where requests are greenlets.

The only module that imports gevent. Nothing here patches anything.

gevent's queues and events belong to the hub of one thread. From any other thread, ``Queue.put`` leaves the item
lying until that hub happens to run (gevent issues 2045 and 347; measured with 25.9.1 to 26.9.0), so whatever
comes from elsewhere goes through a :class:`Mailbox`: one atomic ``deque.append`` and one native ``async`` watcher.
"""

from __future__ import annotations

import contextvars
import logging
import os
import sys
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, Final, TypeVar

import gevent
import gevent.monkey
import gevent.socket
from gevent.event import Event as GreenletEvent
from gevent.hub import Hub, get_hub

from ..errors import BrokerError
from .base import Flusher, Loop, Task, Waiter

__all__ = ["GeventRuntime", "in_gevent"]

logger: logging.Logger = logging.getLogger("flask_sse_stream")

T = TypeVar("T")

# Not the one that monkey patching leaves in its place, which tells greenlets apart.
get_ident: Final[Callable[[], int]] = gevent.monkey.get_original("_thread", "get_ident")
# A sleep of 0 comes back before the loop has looked at its sockets and timers, up to fifty times: with slices of a
# millisecond, a request would wait for 50 (gevent's loop, _run_callbacks; measured with 10,000 streams: up to 78).
_ONE_TURN: Final = 1e-6
_BATCH: Final = 256  # calls of one drain; more would keep the loop from its sockets


def in_gevent() -> bool:
    """Say whether the current code is to wait as gevent does.

    True in a gevent greenlet, and everywhere in a process whose threads are greenlets by monkey patching: there
    the flusher's thread is one too, and a native wait would stop it.
    """
    if isinstance(gevent.getcurrent(), gevent.Greenlet):
        return True
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


class Mailbox:
    """A hub's loop, and the calls that other threads want made in it. One for each hub."""

    has_flushers = True
    _of_hub: ClassVar[weakref.WeakKeyDictionary[Hub, Mailbox]] = weakref.WeakKeyDictionary()

    @classmethod
    def current(cls) -> Mailbox:
        """Give the mailbox of the current thread's hub."""
        hub = get_hub()
        mailbox = cls._of_hub.get(hub)
        if mailbox is None:
            mailbox = cls._of_hub[hub] = cls(hub)
        return mailbox

    def __init__(self, hub: Hub) -> None:
        self.thread: int = get_ident()
        self._calls: deque[Callable[[], object]] = deque()
        self.hub: weakref.ref[Hub] = weakref.ref(hub)
        self.guests: dict[type, Any] = {}
        # ref=False: a program whose other work is done may end.
        self._async: Any = hub.loop.async_(ref=False)
        self._async.start(self._drain)
        self._waiting = 0

    def begin_wait(self) -> None:
        """Somebody waits for what may come from another thread, so the loop is not without anything to do."""
        self._waiting += 1
        if self._waiting == 1:
            self._async.ref = True

    def end_wait(self) -> None:
        """Somebody no longer waits."""
        self._waiting -= 1
        if self._waiting == 0:
            self._async.ref = False

    def post(self, call: Callable[[], object]) -> None:
        """Have ``call`` made soon in the hub, where it must not block. From any thread or signal handler."""
        self._calls.append(call)
        self._async.send()

    def watch(self, descriptor: int, callback: Callable[[], object]) -> Callable[[], None]:
        """Call ``callback`` in the hub whenever ``descriptor`` is readable. In the hub's own thread."""
        watcher = get_hub().loop.io(descriptor, 1, ref=False)
        watcher.start(callback)
        stop: Callable[[], None] = watcher.stop
        return stop

    def _drain(self) -> None:
        for _ in range(_BATCH):
            try:
                call = self._calls.popleft()
            except IndexError:
                return
            try:
                call()
            except Exception:
                logger.exception("a call from another thread failed")
        self._async.send()


class GeventWaiter:
    """A place to wait for a greenlet; it belongs to the hub in which it was made."""

    __slots__ = ("_event", "_mailbox")

    def __init__(self) -> None:
        self._mailbox = Mailbox.current()
        self._event = GreenletEvent()

    def wait(self, timeout: float | None = None) -> None:
        """Return when woken, or after ``timeout`` seconds."""
        self._mailbox.begin_wait()
        try:
            self._event.wait(timeout)
        finally:
            self._mailbox.end_wait()
        self._event.clear()

    def wake(self) -> None:
        """Let the waiting greenlet go on."""
        if self._event.is_set():
            return
        if get_ident() == self._mailbox.thread:
            self._event.set()
        else:
            self._mailbox.post(self._event.set)


class GeventTask:
    """Runs in a greenlet of its own, which can be interrupted where it waits."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._mailbox = Mailbox.current()
        context = contextvars.Context()
        self._greenlet = gevent.spawn(context.run, function)

    def stop(self) -> None:
        """Raise ``GreenletExit`` where the task waits."""
        if self._greenlet is gevent.getcurrent():
            return  # It is the task that has ended its stream: let it go on to its own end.
        if get_ident() == self._mailbox.thread:
            self._greenlet.kill(block=False)
        else:
            self._mailbox.post(lambda: self._greenlet.kill(block=False))


class GeventFlusher:
    """One greenlet that runs the pool manager's ``flush``."""

    def __init__(self, flush: Callable[[], float | None]) -> None:
        self._flush = flush
        self._mailbox = Mailbox.current()
        self._event = GreenletEvent()
        self._stopped = self._woken = False
        self._pid = os.getpid()
        self._greenlet = gevent.spawn(contextvars.Context().run, self._run)

    def _run(self) -> None:
        # A forked child has a copy of its parent's greenlets, and a flusher of its own.
        while not self._stopped and self._pid == os.getpid():
            try:
                self._turn()
            except (KeyboardInterrupt, SystemExit) as error:
                # What a signal handler raises comes up in whatever greenlet runs. It is meant for the main one, and
                # this one has yet to take leave of the clients.
                get_hub().handle_system_error(type(error), error)

    def _turn(self) -> None:
        # Before the work: a wake during it must not be lost.
        self._woken = False
        self._event.clear()
        delay = self._flush()
        if delay == 0.0:
            gevent.sleep(_ONE_TURN)
        else:
            self._event.wait(delay)

    @property
    def alive(self) -> bool:
        """Whether its greenlet can still run: the hub of a thread that ended is gone."""
        hub = self._mailbox.hub()
        return not self._greenlet.dead and hub is not None and hub.loop is not None

    def wake(self) -> None:
        """There is work."""
        if not self._woken:
            self._woken = True
            self._mailbox.post(self._event.set)

    def give_turn(self) -> bool:
        """Let the flusher's greenlet run; in another thread, sleep a moment."""
        # A greenlet of this hub lets it run; another thread's own hub just sleeps.
        return self.rest(_ONE_TURN if get_ident() == self._mailbox.thread else 0.0005)

    def rest(self, seconds: float) -> bool:
        """Sleep in the current greenlet."""
        current = gevent.getcurrent()
        if current is self._greenlet or current is get_hub():
            return False
        gevent.sleep(seconds)
        return True

    def stop(self) -> None:
        """Let the greenlet end."""
        self._stopped = True
        self.wake()


class GeventRuntime:
    """Greenlets: gevent's pywsgi, gunicorn's gevent workers, and any server in a monkey-patched process."""

    def waiter(self) -> Waiter:
        """Make a place to wait for a greenlet."""
        return GeventWaiter()

    def spawn(self, function: Callable[[], None], name: str = "sse-source") -> Task:
        """Run ``function`` in a greenlet."""
        return GeventTask(function)

    def start_flusher(self, flush: Callable[[], float | None]) -> Flusher:
        """Start the flusher's greenlet."""
        return GeventFlusher(flush)

    def outside(self, function: Callable[[], T]) -> T:
        """Call it here where sockets are gevent's own, else in a thread of the hub's pool, and wait as a greenlet.

        Raises :class:`BrokerError` in a callback of the hub, which may not wait, where sockets are gevent's own.
        """
        if _sockets_are_patched():
            if gevent.getcurrent() is get_hub():
                raise BrokerError("this has to wait, which a callback of the hub cannot: spawn a greenlet for it")
            return function()
        results: list[T] = []
        error = get_hub().threadpool.apply(_call_into, (function, results))
        if error is not None:
            raise error
        return results[0]

    def home(self) -> Hashable:
        """Sockets of gevent's belong to the hub of one thread; others may be used by any."""
        return id(get_hub()) if _sockets_are_patched() else None

    def loop(self) -> Loop:
        """Give the current thread's hub."""
        return Mailbox.current()

    @property
    def socket_type(self) -> type:
        """gevent's, also where nothing is patched."""
        return gevent.socket.socket


def _sockets_are_patched() -> bool:
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("socket"))


def _call_into(function: Callable[[], T], results: list[T]) -> BaseException | None:
    # gevent prints the traceback of what a pool's thread raises, although it is raised in the caller as well.
    try:
        results.append(function())
    except BaseException as error:
        return error
    return None
