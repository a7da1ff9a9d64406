"""Reads prompts of several sequences in one pass that pages by itself, for experts that `prompt_expert_kernels` computes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.executor.gpu.pager import MAX_ROWS, DevicePager
from actors.executor.gpu.prompt_pass import PackedPrompts, PackedTokens, PromptPass
from actors.executor.model_loader import SlotModel
from actors.executor.passes import PassClock
from actors.executor.prompts import AfterLayer, PromptResult
from actors.executor.runner import ModelRunner, RowInput
from actors.executor.sequence import PromptChunk

# Packed tokens -> [chunks, outputs] float32 logits of each chunk: of its last token, or of its labels.
PromptForward = Callable[[PackedPrompts], Tensor]


class QueuedPasses(ABC):
    """Runs `PromptPass`es of one model."""

    def __init__(self, slot_model: SlotModel) -> None:
        assert isinstance(slot_model.pager, DevicePager)
        self._pager: DevicePager = slot_model.pager
        self._device: torch.device = slot_model.model.device
        self._clock: PassClock = slot_model.clock

    @torch.inference_mode()
    def warm_up(self, num_tokens: int) -> None:
        """Compile what any number of tokens runs, so that no request waits for it.

        No token counts, but a few experts are prefetched by a guess.
        """
        prompts = PackedPrompts.of([RowInput(0, 0, (0,) * num_tokens)], self._device)
        prompts.num_tokens.zero_()  # all of it is padding
        self._run(self._new_pass(prompts))
        for layer in range(self._clock.num_layers):  # not all of them lie at equally aligned addresses
            self._pager.prefetch_used(layer, [0])  # as a hash table does
            self._pager.join()  # as the layer itself does: two at once would break its page table
            self._pager.prefetch_ahead(layer, [0])
            self._pager.join_ahead(layer)

    @abstractmethod
    def _new_pass(self, prompts: PackedTokens) -> PromptPass: ...

    def _run(self, pass_: PromptPass) -> Tensor:
        """Queue the pass. Returns: [chunks, outputs] float32 logits."""
        self._clock.begin_pass(pass_)
        try:
            self._pager.begin_prompt()
            pass_.after_layer(-1)
            return self._queue(pass_.prompts)
        finally:
            self._pager.join()
            self._clock.end_pass()

    @abstractmethod
    def _queue(self, prompts: PackedTokens) -> Tensor: ...

    def _result(self, pass_: PromptPass, inputs: Sequence[RowInput], logits: Tensor) -> PromptResult:
        """Waits for the pass. Args: inputs: the chunks that it read."""
        lengths = [len(each.token_ids) for each in inputs]
        needed, missed = torch.stack([pass_.needed, pass_.missed])[:, : len(inputs)].cpu().numpy()
        choices: NDArray[np.int64] = (
            torch.stack(pass_.choices)[:, : sum(lengths)].cpu().long().numpy()
        )  # [layers, tokens, top_k]
        of_chunks = np.split(choices, np.cumsum(lengths)[:-1], axis=1)
        copied = int(self._pager.num_prefetched + self._pager.num_copied_ahead)
        fetched = missed + _shared(copied, lengths)
        return PromptResult(logits, needed, missed, fetched, [list(each) for each in of_chunks])


class DevicePrompts(QueuedPasses):
    """
    Args:
        runner: reads the prompts of families without a forward of their own, one chunk at a time.
        forward: computes packed prompts, in a `PromptPass`.
        prefetch: copy experts for the next layer while one is computed.
    """

    runs_ahead = True
    reads_whole = False

    def __init__(
        self, slot_model: SlotModel, runner: ModelRunner, forward: PromptForward | None, prefetch: bool = True
    ) -> None:
        super().__init__(slot_model)
        self._runner, self._forward, self._prefetch = runner, forward, prefetch
        self.max_chunks = MAX_ROWS if forward is not None else 1

    def joins(self, chunk: PromptChunk, chunks: Sequence[PromptChunk]) -> bool:
        return len(chunks) < self.max_chunks

    def read(self, chunks: Sequence[PromptChunk], after_layer: AfterLayer, paced: bool) -> PromptResult:
        inputs = [RowInput(chunk.sequence.row, chunk.start, chunk.token_ids) for chunk in chunks]
        return self.read_rows(inputs, after_layer, paced)

    @torch.inference_mode()
    def read_rows(
        self, inputs: Sequence[RowInput], after_layer: AfterLayer = lambda _: None, paced: bool = False
    ) -> PromptResult:
        """`read` of any rows' next tokens, at most `max_chunks` rows."""
        pass_ = self._new_pass(PackedPrompts.of(inputs, self._device), after_layer, paced)
        return self._result(pass_, inputs, self._run(pass_))

    def _new_pass(
        self, prompts: PackedTokens, after_layer: AfterLayer = lambda _: None, paced: bool = False
    ) -> PromptPass:
        return PromptPass(
            self._pager, self._clock.num_layers, prompts, after_layer, guesses=self._prefetch, paced=paced
        )

    def _queue(self, prompts: PackedTokens) -> Tensor:
        assert isinstance(prompts, PackedPrompts)
        return self._runner.forward(prompts.inputs) if self._forward is None else self._forward(prompts)

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        self._pager.join()
        running = self._clock.running
        with self._runner.cache.address_kept():
            yield
        self._clock.running = running


def _shared(count: int, lengths: Sequence[int]) -> NDArray[np.int64]:
    """`count` parted by length."""
    ends = np.cumsum(lengths) * count // sum(lengths)
    return np.diff(ends, prepend=0)
