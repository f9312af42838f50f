"""What a process counts, as whole numbers in one row of cells.

A row, because it can be moved: into a file that other processes read, and that outlives this one
(``metrics.py``). Counting costs the same there, since the file is memory; and what is in it is never late.

Cells up to :data:`COUNTERS` only ever grow. Those after it are the state at the moment of the last
:meth:`Counts.sample`. Times are nanoseconds. Nobody is kept from counting at the same moment: among threads a number
may be missed, as with any statistics that cost nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

__all__ = [
    "BROKER_GAPS",
    "BROKER_RECONNECTS",
    "BROKER_SKIPPED",
    "BROKER_UP",
    "BYTES",
    "CLOSED",
    "COUNTERS",
    "DELIVERED",
    "DRAINING",
    "DROPPED",
    "FLUSH",
    "KEYS",
    "LAG",
    "MAX_REASONS",
    "OPENED",
    "OUTBOX",
    "PUBLISHED",
    "QUEUE",
    "REFUSED",
    "REPLAYED",
    "RESETS",
    "SIZE",
    "Cells",
    "Counts",
    "Histogram",
]

OPENED, REFUSED, PUBLISHED, DELIVERED, DROPPED, REPLAYED, RESETS, BYTES = range(8)
BROKER_RECONNECTS, BROKER_GAPS, BROKER_SKIPPED = range(8, 11)
CLOSED: Final = 11
"""The first of the cells for the reasons why streams end, in the order of :class:`~.stream.CloseReason`."""
MAX_REASONS: Final = 13


class Cells(Protocol):
    """A list, or the memory of a file."""

    def __getitem__(self, index: int, /) -> int: ...
    def __setitem__(self, index: int, value: int, /) -> None: ...


class Histogram:
    """How often something was at most so much: the cells of its buckets, and of the sum of all.

    ``bounds``
        the upper ends of the buckets; a last one takes what is beyond.
    """

    def __init__(self, start: int, bounds: Sequence[float]) -> None:
        self.start = start
        self.bounds: tuple[float, ...] = tuple(bounds)
        self.sum: int = start + len(self.bounds) + 1
        self.end: int = self.sum + 1

    def add(self, cells: Cells, value: float, times: int = 1) -> None:
        """Count a value; the sum is of billionths."""
        cells[self.start + bisect_left(self.bounds, value)] += times
        cells[self.sum] += int(value * 1e9) * times

    def add_all(self, cells: Cells, values: Iterable[float]) -> None:
        """Count several values, in less time than one by one."""
        start, bounds, total = self.start, self.bounds, 0.0
        for value in values:
            cells[start + bisect_left(bounds, value)] += 1
            total += value
        cells[self.sum] += int(total * 1e9)

    def clear(self, cells: Cells) -> None:
        """Begin anew."""
        for index in range(self.start, self.end):
            cells[index] = 0

    def read(self, cells: Sequence[int]) -> tuple[list[int], float]:
        """Give how many there are in each bucket, and the sum."""
        return list(cells[self.start : self.sum]), cells[self.sum] / 1e9

    def quantile(self, cells: Sequence[int], share: float) -> float:
        """Give a bound below which ``share`` of the values are: 0.0 without any, ``inf`` beyond the last."""
        buckets, _ = self.read(cells)
        left = share * sum(buckets)
        for bound, count in zip((*self.bounds, float("inf")), buckets, strict=True):
            left -= count
            if left <= 0:
                return bound if sum(buckets) else 0.0
        return 0.0


LAG: Final = Histogram(
    CLOSED + MAX_REASONS, (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
)
"""Seconds from the publish of an event until every stream of this process has it in its socket or its queue."""
FLUSH: Final = Histogram(LAG.end, (0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5))
"""Seconds for which a slice of the flusher's work kept everything else of its loop waiting."""

COUNTERS: Final[int] = FLUSH.end
KEYS, OUTBOX, DRAINING, BROKER_UP = range(COUNTERS, COUNTERS + 4)
QUEUE: Final = Histogram(COUNTERS + 4, (0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000))
"""How many streams had at most so many frames waiting, when it was last looked."""
SIZE: Final[int] = QUEUE.end


class Counts:
    """The cells of one pool manager in one process. ``cells`` is looked up each time, since it may be moved."""

    __slots__ = ("cells",)

    def __init__(self) -> None:
        self.cells: Cells = [0] * SIZE

    def move(self, cells: Cells) -> None:
        """Go on counting in other cells, which are empty."""
        old, self.cells = self.cells, cells
        for index in range(SIZE):
            self.cells[index] += old[index]

    def read(self) -> list[int]:
        """Give the numbers of this moment."""
        cells = self.cells
        return [cells[index] for index in range(SIZE)]

    def sample(self, state: Iterable[tuple[int, int]], waiting: Iterable[int]) -> None:
        """Note the state of this moment: cells with their values, and how many frames wait for each stream."""
        cells = self.cells
        for index, value in state:
            cells[index] = value
        tally: dict[int, int] = {}
        for frames in waiting:
            tally[frames] = tally.get(frames, 0) + 1
        QUEUE.clear(cells)
        for frames, streams in tally.items():
            QUEUE.add(cells, frames, streams)
