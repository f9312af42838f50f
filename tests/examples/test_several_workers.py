"""gunicorn with four workers behind nginx, with the configuration that is shipped: only its ports are others."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import httpx
import psutil
import pytest
from playwright.sync_api import Browser, Page, expect
from redis_server import RedisServer
from support import ROOT, Server, chromium, free_port, python, wait_for

from flask_sse_stream import EventDecoder, Publisher, Settings

pytestmark = pytest.mark.live

EXAMPLE = ROOT / "examples" / "several_workers"
CONFIGURATION = (EXAMPLE / "nginx.conf").read_text()
SOON = 5.0  # seconds; what is held back would come with the next heartbeat, after 10
LONG = 20.0  # for what every process has a part in, on a machine that is busy with something else
PATIENCE = 30_000  # milliseconds; a busy machine starts Chromium slowly

WAS_KILLED = r"Worker \(pid:\d+\) was sent SIGKILL!"
BROKE = r"upstream prematurely closed connection while reading upstream"
AWAY = (
    r"(connect|recv)\(\) failed \(\d+: [^)]*\) while (connecting to|reading response header from) upstream"
    r"|upstream prematurely closed connection while reading response header from upstream"
)
SILENT = r"upstream timed out \(110: [^)]*\) while reading upstream"

# gunicorn leaves the files of its heartbeats open when it ends, and its older versions a socket that is bound no more.
LEFT_OPEN = (
    r"Exception ignored in: <(_io\.FileIO .*|socket\.socket fd=\d+, family=\S+, type=\S+, proto=0>)\n"
    r"ResourceWarning: unclosed (file )?<\1\n"
)

# What somebody may have in the rest of a configuration that is bad for streams.
ADVERSE = {
    "gzip on;": "gzip on; gzip_types *; gzip_min_length 0; gzip_proxied any; proxy_ignore_headers X-Accel-Buffering;",
    "proxy_http_version 1.1;": "proxy_http_version 1.0;",
}


def nginx() -> str:
    path = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if path is None:
        raise AssertionError("there is no nginx here: install the Debian package 'nginx'")
    return path


class Site:
    """The example as its README has it run; ``application`` is gunicorn, ``proxy`` nginx in front of it."""

    def __init__(
        self, directory: Path, broker_url: str, options: list[str], changes: dict[str, str], **env: str
    ) -> None:
        ports = free_port(), free_port()
        self.application = Server(
            python(
                "-m", "gunicorn", "-c", str(EXAMPLE / "gunicorn.conf.py"), "--bind", f"127.0.0.1:{ports[0]}", *options
            ),
            ports[0],
            directory / "gunicorn.log",
            {"PYTHONWARNINGS": "error", "SSE_BROKER_URL": broker_url, **env},
        )
        configuration = CONFIGURATION
        for shipped, changed in {
            "server 127.0.0.1:8000;": f"server 127.0.0.1:{ports[0]};",
            "listen 127.0.0.1:8080;": f"listen 127.0.0.1:{ports[1]};",
            **changes,
        }.items():
            assert configuration.count(shipped) == 1, shipped
            configuration = configuration.replace(shipped, changed)
        (directory / "nginx.conf").write_text(configuration)
        (directory / "run").mkdir()
        command = [nginx(), "-p", str(directory / "run"), "-c", "../nginx.conf", "-e", "stderr"]
        self.proxy = Server(command, ports[1], directory / "nginx.log")
        self.url = self.proxy.url
        self.expected: list[str] = []

    def start(self) -> None:
        self.application.start()
        self.wait_until_ready()
        self.proxy.start()

    def wait_until_ready(self) -> None:
        """Wait for four workers that answer: gunicorn does not say when one does, and before, signals are lost."""
        wait_for(lambda: len(self.workers()) == 4, "four workers", LONG)
        for worker in self.workers():
            self.streams(worker)

    def stop(self) -> None:
        self.proxy.stop()
        self.application.stop()

    def expect_in_a_log(self, pattern: str) -> None:
        """Let a line that the test provokes be no error."""
        self.expected.append(pattern)

    def check_logs(self) -> None:
        """Find what nobody expects in them: in nginx's any line, in gunicorn's any that is not of level info."""
        said = re.sub(LEFT_OPEN, "", self.application.log)
        lines = [line for line in said.splitlines() if not re.match(r"\[[^]]+\] \[\d+\] \[INFO\] ", line)]
        lines += self.proxy.log.splitlines()
        for pattern in self.expected:
            assert any(re.search(pattern, line) for line in lines), pattern
        assert [line for line in lines if not any(re.search(pattern, line) for pattern in self.expected)] == []

    # What its processes know

    def workers(self) -> set[int]:
        """Give the ids of the processes that serve."""
        return {
            child.pid
            for child in psutil.Process(self.application.pid).children()
            if child.status() != psutil.STATUS_ZOMBIE
        }

    def streams(self, worker: int) -> int:
        """Ask one worker how many streams it has. Who answers is the kernel's choice, so the others stand still."""
        others = [psutil.Process(other) for other in self.workers() - {worker}]
        for other in others:
            other.suspend()
        try:
            wait_for(lambda: all(other.status() == psutil.STATUS_STOPPED for other in others), "they stand still")
            answer = httpx.get(f"{self.application.url}/worker", timeout=LONG, headers={"Connection": "close"}).json()
        finally:
            for other in others:
                other.resume()
        assert answer["pid"] == worker
        return int(answer["streams"])

    def publish(self, text: str) -> str:
        """Publish through nginx; give the event's id."""
        response = httpx.post(f"{self.url}/news", json=text, timeout=LONG)
        assert response.status_code == 201, response.text
        assert response.json()["publisher"] in self.workers()
        return str(response.json()["id"])


