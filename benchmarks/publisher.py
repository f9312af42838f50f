"""A process that publishes and has no streams, as a background task or a cron job has none.

:class:`Publisher` starts this file as a program and makes it publish::

    with Publisher("ours", store.url) as publisher:
        published = publisher.publish(["bench"], events=400, interval=0.005, size=100)

The program reads one request a line, as JSON, and answers each with one line: the times at which each call began
and returned, and the ids. It is told how servers are fed, see :data:`KINDS`.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, final

from harness import Published, child_environment, prepare_child
from load import BenchmarkError

# What publishes one text to a key and gives the event's id, if it has one.
Publish = Callable[[str, str], Any]


def _ours(url: str) -> Publish:
    from flask_sse_stream import Publisher as OurPublisher

    publisher = OurPublisher(url)
    return lambda key, text: publisher.publish(key, text, event="tick")


def _flask_sse(url: str) -> Publish:
    from flask import Flask
    from flask_sse import sse

    app = Flask(__name__)
    app.config["REDIS_URL"] = url
    app.app_context().push()
    return lambda key, text: sse.publish(text, type="tick", channel=key)


def _pubsub(url: str) -> Publish:
    import redis

    client = redis.Redis.from_url(url)
    return lambda key, text: client.publish(key, f"event: tick\ndata: {text}\n\n")


def _xread(url: str) -> Publish:
    import redis

    client = redis.Redis.from_url(url, decode_responses=True)
    return lambda key, text: client.xadd(key, {"data": text}, maxlen=1000, approximate=True)


KINDS: dict[str, Callable[[str], Publish]] = {
    "ours": _ours,
    "flask-sse": _flask_sse,
    "pubsub": _pubsub,
    "xread": _xread,
}


@dataclass(frozen=True)
class PublishedElsewhere(Published):
    """What the calls returned, too: the ids of the events, where they have any."""

    ids: list[str]


@final
class Publisher:
    """One such process; a context manager that leaves none behind."""

    def __init__(self, kind: str, url: str) -> None:
        self._seconds = 0.0
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), kind, url],
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=prepare_child,
        )

    def publish(
        self, keys: Sequence[str], events: int, interval: float = 0, size: int = 100, seconds: float = 60.0
    ) -> PublishedElsewhere:
        """Publish ``events`` events to each of ``keys``, the keys in turn, and return when that is done."""
        self.begin(keys, events, interval, size, seconds)
        return self.finish()

    def begin(
        self, keys: Sequence[str], events: int, interval: float = 0, size: int = 100, seconds: float = 60.0
    ) -> None:
        """Begin to publish, for several of these to do it at once."""
        assert self._process.stdin is not None
        self._seconds = seconds + len(keys) * events * interval
        request = {"keys": list(keys), "events": events, "interval": interval, "size": size}
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise _failed("has ended unexpectedly") from None

    def finish(self) -> PublishedElsewhere:
        """Wait until what was begun is done."""
        assert self._process.stdout is not None
        answer = b""
        deadline = time.monotonic() + self._seconds
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise _failed(f"did not answer within {self._seconds:.0f} seconds")
            received = os.read(self._process.stdout.fileno(), 1 << 20)
            if not received:
                raise _failed("has ended unexpectedly")
            answer += received
        return PublishedElsewhere(**json.loads(answer))

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()  # it has nothing to save
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


def _failed(how: str) -> BenchmarkError:
    return BenchmarkError(f"A publishing process {how}.")


def answer(publish: Publish, keys: list[str], events: int, interval: float, size: int) -> dict[str, list[Any]]:
    """Do what one request asks for."""
    text = "x" * size
    step = round(interval * 1e9)
    started, returned, ids = [], [], []
    due = time.monotonic_ns()
    for _ in range(events):
        for key in keys:
            if step:
                due += step
                time.sleep(max(0, due - time.monotonic_ns()) / 1e9)
            started.append(time.monotonic_ns())
            identifier = publish(key, text)
            returned.append(time.monotonic_ns())
            ids.append(str(identifier))
    return {"started": started, "returned": returned, "ids": ids}


def main() -> None:
    _, kind, url = sys.argv
    publish = KINDS[kind](url)
    for line in sys.stdin:
        print(json.dumps(answer(publish, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
