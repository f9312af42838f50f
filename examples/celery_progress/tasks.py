"""The work: a Celery task whose progress and end are published from whichever process knows of them.

Start a worker with ``celery --workdir examples/celery_progress --app tasks worker``.
"""

import keyword
import os
import sysconfig
import time
import tokenize
from collections import Counter
from pathlib import Path
from typing import Any

from celery import Celery, Task

from flask_sse_stream.celery import publish_task_events

REDIS_URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")
# One Redis carries the tasks to the workers and the events to the pages; they keep out of each other's way.
SSE_BROKER_URL = os.environ.get("SSE_BROKER_URL", REDIS_URL)

FOLDER = Path(sysconfig.get_path("stdlib"))
SECONDS_BETWEEN = 0.1  # a page shows no more, and the log need not remember more

celery = Celery("tasks", broker=REDIS_URL)
celery.conf.update(
    task_ignore_result=True,  # it is told by an event
    broker_connection_retry_on_startup=True,
)


@celery.task(bind=True)
def count_names(self: "Task[Any, Any]", letters: int) -> dict[str, Any]:
    """Count the names in the source of Python's standard library, and tell which are the most frequent."""
    files = sorted(path for path in FOLDER.rglob("*.py") if not {"site-packages", "dist-packages"} & set(path.parts))
    of = len(files)
    told = time.monotonic()
    names: Counter[str] = Counter()
    for done, path in enumerate(files, 1):
        names.update(name for name in names_in(path) if len(name) >= letters)
        if time.monotonic() - told >= SECONDS_BETWEEN:
            self.update_state(state="COUNTING", meta={"done": done, "of": of})
            told = time.monotonic()
        time.sleep(0)  # in a worker of greenlets (--pool gevent) the other tasks have their turn here
    return {"of": of, "names": names.most_common(10)}


def names_in(path: Path) -> list[str]:
    try:
        with tokenize.open(path) as source:
            tokens = [
                token.string for token in tokenize.generate_tokens(source.readline) if token.type == tokenize.NAME
            ]
    except (SyntaxError, tokenize.TokenError, UnicodeDecodeError):
        return []  # Python tests itself with some files that are no Python
    return [name for name in tokens if not keyword.iskeyword(name)]


# Each event says how many letters it is about, so who comes late needs the latest event and no other.
publish_task_events(celery, SSE_BROKER_URL, tasks=[count_names], to="task-{task_id}", include=["kwargs", "result"])
