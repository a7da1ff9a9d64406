"""Puts an engine together from a configuration and a source of experts."""

import logging
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from actors.executor.engine import Engine, EngineLimits
from actors.executor.eviction import EVICTION_POLICIES
from actors.executor.expert_source import ExpertSource
from actors.executor.model_loader import load_slot_model
from actors.executor.passes import Pass
from actors.executor.predicted_routing import PredictedRouting
from actors.executor.prefetcher import Prefetcher
from actors.executor.runner import ModelRunner, RowInput
from actors.predictor.hash_function import find_hash_function, load_hash_function
from common.architecture import describe_architecture
from common.config import ServingConfig
from common.errors import ConfigError
from common.tokenizer import load_tokenizer


def build_engine(config: ServingConfig, source: ExpertSource, logger: logging.Logger | None = None) -> Engine:
    """An engine that has run one pass and waits to be started.

    Args:
        logger: gets one line about what was built.
    Raises:
        CheckpointError, UnsupportedModelError: the model cannot be loaded or driven.
        ConfigError, SlotsTooFewError: the settings do not fit the model.
    """
    started = time.perf_counter()
    architecture = describe_architecture(config.model)
    device = torch.device(_resolve_device(config.device))
    dtype = config.compute_dtype(device.type, source.layout.dtype)
    slot_bytes = source.layout.with_dtype(dtype).slab_bytes
    num_slots = config.expert_slots.slots_per_layer(
        architecture.num_layers, architecture.num_experts, slot_bytes, architecture.top_k
    )
    slot_model = load_slot_model(
        config.model, source, num_slots, dtype, device, EVICTION_POLICIES[config.eviction]
    )
    limits = EngineLimits(config.max_batch_size, config.prefill_chunk_tokens, config.max_queued_requests)
    runner = ModelRunner(
        slot_model, limits.max_batch_size, config.context_limit(architecture.max_context_tokens)
    )
    # Allocates the KV cache, and fails here rather than for a user.
    runner.run([RowInput(0, 0, (0,))], Pass(1))
    (logger or logging.getLogger(__name__)).info(
        "Executor ready in %.1f s: %s on %s in %s, %d of %d experts per layer in slots (%.2f GB), KV cache %.2f GB",
        time.perf_counter() - started, config.served_name, device, dtype, num_slots, architecture.num_experts,
        num_slots * architecture.num_layers * slot_bytes / 1e9, runner.cache.num_bytes() / 1e9,
    )  # fmt: skip
    return Engine(
        runner,
        slot_model.pager,
        slot_model.clock,
        limits,
        tokenizer=_fast_tokenizer(config.model),
        eos_ids=eos_ids(slot_model.model),
        prefetcher=Prefetcher(slot_model.pager, slot_model.clock) if config.prefetch else None,
        predicted_routing=_predicted_routing(config) if config.routing == "predicted" else None,
    )


def _predicted_routing(config: ServingConfig) -> PredictedRouting:
    folder = find_hash_function(config.model, config.hash_function)
    if folder is None:
        raise ConfigError(
            "routing", config.routing, "the model has no hash function; train one, or set hash_function"
        )
    return PredictedRouting(load_hash_function(folder, config.model))


def eos_ids(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a sequence: the generation config's, else the model config's."""
    of_generation = model.generation_config.eos_token_id if model.generation_config is not None else None
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
