"""The shell of the table bus's server: the embedded one's life and protection, and the user's own server."""

import asyncio
import os
import signal

import pytest
import redis

from common.config import ServingConfig
from common.errors import ConfigError, TableBusError
from common.table_bus import RedisTableBus
from deployments.table_server import TableServer


@pytest.fixture
def server():
    server = TableServer(ServingConfig(), host="127.0.0.1")
    yield server
    server.stop()


def test_the_embedded_server_answers_only_with_its_password(server: TableServer) -> None:
    url = asyncio.run(server.url())
    with redis.Redis.from_url(url) as client:
        assert client.ping()
    anonymous = "redis://" + url.rpartition("@")[2]
    assert not anonymous.startswith("redis://127.0.0.1:6379")
    with redis.Redis.from_url(anonymous) as client, pytest.raises(redis.AuthenticationError):
        client.ping()


def test_the_embedded_server_is_reached_at_the_address_of_the_node() -> None:
    server = TableServer(ServingConfig())
    try:
        with redis.Redis.from_url(asyncio.run(server.url())) as client:
            assert client.set("key", "value")
    finally:
        server.stop()


def test_an_address_that_is_not_of_this_machine_is_refused_with_a_remedy() -> None:
    with pytest.raises((TableBusError, OSError)):
        TableServer(ServingConfig(), host="203.0.113.1")


def test_health_fails_when_the_embedded_server_has_died(server: TableServer) -> None:
    server.check_health()
    with redis.Redis.from_url(asyncio.run(server.url())) as client:
        os.kill(client.info("server")["process_id"], signal.SIGKILL)
    with pytest.raises(TableBusError, match="does not answer"):
        server.check_health()


def test_stop_can_be_called_twice(server: TableServer) -> None:
    server.stop()
    server.stop()
    with pytest.raises(TableBusError):
        server.check_health()


def test_the_configured_server_is_used_as_it_is(valkey_url: str) -> None:
    server = TableServer(ServingConfig(redis_url=valkey_url))
    assert asyncio.run(server.url()) == valkey_url
    server.check_health()
    server.stop()


def test_a_configured_server_that_does_not_answer_is_refused_at_start() -> None:
    with pytest.raises(ConfigError, match=r"redis_url='redis://127.0.0.1:1/0'.*no server answers") as caught:
        TableServer(ServingConfig(redis_url="redis://:secret@127.0.0.1:1/0"))
    assert "secret" not in str(caught.value)


async def test_the_bus_takes_the_servers_method_as_its_resolver(server: TableServer) -> None:
    bus = RedisTableBus(server.url)
    assert await bus.fetch("nothing", timeout_s=0) is None
    await bus.close()
