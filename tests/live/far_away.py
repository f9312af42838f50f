"""A server and a client between which the route is dropped. Says in JSON how its stream ended, and when.

In a namespace of the network of its own it makes another one for the client, with a cable between them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from clients import Raw
from support import drop_what_comes, wait_for
from test_live_slow import PING, SEND_TIMEOUT, SlowServer

CLIENT = """
import socket, sys
client = socket.create_connection(("10.9.8.1", int(sys.argv[1])))
client.sendall(b"GET /stream?connectKey=k HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
received = b""
while b": open" not in received:
    received += client.recv(65536)
print("open", flush=True)
while client.recv(65536):
    pass
"""


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def main(way: str, fast: bool, log: Path) -> None:
    namespaces = way == "namespaces"
    if namespaces:
        run("ip", "link", "set", "lo", "up")
    host = "0.0.0.0" if namespaces else "127.0.0.1"
    server = SlowServer("pywsgi", fast, log, host, send_timeout=SEND_TIMEOUT, ping_interval=PING)
    processes: list[subprocess.Popen[bytes]] = []
    client = None
    try:
        server.start()
        if namespaces:
            far = subprocess.Popen(
                ["unshare", "--net", "sh", "-c", "echo here; exec sleep 300"], stdout=subprocess.PIPE
            )
            processes.append(far)
            assert far.stdout is not None
            assert far.stdout.readline() == b"here\n"
            there = ("nsenter", "--target", str(far.pid), "--net")
            run("ip", "link", "add", "name", "near", "type", "veth", "peer", "name", "far")
            run("ip", "link", "set", "far", "netns", str(far.pid))
            run("ip", "address", "add", "10.9.8.1/24", "dev", "near")
            run("ip", "link", "set", "near", "up")
            run(*there, "ip", "address", "add", "10.9.8.2/24", "dev", "far")
            run(*there, "ip", "link", "set", "far", "up")
            command = [*there, sys.executable, "-c", CLIENT, str(server.port)]
            reader = subprocess.Popen(command, stdout=subprocess.PIPE)
            processes.append(reader)
            assert reader.stdout is not None
            assert reader.stdout.readline() == b"open\n"
        else:
            client = Raw(server.port)
            client.request("/stream?connectKey=k").read_until(b": open\n\n")
        assert server.count() == 1
        if namespaces:
            run(*there, "ip", "route", "add", "blackhole", "10.9.8.1/32")
            run(*there, "ip", "link", "set", "far", "down")
        else:
            assert client is not None
            drop_what_comes(client.socket)
        began = time.monotonic()
        wait_for(lambda: server.count() == 0, "its stream has ended", 60)
        print(json.dumps({"seconds": time.monotonic() - began, "closed": server.state()["closed"]}))
    finally:
        for process in processes:
            process.kill()
            process.wait()
        server.stop()
    assert "Traceback" not in server.log, server.log


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "True", Path(sys.argv[3]))
