"""Jobs: work that any number of readers follow from its beginning, and that ends once, whatever becomes of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest
from fakes import Clock, House, RecordingTransport
from flask import Flask, abort, request
from flask.testing import FlaskClient
from support import wait_for

from flask_sse_stream import SSE, Job, JobClosed, JobState
from flask_sse_stream.brokers.base import Gap, Life
from flask_sse_stream.errors import BrokerError, EventError
from flask_sse_stream.event import Event, Message
from flask_sse_stream.keeper import Keeper
from flask_sse_stream.keys import JobKey
from flask_sse_stream.stream import CloseReason


def room(**options: object) -> House:
    return House(**options)


def job(house: House, id: str = "work", ttl: float | None = None) -> Job:
    return Job(house.manager, id, ttl)


def told(house: House, id: str = "work", after: str | None = None) -> list[tuple[str | None, str | None]]:
    """What a reader that comes now is given, as (event, data)."""
    stream = house.open(JobKey.of(id), after=after)
    found = [(event.event, event.data) for event in house.events(stream)]
    stream.close(CloseReason.PEER)
    return found


# Reading


def test_a_reader_gets_a_job_from_its_beginning_and_follows_it() -> None:
    house = room()
    work = job(house)
    assert work.open()
    work.send("one")
    stream = house.open(JobKey.of("work"))
    work.send({"n": 2}, event="step")
    assert [(event.event, event.data) for event in house.events(stream)] == [(None, "one"), ("step", '{"n":2}')]


def test_a_reader_that_comes_back_gets_what_it_missed_and_no_more() -> None:
    house = room()
    work = job(house)
    first = work.send("one")
    work.send("two")
    stream = house.open(JobKey.of("work"), after=first)
    assert house.data(stream) == ["two"]
    cursor = house.cursor(stream)
    stream.close(CloseReason.PEER)
    work.send("three")
    assert told(house, after=cursor) == [(None, "three")]


@pytest.mark.parametrize(("end", "data"), [("done", "[1]"), ("failed", "no luck"), ("cancelled", "")])
def test_the_end_of_a_job_ends_its_streams_for_good(end: str, data: str) -> None:
    house = room()
    work = job(house)
    work.send("one")
    stream = house.open(JobKey.of("work"))
    assert {"done": lambda: work.done([1]), "failed": lambda: work.failed("no luck"), "cancelled": work.cancel}[end]()
    events = house.events(stream)
    assert [(event.event, event.data, event.id) for event in events[1:]] == [(end, data, "end")]
    assert stream.reason is CloseReason.ENDED
    assert work.state == end


def test_a_job_that_is_over_is_replayed_to_its_end() -> None:
    house = room()
    work = job(house)
    first = work.send("one")
    work.done("all")
    stream = house.open(JobKey.of("work"))
    assert [event.data for event in house.events(stream)] == ["one", "all"]
    assert (house.decoders[stream].last_event_id, stream.reason) == ("end", CloseReason.ENDED)
    assert told(house, after=first) == [("done", "all")]
    assert told(house, after=f"{first.rpartition('-')[0]}-{house.manager._windows.head}") == [("done", "all")]


def test_a_job_ends_once_and_nothing_is_read_after_its_end() -> None:
    house = room()
    work, other = job(house), job(house)
    work.send("one")
    stream = house.open(JobKey.of("work"))
    published = house.manager.stats().published
    assert (other.cancel(), work.done(), other.failed(), other.cancel()) == (True, False, False, False)
    assert house.manager.stats().published == published + 1
    work.send("too late")
    wanted = [(None, "one"), ("cancelled", "")]
    assert [(event.event, event.data) for event in house.events(stream)] == wanted
    assert told(house) == wanted
    assert work.state is JobState.CANCELLED


def test_what_goes_to_all_is_no_part_of_a_job() -> None:
    house = room(history_size=2)
    work = job(house)
    first = work.send("one")
    stream = house.open(JobKey.of("work"))
    for number in range(5):
        house.manager.publish_all(str(number))
    work.send("two")
    assert house.data(stream) == ["one", "two"]
    assert told(house, after=first) == [(None, "two")], "its place is still known"


def test_history_settings_do_not_cut_a_job_short() -> None:
    house = room(history_size=3, history_ttl=0.001)
    work = job(house)
    for number in range(50):
        work.send(str(number))
    assert told(house) == [(None, str(number)) for number in range(50)]


def test_a_job_can_be_read_without_any_history_of_ordinary_keys() -> None:
    house = room(history_size=0)
    work = job(house)
    first = work.send("one")
    work.send("two")
    assert told(house) == [(None, "one"), (None, "two")]
    assert told(house, after=first) == [(None, "two")]


def test_a_job_that_says_more_than_is_kept_tells_its_readers_that_they_have_not_all() -> None:
    house = room(job_events=10)
    work = job(house)
    first = work.send("0")
    for number in range(1, 30):
        work.send(str(number))
    reset = ("stream-reset", json.dumps({"reason": "history", "keys": ["work"]}))
    kept = [(None, str(number)) for number in range(20, 30)]
    assert told(house) == [reset, *kept]
    assert told(house, after=first) == [reset, *kept]
    unknown = ("stream-reset", reset[1].replace("history", "unknown"))
    assert told(house, after="nonsense") == [unknown, *kept]
    stream = house.open(JobKey.of("work"))
    assert house.events(stream)[0].id is not None
    cut_off = house.open(JobKey.of("work"))
    place = next(line for line in house.take(cut_off).decode().split("\n") if line.startswith("id: "))
    assert told(house, after=place.removeprefix("id: ")) == kept, "cut off after the reset, it still gets the rest"


def test_a_job_is_kept_for_its_time_after_its_last_event() -> None:
    house = room(job_ttl=100)
    work = job(house, ttl=1)
    work.send("one")
    assert work.state is JobState.RUNNING
    wait_for(lambda: work.state is None, "it is no longer kept")
    assert not work.follow()


def test_a_jobs_key_is_none_that_a_request_can_name() -> None:
    house = room()
    job(house).send("one")
    with pytest.raises(EventError, match="control character"):
        house.open(str(JobKey.of("work")).encode().decode())


# Working


def test_work_runs_once_whoever_starts_it_again() -> None:
    house = room()
    ran: list[int] = []
    release = threading.Event()

    def work(this: Job, number: int) -> str:
        ran.append(number)
        this.send("hello")
        assert release.wait(30)
        return "result"

    assert job(house).start(work, 1)
    assert not job(house).start(work, 2)
    wait_for(lambda: ran, "it runs")
    assert job(house).state is JobState.RUNNING
    release.set()
    wait_for(lambda: job(house).state is JobState.DONE, "it is done")
    assert not job(house).start(work, 3)
    assert ran == [1]
    assert told(house) == [(None, "hello"), ("done", "result")]


def test_many_who_start_a_job_at_once_run_it_once() -> None:
    house = room()
    ran: list[bool] = []
    answers: list[bool] = []
    begin = threading.Barrier(8)

    def try_to() -> None:
        begin.wait(30)
        answers.append(job(house).start(lambda this: ran.append(True)))

    threads = [threading.Thread(target=try_to) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    wait_for(lambda: job(house).state is JobState.DONE, "it is done")
    assert (sum(answers), len(answers), len(ran)) == (1, 8, 1)


def test_a_generator_is_sent_item_by_item_and_gives_its_result() -> None:
    house = room()

    def count() -> Iterator[object]:
        yield "one"
        yield Event("two", event="step")
        return {"n": 2}

    assert job(house).run(count())
    assert told(house) == [(None, "one"), ("step", "two"), ("done", '{"n":2}')]


def test_work_that_raises_fails_without_telling_why(caplog: pytest.LogCaptureFixture) -> None:
    house = room()

    def work(this: Job) -> None:
        this.send("one")
        raise RuntimeError("the password is 1234")

    assert job(house).start(work)
    wait_for(lambda: job(house).state is JobState.FAILED, "it has failed")
    wait_for(lambda: "the password" in caplog.text, "the log has it")
    assert told(house) == [(None, "one"), ("failed", "failed")]
    with pytest.raises(RuntimeError):
        job(house, "another").run(work)
    assert told(house, "another") == [(None, "one"), ("failed", "failed")]


def test_a_generator_is_closed_when_its_job_is_cancelled() -> None:
    house = room()
    closed = threading.Event()

    def tick() -> Iterator[str]:
        try:
            while True:
                yield "tick"
                closed.wait(0.01)
        finally:
            closed.set()

    assert job(house).start(tick())
    wait_for(lambda: len(told(house)) > 1, "it ticks")
    assert job(house).cancel()
    wait_for(closed.is_set, "it is closed")
    assert told(house)[-1] == ("cancelled", "")


def test_a_producer_elsewhere_hears_that_its_job_is_cancelled() -> None:
    house = room()
    work = job(house)
    with work:
        work.send("one")
        assert not work.cancelled
        producer = Keeper.of(house.manager)._producers.pop("work")  # as if another process cancelled it
        job(house).cancel()
        Keeper.of(house.manager).take(producer)
        wait_for(lambda: work.cancelled, "it is told")
        work.send("two")
        raise AssertionError("send raises")
    assert told(house) == [(None, "one"), ("cancelled", "")]


def test_a_block_is_a_producer() -> None:
    house = room()
    with job(house) as work:
        work.send("one")
        with pytest.raises(JobClosed, match="has another producer"):
            job(house).run([])
        with pytest.raises(JobClosed), job(house):
            raise AssertionError("it has another producer")
    assert told(house) == [(None, "one"), ("done", "")]
    with pytest.raises(ZeroDivisionError), job(house, "other") as work:
        work.send(1 / 0)
    assert told(house, "other") == [("failed", "failed")]
    with pytest.raises(JobClosed, match="is over"):
        job(house).run([])


def test_others_may_send_to_a_job_that_somebody_works_on() -> None:
    house = room()
    with job(house) as work:
        job(house).send("from another")
        work.send("from its producer")
    assert [data for _, data in told(house)] == ["from another", "from its producer", ""]


def test_an_opened_job_waits_for_its_producer() -> None:
    house = room(job_lease=0.5)
    assert (job(house).state, job(house).open(), job(house).open()) == (None, True, False)
    assert job(house).state is JobState.WAITING
    house.open(JobKey.of("work"))
    keeper = Keeper.of(house.manager)
    keeper._check(house.manager, "work")
    assert job(house).state is JobState.WAITING
    assert job(house).start(["one"])
    wait_for(lambda: job(house).state is JobState.DONE, "it is done")


def test_a_producer_that_dies_without_a_word_fails_its_job_where_it_is_read(caplog: pytest.LogCaptureFixture) -> None:
    house = room(job_lease=0.5)
    work = job(house)
    work._begin(fresh=True)
    Keeper.of(house.manager)._producers.clear()  # as if its process had died
    work.send("one")
    stream = house.open(JobKey.of("work"))
    assert job(house).follow()
    wait_for(lambda: job(house).state is JobState.FAILED, "somebody notices")
    assert [(event.event, event.data) for event in house.events(stream)] == [(None, "one"), ("failed", "interrupted")]
    assert "'work' has failed: its producer was not heard of" in caplog.text


def test_a_job_that_its_process_looks_at_while_it_is_ended_is_not_taken_for_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    house = room()
    publish = house.manager.publish

    def look_and_publish(*arguments: object, **options: object) -> str:
        Keeper.of(house.manager)._tick()
        return publish(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(house.manager, "publish", look_and_publish)
    assert job(house).run(["a row"])
    assert told(house) == [(None, "a row"), ("done", "")]

    begun, going_on = threading.Event(), threading.Event()

    def work(_: Job) -> None:
        begun.set()
        going_on.wait(20)

    assert job(house, "another").start(work)
    begun.wait(20)
    assert job(house, "another").cancel()
    going_on.set()
    assert told(house, "another") == [("cancelled", "")]
    house.manager.shutdown()


def test_a_producer_that_lives_keeps_its_job_however_long_it_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr("flask_sse_stream.keeper.time", clock)
    house = room(job_lease=10)
    keeper = Keeper.of(house.manager)
    with job(house) as work:
        house.open(JobKey.of("work"))
        for _ in range(20):
            clock.now += 4
            keeper._tick()
        assert work.state is JobState.RUNNING
        keeper._producers.clear()
        for _ in range(5):
            clock.now += 4
            keeper._tick()
        assert work.state is JobState.FAILED


def test_a_job_is_stopped_when_nobody_reads_it_here_or_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr("flask_sse_stream.keeper.time", clock)
    house = room()
    keeper = Keeper.of(house.manager)
    work = Job(house.manager, "work", stop_when_unread=5)
    work._begin(fresh=True)
    stream = house.open(JobKey.of("work"))

    def after_ticks(count: int) -> JobState | None:
        for _ in range(count):
            clock.now += 1
            keeper._tick()
        return work.state

    assert after_ticks(20) is JobState.RUNNING, "it is read here"
    stream.close(CloseReason.PEER)
    clock.now += 4
    for _ in range(5):
        assert job(house).follow(), "as another process that has a reader would"
        assert after_ticks(2) is JobState.RUNNING
    assert after_ticks(20) is JobState.CANCELLED


def test_readers_are_made_known_to_a_producer_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr("flask_sse_stream.keeper.time", clock)
    house = room()
    keeper = Keeper.of(house.manager)
    work = Job(house.manager, "work", stop_when_unread=5)
    work._begin(fresh=True)
    keeper._producers.clear()  # it is another process's
    stream = house.open(JobKey.of("work"))

    def is_read() -> bool:
        keeper._tick()
        return not house.manager.hold(f"{work.key} read", "producer", 0)

    for _ in range(5):
        assert is_read()
        clock.now += 1.5
    stream.close(CloseReason.PEER)
    keeper._tick()
    clock.now += 4
    assert not is_read()


@pytest.mark.parametrize(("lease", "tick"), [(0.6, 0.2), (2.4, 0.8), (10, 1.0)])
def test_a_lease_is_renewed_well_before_it_ends(lease: float, tick: float) -> None:
    assert Keeper.of(room(job_lease=lease).manager)._tick_seconds() == pytest.approx(tick)


def test_a_task_that_is_tried_again_takes_up_what_nobody_was_told_had_failed() -> None:
    house = room(job_lease=0.5)
    work = job(house)
    work._begin(fresh=True)
    work.send("one")
    Keeper.of(house.manager)._producers.clear()

    def again() -> bool:
        try:
            return job(house).run(["two"])
        except JobClosed:
            return False

    wait_for(again, "its lease ends")
    assert told(house) == [(None, "one"), (None, "two"), ("done", "")]


def test_work_whose_producer_is_gone_is_not_begun_again_by_a_reload() -> None:
    house = room(job_lease=0.5)
    work = job(house)
    work._begin(fresh=True)
    Keeper.of(house.manager)._producers.clear()
    wait_for(lambda: house.manager.hold(f"{work.key} work", "me", 0), "its lease ends")
    assert not job(house).start(["again"])
    assert told(house) == []


def test_a_producer_that_lost_its_lease_ends(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr("flask_sse_stream.keeper.time", clock)
    house = room(job_lease=10)
    with job(house) as work:
        clock.now += 60  # as if the whole process had been stopped for so long
        assert house.manager.hold(f"{work.key} work", "another", 10)
        Keeper.of(house.manager)._tick()
        assert work.cancelled
        work.send("x")
        raise AssertionError("send raises")
    assert "this process was not heard of for too long" in caplog.text


def test_a_producer_is_missed_also_where_its_beginning_is_no_longer_kept() -> None:
    house = room(job_lease=0.5, job_events=10)
    work = job(house)
    work._begin(fresh=True)
    for number in range(42):
        work.send(str(number))
    Keeper.of(house.manager)._producers.clear()
    house.open(JobKey.of("work"))
    assert job(house).follow()
    wait_for(lambda: job(house).state is JobState.FAILED, "somebody notices")


def test_what_is_worked_on_fails_when_the_process_ends() -> None:
    house = room()
    work = job(house)
    with work:
        stream = house.open(JobKey.of("work"))
        for stop in house.manager.stopping:
            stop()
        assert house.events(stream)[-1].data == "interrupted"
        work.send("goes on")
        raise AssertionError("send raises")
    with pytest.raises(JobClosed, match=r"the job 'work' is over \(failed\)"):
        work.send("still")


def test_a_broker_that_is_gone_leaves_no_producer_that_seems_to_live(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    house = room(job_lease=0.5)
    real = house.manager._broker.publish

    def publish(*args: object) -> str:
        raise BrokerError("gone")

    def work(this: Job) -> None:
        monkeypatch.setattr(house.manager._broker, "publish", publish)
        this.send("one")

    assert job(house).start(work)
    wait_for(lambda: "could not say that it failed" in caplog.text, "it gives up")
    monkeypatch.setattr(house.manager._broker, "publish", real)
    monkeypatch.setattr("flask_sse_stream.keeper.SAY_SECONDS", 0.1)
    assert Keeper.of(house.manager).producer("work") is None
    house.manager._broker._leases.clear()  # type: ignore[attr-defined]  # ten seconds later
    house.open(JobKey.of("work"))
    assert job(house).follow()
    wait_for(lambda: job(house).state is JobState.FAILED, "readers are told")


def test_a_log_that_lost_what_a_reader_waits_for_has_him_come_back_and_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    for news in (
        lambda windows: Gap(JobKey.of("work"), windows.epoch, windows.head + 5),
        lambda windows: Life("another", 7),
    ):
        house = room()
        job(house).send("one")
        stream, ordinary = house.open(JobKey.of("work")), house.open("k")
        house.data(stream)
        house.manager.deliver(news(house.manager._windows))
        house.manager.deliver(Message(JobKey.of("work"), house.manager._windows.epoch or "", 99, b"data: x\n\n", 0.0))
        assert house.data(stream) == []
        assert (stream.reason, ordinary.reason) == (CloseReason.ROTATED, None)


# Bad input


@pytest.mark.parametrize("id", ["", "x" * 201, "a\nb", "\0", "\ud800"])
def test_an_impossible_id_is_a_job_that_never_was_and_cannot_be(id: str) -> None:
    house = room()
    work = job(house, id)
    assert work.state is None
    assert not work.follow()
    assert not work.cancel()
    for use in (work.open, work.send, work.done, lambda: work.start([]), lambda: work.run([])):
        with pytest.raises(EventError, match="the id of a job"):
            use()


def test_what_cannot_be_work_or_an_event_is_refused() -> None:
    house = room()
    with pytest.raises(EventError, match="must be text"):
        job(house, 5)  # type: ignore[arg-type]
    for ttl in (0, -1, 1e9):
        with pytest.raises(ValueError, match="SSE_JOB_TTL=3600 seconds"):
            job(house, ttl=ttl)
    for seconds in (0, -1, 1e9):
        with pytest.raises(ValueError, match="stop_when_unread"):
            Job(house.manager, "work", stop_when_unread=seconds)
    for work in ("text", {"a": 1}, 5, None):
        with pytest.raises(TypeError, match="a function or an iterable of events"):
            job(house).start(work)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="arguments are for a function"):
        job(house).run([], 1)
    with pytest.raises(EventError, match="'done' ends a job"):
        job(house).send("x", event="done")
    with pytest.raises(EventError, match="'failed' ends a job"):
        job(house).send(Event("x", event="failed"))
    with pytest.raises(EventError, match="leave out its own"):
        job(house).send(Event("x", id="mine"))
    with pytest.raises(EventError):
        job(house).done({1})
    assert job(house).state is None, "nothing was touched"


def test_cancelling_what_never_was_touches_nothing() -> None:
    house = room()
    assert not job(house).cancel()
    assert job(house).state is None


# In views


def client(**options: object) -> FlaskClient:
    app = Flask(__name__)
    sse = SSE(app, **options)

    @app.post("/jobs")
    def start() -> str:
        job = sse.job()
        job.start(iter(["one", "two"]))
        return job.id

    @app.get("/jobs/<id>")
    @app.post("/jobs/<id>")
    def read(id: str) -> object:
        if request.args.get("user") == "mallory":
            abort(403)
        return sse.job(id).response(heartbeats="quiet" not in request.args, headers={"X-Job": id})

    return app.test_client()


def test_a_view_starts_a_job_and_another_reads_it() -> None:
    pages = client()
    id = pages.post("/jobs").text
    assert len(id) == 22, "128 bits that nobody guesses"
    for method in (pages.get, pages.post):
        answer = method(f"/jobs/{id}")
        assert (answer.status_code, answer.headers["X-Job"], answer.mimetype) == (200, id, "text/event-stream")
        assert answer.text.endswith("id: end\nevent: done\ndata: \n\n")
        assert [line for line in answer.text.split("\n") if line.startswith("data: ")] == [
            "data: one", "data: two", "data: "
        ]  # fmt: skip


def test_a_job_that_is_over_is_not_asked_for_again() -> None:
    pages = client()
    id = pages.post("/jobs").text
    assert pages.get(f"/jobs/{id}", headers={"Last-Event-ID": "end"}).status_code == 204


@pytest.mark.parametrize("id", ["unknown", "x" * 300, "a%0Ab", "%00", "%ff", "%02unknown"])
def test_a_job_that_never_was_is_answered_404_before_any_byte(id: str) -> None:
    answer = client(cors_origins=["https://a.example"]).get(f"/jobs/{id}", headers={"Origin": "https://a.example"})
    assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (404, "https://a.example")
    assert "no such job" in answer.text


def test_the_view_decides_who_reads() -> None:
    pages = client()
    id = pages.post("/jobs").text
    assert pages.get(f"/jobs/{id}?user=mallory").status_code == 403


def test_the_endpoint_of_the_pools_reads_no_job() -> None:
    pages = client()
    id = pages.post("/jobs").text
    assert pages.get(f"/stream?connectKey=%02{id}").status_code == 400


def test_without_heartbeats_there_is_no_comment_in_a_stream() -> None:
    for options in ({}, {"retry": None}):
        pages = client(**options)
        id = pages.post("/jobs").text
        assert "\n: " in "\n" + pages.get(f"/jobs/{id}").text
        assert "\n:" not in "\n" + pages.get(f"/jobs/{id}?quiet").text


def test_a_silent_stream_without_heartbeats_stays_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    house = room(ping_interval=5.0)
    streams = [
        house.manager.open(["k"], RecordingTransport(), house.runtime, comments=comments)  # type: ignore[arg-type]
        for comments in (True, False)
    ]
    taken = [house.take(stream) for stream in streams]
    clock.now += 6
    assert [house.take(stream) for stream in streams] == [b": ping\n\n", b""]
    assert [b": open" in first for first in taken] == [True, False]
