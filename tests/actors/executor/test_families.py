"""Every family of the library's experts registry that the runner drives, at the smallest legal number of slots."""

from pathlib import Path

import pytest
import torch
from transformers import Llama4Config, Llama4ForConditionalGeneration

from actors.executor.families import check_supported
from common.architecture import load_config
from common.errors import UnsupportedModelError
from tests.actors.executor.harness import PROMPTS, library_greedy, library_model, slot_model, start_engine
from tests.tiny_models import FAMILIES, UNSUPPORTED_FAMILIES, make_checkpoint, make_model

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


def test_the_text_model_of_a_multimodal_checkpoint_is_served(tmp_path: Path) -> None:
    """Llama 4 as it is published: one expert per token, beside an image encoder."""
    text = make_model("llama4_text", num_experts_per_tok=1).config.to_dict()
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes = dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32)
    config = Llama4Config(text_config=text, vision_config={**vision, **sizes, "image_size": 28})
    torch.manual_seed(0)
    reference = Llama4ForConditionalGeneration(config).eval()
    reference.save_pretrained(tmp_path)
    expected = [library_greedy(reference, prompt, NUM_TOKENS) for prompt in PROMPTS]
    harness = start_engine(slot_model(tmp_path, 1))
    try:
        assert harness.generate(PROMPTS, max_tokens=NUM_TOKENS) == expected
    finally:
        harness.engine.stop()


@pytest.mark.parametrize("family", UNSUPPORTED_FAMILIES)
def test_refuses_families_with_other_caches(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path)
    with pytest.raises(UnsupportedModelError, match="not supported"):
        check_supported(load_config(folder), folder)
