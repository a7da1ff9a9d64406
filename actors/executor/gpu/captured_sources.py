"""A pass over at most so many tokens of texts, in fixed memory and as CUDA graphs: one from each MoE layer's experts to the
next one's. Between two the host may have experts copied, and nothing else needs it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from actors.executor.gpu.pager import MAX_ROWS, DevicePager
from actors.executor.gpu.prompt_pass import PackedTokens, PromptPass
from actors.executor.passes import Routing
from actors.executor.prompts import AfterLayer
from actors.executor.runner import RowInput

SMALLEST_BUCKET = 16  # tokens
_NO_SOURCE = -1  # the number of padding

# Tokens of at most MAX_ROWS sources -> [MAX_ROWS, labels] float32 logits.
SourcesForward = Callable[[PackedTokens], Tensor]


def bucket_sizes(most: int) -> list[int]:
    """Tokens, with two sizes to each doubling: up to the first that holds `most`, a third of it padding at worst."""
    sizes, step = [SMALLEST_BUCKET], SMALLEST_BUCKET // 2
    while sizes[-1] < most:
        if sizes[-1] == 4 * step:
            step *= 2
        sizes.append(sizes[-1] + step)
    return sizes


class _PaddedPass(PromptPass):
    """Keeps padding finite: attention multiplies it by zero."""

    def run_experts(
        self,
        layer: int,
        experts: nn.Module,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        next_ids: Tensor | None = None,
    ) -> Tensor:
        output = super().run_experts(layer, experts, hidden, ids, weights, next_ids)
        return output.masked_fill((self.prompts.rows == _NO_SOURCE).unsqueeze(1), 0)


class CapturedSources:
    """
    Args:
        size: the most tokens.
        top_k: choices per token in the routing that `load` takes; None where the routers decide.
    """

    def __init__(self, pager: DevicePager, num_layers: int, size: int, top_k: int | None) -> None:
        device = pager.state.step.device
        self.size, self._num_layers, self._pager = size, num_layers, pager
        self._tokens = torch.zeros(3, size, dtype=torch.int64, device=device)
        self._bounds = torch.zeros(MAX_ROWS + 2, dtype=torch.int32, device=device)  # starts and the end
        token_ids, positions, numbers = self._tokens.unbind()
        inputs = [RowInput(number, 0, ()) for number in range(MAX_ROWS)]
        packed = PackedTokens(inputs, token_ids, positions, numbers, self._bounds[:-1], self._bounds[-1:])
        self._routing: Routing | None = None
        if top_k is not None:
            shape = (num_layers, size, top_k)
            ids = torch.zeros(shape, dtype=torch.int64, device=device)
            self._routing = Routing(ids, torch.zeros(shape, dtype=torch.float32, device=device))
        self.pass_: PromptPass = _PaddedPass(pager, num_layers, packed, routing=self._routing)
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._logits = torch.empty(0)

    def load(self, inputs: Sequence[RowInput], routing: Routing | None) -> None:
        """Say what the coming pass reads. Args: routing: [layers, tokens, top_k] on the host."""
        lengths = [len(each.token_ids) for each in inputs]
        num_tokens = sum(lengths)
        tokens = np.zeros((3, self.size), np.int64)
        tokens[0, :num_tokens] = np.concatenate([each.token_ids for each in inputs])
        tokens[1, :num_tokens] = np.concatenate([np.arange(length) for length in lengths])
        tokens[2] = _NO_SOURCE
        tokens[2, :num_tokens] = np.repeat(np.arange(len(inputs)), lengths)
        bounds = np.full(MAX_ROWS + 2, num_tokens, np.int32)
        bounds[0] = 0
        bounds[1 : len(inputs) + 1] = np.cumsum(lengths)
        _write(self._tokens, tokens)
        _write(self._bounds, bounds)
        if self._routing is not None:
            assert routing is not None
            _write(self._routing.expert_ids, self._padded(routing.expert_ids))
            _write(self._routing.weights, self._padded(routing.weights))

    def _padded(self, values: Tensor) -> NDArray[np.int64 | np.float32]:
        """[layers, size, top_k], with zeros behind the tokens."""
        missing = self.size - values.shape[1]
        padded: NDArray[np.int64 | np.float32] = nn.functional.pad(values, (0, 0, 0, missing)).numpy()
        return padded

    def capture(self, forward: SourcesForward, pool: Any) -> None:
        """On the current stream, which is not the default one. Its kernels are compiled; no token counts yet."""
        torch.cuda.synchronize()
        self._begin_graph(pool)

        def cut(layer: int) -> None:
            self._graphs[-1].capture_end()
            self._begin_graph(pool)

        try:
            self._logits = self._forward(forward, cut)
        finally:
            self._graphs[-1].capture_end()

    def _begin_graph(self, pool: Any) -> None:
        self._graphs.append(torch.cuda.CUDAGraph())
        self._graphs[-1].capture_begin(pool=pool)

    def run(self, forward: SourcesForward, after_layer: AfterLayer) -> Tensor:
        """Queue the loaded pass, as graphs if it was captured. Returns: [MAX_ROWS, labels] float32 logits."""
        self.pass_.needed.zero_()
        self.pass_.missed.zero_()
        after_layer(-1)
        if not self._graphs:
            return self._forward(forward, after_layer)
        for layer, graph in enumerate(self._graphs):
            if layer < self._num_layers:
                self._pager.join()
                self._pager.join_ahead(layer)
            graph.replay()
            if layer < self._num_layers:
                after_layer(layer)
        return self._logits

    def _forward(self, forward: SourcesForward, after_layer: AfterLayer) -> Tensor:
        self.pass_.choices.clear()
        self.pass_.after_layer = after_layer
        try:
            return forward(self.pass_.prompts)
        finally:
            self.pass_.after_layer = _nothing  # no cycle of references shall keep the slots alive


def _nothing(_: int) -> None:
    pass


def _write(
    target: Tensor, values: NDArray[np.int64] | NDArray[np.int32] | NDArray[np.int64 | np.float32]
) -> None:
    """Behind what is queued."""
    source = torch.from_numpy(values)
    assert source.shape == target.shape
    if target.device.type == "cuda":
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)
