"""Every command of the page about tools, typed as it stands there: only hosts, ports, paths and numbers are others."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from command import LONG, entry_points
from docs_blocks import all_blocks, commands
from support import ROOT, free_port, wait_for

from flask_sse_stream import Publisher

pytestmark = pytest.mark.live

APP = """
from flask import Flask, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from flask_sse_stream import SSE
from flask_sse_stream.metrics import SSECollector

app = Flask(__name__)
app.config.from_prefixed_env()
sse = SSE(app)
registry = CollectorRegistry()
registry.register(SSECollector(sse.manager))
[stream] = [rule.endpoint for rule in app.url_map.iter_rules() if rule.rule == "/stream"]
app.add_url_rule("/mine", "mine", app.view_functions[stream])

@app.get("/metrics")
def metrics():
    return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)
"""
GUNICORN = 'worker_class = "gevent"\nworkers = 2\nworker_connections = 10_100\n'
ELSEWHERE = {
    "https://example.org/": "http://127.0.0.1:{port}/",
    "http://127.0.0.1:8000/": "http://127.0.0.1:{port}/",
    "--port 8000": "--port {port}",
    "--access-log --no-patch": "--access-log --no-patch --port {other}",
    "--clients 5000 --rate 1000 --seconds 30": "--clients 50 --rate 1000 --seconds 1",
    "--wait 3": "--wait 1",
    "/run/news-metrics": "{directory}/news-metrics",
    "gunicorn -k": "gunicorn --bind 127.0.0.1:{third} -k",
}


class Terminal:
    """A shell in a directory with ``news.py``, and the commands that run in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "news.py").write_text(APP)
        (directory / "gunicorn.conf.py").write_text(GUNICORN)
        self.broker = f"sqlite:///{directory}/sse.db"
        self.ports = {"port": free_port(), "other": free_port(), "third": free_port(), "directory": directory}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLASK_", "GUNICORN"))}
        self.environment = {
            **{name: value for name, value in kept.items() if name not in ("NO_COLOR", "FORCE_COLOR")},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{entry_points(directory)}{os.pathsep}{ROOT}",
            "PYTHONUNBUFFERED": "1",
            "FLASK_SSE_BROKER_URL": self.broker,
            "FLASK_SSE_PING_INTERVAL": "0.5",
            "FLASK_SSE_MAX_CLIENTS": "400",
        }
        self._number = 0

    def here(self, command: str) -> str:
        for there, here in ELSEWHERE.items():
            command = command.replace(there, here.format(**self.ports))
        return command

    @contextlib.contextmanager
    def typed(self, command: str, more: str = "", **environment: str) -> Iterator[Typed]:
        """Run it until the block ends, at the latest."""
        self._number += 1
        typed = Typed(f"{self.here(command)}{more}", self, self.directory / f"output-{self._number}", environment)
        try:
            yield typed
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(typed.process.pid, signal.SIGKILL)
            typed.process.wait()


