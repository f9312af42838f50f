"""A visitor who reads no stream: asks for an ordinary view at a steady pace and says how long each answer took.

:class:`Prober` starts this file as a program::

    with Prober(port, core=1) as prober:
        prober.begin(seconds=2, interval=0.01)
        ...                       # what is done meanwhile
        probes = prober.finish()  # when each answer was due to be asked for, and when it had come

No request waits for the one before it: a server that answers nothing for a second is found slow a hundred times and
not once, and those who come after a slow answer are not blamed for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import selectors
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


class Request:
    """One request on a connection of its own, from when it was due until its whole answer is there."""

    def __init__(self, port: int, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._answer = b""
        self._socket = socket.socket()
        self._socket.setblocking(False)  # noqa: FBT003 - its only parameter has no name
        self._socket.connect_ex(("127.0.0.1", port))
        selector.register(self._socket, selectors.EVENT_WRITE, self)

    def go_on(self) -> bool:
        """Do what the socket is ready for, and say whether that was the last of it."""
        if self._selector.get_key(self._socket).events == selectors.EVENT_WRITE:
            self._socket.sendall(REQUEST)
            self._selector.modify(self._socket, selectors.EVENT_READ, self)
            return False
        received = self._socket.recv(65536)
        self._answer += received
        if received:
            return False
        self._selector.unregister(self._socket)
        self._socket.close()
        if not self._answer.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"The server answered {self._answer[:40]!r}.")
        return True


def probe(port: int, seconds: float, interval: float) -> dict[str, list[int]]:
    """Do what one line asks for."""
    count, step = max(1, round(seconds / interval)), round(interval * 1e9)
    start = time.monotonic_ns()
    due = [start + number * step for number in range(count)]
    answered = [0] * count
    under_way: dict[Request, int] = {}
    begun = 0
    with selectors.DefaultSelector() as selector:
        while begun < count or under_way:
            now = time.monotonic_ns()
            if now > due[-1] + ANSWER_SECONDS * 1e9:
                raise SystemExit("The server did not answer.")
            while begun < count and due[begun] <= now:
                under_way[Request(port, selector)] = begun
                begun += 1
            wait = (due[begun] - now) / 1e9 if begun < count else 1.0
            for key, _ in selector.select(wait):
                if key.data.go_on():
                    answered[under_way.pop(key.data)] = time.monotonic_ns()
    return {"due": due, "answered": answered}


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(probe(int(sys.argv[1]), **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
