"""How a contract's code runs beside the test where servers use threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from .transport import TransportContract


class InThreads(TransportContract):
    def run(self, function: Callable[[], None]) -> None:
        threading.Thread(target=function, daemon=True).start()

    def sleep(self) -> None:
        time.sleep(0.002)
