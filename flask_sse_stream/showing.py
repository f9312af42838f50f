"""How the commands show things: as text for people, as lines for programs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any, Final
from urllib.parse import urlsplit

import click

from .bench import Figures
from .event import Event
from .reports import Report

__all__ = [
    "KEY_HEAD",
    "PROCESS_HEAD",
    "as_json_line",
    "as_text",
    "figure_rows",
    "key_rows",
    "masked",
    "process_rows",
]

PROCESS_HEAD: Final = ("PROCESS", "UP", "STREAMS", "QUEUED", "LAG p50", "LAG p99", "")
KEY_HEAD: Final = ("KEY", "STREAMS", "PROCESSES", "QUEUED", "LONGEST QUEUE", "OLDEST WAITS")


def masked(url: str) -> str:
    """Show a broker's URL without its password."""
    parts = urlsplit(url)
    login, at, hosts = parts.netloc.rpartition("@")
    user = login.partition(":")[0]
    return f"{parts.scheme}://{f'{user}:***' if at else ''}{at}{hosts}{parts.path}"


def as_json_line(key: str | None, event: Event) -> str:
    """Give an event as one line of JSON."""
    found = {"key": key, "event": event.event, "id": event.id, "data": event.data, "retry": event.retry}
    if event.comment is not None:
        found["comment"] = event.comment
    return json.dumps({name: value for name, value in found.items() if value is not None}, ensure_ascii=False)


def as_text(key: str | None, event: Event) -> str:
    """Give an event as text, coloured where a terminal shows it."""
    parts = [click.style(time.strftime("%H:%M:%S"), dim=True)]
    if key is not None:
        parts.append(click.style(_printable(key), fg="cyan"))
    if event.event is not None:
        parts.append(click.style(_printable(event.event), fg="green", bold=True))
    if event.data is not None:
        # Escape sequences of somebody else's are not for this terminal.
        parts.append("\n    ".join(map(_printable, event.data.split("\n"))))
    if event.comment is not None:
        parts.append(click.style(f": {_printable(event.comment)}", dim=True))
    if event.id is not None:
        parts.append(click.style(f"({_printable(event.id)})", dim=True))
    return " ".join(parts)


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() or character == "\t" else "�" for character in text)


def process_rows(reports: Iterable[Report]) -> list[tuple[str, ...]]:
    """Give a row for each process."""
    rows: list[tuple[str, ...]] = []
    for report in reports:
        notes = [*(["draining"] if report.draining else []), *([] if report.broker_up else ["broker is away"])]
        counts = (f"{report.host}/{report.pid}", _duration(report.seconds), str(report.streams), str(report.waiting))
        rows.append((*counts, _lag(report.lag_median), _lag(report.lag_p99), ", ".join(notes)))
    return rows


def key_rows(reports: Iterable[Report]) -> list[tuple[str, ...]]:
    """Give a row for each key, of all processes together."""
    found: dict[str, list[Any]] = {}
    for report in reports:
        for key in report.keys:
            row = found.setdefault(key.key, [0, 0, 0, 0, 0.0])
            row[0] += key.streams
            row[1] += 1
            row[2] += key.waiting
            row[3] = max(row[3], key.longest)
            row[4] = max(row[4], key.lag)
    ordered = sorted(found.items(), key=lambda item: (-item[1][0], item[0]))
    return [(_printable(key), *map(str, row[:4]), _duration(row[4]) if row[4] else "-") for key, row in ordered]


def _lag(bound: float) -> str:
    return "-" if not bound else "> 10 s" if bound > 10 else f"< {_duration(bound)}"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def figure_rows(found: Figures) -> Iterable[tuple[str, str]]:
    """Give the figures of a measurement, each with its name."""
    median, p99, slowest = map(_milliseconds, (found.first_byte_median, found.first_byte_p99, found.first_byte_max))
    return (
        ("opened", f"{found.opened} of {found.asked}, {found.opened_per_second:g} a second"),
        ("first byte", f"median {median}, 99 % {p99}, slowest {slowest}"),
        ("events", f"{found.events}, {found.events_per_second:g} a second"),
        ("heartbeats", str(found.heartbeats)),
        ("bytes", str(found.bytes)),
        ("dropped", str(found.dropped)),
        ("this client", f"busy for {found.client_busy_percent:g} % of the time"),
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"
