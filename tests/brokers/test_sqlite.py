"""The SQLite broker keeps the contract, across processes, restarts and what happens to files."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import House
from hypothesis import settings as hypothesis_settings
from support import ROOT, wait_for

from flask_sse_stream import Job, JobClosed, JobState, Publisher
from flask_sse_stream.brokers.base import Broker, Delivery, Gap, History, Position, broker_from_url
from flask_sse_stream.brokers.sqlite import SQLiteBroker
from flask_sse_stream.errors import BrokerError, SettingsError
from flask_sse_stream.event import Message
from flask_sse_stream.keys import JobKey
from flask_sse_stream.settings import Settings
from flask_sse_stream.stream import CloseReason
from flask_sse_stream.testing.contracts.broker import BrokerContract, body, place
from flask_sse_stream.testing.contracts.jobs import JobContract
from flask_sse_stream.testing.contracts.replay import OutsideReplayMachine


class TestSQLiteBroker(BrokerContract):
    @pytest.fixture(autouse=True)
    def _file(self, tmp_path: Path) -> None:
        self.url = f"sqlite:///{tmp_path}/log.db"

    def settings(self, **options: Any) -> Settings:
        return Settings(broker_url=self.url, **options)

    def make(self, settings: Settings) -> Broker:
        return broker_from_url(settings)


class TestJobsOverSQLite(JobContract):
    @pytest.fixture(autouse=True)
    def _file(self, tmp_path: Path) -> None:
        self.url = f"sqlite:///{tmp_path}/log.db"

    def house(self, **options: object) -> House:
        return House(broker_url=self.url, **options)

    def test_a_process_without_streams_works_on_a_job_and_hears_that_it_is_cancelled(self) -> None:
        house, _ = self.two()
        job = Job(house.manager, "work")
        assert job.open()
        stream = house.open(JobKey.of("work"))
        with Publisher(self.url) as publisher:
            assert publisher.job("work").run(["one", "two"])
            with pytest.raises(JobClosed, match="is over"):
                publisher.job("work").run(["again"])
            assert self.read(house, stream, "") == [(None, "one"), (None, "two"), ("done", "")]
            with publisher.job("another") as other:
                assert Job(house.manager, "another").cancel()
                wait_for(lambda: other.cancelled, "it hears of it")
            unended = publisher.job("never ended")
            unended._begin(fresh=False)
        assert Job(house.manager, "never ended").state is JobState.FAILED

    def test_a_job_that_nobody_reads_any_more_is_stopped_if_it_is_to_be(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("flask_sse_stream.keeper._TICK_SECONDS", 0.3)
        here, there = self.two()
        stopped = threading.Event()

        def tick() -> Iterator[str]:
            try:
                while True:
                    yield "tick"
                    stopped.wait(0.05)
            finally:
                stopped.set()

        assert Job(here.manager, "work", stop_when_unread=1.5).start(tick())
        stream = there.open(JobKey.of("work"))
        assert Job(there.manager, "work").follow()
        began = time.monotonic()
        wait_for(lambda: stopped.is_set() or time.monotonic() > began + 2.5, "it goes on while it is read")
        assert not stopped.is_set()
        stream.close(CloseReason.PEER)
        wait_for(stopped.is_set, "it is stopped")
        assert Job(there.manager, "work").state is JobState.CANCELLED

    def test_jobs_that_said_nothing_for_long_are_deleted_and_others_are_not(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        house, _ = self.two(job_ttl=600)
        for id in ("old", "older"):
            Job(house.manager, id).send("x")
        now = time.monotonic()
        monkeypatch.setattr("flask_sse_stream.brokers.sqlite._machine_time", lambda: now + 700)
        monkeypatch.setattr("flask_sse_stream.brokers.sqlite.random.random", lambda: 0.0)
        Job(house.manager, "young").send("y")
        house.manager.publish("k", "z")
        with contextlib.closing(sqlite3.connect(tmp_path / "log.db")) as connection:
            assert {key for (key,) in connection.execute("SELECT key FROM job_event")} == {JobKey.of("young")}
            assert {key for (key,) in connection.execute("SELECT key FROM job")} == {JobKey.of("young")}


class Log:
    """One database, and brokers as several processes would have them."""

    def __init__(self, path: Path) -> None:
        self.path = path / "log.db"
        self.brokers: list[SQLiteBroker] = []

    def broker(self, **options: Any) -> tuple[SQLiteBroker, list[Delivery]]:
        broker = SQLiteBroker(Settings(broker_url=f"sqlite:///{self.path}", **options))
        self.brokers.append(broker)
        delivered: list[Delivery] = []
        broker.start(delivered.append)
        return broker, delivered


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    log = Log(tmp_path)
    yield log
    for broker in log.brokers:
        broker.close()


def ids(delivered: list[Delivery]) -> list[str]:
    return [item.id if isinstance(item, Message) else "gap" for item in delivered if not isinstance(item, History)]


def fetch(
    broker: SQLiteBroker, delivered: list[Delivery], key: str, after: str | None = None
) -> tuple[Position, History]:
    position = broker.cover([key], [key], after)
    [history] = [item for item in delivered if isinstance(item, History) and item.key == key][-1:]
    return position, history


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///", "sqlite://log.db", "sqlite:///dir/"])
def test_a_url_without_a_file_is_refused_with_the_cure(url: str) -> None:
    with pytest.raises(SettingsError, match="names no file: write sqlite:///relative.db"):
        broker_from_url(Settings(broker_url=url))


def test_nothing_is_opened_before_it_is_used(log: Log) -> None:
    log.broker()
    assert list(log.path.parent.iterdir()) == []


def test_publishing_alone_starts_no_thread(log: Log) -> None:
    before = threading.active_count()
    broker, _ = log.broker()
    broker.publish("a", body("x"))
    assert threading.active_count() == before


def test_an_event_reaches_every_listener_once_whoever_published_it(log: Log) -> None:
    (one, to_one), (two, to_two), (publisher, _) = log.broker(), log.broker(), log.broker()
    one.cover([], [], None), two.cover([], [], None)
    published = [broker.publish("a", body("x")) for broker in (one, two, publisher) * 20]
    for delivered in (to_one, to_two):
        wait_for(lambda delivered=delivered: len(delivered) >= 60, "all are delivered")  # type: ignore[misc]
        assert ids(delivered) == published


def test_namespaces_of_one_file_know_nothing_of_each_other(log: Log) -> None:
    (one, to_one), (other, to_other) = log.broker(namespace="one"), log.broker(namespace="other")
    one.cover([], [], None), other.cover([], [], None)
    first, second = one.publish("a", body("x")), other.publish("a", body("y"))
    wait_for(lambda: to_one and to_other, "both are delivered")
    assert (ids(to_one), ids(to_other)) == ([first], [second])
    assert place(first)[0] != place(second)[0]


def test_the_log_survives_the_end_of_every_process(log: Log) -> None:
    broker, _ = log.broker()
    published = [broker.publish("a", body(str(number))) for number in range(3)]
    broker.close()
    again, delivered = log.broker()
    position, history = fetch(again, delivered, "a", published[0])
    assert [message.id for message in history.messages] == published
    assert place(again.publish("a", body("x"))) == (position.epoch, position.head + 1)


def test_after_the_machine_was_started_anew_the_log_has_another_life(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    broker, _ = log.broker()
    old = broker.publish("a", body("x"))
    broker.close()
    monkeypatch.setattr("flask_sse_stream.brokers.sqlite._boot_id", lambda: "another boot")
    again, delivered = log.broker()
    new = again.publish("a", body("y"))
    assert place(new)[0] != place(old)[0]
    assert [message.id for message in fetch(again, delivered, "a")[1].messages] == [new]


def test_a_database_that_was_deleted_is_a_new_log_and_listeners_learn_it(log: Log) -> None:
    (listener, delivered), (publisher, _) = log.broker(), log.broker()
    listener.cover([], [], None)
    old = publisher.publish("a", body("x"))
    wait_for(lambda: delivered, "it is delivered")
    for path in log.path.parent.glob("log.db*"):
        if path.is_file():
            path.unlink()
    new = publisher.publish("a", body("y"))
    wait_for(lambda: len(delivered) == 2, "it is delivered")
    assert (ids(delivered), place(new)[1]) == ([old, new], 1)
    assert place(old)[0] != place(new)[0]


def test_what_a_listener_could_not_read_before_it_was_trimmed_is_told_as_a_gap(log: Log) -> None:
    (listener, delivered), (publisher, _) = log.broker(history_size=5), log.broker(history_size=5)
    listener.cover([], [], None)
    assert listener._listener is not None
    listener._listener._read = lambda broker: False  # type: ignore[method-assign]  # it is being held up
    for number in range(1200):
        publisher.publish("a" if number % 2 else "b", body(str(number)))
    with publisher._transaction() as connection:
        publisher._trim(connection, "a")
    del listener._listener._read  # type: ignore[attr-defined]
    last = publisher.publish("c", body("end"))
    wait_for(lambda: ids(delivered)[-1:] == [last], "the end is delivered")
    gaps = [item for item in delivered if isinstance(item, Gap)]
    assert "a" in {gap.key for gap in gaps}
    assert len(gaps) == len({gap.key for gap in gaps})
    for key in ("a", "b"):
        at = next((index for index, item in enumerate(delivered) if isinstance(item, Gap) and item.key == key), 0)
        floor = max((gap.seq for gap in gaps if gap.key == key), default=0)
        mine = [item.seq for item in delivered[at:] if isinstance(item, Message) and item.key == key]
        assert mine == [seq for seq in range(1, 1201) if (seq % 2 == 0) == (key == "a") and seq > floor]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("body", "'data: text'"),
        ("body", "x'ff'"),
        ("body", "CAST('data: x' || char(10) || char(10) || 'data: forged' || char(10) || char(10) AS BLOB)"),
        ("body", "zeroblob(2000000)"),
        ("created", "'yesterday'"),
        ("key", "x'ff'"),
        ("seq", "'seven'"),
        ("seq", "3"),
        ("seq", "x'07'"),
    ],
)
def test_a_row_that_is_no_event_is_left_out_and_the_listener_goes_on(column: str, value: str, log: Log) -> None:
    broker, delivered = log.broker()
    broker.cover([], [], None)
    first = broker.publish("a", body("x"))
    wait_for(lambda: delivered, "it is delivered")
    row = {"namespace": "'sse'", "seq": "2", "key": "'a'", "created": "0", "body": "x''", column: value}
    with contextlib.closing(sqlite3.connect(log.path)) as connection, connection:
        connection.execute(f"INSERT INTO event VALUES ({', '.join(row.values())})")
        connection.execute("UPDATE log SET head = 2")
    last = broker.publish("a", body("y"))
    wait_for(lambda: len(delivered) == 2, "the next one is delivered")
    assert ids(delivered) == [first, last]
    assert broker.stats().skipped == (row["seq"] == "2")
    assert place(last)[1] == 3
    assert {message.id for message in fetch(broker, delivered, "a")[1].messages} <= {first, last}


@pytest.mark.parametrize(
    ("column", "value"), [("epoch", "'a' || char(10) || 'b'"), ("epoch", "x'ff'"), ("head", "'x'")]
)
def test_a_log_that_somebody_else_has_written_to_is_a_new_one(column: str, value: str, log: Log) -> None:
    broker, delivered = log.broker()
    broker.cover([], [], None)
    old = broker.publish("a", body("x"))
    wait_for(lambda: delivered, "it is delivered")
    with contextlib.closing(sqlite3.connect(log.path)) as connection, connection:
        connection.execute(f"UPDATE log SET {column} = {value}")
    new = broker.publish("a", body("y"))
    wait_for(lambda: len(delivered) == 2, "the next one is delivered")
    assert place(new)[1] == 1
    assert place(new)[0] != place(old)[0]


def test_the_file_does_not_grow_without_end(log: Log) -> None:
    broker, _ = log.broker(history_size=5)
    for number in range(4000):
        broker.publish("a", body(str(number)))
    with broker._reading() as connection:
        (rows,) = connection.execute("SELECT COUNT(*) FROM event").fetchone()
    assert rows < 1500


def test_events_that_are_too_old_are_not_remembered(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    broker, delivered = log.broker(history_ttl=100.0)
    old = broker.publish("a", body("x"))
    now = time.monotonic()
    monkeypatch.setattr("flask_sse_stream.brokers.sqlite._machine_time", lambda: now + 150)
    new = broker.publish("a", body("y"))
    history = fetch(broker, delivered, "a", old)[1]
    assert (history.floor, [message.id for message in history.messages]) == (place(old)[1], [new])


def test_what_another_process_has_seen_is_delivered_before_cover_returns(log: Log) -> None:
    (listener, delivered), (publisher, _) = log.broker(), log.broker()
    listener.cover([], [], None)
    for number in range(300):
        identifier = publisher.publish("a", body(str(number)))
        assert listener.cover(["a"], [], identifier) == place(identifier)
        assert ids(delivered)[-1] == identifier


def test_an_older_copy_that_is_put_back_is_a_new_log_and_listeners_learn_it(log: Log, tmp_path: Path) -> None:
    publisher, _ = log.broker()
    publisher.publish("a", body("1"))
    publisher.close()  # what is in the -wal file is in the database now
    copy = tmp_path / "copy"
    copy.write_bytes(log.path.read_bytes())
    (listener, delivered), (publisher, _) = log.broker(), log.broker()
    listener.cover([], [], None)
    old = [publisher.publish("a", body("2")), publisher.publish("a", body("3"))]
    wait_for(lambda: ids(delivered) == old, "they are delivered")
    for path in log.path.parent.glob("log.db*"):
        if path.is_file():
            path.unlink()
    copy.rename(log.path)
    wait_for(lambda: listener.cover([], [], None).epoch != place(old[0])[0], "the log has another life")
    new = publisher.publish("a", body("4"))
    wait_for(lambda: ids(delivered)[-1] == new, "it is delivered")
    assert place(new)[0] != place(old[0])[0]


def test_a_wake_directory_that_was_removed_is_made_again(log: Log) -> None:
    (listener, delivered), (publisher, _) = log.broker(), log.broker()
    listener.cover([], [], None)
    wake = Path(f"{log.path}.wake")
    [own] = wake.iterdir()
    shutil.rmtree(wake)
    last = publisher.publish("a", body("x"))
    wait_for(lambda: ids(delivered)[-1:] == [last], "it is delivered all the same")
    wait_for(own.exists, "the socket is there again")


def test_a_process_without_descriptors_neither_wipes_the_log_nor_denies_what_it_published(log: Log) -> None:
    (listener, delivered), (publisher, _) = log.broker(), log.broker()
    listener.cover([], [], None)
    first = publisher.publish("a", body("x"))
    wait_for(lambda: len(delivered) == 1, "it is delivered")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    hogs = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                hogs.append(os.open(os.devnull, os.O_RDONLY))
        second = publisher.publish("a", body("y"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for hog in hogs:
            os.close(hog)
    wait_for(lambda: ids(delivered) == [first, second], "it is delivered when the listener looks by itself")


def test_very_many_keys_have_one_floor_together(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flask_sse_stream.brokers.sqlite._FLOORS", 5)
    monkeypatch.setattr("flask_sse_stream.brokers.sqlite._TRIM_EVERY", 1)
    broker, delivered = log.broker(history_ttl=100.0)
    now = time.monotonic()
    published = [broker.publish(f"job {number}", body("x")) for number in range(20)]
    monkeypatch.setattr("flask_sse_stream.brokers.sqlite._machine_time", lambda: now + 150)
    broker.publish("k", body("x"))
    with broker._reading() as connection:
        (floors,) = connection.execute("SELECT COUNT(*) FROM floor").fetchone()
    assert floors == 5
    for number in (0, 19):
        history = fetch(broker, delivered, f"job {number}", published[0])[1]
        assert history.floor >= place(published[number])[1]


# Processes


PUBLISHER = """
import sys
from flask_sse_stream import Settings
from flask_sse_stream.brokers.sqlite import SQLiteBroker
broker = SQLiteBroker(Settings(broker_url=sys.argv[1]))
broker.start(print)
print("ready", flush=True)
for number in range(int(sys.argv[2])):
    print(broker.publish("a", b"data: %d\\n\\n" % number), flush=True)
