"""The readers of a benchmark, driven from Python.

``load.c`` opens the streams and counts what arrives; this module compiles it, as any other C program of the
benchmarks, into ``_build/`` when it is missing or older than its source, and turns its commands and replies into
methods and values::

    with Load(core=1) as load:
        load.open(port, 1000, [Target("/stream?connectKey=bench")])
        load.expect(events=200)
        ...                       # publish 200 events
        result = load.round()     # who got how many, and when

Times are nanoseconds of ``CLOCK_MONOTONIC``: what ``time.monotonic_ns()`` gives in any process of this
machine. Linux only, because of epoll.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, final

SOURCE = Path(__file__).with_name("load.c")
BUILD = Path(__file__).with_name("_build")
COMPILE_SECONDS = 60.0

# What Round.latency tells of.
PERCENTS = (50, 90, 99, 99.9, 100)

# When nobody gets anything for so long, though an event was published, there is nothing more to come.
STALL_SECONDS = 5.0

# So few that no server's listen queue overflows, which would measure how long the kernel waits to try again.
OPENING_AT_ONCE = 64


class BenchmarkError(Exception):
    """A benchmark cannot go on; the message is one sentence for the person who started it."""


@dataclass(frozen=True)
class Target:
    """What a client asks for: a path, and the ``Last-Event-ID`` it comes back with, if it does."""

    path: str
    last_event_id: str = ""


@dataclass(frozen=True)
class Opened:
    """How the opening went: streams open, streams that failed, and the seconds it took for all of them."""

    open: int
    failed: int
    seconds: float
    trouble: str


@dataclass(frozen=True)
class Round:
    """What the clients got since :meth:`Load.expect`.

    ``first[i]`` and ``last[i]`` are when the first and the last client had its event number ``i``; 0 where
    none had. ``least`` and ``most`` are the events of the clients that got fewest and most. The rest is about the
    ``numbered`` events alone, whose data says which and how old they are (see ``load.c``); ``latency`` has the
    nanoseconds that :data:`PERCENTS` of the deliveries took at most, and is empty without such events.
    """

    clients: int
    ended: int
    delivered: int
    least: int
    most: int
    numbered: int
    lost: int
    doubled: int
    latency: list[int]
    first: list[int]
    last: list[int]


def build(source: Path = SOURCE) -> Path:
    """Compile a C program unless that is done already, and return its path."""
    program = BUILD / source.stem
    if program.exists() and program.stat().st_mtime > source.stat().st_mtime:
        return program
    if sys.platform != "linux":
        raise BenchmarkError("The benchmarks need Linux: the load client is built on epoll.")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise BenchmarkError("The benchmarks need a C compiler (cc) for their load client; none was found.")
    BUILD.mkdir(exist_ok=True)
    # Into a file of its own and then renamed: two benchmarks may be started at the same time.
    unfinished = BUILD / f"{source.stem}.{os.getpid()}"
    outcome = subprocess.run(
        [compiler, "-O2", "-o", str(unfinished), str(source)],
        capture_output=True,
        text=True,
        timeout=COMPILE_SECONDS,
        check=False,
    )
    if outcome.returncode != 0:
        raise BenchmarkError(f"{source.name} could not be compiled with {compiler}:\n{outcome.stderr}")
    unfinished.replace(program)
    return program


@final
class Load:
    """One running load process; a context manager that leaves no process behind.

    ``core`` is the CPU it is pinned to, ``None`` for none. Every method is bounded in time and raises
    :class:`BenchmarkError` when the process does not answer.
    """

    def __init__(self, core: int | None = None) -> None:
        self._process = subprocess.Popen([build()], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._buffer = b""
        self._round_seconds = 0.0
        if core is not None:
            os.sched_setaffinity(self._process.pid, {core})

    @property
    def pid(self) -> int:
        """Process id, for whoever wants to know how busy the load itself was."""
        return self._process.pid

    def open(
        self,
        port: int,
        clients: int,
        targets: Sequence[Target],
        missed: int = 0,
        at_once: int = OPENING_AT_ONCE,
        seconds: float = 60.0,
    ) -> Opened:
        """Open ``clients`` streams more of the targets in turn; return when each has had its first bytes.

        With ``missed`` it has had so many events, too. ``at_once`` connections are on their way at a time.
        """
        for target in targets:
            self._command(f"target {target.path} {target.last_event_id or '-'}")
        self._command(f"open {port} {clients} {seconds} {at_once} {missed}")
        reply = self._reply("open", seconds)
        return Opened(reply["open"], reply["failed"], reply["nanoseconds"] / 1e9, reply["trouble"])

    def expect(self, events: int, seconds: float = 60.0, settle: float = 0.2, stall: float = STALL_SECONDS) -> int:
        """Start a round of ``events`` for each client and return the number of clients that take part.

        The round is over when everybody had ``events`` events and ``settle`` seconds passed without
        another one, after ``seconds``, or when not a single event has come for ``stall`` seconds.
        """
        self._round_seconds = seconds
        self._command(f"expect {events} {seconds} {settle} {stall}")
        clients: int = self._reply("armed", 5.0)["clients"]
        return clients

    def round(self) -> Round:
        """Wait until the round is over."""
        reply = self._reply("round", self._round_seconds)
        return Round(**{name: reply[name] for name in Round.__dataclass_fields__})

    def counts(self) -> tuple[int, int]:
        """The events of the clients that had fewest and most since they were opened or a round was started."""
        self._command("counts")
        reply = self._reply("counts", 5.0)
        return reply["least"], reply["most"]

    def close_streams(self) -> None:
        """Close all streams; the process stays and can open others."""
        self._command("close")
        self._reply("closed", 30.0)

    def _command(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise BenchmarkError("The load client has ended unexpectedly.") from None

    def _reply(self, kind: str, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + seconds + 5.0  # the program keeps its own deadline; this is for its death
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise BenchmarkError(f"The load client did not answer within {seconds + 5.0:.0f} seconds.")
            received = os.read(descriptor, 1 << 20)
            if not received:
                raise BenchmarkError("The load client has ended unexpectedly.")
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        if reply["reply"] == "error":
            raise BenchmarkError(f"The load client failed: {reply['trouble']}.")
        if reply["reply"] != kind:
            raise BenchmarkError(f"The load client answered {reply['reply']!r} where {kind!r} was due.")
        return reply

    def __enter__(self) -> Load:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()  # it has nothing to save
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
