"""What is arranged for the end of a process, when, and that nothing of the application's is touched by it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from redis_server import RedisServer
from support import ROOT

from flask_sse_stream import Publisher

pytestmark = pytest.mark.elsewhere


def run(script: str) -> tuple[int, str]:
    """Run code in a process of its own; give how it ended and what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout


APP = """
import os, signal, sys, threading, time
from flask import Flask
from flask_sse_stream import SSE, Publisher
def handled():
    return signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
"""
STREAM = """
from flask_sse_stream.wsgi import respond
environ = {"REQUEST_METHOD": "GET", "QUERY_STRING": "connectKey=k", "SERVER_PROTOCOL": "HTTP/1.1"}
def serve(manager, begun):
    body = respond(manager, environ, lambda status, headers: None)
    for data in body:
        os.write(1, repr(data).encode() + b"\\n")  # in one piece
        begun.set()
    body.close()
def open_stream(manager):
    begun = threading.Event()
    threading.Thread(target=serve, args=(manager, begun), daemon=True).start()
    assert begun.wait(20)
"""


def test_a_process_without_streams_dies_of_the_signal_at_once() -> None:
    script = "SSE(Flask('app'), drain_seconds=60)\nassert handled()\nos.kill(os.getpid(), 15)\ntime.sleep(30)"
    status, said = run(APP + script)
    assert (status, said) == (-signal.SIGTERM, "")


@pytest.mark.parametrize(
    "program",
    [
        "SSE(Flask('app'), drain_seconds=0)",
        "Publisher('sqlite:///never-opened.db')",
        "thread = threading.Thread(target=lambda: SSE(Flask('app'))); thread.start(); thread.join()",
    ],
    ids=["told not to", "a publisher", "not in the main thread"],
)
def test_nothing_is_installed_for(program: str) -> None:
    assert run(f"{APP}{program}\nassert not handled()") == (0, "")


def test_a_handler_that_was_there_before_stays() -> None:
    script = "signal.signal(15, lambda *_: sys.exit(7))\nSSE(Flask('app'))\nos.kill(os.getpid(), 15)\ntime.sleep(30)"
    assert run(APP + script) == (7, "")
    assert run(APP + "signal.signal(15, signal.SIG_IGN)\nSSE(Flask('app'))\nos.kill(os.getpid(), 15)") == (0, "")


def test_a_handler_of_gevents_loop_stays_though_python_does_not_know_of_it() -> None:
    script = """
    import gevent
    told = gevent.event.Event()
    gevent.signal_handler(15, told.set)
    SSE(Flask('app'))
    assert not handled()
    os.kill(os.getpid(), 15)
    assert told.wait(20)
    """
    assert run(APP + "import gevent.event\n" + textwrap.dedent(script)) == (0, "")


def test_a_handler_that_comes_later_stays() -> None:
    script = """
    SSE(Flask("app"))
    signal.signal(15, lambda *_: sys.exit(7))
    SSE(Flask("other"))
    os.kill(os.getpid(), 15)
    time.sleep(30)
    """
    assert run(APP + textwrap.dedent(script)) == (7, "")


@pytest.mark.parametrize(
    ("end", "status"),
    [("os.kill(os.getpid(), 15); time.sleep(30)", -15), ("sys.exit(3)", 3), ("", 0), ("raise KeyboardInterrupt", -2)],
)
def test_the_streams_of_all_apps_are_drained_however_the_process_ends(end: str, status: int) -> None:
    script = f"""
apps = [Flask("one"), Flask("two")]
for app in apps:
    SSE(app, retry=1000)
    open_stream(app.extensions["sse_stream"])
{end}
"""
    ended, said = run(APP + STREAM + script)
    assert ended == status
    assert said.count("open") == 2
    waits = [line for line in said.splitlines() if line.startswith("b'retry: ") and "open" not in line]
    assert len(waits) == 2


