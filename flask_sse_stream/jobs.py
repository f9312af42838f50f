"""One piece of work, and the stream that anybody reads it from: from its beginning, from any process, at any time.

A job's events are a key of the log, so they are ordered, kept, replayed and carried like all others. What is added here
is who works on it: a lease in the log, which its producer's process renews. Where it runs out, the producer is gone,
and whoever has readers of the job tells them so.

::

    job = sse.job()                      # a new one; its id is not to be guessed
    job.start(count, 10)                 # count(job, 10) runs beside the request
    sse.job(id).response()               # in the view that reads it

It knows no framework and no server. Everything may be called from any thread or greenlet.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Final

from .errors import BrokerError, EventError, JobClosed
from .event import Event
from .keeper import SAY_SECONDS, JobState, Keeper, Producer, end_job, is_over, is_to_be_heard, mark, say_heard, state_of
from .keys import JOB_ENDS, JobKey
from .pools import PoolManager, check_key
from .transports.base import current_runtime

__all__ = ["Job", "JobState"]

logger: logging.Logger = logging.getLogger("flask_sse_stream")

_MAX_ID: Final = 200
_LONGEST_UNREAD: Final = 86_400
_FAILED: Final = "failed"


class Job:
    """One piece of work by its id. ``sse.job()`` and ``Publisher.job()`` make it; making it asks nobody anything.

    ``id``
        1 to 200 characters. Who knows it may read the job where the application lets him.

    What works on a job is its producer: what :meth:`start` or :meth:`run` runs, or a ``with`` block. It has the job's
    lease, which its process renews. The others only send, read and cancel.

    Events reach readers in the order in which they were sent. The last ``SSE_JOB_EVENTS`` of them are kept, and all of
    them for ``SSE_JOB_TTL`` seconds (or ``ttl``) after the last one.

    ``stop_when_unread``
        for its producer: seconds, about, after which the job is cancelled if nobody reads it in any process; so long
        the first reader, and one who reloads, may take. ``None``: it goes on to its end.
    """

    def __init__(
        self, manager: PoolManager, id: str, ttl: float | None = None, stop_when_unread: float | None = None
    ) -> None:
        if not isinstance(id, str):
            raise EventError(f"the id of a job must be text, not {type(id).__name__}")
        longest = manager.settings.job_ttl
        if ttl is not None and not 1 <= ttl <= longest:
            raise ValueError(f"a job is kept for 1 to SSE_JOB_TTL={longest:g} seconds, not {ttl!r}")
        if stop_when_unread is not None and not 0 < stop_when_unread <= _LONGEST_UNREAD:
            raise ValueError(f"stop_when_unread is 0 to {_LONGEST_UNREAD} seconds, or None, not {stop_when_unread!r}")
        self.id = id
        self._unread = stop_when_unread
        self._manager = manager
        self._ttl = longest if ttl is None else ttl
        self._opened = self._known = False
        self._producer: Producer | None = None

    def __repr__(self) -> str:
        return f"<Job {self.id!r}>"

    @property
    def key(self) -> JobKey:
        """The key of its events in the log."""
        return JobKey.of(self.id)

    # Looking

    @property
    def state(self) -> JobState | None:
        """How far it is, as the log says; ``None`` for one that never was, or is no longer kept.

        Raises :class:`BrokerError`.
        """
        if not self._is_possible():
            return None
        messages = self._manager.look(self.key)
        return state_of(messages, self._manager.settings.job_ttl)

    def _is_possible(self) -> bool:
        # Whatever a request's path may have held.
        try:
            self._check_id()
        except EventError:
            return False
        return True

    def _check_id(self) -> None:
        check_key(self.id, "the id of a job")
        if len(self.id) > _MAX_ID:
            raise EventError(f"the id of a job must have 1 to {_MAX_ID} characters, not {len(self.id)}")

    @property
    def cancelled(self) -> bool:
        """Whether there is no more work to do: somebody cancelled it, or ended it otherwise.

        In its producer it costs nothing to ask, and is true within about a second; elsewhere the log is asked.
        """
        producer = self._producer
        if producer is not None:
            return producer.over is not None
        self._check_id()
        return is_over(self._manager, self.id)

    def follow(self) -> bool:
        """Say whether there is anything to read; if so, see from now on that its readers are not left hanging.

        For what answers requests. Raises :class:`BrokerError`.
        """
        if not self._known and self._is_possible():
            messages = self._manager.look(self.key)
            self._known = state_of(messages, self._manager.settings.job_ttl) is not None
            if is_to_be_heard(messages):
                say_heard(self._manager, self.id)  # at once: the keeper comes to it only after the stream has begun
        if self._known:
            Keeper.of(self._manager).watch()
        return self._known

    # Working

    def open(self) -> bool:
        """Let the job be read from now on, before anybody works on it; say whether it is new.

        So a task that is yet to be queued has a place to be read from, and is queued once. An id may be used again
        ``SSE_JOB_TTL`` seconds after the last event.
        """
        self._check_id()
        lease, token = f"{self.key} open", secrets.token_hex(8)
        if not self._manager.hold(lease, token, SAY_SECONDS):
            return False  # Somebody else is about to.
        try:
            if self.state is not None:
                return False
            self._mark("wait")
        finally:
            self._manager.hold(lease, token, 0)
        return True

    def start(self, work: Callable[..., Any] | Iterable[Any], *args: Any, **kwargs: Any) -> bool:
        """Run ``work`` beside the caller, in a greenlet or a thread, unless somebody has; say whether this call does.

        ``work`` is a function, which is called with this job and the further arguments, or an iterable. Each item of
        an iterable or of a generator that the function gives is sent as an event. What a generator or a function
        returns is the data of ``done``; what it raises makes ``failed``, without telling why; the log has it.
        A generator is closed when the job is cancelled. It runs without the request's context.

        Of all calls for a job, in any process, one runs it, as long as the job is kept.
        """
        _check_work(work, args, kwargs)
        self._check_id()
        producer = self._begin(fresh=True)
        if producer is None:
            _close(work)
            return False

        def beside() -> None:
            try:
                self._work(producer, work, args, kwargs)
            except Exception:
                logger.exception("the job %r failed; its readers are not told why", self.id)

        producer.task = current_runtime().spawn(beside, "sse-job")
        return True

    def run(self, work: Callable[..., Any] | Iterable[Any], *args: Any, **kwargs: Any) -> bool:
        """Do what :meth:`start` does, here: in a task of Celery's, say. Give whether it was done to its end.

        It was not if the job was cancelled meanwhile. What ``work`` raises is raised. Takes up again what another
        producer began, if that one has gone without a word and nobody was told. Raises :class:`JobClosed` if the job
        has ended or another producer has it, before anything is done.
        """
        _check_work(work, args, kwargs)
        self._check_id()
        producer = self._begin(fresh=False)
        return producer is not None and self._work(producer, work, args, kwargs)

    def __enter__(self) -> Job:  # noqa: PYI034  Self is of Python 3.11
        self._check_id()
        self._begin(fresh=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        producer = self._producer
        if producer is None:
            return False
        if error is not None:
            if producer.over is None:
                self._give_up(producer)
                return False
            return isinstance(error, JobClosed)  # It was told to stop, and has.
        try:
            if producer.over is None:
                self.done()
        except BaseException:
            self._give_up(producer)
            raise
        return False

    def send(self, data: Any = None, *, event: str | None = None, retry: int | None = None) -> str:
        """Send an event to every reader, of now and later; return its id.

        ``data`` is text as it is, any other value as JSON, or an :class:`~flask_sse_stream.Event` without an id.
        Anybody may send, not its producer alone. ``done``, ``failed`` and ``cancelled`` are no names for an event.

        Raises :class:`JobClosed` once it is known here that the job has ended, :class:`EventError` for a bad event, and
        :class:`BrokerError` if the broker may not have taken it: whoever gives up then need not end the job, for it
        fails with its lease.
        """
        name, identifier = (data.event, data.id) if isinstance(data, Event) else (event, None)
        if name in JOB_ENDS:
            raise EventError(f"{name!r} ends a job, and is no name for another event: call {name}() or cancel()")
        if identifier is not None:
            raise EventError("an event of a job has the id of its place: leave out its own")
        producer = self._producer
        if producer is not None:
            if producer.over is not None:
                raise JobClosed(self.id, producer.over)
            producer.sent += 1
            if producer.sent % max(1, self._manager.settings.job_events // 2) == 0:
                self._mark("still" + self._kind())  # the marks of its beginning are about to be dropped
        elif not self._opened:
            self._check_id()
            self._mark("join")
        return self._manager.publish(self.key, data, event=event, retry=retry)

    # Ending

    def done(self, data: Any = None) -> bool:
        """End the job well, with the event ``done``; say whether it had not ended. Raises as :meth:`send`."""
        return self._end(JobState.DONE, "" if data is None else data)

    def failed(self, message: str | None = None) -> bool:
        """End the job with the event ``failed``, whose data is ``message``, which readers see."""
        return self._end(JobState.FAILED, _FAILED if message is None else message)

    def cancel(self) -> bool:
        """End the job with the event ``cancelled``, from any process; say whether it had not ended.

        Its readers are told at once. Its producer is within about a second: a generator is closed, under gevent
        wherever it waits, elsewhere when it next yields; ``send`` raises :class:`JobClosed`; :attr:`cancelled` is true.
        An unknown job is left alone.
        """
        if self._producer is None and self.state is None:
            return False
        return self._end(JobState.CANCELLED, "")

    def _end(self, state: JobState, data: Any) -> bool:
        self._check_id()
        return end_job(self._manager, self.id, state, data)

    # The producer

    def _begin(self, *, fresh: bool) -> Producer | None:
        """Take the job's lease and say that it runs; ``fresh``: only if nobody ever did, else ``None``."""
        manager = self._manager
        producer = Producer(self.id, manager.settings.job_lease, self._unread)
        begun = False
        closed: JobClosed | None = None
        if not manager.hold(producer.lease, producer.holder, producer.seconds):
            closed = JobClosed(self.id, JobState.RUNNING)
        else:
            try:
                # Nobody else comes here while the lease is held.
                if is_over(manager, self.id):
                    closed = JobClosed(self.id)
                elif fresh and self.state not in (None, JobState.WAITING):
                    closed = JobClosed(self.id, JobState.RUNNING)
                else:
                    self._mark(self._kind())
                    begun = True
            finally:
                if not begun:
                    with contextlib.suppress(BrokerError):  # Then it ends by itself.
                        manager.hold(producer.lease, producer.holder, 0)
        if closed is not None:
            if fresh:
                return None
            raise closed
        self._producer = producer
        Keeper.of(manager).take(producer)
        return producer

    def _kind(self) -> str:
        return "run" if self._unread is None else "heard"

    def _mark(self, kind: str) -> None:
        """Put a mark into the log, which says how far the job is, and for how long it is kept."""
        self._manager.publish(self.key, mark(kind, self._ttl))
        self._opened = True

    def _work(self, producer: Producer, work: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        try:
            result = work(self, *args, **kwargs) if callable(work) else work
            if not callable(work) or isinstance(result, Iterator):
                result = self._exhaust(result)
            if producer.over is None:
                self.done(result)
        except BaseException as error:
            if producer.over is None:
                self._give_up(producer)
                raise
            if not isinstance(error, Exception):
                raise
            logger.debug("the job %r, which was over already, raised", self.id, exc_info=error)
        return producer.over is JobState.DONE

    def _give_up(self, producer: Producer) -> None:
        try:
            self.failed()
        except BrokerError as error:
            logger.error("the job %r could not say that it failed; its readers are told later: %s", self.id, error)
        if producer.over is None:
            Keeper.of(self._manager).let_go(producer, JobState.FAILED)

    def _exhaust(self, items: Iterable[Any]) -> Any:
        """Send every item; give what a generator returns."""
        iterator = iter(items)
        try:
            while True:
                try:
                    item = next(iterator)
                except StopIteration as stop:
                    return stop.value
                self.send(item)
        finally:
            _close(iterator)


def _check_work(work: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if isinstance(work, (str, bytes, bytearray, Mapping)) or not (callable(work) or isinstance(work, Iterable)):
        raise TypeError(f"the work of a job is a function or an iterable of events, not {type(work).__name__}")
    if not callable(work) and (args or kwargs):
        raise TypeError("arguments are for a function; an iterable has what it needs")


def _close(work: Any) -> None:
    close = getattr(work, "close", None)
    if close is not None and not callable(work):
        close()
