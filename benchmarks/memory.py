"""What an idle client costs: memory of the server's process, heartbeats, and the opening of its stream.

    python benchmarks/memory.py                         about two minutes
    python benchmarks/memory.py --clients 10000 --rounds 5 --json memory.json

Each run is a fresh server on its own core. A few streams are opened and closed first, so that what a server
loads or allocates once is not counted; then N are opened and left alone for some heartbeats of one a second.
Only the memory of the process is counted, not what the kernel keeps for a connection.
"""

from __future__ import annotations

import sys
import time

from harness import (
    SERVERS,
    Cores,
    Figure,
    Running,
    allow_files,
    arguments,
    machine,
    medians,
    open_all,
    print_table,
    running,
    write_json,
)
from load import BenchmarkError, Load, build

FIGURES = (
    Figure("bytes_per_client", "resident memory of an idle client, bytes"),
    Figure("opened_per_second", "streams opened a second", more_is_better=True),
    Figure("opening_cpu", "server CPU to open a stream, us"),
    Figure("heartbeat_cpu", "server CPU of one heartbeat to one client, us"),
)

WARM_UP_CLIENTS = 20
PING_SECONDS = 1.0
# A server notices that the streams of the warm-up are gone at its next heartbeat or the one after it.
WARM_UP_SECONDS = 2.5 * PING_SECONDS


def measure(server: Running, load: Load, clients: int, seconds: float) -> dict[str, float]:
    """One run on a server that was just started."""
    open_all(load, server.port, WARM_UP_CLIENTS)
    load.close_streams()
    time.sleep(WARM_UP_SECONDS)

    rss, cpu = server.rss(), server.cpu_seconds()
    opening_seconds = open_all(load, server.port, clients)
    opening_cpu = server.cpu_seconds() - cpu

    time.sleep(PING_SECONDS)  # the first heartbeats, still in the rhythm of the opening
    cpu, since = server.cpu_seconds(), time.monotonic()
    time.sleep(seconds)
    heartbeats = clients * (time.monotonic() - since) / PING_SECONDS
    heartbeat_cpu = server.cpu_seconds() - cpu
    idle_rss = server.rss()

    # The streams that were measured are still there and work: one event reaches every one of them once.
    load.expect(events=1)
    server.publish(events=1, interval=0, size=100)
    reached = load.round()
    if (reached.clients, reached.delivered, reached.least) != (clients, clients, 1):
        raise BenchmarkError(f"Only {reached.delivered} of {clients} idle streams got the event at the end.")

    return {
        "delivered": reached.delivered,
        "bytes_per_client": (idle_rss - rss) / clients,
        "opened_per_second": clients / opening_seconds,
        "opening_cpu": opening_cpu / clients * 1e6,
        "heartbeat_cpu": heartbeat_cpu / heartbeats * 1e6,
    }


def main() -> None:
    parser = arguments("Memory, heartbeats and opening of idle clients.")
    parser.add_argument("--clients", type=int, nargs="+", default=[1000, 5000], help="streams open at a time")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long the streams are left alone")
    options = parser.parse_args()
    if min(*options.clients, options.rounds, 10**9) < 1 or options.seconds <= 0:
        parser.error("clients and rounds start at 1, and seconds above 0")
    allow_files(max(options.clients))
    build()  # before anything is started: a missing compiler shall be told at once
    cores = Cores.choose()
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    if cores.server is None:
        print("Only one core is available: server and load share it, so times are not figures to quote.")

    tables = []
    for clients in options.clients:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in options.servers}
        # The servers take turns, so that what else the machine does meets all of them.
        for _ in range(options.rounds):
            for name in options.servers:
                with (
                    running(SERVERS[name], cores.server, PING_SECONDS) as server,
                    Load(cores.load) as load,
                ):
                    runs[name].append(measure(server, load, clients, options.seconds))
        results = {name: medians(of_server) for name, of_server in runs.items()}
        print_table(
            f"{clients} idle clients, a heartbeat every {PING_SECONDS:g} s; medians of {options.rounds} runs",
            FIGURES,
            results,
        )
        tables.append({"clients": clients, "medians": results, "runs": runs})
    write_json(
        options.json,
        {
            "benchmark": "memory",
            "rounds": options.rounds,
            "seconds": options.seconds,
            "ping_seconds": PING_SECONDS,
            "tables": tables,
        },
    )


if __name__ == "__main__":
    try:
        main()
    except BenchmarkError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
