"""A publisher reaches the streams of other processes, and is nothing to look after."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fakes import House
from support import ROOT

from flask_sse_stream import BrokerError, EventError, Publisher, SettingsError


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/log.db"


def test_what_it_publishes_reaches_the_streams_of_the_application(url: str) -> None:
    house = House(broker_url=url)
    stream = house.open("jobs")
    with Publisher(url) as publisher:
        ids = [publisher.publish("jobs", {"done": 5}, event="progress"), publisher.publish_all("all")]
    events = house.events(stream)
    assert [event.id for event in events] == ids
    assert [(event.event, event.data) for event in events] == [("progress", '{"done":5}'), (None, "all")]
    house.manager.shutdown()


def test_another_namespace_is_another_log(url: str) -> None:
    house = House(broker_url=url)
    stream = house.open()
    with Publisher(url, "other") as publisher:
        publisher.publish("k", "x")
    assert house.events(stream) == []
    house.manager.shutdown()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://", "'memory://' reaches no other process"),
        ("carrier-pigeon://", "SSE_BROKER_URL must begin with one of"),
        ("sqlite://", "names no file"),
        ("/tmp/log.db", "SSE_BROKER_URL .* must be a URL"),
    ],
)
def test_a_url_that_leads_nowhere_is_refused_at_once(url: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Publisher(url)


def test_a_bad_event_is_refused_before_the_log_is_touched(url: str, tmp_path: Path) -> None:
    publisher = Publisher(url)
    with pytest.raises(EventError, match="^retry must"):
        publisher.publish("k", "x", retry=-1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SettingsError, match="did you mean history_size"):
        Publisher(url, history_sise=5)


def test_threads_may_share_one(url: str) -> None:
    ids: list[str] = []
    # Four that want the same lock all the time may wait for longer than the default on a machine that is busy.
    with Publisher(url, broker_timeout=30) as publisher:
        threads = [
            threading.Thread(target=lambda: ids.extend(publisher.publish("k", "x") for _ in range(50)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(set(ids)) == 200


def test_a_forked_child_may_go_on_using_its_parents(url: str) -> None:
    publisher = Publisher(url)
    first = publisher.publish("k", "parent")
    pid = os.fork()
    if pid == 0:
        ok = False
        try:
            ok = publisher.publish("k", "child") == first[:-1] + "2"
        finally:
            os._exit(0 if ok else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert publisher.publish("k", "parent") == first[:-1] + "3"
    publisher.close()


def test_one_that_is_thrown_away_leaves_no_file_open(url: str) -> None:
    def open_files() -> set[str]:
        return {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}

    publisher = Publisher(url)
    publisher.publish("k", "x")
    path = url.removeprefix("sqlite:///")
    assert path in open_files()
    del publisher
    gc.collect()
    assert path not in open_files()


def test_a_closed_one_says_so(url: str) -> None:
    publisher = Publisher(url)
    publisher.close()
    publisher.close()
    with pytest.raises(BrokerError, match="is closed"):
        publisher.publish("k", "x")


def test_it_needs_neither_flask_nor_gevent(url: str) -> None:
    script = (
        "import sys\n"
        "for name in ('flask', 'gevent', 'werkzeug'):\n"
        "    sys.modules[name] = None\n"
        "from flask_sse_stream import Publisher\n"
        f"print(Publisher({url!r}).publish('k', 'x'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    assert (done.stdout.strip()[-2:], done.stderr) == ("-1", "")
