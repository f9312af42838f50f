"""What a process has to do with jobs: it renews the leases of its producers, and looks after those that it reads.

A job's state is in the log: marks that its producer puts there, and its end. Who works on it is a lease's holder. Where
that lease runs out, the producer is gone, and whoever has readers of the job lets it fail. One thread or greenlet of
each process does all of it, while there is anything to do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any, ClassVar, Final

from .errors import BrokerError
from .event import Event, Message, to_text
from .keys import JOB_ENDS, JOB_MARK, JobKey, is_job, shown
from .leaving import give_up_at_exit
from .pools import PoolManager
from .transports.base import Task, Waiter, current_runtime

__all__ = [
    "SAY_SECONDS",
    "JobState",
    "Keeper",
    "Producer",
    "end_job",
    "is_over",
    "is_to_be_heard",
    "mark",
    "say_heard",
    "state_of",
]

logger: logging.Logger = logging.getLogger("flask_sse_stream")

SAY_SECONDS: Final = 10.0
"""In which whoever is to say something about a job has done so, or another one may."""

_TICK_SECONDS: Final = 1.0
_STAYS_SECONDS: Final = 30.0  # in which a stream begins that was asked for
_LOST: Final = "interrupted"
_MARK: Final = re.compile(re.escape(JOB_MARK) + r"(wait|join|(?:still)?(?:run|heard))\.([0-9]{1,10})\.[0-9a-f]{12}\Z")


class JobState(str, Enum):
    """How far a job is."""

    WAITING = "waiting"  #: it was opened, and nobody works on it yet
    RUNNING = "running"  #: a producer works on it
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    def __str__(self) -> str:
        return self.value


class Producer:
    """What works on a job in this process.

    ``unread``
        for how many seconds it goes on while nobody reads; ``None``: to its end.
    ``read``
        the monotonic time when somebody read the job last.
    ``ending``
        how many are about to end the job here.
    ``over``
        how the job ended, once that is known here.
    """

    def __init__(self, id: str, seconds: float, unread: float | None) -> None:
        self.id = id
        self.unread = unread
        self.read: float = time.monotonic()
        self.lease: str = _work_lease(id)
        self.holder: str = secrets.token_hex(8)
        self.seconds = seconds
        self.renewed: float = time.monotonic()
        self.sent = 0
        self.ending = 0
        self.over: JobState | None = None
        self.task: Task | None = None


class Keeper:
    """Renews the leases of the producers of one process, and looks after the jobs that it has readers of."""

    _of: ClassVar[weakref.WeakKeyDictionary[PoolManager, Keeper]] = weakref.WeakKeyDictionary()
    _making: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def of(cls, manager: PoolManager) -> Keeper:
        """Give those of a pool manager's process."""
        with cls._making:
            jobs = cls._of.get(manager)
            if jobs is None or jobs.pid != os.getpid():
                jobs = cls._of[manager] = cls(manager)
            return jobs

    @classmethod
    def forked(cls) -> None:
        """A child has neither its parent's producers nor the use of its locks."""
        cls._making = threading.Lock()

    def __init__(self, manager: PoolManager) -> None:
        self.pid: int = os.getpid()
        self._manager = weakref.ref(manager)
        self._lock = threading.Lock()
        self._producers: dict[str, Producer] = {}
        self._looked: dict[str, float] = {}
        self._heard: set[str] = set()  # jobs that are to know whether they are read
        self._keeper: Waiter | None = None
        self._stopped = False
        stop = weakref.WeakMethod(self.stop)
        manager.stopping.append(lambda: (strong := stop()) and strong())
        self._stays = 0.0

    def producer(self, id: str) -> Producer | None:
        """Give the one that works on a job here."""
        return self._producers.get(id)

    def take(self, producer: Producer) -> None:
        """Renew a producer's lease from now on."""
        with self._lock:
            self._producers[producer.id] = producer
        manager = self._manager()
        if manager is not None:
            give_up_at_exit(manager)
        self.watch()

    @contextlib.contextmanager
    def ending(self, producer: Producer | None) -> Iterator[None]:
        """Leave a producer alone while somebody here ends its job."""
        if producer is None:
            yield
            return
        with self._lock:
            producer.ending += 1
        try:
            yield
        finally:
            with self._lock:
                producer.ending -= 1

    def let_go(self, producer: Producer, state: JobState) -> None:
        """Tell a producer that its job is over, and give its lease back."""
        if producer.over is None:
            producer.over = state
        with self._lock:
            if self._producers.get(producer.id) is producer:
                del self._producers[producer.id]
        manager = self._manager()
        if manager is not None:
            with contextlib.suppress(BrokerError):  # Then it ends by itself.
                manager.hold(producer.lease, producer.holder, 0)
        if producer.task is not None and state is not JobState.DONE:
            producer.task.stop()

    def watch(self) -> None:
        """See to everything from now on."""
        self._stays = time.monotonic() + _STAYS_SECONDS
        with self._lock:
            if self._keeper is not None or self._stopped:
                return
            self._keeper = current_runtime().waiter()  # until the keeper has its own
        reference, pid = weakref.ref(self), self.pid

        def keep() -> None:
            waiter = current_runtime().waiter()
            jobs = reference()
            if jobs is not None:
                jobs._keeper = waiter
            while jobs is not None and pid == os.getpid() and jobs._tick():
                seconds = jobs._tick_seconds()
                jobs = None  # nothing that waits keeps an application alive that is otherwise gone
                waiter.wait(seconds)
                jobs = reference()

        current_runtime().spawn(keep, "sse-jobs")

    def stop(self) -> None:
        """Tell the readers of what is worked on here that it will not be finished."""
        if self.pid != os.getpid():
            return
        self._stopped = True
        manager = self._manager()
        if manager is not None:
            with contextlib.suppress(BrokerError):  # Then they fail by themselves, when their leases are over.
                for producer in list(self._producers.values()):
                    logger.error("the job %r has failed: its process ends", producer.id)
                    end_job(manager, producer.id, JobState.FAILED, _LOST)
        keeper = self._keeper
        if keeper is not None:
            keeper.wake()

    def _tick_seconds(self) -> float:
        manager = self._manager()
        return _TICK_SECONDS if manager is None else min(_TICK_SECONDS, manager.settings.job_lease / 3)

    def _tick(self) -> bool:
        """Do what is due; say whether to come back."""
        manager = self._manager()
        if manager is None or self._stopped:
            return False
        try:
            for producer in list(self._producers.values()):
                self._renew(manager, producer)
            self._look_after(manager)
        except BrokerError as error:
            logger.debug("jobs wait: %s", error)
        except Exception:
            logger.exception("the keeper of jobs failed, and goes on")
        with self._lock:
            if self._producers or self._looked or time.monotonic() < self._stays:
                return True
            self._keeper = None  # Who comes from now on begins another one.
        return False

    def _renew(self, manager: PoolManager, producer: Producer) -> None:
        if is_over(manager, producer.id):
            # Whoever ends it here is in the midst of saying so, and lets it go himself.
            if not producer.ending and producer.over is None:
                self.let_go(producer, JobState.CANCELLED)
            return
        now = time.monotonic()
        if producer.unread is not None:
            if manager.count(JobKey.of(producer.id)) or not manager.hold(_read_lease(producer.id), producer.holder, 0):
                producer.read = now
            elif now - producer.read > producer.unread:
                logger.info("the job %r is cancelled: nobody reads it", producer.id)
                end_job(manager, producer.id, JobState.CANCELLED, "")
                return
        if now - producer.renewed < producer.seconds / 3:
            return
        if manager.hold(producer.lease, producer.holder, producer.seconds):
            producer.renewed = now
        else:
            logger.error("the job %r was given up: this process was not heard of for too long", producer.id)
            self.let_go(producer, JobState.FAILED)

    def _look_after(self, manager: PoolManager) -> None:
        """Let jobs fail that have readers here and no producer any more."""
        now, every = time.monotonic(), manager.settings.job_lease / 2
        keys = {shown(key) for key in manager.keys() if is_job(key)}  # noqa: SIM118  it is no mapping
        for id in [id for id in self._looked if id not in keys]:
            del self._looked[id]
        self._heard &= keys
        for id in self._heard:
            say_heard(manager, id)
        for id in keys:
            if now - self._looked.get(id, -every) < every:
                continue
            self._looked[id] = now
            if id not in self._producers:
                self._check(manager, id)

    def _check(self, manager: PoolManager, id: str) -> None:
        messages = manager.look(JobKey.of(id))
        if is_to_be_heard(messages):
            self._heard.add(id)
            say_heard(manager, id)
        # One that is over has been told, and one that waits has no producer that could have gone.
        if state_of(messages, manager.settings.job_ttl) is not JobState.RUNNING or not _was_begun(messages):
            return
        token = secrets.token_hex(8)
        if not manager.hold(_work_lease(id), token, SAY_SECONDS):
            return
        logger.error(
            "the job %r has failed: its producer was not heard of for %g seconds", id, manager.settings.job_lease
        )
        end_job(manager, id, JobState.FAILED, _LOST)
        manager.hold(_work_lease(id), token, 0)


