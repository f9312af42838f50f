"""``flask sse doctor`` finds each misconfiguration when it is made on purpose, in the real thing, and no other."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from command import Flask
from redis_server import RedisServer
from support import ROOT, Server, free_port, wait_for

import flask_sse_stream
from flask_sse_stream import PoolManager, Settings, SettingsError
from flask_sse_stream.doctor import Gunicorn, _judge_redis, examine
from flask_sse_stream.probing import Finding

pytestmark = pytest.mark.live


LONG = 20.0
FOUND: list[Finding] = []  # all that was not well in the tests here


def bad(findings: Any) -> dict[str, str]:
    """What is not well, by what was looked at; each has its cure."""
    found = [finding for finding in findings if finding.level != "ok"]
    assert all(finding.cure for finding in found)
    FOUND.extend(found)
    return {finding.check: f"{finding.level}: {finding.text}" for finding in found}


@pytest.fixture(scope="module", autouse=True)
def many_files() -> Iterator[None]:
    """What is looked at here has enough, unless a test takes it away."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 20_000) if hard > 0 else 20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def gunicorn(directory: Path, text: str, **environ: str) -> Gunicorn:
    file = directory / "gunicorn.conf.py"
    file.write_text(text)
    found = Gunicorn.read(str(file), environ)
    assert found is not None
    return found


GOOD = 'worker_class = "gevent"\nworkers = 1\nworker_connections = 10_100\n'


def test_a_good_configuration_has_nothing_to_find(tmp_path: Path) -> None:
    manager = PoolManager(Settings(broker_url=f"sqlite:///{tmp_path}/sse.db"))
    shipped = (ROOT / "examples" / "several_workers" / "gunicorn.conf.py").read_text()
    assert bad(examine(manager, gunicorn=gunicorn(tmp_path, shipped))) == {}
    manager.shutdown()


@pytest.mark.parametrize(
    ("text", "check", "words"),
    [
        ("workers = 3\n", "broker", "problem: SSE_BROKER_URL is memory:// and there are 3 workers"),
        ("max_requests = 100\n", "recycling", "warning: max_requests = 100"),
        ("worker_connections = 1000\n", "connections", "problem: worker_connections = 1000 is less"),
        ('worker_class = "sync"\n', "worker class", "warning: sync"),
        ('worker_class = "tornado"\n', "worker class", "problem: tornado"),
        ("graceful_timeout = 3\n", "stopping", "warning: graceful_timeout = 3"),
        ("preload_app = True\n", "monkey patching", "problem: preload_app imports"),
    ],
)
def test_what_gunicorn_is_told_wrongly_is_found_in_its_file_and_in_its_arguments(
    tmp_path: Path, text: str, check: str, words: str
) -> None:
    manager = PoolManager(Settings())
    found = bad(examine(manager, gunicorn=gunicorn(tmp_path, GOOD + text)))
    assert list(found) == [check]
    assert found[check].startswith(words)
    name, _, value = text.strip().partition(" = ")
    argument = {"preload_app": "--preload"}.get(name, f"--{name.replace('_', '-')}={value}")
    again = gunicorn(tmp_path, GOOD, GUNICORN_CMD_ARGS=argument)
    assert list(bad(examine(manager, gunicorn=again))) == [check]


def test_gunicorns_file_is_found_where_gunicorn_finds_it_or_missed_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Gunicorn.read(None, {}) is None
    with pytest.raises(SettingsError, match="there is no gunicorn configuration"):
        Gunicorn.read("nowhere.py", {})
    (tmp_path / "gunicorn.conf.py").write_text("workers = 7\n")
    (tmp_path / "other.py").write_text("workers = 8\n")
    (tmp_path / "broken.py").write_text("workers = \n")
    for environ, workers in (({}, 7), ({"GUNICORN_CMD_ARGS": "-c other.py"}, 8), ({"GUNICORN_CMD_ARGS": "-w 9"}, 9)):
        found = Gunicorn.read(None, environ)
        assert found is not None
        assert found.workers == workers
    with pytest.raises(SettingsError, match=r"broken.py cannot be read"):
        Gunicorn.read("broken.py", {})


