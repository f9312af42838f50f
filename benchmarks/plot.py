"""Draws what the programs measured, for the page of the benchmarks in the docs.

    python benchmarks/plot.py benchmarks/_build/results/*.json

It writes ``docs/_static/benchmarks/``: an SVG for each question, and ``measured.inc``, which the page includes, with
the machine and the versions, the plots, the goals and where we lose. Nothing in it is written by hand, so nothing is
left out of it by hand either.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).resolve().parents[1] / "docs" / "_static" / "benchmarks"
OURS = "ours"
# A difference that is smaller is none.
NOISE = 1.05
EVERY_LOSS = (
    "Every figure in which another server does better, by more than a twentieth. The plain C server has neither "
    "history nor limits nor Python, and the hand-written one no bound on what waits for a slow client."
)

Json = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """A server and its figure."""

    label: str
    value: float
    ours: bool


@dataclass(frozen=True)
class Group:
    """Bars that are compared with each other, under a heading; no heading where there is but one group."""

    heading: str
    bars: list[Bar]


@dataclass(frozen=True)
class Chart:
    """A question: which figures of which tables answer it, and how they are drawn.

    ``scattered``: the answers are so far apart that they are dots on a logarithmic scale.
    """

    row: str
    title: str
    benchmark: str
    figures: tuple[tuple[str, str], ...]
    clients: tuple[int, ...] = ()
    keys: bool = False
    scattered: bool = False


CPU = "server CPU a delivery, µs"
CHARTS = (
    Chart("a", f"Events back to back to 1,000 clients: {CPU}", "fanout", (("cpu_per_delivery", ""),), (1000,)),
    Chart("b", f"Single events to 1,000 clients: {CPU}", "fanout", (("paced_cpu_per_delivery", ""),), (1000,)),
    Chart("c", f"Single events to more: {CPU}", "fanout", (("paced_cpu_per_delivery", ""),), (5000, 10000)),
    Chart("d", "Resident memory of an idle client, bytes", "memory", (("bytes_per_client", ""),)),
    Chart("e", "Time until all streams are open, s", "memory", (("opening_seconds", ""),)),
    Chart(
        "f",
        "An ordinary view, 10,000 streams, ms",
        "views",
        (
            ("idle_median", "nothing sent, median"),
            ("busy_median", "events sent, median"),
            ("idle_p99", "nothing sent, 99th percentile"),
            ("busy_p99", "events sent, 99th percentile"),
        ),
        (10000,),
        scattered=True,
    ),
    Chart(
        "g",
        "How long one publish keeps its caller, µs",
        "views",
        (("publish_call_loop", "in a loop"), ("publish_call", "after a pause")),
        scattered=True,
    ),
    Chart(
        "h",
        "Heartbeats of 10,000 idle clients every 10 s: percent of a core",
        "memory",
        (("heartbeat_percent", ""),),
        (10000,),
    ),
    Chart(
        "i",
        f"Events to 10,000 keys with one client each: {CPU}",
        "fanout",
        (("paced_cpu_per_delivery", ""),),
        keys=True,
    ),
)


def groups(chart: Chart, results: Sequence[Json]) -> list[Group]:
    """What is drawn: a group for each number of clients and each of the chart's figures."""
    found = []
    for table in tables(results, chart.benchmark):
        if (table["row"] == "i") is not chart.keys or (chart.clients and table["clients"] not in chart.clients):
            continue
        for figure, meaning in chart.figures:
            bars = [
                Bar(table["labels"][name], of_server[figure], name == OURS)
                for name, of_server in table["medians"].items()
                if figure in of_server
            ]
            clients = f"{table['clients']:,} clients"
            if bars:
                found.append(Group(", ".join(filter(None, [clients, meaning])), bars))
    return found


def tables(results: Sequence[Json], benchmark: str = "") -> Iterator[Json]:
    """All tables of a program, or of all of them."""
    for result in results:
        if benchmark in ("", result["benchmark"]):
            yield from (table for table in result["tables"] if "labels" in table)


