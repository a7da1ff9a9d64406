"""Hit rates and fidelity of hash functions for one classifier."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from actors.predictor.hash_function import save_hash_function
from actors.predictor.library_routing import load_resident_model
from actors.predictor.network import HashFunction
from actors.predictor.traces import TraceBatch
from actors.predictor.tracing import RoutingTracer
from benchmarks.sida.batches import Batch
from benchmarks.sida.data.build import TaskPart, read_task, read_text
from benchmarks.sida.data.sources import PARTS, Part
from benchmarks.sida.data.tasks import MIRRORED, TaskName
from benchmarks.sida.data.tokens import NO_TOKEN
from benchmarks.sida.exactness import compare_slots
from benchmarks.sida.hash_functions import NETWORKS, TracedTask, naming, train_hash_function
from benchmarks.sida.predicted import (
    NAMED,
    Answers,
    answers,
    hit_rates,
    routed_at_random,
    routed_batch,
    token_hit_rate,
)
from benchmarks.sida.speed.sentences import write_recording
from benchmarks.sida.text_quality import measure_text
from benchmarks.sida.workshop import Workshop, routing_folder

Row = dict[str, Any]

ROUTING_FILE = "routing.npz"
_COMPARED, _RECORDED = 16, 400  # sentences


def measure_task(workshop: Workshop, num_experts: int, task: TaskName) -> Row:
    """Hash functions and a recording of the test part's routing are kept in the row's folder."""
    folder = routing_folder(workshop.root, num_experts, task)
    return workshop.once(
        folder, lambda folder: _TaskQuality(workshop, num_experts, task).measure(folder)
    ).record


def measure_exactness(workshop: Workshop, num_experts: int, task: TaskName) -> Row:
    """Of the engine, on some test sentences."""

    def measure(_folder: Path) -> Row:
        test = read_task(workshop.data, task, "test").first(_COMPARED)
        sentences = [tuple(row[row != NO_TOKEN].tolist()) for row in test.ids]
        classifier = workshop.classifier(num_experts, task).folder
        compared = compare_slots(classifier, sentences, workshop.device.type, workshop.dtype)
        return {"experts": num_experts, "task": task, **compared}

    return workshop.once(workshop.folder(num_experts, f"{task}_exactness"), measure).record


class _TaskQuality:
    def __init__(self, workshop: Workshop, num_experts: int, task: TaskName) -> None:
        self._workshop, self._num_experts, self._task = workshop, num_experts, task
        self._made = workshop.classifier(num_experts, task)
        self._model = load_resident_model(self._made.folder, workshop.device, workshop.dtype)
        self._tracer = RoutingTracer(self._model, self._made.folder, stack="encoder")
        self._parts = {part: read_task(workshop.data, task, part) for part in PARTS}
        self._training = workshop.size.hash_training
        measure_text(workshop, num_experts)  # whose hash functions are begun with

    def measure(self, folder: Path) -> Row:
        """Args: folder: for what is made."""
        held_out, test = self._traces("validation", self._training.held_out_batches), self._traces("test")
        exact = answers(self._model, self._parts["test"], self._training.batch_tokens)
        baselines = self._workshop.baselines(self._task)
        row: Row = {
            "experts": self._num_experts,
            "task": self._task,
            "mirrors": MIRRORED[self._task],
            "test_examples": len(self._parts["test"].labels),
            "tokens_mean": round(float(self._parts["test"].lengths.mean()), 1),
            "accuracy": round(exact.accuracy, 4),
            **{name: baselines[name] for name in ("majority", "bag_of_tokens")},
            "skew": self._made.record["skew"],
            "token_id": self._token_hit_rates(test),
        }
        row["random"] = self._fidelity(exact, lambda _: routed_at_random(self._model), 1)
        for network in NETWORKS:
            function = self._train(network, held_out)
            save_hash_function(naming(function, 1), folder / network)
            row[network] = hit_rates(function, test)
            for count in NAMED:
                routing = partial(routed_batch, self._model, function=function, num_named=count)
                row[network] |= self._fidelity(exact, routing, count)
        write_recording(folder / ROUTING_FILE, self._num_experts, *self._recording())
        return {**row, "training": self._made.record}

    def _traces(self, part: Part, most: int | None = None) -> list[TraceBatch]:
        traced = TracedTask(self._tracer, self._parts[part], self._training.batch_tokens)
        return list(islice(traced.traces(None), most))

    def _train(self, network: str, held_out: Sequence[TraceBatch]) -> HashFunction:
        text = torch.from_numpy(read_text(self._workshop.data, "train")).long()
        return train_hash_function(
            self._made.folder,
            TracedTask(self._tracer, self._parts["train"], self._training.batch_tokens, text),
            held_out,
            network,
            self._training,
            self._workshop.seed,
            self._workshop.device,
            start=routing_folder(self._workshop.root, self._num_experts, "text") / f"encoder_{network}",
        )

    def _fidelity(
        self, exact: Answers, routing: Callable[[Batch], AbstractContextManager[None]], count: int
    ) -> Row:
        """Args: count: of experts per token, in the names of the figures."""
        answered = answers(self._model, self._parts["test"], self._training.batch_tokens, routing)
        return {
            f"accuracy_{count}": round(answered.accuracy, 4),
            f"fidelity_{count}": round(answered.accuracy / exact.accuracy, 4),
            f"agreement_{count}": round(answered.agreement(exact), 4),
        }

    def _token_hit_rates(self, test: Sequence[TraceBatch]) -> Row:
        train = self._traces("train", self._training.held_out_batches)
        vocab_size = self._workshop.vocabulary.size
        return {
            f"top_{count}": round(token_hit_rate(train, test, self._num_experts, vocab_size, count), 4)
            for count in NAMED
        }

    def _recording(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Token ids [sentences, tokens], NO_TOKEN behind their ends, and experts [layers, sentences, tokens]."""
        few: TaskPart = self._parts["test"].first(_RECORDED)
        mask = torch.from_numpy(few.ids != NO_TOKEN)
        ids = torch.from_numpy(few.ids).long().masked_fill(~mask, 0)
        traced = [
            self._tracer.trace(*rows).expert_ids[..., 0].cpu()
            for rows in zip(ids.split(_COMPARED), mask.split(_COMPARED), strict=True)
        ]
        return few.ids, torch.cat(traced).permute(2, 0, 1).numpy()
