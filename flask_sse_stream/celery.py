"""Publishes what becomes of Celery's tasks: started, progress, succeeded, failed, retried, revoked.

It listens to Celery's signals in the worker, in whichever process sends them: the one that runs a task, or the main one
for what that cannot say any more. Progress has no signal, so ``update_state`` of a chosen task is wrapped when the task
first runs in a process.

Nothing here makes a task fail, or changes what it gives. Celery is imported here alone.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import math
import secrets
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from .errors import BrokerError, EventError
from .event import Event
from .jobs import Job
from .pools import PoolManager, check_key
from .publisher import HasManager, Publisher, manager_of

try:
    from celery import Celery, Task, signals
    from celery.exceptions import SoftTimeLimitExceeded
    from celery.local import Proxy
except ImportError as _error:
    raise ImportError("flask_sse_stream.celery needs Celery: pip install 'flask-sse-stream[celery]'") from _error

__all__ = ["TaskEvent", "TaskEventStats", "TaskEvents", "publish_task_events"]

logger: logging.Logger = logging.getLogger("flask_sse_stream")

INCLUDABLE: Final = ("args", "kwargs", "result", "message")
_LOG_SECONDS: Final = 60.0
_PAUSE_SECONDS: Final = 5.0  # a broker that hangs costs each publish SSE_BROKER_TIMEOUT
# A task that sets one of these by itself, before it raises Ignore, has said how it ended.
_STATES: Final = {"SUCCESS": "succeeded", "FAILURE": "failed", "REVOKED": "revoked", "RETRY": "retried"}
_ENDS: Final = frozenset({"succeeded", "failed", "revoked"})


@dataclass(frozen=True)
class TaskEvent:
    """What has happened to a task, in the words of Celery.

    ``event``
        ``started``, ``progress``, ``succeeded``, ``failed``, ``retried`` or ``revoked``.
    ``task_id``, ``name``, ``state``
        the task's id, its name, and its state in Celery: one of its own, or the custom one of an ``update_state``.
    ``retries``
        how often it has been tried again; ``None`` where that is not known.
    ``args``, ``kwargs``
        what the task was called with.
    ``meta``
        what ``update_state`` was given.
    ``result``
        what the task returned.
    ``exception``
        why it failed or is tried again.
    ``terminated``, ``expired``
        whether a revoked task was at work and was stopped, and whether nobody revoked it but its time ran out.
    """

    event: str
    task_id: str
    name: str
    state: str | None
    retries: int | None = None
    args: Any = ()
    kwargs: Any = None
    meta: Any = None
    result: Any = None
    exception: BaseException | None = None
    terminated: bool = False
    expired: bool = False

    def data(self, include: Collection[str] = ()) -> dict[str, Any]:
        """Give what is published. Nothing of the call, the result or the exception but its type, unless included."""
        data: dict[str, Any] = {"task": self.task_id, "name": self.name, "state": self.state}
        if self.retries is not None:
            data["retries"] = self.retries
        if self.event == "progress":
            data["meta"] = self.meta
        elif self.event in ("failed", "retried"):
            data["error"] = self.error
        elif self.event == "revoked":
            data |= {"terminated": self.terminated, "expired": self.expired}
        for name in ("args", "kwargs"):
            if name in include:
                data[name] = getattr(self, name)
        if "result" in include and self.event == "succeeded":
            data["result"] = self.result
        if "message" in include and self.event in ("failed", "retried"):
            data["message"] = None if self.exception is None else str(self.exception)
        return data

    @property
    def error(self) -> str | None:
        """The name of the exception's type."""
        if self.exception is not None:
            return type(self.exception).__name__
        # As Celery's own backends keep an exception, and as tasks that do so by themselves are told to.
        kind = self.meta.get("exc_type") if isinstance(self.meta, Mapping) else None
        return kind if isinstance(kind, str) else None


