"""Turns one row of logits into a token, with the library's own logits processors. Holds one sequence's random state."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from common.generation import SamplingParams, TokenLogprobs


class Sampler:
    """Draws on the CPU with a generator of its own, so a seed gives the same tokens whoever else is in the batch."""

    def __init__(self, params: SamplingParams) -> None:
        self.is_greedy = params.temperature == 0
        self.num_logprobs = params.logprobs
        self._warpers = LogitsProcessorList() if self.is_greedy else _warpers(params)
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def draw(self, logits: Tensor) -> int:
        """Args: logits: [vocab] float32 on the CPU."""
        scores = self._warpers(torch.empty(1, 0, dtype=torch.int64), logits.unsqueeze(0).clone())
        probabilities = scores.softmax(dim=-1)  # [1, vocab]
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def logprobs(self, logits: Tensor, token_id: int) -> TokenLogprobs | None:
        """Log probabilities before temperature and cuts; None when the request asked for none."""
        if self.num_logprobs is None:
            return None
        logprobs = logits.log_softmax(dim=-1)
        values, ids = logprobs.topk(self.num_logprobs)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return TokenLogprobs(token_id, float(logprobs[token_id]), top)


def sample(samplers: Sequence[Sampler], logits: Tensor) -> list[tuple[int, TokenLogprobs | None]]:
    """One token per row.

    Args:
        logits: [rows, vocab] float32 on any device; only rows that need more than the maximum are copied to the host.
    """
    greedy: list[int] = logits.argmax(dim=-1).tolist()
    chosen: list[tuple[int, TokenLogprobs | None]] = []
    for row, (sampler, token_id) in enumerate(zip(samplers, greedy, strict=True)):
        if sampler.is_greedy and sampler.num_logprobs is None:
            chosen.append((token_id, None))
            continue
        on_host = logits[row].cpu()
        token_id = token_id if sampler.is_greedy else sampler.draw(on_host)
        chosen.append((token_id, sampler.logprobs(on_host, token_id)))
    return chosen


def _warpers(params: SamplingParams) -> LogitsProcessorList:
    """The library's order: temperature, top-k, top-p."""
    warpers = LogitsProcessorList()
    if params.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(float(params.top_p)))
    return warpers
