"""What may be a key: the name of a pool, of a job, and of whatever else a namespace tells apart.

A job's events are a key of the log like any other, so that replay, brokers and several processes are the same for them.
Its form is one that no key of a user's can have, and that no text of a request's can become.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from .errors import EventError

__all__ = [
    "JOB_ENDS",
    "JOB_MARK",
    "MAX_KEYS",
    "REPORT_KEY",
    "JobKey",
    "Kept",
    "check_key",
    "check_keys",
    "is_job",
    "shown",
]

MAX_KEYS: Final = 100
"""The most keys that one stream may listen to."""

REPORT_KEY: Final = "\x03"
"""The key of what processes say of themselves. No stream can listen to it: a key has no control character."""

_MAX_KEY_LENGTH: Final = 255
_JOB: Final = "\x02"  # a control character, which check_key() refuses
_NOT_IN_KEYS: Final = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

JOB_ENDS: Final = ("done", "failed", "cancelled")
"""The names of a job's last event."""

JOB_MARK: Final = "job."
"""What the ids of a job's own marks begin with, which say how far it is and fire nothing."""


class JobKey(str):
    """The key of one job. Who has one made it from the job's id: text from outside is never an instance."""

    __slots__ = ()

    @classmethod
    def of(cls, identifier: str) -> JobKey:
        """Give the key of the job with this id."""
        return cls(_JOB + identifier)


def is_job(key: str | None) -> bool:
    """Say whether a key, as a broker gives it back too, is a job's."""
    return key is not None and key.startswith(_JOB)


def shown(key: str) -> str:
    """Name a key to a client: a job by its id."""
    return key.removeprefix(_JOB)


class Kept(NamedTuple):
    """What is kept of a key: the latest ``size`` events.

    ``ttl``
        seconds that each is kept; with ``whole``, that all are kept after the newest of them, since what is read from
        its beginning is of no use without it.
    """

    size: int
    ttl: float
    whole: bool = False


def check_key(key: Any, called: str = "key") -> str:
    """Give back a key that is text of 1 to 255 characters without control characters; else :class:`EventError`.

    Keys are compared by code points; no character has a meaning beyond itself. A ``JobKey`` is good.
    """
    if isinstance(key, JobKey):
        return key
    if not isinstance(key, str):
        raise EventError(f"{called} must be text, not {type(key).__name__}")
    if not key or len(key) > _MAX_KEY_LENGTH:
        raise EventError(f"{called} must have 1 to {_MAX_KEY_LENGTH} characters, not {len(key)}")
    bad = _NOT_IN_KEYS.search(key)
    if bad is not None:
        raise EventError(f"{called} must not contain {bad.group()!r}: no control character, no lone surrogate")
    return key


def check_keys(keys: Iterable[str]) -> tuple[str, ...]:
    """Give the keys of one stream, each once; :class:`EventError` for a bad one or more than :data:`MAX_KEYS`."""
    checked = tuple(dict.fromkeys(check_key(key) for key in keys))
    if not 0 < len(checked) <= MAX_KEYS:
        raise EventError(f"a stream listens to 1 to {MAX_KEYS} keys, not {len(checked)}")
    return checked
