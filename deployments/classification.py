"""Requests for classifications into requests to executors, and what comes of them into answers.

Plain asyncio behind the Protocol of `completions.py`: neither HTTP nor Ray is known here.
"""

import math
import time
import uuid
from collections.abc import Sequence
from contextlib import aclosing

from common.errors import ModelNotFoundError, WrongTaskError
from common.generation import ExpertUsage, GenerationChunk, GenerationRequest, SamplingParams
from deployments.classify_schema import Classification, ClassificationRequest, Classified
from deployments.completions import Backend, merge
from deployments.openai_schema import ExpertFigures, Usage
from deployments.prompts import PromptReader


class ClassificationService:
    """Answers requests for classifications by one served model.

    Args:
        labels: of a classifier, in the order of its logits; empty for a model that generates, whose requests are refused.
    """

    def __init__(
        self, served_name: str, reader: PromptReader, backend: Backend, labels: Sequence[str]
    ) -> None:
        self._served_name, self._reader, self._backend, self._labels = served_name, reader, backend, labels

    async def classify(self, request: ClassificationRequest) -> Classification:
        """
        Raises:
            RequestError: the request cannot be served as it is.
            UnavailableError: it could be served later.
        """
        answer_id, requests = self._admit(request)
        for each in requests:
            self._backend.predict(each)  # first, so that the table is on its way when the executor looks
        async with aclosing(merge([self._backend.generate(each) for each in requests])) as merged:
            chunks = {index: chunk async for index, chunk in merged}
        num_tokens = sum(len(each.prompt_token_ids) for each in requests)
        usage = ExpertUsage.total(chunk.experts or ExpertUsage() for chunk in chunks.values())
        return Classification(
            id=answer_id,
            created=int(time.time()),
            model=self._served_name,
            data=[self._classified(index, chunks[index]) for index in range(len(requests))],
            usage=Usage(
                prompt_tokens=num_tokens,
                completion_tokens=0,
                total_tokens=num_tokens,
                experts=ExpertFigures.of(usage),
                timings=None,
            ),
        )

    def _admit(self, request: ClassificationRequest) -> tuple[str, list[GenerationRequest]]:
        if request.model not in (None, self._served_name):
            raise ModelNotFoundError(str(request.model), self._served_name)
        if not self._labels:
            raise WrongTaskError("generates text and has no classifier", "/v1/completions")
        answer_id = f"classify-{uuid.uuid4().hex}"
        inputs = [self._reader.read(text, None, param="input") for text in request.input]
        return answer_id, [
            GenerationRequest(f"{answer_id}-{index}", token_ids, SamplingParams())
            for index, token_ids in enumerate(inputs)
        ]

    def _classified(self, index: int, chunk: GenerationChunk) -> Classified:
        assert chunk.label_logits is not None
        probs = probabilities(chunk.label_logits)
        label = self._labels[probs.index(max(probs))]
        return Classified(index=index, label=label, probs=probs, num_classes=len(probs))


def probabilities(logits: Sequence[float]) -> list[float]:
    """Softmax over the labels, or a sigmoid where there is one alone."""
    if len(logits) == 1:
        logits = (*logits, 0.0)
        return _softmax(logits)[:1]
    return _softmax(logits)


def _softmax(logits: Sequence[float]) -> list[float]:
    highest = max(logits)
    weights = [math.exp(logit - highest) for logit in logits]
    total = sum(weights)
    return [weight / total for weight in weights]
