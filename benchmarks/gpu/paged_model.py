"""What a measurement of paged decoding runs: a model built once, given slots many times, and its graphs.

The parts are the executor's own, put together without an engine: no scheduler, no queues, no text.
"""

import gc
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from actors.executor.expert_source import CheckpointExpertSource, ExpertSource
from actors.executor.experts_hook import _ATTRIBUTE
from actors.executor.gpu.device_prompts import DevicePrompts, PromptForward
from actors.executor.gpu.fused_model import FusedModel, fuses
from actors.executor.gpu.graph_decoder import DecodeStep, GraphDecoder, bucket_sizes
from actors.executor.gpu.host_experts import HostExperts
from actors.executor.gpu.library_step import LibraryStep
from actors.executor.gpu.pager import DevicePager
from actors.executor.gpu.prefetch_governor import PrefetchGovernor
from actors.executor.model_loader import SlotModel, attach_slots, load_dense_model
from actors.executor.pager import LayerCounters
from actors.executor.passes import Pass
from actors.executor.runner import ModelRunner, RowInput
from actors.executor.sequence import Sequence
from actors.executor.slots import SlotPool
from benchmarks.engine import Collector
from benchmarks.gpu.baselines import synchronize
from benchmarks.gpu.routings import Table, TableRouting, TableShape
from benchmarks.gpu.shapes import RandomExpertSource, random_dense_model
from common.architecture import find_experts_modules
from common.checkpoint import Checkpoint
from common.generation import GenerationRequest, SamplingParams

Prompts = SequenceOf[tuple[int, ...]]

PROMPT_LENGTHS = 4  # different ones among the rows
PASS_TOKENS = 512  # of the prompts that one pass reads


class HostModel:
    """The dense model on the device and every expert in host memory that the device reads."""

    def __init__(self, model: PreTrainedModel, source: ExpertSource) -> None:
        experts = list(find_experts_modules(model).values())
        num_experts = experts[0].num_experts
        assert isinstance(num_experts, int)
        self.model, self.source, self.device = model, source, model.device
        self.layout = source.layout.with_dtype(model.dtype)
        self.num_layers, self.num_experts = len(experts), num_experts
        self.top_k: int = model.config.num_experts_per_tok
        self.vocab_size: int = model.config.vocab_size
        self.host_experts = HostExperts(source, self.num_layers, num_experts, self.device)

    @classmethod
    def random(cls, config: PretrainedConfig, seed: int, device: torch.device) -> "HostModel":
        source = cast(ExpertSource, RandomExpertSource(config, seed, device))  # nothing is ever adopted
        return cls(random_dense_model(config, device, seed), source)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, device: torch.device) -> "HostModel":
        source = CheckpointExpertSource(Checkpoint.open(folder))
        return cls(load_dense_model(folder, dtype, device), source)

    def attach(self, num_slots: int, eviction: str, max_rows: int) -> SlotModel:
        """Fresh slots; the former ones must have been detached."""

        def new_pager(pools: SequenceOf[SlotPool], num_experts: int) -> DevicePager:
            pager = DevicePager(self.source, pools, num_experts, self.host_experts, eviction)
            if pager.holds_all:
                pager.load_all()
            return pager

        return attach_slots(self.model, self.layout, num_slots, new_pager)

    def detach(self) -> None:
        """Let go of the slots, also of those that `attach` could only give to some layers. Twice is fine."""
        for module in find_experts_modules(self.model).values():
            for name in (_ATTRIBUTE, *(tensor.name for tensor in self.layout.tensors)):
                vars(module).pop(name, None)
            module.num_experts = self.num_experts
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        self.detach()
        self.host_experts.close()

    def bytes_read(self, batch: int, distinct_experts_per_layer: float) -> float:
        """Weights that a decode step needs, each counted once."""
        embedding = self.model.get_input_embeddings().weight
        dense = sum(parameter.nbytes for parameter in self.model.parameters())  # experts are no parameters
        if self.model.get_output_embeddings().weight is not embedding:
            dense += batch * embedding[0].nbytes - embedding.nbytes
        return float(dense + distinct_experts_per_layer * self.num_layers * self.layout.slab_bytes)


