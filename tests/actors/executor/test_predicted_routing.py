"""routing=predicted: the tables decide, for prompts and for generated tokens, whether or not they came in time."""

from pathlib import Path

import pytest
import torch

from actors.executor.build import build_engine
from actors.executor.expert_source import CheckpointExpertSource
from actors.executor.passes import Pass, to_routing
from actors.executor.predicted_routing import PredictedRouting
from actors.executor.runner import ModelRunner, RowInput
from actors.predictor.network import HashFunction
from actors.predictor.predictor import HashFunctionPredictor
from common.checkpoint import Checkpoint
from common.config import ServingConfig
from common.errors import ConfigError
from tests.actors.executor.harness import PROMPTS, library_greedy, library_model, slot_model, start_engine
from tests.actors.predictor.conftest import make_function
from tests.tiny_models import NUM_EXPERTS, make_checkpoint

NUM_TOKENS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture(scope="module")
def function(folder: Path) -> HashFunction:
    return make_function(folder)


def expected_tokens(folder: Path, function: HashFunction, prompt: list[int]) -> list[int]:
    """The slow way: for every token the whole sequence is predicted and computed anew, with every expert in place."""
    predictor = HashFunctionPredictor(function)
    runner = ModelRunner(slot_model(folder, NUM_EXPERTS), num_rows=1, max_tokens=64)
    tokens = list(prompt)
    for _ in range(NUM_TOKENS):
        [table] = predictor.predict([tokens])
        logits = runner.run([RowInput(0, 0, tokens)], Pass(1, to_routing(table.expert_ids, table.weights)))
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("with_table", [True, False], ids=["table on the bus", "table lost"])
def test_hash_function_routes_prompt_and_generated_tokens(
    folder: Path, function: HashFunction, with_table: bool
) -> None:
    expected = [expected_tokens(folder, function, prompt) for prompt in PROMPTS]
    harness = start_engine(slot_model(folder), routing=PredictedRouting(function))
    try:
        sinks = []
        for index, prompt in enumerate(PROMPTS):
            sinks.append(harness.submit(prompt, f"r{index}", max_tokens=NUM_TOKENS))
            if with_table:
                [table] = HashFunctionPredictor(function).predict([prompt])
                harness.engine.attach_table(f"r{index}", table)
        assert [sink.token_ids() for sink in sinks] == expected
        usage = sinks[0].chunks[-1].experts
        assert usage is not None
        assert usage.predicted == usage.needed
    finally:
        harness.engine.stop()


def test_it_is_not_the_routers_that_decide(folder: Path, function: HashFunction) -> None:
    own = library_greedy(library_model(folder), PROMPTS[0], NUM_TOKENS)
    assert expected_tokens(folder, function, list(PROMPTS[0])) != own


def test_routing_takes_device_and_dtype_of_the_routers_weights(function: HashFunction) -> None:
    [table] = HashFunctionPredictor(function).predict([[1, 2, 3]])
    ids, weights = to_routing(table.expert_ids, table.weights).of_layer(
        1, like=torch.ones(1, dtype=torch.bfloat16)
    )
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.bfloat16)
    assert ids.shape == (3, 2)


def test_a_family_whose_tables_would_not_say_everything_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint("llama4_text", tmp_path)
    args = {"model": str(folder), "device": "cpu", "routing": "predicted"}
    source = CheckpointExpertSource(Checkpoint.open(folder))
    with pytest.raises(ConfigError, match="also scale what goes into the experts; use exact"):
        build_engine(ServingConfig.from_args(args, environ={}), source)
