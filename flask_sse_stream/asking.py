"""What one process asks of all that share its log, and answers: how they are, and to end a stream, wherever it is.

It goes through the log, to keys that no stream can have: :data:`~.access.CONTROL_KEY`, which every process hears that
has had a stream, and :data:`~.keys.REPORT_KEY`, which only who has asked hears.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from .access import CONTROL_KEY
from .brokers.base import Broker
from .counts import Counts
from .errors import BrokerError
from .event import Message
from .intake import Intake
from .keys import REPORT_KEY, is_job
from .kicks import Kick, stream_name
from .opening import Opening
from .reports import Inquiry, Report
from .rounds import Rounds
from .settings import Settings
from .stream import CloseReason, Lock, Stream
from .transports.base import current_runtime
from .window import Windows

__all__ = ["Asking"]

T = TypeVar("T")


class _Outside(Protocol):
    def __call__(self, function: Callable[[], T], /) -> T: ...


class Asking:
    """The part of a pool manager that speaks with other processes about themselves.

    ``process``
        names this process among all that share a log: at random, so that one that starts anew is another one.
    ``outside``
        calls what waits for the broker.
    ``ending``
        gives the reason and the last bytes of a stream that is ended, to come back or not.
    """

    def __init__(
        self,
        settings: Settings,
        lock: Lock,
        broker: Broker,
        windows: Windows,
        rounds: Rounds,
        intake: Intake,
        opening: Opening,
        counts: Counts,
        outside: _Outside,
        ending: Callable[[Stream, bool], tuple[CloseReason, bytes]],
    ) -> None:
        self.process: str = secrets.token_hex(8)
        self._settings = settings
        self._lock = lock
        self._broker = broker
        self._windows = windows
        self._rounds = rounds
        self._intake = intake
        self._opening = opening
        self._counts = counts
        self._outside = outside
        self._ending = ending

    # How they are

    def report(self, keys: Sequence[str] = ()) -> Report:
        """Say how this process is, and which streams the ``keys`` have."""
        with self._lock:
            streams = list(self._rounds.streams)
        draining, up = self._rounds.drain.deadline is not None, self._broker.stats().up
        cells = self._counts.read()
        return Report.of(streams, cells, process=self.process, draining=draining, broker_up=up, of=keys)

    def gather(self, reports: deque[bytes] | None) -> None:
        """Put what processes answer to :meth:`ask` into ``reports``, whose bound is the caller's; ``None``: no more.

        Raises :class:`BrokerError`.
        """
        self._intake.reports = reports
        if reports is not None and self._broker.remembers:
            self._opening.know_the_log()
            self._outside(lambda: self._broker.cover((REPORT_KEY,), (), None))

    def ask(self, inquiry: Inquiry) -> None:
        """Ask every process that has had a stream how it is. Raises :class:`BrokerError`."""
        self._outside(lambda: self._broker.publish(CONTROL_KEY, inquiry.encode()))

    def asked(self, inquiry: Inquiry) -> None:
        """Answer, soon. For the flusher."""
        current_runtime().spawn(functools.partial(self.answer, inquiry), "sse-report")

    def answer(self, inquiry: Inquiry) -> None:
        """Say how this process is to whoever has asked all of them."""
        body = self.report(inquiry.keys).encode(inquiry.token, self._settings.max_event_bytes)
        with contextlib.suppress(BrokerError):  # Whoever asked will see that this one is missing.
            self._outside(lambda: self._broker.publish(REPORT_KEY, body))

    # What was said

    def recent(self, key: str, number: int) -> list[Message]:
        """Give the latest events of a key, and of what went to all: at most ``number`` of each, oldest first.

        The first call asks the log; those within a minute after another cost nothing outside this process. Raises
        :class:`BrokerError`.
        """
        self._opening.know_the_log()
        followed = (key,) if is_job(key) else (key, None)
        with self._lock:
            wanted = self._windows.incomplete(followed, time.monotonic())
        if wanted:
            self._outside(lambda: self._broker.cover(followed, wanted, None))
        with self._lock:
            self._intake.take_all()
            self._windows.touch(key, now := time.monotonic())
            return self._windows.latest((key,), number, now)

    # To end a stream

    def kick(self, name: str, *, reconnect: bool = False) -> None:
        """End the stream with this name, of :class:`.StreamReport`, in whatever process it is, as ``close()`` does.

        Raises :class:`BrokerError`. Whether there was such a stream is not known here.
        """
        self._outside(lambda: self._broker.publish(CONTROL_KEY, Kick(name, reconnect).encode()))

    def kicked(self, kick: Kick) -> None:
        """Have the rounds end a stream, if it is here. For the intake, under the lock."""

        def end(stream: Stream) -> tuple[CloseReason, bytes] | None:
            return self._ending(stream, kick.reconnect) if stream_name(self.process, stream) == kick.stream else None

        if kick.stream.startswith(self.process):
            self._rounds.search_soon(end)
