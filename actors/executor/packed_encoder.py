"""Passes over the encoder of a model, with several sources at once. Decides nothing about who runs when."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from actors.executor.model_loader import SlotModel
from actors.executor.passes import AfterRouting, Pass, Routing
from actors.executor.positions import RowPositions
from actors.executor.runner import library_mask


def has_encoder(model: PreTrainedModel) -> bool:
    """Whether prompts go through an encoder; what does not generate is one alone."""
    return bool(model.config.is_encoder_decoder) or not model.can_generate()


class PackedEncoder:
    """Runs sources behind each other in one row, without padding: no token is routed that is not a source's.

    Attention sees a token's own source alone, and positions begin anew with each one, so a source's states do not depend
    on its neighbours.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._encoder = model, model.get_encoder()
        self._positions = RowPositions(self._encoder)

    def __call__(self, sources: Sequence[Sequence[int]]) -> Tensor:
        """[tokens of all sources, hidden] states."""
        device = self._model.device
        token_ids = torch.tensor([token for source in sources for token in source], device=device)
        positions = torch.cat([torch.arange(len(source)) for source in sources]).to(device)
        return self.states(token_ids, positions, source_numbers(sources, device))

    def states(self, token_ids: Tensor, positions: Tensor, numbers: Tensor) -> Tensor:
        """Queue the encoder.

        Args: [tokens] int64 each, on the model's device: ids, places in their source, and the number of their source.
        Returns:
            [tokens, hidden].
        """
        token_ids, positions = token_ids.unsqueeze(0), positions.unsqueeze(0)
        visible = (numbers[:, None] == numbers).unsqueeze(0)  # [1, tokens, tokens]
        if self._positions.biases_attention:
            self._positions.set(positions, positions, visible)
            mask = torch.ones_like(token_ids)  # a T5 encoder takes no other
        else:
            self._positions.set(positions, positions)
            mask = library_mask(self._model, visible.unsqueeze(1))
        states: Tensor = self._encoder(input_ids=token_ids, attention_mask=mask).last_hidden_state[0]
        return states


class EncoderRunner(ABC):
    """A model that begins with an encoder. Every call must come from the same thread."""

    def __init__(self, slot_model: SlotModel) -> None:
        self._model = slot_model.model
        self._clock, self._pager = slot_model.clock, slot_model.pager
        self.encode = PackedEncoder(self._model)

    @torch.inference_mode()
    def read(self, rows: Sequence[int], sources: Sequence[Sequence[int]], pass_: "SourcePass") -> Tensor:
        """Run one pass over sources.

        Args:
            rows: of the caches, where there are any; different ones.
        Returns:
            [sources, outputs] float32 logits on the model's device: of each one's first token, or of its labels.
        """
        return self._in_pass(pass_, lambda: self._outputs(rows, sources, pass_))

    def _in_pass(self, pass_: Pass, forward: Callable[[], Tensor]) -> Tensor:
        self._clock.begin_pass(pass_)
        try:
            with self._pager.host_pass():
                if pass_.after_layer is not None:
                    pass_.after_layer(-1)
                return forward()
        finally:
            self._clock.end_pass()

    @abstractmethod
    def _outputs(
        self, rows: Sequence[int], sources: Sequence[Sequence[int]], pass_: "SourcePass"
    ) -> Tensor: ...


class ClassifierRunner(EncoderRunner):
    """An encoder, the mean of its states over a source, and a linear head."""

    def _outputs(self, rows: Sequence[int], sources: Sequence[Sequence[int]], pass_: "SourcePass") -> Tensor:
        return self.judge(self.encode(sources), source_numbers(sources, self._model.device), len(sources))

    def judge(self, states: Tensor, numbers: Tensor, num_sources: int) -> Tensor:
        """
        Args:
            states: [tokens, hidden]. numbers: [tokens] of their sources; another one's is left out.
        Returns:
            [num_sources, labels] float32 logits; NaN for a source without tokens.
        """
        sources = torch.arange(num_sources, device=numbers.device).unsqueeze(1)
        members = (numbers == sources).float()  # [num_sources, tokens]
        means = members @ states.float() / members.sum(1, keepdim=True)
        logits: Tensor = self._model.classifier(means.to(states.dtype))
        return logits.float()


def source_numbers(sources: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[tokens of all sources] int64: 0 for those of the first one, and so on."""
    lengths = torch.tensor([len(source) for source in sources])
    return torch.arange(len(sources)).repeat_interleave(lengths).to(device)


class SourcePass(Pass):
    """A pass over packed sources, and then, if there is a decoder, over as many first tokens of each.

    Args:
        lengths: of the sources, in tokens.
        routing: replaces the encoder's routers; a decoder's decide for themselves.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        routing: Routing | None = None,
        keep_choices: bool = False,
        after_layer: Callable[[int], None] | None = None,
        after_routing: AfterRouting | None = None,
    ) -> None:
        super().__init__(len(lengths), routing, keep_choices, after_layer, after_routing)
        self._ends = np.cumsum(lengths)
        self._source_of: NDArray[np.int64] | None = np.repeat(np.arange(len(lengths)), lengths)  # [tokens]
        self.source_choices = self.choices  # of the encoder
        self.source_needed = self.needed  # of the encoder

    def begin_decoder(self) -> None:
        self._source_of = self.routing = self.choices = None
        self.source_needed = self.needed.copy()

    def by_sequence(self, ids: NDArray[np.int64]) -> Sequence[NDArray[np.int64]]:
        return super().by_sequence(ids) if self._source_of is None else np.split(ids, self._ends[:-1])

    def _mark_needed(self, needed: NDArray[np.bool_], ids: NDArray[np.int64]) -> None:
        if self._source_of is None:
            super()._mark_needed(needed, ids)
        else:
            needed[self._source_of[:, None], ids] = True
