"""The predictor's shell, undecorated: prompts become tables on the bus, or nothing when there is no hash function."""

from collections.abc import Awaitable
from pathlib import Path

import pytest
import torch

from actors.predictor.hash_function import find_embedding_key, read_embedding, save_hash_function
from actors.predictor.network import HashFunction, HashFunctionSpec, WeightRule
from common.checkpoint import Checkpoint
from common.config import ServingConfig
from common.errors import ConfigError, VocabularyError
from common.table_bus import RedisTableBus
from deployments.predictor import PredictorDeployment
from tests.tiny_models import NUM_EXPERTS, TOP_K, VOCAB_SIZE, make_checkpoint


class FakeHandle:
    """A deployment handle with one method, `url`."""

    def __init__(self, url: str) -> None:
        self._url = url

    @property
    def url(self) -> "FakeHandle":
        return self

    def remote(self) -> Awaitable[str]:
        return self.resolve()

    async def resolve(self) -> str:
        return self._url


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path / "model")


def add_hash_function(model: Path) -> str:
    checkpoint = Checkpoint.open(model)
    key = find_embedding_key(model)
    spec = HashFunctionSpec(
        checkpoint.fingerprint,
        key,
        VOCAB_SIZE,
        64,
        checkpoint.architecture.num_layers,
        NUM_EXPERTS,
        TOP_K,
        WeightRule(1.0),
    )
    save_hash_function(HashFunction(spec, read_embedding(model, key)), model / "hash_function")
    return checkpoint.fingerprint


@pytest.fixture(autouse=True)
def keep_torch_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


async def test_a_prompt_becomes_a_table_on_the_bus(model: Path, valkey_url: str) -> None:
    fingerprint = add_hash_function(model)
    deployment = PredictorDeployment(ServingConfig(model=str(model)), FakeHandle(valkey_url))
    bus = RedisTableBus(FakeHandle(valkey_url).resolve)
    await deployment.predict("predictor-shell", [1, 2, 3])
    table = await bus.fetch("predictor-shell", timeout_s=0)
    assert table is not None
    table.check_fits(fingerprint, table.num_layers, NUM_EXPERTS, 3)
    with pytest.raises(VocabularyError):
        await deployment.predict("predictor-shell-2", [VOCAB_SIZE])
    description = await deployment.describe()
    assert (description["predictor"], description["tables_published"]) == ("hash_function", 1)
    await deployment.stop()
    await deployment.stop()
    await bus.close()


async def test_a_model_without_a_hash_function_is_not_predicted(model: Path, valkey_url: str) -> None:
    deployment = PredictorDeployment(ServingConfig(model=str(model)), FakeHandle(valkey_url))
    await deployment.predict("request", [1, 2, 3])
    assert await deployment.describe() == {"predictor": None, "reason": "the model has no hash function"}
    await deployment.stop()


async def test_a_hash_function_that_is_not_there_is_refused(
    model: Path, tmp_path: Path, valkey_url: str
) -> None:
    with pytest.raises(ConfigError, match="hash_function"):
        PredictorDeployment(
            ServingConfig(model=str(model), hash_function=str(tmp_path / "none")), FakeHandle(valkey_url)
        )
