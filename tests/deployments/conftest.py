"""The application that several modules ask, and whose processes `test_faults` kills: tiny, complete, started once."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from actors.predictor.hash_function import save_hash_function
from tests.actors.predictor.conftest import make_function
from tests.deployments.application import EXACT_APP, running
from tests.deployments.fakes import VOCAB_SIZE, write_tokenizer
from tests.tiny_models import make_checkpoint


@pytest.fixture(scope="session")
def exact_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer and a (random) hash function, its experts large enough for shared memory."""
    folder = tmp_path_factory.mktemp("tiny")
    make_checkpoint("qwen3_moe", folder, vocab_size=VOCAB_SIZE, moe_intermediate_size=256)
    write_tokenizer(folder)
    save_hash_function(make_function(folder), folder / "hash_function")
    return folder


@pytest.fixture(scope="session")
def exact(serve_url: str, exact_folder: Path) -> Iterator[httpx.Client]:
    settings = {"model_name": "tiny", "expert_slots": 4}
    with running(serve_url, EXACT_APP, exact_folder, **settings) as client:
        yield client
