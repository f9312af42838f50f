"""What an inspector's pages see: a look at all processes each second, while there is a page.

One task looks, however many pages there are, and asks the other processes over the broker once a second; the pages of
this process share what it finds. Without a page nothing runs, nothing is asked, and nothing is kept but these objects.
What other processes say comes out of a store: it was checked when it was read (``reports.py``), and is bounded here.

This module knows no framework. Pages are served by ``inspector.py``.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from .counts import LAG
from .errors import BrokerError
from .event import Event, EventDecoder, Message
from .keys import is_job, shown
from .pools import PoolManager
from .reports import MAX_ASKED, Inquiry, Report
from .stream import Lock
from .transports.base import Waiter, current_runtime

__all__ = ["Page", "Sampler"]

logger: logging.Logger = logging.getLogger("flask_sse_stream")

_TICK_SECONDS: Final = 1.0
_ANSWER_SECONDS: Final = 0.1  # in which most have answered; later ones count for the next look
_LINGER_SECONDS: Final = 5.0  # for a page that is loaded again, or looks at another key
_SILENT_SECONDS: Final = 4.0  # after which a process that does not answer is left out
_PAST: Final = 120  # looks that a page gets when it is opened
_MOST_PROCESSES: Final = 200
_MOST_KEYS: Final = 200
_MOST_STREAMS: Final = 100
_MOST_EVENTS: Final = 50
_MOST_REPORTS: Final = 1000  # that were not read yet
_LONGEST_DATA: Final = 4000  # characters of an event's data
_LONGEST_FRAME: Final = 16 * 1024  # bytes of an event that are looked at
_RATES: Final = ("published", "delivered", "dropped", "opened", "closed", "refused", "resets", "replayed", "sent_bytes")


@dataclass(slots=True)
class _Known:
    """What is known of a process: its last answer, when that came, and how fast its counts grow."""

    report: Report
    heard: float
    rates: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_RATES, 0.0))
    lags: list[int] = field(default_factory=list)  # events in each bucket since the answer before

    def hear(self, report: Report, now: float) -> None:
        seconds = report.seconds - self.report.seconds
        self.heard = now
        if seconds < 0.2:
            return  # it was asked by another one's inspector just now
        for name in _RATES:
            self.rates[name] = max(0, getattr(report, name) - getattr(self.report, name)) / seconds
        pairs = zip(report.lag_buckets, self.report.lag_buckets, strict=False)
        self.lags = [max(0, new - old) for new, old in pairs]
        self.report = report


class Page:
    """One page that is open; ``key`` is what it has a closer look at, a job's key too, or ``None``."""

    def __init__(self, key: str | None, waiter: Waiter) -> None:
        self.key = key
        self.waiter = waiter


