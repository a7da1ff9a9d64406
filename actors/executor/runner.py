"""Runs passes: tokens of given rows in, logits of each row's last token out. Decides nothing about who runs when."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.executor.families import attention_chunk, sliding_window, takes_mask_per_layer_type
from actors.executor.kv_cache import RowCache
from actors.executor.model_loader import SlotModel
from actors.executor.passes import Pass


@dataclass(frozen=True)
class RowInput:
    """The next tokens of one row."""

    row: int
    start: int  # position of the first token
    token_ids: Sequence[int]


class ModelRunner:
    """One model and its row cache. Every call must come from the same thread."""

    def __init__(self, slot_model: SlotModel, num_rows: int, max_tokens: int) -> None:
        self._model = slot_model.model
        self._clock, self._pager = slot_model.clock, slot_model.pager
        self.device = slot_model.model.device
        self._window, self._chunk = sliding_window(self._model.config), attention_chunk(self._model.config)
        self._mask_per_layer_type = takes_mask_per_layer_type(self._model.config)
        self.max_tokens = max_tokens
        self.cache = RowCache(num_rows, max_tokens)

    @torch.inference_mode()
    def run(self, inputs: Sequence[RowInput], pass_: Pass) -> Tensor:
        """Run one pass and fill the rows' caches.

        Args:
            inputs: different rows; neighbouring ones in rising order are read without a copy. Those with fewer tokens
                than others begin with repetitions of their first one, which take its place once more: they change
                nothing, and need no expert that it does not.
        Returns:
            [rows, vocab] float32 logits of each row's last token, on the model's device.
        """
        self._clock.begin_pass(pass_)
        try:
            with self._pager.host_pass():
                if pass_.after_layer is not None:
                    pass_.after_layer(-1)
                return self.forward(inputs)
        finally:
            self._clock.end_pass()

    def forward(self, inputs: Sequence[RowInput]) -> Tensor:
        """Within a pass: queue the model's own modules. Args and result as `run`."""
        num_queries = max(len(row.token_ids) for row in inputs)
        padding = [num_queries - len(row.token_ids) for row in inputs]
        padded = [
            [row.token_ids[0]] * num + list(row.token_ids) for row, num in zip(inputs, padding, strict=True)
        ]
        token_ids = torch.tensor(padded, device=self.device)  # [rows, queries]
        starts = torch.tensor([[row.start] for row in inputs], device=self.device)
        skipped = torch.tensor([[num] for num in padding], device=self.device)
        steps = torch.arange(num_queries, device=self.device)
        positions = starts + (steps - skipped).clamp(min=0)  # [rows, queries]
        length = self.cache.address([row.row for row in inputs], positions)
        output = self._model(
            input_ids=token_ids,
            position_ids=positions,
            attention_mask=self._masks(positions, length),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits
        return logits[:, -1].float()

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """Within `run`, between two layers: a step that the host does not drive may run in the body."""
        running = self._clock.running
        with self.cache.address_kept(), self._pager.interrupted():
            yield
        self._clock.running = running

    def _masks(self, positions: Tensor, length: int) -> Tensor | dict[str, Tensor]:
        """Ready-made [rows, 1, queries, length] masks, which the library passes on as they are."""
        keys = torch.arange(length, device=positions.device)
        causal = keys <= positions[:, None, :, None]
        masks = {"full_attention": causal}
        if self._window is not None:
            masks["sliding_attention"] = causal & (keys > positions[:, None, :, None] - self._window)
        if self._chunk is not None:
            same_chunk = keys // self._chunk == positions[:, None, :, None] // self._chunk
            masks["chunked_attention"] = causal & same_chunk
        if self._mask_per_layer_type:
            return {kind: library_mask(self._model, visible) for kind, visible in masks.items()}
        return library_mask(self._model, masks.get("sliding_attention", causal))


def library_mask(model: PreTrainedModel, visible: Tensor) -> Tensor:
    """In the form that the model's attention takes. Args: visible: [rows, 1, queries, keys] bool."""
    if model.config._attn_implementation != "eager":
        return visible
    mask = torch.zeros_like(visible, dtype=model.dtype)
    return mask.masked_fill(~visible, torch.finfo(model.dtype).min)
