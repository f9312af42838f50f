"""Makes the picture of the inspector: real Chromium, real workers, real clients and a real log.

``python docs/inspector_picture.py`` writes ``docs/_static/inspector.png``, and with ``--scheme``, ``--width`` and
``--height`` another one to ``--out``. It needs gunicorn, playwright, and Chromium on the PATH, and takes a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.request import urlopen

from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
ROOT = HERE.parent
APP = """
import math
import os
import random
import time
import gevent
from flask import Flask
from flask_sse_stream import SSE, Ticket
app = Flask("shop")
sse = SSE(app, broker_url=os.environ["LOG"], inspector="/sse-inspector", max_clients=3000, send_buffer=4096)
@sse.authorize
def authorize(keys):
    return Ticket(keys, user=f"user-{random.randrange(1000, 10000)}")
@sse.authorize_inspector
def everybody():
    return True
@app.get("/begin")
def begin():
    gevent.spawn(business)
    return ""
def business():
    begun = time.monotonic()
    while True:
        gevent.sleep(0.04)
        tide = 1.2 + math.sin((time.monotonic() - begun) / 7)
        if random.random() < 0.45 * tide:
            price = round(random.uniform(20, 400), 2)
            sse.publish("prices", {"symbol": random.choice(("ACME", "INIT", "GLOB")), "price": price}, event="tick")
        if random.random() < 0.05 * tide:
            sse.publish("chat/lobby", {"who": "Ada", "text": "Is the kettle on?"}, event="message")
        if random.random() < 0.03:
            sse.publish("news", {"title": "The harbour is open again"}, event="headline")
        if random.random() < 0.01:
            sse.publish("orders/4711", {"state": "packed", "items": 3}, event="order")
"""
KEYS = {
    "prices": 420,
    "news": 180,
    "orders/4711": 3,
    "orders/4712": 2,
    "chat/lobby": 64,
    "chat/kitchen": 22,
    "alerts": 96,
}


def slow_reader(port: int, stop: threading.Event) -> None:
    """Read as somebody whose train is in a tunnel."""
    while not stop.is_set():
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", port))
            client.sendall(b"GET /stream?connectKey=prices HTTP/1.1\r\nHost: localhost\r\n\r\n")
            stop.wait(20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "_static" / "inspector.png")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=1020)
    parser.add_argument("--seconds", type=float, default=80.0)
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (directory / "shop.py").write_text(APP)
        url = f"sqlite:///{directory}/log.db"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{directory}", "LOG": url}
        serve = ["-m", "gunicorn", "-k", "gevent", "-w", "3", "--worker-connections", "3000", "--log-level", "error"]

        def start(*arguments: str) -> None:
            process = subprocess.Popen([sys.executable, *arguments], env=env, stdout=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.terminate)

        start(*serve, "--graceful-timeout", "1", "--bind", f"127.0.0.1:{port}", "shop:app")
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        threads = [threading.Thread(target=slow_reader, args=(port, stop), daemon=True) for _ in range(2)]
        stack.callback(stop.set)
        playwright = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=chromium, args=["--headless", "--no-sandbox"])
        stack.callback(browser.close)
        page = browser.new_page(
            viewport={"width": options.width, "height": options.height}, color_scheme=options.scheme
        )
        page.goto(f"http://127.0.0.1:{port}/sse-inspector#key=prices")
        urlopen(f"http://127.0.0.1:{port}/begin").read()
        for thread in threads:
            thread.start()
        for key, clients in KEYS.items():
            target = f"http://127.0.0.1:{port}/stream?connectKey={key}"
            start("-m", "flask_sse_stream", "bench", target, "-c", str(clients), "-s", "600", "--rate", "40")
            time.sleep(1)
        time.sleep(options.seconds)
        page.screenshot(path=options.out, full_page=options.width < 600)
        wide = page.evaluate("document.documentElement.scrollWidth")
        print(f"{options.out}: {options.out.stat().st_size} bytes, {wide} pixels wide")


if __name__ == "__main__":
    main()