broker.close()
"""


def process(log: Log, code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), f"sqlite:///{log.path}", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.live
def test_several_processes_publish_at_once_and_nothing_is_lost_doubled_or_out_of_order(log: Log) -> None:
    broker, delivered = log.broker()
    broker.cover([], [], None)
    processes = [process(log, PUBLISHER, "200") for _ in range(3)]
    published = [child.communicate(timeout=60)[0].split()[1:] for child in processes]
    wait_for(lambda: len(delivered) == 600, "all are delivered")
    assert sorted(ids(delivered), key=lambda identifier: place(identifier)[1]) == ids(delivered)
    assert set(ids(delivered)) == {identifier for own in published for identifier in own}


@pytest.mark.live
def test_a_process_that_is_killed_leaves_no_debris_that_matters(log: Log) -> None:
    (listener, delivered) = log.broker()
    listener.cover([], [], None)
    listening = """
        import sys, time
        from flask_sse_stream import Settings
        from flask_sse_stream.brokers.sqlite import SQLiteBroker
        broker = SQLiteBroker(Settings(broker_url=sys.argv[1]))
        broker.start(lambda message: None)
        broker.cover([], [], None)
        print("ready", flush=True)
        while True:
            broker.publish("a", b"data: x\\n\\n")
    """
    child = process(log, listening)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    wait_for(lambda: len(delivered) > 20, "it publishes")
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=10)
    last = listener.publish("a", body("after"))
    wait_for(lambda: ids(delivered)[-1] == last, "the log goes on")
    assert [place(identifier)[1] for identifier in ids(delivered)] == list(range(1, len(delivered) + 1))
    wake = Path(f"{log.path}.wake")
    assert len(list(wake.iterdir())) == 1, "its socket is gone"
    listener.close()
    assert list(wake.iterdir()) == []


def test_a_forked_child_shares_no_connection_with_its_parent(log: Log) -> None:
    house = House(broker_url=f"sqlite:///{log.path}")
    first = house.manager.publish("k", "parent")
    pid = os.fork()
    if pid == 0:  # the child: nothing of the test runner may run in it
        ok = False
        try:
            ok = place(house.manager.publish("k", "child")) == (place(first)[0], 2)
        finally:
            os._exit(0 if ok else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert place(house.manager.publish("k", "parent again"))[1] == 3
    house.manager.shutdown()


# What happens to files


def test_a_database_that_is_locked_is_a_broker_error_within_the_timeout(log: Log) -> None:
    broker, _ = log.broker(broker_timeout=0.2)
    broker.publish("a", body("x"))
    holder = sqlite3.connect(log.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(BrokerError, match="locked; another process holds it .* SSE_BROKER_TIMEOUT"):
            broker.publish("a", body("y"))
    finally:
        holder.execute("ROLLBACK")
        holder.close()
    assert place(broker.publish("a", body("z")))[1] == 2, "the failed one made no event"


def test_a_directory_that_is_missing_is_a_broker_error_with_the_cure(tmp_path: Path) -> None:
    broker = SQLiteBroker(Settings(broker_url=f"sqlite:///{tmp_path}/missing/log.db"))
    broker.start(lambda message: None)
    with pytest.raises(BrokerError, match="unable to open .*; make its directory"):
        broker.publish("a", body("x"))


def test_a_file_that_is_no_database_is_a_broker_error_with_the_cure(log: Log) -> None:
    log.path.write_text("some text that is long enough to be taken for a header of a file " * 20)
    broker, _ = log.broker()
    with pytest.raises(BrokerError, match="not a database; delete the file, or name another"):
        broker.publish("a", body("x"))


def test_a_database_of_another_application_is_left_alone(log: Log) -> None:
    with sqlite3.connect(log.path) as other:
        other.execute("CREATE TABLE mine (x)")
    other.close()
    broker, _ = log.broker()
    with pytest.raises(BrokerError, match="another application's database"):
        broker.publish("a", body("x"))


def test_a_file_that_another_process_makes_meanwhile_is_not_taken_for_another_applications(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = []

    def make() -> None:
        other, _ = log.broker()
        other.publish("a", body("from another process"))

    class Interrupted(sqlite3.Connection):
        def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
            if "sqlite_master" in statement and not others:
                monkeypatch.undo()
                others.append(threading.Thread(target=make))
                others[0].start()
                others[0].join(0.5)  # it may have to wait for this one
            return super().execute(statement, *arguments)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *some, **more: connect(*some, factory=Interrupted, **more))
    broker, _ = log.broker()
    assert place(broker.publish("a", body("x")))[1] in (1, 2)
    others[0].join(20)
    assert place(broker.publish("a", body("y")))[1] == 3


def test_a_database_of_another_format_is_refused(log: Log) -> None:
    broker, _ = log.broker()
    broker.publish("a", body("x"))
    with broker._connection(time.monotonic() + 5) as connection:
        connection.execute("PRAGMA user_version=99")
    broker.close()
    with pytest.raises(BrokerError, match="has format 99, not 4"):
        log.broker()[0].publish("a", body("x"))


def test_a_broken_database_is_a_broker_error_and_deleting_it_is_the_cure(log: Log) -> None:
    broker, _ = log.broker()
    broker.publish("a", body("x" * 5000))
    broker.close()
    with log.path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 8192)
    second, _ = log.broker()
    with pytest.raises(BrokerError, match=r"malformed; delete the file"):
        for _ in range(5):
            second.publish("a", body("x"))
    for path in log.path.parent.glob("log.db*"):
        if path.is_file():
            path.unlink()
    assert second.publish("a", body("x"))


def test_a_full_disk_is_a_broker_error_and_nothing_is_published(log: Log) -> None:
    broker, _ = log.broker()
    first = broker.publish("a", body("x"))
    inode, connection = broker._free[0]
    connection.execute("PRAGMA max_page_count=12")
    with pytest.raises(BrokerError, match="full; make room"):
        broker.publish("a", body("x" * 500_000))
    assert place(broker.publish("a", body("y")))[1] == place(first)[1] + 1


def test_a_closed_broker_says_so(log: Log) -> None:
    broker, _ = log.broker()
    broker.close()
    with pytest.raises(BrokerError, match="is closed"):
        broker.publish("a", body("x"))


def test_a_listener_that_cannot_read_says_so_once_and_goes_on_when_it_can(
    log: Log, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, delivered = log.broker()
    broker.cover([], [], None)
    reading = broker.read_after
    looks: list[int] = []

    def fail(seq: int) -> Any:
        looks.append(seq)
        raise BrokerError("the disk is on fire")

    monkeypatch.setattr(broker, "read_after", fail)
    identifiers = []
    while len(looks) < 3:
        identifiers.append(broker.publish("a", body("x")))
        wanted = len(looks) + 1
        wait_for(lambda wanted=wanted: len(looks) >= wanted, "it looks")  # type: ignore[misc]
    monkeypatch.setattr(broker, "read_after", reading)
    identifiers.append(broker.publish("a", body("y")))
    wait_for(lambda: len(delivered) == len(identifiers), "all are delivered")
    assert ids(delivered) == identifiers
    assert caplog.text.count("live events wait") == 1
    assert caplog.text.count("can be read again") == 1


def test_a_deep_directory_is_no_hindrance(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    log = Log(deep)
    broker, delivered = log.broker()
    broker.cover([], [], None)
    broker.publish("a", body("x"))
    wait_for(lambda: delivered, "it is delivered")
    broker.close()


# Every client against a model


class SQLiteReplayMachine(OutsideReplayMachine):
    def make_house(self) -> House:
        if not hasattr(self, "directory"):
            self.directory = tempfile.TemporaryDirectory()
        return House(broker_url=f"sqlite:///{self.directory.name}/log.db", history_size=4, queue_events=6)

    def teardown(self) -> None:
        super().teardown()
        self.directory.cleanup()


TestReplay = SQLiteReplayMachine.TestCase
TestReplay.settings = hypothesis_settings(max_examples=30, stateful_step_count=30, deadline=None)
