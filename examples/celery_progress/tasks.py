"""The work, and what it says of itself: a Celery task that publishes its progress from whichever process it runs in.

Start a worker with ``celery --workdir examples/celery_progress --app tasks worker``.
"""

import keyword
import logging
import os
import sysconfig
import time
import tokenize
from collections import Counter
from pathlib import Path
from typing import Any

from celery import Celery, Task
from celery.signals import task_failure

from flask_sse_stream import BrokerError, Publisher

REDIS_URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")
# One Redis carries the tasks to the workers and the events to the pages; they keep out of each other's way.
SSE_BROKER_URL = os.environ.get("SSE_BROKER_URL", REDIS_URL)

FOLDER = Path(sysconfig.get_path("stdlib"))
SECONDS_BETWEEN = 0.1  # a page shows no more, and the log need not remember more

logger = logging.getLogger(__name__)

celery = Celery("tasks", broker=REDIS_URL)
celery.conf.update(
    task_ignore_result=True,  # it is told by an event
    broker_connection_retry_on_startup=True,
)

# Made once, before the worker forks its children: each of them may go on using it. Nothing is opened until something
# is published.
live = Publisher(SSE_BROKER_URL)


def key_of(task_id: str) -> str:
    """Name the pool of those who watch a task."""
    return f"task-{task_id}"


def tell(task_id: str, event: str, **state: Any) -> None:
    """Publish the state of a task, all of it: who comes late needs the latest event and no other."""
    try:
        live.publish(key_of(task_id), {"task": task_id, **state}, event=event)
    except BrokerError:
        # The work is worth doing even if nobody can be told of it.
        logger.exception("nobody was told that task %s is %r", task_id, event)


@celery.task(bind=True)
def count_names(self: "Task[Any, Any]", letters: int) -> None:
    """Count the names in the source of Python's standard library, and tell which are the most frequent."""
    task_id = str(self.request.id)
    files = sorted(path for path in FOLDER.rglob("*.py") if not {"site-packages", "dist-packages"} & set(path.parts))
    of = len(files)
    tell(task_id, "started", letters=letters, done=0, of=of)
    told = time.monotonic()
    names: Counter[str] = Counter()
    for done, path in enumerate(files, 1):
        names.update(name for name in names_in(path) if len(name) >= letters)
        if time.monotonic() - told >= SECONDS_BETWEEN or done == of:
            tell(task_id, "progress", letters=letters, done=done, of=of)
            told = time.monotonic()
        time.sleep(0)  # in a worker of greenlets (--pool gevent) the other tasks have their turn here
    tell(task_id, "done", letters=letters, done=of, of=of, names=names.most_common(10))


def names_in(path: Path) -> list[str]:
    try:
        with tokenize.open(path) as source:
            tokens = [
                token.string for token in tokenize.generate_tokens(source.readline) if token.type == tokenize.NAME
            ]
    except (SyntaxError, tokenize.TokenError, UnicodeDecodeError):
        return []  # Python tests itself with some files that are no Python
    return [name for name in tokens if not keyword.iskeyword(name)]


@task_failure.connect(sender=count_names)
def tell_failure(task_id: str, exception: BaseException, kwargs: dict[str, Any], **_: Any) -> None:
    """Tell why a task came to nothing.

    A signal and no ``except`` in the task: where its process was killed, by a person or for want of memory, it is the
    worker's main process that notices, and runs this.
    """
    tell(task_id, "failed", letters=kwargs["letters"], why=type(exception).__name__)
