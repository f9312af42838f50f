"""What keeps the events of a server that does not keep them itself: a file, or a Redis, new for each run.

::

    with opened("redis") as store:
        store.url                  # redis://127.0.0.1:43211/0
        store.commands()           # {"xread": 12, ...}: how many commands it has done so far
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import Any

from harness import prepare_child, stop
from load import BenchmarkError

START_SECONDS = 10.0


class Store:
    """Where the events are; ``url`` is what servers and publishers are given."""

    def __init__(self, url: str) -> None:
        self.url = url

    def commands(self) -> dict[str, int]:
        """How many commands it has done so far, by their names; none if it does not know commands."""
        return {}


class Redis(Store):
    """A Redis server of a run's own."""

    def __init__(self, url: str, client: Any) -> None:
        super().__init__(url)
        self._client = client
        self._asked = 0

    def commands(self) -> dict[str, int]:
        """How many commands it has done so far, by their names, without those that asked for it here."""
        stats = self._client.info("commandstats")
        counts = {name.removeprefix("cmdstat_"): int(of_command["calls"]) for name, of_command in stats.items()}
        counts["info"] = counts.get("info", 0) - self._asked
        self._asked += 1
        return counts


def check(kinds: Iterable[str]) -> None:
    """Refuse what cannot be opened here before anything is started."""
    if "redis" not in kinds:
        return
    if shutil.which("redis-server") is None:
        raise BenchmarkError("What is kept in Redis needs redis-server; none was found. --servers chooses the others.")
    try:
        import redis  # noqa: F401
    except ImportError:
        raise BenchmarkError("What is kept in Redis needs redis-py: install the dependency group bench.") from None


@contextlib.contextmanager
def opened(kind: str, core: int | None = None) -> Iterator[Store]:
    """Give an empty store: ``"sqlite"``, ``"redis"`` (on ``core``), or ``""`` for the server's own memory."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as directory:
        if kind == "redis":
            with _redis(directory, core) as store:
                yield store
        elif kind == "sqlite":
            yield Store(f"sqlite:///{directory}/sse.db")
        else:
            yield Store("memory://")


@contextlib.contextmanager
def _redis(directory: str, core: int | None) -> Iterator[Redis]:
    import redis

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    # Nothing is written to the disk: a snapshot in the middle of a run would be measured with it.
    options = ("--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--maxclients", "50000")
    process = subprocess.Popen(
        ["redis-server", "--port", str(port), *options, "--dir", directory, "--loglevel", "warning"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: prepare_child(core),
    )
    try:
        url = f"redis://127.0.0.1:{port}/0"
        with redis.Redis.from_url(url) as client:
            _await(client, process)
            yield Redis(url, client)
    finally:
        stop(process)


def _await(client: Any, process: subprocess.Popen[bytes]) -> None:
    import redis

    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            client.ping()
        except redis.RedisError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkError(f"redis-server did not start: {error}.") from error
            time.sleep(0.02)
        else:
            return


def spent(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """The commands done in between."""
    counts = {name: count - before.get(name, 0) for name, count in after.items()}
    return {name: count for name, count in counts.items() if count}