@dataclass(frozen=True)
class Counts:
    """What the pager counted over all layers."""

    hits: int
    misses: int
    evictions: int
    fetched: int  # experts copied, prefetched ones included
    prefetched: int
    prefetched_used: int

    @classmethod
    def of(cls, layers: SequenceOf[LayerCounters], slab_bytes: int) -> "Counts":
        return cls(
            hits=sum(layer.hits for layer in layers),
            misses=sum(layer.misses for layer in layers),
            evictions=sum(layer.evictions for layer in layers),
            fetched=sum(layer.moved_bytes for layer in layers) // slab_bytes,
            prefetched=sum(layer.prefetched for layer in layers),
            prefetched_used=sum(layer.prefetched_used for layer in layers),
        )

    def since(self, before: "Counts") -> "Counts":
        return Counts(**{name: count - getattr(before, name) for name, count in vars(self).items()})

    @property
    def fetched_in_vain(self) -> int:
        return self.prefetched - self.prefetched_used


@dataclass(frozen=True)
class Case:
    batch: int
    routing: str
    prefetch: bool


class PagedDecoding:
    """One number of slots: prompts are read into the cache, then rows decode from there as often as wanted.

    Args:
        prompts: one per row.
        max_tokens: that a row of the cache holds.
        shape: of the tables that route.
        foresees: whether they come with guesses; else the model's own guesses are all that prefetching has.
        sampling: of every row.
    """

    def __init__(
        self,
        host: HostModel,
        num_slots: int,
        eviction: str,
        prompts: Prompts,
        max_tokens: int,
        shape: TableShape,
        foresees: bool,
        sampling: SamplingParams,
    ) -> None:
        self.host, self._num_rows = host, shape.rows
        self.num_slots_in_all = num_slots * host.num_layers
        self._slot_model = host.attach(num_slots, eviction, shape.rows)
        assert isinstance(self._slot_model.pager, DevicePager)
        self._pager = self._slot_model.pager
        self._runner = ModelRunner(self._slot_model, shape.rows + 1, max_tokens)
        self._runner.run([RowInput(0, 0, (0,))], Pass(1))  # allocates the cache
        model, cache = self._slot_model.model, self._runner.cache
        self._step: DecodeStep = LibraryStep(model, cache)
        forward: PromptForward | None = None
        if fuses(model):
            fused = FusedModel(model, cache, self._slot_model.clock)
            self._step, forward = fused.decode, fused.prefill
        self._prompts = DevicePrompts(self._slot_model, self._runner, forward)
        self._sequences = [_sequence(row, prompt, sampling) for row, prompt in enumerate(prompts)]
        self._first_logits: dict[int, Tensor] = {}  # by row, [1, vocab]
        self._decoders: dict[tuple[bool, bool], GraphDecoder] = {}  # by: a table routes, prefetch
        self._table_routing = TableRouting(shape, self._pager.state.step, foresees)

    def read(self, token_ids: SequenceOf[int]) -> Tensor:
        """[1, vocab] logits after a prompt in row 0."""
        return self._prompts.read_rows([RowInput(0, 0, token_ids)]).logits

    def read_prompts(self) -> None:
        """Many in one pass: with few slots, a pass moves nearly every expert, however long."""
        for group in _groups(self._sequences, self._prompts.max_chunks):
            inputs = [RowInput(each.row, 0, each.request.prompt_token_ids) for each in group]
            logits = self._prompts.read_rows(inputs).logits
            for each, row_logits in zip(group, logits.split(1), strict=True):
                self._first_logits[each.row] = row_logits

    def can_prefetch(self, batch: int) -> bool:
        """Elsewhere it makes no difference whether a case prefetches."""
        return self._pager.can_prefetch(_bucket_size(batch, bucket_sizes(self._num_rows)), self.host.top_k)

    def capture(self, cases: SequenceOf[Case], tables: Mapping[str, Table | None]) -> None:
        """Capture the graphs of these cases; prompts have been read."""
        batches = defaultdict(set)
        for case in cases:
            batches[tables[case.routing] is not None, case.prefetch].add(case.batch)
        for (by_table, prefetch), needed in batches.items():
            decoder = GraphDecoder(
                self._step, self._pager, self._slot_model.clock, self._num_rows, self._runner.max_tokens, self.host.top_k,
                self.host.device, prefetch,
                reroute=self._table_routing.reroute if by_table else None,
                foresee=self._table_routing.foresee if by_table else None,
            )  # fmt: skip
            sizes = {_bucket_size(batch, decoder._buckets) for batch in needed}
            sizes.add(1)  # times the prefetching
            decoder._buckets = {size: decoder._buckets[size] for size in sizes}
            decoder.capture()
            self._decoders[by_table, prefetch] = decoder

    def restart(self, case: Case, table: Table | None) -> "DecodeStream":
        """Decode the first rows anew from their prompts' ends.

        Slots stay as they are. Former uses, which would count for hundreds of steps, are forgotten, and so is
        how prefetching did.
        """
        decoder = self._decoders[table is not None, case.prefetch]
        self._pager.state.heat.zero_()
        self._pager.state.counters.zero_()
        judged = decoder._governor
        decoder._governor = PrefetchGovernor(self.host.num_layers, judged.break_even, judged.most)
        self._pager._budget.fill(judged.most)
        self._pager.prefetch_budget.fill_(judged.most)
        self._pager.refresh()
        batch = self._sequences[: case.batch]
        decoder.first(batch, torch.cat([self._first_logits[sequence.row] for sequence in batch]))
        if table is not None:
            self._table_routing.load(table)
        return DecodeStream(decoder, batch, self.host.device)

    def counts(self) -> Counts:
        """Waits for the device."""
        self._pager.refresh()
        synchronize(self.host.device)
        layers = [self._pager.counters(layer) for layer in range(self.host.num_layers)]
        return Counts.of(layers, self.host.source.layout.slab_bytes)


