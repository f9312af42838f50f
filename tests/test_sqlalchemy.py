"""What a transaction has to say is published when it was committed, and never otherwise."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import House
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Engine, ForeignKey, create_engine, event, text
from sqlalchemy.exc import IllegalStateChangeError, IntegrityError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, object_session, scoped_session, sessionmaker

from flask_sse_stream import SSE, BrokerError, Event, EventError, Publisher
from flask_sse_stream.extension import event_published
from flask_sse_stream.sqlalchemy import after_commit_stats, publish_after_commit, publish_all_after_commit


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "author"
    id: Mapped[int] = mapped_column(primary_key=True)


class Book(Base):
    __tablename__ = "book"
    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey("author.id", deferrable=True, initially="DEFERRED"))


def make_engine(path: Path) -> Engine:
    """A database in a file, whose foreign keys are looked at when a transaction is committed."""
    engine = create_engine(f"sqlite:///{path}")

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself, so savepoints work
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    Base.metadata.create_all(engine)
    return engine


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = make_engine(tmp_path / "books.db")
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with Session(engine) as session:
        yield session


class Readers(House):
    """A pool manager and a stream of the key "news", which says what it hears."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.stream = super().open("news")

    def heard(self) -> list[str | None]:
        return self.data(self.stream)

    def say(self, session: Any, data: Any, **options: Any) -> None:
        publish_after_commit(self.manager, session, "news", data, **options)


@pytest.fixture
def readers() -> Iterator[Readers]:
    readers = Readers()
    yield readers
    readers.manager.shutdown()


def test_it_is_published_when_the_session_commits_and_not_before(session: Session, readers: Readers) -> None:
    session.add(Author(id=1))
    readers.say(session, {"author": 1}, event="author", id="a-1", retry=500)
    session.flush()
    assert readers.heard() == []
    session.commit()
    [heard] = readers.events(readers.stream)
    assert (heard.event, heard.data, heard.id, heard.retry) == ("author", '{"author":1}', "a-1", 500)
    session.commit()
    assert readers.heard() == []


def test_who_hears_it_finds_what_was_committed_and_no_connection_is_held(
    engine: Engine, session: Session, readers: Readers
) -> None:
    seen: list[tuple[int, int]] = []

    def look(key: str | None, value: Event) -> None:
        with Session(engine) as other:
            rows = other.query(Author).count()
        seen.append((rows, engine.pool.checkedout()))  # type: ignore[attr-defined]

    readers.manager.hooks.published = look
    session.add(Author(id=1))
    readers.say(session, "1")
    session.commit()
    assert seen == [(1, 0)]


def test_events_come_in_the_order_in_which_they_were_added(session: Session, readers: Readers) -> None:
    readers.say(session, "1")
    publish_all_after_commit(readers.manager, session, "2", event="all")
    with session.begin_nested():
        readers.say(session, "3")
    readers.say(session, "4")
    session.commit()
    assert readers.heard() == ["1", "2", "3", "4"]


@pytest.mark.parametrize("end", [Session.rollback, Session.close, Session.invalidate])
def test_nothing_is_published_without_a_commit(
    end: Callable[[Session], None], session: Session, readers: Readers
) -> None:
    before = after_commit_stats()
    session.add(Author(id=1))
    session.flush()
    readers.say(session, "lost")
    end(session)
    readers.say(session, "of the next transaction")
    session.commit()
    assert readers.heard() == ["of the next transaction"]
    after = after_commit_stats()
    assert (after.dropped - before.dropped, after.published - before.published) == (1, 1)


def test_what_was_said_in_a_session_that_has_done_nothing_yet_goes_with_its_transaction(
    session: Session, readers: Readers
) -> None:
    readers.say(session, "lost")
    session.close()
    session.commit()
    assert readers.heard() == []
    readers.say(session, "kept")
    session.commit()
    assert readers.heard() == ["kept"]


def test_nothing_is_published_if_a_transaction_is_left_by_an_error(session: Session, readers: Readers) -> None:
    with pytest.raises(KeyError), session.begin():
        readers.say(session, "lost")
        raise KeyError("x")
    with session.begin():
        readers.say(session, "kept")
    assert readers.heard() == ["kept"]


def test_nothing_is_published_if_the_flush_fails(engine: Engine, session: Session, readers: Readers) -> None:
    with Session(engine) as other:
        other.add(Author(id=1))
        other.commit()
    session.add(Author(id=1))
    readers.say(session, "lost")
    with pytest.raises(IntegrityError):
        session.commit()
    session.rollback()
    session.commit()
    assert readers.heard() == []


