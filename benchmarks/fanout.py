"""How fast, and at what cost, one event reaches all clients of a key, and how many keys of one client each.

    python benchmarks/fanout.py                         about seven minutes
    python benchmarks/fanout.py --clients 1000 --keys 0 --rounds 5 --json fanout.json
    python benchmarks/fanout.py --peers                 other libraries' servers too; what they need is installed

Each run is a fresh server on its own core, N clients in one other process, and two parts: events published
back to back in one request (throughput; with up to 1,000 clients), and events published one at a time (latency,
and what a single delivery costs when nothing can be joined). A run in which not every client got every event
exactly once and in order is an error, not a figure.
"""

from __future__ import annotations

import sys
from statistics import median

from harness import Running, calm, cpu_seconds, deliver, open_all, percentile, reach_all
from load import BenchmarkError, Load
from rounds import Figure, Goal, Report, arguments

BURST_FIGURES = (
    Figure("deliveries_per_second", "back to back: deliveries a second", more_is_better=True),
    Figure("cpu_per_delivery", "back to back: server CPU a delivery, us"),
)
PACED_FIGURES = (
    Figure("paced_cpu_per_delivery", "paced: server CPU a delivery, us"),
    Figure("latency_median", "paced: a client has it, median, ms"),
    Figure("latency_p99", "paced: a client has it, 99th percentile, ms"),
    Figure("last_client_median", "paced: last client has it, median, ms"),
    Figure("last_client_p99", "paced: last client has it, 99th percentile, ms"),
    Figure("publish_call", "paced: one publish call, us"),
)
BURST_GOALS = (Goal("a", "cpu_per_delivery", 0.25, "plain"),)

WARM_UP_EVENTS = 20
BACK_TO_BACK_DELIVERIES = 100_000
# With more, events in a loop measure the same for longer.
BURST_CLIENTS = 1000
# What one event may take at most for it not to meet the next, of the servers that are compared by default.
SECONDS_A_CLIENT = 50e-6


def goals(clients: int) -> tuple[Goal, ...]:
    """With few clients, what there is to do once for an event is most of it: nothing is promised about them."""
    if clients < BURST_CLIENTS:
        return ()
    row = "b" if clients == BURST_CLIENTS else "c"
    paced = (Goal(row, "paced_cpu_per_delivery", 1.2, "plain"), Goal(row, "paced_cpu_per_delivery", 0.85, "nchan"))
    return (*BURST_GOALS, *paced) if row == "b" else paced


def back_to_back_events(clients: int) -> int:
    """Enough for a measurable time: as many deliveries whatever the number of clients, at least 200 events."""
    return min(20_000, max(200, BACK_TO_BACK_DELIVERIES // clients))


def warm_up(server: Running, load: Load, clients: int, size: int, keys: int = 0) -> None:
    """Have each client get some events, so that what is done once is done."""
    reach_all(server, load, keys)
    if not keys:
        deliver(server, load, clients, WARM_UP_EVENTS, 0, size)
    calm(server)


def burst(server: Running, load: Load, clients: int, events: int, size: int) -> dict[str, float]:
    """Events back to back."""
    cpu, load_cpu = server.cpu_seconds(), cpu_seconds(load.pid)
    published, result = deliver(server, load, clients, events, 0, size)
    calm(server)
    cpu, load_cpu = server.cpu_seconds() - cpu, cpu_seconds(load.pid) - load_cpu
    took = (max(result.last) - published.started[0]) / 1e9
    return {
        "burst_delivered": result.delivered,
        "deliveries_per_second": result.delivered / took,
        "cpu_per_delivery": cpu / result.delivered * 1e6,
        "load_busy_percent": load_cpu / took * 100,
    }


def paced(
    server: Running, load: Load, clients: int, events: int, interval: float, size: int, keys: int = 0
) -> dict[str, float]:
    """Events one at a time; with ``keys``, each to so many keys one after the other."""
    cpu = server.cpu_seconds()
    published, result = deliver(server, load, clients, events, interval, size, keys)
    cpu = server.cpu_seconds() - cpu
    last = [(at - start) / 1e6 for at, start in zip(result.last, published.started, strict=True)]
    calls = zip(published.started, published.returned, strict=True)
    latency_median, _, latency_p99, *_ = result.latency
    return {
        "delivered": result.delivered,
        "paced_cpu_per_delivery": cpu / result.delivered * 1e6,
        "latency_median": latency_median / 1e6,
        "latency_p99": latency_p99 / 1e6,
        "last_client_median": median(last),
        "last_client_p99": percentile(last, 99),
        "publish_call": median(end - start for start, end in calls) / 1e3 / (keys or 1),
    }


def main() -> None:
    parser = arguments("Deliveries a second, CPU per delivery and time until clients have an event.")
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[1, 100, 1000, 5000, 10000], help="streams open at a time"
    )
    parser.add_argument("--keys", type=int, default=10000, help="keys with one client each, in a last table; 0: none")
    parser.add_argument(
        "--events", type=int, help="events back to back (default: 100,000 deliveries, at least 200 events)"
    )
    parser.add_argument("--paced-events", type=int, default=20, help="events one at a time")
    parser.add_argument(
        "--interval", type=float, help="seconds between paced events (default: 0.05, with many clients more)"
    )
    parser.add_argument("--size", type=int, default=100, help="bytes of data in an event")
    options = parser.parse_args()
    if min(*options.clients, options.rounds, options.paced_events, options.events or 1, options.keys + 1) < 1:
        parser.error("clients, events and rounds start at 1, keys at 0")
    report = Report("fanout", options, "paced_events", "size", clients=max(*options.clients, options.keys))

    for clients in options.clients:
        events = options.events or back_to_back_events(clients)
        interval = options.interval or max(0.05, clients * SECONDS_A_CLIENT)
        bursts = clients <= BURST_CLIENTS

        def measure(
            server: Running,
            load: Load,
            clients: int = clients,
            events: int = events,
            interval: float = interval,
            bursts: bool = bursts,
        ) -> dict[str, float]:
            open_all(load, server.port, clients)
            warm_up(server, load, clients, options.size)
            figures = burst(server, load, clients, events, options.size) if bursts else {}
            return figures | paced(server, load, clients, options.paced_events, interval, options.size)

        title = f"{clients} clients; {options.paced_events} events of {options.size} bytes every {interval:g} s"
        runs = report.table(
            "a, b" if bursts else "c",
            f"{title}, before that {events} back to back" if bursts else title,
            (*(BURST_FIGURES if bursts else ()), *PACED_FIGURES),
            measure,
            clients=clients,
            goals=goals(clients),
            interval=interval,
            events=events if bursts else 0,
        )
        if bursts:
            busy = max(result["load_busy_percent"] for result in runs.medians().values())
            print(f"\nThe load client used up to {busy:.0f} % of its core, each delivery counted exactly once.")

    if options.keys:
        events, interval = max(1, options.paced_events // 4), options.interval or 1.0

        def measure_keys(server: Running, load: Load) -> dict[str, float]:
            open_all(load, server.port, options.keys, options.keys)
            warm_up(server, load, options.keys, options.size, options.keys)
            return paced(server, load, options.keys, events, interval, options.size, options.keys)

        report.table(
            "i",
            f"{options.keys} keys with one client each; {events} times an event of {options.size} bytes to each key, "
            f"every {interval:g} s",
            PACED_FIGURES,
            measure_keys,
            clients=options.keys,
            interval=interval,
        )


if __name__ == "__main__":
    try:
        main()
    except BenchmarkError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
