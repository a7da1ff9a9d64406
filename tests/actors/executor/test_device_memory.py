"""What fits on a device, with the memory of the device made up; at the end, of a GPU if there is one."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from actors.executor.build import auto_slots, build_engine
from actors.executor.device_memory import CudaMeter, DeviceMemory, measure_memory, slots_that_fit
from actors.executor.drivers import cache_bytes, new_runner
from actors.executor.engine import EngineLimits
from actors.executor.eviction import EVICTION_POLICIES
from actors.executor.expert_source import CheckpointExpertSource
from actors.executor.host_pager import HostPager
from actors.executor.model_loader import SlotModel, attach_slots, load_dense_model
from actors.executor.passes import Pass
from actors.executor.runner import ModelRunner, RowInput
from common.architecture import MoeArchitecture, describe_architecture
from common.checkpoint import Checkpoint
from common.config import ServingConfig
from common.errors import ConfigError
from common.expert_layout import ExpertLayout
from common.slot_budget import SlotBudget
from tests.actors.executor.harness import PROMPTS, library_greedy, library_model, start_engine
from tests.tiny_models import (
    ENCODER_DECODER_FAMILIES,
    FAMILIES,
    NUM_EXPERTS,
    TOP_K,
    VOCAB_SIZE,
    make_checkpoint,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

GB = 10**9
AUTO = SlotBudget.parse("auto")
LIMITS = EngineLimits(max_batch_size=3, prefill_chunk_tokens=5, max_queued_requests=8)
MAX_TOKENS = 24
HIDDEN, INTERMEDIATE = 64, 32


class FakeMeter:
    def __init__(
        self, peaks: tuple[int, ...] = (1000, 200), free_and_total: tuple[int, int] = (0, 0)
    ) -> None:
        self._peaks, self._free_and_total = list(peaks), free_and_total

    def peak_bytes(self, run: Callable[[], object]) -> int:
        run()
        return self._peaks.pop(0)

    def free_and_total_bytes(self) -> tuple[int, int]:
        return self._free_and_total


class FullMeter(FakeMeter):
    def peak_bytes(self, run: Callable[[], object]) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")


def load_dense(folder: Path) -> PreTrainedModel:
    return load_dense_model(folder, torch.float32, torch.device("cpu"))


def attach(model: PreTrainedModel, folder: Path, layout: ExpertLayout) -> SlotModel:
    source, policy = CheckpointExpertSource(Checkpoint.open(folder)), EVICTION_POLICIES["lru"]
    return attach_slots(
        model,
        layout,
        TOP_K,
        lambda pools, num_experts: HostPager(source, pools, num_experts, policy, model.device),
    )


def measure(
    folder: Path, meter: FakeMeter, on_device: bool = False
) -> tuple[DeviceMemory, MoeArchitecture, ExpertLayout]:
    architecture = describe_architecture(folder)
    model = load_dense(folder)
    layout = ExpertLayout.from_shapes(architecture.expert_shapes, torch.float32)
    memory = measure_memory(model, architecture, layout, LIMITS, MAX_TOKENS, on_device, meter)
    return memory, architecture, layout


def architecture(num_experts: int = 32, top_k: int = 4) -> MoeArchitecture:
    return MoeArchitecture("", ("a", "b"), num_experts, top_k, {}, 64, 128, 512)


def test_slots_get_what_the_rest_and_the_reserve_leave() -> None:
    memory = DeviceMemory(80 * GB, 70 * GB, 10 * GB, 2 * GB)
    assert memory.reserve_bytes == 2**30 + 4 * GB
    assert memory.available_bytes == 54 * GB - 2**30
    assert str(memory) == (
        "70.00 GB free beside the dense weights - 10.00 GB KV cache - 2.00 GB prompts and decode graphs "
        "- 5.07 GB reserve = 52.93 GB for expert slots"
    )


@pytest.mark.parametrize(("slot_bytes", "expected"), [(GB, 26), (2 * GB, 13), (GB // 2, 32)])
def test_as_many_slots_fit_in_every_layer_as_there_are_experts_at_most(
    slot_bytes: int, expected: int
) -> None:
    memory = DeviceMemory(80 * GB, 70 * GB, 10 * GB, 2 * GB)
    assert slots_that_fit(AUTO, architecture(), slot_bytes, memory) == expected


@pytest.mark.parametrize(("free_bytes", "slots"), [(25 * GB, 3), (10 * GB, 0)])
def test_too_few_slots_end_in_the_numbers_and_what_to_lower(free_bytes: int, slots: int) -> None:
    memory = DeviceMemory(80 * GB, free_bytes, 10 * GB, 2 * GB)
    with pytest.raises(ConfigError) as caught:
        slots_that_fit(AUTO, architecture(), GB, memory)
    assert str(caught.value) == (
        f"expert_slots='auto' is not possible: {slots} slots per layer fit, one token needs 4 (8.00 GB): {memory}; "
        "lower max_context_tokens, max_batch_size or prefill_chunk_tokens, or serve a smaller model"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_as_large_as_the_one_that_is_allocated(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path)
    memory, _, layout = measure(folder, FakeMeter(free_and_total=(7, 9)))
    slot_model = attach(load_dense(folder), folder, layout)
    runner = ModelRunner(slot_model, LIMITS.max_batch_size + 1, MAX_TOKENS)
    runner.run([RowInput(0, 0, (0,))], Pass(1))
    assert memory.cache_bytes == runner.cache.num_bytes()
    assert (memory.free_bytes, memory.total_bytes) == (7, 9)


@pytest.mark.parametrize("family", ENCODER_DECODER_FAMILIES)
def test_an_encoder_reads_whole_prompts_and_rows_hold_them_too(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path, num_layers=2)
    memory, architecture, layout = measure(folder, FakeMeter(peaks=(1000, 200)))
    runner = new_runner(attach(load_dense(folder), folder, layout), LIMITS.max_batch_size, MAX_TOKENS)
    assert memory.cache_bytes == cache_bytes(runner) > 0
    per_pair = (4 * HIDDEN + 3 * 48) * 4
    experts = (MAX_TOKENS + LIMITS.max_batch_size) * architecture.top_k * per_pair
    assert memory.passes_bytes == 1200 + experts + 6 * 4 * LIMITS.max_batch_size * VOCAB_SIZE


def test_the_passes_are_what_was_measured_and_what_experts_and_logits_take(tmp_path: Path) -> None:
    memory, _, _ = measure(make_checkpoint("qwen3_moe", tmp_path), FakeMeter(peaks=(1000, 200)))
    per_pair = (4 * HIDDEN + 3 * INTERMEDIATE) * 4
    experts = (LIMITS.prefill_chunk_tokens + LIMITS.max_batch_size) * TOP_K * per_pair
    logits = 6 * 4 * LIMITS.max_batch_size * VOCAB_SIZE
    assert memory.passes_bytes == 1000 + 200 + experts + logits


@pytest.mark.skipif(torch.cuda.is_available(), reason="its step on the CPU needs Triton's interpreter")
@pytest.mark.parametrize(
    ("family", "copies_experts"), [("qwen3_moe", False), ("gpt_oss", True), ("deepseek_v3", False)]
)
def test_graphs_are_as_wide_as_a_power_of_two_and_may_copy_experts(
    family: str, copies_experts: bool, tmp_path: Path
) -> None:
    memory, architecture, layout = measure(
        make_checkpoint(family, tmp_path), FakeMeter(peaks=(0, 0)), on_device=True
    )
    rows = 4  # of a batch of 3
    intermediate = architecture.expert_shapes["down_proj"][0 if family == "gpt_oss" else 1]
    per_pair = (4 * HIDDEN + 3 * intermediate) * 4
    step = rows * TOP_K * (layout.slab_bytes if copies_experts else per_pair)
    prompt = LIMITS.prefill_chunk_tokens * TOP_K * per_pair
    logits = 6 * 4 * rows * VOCAB_SIZE
    assert memory.passes_bytes == prompt + step + logits


def test_a_model_that_was_measured_generates_the_librarys_tokens(tmp_path: Path) -> None:
    folder = make_checkpoint("mixtral", tmp_path)
    model, architecture = load_dense(folder), describe_architecture(folder)
    layout = ExpertLayout.from_shapes(architecture.expert_shapes, torch.float32)
    measure_memory(model, architecture, layout, LIMITS, MAX_TOKENS, False, FakeMeter())
    harness = start_engine(attach(model, folder, layout))
    try:
        reference = library_model(folder)
        expected = [library_greedy(reference, prompt, 8) for prompt in PROMPTS]
        assert harness.generate(PROMPTS, max_tokens=8) == expected
    finally:
        harness.engine.stop()


def test_a_context_that_does_not_fit_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="one sequence of 24 tokens does not fit .* lower max_context_tokens"
    ):
        measure(make_checkpoint("qwen3_moe", tmp_path), FullMeter())


def test_auto_is_half_of_the_experts_on_a_cpu(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path)
    args = {"model": str(folder), "device": "cpu", "expert_slots": "auto", "max_batch_size": 2}
    engine = build_engine(
        ServingConfig.from_args(args, environ={}), CheckpointExpertSource(Checkpoint.open(folder))
    )
    assert engine.report().slots_per_layer == NUM_EXPERTS // 2
    engine.stop()


def test_auto_on_a_cpu_is_never_less_than_a_token_needs(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path, num_experts_per_tok=NUM_EXPERTS - 1)
    architecture = describe_architecture(folder)
    layout = ExpertLayout.from_shapes(architecture.expert_shapes, torch.float32)
    config = ServingConfig.from_args({"expert_slots": "auto"}, environ={})
    logger = logging.getLogger(__name__)
    slots = auto_slots(config, load_dense(folder), architecture, layout, LIMITS, MAX_TOKENS, logger)
    assert slots == NUM_EXPERTS - 1


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("on_device", [True, False])
def test_auto_measures_a_gpu_and_gives_back_what_that_took(on_device: bool, tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path)
    device = torch.device("cuda")
    architecture = describe_architecture(folder)
    layout = ExpertLayout.from_shapes(architecture.expert_shapes, torch.float32)
    model = load_dense_model(folder, torch.float32, device)
    meter = CudaMeter(model.device)
    measure_memory(model, architecture, layout, LIMITS, MAX_TOKENS, on_device, meter)  # loads kernels
    before = torch.cuda.memory_allocated(device)
    memory = measure_memory(model, architecture, layout, LIMITS, MAX_TOKENS, on_device, meter)
    assert torch.cuda.memory_allocated(device) == before
    assert 0 < memory.passes_bytes < 64 * 2**20
    assert 0 < memory.available_bytes < memory.free_bytes < memory.total_bytes
    assert slots_that_fit(AUTO, architecture, layout.slab_bytes, memory) == NUM_EXPERTS


@pytest.mark.gpu
@needs_gpu
def test_an_engine_with_auto_slots_holds_all_experts_of_a_small_model(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path)
    args = {"model": str(folder), "device": "cuda", "expert_slots": "auto", "max_batch_size": 2}
    engine = build_engine(
        ServingConfig.from_args(args, environ={}), CheckpointExpertSource(Checkpoint.open(folder))
    )
    assert engine.report().slots_per_layer == NUM_EXPERTS
    engine.stop()
