"""Puts an engine together from a configuration and a source of experts."""

import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from actors.executor.device_memory import CudaMeter, measure_memory, slots_that_fit
from actors.executor.drivers import cache_bytes, new_passes, new_prefetcher, new_runner
from actors.executor.encoder_decoder import EncoderDecoderRunner
from actors.executor.engine import Engine, EngineLimits
from actors.executor.eviction import EVICTION_POLICIES
from actors.executor.expert_source import ExpertSource
from actors.executor.gpu.page_state import EVICTION_ORDERS
from actors.executor.host_pager import HostPager
from actors.executor.model_loader import attach_slots, load_dense_model
from actors.executor.packed_encoder import has_encoder
from actors.executor.pager import NEXT_GATE, Pager
from actors.executor.predicted_routing import PredictedRouting
from actors.executor.predictors import NONE, chosen_predictor, given_lookahead, new_lookahead
from actors.executor.resident_set import (
    PinnedExperts,
    count_pinned,
    load_pinned,
    most_used,
    recorded_counts,
)
from actors.executor.slots import SlotPool
from actors.executor.warm_up import Residents, warm_up
from actors.predictor.decoding import DecodingPredictor
from actors.predictor.hash_function import find_hash_function, load_hash_function
from common.architecture import MoeArchitecture, describe_architecture
from common.config import ServingConfig
from common.errors import ConfigError, HostRegistrationError
from common.expert_layout import ExpertLayout
from common.tokenizer import load_tokenizer


def build_engine(
    config: ServingConfig,
    source: ExpertSource,
    logger: logging.Logger | None = None,
    peers: Sequence[Residents] = (),
    predictor: DecodingPredictor | None = None,
) -> Engine:
    """An engine that has run one pass and waits to be started.

    Args:
        logger: gets one line about what was built.
        peers: what other executors hold, to begin with.
        predictor: on a CPU in the place of the configured one; for comparison.
    Raises:
        CheckpointError, UnsupportedModelError: the model cannot be loaded or driven.
        ConfigError, SlotsTooFewError: the settings do not fit the model.
    """
    started = time.perf_counter()
    logger = logger or logging.getLogger(__name__)
    architecture = describe_architecture(config.model)
    device = torch.device(_resolve_device(config.device))
    check_eviction(config.eviction, device)
    predictor_name, counts = chosen_predictor(config, device.type), recorded_counts(config)
    dtype = config.compute_dtype(device.type, source.layout.dtype)
    layout = source.layout.with_dtype(dtype)
    limits = EngineLimits(
        config.max_batch_size,
        config.prefill_chunk_tokens,
        config.max_queued_requests,
        config.max_stall_ms / 1e3,
    )
    max_tokens = config.context_limit(architecture.max_context_tokens)
    num_slots = None
    if not config.expert_slots.is_auto:
        num_slots = config.expert_slots.slots_per_layer(
            architecture.num_layers, architecture.num_experts, layout.slab_bytes, architecture.top_k
        )
    model = load_dense_model(config.model, dtype, device)
    if num_slots is None:
        num_slots = auto_slots(config, model, architecture, layout, limits, max_tokens, logger)
    num_pinned = count_pinned(config, num_slots, architecture.num_experts, architecture.top_k)
    pinned = most_used(counts, num_pinned) if counts is not None and num_pinned else ()
    slot_model = attach_slots(model, layout, num_slots, partial(new_pager, config, source, device, pinned))
    routing = _predicted_routing(config, model) if config.routing == "predicted" else None
    runner = new_runner(slot_model, limits.max_batch_size, max_tokens)
    load_pinned(slot_model.pager, pinned)
    if peers:
        warm_up_softly(slot_model.pager, peers, logger)
    lookahead = (
        new_lookahead(predictor_name, slot_model, architecture, counts)
        if predictor is None
        else given_lookahead(predictor, slot_model)
    )
    prompts, decoder = new_passes(
        slot_model,
        runner,
        limits,
        architecture.top_k,
        routing,
        predictor_name == NEXT_GATE,
        logger,
        lookahead,
    )
    logger.info(
        "Executor ready in %.1f s: %s on %s in %s, %d of %d experts per layer in slots (%.2f GB), %d of them pinned, "
        "KV cache %.2f GB, decode_predictor=%s",
        time.perf_counter() - started, config.served_name, device, dtype, num_slots, architecture.num_experts,
        num_slots * architecture.num_layers * layout.slab_bytes / 1e9, num_pinned, cache_bytes(runner) / 1e9,
        lookahead.name if lookahead else predictor_name if decoder.runs_ahead else NONE,
    )  # fmt: skip
    return Engine(
        prompts,
        decoder,
        slot_model.pager,
        slot_model.clock,
        limits,
        tokenizer=_fast_tokenizer(config.model),
        eos_ids=eos_ids(slot_model.model),
        prefetcher=new_prefetcher(slot_model, prompts) if config.prefetch else None,
        prefix=runner.prefix if isinstance(runner, EncoderDecoderRunner) else None,
        lookahead=lookahead,
    )


