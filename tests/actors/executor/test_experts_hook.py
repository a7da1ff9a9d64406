"""Slots against every expert in place: the same bits, whatever the slots, the waves, the dtype and the policy."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.executor.passes import Pass
from actors.executor.runner import ModelRunner, RowInput
from common.architecture import find_experts_modules
from tests.actors.executor.harness import PROMPTS, slot_model
from tests.tiny_models import NUM_EXPERTS, make_checkpoint

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Where every core is busy, several wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_all(folder: Path, num_slots: int, dtype: torch.dtype, eviction: str = "lru") -> list[Tensor]:
    """Logits of prompt passes, each for one and one for all of them, and of a batch of decode passes."""
    runner = ModelRunner(slot_model(folder, num_slots, dtype, eviction), num_rows=3, max_tokens=64)
    prompts = [RowInput(row, 0, prompt) for row, prompt in enumerate(PROMPTS)]
    logits = [runner.run([prompt], Pass(1)) for prompt in prompts]
    logits.append(runner.run(prompts, Pass(len(prompts))))
    for step in range(4):
        inputs = [RowInput(row, len(prompt) + step, (7 + row + step,)) for row, prompt in enumerate(PROMPTS)]
        logits.append(runner.run(inputs, Pass(len(inputs))))
    return logits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "family", ["qwen3_moe", "deepseek_v2", "gpt_oss", "granitemoe", "llama4_text", "dbrx"]
)
def test_logits_are_bit_equal_to_all_resident(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path, dtype=dtype)
    resident = run_all(folder, NUM_EXPERTS, dtype)
    for num_slots, eviction in ((2, "lru"), (3, "fifo"), (5, "lru")):
        paged = run_all(folder, num_slots, dtype, eviction)
        assert all(torch.equal(a, b) for a, b in zip(resident, paged, strict=True)), (num_slots, eviction)


def test_several_threads_change_no_bit_either(tmp_path: Path) -> None:
    """With them BLAS rounds a row by its place in the matrix, and the library's sort does not keep places."""
    torch.set_num_threads(2)
    folder = make_checkpoint("qwen3_moe", tmp_path)
    resident, paged = (run_all(folder, num_slots, torch.float32) for num_slots in (NUM_EXPERTS, 3))
    assert all(torch.equal(a, b) for a, b in zip(resident, paged, strict=True))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "gpt_oss", "granitemoe", "llama4_text"])
def test_prompts_of_one_pass_do_not_see_each_other(family: str, tmp_path: Path) -> None:
    """Nor the padding of the shorter ones, in any chunk."""
    model = slot_model(make_checkpoint(family, tmp_path), 3)
    runner = ModelRunner(model, num_rows=5, max_tokens=64)
    rows = (3, 0, 4)
    for start, stop in ((0, 3), (3, 16)):
        parts = [(row, prompt[start:stop]) for row, prompt in zip(rows, PROMPTS, strict=True)]
        alone = [runner.run([RowInput(row, start, part)], Pass(1)) for row, part in parts]
        together = runner.run([RowInput(row, start, part) for row, part in parts], Pass(len(parts)))
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-4)


def test_a_wrong_expert_would_show(tmp_path: Path) -> None:
    """The control of the tests above: one expert's weights changed, and the logits differ."""
    folder = make_checkpoint("qwen3_moe", tmp_path)
    model = slot_model(folder, NUM_EXPERTS)
    runner = ModelRunner(model, num_rows=1, max_tokens=64)
    before = runner.run([RowInput(0, 0, PROMPTS[0])], Pass(1))
    slot = int(model.pager.page_table[0][model.pager.resident(0)][0])
    next(iter(find_experts_modules(model.model).values())).down_proj[slot].zero_()
    assert not torch.equal(before, runner.run([RowInput(0, 0, PROMPTS[0])], Pass(1)))


def test_checkpoint_in_bfloat16_is_converted_on_the_way_into_float32_slots(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path, dtype=torch.bfloat16)
    model = slot_model(folder, NUM_EXPERTS, torch.float32)
    ModelRunner(model, num_rows=1, max_tokens=64).run([RowInput(0, 0, PROMPTS[0])], Pass(1))
    expert_id = int(model.pager.resident(0).nonzero()[0][0])
    experts = next(iter(find_experts_modules(model.model).values()))
    in_slot = experts.down_proj[int(model.pager.page_table[0][expert_id])]
    stored = model.pager.source.layout.views(model.pager.source.fetch(0, expert_id))["down_proj"]
    assert in_slot.dtype == torch.float32
    assert torch.equal(in_slot, stored.float())


def test_a_pass_knows_what_it_needed_and_missed(tmp_path: Path) -> None:
    model = slot_model(make_checkpoint("qwen3_moe", tmp_path), NUM_EXPERTS)
    runner = ModelRunner(model, num_rows=2, max_tokens=64)
    first, again = Pass(1, keep_choices=True), Pass(1)
    runner.run([RowInput(0, 0, PROMPTS[0])], first)
    runner.run([RowInput(0, 0, PROMPTS[0])], again)
    assert first.choices is not None
    needed = sum(len(set(ids.flatten().tolist())) for ids in first.choices)
    assert (int(first.needed[0]), int(first.missed[0])) == (needed, needed)
    assert (int(again.needed[0]), int(again.missed[0])) == (needed, 0)
    batch = Pass(2)
    runner.run([RowInput(0, 14, (3,)), RowInput(1, 0, (4,))], batch)
    assert batch.needed.tolist() == [model.clock.num_layers * 2] * 2
    prompts = Pass(2)
    runner.run([RowInput(0, 0, PROMPTS[0]), RowInput(1, 0, PROMPTS[2])], prompts)
    alone = Pass(1)
    runner.run([RowInput(1, 0, PROMPTS[2])], alone)
    assert prompts.needed.tolist() == [needed, int(alone.needed[0])]
