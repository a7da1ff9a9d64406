"""The experts function `slots` in the library's registry: looks tokens' experts up in the page table, has misses paged
in, and runs the library's own grouped GEMM over the slots, or on a CPU one expert after the other. One function for every
family; routers are never touched.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from actors.executor.host_pager import HostPager
from actors.executor.pager import Pager
from actors.executor.passes import Pass, PassClock
from actors.executor.slot_expert import SlotExpert

EXPERTS_IMPLEMENTATION = "slots"
_ATTRIBUTE = "slot_experts"


class SlotExperts:
    """The slots of one MoE layer, attached to the library's experts module of that layer."""

    def __init__(self, layer: int, pager: Pager, clock: PassClock) -> None:
        self._layer, self._pager, self._clock = layer, pager, clock

    def attach(self, experts: nn.Module) -> None:
        if isinstance(self._pager, HostPager):
            self._in_slot = [SlotExpert(experts, slot) for slot in range(self._pager.num_slots)]
        setattr(experts, _ATTRIBUTE, self)

    def forward(self, experts: nn.Module, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """
        Args:
            hidden: [tokens, hidden]. topk_ids: [tokens, top_k] int64. topk_weights: [tokens, top_k].
        Returns:
            [tokens, hidden], the same bits whatever is resident; those of the library's grouped_mm where that keeps the
            order of an expert's rows.
        """
        running = self._clock.running
        assert running is not None
        if not isinstance(running, Pass):
            return running.run_experts(self._layer, experts, hidden, topk_ids, topk_weights)
        self._clock.enter(self._layer)
        if running.routing is not None:
            topk_ids, topk_weights = running.routing.of_layer(self._layer, like=topk_weights)
        ids = topk_ids.cpu()  # [tokens, top_k]; the one host synchronisation of the layer
        resident = self._pager.resident(self._layer)
        needed = np.bincount(ids.numpy().reshape(-1)).nonzero()[0]  # `unique` takes 5 times as long
        some_miss = not resident[needed].all()
        running.record(ids.numpy(), resident, self._pager.loading(self._layer) if some_miss else resident)
        if running.after_routing is not None:
            running.after_routing(self._layer, running.by_sequence(ids.numpy()))
        if isinstance(self._pager, HostPager) and hidden.device.type == "cpu":
            output = self._one_by_one(self._pager, hidden, ids, topk_weights, needed)
        elif self._pager.fits(self._layer, needed):
            output = self._single_wave(experts, hidden, ids, topk_weights, needed)
        else:
            waves = _split(needed, resident, self._pager.wave_size)
            output = self._waves(experts, hidden, ids, topk_weights, waves)
        self._clock.leave(self._layer)
        if running.after_layer is not None:
            running.after_layer(self._layer)
        return output

    def _one_by_one(
        self, pager: HostPager, hidden: Tensor, ids: Tensor, topk_weights: Tensor, needed: NDArray[np.int64]
    ) -> Tensor:
        """On a CPU: a missed expert is computed while its copy is still in the processor's cache.

        An expert computes the same rows in the same order whatever is in the slots; the library's sort changes the order.
        """
        pair_ids = ids.numpy().reshape(-1)  # [tokens * top_k]
        order = pair_ids.argsort(kind="stable")  # an expert's pairs side by side
        rows = hidden.index_select(0, torch.from_numpy(order // ids.shape[1]))
        inputs = dict(zip(needed.tolist(), rows.split(np.bincount(pair_ids)[needed].tolist()), strict=True))
        outputs = dict.fromkeys(inputs, hidden)  # in the order of the inputs
        with pager.streaming(self._layer, list(inputs)) as slots:
            for expert_id, slot in slots:
                outputs[expert_id] = self._in_slot[slot](inputs[expert_id])
        place = torch.from_numpy(order.argsort())  # of each pair
        return _combined(torch.cat(list(outputs.values())).index_select(0, place), topk_weights)

    def _single_wave(
        self, experts: nn.Module, hidden: Tensor, ids: Tensor, topk_weights: Tensor, needed: NDArray[np.int64]
    ) -> Tensor:
        with self._pager.reading(self._layer, needed.tolist()) as slot_of:
            return _grouped_mm(experts, hidden, _queued(slot_of[ids], hidden.device), topk_weights)

    def _waves(
        self,
        experts: nn.Module,
        hidden: Tensor,
        ids: Tensor,
        topk_weights: Tensor,
        waves: Sequence[list[int]],
    ) -> Tensor:
        """Each (token, choice) pair is computed in the wave of its expert; weighting and summing come after the last
        wave, in the order and precision of the library's forward, so the number of waves does not change a bit.
        """
        num_tokens, top_k = ids.shape
        pair_ids = ids.reshape(-1)  # [tokens * top_k]
        rows = hidden.new_empty(num_tokens * top_k, hidden.shape[-1])
        for wave, following in zip(waves, (*waves[1:], []), strict=True):
            pairs = torch.isin(pair_ids, torch.tensor(wave)).nonzero().squeeze(1)  # [pairs of this wave]
            here = _queued(pairs, hidden.device)
            with self._pager.reading(self._layer, wave) as slot_of:
                self._pager.load_ahead(self._layer, following)
                slots = _queued(slot_of[pair_ids[pairs]].unsqueeze(1), hidden.device)
                ones = hidden.new_ones(len(pairs), 1)
                rows[here] = _grouped_mm(experts, hidden[here // top_k], slots, ones)
        return _combined(rows, topk_weights)


def _combined(rows: Tensor, topk_weights: Tensor) -> Tensor:
    """Args: rows: [tokens * top_k, hidden] expert outputs. Returns: [tokens, hidden], as the library weights and sums."""
    weighted = rows * topk_weights.reshape(-1, 1)
    return weighted.view(*topk_weights.shape, -1).sum(dim=1).to(rows.dtype)


def _split(needed: NDArray[np.int64], resident: NDArray[np.bool_], wave_size: int) -> list[list[int]]:
    """Waves of experts, the resident ones first so that none of them is evicted unread."""
    order = np.concatenate([needed[resident[needed]], needed[~resident[needed]]])
    return [order[start : start + wave_size].tolist() for start in range(0, len(order), wave_size)]


def _queued(indices: Tensor, device: torch.device) -> Tensor:
    """On the device behind what is queued there: a copy from ordinary memory would first wait for all of it."""
    return indices if device.type == "cpu" else indices.pin_memory().to(device, non_blocking=True)


def _grouped_mm(experts: nn.Module, hidden: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    output: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden, slots, weights)
    return output


def _slots_forward(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    slot_experts: SlotExperts = getattr(experts, _ATTRIBUTE)
    return slot_experts.forward(experts, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, _slots_forward)
