"""What each process says of itself when somebody asks all of them.

Who asks publishes an :class:`Inquiry` to :data:`~.access.CONTROL_KEY`, which every process hears that has had a stream;
each answers with one message to :data:`~.keys.REPORT_KEY`, which nobody hears but who asks. Between two inquiries it
costs nothing.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, NamedTuple

from .access import CONTROL_KEY
from .counts import (
    BYTES,
    CLOSED,
    DELIVERED,
    DROPPED,
    LAG,
    MAX_REASONS,
    OPENED,
    PUBLISHED,
    REFUSED,
    REPLAYED,
    RESETS,
)
from .event import Event, Message
from .hearing import Hearing
from .keys import REPORT_KEY, is_job, shown
from .kicks import stream_name
from .settings import Settings
from .stream import Stream

__all__ = ["MAX_ASKED", "REPORT_KEY", "Inquiry", "KeyReport", "Listened", "Report", "StreamReport", "inquire"]

MAX_ASKED: Final = 8
"""The most keys whose streams are asked for at a time."""

_VERSION: Final = 1
_MOST_KEYS: Final = 200
_MOST_STREAMS: Final = 50
_MOST_NAME: Final = 300
_MOST_BUCKETS: Final = 100
_LONGEST_INQUIRY: Final = 32 * 1024
_LONGEST_REPORT: Final = 2 * 1024 * 1024
_MOST: Final = 2**62
_BEGUN: Final = time.monotonic()


class Inquiry(NamedTuple):
    """Asks every process how it is, and which streams the ``keys`` have; the answer carries ``token``."""

    token: str
    keys: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """Give the body of the message that asks."""
        return Event(json.dumps({"inquiry": self.token, "of": self.keys})).encode()

    @classmethod
    def decode(cls, frame: bytes) -> Inquiry | None:
        """Read such a body; ``None`` for any other message of the control key: a store is not trusted."""
        if len(frame) > _LONGEST_INQUIRY:
            return None
        try:
            found = json.loads(_data(frame))
            token, keys = found["inquiry"], found.get("of", [])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        sound = isinstance(keys, list) and len(keys) <= MAX_ASKED and all(isinstance(key, str) for key in keys)
        return cls(token, tuple(keys)) if sound and isinstance(token, str) and len(token) <= _MOST_NAME else None


@dataclass(frozen=True, slots=True)
class KeyReport:
    """One key in one process."""

    key: str  #: a job by its id
    streams: int
    waiting: int  #: frames in the queues of all its streams
    longest: int  #: frames in the longest of these queues
    lag: float  #: seconds that the oldest event in them has waited
    job: bool


@dataclass(frozen=True, slots=True)
class StreamReport:
    """One stream."""

    name: str  #: for :meth:`PoolManager.kick`
    seconds: float  #: since it began
    waiting: int  #: frames in its queue
    sent: int  #: bytes
    lag: float  #: seconds that the oldest of them has waited
    user: str | None


@dataclass(frozen=True, slots=True)
class Listened:
    """The streams of one key in one process that was asked for."""

    key: str  #: as it was asked for
    more_streams: int  #: those that are not in ``streams``, which has those with the longest queues, then the oldest
    streams: tuple[StreamReport, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """One process."""

    process: str  #: at random, another one for one that was started anew
    host: str
    pid: int
    seconds: float  #: since it began
    streams: int
    of_requests: int  #: those of them that are of one request, and have no key
    waiting: int
    lag_median: float  #: seconds from a publish until all clients have it, or it is queued; the bound of a bucket
    lag_p99: float
    lag_buckets: tuple[int, ...]  #: how many events were in each bucket of :data:`~.counts.LAG` since it began
    draining: bool
    broker_up: bool
    opened: int  #: this and what follows only ever grow
    closed: int
    refused: int
    published: int
    delivered: int
    dropped: int
    replayed: int
    resets: int
    sent_bytes: int
    more_keys: int  #: keys that are not in ``keys``, which has those with the most streams
    keys: tuple[KeyReport, ...]
    listened: tuple[Listened, ...]  #: of the keys that were asked for

    @classmethod
    def of(
        cls,
        streams: Iterable[Stream],
        cells: Sequence[int],
        *,
        process: str,
        draining: bool,
        broker_up: bool,
        of: Sequence[str] = (),
    ) -> Report:
        """Look at a process, and at the streams of the keys ``of``. Streams may come and go meanwhile."""
        keys: dict[str, list[float]] = {}
        listened: dict[str, list[Stream]] = {key: [] for key in of[:MAX_ASKED]}
        count = waiting = of_requests = 0
        for stream in streams:
            count += 1
            frames = stream.waiting
            lag = stream.lag if frames or stream.writing_since else 0.0
            waiting += frames
            of_requests += not stream.keys
            for key in stream.keys:
                found = keys.get(key)
                if found is None:
                    found = keys[key] = [0, 0, 0, 0.0]
                found[0] += 1
                if frames:
                    found[1] += frames
                    found[2] = max(found[2], frames)
                if lag:
                    found[3] = max(found[3], lag)
                if key in listened:
                    listened[key].append(stream)
        most = sorted(keys.items(), key=lambda item: (-item[1][0], item[0]))
        median, p99 = (_finite(LAG.quantile(cells, share)) for share in (0.5, 0.99))
        return cls(
            process=process,
            host=socket.gethostname()[:_MOST_NAME],
            pid=os.getpid(),
            seconds=round(time.monotonic() - _BEGUN, 3),
            streams=count,
            of_requests=of_requests,
            waiting=waiting,
            lag_median=median,
            lag_p99=p99,
            lag_buckets=tuple(LAG.read(cells)[0]),
            draining=draining,
            broker_up=broker_up,
            opened=cells[OPENED],
            closed=sum(cells[CLOSED : CLOSED + MAX_REASONS]),
            refused=cells[REFUSED],
            published=cells[PUBLISHED],
            delivered=cells[DELIVERED],
            dropped=cells[DROPPED],
            replayed=cells[REPLAYED],
            resets=cells[RESETS],
            sent_bytes=cells[BYTES],
            more_keys=max(0, len(most) - _MOST_KEYS),
            keys=tuple(
                KeyReport(shown(key), int(number), int(frames), int(longest), round(lag, 3), is_job(key))
                for key, (number, frames, longest, lag) in most[:_MOST_KEYS]
            ),
            listened=tuple(_listened(process, key, found) for key, found in listened.items() if found),
        )

    def encode(self, token: str, limit: int = _LONGEST_REPORT) -> bytes:
        """Give the body of the message that answers an inquiry; with fewer keys and streams where it is too long."""
        report = self
        while True:
            body = Event(json.dumps({"report": token, "version": _VERSION, **asdict(report)})).encode()
            if len(body) <= min(limit, _LONGEST_REPORT) or not (report.keys or report.listened):
                return body
            half = len(report.keys) // 2
            left_out = report.more_keys + len(report.keys) - half
            report = replace(report, keys=report.keys[:half], more_keys=left_out, listened=report.listened[:half])

    @classmethod
    def decode(cls, frame: bytes, token: str) -> Report | None:
        """Read such a body; ``None`` for anything else: a store is not trusted."""
        if len(frame) > _LONGEST_REPORT:
            return None
        try:
            found = json.loads(_data(frame))
            if found.pop("report") != token or found.pop("version") != _VERSION:
                return None
            found["lag_buckets"] = tuple(found["lag_buckets"])
            found["keys"] = tuple(KeyReport(**item) for item in found["keys"])
            found["listened"] = tuple(
                Listened(**{**item, "streams": tuple(StreamReport(**stream) for stream in item["streams"])})
                for item in found["listened"]
            )
            report = cls(**found)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        parts = (report, *report.keys, *report.listened, *(part for item in report.listened for part in item.streams))
        few = len(report.keys) <= _MOST_KEYS and len(report.listened) <= MAX_ASKED
        return report if few and all(map(_is_sound, parts)) else None


def _listened(process: str, key: str, streams: list[Stream]) -> Listened:
    now = time.monotonic()
    streams.sort(key=lambda stream: (-stream.waiting, stream.opened))
    shown_ones = tuple(
        StreamReport(
            name=stream_name(process, stream),
            seconds=round(now - stream.opened, 1),
            waiting=stream.waiting,
            sent=max(0, stream.sent),
            lag=round(stream.lag, 3),
            user=stream.ticket.user if stream.ticket is not None else None,
        )
        for stream in streams[:_MOST_STREAMS]
    )
    return Listened(key, max(0, len(streams) - _MOST_STREAMS), shown_ones)


def _is_sound(value: Any) -> bool:
    return all(_fits(getattr(value, item.name), str(item.type)) for item in fields(value))


def _fits(value: Any, wanted: str) -> bool:
    if wanted == "bool":
        return isinstance(value, bool)
    if wanted in ("int", "float"):
        # A NaN is not at least 0. JSON as Python reads it has that, and infinity too.
        number = isinstance(value, int if wanted == "int" else (int, float)) and not isinstance(value, bool)
        return number and 0 <= value <= _MOST
    if wanted == "tuple[int, ...]":
        return len(value) <= _MOST_BUCKETS and all(_fits(item, "int") for item in value)
    if wanted in ("str", "str | None"):
        return (isinstance(value, str) and len(value) <= _MOST_NAME) or (value is None and wanted != "str")
    return len(value) <= _MOST_KEYS


def _finite(seconds: float) -> float:
    return min(seconds, 2 * LAG.bounds[-1])  # JSON has no infinity; it stands for "more than the last bound"


def _data(frame: bytes) -> bytes:
    return frame[frame.index(b"data: ") + 6 :]


def inquire(settings: Settings, seconds: float) -> list[Report]:
    """Ask every process of an application that has had a stream, and give what they say within so many seconds.

    Raises :class:`~flask_sse_stream.BrokerError`.
    """
    token = secrets.token_hex(8)
    reports: dict[str, Report] = {}
    with Hearing(settings) as hearing:
        broker = hearing.broker
        hearing.outside(lambda: broker.cover([REPORT_KEY], [], None))
        hearing.outside(lambda: broker.publish(CONTROL_KEY, Inquiry(token).encode()))
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            hearing.wait(left)
            for item in hearing.take():
                report = Report.decode(item.frame, token) if isinstance(item, Message) else None
                if report is not None:
                    reports[report.process] = report
    return sorted(reports.values(), key=lambda report: (report.host, report.pid))
