"""What is counted, and how Prometheus is given it: by one process, and by several that share a directory."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from fakes import Clock, House, shut_down
from flask import Flask
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from support import ROOT, run_unpatched, wait_for

from flask_sse_stream import SSE, CloseReason, PoolManager, Settings, SettingsError
from flask_sse_stream.counts import CLOSED, COUNTERS, FLUSH, LAG, MAX_REASONS, SIZE, Counts, Histogram
from flask_sse_stream.errors import BrokerError
from flask_sse_stream.health import Health
from flask_sse_stream.metrics import NAMES, SSECollector


@pytest.fixture(autouse=True)
def no_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)


def scrape(collector: SSECollector) -> dict[str, float]:
    """What Prometheus would read, by name and labels."""
    registry = CollectorRegistry()
    registry.register(collector)
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


# What is counted


def test_a_histogram_counts_values_at_or_below_its_bounds_and_their_sum() -> None:
    cells = [0] * 10
    histogram = Histogram(2, (1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 7.0):
        histogram.add(cells, value)
    assert cells == [0, 0, 2, 1, 1, 10_000_000_000, 0, 0, 0, 0]
    assert histogram.read(cells) == ([2, 1, 1], 10.0)
    assert [histogram.quantile(cells, share) for share in (0.5, 0.75, 0.99)] == [1.0, 2.0, float("inf")]
    histogram.clear(cells)
    assert (cells, histogram.quantile(cells, 0.5)) == ([0] * 10, 0.0)


def test_every_reason_has_a_cell_of_its_own() -> None:
    assert len(CloseReason) <= MAX_REASONS
    assert LAG.start == CLOSED + MAX_REASONS
    assert LAG.end == FLUSH.start < COUNTERS < SIZE


def test_counts_that_move_go_on_where_they_were() -> None:
    counts = Counts()
    counts.cells[3] += 2
    cells = [0] * SIZE
    counts.move(cells)
    counts.cells[3] += 1
    assert (cells[3], counts.read()[3]) == (3, 3)


def test_bytes_are_those_that_clients_were_given() -> None:
    house = House(ping_interval=5)
    streams = [house.open(), house.open()]
    house.manager.publish("k", "x" * 100)
    given = sum(len(house.take(stream)) for stream in streams)
    assert given > 200
    assert house.manager.stats().sent_bytes == given


def test_lag_is_from_the_publish_to_the_end_of_the_pass_that_offered_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    house = House()
    stream = house.open()
    house.flush()
    house.manager.publish("k", "x")
    clock.now += 0.3
    house.flush()
    assert LAG.read(house.manager.counts.read())[1] == pytest.approx(0.3)
    assert LAG.quantile(house.manager.counts.read(), 0.5) == 0.5
    clock.now += 2
    assert stream.lag == pytest.approx(2.3)
    stream.take()
    clock.now += 1
    assert stream.lag == 1.0  # its transport has it, and has not come back
    stream.take()
    assert stream.lag == 0.0


def test_flush_time_is_of_each_slice() -> None:
    house = House()
    house.open()
    before = sum(FLUSH.read(house.manager.counts.read())[0])
    house.manager.flush()
    assert sum(FLUSH.read(house.manager.counts.read())[0]) == before + 1


# One process


def test_prometheus_reads_every_number_under_its_documented_name() -> None:
    house = House(history_size=10, queue_events=2, overflow="drop_newest", max_clients=2)
    _, second = house.open(), house.open("k", "other")
    with pytest.raises(Exception, match="all the 2 streams"):
        house.open()
    place = house.manager.publish("k", "1")
    for number in range(4):
        house.manager.publish("k", str(number))
    house.flush()
    second.close(CloseReason.PEER)
    house.open(after=place)
    found = scrape(SSECollector(house.manager))
    expected = {
        "flask_sse_processes": 1,
        "flask_sse_streams": 2,
        "flask_sse_keys": 1,
        "flask_sse_outbox_events": 0,
        "flask_sse_draining": 0,
        "flask_sse_broker_up": 1,
        "flask_sse_streams_opened_total": 3,
        "flask_sse_streams_closed_total{reason=peer}": 1,
        "flask_sse_streams_closed_total{reason=slow}": 0,
        "flask_sse_streams_refused_total": 1,
        "flask_sse_events_published_total": 5,
        "flask_sse_events_delivered_total": house.manager.stats().offered,
        "flask_sse_events_dropped_total": house.manager.stats().dropped,
        "flask_sse_events_replayed_total": 4,
        "flask_sse_resets_total": 0,
        "flask_sse_broker_reconnects_total": 0,
        "flask_sse_lag_seconds_count": 5,
        "flask_sse_queue_frames_gcount": 2,
        "flask_sse_queue_frames_gsum": sum(stream.waiting for stream in house.manager.streams("k")),
    }
    assert {name: found[name] for name in expected} == expected
    assert expected["flask_sse_events_delivered_total"] > 0
    assert expected["flask_sse_events_dropped_total"] > 0
    families = {re.sub(r"(_bucket|_count|_sum|_gcount|_gsum)?(\{.*)?$", "", name) for name in found}
    assert families == set(NAMES)


def test_quantiles_come_from_buckets_that_only_grow() -> None:
    house = House()
    for _ in range(3):
        house.open()
    house.take(house.open("quiet"))
    found = scrape(SSECollector(house.manager))
    ends = ["0.0", "1.0", "3.0", "10.0", "30.0", "100.0", "300.0", "1000.0", "3000.0", "10000.0", "+Inf"]
    assert [found[f"flask_sse_queue_frames_bucket{{le={end}}}"] for end in ends] == [1, 1, *[4] * 9]


def test_names_are_known_without_counting_anything() -> None:
    families = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in SSECollector(PoolManager(Settings())).describe()
    }
    assert families == set(NAMES)
    assert all(name.startswith("flask_sse_") for name in NAMES)


# Several processes


PROCESS = """
import sys, time
from fakes import House
from flask_sse_stream.metrics import SSECollector
house = House()
SSECollector(house.manager)
streams = [house.open() for _ in range(int(sys.argv[1]))]
house.manager.publish("k", "x")
house.flush()
house.manager.sample()
print("ready", flush=True)
sys.stdin.read()
"""


def process(directory: Path, streams: int) -> subprocess.Popen[str]:
    started = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROCESS), str(streams)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "PROMETHEUS_MULTIPROC_DIR": str(directory),
        },
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


def test_the_sum_has_what_a_killed_process_counted_and_the_state_of_those_that_live(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    (tmp_path / "counter_1.db").write_bytes(b"prometheus_client's own")
    house = House()
    collector = SSECollector(house.manager)
    house.open()
    names = ("processes", "streams", "streams_opened_total", "events_published_total", "queue_frames_gcount")

    def numbers() -> list[float]:
        found = scrape(SSECollector(house.manager))  # a registry for each request makes it anew
        return [found[f"flask_sse_{name}"] for name in names]

    assert numbers() == [1, 1, 1, 0, 1]
    with process(tmp_path, 2) as lives, process(tmp_path, 3) as killed:
        assert numbers() == [3, 6, 6, 2, 6]
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert numbers() == [2, 3, 6, 2, 3]
        assert lives.stdin is not None
        lives.stdin.close()
        lives.wait()
    assert numbers() == [1, 1, 6, 2, 1]
    # Those that were forked to become another program have left none.
    assert len(list(tmp_path.glob("*.counts"))) == 3
    assert scrape(collector)["flask_sse_streams"] == 1


def test_a_file_of_an_earlier_process_of_the_same_number_is_kept_and_summed(tmp_path: Path) -> None:
    house = House(namespace="of-pid-1")
    with process(tmp_path, 2) as other:
        other.kill()
    [left] = tmp_path.glob("*.counts")
    left.rename(tmp_path / f"flask-sse-of-pid-1-{os.getpid()}-0.counts")
    (tmp_path / "flask-sse-of-pid-1-2-0.counts").write_bytes(b"just being made")
    found = scrape(SSECollector(house.manager, tmp_path))
    assert (found["flask_sse_streams_opened_total"], found["flask_sse_streams"]) == (2, 0)
    assert (tmp_path / f"flask-sse-of-pid-1-{os.getpid()}-1.counts").exists()


def test_a_forked_child_counts_by_itself_and_is_summed(tmp_path: Path) -> None:
    run_unpatched(
        f"""
        import os, sys
        sys.path.insert(0, {str(ROOT / "tests")!r})
        from fakes import House
        from flask_sse_stream.metrics import SSECollector
        from test_metrics import scrape
        house = House()
        collector = SSECollector(house.manager, {str(tmp_path)!r})
        house.manager.publish("k", "of the parent")
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            house.manager.publish("k", "of the child")
            assert house.manager.stats().published == 1
            os.write(writer, b"x")
            os._exit(0)
        os.read(reader, 1)
        os.waitpid(child, 0)
        found = scrape(collector)
        assert found["flask_sse_events_published_total"] == 2, found
        assert found["flask_sse_processes"] == 1
        """
    )


def test_two_apps_in_one_directory_are_told_apart_by_their_namespaces(tmp_path: Path) -> None:
    one, two = House(namespace="a"), House(namespace="a-1")
    collectors = [SSECollector(house.manager, tmp_path) for house in (one, two)]
    assert list(tmp_path.iterdir()) == []  # nothing was counted yet
    one.manager.publish("k", "x")
    assert [scrape(collector)["flask_sse_events_published_total"] for collector in collectors] == [1, 0]


def test_two_managers_of_one_application_in_one_process_are_summed_once_each(tmp_path: Path) -> None:
    one, two = House(), House()
    SSECollector(two.manager, tmp_path)
    one.open(), two.open()
    found = scrape(SSECollector(one.manager, tmp_path))
    assert (found["flask_sse_processes"], found["flask_sse_streams_opened_total"]) == (2, 2)


def test_a_directory_that_is_none_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"PROMETHEUS_MULTIPROC_DIR .*nowhere"):
        SSECollector(PoolManager(), tmp_path / "nowhere")


def test_the_state_of_a_process_is_noted_from_its_first_stream_until_it_is_shut_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flask_sse_stream.metrics._SAMPLE_SECONDS", 0.01)
    from flask_sse_stream.transports.base import current_runtime
    from flask_sse_stream.transports.iterator import IteratorTransport

    manager = PoolManager(Settings())
    SSECollector(manager, tmp_path)
    looked: list[int] = []
    sample = manager.sample

    def counting() -> None:
        looked.append(1)
        sample()

    monkeypatch.setattr(manager, "sample", counting)
    runtime = current_runtime()
    assert not looked
    stream = manager.open(["k"], IteratorTransport(runtime.waiter()), runtime)
    wait_for(lambda: len(looked) >= 3, "it is looked at again and again")
    assert stream.waiting
    shut_down(manager)
    before = len(looked)
    runtime.waiter().wait(0.1)
    assert len(looked) <= before + 1


# The dashboard

DASHBOARD = ROOT / "examples" / "grafana" / "dashboard.json"


def series(collector: SSECollector) -> set[str]:
    """Every name that a query may ask for."""
    return {name.partition("{")[0] for name in scrape(collector)}


def test_every_query_of_the_dashboard_and_the_alerts_asks_for_series_that_there_are() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [variable["query"]["query"] for variable in dashboard["templating"]["list"] if variable["name"] == "job"]
    page = (ROOT / "docs" / "tools.rst").read_text()
    queries += re.findall(r"expr: (.+)", page) + re.findall(r"``(histogram_quantile.+?)``", page)
    known = series(SSECollector(House().manager))
    asked = set()
    for query in queries:
        assert query.count("(") == query.count(")"), query
        named = set(re.findall(r"\bflask_sse_\w+", query))
        assert named, query
        assert named <= known, query
        asked |= named
    families = {re.sub(r"_(bucket|count|sum|gcount|gsum)$", "", name) for name in asked}
    assert families == set(NAMES), "the dashboard shows everything"


def test_the_panels_of_the_dashboard_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        assert all(target["refId"] for target in panel["targets"])
        taken |= cells


# Health


def test_a_process_is_ready_until_it_drains() -> None:
    app = Flask(__name__)
    sse = SSE(app)
    assert sse.health() == Health(True, ())
    assert sse.health()
    sse.manager.begin_drain()
    assert sse.health() == Health(False, ("this process is about to stop and takes no more streams",))
    assert not sse.health()


def test_a_process_is_not_ready_while_its_broker_does_not_answer_or_does_not_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flask_sse_stream.brokers.base import BrokerStats

    sse = SSE(Flask(__name__))
    broker: Any = sse.manager._broker

    def gone(names: Any) -> float:
        raise BrokerError("no answer within 2.0 s")

    with monkeypatch.context() as patch:
        patch.setattr(broker, "marked", gone)
        assert sse.health().reasons == ("the broker does not answer: no answer within 2.0 s",)
    monkeypatch.setattr(broker, "stats", lambda: BrokerStats(up=False, error="connection refused"))
    assert sse.health().reasons == ("live events do not reach this process: connection refused",)
