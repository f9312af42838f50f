"""What the benchmarks share: the table of servers, running one of them, reading its costs, printing figures.

A new server is a file in ``servers/`` and a row in :data:`SERVERS`. It is started with a listening socket on
127.0.0.1 inherited from here, so no port is guessed and no connection comes too early. What it must answer:

- ``GET /stream?connectKey=bench``: a stream whose first bytes come at once;
- ``POST /publish?events=..&interval=..&size=..``: see ``servers/endpoint.py``.

If its events are kept elsewhere, the environment variable ``BENCHMARK_STORE_URL`` says where.
"""

from __future__ import annotations

import argparse
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
from statistics import median
from typing import Any

import psutil
from load import BenchmarkError, Load, Target

HERE = Path(__file__).resolve().parent
STREAM = "/stream?connectKey={key}"
KEY = "bench"
START_SECONDS = 20.0
STOP_SECONDS = 5.0
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Server:
    """How a server is started: its heading in the tables, and its command with ``{fd}`` for the socket.

    ``store``
        what keeps its events, see ``stores.py``; nothing if they stay in its process.
    ``publisher``
        how another process publishes to its clients, see ``publisher.py``; nothing if none can.
    """

    label: str
    command: tuple[str, ...]
    store: str = ""
    publisher: str = ""


def _pywsgi(file: str) -> tuple[str, ...]:
    return (sys.executable, file, "{fd}")


def _gunicorn(module: str) -> tuple[str, ...]:
    return (
        *(sys.executable, "-m", "gunicorn", f"{module}:app", "--bind", "fd://{fd}", "--workers", "1"),
        *("--worker-class", "gevent", "--worker-connections", "20000", "--log-level", "error"),
        *("--graceful-timeout", "1"),
    )


# The first one chosen is what the others are compared with.
SERVERS = {
    "handwritten": Server("hand-written", _pywsgi("handwritten.py")),
    "ours": Server("flask_sse_stream", _pywsgi("ours.py")),
    "handwritten-gunicorn": Server("hand-written, gunicorn", _gunicorn("handwritten")),
    "ours-gunicorn": Server("flask_sse_stream, gunicorn", _gunicorn("ours")),
    "flask-sse": Server("Flask-SSE, Redis", _pywsgi("flasksse.py"), "redis", "flask-sse"),
    "ours-memory": Server("memory://", _pywsgi("ours.py")),
    "ours-sqlite": Server("sqlite://", _pywsgi("ours.py"), "sqlite", "ours"),
    "ours-redis": Server("redis://", _pywsgi("ours.py"), "redis", "ours"),
    "pubsub": Server("bare PUBLISH", _pywsgi("pubsub.py"), "redis", "pubsub"),
    "xread": Server("hand-written, XREAD", _pywsgi("xread.py"), "redis", "xread"),
}
IN_PROCESS = tuple(name for name, server in SERVERS.items() if not server.store)
DEFAULT_SERVERS = ("handwritten", "ours")


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

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.port = port

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

    def publish(self, events: int, interval: float, size: int, seconds: float = 60.0) -> Published:
        """Make the server publish, and return when it has."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=seconds + events * interval)
        try:
            connection.request("POST", f"/publish?events={events}&interval={interval}&size={size}")
            response = connection.getresponse()
            body = response.read()
        except (OSError, HTTPException) as error:
            raise BenchmarkError(f"The server did not publish: {error!r}.") from error
        finally:
            connection.close()
        if response.status != 200:
            raise BenchmarkError(f"The server answered {response.status} to a publish request.")
        return Published(**json.loads(body))


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
    environment = child_environment(BENCHMARK_PING_SECONDS=str(ping_seconds), BENCHMARK_STORE_URL=store_url)
    with tempfile.TemporaryFile() as log:
        with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
            port: int = listener.getsockname()[1]
            process = subprocess.Popen(
                [part.format(fd=listener.fileno()) for part in server.command],
                cwd=HERE / "servers",
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                preexec_fn=lambda: prepare_child(core),
            )
        try:
            started = Running(process, port)
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


def open_all(load: Load, port: int, clients: int) -> float:
    """Open ``clients`` streams and return the seconds it took; all of them or an error."""
    opened = load.open(port, clients, [Target(STREAM.format(key=KEY))])
    if opened.failed:
        raise BenchmarkError(f"{opened.failed} of {clients} streams did not open: {opened.trouble}.")
    return opened.seconds


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of ``values`` that is not exceeded by ``percent`` of them (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -int(-percent * len(ordered) // 100) - 1)]


@dataclass(frozen=True)
class Figure:
    """A row of a table: the name in the results, its heading, and whether more of it is better."""

    name: str
    heading: str
    more_is_better: bool = False


def medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each figure over several runs."""
    return {name: median(run[name] for run in runs) for name in runs[0]}


def _number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def print_table(title: str, figures: Sequence[Figure], results: dict[str, dict[str, float]]) -> None:
    """Print one table: a row for each figure, a column for each server, ratios to the first of them.

    A figure that a server does not have is a dash.
    """
    names = list(results)
    headings = ["", *(SERVERS[name].label for name in names)]
    rows = []
    for figure in figures:
        reference = results[names[0]].get(figure.name, 0)
        row = [figure.heading]
        for position, name in enumerate(names):
            value = results[name].get(figure.name)
            if value is None:
                row.append("-")
                continue
            cell = _number(value)
            if position and value > 0 and reference > 0:
                gain = value / reference if figure.more_is_better else reference / value
                cell += f"  ({gain:.1f}x better)" if gain >= 1 else f"  ({1 / gain:.1f}x worse)"
            row.append(cell)
        rows.append(row)
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    print(f"\n{title}\n")
    for row in [headings, *rows]:
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip(), flush=True)


def machine() -> dict[str, str]:
    """What the figures depend on: the processor, the kernel and the versions."""
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
    }


def arguments(
    description: str, servers: Sequence[str] = IN_PROCESS, default: Sequence[str] = DEFAULT_SERVERS
) -> argparse.ArgumentParser:
    """A parser with the options all benchmarks have; ``servers`` are those that can be chosen."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--servers", nargs="+", choices=servers, default=list(default), help="the first is the reference"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each; the medians are printed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results of every run to FILE")
    return parser


def allow_files(clients: int, each: int = 1) -> None:
    """Raise this process's limit of open files, which the servers inherit, to what ``clients`` need.

    ``each`` is how many one client costs its server.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and clients * each + 100 > most:
        raise BenchmarkError(f"{clients} clients need more than the {most} open files allowed here.")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def write_json(file: Path | None, results: dict[str, Any]) -> None:
    """Write ``results`` with the description of the machine, if a file was asked for."""
    if file is not None:
        file.write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")
