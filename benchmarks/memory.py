"""What an idle client costs: memory of the server's process, the opening of its stream, heartbeats.

    python benchmarks/memory.py                         about seven minutes
    python benchmarks/memory.py --clients 10000 --rounds 5 --json memory.json

Each run is a fresh server on its own core. A few streams are opened first and stay, so that what a server loads
or allocates once is not counted; then N are opened and left alone. With the greatest N that is long enough for
two heartbeats of each, at the interval that servers come with; the others are left alone for a moment. Only the
memory of the process is counted, not what the kernel keeps for a connection.
"""

from __future__ import annotations

import sys
import time

from harness import Running, deliver, open_all
from load import BenchmarkError, Load
from rounds import Figure, Goal, Report, arguments

FIGURES = (
    Figure("bytes_per_client", "resident memory of an idle client, bytes"),
    Figure("opening_seconds", "time until all are open, s"),
    Figure("opening_cpu", "server CPU to open a stream, us"),
    Figure("heartbeat_percent", "heartbeats: percent of a core"),
    Figure("heartbeat_cpu", "server CPU of one heartbeat to one client, us"),
)
MANY = 10_000
OPENING_GOAL = Goal("e", "opening_seconds", 0.7, "handwritten")
# What holds with ten thousand; with fewer, what a process needs once is a greater part of it.
GOALS_OF_MANY = (Goal("d", "bytes_per_client", 2048), Goal("h", "heartbeat_percent", 1.0))

WARM_UP_CLIENTS = 20
WARM_UP_SECONDS = 0.5
MOMENT_SECONDS = 2.0


def measure(server: Running, load: Load, clients: int, ping_seconds: float, intervals: int) -> dict[str, float]:
    """One run on a server that was just started; with ``intervals``, heartbeats are measured for so many."""
    open_all(load, server.port, WARM_UP_CLIENTS)
    time.sleep(WARM_UP_SECONDS)

    rss, cpu = server.rss(), server.cpu_seconds()
    opening_seconds = open_all(load, server.port, clients)
    opening_cpu = server.cpu_seconds() - cpu

    if not intervals:
        time.sleep(MOMENT_SECONDS)
    # Whole intervals: whenever in it a client's heartbeat comes, it comes as many times.
    cpu, since = server.cpu_seconds(), time.monotonic()
    time.sleep(intervals * ping_seconds)
    heartbeat_cpu, took = server.cpu_seconds() - cpu, time.monotonic() - since
    idle_rss = server.rss()

    # The streams that were measured are still there and work: one event reaches every one of them once.
    _, reached = deliver(server, load, clients + WARM_UP_CLIENTS, 1)

    figures = {
        "delivered": reached.delivered,
        "bytes_per_client": (idle_rss - rss) / clients,
        "opening_seconds": opening_seconds,
        "opening_cpu": opening_cpu / clients * 1e6,
    }
    if intervals:
        figures["heartbeat_percent"] = heartbeat_cpu / took * 100
        figures["heartbeat_cpu"] = heartbeat_cpu / (reached.clients * took / ping_seconds) * 1e6
    return figures


def main() -> None:
    parser = arguments("Memory, opening and heartbeats of idle clients.")
    parser.add_argument("--clients", type=int, nargs="+", default=[1000, 5000, 10000], help="streams open at a time")
    parser.add_argument("--ping-seconds", type=float, default=10.0, help="seconds between heartbeats")
    parser.add_argument("--intervals", type=int, default=2, help="of heartbeats that are measured")
    options = parser.parse_args()
    if min(*options.clients, options.rounds, options.intervals) < 1 or options.ping_seconds <= 0:
        parser.error("clients, rounds and intervals start at 1, and seconds above 0")
    report = Report("memory", options, "ping_seconds", "intervals", clients=max(options.clients) + WARM_UP_CLIENTS)

    for clients in options.clients:
        intervals = options.intervals if clients == max(options.clients) else 0

        def run(server: Running, load: Load, clients: int = clients, intervals: int = intervals) -> dict[str, float]:
            return measure(server, load, clients, options.ping_seconds, intervals)

        title = f"{clients} idle clients"
        report.table(
            "d, e, h" if intervals else "d, e",
            f"{title}, a heartbeat every {options.ping_seconds:g} s" if intervals else title,
            FIGURES,
            run,
            clients=clients,
            ping_seconds=options.ping_seconds,
            goals=(OPENING_GOAL, *(GOALS_OF_MANY if clients >= MANY else ())),
        )


if __name__ == "__main__":
    try:
        main()
    except BenchmarkError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
