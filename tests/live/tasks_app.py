"""Tasks of Celery and of RQ, which publish by the one Publisher that was made when this module was imported.

Run as a program it is a worker of RQ that has imported everything before its first job, as RQ's documentation advises.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

from celery import Celery, Task
from redis import Redis

from flask_sse_stream import Publisher
from flask_sse_stream.celery import publish_task_events

REDIS_URL = os.environ["REDIS_URL"]

celery = Celery("tasks_app", broker=REDIS_URL)
celery.conf.update(task_ignore_result=True, broker_connection_retry_on_startup=True, worker_prefetch_multiplier=1)

live = Publisher(os.environ["SSE_BROKER_URL"])

# What is open in the parent is there when its children are forked.
if "PUBLISH_AT_IMPORT" in os.environ:
    live.publish(os.environ["PUBLISH_AT_IMPORT"], {"imported by": os.getpid()})


@contextlib.contextmanager
def connected() -> Iterator[Redis]:
    """Give a client of Redis for as long as the block lasts."""
    redis = Redis.from_url(REDIS_URL)
    try:
        yield redis
    finally:
        redis.connection_pool.disconnect()  # which redis-py 5.0 does not do by itself for a client that has a URL


def speak(key: str, name: int, count: int, together: int) -> None:
    """Publish so many events, once so many tasks are at it."""
    with connected() as redis:
        redis.incr(f"met-{key}")
        deadline = time.monotonic() + 60
        while int(redis.get(f"met-{key}") or 0) < together:
            if time.monotonic() > deadline:
                raise AssertionError(f"{together} tasks never were at work at once")
            time.sleep(0.01)
    for number in range(count):
        live.publish(key, {"task": name, "number": number, "process": os.getpid()})


# The first argument of each task is the key at which it is heard.
publish_task_events(celery, live, tasks=["story*"], to=lambda task: task.args[0], include=["result"])
if "BROKER_THAT_IS_AWAY" in os.environ:
    publish_task_events(celery, os.environ["BROKER_THAT_IS_AWAY"], tasks=["story"])


@celery.task(name="speak")
def speak_in_celery(*arguments: Any) -> None:
    speak(*arguments)


@celery.task(name="speak once", bind=True, acks_late=True, reject_on_worker_lost=True)
def speak_once(self: Task[Any, Any], key: str, how: str) -> None:
    """Publish, and come to nothing twice."""
    live.publish(key, "once", idempotency_key=f"speak-once-{self.request.id}")
    with connected() as redis:
        runs = redis.incr(f"runs-{key}")
    if runs < 3 and how == "retried":
        raise self.retry(countdown=0)
    if runs < 3:
        os.kill(os.getpid(), signal.SIGKILL)
    live.publish(key, f"after {runs} runs")


@celery.task(name="story", bind=True)
def story(self: Task[Any, Any], key: str, how: str) -> str:
    """Tell two pages, and between them what ``how`` says."""
    self.update_state(state="READING", meta={"page": 1})
    if how == "waits":  # to be stopped; not with a connection of redis-py's that is just being opened, which it leaks
        time.sleep(240)
    with connected() as redis:
        runs = redis.incr(f"runs-{key}-{how}")
        if how == "fails":
            raise LookupError("secret")
        if how == "is retried" and runs == 1:
            raise self.retry(exc=OSError("secret"), countdown=0)
        if how == "is killed" and runs < 3:
            os.kill(os.getpid(), signal.SIGKILL)
    self.update_state(state="READING", meta={"page": 2})
    return f"read {runs} times"


@celery.task(name="story of which each word counts", bind=True, acks_late=True, reject_on_worker_lost=True)
def story_again(self: Task[Any, Any], key: str, how: str) -> str:
    """Tell it again where the process was lost in the middle."""
    return str(story.run.__func__(self, key, how))


if __name__ == "__main__":
    import sys

    from rq import Queue, Worker

    connection = Redis.from_url(REDIS_URL)
    # Jobs name the module by its own name, and its children shall find the one that is here.
    sys.modules["tasks_app"] = sys.modules["__main__"]
    Worker([Queue("default", connection=connection)], connection=connection).work()