@pytest.mark.parametrize(
    ("patch", "config", "words"),
    [
        ("monkey.patch_all()", "worker_class = 'gthread'\nthreads = 4\n", "needs threads"),
        ("monkey.patch_socket()", GOOD, "a part of the standard library alone"),
        ("monkey.patch_all()", GOOD + "preload_app = True\n", ""),
    ],
)
def test_an_application_that_patches_wrongly_is_found(tmp_path: Path, patch: str, config: str, words: str) -> None:
    (tmp_path / "patching.py").write_text(f"from gevent import monkey\n{patch}\nfrom tools_app import app\n")
    (tmp_path / "conf.py").write_text(config)
    done = Flask(tmp_path, app="patching").run("doctor", "--json", "--gunicorn-config", "conf.py", PYTHONWARNINGS="")
    [found] = [item for item in json.loads(done.stdout)["findings"] if item["check"] == "monkey patching"]
    bad([Finding(**found)])
    assert (found["level"] == "problem", words in found["text"]) == (bool(words), True)
    assert done.returncode == bool(words)


def test_too_few_descriptors_are_found_and_the_exit_status_is_1(tmp_path: Path) -> None:
    flask = Flask(tmp_path, broker_url=f"sqlite:///{tmp_path}/sse.db")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        done = flask.run("doctor")
        few = flask.run("doctor", FLASK_SSE_MAX_CLIENTS="200")
        assert list(bad(examine(PoolManager(Settings())))) == ["open files"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert done.returncode == 1
    assert "problem  open files: 300 open files are allowed here" in done.stdout
    assert "         -> LimitNOFILE=65536" in done.stdout
    assert few.returncode == 0, few


def test_a_directory_that_belongs_to_somebody_else_is_found(tmp_path: Path) -> None:
    directory = tmp_path / "elsewhere"
    directory.mkdir(mode=0o555)
    flask = Flask(tmp_path, broker_url=f"sqlite:///{directory}/sse.db")
    # Root may write everywhere, unless this is taken from it.
    as_somebody = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.getuid() == 0 else []
    done = subprocess.run(
        [*as_somebody, *flask.command("doctor", "--json")],
        cwd=tmp_path,
        env=flask.environment,
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    found = bad(Finding(**item) for item in json.loads(done.stdout)["findings"])
    assert done.returncode == 1
    assert found["sqlite"] == f"problem: {directory} cannot be written to by this user"
    assert "the broker does not answer" in found["broker"]


def test_a_log_that_cannot_be_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = PoolManager(Settings(broker_url=f"sqlite:///{tmp_path}/nowhere/sse.db"))
    assert "there is no directory" in bad(examine(manager))["sqlite"]
    manager = PoolManager(Settings(broker_url=f"sqlite:///{tmp_path}/sse.db"))
    monkeypatch.setattr("flask_sse_stream.doctor._file_system", lambda directory: "nfs4")
    assert "file system of the network (nfs4)" in bad(examine(manager))["sqlite"]
    manager.shutdown()


# Redis


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis"), appendonly="yes") as server:
        yield server


@pytest.mark.parametrize(
    ("command", "undo", "check", "words"),
    [
        (None, None, "", ""),
        ("CONFIG SET appendonly no", "CONFIG SET appendonly yes", "redis persistence", "warning: appendonly no"),
        (
            "CONFIG SET maxmemory-policy allkeys-lru",
            "CONFIG SET maxmemory-policy noeviction",
            "redis memory",
            "problem: maxmemory-policy allkeys-lru may throw the log",
        ),
        (
            "CONFIG SET maxmemory-policy volatile-ttl",
            "CONFIG SET maxmemory-policy noeviction",
            "redis memory",
            "problem: maxmemory-policy volatile-ttl",
        ),
        ("CONFIG SET maxmemory 1100000", "CONFIG SET maxmemory 0", "redis memory", "warning: "),
        ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE", "redis role", "problem: this Redis is a replica"),
    ],
)
def test_what_redis_is_told_wrongly_is_found(
    redis: RedisServer, command: str | None, undo: str | None, check: str, words: str
) -> None:
    manager = PoolManager(Settings(broker_url=redis.url))
    try:
        if command is not None:
            redis.cli(*command.split(" "))
        found = bad(examine(manager))
        assert list(found) == ([check] if check else [])
        assert not check or found[check].startswith(words)
    finally:
        if undo is not None:
            redis.cli(*undo.split(" "))
        manager.shutdown()


def test_a_master_that_waits_for_no_replica_is_found(redis: RedisServer, tmp_path: Path) -> None:
    manager = PoolManager(Settings(broker_url=redis.url))
    with RedisServer(tmp_path / "replica", replicaof=f"127.0.0.1 {redis.port}"):
        wait_for(lambda: redis.cli("INFO", "replication")["connected_slaves"] == 1, "it has a replica", LONG)
        found = bad(examine(manager))
        assert list(found) == ["redis role"]
        assert found["redis role"].startswith("warning: a master that is cut off")
        redis.cli("CONFIG", "SET", "min-replicas-to-write", "1")
        assert bad(examine(manager)) == {}
        redis.cli("CONFIG", "SET", "min-replicas-to-write", "0")
    manager.shutdown()


def test_a_user_of_redis_with_the_rights_of_the_page_alone_is_well_and_one_with_fewer_is_found(
    redis: RedisServer,
) -> None:
    [rights] = re.findall(r"ACL SETUSER app on >password (.*)", (ROOT / "docs" / "redis.rst").read_text())
    redis.cli("ACL", "SETUSER", "app", "on", ">password", *rights.split())
    manager = PoolManager(Settings(broker_url=redis.url.replace("redis://", "redis://app:password@")))
    assert bad(examine(manager)) == {}
    manager.shutdown()
    redis.cli("ACL", "SETUSER", "app", "-info")
    manager = PoolManager(Settings(broker_url=manager.settings.broker_url))
    assert "no permissions" in bad(examine(manager))["broker"]
    manager.shutdown()


def test_a_redis_that_goes_while_it_is_looked_at_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RedisServer(tmp_path / "redis") as redis:
        manager = PoolManager(Settings(broker_url=redis.url))
        monkeypatch.setattr(manager, "reach_broker", redis.stop)
        found = bad(examine(manager))
    assert list(found) == ["redis"]
    assert found["redis"].startswith("warning: Redis does not say how it is set up")
    manager.shutdown()


def test_an_old_redis_and_a_master_that_waits_for_no_replica_are_found() -> None:
    well = {"redis_version": "7.0.15", "aof_enabled": "1", "role": "master"}
    assert bad(_judge_redis(well, "0")) == {}
    assert bad(_judge_redis({**well, "redis_version": "6.0.16"}, "0")) == {
        "redis version": "problem: Redis 6.0.16 is older than 6.2"
    }
    assert list(bad(_judge_redis({**well, "connected_slaves": "1"}, "0"))) == ["redis role"]
    assert bad(_judge_redis({**well, "connected_slaves": "1"}, "1")) == {}


def test_a_redis_that_is_not_there_is_found(tmp_path: Path) -> None:
    done = Flask(tmp_path, broker_url=f"redis://127.0.0.1:{free_port()}").run("doctor", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"]) == (1, False)
    assert [item["check"] for item in found["findings"] if item["level"] == "problem"] == ["broker"]


# On the way to a browser

HTTP_1_1 = "proxy_http_version 1.1;"
SITES = {
    "good": f"{HTTP_1_1} proxy_buffering off;",
    # What comes over HTTP/1.0, nginx's default for long, it keeps until a buffer is full; chunks it passes on.
    "buffering": "proxy_http_version 1.0; proxy_ignore_headers X-Accel-Buffering; proxy_buffering on;",
    "compressing": f"{HTTP_1_1} gzip on; gzip_types text/event-stream; gzip_min_length 0; gzip_proxied any;",
    "hasty": f"{HTTP_1_1} proxy_read_timeout 100ms;",
    "rewriting": f"{HTTP_1_1} proxy_hide_header Cache-Control;",
    "broken": "proxy_pass http://127.0.0.1:9;",
    "away": "proxy_pass http://127.0.0.1:9; error_page 502 =200 @come_back;",
}
COME_BACK = 'location @come_back { default_type text/event-stream; return 200 "retry: 5000\\n\\n"; }'


class Way:
    """An application, and an nginx before it that has a port for each way to be wrong."""

    def __init__(self, directory: Path) -> None:
        self.settings = Settings(broker_url=f"sqlite:///{directory}/sse.db", ping_interval=0.5)
        self.flask = Flask(directory, broker_url=self.settings.broker_url, ping_interval="0.5")
        port = free_port()
        self.application = Server(self.flask.command("run", "--port", str(port)), port, directory / "log")
        self.application.env = self.flask.environment
        self.ports = {name: free_port() for name in SITES}
        servers = "\n".join(
            f"server {{ listen 127.0.0.1:{self.ports[name]}; location / {{ proxy_set_header Connection ''; {lines} "
            f"{'' if 'proxy_pass' in lines else f'proxy_pass http://127.0.0.1:{port};'} }} {COME_BACK} }}"
            for name, lines in SITES.items()
        )
        (directory / "nginx.conf").write_text(
            "daemon off; pid nginx.pid; error_log stderr crit; events { worker_connections 200; }\n"
            "http { access_log off; client_body_temp_path b; proxy_temp_path p; fastcgi_temp_path f; "
            f"uwsgi_temp_path u; scgi_temp_path s;\n{servers}\n}}\n"
        )
        program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
        assert program is not None, "there is no nginx here: install the Debian package 'nginx'"
        (directory / "run").mkdir()
        command = [program, "-p", str(directory / "run"), "-c", "../nginx.conf", "-e", "stderr"]
        self.proxy = Server(command, self.ports["good"], directory / "nginx.log")

    def url(self, name: str, path: str = "/stream?connectKey=news") -> str:
        return f"http://127.0.0.1:{self.ports[name]}{path}"


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Way]:
    way = Way(tmp_path_factory.mktemp("way"))
    try:
        way.application.start()
        way.proxy.start()
        yield way
    finally:
        way.proxy.stop()
        way.application.stop()


def test_through_a_good_proxy_everything_is_well(way: Way) -> None:
    done = way.flask.run("doctor", "--url", way.url("good"))
    assert done.returncode == 0, done
    for check in ("compression", "events", "heartbeats"):
        assert f"ok       {check}: " in done.stdout
    assert " first bytes: after " in done.stdout
    assert "published to 'news', there after" in done.stdout
    strict = way.flask.run("doctor", "--strict", "--json", "--url", way.url("rewriting"))
    assert (strict.returncode, json.loads(strict.stdout)["ok"]) == (1, False)


@pytest.mark.parametrize(
    ("name", "checks", "words"),
    [
        ("buffering", ["first bytes"], "problem: "),
        ("compressing", ["compression"], "problem: the stream is compressed (gzip)"),
        ("hasty", ["heartbeats"], "problem: the stream was cut after"),
        ("rewriting", ["headers"], "warning: Cache-Control is ''"),
    ],
)
def test_what_a_proxy_does_wrongly_is_found(
    way: Way, name: str, checks: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_sse_stream.probing._LATE", 60)  # this machine may be busy
    if name == "buffering":  # what never comes need not be waited for so long
        monkeypatch.setattr("flask_sse_stream.probing._HEAD_SECONDS", 1.5)
        monkeypatch.setattr("flask_sse_stream.probing._FIRST_SECONDS", 1.0)
    # Without a broker in common, for the one that cuts before anything could be published.
    manager = PoolManager(way.settings if name != "hasty" else Settings(ping_interval=0.5))
    found = bad(examine(manager, url=way.url(name)))
    assert list(found) == checks
    assert found[checks[0]].startswith(words)
    manager.shutdown()


def test_a_url_of_no_stream_and_a_server_of_another_log_are_found(way: Way, tmp_path: Path) -> None:
    manager = PoolManager(way.settings)
    for path, words in (("/nowhere", "is answered 404"), ("/metrics", "is answered 200 text/plain")):
        assert words in bad(examine(manager, url=way.url("good", path)))["endpoint"]
    assert "refused" in bad(examine(manager, url=f"http://127.0.0.1:{free_port()}/stream"))["endpoint"]
    assert "is answered 502" in bad(examine(manager, url=way.url("broken")))["endpoint"]
    manager.shutdown()


def test_a_server_that_publishes_elsewhere_is_found(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flask_sse_stream.probing._EVENT_SECONDS", 1.0)
    monkeypatch.setattr("flask_sse_stream.probing._LATE", 60)
    manager = PoolManager(Settings(broker_url=f"sqlite:///{tmp_path}/other.db", ping_interval=0.5))
    found = [item for item in examine(manager, url=way.url("good")) if item.level != "ok"]
    assert list(bad(found)) == ["events"]
    assert "another SSE_BROKER_URL" in found[0].cure
    assert isinstance(found[0], Finding)
    manager.shutdown()


def test_what_is_answered_in_place_of_a_stream_is_found(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_sse_stream.probing._LATE", 60)
    monkeypatch.setattr("flask_sse_stream.probing._BEAT_SECONDS", 0.5)
    manager = PoolManager(Settings(ping_interval=0.5))
    away = bad(examine(manager, url=way.url("away")))
    assert list(away) == ["headers", "endpoint"]  # what answers says nothing of caches
    assert away["endpoint"].endswith("says retry: 5000 and ends: nobody is given a stream there now")
    port = free_port()
    flask = Flask(tmp_path, max_clients="1", ping_interval="60", public_keys='["news"]')
    server = Server(flask.command("run", "--port", str(port)), port, tmp_path / "log")
    server.env = flask.environment
    url = f"{server.url}/stream?connectKey="
    try:
        server.start()
        assert "is answered 403" in bad(examine(manager, url=f"{url}secret"))["endpoint"]
        # It beats less often than this application here believes.
        assert bad(examine(manager, url=f"{url}news"))["heartbeats"].startswith("problem: none came in 1 s")
        with socket.create_connection(("127.0.0.1", port), LONG) as client:
            count = f"{server.url}/count/news"
            wait_for(lambda: httpx.get(count, timeout=LONG).text == "0", "the doctor has left", LONG)
            client.sendall(b"GET /stream?connectKey=news HTTP/1.1\r\nHost: localhost\r\n\r\n")
            wait_for(lambda: httpx.get(count, timeout=LONG).text == "1", "it is full", LONG)
            found = bad(examine(manager, url=f"{url}news"))
            assert list(found) == ["endpoint"]
            assert re.search(r"says retry: \d+ and ends", found["endpoint"])
    finally:
        server.stop()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@contextlib.contextmanager
def something(answer: bytes) -> Iterator[str]:
    """What none of the proxies here makes of a stream: somebody who says this and no more; give the URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            client, _ = listener.accept()
            with client, contextlib.suppress(OSError):
                client.recv(65536)
                client.sendall(answer)
                client.recv(65536)  # until the other side has seen enough

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/stream"
        thread.join(LONG)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("answer", "check", "words"),
    [
        (CHUNKED, "first bytes", "problem: the head came, and no byte"),
        (HEAD + b"Content-Length: 8\r\n\r\n: open\n\n", "headers", "problem: the response has a Content-Length"),
        # What is wrong comes behind what is read at once.
        (CHUNKED + b"8\r\n: open\n\n\r\nno chunk" + b"!" * 200_000 + b"\r\n", "endpoint", "problem: the stream broke"),
    ],
)
def test_a_stream_that_is_none_is_found(answer: bytes, check: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flask_sse_stream.probing._FIRST_SECONDS", 1.0)
    with something(answer) as url:
        found = bad(examine(PoolManager(Settings(ping_interval=0.5)), url=url))
    assert found.get(check, "").startswith(words), found


def test_streams_without_heartbeats_slow_ones_and_a_broker_that_is_away_are_found(
    way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_sse_stream.probing._LATE", 0.0)
    found = bad(examine(PoolManager(Settings(ping_interval=0)), url=way.url("good")))
    assert found["heartbeats"].startswith("warning: SSE_PING_INTERVAL is 0")
    assert re.fullmatch(r"warning: after \d+ ms", found["first bytes"])
    away = PoolManager(Settings(broker_url=f"redis://127.0.0.1:{free_port()}", broker_timeout=0.3, ping_interval=0.5))
    assert bad(examine(away, url=way.url("good")))["events"].startswith("problem: publishing failed")
    away.shutdown()


# All of them


def as_pattern(text: ast.expr | None, function: ast.FunctionDef, line: int) -> str:
    """Give what a text matches that a finding is given in this line: as it stands there, or by a name."""
    if isinstance(text, ast.Constant):
        return re.escape(str(text.value))
    if isinstance(text, ast.JoinedStr):
        return "".join(as_pattern(part, function, line) for part in text.values)
    if isinstance(text, ast.Name):
        said = ""
        for node in sorted(ast.walk(function), key=lambda node: getattr(node, "lineno", 0)):
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(target, ast.Name) and target.id == text.id and node.lineno < line:
                piece = as_pattern(node.value, function, line)
                said = said + piece if isinstance(node, ast.AugAssign) else piece
        return said
    return ".*"


def findings_of(module: str) -> Iterator[tuple[int, set[str], str, str]]:
    """What a module may find that is not well: line, levels, what it looks at, a pattern of what it says."""
    file = Path(flask_sse_stream.__file__).with_name(f"{module}.py")
    for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(function, ast.FunctionDef):
            continue
        for call in ast.walk(function):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Finding":
                level, check, text = call.args[:3]
                levels = {node.value for node in ast.walk(level) if isinstance(node, ast.Constant)}
                assert isinstance(check, ast.Constant)
                if levels & {"warning", "problem"}:
                    yield call.lineno, levels, check.value, as_pattern(text, function, call.lineno)


def test_each_finding_that_there_is_was_made_on_purpose_above(request: pytest.FixtureRequest) -> None:
    here = {item.name.partition("[")[0] for item in request.session.items if item.path == request.path}
    defined = {name for name in globals() if name.startswith("test_")}
    if here != defined:
        pytest.skip("the other tests of this file were not asked for")
    possible = [(module, *finding) for module in ("doctor", "probing") for finding in findings_of(module)]
    assert len(possible) > 30
    for module, line, levels, check, pattern in possible:
        assert pattern.replace(".*", ""), f"line {line} of {module}: this test does not understand it"
        assert any(
            item.level in levels and item.check == check and re.fullmatch(pattern, item.text, re.DOTALL)
            for item in FOUND
        ), f"no test here has {module}.py, line {line}, find {check!r}: {pattern}"
