"""The proxies of the docs in front of a server of ours, each with the configuration that its page shows.

Only ports and paths are others, and in front of the server whose heartbeats come often the waits are shorter than
the page says. All of them run at the same time, so that what takes its time is waited for once.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import trustme
from clients import DEADLINE, Curl
from docs_blocks import all_blocks
from proxy import Proxy
from support import ROOT, Server, free_port, python, wait_for
from workers import Crowd, Follower

from flask_sse_stream import PoolManager, Publisher, Settings
from flask_sse_stream.probing import look_at_url

pytestmark = pytest.mark.live

DOCS = ROOT / "docs"
EXAMPLE = ROOT / "examples" / "several_workers"
LONG = 30.0  # longer than any deadline here: what is held back until a heartbeat comes too late for these tests
OFTEN = 0.4
WAIT = 2  # seconds, of a proxy that was made impatient


class Kind(NamedTuple):
    """What is to be known of a program to run it; ``waits`` are those that are shortened."""

    page: str
    file: str
    listen: str
    upstream: tuple[str, ...]
    waits: dict[str, str]
    gently: int


KINDS = {
    "nginx": Kind(
        "deploying.rst",
        "nginx.conf",
        "listen 127.0.0.1:8080;",
        ("server 127.0.0.1:8000;",),
        {
            "proxy_read_timeout 60s;": f"proxy_read_timeout {WAIT}s;",
            "worker_shutdown_timeout 5s;": "worker_shutdown_timeout 1s;",
        },
        signal.SIGQUIT,
    ),
    "caddy": Kind(
        "proxies.rst",
        "Caddyfile",
        "http://127.0.0.1:8080 {",
        ("reverse_proxy 127.0.0.1:8000",),
        {"grace_period 5s": "grace_period 1s"},
        signal.SIGTERM,
    ),
    "haproxy": Kind(
        "proxies.rst",
        "haproxy.cfg",
        "bind 127.0.0.1:8080",
        ("server one 127.0.0.1:8000",),
        {
            "timeout client 60s": f"timeout client {WAIT}s",
            "timeout server 60s": f"timeout server {WAIT}s",
            "hard-stop-after 5s": "hard-stop-after 1s",
        },
        signal.SIGUSR1,
    ),
    "apache": Kind(
        "proxies.rst",
        "apache.conf",
        "Listen 127.0.0.1:8080",
        ("http://127.0.0.1:8000/stream", '"http://127.0.0.1:8000/"'),
        {"timeout=60 ": f"timeout={WAIT} ", "GracefulShutdownTimeout 5": "GracefulShutdownTimeout 1"},
        signal.SIGWINCH,
    ),
}
CUTTING = [kind for kind in KINDS if kind != "caddy"]  # which cuts no stream by itself


def program(name: str, package: str) -> str:
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    assert path is not None, f"there is no {name} here: install the Debian package {package!r}"
    return path


def replaced(text: str, changes: dict[str, str]) -> str:
    for shown, here in changes.items():
        assert shown in text, shown
        text = text.replace(shown, here)
    return text


def shown(kind: str) -> str:
    """Give the configuration that the page shows."""
    found = re.findall(r"^\.\. literalinclude:: (\S+)$", (DOCS / KINDS[kind].page).read_text(), re.MULTILINE)
    [path] = [path for path in found if path.endswith(f"/{KINDS[kind].file}")]
    return (DOCS / path).read_text()


def shown_for_tls(kind: str) -> str:
    """Give what the page has in place of the line with the port."""
    lines = (DOCS / "proxies.rst").read_text().split("\n")
    start = [line.lower() for line in lines].index(f"* {kind}:")
    return next(block.text for block in all_blocks("docs/proxies.rst") if block.line > start).strip()


class ProxyServer(Server):
    """One of them, before the server on ``port``."""

    def __init__(
        self, kind: str, directory: Path, origin: int, changes: dict[str, str] | None = None, *, tls: bool = False
    ) -> None:
        self.kind = kind
        self.what = KINDS[kind]
        port = free_port()
        text = replaced(shown(kind), changes or {})
        text = replaced(text, {line: line.replace(":8000", f":{origin}") for line in self.what.upstream})
        listen = self.what.listen
        if tls:
            text = replaced(text, {listen: shown_for_tls(kind)}).replace("site.example.org", "localhost")
            text = replaced(text, {":8443": f":{port}", "/etc/ssl/": f"{directory.parent}/"})
        else:
            text = replaced(text, {listen: listen.replace(":8080", f":{port}")})
        directory.mkdir()
        (directory / "run").mkdir()
        for beside in ("come_back.http", "come_back.asis"):
            shutil.copy(EXAMPLE / beside, directory)
        file = directory / self.what.file
        file.write_text(text)
        super().__init__(self._command(directory, file), port, directory / "log", {"HOME": str(directory)})
        self.tls = tls
        self.url = f"{'https://localhost' if tls else 'http://127.0.0.1'}:{port}"
        self.stream = f"{self.url}/stream?connectKey=news"
        self.options = ("--cacert", str(directory.parent / "ca.pem"), "--http2") if tls else ()

    def _command(self, directory: Path, file: Path) -> list[str]:
        if self.kind == "nginx":
            return [program("nginx", "nginx"), "-p", f"{directory}/run", "-c", str(file), "-e", "stderr"]
        if self.kind == "caddy":
            return [program("caddy", "caddy"), "run", "--config", str(file), "--adapter", "caddyfile"]
        if self.kind == "haproxy":
            return [program("haproxy", "haproxy"), "-db", "-C", str(directory), "-f", str(file)]
        # Who is root leaves that behind, and the page is for any user.
        root = ["-C", "User nobody", "-C", "Group nogroup"] if os.getuid() == 0 else []
        name = program("apache2", "apache2-bin")
        return [name, *root, "-d", str(directory), "-f", str(file), "-D", "FOREGROUND"]

    def curl(self, *options: str) -> Curl:
        return Curl(self.stream, *self.options, *options)


class Origin(Server):
    """The example with one worker, so that it can be asked how many streams it has."""

    def __init__(self, directory: Path, ping_interval: float) -> None:
        port = free_port()
        self.broker = f"sqlite:///{directory}/sse.db"
        self.settings = Settings(broker_url=self.broker, ping_interval=ping_interval)
        command = python(
            "-m", "gunicorn", "-c", str(EXAMPLE / "gunicorn.conf.py"), "--bind", f"127.0.0.1:{port}", "-w", "1"
        )
        environment = {"SSE_BROKER_URL": self.broker, "FLASK_SSE_PING_INTERVAL": str(ping_interval)}
        super().__init__(command, port, directory / "log", environment)
        self.publisher = Publisher(self.broker)
        self.said = 0

    def start(self) -> Server:
        """Wait for its worker too: gunicorn listens before there is one."""
        super().start()
        wait_for(lambda: self.streams() == 0, "the worker answers", LONG)
        return self

    def say(self) -> tuple[str, str]:
        """Publish; give the id and the text."""
        self.said += 1
        text = f"said {self.said:04}"
        return self.publisher.publish("news", {"text": text, "publisher": 0}, event="said"), text

    def streams(self) -> int:
        return int(httpx.get(f"{self.url}/worker", timeout=DEADLINE, trust_env=False).json()["streams"])

    def wait_for_streams(self, count: int) -> None:
        wait_for(lambda: self.streams() == count, f"{count} streams (log: {self.log[-2000:]})", DEADLINE)

    def send_everybody_away(self) -> None:
        """Wait until nobody is left of those who have hung up, which some proxies tell only who writes."""
        wait_for(lambda: self.say() and self.streams() == 0, "nobody is left", DEADLINE)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory that a proxy can still read when it is no longer root, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="proxies-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        authority = trustme.CA()
        certificate = authority.issue_cert("localhost", "127.0.0.1")
        authority.cert_pem.write_to_path(str(directory / "ca.pem"))
        certificate.private_key_pem.write_to_path(str(directory / "site.key"))
        certificate.private_key_and_cert_chain_pem.write_to_path(str(directory / "site.pem"))
        yield directory


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Origin]:
    """A server whose heartbeats come later than anybody here waits."""
    origin = Origin(tmp_path_factory.mktemp("origin"), LONG)
    try:
        origin.start()
        yield origin
    finally:
        origin.stop(signal.SIGKILL)
        origin.publisher.close()


@pytest.fixture(scope="module")
def often(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Origin]:
    """A server whose heartbeats come often."""
    origin = Origin(tmp_path_factory.mktemp("often"), OFTEN)
    try:
        origin.start()
        yield origin
    finally:
        origin.stop(signal.SIGKILL)
        origin.publisher.close()


def started(stack: contextlib.ExitStack, proxy: ProxyServer) -> ProxyServer:
    stack.callback(proxy.stop, signal.SIGKILL)
    proxy.start()
    return proxy


@pytest.fixture(scope="module")
def plain(origin: Origin, place: Path) -> Iterator[dict[str, ProxyServer]]:
    """Each as it is shown."""
    with contextlib.ExitStack() as stack:
        yield {kind: started(stack, ProxyServer(kind, place / kind, origin.port)) for kind in KINDS}


@pytest.fixture(scope="module")
def secure(origin: Origin, place: Path) -> Iterator[dict[str, ProxyServer]]:
    """Each with TLS."""
    with contextlib.ExitStack() as stack:
        yield {kind: started(stack, ProxyServer(kind, place / f"{kind}-tls", origin.port, tls=True)) for kind in KINDS}


@pytest.fixture
def proxy(request: pytest.FixtureRequest) -> ProxyServer:
    kind, scheme = request.param
    found: ProxyServer = request.getfixturevalue({"http": "plain", "https": "secure"}[scheme])[kind]
    return found


each = pytest.mark.parametrize(
    "proxy", [(kind, scheme) for scheme in ("http", "https") for kind in KINDS], indirect=True, ids="-".join
)


@each
def test_each_event_comes_before_the_next_and_a_client_that_returns_gets_what_it_missed(
    origin: Origin, proxy: ProxyServer
) -> None:
    version = b"HTTP/2 200" if proxy.tls else b"HTTP/1.1 200"
    with proxy.curl("--include", "--header", "Accept-Encoding: gzip, deflate, br") as curl:
        curl.wait_for(version, b": open")  # before there is an event
        said = []
        for _ in range(5):
            said.append(origin.say())
            curl.wait_for(said[-1][1].encode())
        assert curl.process.poll() is None
        assert b"content-encoding" not in curl.output.lower()
        assert b": ping" not in curl.output
    with proxy.curl("--header", f"Last-Event-ID: {said[1][0]}") as curl:
        curl.wait_for(said[-1][1].encode())
        assert re.findall(rb"said \d+", curl.output) == [text.encode() for _, text in said[2:]]
    with proxy.curl("--include", "--header", "Last-Event-ID: end") as curl:
        assert re.match(rb"HTTP/[\d.]+ 204", curl.wait_for_end())


@each
def test_the_application_knows_that_a_client_has_left(origin: Origin, proxy: ProxyServer) -> None:
    origin.send_everybody_away()
    with proxy.curl() as curl:
        curl.wait_for(b": open")
        origin.wait_for_streams(1)
    if proxy.kind == "apache":
        origin.send_everybody_away()  # what is said does here what heartbeats do
    else:
        origin.wait_for_streams(0)


@pytest.mark.parametrize("kind", KINDS)
def test_many_streams_and_other_requests_share_a_connection_over_http_2(
    kind: str, origin: Origin, secure: dict[str, ProxyServer], tmp_path: Path
) -> None:
    # Apache works on six requests of a connection, and on more only once it has answered some.
    proxy, count = secure[kind], 5 if kind == "apache" else 12
    origin.send_everybody_away()
    wanted: list[str] = []
    for number in range(count):
        wanted += ["--output", str(tmp_path / f"{number}"), proxy.stream]
    worker = ["--output", str(tmp_path / "worker"), f"{proxy.url}/worker"]
    options = ["--verbose", "--silent", "--no-buffer", "--parallel", "--parallel-max", "50", "--noproxy", "*"]
    log = tmp_path / "log"
    with log.open("wb") as output:
        curl = subprocess.Popen(["curl", *options, *proxy.options, *wanted, *worker], stderr=output)
    try:
        origin.wait_for_streams(count)
        _, text = origin.say()

        def have_it() -> bool:
            files = [tmp_path / f"{number}" for number in range(count)]
            return all(file.exists() and text in file.read_text() for file in files)

        wait_for(have_it, f"all have the event: {log.read_text()[-2000:]}", DEADLINE)
        wait_for(lambda: (tmp_path / "worker").exists(), "the other request is answered", DEADLINE)
        assert curl.poll() is None
    finally:
        curl.kill()
        curl.wait()
    assert log.read_text().count("Connected to ") == 1


# What takes its time: for all at once


class Counting(Follower):
    """Counts heartbeats."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.beats = 0

    def receive(self) -> bytes:
        data = super().receive()
        self.beats += data.count(b": ping\n")
        return data


