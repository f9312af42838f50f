"""Waiting for a condition, with a deadline: no test sleeps for luck, and none hangs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["wait_for"]

T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str, seconds: float = 15.0) -> T:
    """Give the condition's first true value; raise :class:`AssertionError` with ``what`` if there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what} (last: {value!r})")
        time.sleep(0.01)
