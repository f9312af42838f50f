"""What becomes of tasks is published, once, and nothing that goes wrong with that is the task's business."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, current_app, signals
from celery.app.task import Context
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded, WorkerLostError
from fakes import House
from flask import Flask

from flask_sse_stream import SSE, BrokerError, EventDecoder, Job, JobState, Publisher, SettingsError
from flask_sse_stream.celery import TaskEvent, TaskEvents, publish_task_events


class Shop:
    """A Celery application whose tasks run in the caller, and the streams that are told of them."""

    def __init__(self, tmp_path: Path) -> None:
        self.app = Celery("shop", set_as_current=False)
        self.app.conf.update(broker_url="memory://", result_backend="cache+memory://", task_store_eager_result=True)
        self.house = House()
        self.stream = self.house.open("tasks")
        self.made: list[TaskEvents] = []

    def publish(self, *, to: Any = "tasks", **options: Any) -> TaskEvents:
        self.made.append(publish_task_events(self.app, self.house.manager, to=to, **options))
        return self.made[-1]

    def task(self, function: Callable[..., Any], name: str = "work", **options: Any) -> Any:
        function.__name__ = "work"  # Celery makes a definition of it
        return self.app.task(name=name, bind=True, shared=False, **options)(function)

    def events(self) -> list[tuple[str | None, dict[str, Any]]]:
        return [(event.event, json.loads(str(event.data))) for event in self.house.events(self.stream)]

    def names(self) -> list[str | None]:
        return [event for event, _ in self.events()]

    def close(self) -> None:
        for made in self.made:
            made.close()
        self.app.close()
        self.house.manager.shutdown()


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path)
    yield shop
    shop.close()


def test_a_task_is_told_of_from_its_start_to_its_end(shop: Shop) -> None:
    shop.publish()

    def work(self: Any, secret: str) -> str:
        self.update_state(state="READING", meta={"done": 1, "of": 2})
        self.update_state(self.request.id, "WRITING", {"done": 2, "of": 2})
        return f"result of {secret}"

    result = shop.task(work).apply(("password",), task_id="7")
    assert result.get() == "result of password"
    about = {"task": "7", "name": "work", "retries": 0}
    assert shop.events() == [
        ("started", {**about, "state": "STARTED"}),
        ("progress", {**about, "state": "READING", "meta": {"done": 1, "of": 2}}),
        ("progress", {**about, "state": "WRITING", "meta": {"done": 2, "of": 2}}),
        ("succeeded", {**about, "state": "SUCCESS"}),
    ]


def test_a_failure_is_told_without_its_text(shop: Shop) -> None:
    shop.publish()

    def work(self: Any) -> None:
        raise KeyError("password")

    assert shop.task(work).apply(task_id="7").state == "FAILURE"
    started, failed = shop.events()
    assert failed == ("failed", {"task": "7", "name": "work", "state": "FAILURE", "retries": 0, "error": "KeyError"})


def test_what_is_included_goes_out(shop: Shop) -> None:
    shop.publish(include=["args", "kwargs", "result", "message"])

    def work(self: Any, number: int, fails: bool = False) -> str:
        if fails:
            raise ValueError("no such number")
        return "done"

    task = shop.task(work)
    task.apply((5,))
    task.apply((6,), {"fails": True})
    started, succeeded, _, failed = [data for _, data in shop.events()]
    assert (started["args"], started["kwargs"]) == ([5], {})
    assert "result" not in started
    assert succeeded["result"] == "done"
    assert (failed["args"], failed["kwargs"], failed["message"]) == ([6], {"fails": True}, "no such number")
    assert "result" not in failed


def test_a_task_that_is_tried_again_says_so_each_time(shop: Shop) -> None:
    shop.publish()

    def work(self: Any) -> None:
        if self.request.retries == 0:
            raise self.retry(exc=OSError("a host's name"), countdown=0)
        if self.request.retries == 1:
            raise self.retry(countdown=0)

    shop.task(work).apply(task_id="7", throw=False)
    told = [(event, data.get("retries"), data.get("error")) for event, data in shop.events()]
    # A task in the caller runs again within itself, so what ends first is the last try.
    assert sorted(told, key=str) == sorted(
        [
            ("started", 0, None),
            ("retried", 0, "OSError"),
            ("started", 1, None),
            ("retried", 1, None),
            ("started", 2, None),
            ("succeeded", 2, None),
        ],
        key=str,
    )


def test_a_task_that_is_delivered_again_speaks_once_and_goes_on_where_it_says_something_new(shop: Shop) -> None:
    shop.publish()
    rest = ["c"]

    def work(self: Any) -> None:
        for state in ("a", "b", "a", *rest):
            self.update_state(state=state)

    task = shop.task(work)
    task.apply(task_id="7")
    told = [data["state"] for _, data in shop.events()]
    assert told == ["STARTED", "a", "b", "a", "c", "SUCCESS"]
    rest[:] = ["d"]
    task.apply(task_id="7")
    assert [data["state"] for _, data in shop.events()] == ["d"]
    task.apply(task_id="8")
    assert len(shop.events()) == 6


def test_two_keys_are_told_of_the_same_task(shop: Shop) -> None:
    shop.publish()
    shop.publish(to="others")
    others = shop.house.open("others")
    shop.task(lambda self: self.update_state(state="x")).apply(task_id="7")
    assert shop.names() == ["started", "progress", "succeeded"]
    assert [event.event for event in shop.house.events(others)] == ["started", "progress", "succeeded"]


# Which tasks, and whom to tell


def test_chosen_tasks_alone_are_told_of_and_no_other_is_touched(shop: Shop) -> None:
    chosen = shop.task(lambda self: None, "chosen")
    shop.publish(tasks=[chosen, "reports.*", "by name"])
    for name in ("reports.daily", "by name", "another", "celery.own"):
        shop.task(lambda self: self.update_state(state="x") if self.name == "another" else None, name)
    for name in ("chosen", "reports.daily", "by name", "another", "celery.own"):
        shop.app.tasks[name].apply()
    told = [data["name"] for event, data in shop.events() if event == "started"]
    assert told == ["chosen", "reports.daily", "by name"]
    assert "update_state" not in vars(shop.app.tasks["another"])


def test_all_tasks_but_celerys_own_are_told_of_unless_some_are_chosen(shop: Shop) -> None:
    shop.publish()
    for name in ("one", "celery.own"):
        shop.task(lambda self: None, name).apply()
    assert {data["name"] for _, data in shop.events()} == {"one"}


def test_a_task_of_another_application_is_none_of_these(shop: Shop) -> None:
    shop.publish()
    other = Celery("other", set_as_current=False)

    def work() -> None: ...

    other.task(name="work", shared=False)(work).apply()
    assert shop.events() == []


def test_the_proxy_of_an_application_is_the_application(shop: Shop) -> None:
    shop.app.set_current()
    events = publish_task_events(current_app, shop.house.manager, to="tasks")
    shop.task(lambda self: None).apply()
    events.close()
    shop.app.set_current()
    assert shop.names() == ["started", "succeeded"]


def test_the_key_is_the_tasks_own_unless_it_is_said(shop: Shop) -> None:
    shop.made.append(publish_task_events(shop.app, shop.house.manager))
    shop.publish(to="all-{name}")
    streams = [shop.house.open(key) for key in ("task-7", "all-work", "task-8")]
    shop.task(lambda self: None).apply(task_id="7")
    assert [len(shop.house.events(stream)) for stream in streams] == [2, 2, 0]


def test_a_function_says_whom_to_tell_and_may_say_nobody(shop: Shop) -> None:
    seen: list[TaskEvent] = []

    def to(task: TaskEvent) -> str | None:
        seen.append(task)
        return f"user-{task.kwargs['user']}" if task.event == "succeeded" else None

    events = shop.publish(to=to)
    stream = shop.house.open("user-5")
    shop.task(lambda self, user: "done").apply(kwargs={"user": 5}, task_id="7")
    assert [event.event for event in shop.house.events(stream)] == ["succeeded"]
    assert [(task.event, task.result) for task in seen] == [("started", None), ("succeeded", "done")]
    assert events.stats().published == 1


# A job


def said_of(shop: Shop, job: Job) -> list[tuple[str | None, Any]]:
    """What a reader of the job is given, who comes now."""
    decoder = EventDecoder()
    frames = [message.frame for message in shop.house.manager.look(job.key)]
    return [(event.event, event.data) for event in decoder.feed(b"".join(frames))]


def test_a_job_is_read_from_the_tasks_start_and_ends_with_it(shop: Shop) -> None:
    shop.publish(to=lambda task: Job(shop.house.manager, task.task_id), include=["result"])

    def work(self: Any, how: str) -> str:
        self.update_state(state="x", meta=1)
        if how == "fails":
            raise KeyError("secret")
        return "done"

    task = shop.task(work)
    well, bad = (Job(shop.house.manager, name) for name in ("well", "bad"))
    assert well.open()
    for _ in range(2):  # it may be delivered again
        task.apply(("is well",), task_id="well")
        task.apply(("fails",), task_id="bad")
    assert (well.state, bad.state) == (JobState.DONE, JobState.FAILED)
    for job, names in ((well, ["started", "progress", "done"]), (bad, ["started", "progress", "failed"])):
        told = said_of(shop, job)
        assert [event for event, _ in told] == names
        assert all(json.loads(data)["task"] == job.id for _, data in told)
        assert "secret" not in str(told)
    assert json.loads(said_of(shop, well)[-1][1])["result"] == "done"


def test_a_revoked_task_is_a_cancelled_job(shop: Shop) -> None:
    shop.publish(to=lambda task: Job(shop.house.manager, task.task_id))
    job = Job(shop.house.manager, "7")
    job.open()
    task = shop.task(lambda self: None)
    request = Context(id="7", args=(), kwargs={}, retries=0)
    signals.task_revoked.send(sender=task, request=request, terminated=True, signum=None, expired=False)
    assert job.state is JobState.CANCELLED
    assert [event for event, _ in said_of(shop, job)] == ["cancelled"]


def test_nothing_is_said_of_a_job_that_its_readers_were_told_is_over(shop: Shop) -> None:
    events = shop.publish(to=lambda task: Job(shop.house.manager, task.task_id))
    job = Job(shop.house.manager, "7")

    def work(self: Any) -> None:
        self.update_state(state="x")
        job.cancel()
        self.update_state(state="y")

    shop.task(work).apply(task_id="7")
    assert [event for event, _ in said_of(shop, job)] == ["started", "progress", "cancelled"]
    assert job.state is JobState.CANCELLED
    assert events.stats().left_out == 1


# What Celery's worker tells from its main process


def test_a_task_that_was_revoked_before_it_began_or_stopped_or_out_of_time_is_told_of(shop: Shop) -> None:
    shop.publish()
    task = shop.task(lambda self: None)
    for task_id, terminated, expired in (("1", False, False), ("2", True, False), ("3", False, True)):
        request = Context(id=task_id, args=(), kwargs={}, retries=0)
        for _ in range(2):  # as of two workers that were given it
            signals.task_revoked.send(sender=task, request=request, terminated=terminated, signum=None, expired=expired)
    about = {"name": "work", "state": "REVOKED", "retries": 0}
    assert shop.events() == [
        ("revoked", {**about, "task": "1", "terminated": False, "expired": False}),
        ("revoked", {**about, "task": "2", "terminated": True, "expired": False}),
        ("revoked", {**about, "task": "3", "terminated": False, "expired": True}),
    ]


def test_a_task_whose_process_was_lost_is_told_of_by_another_one(shop: Shop) -> None:
    shop.publish(include=["args"])
    task = shop.task(lambda self: None)
    lost = {"task_id": "7", "exception": WorkerLostError("x"), "args": [1], "kwargs": {}, "traceback": None}
    signals.task_failure.send(sender=task, einfo=None, **lost)
    [(event, data)] = shop.events()
    task.push_request(id="7", retries=1)  # by a process that knows more of it; an end is told once
    signals.task_failure.send(sender=task, einfo=None, **lost)
    task.pop_request()
    assert shop.events() == []
    assert (event, data) == (
        "failed",
        {"task": "7", "name": "work", "state": "FAILURE", "error": "WorkerLostError", "args": [1]},
    )


def test_a_task_that_is_cancelled_to_be_run_again_is_told_of(shop: Shop) -> None:
    shop.publish()
    task = shop.task(lambda self: None)
    signals.task_retry.send(sender=task, request=Context(id="7", retries=2), einfo=None)  # as when a worker is drained
    assert shop.events() == [
        ("retried", {"task": "7", "name": "work", "state": "RETRY", "retries": 2, "error": None}),
    ]


@pytest.mark.parametrize(
    ("state", "event", "meta", "error"),
    [
        ("FAILURE", "failed", {"exc_type": "ValueError", "exc_message": "secret"}, "ValueError"),
        ("FAILURE", "failed", "secret", None),
        ("SUCCESS", "succeeded", "secret", None),
    ],
)
def test_a_task_that_sets_its_last_state_itself_has_ended(
    state: str, event: str, meta: Any, error: str | None, shop: Shop
) -> None:
    shop.publish()

    def work(self: Any) -> None:
        self.update_state(state=state, meta=meta)
        raise Ignore

    shop.task(work).apply()
    started, (name, data) = shop.events()
    assert (name, data["state"], data.get("error")) == (event, state, error)
    assert "secret" not in json.dumps(data)


def test_a_task_that_celery_is_told_to_ignore_says_nothing_of_its_end(shop: Shop) -> None:
    shop.publish()

    def work(self: Any, error: type[Exception]) -> None:
        raise error

    for error in (Ignore, Reject):
        shop.task(work, error.__name__).apply((error,))
    assert shop.names() == ["started", "started"]


def test_progress_of_another_task_is_told_as_that_tasks(shop: Shop) -> None:
    shop.publish()

    def work(self: Any) -> None:
        for _ in range(2):
            self.update_state(task_id="other", state="x")

    shop.task(work).apply(task_id="7")
    progress = [data for event, data in shop.events() if event == "progress"]
    assert progress == [{"task": "other", "name": "work", "state": "x", "meta": None}] * 2


def test_a_tasks_own_update_state_is_called_as_before(shop: Shop) -> None:
    calls: list[Any] = []

    class Own(shop.app.Task):  # type: ignore[misc, name-defined]
        def update_state(self, *args: Any, **kwargs: Any) -> str:
            calls.append((args, kwargs))
            return "mine"

    shop.publish()
    task = shop.task(lambda self: self.update_state(state="x", meta=1, own=2), base=Own)
    assert [task.apply().get() for _ in range(2)] == ["mine", "mine"]
    assert calls == [((), {"state": "x", "meta": 1, "own": 2})] * 2
    assert shop.names().count("progress") == 2


def test_a_state_that_could_not_be_stored_is_not_told(shop: Shop) -> None:
    shop.publish()

    def work(self: Any) -> None:
        self.update_state(state="x", meta={1, 2, object()})  # which no backend's JSON knows

    assert shop.task(work).apply().state == "FAILURE"
    assert shop.names() == ["started", "failed"]


def test_closing_ends_it_and_leaves_others_alone(shop: Shop) -> None:
    other = shop.house.open("others")
    first = shop.publish()
    shop.publish(to="others")
    task = shop.task(lambda self: self.update_state(state="x"))
    task.apply()
    shop.events()
    shop.house.events(other)
    first.close()
    first.close()
    task.apply()
    assert shop.events() == []
    assert [event.event for event in shop.house.events(other)] == ["started", "progress", "succeeded"]


# What goes wrong


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("flask_sse_stream.celery.time", clock)
    return clock


def test_a_broker_that_fails_fails_no_task_and_is_not_asked_for_all_progress(
    shop: Shop, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    events = shop.publish()
    tries = 0

    def away(*_: Any) -> str:
        nonlocal tries
        tries += 1
        raise BrokerError("the broker is away")

    monkeypatch.setattr(shop.house.manager._broker, "publish", away)

    def work(self: Any) -> str:
        for number in range(60):
            self.update_state(state="x", meta=number)
            clock.now += 0.1
        return "done"

    assert shop.task(work).apply().get() == "done"
    assert tries == 3  # started, progress once in six seconds, succeeded
    assert events.stats() == (0, 3, 59, "the broker is away")
    assert [record.getMessage() for record in caplog.records if record.name == "flask_sse_stream"] == [
        f"nobody is told that the task {record_id(caplog)} of work is 'started': the broker is away"
    ]
    monkeypatch.undo()


def record_id(caplog: pytest.LogCaptureFixture) -> str:
    return caplog.records[0].getMessage().split()[6]


def test_the_log_has_a_line_a_minute_that_counts_the_others(
    shop: Shop, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    def to(task: TaskEvent) -> str:
        raise LookupError("no such user")

    shop.publish(to=to)
    task = shop.task(lambda self: None)
    for _ in range(3):
        task.apply()
    clock.now += 61
    task.apply(task_id="7")
    lines = [record for record in caplog.records if record.name == "flask_sse_stream"]
    assert [line.levelno for line in lines] == [logging.ERROR] * 2
    assert lines[1].getMessage() == (
        "nobody is told that the task 7 of work is 'started' (5 more since the last such line): no such user"
    )
    assert lines[1].exc_info is not None
    assert lines[1].exc_info[0] is LookupError


@pytest.mark.parametrize("meta", ["x" * 2**20, float("nan")])
def test_what_is_too_large_or_no_json_is_left_out_of_the_event(
    meta: Any, shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    events = shop.publish(include=["result"])

    def work(self: Any) -> Any:
        self.update_state(state="x", meta=meta)
        return meta

    shop.task(work).apply(task_id="7")
    told = shop.events()
    assert [(event, data["state"]) for event, data in told] == [
        ("started", "STARTED"),
        ("progress", "x"),
        ("succeeded", "SUCCESS"),
    ]
    assert not any("meta" in data or "result" in data for _, data in told)
    assert events.stats()[:3] == (3, 2, 0)
    assert "what the task 7 of work says of itself is left out" in caplog.text


def test_a_failure_is_told_although_its_exception_cannot_be_put_into_words(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    class Speechless(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    to_be_told = TaskEvent("failed", "7", "work", "FAILURE", exception=Speechless())
    events = shop.publish(include=["message"])
    events._publish("tasks", to_be_told)
    assert shop.events() == [
        ("failed", {"task": "7", "name": "work", "state": "FAILURE", "error": "Speechless"}),
    ]
    assert "no words" in caplog.text


def test_a_bad_key_is_logged_and_the_task_goes_on(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    events = shop.publish(to=lambda task: "")
    assert shop.task(lambda self: "done").apply().get() == "done"
    assert "key must have 1 to 255 characters" in caplog.text
    assert events.stats()[:2] == (0, 2)


def test_a_soft_time_limit_that_comes_while_something_is_published_reaches_the_task(shop: Shop) -> None:
    def to(task: TaskEvent) -> str:
        if task.event == "progress":
            raise SoftTimeLimitExceeded  # as the signal does, wherever it comes
        return "tasks"

    shop.publish(to=to)

    def work(self: Any) -> str:
        try:
            self.update_state(state="x")
        except SoftTimeLimitExceeded:
            return "out of time"
        return "not told"

    assert shop.task(work).apply().get() == "out of time"


def test_other_receivers_of_celerys_signals_are_called_as_before(shop: Shop) -> None:
    heard: list[str] = []

    def prerun(task_id: str, **_: Any) -> None:
        heard.append(task_id)

    def away(task: TaskEvent) -> str:
        raise BrokerError("away")

    signals.task_prerun.connect(prerun)
    shop.publish(to=away)
    signals.task_success.connect(success := lambda result, **_: heard.append(result))
    try:
        shop.task(lambda self: "done").apply(task_id="7")
    finally:
        signals.task_prerun.disconnect(prerun)
        signals.task_success.disconnect(success)
    assert heard == ["7", "done"]


def test_a_worker_says_what_would_never_be_told(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    shop.task(lambda self: None, "reports.daily")
    shop.publish(tasks=["reports.*", "reports.dialy", "sums.*"])
    signals.worker_ready.send(sender=None)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "what becomes of tasks is published into memory:// and reaches no stream of another process",
        "what becomes of 'reports.dialy' is to be published, but this worker has no such task",
        "what becomes of 'sums.*' is to be published, but this worker has no such task",
    ]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"app": "tasks"}, TypeError, "app must be a Celery application, not str"),
        ({"publisher": "memory://"}, SettingsError, "reaches no other process"),
        ({"publisher": 7}, TypeError, "publisher must be a URL, a Publisher or an SSE, not int"),
        ({"tasks": "work"}, TypeError, r"tasks must be a list: \['work'\]"),
        ({"tasks": [7]}, TypeError, "tasks must be tasks, names or patterns of names, not int"),
        ({"to": 7}, TypeError, "to must be a key or a function, not int"),
        (
            {"to": "task-{id}"},
            ValueError,
            r"to may have \{task_id\} and \{name\} filled in.*: 'task-\{id\}'",
        ),
        ({"include": "result"}, ValueError, "include must be some of args, kwargs, result, message, in a list"),
        ({"include": ["results"]}, ValueError, "include must be some of args, kwargs, result, message, in a list"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_listened_to(
    options: dict[str, Any], error: type[Exception], message: str, shop: Shop
) -> None:
    before = [len(signal.receivers) for signal in (signals.task_prerun, signals.task_revoked)]
    with pytest.raises(error, match=message):
        publish_task_events(**{"app": shop.app, "publisher": shop.house.manager, **options})
    assert [len(signal.receivers) for signal in (signals.task_prerun, signals.task_revoked)] == before


def test_it_publishes_by_a_url_a_publisher_or_an_extension(shop: Shop, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/log.db"
    house = House(broker_url=url)
    stream = house.open("tasks")
    flask = Flask("app")
    with Publisher(url) as publisher:
        task = shop.task(lambda self: None)
        for way in (url, publisher, SSE(flask, broker_url=url)):
            shop.made.append(publish_task_events(shop.app, way, to="tasks"))
            task.apply()
            shop.made.pop().close()
    assert [event.event for event in house.events(stream)] == ["started", "succeeded"] * 3
    for manager in (house.manager, flask.extensions["sse_stream"]):
        manager.shutdown()
