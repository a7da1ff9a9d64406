"""Serve shell of the expert store: the one replica that owns every expert. All of its work is in `actors/`."""

import logging
from typing import Any

from actors.expert_store.directory import ExpertDirectory
from actors.expert_store.store import ExpertStore
from common.config import ServingConfig


class ExpertStoreDeployment:
    """One replica only: another would hold all experts again. A replacement loads again, under a new generation."""

    def __init__(self, config: ServingConfig) -> None:
        self._store = ExpertStore(config.model, logging.getLogger("ray.serve"), config.placement_trace)
        self._store.start()

    async def directory(self) -> ExpertDirectory:
        """The references to all experts, once they are loaded.

        Raises:
            CheckpointError, CapacityError, ConfigError: why they were not.
        """
        return await self._store.wait_directory()

    async def generation(self) -> str:
        """Which load the store holds; changes when a replica takes over, whose directory is then to be fetched."""
        return (await self._store.wait_directory()).generation

    async def describe(self) -> dict[str, Any]:
        """Model, experts, bytes, nodes, seconds and GB/s, as plain data; answers while loading too."""
        return self._store.describe()

    async def check_health(self) -> None:
        """Waits for the load: Serve's first check so keeps a replica out of service until it has its experts, and
        counts a failed load as a failed start. Later checks return at once.
        """
        await self._store.wait_directory()

    def __del__(self) -> None:
        self._store.stop()
