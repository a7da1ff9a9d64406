"""Perplexity of corrupted text with the routers' routing, and with that of hash functions."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from actors.predictor.hash_function import save_hash_function
from actors.predictor.library_routing import load_resident_model
from actors.predictor.network import HashFunction
from actors.predictor.traces import Stack, TraceBatch, TraceWriter
from benchmarks.sida.corruption import Corrupted
from benchmarks.sida.hash_functions import NETWORKS, TracedText, naming, train_hash_function
from benchmarks.sida.predicted import NAMED, hit_rates, routed_at_random, routed_text
from benchmarks.sida.pretrain import perplexity
from benchmarks.sida.workshop import Workshop, routing_folder

Row = dict[str, Any]

DECODER = "decoder_ours"
_SAVED_WINDOWS = 128


def measure_text(workshop: Workshop, num_experts: int) -> Row:
    """Hash functions, and traces of both stacks for `benchmarks.cache_policies`, are kept in the row's folder."""
    folder = routing_folder(workshop.root, num_experts, "text")
    return workshop.once(folder, lambda folder: _TextQuality(workshop, num_experts).measure(folder)).record


class _TextQuality:
    def __init__(self, workshop: Workshop, num_experts: int) -> None:
        self._workshop, self._size = workshop, workshop.size
        self._made = workshop.pretrained(num_experts)
        self._model = load_resident_model(self._made.folder, workshop.device, workshop.dtype)
        self._test = workshop.text.evaluated("test", self._size.evaluated_windows)

    def measure(self, folder: Path) -> Row:
        """Args: folder: for what is made."""
        training = self._made.record
        exact = perplexity(self._model, self._test)
        row: Row = {"experts": training["experts"], "perplexity": round(exact, 4), "skew": training["skew"]}
        row["random"] = self._perplexity(exact, lambda _: routed_at_random(self._model), 1)
        functions: dict[str, HashFunction] = {}
        stacks: tuple[tuple[Stack, str], ...] = (
            *(("encoder", network) for network in NETWORKS),
            ("decoder", "ours"),
        )
        for stack, network in stacks:
            name = f"{stack}_{network}"
            functions[name], row[name] = self._train(stack, network)
            save_hash_function(naming(functions[name], 1), folder / name)
        for name, function in functions.items():
            is_decoder = name == DECODER
            encoder = functions["encoder_ours"] if is_decoder else function
            for count in NAMED:
                routing = partial(
                    routed_text,
                    self._model,
                    encoder=encoder,
                    decoder=function if is_decoder else None,
                    num_named=count,
                )
                row[name] |= self._perplexity(exact, routing, count)
        for stack in ("encoder", "decoder"):
            self._save_traces(stack, folder / f"{stack}_traces")
        return {**row, "training": training}

    def _train(self, stack: Stack, network: str) -> tuple[HashFunction, Row]:
        """A hash function of one stack, and its hit rates."""
        windows = self._size.pretraining_batch * self._size.hash_training.held_out_batches
        traced = self._traced(stack, self._workshop.text.evaluated("validation", windows))
        function = train_hash_function(
            self._made.folder,
            traced,
            list(traced.traces(None)),
            network,
            self._size.hash_training,
            self._workshop.seed,
            self._workshop.device,
        )
        return function, hit_rates(function, list(self._traced(stack, self._test).traces(None)))

    def _traced(self, stack: Stack, fixed: list[Corrupted]) -> TracedText:
        corruption, count = self._workshop.text.corruption("train"), self._size.pretraining_batch
        return TracedText(self._model, self._made.folder, stack, corruption, fixed, count)

    def _perplexity(
        self, exact: float, routing: Callable[[Corrupted], AbstractContextManager[None]], count: int
    ) -> Row:
        """Args: count: of experts per token, in the names of the figures."""
        found = perplexity(self._model, self._test, routing)
        return {f"perplexity_{count}": round(found, 4), f"ratio_{count}": round(found / exact, 4)}

    def _save_traces(self, stack: Stack, folder: Path) -> None:
        """Decisions on some test windows, without logits."""
        traced = self._traced(stack, self._workshop.text.evaluated("test", _SAVED_WINDOWS))
        writer = TraceWriter(folder, replace(traced.header(), num_kept=0, teacher="choices"))
        for batch in traced.traces(None):
            writer.write(TraceBatch(batch.token_ids, batch.mask, batch.expert_ids, batch.weights))
