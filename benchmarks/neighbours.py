"""What healthy clients feel of bad ones beside them.

    python benchmarks/neighbours.py                     about two minutes
    python benchmarks/neighbours.py --healthy 99 --bad 1 --size 100

Each run is a fresh server on its own core. The healthy clients are sent events, first alone, then beside bad ones that
listen to the same key: in turn one that has stopped reading, one that reads 100 bytes a second, and one that reads
steadily at a tenth of what is sent. Each resets its connection after three seconds, by when the server has cut it off
with the default settings and sizes, and comes back. The figures are how long each event took from its publishing until
the last of the healthy clients had it.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import threading
import time
from statistics import median

from harness import KEY, STREAM, Running, deliver, open_all, percentile, reach_all
from load import BenchmarkError, Load
from rounds import Figure, Goal, Report, arguments

FIGURES = (
    Figure("alone_median", "healthy alone: median, ms"),
    Figure("alone_p99", "healthy alone: 99th percentile, ms"),
    Figure("beside_median", "beside bad ones: median, ms"),
    Figure("beside_p99", "beside bad ones: 99th percentile, ms"),
    Figure("added_median", "what bad ones add to the median, ms"),
    Figure("added_p99", "what they add to the 99th percentile, ms"),
)
GOALS = (Goal("n", "added_median", 10), Goal("n", "added_p99", 10))
TENTH = 10
STAY_SECONDS = 3.0
RESET = struct.pack("ii", 1, 0)


class Bad:
    """Clients that read nothing, next to nothing, or too little."""

    def __init__(self, port: int, count: int, rate: float) -> None:
        self._port = port
        self._stopped = threading.Event()
        # Bytes a second, taken in pieces; nothing is read at a rate of 0.
        rates = [(0.0, 100, rate / TENTH)[number % 3] for number in range(count)]
        self._threads = [threading.Thread(target=self._run, args=(rate,), daemon=True) for rate in rates]
        self._opened = threading.Semaphore(0)

    def __enter__(self) -> Bad:  # noqa: PYI034  Self is of Python 3.11
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            if not self._opened.acquire(timeout=30):
                raise BenchmarkError("A bad client got no stream.")
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(30)

    def _run(self, rate: float) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(OSError), socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                client.settimeout(30)
                client.connect(("127.0.0.1", self._port))
                client.sendall(f"GET {STREAM.format(key=KEY)} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                client.recv(100)
                self._opened.release()
                self._read(client, rate)

    def _read(self, client: socket.socket, rate: float) -> None:
        piece = max(1, round(rate / 20))
        end = time.monotonic() + STAY_SECONDS
        while time.monotonic() < end and not self._stopped.wait(0.05):
            if rate and not client.recv(piece):
                return


def main() -> None:
    parser = arguments("What healthy clients feel of bad ones beside them.", default=("ours", "ours-gunicorn"))
    parser.add_argument("--healthy", type=int, default=99, help="clients that keep up")
    parser.add_argument("--bad", type=int, default=9, help="clients that do not, of three kinds in turn")
    parser.add_argument("--events", type=int, default=1000, help="events of each measurement")
    parser.add_argument("--interval", type=float, default=0.01, help="seconds between them")
    parser.add_argument("--size", type=int, default=4000, help="bytes of one")
    options = parser.parse_args()
    if min(options.healthy, options.bad, options.events, options.rounds) < 1 or options.interval <= 0:
        parser.error("clients, events and rounds start at 1, and the interval above 0")
    report = Report("neighbours", options, "events", "interval", "size", "bad", clients=options.healthy + options.bad)

    def took(server: Running, load: Load) -> list[float]:
        published, result = deliver(server, load, options.healthy, options.events, options.interval, options.size)
        return [(last - start) / 1e6 for start, last in zip(published.started, result.last, strict=True)]

    def measure(server: Running, load: Load) -> dict[str, float]:
        open_all(load, server.port, options.healthy)
        reach_all(server, load)
        took(server, load)  # warm
        alone = took(server, load)
        with Bad(server.port, options.bad, options.size / options.interval):
            together = took(server, load)
        figures = {
            "alone_median": median(alone), "alone_p99": percentile(alone, 99),
            "beside_median": median(together), "beside_p99": percentile(together, 99),
        }  # fmt: skip
        for name in ("median", "p99"):
            figures[f"added_{name}"] = max(0.0, figures[f"beside_{name}"] - figures[f"alone_{name}"])
        return figures

    title = (
        f"{options.healthy} healthy clients, {options.bad} bad ones, {options.events} events of {options.size} bytes"
    )
    report.table("n", title, FIGURES, measure, clients=options.healthy, goals=GOALS)


if __name__ == "__main__":
    try:
        main()
    except BenchmarkError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