class Sampler:
    """Looks at all processes of ``manager``'s application for the pages of this one."""

    def __init__(self, manager: PoolManager) -> None:
        self._manager = manager
        self._begin()
        manager.begun.append(self._begin)

    def _begin(self) -> None:
        self._lock = Lock(lambda: None)
        self._pages: dict[Page, None] = {}
        self._runs = self._stopped = False
        self._known: dict[str, _Known] = {}
        self._past: deque[dict[str, float]] = deque(maxlen=_PAST)
        self._trouble = ""
        self._sample = ""
        self._listened: dict[str, dict[str, Any]] = {}

    @property
    def runs(self) -> bool:
        """Whether anybody looks."""
        return self._runs

    def events(self, key: str | None) -> Iterator[Event]:
        """Give what one page is sent, until it is closed. For the task of its stream."""
        page = Page(key, current_runtime().waiter())
        with self._lock:
            self._pages[page] = None
        try:
            self._see_that_it_runs()
            yield _json("history", {"seconds": _TICK_SECONDS, "totals": list(self._past)})
            seen: tuple[str, int] | None = None
            while True:
                if key is not None:
                    seen, found = self._news(key, seen)
                    yield _json("key", {**found, **self._listened.get(key, {})})
                page.waiter.wait(5 * _TICK_SECONDS)
                self._see_that_it_runs()
                if self._sample:
                    yield Event(self._sample, event="sample")
        finally:
            with self._lock:
                self._pages.pop(page, None)

    def _see_that_it_runs(self) -> None:
        with self._lock:
            begins, self._runs = not self._runs, True
        if begins:
            current_runtime().spawn(self._run, "sse-inspector")

    # The task that looks

    def _run(self) -> None:
        waiter = current_runtime().waiter()
        reports: deque[bytes] = deque(maxlen=_MOST_REPORTS)
        token, gathers, due, wanted = secrets.token_hex(8), False, 0.0, time.monotonic()
        try:
            while True:
                while (left := due - time.monotonic()) > 0:
                    waiter.wait(left)
                with self._lock:
                    pages = list(self._pages)
                    if pages:
                        wanted = time.monotonic()
                    elif time.monotonic() - wanted > _LINGER_SECONDS or self._stopped:
                        self._end()
                        return
                due = time.monotonic() + _TICK_SECONDS
                keys = tuple(dict.fromkeys(page.key for page in pages if page.key is not None))[:MAX_ASKED]
                try:
                    if self._manager.reaches_other_processes:
                        if not gathers:
                            self._manager.asking.gather(reports)
                            gathers = True
                        self._manager.asking.ask(Inquiry(token, keys))
                    self._trouble = ""
                except BrokerError as error:
                    self._trouble = str(error)[:500]
                if gathers:
                    until = time.monotonic() + _ANSWER_SECONDS
                    while (left := until - time.monotonic()) > 0:
                        waiter.wait(left)
                try:
                    self._look(keys, token, reports)
                except Exception:
                    logger.exception("the inspector could not look, and goes on a second later")
                for page in pages:
                    page.waiter.wake()
        except BaseException:
            with self._lock:
                self._end()
            raise

    def _end(self) -> None:
        self._runs = False
        self._manager.asking.gather(None)
        self._known, self._sample, self._listened = {}, "", {}
        self._past.clear()

    def stop(self) -> None:
        """Look no more, once the pages have gone."""
        self._stopped = True

    def _look(self, keys: Sequence[str], token: str, reports: deque[bytes]) -> None:
        now = time.monotonic()
        own = self._manager.asking.report(keys)
        self._hear(own, now)
        while reports:
            report = Report.decode(reports.popleft(), token)
            if report is not None and report.process != own.process:
                self._hear(report, now)
        for name in [name for name, known in self._known.items() if now - known.heard > _SILENT_SECONDS]:
            del self._known[name]
        found = sorted(self._known.values(), key=lambda known: (known.report.host, known.report.pid))
        totals = _totals(found)
        self._past.append(totals)
        self._listened = {key: _listened(key, found) for key in keys}
        rows, more_keys = _key_rows(found)
        self._sample = _text(
            {
                "totals": totals,
                "processes": [_process_row(known, own.process, now) for known in found],
                "keys": rows,
                "more_keys": more_keys,
                "trouble": self._trouble,
                "shared": self._manager.reaches_other_processes,
            }
        )

    def _hear(self, report: Report, now: float) -> None:
        known = self._known.get(report.process)
        if known is not None:
            known.hear(report, now)
        elif len(self._known) < _MOST_PROCESSES:
            self._known[report.process] = _Known(report, now)

    def _news(self, key: str, seen: tuple[str, int] | None) -> tuple[tuple[str, int] | None, dict[str, Any]]:
        """Give the events of a key that came after ``seen``, and where that is now."""
        found: dict[str, Any] = {
            "key": shown(key),
            "job": is_job(key),
            "fresh": seen is None,
            "history": self._manager.settings.history_size,
        }
        try:
            messages = self._manager.asking.recent(key, _MOST_EVENTS)
        except BrokerError as error:
            return seen, {**found, "events": [], "trouble": str(error)[:500]}
        epoch, place = seen = seen or ("", 0)
        new = [message for message in messages if message.epoch != epoch or message.seq > place][-_MOST_EVENTS:]
        if messages:
            seen = messages[-1].epoch, messages[-1].seq
        now = time.monotonic()
        return seen, {**found, "events": [_event_row(message, now) for message in new]}


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _json(name: str, value: Any) -> Event:
    return Event(_text(value), event=name)


