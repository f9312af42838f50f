"""What it takes until clients that lost their worker are live again in a new one, with all that they missed.

    python benchmarks/reconnect_storm.py                about five minutes
    python benchmarks/reconnect_storm.py --clients 1000 --keys 1 --rounds 1 --servers ours-redis

Each run is a fresh store, some events in it, and a server that was started just now. Then all clients come at once,
each with the id of an event and so many behind it that it missed. The clock stops when the last of them has these.
At the end each key gets one event more, and a run in which not every client got everything exactly once is an
error, not a figure.
"""

from __future__ import annotations

import contextlib
import sys
import time

import stores
from harness import SERVERS, STREAM, Cores, allow_files, machine, running
from load import BenchmarkError, Load, Target, build
from publisher import Publisher
from rounds import Figure, Figures, arguments, print_table, take_turns, write_json

FIGURES = (
    Figure("last_seconds", "last client has what it missed, s"),
    Figure("cpu_per_client", "server CPU a client, us"),
    Figure("peak_megabytes", "peak memory of the server, MB"),
    Figure("commands", "commands of Redis, inside of scripts too"),
    Figure("commands_per_key", "commands of Redis, a key"),
)
CHOICES = ("xread", "ours-sqlite", "ours-redis")

# As many as a listen queue takes by the limit that kernels come with; of those beyond it, the kernel would make
# some wait a second.
AT_ONCE = 4000
SECONDS = 180.0
SETTLE_SECONDS = 0.3


def measure(
    name: str, cores: Cores, clients: int, keys: int, earlier: int, missed: int, size: int
) -> tuple[dict[str, float], dict[str, int]]:
    """One run with a fresh store, events, server and clients: its figures, and what Redis did meanwhile."""
    server = SERVERS[name]
    names = [f"bench-{number}" for number in range(keys)]
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(stores.opened(server.store, cores.load))
        publisher = stack.enter_context(Publisher(server.publisher, store.url))
        seen = publisher.publish(names, earlier, size=size).ids[-keys:]
        publisher.publish(names, missed, size=size)
        started = stack.enter_context(running(server, cores.server, store_url=store.url))
        load = stack.enter_context(Load(cores.load))

        targets = [Target(STREAM.format(key=key), id) for key, id in zip(names, seen, strict=True)]
        cpu, commands = started.cpu_seconds(), store.commands()
        opened = load.open(started.port, clients, targets, missed, AT_ONCE, SECONDS)
        cpu, spent = started.cpu_seconds() - cpu, stores.spent(commands, store.commands())
        if opened.failed:
            raise BenchmarkError(f"{opened.failed} of {clients} clients did not come back: {opened.trouble}.")
        peak = started.peak()

        time.sleep(SETTLE_SECONDS)  # what is sent twice shall have come
        if load.counts() != (missed, missed):
            raise BenchmarkError(f"Each client missed {missed} events; they got {load.counts()}.")
        load.expect(1, SECONDS)
        publisher.publish(names, 1, size=size)
        live = load.round()
        if (live.clients, live.ended, live.least, live.most) != (clients, 0, 1, 1):
            raise BenchmarkError(f"Of {clients} clients that came back, {live.delivered} got the next event.")

    figures = {
        "last_seconds": opened.seconds,
        "cpu_per_client": cpu / clients * 1e6,
        "peak_megabytes": peak / 1e6,
    }
    if server.store == "redis":
        figures |= {"commands": sum(spent.values()), "commands_per_key": sum(spent.values()) / keys}
    return figures, spent


def main() -> None:
    parser = arguments("Clients that come back to a new worker all at once.", CHOICES, CHOICES)
    parser.add_argument("--clients", type=int, default=5000, help="clients that come back")
    parser.add_argument(
        "--keys", type=int, nargs="+", help="keys they are spread over (default: 1, 100, and a key for each client)"
    )
    parser.add_argument("--earlier", type=int, default=3, help="events of each key before these, the last one seen")
    parser.add_argument("--missed", type=int, default=10, help="events that each of them missed")
    parser.add_argument("--size", type=int, default=100, help="bytes of data in an event")
    options = parser.parse_args()
    spreads = options.keys or [1, 100, options.clients]
    if min(*spreads, options.earlier, options.missed, options.rounds) < 1 or options.clients < max(spreads):
        parser.error("keys, events and rounds start at 1, and each key needs a client")
    # One by hand has a connection to Redis beside that of its client.
    allow_files(options.clients, each=2 if "xread" in options.servers else 1)
    stores.check({SERVERS[name].store for name in options.servers})
    build()  # before anything is started: a missing compiler shall be told at once
    cores = Cores.choose()
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    if cores.server is None:
        print("Only one core is available: server and load share it, so these are not figures to quote.")

    tables = []
    for keys in spreads:
        commands: dict[str, list[dict[str, int]]] = {name: [] for name in options.servers}

        def run(name: str, keys: int = keys, commands: dict[str, list[dict[str, int]]] = commands) -> Figures:
            figures, spent = measure(name, cores, options.clients, keys, options.earlier, options.missed, options.size)
            commands[name].append(spent)
            return figures

        runs = take_turns(options.servers, options.rounds, run)
        results = runs.medians()
        print_table(
            f"{options.clients} clients of {keys} keys come back, {options.missed} events of {options.size} bytes "
            f"missed by each; medians of {options.rounds} runs",
            FIGURES,
            results,
        )
        print()
        for name, (*_, spent) in commands.items():
            if spent:
                told = ", ".join(f"{count} {command}" for command, count in sorted(spent.items()))
                print(f"Commands in the last run, {SERVERS[name].label}: {told}")
        tables.append({"keys": keys, "medians": results, "runs": runs.of, "commands": commands})
    settings = {name: getattr(options, name) for name in ("rounds", "clients", "earlier", "missed", "size")}
    write_json(options.json, {"machine": machine(), "benchmark": "reconnect_storm", **settings, "tables": tables})


if __name__ == "__main__":
    try:
        main()
    except BenchmarkError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
