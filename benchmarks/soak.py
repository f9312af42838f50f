"""Whether gunicorn's workers and a broker keep every promise for an hour in which everything goes wrong in turn.

    python benchmarks/soak.py                          an hour, with Redis
    python benchmarks/soak.py --short                  five minutes
    python benchmarks/soak.py --short --broker sqlite

Clients come and go, some read slowly, publishers never stop, and every few seconds something happens: a burst, all
clients leaving at once, a worker killed or stopped, the broker killed, stopped, emptied or cut off. ``soak_clients.py``
knows what each client must have been given. At the end it is told what was lost (0) and doubled (0), and by how much
the memory and the descriptors of a worker that lived all the while have grown; if one of these is not as it must be,
the program ends with status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from harness import HERE, allow_files, child_environment, machine, prepare_child, stop
from load import BenchmarkError
from soak_clients import ALL, Book, Client, Crowd
from stores import check as check_store

from flask_sse_stream import Publisher
from flask_sse_stream.errors import BrokerError

START_SECONDS = 30.0
END_SECONDS = 60.0
SAMPLE_SECONDS = 1.0
CALM_SHARE = 0.15  # of the time at the end, without faults
HISTORY = 1000
SETTINGS: dict[str, Any] = {
    "ping_interval": 2.0,
    "history_size": HISTORY,
    "queue_events": 200,
    "send_buffer": 16 * 1024,
    "send_timeout": 10.0,
    "drain_seconds": 1.0,
}
BURST = 300, 1000  # events and bytes: more than a slow reader's queue
MOST_GROWTH = 0.15
MOST_GROWTH_BYTES = 8_000_000  # a short run's allocator may take as much without a leak
MOST_FILES = 10


class Store:
    """A broker that things happen to; ``faults`` has them by their name."""

    url = ""

    def __init__(self) -> None:
        self.faults: dict[str, Callable[[], object]] = {}

    def close(self) -> None:
        """Nothing of it stays."""


class Redis(Store):
    """A Redis server that loses nothing it has acknowledged."""

    def __init__(self, directory: str) -> None:
        super().__init__()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self._directory = directory
        self._start()
        self.faults = {
            "Redis killed and started": self._restart,
            "Redis stopped for 4 s": self._pause,
            "Redis emptied": lambda: self._command("FLUSHALL"),
            "connections to Redis cut": self._cut,
        }

    def _start(self) -> None:
        options = ("--bind", "127.0.0.1", "--save", "", "--appendonly", "yes", "--appendfsync", "always")
        self._process = subprocess.Popen(
            ["redis-server", "--port", str(self._port), *options, "--dir", self._directory, "--loglevel", "warning"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=prepare_child,
        )
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self._command("PING")
                return
            except Exception as error:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise BenchmarkError(f"redis-server did not start: {error}.") from error
                time.sleep(0.05)

    def _command(self, *command: str) -> Any:
        import redis

        with redis.Redis(port=self._port, socket_timeout=START_SECONDS) as client:
            return client.execute_command(*command)

    def _restart(self) -> None:
        self._process.kill()
        self._process.wait()
        time.sleep(random.uniform(0.1, 2.0))
        self._start()

    def _pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)
        try:
            time.sleep(4)
        finally:
            self._process.send_signal(signal.SIGCONT)

    def _cut(self) -> None:
        self._command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        self._command("CLIENT", "KILL", "TYPE", "pubsub")

    def close(self) -> None:
        stop(self._process)


class SQLite(Store):
    """A file."""

    def __init__(self, directory: str) -> None:
        super().__init__()
        self._path = Path(directory, "soak.db")
        self.url = f"sqlite:///{self._path}"
        self.faults = {"database locked for 4 s": self._lock, "database deleted": self._delete}

    def _lock(self) -> None:
        with contextlib.closing(sqlite3.connect(self._path, timeout=10, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            time.sleep(4)
            connection.execute("ROLLBACK")

    def _delete(self) -> None:
        for path in sorted(self._path.parent.glob("soak.db*")):
            if path.is_file():
                path.unlink()


class Workers:
    """gunicorn, and what it costs. The first of its workers is not killed, so that it can be watched all the while."""

    def __init__(self, count: int, url: str, log: Path) -> None:
        self._log = log
        settings = json.dumps({**SETTINGS, "broker_url": url})
        with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener, log.open("wb") as output:
            self.port: int = listener.getsockname()[1]
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "gunicorn", "soaked:app", "--bind", f"fd://{listener.fileno()}"),
                    *("--workers", str(count), "--worker-class", "gevent", "--worker-connections", "5000"),
                    *("--graceful-timeout", "3", "--log-level", "warning"),
                ],
                cwd=HERE / "servers",
                env=child_environment(SOAK_SETTINGS=settings),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[listener.fileno()],
                preexec_fn=prepare_child,
            )
        self._count = count
        self.watched = 0
        self.files = 0
        self.samples: list[tuple[float, float]] = []  # of the watched one: seconds and bytes

    def pids(self) -> list[int]:
        """The workers that there are, oldest first."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child.pid)
        return sorted(found, key=lambda pid: psutil.Process(pid).create_time())

    def wait(self, none_of: Sequence[int] = ()) -> None:
        """Wait until as many as there should be answer, none of them one of those that are to go."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                pids = self.pids()
                with socket.create_connection(("127.0.0.1", self.port), timeout=5) as client:
                    client.sendall(b"HEAD /stream HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n\r\n")
                    if client.recv(16) and len(pids) == self._count and not set(pids) & set(none_of):
                        return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkError(f"gunicorn did not start:\n{self.log()[-2000:]}")
            time.sleep(0.05)

    def watch(self) -> None:
        """From now on watch the oldest worker."""
        self.watched = self.pids()[0]
        self.files = psutil.Process(self.watched).num_fds()

    def sample(self) -> None:
        """Note what the watched worker has."""
        try:
            self.samples.append((time.monotonic(), float(psutil.Process(self.watched).memory_info().rss)))
        except psutil.NoSuchProcess:
            raise BenchmarkError(f"The worker that nobody killed is gone:\n{self.log()[-2000:]}") from None

    def others(self) -> list[int]:
        """The workers that may be killed."""
        return [pid for pid in self.pids() if pid != self.watched]

    def kill_one(self) -> None:
        """SIGKILL one, and wait for the one that gunicorn puts in its place."""
        victim = random.choice(self.others())
        os.kill(victim, signal.SIGKILL)
        self.wait([victim])

    def stop_one(self) -> None:
        """Let one stand still for two seconds, the watched one too."""
        victim = random.choice(self.pids())
        os.kill(victim, signal.SIGSTOP)
        try:
            time.sleep(2)
        finally:
            os.kill(victim, signal.SIGCONT)

    def reload(self) -> None:
        """Have gunicorn put new workers in the place of all."""
        old = self.pids()
        self.process.send_signal(signal.SIGHUP)
        self.wait(old)

    def end_one(self) -> None:
        """SIGTERM one, as gunicorn does with one that has had its number of requests."""
        victim = random.choice(self.others())
        os.kill(victim, signal.SIGTERM)
        self.wait([victim])

    def log(self) -> str:
        """What gunicorn and the workers have said."""
        return self._log.read_text(errors="replace")


class Publishers:
    """A thread for each source, which publishes its numbers in order; bursts are its too."""

    def __init__(self, book: Book, url: str, sources: Sequence[str], rate: float) -> None:
        self._book = book
        self._publisher = Publisher(url, history_size=HISTORY)
        self._pause = len(sources) / rate
        self._stopped = threading.Event()
        self._bursts: Counter[str] = Counter()
        self.failure: BaseException | None = None
        self._threads = [threading.Thread(target=self._run, args=(source,), daemon=True) for source in sources]
        self._sources = sources

    def fill(self) -> None:
        """Fill every history, so that what it takes is there before the memory is looked at."""
        for source in self._sources:
            for _ in range(HISTORY):
                self._book.publish(source, self._call(source))

    def start(self) -> None:
        """Begin to publish."""
        for thread in self._threads:
            thread.start()

    def burst(self) -> None:
        """Have one source publish much at once."""
        self._bursts[random.choice([source for source in self._sources if source != ALL])] += 1

    def stop(self) -> None:
        """Publish no more."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(START_SECONDS)

    def finish(self) -> None:
        """Publish one last number of each source, again until it is taken."""
        deadline = time.monotonic() + START_SECONDS
        for source in self._sources:
            while not self._book.publish(source, self._call(source)):
                if time.monotonic() > deadline:
                    raise BenchmarkError("The broker takes nothing any more.")
                time.sleep(0.1)

    def close(self) -> None:
        """Let go of the broker."""
        self.stop()
        self._publisher.close()

    def _call(self, source: str) -> Callable[[str], str]:
        if source == ALL:
            return self._publisher.publish_all
        return lambda text: self._publisher.publish(source, text)

    def _run(self, source: str) -> None:
        call = self._call(source)
        try:
            while not self._stopped.wait(random.uniform(0.5, 1.5) * self._pause):
                self._book.publish(source, call)
                if self._bursts[source]:
                    self._bursts[source] -= 1
                    events, size = BURST
                    for _ in range(events):
                        if not self._book.publish(source, call, size):
                            break
        except BaseException as error:
            self.failure = error
            raise


