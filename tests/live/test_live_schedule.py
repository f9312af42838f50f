"""A scheduler in each worker, on one log: one of them speaks at each tick, whatever becomes of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from docs_blocks import blocks
from support import ROOT, Server, free_port, python, wait_for
from workers import LONG, Crowd, Follower, Log, Received, Workers, number

pytestmark = pytest.mark.live

# What a log has to do is in the contract of the brokers; here each is seen under some of the servers.
ON_SQLITE = pytest.mark.parametrize("log", ["sqlite"], indirect=True)
ON_REDIS = pytest.mark.parametrize("log", ["redis"], indirect=True)

CLOCK, CONFIGURATION = [code for _, code in blocks("docs/scheduling.rst")][:2]
WORKERS = 3
KINDS: dict[str, tuple[str, ...]] = {
    "gevent": (),
    "gevent, preloaded": ("--preload",),
    "gthread": ("-k", "gthread", "--threads", "40"),
}

StartClock = Callable[..., "Clock"]


class Clock:
    """A server whose workers tick every second, what its clients hear, and what the workers wrote down."""

    def __init__(self, server: Workers, notes: Path, crowd: Crowd) -> None:
        self.server = server
        self._notes = notes
        self._crowd = crowd

    def follow(self, key: str = "clock") -> list[Follower]:
        """Let clients on every worker listen."""
        self.server.wait_for_workers(WORKERS)
        return self._crowd.follow_on_each([self.server], 2 * WORKERS, key)

    def notes(self, what: str, *, without: int = 0) -> list[dict[str, Any]]:
        """Give what was written down, except by one process."""
        lines = self._notes.read_text().splitlines() if self._notes.exists() else []
        notes = map(json.loads, lines)
        return [note for note in notes if note["what"] == what and note["process"] != without]

    @contextlib.contextmanager
    def same_for_all(self) -> Iterator[None]:
        """Let all workers give one name to what they say; the first of them stands still before it speaks."""
        same = Path(f"{self._notes}.same")
        same.touch()
        yield
        same.unlink()


@pytest.fixture
def start_clock(serve: Callable[..., Workers], crowd: Crowd, tmp_path: Path) -> StartClock:
    """Start gunicorn with the configuration that the documentation prints."""

    def start(kind: str = "gevent", *, lease: float, **environment: str) -> Clock:
        configuration, notes = tmp_path / "gunicorn.conf.py", tmp_path / "notes"
        text = CONFIGURATION
        if kind == "gthread":
            text = text.replace("gevent import GeventScheduler", "background import BackgroundScheduler")
            text = text.replace("GeventScheduler(", "BackgroundScheduler(")
        configuration.write_text(text)
        # Only what the configuration says about schedules and the worker class is of interest here.
        options = ("-c", str(configuration), "-w", str(WORKERS), *KINDS[kind])
        if kind == "gevent, preloaded":
            environment["PATCH"] = "yes"  # in time, as an app that uses redis-py must then
        environment = {"NOTES": str(notes), "LEASE": str(lease), "SSE_JOIN_HISTORY": "1000", **environment}
        return Clock(serve(*options, app="clock:app", **environment), notes, crowd)

    return start


def said(follower: Follower) -> list[dict[str, Any]]:
    """Give what was said at each tick; no tick may be heard twice, and nothing but ticks."""
    assert {event.event for event in follower.events} <= {"tick"}
    ticks = [json.loads(event.data) for event in follower.events]
    names = [tick["tick"] for tick in ticks]
    assert len(set(names)) == len(names)
    assert len(set(follower.ids)) == len(names)
    return ticks


def wait_for_ticks(followers: list[Follower], count: int, *, without: int = 0) -> list[dict[str, Any]]:
    """Wait until every client has heard so many ticks, not counting those of one process; give all that they heard."""

    def heard(follower: Follower) -> int:
        return sum(tick["process"] != without for tick in said(follower))

    wait_for(lambda: all(heard(follower) >= count for follower in followers), f"{count} ticks", LONG)
    shortest = min((said(follower) for follower in followers), key=len)
    for follower in followers:
        assert said(follower)[: len(shortest)] == shortest
    return shortest


@pytest.mark.parametrize(
    ("log", "kind"), [("sqlite", "gevent"), ("redis", "gevent, preloaded"), ("redis", "gthread")], indirect=["log"]
)
def test_at_each_tick_all_workers_ask_and_one_of_them_speaks_once(start_clock: StartClock, kind: str) -> None:
    clock = start_clock(kind, lease=15)
    ticks = wait_for_ticks(clock.follow(), 4)
    [speaker] = {tick["process"] for tick in ticks}
    workers = clock.server.workers()
    assert clock.server.pid not in workers
    assert speaker in workers
    wait_for(lambda: {note["process"] for note in clock.notes("asks")} == workers, "all ask", LONG)
    assert {note["process"] for note in clock.notes("has it")} == {speaker}
    names = [tick["tick"] for tick in ticks]
    # It has asked at most once a second, and not again before it had spoken.
    assert list(dict.fromkeys(note["tick"] for note in clock.notes("has it")))[: len(names)] == names


@ON_SQLITE
def test_when_the_worker_that_ticks_is_killed_another_one_does_as_soon_as_it_asks_after_the_end_of_the_lease(
    start_clock: StartClock,
) -> None:
    lease = 3
    clock = start_clock(lease=lease)
    followers = clock.follow()
    victim = wait_for_ticks(followers, 2)[-1]["process"]
    os.kill(victim, signal.SIGKILL)
    ticks = wait_for_ticks(followers, 3, without=victim)
    assert len({tick["process"] for tick in ticks} - {victim}) == 1
    # Nobody was told yes before the lease had ended.
    asked = [note["time"] for note in clock.notes("asks") if note["process"] == victim]
    answered = [note["time"] for note in clock.notes("has it") if note["process"] == victim]
    first = min(note["time"] for note in clock.notes("has it", without=victim))
    assert first > max(time for time in asked if time < answered[-1]) + lease
    # Who was the first to ask a second later was told yes, unless somebody else had been before.
    later = min(
        (note for note in clock.notes("asks", without=victim) if note["time"] > asked[-1] + lease + 1),
        key=lambda note: float(note["time"]),
    )
    answers = clock.notes("has it") + clock.notes("has it not")
    assert first <= min(
        note["time"] for note in answers if note["process"] == later["process"] and note["time"] > later["time"]
    )


@pytest.mark.parametrize(("log", "kind"), [("redis", "gevent"), ("sqlite", "gthread")], indirect=["log"])
def test_a_worker_that_ends_hands_its_ticks_on_long_before_its_lease_would_have_ended(
    start_clock: StartClock, kind: str
) -> None:
    # gthread leaves the connections open whose streams outlast its grace.
    warnings = "error,ignore:unclosed <socket:ResourceWarning" if kind == "gthread" else "error"
    clock = start_clock(kind, lease=10 * LONG, PYTHONWARNINGS=warnings)
    followers = clock.follow()
    holder = wait_for_ticks(followers, 2)[-1]["process"]
    os.kill(holder, signal.SIGTERM)
    ticks = wait_for_ticks(followers, 2, without=holder)
    assert len({tick["process"] for tick in ticks} - {holder}) == 1
    wait_for(lambda: not psutil.pid_exists(holder), "it is gone", LONG)
    # It has kept the lease to its end, and not a moment longer.
    ends = max(note["time"] for note in clock.notes("has it") if note["process"] == holder)
    assert all(note["time"] > ends for note in clock.notes("has it", without=holder))


@ON_REDIS
def test_a_worker_that_stood_still_since_it_was_told_yes_does_not_say_again_what_another_one_said(
    start_clock: StartClock,
) -> None:
    clock = start_clock(lease=2)
    followers = clock.follow()
    wait_for_ticks(followers, 1)

    def speakers() -> list[int]:
        return [note["process"] for note in clock.notes("has spoken") if note["tick"] == "the same"]

    with clock.same_for_all():
        [note] = wait_for(lambda: clock.notes("stands still"), "a worker has the lease and stands still", LONG)
        still = note["process"]
        wait_for(speakers, "another one speaks", LONG)
        assert still not in speakers()
    os.kill(still, signal.SIGCONT)
    wait_for(lambda: still in speakers(), "it goes on", LONG)
    assert len({note["id"] for note in clock.notes("has spoken") if note["tick"] == "the same"}) == 1
    count = len(wait_for_ticks(followers, 1)) + 2
    names = [tick["tick"] for tick in wait_for_ticks(followers, count)]
    assert names.count("the same") == 1


@ON_SQLITE
def test_what_each_worker_sends_its_own_streams_reaches_no_others(start_clock: StartClock) -> None:
    clock = start_clock(lease=15)
    followers = clock.follow("worker")
    assert {follower.process for follower in followers} == clock.server.workers()
    wait_for(lambda: all(len(follower.events) >= 3 for follower in followers), "each hears its own", LONG)
    for follower in followers:
        assert {json.loads(data)["process"] for data in follower.data} == {follower.process}
        names = [json.loads(data)["tick"] for data in follower.data]
        assert names == sorted(names)
        assert set(follower.ids) == {""}


def expect_each_second_once(followers: list[Follower], latest: Follower, count: int) -> None:
    """Wait until all have so many events from the first one of the latest on, which are the same, in their order."""

    def heard(follower: Follower) -> list[Received]:
        events = list(follower.events)
        return next((events[at:][:count] for at, event in enumerate(events) if event == latest.events[0]), [])

    wait_for(lambda: all(len(heard(follower)) == count for follower in followers), "the clock ticks", LONG)
    for follower in followers:
        assert heard(follower) == heard(latest)
        assert {event.event for event in follower.events} == {"tick"}
        assert follower.data == sorted(set(follower.data))


@ON_SQLITE
def test_the_clock_of_the_documentation_tells_each_second_once_though_three_workers_tick(
    serve: Callable[..., Workers], crowd: Crowd, log: Log, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    of_this_test = f'"{log.url}"\napp.config["SSE_NAMESPACE"] = "{log.namespace}"'
    (site / "clock.py").write_text(CLOCK.replace('"sqlite:///sse.db"', of_this_test))
    (site / "gunicorn.conf.py").write_text(CONFIGURATION)
    server = serve("-c", f"{site}/gunicorn.conf.py", "--chdir", str(site), "-w", "3", app="clock:app")
    server.wait_for_workers(3)
    followers = [crowd.follow(server.port, "clock") for _ in range(12)]
    wait_for(lambda: all(follower.events for follower in followers), "the clock ticks", LONG)
    latest = max(followers, key=lambda follower: number(follower.ids[0]))
    expect_each_second_once(followers, latest, 4)


@ON_REDIS
def test_of_two_processes_of_the_example_the_other_one_ticks_when_one_is_killed(
    crowd: Crowd, log: Log, tmp_path: Path
) -> None:
    ports = free_port(), free_port()
    command = python("-W", "error", str(ROOT / "examples" / "schedule.py"))
    one, other = (
        Server(command, port, tmp_path / f"log-{port}", {"PORT": str(port), "SSE_BROKER_URL": log.url})
        for port in ports
    )
    with contextlib.ExitStack() as stack:
        stack.callback(one.stop)
        one.start()
        early = crowd.follow(one.port, "time")
        wait_for(lambda: early.events, "it ticks", LONG)
        stack.callback(other.stop)
        other.start()
        late = crowd.follow(other.port, "time")
        wait_for(lambda: len(late.events) >= 2, "the other one's clients hear it", LONG)
        early.port = other.port
        one.stop(signal.SIGKILL)
        expect_each_second_once([early, late], late, len(late.events) + 2)
        assert other.process is not None
        other.process.send_signal(signal.SIGTERM)
        assert other.process.wait(LONG) == 0
    assert "Traceback" not in other.log, other.log
