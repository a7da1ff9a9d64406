"""A small hash function and a tiny checkpoint, shared by the tests of the predictor."""

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.predictor.hash_function import find_embedding_key, read_embedding
from actors.predictor.network import HashFunction, HashFunctionSpec, WeightRule
from common.checkpoint import Checkpoint
from tests.tiny_models import make_checkpoint


def make_function(model: Path, seed: int = 0, **changes: Any) -> HashFunction:
    """A random hash function for a checkpoint, with weights large enough that context matters.

    Args:
        changes: to its spec.
    """
    checkpoint = Checkpoint.open(model)
    key = find_embedding_key(model)
    embedding = read_embedding(model, key)
    spec = HashFunctionSpec(
        model_fingerprint=checkpoint.fingerprint,
        embedding_key=key,
        vocab_size=embedding.shape[0],
        embedding_size=embedding.shape[1],
        num_layers=checkpoint.architecture.num_encoder_layers or checkpoint.architecture.num_layers,
        num_experts=checkpoint.architecture.num_experts,
        top_k=checkpoint.architecture.top_k,
        weight_rule=WeightRule(sum=1.0),
        **{"compressed_size": 24, "hidden_size": 32, "half_lives": (1.0, 8.0), **changes},
    )
    torch.manual_seed(seed)
    function = HashFunction(spec, embedding)
    with torch.no_grad():
        for parameter in function.parameters():
            parameter.mul_(4)
            if not parameter.any():  # blocks that begin as nothing
                parameter.normal_(std=0.5)
    return function.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "token_residual": {"token_residual": True},
    "filters": {"network": "filters"},
}


@pytest.fixture(params=list(VARIANTS))
def function(model_folder: Path, request: pytest.FixtureRequest) -> HashFunction:
    return make_function(model_folder, **VARIANTS[request.param])