class Received(NamedTuple):
    id: str | None
    text: str


class Follower:
    """A client behind nginx that comes back as a browser does, with the last id it saw."""

    def __init__(self, site: Site) -> None:
        self.events: list[Received] = []
        self.errors: list[str] = []
        self.heads: list[dict[str, str]] = []  # one for each connection that was answered
        self.heartbeats = 0
        self.retry: int | None = None
        self.worker = 0  # whose stream it is reading; 0 while it reads none
        self._port = site.proxy.port
        self._last_id = ""
        self._may_come = threading.Event()
        self._may_come.set()
        self._stopped = False
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Follower:  # noqa: PYI034  Self is of Python 3.11
        wait_for(lambda: self.worker or self.errors, "a stream begins", LONG)
        assert self.errors == []
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.leave()
        if kind is None:
            assert self.errors == []

    def leave(self) -> None:
        """Hang up for good, as a closed browser tab does."""
        self._stopped = True
        self._may_come.set()
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(LONG)
        assert not self._thread.is_alive()

    @contextlib.contextmanager
    def staying_away(self) -> Iterator[None]:
        """While the block lasts it does not come back, should its stream end."""
        self._may_come.clear()
        try:
            yield
        finally:
            self._may_come.set()

    def _run(self) -> None:
        while not self._stopped:
            self._may_come.wait()
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
            try:
                self._follow(connection)
            except (OSError, http.client.IncompleteRead):  # cut off in the middle
                pass
            except Exception as error:
                self.errors.append(repr(error))
                return
            finally:
                self.worker = 0
                connection.close()
            time.sleep(0.02)  # a browser waits for longer

    def _follow(self, connection: http.client.HTTPConnection) -> None:
        headers = {"Accept-Encoding": "gzip", **({"Last-Event-ID": self._last_id} if self._last_id else {})}
        connection.request("GET", "/stream?connectKey=news", headers=headers)
        self._socket = connection.sock
        response = connection.getresponse()
        head = {name.lower(): value for name, value in response.getheaders()}
        if (response.status, head["content-type"], head.get("content-encoding")) != (200, "text/event-stream", None):
            raise AssertionError(f"{response.status} {head} {response.read()!r}")
        self.heads.append(head)
        decoder = EventDecoder(comments=True)
        while data := response.read1(65536):
            for event in decoder.feed(data):
                if event.comment == "ping":
                    self.heartbeats += 1
                elif event.event == "worker":
                    self.worker = json.loads(str(event.data))["pid"]
                elif event.event == "said":
                    self.events.append(Received(event.id, json.loads(str(event.data))["text"]))
                elif event.data is not None:
                    raise AssertionError(f"{event}")
            self.retry = decoder.retry
            self._last_id = decoder.last_event_id or self._last_id

    def wait_for(self, event: Received, seconds: float = LONG) -> None:
        wait_for(lambda: self.errors or event in self.events[-1:], f"{event} comes", seconds)
        assert self.errors == []


