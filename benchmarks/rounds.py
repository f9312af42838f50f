"""What the programs have in common: servers that take turns, medians, tables, goals, options and files of results.

A program makes a :class:`Report` and gives it one table after the other::

    report = Report("fanout", options)
    report.table("b", "1000 clients", FIGURES, measure, clients=1000, goals=GOALS)

``measure`` is called with a server that was just started and a load client, once for each server and round, and
returns the figures of one run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import peers
import stores
from harness import ALONE, DEFAULT_SERVERS, PEERS, SERVERS, Cores, Running, allow_files, machine, running
from load import BenchmarkError, Load, build

OURS = "ours"
Figures = dict[str, float]
Measure = Callable[[Running, Load], Figures]


@dataclass(frozen=True)
class Figure:
    """A row of a table: the name in the results, its heading, and whether more of it is better."""

    name: str
    heading: str
    more_is_better: bool = False


@dataclass(frozen=True)
class Goal:
    """What one of our figures shall be at most: so many times that of the server ``against``, or so much itself.

    ``row`` is the letter of the question it belongs to.
    """

    row: str
    figure: str
    at_most: float
    against: str = ""


@dataclass(frozen=True)
class Verdict:
    """What became of a goal."""

    row: str
    figure: str
    heading: str
    against: str
    value: float
    at_most: float
    met: bool

    def __str__(self) -> str:
        told = f"{number(self.value)} times {SERVERS[self.against].label}" if self.against else number(self.value)
        outcome = "met" if self.met else "missed"
        return f"({self.row}) {self.heading}: {told}; at most {self.at_most:g}: {outcome}"


@dataclass
class Runs:
    """The figures of every run of each server, and why others have none."""

    of: dict[str, list[Figures]]
    absent: dict[str, str] = field(default_factory=dict)

    def medians(self) -> dict[str, Figures]:
        """The median of each figure over the runs of each server, of those that all its runs have."""
        return {
            name: {
                figure: median(run[figure] for run in runs) for figure in runs[0] if all(figure in run for run in runs)
            }
            for name, runs in self.of.items()
        }

    def judge(self, goal: Goal, heading: str) -> Verdict | None:
        """Hold our figure to a goal; ``None`` where a server or a figure of it is not there.

        The ratio is taken within each round and is the median of these: what else the machine does meets both of
        a round, while it may change from one round to the next.
        """
        ours = self.of.get(OURS) or self.of.get(f"{OURS}-gunicorn") or []
        mine = [run[goal.figure] for run in ours if goal.figure in run]
        value = median(mine) if mine else None
        if goal.against:
            theirs = [run[goal.figure] for run in self.of.get(goal.against, ()) if goal.figure in run]
            if not theirs or min(theirs) <= 0:
                return None
            value = median(one / other for one, other in zip(mine, theirs, strict=True)) if mine else None
        if value is None:
            return None
        return Verdict(goal.row, goal.figure, heading, goal.against, value, goal.at_most, value <= goal.at_most)


def take_turns(names: Sequence[str], rounds: int, run: Callable[[str], Figures]) -> Runs:
    """Run each server once a round, so that what else the machine does meets all of them.

    A peer that fails is left out from there on; that one of ours does is an error.
    """
    runs = Runs({name: [] for name in names})
    for _ in range(rounds):
        for name in names:
            if name in runs.absent:
                continue
            try:
                runs.of[name].append(run(name))
            except BenchmarkError as error:
                if not SERVERS[name].peer:
                    raise
                runs.absent[name] = str(error)
                del runs.of[name]
    return runs


@contextlib.contextmanager
def opened(name: str, cores: Cores, ping_seconds: float = 10.0) -> Iterator[tuple[Running, Load]]:
    """Start a server with what keeps its events, and a load client that is not connected yet."""
    server = SERVERS[name]
    with (
        stores.opened(server.store, cores.load) as store,
        running(server, cores.server, ping_seconds, store.url) as started,
        Load(cores.load) as load,
    ):
        yield started, load


def number(value: float) -> str:
    """A figure as it is printed."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def print_table(title: str, figures: Sequence[Figure], results: dict[str, Figures]) -> None:
    """Print one table: a row for each figure, a column for each server, ratios to the first of them.

    A figure that a server does not have is a dash.
    """
    names = list(results)
    headings = ["", *(SERVERS[name].label for name in names)]
    rows = []
    for figure in figures:
        reference = results[names[0]].get(figure.name, 0)
        row = [figure.heading]
        for position, name in enumerate(names):
            value = results[name].get(figure.name)
            if value is None:
                row.append("-")
                continue
            cell = number(value)
            if position and value > 0 and reference > 0:
                gain = value / reference if figure.more_is_better else reference / value
                cell += f"  ({gain:.1f}x better)" if gain >= 1 else f"  ({1 / gain:.1f}x worse)"
            row.append(cell)
        rows.append(row)
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    print(f"\n{title}\n")
    for row in [headings, *rows]:
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip(), flush=True)


