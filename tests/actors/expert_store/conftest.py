"""A checkpoint whose experts are too large for Ray to send by value."""

from pathlib import Path

import pytest

from tests.tiny_models import make_checkpoint


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"), moe_intermediate_size=256)
