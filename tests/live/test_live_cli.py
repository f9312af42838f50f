"""``flask sse`` as a process of its own: serving, publishing, listening, looking."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import httpx
import pytest
from command import LONG, Flask, line
from redis_server import RedisServer
from support import Server, free_port, python, wait_for

from flask_sse_stream import Publisher
from flask_sse_stream.cli import main, sse
from flask_sse_stream.settings import Settings
from flask_sse_stream.tailing import Line, follow_broker

pytestmark = pytest.mark.live


class Served:
    """What ``flask sse run`` serves, over SQLite."""

    def __init__(self, directory: Path, **settings: str) -> None:
        self.broker = f"sqlite:///{directory}/sse.db"
        self.flask = Flask(directory, broker_url=self.broker, ping_interval="0.5", retry="100", **settings)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = Server(self.flask.command("run", "--port", str(self.port)), self.port, directory / "log")
        self.server.env = {**self.flask.environment, "PYTHONUNBUFFERED": "1"}

    def open(self, key: str) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), LONG)
        client.sendall(f"GET /stream?connectKey={key} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        read_until(client, b": open")
        return client


def read_until(client: socket.socket, wanted: bytes) -> bytes:
    found = b""
    while wanted not in found:
        data = client.recv(65536)
        assert data, found
        found += data
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    served = Served(tmp_path_factory.mktemp("served"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))  # inherited, and raised by the command
    try:
        served.server.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    yield served
    served.server.stop()


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


def test_run_says_what_it_does_and_has_raised_its_descriptors(served: Served) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    said = wait_for(lambda: log if "broker" in (log := served.server.log) else "", "it has said everything", LONG)
    assert f"Serving tools_app on {served.url} (pid {served.server.pid})" in said
    assert f"{hard} open files, broker {served.broker}, standard library patched" in said
    limits = Path(f"/proc/{served.server.pid}/limits").read_text()
    assert re.search(rf"Max open files +{hard} +{hard} ", limits)


def test_publish_reaches_a_stream_and_gives_the_id(served: Served) -> None:
    with served.open("pub") as client:
        identifier = served.flask.says("publish", "pub", "-", "--event", "headline", "--json", stdin='{"a":  "ü"}\n')
        found = read_until(client, b"headline\n").decode()
        assert f"id: {identifier.strip()}\n" in found
        if "data" not in found:
            read_until(client, '{"a":"ü"}\n'.encode())
        served.flask.says("publish", "--all", "to all", "--id", "mine", "--retry", "50")
        assert b"data: to all\n" in read_until(client, b"to all\n")


def test_publish_refuses_what_cannot_be_with_a_cure(served: Served, tmp_path: Path) -> None:
    (tmp_path / "bare.py").write_text("import flask\napp = flask.Flask('bare')\n")
    alone = Flask(tmp_path, broker_url="memory://")
    cases = [
        (alone, ("publish", "news", "x"), 1, "Set SSE_BROKER_URL to sqlite:///path"),
        (alone, ("tail", "news"), 1, "flask sse tail --url"),
        (alone, ("ps",), 1, "see sse.stats()"),
        (served.flask, ("publish", "news", "{", "--json"), 1, "DATA is no JSON"),
        (served.flask, ("publish", "news", "x", "--event", "a\nb"), 1, "event must not contain"),
        (served.flask, ("publish", "news", "x", "--all"), 2, "there is no KEY"),
        (served.flask, ("run", "--no-patch", "--port", str(served.port)), 1, "Choose another --port"),
        (Flask(tmp_path, ping_interval="-1"), ("ps",), 1, "SSE_PING_INTERVAL (keyword argument"),
        (Flask(tmp_path, app="bare"), ("publish", "news", "x"), 1, "has no SSE extension"),
    ]
    for flask, arguments, status, words in cases:
        done = flask.run(*arguments)
        assert (done.returncode, done.stdout) == (status, ""), (arguments, done)
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_tail_shows_the_history_and_what_comes_with_keys_and_ends_at_ctrl_c(served: Served) -> None:
    with Publisher(served.broker) as publisher:
        for number in range(3):
            publisher.publish("tailed", f"old {number}")
        with served.flask.started("tail", "tailed", "other", "--last", "2") as tail:
            assert [re.sub(r" \(.*", "", line(tail))[9:] for _ in range(2)] == ["tailed old 1", "tailed old 2"]
            publisher.publish("elsewhere", "not heard")
            identifier = publisher.publish("other", "two\nlines \x1b[31m", event="said")
            assert line(tail)[9:] == "other said two"
            assert line(tail) == f"    lines �[31m ({identifier})"
            publisher.publish_all("for all")
            assert re.fullmatch(r"[\d:]{8} for all \(\S+\)", line(tail))
            tail.send_signal(signal.SIGINT)
            assert tail.wait(LONG) == 0
            assert tail.communicate() == ("", "")


def test_tail_has_colours_where_a_terminal_shows_them(served: Served) -> None:
    terminal, end = os.openpty()
    with Publisher(served.broker) as publisher:
        publisher.publish("coloured", "hi", event="greeting")
    environment = {name: value for name, value in served.flask.environment.items() if name != "NO_COLOR"}
    command = Flask.command("tail", "coloured", "--last", "1")
    with subprocess.Popen(command, env=environment, stdout=end, stderr=end, stdin=subprocess.DEVNULL) as tail:
        os.close(end)
        said = b""
        while b"\n" not in said:
            said += os.read(terminal, 4096)
        assert b"\x1b[36mcoloured\x1b[0m" in said
        assert click.unstyle(said.decode())[9:].startswith("coloured greeting hi (")
        os.close(terminal)  # its window was closed
        assert tail.wait(LONG) in (0, -signal.SIGHUP)


def test_tail_gives_json_lines_and_ends_when_nobody_reads_them_any_more(served: Served) -> None:
    with Publisher(served.broker) as publisher, served.flask.started("tail", "piped", "--json", "-n", "1") as tail:
        identifier = publisher.publish("piped", {"a": 1}, event="e")
        assert json.loads(line(tail)) == {"key": "piped", "event": "e", "id": identifier, "data": '{"a":1}'}
        assert tail.stdout is not None
        tail.stdout.close()  # and nothing is published
        assert tail.wait(LONG) == 0
        assert tail.stderr is not None
        assert tail.stderr.read() == ""


def test_tail_over_http_comes_back_and_misses_nothing_as_a_browser_does(served: Served) -> None:
    url = f"{served.url}/stream?connectKey=over-http"
    with Publisher(served.broker) as publisher, served.flask.started("tail", "--url", url, "--json") as tail:
        wait_for(lambda: httpx.get(f"{served.url}/count/over-http", timeout=LONG).text == "1", "it listens", LONG)
        publisher.publish("over-http", "first")
        assert json.loads(line(tail))["data"] == "first"
        httpx.post(f"{served.url}/close/over-http", timeout=LONG).raise_for_status()
        publisher.publish("over-http", "second", event="e")
        assert json.loads(line(tail)) == {"event": "e", "id": served_id(publisher, "over-http"), "data": "second"}
        tail.send_signal(signal.SIGINT)
        out, err = tail.communicate(timeout=LONG)
        assert (tail.returncode, out) == (0, "")
        assert "the stream ended; trying again in" in err
    done = served.flask.run("tail", "--url", f"{served.url}/nowhere")
    assert (done.returncode, "SSE_PATH says which" in done.stderr) == (1, True)


def served_id(publisher: Publisher, key: str) -> str:
    """The id of the newest event of a key: the one before that of another."""
    epoch, _, number = publisher.publish("another key", "x").rpartition("-")
    return f"{epoch}-{int(number) - 1}"


@pytest.mark.parametrize("fast_path", ["true", "false"])
def test_sigterm_tells_clients_when_to_come_back_and_the_process_ends(tmp_path: Path, fast_path: str) -> None:
    served = Served(tmp_path, fast_path=fast_path)
    served.server.start()
    with served.open("k") as client:
        assert served.server.process is not None
        served.server.process.send_signal(signal.SIGTERM)
        assert re.search(rb"retry: \d+\n", read_until(client, b"retry: "))
        while client.recv(65536):
            pass
        assert served.server.process.wait(LONG) == 0
    assert "Traceback" not in served.server.log
    served.server.stop()


@pytest.fixture(scope="module")
def workers(redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Flask, Server]]:
    directory = tmp_path_factory.mktemp("workers")
    flask = Flask(directory, broker_url=redis.url)
    port = free_port()
    server = Server(
        python("-m", "gunicorn", "-k", "gevent", "-w", "2", "-b", f"127.0.0.1:{port}", "tools_app:app"),
        port,
        directory / "log",
    )
    server.env = {**flask.environment, "PYTHONWARNINGS": ""}
    server.start()
    yield flask, server
    server.stop()


def all_of(text: str, number: int) -> list[dict[str, Any]]:
    """The processes that ``ps`` shows, if they are so many: a machine that is busy lets one be late."""
    found: list[dict[str, Any]] = json.loads(text)["processes"]
    return found if len(found) == number else []


def test_ps_shows_every_worker_and_every_key_of_all(workers: tuple[Flask, Server]) -> None:
    flask, server = workers
    with contextlib.ExitStack() as stack:
        pids: dict[str, int] = {}
        for number in range(40):
            client = stack.enter_context(httpx.Client(timeout=LONG))
            key = f"k{number % 3}"
            answer = stack.enter_context(client.stream("GET", f"{server.url}/stream?connectKey={key}"))
            pids[answer.headers["X-Process"]] = pids.get(answer.headers["X-Process"], 0) + 1
            if len(pids) == 2 and number > 5:
                break
        assert len(pids) == 2
        found = wait_for(lambda: all_of(flask.says("ps", "--json"), 2), "both answer", LONG)
        assert {str(process["pid"]): process["streams"] for process in found} == pids
        assert all(process["broker_up"] and not process["draining"] for process in found)
        keys: dict[str, int] = {}
        for process in found:
            for row in process["keys"]:
                keys[row["key"]] = keys.get(row["key"], 0) + row["streams"]
        assert sum(keys.values()) == sum(pids.values())
        said = wait_for(lambda: text if (text := flask.says("ps")).count("/") == 2 else "", "both answer", LONG)
        for pid, count in pids.items():
            assert re.search(rf"^\S+/{pid} +\S+ \S+ +{count} +\d+ ", said, re.MULTILINE), said
        for name, count in keys.items():
            assert re.search(rf"^{name} +{count} +[12] ", said, re.MULTILINE), said


def test_ps_over_sqlite_and_when_nobody_is_there(served: Served, tmp_path: Path) -> None:
    with served.open("lonely"):
        found = json.loads(served.flask.says("ps", "--json"))["processes"]
        assert [process["pid"] for process in found] == [served.server.pid]
        assert "lonely" in [row["key"] for row in found[0]["keys"]]
    nobody = Flask(tmp_path, broker_url=f"sqlite:///{tmp_path}/other.db").run("ps", "--wait", "0.1")
    assert (nobody.returncode, nobody.stdout) == (0, "")
    assert "none has had a stream" in nobody.stderr


def test_every_command_has_a_help_text_with_its_defaults(served: Served) -> None:
    said = served.flask.says("--help")
    assert set(re.findall(r"^  ([a-z]+)  ", said.partition("Commands:")[2], re.MULTILINE)) == set(sse.commands)
    alone = [sys.executable, "-m", "flask_sse_stream", "bench", "--help"]
    helps = {name: Flask.command(name, "--help") for name in ("run", "tail", "ps")} | {"bench": alone}
    for name, arguments in helps.items():
        done = subprocess.run(arguments, env=served.flask.environment, capture_output=True, text=True, check=True)
        assert "[default: " in done.stdout, name
    for name, command in {**sse.commands, **main.commands}.items():
        assert len(command.help or "") > 50, name
        options = [option for option in command.params if isinstance(option, click.Option)]
        assert all(option.help for option in options), name


def test_who_follows_a_broker_is_told_that_the_log_began_anew(redis: RedisServer) -> None:
    settings = Settings(broker_url=redis.url, namespace="follow")
    with Publisher(redis.url, "follow") as publisher:
        publisher.publish("k", "before")
        lines = follow_broker(settings, ["k"], 5)

        def until(wanted: str) -> list[Line]:
            found = []
            for item in lines:
                if item != Line():
                    found.append(item)
                if wanted in ((item.event.data or "") if item.event else "", item.notice):
                    return found
            raise AssertionError

        assert until("before")[-1].key == "k"
        redis.cli("DEL", "{follow}:log")
        until("the log began anew")
        publisher.publish("k", "after")
        assert until("after")[-1].key == "k"
        lines.close()  # type: ignore[attr-defined]
