"""The portable transport: a response body that the server's own thread or greenlet iterates.

It works under every WSGI server. The server's code iterates a :class:`Body` and writes what it gets; in between it
waits in the connection's :class:`~.base.Waiter`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

from ..stream import CloseReason, Stream
from .base import Task, Waiter

__all__ = ["Body", "IteratorTransport"]


class IteratorTransport:
    """Wakes the server's code that iterates a :class:`Body`, and cuts off a client it may hang on.

    ``cut`` ends the connection from outside, or with ``socket.SHUT_RD`` what the server may read of it; ``None`` where
    the server does not show the client's socket.
    """

    __slots__ = ("_cut", "waiter")

    ready = None  # only the server's code writes

    def __init__(self, waiter: Waiter, cut: Callable[..., None] | None = None) -> None:
        self.waiter: Waiter = waiter
        self._cut = cut

    def wake(self) -> None:
        """Let the server's code come back for more."""
        self.waiter.wake()

    def close(self) -> None:
        """Cut the client off: a server's thread that hangs in a write to it goes on."""
        cut, self._cut = self._cut, None
        if cut is not None:
            cut()

    def keep_no_longer(self) -> None:
        """Let the server believe that its client will ask for nothing more on this connection."""
        cut, self._cut = self._cut, None
        if cut is not None:
            cut(socket.SHUT_RD)


class Body:
    """The body of one streamed response, which the server iterates and closes (PEP 3333).

    ``verdict`` says whether the client has left, since the server's writes do not; ``None`` where nobody knows.
    """

    __slots__ = ("_stream", "_task", "_verdict", "_waiter")

    def __init__(
        self,
        stream: Stream,
        waiter: Waiter,
        task: Task | None = None,
        verdict: Callable[[], CloseReason | None] | None = None,
    ) -> None:
        self._stream: Stream | None = stream
        self._waiter = waiter
        self._task = task
        self._verdict = verdict

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        while (stream := self._stream) is not None:
            data = stream.take()
            if data:
                reason = self._verdict() if self._verdict is not None else None
                if reason is None:
                    return data
                stream.close(reason)
                continue
            if data is None:
                break  # The stream is let go of in close(), before which the server writes the end of the response.
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
            # Whoever keeps the stream shall not keep the socket.
            transport, stream.transport = stream.transport, None
            if stream.reason is CloseReason.SHUTDOWN and isinstance(transport, IteratorTransport):
                # The response is written in full. A server that waited for the connection's next request, as they do
                # for seconds or for ever, would hold up the end of its process.
                transport.keep_no_longer()
        if task is not None:
            task.stop()

    def __del__(self) -> None:
        # A middleware that forgets to close the body must not leave a listener for ever. The collector of
        # garbage runs anywhere, also where this very thread holds the lock.
        if self._stream is not None:
            self._stream.abandon()
