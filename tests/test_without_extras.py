"""Where no optional package is installed, what needs none works, and what needs one says which and how to install it.

``make package`` runs this in an environment that has none of them. Where they are, processes are told that they are
not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from importlib.metadata import entry_points as installed
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, Server, entry_points, free_port, python
from try_package import OPTIONAL

pytestmark = pytest.mark.elsewhere

LONG = 60.0
REDIS = "needs redis-py: install it with: pip install 'flask-sse-stream[redis]'"
GUNICORN = (
    "gunicorn is not installed here, so what it would run with cannot be read: run this where the server runs, or pip "
    "install 'gunicorn[gevent]'"
)
METRICS = "metrics need prometheus_client: pip install 'flask-sse-stream[metrics]', or prometheus-client"
MOVED = (
    "from flask_sse_stream.compat.flask_sse import sse; app = Flask('app'); "
    "app.config['REDIS_URL'] = 'redis://127.0.0.1'; app.app_context().push()"
)

# What somebody does, the error, and what it says.
SENTENCES = {
    "import flask_sse_stream.celery": (
        "ImportError",
        "flask_sse_stream.celery needs Celery: pip install 'flask-sse-stream[celery]'",
    ),
    "import flask_sse_stream.sqlalchemy": (
        "ImportError",
        "flask_sse_stream.sqlalchemy needs SQLAlchemy: pip install 'flask-sse-stream[sqlalchemy]'",
    ),
    "SSE(Flask('app'), broker_url='redis://127.0.0.1')": ("SettingsError", f"redis:// {REDIS}"),
    "SSE(Flask('app'), broker_url='redis+sentinel://127.0.0.1/news')": ("SettingsError", f"redis:// {REDIS}"),
    "Publisher('rediss://127.0.0.1')": ("SettingsError", f"redis:// {REDIS}"),
    "SSE(Flask('app')).bridge('orders', 'news', url='redis://127.0.0.1')": ("SettingsError", f"redis:// {REDIS}"),
    f"{MOVED}; app.register_blueprint(sse, url_prefix='/stream'); sse.publish('x')": (
        "SettingsError",
        f"redis:// {REDIS}",
    ),
    f"{MOVED}; sse.redis": ("SettingsError", "sse.redis needs redis-py: pip install 'flask-sse-stream[redis]'"),
    "from flask_sse_stream.metrics import SSECollector; SSECollector(PoolManager())": ("SettingsError", METRICS),
    "from flask_sse_stream.testing.contracts.replay import ReplayMachine": (
        "ImportError",
        "the contract of replay needs Hypothesis: pip install hypothesis",
    ),
    "sys.modules['pytest'] = None; import flask_sse_stream.testing.contracts": (
        "ImportError",
        "flask_sse_stream.testing.contracts needs pytest: pip install pytest",
    ),
    "from flask_sse_stream.doctor import Gunicorn; Gunicorn.read('gunicorn.conf.py')": ("SettingsError", GUNICORN),
}
TRY = f"""
    import json, sys
    from flask import Flask
    from flask_sse_stream import SSE, PoolManager, Publisher
    said = {{}}
    for program in {list(SENTENCES)!r}:
        before = {{name for name in sys.modules if name.startswith("flask_sse_stream.testing.contracts")}}
        for name in before:
            del sys.modules[name]
        try:
            exec(program)
        except Exception as error:
            said[program] = type(error).__name__, str(error)
    print(json.dumps(said))
"""
EVERY_MODULE = """
    import importlib, json, pkgutil, flask_sse_stream
    said = {}
    for found in pkgutil.walk_packages(flask_sse_stream.__path__, "flask_sse_stream."):
        if not found.name.endswith("__main__"):
            try:
                importlib.import_module(found.name)
            except Exception as error:
                said[found.name.partition(".")[2]] = str(error)
    print(json.dumps(said))
"""
WORKS = """
    from flask import Flask
    from flask_sse_stream import SSE, Publisher
    from flask_sse_stream.testing import record_published, sse_client

    for url in ("memory://", "sqlite:///sse.db"):
        app = Flask("app")
        sse = SSE(app, broker_url=url)
        with sse_client(app, timeout=30) as client, record_published() as published:
            stream = client.get("/stream?connectKey=news")
            identifier = sse.publish("news", {"n": 1}, event="first")
            event = stream.next()
            assert (event.event, event.data, event.id) == ("first", '{"n": 1}', identifier), event
            if url != "memory://":
                with Publisher(url) as publisher:
                    publisher.publish("news", "from elsewhere")
                assert stream.next().data == "from elsewhere"
            list(sse.progress("ab", key="news"))
            assert sse.job("import").run(["a row"])
            assert client.get("/stream?connectKey=news", last_event_id=identifier).next().data
        published.assert_published("news", event="first")
        assert sse.health().ok
        sse.manager.shutdown()
