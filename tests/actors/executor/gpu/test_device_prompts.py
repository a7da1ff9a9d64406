"""Prompts of several rows in one pass that pages by itself: the library's logits, whoever else is in the pass."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.executor.gpu.device_prompts import DevicePrompts
from actors.executor.gpu.fused_model import FusedModel
from actors.executor.gpu.pager import DevicePager
from actors.executor.pager import ABSENT
from actors.executor.passes import Pass
from actors.executor.prompts import PromptResult
from actors.executor.runner import ModelRunner, RowInput
from tests.actors.executor.harness import library_model, slot_model
from tests.tiny_models import NUM_EXPERTS, TOP_K, make_checkpoint

LAYERS = 2
LONG = [(7 * place) % 120 + 1 for place in range(21)]
SHORT = [(11 * place) % 120 + 1 for place in range(5)]


class Prompts:
    """The reader of one number of slots, and what the library says of the same checkpoint."""

    def __init__(self, folder: Path, num_slots: int, device: str, fused: bool = True, prefetch: bool = True):
        self.model = slot_model(folder, num_slots, device=device, on_device=True)
        runner = ModelRunner(self.model, num_rows=5, max_tokens=48)
        runner.run([RowInput(0, 0, (0,))], Pass(1))
        forward = FusedModel(self.model.model, runner.cache, self.model.clock).prefill if fused else None
        self.reader = DevicePrompts(self.model, runner, forward, prefetch)
        self.reference = library_model(folder)

    def read(self, *inputs: tuple[int, int, Sequence[int]]) -> PromptResult:
        return self.reader.read_rows([RowInput(*each) for each in inputs])

    def expected(self, prompt: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return self.reference(torch.tensor([prompt])).logits[:, -1]


def test_logits_are_the_librarys_and_do_not_depend_on_company_or_chunks(device: str, tmp_path: Path) -> None:
    """Mixtral's sliding window is shorter than the long prompt."""
    prompts = Prompts(make_checkpoint("mixtral", tmp_path, num_layers=LAYERS), 3, device)
    together = prompts.read((1, 0, LONG), (2, 0, SHORT)).logits
    for logits, prompt in zip(together, (LONG, SHORT), strict=True):
        torch.testing.assert_close(logits[None].cpu(), prompts.expected(prompt), atol=2e-4, rtol=1e-4)
    alone = prompts.read((3, 0, SHORT)).logits
    prompts.read((4, 0, LONG[:18]))
    in_two = prompts.read((3, 0, SHORT), (4, 18, LONG[18:])).logits
    # The interpreter multiplies matrices with a library for which a row's place in its tile matters.
    tolerance = {"atol": 0.0, "rtol": 0.0} if device == "cuda" else {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(alone[0], together[1], **tolerance)
    torch.testing.assert_close(in_two, together.flip(0), **tolerance)
    prompts.model.pager.close()


def test_the_number_of_slots_changes_no_bit(device: str, tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path, num_layers=LAYERS)
    logits = []
    for num_slots in (NUM_EXPERTS, 3):
        prompts = Prompts(folder, num_slots, device)
        logits.append(prompts.read((1, 0, LONG[:7]), (2, 0, SHORT[:3])).logits)
        prompts.model.pager.close()
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("family", ["deepseek_v3", "olmoe"])
def test_modules_of_other_families_have_their_experts_paged(family: str, device: str, tmp_path: Path) -> None:
    prompts = Prompts(make_checkpoint(family, tmp_path, num_layers=3), 2, device, fused=False)
    result = prompts.read((1, 0, SHORT))
    torch.testing.assert_close(result.logits.cpu(), prompts.expected(SHORT), atol=2e-4, rtol=1e-4)
    prompts.model.pager.close()


def test_each_chunk_is_told_what_it_needed(device: str, tmp_path: Path) -> None:
    prompts = Prompts(
        make_checkpoint("qwen3_moe", tmp_path, num_layers=LAYERS), NUM_EXPERTS - 1, device, prefetch=False
    )
    slot_of = prompts.model.pager.state.slot_of.cpu().clone()
    both = LONG[:9], SHORT
    result = prompts.read((1, 0, both[0]), (2, 0, both[1]))
    assert result.choices is not None
    for index, tokens in enumerate(both):
        layers = result.choices[index]
        assert [each.shape for each in layers] == [(len(tokens), TOP_K)] * LAYERS
        needed = [np.unique(each) for each in layers]
        assert result.needed[index] == sum(map(len, needed))
        absent = [np.count_nonzero(slot_of[layer, needed[layer]] == ABSENT) for layer in range(LAYERS)]
        assert result.missed[index] == sum(absent) > 0
    assert (result.fetched == result.missed).all()
    prompts.model.pager.close()


def test_what_is_prefetched_is_no_miss_but_is_counted_as_moved(device: str, tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path, num_layers=LAYERS)
    plain = Prompts(folder, NUM_EXPERTS - 1, device, prefetch=False).read((1, 0, SHORT))
    ahead = Prompts(folder, NUM_EXPERTS - 1, device, prefetch=True).read((1, 0, SHORT))
    assert torch.equal(plain.logits, ahead.logits)
    assert ahead.missed[0] < plain.missed[0]
    assert ahead.fetched[0] > ahead.missed[0]


def test_warm_up_has_one_prefetch_for_a_layer_under_way_at_a_time(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two streams would both find the expert absent, and each give it a slot."""
    prompts = Prompts(make_checkpoint("qwen3_moe", tmp_path, num_layers=LAYERS), 5, device)
    pager, under_way, begun = prompts.model.pager, set[int](), list[int]()
    assert isinstance(pager, DevicePager)

    def begin(layer: int, expert_ids: Sequence[int]) -> None:
        assert layer not in under_way
        under_way.add(layer)
        begun.append(layer)

    monkeypatch.setattr(prompts.reader, "_run", lambda _: None)  # a pass of padding
    monkeypatch.setattr(pager, "prefetch_used", begin)
    monkeypatch.setattr(pager, "prefetch_ahead", begin)
    monkeypatch.setattr(pager, "join", under_way.clear)
    monkeypatch.setattr(pager, "join_ahead", under_way.discard)
    prompts.reader.warm_up(num_tokens=4)
    assert begun == [0, 0, 1, 1]
    assert not under_way
    pager.close()
