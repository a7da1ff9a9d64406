"""Every family of the library's experts registry that the runner drives, at the smallest legal number of slots."""

from pathlib import Path

import pytest

from actors.executor.families import check_supported
from common.architecture import load_config
from common.errors import UnsupportedModelError
from tests.actors.executor.harness import PROMPTS, library_greedy, library_model, slot_model, start_engine
from tests.tiny_models import FAMILIES, UNSUPPORTED_FAMILIES, make_checkpoint

NUM_TOKENS = 12


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batch_generates_the_librarys_tokens(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path)
    reference = library_model(folder)
    expected = [library_greedy(reference, prompt, NUM_TOKENS) for prompt in PROMPTS]
    harness = start_engine(slot_model(folder))
    try:
        assert harness.generate(PROMPTS, max_tokens=NUM_TOKENS) == expected
    finally:
        harness.engine.stop()


@pytest.mark.parametrize("family", UNSUPPORTED_FAMILIES)
def test_refuses_families_with_other_caches(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path)
    with pytest.raises(UnsupportedModelError, match="not supported"):
        check_supported(load_config(folder), folder)
