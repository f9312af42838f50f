"""What the errors of Redis mean: whether another attempt may help, and what to do about them."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from typing import Any, Final

from ..errors import BrokerError, SettingsError

try:
    import redis
except ImportError as _error:
    raise SettingsError("redis:// needs redis-py: install it with: pip install 'flask-sse-stream[redis]'") from _error

__all__ = ["FAILURES", "NotTaken", "broker_error", "code", "is_elsewhere", "is_permanent", "patiently"]

FAILURES: Final = (redis.RedisError, OSError)
"""What may go wrong with a connection."""


class NotTaken(Exception):
    """The server has certainly not done what it was told, and may do so later or elsewhere."""


# What a server says that is not the one to ask, or not yet ready.
_ELSEWHERE: Final = ("MOVED", "ASK", "READONLY", "LOADING", "CLUSTERDOWN", "TRYAGAIN", "MASTERDOWN")
_CLASSES: Final = {
    "ReadOnlyError": "READONLY",
    "BusyLoadingError": "LOADING",
    "NoScriptError": "NOSCRIPT",
    "MovedError": "MOVED",
    "AskError": "ASK",
    "ClusterDownError": "CLUSTERDOWN",
    "TryAgainError": "TRYAGAIN",
    "MasterDownError": "MASTERDOWN",
    "OutOfMemoryError": "OOM",
    "NoPermissionError": "NOPERM",
    "AuthenticationError": "WRONGPASS",
}
_WORDS: Final = re.compile(
    rf"\b({'|'.join([*_ELSEWHERE, 'OOM', 'WRONGTYPE', 'NOPERM', 'NOAUTH', 'MISCONF', 'NOREPLICAS'])})\b"
)


def code(error: BaseException) -> str:
    """Give the word by which Redis names an error.

    redis-py takes it away where it has a class for it, and before 7.0 Redis hides it in what a script's error says.
    """
    if "HELLO must be called with the client already authenticated" in str(error):
        return "NOAUTH"
    if "can't run this command" in str(error):
        return "NOPERM"  # as 7.0 says it of what a script runs
    word = _WORDS.search(str(error))
    return _CLASSES.get(type(error).__name__) or (word[1] if word else "")


_CURES: Final = {
    "WRONGPASS": "the user or the password in SSE_BROKER_URL is wrong",
    "NOAUTH": "SSE_BROKER_URL needs a password: redis://:password@host:6379/0",
    "NOPERM": "let this user run EVAL, EVALSHA, EXISTS, INFO, (S)SUBSCRIBE and what the scripts call "
    "on the namespace's keys and channels",
    "OOM": "Redis is full: raise its maxmemory, or keep a shorter history (SSE_HISTORY_SIZE, SSE_HISTORY_TTL)",
    "WRONGTYPE": "something else writes under this namespace: delete its key, or choose another SSE_NAMESPACE",
    "READONLY": "this is a replica, which takes no writes: name the master, or use redis+sentinel://",
    "MISCONF": "Redis cannot save to its disk and refuses writes: look at its log",
    "NOREPLICAS": "too few replicas are connected for min-replicas-to-write",
    "LOADING": "Redis is still reading its data",
    "CLUSTERDOWN": "a part of the cluster is down",
}


def broker_error(where: str, error: BaseException, *, doubt: bool = False) -> BrokerError:
    """Say what failed, and what to do. ``doubt``: whether the event was taken is not known."""
    cure = _CURES.get(code(error), "see the cause" if isinstance(error, redis.ResponseError) else "is it running?")
    known = "; whether the event was taken is not known" if doubt else ""
    return BrokerError(f"{where}: {error}; {cure}{known}")


def is_elsewhere(error: BaseException) -> bool:
    """Whether the server has certainly done nothing, and another one or a later attempt may."""
    return code(error) in _ELSEWHERE


def is_permanent(error: BaseException) -> bool:
    """Whether trying again is of no use before somebody has changed something."""
    return isinstance(error, redis.ResponseError | redis.AuthenticationError) and not is_elsewhere(error)


def patiently(attempt: Callable[[], Any], deadline: float) -> Any:
    """Call until it does not raise :class:`NotTaken`, or the time is over."""
    pause = 0.01
    while True:
        try:
            return attempt()
        except NotTaken:
            if time.monotonic() + pause >= deadline:
                raise
        time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311  only spreads
        pause = min(2 * pause, 0.25)
