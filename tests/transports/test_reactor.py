"""Sockets that pywsgi has given up, served by the reactor; and what makes a stream stay where it is."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import socket as standard_socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.monkey
import gevent.pywsgi
import greenlet
import gunicorn.config
import gunicorn.glogging
import gunicorn.workers.base
import pytest
from gevent import socket
from gevent.ssl import SSLContext
from gunicorn.workers.gthread import ThreadWorker

from flask_sse_stream.pools import PoolManager
from flask_sse_stream.settings import Settings
from flask_sse_stream.stream import CloseReason
from flask_sse_stream.testing.contracts.greenlets import InGreenlets
from flask_sse_stream.testing.contracts.threads import InThreads
from flask_sse_stream.testing.contracts.transport import Client, context_of_request
from flask_sse_stream.transports.gevent import GeventRuntime, Mailbox
from flask_sse_stream.transports.reactor import Reactor
from flask_sse_stream.transports.threads import ThreadLoop
from flask_sse_stream.wsgi import respond

Wrap = Callable[[Any], Any]


class Application:
    """Answers every request with a stream of ``manager``."""

    def __init__(self, manager: PoolManager) -> None:
        self.manager = manager
        self.arguments: dict[str, Any] = {}

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        token = context_of_request.set("the request's")
        try:
            return respond(self.manager, environ, start_response, **self.arguments)
        finally:
            context_of_request.reset(token)


class Server(Application):
    """gevent's own server in this process."""

    def __init__(self, manager: PoolManager, wrap: Wrap = lambda app: app, **options: Any) -> None:
        super().__init__(manager)
        self.handled: list[str] = []

        class Log:
            @staticmethod
            def write(line: str) -> None:
                self.handled.append(line)

        self._server = gevent.pywsgi.WSGIServer(("127.0.0.1", 0), wrap(self), log=Log(), error_log=None, **options)
        self._server.start()
        self.address = ("127.0.0.1", self._server.server_port)

    def connect(self, query: str = "connectKey=k", version: str = "1.1", more: bytes = b"") -> Any:
        """Connect, and ask for a stream."""
        client = socket.create_connection(self.address)
        client.sendall(f"GET /?{query} HTTP/{version}\r\nHost: localhost\r\n\r\n".encode() + more)
        return client

    def stop(self) -> None:
        self._server.stop()