def warm_up_softly(pager: Pager, peers: Sequence[Residents], logger: logging.Logger) -> None:
    """Fill the slots with what peers hold, or say why not."""
    started = time.perf_counter()
    try:
        num_copied = warm_up(pager, peers)
    except Exception as error:  # whatever is missing is fetched on demand, where errors are answered
        logger.warning("Warming up was given up: %s: %s", type(error).__name__, error)
        return
    logger.info(
        "Warmed up in %.2f s with %d experts that %d other executors hold",
        time.perf_counter() - started, num_copied, len(peers),
    )  # fmt: skip


def auto_slots(
    config: ServingConfig,
    model: PreTrainedModel,
    architecture: MoeArchitecture,
    layout: ExpertLayout,
    limits: EngineLimits,
    max_tokens: int,
    logger: logging.Logger,
) -> int:
    """The slots per layer that `expert_slots=auto` means for a model that has none yet.

    Raises:
        ConfigError: too few fit on the device.
    """
    if model.device.type != "cuda":
        # All experts lie in this memory already, and a slot is a second copy.
        return max(architecture.top_k, architecture.num_experts // 2)
    on_device = config.routing == "exact" and not has_encoder(model)
    memory = measure_memory(
        model, architecture, layout, limits, max_tokens, on_device, CudaMeter(model.device)
    )
    logger.info("expert_slots=auto: %s", memory)
    return slots_that_fit(config.expert_slots, architecture, layout.slab_bytes, memory)


def check_eviction(eviction: str, device: torch.device) -> None:
    """
    Raises:
        ConfigError: a policy that only the host's pager knows, where the device pages.
    """
    if device.type == "cuda" and eviction not in EVICTION_ORDERS:
        known = f"on a GPU, which pages by itself, one of {', '.join(EVICTION_ORDERS)}"
        raise ConfigError("eviction", eviction, f"{known}; the others are for device=cpu")


def new_pager(
    config: ServingConfig,
    source: ExpertSource,
    device: torch.device,
    pinned: PinnedExperts,
    pools: Sequence[SlotPool],
    num_experts: int,
) -> Pager:
    """A device pager where the device reads the source's memory, else one that the host drives."""
    if device.type == "cuda":
        try:
            return new_device_pager(source, pools, num_experts, config.eviction, pinned)
        except (HostRegistrationError, ValueError) as error:
            logging.getLogger(__name__).warning(
                "The host drives paging, without CUDA graphs and several times slower: %s", error
            )
    policy = EVICTION_POLICIES[config.eviction]
    return HostPager(source, pools, num_experts, policy, device, pinned=pinned)


def new_device_pager(
    source: ExpertSource,
    pools: Sequence[SlotPool],
    num_experts: int,
    eviction: str,
    pinned: PinnedExperts = (),
) -> Pager:
    """
    Raises:
        HostRegistrationError, ValueError: as `HostExperts`.
    """
    # Here, because Triton is installed with CUDA builds of torch only.
    from actors.executor.gpu.host_experts import HostExperts
    from actors.executor.gpu.pager import DevicePager

    experts = HostExperts(source, len(pools), num_experts, pools[0].elements.device)
    pager = DevicePager(source, pools, num_experts, experts, eviction, pinned=pinned)
    if pager.holds_all:
        pager.load_all()
    return pager


def _predicted_routing(config: ServingConfig, model: PreTrainedModel) -> PredictedRouting:
    if getattr(model, "scores_scale_inputs", False):
        needs_router = f"the routers of {config.served_name} also scale what goes into the experts; use exact"
        raise ConfigError("routing", config.routing, needs_router)
    folder = find_hash_function(config.model, config.hash_function)
    if folder is None:
        raise ConfigError(
            "routing", config.routing, "the model has no hash function; train one, or set hash_function"
        )
    return PredictedRouting(load_hash_function(folder, config.model))


def eos_ids(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a sequence: the generation config's, else the model config's."""
    generation_config = getattr(model, "generation_config", None)  # a classifier has none
    of_generation = None if generation_config is None else generation_config.eos_token_id
    found = of_generation if of_generation is not None else model.config.get_text_config().eos_token_id
    if found is None:
        return frozenset()
    return frozenset(found if isinstance(found, list) else [found])


def _fast_tokenizer(folder: str | Path) -> Tokenizer | None:
    tokenizer = load_tokenizer(folder)
    return None if tokenizer is None else tokenizer.backend_tokenizer


def _resolve_device(setting: str) -> str:
    if setting == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return setting
