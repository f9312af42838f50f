"""What those feel who read no stream: who asks for an ordinary view, and who publishes.

    python benchmarks/views.py                          about ten minutes
    python benchmarks/views.py --clients 10000 --rounds 5 --json views.json

Each run is a fresh server on its own core with N clients. With the greatest N somebody first asks for an ordinary
view a hundred times a second while nothing is sent, then while events are. Of these requests those count that were
under way while an event was, from the call that published it until the last client had it. Then events are
published in a loop, and one at a time, and it is measured how long each call kept its caller.
"""

from __future__ import annotations

import sys
from statistics import median

from harness import Running, deliver, open_all, percentile, reach_all
from load import BenchmarkError, Load
from prober import Prober
from rounds import OURS, Figure, Goal, Report, Runs, Verdict, arguments

VIEW_FIGURES = (
    Figure("idle_median", "view, nothing sent: median, ms"),
    Figure("idle_p99", "view, nothing sent: 99th percentile, ms"),
    Figure("busy_median", "view, events sent: median, ms"),
    Figure("busy_p99", "view, events sent: 99th percentile, ms"),
    Figure("added_median", "view: what the sending adds to the median, ms"),
    Figure("added_p99", "view: what it adds to the 99th percentile, ms"),
)
PUBLISH_FIGURES = (
    Figure("publish_call_loop", "publish in a loop: one call, us"),
    Figure("publish_call", "publish after a pause: one call, us"),
)
MANY = 10_000
VIEW_GOALS = (Goal("f", "added_median", 5), Goal("f", "added_p99", 5))
PUBLISH_GOALS = (Goal("g", "publish_call_loop", 50), Goal("g", "publish_call", 50))
# So much may a call take with many streams, compared with few, to count as the same.
SAME = 1.25


def views(
    server: Running, load: Load, core: int | None, clients: int, events: int, interval: float, pace: float
) -> dict[str, float]:
    """How long an ordinary view takes, while nothing is sent and while events are."""
    seconds = events * interval
    with Prober(server.port, core) as prober:
        prober.begin(min(1.0, seconds), pace)  # connections and code are warm after it
        prober.finish()
        prober.begin(seconds, pace)
        idle = prober.finish().milliseconds()
        prober.begin(seconds + interval, pace)
        published, result = deliver(server, load, clients, events, interval)
        probes = prober.finish()
    busy = probes.during(list(zip(published.started, result.last, strict=True))).milliseconds()
    figures = {"probes": float(len(busy)), "idle_median": median(idle), "idle_p99": percentile(idle, 99)}
    if busy:  # else the events came and went between the probes
        figures["busy_median"] = median(busy)
        figures["busy_p99"] = percentile(busy, 99)
        figures["added_median"] = max(0.0, figures["busy_median"] - figures["idle_median"])
        figures["added_p99"] = max(0.0, figures["busy_p99"] - figures["idle_p99"])
    return figures


def calls(server: Running, load: Load, clients: int, events: int, interval: float) -> dict[str, float]:
    """How long one publish keeps its caller."""
    figures = {}
    for name, pause in (("publish_call_loop", 0.0), ("publish_call", interval)):
        published, _ = deliver(server, load, clients, events, pause)
        took = zip(published.started, published.returned, strict=True)
        figures[name] = median(end - start for start, end in took) / 1e3
    return figures


def compare(few: Runs, many: Runs) -> list[Verdict]:
    """Hold our calls with many streams to those with few, round by round."""
    if OURS not in few.of or OURS not in many.of:
        return []
    verdicts = []
    for goal in PUBLISH_GOALS:
        pairs = zip(many.of[OURS], few.of[OURS], strict=True)
        ratio = median(one[goal.figure] / other[goal.figure] for one, other in pairs)
        (heading,) = (figure.heading for figure in PUBLISH_FIGURES if figure.name == goal.figure)
        heading = heading.replace(", us", ", many streams to few")
        verdicts.append(Verdict("g", goal.figure, heading, "", ratio, SAME, ratio <= SAME))
    return verdicts


def main() -> None:
    parser = arguments("What views and publishers feel of the streams.")
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 10000], help="streams open at a time")
    parser.add_argument("--events", type=int, default=20, help="events during which views are asked for")
    parser.add_argument("--interval", type=float, default=0.5, help="seconds between them")
    parser.add_argument("--pace", type=float, default=0.01, help="seconds between views")
    parser.add_argument("--published", type=int, default=40, help="events of which the call is measured")
    options = parser.parse_args()
    if min(*options.clients, options.rounds, options.events, options.published) < 1 or options.pace <= 0:
        parser.error("clients, events and rounds start at 1, and the pace above 0")
    report = Report("views", options, "events", "interval", "pace", "published", clients=max(options.clients))

    tables = []
    probing = (
        f"views every {options.pace:g} s while {options.events} events are sent every {options.interval:g} s, then "
    )
    for clients in options.clients:
        viewed = clients == max(options.clients)

        def measure(server: Running, load: Load, clients: int = clients, viewed: bool = viewed) -> dict[str, float]:
            open_all(load, server.port, clients)
            reach_all(server, load)
            figures = {}
            if viewed:
                core = report.cores.load
                figures = views(server, load, core, clients, options.events, options.interval, options.pace)
            return figures | calls(server, load, clients, options.published, options.interval)

        runs = report.table(
            "f, g" if viewed else "g",
            f"{clients} streams; {probing if viewed else ''}{options.published} events in a loop and as many one at a "
            "time",
            (*(VIEW_FIGURES if viewed else ()), *PUBLISH_FIGURES),
            measure,
            clients=clients,
            goals=(*(VIEW_GOALS if viewed and clients >= MANY else ()), *PUBLISH_GOALS),
        )
        tables.append(runs)
    if len(tables) > 1:
        report.goals(compare(tables[0], tables[-1]))


if __name__ == "__main__":
    try:
        main()
    except BenchmarkError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