@dataclass
class Plan:
    """How long, how many, how often."""

    minutes: float
    clients: int
    keys: int
    rate: float
    workers: int
    every: float
    broker: str


@contextlib.contextmanager
def _store(kind: str, directory: str) -> Iterator[Store]:
    store = Redis(directory) if kind == "redis" else SQLite(directory)
    try:
        yield store
    finally:
        store.close()


def soak(plan: Plan) -> dict[str, Any]:
    """Run it all; give the figures."""
    book = Book()
    keys = [f"key-{number}" for number in range(plan.keys)]
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as directory,
        _store(plan.broker, directory) as store,
        contextlib.ExitStack() as stack,
    ):
        workers = Workers(plan.workers, store.url, Path(directory, "workers.log"))
        stack.callback(stop, workers.process)
        workers.wait()
        publishers = Publishers(book, store.url, [*keys, ALL], plan.rate)
        stack.callback(publishers.close)
        clients = [
            # A quarter churns, a tenth reads slowly, the others stay until they are cut.
            Client(book, workers.port, keys[number % plan.keys], slow=number % 10 == 7, stays=5.0 * (number % 4 == 1))
            for number in range(plan.clients)
        ]
        publishers.fill()
        # First of all, for it leaves nobody to be watched.
        survived = Counter({"all workers replaced (SIGHUP)": 1})
        workers.reload()
        workers.watch()
        crowd = stack.enter_context(Crowd(clients))
        _wait(lambda: crowd.reading() == plan.clients, f"{plan.clients} streams open", START_SECONDS + END_SECONDS)
        publishers.start()
        began, filled = time.monotonic(), book.acknowledged
        streams = _go_wrong(plan, crowd, publishers, workers, store, survived, began + plan.minutes * 60)
        took = time.monotonic() - began
        for failure in (crowd.failure, publishers.failure):
            if failure is not None:
                raise BenchmarkError(f"The soak itself failed: {failure!r}.")
        publishers.stop()
        workers.sample()
        crowd.churning = False
        publishers.finish()
        with contextlib.suppress(BenchmarkError):  # what is missing then is lost
            _wait(lambda: not any(client.missing() for client in clients), "everybody has all", END_SECONDS)
        crowd.__exit__()
        for client in clients:
            client.settle()
        with contextlib.suppress(BenchmarkError):
            _wait(lambda: _files(workers) <= MOST_FILES, "descriptors are closed", END_SECONDS)
        published = book.acknowledged - filled
        return _figures(plan, book, crowd, workers, survived, streams, took) | {
            "published": published,
            "events_a_second": published / took,
        }


