"""What the benchmarks share: the table of servers, running one of them, reading its costs, counting what it delivers.

A new server is a file in ``servers/`` and a row in :data:`SERVERS`. It is started with a listening socket on
127.0.0.1 inherited from here, so no port is guessed and no connection comes too early. What it must answer:

- ``GET /stream?connectKey=bench``: a stream whose first bytes come at once;
- ``POST /publish?events=..&interval=..&size=..&keys=..`` and ``GET /view``: see ``servers/endpoint.py``; or, if it
  cannot publish by itself, ``POST /publish-one?connectKey=bench`` with the data of one event.

If its events are kept elsewhere, the environment variable ``BENCHMARK_STORE_URL`` says where. What it needs beside
this repository is for ``peers.py``.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import json
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import peers
import psutil
from load import BUILD, STALL_SECONDS, BenchmarkError, Load, Round, Target

HERE = Path(__file__).resolve().parent
STREAM = "/stream?connectKey={key}"
KEY = "bench"
START_SECONDS = 20.0
OPENING_SECONDS = 180.0
ROUND_SECONDS = 180.0
CALM_SECONDS = 15.0
CALM_STEP = 0.1
REACH_TRIES = 10
STOP_SECONDS = 5.0
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Server:
    """How a server is started: its heading in the tables, and its command with ``{fd}`` for the socket.

    ``store``
        what keeps its events, see ``stores.py``; nothing if they stay in its process.
    ``publisher``
        how another process publishes to its clients, see ``publisher.py``; nothing if none can.
    ``needs``
        what has to be there before it can be started, see ``peers.py``.
    ``peer``
        whether it is somebody else's: if it cannot be had, or fails at something, that is told, and is no error.
    ``heartbeats``
        whether it sends any.
    ``files``
        open files that a client costs it.
    ``publishes``
        whether it has an endpoint that publishes, as the others do; else each event is a request to it.
    """

    label: str
    command: tuple[str, ...]
    store: str = ""
    publisher: str = ""
    needs: str = ""
    peer: bool = False
    heartbeats: bool = True
    files: int = 1
    publishes: bool = True


def _pywsgi(file: str) -> tuple[str, ...]:
    return (sys.executable, file, "{fd}")


def _gunicorn(module: str) -> tuple[str, ...]:
    return (
        *(sys.executable, "-m", "gunicorn", f"{module}:app", "--bind", "fd://{fd}", "--workers", "1"),
        *("--worker-class", "gevent", "--worker-connections", "20000", "--log-level", "error"),
        *("--graceful-timeout", "1"),
    )


def _node(file: str) -> tuple[str, ...]:
    return ("node", file, "{fd}")


# The first one chosen is what the others are compared with.
SERVERS = {
    "handwritten": Server("hand-written", _pywsgi("handwritten.py")),
    "ours": Server("flask_sse_stream", _pywsgi("ours.py")),
    "plain": Server("plain C", (str(BUILD / "plain"), "{fd}"), needs="plain"),
    "handwritten-gunicorn": Server("hand-written, gunicorn", _gunicorn("handwritten")),
    "ours-gunicorn": Server("flask_sse_stream, gunicorn", _gunicorn("ours")),
    "koa-sse-stream": Server("koa-sse-stream", _node("koa_sse_stream.js"), needs="node", peer=True),
    "egg-sse": Server("egg-sse", _node("egg_sse.js"), needs="node", peer=True),
    "better-sse": Server("better-sse", _node("better_sse.js"), needs="node", peer=True),
    "fastify-sse": Server("@fastify/sse", _node("fastify_sse.js"), needs="node", peer=True),
    "sse-starlette": Server(
        "sse-starlette", (str(peers.STARLETTE_PYTHON), "sse_starlette_app.py", "{fd}"), needs="starlette", peer=True
    ),
    "flask-sse": Server(
        *("Flask-SSE, Redis", _pywsgi("flasksse.py"), "redis", "flask-sse"),
        needs="redis",
        peer=True,
        heartbeats=False,
        files=2,
    ),
    "nchan": Server("nchan", (sys.executable, "nchan.py", "{fd}", "{port}"), needs="nchan", peer=True, publishes=False),
    "ours-memory": Server("memory://", _pywsgi("ours.py")),
    "ours-sqlite": Server("sqlite://", _pywsgi("ours.py"), "sqlite", "ours"),
    "ours-redis": Server("redis://", _pywsgi("ours.py"), "redis", "ours"),
    "pubsub": Server("bare PUBLISH", _pywsgi("pubsub.py"), "redis", "pubsub"),
    "xread": Server("hand-written, XREAD", _pywsgi("xread.py"), "redis", "xread"),
}
# Those that are asked to publish themselves, or need no process beside them to be published to.
ALONE = tuple(name for name, server in SERVERS.items() if server.peer or not server.store)
DEFAULT_SERVERS = ("handwritten", "ours", "plain")
PEERS = tuple(name for name, server in SERVERS.items() if server.peer)


@dataclass(frozen=True)
class Cores:
    """The CPU of the server and that of everybody else; both ``None`` where there is only one to have."""

    server: int | None
    load: int | None

    @classmethod
    def choose(cls) -> Cores:
        """Take the first two this process may use."""
        allowed = sorted(os.sched_getaffinity(0))
        return cls(allowed[0], allowed[1]) if len(allowed) > 1 else cls(None, None)


@dataclass(frozen=True)
class Published:
    """Nanoseconds of ``CLOCK_MONOTONIC`` at which each publish call began and returned."""

    started: list[int]
    returned: list[int]


class Running:
    """A server that runs, seen from outside."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, *, publishes: bool = True) -> None:
        self.process = process
        self.port = port
        self.publishes = publishes

    def processes(self) -> list[psutil.Process]:
        """The server's process and its workers."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """CPU time of the server so far, user and system, as the kernel accounts for it."""
        return sum(cpu_seconds(process.pid) for process in self.processes())

    def rss(self) -> int:
        """Resident memory of the server in bytes."""
        return sum(int(process.memory_info().rss) for process in self.processes())

    def peak(self) -> int:
        """The most resident memory that the server's processes ever had, in bytes."""
        return sum(_peak(process.pid) for process in self.processes())

    def publish(self, events: int, interval: float, size: int, seconds: float = 60.0, keys: int = 0) -> Published:
        """Make the server publish, and return when it has; with ``keys``, each event to so many keys in turn."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=seconds + events * interval)
        try:
            if self.publishes:
                return self._ask(connection, f"/publish?{events=}&{interval=}&{size=}&{keys=}")
            return self._tell(connection, events, interval, size, keys)
        except (OSError, HTTPException) as error:
            raise BenchmarkError(f"The server did not publish: {error!r}.") from error
        finally:
            connection.close()

    def _ask(self, connection: HTTPConnection, path: str) -> Published:
        connection.request("POST", path)
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise BenchmarkError(f"The server answered {response.status} to a publish request.")
        return Published(**json.loads(body))

    def _tell(self, connection: HTTPConnection, events: int, interval: float, size: int, keys: int) -> Published:
        """What ``servers/endpoint.py`` does, from here."""
        names = [f"{KEY}-{number}" for number in range(keys)] or [KEY]
        published = Published([], [])
        due = time.monotonic()
        connection.request("GET", "/view")  # it is connected, and known to run, before the first event
        connection.getresponse().read()
        for number in range(events):
            due += interval
            time.sleep(max(0.0, due - time.monotonic()) if interval else 0.0)
            published.started.append(time.monotonic_ns())
            text = f"{number} {published.started[-1]} ".ljust(size, "x")
            for name in names:
                connection.request("POST", f"/publish-one?connectKey={name}", text, {"X-EventSource-Event": "tick"})
                response = connection.getresponse()
                response.read()
                if response.status >= 300:
                    raise BenchmarkError(f"The server answered {response.status} to an event.")
            published.returned.append(time.monotonic_ns())
        return published


def cpu_seconds(pid: int) -> float:
    """CPU time of a process in seconds, to the nanosecond.

    ``/proc/<pid>/stat`` has the same sum of user and system time, but in steps of 10 ms, which is several
    percent of a short run.
    """
    clock = ctypes.c_int()
    if ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock)) != 0:
        raise BenchmarkError(f"The CPU time of process {pid} cannot be read.")
    return time.clock_gettime(clock.value)


def _peak(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise BenchmarkError(f"The peak memory of process {pid} cannot be read.")


def prepare_child(core: int | None = None) -> None:
    """Runs in a child's process before its program: it dies with the benchmark, and may have its own core."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if core is not None:
        os.sched_setaffinity(0, {core})


