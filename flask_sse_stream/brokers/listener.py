"""Reads what is new in a log that several processes write to, as soon as one of them has written.

A listener is a thread (a greenlet where threads are patched). It is woken by a datagram to its Unix socket in a
directory that all processes know; should one be lost, it looks by itself once a second. It knows messages and their
order, and nothing of how the log is stored.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from ..errors import BrokerError
from ..event import Message
from ..transports.base import current_runtime
from .base import Delivery, Gap

__all__ = ["LOOK_SECONDS", "READ_EVENTS", "Listener", "Log", "Part", "wake_all"]

logger: logging.Logger = logging.getLogger("flask_sse_stream")

LOOK_SECONDS: Final = 1.0
"""How long a listener that nobody wakes waits before it looks by itself."""

READ_EVENTS: Final = 500
"""The most that are read at a time."""


class Part(NamedTuple):
    """What is in the log after a place.

    ``messages``
        the next ones, up to ``reached``. If that is below ``head`` there are more.
    ``gone``
        by key, up to where events had been deleted by then.
    ``skipped``
        how many there were besides that are no events.
    """

    epoch: str
    head: int
    messages: Sequence[Message]
    reached: int
    gone: Mapping[str | None, int]
    skipped: int


class Log(Protocol):
    """What a listener reads from. Any of it may raise :class:`BrokerError`."""

    def read_after(self, seq: int) -> Part:
        """Give what comes next after ``seq``."""

    def rewound(self, epoch: str) -> None:
        """Begin a new life, for this one was put back to an older state."""

    def inode(self) -> int:
        """Say which file the log is in, so that one that was put in its place is noticed."""

    def deliver(self, delivery: Delivery) -> None:
        """Take a message."""


def wake_all(directory: str) -> None:
    """Wake every listener that has its socket in ``directory``. Never waits, never raises.

    What is to be read has been written by now: nothing that happens here is a reason to say that it was not, and a
    listener that could not be woken looks by itself.
    """
    with contextlib.suppress(OSError):
        names = os.listdir(directory)
        with _short(directory) as path, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(0)
            for name in names:
                _wake(sender, f"{path}/{name}")


def _wake(sender: socket.socket, address: str) -> None:
    try:
        sender.sendto(b"!", address)
    except BlockingIOError:
        pass  # It has more wakes waiting than it needs.
    except ConnectionRefusedError:  # Left behind by a process that was killed.
        with contextlib.suppress(OSError):
            os.unlink(address)
    except OSError:
        pass  # It has gone meanwhile.


class Listener:
    """Reads what is new in the log and delivers it, in its order.

    It holds its log weakly: a thread must not keep an application alive that is otherwise gone.
    """

    def __init__(self, log: Log, wake_directory: str, epoch: str, head: int) -> None:
        self._log = weakref.ref(log)
        self._epoch = epoch
        self._head = head
        self._told: dict[str | None, int] = {}
        self._turn = threading.Lock()
        self._stopped = False
        self.broken: str = ""  # why the log cannot be read
        self.gaps: int = 0
        self.skipped: int = 0
        self._name = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._wake_directory = wake_directory
        self._path = os.path.join(wake_directory, self._name)
        self._inode = log.inode()
        try:
            self._socket = self._bind()
        except OSError as error:
            raise BrokerError(
                f"{wake_directory}: {error.strerror}; processes are woken through it: let this user write there"
            ) from error
        _listeners.add(self)
        self._pid = os.getpid()
        self._ended = threading.Event()
        self._thread = threading.get_ident()
        current_runtime().spawn(self._run, "sse-sqlite")

    def _bind(self) -> socket.socket:
        os.makedirs(self._wake_directory, mode=0o700, exist_ok=True)
        made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            with _short(self._wake_directory) as directory:
                made.bind(f"{directory}/{self._name}")
        except OSError:
            made.close()
            raise
        return made

    def forked(self) -> None:
        """Let go of what is the parent's, in a child."""
        self._socket.close()

    def stop(self) -> None:
        """Let the thread end, and wait until it has: it must not use a connection that is being closed."""
        self._stopped = True
        with (
            contextlib.suppress(OSError),
            _short(self._wake_directory) as directory,
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender,
        ):
            sender.sendto(b"!", f"{directory}/{self._name}")
        if self._thread != threading.get_ident():
            self._ended.wait(2 * LOOK_SECONDS)

    def _run(self) -> None:
        self._thread = threading.get_ident()
        try:
            while self._look():
                self._wait()
        finally:
            self._socket.close()
            if self._pid == os.getpid():
                with contextlib.suppress(OSError):
                    os.unlink(self._path)
            self._ended.set()

    def _look(self) -> bool:
        """Deliver everything that is new; say whether to go on."""
        log = self._log()
        # A forked child has a copy of its parent's greenlets, which must not touch what is still the parent's.
        if log is None or self._stopped or self._pid != os.getpid():
            return False
        try:
            self.catch_up(log)
        except BrokerError as error:
            if not self.broken and not self._stopped:
                logger.error("live events wait until the log can be read: %s", error)
            self.broken = str(error)
        else:
            if self.broken:
                logger.warning("the log can be read again")
            self.broken = ""
        return not self._stopped

    def catch_up(self, log: Log) -> None:
        """Deliver everything that is in the log by now, in this thread."""
        with self._turn:
            while self._read(log) and not self._stopped:
                pass

    def _wait(self) -> None:
        if not os.path.exists(self._path):  # somebody tidied up
            with contextlib.suppress(OSError):
                renewed = self._bind()
                self._socket.close()
                self._socket = renewed
        self._socket.settimeout(LOOK_SECONDS)
        try:
            self._socket.recv(16)
            self._socket.settimeout(0)
            while True:  # One look answers all the wakes that came before it.
                self._socket.recv(16)
        except OSError:
            pass

    def _read(self, log: Log) -> bool:
        """Deliver the next messages; say whether there may be more."""
        inode = log.inode()
        epoch, head, messages, reached, gone, skipped = log.read_after(self._head)
        if not epoch:
            return False  # The log was deleted and has no new life yet.
        if epoch == self._epoch and (head < self._head or inode != self._inode):
            # An older copy of the file was put back: its next numbers would be taken for those known already.
            log.rewound(epoch)
            self._inode = inode
            return True
        self._inode = inode
        if epoch != self._epoch:
            self._epoch, self._head = epoch, 0
            self._told.clear()
            return True
        for key, floor in gone.items():
            # An event of this key above our head was deleted before we came to read it.
            if floor > self._told.get(key, 0):
                self._told[key] = floor
                self.gaps += 1
                log.deliver(Gap(key, epoch, floor))
        for message in messages:
            log.deliver(message)
            self._head = message.seq
        self.skipped += skipped
        self._head = max(self._head, reached)
        return self._head < head


_listeners: weakref.WeakSet[Listener] = weakref.WeakSet()


def _forked() -> None:
    for listener in list(_listeners):
        listener.forked()


os.register_at_fork(after_in_child=_forked)


@contextlib.contextmanager
def _short(path: str) -> Iterator[str]:
    """Give a short path to a directory: a Unix socket's address has 107 bytes, and databases lie deep."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