class TaskEventStats(NamedTuple):
    """What has become of the events of tasks in this process.

    ``published``, ``failed``, ``left_out``
        taken by the broker, if perhaps as one that it had already; not published, because of an error; progress that
        was not tried, because the broker had just failed.
    ``error``
        what went wrong last.
    """

    published: int
    failed: int
    left_out: int
    error: str


def publish_task_events(
    app: Any,
    publisher: str | HasManager | PoolManager,
    *,
    tasks: Iterable[Any] | None = None,
    to: str | Callable[[TaskEvent], str | Job | None] = "task-{task_id}",
    include: Collection[str] = (),
) -> TaskEvents:
    """Publish what becomes of the tasks of a Celery application, from the worker that runs them.

    ``app``
        the Celery application. Call this in the module that makes it, which the worker imports.
    ``publisher``
        a URL as of ``SSE_BROKER_URL``, a :class:`~flask_sse_stream.Publisher`, or an :class:`~flask_sse_stream.SSE`.
    ``tasks``
        which ones: tasks, their names, or patterns of names (``"reports.*"``). All but Celery's own if left out.
    ``to``
        the key, in which ``{task_id}`` and ``{name}`` are filled in; or a function that is given the
        :class:`TaskEvent` and returns the key, a :class:`~flask_sse_stream.Job`, or ``None`` for what nobody is to be
        told. A job ends with the task: ``succeeded`` is its ``done``, and ``revoked`` its ``cancelled``.
    ``include``
        what else goes out: ``"args"``, ``"kwargs"``, ``"result"``, ``"message"`` (an exception's text). Whoever may
        listen to the key reads it.

    The events' names are those of :class:`TaskEvent`, and their data is what its ``data`` gives, as JSON.

    A task that is delivered again, because its worker died, speaks once: all but progress has an idempotency key, and
    progress has one where it is the same as before. So a task's id is for one task: a second one with the same id and
    name, within ``SSE_IDEMPOTENCY_TTL``, says nothing.

    No task fails, or is held up for long, because nobody can be told: an error is counted, and logged at most once a
    minute. After one of the broker's, progress is left out for five seconds.

    Raises :class:`SettingsError` for a URL that leads to no other process, and :class:`TypeError` or
    :class:`ValueError` for other arguments that make no sense.
    """
    return TaskEvents(app, publisher, tasks, to, include)


