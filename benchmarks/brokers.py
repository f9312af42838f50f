"""How many events a second each broker takes, and how long one is on its way from another process to a client.

    python benchmarks/brokers.py                        about two minutes
    python benchmarks/brokers.py --servers flask-sse ours-redis --rounds 9 --json brokers.json

Each run is a fresh store and a fresh server with one client, and three parts: one process publishes in a loop, four
do so at once, and one publishes at a steady pace, which gives the latency. With ``memory://``, which reaches no
other process, the server itself publishes. The kernel is left to place the processes on the cores. A run in which
the client did not get every event exactly once is an error, not a figure.
"""

from __future__ import annotations

import contextlib
import sys
from statistics import median

import stores
from harness import KEY, SERVERS, Published, Running, machine, open_all, percentile, running
from load import BenchmarkError, Load, build
from publisher import Publisher
from rounds import Figure, arguments, print_table, take_turns, write_json

FIGURES = (
    Figure("one_publisher", "publishes a second, one publisher", more_is_better=True),
    Figure("several_publishers", "publishes a second, four at once", more_is_better=True),
    Figure("publish_call", "paced: one publish call, us"),
    Figure("latency_median", "paced: client has it, median, ms"),
    Figure("latency_p99", "paced: client has it, 99th percentile, ms"),
)
CHOICES = ("flask-sse", "ours-memory", "ours-sqlite", "ours-redis", "pubsub", "xread")
DEFAULT = ("flask-sse", "ours-memory", "ours-sqlite", "ours-redis", "pubsub")

PUBLISHERS = 4
WARM_UP_EVENTS = 20
WARM_UP_TRIES = 50
ROUND_SECONDS = 60.0


class Feed:
    """How a run's server is fed: by processes of their own or, where no other process can, by itself."""

    def __init__(self, server: Running, publishers: list[Publisher], size: int) -> None:
        self._server = server
        self._publishers = publishers
        self._size = size

    @property
    def publishers(self) -> int:
        """How many can publish at once."""
        return len(self._publishers) or 1

    def publish(self, events: int, interval: float = 0, publishers: int = 1) -> list[Published]:
        """Publish ``events`` events in all and return when that is done."""
        if not self._publishers:
            return [self._server.publish(events, interval, self._size, ROUND_SECONDS)]
        at_work = self._publishers[:publishers]
        for publisher in at_work:
            publisher.begin([KEY], events // publishers, interval, self._size, ROUND_SECONDS)
        return [publisher.finish() for publisher in at_work]


def warm_up(feed: Feed, load: Load) -> None:
    """Publish until the client gets it: with Flask-SSE it may have had its first bytes before it is subscribed."""
    for _ in range(WARM_UP_TRIES):
        load.expect(1, seconds=0.5, settle=0.05)
        feed.publish(1)
        if load.round().least:
            break
    counted(feed, load, WARM_UP_EVENTS)
    # Each opens its connection with the first event.
    counted(feed, load, WARM_UP_EVENTS * feed.publishers, publishers=feed.publishers)


def counted(
    feed: Feed, load: Load, events: int, interval: float = 0, publishers: int = 1
) -> tuple[list[Published], list[int]]:
    """Publish events, and give the calls and the times at which the client had each; exactly once, or an error."""
    load.expect(events, ROUND_SECONDS + events * interval)
    published = feed.publish(events, interval, publishers)
    result = load.round()
    if (result.clients, result.ended, result.least, result.most) != (1, 0, events, events):
        ended = ", and its stream ended" if result.ended else ""
        raise BenchmarkError(f"The client was to get {events} events; it got {result.delivered}{ended}.")
    return published, result.last


def a_second(published: list[Published]) -> float:
    """Publishes a second, from the beginning of the first call to the return of the last."""
    took = max(of_one.returned[-1] for of_one in published) - min(of_one.started[0] for of_one in published)
    return sum(len(of_one.started) for of_one in published) / took * 1e9


def measure(feed: Feed, load: Load, events: int, paced_events: int, interval: float) -> dict[str, float]:
    """One run on a server that was just started and has one client."""
    warm_up(feed, load)
    figures = {}
    published, _ = counted(feed, load, events)
    figures["one_publisher"] = a_second(published)
    if feed.publishers == PUBLISHERS:
        published, _ = counted(feed, load, events // PUBLISHERS * PUBLISHERS, publishers=PUBLISHERS)
        figures["several_publishers"] = a_second(published)
    (paced,), arrived = counted(feed, load, paced_events, interval)
    latency = [(at - start) / 1e6 for at, start in zip(arrived, paced.started, strict=True)]
    calls = zip(paced.started, paced.returned, strict=True)
    figures["publish_call"] = median(end - start for start, end in calls) / 1e3
    figures["latency_median"] = median(latency)
    figures["latency_p99"] = percentile(latency, 99)
    return figures


def run(name: str, events: int, paced_events: int, interval: float, size: int) -> dict[str, float]:
    """One run with a fresh store, server, client and publishers."""
    server = SERVERS[name]
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(stores.opened(server.store))
        started = stack.enter_context(running(server, store_url=store.url))
        count = PUBLISHERS if server.publisher else 0
        publishers = [stack.enter_context(Publisher(server.publisher, store.url)) for _ in range(count)]
        load = stack.enter_context(Load())
        open_all(load, started.port, 1)
        return measure(Feed(started, publishers, size), load, events, paced_events, interval)


def main() -> None:
    parser = arguments("Publishes a second, and latency from process to process.", CHOICES, DEFAULT)
    parser.add_argument("--events", type=int, default=2000, help="events in a loop")
    parser.add_argument("--paced-events", type=int, default=400, help="events one at a time")
    parser.add_argument("--interval", type=float, default=0.005, help="seconds between paced events")
    parser.add_argument("--size", type=int, default=100, help="bytes of data in an event")
    options = parser.parse_args()
    if min(options.rounds, options.paced_events) < 1 or options.events < PUBLISHERS:
        parser.error(f"rounds and paced events start at 1, events at {PUBLISHERS}")
    stores.check({SERVERS[name].store for name in options.servers})
    build()  # before anything is started: a missing compiler shall be told at once
    print(", ".join(f"{name} {value}" for name, value in machine().items()))

    runs = take_turns(
        options.servers,
        options.rounds,
        lambda name: run(name, options.events, options.paced_events, options.interval, options.size),
    )
    results = runs.medians()
    print_table(
        f"one client; {options.events} events of {options.size} bytes in a loop, then {options.paced_events} every "
        f"{options.interval} s; medians of {options.rounds} runs",
        FIGURES,
        results,
    )
    for name, reason in runs.absent.items():
        print(f"\nWithout {SERVERS[name].label}: {reason}")
    print("\nEach event was counted exactly once.")
    settings = {name: getattr(options, name) for name in ("rounds", "events", "paced_events", "interval", "size")}
    tables = [{"medians": results, "runs": runs.of, "absent": runs.absent}]
    write_json(options.json, {"machine": machine(), "benchmark": "brokers", **settings, "tables": tables})


if __name__ == "__main__":
    try:
        main()
    except BenchmarkError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
