"""Random joins, leaves, reconnects and publishes: what every client saw is what a model says it must have seen.

A test makes ``TestCase`` of a machine and says how a pool manager is made.
"""

from __future__ import annotations

import json

try:
    import hypothesis.strategies as st
    from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
except ImportError as _error:
    raise ImportError("the contract of replay needs Hypothesis: pip install hypothesis") from _error

from ...event import Event
from ...stream import CloseReason, Stream
from ..house import House


class ReplayMachine(RuleBasedStateMachine):
    """Random joins, leaves, reconnects and publishes; what every client saw is what the model says it must have seen.

    A client is its keys, the cursor its browser holds, and the list of what it was given since it first came. The
    model knows the whole log. What a client has must be the log's events for its keys from where it began, without
    gap or repetition, unless it was told ``stream-reset``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str | None, str]] = []
        self.house: House = self.make_house()
        self.clients: list[dict[str, object]] = []

    def make_house(self) -> House:
        """Override it to say where the log is."""
        return House(history_size=4, queue_events=6)

    keys: st.SearchStrategy[list[str]] = st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True)

    @initialize()
    def begin(self) -> None:
        self.house.manager.publish("a", "first")
        self.log.append(("a", "first"))

    @rule(key=st.sampled_from(["a", "b", "c", None]), own=st.booleans())
    def publish(self, key: str | None, own: bool) -> None:
        data = str(len(self.log))
        # Never the same one twice: then the newest place counts, and what was between is the user's choice.
        if key is None:
            self.house.manager.publish_all(data, id=f"own {data}" if own else None)
        else:
            self.house.manager.publish(key, data, id=f"own {data}" if own else None)
        self.log.append((key, data))

    @rule(key=st.sampled_from("abc"))
    def publish_more_than_is_kept(self, key: str) -> None:
        for _ in range(5):
            self.publish(key, own=False)

    @rule(keys=keys)
    def join(self, keys: list[str]) -> None:
        stream = self.house.open(*keys)
        # A client has come when the first bytes have reached it. One that was too slow before that has not.
        cursor = self.house.cursor(stream)
        if not cursor:
            assert stream.reason is CloseReason.SLOW
            return
        self.clients.append({"keys": keys, "stream": stream, "cursor": cursor, "from": len(self.log), "saw": []})

    @rule(which=st.integers(0, 50))
    def read(self, which: int) -> None:
        if self.clients:
            self._read(self.clients[which % len(self.clients)])

    def _read(self, client: dict[str, object]) -> None:
        stream = client["stream"]
        assert isinstance(stream, Stream)
        saw = client["saw"]
        assert isinstance(saw, list)
        for event in self.house.events(stream):
            if event.event == "stream-reset":
                place = int((event.id or "").rpartition("-")[2])
                self._check_that_it_names_what_was_lost(event, self._due(client)[len(saw) :], place, client)
                client["from"] = place
                saw.clear()
            else:
                saw.append(event.data)
        client["cursor"] = self.house.decoders[stream].last_event_id or client["cursor"]

    def _due(self, client: dict[str, object]) -> list[tuple[int, str | None, str]]:
        """What the log has for a client from where it began."""
        start, keys = client["from"], client["keys"]
        assert isinstance(start, int)
        assert isinstance(keys, list)
        entries = [(place, key, data) for place, (key, data) in enumerate(self.log, 1)]
        return [(place, key, data) for place, key, data in entries[start:] if key is None or key in keys]

    def _check_that_it_names_what_was_lost(
        self, reset: Event, unseen: list[tuple[int, str | None, str]], goes_on: int, client: dict[str, object]
    ) -> None:
        keys, named = client["keys"], json.loads(reset.data or "")["keys"]
        assert isinstance(keys, list)
        for place, key, _ in unseen:
            if place <= goes_on:
                assert {*keys} <= {*named} if key is None else key in named

    @rule(key=st.sampled_from("abc"))
    def publish_and_close(self, key: str) -> None:
        self.publish(key, own=False)
        # One that was too slow has been ended already.
        listening = [stream for stream in self.house.manager.streams(key) if stream.reason is None]
        assert self.house.manager.close(key) == len(listening)
        for stream in listening:
            events = self.house.events(stream)
            assert [event.event for event in events[-1:]] == ["close"]
            assert events[-2].data == self.log[-1][1], "what was said before the end comes before it"
        self.clients = [client for client in self.clients if client["stream"] not in listening]

    @rule(which=st.integers(0, 50), read_first=st.booleans())
    def reconnect(self, which: int, read_first: bool) -> None:
        if not self.clients:
            return
        client = self.clients[which % len(self.clients)]
        if read_first or not client["cursor"]:
            self._read(client)
        stream, keys = client["stream"], client["keys"]
        assert isinstance(stream, Stream)
        assert isinstance(keys, list)
        stream.close(CloseReason.PEER)
        client["stream"] = self.house.open(*keys, after=str(client["cursor"]))

    @invariant()
    def nobody_lost_or_doubled_anything(self) -> None:
        for client in self.clients:
            saw = client["saw"]
            assert isinstance(saw, list)
            assert saw == [data for _, _, data in self._due(client)][: len(saw)]

    def teardown(self) -> None:
        self.house.flush()
        for client in self.clients:
            stream = client["stream"]
            assert isinstance(stream, Stream)
            if stream.closed:  # too slow in between: its browser would come back
                self._read(client)
                keys = client["keys"]
                assert isinstance(keys, list)
                client["stream"] = self.house.open(*keys, after=str(client["cursor"]))
            self._read(client)
            assert client["saw"] == [data for _, _, data in self._due(client)]
        self.house.manager.shutdown()


class OutsideReplayMachine(ReplayMachine):
    """The same over a log outside the process, whose windows are fetched."""

    @rule(read_first=st.booleans())
    def restart(self, read_first: bool) -> None:
        """Another process takes over, and every client comes back to it."""
        if read_first:
            for client in self.clients:
                self._read(client)
        self.house.manager.shutdown()
        self.house: House = self.make_house()
        for client in self.clients:
            keys = client["keys"]
            assert isinstance(keys, list)
            client["stream"] = self.house.open(*keys, after=str(client["cursor"]))
