"""Publishing from workers of task queues, from threads, and from processes that end: every event once, in order."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from clients import Listener
from conftest import HERE
from redis import Redis
from redis_server import RedisServer
from rq import Queue
from support import ROOT, Server, free_port, python, serving, wait_for
from task_workers import TaskWorker

from flask_sse_stream import Publisher

pytestmark = [pytest.mark.live, pytest.mark.timeout(240)]

LONG = 60.0  # for what several processes have a part in, on a machine that is busy with something else

StartWorker = Callable[..., TaskWorker]


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module", params=["sqlite", "redis"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, redis: RedisServer) -> str:
    """The log that all processes share."""
    return f"sqlite:///{tmp_path_factory.mktemp('log')}/log.db" if request.param == "sqlite" else redis.url


@pytest.fixture(scope="module")
def server(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A worker of gunicorn, which has the streams."""
    port = free_port()
    command = python("-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "-k", "gevent", "workers_app:app")
    environment = {
        "PYTHONPATH": f"{ROOT}:{HERE}",
        "PYTHONWARNINGS": "error",
        "SSE_BROKER_URL": url,
        "SSE_PING_INTERVAL": "1",
        "SSE_HISTORY_SIZE": "5000",
    }
    log = tmp_path_factory.mktemp("server") / "log"
    with serving([*command, "--graceful-timeout", "1"], port, log, environment) as server:
        yield server
        assert "Traceback" not in server.log, server.log
        assert "Warning" not in server.log, server.log


@pytest.fixture
def key() -> str:
    """A key and a queue that no other test uses."""
    return f"tasks-{os.urandom(8).hex()}"


@pytest.fixture
def heard(server: Server, key: str) -> Iterator[Listener]:
    """A client of the server that listens to the key."""
    with Listener(f"{server.url}/stream", params={"connectKey": key}) as listener:
        assert listener.status == 200
        yield listener


@pytest.fixture
def worker(redis: RedisServer, url: str, tmp_path: Path) -> Iterator[StartWorker]:
    """Start one worker, which complains of nothing, unless its processes are killed."""
    workers: list[TaskWorker] = []

    def worker(command: list[str], ready: str, **environment: str) -> TaskWorker:
        paths = {"PYTHONPATH": f"{ROOT}:{HERE}", "REDIS_URL": redis.url, "SSE_BROKER_URL": url}
        workers.append(TaskWorker(command, ready, tmp_path / "worker.log", {**paths, **environment}))
        return workers[-1].__enter__()

    yield worker
    for started in workers:
        started.stop()
        foretold = "SIGKILL" in started.log or "LookupError('secret')" in started.log
        signs = ["Warning", "Exception ignored"] + ["Traceback"] * (not foretold)
        assert [sign for sign in signs if sign in started.log] == [], started.log


def all_of(heard: Listener, url: str, key: str, count: int) -> list[dict[str, Any]]:
    """Give what was published, which is so many events and not one more: an event that comes after them is next."""
    wait_for(lambda: len(heard.events) >= count or heard.ended.is_set(), f"{count} events", LONG)
    with Publisher(url) as publisher:
        publisher.publish(key, {"last": True})
    wait_for(lambda: '{"last":true}' in heard.data or heard.ended.is_set(), "the last event", LONG)
    assert len(heard.events) == count + 1
    places = [int(event.id.rpartition("-")[2]) for event in heard.events]
    assert places == sorted(set(places))
    *events, last = map(json.loads, heard.data)
    assert last == {"last": True}
    return events


def expect_each_once(events: list[dict[str, Any]], tasks: int, count: int) -> set[int]:
    """Compare what tasks said with what they were to say; give the processes that they ran in."""
    for task in range(tasks):
        assert [event["number"] for event in events if event["task"] == task] == list(range(count))
    assert len(events) == tasks * count
    return {event["process"] for event in events}


CELERY_POOLS = {
    "prefork": ["--pool", "prefork", "--concurrency", "3"],
    "prefork, a process for each task": ["--pool", "prefork", "--concurrency", "3", "--max-tasks-per-child", "1"],
    "gevent": ["--pool", "gevent", "--concurrency", "40"],
    "threads": ["--pool", "threads", "--concurrency", "20"],
}
AT_ONCE = {"gevent": 40, "threads": 20}


@pytest.mark.parametrize(
    ("url", "pool"), list(zip(("sqlite", "redis", "redis", "sqlite"), CELERY_POOLS, strict=True)), indirect=["url"]
)
def test_celery_tasks_that_run_at_once_share_what_was_published_with_before_the_fork(
    pool: str, worker: StartWorker, redis: RedisServer, url: str, key: str, heard: Listener
) -> None:
    command = python("-m", "celery", "--app", "tasks_app", "worker", "--loglevel", "INFO", "--queues", key)
    started = worker([*command, *CELERY_POOLS[pool]], " ready.", PUBLISH_AT_IMPORT=key)
    at_once = AT_ONCE.get(pool, 3)
    tasks, count = 2 * at_once, 30
    with Celery(broker=redis.url) as celery:
        for name in range(tasks):
            celery.send_task("speak", (key, name, count, at_once), queue=key, ignore_result=True)
    imported, *events = all_of(heard, url, key, 1 + tasks * count)
    assert imported == {"imported by": started.pid}
    processes = expect_each_once(events, tasks, count)
    if "prefork" in pool:
        assert started.pid not in processes
        assert len(processes) == (tasks if "each" in pool else 3)
    else:
        assert processes == {started.pid}


@pytest.mark.parametrize("how", ["retried", "killed"])
def test_a_celery_task_that_has_to_run_again_speaks_once_with_an_idempotency_key(
    how: str, worker: StartWorker, redis: RedisServer, key: str, heard: Listener
) -> None:
    command = python("-m", "celery", "--app", "tasks_app", "worker", "--loglevel", "INFO", "--queues", key)
    started = worker([*command, "--concurrency", "2"], " ready.")
    with Celery(broker=redis.url) as celery:
        celery.send_task("speak once", (key, how), queue=key, ignore_result=True)
    wait_for(lambda: "after 3 runs" in heard.data, "the last run", LONG)
    assert heard.data == ["once", "after 3 runs"]
    assert started.log.count("SIGKILL") >= (2 if how == "killed" else 0)


# The same whatever the log is, so one will do.
@pytest.mark.parametrize("url", ["redis"], indirect=True)
@pytest.mark.parametrize("pool", ["prefork", "gevent"])
def test_what_becomes_of_celery_tasks_is_heard_once_and_a_broker_that_is_away_changes_nothing(
    pool: str, worker: StartWorker, redis: RedisServer, key: str, heard: Listener
) -> None:
    command = python("-m", "celery", "--app", "tasks_app", "worker", "--loglevel", "INFO", "--queues", key)
    options = ["--pool", pool, "--concurrency", "2"]
    started = worker([*command, *options], " ready.", BROKER_THAT_IS_AWAY=f"redis://127.0.0.1:{free_port()}/0")

    def told(task: str) -> list[tuple[str, dict[str, Any]]]:
        events = [(str(event.event), json.loads(str(event.data))) for event in heard.events]
        return [(name, data) for name, data in events if data["task"] == task]

    def wait_for_end(task: str) -> list[tuple[str, Any]]:
        """Give the names of a task's events, each with what is its own."""
        wait_for(
            lambda: {"succeeded", "failed", "revoked"} & {name for name, _ in told(task)} or heard.ended.is_set(),
            f"the end of {task!r}",
            LONG,
        )
        own = {"started": "retries", "progress": "meta", "succeeded": "result", "revoked": "terminated"}
        assert "secret" not in json.dumps(told(task))
        return [(name, data.get(own.get(name, "error"))) for name, data in told(task)]

    pages = [("progress", {"page": 1}), ("progress", {"page": 2})]
    with Celery(broker=redis.url) as celery:

        def send(task: str, how: str, name: str = "story", **options: Any) -> None:
            celery.send_task(name, (key, how), queue=key, task_id=f"{key} {task}", ignore_result=True, **options)

        def end(task: str) -> list[tuple[str, Any]]:
            return wait_for_end(f"{key} {task}")

        def revoke(task: str, **options: Any) -> None:
            arguments = {"task_id": f"{key} {task}", **options}
            assert celery.control.broadcast("revoke", arguments=arguments, reply=True, timeout=LONG, limit=1)

        send("good", "is well")
        assert end("good") == [("started", 0), *pages, ("succeeded", "read 1 times")]
        send("bad", "fails")
        assert end("bad") == [("started", 0), pages[0], ("failed", "LookupError")]
        send("again", "is retried")
        assert end("again") == [
            *[("started", 0), pages[0], ("retried", "OSError")],
            *[("started", 1), *pages, ("succeeded", "read 2 times")],
        ]
        revoke("early")
        send("early", "is well")
        assert end("early") == [("revoked", False)]
        send("stopped", "waits")
        wait_for(lambda: len(told(f"{key} stopped")) == 2, "it is at work", LONG)
        revoke("stopped", terminate=True)
        assert end("stopped") == [("started", 0), pages[0], ("revoked", True)]
        if pool == "prefork":
            send("late", "waits", time_limit=1)
            assert end("late") == [("started", 0), pages[0], ("failed", "TimeLimitExceeded")]
            send("killed", "is killed", "story of which each word counts")
            assert end("killed") == [("started", 0), *pages, ("succeeded", "read 3 times")]
    lines = started.log.count("nobody is told that the task")
    assert 1 <= lines <= 6  # one of each process, also of those that took the place of lost ones
    started.stop(signal.SIGKILL)


@pytest.mark.parametrize("how", ["rq's own worker", "a worker that imported the job before it forks"])
def test_jobs_of_rq_have_been_heard_when_their_process_ends(
    how: str, worker: StartWorker, redis: RedisServer, url: str, key: str, heard: Listener
) -> None:
    if how == "rq's own worker":
        # It leaves its own connection to Redis open at its end.
        warnings = "error,ignore:unclosed <socket:ResourceWarning"
        command = python("-m", "rq.cli", "worker", "--url", redis.url)
        started = worker(command, "Listening on default", PYTHONWARNINGS=warnings)
    else:
        started = worker(python(str(HERE / "tasks_app.py")), "Listening on default", PUBLISH_AT_IMPORT=key)
    tasks, count = 6, 30
    with Redis(host="127.0.0.1", port=redis.port) as connection:
        queue = Queue("default", connection=connection)
        for name in range(tasks):
            queue.enqueue("tasks_app.speak", key, name, count, 1)
    expected = tasks * count
    if how != "rq's own worker":
        expected += 1
    events = all_of(heard, url, key, expected)
    if how != "rq's own worker":
        assert events.pop(0) == {"imported by": started.pid}
    processes = expect_each_once(events, tasks, count)
    assert len(processes) == tasks
    assert started.pid not in processes


def test_the_threads_of_a_pool_share_one_publisher(url: str, key: str, heard: Listener) -> None:
    tasks, count = 16, 30
    together = threading.Barrier(tasks)
    with Publisher(url) as publisher, ThreadPoolExecutor(tasks) as pool:

        def speak(name: int) -> None:
            together.wait(LONG)
            for number in range(count):
                publisher.publish(key, {"task": name, "number": number, "process": os.getpid()})

        for done in [pool.submit(speak, name) for name in range(tasks)]:
            done.result(LONG)
    assert expect_each_once(all_of(heard, url, key, tasks * count), tasks, count) == {os.getpid()}


ENDINGS = {
    "after the last line": "say()",
    "by sys.exit": "say(); sys.exit()",
    "by os._exit": "say(); os._exit(0)",
    "by SIGKILL": "say(); os.kill(os.getpid(), signal.SIGKILL)",
    "with an atexit function that it registered after its first event": (
        "live.publish(sys.argv[2], 'first'); atexit.register(say)"
    ),
    "with an atexit function that it registered before there was a publisher": (
        "atexit.register(lambda: later.publish(sys.argv[2], 'said'))\n"
        "later = Publisher(sys.argv[1]); later.publish(sys.argv[2], 'first')"
    ),
    "with a thread that outlives the main one": (
        "live.publish(sys.argv[2], 'first')\n"
        "threading.Thread(target=lambda: (threading.main_thread().join(), say())).start()"
    ),
    "with a child that goes on alone": (
        "live.publish(sys.argv[2], 'first')\n"
        "parent = os.getpid()\n"
        "if not os.fork():\n"
        "    while os.getppid() == parent: time.sleep(0.001)\n"
        "    say()"
    ),
}


@pytest.mark.parametrize("how", ENDINGS)
def test_what_a_process_published_is_heard_although_it_ended(how: str, url: str, key: str, heard: Listener) -> None:
    script = (
        "import atexit, os, signal, sys, threading, time\n"
        "from flask_sse_stream import Publisher\n"
        "live = Publisher(sys.argv[1])\n"
        "def say(): live.publish(sys.argv[2], 'said')\n" + ENDINGS[how]
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, url, key],
        capture_output=True,
        text=True,
        timeout=LONG,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert done.returncode == (-9 if "SIGKILL" in how else 0)
    expected = ["first", "said"] if "first" in ENDINGS[how] else ["said"]
    wait_for(lambda: len(heard.events) >= len(expected), "it is heard", LONG)
    with Publisher(url) as publisher:
        publisher.publish(key, "last")
    wait_for(lambda: "last" in heard.data, "the last event", LONG)
    assert heard.data == [*expected, "last"]
