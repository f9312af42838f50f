"""Notices that this process is to stop, and has its streams drained, and what it holds given up, before it does.

Servers know little of streams. gunicorn keeps one until ``graceful_timeout`` is over and then kills its worker,
gevent's own server and Flask's die of a signal at once, and of a socket that was taken over none of them knows any
more. So there are three ways in which the end is noticed, and none takes anything away from the application:

* gunicorn's worker says so itself: it is no longer ``alive``, because of a signal, ``--max-requests`` or a reload.
* Where SIGTERM would kill the process, a handler drains first and then lets the signal do what it would have done. It
  is installed where nobody else has one, and whoever installs one later has his own way.
* At the exit of the interpreter, whoever ends it: Ctrl-C, ``sys.exit``, a handler of the application's. It waits for
  what the other two have begun.

What is given up are jobs and leases. That comes last, when this process does nothing any more that they are for; those
of a process that is killed end by themselves, some seconds later.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, Final, Protocol

from .transports.base import Runtime, current_runtime, original

__all__ = ["Drainable", "Holder", "attend", "give_up_at_exit", "handle_sigterm"]

_LOOK_SECONDS: Final = 0.25  # between two looks at whether gunicorn's worker is alive
_POLL_SECONDS: Final = 0.01
_GIVE_UP_SECONDS: Final = 3.0  # in which other processes are told, if their broker answers
# Those that a worker of gunicorn's handles: if the application has replaced one, another one is still the worker's.
_WORKERS_SIGNALS: Final = ("SIGTERM", "SIGQUIT", "SIGINT", "SIGABRT", "SIGUSR1", "SIGWINCH")


class Drainable(Protocol):
    """A pool manager."""

    def begin_drain(self) -> int:
        """Begin to end all streams. From any thread or signal handler."""

    def drain(self) -> int:
        """The same, and wait until it is done."""

    def drain_waits(self) -> bool:
        """Whether it is not done, and not late either."""


class Holder(Protocol):
    """A pool manager, too."""

    def give_up(self) -> None:
        """Let other processes have what this one holds."""


class _Process:
    """What was arranged in this process. A forked child inherits its parent's handlers, but no threads."""

    def __init__(self) -> None:
        self.attended: weakref.WeakSet[Drainable] = weakref.WeakSet()
        self.holders: weakref.WeakSet[Holder] = weakref.WeakSet()
        self.watches = False


_process = _Process()
_exit_is_watched = False


def attend(manager: Drainable, runtime: Runtime) -> None:
    """Have the manager drained before this process ends. Call it with the first stream of a process."""
    _process.attended.add(manager)
    _watch_exit()
    worker = _gunicorns_worker()
    if worker is None:
        handle_sigterm()
    elif not _process.watches:
        _process.watches = True
        runtime.spawn(functools.partial(_watch, worker), "sse-leaving")


def give_up_at_exit(holder: Holder) -> None:
    """Have it give up what it holds before this process ends. Call it with the first that it holds."""
    if holder not in _process.holders:
        _process.holders.add(holder)
        _watch_exit()


def _watch_exit() -> None:
    global _exit_is_watched
    if not _exit_is_watched:
        _exit_is_watched = True
        atexit.register(_at_exit)


def _at_exit() -> None:
    for leave in (_drain, _give_up):
        try:
            leave()
        except (KeyboardInterrupt, SystemExit):
            # gevent's hub throws what ended a greenlet into the main one, which may be here already for that reason.
            leave()


def _drain() -> None:
    """Drain everything, as far as whoever calls may wait for it."""
    managers = list(_process.attended)
    for manager in managers:
        manager.begin_drain()  # all at once, so that it takes no longer than for one
    for manager in managers:
        manager.drain()


def _give_up() -> None:
    for holder in list(_process.holders):
        holder.give_up()


def _gunicorns_worker() -> Any:
    """Give the worker of gunicorn's that this process is, if it is one.

    Read in gunicorn 21.2 to 27.0: in ``init_signals`` every kind of worker installs methods of its own.
    """
    module = sys.modules.get("gunicorn.workers.base")
    if module is None:
        return None
    for name in _WORKERS_SIGNALS:
        owner = getattr(signal.getsignal(getattr(signal, name)), "__self__", None)
        if isinstance(owner, module.Worker):
            return owner
    return None


def _watch(worker: Any) -> None:
    waiter = current_runtime().waiter()
    while worker.alive:
        waiter.wait(_LOOK_SECONDS)
    _drain()


# SIGTERM


def handle_sigterm() -> None:
    """Drain at SIGTERM, if the signal would end this process at once, and if this is the main thread.

    Nothing else changes: with no streams the process ends as it would have done, and with streams a moment later.
    """
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL or _is_handled_below(signal.SIGTERM):
        return
    try:
        signal.signal(signal.SIGTERM, _on_sigterm)
    except ValueError:  # Python lets only the main thread do that
        return


def _is_handled_below(number: int) -> bool:
    """Whether something has a handler that Python does not know of, as ``gevent.signal_handler`` installs it."""
    try:
        get = ctypes.pythonapi.PyOS_getsig
    except AttributeError:  # an interpreter without CPython's interface: nothing is known, so nothing is touched
        return True
    get.argtypes, get.restype = [ctypes.c_int], ctypes.c_void_p
    return get(number) is not None  # SIG_DFL is the null pointer


def _on_sigterm(number: int, _frame: FrameType | None) -> None:
    # From here on the signal is what it was, and a second one ends the process at once.
    signal.signal(number, signal.SIG_DFL)
    managers = list(_process.attended)
    if not managers and not _process.holders:
        _die(number, time.sleep)
        return
    # Nothing may wait here: this may be gevent's hub, or code that holds a lock. And not in a greenlet, which would
    # not run while something keeps the hub. This is what threads are made of, without the locks of ``threading``.
    start: Callable[..., object] = original("_thread", "start_new_thread")
    start(_drain_and_die, (managers, number))


def _drain_and_die(managers: list[Drainable], number: int) -> None:
    sleep: Callable[[float], object] = original("time", "sleep")
    for manager in managers:
        manager.begin_drain()
    while any(manager.drain_waits() for manager in managers):
        sleep(_POLL_SECONDS)
    given_up: list[bool] = []

    def give_up() -> None:
        try:
            _give_up()
        finally:
            given_up.append(True)

    # Beside, because it waits for a broker, and whatever that does, the signal is to end this process.
    start: Callable[..., object] = original("_thread", "start_new_thread")
    start(give_up, ())
    late = time.monotonic() + _GIVE_UP_SECONDS
    while not given_up and time.monotonic() < late:
        sleep(_POLL_SECONDS)
    _die(number, sleep)


def _die(number: int, sleep: Callable[[float], object]) -> None:
    os.kill(os.getpid(), number)
    if signal.getsignal(number) is signal.SIG_DFL:
        # The first process of a container is spared by signals that it does not handle.
        sleep(1)
        os._exit(128 + number)


def _forked() -> None:
    global _process
    _process = _Process()


os.register_at_fork(after_in_child=_forked)
