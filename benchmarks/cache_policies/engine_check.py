"""Does the simulation count what the engine counts? Hit rates of both, of the same tokens, requests one by one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from actors.executor.build import build_engine
from actors.executor.engine import Engine
from actors.executor.eviction import EVICTION_POLICIES
from actors.executor.expert_source import CheckpointExpertSource
from actors.executor.lookahead import COPIES_AHEAD
from actors.executor.pager import NEXT_GATE
from actors.executor.predictors import ACTIVATION_TRACE, FREQUENCY, NONE
from actors.expert_store.loads import ExpertLoads
from actors.predictor.decoding import DecodingPredictor
from actors.predictor.library_routing import load_resident_model
from actors.predictor.tracing import RoutingTracer
from benchmarks.cache_policies.cells import BELADY, PREDICTORS, Workload
from benchmarks.cache_policies.guesses import Guesses, RecordedGuesses, guess_next_gates
from benchmarks.cache_policies.simulation import CPU, Counts, Ids, simulate, split
from benchmarks.engine import generate
from common.checkpoint import Checkpoint
from common.config import ServingConfig

SLOTS_SHARE = 4  # a quarter of the experts
NUM_BEST = 5
REQUESTS = 8
PROMPT_TOKENS, NEW_TOKENS = 32, 96

Combination = tuple[str, str]  # predictor, policy
ON_DEMAND: tuple[Combination, ...] = tuple((NONE, policy) for policy in EVICTION_POLICIES)
OF_ENGINES = (NONE, NEXT_GATE, FREQUENCY, ACTIVATION_TRACE)  # in decoding; hash tables are for prompts


def best_combinations(workload: Workload, rows: Sequence[dict[str, Any]]) -> list[Combination]:
    """Of simulated rows, those that miss least with the engine's slots and copies, and that an engine can do."""
    possible = (NONE,) if workload.at_once else OF_ENGINES  # it copies ahead in decoding alone
    comparable = [
        row
        for row in rows
        if row["slots"] == workload.num_experts // SLOTS_SHARE
        and row["policy"] != BELADY
        and row["predictor"] in possible
        and row["copies_ahead"] in (0, COPIES_AHEAD)
    ]
    ranked = sorted(comparable, key=lambda row: float(row["miss_rate"]))
    return [(row["predictor"], row["policy"]) for row in ranked[:NUM_BEST]]


