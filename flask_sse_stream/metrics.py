"""The numbers of an application for Prometheus, those of all its processes.

``prometheus_client`` sums the numbers of several processes from files in ``PROMETHEUS_MULTIPROC_DIR``, to which each
process writes its own; but it asks collectors, like the one here, only in the process that happens to be scraped. So
this one has files of its own there, beside those. The counts of a process live in its file, as memory: nothing is
written when something is counted, nothing is late, and a process that was killed leaves what it had. The state of the
others (their queues, their brokers) is noted there every few seconds, and counts for as long as they live, which the
lock on each file tells, whatever happened to its process and whoever has its number now.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import logging
import mmap
import os
import re
import struct
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, cast

from .counts import (
    BROKER_GAPS,
    BROKER_RECONNECTS,
    BROKER_SKIPPED,
    BROKER_UP,
    BYTES,
    CLOSED,
    COUNTERS,
    DELIVERED,
    DRAINING,
    DROPPED,
    FLUSH,
    KEYS,
    LAG,
    OPENED,
    OUTBOX,
    PUBLISHED,
    QUEUE,
    REFUSED,
    REPLAYED,
    RESETS,
    SIZE,
    Cells,
    Counts,
    Histogram,
)
from .errors import SettingsError
from .pools import PoolManager
from .stream import CloseReason, Lock
from .transports.base import current_runtime

__all__ = ["NAMES", "SSECollector"]

logger: logging.Logger = logging.getLogger("flask_sse_stream")

NAMES: Final = {
    "flask_sse_processes": "Processes that these numbers are of and that live.",
    "flask_sse_streams": "Open streams.",
    "flask_sse_keys": "Keys that have streams, counted in each process.",
    "flask_sse_outbox_events": "Events that were not offered to their streams yet.",
    "flask_sse_draining": "Processes that are about to stop.",
    "flask_sse_queue_frames": "Frames that wait for each open stream at this moment.",
    "flask_sse_broker_up": "Whether live events reach every process: 1 or 0.",
    "flask_sse_streams_opened_total": "Streams that began.",
    "flask_sse_streams_closed_total": "Streams that ended, by their close reason.",
    "flask_sse_streams_refused_total": "Streams that a limit refused.",
    "flask_sse_events_published_total": "Events published by these processes.",
    "flask_sse_events_delivered_total": "Events put into a client's socket or queue, once for each client.",
    "flask_sse_events_dropped_total": "Events that an overflow policy dropped, once for each client.",
    "flask_sse_events_replayed_total": "Events from the history for clients that came back, once for each client.",
    "flask_sse_resets_total": "Times that a client was told to load its state anew.",
    "flask_sse_sent_bytes_total": "Bytes of the streams, without what HTTP adds.",
    "flask_sse_lag_seconds": "From the publish of an event until all clients of a process have it, or it is queued.",
    "flask_sse_flush_seconds": "For how long one slice of the flusher's work kept other requests waiting.",
    "flask_sse_broker_reconnects_total": "Times that a listening connection to the broker was made anew.",
    "flask_sse_broker_gaps_total": "Times that events of a key were lost on their way to a process.",
    "flask_sse_broker_skipped_total": "Messages in the broker that were no events.",
}
"""Every metric by its name, with what it says."""

_COUNTERS: Final = {
    "flask_sse_streams_opened": OPENED,
    "flask_sse_streams_refused": REFUSED,
    "flask_sse_events_published": PUBLISHED,
    "flask_sse_events_delivered": DELIVERED,
    "flask_sse_events_dropped": DROPPED,
    "flask_sse_events_replayed": REPLAYED,
    "flask_sse_resets": RESETS,
    "flask_sse_sent_bytes": BYTES,
    "flask_sse_broker_reconnects": BROKER_RECONNECTS,
    "flask_sse_broker_gaps": BROKER_GAPS,
    "flask_sse_broker_skipped": BROKER_SKIPPED,
}
_REASONS: Final = [(CLOSED + place, reason.value) for place, reason in enumerate(CloseReason)]
_SUMS: Final = {"flask_sse_keys": KEYS, "flask_sse_outbox_events": OUTBOX, "flask_sse_draining": DRAINING}
_VERSION: Final = 1  # of the order of the cells; files of another one are not ours to read
_BYTES: Final = 8 * (1 + SIZE)
_SAMPLE_SECONDS: Final = 5.0


class SSECollector:
    """Gives the numbers of an application to a registry of ``prometheus_client``.

    ::

        REGISTRY.register(SSECollector(sse.manager))

    ``manager``
        the pool manager whose processes these are.
    ``directory``
        where the processes of the application, which all make a collector, put their numbers, so that each can give
        those of all, also of those that have ended. ``PROMETHEUS_MULTIPROC_DIR`` of the environment if left out; if
        that is not set, the numbers are those of this process. Empty it before the server starts.

    With a directory every registry has to be given the collector, also one that has a ``MultiProcessCollector``.

    Raises :class:`~flask_sse_stream.SettingsError` where ``prometheus_client`` is missing or the directory cannot be
    used.
    """

    def __init__(self, manager: PoolManager, directory: str | os.PathLike[str] | None = None) -> None:
        self._client = _prometheus_client()
        self._manager = manager
        directory = directory or os.environ.get("PROMETHEUS_MULTIPROC_DIR") or None
        self._shared = _Shared.of(manager, Path(directory)) if directory is not None else None

    def describe(self) -> Iterator[Any]:
        """Say which names there are, without asking anybody."""
        return self._families([0] * SIZE, [])

    def collect(self) -> Iterator[Any]:
        """Give the numbers of this moment."""
        self._manager.sample()
        own = self._manager.counts.read()
        others = list(self._shared.others()) if self._shared is not None else []
        total = [sum(cells) for cells in zip(own, *(cells for cells, _ in others), strict=True)]
        alive = [own, *(cells for cells, lives in others if lives)]
        total[COUNTERS:] = [sum(cells) for cells in zip(*(cells[COUNTERS:] for cells in alive), strict=True)]
        return self._families(total, alive)

    def _families(self, total: Sequence[int], alive: Sequence[Sequence[int]]) -> Iterator[Any]:
        core = self._client
        for name, cell in _COUNTERS.items():
            yield core.CounterMetricFamily(name, NAMES[f"{name}_total"], value=total[cell])
        closed = core.CounterMetricFamily(
            "flask_sse_streams_closed", NAMES["flask_sse_streams_closed_total"], labels=["reason"]
        )
        for cell, reason in _REASONS:
            closed.add_metric([reason], total[cell])
        yield closed
        gauges = {name: total[cell] for name, cell in _SUMS.items()}
        gauges["flask_sse_processes"] = len(alive)
        gauges["flask_sse_streams"] = sum(_open_streams(cells) for cells in alive)
        # A process without streams does not listen, and has nothing to complain of.
        gauges["flask_sse_broker_up"] = int(all(cells[BROKER_UP] or not _open_streams(cells) for cells in alive))
        for name, value in gauges.items():
            yield core.GaugeMetricFamily(name, NAMES[name], value=value)
        for name, cells in {"flask_sse_lag_seconds": LAG, "flask_sse_flush_seconds": FLUSH}.items():
            buckets, summed = _buckets(cells, total)
            yield core.HistogramMetricFamily(name, NAMES[name], buckets=buckets, sum_value=summed)
        name = "flask_sse_queue_frames"
        buckets, summed = _buckets(QUEUE, total)
        yield core.GaugeHistogramMetricFamily(name, NAMES[name], buckets=buckets, gsum_value=summed)


def _open_streams(cells: Sequence[int]) -> int:
    return cells[OPENED] - sum(cells[cell] for cell, _ in _REASONS)


def _buckets(histogram: Histogram, cells: Sequence[int]) -> tuple[list[tuple[str, int]], float]:
    counts, summed = histogram.read(cells)
    ends = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
    return list(zip(ends, itertools.accumulate(counts), strict=True)), summed


def _prometheus_client() -> Any:
    try:
        from prometheus_client import metrics_core
    except ImportError as error:
        raise SettingsError(
            "metrics need prometheus_client: pip install 'flask-sse-stream[metrics]', or prometheus-client"
        ) from error
    return metrics_core


class _Unmoved:
    """The cells of a process that has not counted anything yet: with the first count it gets its file.

    Many never do: parents of workers, and children that are about to become another program.
    """

    def __init__(self, counts: Counts, make: Callable[[], Cells]) -> None:
        self._counts = counts
        self._make = make
        self._making = Lock(lambda: None)

    def __getitem__(self, index: int) -> int:
        cells = self._counts.cells
        return cells[index] if cells is not self else 0

    def __setitem__(self, index: int, value: int) -> None:
        # Not waited for: a signal handler may have interrupted who holds it.
        if value and self._counts.cells is self and self._making.try_acquire():
            try:
                if self._counts.cells is self:
                    self._counts.cells = self._make()
            finally:
                self._making.release()
        if self._counts.cells is not self:
            self._counts.cells[index] = value


class _Shared:
    """The files of the processes of one application, of which one is this process's."""

    _all: ClassVar[weakref.WeakKeyDictionary[PoolManager, _Shared]] = weakref.WeakKeyDictionary()
    # Those of this process, whoever's they are: to open and close one here would let go of its lock (fcntl(2)).
    _mine: ClassVar[dict[Path, memoryview]] = {}

    @classmethod
    def of(cls, manager: PoolManager, directory: Path) -> _Shared:
        """Give that of an application: a registry is often made anew for each request."""
        shared = cls._all.get(manager)
        if shared is None:
            shared = cls._all[manager] = cls(manager, directory)
        return shared

    def __init__(self, manager: PoolManager, directory: Path) -> None:
        if not directory.is_dir() or not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
            raise SettingsError(
                f"PROMETHEUS_MULTIPROC_DIR {str(directory)!r} cannot be used: name a directory that exists, is on a "
                "local disk, and that the server's processes may read and write"
            )
        self._manager = weakref.ref(manager)
        self._directory = directory
        self._namespace = manager.settings.namespace
        self._path: Path | None = None
        self._sampler: object | None = None
        self._begin()
        manager.begun.append(self._begin)
        manager.starting.append(self._begin_to_sample)
        manager.stopping.append(self._stop_sampling)

    def _begin(self) -> None:
        manager = self._manager()
        self._path = self._sampler = None
        if manager is not None:
            manager.counts.move(_Unmoved(manager.counts, self._make))

    def _make(self) -> Cells:
        """Give the counts of this process a file of its own; called in the midst of its work, so nothing is raised."""
        try:
            return cast(Cells, self._make_file())
        except OSError:
            logger.exception("what this process counts is not in the metrics of the others")
            return [0] * SIZE

    def _make_file(self) -> memoryview:
        for number in itertools.count():
            # Not only the process's number: there may be a file of another that had it, or has it in another container.
            path = self._directory / f"flask-sse-{self._namespace}-{os.getpid()}-{number}.counts"
            with contextlib.suppress(FileExistsError):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                break
        # It is never closed: as long as this process lives, so do lock and file.
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
        os.ftruncate(descriptor, _BYTES)
        memory = memoryview(mmap.mmap(descriptor, _BYTES)).cast("q")
        memory[0] = _VERSION
        self._path = path
        self._mine[path] = memory
        return memory[1:]

    def others(self) -> Iterator[tuple[list[int], bool]]:
        """Give the numbers of all processes but this one, and whether each lives."""
        pattern = re.compile(rf"flask-sse-{re.escape(self._namespace)}-\d+-\d+\.counts")
        for path in sorted(self._directory.iterdir()):
            if pattern.fullmatch(path.name) is None or path == self._path:
                continue
            mine = self._mine.get(path)
            if mine is not None:  # of another pool manager
                yield list(mine[1:]), True
                continue
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                lives = _is_locked(file.fileno())
                data = file.read(_BYTES)
                if len(data) == _BYTES:  # else it is just being made
                    version, *cells = struct.unpack(f"={1 + SIZE}q", data)
                    if version == _VERSION:
                        yield cells, lives

    def _begin_to_sample(self) -> None:
        # Again where the thread of the one before has ended.
        self._sampler = sampler = object()
        current_runtime().spawn(functools.partial(_sample, weakref.ref(self), sampler, os.getpid()), "sse-metrics")

    def _stop_sampling(self) -> None:
        self._sampler = None

    def sample(self, sampler: object) -> bool:
        """Note the state of this process; ``False``: that is not yours to do any more."""
        manager = self._manager()
        if manager is None or self._sampler is not sampler:
            return False
        manager.sample()
        return True


def _sample(reference: weakref.ref[_Shared], sampler: object, pid: int) -> None:
    waiter = current_runtime().waiter()
    # A forked child has a copy of its parent's greenlets, and begins its own.
    while pid == os.getpid() and (shared := reference()) is not None and shared.sample(sampler):
        del shared
        waiter.wait(_SAMPLE_SECONDS)


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def _forked() -> None:
    _Shared._mine = {}


os.register_at_fork(after_in_child=_forked)