def test_nothing_is_published_if_the_database_refuses_the_commit_itself(session: Session, readers: Readers) -> None:
    session.add(Book(id=1, author_id=99))
    session.flush()  # which the database takes: it looks at the key at the end
    readers.say(session, "lost")
    with pytest.raises(IntegrityError, match="FOREIGN KEY"):
        session.commit()
    session.rollback()
    session.add(Author(id=99))
    readers.say(session, "kept")
    session.commit()
    assert readers.heard() == ["kept"]


def test_nothing_is_published_if_the_database_is_locked_at_the_commit(
    engine: Engine, session: Session, readers: Readers
) -> None:
    session.add(Author(id=1))
    session.flush()
    session.execute(text("PRAGMA busy_timeout=1"))
    readers.say(session, "lost")
    with engine.connect() as other:
        other.execute(text("SELECT * FROM author")).all()
        with pytest.raises(OperationalError, match="locked"):
            session.commit()
        session.close()
    assert readers.heard() == []


# Savepoints


def test_a_savepoint_that_is_rolled_back_takes_its_own_events_along(session: Session, readers: Readers) -> None:
    readers.say(session, "before")
    savepoint = session.begin_nested()
    session.add(Author(id=1))
    readers.say(session, "inside")
    savepoint.rollback()
    readers.say(session, "after")
    session.commit()
    assert readers.heard() == ["before", "after"]


def test_a_savepoint_in_one_that_is_rolled_back_is_forgotten_though_it_was_released(
    session: Session, readers: Readers
) -> None:
    readers.say(session, "1")
    outer = session.begin_nested()
    readers.say(session, "2")
    with session.begin_nested():
        session.add(Author(id=1))
        session.flush()
        readers.say(session, "3")
    readers.say(session, "4")
    outer.rollback()
    with session.begin_nested():
        readers.say(session, "5")
        inner = session.begin_nested()
        readers.say(session, "6")
        inner.rollback()
    session.commit()
    assert readers.heard() == ["1", "5"]


def test_a_transaction_that_is_rolled_back_takes_the_events_of_its_savepoints_along(
    session: Session, readers: Readers
) -> None:
    with session.begin_nested():
        readers.say(session, "released")
    session.begin_nested()
    readers.say(session, "open")
    session.rollback()
    session.commit()
    assert readers.heard() == []


def test_a_commit_releases_the_savepoints_that_are_open(session: Session, readers: Readers) -> None:
    session.begin_nested()
    readers.say(session, "outer")
    session.begin_nested()
    session.add(Author(id=1))
    readers.say(session, "inner")
    session.commit()
    assert readers.heard() == ["outer", "inner"]


def test_a_row_that_fails_in_a_savepoint_is_not_told_of(session: Session, readers: Readers) -> None:
    for number in (1, 1, 2):
        try:
            with session.begin_nested():
                session.add(Author(id=number))
                readers.say(session, f"author {number}")
        except IntegrityError:
            session.expunge_all()
    session.commit()
    assert readers.heard() == ["author 1", "author 2"]


def test_a_mapper_event_may_say_it_in_the_middle_of_a_flush(session: Session, readers: Readers) -> None:
    def inserted(_: Any, __: Any, author: Author) -> None:
        readers.say(object_session(author), f"author {author.id}")

    event.listen(Author, "after_insert", inserted)
    try:
        session.add(Author(id=1))
        with session.begin_nested():
            session.add(Author(id=2))
        savepoint = session.begin_nested()
        session.add(Author(id=3))
        session.flush()
        savepoint.rollback()
        session.add(Author(id=4))
        session.commit()
    finally:
        event.remove(Author, "after_insert", inserted)
    assert readers.heard() == ["author 1", "author 2", "author 4"]


# Two phases


@pytest.mark.parametrize("fails", ["nothing", "prepare", "commit"])
def test_of_two_phases_the_second_one_counts(engine: Engine, readers: Readers, fails: str) -> None:
    dialect = engine.dialect

    def do(name: str, statement: str | None) -> Callable[..., None]:
        def call(connection: Any, *_: Any) -> None:
            if name == fails:
                raise RuntimeError(name)
            if statement is not None:
                connection.exec_driver_sql(statement)

        return call

    # SQLite has one phase; what counts is when a session asks for which.
    for name, statement in {"begin": "BEGIN", "prepare": None, "commit": "COMMIT", "rollback": "ROLLBACK"}.items():
        setattr(dialect, f"do_{name}_twophase", do(name, statement))
    with Session(engine, twophase=True) as session:
        session.add(Author(id=1))
        readers.say(session, "kept")
        if fails == "nothing":
            session.commit()
        else:
            # SQLAlchemy 2.0.16 stumbles when it rolls back what could not be prepared.
            with pytest.raises((RuntimeError, IllegalStateChangeError), match=fails):
                session.commit()
    assert readers.heard() == (["kept"] if fails == "nothing" else [])


