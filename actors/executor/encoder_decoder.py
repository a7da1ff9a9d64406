"""Passes of models with an encoder and a decoder: sources in, logits of the first token out; then token by token.

The decoder's cache has two halves: the keys and values of what was generated, and those of the source, which are written
once. Decides nothing about who runs when.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import MoEModelOutput

from actors.executor.kv_cache import RowCache
from actors.executor.model_loader import SlotModel
from actors.executor.packed_encoder import EncoderRunner, SourcePass
from actors.executor.passes import Pass
from actors.executor.positions import RowPositions
from actors.executor.runner import RowInput, library_mask
from common.errors import UnsupportedModelError


class SourceCache(RowCache):
    """Keys and values of sources: a row's are written by its first decoder pass, from packed states, and read by all."""

    def __init__(self, num_rows: int, max_tokens: int) -> None:
        super().__init__(num_rows, max_tokens)
        self.layers = _Layers(self)  # where the library looks for what is written already

    def address_reads(self, rows: Sequence[int], lengths: Tensor) -> None:
        """Say which rows the coming pass reads. Args: lengths: [rows] int64 of their sources, on the model's device."""
        self.address(rows, lengths.unsqueeze(1) - 1)

    def address_writes(self, rows: Sequence[int], lengths: Tensor) -> None:
        """After `address_reads`: the pass writes the rows first; `update` takes the tokens of all in one row."""
        row_index = torch.tensor(rows, device=lengths.device)
        starts = lengths.cumsum(0) - lengths  # of the sources among all tokens
        self._row_index = row_index.repeat_interleave(lengths).unsqueeze(0)  # [1, tokens]
        self._positions = torch.arange(self._row_index.shape[1], device=lengths.device).unsqueeze(0)
        self._positions = self._positions - starts.repeat_interleave(lengths)

    def read(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """[batch, heads, length, head_dim] keys and values of the addressed rows."""
        keys, values = self.of_layer(layer_idx)
        return keys[self._rows, :, : self._length], values[self._rows, :, : self._length]


class _Layer:
    def __init__(self, cache: SourceCache, layer_idx: int) -> None:
        self.keys, self.values = cache.read(layer_idx)


class _Layers:
    """A list of layers as far as a library model uses one."""

    def __init__(self, cache: SourceCache) -> None:
        self._cache = cache

    def __getitem__(self, layer_idx: int) -> _Layer:
        return _Layer(self._cache, layer_idx)

    def __len__(self) -> int:
        return len(self._cache)


class TwoCaches(EncoderDecoderCache):  # type: ignore[misc]  # untyped
    """A library cache of rows at different positions with sources of different lengths."""

    def __init__(self, num_rows: int, max_tokens: int, max_source_tokens: int) -> None:
        self.targets = RowCache(num_rows, max_tokens)
        self.sources = SourceCache(num_rows, max_source_tokens)
        super().__init__(self.targets, self.sources)

    def address(self, rows: Sequence[int], positions: Tensor, lengths: Tensor, is_first: bool) -> int:
        """Say what the coming pass reads and writes.

        Args:
            positions: [len(rows), queries] int64 of the decoder's tokens.
            lengths: [len(rows)] int64 of the rows' sources.
            is_first: the sources are written in this pass.
        Returns:
            The number of decoder positions that attention will see.
        """
        self.is_updated = {} if is_first else dict.fromkeys(range(len(self.sources)), True)
        self.sources.address_reads(rows, lengths)
        if is_first:
            self.sources.address_writes(rows, lengths)
        return self.targets.address(rows, positions)

    def num_bytes(self) -> int:
        return self.targets.num_bytes() + self.sources.num_bytes()


class EncoderDecoderRunner(EncoderRunner):
    """One model and its caches.

    Args:
        max_tokens: of a source, and of what is generated from it, each.
    """

    def __init__(self, slot_model: SlotModel, num_rows: int, max_tokens: int) -> None:
        super().__init__(slot_model)
        self.prefix = decoder_prefix(self._model)
        self.cache = TwoCaches(num_rows, max_tokens + len(self.prefix), max_tokens)
        self._positions = RowPositions(self._model.get_decoder())
        self._source_lengths = [0] * num_rows

    @torch.inference_mode()
    def run(self, inputs: Sequence[RowInput], pass_: Pass) -> Tensor:
        """Run one decode step.

        Args:
            inputs: one token each, of different rows that were read; `start` counts the source's tokens too.
        Returns:
            [rows, vocab] float32 logits, on the model's device.
        """
        return self._in_pass(pass_, lambda: self._step(inputs))

    def _outputs(self, rows: Sequence[int], sources: Sequence[Sequence[int]], pass_: SourcePass) -> Tensor:
        for row, source in zip(rows, sources, strict=True):
            self._source_lengths[row] = len(source)
        states = self.encode(sources)
        pass_.begin_decoder()
        token_ids = torch.tensor([self.prefix] * len(rows), device=self._model.device)
        positions = torch.arange(len(self.prefix), device=self._model.device).expand(len(rows), -1)
        return self._decode(rows, token_ids, positions, states)

    def _step(self, inputs: Sequence[RowInput]) -> Tensor:
        self._clock.skip_encoder()
        device = self._model.device
        rows = [each.row for each in inputs]
        token_ids = torch.tensor([each.token_ids for each in inputs], device=device)
        starts = [[each.start - self._source_lengths[each.row] + len(self.prefix)] for each in inputs]
        return self._decode(rows, token_ids, torch.tensor(starts, device=device))

    def _decode(
        self, rows: Sequence[int], token_ids: Tensor, positions: Tensor, states: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            token_ids, positions: [rows, queries] int64.
            states: [tokens of all sources, hidden] of the encoder; None where the cache holds what comes of them.
        """
        lengths = torch.tensor([self._source_lengths[row] for row in rows], device=positions.device)
        length = self.cache.address(rows, positions, lengths, is_first=states is not None)
        keys = torch.arange(length, device=positions.device)
        self._positions.set(positions, keys.unsqueeze(0))
        source_keys = torch.arange(self.cache.sources.get_seq_length(), device=positions.device)
        in_source = source_keys < lengths.unsqueeze(1)  # [rows, longest source]
        if states is None:  # the library still wants to see some
            states = torch.empty(1, self._model.config.hidden_size, device=positions.device)
        output = self._model(
            encoder_outputs=MoEModelOutput(last_hidden_state=states.unsqueeze(0)),
            attention_mask=library_mask(self._model, in_source[:, None, None]),
            decoder_input_ids=token_ids,
            decoder_attention_mask=library_mask(self._model, keys <= positions[:, None, :, None]),
            past_key_values=self.cache,
            use_cache=True,
        )
        logits: Tensor = output.logits
        return logits[:, -1].float()


def decoder_prefix(model: PreTrainedModel) -> tuple[int, ...]:
    """The tokens that every completion begins behind: the start token, and NLLB's forced one, which names a language.

    Raises:
        UnsupportedModelError: the checkpoint names no start token.
    """
    start, forced = _setting(model, "decoder_start_token_id"), _setting(model, "forced_bos_token_id")
    start = _setting(model, "bos_token_id") if start is None else start
    if start is None:
        raise UnsupportedModelError(
            str(model.config.name_or_path),
            "neither config.json nor generation_config.json has a decoder_start_token_id",
        )
    return (start,) if forced is None else (start, forced)


def _setting(model: PreTrainedModel, name: str) -> Any:
    """Of the generation config, else of the model's config."""
    found = getattr(model.generation_config, name, None)
    return found if found is not None else getattr(model.config, name, None)