def _totals(found: list[_Known]) -> dict[str, float]:
    totals: dict[str, float] = {name: round(sum(known.rates[name] for known in found), 1) for name in _RATES}
    buckets = [0] * (len(LAG.bounds) + 1)
    for known in found:
        for place, count in enumerate(known.lags[: len(buckets)]):
            buckets[place] += count
    cells = [*([0] * LAG.start), *buckets, 0]
    beyond = 2 * LAG.bounds[-1]  # JSON has no infinity
    totals["lag_median"], totals["lag_p99"] = (min(LAG.quantile(cells, share), beyond) for share in (0.5, 0.99))
    totals["streams"] = sum(known.report.streams for known in found)
    totals["of_requests"] = sum(known.report.of_requests for known in found)
    totals["waiting"] = sum(known.report.waiting for known in found)
    totals["oldest"] = max((key.lag for known in found for key in known.report.keys), default=0.0)
    return totals


def _process_row(known: _Known, own: str, now: float) -> dict[str, Any]:
    report = known.report
    cells = [*([0] * LAG.start), *known.lags[: len(LAG.bounds) + 1], 0]
    full = len(known.lags) > len(LAG.bounds)
    return {
        "process": report.process,
        "host": report.host,
        "pid": report.pid,
        "seconds": round(report.seconds),
        "streams": report.streams,
        "waiting": report.waiting,
        "delivered": round(known.rates["delivered"], 1),
        "sent_bytes": round(known.rates["sent_bytes"]),
        "lag_p99": min(LAG.quantile(cells, 0.99), 2 * LAG.bounds[-1]) if full else 0.0,
        "draining": report.draining,
        "broker_up": report.broker_up,
        "own": report.process == own,
        "silent": round(now - known.heard, 1),
    }


def _key_rows(found: list[_Known]) -> tuple[list[dict[str, Any]], int]:
    rows: dict[tuple[str, bool], dict[str, Any]] = {}
    for known in found:
        for key in known.report.keys:
            row = rows.setdefault(
                (key.key, key.job),
                {"key": key.key, "job": key.job, "streams": 0, "processes": 0, "waiting": 0, "longest": 0, "lag": 0.0},
            )
            row["streams"] += key.streams
            row["processes"] += 1
            row["waiting"] += key.waiting
            row["longest"] = max(row["longest"], key.longest)
            row["lag"] = max(row["lag"], key.lag)
    most = sorted(rows.values(), key=lambda row: (-row["streams"], row["key"]))
    # Those that processes have left out may be the same ones in each: at most so many.
    return most[:_MOST_KEYS], max(0, len(most) - _MOST_KEYS) + sum(known.report.more_keys for known in found)


def _listened(key: str, found: list[_Known]) -> dict[str, Any]:
    streams: list[dict[str, Any]] = []
    more = 0
    for known in found:
        for listened in known.report.listened:
            if listened.key != key:
                continue
            more += listened.more_streams
            streams += [
                {
                    "name": stream.name,
                    "process": f"{known.report.host}/{known.report.pid}",
                    "seconds": round(stream.seconds),
                    "waiting": stream.waiting,
                    "sent": stream.sent,
                    "lag": stream.lag,
                    "user": stream.user,
                }
                for stream in listened.streams
            ]
    streams.sort(key=lambda stream: (-stream["waiting"], -stream["seconds"], stream["name"]))
    return {"streams": streams[:_MOST_STREAMS], "more_streams": more + max(0, len(streams) - _MOST_STREAMS)}


def _event_row(message: Message, now: float) -> dict[str, Any]:
    frame = message.frame
    if len(frame) > _LONGEST_FRAME:
        frame = frame[:_LONGEST_FRAME].decode("utf-8", "ignore").encode() + b"\n\n"
    decoded = EventDecoder(comments=True).feed(frame)
    event = decoded[0] if decoded else Event(comment="")
    data = event.data if event.data is not None else event.comment or ""
    return {
        "id": message.id[:300],
        "seq": message.seq,
        "event": (event.event or "")[:300],
        "comment": event.data is None,
        "all": message.key is None,
        "data": data[:_LONGEST_DATA],
        "cut": len(message.frame) > _LONGEST_FRAME or len(data) > _LONGEST_DATA,
        "bytes": len(message.frame),
        "ago": round(max(0.0, now - message.created), 2),
    }
