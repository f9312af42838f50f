"""The Redis broker keeps the contract, on one server, in a cluster, under Sentinels and by TLS."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
from fakes import House
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import rule
from redis_server import PROGRAMS, RedisCluster, RedisServer, Sentinel
from support import wait_for

from flask_sse_stream.brokers.base import Broker, broker_from_url
from flask_sse_stream.event import Message
from flask_sse_stream.settings import Settings
from flask_sse_stream.testing.contracts.broker import BrokerContract, body, place
from flask_sse_stream.testing.contracts.jobs import JobContract
from flask_sse_stream.testing.contracts.replay import OutsideReplayMachine


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        RedisReplayMachine.server = server
        yield server


class RedisReplayMachine(OutsideReplayMachine):
    """Every client against a model, while Redis cuts connections and forgets scripts."""

    server: RedisServer

    def make_house(self) -> House:
        if not hasattr(self, "namespace"):
            self.namespace = f"test-{secrets.token_hex(4)}"
        # Redis trims whole nodes of a stream, so more may be there than the window takes.
        return House(broker_url=self.server.url, namespace=self.namespace, history_size=4, queue_events=6)

    @rule(whose=st.sampled_from(["pubsub", "normal"]))
    def cut(self, whose: str) -> None:
        self.server.cli("CLIENT KILL", "TYPE", whose)

    @rule()
    def forget_scripts(self) -> None:
        self.server.cli("SCRIPT FLUSH")


TestReplay = RedisReplayMachine.TestCase
TestReplay.settings = hypothesis_settings(max_examples=100, stateful_step_count=30, deadline=None)


class TestRedisBroker(BrokerContract):
    @pytest.fixture(autouse=True)
    def _server(self, server: RedisServer) -> None:
        self.url = server.url
        self.namespace = f"test-{secrets.token_hex(4)}"

    def settings(self, **options: Any) -> Settings:
        return Settings(broker_url=self.url, namespace=self.namespace, **options)

    def make(self, settings: Settings) -> Broker:
        return broker_from_url(settings)

    def test_only_what_was_asked_for_is_delivered(self, started: Any) -> None:
        broker, messages = started()
        broker.publish("never asked for", body("x"))
        last = broker.publish("a", body("y"))
        wait_for(lambda: messages, "it is delivered")
        assert [message.id for message in messages] == [last]
        broker.cover(["never asked for"], [], None)
        last = broker.publish("never asked for", body("x"))
        wait_for(lambda: len(messages) == 2, "it is delivered")
        assert messages[-1].id == last

    def test_an_event_is_delivered_to_every_process_in_the_same_order(self, started: Any) -> None:
        (one, to_one), (two, to_two), (three, _) = started(), started(), started()
        ids = [broker.publish(key, body("x")) for broker in (one, two, three) * 20 for key in ("a", None)]
        for messages in (to_one, to_two):
            wait_for(lambda messages=messages: len(messages) == len(ids), "all are delivered")  # type: ignore[misc]
            assert [message.id for message in messages] == ids
            assert all(isinstance(message, Message) for message in messages)

    def test_an_id_of_another_process_is_reached_before_cover_returns(self, started: Any) -> None:
        (listener, messages), (publisher, _) = started(), started()
        for number in range(300):
            identifier = publisher.publish("a", body(str(number)))
            assert listener.cover(["a"], [], identifier) == place(identifier)
            assert messages[-1].id == identifier


@pytest.fixture(scope="module")
def persistent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("persistent"), persistent=True, password="p: 100%/@#?") as server:
        yield server


class TestJobsOverRedis(JobContract):
    @pytest.fixture(autouse=True)
    def _server(self, server: RedisServer) -> None:
        self.url = server.url
        self.namespace = f"test-{secrets.token_hex(4)}"

    def house(self, **options: object) -> House:
        return House(broker_url=self.url, namespace=self.namespace, **options)


class TestRedisThatPersistsAndWantsAPassword(TestRedisBroker):
    @pytest.fixture(autouse=True)
    def _server(self, persistent: RedisServer) -> None:
        self.url = persistent.url
        self.namespace = f"test-{secrets.token_hex(4)}"


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("secure"), tls=True) as server:
        yield server


class TestRedisOverTLS(TestRedisBroker):
    @pytest.fixture(autouse=True)
    def _server(self, secure: RedisServer) -> None:
        self.url = secure.url
        self.namespace = f"test-{secrets.token_hex(4)}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    with RedisCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


class TestRedisClusterThroughTheNodeThatDoesNotHaveTheLog(TestRedisBroker):
    @pytest.fixture(autouse=True)
    def _server(self, cluster: RedisCluster) -> None:
        self.namespace = f"test-{secrets.token_hex(4)}"
        self.url = cluster.stranger(f"{{{self.namespace}}}:log").url


@pytest.fixture(scope="module")
def sentinel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sentinel]:
    with Sentinel(tmp_path_factory.mktemp("sentinel"), password="secret") as servers:
        yield servers


class TestRedisUnderSentinel(TestRedisBroker):
    @pytest.fixture(autouse=True)
    def _server(self, sentinel: Sentinel) -> None:
        self.url = sentinel.url
        self.namespace = f"test-{secrets.token_hex(4)}"


if "6.2" in PROGRAMS:  # not every Python has a wheel that brings it

    @pytest.fixture(scope="module")
    def oldest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
        with RedisServer(tmp_path_factory.mktemp("oldest"), program=PROGRAMS["6.2"]) as server:
            yield server

    class TestTheOldestRedis(TestRedisBroker):
        @pytest.fixture(autouse=True)
        def _server(self, oldest: RedisServer) -> None:
            assert oldest.info("server", "redis_version").startswith("6.2.")
            self.url = oldest.url
            self.namespace = f"test-{secrets.token_hex(4)}"
