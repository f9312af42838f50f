"""Standard library threads: how to wait and to run code where each request has a thread of its own.

Its twin for greenlets is ``gevent.py``. Where the threads of the standard library are gevent's greenlets, nothing here
is used.
"""

from __future__ import annotations

import contextvars
import logging
import os
import select
import socket
import threading
import time
from _queue import Empty, SimpleQueue
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, TypeVar

from .base import Flusher, Loop, Task, Waiter

__all__ = ["ThreadLoop", "ThreadRuntime", "ThreadWaiter"]

logger: logging.Logger = logging.getLogger("flask_sse_stream")

T = TypeVar("T")


class ThreadWaiter:
    """A place to wait for a thread of the operating system.

    ``SimpleQueue.put`` may interrupt itself, unlike ``threading.Event.set``, so a signal handler may wake.
    """

    __slots__ = ("_queue",)

    def __init__(self) -> None:
        self._queue: SimpleQueue[None] = SimpleQueue()

    def wait(self, timeout: float | None = None) -> None:
        """Return when woken, or after ``timeout`` seconds."""
        try:
            self._queue.get(timeout=timeout)
            while True:  # However often it was woken before, once is enough.
                self._queue.get_nowait()
        except Empty:
            pass

    def wake(self) -> None:
        """Let the waiting thread go on."""
        if self._queue.empty():
            self._queue.put(None)


class ThreadTask:
    """Runs in a thread of its own. Threads cannot be interrupted: it ends when it next touches its stream."""

    def __init__(self, function: Callable[[], None], name: str) -> None:
        context = contextvars.Context()
        threading.Thread(target=context.run, args=(function,), name=name, daemon=True).start()

    def stop(self) -> None:
        """Nothing can be done from outside; the stream's own methods raise in the task."""


class ThreadFlusher:
    """One daemon thread that runs the pool manager's ``flush``."""

    def __init__(self, flush: Callable[[], float | None]) -> None:
        self._flush = flush
        self._waiter = ThreadWaiter()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="sse-flusher", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped:
            delay = self._flush()
            if delay == 0.0:
                time.sleep(0)  # the interpreter's lock to whoever waits for it: the threads that write
            else:
                self._waiter.wait(delay)

    @property
    def alive(self) -> bool:
        """Whether its thread still runs."""
        return self._thread.is_alive()

    def wake(self) -> None:
        """There is work."""
        self._waiter.wake()

    def give_turn(self) -> bool:
        """Sleep a moment, in which the flusher runs."""
        return self.rest(0.0005)

    def rest(self, seconds: float) -> bool:
        """Sleep in the current thread."""
        if threading.get_ident() == self._thread.ident:
            return False
        time.sleep(seconds)
        return True

    def stop(self) -> None:
        """Let the thread end after what it is doing."""
        self._stopped = True
        self._waiter.wake()


class ThreadLoop:
    """One daemon thread of this process that waits for sockets. It begins with the first stream that needs it."""

    has_flushers = False
    _current: ClassVar[ThreadLoop | None] = None
    _lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def current(cls) -> ThreadLoop:
        """Give the one of this process."""
        with cls._lock:
            if cls._current is None:
                cls._current = cls()
            return cls._current

    @classmethod
    def forked(cls) -> None:
        """Let go of what is the parent's: a child has a copy of everything but the thread."""
        loop, cls._current, cls._lock = cls._current, None, threading.Lock()
        if loop is not None:
            loop._epoll.close()
            os.close(loop._alarm)

    def __init__(self) -> None:
        self.guests: dict[type, Any] = {}
        self._calls: deque[Callable[[], object]] = deque()
        self._callbacks: dict[int, Callable[[], object]] = {}
        self._epoll = select.epoll()
        self._alarm = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._alarmed = False
        self.watch(self._alarm, self._drain)
        thread = threading.Thread(target=contextvars.Context().run, args=(self._run,), name="sse-sockets", daemon=True)
        thread.start()
        self.thread: int = thread.ident or 0

    def post(self, call: Callable[[], object]) -> None:
        """Have ``call`` made soon in the loop's thread."""
        self._calls.append(call)
        if not self._alarmed:
            self._alarmed = True
            os.eventfd_write(self._alarm, 1)

    def watch(self, descriptor: int, callback: Callable[[], object]) -> Callable[[], None]:
        """Call ``callback`` whenever ``descriptor`` is readable."""
        self._callbacks[descriptor] = callback
        self._epoll.register(descriptor, select.EPOLLIN)

        pid = os.getpid()

        def stop() -> None:
            if pid == os.getpid():  # A forked child's epoll is the parent's.
                self._epoll.unregister(descriptor)
                del self._callbacks[descriptor]

        return stop

    def _run(self) -> None:
        while True:
            for descriptor, _ in self._epoll.poll():
                self._call(self._callbacks[descriptor])

    def _drain(self) -> None:
        os.eventfd_read(self._alarm)
        self._alarmed = False  # Before the calls: what is posted from here on is found here, or sounds the alarm.
        for _ in range(len(self._calls)):
            self._call(self._calls.popleft())

    def _call(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception:
            logger.exception("a call in the thread of the sockets failed")


class ThreadRuntime:
    """Standard library threads: gunicorn's gthread, werkzeug's development server and others."""

    def waiter(self) -> Waiter:
        """Make a place to wait for a thread."""
        return ThreadWaiter()

    def spawn(self, function: Callable[[], None], name: str = "sse-source") -> Task:
        """Run ``function`` in a daemon thread."""
        return ThreadTask(function, name)

    def start_flusher(self, flush: Callable[[], float | None]) -> Flusher:
        """Start the flusher's thread."""
        return ThreadFlusher(flush)

    def outside(self, function: Callable[[], T]) -> T:
        """Call it: other threads go on."""
        return function()

    def home(self) -> Hashable:
        """A socket may be used by any thread."""
        return None

    def loop(self) -> Loop:
        """Give the thread of this process that waits for sockets."""
        return ThreadLoop.current()

    @property
    def socket_type(self) -> type:
        """The standard library's."""
        return socket.socket


os.register_at_fork(after_in_child=ThreadLoop.forked)
