"""The portable transport: a response body that the server's own thread or greenlet iterates.

It works under every WSGI server. The server's code iterates a :class:`Body` and writes what it gets; in between it
waits in the connection's :class:`~.base.Waiter`. Here is also the runtime for servers that use threads; gevent's is
in ``gevent.py``.
"""

from __future__ import annotations

import contextvars
import threading
import time
from _queue import Empty, SimpleQueue
from collections.abc import Callable, Hashable, Iterator
from typing import TypeVar

from ..stream import CloseReason, Stream
from .base import Flusher, Task, Waiter

__all__ = ["Body", "IteratorTransport", "ThreadRuntime", "ThreadWaiter"]

T = TypeVar("T")


class IteratorTransport:
    """Wakes the server's code that iterates a :class:`Body`, and cuts off a client it may hang on.

    ``cut`` ends the connection from outside; ``None`` where the server does not show the client's socket.
    """

    __slots__ = ("_cut", "waiter")

    ready = False

    def __init__(self, waiter: Waiter, cut: Callable[[], None] | None = None) -> None:
        self.waiter = waiter
        self._cut = cut

    def push(self, chunk: bytes) -> bool:
        """Only the server's code writes."""
        return False

    def wake(self) -> None:
        """Let the server's code come back for more."""
        self.waiter.wake()

    def close(self) -> None:
        """Cut the client off: a server's thread that hangs in a write to it goes on."""
        cut, self._cut = self._cut, None
        if cut is not None:
            cut()


class Body:
    """The body of one streamed response, which the server iterates and closes (PEP 3333)."""

    __slots__ = ("_stream", "_task", "_waiter")

    def __init__(self, stream: Stream, waiter: Waiter, task: Task | None = None) -> None:
        self._stream: Stream | None = stream
        self._waiter = waiter
        self._task = task

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        while (stream := self._stream) is not None:
            data = stream.take()
            if data:
                return data
            if data is None:
                self.close()
            else:
                self._waiter.wait()
        raise StopIteration

    def release(self) -> None:
        """Somebody else serves the stream: this is nobody's body any more."""
        self._stream = self._task = None

    def close(self) -> None:
        """The server is done: the end was sent, the client left, or the request failed on its way out."""
        stream, self._stream = self._stream, None
        task, self._task = self._task, None
        if stream is not None:
            stream.close(CloseReason.PEER)
            stream.transport = None  # whoever keeps the stream shall not keep the socket
        if task is not None:
            task.stop()

    def __del__(self) -> None:
        # A middleware that forgets to close the body must not leave a listener for ever. The collector of
        # garbage runs anywhere, also where this very thread holds the lock.
        if self._stream is not None:
            self._stream.abandon()


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
        if threading.current_thread() is self._thread:
            return False
        time.sleep(0.0005)
        return True

    def stop(self) -> None:
        """Let the thread end after what it is doing."""
        self._stopped = True
        self._waiter.wake()


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
