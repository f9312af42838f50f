"""Several processes on one log: whoever publishes, every client of every process gets it, whatever dies."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

import psutil
import pytest
from clients import DEADLINE
from support import wait_for
from workers import LONG, Crowd, Log, PublishingProcess, Workers, number, pywsgi

pytestmark = pytest.mark.live

Serve = Callable[..., Workers]
ON_SQLITE = pytest.mark.parametrize("log", ["sqlite"], indirect=True)
ON_REDIS = pytest.mark.parametrize("log", ["redis"], indirect=True)


def sockets(database: Path) -> set[int]:
    """Give the ids of the processes that want to be woken."""
    directory = Path(f"{database}.wake")
    return {int(name.partition("-")[0]) for name in os.listdir(directory)} if directory.exists() else set()


def two_masters(serve: Serve) -> list[Workers]:
    return [serve("-k", "gevent", "-w", "2") for _ in range(2)]


ARRANGEMENTS: dict[str, tuple[int, Callable[[Serve], list[Workers]]]] = {
    "gevent": (2, lambda serve: [serve("-k", "gevent", "-w", "2")]),
    "gthread": (2, lambda serve: [serve("-k", "gthread", "-w", "2", "--threads", "40")]),
    "two unpatched pywsgi": (2, lambda serve: [serve(command=pywsgi) for _ in range(2)]),
    "two patched pywsgi": (2, lambda serve: [serve("--patch", command=pywsgi) for _ in range(2)]),
    "two masters of gunicorn": (4, two_masters),
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_an_event_streams_on_every_worker_once_and_in_order_whichever_published_it(
    serve: Serve, crowd: Crowd, arrangement: str
) -> None:
    count, start = ARRANGEMENTS[arrangement]
    servers = start(serve)
    for server in servers:
        server.wait_for_workers(count // len(servers))
    followers = crowd.follow_on_each(servers, 20, "news")
    published: list[str] = []
    processes: set[int] = set()
    while len(published) < 50 or len(processes) < count:
        assert len(published) < 2000, "some process gets none of the requests"
        identifier, process = servers[len(published) % len(servers)].post("news", f"news {len(published)}")
        published.append(identifier)
        processes.add(process)
    for follower in followers:
        follower.wait_for_data(f"news {len(published) - 1}")
        assert follower.ids == published
        assert follower.data == [f"news {index}" for index in range(len(published))]
        assert follower.connections == 1
    assert published == sorted(published, key=number)


class Publishers:
    """Several at once, in processes of their own and in the workers of a server; ``publish`` lets some events go.

    What a worker that was killed may or may not have published is published again under the same idempotency key.
    """

    def __init__(self, server: Workers, log: Log, stack: contextlib.ExitStack) -> None:
        self.published: dict[str, str] = {}  # the id of each event's data
        self.failures: list[str] = []
        self.retried = 0
        self._server = server
        self._allowed = threading.Semaphore(0)
        self._finished = False
        ways = [stack.enter_context(PublishingProcess(log)).publish for _ in range(2)]
        self._threads = [
            threading.Thread(target=self._run, args=(name, way), daemon=True)
            for name, way in zip("abcd", [*ways, self._post, self._post], strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def _post(self, key: str, data: str) -> str:
        while True:
            try:
                return self._server.post(key, data, once=data)[0]
            except (OSError, HTTPException):  # killed meanwhile
                self.retried += 1

    def _run(self, name: str, publish: Callable[[str, str], str]) -> None:
        index = 0
        while self._allowed.acquire() and not self._finished:
            try:
                data = f"{name} {index}"
                self.published[data] = publish("news", data)
                index += 1
            except BaseException as error:
                self.failures.append(repr(error))
                raise

    def publish(self, count: int) -> None:
        """Let so many more events be published, by whoever comes first."""
        self._allowed.release(count)

    def wait_for(self, count: int) -> None:
        """Wait until so many have been published in all."""
        wait_for(lambda: self.failures or len(self.published) >= count, f"{count} were published", LONG)
        assert self.failures == []

    def finish(self) -> None:
        """Let no more be published."""
        self._finished = True
        self._allowed.release(len(self._threads))
        for thread in self._threads:
            thread.join(LONG)
            assert not thread.is_alive()
        assert self.failures == []


# What the suite has time for; with ROLLING_CLIENTS=1000 in the environment, a thousand, and each way on each log.
ROLLING = int(os.environ.get("ROLLING_CLIENTS", "200"))
ROLLS = [("sqlite", "one by one"), ("redis", "reload")]
if "ROLLING_CLIENTS" in os.environ:
    ROLLS += [("sqlite", "reload"), ("redis", "one by one")]


@pytest.mark.parametrize(("log", "way"), ROLLS, indirect=["log"])
def test_across_a_rolling_restart_of_four_workers_no_client_misses_anything_or_sees_it_twice(
    serve: Serve, crowd: Crowd, log: Log, way: str
) -> None:
    server = serve("-k", "gevent", "-w", "4", "--graceful-timeout", "60", SSE_DRAIN_SECONDS="2")
    server.wait_for_workers(4)
    followers = crowd.follow_on_each([server], ROLLING, "news")
    allowed = 0
    paced = time.monotonic()
    with contextlib.ExitStack() as stack:
        publishers = Publishers(server, log, stack)

        def publish_until(condition: Callable[[], object], what: str) -> None:
            """Go on publishing, and let everybody go on until it is so, and for a while after."""

            def look() -> object:
                nonlocal allowed, paced
                if time.monotonic() - paced > 0.05 and len(publishers.published) > allowed - 10:
                    paced = time.monotonic()
                    allowed += 5
                    publishers.publish(5)
                return publishers.failures or crowd.errors or condition()

            wait_for(look, what, 2 * LONG)
            assert crowd.errors == []
            assert publishers.failures == []

        def all_read() -> bool:
            return all(follower.process in server.workers() for follower in followers)

        reload = way == "reload"
        for old in [server.workers()] if reload else [{worker} for worker in sorted(server.workers())]:
            publish_until(lambda goal=allowed + 20: len(publishers.published) >= goal, "some are published")  # type: ignore[misc]
            begun = time.monotonic()
            os.kill(server.pid if reload else min(old), signal.SIGHUP if reload else signal.SIGTERM)
            publish_until(lambda old=old: not old & server.workers(), "the old have left")  # type: ignore[misc]
            left = time.monotonic() - begun
            publish_until(lambda: len(server.workers()) == 4 and all_read(), "all read again")
            print(f"{way}: left after {left:.2f} s, all read again after {time.monotonic() - begun:.2f} s")
        publishers.wait_for(allowed)
        publishers.finish()
    last = max(publishers.published, key=lambda data: number(publishers.published[data]))
    for follower in followers:
        follower.wait_for_data(last)
    lost = sum(len(publishers.published.keys() - set(follower.data)) for follower in followers)
    doubled = sum(len(follower.data) - len(set(follower.data)) for follower in followers)
    print(f"{len(publishers.published)} events, {lost} lost and {doubled} doubled by {len(followers)} clients")
    assert (lost, doubled) == (0, 0)
    for follower in followers:
        assert follower.events == followers[0].events
        assert follower.connections > 1
    assert {event.event for event in followers[0].events} == {"message"}
    assert {event.data: event.id for event in followers[0].events} == publishers.published


CLIENTS, EVENTS, KILLS = 200, 5000, 20


@pytest.mark.parametrize(("log", "workers"), [("sqlite", 4), ("redis", 2)], indirect=["log"])
def test_of_5000_events_200_clients_have_each_once_in_order_while_workers_are_killed_and_connections_cut(
    serve: Serve, crowd: Crowd, log: Log, workers: int
) -> None:
    server = serve("-k", "gevent", "-w", str(workers))
    server.wait_for_workers(workers)
    followers = crowd.follow_on_each([server], CLIENTS, "news")
    dice = random.Random(workers)
    with contextlib.ExitStack() as stack:
        publishers = Publishers(server, log, stack)
        for kill in range(KILLS):
            before, share = EVENTS * kill // KILLS, EVENTS // KILLS
            publishers.publish(EVENTS * (kill + 1) // KILLS - before)
            publishers.wait_for(before + dice.randrange(share // 2))
            victims = {dice.choice(sorted({follower.process for follower in followers} - {0}))}
            if kill % 3 == 0:  # and perhaps one that has no stream yet
                victims.add(dice.choice(sorted(server.workers())))
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
            for follower in dice.sample(followers, CLIENTS // 10):
                follower.hang_up()
            publishers.wait_for(EVENTS * (kill + 1) // KILLS)
            wait_for(
                lambda: crowd.errors or all(f.process not in {0, *victims} for f in followers),  # noqa: B023
                "all read again",
                LONG,
            )
            assert crowd.errors == []
        publishers.finish()
    assert len(publishers.published) == EVENTS
    last = max(publishers.published, key=lambda data: number(publishers.published[data]))
    for follower in followers:
        follower.wait_for_data(last)
    first = followers[0].events
    for follower in followers:
        assert follower.events == first
    assert {event.event for event in first} == {"message"}
    assert {event.data: event.id for event in first} == publishers.published
    assert len(first) == EVENTS
    places = [number(event.id) for event in first]
    assert places == sorted(places)
    said: dict[str, list[int]] = defaultdict(list)
    for event in first:
        name, index = event.data.split()
        said[name].append(int(index))
    assert len(said) == 4
    assert all(indexes == list(range(len(indexes))) for indexes in said.values())
    assert sum(follower.connections for follower in followers) > 2 * len(followers)
    if log.redis is None:
        # By the next publish, which may be after the last kill has taken effect.
        wait_for(
            lambda: server.post("other", "x") and sockets(log.database) <= server.workers(),
            "the sockets of the dead are gone",
            DEADLINE,
        )


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["ended", "killed"])
def test_a_client_of_a_server_that_was_away_gets_what_another_process_published_meanwhile(
    serve: Serve, crowd: Crowd, log: Log, how: signal.Signals
) -> None:
    server = serve("-k", "gevent", "-w", "2")
    follower = crowd.follow(server.port, "news").wait_until_it_reads()
    with PublishingProcess(log) as publisher:
        published = [publisher.publish("news", "before")]
        follower.wait_for_data("before")
        server.stop(how)
        wait_for(lambda: not follower.process, "the stream ends", LONG)
        for index in range(200):
            published.append(publisher.publish("news", f"meanwhile {index}"))
            publisher.publish("other", "of no concern")
        server.start()
        follower.wait_until_it_reads()
        published.append(publisher.publish("news", "after"))
    follower.wait_for_data("after")
    assert follower.ids == published
    assert {event.event for event in follower.events} == {"message"}


def test_clients_of_a_server_that_is_killed_go_over_to_another_and_miss_nothing(
    serve: Serve, crowd: Crowd, log: Log
) -> None:
    one, other = two_masters(serve)
    followers = crowd.follow_on_each([one], 20, "news")
    with PublishingProcess(log) as publisher:
        published = [publisher.publish("news", f"before {index}") for index in range(100)]
        for follower in followers:
            follower.port = other.port
        one.stop(signal.SIGKILL)
        published += [publisher.publish("news", f"meanwhile {index}") for index in range(100)]
        wait_for(lambda: all(follower.process in other.workers() for follower in followers), "all went over", LONG)
        published += [other.post("news", f"after {index}")[0] for index in range(20)]
    for follower in followers:
        follower.wait_for_data("after 19")
        assert follower.ids == published
        assert {event.event for event in follower.events} == {"message"}


def forget(log: Log, what: str) -> None:
    """Delete a log while it is in use."""
    if log.redis is not None:
        with log.redis.client() as client:
            client.delete(*client.keys(f"{{{log.namespace}}}:*"))
        return
    for path in log.directory.glob("log.db*"):
        if not path.is_dir():
            path.unlink()
        elif what == "the wake directory too":
            shutil.rmtree(path)


@pytest.mark.parametrize(
    ("log", "what"),
    [("sqlite", "the file alone"), ("sqlite", "the wake directory too"), ("redis", "the namespace")],
    indirect=["log"],
)
def test_a_log_that_is_deleted_makes_every_client_begin_anew_and_go_on(
    serve: Serve, crowd: Crowd, log: Log, what: str
) -> None:
    server = serve("-k", "gevent", "-w", "2")
    server.wait_for_workers(2)
    followers = crowd.follow_on_each([server], 8, "news")
    with PublishingProcess(log) as publisher:
        publisher.publish("news", "before")
        for follower in followers:
            follower.wait_for_data("before")
        forget(log, what)
        published = [server.post("news", "new 0")[0]]
        for index in range(1, 40):
            data = f"new {index}"
            published.append(publisher.publish("news", data) if index % 2 else server.post("news", data)[0])
    for follower in followers:
        follower.wait_for_data("new 39")
        before, reset, *after = follower.events
        assert before.data == "before"
        assert reset.event == "stream-reset"
        assert json.loads(reset.data) == {"reason": "epoch", "keys": ["news"]}
        # What is before the place that the reset names, it stands for.
        assert [event.id for event in after] == published[number(reset.id) :]
        assert number(reset.id) < len(published)
        assert follower.connections == 1
    # What it was told is a place in the new log.
    late = crowd.follow(server.port, "news", published[0])
    late.wait_for_data("new 39")
    assert late.ids == published[1:]


def connections(process: int, port: int) -> set[int]:
    """Give this end's ports of what connects a process to ``port``."""
    found = psutil.Process(process).net_connections("tcp4")
    return {link.laddr.port for link in found if link.raddr[1:] == (port,)}