def mark(kind: str, ttl: float) -> Event:
    """Make what says in the log how far a job is, and for how long it is kept; it fires nothing."""
    return Event(id=f"{JOB_MARK}{kind}.{ttl:.0f}.{secrets.token_hex(6)}")


def end_job(manager: PoolManager, id: str, state: JobState, data: Any) -> bool:
    """End a job for its readers, and for its producer if that is here; say whether it had not ended."""
    event = Event(to_text(data, manager.dumps), event=state.value)
    token, lease = secrets.token_hex(8), _end_lease(id)
    keeper = Keeper.of(manager)
    producer = keeper.producer(id)
    with keeper.ending(producer):
        first = manager.hold(lease, token, SAY_SECONDS)
        if first:
            manager.publish(JobKey.of(id), event)
            manager.hold(lease, token, manager.settings.job_ttl)
        if producer is not None:
            keeper.let_go(producer, state if first else JobState.CANCELLED)
    return first


def is_over(manager: PoolManager, id: str) -> bool:
    """Ask the log whether a job has ended."""
    return not manager.hold(_end_lease(id), secrets.token_hex(8), 0)


os.register_at_fork(after_in_child=Keeper.forked)


def state_of(messages: Sequence[Message], longest: float) -> JobState | None:
    """Say how far a job is of which the log has these messages; ``None``: there is none.

    ``longest`` is for how many seconds after the newest any job is kept.
    """
    if not messages:
        return None
    newest = messages[-1]
    marks = [mark for message in messages if (mark := _mark_of(message)) is not None]
    if newest.created < time.monotonic() - min([longest, *(float(mark[2]) for mark in marks)]):
        return None
    if newest.last:
        return next(JobState(name) for name in JOB_ENDS if b"\nevent: %b\n" % name.encode() in newest.frame)
    if len(marks) == len(messages) and all(mark[1] == "wait" for mark in marks):
        return JobState.WAITING
    return JobState.RUNNING


def is_to_be_heard(messages: Sequence[Message]) -> bool:
    """Whether its producer wants to know if it is read."""
    return any((mark := _mark_of(message)) is not None and mark[1].endswith("heard") for message in messages)


def say_heard(manager: PoolManager, id: str) -> None:
    """Tell a job's producer that it is read, for the next moments."""
    # By one name for the readers of all processes: any of them may hold it for longer.
    manager.hold(_read_lease(id), "readers", 3 * _TICK_SECONDS)


def _was_begun(messages: Sequence[Message]) -> bool:
    """Whether it has a producer, or had one; what is only sent to has none."""
    return any((mark := _mark_of(message)) is not None and mark[1] not in ("wait", "join") for message in messages)


def _mark_of(message: Message) -> re.Match[str] | None:
    return _MARK.match(message.id) if message.own_id else None


def _work_lease(id: str) -> str:
    return f"{JobKey.of(id)} work"


def _read_lease(id: str) -> str:
    return f"{JobKey.of(id)} read"


def _end_lease(id: str) -> str:
    return f"{JobKey.of(id)} end"
