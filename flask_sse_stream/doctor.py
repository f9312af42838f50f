"""Looks for what keeps streams from working, before the day that it shows.

Everything here gives findings as values, each with its cure; ``cli.py`` shows them. A *problem* breaks something that
is promised, a *warning* may be meant so.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .brokers.base import REDIS_SCHEMES
from .errors import BrokerError, SettingsError
from .pools import PoolManager
from .probing import Finding, look_at_url
from .settings import Settings

__all__ = ["Gunicorn", "examine"]

_SPARE: Final = 64  # descriptors for everything but streams
_OTHER_REQUESTS: Final = 20
_NETWORK_FILES: Final = ("nfs", "cifs", "smb", "9p", "fuse.sshfs", "glusterfs", "ceph", "lustre", "afs", "vboxsf")


@dataclass(frozen=True, slots=True)
class Gunicorn:
    """What gunicorn would run with."""

    workers: int
    worker_class: str
    worker_connections: int
    threads: int
    preload: bool
    max_requests: int
    graceful_timeout: int
    source: str

    @classmethod
    def read(cls, file: str | None, environ: Mapping[str, str] = os.environ) -> Gunicorn | None:
        """Read its file (``./gunicorn.conf.py`` if that is there) and ``GUNICORN_CMD_ARGS``, which come before it.

        ``None``: there is neither. Raises :class:`SettingsError` for what cannot be read.
        """
        arguments = shlex.split(environ.get("GUNICORN_CMD_ARGS", ""))
        try:
            from gunicorn.config import Config  # type: ignore[import-untyped]
        except ImportError:
            if file is None and not arguments:
                return None
            raise SettingsError(
                "gunicorn is not installed here, so what it would run with cannot be read: run this where the server "
                "runs, or pip install 'gunicorn[gevent]'"
            ) from None
        config = Config()
        given = vars(config.parser().parse_args(arguments))
        path = Path(given["config"] or file or "gunicorn.conf.py").resolve()
        sources = []
        if path.exists():
            sources.append(str(path))
            names: dict[str, Any] = {"__file__": str(path), "__name__": "__config__"}
            try:
                exec(compile(path.read_bytes(), str(path), "exec"), names)  # noqa: S102  it is Python, and its user's
                for name, value in names.items():
                    if name in config.settings:
                        config.set(name, value)
            except Exception as error:
                raise SettingsError(f"gunicorn's configuration {path} cannot be read: {error}") from error
        elif file is not None or given["config"]:
            raise SettingsError(f"there is no gunicorn configuration {path}")
        if arguments:
            sources.append("GUNICORN_CMD_ARGS")
            for name, value in given.items():
                if value is not None and name in config.settings:
                    config.set(name, value)
        if not sources and "WEB_CONCURRENCY" not in environ:
            return None
        return cls(
            workers=config.workers,
            worker_class=config.worker_class_str,
            worker_connections=config.worker_connections,
            threads=config.threads,
            preload=config.preload_app,
            max_requests=config.max_requests,
            graceful_timeout=config.graceful_timeout,
            source=" and ".join(sources or ["WEB_CONCURRENCY"]),
        )

    @property
    def in_greenlets(self) -> bool:
        """Whether its workers are gevent's."""
        return self.worker_class.rpartition(".")[2].lower() in ("gevent", "gevent_pywsgi", "gevent_wsgi") or (
            ".ggevent" in self.worker_class
        )


