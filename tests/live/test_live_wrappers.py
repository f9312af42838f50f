"""Whatever people put around an app, under every server: a stream is whole, an error tool is told of none.

Where the server's socket is taken over, the tool sees the request end at once; where the tool keeps the server's
``write`` to itself, the stream stays with the server.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from clients import DEADLINE, Listener, Raw
from conftest import HERE
from support import ROOT, Server, free_port, python, wait_for
from workers import LEFT_OPEN

pytestmark = pytest.mark.live

GIVE_UP = ("pywsgi", "pywsgi-patched", "gunicorn-gevent", "gunicorn-gevent_pywsgi", "gunicorn-gthread")
KEEP = ("werkzeug",)
PASS_ON = (
    "bare", "compress", "compress-streams", "proxy", "dispatcher", "sentry", "reporting", "opentelemetry", "tracing",
)  # fmt: skip
# They hand the app a write of their own.
REPLACE = ("counting", "lint")
# They tell which requests have begun and not yet ended.
WATCH = ("reporting", "opentelemetry", "tracing")

# As browsers do, so that whatever compresses would.
BROWSER = b"Accept-Encoding: gzip, deflate, br, zstd"
PINGED = b": ping\n\n"


class Wrapped(Server):
    """A server of ``wrappers_app``."""

    def __init__(self, kind: str, log: Path) -> None:
        port = free_port()
        gunicorn = python("-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--graceful-timeout", "1")
        command = {
            "pywsgi": python(str(HERE / "wrappers_app.py"), str(port)),
            "pywsgi-patched": python(str(HERE / "wrappers_app.py"), str(port), "--patch"),
            "werkzeug": python("-m", "flask", "--app", "wrappers_app", "run", "--port", str(port), "--no-reload"),
        }.get(kind) or [
            *gunicorn, "-k", kind.partition("-")[2], "--access-logfile", "-", "wrappers_app:app",
            *(["--threads", "4"] if kind == "gunicorn-gthread" else []),
        ]  # fmt: skip
        super().__init__(command, port, log, {"PYTHONPATH": f"{ROOT}:{HERE}", "PYTHONWARNINGS": "error"})
        self.kind = kind
        self.targets: list[str] = []  # of the streams it was asked for
        self.client = httpx.Client(
            base_url=self.url, timeout=DEADLINE, trust_env=False, headers={"Connection": "close"}
        )

    def get(self, path: str, **request: Any) -> httpx.Response:
        response = self.client.get(path, **request)
        response.raise_for_status()
        return response

    def publish(self, variant: str, key: str, data: str) -> None:
        self.client.post(f"/{variant}/publish", params={"key": key, "data": data}).raise_for_status()

    def state(self, variant: str, key: str = "nobody") -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/{variant}/state", params={"key": key}).json()
        return found

    def stream(self, target: str) -> str:
        """Give ``target`` as it is; what was asked for is looked up in the access log at the end."""
        self.targets.append(target)
        return target

    def lines(self, target: str) -> int:
        return self.log.count(f"GET {target} HTTP/1.1")


@pytest.fixture(scope="module", params=(*GIVE_UP, *KEEP))
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wrapped]:
    """One server of each kind, with all variants."""
    server = Wrapped(request.param, tmp_path_factory.mktemp(request.param) / "log")
    try:
        server.start()
        yield server
        wait_for(lambda: all(map(server.lines, server.targets)), "each stream has a line in the access log", DEADLINE)
        assert {target: server.lines(target) for target in server.targets} == dict.fromkeys(server.targets, 1)
    finally:
        server.client.close()
        server.stop()
    # Of what came when it was stopped as well.
    _is_quiet(server)


@pytest.fixture
def server(running: Wrapped) -> Iterator[Wrapped]:
    """The running server; whatever is reported to any of its tools, or looks like it in its log, is a failure."""
    yield running
    assert running.state("bare")["reports"] == []
    _is_quiet(running)


def _is_quiet(server: Wrapped) -> None:
    said = re.sub(LEFT_OPEN, "", server.log)
    for sign in ("Traceback", "Exception ignored", "Warning", "Failed to detach"):
        assert sign not in said, said[-5000:]


@pytest.fixture
def key() -> str:
    """A key that no other test uses."""
    return f"key-{time.monotonic_ns()}"


def hear(server: Wrapped, variant: str, key: str, client: Raw) -> None:
    """Publish, until three events in a row have come without a heartbeat that pushed them out of some buffer."""
    at_once = 0
    for number in range(30):
        before = client.received.count(PINGED)
        server.publish(variant, key, f"number {number}")
        data = b"data: number %d\n\n" % number
        came_before = client.read_until(data).partition(data)[0]
        at_once = at_once + 1 if came_before.count(PINGED) == before else 0
        if at_once == 3:
            return
    raise AssertionError("no three events came at once")


@pytest.mark.parametrize("variant", [*PASS_ON, *REPLACE])
def test_a_stream_is_whole_inside_whatever_is_around_the_app(server: Wrapped, variant: str, key: str) -> None:
    target = server.stream(f"/{variant}/stream?connectKey={key}")
    with Raw(server.port) as client:
        if server.kind != "werkzeug":  # It closes a connection after each answer.
            client.request(f"/{variant}/view").read_until(b"a view, " * 100)
            client.received = b""
        client.request(target, BROWSER).read_until(b": open\n\n")
        assert client.status == 200
        hear(server, variant, key, client)
        client.received = b""
        client.read_until(PINGED)
        handed_off = server.kind in GIVE_UP and variant in PASS_ON
        expected = (["HandedOff" if handed_off else "IteratorTransport"], int(variant in WATCH and not handed_off))

        def as_promised() -> bool:
            state = server.state(variant, key)
            return (state["transports"], state["unfinished"]) == expected

        wait_for(as_promised, f"its transport, and what the tool makes of it, are {expected}", DEADLINE)
        client.leave()
    wait_for(lambda: server.state(variant)["streams"] == 0, "it is known that the client has left", DEADLINE)
    assert server.get(f"/{variant}/view").text == "a view, " * 100
    wait_for(lambda: server.state(variant)["unfinished"] == 0, "the tool has seen the request end", DEADLINE)
    wait_for(lambda: server.lines(target) == 1, "it has its line in the access log", DEADLINE)


@pytest.mark.parametrize("variant", [*PASS_ON, *REPLACE])
def test_a_stream_that_has_said_everything_ends_as_it_should(server: Wrapped, variant: str, key: str) -> None:
    with Raw(server.port) as client:
        client.request(server.stream(f"/{variant}/countdown?{key}"), BROWSER, b"Connection: close").read_all()
        body = client.received.partition(b"\r\n\r\n")[2]
        for expected in (b'data: {"left": 3}\n\n', b'data: {"left": 2}\n\n', b'data: {"left": 1}\n\n', b"id: end\n"):
            assert expected in body
        assert body.endswith(b"\r\n0\r\n\r\n")
    wait_for(lambda: server.state(variant)["streams"] == 0, "nothing is left of it", DEADLINE)


def test_flask_compress_compresses_views_and_leaves_streams_as_they_are(server: Wrapped, key: str) -> None:
    headers = {"Accept-Encoding": "deflate"}
    view = server.get("/compress/view", headers=headers)
    assert view.headers["Content-Encoding"] == "deflate"
    assert view.text == "a view, " * 100
    target = server.stream(f"/compress/stream?connectKey={key}")
    with Listener(server.url + target, headers=headers) as listener:
        assert "Content-Encoding" not in listener.headers
        server.publish("compress", key, "one")
        listener.wait_for_data("one")


def test_a_stream_that_flask_compress_was_told_to_compress_is_what_it_says(server: Wrapped, key: str) -> None:
    target = server.stream(f"/compress-streams/stream?connectKey={key}")
    with Listener(server.url + target, headers={"Accept-Encoding": "deflate"}) as listener:
        server.publish("compress-streams", key, "one")
        listener.wait_for_data("one")


def test_each_tool_is_at_work(server: Wrapped) -> None:
    server.get("/proxy/view", headers={"X-Forwarded-For": "192.0.2.1"})
    for variant in ("sentry", *WATCH):
        server.get(f"/{variant}/view")
    seen = server.state("bare")["seen"]
    assert seen["proxy 192.0.2.1"] == 1
    for variant in ("sentry transaction", *WATCH):
        assert seen[variant] > 0


def test_an_app_that_does_raise_is_reported_by_each_tool(tmp_path: Path) -> None:
    server = Wrapped("pywsgi", tmp_path / "log")
    try:
        server.start()
        for variant in ("sentry", *WATCH):
            with Raw(server.port) as client:
                client.request(f"/{variant}/raising").read_all()
        tools = {report.partition(":")[0] for report in server.state("bare")["reports"]}
        assert tools == {"sentry", *WATCH}
        assert server.log.count("Traceback") == len(tools)
    finally:
        server.client.close()
        server.stop()