class TaskEvents:
    """What :func:`publish_task_events` began."""

    def __init__(
        self,
        app: Any,
        publisher: str | HasManager | PoolManager,
        tasks: Iterable[Any] | None,
        to: str | Callable[[TaskEvent], str | Job | None],
        include: Collection[str],
    ) -> None:
        if not isinstance(app, Celery):
            raise TypeError(f"app must be a Celery application, not {type(app).__name__}")
        if not isinstance(publisher, (str, PoolManager)) and not hasattr(type(publisher), "manager"):
            raise TypeError(f"publisher must be a URL, a Publisher or an SSE, not {type(publisher).__name__}")
        if isinstance(include, str) or not set(include) <= set(INCLUDABLE):
            raise ValueError(f"include must be some of {', '.join(INCLUDABLE)}, in a list, not {include!r}")
        if isinstance(tasks, str):
            raise TypeError(f"tasks must be a list: [{tasks!r}]")
        chosen = None if tasks is None else list(tasks)
        for task in chosen or ():
            # A task that was just defined is a proxy, and to look into it would have the application made too early.
            if not issubclass(type(task), (str, Task, Proxy)):
                raise TypeError(f"tasks must be tasks, names or patterns of names, not {type(task).__name__}")
        if isinstance(to, str):
            try:
                to.format(task_id="", name="")
            except (LookupError, ValueError) as error:
                raise ValueError(f"to may have {{task_id}} and {{name}} filled in, and no other: {to!r}") from error
        elif not callable(to):
            raise TypeError(f"to must be a key or a function, not {type(to).__name__}")
        self._app = app
        self._own: Publisher | None = None
        if isinstance(publisher, str):
            self._own = publisher = Publisher(publisher)
        self._publisher = publisher
        self._tasks = chosen
        self._to = to
        self._include = frozenset(include)
        self._wrapped: weakref.WeakSet[Any] = weakref.WeakSet()
        self._told: dict[str, int] = {}  # of each task that is at work here, how often it told its progress
        self._published = self._failed = self._left_out = 0  # of several threads, one may be missed
        self._error = ""
        self._silent_until = -math.inf
        self._logged = -math.inf
        self._unlogged = 0
        self._receivers = {
            signals.task_prerun: self._prerun,
            signals.task_postrun: self._postrun,
            signals.task_success: self._success,
            signals.task_failure: self._failure,
            signals.task_retry: self._retry,
            signals.task_revoked: self._revoked,
            signals.worker_ready: self._ready,
        }
        # Celery 5.3 takes the same method of two objects for one.
        self._uid = f"flask_sse_stream {secrets.token_hex(8)}"
        for signal, receiver in self._receivers.items():
            signal.connect(receiver, weak=False, dispatch_uid=self._uid)

    def stats(self) -> TaskEventStats:
        """Say what has become of the events in this process."""
        return TaskEventStats(self._published, self._failed, self._left_out, self._error)

    def close(self) -> None:
        """Say nothing more. A publisher that was given as such stays open."""
        if self._own is not None:
            self._own.close()
        for signal, receiver in self._receivers.items():
            signal.disconnect(receiver, dispatch_uid=self._uid)
        self._receivers.clear()

    # What Celery tells

    def _prerun(self, sender: Any, task_id: str, **_: Any) -> None:
        if self._chooses(sender):
            self._wrap(sender)
            self._told[task_id] = 0
            self._tell("started", sender, task_id, "STARTED")

    def _postrun(self, task_id: str, **_: Any) -> None:
        self._told.pop(task_id, None)

    def _success(self, sender: Any, result: Any, **_: Any) -> None:
        if self._chooses(sender):
            self._tell("succeeded", sender, sender.request.id, "SUCCESS", result=result)

    def _failure(self, sender: Any, task_id: str, exception: Any, args: Any, kwargs: Any, **_: Any) -> None:
        if self._chooses(sender):
            self._tell("failed", sender, task_id, "FAILURE", exception=exception, args=args, kwargs=kwargs)

    def _retry(self, sender: Any, request: Any, reason: Any = None, **_: Any) -> None:
        if self._chooses(sender):
            # The exception that is the reason, where there was one, and not the one by which Celery is told to retry.
            self._tell("retried", sender, request.id, "RETRY", request, exception=getattr(reason, "exc", None))

    def _revoked(self, sender: Any, request: Any, terminated: Any, expired: Any, **_: Any) -> None:
        if self._chooses(sender):
            how = {"terminated": bool(terminated), "expired": bool(expired)}
            self._tell("revoked", sender, request.id, "REVOKED", request, **how)

    def _ready(self, **_: Any) -> None:
        """Tell the operator what would go wrong without a word."""
        if not manager_of(self._publisher).reaches_other_processes:
            logger.warning("what becomes of tasks is published into memory:// and reaches no stream of another process")
        for name in self._names():
            if not fnmatch.filter(self._app.tasks, name):
                logger.warning("what becomes of %r is to be published, but this worker has no such task", name)

    def _names(self) -> list[str]:
        return [task if isinstance(task, str) else task.name for task in self._tasks or ()]

    def _chooses(self, task: Any) -> bool:
        # The proxy of an application is not the application.
        app = self._app._get_current_object() if issubclass(type(self._app), Proxy) else self._app
        if getattr(task, "app", None) is not app:
            return False
        if self._tasks is None:
            return not task.name.startswith("celery.")
        return any(fnmatch.fnmatchcase(task.name, name) for name in self._names())

    def _wrap(self, task: Any) -> None:
        if task in self._wrapped:
            return
        self._wrapped.add(task)
        update_state = task.update_state
        events = weakref.ref(self)

        def update_state_and_tell(*args: Any, **kwargs: Any) -> Any:
            done = update_state(*args, **kwargs)
            self = events()
            if self is not None and self._receivers:
                given = dict(zip(("task_id", "state", "meta"), args, strict=False)) | kwargs
                task_id = given.get("task_id") or task.request.id
                state = given.get("state")
                self._tell(_STATES.get(str(state), "progress"), task, task_id, state, meta=given.get("meta"))
            return done

        task.update_state = update_state_and_tell

    # Telling it

    def _tell(self, event: str, task: Any, task_id: str, state: str | None, request: Any = None, **more: Any) -> None:
        try:
            if event == "progress" and time.monotonic() < self._silent_until:
                self._left_out += 1
                return
            request = task.request if request is None else request
            if request.id == task_id:
                more = {"args": request.args, "kwargs": request.kwargs, "retries": request.retries or 0, **more}
            value = TaskEvent(event, task_id, task.name, state, **more)
            key = self._to(value) if callable(self._to) else self._to.format(task_id=task_id, name=task.name)
            if isinstance(key, Job):
                self._work_on(key, value)
            elif key is not None:
                self._publish(check_key(key), value)
        except SoftTimeLimitExceeded:
            raise  # it is meant for the task, which happened to be here
        except Exception as error:
            self._fail(error, f"nobody is told that the task {task_id} of {task.name} is {event!r}")

    def _publish(self, key: str, value: TaskEvent) -> None:
        once = self._once(key, value)
        event = self._event(value)
        manager_of(self._publisher).publish(key, event, idempotency_key=once)
        self._published += 1

    def _work_on(self, job: Job, value: TaskEvent) -> None:
        if value.event == "started":
            job.open()  # unless whoever queued the task has
        if value.event == "succeeded":
            job.done(self._event(value).data)
        elif value.event == "failed":
            job.failed(self._event(value).data)
        elif value.event == "revoked":
            job.cancel()
        elif job.cancelled:
            self._left_out += 1  # it is over for its readers
            return
        else:
            self._publish(job.key, value)
            return
        self._published += 1

    def _event(self, value: TaskEvent) -> Event:
        make = manager_of(self._publisher).make_event
        try:
            return make(value.data(self._include), event=value.event)
        except SoftTimeLimitExceeded:
            raise
        except Exception as error:
            # What the task itself said is too large, no JSON, or an exception without a text. That it has ended has
            # to be told all the same.
            self._fail(error, f"what the task {value.task_id} of {value.name} says of itself is left out")
            plain = {name: item for name, item in value.data().items() if name != "meta"}
            return make(plain, event=value.event)

    def _once(self, key: str, value: TaskEvent) -> str | None:
        """Name what a task that runs again would say again."""
        what: object = None
        if value.event == "progress":
            number = self._told.get(value.task_id)
            if number is None:
                return None  # of a task that is at work elsewhere
            self._told[value.task_id] = number + 1
            # The number, because a task may say the same again, and what it said, because it need not.
            what = (value.retries, number, value.state, value.meta)
        elif value.event not in _ENDS:
            what = value.retries
        name = repr((key, value.task_id, value.name, value.event, what))
        return "task " + hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:40]

    def _fail(self, error: Exception, what: str) -> None:
        self._failed += 1
        self._error = str(error) or type(error).__name__
        self._unlogged += 1
        now = time.monotonic()
        if isinstance(error, BrokerError):
            self._silent_until = now + _PAUSE_SECONDS
        if now >= self._logged + _LOG_SECONDS:
            more = f" ({self._unlogged - 1} more since the last such line)" if self._unlogged > 1 else ""
            expected = isinstance(error, (BrokerError, EventError))
            logger.error("%s%s: %s", what, more, self._error, exc_info=None if expected else error)
            self._logged, self._unlogged = now, 0
