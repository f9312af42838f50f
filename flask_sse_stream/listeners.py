"""Who listens to what in this process. Every call is made under the lock of the pool manager."""

from __future__ import annotations

from .keys import is_job
from .stream import Stream

__all__ = ["Listeners", "Pool"]


class Pool:
    """The streams that listen to one key. It vanishes with its last stream."""

    __slots__ = ("_snapshot", "key", "streams")

    def __init__(self, key: str) -> None:
        self.key: str = key
        self.streams: dict[Stream, None] = {}
        self._snapshot: tuple[Stream, ...] | None = None

    def add(self, stream: Stream) -> None:
        """Take a stream in."""
        self.streams[stream] = None
        self._snapshot = None

    def discard(self, stream: Stream) -> None:
        """Let a stream go."""
        self.streams.pop(stream, None)
        self._snapshot = None

    def snapshot(self) -> tuple[Stream, ...]:
        """Give the streams of this moment, for a pass that others may join and leave meanwhile."""
        if self._snapshot is None:
            self._snapshot = tuple(self.streams)
        return self._snapshot


class Listeners:
    """All pools by their keys. It contains the keys that have streams; ``None``, all keys, while there is any."""

    def __init__(self) -> None:
        self._pools: dict[str, Pool] = {}
        self._everybody: tuple[Stream, ...] | None = None

    def __len__(self) -> int:
        return len(self._pools)

    def __contains__(self, key: object) -> bool:
        return key in self._pools if key is not None else bool(self._pools)

    def add(self, stream: Stream) -> None:
        """Take a stream into the pools of its keys."""
        self._everybody = None
        for key in stream.keys:
            pool = self._pools.get(key)
            if pool is None:
                pool = self._pools[key] = Pool(key)
            pool.add(stream)

    def discard(self, stream: Stream) -> None:
        """Let a stream go."""
        self._everybody = None
        for key in stream.keys:
            pool = self._pools[key]
            pool.discard(stream)
            if not pool.streams:
                del self._pools[key]

    def of(self, key: str | None) -> tuple[Stream, ...]:
        """Give the streams of this moment that a message of ``key`` is for; of ``None``, all that have keys."""
        if key is not None:
            pool = self._pools.get(key)
            return pool.snapshot() if pool is not None else ()
        if self._everybody is None:
            pools = [pool for key, pool in self._pools.items() if not is_job(key)]
            self._everybody = tuple(dict.fromkeys(stream for pool in pools for stream in pool.streams))
        return self._everybody

    def of_jobs(self) -> list[Stream]:
        """Give the streams of all jobs, which what goes to all is not for."""
        return [stream for key, pool in self._pools.items() if is_job(key) for stream in pool.streams]

    def count(self, key: str) -> int:
        """How many streams listen to ``key``."""
        pool = self._pools.get(key)
        return len(pool.streams) if pool is not None else 0

    def keys(self) -> list[str]:
        """The keys that have streams."""
        return list(self._pools)
