"""The application that several modules ask, and whose processes `test_faults` kills: tiny, complete, started once."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.deployments.application import EXACT_APP, make_complete_checkpoint, running


@pytest.fixture(scope="session")
def exact_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer and a (random) hash function, its experts large enough for shared memory."""
    folder = tmp_path_factory.mktemp("tiny")
    return make_complete_checkpoint(folder, moe_intermediate_size=256)


@pytest.fixture(scope="session")
def exact(serve_url: str, exact_folder: Path) -> Iterator[httpx.Client]:
    settings = {"model_name": "tiny", "expert_slots": 4}
    with running(serve_url, EXACT_APP, exact_folder, **settings) as client:
        yield client
