"""The contract of jobs over a broker: two processes, of which one works and the other reads.

A test class inherits it and says how the pool managers of two processes are made.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator

import pytest

from ...errors import JobClosed
from ...jobs import Job, JobState
from ...keeper import Keeper
from ...keys import JobKey
from ...stream import CloseReason, Stream
from ..house import House
from ..waiting import wait_for

Said = list[tuple[str | None, str | None]]


class JobContract:
    """Inherit it and override ``house``."""

    def house(self, **options: object) -> House:
        """Give a process's pool manager; of one log, as often as it is called in a test."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _end_houses(self) -> Iterator[None]:
        self.houses: list[House] = []
        yield
        for house in self.houses:
            house.manager.shutdown()

    def two(self, **options: object) -> tuple[House, House]:
        """Give where a job is worked on, and where it is read."""
        self.houses = [self.house(**options)]
        if self.houses[0].manager.reaches_other_processes:
            self.houses.append(self.house(**options))
        return self.houses[0], self.houses[-1]

    @staticmethod
    def read(house: House, stream: Stream, until: str) -> Said:
        """What a reader is given up to an event with this data."""
        found: Said = []

        def has_it() -> bool:
            found.extend((event.event, event.data) for event in house.events(stream))
            return any(data == until for _, data in found)

        wait_for(has_it, f"{until!r} comes")
        return found

    def test_a_job_is_read_elsewhere_from_its_beginning_to_its_end(self) -> None:
        here, there = self.two()
        with Job(here.manager, "work") as work:
            work.send("one")
            stream = there.open(JobKey.of("work"))
            work.send("two", event="step")
            assert self.read(there, stream, "two") == [(None, "one"), ("step", "two")]
            work.done("all")
        whole = [(None, "one"), ("step", "two"), ("done", "all")]
        late = there.open(JobKey.of("work"))
        assert self.read(there, late, "all") == whole
        wait_for(lambda: there.flush() is None or stream.closed, "the one that followed it is ended")
        assert (stream.reason, late.reason) == (CloseReason.ENDED, CloseReason.ENDED)
        assert Job(there.manager, "work").state is Job(here.manager, "work").state is JobState.DONE

    def test_what_one_process_has_said_is_known_in_another_as_soon_as_it_is_asked(self) -> None:
        here, there = self.two()
        for number in range(50):
            opened, read = Job(here.manager, f"work {number}"), Job(there.manager, f"work {number}")
            assert read.state is None
            assert not read.follow(), "and from here on it listens for it"
            assert opened.open()
            assert read.follow(), "or a browser that comes at once is answered 404 and gives up"
            assert opened.state is Job(here.manager, f"work {number}").state is JobState.WAITING

    def test_a_reader_that_moves_to_another_process_has_each_event_once(self) -> None:
        here, there = self.two()
        work = Job(here.manager, "work")
        found, cursor = [], ""
        for number in range(30):
            work.send(str(number))
            house = (here, there)[number % 2]
            stream = house.open(JobKey.of("work"), after=cursor)
            found += self.read(house, stream, str(number))
            cursor = house.cursor(stream)
            stream.close(CloseReason.PEER)
        assert found == [(None, str(number)) for number in range(30)]

    def test_work_that_is_started_in_two_processes_runs_once(self) -> None:
        here, there = self.two()
        ran: list[str] = []
        release = threading.Event()

        def work(this: Job, where: str) -> None:
            ran.append(where)
            assert release.wait(30)

        answers = [
            Job(house.manager, "work").start(work, where)
            for house, where in ((here, "here"), (there, "there"), (here, "again"))
        ]
        release.set()
        wait_for(lambda: Job(there.manager, "work").state is JobState.DONE, "it is done")
        assert not Job(there.manager, "work").start(work, "afterwards")
        assert (answers, ran) == ([True, False, False], ["here"])

    def test_cancelling_elsewhere_stops_the_work_here(self) -> None:
        here, there = self.two()
        stopped = threading.Event()

        def tick() -> Iterator[str]:
            try:
                while True:
                    yield "tick"
                    stopped.wait(0.02)
            finally:
                stopped.set()

        assert Job(here.manager, "work").start(tick())
        stream = there.open(JobKey.of("work"))
        self.read(there, stream, "tick")
        assert Job(there.manager, "work").cancel()
        assert self.read(there, stream, "")[-1] == ("cancelled", "")
        wait_for(stopped.is_set, "the generator is closed")
        assert not Job(here.manager, "work").cancel()
        with pytest.raises(JobClosed):
            Job(here.manager, "work").run([])

    def test_readers_elsewhere_are_told_of_a_producer_that_died(self) -> None:
        here, there = self.two(job_lease=0.5)
        work = Job(here.manager, "work")
        work._begin(fresh=True)
        work.send("half")
        Keeper.of(here.manager)._producers.clear()  # as if its process had been killed
        stream = there.open(JobKey.of("work"))
        assert Job(there.manager, "work").follow()
        assert self.read(there, stream, "interrupted") == [(None, "half"), ("failed", "interrupted")]
        assert Job(here.manager, "work").state is JobState.FAILED

    def test_a_job_is_kept_whole_while_it_speaks_and_gone_when_it_has_not_for_long(self) -> None:
        here, there = self.two(job_ttl=1.0, history_ttl=0.001)
        jobs: list[Job] = []

        def is_whole() -> bool:
            work = Job(here.manager, f"work {len(jobs)}")
            jobs.append(work)
            moments = [time.monotonic()]
            sent: list[str] = []
            while moments[-1] < moments[0] + 1.2:
                sent.append(work.send("still here"))
                time.sleep(0.05)
                moments.append(time.monotonic())
            found = [message.id for message in there.manager.look(work.key)][1:]
            moments.append(time.monotonic())
            if any(later - earlier > 0.8 for earlier, later in itertools.pairwise(moments)):
                return False  # on a machine that is slower than the job is kept: another attempt
            assert found == sent
            return True

        wait_for(is_whole, "it was read in time", 60)
        wait_for(lambda: Job(there.manager, jobs[-1].id).state is None, "it is gone")

    def test_a_job_that_says_more_than_is_kept_says_so_to_whoever_comes_late(self) -> None:
        here, there = self.two(job_events=20)
        work = Job(here.manager, "work")
        for number in range(60):
            work.send(str(number))
        found = self.read(there, there.open(JobKey.of("work")), "59")
        assert found[0] == ("stream-reset", json.dumps({"reason": "history", "keys": ["work"]}))
        assert found[1:] == [(None, str(number)) for number in range(40, 60)]

    def test_what_is_said_after_the_end_reaches_nobody(self) -> None:
        here, there = self.two()
        work = Job(here.manager, "work")
        work.send("one")
        stream = there.open(JobKey.of("work"))
        Job(there.manager, "work").failed("no")
        work.send("too late")
        whole = [(None, "one"), ("failed", "no")]
        assert self.read(there, stream, "no") == whole
        for house in (here, there):
            assert self.read(house, house.open(JobKey.of("work")), "no") == whole