def test_streams_outlive_a_reload_of_the_application_and_miss_nothing(
    origin: Origin, plain: dict[str, ProxyServer], crowd: Crowd
) -> None:
    followers = {kind: crowd.follow(proxy.port, "news") for kind, proxy in plain.items()}
    for follower in followers.values():
        follower.wait_until_it_reads()
    said = [origin.say()]
    os.kill(origin.pid, signal.SIGHUP)

    def all_are_back() -> bool:
        said.append(origin.say())
        time.sleep(0.05)  # between two events
        return all(follower.connections >= 2 for follower in followers.values())

    wait_for(all_are_back, "all have come back", DEADLINE)
    said.append(origin.say())
    for kind, follower in followers.items():
        wait_for(lambda follower=follower: said[-1][0] in follower.ids, "the last event", DEADLINE)  # type: ignore[misc]
        ids = [event.id for event in follower.events if event.event == "said"]
        assert ids[ids.index(said[0][0]) :] == [identifier for identifier, _ in said], kind
        assert len(set(ids)) == len(ids), kind


def test_while_the_application_is_away_a_browser_is_told_to_come_back(
    origin: Origin, plain: dict[str, ProxyServer]
) -> None:
    origin.stop(signal.SIGKILL)

    def ask(kind: str, path: str) -> httpx.Response:
        return httpx.get(f"{plain[kind].url}{path}", timeout=DEADLINE, trust_env=False)

    with ThreadPoolExecutor(8) as pool:
        streams = {kind: pool.submit(ask, kind, "/stream?connectKey=news") for kind in KINDS}
        pages = {kind: pool.submit(ask, kind, "/worker") for kind in KINDS}
        for kind in KINDS:
            answer = streams[kind].result()
            said = answer.status_code, answer.headers["Content-Type"], answer.text
            assert said == (200, "text/event-stream", "retry: 5000\n\n"), kind
            assert pages[kind].result().status_code in (502, 503), kind
    origin.start()
    for proxy in plain.values():
        with proxy.curl() as curl:  # none of them holds it against the application that it was away
            curl.wait_for(b": open")