def arguments(
    description: str, servers: Sequence[str] = ALONE, default: Sequence[str] = DEFAULT_SERVERS
) -> argparse.ArgumentParser:
    """A parser with the options all benchmarks have; ``servers`` are those that can be chosen."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--servers", nargs="+", choices=servers, default=list(default), help="the first is the reference"
    )
    parser.add_argument(
        "--peers", action="store_true", help="other libraries' servers too; what they need is installed"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each; the medians are printed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results of every run to FILE")
    return parser


def write_json(file: Path | None, results: dict[str, Any]) -> None:
    """Write ``results``, if a file was asked for."""
    if file is not None:
        file.write_text(json.dumps(results, indent=2) + "\n")


class Report:
    """One run of a program: says on what, prints its tables, and writes them to a file."""

    def __init__(self, benchmark: str, options: argparse.Namespace, *settings: str, clients: int = 0) -> None:
        """``clients`` are the most there will be; ``settings`` the options that belong to the results."""
        names = list(dict.fromkeys([*options.servers, *(PEERS if options.peers else ())]))
        allow_files(clients)
        build()  # before anything is started: a missing compiler shall be told at once
        self.absent = {}
        for name in names:
            reason = peers.prepare(SERVERS[name].needs)
            if reason and not SERVERS[name].peer:
                raise BenchmarkError(reason)
            if reason:
                self.absent[name] = reason
        self.servers = [name for name in names if name not in self.absent]
        if not self.servers:
            raise BenchmarkError(f"None of the servers is there. {' '.join(set(self.absent.values()))}")
        self.cores = Cores.choose()
        self._rounds = options.rounds
        self._file = options.json
        about = machine([SERVERS[name].needs for name in self.servers])
        self._results: dict[str, Any] = {
            "machine": about,
            "benchmark": benchmark,
            **{name: getattr(options, name) for name in ("rounds", *settings)},
            "absent": self.absent,
            "tables": [],
        }
        print(", ".join(f"{name} {value}" for name, value in about.items()))
        for name, reason in self.absent.items():
            print(f"{SERVERS[name].label} is not there: {reason}")
        if self.cores.server is None:
            print("Only one core is available: server and load share it, so these are not figures to quote.")

    def table(
        self,
        row: str,
        title: str,
        figures: Sequence[Figure],
        measure: Measure,
        *,
        clients: int,
        goals: Sequence[Goal] = (),
        ping_seconds: float = 10.0,
        **facts: Any,
    ) -> Runs:
        """Measure all servers with so many clients, print the table and what became of the goals, and keep both."""
        too_many = {
            name: f"{clients} clients need more open files than it may have"
            for name in self.servers
            if SERVERS[name].peer and not allowed(clients * SERVERS[name].files)
        }

        def run(name: str) -> Figures:
            with opened(name, self.cores, ping_seconds) as (server, load):
                figures = measure(server, load)
            if not SERVERS[name].heartbeats:
                figures = {figure: value for figure, value in figures.items() if not figure.startswith("heartbeat")}
            return figures

        runs = take_turns([name for name in self.servers if name not in too_many], self._rounds, run)
        runs.absent |= too_many
        if not runs.of:
            raise BenchmarkError(f"No server could be measured. {' '.join(runs.absent.values())}")
        results = runs.medians()
        shown = [figure for figure in figures if any(figure.name in of_server for of_server in results.values())]
        print_table(f"({row}) {title}; medians of {self._rounds} runs", shown, results)
        for name, reason in runs.absent.items():
            print(f"\nWithout {SERVERS[name].label}: {reason}")
        self._results["tables"].append(
            {
                "row": row,
                "title": title,
                "clients": clients,
                **facts,
                "figures": [asdict(figure) for figure in shown],
                "labels": {name: SERVERS[name].label for name in results},
                "medians": results,
                "runs": runs.of,
                "absent": runs.absent,
                "goals": [],
            }
        )
        headings = {figure.name: figure.heading for figure in figures}
        verdicts = [runs.judge(goal, headings[goal.figure]) for goal in goals]
        self.goals([verdict for verdict in verdicts if verdict])
        return runs

    def goals(self, verdicts: Sequence[Verdict]) -> None:
        """Print what became of goals, and keep it with the last table."""
        if verdicts:
            print()
        for verdict in verdicts:
            print(verdict, flush=True)
        self._results["tables"][-1]["goals"] += [asdict(verdict) for verdict in verdicts]
        write_json(self._file, self._results)  # as far as it is: a run of hours may be ended early


def allowed(files: int) -> bool:
    """Whether a process may have so many files open here."""
    try:
        allow_files(files)
    except BenchmarkError:
        return False
    return True
