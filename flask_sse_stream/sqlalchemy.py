"""Publishes when a session of SQLAlchemy's has committed, and nothing when it is rolled back.

What is to be published waits in ``session.info``, each event with the transaction or savepoint that it was added in.
A savepoint that is released hands its events to what it is in; a transaction that ends without a commit takes them
along. Everything is sent when the outermost transaction has ended, so no connection of the database waits meanwhile.

It listens to those sessions alone that something was published with. SQLAlchemy is imported here alone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from .errors import BrokerError
from .event import Event
from .pools import PoolManager, check_key
from .publisher import HasManager, manager_of

try:
    from sqlalchemy.event import listen
    from sqlalchemy.orm import Session, SessionTransaction, scoped_session
except ImportError as _error:
    raise ImportError(
        "flask_sse_stream.sqlalchemy needs SQLAlchemy: pip install 'flask-sse-stream[sqlalchemy]'"
    ) from _error

__all__ = ["AfterCommitStats", "OnError", "after_commit_stats", "publish_after_commit", "publish_all_after_commit"]

logger: logging.Logger = logging.getLogger("flask_sse_stream")

OnError = Callable[[Exception, "str | None", Event], object]

_NAME: Final = "flask_sse_stream.after_commit"


class AfterCommitStats(NamedTuple):
    """What has become of the events of this process's sessions.

    ``published``, ``dropped``, ``failed``
        after a commit; with a transaction or savepoint that was rolled back; not published though it was committed.
    ``error``
        why the last one of those failed.
    """

    published: int
    dropped: int
    failed: int
    error: str


def publish_after_commit(
    sse: HasManager | PoolManager,
    session: Session | scoped_session[Any],
    key: str,
    data: Any = None,
    *,
    event: str | None = None,
    id: str | int | None = None,
    retry: int | None = None,
    idempotency_key: str | None = None,
    on_error: OnError | None = None,
) -> None:
    """Send an event to every stream of ``key`` when ``session`` has committed its transaction, and not before.

    ``sse``
        what is to publish: an :class:`~flask_sse_stream.SSE`, a :class:`~flask_sse_stream.Publisher` or a
        :class:`~flask_sse_stream.PoolManager`.
    ``session``
        a session, or one that is scoped to a thread or request, as Flask-SQLAlchemy's ``db.session`` is.
    ``on_error``
        called with the error, the key (``None``: every key) and the event if it cannot be published after the commit.
        It must not use the session, whose ``commit()`` has not returned yet.

    The other arguments are those of :meth:`.PoolManager.publish`. ``data`` is encoded at once, so it does not matter
    what becomes of it. Events go out in the order in which they were added, after the database has committed and its
    connection was let go, before ``commit()`` returns. Those of a savepoint that is rolled back, of a transaction that
    is rolled back or closed, and of a commit that fails are forgotten.

    An event that the broker does not take is logged, counted (:func:`after_commit_stats`) and given to ``on_error``.
    It does not raise: the transaction has been committed. After a :class:`BrokerError` the broker is not asked for the
    rest of that commit's events, which are lost alike.

    Raises, at the call, :class:`EventError` for a bad key or event, :class:`TypeError` for what is no session or
    cannot publish, and :class:`RuntimeError` for a session that has to be told to begin and was not.
    """
    _add(manager_of(sse), session, check_key(key), data, event, id, retry, idempotency_key, on_error)


def publish_all_after_commit(
    sse: HasManager | PoolManager,
    session: Session | scoped_session[Any],
    data: Any = None,
    *,
    event: str | None = None,
    id: str | int | None = None,
    retry: int | None = None,
    idempotency_key: str | None = None,
    on_error: OnError | None = None,
) -> None:
    """Send an event to every stream of every key; as :func:`publish_after_commit` in everything else."""
    _add(manager_of(sse), session, None, data, event, id, retry, idempotency_key, on_error)


def after_commit_stats() -> AfterCommitStats:
    """Say what has become of the events of this process's sessions."""
    with _counts.lock:
        return AfterCommitStats(_counts.published, _counts.dropped, _counts.failed, _counts.error)


