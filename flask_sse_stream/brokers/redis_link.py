"""Where Redis is, and how to get a connection to it.

A :class:`Link` is one connection of redis-py's, without any of its retrying: a command is sent once, and what became
of it is known or it is not. Whoever has a link is alone on it.

Deadlines are monotonic times.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, cast
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

from ..errors import SettingsError
from .redis_errors import NotTaken, code

# isort: split
# Below what says how to install it.
import redis
from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection, parse_url
from redis.retry import Retry

from .redis_scripts import Names

__all__ = ["Bell", "Link", "Server"]

_HOPS: Final = 5
_SENTINEL_SECONDS: Final = 0.5  # for one that does not answer, since there are others
_OURS: Final = {  # options of redis-py's that a link stands on
    "decode_responses",
    "health_check_interval",
    "protocol",
    "redis_connect_func",
    "retry",
    "retry_on_error",
    "retry_on_timeout",
    "socket_connect_timeout",
    "socket_keepalive",
    "socket_timeout",
}


class Link:
    """One connection to the server that has the log.

    ``run``
        which life of the server process this is.
    ``sharded``
        whether it has sharded pub/sub (Redis 7.0), whose messages a cluster does not send to all of its nodes.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.run: str = ""
        self.sharded: bool = False

    def begin(self, deadline: float) -> None:
        """Connect, and learn whom this is connected to."""
        self._connection.connect()
        # redis-py would connect again by itself, to a server that may be another and knows no subscription.
        self._connection.redis_connect_func = _refuse
        # It writes every message into a log line that nobody asked for.
        parser = self._connection._parser
        quiet = getattr(parser, "set_pubsub_push_handler", None) or getattr(parser, "set_push_handler", None)
        if quiet is not None:
            quiet(lambda response: response)
        info = {}
        for line in _text(self.call(deadline, "INFO", "server")).split("\r\n"):
            name, _, value = line.partition(":")
            info[name] = value
        self.run = info.get("run_id", "")
        self.sharded = int(info.get("redis_version", "0").partition(".")[0] or 0) >= 7

    def call(self, deadline: float, *command: Any) -> Any:
        """Run one command. Raises what redis-py raises."""
        self.send(deadline, command)
        return self.receive(deadline)

    def script(self, deadline: float, digest: str, source: str, keys: Sequence[bytes], arguments: Sequence[Any]) -> Any:
        """Run a script, which the server may have forgotten."""
        try:
            return self.call(deadline, "EVALSHA", digest, len(keys), *keys, *arguments)
        except redis.exceptions.NoScriptError:
            return self.call(deadline, "EVAL", source, len(keys), *keys, *arguments)

    def send(self, deadline: float, command: Sequence[Any]) -> None:
        """Send one command; its reply, or what else comes, is received later."""
        self._until(deadline)
        self._connection.send_packed_command(self._connection.pack_command(*command), check_health=False)

    def receive(self, deadline: float) -> Any:
        """Give the next reply or, where this listens, message."""
        self._until(deadline)
        return self._connection.read_response(disable_decoding=True, push_request=True)

    def can_read(self) -> bool:
        """Whether something has come. Raises what redis-py raises if that was the end."""
        self._until(time.monotonic())
        return bool(self._connection.can_read(0))

    def wait(self, seconds: float, bell: Bell) -> bool:
        """Wait until something has come, the bell is rung, or the time is over; say whether something has come."""
        if self.can_read():  # it may lie in a buffer
            return True
        ready = select.poll()
        ready.register(self._connection._sock, select.POLLIN)
        ready.register(bell, select.POLLIN)
        pid = os.getpid()
        ready.poll(max(0.0, seconds) * 1000)
        if os.getpid() != pid:
            return False  # In a forked child, everything here is its parent's.
        bell.silence()
        return self.can_read()

    def _until(self, deadline: float) -> None:
        sock = self._connection._sock
        if sock is None:
            raise redis.ConnectionError("the connection is closed")
        sock.settimeout(max(0.001, deadline - time.monotonic()))

    def is_clean(self) -> bool:
        """Whether it is still open and has nothing unread."""
        try:
            return not self.can_read()
        except Exception:
            return False

    def close(self) -> None:
        """Cut it. From any thread."""
        with contextlib.suppress(Exception):
            self._connection.disconnect()


def _refuse(_: Any) -> None:
    raise redis.ConnectionError("the connection is closed")


def _text(reply: Any) -> str:
    return reply.decode("utf-8", "replace") if isinstance(reply, bytes) else str(reply)


