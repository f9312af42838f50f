"""The metrics and the health of two real workers of gunicorn's, one of which is killed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from redis_server import RedisServer
from support import Server, free_port, python, wait_for

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LONG = 30.0

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def server(redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("metrics")
    (directory / "prometheus").mkdir()
    port = free_port()
    command = python("-m", "gunicorn", "-k", "gevent", "-w", "2", "--preload", "-b", f"127.0.0.1:{port}")
    environment = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}",
        "PROMETHEUS_MULTIPROC_DIR": str(directory / "prometheus"),
        "FLASK_SSE_BROKER_URL": redis.url,
        "FLASK_SSE_BROKER_TIMEOUT": "0.5",
    }
    server = Server([*command, "tools_app:app"], port, directory / "log", environment)
    try:
        yield server.start()
    finally:
        server.stop()


def numbers(server: Server) -> dict[str, float]:
    """What Prometheus reads, from whichever worker answers."""
    text = httpx.get(f"{server.url}/metrics", headers={"Connection": "close"}, timeout=LONG).text
    return {name: float(value) for name, value in re.findall(r"^(flask_sse_\S+) (\S+)$", text, re.MULTILINE)}


def workers(server: Server) -> list[int]:
    return [child.pid for child in psutil.Process(server.pid).children()]


def test_any_worker_gives_the_sum_of_all_and_a_killed_ones_counts_stay_in_it(server: Server) -> None:
    with contextlib.ExitStack() as stack:

        def open_stream() -> int:
            client = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), LONG))
            client.sendall(b"GET /stream?connectKey=k HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
            return int(client.getsockname()[1])

        ports = [open_stream() for _ in range(12)]

        def having() -> dict[int, int]:
            """How many of them each worker has: the connections whose other end is ours."""
            found = {worker: psutil.Process(worker).net_connections() for worker in workers(server)}
            return {
                worker: len({it.raddr.port for it in connections if it.raddr} & {*ports})
                for worker, connections in found.items()
            }

        while min(having().values()) < 1:  # the kernel chooses
            ports.append(open_stream())
        wait_for(lambda: numbers(server)["flask_sse_streams"] == len(ports), "all are counted", LONG)
        sent = numbers(server)["flask_sse_sent_bytes_total"]
        httpx.post(f"{server.url}/publish/k", content=b"x" * 1000, timeout=LONG)
        wait_for(lambda: numbers(server)["flask_sse_events_delivered_total"] == len(ports), "all have it", LONG)
        for _ in range(5):
            found = numbers(server)
            assert found["flask_sse_streams_opened_total"] == len(ports)
            assert found["flask_sse_events_published_total"] == 1
            assert found["flask_sse_lag_seconds_count"] == found["flask_sse_processes"] == 2
            assert found["flask_sse_broker_up"] == 1
            assert sent + 1000 * len(ports) < found["flask_sse_sent_bytes_total"] < sent + 1200 * len(ports)

        killed, lost = max(having().items(), key=lambda item: item[1])
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: len(workers(server)) == 2 and killed not in workers(server), "it has a successor", LONG)
        for _ in range(5):
            found = numbers(server)
            assert found["flask_sse_streams_opened_total"] == len(ports)
            assert found["flask_sse_events_delivered_total"] == len(ports)
            assert found["flask_sse_streams"] == len(ports) - lost


def test_a_worker_is_not_ready_while_redis_hangs(server: Server, redis: RedisServer) -> None:
    def ready() -> httpx.Response:
        return httpx.get(f"{server.url}/ready", headers={"Connection": "close"}, timeout=LONG)

    wait_for(lambda: ready().status_code == 200, "it is ready", LONG)
    with redis.paused():
        answer = ready()
        assert answer.status_code == 503
        assert "the broker does not answer" in answer.json()["reasons"][0]
        assert answer.elapsed.total_seconds() < 10
    wait_for(lambda: ready().status_code == 200, "it is ready again", LONG)
