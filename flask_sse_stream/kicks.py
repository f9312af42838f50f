"""The order to end one stream, in whatever process it is: what an inspector's button sends.

It goes to :data:`~.access.CONTROL_KEY`, which every process hears that has had a stream.
"""

from __future__ import annotations

import json
from typing import Final, NamedTuple

from .event import Event
from .stream import Stream

__all__ = ["Kick", "stream_name"]

_VERSION: Final = 1
_LONGEST_BODY: Final = 256


def stream_name(process: str, stream: Stream) -> str:
    """Name a stream among those of all processes; ``process`` is the name of the one that has it.

    Where it is in memory may be another one's place a moment later, so when it began is in the name as well.
    """
    return f"{process}-{id(stream):x}-{int(stream.opened * 1e6):x}"


class Kick(NamedTuple):
    """End the stream of this name: for good, or with ``reconnect`` so that its client comes back."""

    stream: str
    reconnect: bool

    def encode(self) -> bytes:
        """Give the body of the message that tells all processes."""
        return Event(json.dumps({"kick": [_VERSION, self.stream, self.reconnect]})).encode()

    @classmethod
    def decode(cls, frame: bytes) -> Kick | None:
        """Read such a body, with or without an id before it; ``None`` for anything else: a store is not trusted."""
        if len(frame) > _LONGEST_BODY:
            return None
        try:
            version, stream, reconnect = json.loads(frame[frame.index(b"data: ") + 6 :])["kick"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        sound = version == _VERSION and isinstance(stream, str) and isinstance(reconnect, bool)
        return cls(stream, reconnect) if sound else None
