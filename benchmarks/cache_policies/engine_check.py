"""Does the simulation count what the engine counts? Hit rates of both, of the same tokens, requests one by one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from actors.executor.build import build_engine
from actors.executor.engine import Engine
from actors.executor.eviction import EVICTION_POLICIES
from actors.executor.expert_source import CheckpointExpertSource
from actors.predictor.decoding import NoPredictor
from actors.predictor.library_routing import load_resident_model
from actors.predictor.tracing import RoutingTracer
from benchmarks.cache_policies.cells import Workload
from benchmarks.cache_policies.simulation import CPU, Ids, simulate, split
from benchmarks.engine import generate
from common.checkpoint import Checkpoint
from common.config import ServingConfig
from common.errors import CheckpointError

POLICIES = ("lru", "lfu", "inactive-lifo", "activation")
SLOTS = "25%"
REQUESTS = 8
PROMPT_TOKENS, NEW_TOKENS = 32, 96


def compare_with_engine(workload: Workload, model: Path) -> list[dict[str, Any]]:
    """Generate greedily on the CPU, trace what was generated with all experts in place, and simulate that.

    Returns:
        A row for each of POLICIES. Hits are over all passes, prompts included.
    Raises:
        CheckpointError: the trace is of another model.
    """
    checkpoint = Checkpoint.open(model)
    if checkpoint.fingerprint != workload.model_fingerprint:
        raise CheckpointError(str(model), "the trace is of another model; trace this one")
    step = max(1, len(workload.token_ids) // REQUESTS)
    prompts = [ids[:PROMPT_TOKENS] for ids in workload.token_ids[::step][:REQUESTS]]
    source, rows, routing = CheckpointExpertSource(checkpoint), [], None
    for policy in POLICIES:
        engine = build_engine(engine_config(model, policy), source)
        engine.start()
        texts = [prompt + generate(engine, [prompt], NEW_TOKENS)[0].token_ids for prompt in prompts]
        hits, needed, slots = engine_counts(engine)
        engine.stop()
        routing = routing or trace_engine(model, texts)  # the same texts for every policy
        counts = simulate(
            engine_passes(routing, PROMPT_TOKENS), workload.num_experts, slots, EVICTION_POLICIES[policy],
            NoPredictor(workload.num_layers, workload.num_experts),
        )  # fmt: skip
        rows.append(
            {
                "policy": policy, "slots": slots, "needed": needed,
                "engine_hit_rate": round(hits / needed, 4), "simulated_hit_rate": round(1 - counts.miss_rate, 4),
                "engine_hits": hits, "simulated_hits": counts.needed - counts.misses,
            }
        )  # fmt: skip
    return rows


def engine_config(model: Path, eviction: str) -> ServingConfig:
    settings = {
        "model": str(model), "expert_slots": SLOTS, "device": "cpu", "eviction": eviction, "prefetch": "false",
        "max_batch_size": 1, "max_context_tokens": PROMPT_TOKENS + NEW_TOKENS,
    }  # fmt: skip
    return ServingConfig.from_args(settings, {})


def engine_counts(engine: Engine) -> tuple[int, int, int]:
    """Hits and needed experts since the engine was built, and its slots per layer."""
    report = engine.report()
    hits = sum(layer.hits for layer in report.layers)
    return hits, hits + sum(layer.misses for layer in report.layers), report.slots_per_layer


def trace_engine(model: Path, texts: Sequence[Sequence[int]]) -> list[Ids]:
    """What the routers decide on the pass with which an engine is built, and on what it reads of each text.

    The last token of a text was drawn, not read.
    """
    tracer = RoutingTracer(load_resident_model(model, CPU, torch.float32), model, num_kept=1)
    read = [[0], *(text[:-1] for text in texts)]
    traced = [tracer.trace(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)) for ids in read]
    return [batch.expert_ids[0].numpy() for batch in traced]


def engine_passes(routing: Sequence[Ids], prompt_tokens: int) -> list[list[Ids]]:
    """As the engine runs them; the first pass belongs to no request, and none has ended when the next begins."""
    first, *requests = routing
    passes = [split(request, prompt_tokens) for request in requests]
    return [[first, *passes[0]], *passes[1:]]