class Worker(Application):
    """gunicorn's worker with threads in this process, without what it needs of its arbiter."""

    def __init__(self, manager: PoolManager) -> None:
        super().__init__(manager)
        listener = standard_socket.create_server(("127.0.0.1", 0))
        configuration = gunicorn.config.Config()
        configuration.set("threads", 2)
        log = gunicorn.glogging.Logger(configuration)
        self.worker = ThreadWorker(1, os.getppid(), [listener], None, 30, configuration, log)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gunicorn.workers.base.Worker, "init_process", lambda worker: None)
            self.worker.init_process()
        self.worker.wsgi = self
        self.address = listener.getsockname()
        self._thread = threading.Thread(target=self.worker.run)
        self._thread.start()

    def connect(self, query: str = "connectKey=k") -> Any:
        """Connect, and ask for a stream."""
        client = standard_socket.create_connection(self.address, 15)
        client.sendall(f"GET /?{query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        return client

    def stop(self) -> None:
        self.worker.handle_exit(None, None)
        self._thread.join()
        self.worker.tmp.close()


class SocketClient(Client):
    """A client of a real server in this process."""

    socket: Any = socket
    server: Any = Server
    head: list[bytes]

    def serve(self, manager: PoolManager, query: str, **arguments: Any) -> None:
        server = self.server(manager)
        server.arguments = arguments
        client = self.socket.create_connection(server.address)
        client.setsockopt(self.socket.SOL_SOCKET, self.socket.SO_RCVBUF, 65536)  # or it takes megabytes unread
        client.sendall(f"GET /?{query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        client.settimeout(0.005)
        received = b""
        try:
            while not self.left:
                if not self.reading:
                    self.sleep()
                    continue
                try:
                    data = client.recv(65536)
                except TimeoutError:
                    continue
                if not data:
                    break
                received += data
                head, _, rest = received.partition(b"\r\n\r\n")
                self.head = head.lower().split(b"\r\n")[1:]
                self.status = head.split(b"\r\n")[0].decode().partition(" ")[2]
                self.chunks, self.bytes, self.whole = dechunk(rest)
        finally:
            client.close()
            server.stop()
            self.ended = True


def dechunk(data: bytes) -> tuple[int, bytes, bool]:
    """Give the number of chunks, their contents, and whether the last chunk has come."""
    chunks, found = 0, b""
    while (end := data.find(b"\r\n")) >= 0:
        size = int(data[:end], 16)
        if len(data) < end + size + 4:
            break
        if size == 0:
            assert data[end + 4 :] == b"", "nothing follows the last chunk"
            return chunks, found, True
        chunks += 1
        found += data[end + 2 : end + 2 + size]
        data = data[end + size + 4 :]
    return chunks, found, False


class WorkersClient(SocketClient):
    socket = standard_socket
    server = Worker


@pytest.mark.skipif(
    gevent.monkey.is_module_patched("threading"), reason="its threads are greenlets, whose sockets it would shut down"
)
class TestHandOffInThreads(InThreads):
    client = WorkersClient

    def test_the_head_says_that_the_connection_ends_with_the_stream(self, manager: PoolManager) -> None:
        client = self.open(manager)
        assert isinstance(client, SocketClient)
        assert client.head.count(b"connection: close") == 1


class TestHandOff(InGreenlets):
    client = SocketClient

    def test_the_end_of_a_stream_is_the_end_of_its_response(self, manager: PoolManager) -> None:
        client = self.open(manager)
        assert isinstance(client, SocketClient)
        manager.close("k")
        self.wait_for(lambda: client.ended, "it ends")
        assert client.whole
        # Or a client would send its next request over a connection that is about to be closed.
        assert client.head.count(b"connection: close") == 1


@pytest.fixture
def manager() -> Iterator[PoolManager]:
    manager = PoolManager(Settings(ping_interval=0))
    yield manager
    manager.shutdown()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*arguments: Any, **options: Any) -> Server:
        servers.append(Server(*arguments, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 15.0) -> Any:
    with gevent.Timeout(seconds, AssertionError(f"not within {seconds} s: {what}")):
        while not (value := condition()):
            gevent.sleep(0.002)
        return value


def handed_off() -> int:
    return len(Reactor.of(Mailbox.current()))


def read_some(client: Any, until: bytes) -> bytes:
    received = b""
    with gevent.Timeout(15, AssertionError(f"no {until!r} came")):
        while until not in received:
            data = client.recv(65536)
            assert data, f"it ended after {received!r}"
            received += data
    return received


def greenlets() -> int:
    gc.collect()
    # By its type: isinstance would ask proxies of other tests what they stand for, and wake them.
    return sum(issubclass(type(item), greenlet.greenlet) and not item.dead for item in gc.get_objects())


def test_streams_that_were_handed_off_cost_no_greenlet(manager: PoolManager, serve: Callable[..., Server]) -> None:
    server = serve(manager)
    first = server.connect()
    read_some(first, b": open")
    before = greenlets()
    clients = [server.connect() for _ in range(50)]
    for client in clients:
        read_some(client, b": open")
    wait_for(lambda: handed_off() == 51, "all are handed off")
    wait_for(lambda: len(server.handled) == 51, "each has its line in the access log")
    wait_for(lambda: greenlets() <= before + 2, "the server's greenlets have ended")
    manager.publish("k", "x")
    for client in (first, *clients):
        read_some(client, b"data: x\n\n\r\n")
        client.close()
    wait_for(lambda: manager.count_all() == handed_off() == 0, "all are gone, without any heartbeat")
    assert manager.stats().closed == {"peer": 51}


def test_an_idle_client_is_five_objects_for_the_collector_of_garbage(
    manager: PoolManager, serve: Callable[..., Server]
) -> None:
    # Its pauses grow with them. A tuple and a weak reference are for the heartbeats.
    manager = PoolManager(Settings())
    server = serve(manager)
    descriptors: list[int] = []

    def open_some(number: int) -> int:
        for _ in range(number):
            client = server.connect()
            read_some(client, b": open")
            descriptors.append(client.detach())
        wait_for(lambda: handed_off() == len(descriptors) == len(server.handled), "the server's greenlets have ended")
        gevent.sleep(0)
        gc.collect()
        return len(gc.get_objects())

    open_some(50)  # and what is made once
    before = open_some(1)
    assert open_some(200) - before < 200 * 5.5
    for descriptor in descriptors:
        os.close(descriptor)
    manager.shutdown()


@pytest.mark.parametrize("how", ["closes", "resets", "shuts its side", "says something"])
def test_a_peer_that_leaves_or_says_what_nobody_asked_for_is_gone_at_once(
    how: str, manager: PoolManager, serve: Callable[..., Server]
) -> None:
    client = serve(manager).connect()
    read_some(client, b": open")
    if how == "closes":
        client.close()
    elif how == "resets":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
    elif how == "shuts its side":
        client.shutdown(socket.SHUT_WR)
    else:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
    wait_for(lambda: manager.count_all() == handed_off() == 0, "it is gone")
    assert manager.stats().closed == {"peer": 1}
    client.close()


def test_a_request_that_is_pipelined_behind_the_first_gets_no_answer(
    manager: PoolManager, serve: Callable[..., Server]
) -> None:
    client = serve(manager).connect(more=b"GET /second HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert read_some(client, b": open").count(b"HTTP/1.1 200") == 1
    manager.publish("k", "x")
    read_some(client, b"data: x")
    client.close()
    wait_for(lambda: handed_off() == 0, "it is gone")


def test_a_request_whose_body_may_be_unread_keeps_its_server(
    manager: PoolManager, serve: Callable[..., Server]
) -> None:
    server = serve(manager)
    server.arguments = {"source": iter(["a", "b"])}
    client = socket.create_connection(server.address)
    client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello")
    received = read_some(client, b"\r\n0\r\n\r\n")
    assert b"data: a" in received
    assert b"event: close" in received
    client.close()


def test_what_a_socket_has_no_room_for_waits_and_arrives_in_order(serve: Callable[..., Server]) -> None:
    manager = PoolManager(Settings(ping_interval=0, send_buffer=4096, queue_events=10_000, queue_bytes=10**8))
    client = serve(manager).connect()
    read_some(client, b": open")
    [stream] = manager.streams("k")
    for number in range(200):
        manager.publish("k", f"{number} " + "x" * 20_000)
    wait_for(lambda: stream.waiting and stream.writing_since, "its socket is full")
    other = serve(manager).connect("connectKey=other")
    read_some(other, b": open")
    manager.publish("other", "y")
    read_some(other, b"data: y")  # nobody else waits for it
    received = b""
    with gevent.Timeout(30):
        while f"data: 199 {'x' * 20_000}\n\n\r\n".encode() not in received[-30_000:]:
            received += client.recv(1_000_000)
    places = [received.index(f"data: {number} x".encode()) for number in range(200)]
    assert places == sorted(places)
    wait_for(lambda: not stream.writing_since, "it waits for news again")
    manager.shutdown()
    client.close()
    other.close()


def test_a_reader_that_has_stopped_is_cut_in_time(serve: Callable[..., Server]) -> None:
    manager = PoolManager(
        Settings(ping_interval=0.05, send_timeout=0.3, send_buffer=4096, queue_events=10_000, queue_bytes=10**8)
    )
    client = serve(manager).connect()
    read_some(client, b": open")
    [stream] = manager.streams("k")
    while not stream.waiting:
        manager.publish("k", "x" * 100_000)
        gevent.sleep(0)
    wait_for(lambda: stream.closed and handed_off() == 0, "it is cut")
    assert stream.reason is CloseReason.STALLED
    manager.shutdown()
    client.close()


def test_a_descriptor_that_is_used_again_gets_nothing_that_was_meant_for_the_one_before(
    manager: PoolManager, serve: Callable[..., Server]
) -> None:
    server = serve(manager)
    for number in range(200):
        client = server.connect(f"connectKey=key-{number}")
        read_some(client, b": open")
        manager.publish(f"key-{number}", f"for {number}")
        if number % 3 == 0:
            manager.close(f"key-{number}")
        elif number % 3 == 1:
            client.close()
        else:
            read_some(client, f"data: for {number}".encode())
        following = server.connect("connectKey=quiet")
        seen = read_some(following, b": open")
        manager.publish("quiet", f"quiet {number}")
        seen += read_some(following, f"data: quiet {number}".encode())
        assert b"data: for" not in seen
        client.close()
        following.close()
    wait_for(lambda: manager.count_all() == handed_off() == 0, "all are gone")


@pytest.mark.parametrize(
    "why",
    ["a wrapped write", "the setting", "HTTP/1.0", "TLS", "a handler of the user's own", "a system that has no epoll"],
)
def test_what_is_not_exactly_known_stays_where_it_is(
    why: str, manager: PoolManager, serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {}
    if why == "a system that has no epoll":
        monkeypatch.setattr("sys.platform", "darwin")
    if why == "a wrapped write":

        def wrap(app: Any) -> Any:
            def wrapped(environ: Any, start_response: Any) -> Any:
                def start(status: str, headers: Any, exc_info: Any = None) -> Any:
                    write = start_response(status, headers, exc_info)
                    return lambda data: write(data)

                return app(environ, start)

            return wrapped

        options["wrap"] = wrap
    elif why == "a handler of the user's own":

        class Handler(gevent.pywsgi.WSGIHandler):
            pass

        options["handler_class"] = Handler
    elif why == "the setting":
        manager = PoolManager(Settings(ping_interval=0, fast_path=False))
    elif why == "TLS":
        import trustme

        authority = trustme.CA()
        certificate = authority.issue_cert("127.0.0.1")
        certificate.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "certificate"))
        server_context = SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server_context.load_cert_chain(str(tmp_path / "certificate"))
        options["ssl_context"] = server_context
    server = serve(manager, **options)
    if why == "TLS":
        context = SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        authority.configure_trust(context)
        client = context.wrap_socket(socket.create_connection(server.address), server_hostname="127.0.0.1")
        client.sendall(b"GET /?connectKey=k HTTP/1.1\r\nHost: localhost\r\n\r\n")
    else:
        client = server.connect(version="1.0" if why == "HTTP/1.0" else "1.1")
    read_some(client, b": open")
    manager.publish("k", "x")
    read_some(client, b"data: x")
    assert handed_off() == 0
    client.close()
    manager.shutdown()


def test_without_a_free_descriptor_the_server_keeps_its_socket(
    manager: PoolManager,
    serve: Callable[..., Server],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def none_is_free(descriptor: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    server = serve(manager)
    monkeypatch.setattr("os.dup", none_is_free)
    client = server.connect()
    read_some(client, b": open")
    manager.publish("k", "x")
    read_some(client, b"data: x")
    assert handed_off() == 0
    assert "a stream stays with its server: [Errno 24] Too many open files" in caplog.text
    client.close()


@pytest.mark.skipif(
    gevent.monkey.is_module_patched("threading"), reason="no threads, so none that waits for sockets of its own"
)
@pytest.mark.parametrize("what", ["epoll", "eventfd"])
def test_without_descriptors_for_the_first_reactor_streams_stay_with_their_server(
    what: str, manager: PoolManager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_is_free(*arguments: Any) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        if what == "epoll":
            patch.setattr("flask_sse_stream.transports.reactor._Epoll", none_is_free)
        else:
            patch.setattr("os.eventfd", none_is_free)
        loop = ThreadLoop() if what == "epoll" else None
        patch.setattr("flask_sse_stream.transports.threads.ThreadLoop._current", loop)
        patch.setattr(GeventRuntime, "loop", lambda runtime: ThreadLoop.current())
        server = Server(manager)
        client = server.connect()
        read_some(client, b": open")
        manager.publish("k", "x")
        read_some(client, b"data: x")
        assert "a stream stays with its server: [Errno 24] Too many open files" in caplog.text
        client.close()
        manager.publish("k", "to one that has left")
        wait_for(lambda: manager.publish("k", "again") and manager.count_all() == 0, "it is gone")
        server.stop()
    gc.collect()
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before + 2, "no descriptor of it is left")


def test_an_error_of_the_servers_write_leaves_nothing_behind(manager: PoolManager) -> None:
    class Handler(gevent.pywsgi.WSGIHandler):
        def __init__(self, client: Any) -> None:
            self.socket, self.request_version, self.headers_sent = client, "HTTP/1.1", False
            self.response_headers = []

        def write(self, data: bytes) -> None:
            raise BrokenPipeError

    client, peer = socket.socketpair()
    environ = {"REQUEST_METHOD": "GET", "QUERY_STRING": "connectKey=k", "SERVER_PROTOCOL": "HTTP/1.1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gevent.pywsgi, "WSGIHandler", Handler)
        answer = gevent.spawn(respond, manager, environ, lambda status, headers: Handler(client).write)
        with pytest.raises(BrokenPipeError):
            answer.get(timeout=15)
    assert manager.count_all() == handed_off() == 0
    client.close()
    assert peer.recv(1) == b"", "no descriptor of it is left"
    peer.close()


def test_a_client_that_leaves_before_its_first_bytes_leaves_nothing_behind(
    manager: PoolManager, serve: Callable[..., Server]
) -> None:
    server = serve(manager)
    for _ in range(50):
        client = standard_socket.create_connection(server.address)
        client.sendall(b"GET /?connectKey=k HTTP/1.1\r\nHost: localhost\r\n\r\n")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
    read_some(last := server.connect(), b": open")
    last.close()
    wait_for(lambda: manager.count_all() == handed_off() == 0, "all are gone")


def test_a_forked_child_holds_no_client_of_its_parents(manager: PoolManager, serve: Callable[..., Server]) -> None:
    client = serve(manager).connect()
    read_some(client, b": open")
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:  # the child: nothing of the test runner may run in it
        with contextlib.suppress(BaseException):
            os.read(reading, 1)
        os._exit(0)
    manager.close("k")
    with gevent.Timeout(10):
        while client.recv(65536):
            pass  # it ends while the child still runs
    os.write(writing, b"!")
    assert os.waitpid(pid, 0)[1] == 0
    client.close()
