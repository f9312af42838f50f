"""What a transport promises, and what it needs from the kind of server it runs under.

A transport moves one stream's bytes to one client; it knows sockets and servers, and no keys. A runtime says how
code waits and runs beside other code: standard library threads, or gevent's greenlets. The pool manager and the
streams call these protocols and never ask which one they have.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from importlib import import_module
from typing import Any, Protocol, TypeVar

__all__ = ["Flusher", "Loop", "Pusher", "Runtime", "Task", "Transport", "Waiter", "current_runtime", "original"]

T = TypeVar("T")


class Pusher(Protocol):
    """Sends the same bytes to many streams whose queues are empty."""

    def push(self, streams: list[Any], chunk: bytes) -> list[Any]:
        """Send it now, ahead of their queues; give those streams in whose queues it has to wait. For the flusher."""


class Transport(Protocol):
    """:meth:`wake` and :meth:`close` return at once, and may be called from any thread, greenlet or hub callback."""

    @property
    def ready(self) -> Pusher | None:
        """Who can send to its client now; ``None``, as for most: its own code has to be woken."""

    def wake(self) -> None:
        """The stream has something to say, or has ended."""

    def close(self) -> None:
        """Cut the client off without waiting for it: it may be the one that does not read."""


class Waiter(Protocol):
    """One connection's place to wait. Woken any number of times before a wait, that wait returns once, at once."""

    def wait(self, timeout: float | None = None) -> None:
        """Return when woken, or after ``timeout`` seconds. For one waiting thread or greenlet at a time."""

    def wake(self) -> None:
        """Let the waiting one go on. From any thread; never blocks."""


class Task(Protocol):
    """Code that runs beside a stream."""

    def stop(self) -> None:
        """Ask it to end: at once where the runtime can interrupt it, else when it next touches its stream."""


class Flusher(Protocol):
    """Runs the pool manager's ``flush`` whenever there is something to do. One per process and manager."""

    @property
    def alive(self) -> bool:
        """Whether the thread it lives in still runs."""

    def wake(self) -> None:
        """There is work. From any thread, hub callback or signal handler; never blocks."""

    def give_turn(self) -> bool:
        """Let the flusher run before the caller goes on. ``False``: the caller cannot wait here."""

    def rest(self, seconds: float) -> bool:
        """Let the flusher and everything else run for so long. ``False``: the caller cannot wait here."""

    def stop(self) -> None:
        """End it."""


class Loop(Protocol):
    """A thread that waits for sockets.

    ``thread``
        which one it is, as ``threading.get_ident`` says.
    ``has_flushers``
        whether the flushers of pool managers run there too.
    ``guests``
        what serves sockets there, by its type; it lives as long as the loop.
    """

    thread: int
    has_flushers: bool
    guests: dict[type, Any]

    def post(self, call: Callable[[], object]) -> None:
        """Have ``call``, which must not block, made soon in the loop's thread. From any thread or signal handler."""

    def watch(self, descriptor: int, callback: Callable[[], object]) -> Callable[[], None]:
        """Call ``callback`` in the loop's thread whenever ``descriptor`` is readable; give what ends that."""


class Runtime(Protocol):
    """How to wait and to run code under the server that called us."""

    def waiter(self) -> Waiter:
        """Make a place to wait for the current thread or greenlet."""

    def spawn(self, function: Callable[[], None], name: str = "sse-source") -> Task:
        """Run ``function`` beside, in an empty context: it must not hold the request's."""

    def start_flusher(self, flush: Callable[[], float | None]) -> Flusher:
        """Call ``flush`` again after as many seconds as it returns (0: after others had their turn), or when woken."""

    def outside(self, function: Callable[[], T]) -> T:
        """Call ``function``, which blocks its thread, so that nobody but the caller waits for it; give its result."""

    def home(self) -> Hashable:
        """Name the place whose sockets the caller may use: those of another one would wait in the wrong loop."""

    def loop(self) -> Loop:
        """Give the loop that serves sockets which servers of this kind have given up."""

    @property
    def socket_type(self) -> type:
        """What the sockets of such servers are, exactly."""


def current_runtime() -> Runtime:
    """Give the runtime of the code that calls."""
    # By name, since implementations are above their protocols. Where nobody has imported gevent, no server of
    # gevent's has called us.
    if sys.modules.get("gevent") is not None:
        runtimes = import_module("flask_sse_stream.transports.gevent")
        if runtimes.in_gevent():
            runtime: Runtime = runtimes.GeventRuntime()
            return runtime
    threads: Runtime = import_module("flask_sse_stream.transports.threads").ThreadRuntime()
    return threads


def original(module: str, name: str) -> Any:
    """Give a function of the standard library, also where gevent has replaced it."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey.get_original(module, name) if monkey is not None else getattr(import_module(module), name)
