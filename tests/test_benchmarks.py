"""The benchmarks run, count every delivery, and print the figures they promise; how good those are is not tested."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CLIENTS = 20
EVENTS = 20
# Those that need nothing from a registry.
SERVERS = {"handwritten", "ours", "plain"}

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


def test_fanout_counts_each_event_of_each_client_exactly_once(tmp_path: Path) -> None:
    options = ["--clients", str(CLIENTS), "--keys", "5", "--events", str(EVENTS), "--interval", "0.01"]
    printed, (one_key, many_keys) = results("fanout.py", tmp_path, *options)
    for heading in ("hand-written", "flask_sse_stream", "plain C", "deliveries a second", "99th percentile, ms"):
        assert heading in printed
    assert set(one_key["runs"]) == set(many_keys["runs"]) == SERVERS
    for (result,) in one_key["runs"].values():
        assert result["burst_delivered"] == CLIENTS * EVENTS
        assert result["delivered"] == CLIENTS * 20
        assert min(result.values()) > 0
    for (result,) in many_keys["runs"].values():
        assert result["delivered"] == 5 * 5


def test_memory_leaves_streams_that_still_get_every_event_once(tmp_path: Path) -> None:
    options = ["--clients", "10", str(CLIENTS), "--ping-seconds", "1", "--intervals", "1"]
    printed, (few, many) = results("memory.py", tmp_path, *options)
    for heading in ("plain C", "memory of an idle client, bytes", "times hand-written; at most 0.7:"):
        assert heading in printed
    for table in (few, many):
        assert set(table["runs"]) == SERVERS
        for (result,) in table["runs"].values():
            assert result["delivered"] == table["clients"] + 20  # those of the warm-up stay
            assert result["opening_seconds"] > 0
            assert ("heartbeat_cpu" in result) is (table is many)


def test_healthy_clients_are_measured_beside_bad_ones(tmp_path: Path) -> None:
    options = ("--servers", "ours", "--healthy", "5", "--bad", "3", "--events", "20", "--rounds", "1")
    printed, (table,) = results("neighbours.py", tmp_path, *options)
    assert "5 healthy clients, 3 bad ones" in " ".join(printed.split())
    figures = table["medians"]["ours"]
    assert 0 < figures["alone_median"] <= figures["alone_p99"]
    assert 0 < figures["beside_median"] <= figures["beside_p99"]
    assert figures["added_p99"] == max(0.0, figures["beside_p99"] - figures["alone_p99"])


def test_views_are_asked_for_while_events_are_sent(tmp_path: Path) -> None:
    options = ["--clients", "3", str(CLIENTS), "--events", "5", "--interval", "0.05", "--pace", "0.001"]
    printed, (few, many) = results("views.py", tmp_path, *options, "--published", "5")
    assert "publish in a loop: one call, many streams to few" in printed
    for table in (few, many):
        assert set(table["runs"]) == SERVERS
        for (result,) in table["runs"].values():
            assert result["publish_call"] > 0
            assert ("idle_median" in result) is (table is many)
    # What a view's latency is measured from.
    assert any(result["probes"] for (result,) in many["runs"].values())


def test_endurance_counts_each_event_and_samples_the_memory(tmp_path: Path) -> None:
    options = ["--servers", *sorted(SERVERS), "--clients", str(CLIENTS), "--minutes", "0.01", "--interval", "0.05"]
    printed, (table,) = results("endurance.py", tmp_path, *options)
    assert "events lost or doubled: 0; at most 0: met" in printed
    assert set(table["runs"]) == SERVERS
    for (result,) in table["runs"].values():
        assert result["delivered"] == CLIENTS * 12
        assert 0 < result["start_megabytes"] <= result["most_megabytes"]


FAULTY = """
from gevent import monkey
monkey.patch_all()
import endpoint
add_publish = endpoint.add_publish
endpoint.add_publish = lambda app, publish: add_publish(app, lambda key, text: FAULT)
from handwritten import app
endpoint.serve(app)
"""
WITH_FAULTY = """
import sys
import harness
harness.SERVERS["handwritten"] = harness.Server("faulty", (sys.executable, FILE, "{fd}"), peer=PEER)
import fanout
sys.argv[1:] = "--clients 20 --keys 0 --rounds 1 --interval 0.01 --servers handwritten ours".split()
fanout.main()
"""


def run_with_a_server(fault: str, tmp_path: Path, *, peer: bool = False) -> subprocess.CompletedProcess[str]:
    (tmp_path / "faulty.py").write_text(FAULTY.replace("FAULT", fault))
    program = tmp_path / "program.py"
    program.write_text(WITH_FAULTY.replace("FILE", repr(str(tmp_path / "faulty.py"))).replace("PEER", str(peer)))
    return run(program, PYTHONPATH=os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)]))


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ('None if text[:2] == "7 " else publish(key, text)', "they got 19 to 19"),
        ('publish(key, text) or (text[:2] == "7 " and publish(key, text))', "they got 21 to 21"),
        (
            'publish(key, "8" + text[1:] if text[:2] == "7 " else text)',
            "20 were passed over and 20 came again or too late",
        ),
        ('publish(key, text.replace(" ", "-"))', "0 had numbers"),
    ],
    ids=["loses", "doubles", "confuses", "numberless"],
)
def test_a_server_that_is_not_right_is_found_out(fault: str, told: str, tmp_path: Path) -> None:
    outcome = run_with_a_server(fault, tmp_path)
    assert outcome.returncode != 0
    assert told in outcome.stderr


def test_a_peer_that_is_not_right_has_no_figures_and_the_others_have(tmp_path: Path) -> None:
    outcome = run_with_a_server('publish(key, "8" + text[1:] if text[:2] == "7 " else text)', tmp_path, peer=True)
    assert outcome.returncode == 0, outcome.stderr
    assert "Without faulty: 20 clients got 20 events each, but not the right ones in order" in outcome.stdout
    assert "deliveries a second" in outcome.stdout


def test_a_peer_that_cannot_be_had_is_told_and_the_others_are_measured(tmp_path: Path) -> None:
    built = run(BENCHMARKS / "endurance.py", "--clients", "1", "--minutes", "0.001", "--interval", "0.05")
    assert built.returncode == 0, built.stderr
    options = ["--clients", "3", "--keys", "0", "--rounds", "1", "--interval", "0.01"]
    outcome = run(BENCHMARKS / "fanout.py", "--servers", "handwritten", "better-sse", *options, PATH=str(tmp_path))
    assert outcome.returncode == 0, outcome.stderr
    assert "better-sse is not there: It needs node; none was found." in outcome.stdout
    assert "deliveries a second" in outcome.stdout


def test_goals_are_judged_by_the_ratios_within_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from rounds import Goal, Runs

    # The machine was slower in the second round, for both.
    ours, plain = [{"cpu": 3.0}, {"cpu": 10.0}, {"cpu": 3.3}], [{"cpu": 2.0}, {"cpu": 10.0}, {"cpu": 3.0}]
    runs = Runs({"ours": ours, "plain": plain})
    verdict = runs.judge(Goal("b", "cpu", 1.2, "plain"), "CPU")
    assert (verdict.value, verdict.met) == (pytest.approx(1.1), True)
    assert str(verdict) == "(b) CPU: 1.1 times plain C; at most 1.2: met"
    assert str(runs.judge(Goal("b", "cpu", 2), "CPU")) == "(b) CPU: 3.3; at most 2: missed"
    assert runs.judge(Goal("b", "cpu", 1, "nchan"), "CPU") is None
    assert Runs({"plain": plain}).judge(Goal("b", "cpu", 1), "CPU") is None


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


def test_a_soak_survives_what_goes_wrong_and_loses_nothing(tmp_path: Path) -> None:
    options = ["--minutes", "0.1", "--clients", str(CLIENTS), "--keys", "2", "--every", "0.5", "--workers", "2"]
    file = tmp_path / "results.json"
    outcome = run(BENCHMARKS / "soak.py", *options, "--seed", "1", "--json", str(file))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    figures = json.loads(file.read_text())
    assert (figures["lost"], figures["doubled"], figures["problems"]) == (0, 0, [])
    assert figures["delivered"] > 100
    assert sum(figures["survived"].values()) >= 2
    for heading in ("events lost", "memory of a worker", "descriptors", "survived"):
        assert heading in outcome.stdout


def test_the_books_of_a_soak_find_what_was_lost_or_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from soak_clients import Book, Client

    from flask_sse_stream import BrokerError, Event

    book, places = Book(), itertools.count(1)

    def publish(text: str) -> str:
        if text.startswith("a 3 "):
            raise BrokerError("nobody knows")
        return f"0123456789ab-{next(places)}"

    for _ in range(9):
        book.publish("a", publish)

    def follow(*seen: int | Event) -> tuple[int, int]:
        client = Client(book, 0, "a", slow=False, stays=0.0)
        for item in seen:
            client.take(Event(f"a {item} ") if isinstance(item, int) else item)
        client.settle()
        return client.counts["lost"], client.counts["doubled"]

    def reset(reason: str, identifier: str) -> Event:
        return Event({"reason": reason, "keys": ["a"]}, event="stream-reset", id=identifier)

    assert follow(0, 1, 2, 4, 5, 6, 7, 8) == (0, 0), "the fourth may be none"
    assert follow(0, 1, 2, 4, 3, 5, 6, 7, 8) == (0, 0), "or come late"
    assert follow(0, 1, 2, 3, 4, 3, 5, 6, 7, 8) == (0, 1)
    assert follow(0, 1, 4, 5, 6, 7, 8) == (1, 0)
    assert follow(0, 1, 2, 4, 5) == (3, 0)
    assert follow(0, 1, 1, 2, 4, 5, 6, 7, 8) == (0, 1)
    assert follow(0, 1, reset("age", "0123456789ab-4"), 6, 7, 8) == (1, 0), "5 came after the reset's place"
    assert follow(0, 1, reset("age", "0123456789ab-5"), 6, 7, 8) == (0, 0)
    assert follow(0, 1, reset("epoch", "ba9876543210-0"), 8) == (0, 0)
    assert follow(0, 1, reset("history", "0123456789ab-2"), 8) == (0, 0)


def test_the_growth_of_memory_is_what_its_quarters_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from soak import growth, verdict

    early, late, slope = growth([(float(second), 1e6 + 1000 * second) for second in range(400)])
    assert (early, late) == (pytest.approx(1.15e6, rel=0.01), pytest.approx(1.35e6, rel=0.01))
    assert slope == pytest.approx(3.6e6)
    fine = {"lost": 0, "doubled": 0, "tracebacks": 0, "problems": [], "delivered": 1, "files": 0, "log": ""}
    memory = {"early_bytes": 50e6, "late_bytes": 51e6, "growth": 0.02}
    assert verdict({**fine, **memory}) == []
    for wrong in ({"lost": 1}, {"doubled": 1}, {"tracebacks": 1}, {"problems": ["x"]}, {"delivered": 0}, {"files": 99}):
        assert verdict({**fine, **memory, **wrong})
    assert verdict({**fine, "early_bytes": 50e6, "late_bytes": 70e6, "growth": 0.4})


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


def test_plots_show_every_figure_and_the_page_tells_where_we_lose(tmp_path: Path) -> None:
    def table(row: str, clients: int, figure: str, ours: float, plain: float) -> dict[str, Any]:
        return {
            "row": row,
            "title": "a table",
            "clients": clients,
            "figures": [{"name": figure, "heading": f"{figure}, us", "more_is_better": False}],
            "labels": {"ours": "flask_sse_stream", "plain": "plain C"},
            "medians": {"ours": {figure: ours}, "plain": {figure: plain}},
            "absent": {"nchan": "It needs Debian's nginx; none was found."},
            "goals": [],
        }

    tables = [
        table("a, b", 1000, "paced_cpu_per_delivery", 11, 10),
        table("c", 10000, "paced_cpu_per_delivery", 7, 8),
        table("i", 10000, "paced_cpu_per_delivery", 30.5, 30),
    ]
    goal = {"row": "b", "heading": "CPU", "against": "plain", "value": 1.1, "at_most": 1.2, "met": True}
    tables[0]["goals"].append(goal)
    file = tmp_path / "fanout.json"
    file.write_text(json.dumps({"benchmark": "fanout", "rounds": 3, "machine": {"node": "20"}, "tables": tables}))
    plots = tmp_path / "plots"
    outcome = run(BENCHMARKS / "plot.py", str(file), "--to", str(plots), "--note", "It was busy.")
    assert outcome.returncode == 0, outcome.stderr
    assert {path.name for path in plots.iterdir()} == {"b.svg", "c.svg", "i.svg", "measured.inc"}
    for path in plots.glob("*.svg"):
        text = "".join(ET.parse(path).getroot().itertext())
        assert "flask_sse_stream" in text
        assert "plain C" in text
    page = (plots / "measured.inc").read_text()
    assert "fanout (medians of 3 runs): node 20." in page
    assert "It was busy." in page
    assert "Without nchan: It needs Debian's nginx" in page
    assert "1.1 times plain C" in page
    # Better than ours by more than noise: in the first table alone.
    assert page.partition("Where we lose")[2].count("- plain C ") == 1
