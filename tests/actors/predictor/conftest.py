"""A small hash function and a tiny checkpoint, shared by the tests of the predictor."""

from pathlib import Path

import pytest
import torch

from actors.predictor.hash_function import find_embedding_key, read_embedding
from actors.predictor.network import HashFunction, HashFunctionSpec, WeightRule
from common.checkpoint import Checkpoint
from tests.tiny_models import make_checkpoint


def make_function(model: Path, seed: int = 0, token_residual: bool = False) -> HashFunction:
    """A random hash function for a checkpoint, with weights large enough that context matters."""
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
        compressed_size=24,
        hidden_size=32,
        token_residual=token_residual,
    )
    torch.manual_seed(seed)
    function = HashFunction(spec, embedding)
    with torch.no_grad():
        for parameter in function.parameters():
            parameter.mul_(4)
    return function.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture(params=[False, True], ids=["paper", "token_residual"])
def function(model_folder: Path, request: pytest.FixtureRequest) -> HashFunction:
    return make_function(model_folder, token_residual=request.param)
