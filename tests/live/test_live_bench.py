"""``python -m flask_sse_stream bench URL`` counts what a real server gives, and opens no more than was asked."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from command import LONG, Flask
from support import Server, free_port, wait_for

from flask_sse_stream.bench import Bench
from flask_sse_stream.errors import SettingsError

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("bench")
    flask = Flask(directory, ping_interval="0.5", max_clients="60", when_full='"503"')
    port = free_port()
    server = Server(flask.command("run", "--port", str(port)), port, directory / "log")
    server.env = flask.environment
    yield server.start()
    server.stop()


def bench(server: Server, *arguments: str, path: str = "/stream?connectKey=k") -> list[str]:
    return [sys.executable, "-m", "flask_sse_stream", "bench", server.url + path, *arguments]


def numbers(server: Server) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics", timeout=LONG).text
    return {name: float(value) for name, value in re.findall(r"^(flask_sse_\S+) (\S+)$", text, re.MULTILINE)}


def started(command: list[str], server: Server) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, env=server.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_it_opens_as_many_as_asked_and_counts_every_event_and_heartbeat(server: Server) -> None:
    before = numbers(server)["flask_sse_streams_opened_total"]
    with started(bench(server, "--clients", "40", "--seconds", "60", "--json"), server) as running:
        wait_for(lambda: numbers(server)["flask_sse_streams"] == 40, "all are open", LONG)
        wait_for(lambda: numbers(server)["flask_sse_sent_bytes_total"] > 40 * 30, "they have their first bytes", LONG)
        assert running.poll() is None
        for number in range(3):
            httpx.post(f"{server.url}/publish/k", content=str(number).encode(), timeout=LONG).raise_for_status()
        delivered = "flask_sse_events_delivered_total"
        wait_for(lambda: numbers(server)[delivered] >= 120, "all are delivered", LONG)
        sent = numbers(server)["flask_sse_sent_bytes_total"]
        wait_for(lambda: numbers(server)["flask_sse_sent_bytes_total"] > sent + 40 * 3, "heartbeats have come", LONG)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=LONG)
    found = json.loads(out)
    assert (running.returncode, found["ok"], found["asked"], found["opened"]) == (0, True, 40, 40), (found, err)
    assert found["events"] == 120
    assert found["heartbeats"] >= 40
    assert (found["failed"], found["dropped"]) == ({}, 0)
    assert 0 < found["first_byte_median"] <= found["first_byte_p99"] <= found["first_byte_max"]
    assert "Opening" in err
    assert "stopped early" in err
    wait_for(lambda: numbers(server)["flask_sse_streams"] == 0, "all have hung up", LONG)
    assert numbers(server)["flask_sse_streams_opened_total"] == before + 40


def test_what_is_refused_and_what_is_ended_is_counted_and_makes_the_status_1(server: Server) -> None:
    with started(bench(server, "--clients", "70", "--seconds", "60"), server) as running:
        wait_for(lambda: numbers(server)["flask_sse_streams_refused_total"] == 10, "ten are refused", LONG)
        wait_for(lambda: numbers(server)["flask_sse_streams"] == 60, "the others are open", LONG)
        httpx.post(f"{server.url}/close/k", timeout=LONG).raise_for_status()
        wait_for(lambda: numbers(server)["flask_sse_streams"] == 0, "all were ended", LONG)
        out, _ = running.communicate(timeout=LONG)  # nobody is left to be held for a minute
    assert running.returncode == 1
    assert re.search(r"^opened +60 of 70, ", out, re.MULTILINE), out
    assert re.search(r"^failed +10: answered 503$", out, re.MULTILINE), out


@pytest.mark.parametrize(
    ("arguments", "path", "words"),
    [
        (["--clients", "3", "--seconds", "0"], "/metrics", "failed       3: no event stream but text/plain"),
        (["--clients", "2", "--seconds", "0"], "/nowhere", "failed       2: answered 404"),
    ],
)
def test_what_is_no_stream_is_said_once_with_its_number(
    server: Server, arguments: list[str], path: str, words: str
) -> None:
    done = subprocess.run(
        bench(server, *arguments, path=path), env=server.env, capture_output=True, text=True, timeout=LONG
    )
    assert done.returncode == 1
    assert words in done.stdout


def test_nobody_there_is_a_failure_of_each_client() -> None:
    bench = Bench(f"http://127.0.0.1:{free_port()}/stream", 5)
    assert sum(bench.open()) == 5
    assert list(bench.listen(3600)) == []  # for whom?
    found = bench.figures()
    bench.close()
    assert (found.opened, found.failed, found.ok) == (0, {"Connection refused": 5}, False)


def test_it_begins_no_faster_than_it_may_and_waits_for_the_first_before_it_begins_many_more(server: Server) -> None:
    slow = Bench(f"{server.url}/stream?connectKey=slow", 6, rate=20)
    assert sum(slow.open()) == 6
    assert slow.figures().opening_seconds >= 5 / 20
    slow.close()
    with socket.create_server(("127.0.0.1", 0), backlog=256) as silent:
        silent_url = f"http://127.0.0.1:{silent.getsockname()[1]}/stream"
        many = Bench(silent_url, 130, rate=1e6, timeout=1.0)
        most = settled = 0
        for more in many.open():
            most = max(most, len(many._pending))
            settled += more
        found = many.figures()
        many.close()
    assert (most, settled, found.failed) == (100, 130, {"no answer within 1 s": 130})


def test_streams_that_end_are_dropped_and_never_opened_again(server: Server) -> None:
    before = numbers(server)["flask_sse_streams_opened_total"]
    bench = Bench(f"{server.url}/stream?connectKey=ended", 7)
    assert sum(bench.open()) == 7
    httpx.post(f"{server.url}/close/ended", timeout=LONG).raise_for_status()
    for _ in bench.listen(60):
        if bench.figures().dropped == 7:
            break
    found = bench.figures()
    bench.close()
    assert (found.opened, found.dropped, found.failed, found.ok) == (7, 7, {}, False)
    assert numbers(server)["flask_sse_streams_opened_total"] == before + 7


@pytest.mark.parametrize(
    ("url", "clients", "error", "words"),
    [
        ("https://127.0.0.1/stream", 1, ValueError, "http alone"),
        ("127.0.0.1:8000", 1, ValueError, "is no URL such as"),
        ("http://127.0.0.1/stream", 10**8, SettingsError, "or fewer --clients"),
    ],
)
def test_what_cannot_be_measured_is_an_error_before_anything_is_opened(
    url: str, clients: int, error: Any, words: str
) -> None:
    with pytest.raises(error, match=words):
        Bench(url, clients)
