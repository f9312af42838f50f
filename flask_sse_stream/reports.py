"""What each process says of itself when somebody asks all of them.

Who asks publishes an inquiry to :data:`~.access.CONTROL_KEY`, which every process hears that has had a stream; each
answers with one message to :data:`REPORT_KEY`, which nobody hears but who asks. Between two inquiries it costs nothing.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from .access import CONTROL_KEY
from .brokers.base import Delivery, broker_from_url
from .counts import LAG
from .event import Event, Message
from .keys import shown
from .settings import Settings
from .stream import Stream
from .transports.base import current_runtime

__all__ = ["REPORT_KEY", "KeyReport", "Report", "inquire", "inquiry_token"]

REPORT_KEY: Final = "\x03"
_MOST_KEYS: Final = 200
_LONGEST_INQUIRY: Final = 256
_BEGUN: Final = time.monotonic()


@dataclass(frozen=True, slots=True)
class KeyReport:
    """One key in one process."""

    key: str
    streams: int
    waiting: int  #: frames in the queues of all its streams
    longest: int  #: frames in the longest of these queues
    lag: float  #: seconds that the oldest event in them has waited


@dataclass(frozen=True, slots=True)
class Report:
    """One process."""

    host: str
    pid: int
    seconds: float  #: since it began
    streams: int
    waiting: int
    lag_median: float  #: seconds from a publish until all clients have it, or it is queued; the bound of a bucket
    lag_p99: float
    draining: bool
    broker_up: bool
    more_keys: int  #: keys that are not in ``keys``, which has those with the most streams
    keys: tuple[KeyReport, ...]

    @classmethod
    def of(cls, streams: Iterable[Stream], cells: Sequence[int], *, draining: bool, broker_up: bool) -> Report:
        """Look at a process. Streams may come and go meanwhile."""
        keys: dict[str, list[float]] = {}
        count = waiting = 0
        for stream in streams:
            count += 1
            frames, lag = stream.waiting, stream.lag
            waiting += frames
            for key in stream.keys:
                found = keys.setdefault(shown(key), [0, 0, 0, 0.0])
                found[0] += 1
                found[1] += frames
                found[2] = max(found[2], frames)
                found[3] = max(found[3], lag)
        most = sorted(keys.items(), key=lambda item: (-item[1][0], item[0]))
        median, p99 = (_finite(LAG.quantile(cells, share)) for share in (0.5, 0.99))
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            seconds=round(time.monotonic() - _BEGUN, 1),
            streams=count,
            waiting=waiting,
            lag_median=median,
            lag_p99=p99,
            draining=draining,
            broker_up=broker_up,
            more_keys=max(0, len(most) - _MOST_KEYS),
            keys=tuple(
                KeyReport(key, int(number), int(frames), int(longest), round(lag, 3))
                for key, (number, frames, longest, lag) in most[:_MOST_KEYS]
            ),
        )

    def encode(self, token: str) -> bytes:
        """Give the body of the message that answers an inquiry."""
        return Event(json.dumps({"report": token, **asdict(self)})).encode()

    @classmethod
    def decode(cls, frame: bytes, token: str) -> Report | None:
        """Read such a body; ``None`` for anything else: a store is not trusted."""
        try:
            found = json.loads(_data(frame))
            if found.pop("report") != token:
                return None
            found["keys"] = tuple(KeyReport(**item) for item in found["keys"])
            report = cls(**found)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        return report if _has_its_types(report) and all(map(_has_its_types, report.keys)) else None


_TYPES: Final[dict[str, Any]] = {"str": str, "int": int, "float": (int, float), "bool": bool}


def _has_its_types(value: Any) -> bool:
    return all(isinstance(getattr(value, item.name), _TYPES.get(str(item.type), object)) for item in fields(value))


def _finite(seconds: float) -> float:
    return min(seconds, 2 * LAG.bounds[-1])  # JSON has no infinity; it stands for "more than the last bound"


def _data(frame: bytes) -> bytes:
    return frame[frame.index(b"data: ") + 6 :]


def inquiry_token(frame: bytes) -> str | None:
    """Give the token of an inquiry; ``None`` for any other message of the control key."""
    if len(frame) > _LONGEST_INQUIRY:
        return None
    try:
        token = json.loads(_data(frame))["inquiry"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return token if isinstance(token, str) else None


def inquire(settings: Settings, seconds: float) -> list[Report]:
    """Ask every process of an application that has had a stream, and give what they say within so many seconds.

    Raises :class:`~flask_sse_stream.BrokerError`.
    """
    runtime = current_runtime()
    waiter = runtime.waiter()
    inbox: deque[Delivery] = deque()

    def deliver(delivery: Delivery) -> None:
        inbox.append(delivery)
        waiter.wake()

    broker = broker_from_url(settings)
    broker.start(deliver)
    token = secrets.token_hex(8)
    reports: dict[tuple[str, int], Report] = {}
    try:
        runtime.outside(lambda: broker.cover([REPORT_KEY], [], None))
        runtime.outside(lambda: broker.publish(CONTROL_KEY, Event(json.dumps({"inquiry": token})).encode()))
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            waiter.wait(left)
            while inbox:
                item = inbox.popleft()
                report = Report.decode(item.frame, token) if isinstance(item, Message) else None
                if report is not None:
                    reports[report.host, report.pid] = report
    finally:
        runtime.outside(broker.close)
    return sorted(reports.values(), key=lambda report: (report.host, report.pid))