class Typed:
    """A command that runs, with its output and its errors in files."""

    def __init__(self, command: str, terminal: Terminal, output: Path, environment: dict[str, str]) -> None:
        self.command = command
        self._out, self._err = output.with_suffix(".out"), output.with_suffix(".err")
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                ["bash", "-c", command],
                cwd=terminal.directory,
                env={**terminal.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def wait_for(self, words: str) -> None:
        wait_for(lambda: words in self.out or self.process.poll() is not None, f"{self.command}: {words!r}", LONG)
        assert words in self.out, (self.command, self.out, self.err)

    def ctrl_c(self) -> int:
        """Have the terminal interrupt it; give its status."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.ended()

    def ended(self) -> int:
        """Give the status of its end. Into a file it writes no colours, and it never shows a traceback."""
        status = self.process.wait(LONG)
        assert "\x1b" not in self.out + self.err, self.command
        assert "Traceback" not in self.out + self.err, (self.command, self.err)
        return status


@pytest.fixture
def terminal(tmp_path: Path) -> Terminal:
    return Terminal(tmp_path)


def shown() -> dict[str, list[str]]:
    """The page's commands, by what they do."""
    found: dict[str, list[str]] = {}
    for block in all_blocks("docs/tools.rst"):
        for command in commands(block) if block.language == "console" else []:
            name = re.search(r"(?:flask --app news sse|python -m flask_sse_stream) (\w+)|(gunicorn|pip|rm) ", command)
            assert name is not None, command
            found.setdefault(name[1] or name[2], []).append(command)
    return found


def test_every_command_of_the_page_does_what_it_says_beside_the_others(terminal: Terminal) -> None:
    typed = shown()
    # What pip would install is looked at elsewhere.
    assert set(typed) == {"run", "publish", "tail", "ps", "doctor", "bench", "rm", "gunicorn", "pip"}
    with contextlib.ExitStack() as stack, Publisher(terminal.broker) as publisher:

        def start(name: str, more: str = "") -> list[Typed]:
            return [stack.enter_context(terminal.typed(command, more)) for command in typed[name]]

        servers = start("run")
        for server in servers:
            server.wait_for("broker sqlite://")
        publisher.publish("news", "from before")
        tails = start("tail")
        history, as_json, over_http = tails
        history.wait_for("from before")

        def all_have_something() -> bool:
            publisher.publish("news", "from now")
            time.sleep(0.05)  # between two events
            return all("from now" in tail.out for tail in tails)

        wait_for(all_have_something, f"each listens: {[(tail.out, tail.err) for tail in tails]}", LONG)
        for said in start("publish"):
            assert said.ended() == 0, said.err
            assert re.fullmatch(r"[\w.-]+\n", said.out), said.command
        for tail, words in (
            (history, "the server restarts at noon"),
            (history, '{"ACME":12.5} (acme-17)'),
            (as_json, '"event": "notice"'),
            (over_http, "refresh"),
        ):
            tail.wait_for(words)
        assert "from before" not in as_json.out
        assert all(json.loads(line)["key"] in ("news", None) for line in as_json.out.splitlines() if '"key"' in line)

        looks = start("ps")
        for look in looks:
            assert look.ended() == 0, look.err
        table, report = looks
        pids = [re.findall(r"\(pid (\d+)\)", server.out)[0] for server in servers]
        assert f"/{pids[0]} " in table.out
        assert pids[0] in [str(process["pid"]) for process in json.loads(report.out)["processes"]]

        found = start("doctor")
        for each in found:
            assert each.ended() == 0, (each.command, each.out, each.err)
        assert json.loads(found[-1].out)["ok"] is True
        measured = start("bench", " --seconds 0.5")
        for each in measured:
            assert each.ended() == 0, (each.command, each.out, each.err)
        assert "opened       50 of 50" in measured[1].out
        assert json.loads(measured[-1].out)["opened"] == 100

        for each in (*tails, *servers):
            assert each.ctrl_c() == 0, (each.command, each.err)


def test_the_workers_of_the_page_answer_for_one_another(terminal: Terminal) -> None:
    typed = shown()
    with terminal.typed(typed["rm"][0]) as made:
        assert made.ended() == 0, made.err
    with terminal.typed(typed["gunicorn"][0]) as gunicorn:
        url = f"http://127.0.0.1:{terminal.ports['third']}"

        def streams() -> str:
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{url}/metrics", timeout=LONG, trust_env=False).text
            return ""

        wait_for(streams, f"it answers: {gunicorn.err}", LONG)
        with httpx.stream("GET", f"{url}/stream?connectKey=news", timeout=LONG, trust_env=False) as client:
            assert client.status_code == 200
            for _ in range(8):  # whoever is asked
                wait_for(lambda: "flask_sse_streams 1.0" in streams(), "the stream is known to all", LONG)


def test_what_is_not_there_is_said_in_a_sentence(terminal: Terminal) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    away = {"FLASK_SSE_BROKER_URL": f"redis://{nobody}", "FLASK_SSE_BROKER_TIMEOUT": "0.3"}
    with contextlib.ExitStack() as stack:
        failing = {
            command: stack.enter_context(terminal.typed(f"flask --app news sse {command}", **away))
            for command in ("publish news x", "tail news", "ps", "doctor --json")
        }
        other = stack.enter_context(terminal.typed(f"python -m flask_sse_stream bench http://{nobody}/stream -c 3"))
        tail = stack.enter_context(terminal.typed(f"flask --app news sse tail --url http://{nobody}/stream"))
        missing = stack.enter_context(terminal.typed("flask --app nowhere sse ps"))
        for command, each in failing.items():
            assert each.ended() == 1, command
            assert "Connection refused" in each.out + each.err, command
        assert other.ended() == 1
        assert "failed       3: Connection refused" in other.out
        assert missing.ended() == 2
        assert "Could not import 'nowhere'" in missing.err
        wait_for(lambda: "Connection refused; trying again in 3 s" in tail.err, "it tries again", LONG)
        assert tail.ctrl_c() == 0


@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_is_shown_colours_unless_somebody_wants_none(terminal: Terminal, no_color: bool) -> None:
    ours, theirs = pty.openpty()
    command = ["bash", "-c", "flask --app news sse doctor"]
    environment = {**terminal.environment, "TERM": "xterm", **({"NO_COLOR": "1"} if no_color else {})}
    with subprocess.Popen(command, cwd=terminal.directory, env=environment, stdin=theirs, stdout=theirs, stderr=theirs):
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # EIO: nobody is left who could write
            while data := os.read(ours, 4096):
                said += data
    os.close(ours)
    assert b"open files" in said
    assert (b"\x1b[32m" in said) is not no_color