@pytest.fixture(scope="module")
def hasty(often: Origin, place: Path) -> Iterator[tuple[Proxy, dict[str, ProxyServer]]]:
    """Each with short waits; what is between it and the application can be made to swallow everything."""
    with contextlib.ExitStack() as stack:
        between = stack.enter_context(Proxy(often.port))
        port = httpx.URL(between.url).port
        assert port is not None
        proxies = {
            kind: started(stack, ProxyServer(kind, place / f"{kind}-hasty", port, KINDS[kind].waits)) for kind in KINDS
        }
        yield between, proxies


def test_heartbeats_keep_a_silent_stream_alive_for_longer_than_a_proxy_waits(
    hasty: tuple[Proxy, dict[str, ProxyServer]], crowd: Crowd
) -> None:
    between, proxies = hasty
    followers = {kind: crowd.follow(proxy.port, "news", kind=Counting) for kind, proxy in proxies.items()}
    for kind, follower in followers.items():
        assert isinstance(follower, Counting)
        wait_for(lambda follower=follower: follower.beats >= 2 * WAIT / OFTEN, f"heartbeats through {kind}", LONG)  # type: ignore[misc]
        assert follower.connections == 1, kind
    between.swallow()  # and without heartbeats they do cut
    for kind in CUTTING:
        wait_for(lambda kind=kind: followers[kind].connections >= 2, f"{kind} cuts", DEADLINE)  # type: ignore[misc]
    assert followers["caddy"].connections == 1


