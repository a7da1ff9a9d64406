"""One decode step through the library's own modules, for every family: nothing in it waits for the device."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.executor.gpu.row_attention import attending_to_rows
from actors.executor.kv_cache import RowCache


class LibraryStep:
    """
    Args:
        cache: of whose rows a step writes one position each; its layers are allocated.
    """

    def __init__(self, model: PreTrainedModel, cache: RowCache) -> None:
        self._model, self._cache = model, cache
        # Multi-head latent attention expands what the cache holds: only the rows that take part.
        self._gather = hasattr(model.config.get_text_config(), "kv_lora_rank")

    def __call__(self, token_ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """Args: [batch] int64 each, on the device. Returns: [batch, vocab] float32 logits."""
        self._cache.address_rows(rows, positions, self._gather)
        seen_rows = torch.arange(len(rows), device=rows.device) if self._gather else rows
        with attending_to_rows(self._model.config, seen_rows, positions):
            output = self._model(
                input_ids=token_ids.unsqueeze(1),
                position_ids=positions.unsqueeze(1),
                attention_mask=None,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: Tensor = output.logits
        return logits[:, -1].to(torch.float32)