def child_environment(**variables: str) -> dict[str, str]:
    """The environment of a child in Python."""
    # The checkout this file is in is what shall be measured, not a release that is installed as well.
    paths = [str(HERE.parent), str(HERE / "servers"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


@contextlib.contextmanager
def running(
    server: Server, core: int | None = None, ping_seconds: float = 10.0, store_url: str = "memory://"
) -> Iterator[Running]:
    """Run a server in a process of its own; it is gone afterwards, whatever happens."""
    environment = child_environment(
        BENCHMARK_PING_SECONDS=str(ping_seconds), BENCHMARK_STORE_URL=store_url, **peers.environment(server.needs)
    )
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        environment["BENCHMARK_SCRATCH"] = scratch
        with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
            port: int = listener.getsockname()[1]
            process = subprocess.Popen(
                [part.format(fd=listener.fileno(), port=port) for part in server.command],
                cwd=HERE / "servers",
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                preexec_fn=lambda: prepare_child(core),
            )
        try:
            started = Running(process, port, publishes=server.publishes)
            try:
                started.publish(events=0, interval=0, size=0, seconds=START_SECONDS)
            except BenchmarkError as error:
                log.seek(0)
                said = log.read().decode(errors="replace").strip()
                raise BenchmarkError(f"The server {server.label!r} did not start. {error}\n{said}") from error
            yield started
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a child and its children, by force where they do not go."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for worker in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()


def open_all(load: Load, port: int, clients: int, keys: int = 0) -> float:
    """Open ``clients`` streams, of one key or of ``keys`` in turn; return the seconds it took; all or an error."""
    names = [f"{KEY}-{number}" for number in range(keys)] or [KEY]
    opened = load.open(port, clients, [Target(STREAM.format(key=name)) for name in names], seconds=OPENING_SECONDS)
    if opened.failed:
        raise BenchmarkError(f"{opened.failed} of {clients} streams did not open: {opened.trouble}.")
    return opened.seconds


def reach_all(server: Running, load: Load, keys: int = 0) -> None:
    """Publish until every client gets it: some are sent the first bytes before they are subscribed."""
    for _ in range(REACH_TRIES):
        load.expect(1)
        server.publish(1, 0, 100, keys=keys)
        if load.round().least:
            return
    raise BenchmarkError(f"After {REACH_TRIES} events there still were clients that had none.")


def check(result: Round, clients: int, events: int) -> None:
    """Refuse figures of a run that lost, doubled or disordered something."""
    if (result.clients, result.ended, result.least, result.most) != (clients, 0, events, events):
        raise BenchmarkError(
            f"{clients} clients were to get {events} events each; they got {result.least} to {result.most}, "
            f"{result.delivered} in all, and {result.ended} of {result.clients} streams ended."
        )
    if (result.numbered, result.lost, result.doubled) != (clients * events, 0, 0):
        raise BenchmarkError(
            f"{clients} clients got {events} events each, but not the right ones in order: {result.numbered} had "
            f"numbers, {result.lost} were passed over and {result.doubled} came again or too late."
        )


def deliver(
    server: Running, load: Load, clients: int, events: int, interval: float = 0.0, size: int = 100, keys: int = 0
) -> tuple[Published, Round]:
    """Publish events and wait until all clients have had each of them once and in order; that, or an error."""
    load.expect(events, ROUND_SECONDS + events * interval, stall=STALL_SECONDS + interval)
    published = server.publish(events, interval, size, ROUND_SECONDS, keys)
    result = load.round()
    check(result, clients, events)
    return published, result


def calm(server: Running) -> None:
    """Wait until the server has nothing left to do: some clean up for long after the last client has everything."""
    deadline = time.monotonic() + CALM_SECONDS
    while time.monotonic() < deadline:
        cpu = server.cpu_seconds()
        time.sleep(CALM_STEP)
        if server.cpu_seconds() - cpu < CALM_STEP / 20:
            return


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of ``values`` that is not exceeded by ``percent`` of them (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -int(-percent * len(ordered) // 100) - 1)]


def machine(needs: Sequence[str] = ()) -> dict[str, str]:
    """What the figures depend on: the processor, the kernel and the versions, also of what servers need."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    versions = {}
    for package in ("flask", "gevent", "gunicorn", "redis", "flask-sse"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "processor": model,
        "cores": str(os.cpu_count()),
        "kernel": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        **versions,
        **peers.versions(needs),
    }


def allow_files(clients: int, each: int = 1) -> None:
    """Raise this process's limit of open files, which the servers inherit, to what ``clients`` need.

    ``each`` is how many one client costs its server.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and clients * each + 100 > most:
        raise BenchmarkError(f"{clients} clients need more than the {most} open files allowed here.")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