"""
FLASK_SSE = """
    from flask import Flask
    from flask_sse_stream.compat.flask_sse import sse
    from flask_sse_stream.testing import sse_client

    app = Flask("app")
    app.register_blueprint(sse, url_prefix="/stream")
    with app.app_context(), sse_client(app, timeout=30) as client:
        stream = client.get("/stream")
        sse.publish({"message": "hi"}, type="greeting")
        assert stream.next().event == "greeting"
"""
APP = """
from flask import Flask
from flask_sse_stream import SSE

app = Flask(__name__)
app.config.from_prefixed_env()
sse = SSE(app)
"""


@pytest.fixture
def environment(tmp_path: Path) -> Mapping[str, str]:
    """The variables of a process for which nothing optional is installed, with an app for ``flask sse``."""
    paths = [str(tmp_path), str(ROOT)]
    if there := [name for name in OPTIONAL if find_spec(name)]:
        (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({there}))\n")
    if not any(command.name == "sse" for command in installed(group="flask.commands")):
        entry_points(tmp_path)
    (tmp_path / "an_app.py").write_text(APP)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLASK_", "GUNICORN_"))}
    path = os.pathsep.join(paths)
    return {**kept, "PYTHONPATH": path, "PYTHONWARNINGS": "error", "FLASK_APP": "an_app", "NO_COLOR": "1"}


def run(script: str, environment: Mapping[str, str], directory: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_needs_an_optional_package_says_which_and_how_to_install_it(
    environment: Mapping[str, str], tmp_path: Path
) -> None:
    said = json.loads(run(TRY, environment, tmp_path))
    assert {program: tuple(error) for program, error in said.items()} == SENTENCES


def test_every_other_module_can_be_imported(environment: Mapping[str, str], tmp_path: Path) -> None:
    said = json.loads(run(EVERY_MODULE, environment, tmp_path))
    need = {name for name in said if name in ("celery", "sqlalchemy") or name.startswith("brokers.redis")}
    assert set(said) - need == {"testing.contracts.replay"}
    assert all("pip install " in text for text in said.values()), said


@pytest.mark.parametrize("program", [WORKS, FLASK_SSE], ids=["the extension", "what was written for Flask-SSE"])
def test_memory_sqlite_and_the_test_kit_work(program: str, environment: Mapping[str, str], tmp_path: Path) -> None:
    run(program, environment, tmp_path)


def flask_sse(environment: Mapping[str, str], directory: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        python("-m", "flask", "sse", *arguments),
        env=environment,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_command_says_it_too_and_shows_no_traceback_before_it(environment: Mapping[str, str], tmp_path: Path) -> None:
    redis = {**environment, "FLASK_SSE_BROKER_URL": "redis://127.0.0.1"}
    commands = [["doctor"], ["run", "--port", "0"], ["publish", "news", "x"], ["tail", "news"], ["ps"]]
    begun = [flask_sse(redis, tmp_path, *arguments) for arguments in commands]
    begun.append(flask_sse(environment, tmp_path, "doctor", "--gunicorn-config", "gunicorn.conf.py"))
    for process, needed in zip(begun, [*[f"redis:// {REDIS}"] * 5, GUNICORN], strict=True):
        out, err = process.communicate(timeout=LONG)
        assert (process.returncode, out) == (1, ""), err
        assert err.splitlines()[0] == f"Error: {needed}", err
        assert "ModuleNotFoundError" not in err  # an old gevent may have something to say after it


@pytest.mark.live
def test_the_commands_work_over_sqlite(environment: Mapping[str, str], tmp_path: Path) -> None:
    port = free_port()
    settings = {"BROKER_URL": f"sqlite:///{tmp_path}/log.db", "PING_INTERVAL": "0.5", "MAX_CLIENTS": "100"}
    settings["JOIN_HISTORY"] = "1"
    environment = {**environment, **{f"FLASK_SSE_{name}": value for name, value in settings.items()}}

    def says(*arguments: str) -> str:
        process = flask_sse(environment, tmp_path, *arguments)
        out, err = process.communicate(timeout=LONG)
        assert process.returncode == 0, (out, err)
        return out

    command = python("-m", "flask", "sse", "run", "--port", str(port))
    server = Server(command, port, tmp_path / "log", dict(environment))
    try:
        server.start()
        url = f"{server.url}/stream?connectKey=news"
        identifiers = [says("publish", "news", "first").strip()]
        with flask_sse(environment, tmp_path, "tail", "--url", url, "--json") as tail:
            assert tail.stdout is not None
            seen = [json.loads(tail.stdout.readline())]
            identifiers.append(says("publish", "news", "second", "--event", "e").strip())
            seen.append(json.loads(tail.stdout.readline()))
            [process] = streams_of(says("ps", "--json"))
            tail.terminate()
        assert [(event["data"], event["id"]) for event in seen] == list(
            zip(("first", "second"), identifiers, strict=True)
        )
        assert process["streams"] == 1
        findings = says("doctor", "--url", url)
        assert "heartbeats" in findings
        assert "problem" not in findings
    finally:
        server.stop()
    assert "Traceback" not in server.log


def streams_of(text: str) -> list[dict[str, Any]]:
    return list(json.loads(text)["processes"])
