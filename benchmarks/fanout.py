"""How fast, and at what cost, one event reaches all clients of a key.

    python benchmarks/fanout.py                         about two minutes
    python benchmarks/fanout.py --clients 5000 --rounds 5 --json fanout.json

Each run is a fresh server on its own core, N clients in one other process, and two parts: events published
back to back in one request (throughput), and events published one at a time (latency, and what a single
delivery costs when nothing can be joined). A run in which not every client got every event exactly once is
an error, not a figure.
"""

from __future__ import annotations

import sys
from statistics import median

from harness import (
    SERVERS,
    Cores,
    Figure,
    Running,
    allow_files,
    arguments,
    cpu_seconds,
    machine,
    medians,
    open_all,
    percentile,
    print_table,
    running,
    write_json,
)
from load import BenchmarkError, Load, Round, build

FIGURES = (
    Figure("deliveries_per_second", "back to back: deliveries a second", more_is_better=True),
    Figure("cpu_per_delivery", "back to back: server CPU a delivery, us"),
    Figure("paced_cpu_per_delivery", "paced: server CPU a delivery, us"),
    Figure("last_client_median", "paced: last client has it, median, ms"),
    Figure("last_client_p99", "paced: last client has it, 99th percentile, ms"),
    Figure("publish_call", "paced: one publish call, us"),
)

WARM_UP_EVENTS = 20
BACK_TO_BACK_DELIVERIES = 100_000
ROUND_SECONDS = 120.0


def back_to_back_events(clients: int) -> int:
    """Enough for a measurable time: as many deliveries whatever the number of clients, at least 200 events."""
    return min(20_000, max(200, BACK_TO_BACK_DELIVERIES // clients))


def check(result: Round, clients: int, events: int) -> None:
    """Refuse figures of a run that lost or doubled something."""
    if (result.clients, result.ended, result.least, result.most) != (clients, 0, events, events):
        raise BenchmarkError(
            f"{clients} clients were to get {events} events each; they got {result.least} to {result.most}, "
            f"{result.delivered} in all, and {result.ended} of {result.clients} streams ended."
        )


def measure(
    server: Running, load: Load, clients: int, events: int, paced_events: int, interval: float, size: int
) -> dict[str, float]:
    """One run on a server that was just started."""
    open_all(load, server.port, clients)

    load.expect(WARM_UP_EVENTS, ROUND_SECONDS)
    server.publish(WARM_UP_EVENTS, interval=0, size=size)
    check(load.round(), clients, WARM_UP_EVENTS)

    load.expect(events, ROUND_SECONDS)
    cpu, load_cpu = server.cpu_seconds(), cpu_seconds(load.pid)
    published = server.publish(events, interval=0, size=size, seconds=ROUND_SECONDS)
    burst = load.round()
    cpu, load_cpu = server.cpu_seconds() - cpu, cpu_seconds(load.pid) - load_cpu
    check(burst, clients, events)
    took = (max(burst.last) - published.started[0]) / 1e9

    load.expect(paced_events, ROUND_SECONDS + paced_events * interval)
    paced_cpu = server.cpu_seconds()
    paced_published = server.publish(paced_events, interval, size, seconds=ROUND_SECONDS)
    paced = load.round()
    paced_cpu = server.cpu_seconds() - paced_cpu
    check(paced, clients, paced_events)
    last = [(at - start) / 1e6 for at, start in zip(paced.last, paced_published.started, strict=True)]
    calls = zip(paced_published.started, paced_published.returned, strict=True)

    return {
        "delivered": burst.delivered + paced.delivered,
        "deliveries_per_second": burst.delivered / took,
        "cpu_per_delivery": cpu / burst.delivered * 1e6,
        "paced_cpu_per_delivery": paced_cpu / paced.delivered * 1e6,
        "last_client_median": median(last),
        "last_client_p99": percentile(last, 99),
        "publish_call": median(end - start for start, end in calls) / 1e3,
        "load_busy_percent": load_cpu / took * 100,
    }


def main() -> None:
    parser = arguments("Deliveries a second, CPU per delivery and time until the last client has an event.")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 100, 1000], help="streams open at a time")
    parser.add_argument(
        "--events", type=int, help="events back to back (default: 100,000 deliveries, at least 200 events)"
    )
    parser.add_argument("--paced-events", type=int, default=100, help="events one at a time")
    parser.add_argument("--interval", type=float, default=0.05, help="seconds between paced events")
    parser.add_argument("--size", type=int, default=100, help="bytes of data in an event")
    options = parser.parse_args()
    if min(*options.clients, options.rounds, options.paced_events, options.events or 1, 10**9) < 1:
        parser.error("clients, events and rounds start at 1")
    allow_files(max(options.clients))
    build()  # before anything is started: a missing compiler shall be told at once
    cores = Cores.choose()
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    if cores.server is None:
        print("Only one core is available: server and load share it, so these are not figures to quote.")

    tables = []
    for clients in options.clients:
        events = options.events or back_to_back_events(clients)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in options.servers}
        # The servers take turns, so that what else the machine does meets all of them.
        for _ in range(options.rounds):
            for name in options.servers:
                with running(SERVERS[name], cores.server) as server, Load(cores.load) as load:
                    runs[name].append(
                        measure(server, load, clients, events, options.paced_events, options.interval, options.size)
                    )
        results = {name: medians(of_server) for name, of_server in runs.items()}
        print_table(
            f"{clients} clients; {events} events of {options.size} bytes back to back, then "
            f"{options.paced_events} every {options.interval} s; medians of {options.rounds} runs",
            FIGURES,
            results,
        )
        busy = max(result["load_busy_percent"] for result in results.values())
        print(f"\nThe load client used up to {busy:.0f} % of its core, each delivery counted exactly once.")
        tables.append({"clients": clients, "events": events, "medians": results, "runs": runs})
    settings = {name: getattr(options, name) for name in ("rounds", "paced_events", "interval", "size")}
    write_json(options.json, {"benchmark": "fanout", **settings, "tables": tables})


if __name__ == "__main__":
    try:
        main()
    except BenchmarkError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
