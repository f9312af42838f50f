"""URLs, where they lead to, and what is said when they lead nowhere."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import redis
from redis_server import RedisCluster, RedisServer, Sentinel
from support import free_port

from flask_sse_stream.brokers.base import broker_from_url
from flask_sse_stream.brokers.redis_errors import NotTaken, broker_error, is_elsewhere, is_permanent
from flask_sse_stream.brokers.redis_link import Server
from flask_sse_stream.brokers.redis_scripts import Names
from flask_sse_stream.errors import BrokerError, SettingsError
from flask_sse_stream.settings import Settings
from flask_sse_stream.testing.contracts.broker import body


def server(url: str) -> Server:
    return Server(url, Names("sse"))


def soon() -> float:
    return time.monotonic() + 5


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("redis+sentinel://", "write redis.sentinel://host:26379,host:26379/service/0"),
        ("redis+sentinel://host", "write redis.sentinel://host:26379,host:26379/service/0"),
        ("redis+sentinel:///service", "write redis.sentinel"),
        ("redis+sentinel://host:port/service", "Port could not be cast"),
        ("redis://host:port", "Port could not be cast"),
        ("redis://host/0?socket_timeout=5", "socket_timeout is this extension's to set"),
        ("redis://host/0?protocol=2", "protocol is this extension's to set"),
        ("redis://host/0?health_check_interval=5", "health_check_interval is this extension's to set"),
        ("redis://host/0?no_such_option=5", "no_such_option"),
        ("rediss://host/0?ssl_cert_reqs=nonsense", "SSE_BROKER_URL 'rediss://host/0': Invalid SSL .*nonsense"),
    ],
)
def test_a_url_that_leads_nowhere_is_refused_with_what_to_write(url: str, text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        broker_from_url(Settings(broker_url=url))


def test_no_message_has_the_password() -> None:
    for url in ("redis://user:secret@localhost:1/0", "redis+sentinel://:secret@localhost:1/news/0?password=secret"):
        broker = broker_from_url(Settings(broker_url=url, broker_timeout=0.2))
        with pytest.raises(BrokerError) as error:
            broker.publish("a", body("x"))
        assert "secret" not in str(error.value)
        assert "localhost:1" in str(error.value) or "no sentinel" in str(error.value)


def test_a_server_that_is_not_there_is_not_waited_for() -> None:
    broker = broker_from_url(Settings(broker_url=f"redis://127.0.0.1:{free_port()}", broker_timeout=60))
    with pytest.raises(BrokerError, match=r"refused.*is it running\?"):
        broker.publish("a", body("x"))


@pytest.mark.parametrize(
    ("error", "elsewhere", "permanent", "cure"),
    [
        (redis.ConnectionError("Connection refused"), False, False, "is it running"),
        (redis.exceptions.ReadOnlyError("You can't write"), True, False, "name the master"),
        (redis.ResponseError("Error running script: @user_script:9: -READONLY You can't"), True, False, "the master"),
        (redis.exceptions.BusyLoadingError("Redis is loading"), True, False, "reading its data"),
        (redis.exceptions.MovedError("12 127.0.0.1:7000"), True, False, "see the cause"),
        (redis.exceptions.OutOfMemoryError("command not allowed"), False, True, "raise its maxmemory"),
        (redis.ResponseError("ERR Error running script: OOM command not allowed"), False, True, "raise its maxmemory"),
        (redis.ResponseError("WRONGTYPE Operation against a key"), False, True, "choose another SSE_NAMESPACE"),
        (redis.AuthenticationError("invalid username-password pair"), False, True, "the user or the password"),
        (redis.ResponseError("MISCONF Redis is configured to save"), False, True, "look at its log"),
        (redis.ResponseError("ERR something else"), False, True, "see the cause"),
    ],
)
def test_an_error_is_named_with_its_cure(error: Any, elsewhere: bool, permanent: bool, cure: str) -> None:
    assert (is_elsewhere(error), is_permanent(error)) == (elsewhere, permanent)
    assert cure in str(broker_error("redis://host", error))
    assert "not known" in str(broker_error("redis://host", error, doubt=True))


def test_a_link_knows_which_server_it_is_connected_to(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "one") as one:
        link = server(one.url).connect(soon())
        assert (link.run, link.sharded) == (one.info("server", "run_id"), True)
        assert link.is_clean()
        one.cli("CLIENT", "KILL", "TYPE", "normal")
        assert not link.is_clean()
        with pytest.raises(redis.ConnectionError):
            link.call(soon(), "PING")
        with pytest.raises(redis.ConnectionError):
            link.call(soon(), "PING")  # it does not connect again by itself
        link.close()


def test_what_listens_says_nothing_into_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with RedisServer(tmp_path / "one") as one, caplog.at_level(logging.DEBUG):
        link = server(one.url).connect(soon())
        link.send(soon(), ("SUBSCRIBE", "channel"))
        link.receive(soon())
        one.cli("PUBLISH", "channel", "secret")
        assert link.receive(soon()) == [b"message", b"channel", b"secret"]
        assert "secret" not in caplog.text
        link.close()


def test_any_node_of_a_cluster_leads_to_the_one_that_has_the_namespace(tmp_path: Path) -> None:
    with RedisCluster(tmp_path) as cluster:
        owner, stranger = cluster.owner("{sse}:log"), cluster.stranger("{sse}:log")
        for node in (owner, stranger):
            link = server(node.url).connect(soon())
            assert link.run == owner.info("server", "run_id")
            link.close()


def test_a_sentinel_that_is_away_is_passed_over(tmp_path: Path) -> None:
    with Sentinel(tmp_path, sentinels=1) as sentinels:
        url = sentinels.url.replace("redis+sentinel://", f"redis+sentinel://127.0.0.1:{free_port()},")
        link = server(url).connect(soon())
        assert link.run == sentinels.master.info("server", "run_id")
        link.close()
        with pytest.raises(NotTaken, match="no sentinel knows a master of 'other'"):
            server(url.replace("/news/", "/other/")).connect(soon())


def test_sentinels_are_spoken_to_with_the_same_tls_as_their_master() -> None:
    with_tls = server("rediss+sentinel://localhost/news/0?ssl_check_hostname=False&ssl_ca_certs=ca.pem")
    assert with_tls._sentinel_options == {"ssl_check_hostname": False, "ssl_ca_certs": "ca.pem"}
    assert server("redis+sentinel://localhost/news/0?sentinel_password=s")._sentinel_options == {"password": "s"}