def number(value: float) -> str:
    """As many digits as are worth reading."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f }
.title { font-size: 15px; font-weight: 600 }
.heading, .note { fill: #57606a }
.bar { fill: #a8b1bb }
.ours { fill: #1f78b4; font-weight: 600 }
.line { stroke: #d0d7de }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .heading, .note { fill: #9da7b1 }
  .bar { fill: #6e7681 }
  .ours { fill: #58b1ea }
  .line { stroke: #3d444d }
}
"""
WIDTH, LEFT, RIGHT, LINE = 720, 190, 80, 20


def draw(chart: Chart, found: Sequence[Group]) -> str:
    """One SVG. It has no background, so that it fits a light page and a dark one."""
    values = [bar.value for group in found for bar in group.bars]
    room = WIDTH - LEFT - RIGHT
    floor = math.floor(math.log10(min((value for value in values if value > 0), default=1)))
    most = max(*values, 10.0**floor)
    ceiling = max(floor + 1, math.ceil(math.log10(most)))

    def length(value: float) -> float:
        if chart.scattered:
            place = (math.log10(value) - floor) / (ceiling - floor) if value > 0 else 0
            return room * max(0.0, place)
        return room * max(0.0, value) / most

    parts = []
    note = "less is better; each vertical line is ten times the one before" if chart.scattered else "less is better"
    y = 22
    parts.append(f'<text class="title" x="0" y="{y}">{escape(chart.title)}</text>')
    y += LINE
    parts.append(f'<text class="note" x="0" y="{y}">{note}</text>')
    for group in found:
        y += LINE + 6
        if len(found) > 1:
            parts.append(f'<text class="heading" x="0" y="{y}">{escape(group.heading)}</text>')
            y += LINE
        if chart.scattered:
            for power in range(floor, ceiling + 1):
                x = LEFT + length(10.0**power)
                bottom = y + (len(group.bars) - 1) * LINE + 4
                parts.append(f'<line class="line" x1="{x:.1f}" y1="{y - 14}" x2="{x:.1f}" y2="{bottom}"/>')
        for bar in group.bars:
            mark = " ours" if bar.ours else ""
            end = LEFT + length(bar.value)
            parts.append(
                f'<text class="name{mark}" x="{LEFT - 8}" y="{y}" text-anchor="end">{escape(bar.label)}</text>'
            )
            if chart.scattered:
                parts.append(f'<circle class="bar{mark}" cx="{end:.1f}" cy="{y - 4}" r="5"/>')
            else:
                parts.append(f'<rect class="bar{mark}" x="{LEFT}" y="{y - 11}" width="{end - LEFT:.1f}" height="13"/>')
            parts.append(f'<text class="{mark.strip()}" x="{end + 8:.1f}" y="{y}">{number(bar.value)}</text>')
            y += LINE
        y -= LINE
    height = y + 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img"><title>{escape(chart.title)}</title><style>{STYLE}</style>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def describe(found: Sequence[Group]) -> str:
    """What a reader who sees no picture is told."""
    told = []
    for group in found:
        values = ", ".join(f"{bar.label} {number(bar.value)}" for bar in group.bars)
        told.append(f"{group.heading}: {values}.")
    return " ".join(told)


def place(row: str, table: Json) -> str:
    """Where a figure is from. The letter has no parentheses, which would begin a list in reStructuredText."""
    return f"{row}: {table['clients']:,} {'keys' if table['row'] == 'i' else 'clients'}"


