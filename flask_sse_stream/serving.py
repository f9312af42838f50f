"""gevent's own server with what it needs in production: descriptors, signals, and streams that take their leave.

gevent is imported here as well as in ``transports/gevent.py``, because this is a program's beginning: it decides
whether the standard library is patched, which nothing else in this package does.
"""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

from .pools import PoolManager

__all__ = ["patch", "raise_descriptors", "serve"]

_BACKLOG = 2048
_STOP_SECONDS = 2.0  # for requests that are no streams


def patch() -> None:
    """Have the standard library wait as gevent does. Before the application is imported."""
    from gevent import monkey

    monkey.patch_all()


def raise_descriptors() -> int:
    """Allow this process as many open files as it may allow itself; give their number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = max(soft, 1_048_576)  # the kernel's own bound (fs.nr_open), unless somebody changed it
    if soft < hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        except (ValueError, OSError):  # a kernel whose bound is lower
            return soft
        return hard
    return soft


def serve(
    app: Any, manager: PoolManager, host: str, port: int, *, access_log: bool, ready: Callable[[int], None]
) -> None:
    """Serve a WSGI application until SIGTERM or SIGINT; ``ready`` is told the port when it listens.

    Raises :class:`OSError` for an address that cannot be had.
    """
    import gevent
    from gevent.pool import Pool
    from gevent.pywsgi import WSGIServer

    # A pool without a bound, so that requests are waited for at the end.
    server = WSGIServer(
        (host, port), app, backlog=_BACKLOG, spawn=Pool(), log=sys.stdout if access_log else None, error_log=sys.stderr
    )
    server.start()
    stopping: list[bool] = []

    def stop() -> None:
        if stopping:
            return
        stopping.append(True)
        manager.drain()
        server.stop(timeout=_STOP_SECONDS)

    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, stop)
    ready(int(server.server_port or port))
    server.serve_forever()
