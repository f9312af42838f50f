"""What may be a key: the name of a pool, and of whatever else a namespace tells apart."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

from .errors import EventError

__all__ = ["MAX_KEYS", "check_key", "check_keys"]

MAX_KEYS: Final = 100
"""The most keys that one stream may listen to."""

_MAX_KEY_LENGTH: Final = 255
_NOT_IN_KEYS: Final = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def check_key(key: Any, called: str = "key") -> str:
    """Give back a key that is text of 1 to 255 characters without control characters; else :class:`EventError`.

    Keys are compared by code points; no character has a meaning beyond itself.
    """
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
