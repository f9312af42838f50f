"""Who may listen, as values: what a stream was let in with, and what takes that right away again.

A ticket's times are of the wall clock, because tickets go from one machine to another, and because the sessions that
they stand for end by it too. It is the only clock here that can be set: machines that share a log keep theirs in step.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from .event import Event

__all__ = ["CONTROL_KEY", "Revocation", "Ticket", "expiry_notice", "is_seconds", "mark_names", "now", "user_name"]

CONTROL_KEY: Final = "\x01"
"""The key of what processes tell each other. No stream can listen to it: a key has no control character."""

_LONGEST_BODY: Final = 8192  # of a revocation: a user and a key of 255 characters each, escaped as JSON


def now() -> float:
    """Give the seconds of the wall clock."""
    return time.time()


@dataclass(frozen=True, slots=True, init=False)
class Ticket:
    """The right to listen to ``keys``, and to no others.

    ``user``
        whose it is, for :meth:`~flask_sse_stream.SSE.revoke`; a whole number becomes text.
    ``expires``
        when it ends, in seconds of the wall clock (``time.time()``); ``None``: never.
    ``issued``
        when it was given; now, if left out. What was revoked after that is refused.

    Raises :class:`ValueError` for what none of these can be.
    """

    keys: tuple[str, ...]
    user: str | None
    expires: float | None
    issued: float

    def __init__(
        self,
        keys: str | Iterable[str],
        *,
        user: str | int | None = None,
        expires: float | None = None,
        issued: float | None = None,
    ) -> None:
        issued = now() if issued is None else issued
        for name, value in (("expires", expires), ("issued", issued)):
            if value is not None and not is_seconds(value):
                raise ValueError(f"{name} must be seconds since 1970, as time.time() gives them, not {value!r}")
        object.__setattr__(self, "keys", (keys,) if isinstance(keys, str) else tuple(keys))
        object.__setattr__(self, "user", user_name(user))
        object.__setattr__(self, "expires", expires)
        object.__setattr__(self, "issued", issued)

    def left(self) -> float | None:
        """For how many more seconds it is good; ``None``: for ever."""
        return None if self.expires is None else self.expires - now()


def is_seconds(value: Any) -> bool:
    """Whether this is a time, or a number of seconds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def user_name(user: Any) -> str | None:
    """Give a user as text: many have whole numbers for them. Raises :class:`ValueError` for anything else."""
    if isinstance(user, int) and not isinstance(user, bool):
        user = str(user)
    if user is not None and not (isinstance(user, str) and 0 < len(user) <= 255 and user.isprintable()):
        raise ValueError(f"user must be a whole number or 1 to 255 printable characters, not {user!r:.80}")
    return user


class Revocation(NamedTuple):
    """What was revoked at a time: the rights of ``user``, or to ``key``, or of this user to this key."""

    user: str | None
    key: str | None
    at: float

    def covers(self, ticket: Ticket | None, keys: Sequence[str]) -> bool:
        """Whether it takes the right of a stream that listens to ``keys`` and was let in with ``ticket``."""
        if self.key is not None and self.key not in keys and (ticket is None or self.key not in ticket.keys):
            return False
        if ticket is None:
            return self.user is None
        return ticket.issued <= self.at and self.user in (None, ticket.user)

    def mark_name(self) -> str:
        """Name it in the store of a broker."""
        return _mark_name(self.user, self.key)

    def encode(self) -> bytes:
        """Give the body of the message that tells other processes."""
        return Event(json.dumps({"revoke": self})).encode()

    @classmethod
    def decode(cls, body: bytes) -> Revocation | None:
        """Read such a body, with or without an id before it; ``None`` for anything else: a store is not trusted."""
        if len(body) > _LONGEST_BODY:
            return None
        try:
            user, key, at = json.loads(body[body.index(b"data: ") + 6 :])["revoke"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        texts = all(text is None or isinstance(text, str) for text in (user, key))
        return cls(user, key, at) if texts and (user, key) != (None, None) and is_seconds(at) else None


def mark_names(ticket: Ticket) -> list[str]:
    """Name every revocation that would take this ticket's right."""
    pairs: list[tuple[str | None, str | None]] = [(None, key) for key in ticket.keys]
    if ticket.user is not None:
        pairs += [(ticket.user, key) for key in (None, *ticket.keys)]
    return [_mark_name(user, key) for user, key in pairs]


def _mark_name(user: str | None, key: str | None) -> str:
    # As JSON, so that no two pairs have one form; hashed, so that a store takes it whatever is in it.
    return hashlib.sha256(json.dumps([user, key]).encode()).hexdigest()[:32]


def expiry_notice(reason: str) -> bytes:
    """Make the last event of a stream whose right has ended: ``reason`` is ``expired`` or ``revoked``.

    It has no id, so that a page goes on with a new ticket from where it is.
    """
    return Event(json.dumps({"reason": reason}), event="stream-expired").encode()
