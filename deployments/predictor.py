"""The Serve shell of the hash function: predicts a request's experts on the CPU and publishes the table.

A model without a hash function is served all the same; this deployment then says so and does nothing.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from ray.serve.handle import DeploymentHandle

from actors.predictor.hash_function import find_hash_function, load_hash_function
from actors.predictor.predictor import HashFunctionPredictor
from actors.predictor.publisher import TablePublisher
from common.config import ServingConfig
from deployments.table_server import connect_bus

logger = logging.getLogger(__name__)


class PredictorDeployment:
    """One replica predicts for any number of executors; all state is in the table bus."""

    def __init__(self, config: ServingConfig, table_server: DeploymentHandle) -> None:
        """
        Raises:
            ConfigError: `hash_function` names no hash function, or one of another model.
            CheckpointError: the hash function or the model is damaged.
        """
        self._predictor: HashFunctionPredictor | None = None
        self._publisher: TablePublisher | None = None
        self._folder = find_hash_function(config.model, config.hash_function)
        if self._folder is None:
            logger.warning(
                "%s has no hash function: no prediction, experts are loaded on demand", config.model
            )
            return
        torch.set_num_threads(_num_threads())
        self._predictor = HashFunctionPredictor(load_hash_function(self._folder, config.model))
        self._bus = connect_bus(config, table_server)
        self._publisher = TablePublisher(self._predictor, self._bus)

    async def predict(self, request_id: str, token_ids: Sequence[int]) -> None:
        """Predict the prompt's experts and publish the table under the request's id; returns when it is on the bus.

        Raises:
            VocabularyError: an id lies outside the model's vocabulary.
            TableBusError: the bus did not take the table.
        """
        if self._publisher is not None:
            await self._publisher.publish(request_id, token_ids)

    async def describe(self) -> dict[str, Any]:
        """What predicts and how much it has done, as plain JSON-able data."""
        if self._predictor is None or self._publisher is None:
            return {"predictor": None, "reason": "the model has no hash function"}
        return {
            "predictor": self._predictor.name,
            "version": self._predictor.version,
            "folder": str(self._folder),
            "tables_published": self._publisher.num_published,
            "batches": self._publisher.num_batches,
        }

    async def stop(self) -> None:
        """Fail what waits and drop the connections; a second call does nothing."""
        if self._publisher is not None:
            await self._publisher.stop()
            await self._bus.close()


def _num_threads() -> int:
    """A quarter of the node's cores, 1 to 4: an LSTM gains nothing from more, and Ray's default is 1 for any replica
    with less than two CPUs.
    """
    return max(1, min(4, (os.cpu_count() or 1) // 4))