@dataclass(frozen=True)
class Work:
    """What engines are given: a decoder continues the beginnings of requests, an encoder reads all of them."""

    prompts: list[list[int]]
    new_tokens: int

    @classmethod
    def of(cls, workload: Workload, num_requests: int) -> "Work":
        texts = workload.token_ids[:: max(1, len(workload.token_ids) // num_requests)][:num_requests]
        if workload.at_once:
            return cls(texts, new_tokens=1)
        return cls([text[:PROMPT_TOKENS] for text in texts], NEW_TOKENS)

    @property
    def context_tokens(self) -> int:
        return max(map(len, self.prompts)) + self.new_tokens


def compare_with_engine(
    workload: Workload,
    model: Path,
    combinations: Iterable[Combination] = ON_DEMAND,
    num_requests: int = REQUESTS,
) -> list[dict[str, Any]]:
    """Generate greedily on the CPU, trace what was generated with all experts in place, and simulate that.

    Returns:
        A row for each combination. Hits are those in the traced layers over all passes, prompts included; with a predictor
        they depend on the copies being in time, which the simulation takes for granted.
    Raises:
        CheckpointError, ConfigError: as `Workload.check_model`.
    """
    workload.check_model(model)
    work, source = Work.of(workload, num_requests), CheckpointExpertSource(Checkpoint.open(model))
    told: Told | None = None
    rows = []
    with TemporaryDirectory() as folder:
        loads, stack = Path(folder) / "loads", "encoder" if workload.at_once else "decoder"
        ExpertLoads(workload.model_fingerprint, workload.warm_up_counts()[None], stack).save(loads)
        for predictor, policy in combinations:
            engine = build_engine(engine_config(model, policy, predictor, loads, work), source)
            built = counts_of(engine, workload)
            engine.start()
            answers = [generate(engine, [prompt], work.new_tokens)[0].token_ids for prompt in work.prompts]
            engine.stop()
            told = told or Told.of(workload, model, work, answers)
            assert answers == told.answers, "no predictor and no policy changes a token"
            measured = counts_of(engine, workload) - built
            simulated = told.simulate(workload, predictor, policy, engine.report().slots_per_layer)
            rows.append({"predictor": predictor, "policy": policy, **_compared(measured, simulated)})
    return rows


@dataclass(frozen=True)
class Told:
    """What engines answered, and what the routers decide on what they read for it."""

    answers: list[list[int]]
    built_with: Ids  # of the pass with which an engine is built
    passes: list[list[Ids]]  # of each request
    guesses: list[list[Guesses]]  # of the next gate; empty for an encoder

    @classmethod
    def of(cls, workload: Workload, model: Path, work: Work, answers: list[list[int]]) -> "Told":
        texts = work.prompts
        if not workload.at_once:  # the last token was drawn, not read
            texts = [prompt + answer[:-1] for prompt, answer in zip(texts, answers, strict=True)]
        built_with, *requests = trace_texts(model, [[0], *texts])
        guesses = [] if workload.at_once else guess_next_gates(model, texts, workload.num_layers, CPU)
        lengths = [len(prompt) for prompt in work.prompts]
        return cls(
            answers,
            built_with,
            [split(request, length) for request, length in zip(requests, lengths, strict=True)],
            [split(guess, length) for guess, length in zip(guesses, lengths, strict=False)],
        )

    def simulate(self, workload: Workload, predictor: str, policy: str, slots: int) -> Counts:
        return simulate(
            self.passes, workload.num_experts, slots, EVICTION_POLICIES[policy],
            self._predictor(workload, predictor), COPIES_AHEAD if predictor != NONE else 0,
            prompts_ahead=False, built_with=self.built_with,
        )  # fmt: skip

    def _predictor(self, workload: Workload, name: str) -> DecodingPredictor:
        if name == NEXT_GATE:
            return RecordedGuesses((guess for request in self.guesses for guess in request), reach=1)
        return PREDICTORS[name](workload)


def _compared(measured: Counts, simulated: Counts) -> dict[str, Any]:
    return {
        "needed": measured.needed,
        "engine_hit_rate": round(1 - measured.miss_rate, 4),
        "simulated_hit_rate": round(1 - simulated.miss_rate, 4),
        "engine_hits": measured.needed - measured.misses,
        "simulated_hits": simulated.needed - simulated.misses,
        "engine_prefetched": measured.prefetched,
        "simulated_prefetched": simulated.prefetched,
    }


def engine_config(model: Path, eviction: str, predictor: str, loads: Path, work: Work) -> ServingConfig:
    """Args: loads: for the predictor alone; nothing is pinned."""
    settings = {
        "model": str(model), "expert_slots": f"{100 // SLOTS_SHARE}%", "device": "cpu", "eviction": eviction,
        "prefetch": "false", "decode_predictor": predictor, "resident_set": str(loads), "pinned_experts": 0,
        "max_batch_size": 1, "max_context_tokens": work.context_tokens,
    }  # fmt: skip
    return ServingConfig.from_args(settings, {})


def counts_of(engine: Engine, workload: Workload) -> Counts:
    """In the traced layers, since the engine was built."""
    layers = engine.report().layers[: workload.num_layers]  # an encoder's come first
    return Counts(
        needed=sum(layer.hits + layer.misses for layer in layers),
        misses=sum(layer.misses for layer in layers),
        prefetched=sum(layer.prefetched for layer in layers),
    )


def trace_texts(model: Path, texts: Sequence[Sequence[int]]) -> list[Ids]:
    """What the routers decide on each text."""
    tracer = RoutingTracer(load_resident_model(model, CPU, torch.float32), model, num_kept=1)
    traced = [tracer.trace(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)) for ids in texts]
    return [batch.expert_ids[0].numpy() for batch in traced]