def test_the_doctor_finds_nothing_wrong_with_any_of_them(
    often: Origin, hasty: tuple[Proxy, dict[str, ProxyServer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_sse_stream.probing._LATE", DEADLINE)  # this machine may be busy
    manager = PoolManager(often.settings)
    for kind, proxy in hasty[1].items():
        findings = list(look_at_url(manager, proxy.stream, {}))
        assert [finding for finding in findings if finding.level != "ok"] == [], kind
        assert {finding.check for finding in findings} == {"compression", "first bytes", "events", "heartbeats"}
    manager.shutdown()


WRONG: dict[str, tuple[str, dict[str, str], str]] = {
    "caddy that keeps what it is given": (
        "caddy",
        {"reverse_proxy 127.0.0.1:8000": "reverse_proxy 127.0.0.1:8000 {\nbuffer_responses\n}"},
        "first bytes",
    ),
    "haproxy that cuts early": ("haproxy", {"timeout server 60s": f"timeout server {WAIT}s"}, "heartbeats"),
    "apache that compresses everything": (
        "apache",
        {"application/json\n": "application/json text/event-stream\n", 'SetEnvIf Request_URI "^/stream$" no-gzip': ""},
        "compression",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_doctor_finds_what_one_of_them_does_wrongly(
    wrong: str, origin: Origin, often: Origin, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, changes, check = WRONG[wrong]
    monkeypatch.setattr("flask_sse_stream.probing._LATE", DEADLINE)
    if check == "first bytes":  # what never comes need not be waited for long
        monkeypatch.setattr("flask_sse_stream.probing._HEAD_SECONDS", 2.0)
    server = origin if check == "heartbeats" else often
    manager = PoolManager(Settings(ping_interval=server.settings.ping_interval))
    with contextlib.ExitStack() as stack:
        proxy = started(stack, ProxyServer(kind, place / wrong.replace(" ", "-"), server.port, changes))
        found = [finding for finding in look_at_url(manager, proxy.stream, {}) if finding.level != "ok"]
    assert [(finding.level, finding.check) for finding in found] == [("problem", check)], found
    manager.shutdown()


def test_one_that_is_told_to_stop_does_not_wait_for_streams_for_ever(
    hasty: tuple[Proxy, dict[str, ProxyServer]], crowd: Crowd
) -> None:
    _, proxies = hasty
    followers = [crowd.follow(proxy.port, "news") for proxy in proxies.values()]
    for follower in followers:
        follower.wait_until_it_reads()
    for proxy in proxies.values():
        os.kill(proxy.pid, proxy.what.gently)
    for kind in ("nginx", "caddy", "haproxy"):  # Apache takes ten seconds more, whatever its configuration says
        process = proxies[kind].process
        assert process is not None
        wait_for(lambda process=process: process.poll() is not None, f"{kind} has ended", LONG)  # type: ignore[misc]
