"""Runs ``flask sse`` as a user does, as a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from support import ROOT, entry_points

HERE = Path(__file__).parent
LONG = 30.0


class Flask:
    """``flask`` with an app; ``settings`` are those of the SSE extension, by their names without prefixes."""

    def __init__(self, directory: Path, app: str = "tools_app", **settings: str) -> None:
        path = os.pathsep.join(map(str, (entry_points(directory), ROOT, HERE)))
        self.directory = directory
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("FLASK_", "GUNICORN"))},
            "PYTHONPATH": path,
            "PYTHONWARNINGS": "error",
            "FLASK_APP": app,
            "NO_COLOR": "1",
            **{f"FLASK_SSE_{name.upper()}": value for name, value in settings.items()},
        }

    @staticmethod
    def command(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "flask", "sse", *arguments]

    def run(self, *arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            cwd=self.directory,
            env={**self.environment, **environment},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=LONG,
        )

    def says(self, *arguments: str, stdin: str = "", **environment: str) -> str:
        """Run it, and give what it says if all is well."""
        done = self.run(*arguments, stdin=stdin, **environment)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    @contextlib.contextmanager
    def started(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            self.command(*arguments),
            cwd=self.directory,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    """Give the next line; pytest's own timeout ends a wait for one that does not come."""
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")
