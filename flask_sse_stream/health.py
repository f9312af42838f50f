"""Whether a process should be sent requests: what a readiness probe asks."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import BrokerError
from .pools import PoolManager

__all__ = ["Health", "health"]


@dataclass(frozen=True, slots=True)
class Health:
    """Whether a process is ready for streams, and what speaks against it."""

    ok: bool
    reasons: tuple[str, ...]  #: one sentence for each; none if it is ok

    def __bool__(self) -> bool:
        return self.ok


def health(manager: PoolManager) -> Health:
    """Say whether the broker answers, live events reach this process, and it is not about to stop.

    One read of a single name in the broker's store, of which nothing is kept; with ``memory://`` not even that. Takes
    at most ``SSE_BROKER_TIMEOUT`` and raises nothing.
    """
    stats = manager.stats()
    reasons = []
    if stats.draining:
        reasons.append("this process is about to stop and takes no more streams")
    try:
        manager.reach_broker()
    except BrokerError as error:
        reasons.append(f"the broker does not answer: {error}")
    else:
        if not stats.broker.up:
            reasons.append(f"live events do not reach this process: {stats.broker.error or 'it is connecting'}")
    return Health(not reasons, tuple(reasons))
