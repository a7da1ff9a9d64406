"""Classification through an engine, for callers in the same process; the server's way is the same `submit`."""

import queue
from collections.abc import Sequence

import torch
from torch import Tensor

from actors.executor.engine import Engine
from common.generation import GenerationChunk, GenerationRequest, SamplingParams
from common.hash_table import HashTable


class _Answer:
    """A chunk sink for one chunk."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[GenerationChunk | Exception] = queue.SimpleQueue()

    def put(self, chunk: GenerationChunk) -> None:
        self._queue.put(chunk)

    def fail(self, error: Exception) -> None:
        self._queue.put(error)

    def wait(self) -> GenerationChunk:
        item = self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item


def classify(
    engine: Engine, inputs: Sequence[Sequence[int]], tables: Sequence[HashTable] | None = None
) -> Tensor:
    """What a classifier says about texts, which share passes as far as the engine's limits go.

    Args:
        engine: of a classifier, started; nobody else's requests may be named "classify-0" and so on.
        inputs: token ids, at most as many as the engine runs and queues.
        tables: the inputs' hash tables.
    Returns:
        [inputs, labels] float32 logits.
    Raises:
        QueueFullError: too many inputs.
        ServingError: the first that failed.
    """
    answers = []
    for index, token_ids in enumerate(inputs):
        request_id = f"classify-{index}"
        answers.append(_Answer())
        engine.submit(GenerationRequest(request_id, tuple(token_ids), SamplingParams()), answers[-1])
        if tables is not None:
            engine.attach_table(request_id, tables[index])
    logits = [answer.wait().label_logits for answer in answers]
    return torch.tensor(logits)
