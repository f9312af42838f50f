"""The benchmarks run, count every delivery, and print the figures they promise; how good those are is not tested."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CLIENTS = 20
EVENTS = 20
SERVERS = {"handwritten", "ours"}

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(sys.platform != "linux", reason="the load client of the benchmarks needs epoll"),
]


def run(program: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(program), *options],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def results(program: str, tmp_path: Path, *options: str) -> tuple[str, list[dict[str, Any]]]:
    """What a benchmark printed, and the tables it wrote."""
    file = tmp_path / "results.json"
    outcome = run(BENCHMARKS / program, "--rounds", "1", "--json", str(file), *options)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    written = json.loads(file.read_text())
    assert written["machine"]["python"]
    return outcome.stdout, written["tables"]


def figures(program: str, tmp_path: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """What a benchmark with clients printed, and the one table it wrote."""
    printed, (table,) = results(program, tmp_path, "--clients", str(CLIENTS), *options)
    assert set(table["runs"]) == SERVERS
    return printed, table


def test_fanout_counts_each_event_of_each_client_exactly_once(tmp_path: Path) -> None:
    printed, table = figures(
        "fanout.py", tmp_path, "--events", str(EVENTS), "--paced-events", str(EVENTS), "--interval", "0.01"
    )
    for heading in ("hand-written", "flask_sse_stream", "deliveries a second", "99th percentile, ms"):
        assert heading in printed
    for (result,) in table["runs"].values():
        assert result["delivered"] == CLIENTS * (EVENTS + EVENTS)
        assert min(result.values()) > 0


def test_memory_leaves_streams_that_still_get_every_event_once(tmp_path: Path) -> None:
    printed, table = figures("memory.py", tmp_path, "--seconds", "1")
    for heading in ("hand-written", "flask_sse_stream", "memory of an idle client, bytes"):
        assert heading in printed
    for (result,) in table["runs"].values():
        assert result["delivered"] == CLIENTS
        assert result["opened_per_second"] > 0
        assert result["heartbeat_cpu"] >= 0


def test_brokers_count_each_event_of_each_publisher_exactly_once(tmp_path: Path) -> None:
    servers = ["flask-sse", "ours-memory", "ours-sqlite", "ours-redis", "pubsub", "xread"]
    printed, (table,) = results(
        "brokers.py",
        tmp_path,
        *("--servers", *servers, "--events", str(EVENTS), "--paced-events", str(EVENTS), "--interval", "0.01"),
    )
    for heading in ("Flask-SSE, Redis", "memory://", "sqlite://", "redis://", "bare PUBLISH", "four at once"):
        assert heading in printed
    assert list(table["runs"]) == servers
    for name, (result,) in table["runs"].items():
        assert min(result.values()) > 0
        # What is in the memory of one process alone can be published to by no other.
        assert ("several_publishers" in result) is (name != "ours-memory")


def test_reconnect_storm_gives_each_client_what_it_missed_exactly_once(tmp_path: Path) -> None:
    servers = ["xread", "ours-sqlite", "ours-redis"]
    options = ["--servers", *servers, "--clients", str(CLIENTS), "--keys", "1", "3", "--missed", "2"]
    printed, tables = results("reconnect_storm.py", tmp_path, *options)
    for heading in ("hand-written, XREAD", "sqlite://", "redis://", "last client has what it missed, s"):
        assert heading in printed
    assert [table["keys"] for table in tables] == [1, 3]
    for table in tables:
        assert list(table["runs"]) == servers
        for name, (result,) in table["runs"].items():
            assert min(result.values()) > 0
            assert ("commands" in result) is (name != "ours-sqlite")
        assert table["commands"]["xread"][0]["xread"] >= CLIENTS


def test_a_missing_redis_server_is_told_in_one_sentence(tmp_path: Path) -> None:
    outcome = run(BENCHMARKS / "brokers.py", PATH=str(tmp_path))
    assert outcome.returncode == 1
    assert outcome.stderr.splitlines() == [
        "What is kept in Redis needs redis-server; none was found. --servers chooses the others."
    ]


def test_a_missing_compiler_is_told_in_one_sentence(tmp_path: Path) -> None:
    copy = tmp_path / "benchmarks"
    shutil.copytree(BENCHMARKS, copy, ignore=shutil.ignore_patterns("_build", "__pycache__"))
    outcome = run(copy / "memory.py", PATH=str(tmp_path))
    assert outcome.returncode == 1
    assert outcome.stderr.splitlines() == [
        "The benchmarks need a C compiler (cc) for their load client; none was found."
    ]


def test_more_clients_than_open_files_are_refused_before_anything_starts() -> None:
    resource = pytest.importorskip("resource")
    _, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        pytest.skip("this machine has no limit of open files")
    outcome = run(BENCHMARKS / "fanout.py", "--clients", str(allowed))
    assert outcome.returncode == 1
    assert "open files allowed here" in outcome.stderr
