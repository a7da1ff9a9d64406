"""The hand-off of hash tables from the predictor to the executors, over Redis. Knows nothing of their content.

Two keys per request, both with one TTL, so that nothing outlives a crash: `sida:{app}:table:{request_id}` holds the
table, and a token in the list `sida:{app}:ready:{request_id}` wakes the executor that waits for it.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from common.errors import TableBusError
from common.hash_table import HashTable

ANSWER_LIMIT_S = 1.0  # how long one operation may take, apart from the time a fetch is meant to wait
CONNECT_LIMIT_S = (
    0.4  # twice this fits into ANSWER_LIMIT_S: the first try and the one after resolving the URL again
)
MAX_CONNECTIONS = 10_000  # a waiting fetch holds one
MAX_COMMANDS = 32  # that run at once; a burst of them reuses connections instead of opening hundreds

ResolveUrl = Callable[[], Awaitable[str]]
T = TypeVar("T")
_LOST_CONNECTION = (RedisConnectionError, OSError)


class TableBus(Protocol):
    """Carries one hash table per request id. Safe for any number of concurrent calls on one event loop."""

    async def publish(self, request_id: str, table: HashTable) -> None:
        """Make the table available for its TTL and wake whoever fetches it; a second publish replaces the first.

        Raises:
            TableBusError: the server cannot be reached or did not answer in time.
        """

    async def fetch(self, request_id: str, timeout_s: float) -> HashTable | None:
        """The request's table as soon as it is there, or None when it did not come within `timeout_s`.

        The table stays fetchable until it is discarded or its TTL ends. 0 looks once and does not wait.

        Raises:
            HashTableError: what came is not a table.
            TableBusError: the server cannot be reached or did not answer in time.
        """

    async def discard(self, request_id: str) -> None:
        """Free the request's keys before their TTL does.

        Raises:
            TableBusError: the server cannot be reached or did not answer in time.
        """

    async def close(self) -> None:
        """Drop all connections. A second call does nothing; a later operation connects again."""


@dataclass(frozen=True, eq=False)
class _Link:
    """A client and the URL it was made from. Each resolution makes a new link, with the old client if it may stay."""

    client: Redis
    url: str


class RedisTableBus:
    """A table bus on any Redis-compatible server, by `redis://`, `rediss://` or `unix://` URL.

    When a connection is lost, the URL is resolved again and the operation tried again, once: an embedded server
    comes back at another address. After a timeout the next operation resolves the URL.
    """

    def __init__(self, resolve_url: ResolveUrl, *, app: str = "sida", ttl_s: float = 60.0) -> None:
        self._resolve_url = resolve_url
        self._prefix = f"sida:{app}"
        self._ttl_ms = max(1, round(ttl_s * 1000))
        self._link: _Link | None = None
        self._doubted: _Link | None = None  # it let an operation time out
        self._connecting = asyncio.Lock()
        self._commands = asyncio.Semaphore(MAX_COMMANDS)

    async def publish(self, request_id: str, table: HashTable) -> None:
        data = table.to_bytes()
        await self._command(lambda client: self._store(client, request_id, data))

    async def fetch(self, request_id: str, timeout_s: float) -> HashTable | None:
        deadline = asyncio.get_running_loop().time() + timeout_s
        data = await self._run(
            lambda client: self._await_bytes(client, request_id, deadline), timeout_s + ANSWER_LIMIT_S
        )
        return None if data is None else HashTable.from_bytes(data)

    async def discard(self, request_id: str) -> None:
        await self._command(lambda client: client.unlink(self._table(request_id), self._ready(request_id)))

    async def close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            await link.client.aclose()

    def _table(self, request_id: str) -> str:
        return f"{self._prefix}:table:{request_id}"

    def _ready(self, request_id: str) -> str:
        return f"{self._prefix}:ready:{request_id}"

    async def _store(self, client: Redis, request_id: str, data: bytes) -> None:
        async with client.pipeline(transaction=True) as pipeline:
            pipeline.set(self._table(request_id), data, px=self._ttl_ms)
            pipeline.rpush(self._ready(request_id), 1)
            pipeline.pexpire(self._ready(request_id), self._ttl_ms)
            await pipeline.execute()

    async def _await_bytes(self, client: Redis, request_id: str, deadline: float) -> bytes | None:
        # The first look serves a fetch whose token an earlier one has taken.
        data = await self._get(client, request_id)
        remaining_s = deadline - asyncio.get_running_loop().time()
        if data is not None or remaining_s <= 0:
            return data
        # A BLPOP of 0 would wait for ever.
        if await client.blpop([self._ready(request_id)], timeout=max(remaining_s, 0.001)) is None:
            return None
        return await self._get(client, request_id)

    async def _get(self, client: Redis, request_id: str) -> bytes | None:
        data = await client.get(self._table(request_id))
        assert data is None or isinstance(data, bytes)  # decode_responses is off
        return data

    async def _command(self, operation: Callable[[Redis], Awaitable[object]]) -> None:
        async with self._commands:
            await self._run(operation, ANSWER_LIMIT_S)

    async def _run(self, operation: Callable[[Redis], Awaitable[T]], limit_s: float) -> T:
        try:
            async with asyncio.timeout(limit_s):
                link = await self._connected()
                try:
                    return await operation(link.client)
                except _LOST_CONNECTION:
                    return await operation((await self._connected(instead_of=link)).client)
        except TimeoutError as error:
            self._doubted = self._link
            raise TableBusError(self._server, f"no answer within {limit_s:g} s") from error
        except (RedisError, OSError) as error:
            raise TableBusError(self._server, str(error)) from error

    @property
    def _server(self) -> str:
        return without_password(self._link.url) if self._link else "(no URL yet)"

    async def _connected(self, instead_of: _Link | None = None) -> _Link:
        """The link of all operations; the URL is resolved when there is none, or it is broken or doubted."""
        async with self._connecting:
            if self._link is None or self._link in (instead_of, self._doubted):
                url = await self._resolved_url()
                if self._link is None or self._link.url != url:
                    await self.close()
                    self._link = _Link(_connect(url), url)
                else:
                    self._link = _Link(self._link.client, url)
            return self._link

    async def _resolved_url(self) -> str:
        try:
            return await self._resolve_url()
        except Exception as error:  # whatever a remote resolver raises
            raise TableBusError(self._server, f"its URL could not be resolved ({error})") from error


def without_password(url: str) -> str:
    """The URL as it may be logged."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _connect(url: str) -> Redis:
    # Without these, redis-py cuts a blocking read after 5 s and then tries for most of a minute; the limits are ours.
    return Redis.from_url(
        url,
        socket_timeout=None,
        socket_connect_timeout=None,
        retry=Retry(NoBackoff(), 0),
        max_connections=MAX_CONNECTIONS,
        protocol=2,  # version 3 begins each connection with round trips for features that are not used here
    )
