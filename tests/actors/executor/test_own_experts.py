"""Encoder-decoder families with experts of ours in slots, the whole model in one call: the unmodified library's logits,
or the published formula's where the library is wrong, whatever the number of slots.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

from actors.executor.model_loader import SlotModel
from actors.executor.passes import Pass
from common.architecture import model_class
from tests.actors.executor.harness import slot_model
from tests.tiny_models import NUM_EXPERTS, make_checkpoint, make_model

INPUT_IDS = torch.randint(3, 128, (3, 11), generator=torch.Generator().manual_seed(1))
DECODER_IDS = torch.randint(3, 128, (3, 7), generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    """[batch, tokens, vocab] of the decoder, teacher forced."""
    return model(input_ids=INPUT_IDS, decoder_input_ids=DECODER_IDS).logits


def paged_logits(model: SlotModel) -> Tensor:
    model.clock.begin_pass(Pass(1))
    try:
        with model.pager.host_pass():
            return logits(model.model)
    finally:
        model.clock.end_pass()


def test_switch_in_slots_equals_the_library(tmp_path: Path) -> None:
    folder = make_checkpoint("switch_transformers", tmp_path, num_layers=4)
    resident = paged_logits(slot_model(folder, NUM_EXPERTS))
    expected = logits(make_model("switch_transformers", num_layers=4))
    torch.testing.assert_close(resident, expected, rtol=1e-5, atol=1e-5)
    for num_slots in (1, 3):
        assert torch.equal(paged_logits(slot_model(folder, num_slots)), resident)


def published_nllb(block: NllbMoeSparseMLP, hidden_states: Tensor, *_: object) -> Tensor:
    """Two experts by probability, renormalised, one expert after the other over all tokens."""
    flat = hidden_states.flatten(0, 1)
    probabilities = block.router.classifier(flat).softmax(-1)
    chosen = probabilities >= probabilities.topk(2).values[:, -1:]  # [tokens, experts]
    gates = probabilities * chosen
    gates = gates / gates.sum(-1, keepdim=True)
    output = torch.zeros_like(flat)
    for expert_id in range(NUM_EXPERTS):
        output += gates[:, expert_id, None] * block.experts[f"expert_{expert_id}"](flat)
    return (1 - block.experts.moe_token_dropout) * output.view_as(hidden_states)


def test_nllb_in_slots_equals_the_published_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint("nllb-moe", tmp_path, num_layers=4)
    resident = paged_logits(slot_model(folder, NUM_EXPERTS))
    reference = make_model("nllb-moe", num_layers=4)
    of_library = logits(reference)
    monkeypatch.setattr(NllbMoeSparseMLP, "forward", published_nllb)
    torch.testing.assert_close(resident, logits(reference), rtol=1e-4, atol=1e-4)
    assert (resident - of_library).abs().max() > 0.1
    for num_slots in (2, 3):
        assert torch.equal(paged_logits(slot_model(folder, num_slots)), resident)


def test_the_library_uses_two_of_nllbs_experts_and_ours_all(tmp_path: Path) -> None:
    def without_most_experts(model: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and name.endswith(("experts.up_proj", "experts.down_proj")):
                    parameter[2:] = 0
                elif ".expert_" in name and not {"expert_0", "expert_1"} & set(name.split(".")):
                    parameter.zero_()
        return logits(model)

    folder = make_checkpoint("nllb-moe", tmp_path, num_layers=4)
    library = make_model("nllb-moe", num_layers=4)
    assert torch.equal(logits(library), without_most_experts(library))
    ours = model_class(library.config).from_pretrained(folder).eval()
    assert not torch.allclose(logits(ours), without_most_experts(ours), atol=0.1)
