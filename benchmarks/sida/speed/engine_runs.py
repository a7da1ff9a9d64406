"""Sentences through this project's own engine, batch 1: with hash tables that a predictor builds meanwhile, or without."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context

import numpy as np
import torch
from numpy.typing import NDArray

from actors.executor.drivers import new_passes, new_prefetcher, new_runner
from actors.executor.engine import Engine, EngineLimits
from actors.executor.model_loader import SlotModel
from actors.executor.passes import Routing, to_routing
from actors.executor.predicted_routing import PredictedRouting
from actors.executor.sequence import PromptChunk
from actors.predictor.network import HashFunction, HashFunctionSpec, WeightRule
from actors.predictor.predictor import HashFunctionPredictor
from benchmarks.sida.answer_sink import WAIT_S, AnswerSink
from benchmarks.sida.hash_functions import NETWORKS
from benchmarks.sida.speed.host_model import HostModel
from benchmarks.sida.speed.sentences import Sentence
from common.generation import GenerationRequest, SamplingParams
from common.hash_table import HashTable

OUTSTANDING = 3  # sentences in the engine: one that runs, one whose experts are copied, one that waits
PREDICTOR_THREADS = 8  # at most; half of the processors are left to the engine

Predict = Callable[[Sentence], HashTable | None]


@dataclass(frozen=True)
class Timed:
    """One run over all sentences."""

    seconds: float  # from before the first prediction to the last answer
    latencies_s: list[float]  # per sentence, from its admission to its answer
    predictions_s: list[float]  # of tables
    logits: list[tuple[float, ...]]


class RecordedRouting(PredictedRouting):
    """Routes every sentence by its recorded table, whether or not the table also prefetches."""

    def __init__(self, sentences: Sequence[Sentence]) -> None:
        self._tables = {sentence.request_id: sentence.table for sentence in sentences}

    def of_source(self, chunk: PromptChunk) -> Routing:
        table = self._tables[chunk.sequence.request_id.partition(" ")[0]]
        return to_routing(table.expert_ids, table.weights)


class EngineRuns:
    """
    Args:
        sentences: all that will be run.
        prefetch: copy what attached tables name; else they are not looked at.
    """

    def __init__(self, slot_model: SlotModel, sentences: Sequence[Sentence], prefetch: bool) -> None:
        longest = max(len(sentence.token_ids) for sentence in sentences)
        runner = new_runner(slot_model, 1, longest)
        limits = EngineLimits(1, longest, max_queued_requests=OUTSTANDING)
        prompts, decoder = new_passes(slot_model, runner, limits, 1, RecordedRouting(sentences))
        prefetcher = new_prefetcher(slot_model, prompts) if prefetch else None
        self.pager = slot_model.pager
        self._num_runs = 0
        self._engine = Engine(
            prompts, decoder, slot_model.pager, slot_model.clock, limits, prefetcher=prefetcher
        )
        self._engine.start()

    def stop(self) -> None:
        self._engine.stop()

    def run(self, sentences: Sequence[Sentence], predict: Predict) -> Timed:
        """Args: predict: the table to attach to a sentence before it is read; None: none."""
        self._num_runs += 1
        free = threading.Semaphore(OUTSTANDING)
        sinks, predictions = [], []
        started = time.perf_counter()
        for sentence in sentences:
            began = time.perf_counter()
            table = predict(sentence)
            predictions.append(time.perf_counter() - began)
            assert free.acquire(timeout=WAIT_S), "the engine does not answer"
            sinks.append(AnswerSink(free.release))
            request_id = f"{sentence.request_id} {self._num_runs}"
            self._engine.submit(
                GenerationRequest(request_id, sentence.token_ids, SamplingParams()), sinks[-1]
            )
            if table is not None:
                self._engine.attach_table(request_id, table)
        chunks = [sink.result() for sink in sinks]
        seconds = time.perf_counter() - started
        latencies = [chunk.timings.prefill_s for chunk in chunks if chunk.timings is not None]
        return Timed(seconds, latencies, predictions, [chunk.label_logits or () for chunk in chunks])


@contextmanager
def hash_function_process(
    host: HostModel, network: str, hidden_size: int
) -> Iterator[Callable[[Sentence], None]]:
    """A process that runs a hash function with random weights: what a prediction costs.

    Its answers travel as those of a trained one would, and are worth nothing: callers take the recorded tables instead.

    Args:
        network: in NETWORKS.
    """
    embedding = host.model.get_input_embeddings().weight
    spec = HashFunctionSpec(
        model_fingerprint=host.source.model_fingerprint,
        embedding_key="shared.weight",
        vocab_size=embedding.shape[0],
        embedding_size=embedding.shape[1],
        num_layers=host.num_layers,
        num_experts=host.num_experts,
        top_k=1,
        weight_rule=WeightRule(None),
        compressed_size=hidden_size,
        hidden_size=hidden_size,
        bidirectional=True,
    )
    spec = replace(spec, **NETWORKS[network].changes)
    with ProcessPoolExecutor(1, get_context("spawn"), _start_predictor, (spec,)) as process:

        def predict(sentence: Sentence) -> None:
            process.submit(_predict, sentence.token_ids).result()

        predict(Sentence("warm-up", (0,) * 32, _no_table()))
        yield predict


def _no_table() -> HashTable:
    return HashTable(np.zeros((1, 1, 1), np.uint16), np.zeros((1, 1, 1), np.float16), "", "", "")


_predictor: HashFunctionPredictor | None = None  # of the process


def _start_predictor(spec: HashFunctionSpec) -> None:
    global _predictor
    torch.set_num_threads(min(PREDICTOR_THREADS, max(1, len(os.sched_getaffinity(0)) // 2)))
    function = HashFunction(spec, torch.randn(spec.vocab_size, spec.embedding_size)).eval()
    function.encode_vocabulary()
    _predictor = HashFunctionPredictor(function)


def _predict(token_ids: tuple[int, ...]) -> HashTable:
    assert _predictor is not None
    return _predictor.predict([token_ids])[0]


def with_mistakes(table: HashTable, hit_rate: float, num_experts: int, seed: int) -> HashTable:
    """A table that names another expert for some of the tokens of each layer, as a predictor with this hit rate would."""
    random = np.random.default_rng(seed)
    wrong = random.random(table.expert_ids.shape) >= hit_rate
    others: NDArray[np.uint16] = random.integers(0, num_experts, table.expert_ids.shape).astype(np.uint16)
    return replace(table, expert_ids=np.where(wrong, others, table.expert_ids))
