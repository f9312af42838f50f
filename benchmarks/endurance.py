"""Whether as many clients as a process may have are served for long: nothing lost, and no memory with it.

    python benchmarks/endurance.py                      about eleven minutes a server
    python benchmarks/endurance.py --minutes 60 --servers ours-gunicorn --json endurance.json

All clients are on one process, and an event is published every second. At the end each must have had every event
once and in order. The resident memory of the server is sampled all the while; it starts to count when the first
events have been sent, because what there is once per process is there by then.
"""

from __future__ import annotations

import sys
import threading
import time

from harness import Running, deliver, open_all, reach_all
from load import BenchmarkError, Load, Round
from rounds import OURS, Figure, Goal, Report, arguments

FIGURES = (
    Figure("delivered", "deliveries, each once and in order", more_is_better=True),
    Figure("lost", "events lost or doubled"),
    Figure("opening_seconds", "time until all are open, s"),
    Figure("opened_megabytes", "resident memory when all are open, MB"),
    Figure("start_megabytes", "resident memory at the start, MB"),
    Figure("middle_megabytes", "resident memory in the middle, MB"),
    Figure("end_megabytes", "resident memory at the end, MB"),
    Figure("most_megabytes", "resident memory, the most of the samples, MB"),
    Figure("growth", "memory at the end, of that at the start"),
    Figure("cpu_percent", "server CPU, percent of a core"),
    Figure("cpu_per_delivery", "server CPU a delivery, us"),
    Figure("latency_median", "a client has an event, median, ms"),
    Figure("latency_p999", "a client has an event, 99.9th percentile, ms"),
    Figure("latency_most", "a client has an event, the last of all, ms"),
)
GOALS = (Goal("endurance", "lost", 0), Goal("endurance", "growth", 1.05))

WARM_UP_EVENTS = 20
SAMPLES = 100


def measure(server: Running, load: Load, clients: int, minutes: float, interval: float, size: int) -> dict[str, float]:
    """One run on a server that was just started."""
    opening_seconds = open_all(load, server.port, clients)
    opened = server.rss()
    reach_all(server, load)
    deliver(server, load, clients, WARM_UP_EVENTS, min(interval, 0.25), size)

    events = max(1, round(minutes * 60 / interval))
    outcomes: list[Round | BenchmarkError] = []

    def publish() -> None:
        try:
            outcomes.append(deliver(server, load, clients, events, interval, size)[1])
        except BenchmarkError as error:
            outcomes.append(error)

    publisher = threading.Thread(target=publish, daemon=True)
    cpu, since = server.cpu_seconds(), time.monotonic()
    samples = [server.rss()]
    publisher.start()
    while publisher.is_alive():
        publisher.join(max(0.05, events * interval / SAMPLES))
        samples.append(server.rss())
    cpu, took = server.cpu_seconds() - cpu, time.monotonic() - since
    (result,) = outcomes
    if isinstance(result, BenchmarkError):
        raise result
    return {
        "delivered": result.delivered,
        "lost": result.lost + result.doubled,
        "opening_seconds": opening_seconds,
        "opened_megabytes": opened / 1e6,
        "start_megabytes": samples[0] / 1e6,
        "middle_megabytes": samples[len(samples) // 2] / 1e6,
        "end_megabytes": samples[-1] / 1e6,
        "most_megabytes": max(samples) / 1e6,
        "growth": samples[-1] / samples[0],
        "cpu_percent": cpu / took * 100,
        "cpu_per_delivery": cpu / result.delivered * 1e6,
        "latency_median": result.latency[0] / 1e6,
        "latency_p999": result.latency[3] / 1e6,
        "latency_most": result.latency[4] / 1e6,
    }


def main() -> None:
    parser = arguments("Many clients for a long time.", default=[OURS])
    parser.add_argument("--clients", type=int, default=18_000, help="streams open at a time")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long events are published")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between events")
    parser.add_argument("--size", type=int, default=100, help="bytes of data in an event")
    parser.set_defaults(rounds=1)
    options = parser.parse_args()
    if min(options.clients, options.rounds) < 1 or min(options.minutes, options.interval) <= 0:
        parser.error("clients and rounds start at 1, minutes and the interval above 0")
    report = Report("endurance", options, "minutes", "interval", "size", clients=options.clients)

    def run(server: Running, load: Load) -> dict[str, float]:
        return measure(server, load, options.clients, options.minutes, options.interval, options.size)

    report.table(
        "endurance",
        f"{options.clients} clients, an event every {options.interval:g} s for {options.minutes:g} minutes",
        FIGURES,
        run,
        clients=options.clients,
        goals=GOALS,
    )


if __name__ == "__main__":
    try:
        main()
    except BenchmarkError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
