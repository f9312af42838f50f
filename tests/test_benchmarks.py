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


def figures(program: str, tmp_path: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """What a benchmark printed, and the one table it wrote."""
    file = tmp_path / "results.json"
    outcome = run(BENCHMARKS / program, "--clients", str(CLIENTS), "--rounds", "1", "--json", str(file), *options)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    results = json.loads(file.read_text())
    assert results["machine"]["python"]
    (table,) = results["tables"]
    assert set(table["runs"]) == SERVERS
    return outcome.stdout, table


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
