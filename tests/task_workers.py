"""Real workers of task queues as subprocesses."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
from support import Server

# A container's tests are run by root, whom Celery warns.
WARNINGS = "error,ignore:You're running the worker with superuser privileges"


class TaskWorker(Server):
    """A worker, which is there when its log says ``ready``."""

    def __init__(self, command: list[str], ready: str, log: Path, env: dict[str, str]) -> None:
        super().__init__(command, 0, log, {"PYTHONWARNINGS": WARNINGS, **env})
        self._ready = ready

    def _listens(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"{self.command} ended with {self.process.returncode}:\n{self.log}")
        return self._ready in self.log

    def __enter__(self) -> TaskWorker:  # noqa: PYI034  Self is of Python 3.11
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self, how: int = signal.SIGTERM, seconds: float = 10.0) -> None:
        """End it: the main process is told, and lets its children finish; what has not ended in time is killed."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.send_signal(how)
                self.process.wait(seconds)
        super().stop(signal.SIGKILL, seconds)

    def processes(self) -> list[psutil.Process]:
        """Give the main process and its children."""
        main = psutil.Process(self.pid)
        return [main, *main.children(recursive=True)]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let all of it stand still for as long as the block lasts."""
        processes = self.processes()
        for process in processes:
            os.kill(process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in processes:
                os.kill(process.pid, signal.SIGCONT)