class _Counts:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.published = self.dropped = self.failed = 0
        self.error = ""


_counts = _Counts()


class _Waiting(NamedTuple):
    place: SessionTransaction | None  # the savepoint it was added in; of the transaction itself: None
    manager: PoolManager
    key: str | None
    event: Event
    once: str | None
    on_error: OnError | None


class _Outbox:
    """The events of one session."""

    def __init__(self) -> None:
        self.waiting: list[_Waiting] = []
        self.committed: list[_Waiting] = []


def _add(
    manager: PoolManager,
    session: Session | scoped_session[Any],
    key: str | None,
    data: Any,
    event: str | None,
    id: str | int | None,
    retry: int | None,
    once: str | None,
    on_error: OnError | None,
) -> None:
    if once is not None:
        check_key(once, "idempotency_key")
    value = manager.make_event(data, event=event, id=id, retry=retry)
    real = _begun(session)
    outbox = real.info.get(_NAME)
    if outbox is None:
        outbox = real.info[_NAME] = _Outbox()
        listen(real, "after_commit", _after_commit)
        listen(real, "after_transaction_end", _after_transaction_end)
    outbox.waiting.append(_Waiting(real.get_nested_transaction(), manager, key, value, once, on_error))


def _begun(session: Any) -> Session:
    """Give the session itself, in a transaction: what is added to none would wait for one that has no part in it."""
    real = session() if isinstance(session, scoped_session) else session
    if not isinstance(real, Session):
        cure = ""
        if hasattr(session, "session"):
            cure = ": give its .session"
        elif hasattr(session, "sync_session"):
            cure = ": give its .sync_session"
        raise TypeError(f"session must be a Session or scoped_session, not {type(session).__name__}{cure}")
    if not real.in_transaction():
        if not getattr(real, "autobegin", True):
            raise RuntimeError("the session has autobegin=False and is in no transaction: call its begin() first")
        real.begin()
    return real


def _after_commit(session: Session) -> None:
    """Look at what was committed: a savepoint, or all of it."""
    outbox: _Outbox = session.info[_NAME]
    savepoint = session.get_nested_transaction()
    if savepoint is None:
        outbox.committed += outbox.waiting
        outbox.waiting = []
        return
    parent = savepoint.parent
    while parent is not None and not parent.nested:
        parent = parent.parent
    outbox.waiting = [item._replace(place=parent) if item.place is savepoint else item for item in outbox.waiting]


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    """Forget what was not committed; send what was."""
    outbox: _Outbox = session.info[_NAME]
    if transaction.parent is not None:
        if transaction.nested:
            kept = [item for item in outbox.waiting if item.place is not transaction]
            _count(dropped=len(outbox.waiting) - len(kept))
            outbox.waiting = kept
        return
    _count(dropped=len(outbox.waiting))
    committed, outbox.waiting, outbox.committed = outbox.committed, [], []
    _send(committed)


def _send(committed: list[_Waiting]) -> None:
    away: dict[int, Exception] = {}  # of managers, whose broker failed
    for item in committed:
        error = away.get(id(item.manager))
        if error is None:
            try:
                if item.key is None:
                    item.manager.publish_all(item.event, idempotency_key=item.once)
                else:
                    item.manager.publish(item.key, item.event, idempotency_key=item.once)
                _count(published=1)
                continue
            except BrokerError as problem:
                error = away[id(item.manager)] = problem
                logger.error("events of a transaction that was committed are not published: %s", problem)
            except Exception as problem:  # of a receiver of event_published
                error = problem
                logger.exception("an event of a transaction that was committed is not published")
        _count(failed=1, error=str(error))
        if item.on_error is not None:
            try:
                item.on_error(error, item.key, item.event)
            except Exception:
                logger.exception("on_error raised")


def _count(published: int = 0, dropped: int = 0, failed: int = 0, error: str | None = None) -> None:
    with _counts.lock:
        _counts.published += published
        _counts.dropped += dropped
        _counts.failed += failed
        if error is not None:
            _counts.error = error
