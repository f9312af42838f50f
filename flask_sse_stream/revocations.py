"""What has been revoked since this process can hear of it: ends the streams that it concerns.

A revocation is in the broker's store before the message that tells of it is published. So who opens a stream looks
into the store when messages are heard already, and asks here once more, under the lock under which the stream is
registered: whatever was revoked in between has been heard by then, or finds the stream when it is. Every call is made
under the lock of the pool manager.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import Final

from .access import Revocation, Ticket, expiry_notice
from .event import Message
from .rounds import Rounds
from .stream import CloseReason, Stream

__all__ = ["Revocations"]

_RECENT: Final = 1000


class Revocations:
    """Has the rounds look for streams whose right was revoked.

    ``retry``
        makes the block that tells a client when to come back, each time with another time in it.
    ``count``
        of what may have concerned any stream; it only ever grows.
    """

    def __init__(self, rounds: Rounds, retry: Callable[[], bytes]) -> None:
        self._rounds = rounds
        self._retry = retry
        self.count: int = 0
        self._recent: deque[Revocation] = deque(maxlen=_RECENT)

    def take(self, message: Message) -> None:
        """Take what another process, or this one, has published to :data:`CONTROL_KEY`."""
        revocation = Revocation.decode(message.frame)
        if revocation is None:
            return  # A message of a later version of this package, or of somebody who has no business here.
        self.count += 1
        self._recent.append(revocation)

        def end(stream: Stream) -> tuple[CloseReason, bytes] | None:
            if not stream.keys or not revocation.covers(stream.ticket, stream.keys):
                return None
            return CloseReason.EXPIRED, self._retry() + expiry_notice("revoked")

        self._rounds.search_soon(end)

    def lost(self) -> None:
        """Something may have been revoked without a word here: let everybody come back who had to be let in."""
        self.count += 1
        self._recent.clear()

        def end(stream: Stream) -> tuple[CloseReason, bytes] | None:
            return (CloseReason.ROTATED, self._retry()) if stream.ticket is not None else None

        self._rounds.search_soon(end)

    def since(self, count: int, ticket: Ticket) -> bool | None:
        """Whether ``ticket`` was revoked since there were ``count``; ``None``: it has to be looked up again."""
        new = self.count - count
        if new > len(self._recent):
            return None
        recent = itertools.islice(reversed(self._recent), new)
        return any(revocation.covers(ticket, ticket.keys) for revocation in recent)