def examine(
    manager: PoolManager,
    *,
    gunicorn: Gunicorn | None = None,
    url: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Iterator[Finding]:
    """Look at everything, one thing after the other; opening a stream at ``url`` takes a heartbeat's time."""
    settings = manager.settings
    if gunicorn is not None:
        yield from _look_at_gunicorn(settings, gunicorn)
    yield _patching(gunicorn)
    yield _descriptors(settings)
    yield from _look_at_broker(manager)
    if url is not None:
        yield from look_at_url(manager, url, headers or {})


# The server


def _look_at_gunicorn(settings: Settings, gunicorn: Gunicorn) -> Iterator[Finding]:
    memory = settings.broker_url.startswith("memory://")
    kind = gunicorn.worker_class.rpartition(".")[2].lower()
    if memory and gunicorn.workers > 1:
        yield Finding(
            "problem",
            "broker",
            f"SSE_BROKER_URL is memory:// and there are {gunicorn.workers} workers: each event reaches the streams of "
            "one of them",
            "set SSE_BROKER_URL to sqlite:///path or redis://host:6379/0, or have one worker",
        )
    if memory and gunicorn.max_requests:
        yield Finding(
            "warning",
            "recycling",
            f"max_requests = {gunicorn.max_requests} ends the worker now and then, and with memory:// its history too",
            "set SSE_BROKER_URL to sqlite:///path, or max_requests = 0",
        )
    cure = 'set worker_class = "gevent"'
    if gunicorn.in_greenlets:
        yield Finding("ok", "worker class", f"{kind} ({gunicorn.source})")
        yield _connections(settings, gunicorn)
    elif kind in ("sync", "syncworker") and gunicorn.threads <= 1:
        text = "sync: a stream that cannot be handed off occupies a whole worker, and is killed after its timeout"
        yield Finding("warning", "worker class", text, cure)
    elif kind in ("gthread", "threadworker", "sync", "syncworker"):
        yield Finding("ok", "worker class", f"gthread with {gunicorn.threads} threads ({gunicorn.source})")
    else:
        yield Finding("problem", "worker class", f"{gunicorn.worker_class} is not a class that streams work with", cure)
    least = settings.drain_seconds + 2
    if settings.drain_seconds and gunicorn.graceful_timeout < least:
        yield Finding(
            "warning",
            "stopping",
            f"graceful_timeout = {gunicorn.graceful_timeout} kills a worker before its streams have left: clients may "
            "take SSE_DRAIN_SECONDS and two more",
            f"set graceful_timeout = {least:.0f} or more, or lower SSE_DRAIN_SECONDS",
        )


def _connections(settings: Settings, gunicorn: Gunicorn) -> Finding:
    have, need = gunicorn.worker_connections, settings.max_clients + _OTHER_REQUESTS
    if have < need:
        text = f"worker_connections = {have} is less than SSE_MAX_CLIENTS = {settings.max_clients} and what other "
        text += "requests need: beyond it, clients are not even answered"
        cure = f"set worker_connections = {settings.max_clients + 100}, or lower SSE_MAX_CLIENTS"
        return Finding("problem", "connections", text, cure)
    return Finding("ok", "connections", f"worker_connections = {have}, SSE_MAX_CLIENTS = {settings.max_clients}")


def _patching(gunicorn: Gunicorn | None) -> Finding:
    monkey = sys.modules.get("gevent.monkey")
    parts = [name for name in ("socket", "threading", "time", "select") if monkey and monkey.is_module_patched(name)]
    first = "begin the program with: from gevent import monkey; monkey.patch_all()"
    if 0 < len(parts) < 4:
        text = f"the application patches a part of the standard library alone ({', '.join(parts)})"
        return Finding("problem", "monkey patching", text, f"patch all of it or nothing: {first}")
    if gunicorn is None:
        return Finding("ok", "monkey patching", "the application patches everything" if parts else "nothing is patched")
    if gunicorn.in_greenlets and gunicorn.preload and not parts:
        return Finding(
            "problem",
            "monkey patching",
            "preload_app imports the application before gunicorn's worker patches the standard library",
            "set preload_app = False, or put the patch at the top of gunicorn's configuration file",
        )
    if not gunicorn.in_greenlets and parts:
        return Finding(
            "problem",
            "monkey patching",
            f"the application patches the standard library, and a worker of class {gunicorn.worker_class} needs "
            "threads that are threads",
            'do not patch, or set worker_class = "gevent"',
        )
    who = "the application" if parts else "gunicorn's worker" if gunicorn.in_greenlets else "nobody, as it should be"
    return Finding("ok", "monkey patching", f"patched by {who}")


def _descriptors(settings: Settings) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = settings.max_clients + _SPARE
    if 0 <= soft < need:
        text = f"{soft} open files are allowed here, and SSE_MAX_CLIENTS = {settings.max_clients} needs {need}"
        cure = f"LimitNOFILE={max(need, 65536)} for systemd, ulimits for Docker, ulimit -n in a shell; or lower "
        cure += "SSE_MAX_CLIENTS"
        if hard < 0 or hard >= need:
            cure += "; flask sse run raises it by itself"
        return Finding("problem", "open files", text, cure)
    return Finding("ok", "open files", f"{soft} here, of which SSE_MAX_CLIENTS = {settings.max_clients} may be streams")


# The broker


def _look_at_broker(manager: PoolManager) -> Iterator[Finding]:
    settings = manager.settings
    scheme, _, path = settings.broker_url.partition("://")
    if scheme == "memory":
        yield Finding("ok", "broker", "memory://: one process, whose history ends with it")
        return
    if scheme == "sqlite":
        yield from _look_at_file(Path(path.removeprefix("/") if path.startswith("/") else path))
    try:
        began = time.monotonic()
        manager.reach_broker()
    except (BrokerError, SettingsError) as error:
        yield Finding("problem", "broker", f"the broker does not answer: {error}", "start it, or mend SSE_BROKER_URL")
        return
    yield Finding("ok", "broker", f"{scheme} answers within {(time.monotonic() - began) * 1000:.0f} ms")
    if scheme in REDIS_SCHEMES:
        try:
            yield from _look_at_redis(settings)
        except Exception as error:
            text = f"Redis does not say how it is set up ({error})"
            yield Finding("warning", "redis", text, "run this again; or look at its configuration yourself")


def _look_at_file(file: Path) -> Iterator[Finding]:
    directory = file.resolve().parent
    if not directory.is_dir():
        yield Finding("problem", "sqlite", f"there is no directory {directory}", "make it, for the server's user")
        return
    if not os.access(directory, os.W_OK):
        text = f"{directory} cannot be written to by this user"
        yield Finding("problem", "sqlite", text, "give it to the user of the server, and run this as that user")
    kind = _file_system(directory)
    if kind.startswith(_NETWORK_FILES):
        text = f"{directory} is on a file system of the network ({kind}), whose locks SQLite cannot rely on"
        yield Finding("problem", "sqlite", text, "put it on a local disk, or use Redis")


def _file_system(directory: Path) -> str:
    """Give the type of the file system of a directory: of the mount whose place is the longest."""
    found = ("", "")
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, place, kind, *_ = line.split(" ")
            if directory.is_relative_to(place.replace("\\040", " ")) and len(place) >= len(found[0]):
                found = place, kind
    return found[1]


def _look_at_redis(settings: Settings) -> Iterator[Finding]:
    from .brokers.redis_link import Server
    from .brokers.redis_scripts import Names

    def ask(*command: str) -> Any:
        return link.call(time.monotonic() + settings.broker_timeout, *command)

    link = Server(settings.broker_url, Names(settings.namespace)).connect(time.monotonic() + settings.broker_timeout)
    try:
        info: dict[str, str] = {}
        for section in ("server", "persistence", "memory", "replication"):
            for line in bytes(ask("INFO", section)).decode().splitlines():
                name, colon, value = line.partition(":")
                if colon:
                    info[name] = value
        asked: Any = {}
        with contextlib.suppress(Exception):  # not everybody may ask
            asked = ask("CONFIG", "GET", "min-replicas-to-write")
        least = bytes(asked[b"min-replicas-to-write"]).decode() if asked else None
    finally:
        link.close()
    yield from _judge_redis(info, least)


def _judge_redis(info: Mapping[str, str], least_replicas: str | None) -> Iterator[Finding]:
    version = info.get("redis_version", "0")
    if tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) < (6, 2):
        text = f"Redis {version} is older than 6.2"
        yield Finding("problem", "redis version", text, "upgrade it to 6.2 or newer")
    else:
        yield Finding("ok", "redis version", version)
    if info.get("aof_enabled") == "1":
        yield Finding("ok", "redis persistence", "appendonly yes")
    else:
        yield Finding(
            "warning",
            "redis persistence",
            "appendonly no: when Redis is killed, history is lost and all clients load their state anew",
            "redis-cli CONFIG SET appendonly yes, and the same in its configuration file",
        )
    policy = info.get("maxmemory_policy", "noeviction")
    cure = "redis-cli CONFIG SET maxmemory-policy noeviction; have a Redis of its own for what is a cache"
    if policy.startswith("allkeys"):
        text = f"maxmemory-policy {policy} may throw the log itself away"
        yield Finding("problem", "redis memory", text, cure)
    elif policy.startswith("volatile"):
        text = f"maxmemory-policy {policy} throws histories, leases and what was revoked away when it is full"
        yield Finding("problem", "redis memory", text, cure)
    else:
        limit, used = int(info.get("maxmemory", "0")), int(info.get("used_memory", "0"))
        if limit and used > 0.8 * limit:
            text = f"{used * 100 // limit} % of maxmemory is used; when it is full, publishing fails"
            yield Finding(
                "warning", "redis memory", text, "raise maxmemory, or lower SSE_HISTORY_SIZE or SSE_HISTORY_TTL"
            )
        else:
            yield Finding("ok", "redis memory", f"maxmemory-policy {policy}")
    if info.get("role") == "slave":
        text = "this Redis is a replica: nothing can be published to it"
        yield Finding("problem", "redis role", text, "name the master, or the Sentinels: redis+sentinel://")
    elif int(info.get("connected_slaves", "0")) and least_replicas == "0":
        text = "a master that is cut off from its replicas goes on taking events, which are lost when one is promoted"
        yield Finding("warning", "redis role", text, "redis-cli CONFIG SET min-replicas-to-write 1")