# What is wrong


@pytest.mark.parametrize(
    ("key", "options", "message"),
    [
        ("", {"data": "x"}, "key must have 1 to 255 characters"),
        (7, {"data": "x"}, "key must be text"),
        ("news", {"data": "x", "event": "a\nb"}, "event"),
        ("news", {"data": "x", "id": "end"}, "id must not be 'end'"),
        ("news", {}, "nothing to publish"),
        ("news", {"data": float("nan")}, "data"),
        ("news", {"data": "x" * 2**20}, "SSE_MAX_EVENT_BYTES"),
        ("news", {"data": "x", "idempotency_key": ""}, "idempotency_key must have"),
    ],
)
def test_what_is_no_event_is_refused_at_once_and_leaves_the_session_alone(
    key: Any, options: dict[str, Any], message: str, session: Session, readers: Readers
) -> None:
    with pytest.raises(EventError, match=message):
        publish_after_commit(readers.manager, session, key, **options)
    assert not session.in_transaction()
    assert session.info == {}
    readers.say(session, "good")
    session.commit()
    assert readers.heard() == ["good"]


def test_data_is_taken_as_it_is_at_the_call(session: Session, readers: Readers) -> None:
    data = {"stock": 1}
    readers.say(session, data)
    data["stock"] = 2
    session.commit()
    assert readers.heard() == ['{"stock":1}']


def test_what_is_no_session_or_cannot_publish_is_named_with_the_cure(readers: Readers, engine: Engine) -> None:
    class Asynchronous:
        sync_session = None

    for wrong, message in (
        (engine, "must be a Session or scoped_session, not Engine$"),
        (SQLAlchemy(), "not SQLAlchemy: give its .session"),
        (Asynchronous(), "not Asynchronous: give its .sync_session"),
    ):
        with pytest.raises(TypeError, match=message):
            readers.say(wrong, "x")
    with pytest.raises(TypeError, match="give the SSE, Publisher or PoolManager that is to publish, not Flask"):
        publish_after_commit(Flask("x"), Session(engine), "news", "x")  # type: ignore[arg-type]


def test_a_session_that_has_to_be_told_to_begin_is_not_begun(readers: Readers, engine: Engine) -> None:
    with Session(engine, autobegin=False) as session:
        with pytest.raises(RuntimeError, match=r"autobegin=False and is in no transaction: call its begin\(\) first"):
            readers.say(session, "x")
        with session.begin():
            readers.say(session, "kept")
    assert readers.heard() == ["kept"]


# When it cannot be published


