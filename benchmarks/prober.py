"""A visitor who reads no stream: asks for an ordinary view at a steady pace and says how long each answer took.

:class:`Prober` starts this file as a program::

    with Prober(port, core=1) as prober:
        prober.begin(seconds=2, interval=0.01)
        ...                       # what is done meanwhile
        probes = prober.finish()  # when each answer was due to be asked for, and when it had come

An answer that is late delays the next request; but its time counts from when it was due, so that a server which
answers nothing for a second is found slow a hundred times and not once.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import final

from load import BenchmarkError

# On a connection that is kept, a server that sends head and body apart waits for the client's delayed
# acknowledgement of the first, forty milliseconds, whatever else it does.
REQUEST = b"GET /view HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
ANSWER_SECONDS = 60.0
# The load client shares its core, and what the prober waits for it is not the server's doing.
NICENESS = -10


@dataclass(frozen=True)
class Probes:
    """Nanoseconds of ``CLOCK_MONOTONIC`` at which each request was due and its answer there."""

    due: list[int]
    answered: list[int]

    def milliseconds(self) -> list[float]:
        """How long each took."""
        return [(end - start) / 1e6 for start, end in zip(self.due, self.answered, strict=True)]

    def during(self, spans: list[tuple[int, int]]) -> Probes:
        """Those that were under way in at least one of these spans of time."""
        chosen = [
            (start, end)
            for start, end in zip(self.due, self.answered, strict=True)
            if any(start <= until and end >= since for since, until in spans)
        ]
        return Probes([start for start, _ in chosen], [end for _, end in chosen])


@final
class Prober:
    """One such process; a context manager that leaves none behind."""

    def __init__(self, port: int, core: int | None = None) -> None:
        self._seconds = 0.0
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        if core is not None:
            os.sched_setaffinity(self._process.pid, {core})
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, self._process.pid, NICENESS)

    def begin(self, seconds: float, interval: float) -> None:
        """Ask every ``interval`` seconds from now on."""
        assert self._process.stdin is not None
        self._seconds = seconds
        self._process.stdin.write(json.dumps({"seconds": seconds, "interval": interval}).encode() + b"\n")
        self._process.stdin.flush()

    def finish(self) -> Probes:
        """Wait until that is over."""
        assert self._process.stdout is not None
        answer = b""
        deadline = time.monotonic() + self._seconds + ANSWER_SECONDS
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            received = os.read(self._process.stdout.fileno(), 1 << 20) if ready else b""
            if not received:
                raise BenchmarkError("The prober got no answer to an ordinary request.")
            answer += received
        return Probes(**json.loads(answer))

    def __enter__(self) -> Prober:
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


def ask(port: int) -> None:
    """One request, on a connection of its own, and its whole answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_SECONDS) as connection:
        connection.sendall(REQUEST)
        answer = b""
        while received := connection.recv(65536):
            answer += received
    if not answer.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"The server answered {answer[:40]!r}.")


def probe(port: int, seconds: float, interval: float) -> dict[str, list[int]]:
    """Do what one line asks for."""
    due, answered = [], []
    at = time.monotonic_ns()
    until = at + round(seconds * 1e9)
    while at < until:
        time.sleep(max(0, at - time.monotonic_ns()) / 1e9)
        ask(port)
        due.append(at)
        answered.append(time.monotonic_ns())
        at += round(interval * 1e9)
    return {"due": due, "answered": answered}


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(probe(int(sys.argv[1]), **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