Run = Callable[..., Site]


@pytest.fixture(params=["sqlite", "redis"])
def broker_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/sse.db"
    else:
        with RedisServer(tmp_path / "redis") as server:
            yield server.url


on_sqlite = pytest.mark.parametrize("broker_url", ["sqlite"], indirect=True)


@pytest.fixture
def run(tmp_path: Path, broker_url: str) -> Iterator[Run]:
    """Start the example; at the end there may be nothing in a log of its servers but what the test provoked."""
    sites: list[Site] = []
    with contextlib.ExitStack() as started:

        def run(*options: str, changes: dict[str, str] | None = None, **environment: str) -> Site:
            site = Site(tmp_path, broker_url, [*options], changes or {}, **environment)
            started.callback(site.stop)
            site.start()
            sites.append(site)
            return site

        yield run
    for site in sites:
        site.check_logs()


# What nginx may do to a stream


@pytest.mark.parametrize("changes", [{}, ADVERSE], ids=["as it is", "among adverse settings"])
def test_each_event_comes_through_nginx_before_the_next_while_the_stream_stays_open(
    run: Run, changes: dict[str, str]
) -> None:
    site = run(changes=changes)
    before = time.monotonic()
    with Follower(site) as follower:
        assert time.monotonic() - before < SOON  # nor are the first bytes held back
        published = []
        for number in range(20):
            published.append(Received(site.publish(f"{number}"), f"{number}"))
            follower.wait_for(published[-1], SOON)
        assert follower.events == published
        assert len(follower.heads) == 1
        assert follower.heartbeats == 0


def test_a_client_whose_worker_is_killed_comes_back_to_another_and_gets_each_event_once_and_in_order(run: Run) -> None:
    site = run()
    site.expect_in_a_log(WAS_KILLED)
    site.expect_in_a_log(BROKE)
    with Follower(site) as follower, Follower(site) as other:

        def publish(count: int, when: str) -> list[Received]:
            return [Received(site.publish(f"{when} {number}"), f"{when} {number}") for number in range(count)]

        published = publish(5, "before")
        follower.wait_for(published[-1])
        killed = follower.worker
        with follower.staying_away():
            os.kill(killed, signal.SIGKILL)
            wait_for(lambda: not follower.worker, "nginx passes on that the stream broke", SOON)
            published += publish(30, "meanwhile")
        wait_for(lambda: follower.worker or follower.errors, "it is back", LONG)
        assert follower.worker != killed
        published += publish(5, "after")
        for client in (follower, other):  # the other may have had the same worker, and come back at once
            client.wait_for(published[-1])
            assert client.events == published
        assert len(follower.heads) == 2
        site.wait_until_ready()


def test_a_client_that_leaves_nginx_is_gone_from_its_worker_within_two_heartbeats(run: Run) -> None:
    site = run(FLASK_SSE_PING_INTERVAL="0.5")
    workers = sorted(site.workers())
    with contextlib.ExitStack() as clients:
        followers = [clients.enter_context(Follower(site)) for _ in range(8)]
        having = [follower.worker for follower in followers]
        assert [site.streams(worker) for worker in workers] == [having.count(worker) for worker in workers]
        followers[0].leave()
        wait_for(lambda: site.streams(having[0]) == having.count(having[0]) - 1, "one is gone", 1 + SOON)
        assert sum(map(site.streams, workers)) == 7
    for worker in workers:
        wait_for(lambda worker=worker: site.streams(worker) == 0, "all are gone", 1 + SOON)  # type: ignore[misc]


