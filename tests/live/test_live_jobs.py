"""Jobs over several workers: started in one, read in another, cancelled from anywhere, and lost with their process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import httpx
import pytest
from clients import Listener
from support import wait_for
from workers import LONG, Workers

pytestmark = pytest.mark.live

Serve = Callable[..., Workers]


class Jobs:
    """Jobs of one server's workers, which are read through these or through those of another one."""

    def __init__(self, here: Workers, there: Workers) -> None:
        self.here = here
        self.there = there
        self.readers: list[Listener] = []

    def ask(self, method: str, path: str, server: Workers | None = None, **options: object) -> httpx.Response:
        url = f"{(server or self.here).url}{path}"
        return httpx.request(method, url, timeout=LONG, trust_env=False, **options)  # type: ignore[arg-type]

    def start(self, most: int) -> tuple[str, int]:
        """Give a new job's id and the process that works on it."""
        answer = self.ask("POST", f"/jobs/{most}")
        assert answer.status_code == 200, answer.text
        return answer.text, int(answer.headers["X-Process"])

    def read(self, id: str, cursor: str = "", server: Workers | None = None) -> Listener:
        headers = {"Last-Event-ID": cursor} if cursor else {}
        reader = Listener(f"{(server or self.here).url}/jobs/{id}", headers=headers)
        reader.__enter__()
        self.readers.append(reader)
        return reader


@pytest.fixture
def jobs(request: pytest.FixtureRequest, serve: Serve) -> Iterator[Jobs]:
    options = request.param
    here, there = (
        serve(*options, "-w", workers, app="jobs_app:app", SSE_JOB_LEASE="4", SSE_RETRY="50") for workers in "21"
    )
    here.wait_for_workers(2)
    jobs = Jobs(here, there)
    yield jobs
    for reader in jobs.readers:
        reader.leave()


def numbers(reader: Listener) -> list[int]:
    return [int(event.data) for event in reader.events if event.event == "message"]


def ends(reader: Listener) -> list[tuple[str, str, str]]:
    return [(event.event, event.data, event.id) for event in reader.events if event.event != "message"]


@pytest.mark.parametrize(
    ("log", "jobs"),
    [("sqlite", ("-k", "gthread", "--threads", "20")), ("redis", ("-k", "gevent"))],
    indirect=True,
    ids=["threads on SQLite", "gevent on Redis"],
)
def test_a_job_is_started_in_one_process_and_read_cancelled_and_lost_in_others(jobs: Jobs) -> None:
    # Read elsewhere, from its beginning to its end, and by a page that is reloaded now and then.
    id, _ = jobs.start(60)
    elsewhere = jobs.read(id, server=jobs.there)
    seen: list[int] = []
    cursor, last = "", []
    while not last:
        reader = jobs.read(id, cursor)
        wait_for(lambda reader=reader: len(numbers(reader)) >= 15 or ends(reader), "it goes on", LONG)  # type: ignore[misc]
        reader.leave()
        seen += numbers(reader)
        cursor, last = reader.events[-1].id, ends(reader)
    assert seen == list(range(60))
    wait_for(lambda: ends(elsewhere), "it ends elsewhere too", LONG)
    assert numbers(elsewhere) == seen
    assert ends(elsewhere) == last == [("done", "", "end")]
    elsewhere.wait_for_end()

    # Over: replayed once, then not asked for again.
    late = jobs.read(id)
    late.wait_for_end()
    assert numbers(late) == seen
    assert jobs.ask("GET", f"/jobs/{id}", headers={"Last-Event-ID": "end"}).status_code == 204

    # What is nobody's, and what is somebody else's.
    assert jobs.ask("GET", "/jobs/nobodys").status_code == 404
    assert jobs.ask("GET", f"/jobs/{id}?user=mallory").status_code == 403

    # Cancelled from the other process: the generator is closed.
    id, _ = jobs.start(100_000)
    reader = jobs.read(id, server=jobs.there)
    wait_for(lambda: numbers(reader), "it runs", LONG)
    closed = jobs.here.log.count("the generator was closed")
    assert jobs.ask("DELETE", f"/jobs/{id}", jobs.there).text == "True"
    wait_for(lambda: ends(reader), "its reader is told", LONG)
    assert ends(reader) == [("cancelled", "", "end")]
    wait_for(lambda: jobs.here.log.count("the generator was closed") > closed, "it is closed", LONG)

    # Its worker is told to stop: it tells readers itself.
    id, worker = jobs.start(100_000)
    reader = jobs.read(id, server=jobs.there)
    wait_for(lambda: numbers(reader), "it runs", LONG)
    os.kill(worker, signal.SIGTERM)
    wait_for(lambda: ends(reader), "its reader is told", LONG)
    assert ends(reader) == [("failed", "interrupted", "end")]
    assert f"the job {id!r} has failed: its process ends" in jobs.here.log
    jobs.here.wait_for_workers(2)

    # Its worker is killed: readers are told, here, there and later.
    id, worker = jobs.start(100_000)
    reader, beside = jobs.read(id, server=jobs.there), jobs.read(id)
    wait_for(lambda: numbers(reader) and numbers(beside), "it runs", LONG)
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: ends(reader), "its reader is told", LONG)
    assert ends(reader) == [("failed", "interrupted", "end")]
    assert numbers(reader) == list(range(len(numbers(reader))))
    assert f"the job {id!r} has failed: its producer was not heard of" in jobs.here.log + jobs.there.log
    late = jobs.read(id, beside.events[-1].id if not ends(beside) else "")
    late.wait_for_end()
    assert ends(late) == ends(reader)
    jobs.here.wait_for_workers(2)