class DecodeStream:
    """Decode steps of some rows, one of them launched ahead, as the engine runs them."""

    def __init__(self, decoder: GraphDecoder, batch: SequenceOf[Sequence], device: torch.device) -> None:
        self._decoder, self._batch, self._device = decoder, batch, device
        self._bucket: Any = decoder._buckets[_bucket_size(len(batch), decoder._buckets)]
        self._pending: Any = None
        self.tokens: list[list[int | None]] = []  # [steps][rows]; None where logits were no numbers
        self.taken_at_s: list[float] = []  # per step

    def run(self, steps: int) -> None:
        """Launch steps, and take the result of each but the last, which `drain` or the next `run` takes."""
        for _ in range(steps):
            launched = self._decoder.launch(self._batch)
            self.drain()
            self._pending = launched

    def drain(self) -> None:
        if self._pending is None:
            return
        drawn = self._pending.result().drawn
        self.taken_at_s.append(time.perf_counter())
        self.tokens.append([each.token_id for each in drawn])
        self._pending = None

    def logits(self) -> Tensor:
        """[rows, vocab] on the host, of the step drained last."""
        logits: Tensor = self._bucket.logits[: len(self._batch)].cpu()
        return logits.clone()

    def replay_ms(self, steps: int) -> list[float]:
        """Device time of each of some more steps, no work of the host between them; none without a graph."""
        if self._bucket.graph is None:
            return []
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(steps)]
        for before, after in events:
            before.record()
            self._bucket.graph.replay()
            after.record()
        synchronize(self._device)
        return [before.elapsed_time(after) for before, after in events]


def _bucket_size(batch: int, sizes: Iterable[int]) -> int:
    return min(size for size in sizes if size >= batch)


def _groups(sequences: SequenceOf[Sequence], most: int) -> list[list[Sequence]]:
    """As many prompts as one pass takes and PASS_TOKENS allow."""
    groups: list[list[Sequence]] = []
    left = 0
    for sequence in sequences:
        if not groups or len(groups[-1]) == most or sequence.num_prompt_tokens > left:
            groups.append([])
            left = PASS_TOKENS
        groups[-1].append(sequence)
        left -= sequence.num_prompt_tokens
    return groups


def table_rows(batches: SequenceOf[int]) -> int:
    """Rows of the largest graph."""
    return bucket_sizes(max(batches))[-1]


def staggered(length: int, rows: int) -> list[int]:
    """Prompt lengths of the rows, of PROMPT_LENGTHS kinds from `length` on."""
    return [length + max(1, length // 8) * (row % PROMPT_LENGTHS) for row in range(rows)]


def _sequence(row: int, prompt: tuple[int, ...], sampling: SamplingParams) -> Sequence:
    sequence = Sequence.of(GenerationRequest(f"r{row}", prompt, sampling), Collector(), None)
    sequence.row = row
    return sequence
