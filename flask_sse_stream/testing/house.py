"""A pool manager whose flusher is the test: streams without a server, a thread or a wait."""

from __future__ import annotations

from collections.abc import Callable

from ..brokers.base import Broker, broker_from_url
from ..event import Event, EventDecoder
from ..pools import PoolManager
from ..settings import Settings
from ..stream import Stream

__all__ = ["House", "ManualRuntime", "RecordingTransport"]


class RecordingTransport:
    ready = None

    def __init__(self) -> None:
        self.wakes: int = 0
        self.closes: int = 0

    def wake(self) -> None:
        self.wakes += 1

    def close(self) -> None:
        self.closes += 1


class ManualRuntime:
    """Its flusher does nothing: the test calls ``flush``."""

    def __init__(self) -> None:
        self.alive: bool = True
        self.wakes: int = 0
        self.turns: int = 0
        self.on_turn: Callable[[], object] = lambda: None
        self.started: int = 0

    def waiter(self) -> object:
        raise AssertionError("nobody waits here")

    def spawn(self, function: Callable[[], None]) -> object:
        raise AssertionError("nothing runs beside here")

    def start_flusher(self, flush: Callable[[], float | None]) -> ManualRuntime:
        self.flush = flush
        self.started += 1
        self.alive = True
        return self

    def wake(self) -> None:
        self.wakes += 1

    def give_turn(self) -> bool:
        self.turns += 1
        self.on_turn()
        return True

    def rest(self, seconds: float) -> bool:
        while self.flush() == 0.0:
            pass
        return False

    def stop(self) -> None:
        self.alive = False


class House:
    """A pool manager with streams whose bytes the test takes, in one thread."""

    def __init__(self, *, broker: Callable[[Settings], Broker] = broker_from_url, **options: object) -> None:
        self.manager: PoolManager = PoolManager(Settings(**options), broker=broker)  # type: ignore[arg-type]
        self.runtime: ManualRuntime = ManualRuntime()
        self.decoders: dict[Stream, EventDecoder] = {}

    def open(self, *keys: str, after: str | None = None) -> Stream:
        return self.manager.open(keys or ("k",), RecordingTransport(), self.runtime, last_event_id=after)  # type: ignore[arg-type]

    def attach(self) -> Stream:
        stream = Stream(self.manager)
        self.manager.attach(stream, RecordingTransport(), self.runtime)  # type: ignore[arg-type]
        return stream

    def settle(self) -> None:
        """Wait until what was published has been delivered here."""
        broker, epoch = self.manager._broker, self.manager._windows.epoch
        if broker.remembers and epoch is not None:
            # A client that claims to be ahead, so that the log is asked.
            broker.cover((), (), f"{epoch}-{10**15}")

    def flush(self) -> float | None:
        """Let the flusher do everything there is to do."""
        self.settle()
        while (delay := self.manager.flush()) is not None and delay < 0.02:
            pass
        return delay

    def take(self, stream: Stream) -> bytes:
        """Everything the stream has for its client."""
        self.flush()
        taken = b""
        while data := stream.take():
            taken += data
        return taken

    def events(self, stream: Stream) -> list[Event]:
        """The events that a client of this stream sees next, as a browser would."""
        decoder = self.decoders.setdefault(stream, EventDecoder())
        return decoder.feed(self.take(stream))

    def data(self, stream: Stream) -> list[str | None]:
        return [event.data for event in self.events(stream)]

    def cursor(self, stream: Stream) -> str:
        """What the client of this stream would send as Last-Event-ID now."""
        self.events(stream)
        return self.decoders[stream].last_event_id
