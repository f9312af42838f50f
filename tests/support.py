"""What tests share: real servers as subprocesses on free ports, with their logs kept, and waiting for conditions."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from flask_sse_stream.testing.waiting import wait_for

if TYPE_CHECKING:
    from playwright.sync_api import Browser

__all__ = [
    "JOB",
    "ROOT",
    "Ports",
    "Server",
    "chromium",
    "drop_what_comes",
    "entry_points",
    "free_port",
    "python",
    "run_unpatched",
    "serving",
    "wait_for",
]

ROOT = Path(__file__).parent.parent


# Each process of a test run has ports of its own: what one has just found free, another must not take. All are below
# those that the kernel gives to outgoing connections: one of these would take the port of a server that is away, or be
# connected to itself when somebody looks whether the server is back.
_PATCHED = "gevent.monkey" in sys.modules and sys.modules["gevent.monkey"].is_module_patched("socket")
JOB = 7 if _PATCHED else int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 7


class Ports:
    """The ports of this process among those from ``first``; ``beside`` says what else each of them needs.

    One after the other, so that none is given twice before all were: one that was given is free until its server
    starts, which with several servers may be after the next one asks.
    """

    def __init__(self, first: int, count: int, *beside: int) -> None:
        self._first = first + JOB * count
        self._count = count
        self._beside = (0, *beside)
        self._next = random.randrange(count)

    def free(self) -> int:
        """Give a port of this machine that nobody listens on."""
        for _ in range(self._count):
            port = self._first + self._next
            self._next = (self._next + 1) % self._count
            with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
                for distance in self._beside:
                    probes.enter_context(socket.socket()).bind(("127.0.0.1", port + distance))
                return port
        raise AssertionError("no port is free")


free_port = Ports(23_000, 1200).free


def drop_what_comes(client: socket.socket) -> None:
    """Have the kernel drop every packet for this socket unseen: to its peer, the route is gone.

    A filter of one instruction that returns 0 (linux/filter.h) comes before TCP has a look, so nothing is acknowledged
    either. Unlike a namespace of the network or a rule of the firewall, it needs no rights.
    """
    instruction = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    program = struct.pack("HL", 1, ctypes.addressof(instruction))
    client.setsockopt(socket.SOL_SOCKET, 26, program)  # SO_ATTACH_FILTER


def run_unpatched(script: str) -> str:
    """Run code in a process of its own, in which nothing is patched yet; give what it says on its error channel."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def entry_points(directory: Path) -> Path:
    """Give a directory in which Flask finds the command, wherever this package is: as if it were installed."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.findall(r'^\[project\.entry-points\."([\w.]+)"\]\n((?:[\w-]+ = ".+"\n)+)', text, re.MULTILINE)
    metadata = directory / "flask_sse_stream-0.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: flask-sse-stream\nVersion: 0\n")
    lines = [f"[{group}]\n{entries.replace(chr(34), '')}" for group, entries in found]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    return directory


class Server:
    """A subprocess that listens on ``port``; its output is in ``log``, a file's text."""

    def __init__(self, command: list[str], port: int, log: Path, env: dict[str, str] | None = None) -> None:
        self.command = command
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log_path = log
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> Server:
        output: IO[Any]
        with self.log_path.open("ab") as output:
            self.process = subprocess.Popen(
                self.command, stdout=output, stderr=output, env=self.env, cwd=ROOT, start_new_session=True
            )
        wait_for(self._listens, f"{self.command} listens on {self.port}", 30)
        return self

    def _listens(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"{self.command} ended with {self.process.returncode}:\n{self.log}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def stop(self, how: int = signal.SIGTERM, seconds: float = 10.0) -> None:
        """End the process and all its children; by force where it does not end in time."""
        if self.process is None:
            return
        for signum, patience in ((how, seconds), (signal.SIGKILL, 10.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signum)
            try:
                self.process.wait(patience)
                break
            except subprocess.TimeoutExpired:
                continue
        with contextlib.suppress(ProcessLookupError):  # workers whose master is gone
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process = None


@contextlib.contextmanager
def serving(command: list[str], port: int, log: Path, env: dict[str, str] | None = None) -> Iterator[Server]:
    """Run ``command``, which listens on ``port``, for as long as the block lasts."""
    server = Server(command, port, log, env)
    try:
        yield server.start()
    finally:
        server.stop()


def python(*arguments: str) -> list[str]:
    """Give the command that runs this interpreter."""
    return [sys.executable, *arguments]


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Run Chromium without a window. While it runs, this thread has an event loop of asyncio's."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        raise AssertionError("there is no Chromium on the PATH: install the Debian package 'chromium'")
    from playwright.sync_api import sync_playwright  # by whoever needs it alone: it brings a driver process along

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=[
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        yield browser
        browser.close()