def open_files(process: int, name: str) -> set[str]:
    found = set()
    for path in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.add(str(path.readlink()))
    return {path for path in found if name in path}


PRELOADED = {
    # redis-py has imported ssl before gunicorn patches its worker, which gevent warns of.
    "gevent": (("-k", "gevent"), {"PYTHONWARNINGS": "error,ignore:Monkey-patching ssl after ssl"}),
    "gevent, patched by the app": (("-k", "gevent"), {"PATCH": "yes"}),
    "gthread": (("-k", "gthread", "--threads", "40"), {}),
}


@pytest.mark.parametrize("kind", PRELOADED)
def test_workers_share_no_connection_with_a_parent_that_published_before_it_forked(
    serve: Serve, crowd: Crowd, log: Log, kind: str
) -> None:
    options, environment = PRELOADED[kind]
    environment = {**environment, "PUBLISH_AT_IMPORT": "news", "SSE_JOIN_HISTORY": "10"}
    server = serve(*options, "-w", "2", "--preload", **environment)
    server.wait_for_workers(2)
    parents = connections(server.pid, log.redis.port) if log.redis is not None else set()
    for worker in server.workers():
        if log.redis is None:
            wait_for(lambda worker=worker: not open_files(worker, str(log.database)), "no file", DEADLINE)  # type: ignore[misc]
        else:
            assert len(parents) == 1
            wait_for(
                lambda worker=worker: not connections(worker, log.redis.port),  # type: ignore[misc]
                "no connection",
                DEADLINE,
            )
    followers = crowd.follow_on_each([server], 8, "news")
    published = [server.post("news", f"news {index}")[0] for index in range(20)]
    for follower in followers:
        follower.wait_for_data("news 19")
        assert follower.data == [f"imported by {server.pid}", *(f"news {index}" for index in range(20))]
        assert follower.ids[1:] == published
        assert number(follower.ids[0]) == 1
    if log.redis is not None:  # and what the children let go of is whole in their parent
        assert connections(server.pid, log.redis.port) == parents
        for worker in server.workers():
            assert connections(worker, log.redis.port).isdisjoint(parents)