def _go_wrong(
    plan: Plan,
    crowd: Crowd,
    publishers: Publishers,
    workers: Workers,
    store: Store,
    survived: Counter[str],
    end: float,
) -> list[int]:
    """Let one thing after the other go wrong, all of them before one comes again; give how many streams there were."""
    faults: dict[str, Callable[[], object]] = {
        "bursts": publishers.burst,
        "all clients cut": crowd.cut_all,
        "worker killed (SIGKILL)": workers.kill_one,
        "worker ended (SIGTERM)": workers.end_one,
        "worker stopped for 2 s": workers.stop_one,
        **store.faults,
    }
    turns = itertools.chain.from_iterable(random.sample(list(faults), len(faults)) for _ in itertools.count())
    calm = end - CALM_SHARE * plan.minutes * 60
    streams = []
    due = time.monotonic() + plan.every
    while (now := time.monotonic()) < end:
        if due <= now < calm:
            name = next(turns)
            faults[name]()
            survived[name] += 1
            due = time.monotonic() + plan.every * random.uniform(0.5, 1.5)
        streams.append(crowd.reading())
        workers.sample()
        time.sleep(min(SAMPLE_SECONDS, plan.every / 2))
    return streams


def _wait(condition: Callable[[], bool], what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise BenchmarkError(f"Not within {seconds:.0f} seconds: {what}.")
        time.sleep(0.1)


def _files(workers: Workers) -> int:
    return psutil.Process(workers.watched).num_fds() - workers.files


def growth(samples: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Give the memory of the second quarter and of the last, as medians, and the slope from there in bytes an hour."""
    quarter = max(1, len(samples) // 4)
    early, late = samples[quarter : 2 * quarter] or samples, samples[-quarter:]
    counted = samples[quarter:]
    middle = sum(when for when, _ in counted) / len(counted)
    mean = sum(value for _, value in counted) / len(counted)
    square = sum((when - middle) ** 2 for when, _ in counted)
    slope = sum((when - middle) * (value - mean) for when, value in counted) / square if square else 0.0
    return _median(early), _median(late), slope * 3600


def _median(samples: Sequence[tuple[float, float]]) -> float:
    values = sorted(value for _, value in samples)
    return values[len(values) // 2]


def _figures(
    plan: Plan, book: Book, crowd: Crowd, workers: Workers, survived: Counter[str], streams: list[int], took: float
) -> dict[str, Any]:
    counts: Counter[str] = sum((client.counts for client in crowd.clients), Counter())
    problems = [problem for client in crowd.clients for problem in client.problems]
    early, late, slope = growth(workers.samples)
    return {
        "minutes": took / 60,
        "clients": plan.clients,
        "streams_on_average": sum(streams) / len(streams),
        "connections": crowd.connections,
        "refused_publishes": book.unknown,
        "longest_publish": book.longest,
        "delivered": counts["delivered"],
        "deliveries_a_second": counts["delivered"] / took,
        "survived": dict(sorted(survived.items())),
        "lost": counts["lost"],
        "doubled": counts["doubled"],
        "resets": counts["resets"],
        "problems": problems,
        "tracebacks": workers.log().count("Traceback"),
        "early_bytes": early,
        "late_bytes": late,
        "growth": late / early - 1,
        "slope": slope,
        "files": _files(workers),
        "log": workers.log()[-3000:],
    }


def verdict(figures: dict[str, Any]) -> list[str]:
    """Say what is not as it must be."""
    wrong = [f"{name}: {figures[name]}" for name in ("lost", "doubled", "tracebacks") if figures[name]]
    if figures["problems"]:
        wrong.append("; ".join(figures["problems"][:5]))
    if figures["tracebacks"]:
        wrong.append(figures["log"])
    if not figures["delivered"]:
        wrong.append("nothing was delivered")
    grown = figures["late_bytes"] - figures["early_bytes"]
    if figures["growth"] > MOST_GROWTH and grown > MOST_GROWTH_BYTES:
        wrong.append(f"the memory of a worker grew by {grown / 1e6:.1f} MB, {figures['growth']:.0%}")
    if figures["files"] > MOST_FILES:
        wrong.append(f"{figures['files']} descriptors stay open when all clients have left")
    return wrong


def show(figures: dict[str, Any]) -> None:
    """Print the figures."""
    lines = {
        "load": f"{figures['clients']} clients for {figures['minutes']:.1f} minutes, of whose streams "
        f"{figures['streams_on_average']:.0f} were open on average, over {figures['connections']} connections",
        "published": f"{figures['published']} events, {figures['events_a_second']:.0f} a second; "
        f"{figures['refused_publishes']} calls raised BrokerError, the longest took {figures['longest_publish']:.2f} s",
        "delivered": f"{figures['delivered']}, {figures['deliveries_a_second']:.0f} a second",
        "survived": ", ".join(f"{count} x {name}" for name, count in figures["survived"].items()),
        "events lost": figures["lost"],
        "events doubled": figures["doubled"],
        "resets": f"{figures['resets']}, each in place of what the history no longer had",
        "tracebacks in the log": figures["tracebacks"],
        "memory of a worker": f"{figures['early_bytes'] / 1e6:.1f} MB early, {figures['late_bytes'] / 1e6:.1f} late: "
        f"{figures['growth']:+.1%}, {figures['slope'] / 1e6:+.1f} MB an hour",
        "descriptors": f"{figures['files']:+d} after all clients have left",
    }
    for name, text in lines.items():
        print(f"{name:>22}  {text}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Much load for long, while everything goes wrong in turn.")
    parser.add_argument("--short", action="store_true", help="five minutes")
    parser.add_argument("--minutes", type=float, help="how long; 60 unless --short says 5")
    parser.add_argument("--broker", choices=["redis", "sqlite"], default="redis")
    parser.add_argument("--clients", type=int, default=300)
    parser.add_argument("--keys", type=int, default=10)
    parser.add_argument("--rate", type=float, default=50.0, help="events a second, over all keys")
    parser.add_argument("--workers", type=int, default=3, help="processes of gunicorn's; one is watched, not killed")
    parser.add_argument("--every", type=float, help="seconds between two faults, on average; 15, or 6 with --short")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of what happens in which order")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    minutes = options.minutes or (5.0 if options.short else 60.0)
    every = options.every or (6.0 if options.short else 15.0)
    if min(options.clients, options.keys) < 1 or options.workers < 2 or min(minutes, every, options.rate) <= 0:
        parser.error("clients and keys start at 1, workers at 2, minutes, rate and --every above 0")
    check_store({options.broker})
    allow_files(options.clients)
    random.seed(options.seed)
    plan = Plan(minutes, options.clients, options.keys, options.rate, options.workers, every, options.broker)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"{options.broker}, {options.workers} workers, --seed {options.seed}", flush=True)
    try:
        figures = soak(plan)
    except BrokerError as error:
        raise BenchmarkError(f"The broker failed before anything had been done to it: {error}.") from error
    show(figures)
    if options.json is not None:
        written = {"benchmark": "soak", "machine": machine(), "broker": options.broker, **figures}
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    wrong = verdict(figures)
    for text in wrong:
        print(f"NOT AS IT MUST BE: {text}", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchmarkError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