@on_sqlite
@pytest.mark.parametrize("changes", [{}, ADVERSE], ids=["as it is", "among adverse settings"])
def test_a_client_that_reads_nothing_is_cut_by_its_worker_since_nginx_keeps_nothing_for_it(
    run: Run, broker_url: str, changes: dict[str, str]
) -> None:
    site = run(changes=changes)
    with socket.create_connection(("127.0.0.1", site.proxy.port), LONG) as client, Publisher(broker_url) as publisher:
        client.sendall(b"GET /stream?connectKey=news HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = b""
        while not (introduced := re.search(rb'data: \{"pid": (\d+)\}', received)):
            received += client.recv(65536)
        sent = 0
        while site.streams(int(introduced[1])):
            assert sent < 100, "nginx takes everything"
            sent += 1
            publisher.publish("news", {"text": "x" * 500_000, "publisher": os.getpid()}, event="said")


@on_sqlite
def test_a_silent_stream_stays_open_as_its_heartbeats_come_more_often_than_nginx_cuts(run: Run) -> None:
    site = run(changes={"proxy_read_timeout 60s;": "proxy_read_timeout 2s;"}, FLASK_SSE_PING_INTERVAL="0.5")
    with Follower(site) as follower:
        before = time.monotonic()
        wait_for(lambda: follower.heartbeats >= 10, "ten heartbeats", LONG)
        assert time.monotonic() - before > 4
        assert len(follower.heads) == 1


@on_sqlite
def test_a_silent_stream_is_cut_by_nginx_when_its_heartbeats_come_too_rarely(run: Run) -> None:
    site = run(changes={"proxy_read_timeout 60s;": "proxy_read_timeout 1s;"}, FLASK_SSE_PING_INTERVAL="60")
    site.expect_in_a_log(SILENT)
    with Follower(site) as follower:
        wait_for(lambda: len(follower.heads) >= 3, "it has come back twice", LONG)
        wait_for(lambda: follower.worker or follower.errors, "it reads", LONG)
        published = Received(site.publish("still here"), "still here")
        follower.wait_for(published)
        assert follower.events == [published]


@on_sqlite
def test_while_the_application_restarts_clients_are_told_when_to_come_back_and_miss_nothing(run: Run) -> None:
    site = run()
    site.expect_in_a_log(AWAY)
    with Follower(site) as polite, Follower(site) as hasty:
        published = [Received(site.publish("before"), "before")]
        polite.wait_for(published[0])
        with polite.staying_away():
            assert site.application.process is not None
            before = time.monotonic()
            site.application.process.send_signal(signal.SIGTERM)
            # Also what the hasty one begins meanwhile is ended: gunicorn would wait for it for thirty seconds.
            assert site.application.process.wait(LONG) == 0
            assert time.monotonic() - before < 10
            wait_for(lambda: not polite.worker, "its stream has ended", SOON)
            assert polite.retry is not None
            assert 3000 <= polite.retry <= 8000  # SSE_RETRY, and a part of SSE_DRAIN_SECONDS
            answer = httpx.get(f"{site.url}/stream?connectKey=news")
            assert (answer.status_code, answer.headers["Content-Type"]) == (200, "text/event-stream")
            assert answer.text == "retry: 5000\n\n"
            assert httpx.get(site.url).status_code == 502
            site.application.start()
            site.wait_until_ready()
            published.append(Received(site.publish("meanwhile"), "meanwhile"))
        for follower in (polite, hasty):
            follower.wait_for(published[-1])
            assert follower.events == published


@on_sqlite
def test_a_reload_of_nginx_moves_a_stream_to_its_new_processes_and_loses_nothing(run: Run) -> None:
    site = run()
    with Follower(site) as follower:
        published = [Received(site.publish("before"), "before")]
        os.kill(site.proxy.pid, signal.SIGHUP)
        number = 0
        deadline = time.monotonic() + LONG
        while len(follower.heads) < 2:
            assert time.monotonic() < deadline, "the old process keeps the stream"
            number += 1
            published.append(Received(site.publish(f"meanwhile {number}"), f"meanwhile {number}"))
            follower.wait_for(published[-1])
        published.append(Received(site.publish("after"), "after"))
        follower.wait_for(published[-1])
        assert follower.events == published


@on_sqlite
def test_nginx_compresses_the_page_and_uses_its_connections_to_the_workers_again(run: Run, tmp_path: Path) -> None:
    access = tmp_path / "access.log"
    site = run("--access-logfile", str(access), "--access-logformat", "%({REMOTE_PORT}e)s")
    with httpx.Client() as client:
        for _ in range(40):
            assert client.get(site.url).headers["Content-Encoding"] == "gzip"
    wait_for(lambda: access.read_text().count("\n") >= 40, "all are logged")
    assert (
        len(set(access.read_text().split()[-40:])) <= 10
    )  # one, unless the machine stood still for longer than an idle one is kept


# What the files say


def test_nginx_waits_for_several_heartbeats_before_it_cuts() -> None:
    (seconds,) = re.findall(r"proxy_read_timeout (\d+)s;", CONFIGURATION)
    assert int(seconds) >= 3 * Settings().ping_interval


def test_nginx_lets_go_of_an_idle_connection_before_gunicorn_does() -> None:
    (nginxs,) = re.findall(r"keepalive_timeout (\d+)s;", CONFIGURATION)
    (gunicorns,) = re.findall(r"^keepalive = (\d+)", (EXAMPLE / "gunicorn.conf.py").read_text(), re.MULTILINE)
    assert int(nginxs) < int(gunicorns)


def test_the_page_about_deploying_shows_the_configuration_that_is_tested_here_and_no_other() -> None:
    page = (ROOT / "docs" / "deploying.rst").read_text()
    assert ".. literalinclude:: ../examples/several_workers/nginx.conf" in page
    assert "code-block:: nginx" not in page


@pytest.mark.parametrize(
    ("name", "timeout", "come_back"),
    [
        ("Caddyfile", None, "Caddyfile"),
        ("haproxy.cfg", r"timeout (?:client|server) (\d+)s", "come_back.http"),
        ("apache.conf", r"timeout=(\d+) ", "come_back.asis"),
    ],
)
def test_the_other_proxies_wait_for_several_heartbeats_and_answer_200_where_nobody_else_does(
    name: str, timeout: str | None, come_back: str
) -> None:
    assert f".. literalinclude:: ../examples/several_workers/{name}\n" in (ROOT / "docs" / "proxies.rst").read_text()
    text = (EXAMPLE / name).read_text()
    if timeout is not None:
        assert text.count(come_back) >= 3
        assert min(int(seconds) for seconds in re.findall(timeout, text)) >= 3 * Settings().ping_interval
    answer = (EXAMPLE / come_back).read_bytes().decode()
    assert re.search(r"(^HTTP/1\.1 |^Status: |\" )200\b", answer, re.MULTILINE)
    # An EventSource takes nothing of another type; and what does not end with an empty line is not heard.
    assert re.search(r"Content-Type:? text/event-stream", answer)
    assert "retry: 5000\n\n" in answer


def test_the_readme_names_every_file_and_the_ports_that_are_configured() -> None:
    readme = (EXAMPLE / "README.md").read_text()
    files = {
        str(path.relative_to(EXAMPLE)) for path in EXAMPLE.rglob("*") if path.is_file() and "run" not in path.parts
    }
    assert set(re.findall(r"^\| \[([\w./]+)\]\(\1\)", readme, re.MULTILINE)) == {
        name for name in files if "__pycache__" not in name and name != "README.md"
    }
    assert set(re.findall(r"http://127\.0\.0\.1:(\d+)", readme)) == {"8000", "8080"}


def test_the_page_makes_no_html_of_what_it_is_sent() -> None:
    source = (EXAMPLE / "templates" / "index.html").read_text()
    assert not re.search(r"\.(innerHTML|outerHTML|insertAdjacentHTML|write\()", source)


# What the application takes


NO_TEXTS = ('""', '" "', "7", '["x"]', '"' + "x" * 201 + '"', "no JSON")


@on_sqlite
def test_what_is_no_text_and_what_is_not_public_is_refused(run: Run) -> None:
    site = run()
    for text in NO_TEXTS:
        answer = httpx.post(f"{site.url}/news", content=text, headers={"Content-Type": "application/json"})
        assert (answer.status_code, text) == (400, text)
    assert httpx.post(f"{site.url}/news", data={"text": "from a form of another page"}).status_code == 415
    assert httpx.get(f"{site.url}/stream?connectKey=secret").status_code == 403


def test_without_a_setting_the_log_is_beside_the_example(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE, tmp_path / "copy", ignore=shutil.ignore_patterns("run", "__pycache__"))
    program = "import app; print(app.app.config['SSE_BROKER_URL']); app.sse.publish('news', 'hi')"
    done = subprocess.run(
        python("-W", "error", "-c", program),
        cwd=tmp_path / "copy",
        env={**os.environ, "SSE_BROKER_URL": "", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    database = tmp_path / "copy" / "run" / "sse.db"
    assert done.stdout == f"sqlite:///{database}\n"
    assert database.exists()


# The page, in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[[Site], Page]]:
    """Give a function that opens the page in a tab; what goes wrong in a script fails the test at its end."""
    context = browser.new_context()
    problems: list[str] = []
    urls: list[str] = []

    def open_page(site: Site) -> Page:
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: urls.append(request.url))
        page.goto(site.url)
        expect(page.locator(".state")).to_have_text("Live", timeout=PATIENCE)
        assert [url for url in urls if not url.startswith((site.url, "data:"))] == []
        return page

    yield open_page
    context.close()
    assert problems == []


@on_sqlite
@pytest.mark.browser
def test_who_has_a_keyboard_alone_can_publish_and_the_page_shows_it_as_text(
    run: Run, open_page: Callable[[Site], Page]
) -> None:
    site = run()
    page, other = open_page(site), open_page(site)
    page.keyboard.press("Tab")
    page.keyboard.type("<b>Grüße</b>")
    page.keyboard.press("Enter")
    for tab in (page, other):
        expect(tab.locator("li")).to_have_count(1, timeout=PATIENCE)
        expect(tab.locator("li p").first).to_have_text("<b>Grüße</b>", timeout=PATIENCE)
        shown = re.fullmatch(r"published by (\d+)", tab.locator("li p").last.inner_text())
        assert shown is not None
        assert int(shown[1]) in site.workers()
        assert int(tab.locator("#worker").inner_text()) in site.workers()
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(other.locator("li")).to_have_count(2, timeout=PATIENCE)
    late = open_page(site)
    expect(late.locator("li")).to_have_count(2, timeout=PATIENCE)
    expect(late.locator("li b")).to_have_text(["before you came"] * 2)


@on_sqlite
@pytest.mark.browser
def test_the_page_names_its_new_worker_after_a_kill_and_marks_what_it_missed(
    run: Run, open_page: Callable[[Site], Page]
) -> None:
    site = run()
    site.expect_in_a_log(WAS_KILLED)
    site.expect_in_a_log(BROKE)
    page = open_page(site)
    site.publish("before")
    expect(page.locator("li")).to_have_count(1, timeout=PATIENCE)
    killed = page.locator("#worker").inner_text()
    expect(page.locator("#hint code")).to_have_text(f"kill -9 {killed}")
    os.kill(int(killed), signal.SIGKILL)
    expect(page.locator(".state")).to_have_text("Reconnecting", timeout=PATIENCE)
    site.publish("meanwhile")
    expect(page.locator(".state")).to_have_text("Live", timeout=PATIENCE)
    expect(page.locator("#worker")).not_to_have_text(killed)
    expect(page.locator("#before")).to_have_text(f"before: {killed}")
    site.publish("after")
    expect(page.locator("li p:first-child")).to_have_text(["after", "meanwhile", "before"], timeout=PATIENCE)
    expect(page.locator("li b")).to_have_text(["missed, replayed"])