@ON_SQLITE
def test_without_a_common_log_each_forked_worker_has_an_epoch_of_its_own(serve: Serve) -> None:
    server = serve("-k", "gevent", "-w", "2", "--preload", SSE_BROKER_URL="memory://", PUBLISH_AT_IMPORT="news")
    server.wait_for_workers(2)
    epochs: dict[int, set[str]] = {}
    requests = 0
    while len(epochs) < 2:
        assert requests < 5000, "one process gets all the requests"
        requests += 1
        identifier, process = server.post("news", "here")
        epochs.setdefault(process, set()).add(identifier.partition("-")[0])
    one, other = epochs.values()
    assert len(one) == len(other) == 1
    assert one != other


@ON_SQLITE
def test_nothing_stays_of_workers_that_ended_or_were_killed_but_the_database_and_its_wake_directory(
    serve: Serve, crowd: Crowd, log: Log
) -> None:
    server = serve("-k", "gevent", "-w", "2")
    server.wait_for_workers(2)
    with PublishingProcess(log) as publisher:
        crowd.follow_on_each([server], 8, "news")
        workers = server.workers()
        assert sockets(log.database) == workers
        victim = min(workers)
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: victim not in server.workers(), "it is gone", LONG)
        assert victim in sockets(log.database)
        publisher.publish("news", "to the living")
        assert victim not in sockets(log.database)
        server.stop()
        publisher.publish("news", "to nobody")
        assert sockets(log.database) == set()
    left = {path.name for path in log.directory.iterdir()}
    assert {"log.db", "log.db.wake"} <= left <= {"log.db", "log.db-wal", "log.db-shm", "log.db.wake"}


@ON_REDIS
def test_nothing_stays_of_workers_that_ended_or_were_killed_but_the_log_in_its_namespace(
    serve: Serve, crowd: Crowd, log: Log
) -> None:
    assert log.redis is not None
    server = serve("-k", "gevent", "-w", "2")
    server.wait_for_workers(2)
    with log.redis.client() as redis:
        crowd.follow_on_each([server], 8, "news")
        server.post("news", "to all")
        assert len(redis.client_list()) > 1
        os.kill(min(server.workers()), signal.SIGKILL)
        server.stop()
        wait_for(lambda: len(redis.client_list()) == 1, "nobody is connected", DEADLINE)
        prefix = f"{{{log.namespace}}}:"
        assert set(redis.keys(f"{prefix}*")) == {f"{prefix}log", f"{prefix}keys", f"{prefix}k:news"}
