"""What the page about systemd, Docker and Kubernetes shows is valid, and what it starts, asks and stops does so.

Nothing is here that would run a unit, a container or a pod. So their commands are run as these would: with the
environment, the limits and the times of the page, and paths and ports of the test.
"""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import pwd
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml
from clients import DEADLINE, Raw
from command import entry_points
from docs_blocks import all_blocks
from packaging.requirements import Requirement
from redis_server import RedisServer
from support import ROOT, free_port, wait_for

from flask_sse_stream import PoolManager, Settings
from flask_sse_stream.doctor import examine

pytestmark = pytest.mark.live

DOCS = ROOT / "docs"
KUBERNETES = ("1.29", "1.33")
STREAM = "/stream?connectKey=notes"


def block(page: str, language: str, with_: str) -> str:
    """Give the block of a page that is in this language and has this in it."""
    [found] = [each.text for each in all_blocks(f"docs/{page}") if each.language == language and with_ in each.text]
    return found


@pytest.fixture
def board(tmp_path: Path) -> Path:
    """The board of the tutorial with the views for the probes, where a service has it: beside a .venv."""
    directory = tmp_path / "board"
    directory.mkdir()
    page, application = (
        block("tutorial.rst", "python", "PAGE ="),
        block("tutorial.rst", "python", '@app.post("/notes")'),
    )
    ready = block("tools.rst", "python", '@app.get("/ready")')
    alive = block("services.rst", "python", '@app.get("/alive")').partition("sse = SSE(app)\n")[2]
    (directory / "board.py").write_text("\n\n".join([page, application, ready, alive]))
    (directory / ".venv").mkdir()
    (directory / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    (tmp_path / "state").mkdir()
    (tmp_path / "path").mkdir()
    return directory


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """What a service gets: nothing of the shell's but where to find this package."""
    path = os.pathsep.join([str(ROOT), str(entry_points(tmp_path / "path"))])
    return {"PATH": os.environ["PATH"], "PYTHONPATH": path, "PYTHONWARNINGS": "error", **more}


@contextlib.contextmanager
def started(
    command: list[str], directory: Path, env: dict[str, str], files: int = 0
) -> Iterator[subprocess.Popen[str]]:
    """Run a command as a service; what it wrote is in ``log`` beside its directory."""

    def limit() -> None:
        if files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    with (directory.parent / "log").open("a") as log:
        process = subprocess.Popen(
            command, cwd=directory, env=env, stdout=log, stderr=log, text=True, preexec_fn=limit, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def opened(port: int) -> Raw:
    """Open a stream; a worker that is about to stop may ask to come back, which is done at once."""

    def attempt() -> Raw | None:
        client = Raw(port).request(STREAM)
        try:
            if b": full" not in client.read_until(b"retry: ", b"\n\n: ", b"\n\n\r\n"):
                return client
        except BaseException:
            client.socket.close()
            raise
        client.socket.close()
        return None

    client = wait_for(attempt, "a stream", DEADLINE)
    assert client is not None
    return client


def told_to_come_back(client: Raw) -> int:
    """Read to the end of a stream; give the last ``retry:`` in milliseconds."""
    with client:
        return int(re.findall(rb"retry: (\d+)", client.read_all())[-1])


# systemd


def test_the_unit_is_valid_and_what_it_starts_reloads_and_stops_does_so(board: Path, tmp_path: Path) -> None:
    port = free_port()
    unit = block("services.rst", "ini", "[Service]")
    user = pwd.getpwuid(os.getuid()).pw_name
    for shown, here in {
        "/opt/board": str(board),
        "/var/lib/board": f"{tmp_path}/state",
        "/etc/board.env": f"{tmp_path}/board.env",
        "User=board": f"User={user}",
        "127.0.0.1:8000": f"127.0.0.1:{port}",
    }.items():
        assert shown in unit, shown
        unit = unit.replace(shown, here)
    (tmp_path / "board.env").write_text("FLASK_SECRET_KEY=not the page's\n")

    def verified(text: str) -> str:
        file = tmp_path / "board.service"
        file.write_text(text)
        program = shutil.which("systemd-analyze")
        assert program is not None, "there is no systemd-analyze here: install the Debian package 'systemd'"
        done = subprocess.run(
            [program, "verify", "--man=no", str(file)], capture_output=True, text=True, timeout=DEADLINE, check=False
        )
        said = [line for line in (done.stdout + done.stderr).splitlines() if "board" in line]
        return "\n".join(said) or ("" if done.returncode == 0 else done.stderr)

    assert verified(unit) == ""
    assert "KillMod" in verified(unit.replace("KillMode", "KillMod"))  # it would say so

    parsed = configparser.RawConfigParser(strict=True)
    parsed.optionxform = str  # type: ignore[assignment, method-assign]
    parsed.read_string(unit)
    service = dict(parsed["Service"])
    name, _, value = service["Environment"].partition("=")
    env = environment(tmp_path, **{name: value})
    for line in Path(service["EnvironmentFile"]).read_text().splitlines():
        name, _, value = line.partition("=")
        env[name] = value
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = int(service["LimitNOFILE"]) if hard < 0 else min(int(service["LimitNOFILE"]), hard)
    assert service["Type"] == "notify"
    assert service["KillMode"] == "mixed"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified, contextlib.ExitStack() as stack:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(DEADLINE)
        env["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        # What the page has put before ExecStart, to stop a deployment that would not work.
        [doctor] = re.findall(r"``ExecStartPre=/opt/board/(\S+ [^`]+)``", (DOCS / "services.rst").read_text())
        with started(shlex.split(f"{board}/{doctor}"), Path(service["WorkingDirectory"]), env, files) as process:
            assert process.wait(DEADLINE) == 0, (tmp_path / "log").read_text()
        command = shlex.split(service["ExecStart"])
        process = stack.enter_context(started(command, Path(service["WorkingDirectory"]), env, files))
        while b"READY=1" not in notified.recv(4096):
            pass
        client = opened(port)
        assert f" {files} " in re.sub(" +", " ", Path(f"/proc/{process.pid}/limits").read_text())
        reload = service["ExecReload"].replace("$MAINPID", str(process.pid))
        subprocess.run(shlex.split(reload), check=True, timeout=DEADLINE)
        assert 3000 <= told_to_come_back(client) <= 8000
        client = opened(port)
        process.send_signal(signal.SIGTERM)  # "mixed": to the first process alone
        assert 3000 <= told_to_come_back(client) <= 8000
        assert process.wait(float(service["TimeoutStopSec"])) == 0  # not a failure, so it is not started again
    assert re.findall(r"\[(?:WARNING|ERROR|CRITICAL)\].*", (tmp_path / "log").read_text()) == []


# Docker and Kubernetes


def dockerfile() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, in their order."""
    lines = block("services.rst", "docker", "FROM").strip().splitlines()
    found = [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]
    assert {name for name, _ in found} == {"FROM", "RUN", "USER", "WORKDIR", "COPY", "EXPOSE", "CMD"}
    return found


def deployment() -> Any:
    return yaml.safe_load(block("services.rst", "yaml", "kind: Deployment"))


def test_the_image_installs_what_there_is_and_is_run_by_a_user_that_it_has() -> None:
    instructions = dockerfile()
    names = [name for name, _ in instructions]
    install, add = [shlex.split(text) for name, text in instructions if name == "RUN"]
    assert install[:2] == ["pip", "install"]
    ours, gunicorn = [Requirement(text) for text in install if not text.startswith("-")][1:][1:]
    project = (ROOT / "pyproject.toml").read_text()
    extras = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    assert ours.name == re.findall(r'^name = "(.+)"', project, re.MULTILINE)[0]
    assert ours.extras <= set(re.findall(r"^(\w+) = ", extras, re.MULTILINE))
    assert str(gunicorn) == "gunicorn[gevent]"
    assert add[0] == "useradd"
    assert dict(instructions)["USER"] == add[-1]
    assert names.index("USER") > max(place for place, name in enumerate(names) if name == "RUN")
    source, target = dict(instructions)["COPY"].split()
    assert (source, target) == ("board.py", ".")
    [version] = re.findall(r"^python:3\.(\d+)-slim$", dict(instructions)["FROM"])
    [least] = re.findall(r'requires-python = ">=3\.(\d+)"', project)
    assert int(version) >= int(least)


def test_the_ports_of_the_files_are_one_port_and_their_limits_those_of_streams() -> None:
    instructions, compose = dict(dockerfile()), yaml.safe_load(block("services.rst", "yaml", "services:"))
    command = json.loads(instructions["CMD"])
    port = int(instructions["EXPOSE"])
    service = compose["services"]["board"]
    assert command[command.index("--bind") + 1] == f"0.0.0.0:{port}"
    assert service["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert service["ulimits"]["nofile"] > int(command[command.index("--worker-connections") + 1])
    assert set(service["depends_on"]) <= set(compose["services"])
    assert service["environment"]["FLASK_SSE_BROKER_URL"] == "redis://redis:6379/0"
    volumes = [volume.partition(":")[0] for volume in compose["services"]["redis"]["volumes"]]
    assert set(volumes) == set(compose["volumes"])
    [container] = deployment()["spec"]["template"]["spec"]["containers"]
    assert container["ports"] == [{"containerPort": port}]
    for probe in ("readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == port


def test_the_redis_of_the_compose_file_is_one_with_which_all_is_well(tmp_path: Path) -> None:
    compose = yaml.safe_load(block("services.rst", "yaml", "services:"))
    name, *options = compose["services"]["redis"]["command"]
    assert name == "redis-server"
    with RedisServer(tmp_path / "redis", arguments=tuple(options)) as redis:
        manager = PoolManager(Settings(broker_url=redis.url, max_clients=100))
        assert [finding for finding in examine(manager) if finding.level != "ok"] == []
        assert str(256 << 20) in str(redis.cli("CONFIG", "GET", "maxmemory"))
        manager.shutdown()


@pytest.mark.parametrize("version", KUBERNETES)
def test_the_deployment_is_one_by_the_schema_of_kubernetes(version: str) -> None:
    kubernetes_validate.validate(deployment(), version, strict=True)
    wrong = deployment()
    wrong["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)
    assert deployment()["spec"]["selector"]["matchLabels"] == deployment()["spec"]["template"]["metadata"]["labels"]


def test_the_probe_of_the_page_about_tools_is_the_one_of_the_deployment() -> None:
    [container] = deployment()["spec"]["template"]["spec"]["containers"]
    assert yaml.safe_load(block("tools.rst", "yaml", "readinessProbe"))["readinessProbe"] == container["readinessProbe"]


def test_the_alerts_are_rules_of_prometheus() -> None:
    for group in yaml.safe_load(block("tools.rst", "yaml", "groups:"))["groups"]:
        assert set(group) == {"name", "rules"}
        for rule in group["rules"]:
            assert set(rule) == {"alert", "expr", "for"}
            assert re.fullmatch(r"\d+[smh]", rule["for"])


def test_a_pod_starts_is_asked_and_stops_as_the_deployment_says(board: Path, tmp_path: Path) -> None:
    port = free_port()
    pod = deployment()["spec"]["template"]["spec"]
    [container] = pod["containers"]
    secrets = {"broker-url": f"sqlite:///{tmp_path}/state/sse.db", "secret-key": "not the page's"}
    env = environment(tmp_path)
    for variable in container["env"]:
        reference = variable.get("valueFrom", {}).get("secretKeyRef", {})
        env[variable["name"]] = variable["value"] if "value" in variable else secrets[reference["key"]]
    command = json.loads(dict(dockerfile())["CMD"])
    command[0] = str(board / ".venv" / "bin" / command[0])
    command[command.index("--bind") + 1] = f"127.0.0.1:{port}"

    def probe(kind: str) -> int:
        path = container[kind]["httpGet"]["path"]
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(
                f"http://127.0.0.1:{port}{path}", timeout=container[kind]["timeoutSeconds"], trust_env=False
            ).status_code
        return 0

    with started(command, board, env) as process:
        wait_for(lambda: probe("readinessProbe") == 200, "the pod is ready", DEADLINE)
        assert probe("livenessProbe") == 204
        client = opened(port)
        [program, seconds] = container["lifecycle"]["preStop"]["exec"]["command"]
        assert subprocess.run([program, "0"], check=False).returncode == 0
        before = time.monotonic()
        process.send_signal(signal.SIGTERM)  # to the first process of the container
        assert 3000 <= told_to_come_back(client) <= 23_000  # SSE_RETRY and SSE_DRAIN_SECONDS
        wait_for(lambda: probe("readinessProbe") != 200, "it is not ready any more", DEADLINE)
        assert process.wait(pod["terminationGracePeriodSeconds"] - float(seconds)) == 0
        assert time.monotonic() - before < pod["terminationGracePeriodSeconds"] - float(seconds)
    assert re.findall(r"\[(?:WARNING|ERROR|CRITICAL)\].*", (tmp_path / "log").read_text()) == []
