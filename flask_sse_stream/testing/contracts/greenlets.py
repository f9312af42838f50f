"""How a contract's code runs beside the test where servers use greenlets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gevent
import gevent.monkey

from .transport import TransportContract

start_native_thread: Any = gevent.monkey.get_original("_thread", "start_new_thread")


class InGreenlets(TransportContract):
    def run(self, function: Callable[[], None]) -> None:
        gevent.spawn(function)

    def sleep(self) -> None:
        gevent.sleep(0.002)

    def in_native_thread(self, function: Callable[[], object]) -> None:
        done: list[bool] = []
        failures: list[BaseException] = []

        def run() -> None:
            try:
                function()
            except BaseException as error:
                failures.append(error)
            done.append(True)

        start_native_thread(run, ())
        self.wait_for(lambda: done, "the thread ends", 60)
        assert not failures
