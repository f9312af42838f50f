"""Publishing from a process that has no streams: a Celery or RQ task, a cron job, a REPL.

It is a pool manager without pools: no Flask, no gevent, and no thread. Threads may share one, and a forked child may
go on using its parent's.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from types import TracebackType
from typing import Any, Protocol, TypeVar

from .errors import SettingsError
from .jobs import Job
from .pools import PoolManager
from .progress import progress
from .settings import Settings

__all__ = ["HasManager", "Publisher", "manager_of"]

T = TypeVar("T")


class Publisher:
    """Publishes to the streams of other processes, through the log that they share.

    ::

        Publisher("sqlite:////var/lib/app/sse.db").publish("jobs", {"done": 5})

    ``url`` and ``namespace`` are the ``SSE_BROKER_URL`` and ``SSE_NAMESPACE`` of the application that has the
    streams; further keyword arguments are settings too, and those of the history should be the same. Nothing is
    opened before the first publish, and what is open is closed with the object, by :meth:`close`, or at the end of a
    ``with`` block.

    Raises :class:`~flask_sse_stream.SettingsError` for a URL of no broker, and for ``memory://``, which reaches no
    other process.
    """

    def __init__(self, url: str, namespace: str = "sse", **options: Any) -> None:
        settings = Settings.from_mapping({}, broker_url=url, namespace=namespace, **options)
        self._manager = PoolManager(settings)
        if not self._manager.reaches_other_processes:
            raise SettingsError(
                f"{url!r} reaches no other process: name a log that is shared: sqlite:///path or redis://host"
            )

    def publish(
        self,
        key: str,
        data: Any = None,
        *,
        event: str | None = None,
        id: str | int | None = None,
        retry: int | None = None,
        idempotency_key: str | None = None,
    ) -> str:
        """Send an event to every stream of ``key``; return its id. See :meth:`PoolManager.publish`."""
        return self._manager.publish(key, data, event=event, id=id, retry=retry, idempotency_key=idempotency_key)

    def publish_all(
        self,
        data: Any = None,
        *,
        event: str | None = None,
        id: str | int | None = None,
        retry: int | None = None,
        idempotency_key: str | None = None,
    ) -> str:
        """Send an event to every stream of every key; return its id. See :meth:`PoolManager.publish_all`."""
        return self._manager.publish_all(data, event=event, id=id, retry=retry, idempotency_key=idempotency_key)

    def revoke(self, *, user: str | int | None = None, key: str | None = None) -> None:
        """Take the right to listen away, in every process. See :meth:`PoolManager.revoke`."""
        self._manager.revoke(user=user, key=key)

    @property
    def manager(self) -> PoolManager:
        """What publishes: a pool manager, without pools."""
        return self._manager

    def progress(
        self,
        iterable: Iterable[T],
        *,
        key: str,
        total: int | None = None,
        event: str = "progress",
        interval: float = 0.1,
    ) -> Generator[T, None, None]:
        """Give the items of ``iterable``, and publish how many are done; see :func:`.progress.progress`."""
        return progress(self.publish, iterable, key=key, total=total, event=event, interval=interval)

    def lease(self, name: str, seconds: float) -> bool:
        """Let this process have ``name`` for so long, unless another one has it. See :meth:`PoolManager.lease`."""
        return self._manager.lease(name, seconds)

    def job(self, id: str, *, ttl: float | None = None, stop_when_unread: float | None = None) -> Job:
        """Give the job with this id, to work on it, or to cancel it. See :class:`~flask_sse_stream.Job`.

        The application's ``SSE_JOB_EVENTS``, ``SSE_JOB_TTL`` and ``SSE_JOB_LEASE`` should be this object's too. What
        works on a job here has a thread that renews its lease.
        """
        return Job(self._manager, id, ttl, stop_when_unread)

    def close(self) -> None:
        """Let go of the log. May be called twice."""
        self._manager.shutdown()

    def __enter__(self) -> Publisher:  # noqa: PYI034  Self is of Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class HasManager(Protocol):
    """What publishes by a pool manager: an :class:`~flask_sse_stream.SSE`, a :class:`Publisher`."""

    @property
    def manager(self) -> PoolManager:
        """The pool manager."""
        ...


def manager_of(source: HasManager | PoolManager) -> PoolManager:
    """Give the pool manager that something publishes by; :class:`TypeError` for what does not publish."""
    manager = source if isinstance(source, PoolManager) else getattr(source, "manager", None)
    if not isinstance(manager, PoolManager):
        raise TypeError(f"give the SSE, Publisher or PoolManager that is to publish, not {type(source).__name__}")
    return manager