HOLDING = """
app = Flask("app")
app.config.update(SSE_BROKER_URL="sqlite:///log.db", SSE_JOB_LEASE=600)
sse = SSE(app)
with app.app_context():
    assert sse.lease("clock", 600)
    begun = threading.Event()
    def work(job):
        begun.set()
        time.sleep(600)
    assert sse.job("work").start(work)
    assert begun.wait(20)
"""


@pytest.mark.parametrize("stream", ["", "open_stream(app.extensions['sse_stream'])"], ids=["", "with streams"])
@pytest.mark.parametrize(
    ("end", "status"),
    [("os.kill(os.getpid(), 15); time.sleep(30)", -15), ("sys.exit(3)", 3), ("raise KeyboardInterrupt", -2)],
    ids=["SIGTERM", "exit", "Ctrl-C"],
)
def test_what_a_process_holds_is_given_up_however_it_ends_unless_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: str, end: str, status: int
) -> None:
    monkeypatch.chdir(tmp_path)
    ended, said = run(APP + STREAM + HOLDING + f"{stream}\n{end}")
    assert ended == status, said
    assert "the job 'work' has failed: its process ends" in said
    publisher = Publisher("sqlite:///log.db")
    assert publisher.job("work").state == "failed"
    assert publisher.lease("clock", 1)
    publisher.close()


def test_a_store_that_hangs_does_not_keep_a_process_that_is_told_to_stop(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis") as server:
        script = f"""
        sse = SSE(Flask("app"), broker_url={server.url!r}, broker_timeout=600)
        assert sse.lease("clock", 600)
        os.kill({server.pid}, signal.SIGSTOP)
        os.kill(os.getpid(), 15)
        time.sleep(30)
        """
        assert run(APP + textwrap.dedent(script))[0] == -signal.SIGTERM  # and not its own end, or that of our patience
        server.resume()


def test_a_forked_child_has_nothing_to_drain_and_dies_of_the_signal_while_its_parent_streams() -> None:
    script = """
    app = Flask("app")
    SSE(app, retry=1000, drain_seconds=60)
    manager = app.extensions["sse_stream"]
    open_stream(manager)
    child = os.fork()
    if not child:
        os.kill(os.getpid(), 15)
        time.sleep(30)
    assert os.waitpid(child, 0)[1] == 15
    assert manager.count_all() == 1
    manager.drain(20)
    """
    status, said = run(APP + STREAM + textwrap.dedent(script))
    assert (status, said.count("retry: ")) == (0, 2)


def test_the_first_process_of_a_container_ends_though_the_signal_does_not_kill_it() -> None:
    # What a kernel does for such a process is to ignore the signal that nobody handles.
    script = """
    from unittest import mock
    SSE(Flask("app"))
    handler = signal.getsignal(15)
    with mock.patch("os.kill"):
        handler(15, None)
    """
    assert run(APP + textwrap.dedent(script)) == (128 + signal.SIGTERM, "")


def test_a_signal_that_interrupts_code_which_holds_the_lock_is_no_deadlock() -> None:
    script = """
    app = Flask("app")
    SSE(app, retry=1000, drain_seconds=60)
    manager = app.extensions["sse_stream"]
    open_stream(manager)
    with manager.lock:
        os.kill(os.getpid(), 15)
        time.sleep(0.1)
    time.sleep(30)
    """
    status, said = run(APP + STREAM + textwrap.dedent(script))
    assert (status, said.count("retry: ")) == (-signal.SIGTERM, 2)


def test_an_interrupt_that_comes_up_in_the_flushers_greenlet_ends_the_program_and_not_the_flusher() -> None:
    script = """
    import gevent
    from flask_sse_stream.transports.gevent import GeventRuntime
    rounds = []
    def flush():
        rounds.append(1)
        if len(rounds) == 1:
            raise KeyboardInterrupt
    flusher = GeventRuntime().start_flusher(flush)
    try:
        gevent.sleep(20)
    except KeyboardInterrupt:
        print("told")
    while len(rounds) < 2:
        flusher.wake()
        gevent.sleep(0.01)
    assert flusher.alive
    """
    assert run(textwrap.dedent(script)) == (0, "told\n")
