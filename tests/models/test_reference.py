"""The model that ships with the project: what users get from their first run."""

import ast
import json
from collections.abc import Iterator

import pytest

from actors.executor.build import build_engine
from actors.executor.engine import Engine
from actors.executor.expert_source import CheckpointExpertSource
from actors.predictor.evaluate import EvaluateArguments, evaluate
from actors.predictor.hash_function import find_hash_function, load_hash_function
from common.checkpoint import Checkpoint
from common.config import REFERENCE_MODEL, ServingConfig
from common.generation import GenerationRequest, SamplingParams
from common.tokenizer import load_tokenizer
from tests.actors.executor.harness import QueueSink, library_greedy, library_model

PROMPT = "def fibonacci(n):"
MAX_BYTES = 32_000_000


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    config = ServingConfig.from_args(
        {"expert_slots": "25%", "device": "cpu", "max_batch_size": 2}, environ={}
    )
    engine = build_engine(config, CheckpointExpertSource(Checkpoint.open(REFERENCE_MODEL)))
    engine.start()
    yield engine
    engine.stop()


def prompt_ids() -> list[int]:
    tokenizer = load_tokenizer(REFERENCE_MODEL)
    assert tokenizer is not None
    return tokenizer.encode(PROMPT)


def test_generates_the_librarys_tokens_with_a_quarter_of_the_slots(engine: Engine) -> None:
    expected = library_greedy(library_model(REFERENCE_MODEL), prompt_ids(), 32)
    sink = QueueSink()
    sampling = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
    engine.submit(GenerationRequest("r", tuple(prompt_ids()), sampling), sink)
    assert sink.token_ids() == expected


def test_continues_a_function_with_lines_of_python(engine: Engine) -> None:
    sink = QueueSink()
    sampling = SamplingParams(max_tokens=48, temperature=0.0)
    engine.submit(GenerationRequest("r", tuple(prompt_ids()), sampling), sink)
    lines = (PROMPT + sink.text()).splitlines()[:-1]  # the last one may be cut
    assert len(lines) > 3
    ast.parse("\n".join(lines) + "\n    pass")


def test_checkpoint_and_hash_function_are_small_and_belong_together() -> None:
    files = [
        path for path in REFERENCE_MODEL.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    folder = find_hash_function(REFERENCE_MODEL)
    assert folder is not None
    load_hash_function(folder, REFERENCE_MODEL)  # refuses one of another model


def test_hash_function_does_on_held_out_text_what_its_card_says() -> None:
    folder = find_hash_function(REFERENCE_MODEL)
    assert folder is not None
    stated = json.loads((folder / "evaluation.json").read_text())["held_out"]
    held_out = str(REFERENCE_MODEL / "heldout.txt")
    measured = evaluate(
        EvaluateArguments(
            model=str(REFERENCE_MODEL), text=held_out, max_tokens=2048, batch_size=2, device="cpu"
        )
    )
    assert measured.mean_recall == pytest.approx(stated["mean_recall"], abs=0.05)
    ratio = measured.perplexity_predicted / measured.perplexity_exact
    assert ratio == pytest.approx(stated["perplexity_predicted"] / stated["perplexity_exact"], abs=0.05)