class Away(Readers):
    """Readers whose broker fails so often before it works again."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.tries: list[str | None] = []
        publish = self.manager._broker.publish

        def failing(key: str | None, body: bytes, once: str | None = None) -> str:
            self.tries.append(once)
            if len(self.tries) <= times:
                raise BrokerError("the broker is away")
            return publish(key, body, once)

        self.manager._broker.publish = failing  # type: ignore[method-assign]


def test_a_broker_that_fails_makes_no_commit_fail(session: Session, caplog: pytest.LogCaptureFixture) -> None:
    readers = Away(1)
    before = after_commit_stats()
    session.add(Author(id=1))
    lost: list[tuple[str, str | None, str | None]] = []

    def keep(error: Exception, key: str | None, value: Event) -> None:
        lost.append((str(error), key, value.data))

    readers.say(session, "1", on_error=keep, idempotency_key="one")
    publish_all_after_commit(readers.manager, session, "2", on_error=keep)
    readers.say(session, "3")
    session.commit()
    assert readers.tries == ["one"]  # it was not asked for the others, each of which would have taken as long
    assert lost == [("the broker is away", "news", "1"), ("the broker is away", None, "2")]
    after = after_commit_stats()
    assert (after.failed - before.failed, after.published - before.published) == (3, 0)
    assert after.error == "the broker is away"
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.ERROR, "events of a transaction that was committed are not published: the broker is away")
    ]
    assert session.query(Author).count() == 1
    readers.say(session, "4")
    session.commit()
    assert readers.heard() == ["4"]


def test_a_hook_that_fails_concerns_its_own_event_alone(session: Session, caplog: pytest.LogCaptureFixture) -> None:
    app = Flask("app")
    sse = SSE(app)
    readers = Readers()
    readers.manager = app.extensions["sse_stream"]
    stream = readers.open("news")

    def veto(_: Any, key: str | None, event: Event) -> None:
        if event.data == "no":
            raise ValueError("not this one")

    def bad_hook(*_: Any) -> None:
        raise KeyError("on_error is wrong too")

    with event_published.connected_to(veto, app):
        for data in ("yes", "no", "yes again"):
            publish_after_commit(sse, session, "news", data, on_error=bad_hook)
        session.commit()
    assert readers.data(stream) == ["yes", "yes again"]
    assert "not this one" in caplog.text
    assert "on_error is wrong too" in caplog.text
    readers.manager.shutdown()


def test_what_is_committed_is_sent_although_a_hook_of_the_session_raises(session: Session, readers: Readers) -> None:
    readers.say(session, "kept")  # so that its listener is the first

    def raising(_: Session) -> None:
        raise KeyError("of the user's")

    event.listen(session, "after_commit", raising)
    session.add(Author(id=1))
    with pytest.raises(KeyError, match="of the user's"):
        session.commit()
    session.close()
    assert session.query(Author).count() == 1
    assert readers.heard() == ["kept"]


# Sessions of all kinds


def test_a_scoped_session_is_that_of_the_thread(engine: Engine, readers: Readers) -> None:
    scoped = scoped_session(sessionmaker(engine))
    scoped.add(Author(id=1))
    readers.say(scoped, "main")

    def beside() -> None:
        readers.say(scoped, "beside")
        scoped.commit()
        scoped.remove()

    thread = threading.Thread(target=beside)
    thread.start()
    thread.join()
    assert readers.heard() == ["beside"]
    scoped.commit()
    assert readers.heard() == ["main"]
    scoped.remove()


def test_each_session_of_a_maker_with_common_info_has_events_of_its_own(engine: Engine, readers: Readers) -> None:
    make = sessionmaker(engine, info={"tenant": 7})
    with make() as one, make() as two:
        readers.say(one, "one")
        readers.say(two, "two")
        two.commit()
        assert readers.heard() == ["two"]
    assert readers.heard() == []


def test_a_session_may_speak_through_several(session: Session, readers: Readers, tmp_path: Path) -> None:
    other = Readers(broker_url=f"sqlite:///{tmp_path}/log.db")
    with Publisher(other.manager.settings.broker_url) as publisher:
        publish_after_commit(publisher, session, "news", "by the publisher")
        readers.say(session, "by the manager")
        session.commit()
    assert other.heard() == ["by the publisher"]
    assert readers.heard() == ["by the manager"]
    other.manager.shutdown()


def test_nothing_of_a_session_is_kept(engine: Engine, readers: Readers) -> None:
    sessions = []
    for _ in range(3):
        with Session(engine) as session:
            readers.say(session, "x")
            session.commit()
        sessions.append(weakref.ref(session))
        del session
    gc.collect()
    assert [ref() for ref in sessions] == [None, None, None]


def test_sessions_that_say_nothing_are_not_listened_to(engine: Engine, session: Session, readers: Readers) -> None:
    readers.say(session, "x")
    with Session(engine) as other:
        other.add(Author(id=1))
        other.commit()
        assert other.info == {}
        assert len(other.dispatch.after_commit) == 0
    session.rollback()


def test_with_flask_sqlalchemy_a_request_that_fails_says_nothing(tmp_path: Path) -> None:
    class Model(DeclarativeBase):
        pass

    db = SQLAlchemy(model_class=Model)

    class Order(db.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True)

    app = Flask("shop")
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path}/shop.db"
    db.init_app(app)
    sse = SSE(app)
    with app.app_context():
        db.create_all()

    @app.post("/orders/<int:number>")
    def order(number: int) -> tuple[str, int]:
        db.session.add(Order(id=number))
        publish_after_commit(sse, db.session, "news", {"number": number}, event="order")
        if number == 13:
            return "left without a commit", 202
        db.session.commit()
        return "", 204

    readers = Readers()
    readers.manager = app.extensions["sse_stream"]
    stream = readers.open("news")
    client = app.test_client()
    app.testing = False
    assert [client.post(f"/orders/{number}").status_code for number in (1, 13, 1, 2)] == [204, 202, 500, 204]
    assert readers.data(stream) == ['{"number": 1}', '{"number": 2}']
    with app.app_context():
        for engine in db.engines.values():
            engine.dispose()
    readers.manager.shutdown()