def losses(results: Sequence[Json]) -> list[tuple[str, str, str, str]]:
    """Every figure of every table in which some server does better than ours: table, figure, ours, theirs."""
    found = []
    for table in tables(results):
        mine = table["medians"].get(OURS, {})
        for figure in table["figures"]:
            name, more = figure["name"], figure["more_is_better"]
            if not mine.get(name):
                continue
            better = []
            for server, theirs in table["medians"].items():
                value = theirs.get(name)
                if server == OURS or value is None:
                    continue
                if value > mine[name] * NOISE if more else value * NOISE < mine[name]:
                    better.append(f"{table['labels'][server]} {number(value)}")
            if better:
                found.append((place(table["row"], table), figure["heading"], number(mine[name]), ", ".join(better)))
    return found


def rows(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """A table in reStructuredText."""
    lines = [".. list-table::", "    :header-rows: 1", "    :width: 100%", ""]
    for row in [heads, *cells]:
        first, *rest = (re.sub(r"([*|`_])", r"\\\1", cell).replace(", us", ", µs") for cell in row)
        lines += [f"    * - {first}", *(f"      - {cell}" for cell in rest)]
    return [*lines, ""]


def page(results: Sequence[Json], drawn: dict[str, list[Group]], note: str) -> str:
    """What the page of the docs includes."""
    lines = [".. This is written by benchmarks/plot.py.", ""]
    if not results:
        return "\n".join([*lines, "Nothing has been measured yet.", ""])
    machines: dict[str, list[str]] = {}
    for result in results:
        about = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
        runs = f"{result['rounds']} run{'s' if result['rounds'] > 1 else ''}"
        machines.setdefault(about, []).append(f"{result['benchmark']} (medians of {runs})")
    for about, programs in machines.items():
        lines += [f"{', '.join(programs)}: {about}.", ""]
    lines += [note, ""] if note else []
    absent = {
        (table["labels"] | {name: name for name in table["absent"]})[name]: f"{reason} ({table['title']})"
        for table in tables(results)
        for name, reason in table["absent"].items()
    }
    absent |= {name: reason for result in results for name, reason in result.get("absent", {}).items()}
    for name, reason in absent.items():
        lines += [f"Without {name}: {' '.join(reason.split())}", ""]
    for chart in CHARTS:
        if chart.row in drawn:
            lines += [f".. image:: _static/benchmarks/{chart.row}.svg", f"    :alt: {describe(drawn[chart.row])}", ""]
    judged = [
        (
            place(verdict["row"], table),
            verdict["heading"],
            f"{number(verdict['value'])} times {table['labels'][verdict['against']]}"
            if verdict["against"]
            else number(verdict["value"]),
            f"{verdict['at_most']:g}",
            "met" if verdict["met"] else "missed",
        )
        for table in tables(results)
        for verdict in table["goals"]
    ]
    if judged:
        lines += [".. rubric:: Goals", "", *rows(("Table", "What", "Measured", "At most", "Outcome"), judged)]
    lost = losses(results)
    title = "Where we lose"
    lines += [title, "-" * len(title), ""]
    if lost:
        lines += [EVERY_LOSS, "", *rows(("Table", "Figure", "Ours", "Better"), lost)]
    else:
        lines += ["In none of the figures.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Plots of what was measured, for the docs.")
    parser.add_argument("results", type=Path, nargs="*", help="files that --json wrote")
    parser.add_argument("--to", type=Path, default=DIRECTORY, help="directory of the plots")
    parser.add_argument("--note", default="", help="a sentence about the circumstances")
    options = parser.parse_args()
    results = []
    for file in options.results:
        try:
            results.append(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            sys.exit(f"{file} cannot be read: {error}.")
    options.to.mkdir(parents=True, exist_ok=True)
    for old in options.to.glob("*.svg"):
        old.unlink()
    drawn = {}
    for chart in CHARTS:
        found = groups(chart, results)
        if found:
            drawn[chart.row] = found
            (options.to / f"{chart.row}.svg").write_text(draw(chart, found), encoding="utf-8")
    (options.to / "measured.inc").write_text(page(results, drawn, options.note), encoding="utf-8")


if __name__ == "__main__":
    main()