class Bell:
    """Wakes a thread that waits for a link. Linux's own pipe, which monkey patching leaves alone."""

    def __init__(self) -> None:
        self._heard, self._rung = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        weakref.finalize(self, _close_both, self._heard, self._rung)

    def ring(self) -> None:
        """Wake it. From any thread; never waits."""
        with contextlib.suppress(BlockingIOError):  # it has been rung often enough
            os.write(self._rung, b"!")

    def fileno(self) -> int:
        """Give the descriptor to wait at."""
        return self._heard

    def silence(self) -> None:
        """Let the next wait wait."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._heard, 4096)


def _close_both(*descriptors: int) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


class Server:
    """Finds the server that ``url`` means, and connects to it.

    Raises :class:`SettingsError` for a URL that means none, which it names as ``what`` the user has written.
    """

    def __init__(self, url: str, names: Names, what: str = "SSE_BROKER_URL") -> None:
        self._names = names
        self._sentinels: list[tuple[str, int]] = []
        self._sentinel_options: dict[str, Any] = {}
        self._service = ""
        try:
            self._options = self._parse(url)
        except ValueError as error:
            raise SettingsError(f"{what} {_masked(url)!r}: {error}") from error
        self._moved: tuple[str, int] | None = None
        self.where: str = _masked(url)
        named = self._sentinels or [(self._options["host"], self._options["port"])]
        self.address: tuple[str, ...] = (self._service, *sorted(f"{host}:{port}" for host, port in named))
        """What tells this server from others, however its URL is written."""

    def _parse(self, url: str) -> dict[str, Any]:
        scheme, _, rest = url.partition("://")
        secure = scheme.startswith("rediss")
        if scheme.endswith("+sentinel"):
            rest = self._parse_sentinels(rest)
        parse = cast("Callable[[str], dict[str, Any]]", parse_url)
        options = parse(f"{'rediss' if secure else 'redis'}://{rest}")
        options.pop("connection_class", None)
        for name in options:
            if name in _OURS:
                raise ValueError(f"{name} is this extension's to set: leave it out")
        self._class = SSLConnection if secure else Connection
        try:
            self._class(**options)  # connects to nothing
        except (TypeError, redis.RedisError) as error:
            raise ValueError(str(error).rpartition("() ")[2]) from error
        options.setdefault("host", "localhost")
        options.setdefault("port", 6379)
        # Sentinels of a master that speaks TLS speak it too. Not from the URL's text, in which "False" would be true.
        self._sentinel_options.update({name: value for name, value in options.items() if name.startswith("ssl_")})
        return options

    def _parse_sentinels(self, rest: str) -> str:
        parts = urlsplit(f"//{rest}")
        login, _, hosts = parts.netloc.rpartition("@")
        for host in filter(None, hosts.split(",")):
            one = urlsplit(f"//{host}")
            if not one.hostname:
                raise ValueError(f"{host!r} is no sentinel")
            self._sentinels.append((one.hostname, one.port or 26379))
        service, _, database = parts.path.lstrip("/").partition("/")
        if not self._sentinels or not service:
            raise ValueError("write redis+sentinel://host:26379,host:26379/service/0")
        self._service = unquote(service)
        query = parse_qs(parts.query)
        for name in ("username", "password"):
            if f"sentinel_{name}" in query:
                self._sentinel_options[name] = query.pop(f"sentinel_{name}")[0]
        login = f"{login}@" if login else ""
        return f"{login}sentinel/{database or 0}?{urlencode(query, doseq=True)}"

    def connect(self, deadline: float) -> Link:
        """Connect to the master that has the namespace.

        Raises :class:`NotTaken` where another attempt may help, and what redis-py raises.
        """
        last: Exception | None = None
        for host, port in self._candidates(deadline):
            try:
                return self._connect_to(host, port, deadline)
            except (redis.ConnectionError, redis.TimeoutError, OSError, NotTaken) as error:
                if isinstance(error, redis.AuthenticationError):
                    raise
                last = error
        self._moved = None
        raise NotTaken(str(last or f"no sentinel knows a master of {self._service!r}")) from last

    def _candidates(self, deadline: float) -> Iterator[tuple[str, int]]:
        if self._moved is not None:
            yield self._moved
        if not self._sentinels:
            yield self._options["host"], self._options["port"]
        for sentinel in list(self._sentinels):
            found = self._ask_sentinel(sentinel, deadline)
            if found is not None:
                # The one that answered is asked first the next time.
                self._sentinels.remove(sentinel)
                self._sentinels.insert(0, sentinel)
                yield found

    def _ask_sentinel(self, sentinel: tuple[str, int], deadline: float) -> tuple[str, int] | None:
        own_deadline = min(deadline, time.monotonic() + _SENTINEL_SECONDS)
        link = self._new_link({**self._sentinel_options, "host": sentinel[0], "port": sentinel[1]}, own_deadline)
        try:
            link._connection.connect()
            reply = link.call(own_deadline, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)
            return (_text(reply[0]), int(reply[1])) if reply else None
        except redis.AuthenticationError:
            raise
        except (redis.ConnectionError, redis.TimeoutError, OSError):
            return None
        finally:
            link.close()

    def _connect_to(self, host: str, port: int, deadline: float) -> Link:
        for _ in range(_HOPS):
            link = self._new_link({**self._options, "host": host, "port": port}, deadline)
            try:
                link.begin(deadline)
                if self._sentinels and _text(link.call(deadline, "ROLE")[0]) != "master":
                    raise NotTaken(f"{host}:{port} is no longer the master")
                link.call(deadline, "EXISTS", self._names.log)  # by which a cluster says who has it
            except redis.ResponseError as error:
                link.close()
                if code(error) != "MOVED":
                    raise
                host, port = self._moved = _address(error, host)
            except BaseException:
                link.close()
                raise
            else:
                return link
        raise NotTaken("the nodes of the cluster send us round in a circle")

    def _new_link(self, options: dict[str, Any], deadline: float) -> Link:
        left = max(0.001, deadline - time.monotonic())
        return Link(
            self._class(
                **options,
                protocol=3,
                socket_timeout=left,
                socket_connect_timeout=left,
                socket_keepalive=True,
                retry=Retry(NoBackoff(), 0),
                health_check_interval=0,
            )
        )


def _address(error: redis.ResponseError, host: str) -> tuple[str, int]:
    """Give where a cluster's node says that a slot is: ``MOVED 1234 host:port``, the host left out if it is its own."""
    new_host, _, port = str(error).split(" ")[-1].rpartition(":")
    return new_host or host, int(port)


def _masked(url: str) -> str:
    """Give the URL without its password."""
    scheme, _, rest = url.partition("://")
    login, at, where = rest.rpartition("@")
    user = login.partition(":")[0]
    return f"{scheme}://{user}:***@{where.partition('?')[0]}" if at else f"{scheme}://{where.partition('?')[0]}"
