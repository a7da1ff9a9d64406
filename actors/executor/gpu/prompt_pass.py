"""A pass over prompt chunks that is queued without the host looking at its routing: packing, paging, experts, counts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor, nn

from actors.executor.gpu.expert_kernels import combine
from actors.executor.gpu.pager import PAIRS_AT_ONCE, DevicePager, Wave
from actors.executor.gpu.paging_kernels import count_kernel
from actors.executor.gpu.prompt_expert_kernels import compute_pairs, sort_pairs
from actors.executor.gpu.prompt_kernels import BLOCK_TOKENS
from actors.executor.gpu.slot_experts import kernel_weights
from actors.executor.passes import Routing
from actors.executor.runner import RowInput

_LAYERS_AHEAD = 2  # that a paced pass queues before the first of them is complete
_ALIGNMENT = 4  # elements of 4 bytes or more


@dataclass(frozen=True)
class PackedTokens:
    """The next tokens of several rows, one after the other, in device memory."""

    inputs: Sequence[RowInput]
    token_ids: Tensor  # [tokens] int64, like the next two
    positions: Tensor
    rows: Tensor
    starts: Tensor  # [chunks + 1] int32: of each chunk's first token
    num_tokens: Tensor  # [1] int32; what is behind is padding


@dataclass(frozen=True)
class PackedPrompts(PackedTokens):
    last: Tensor  # [chunks] int64: the place of each chunk's last token
    blocks: Tensor  # [blocks, 2] int32, as `prompt_kernels.prompt_attention` takes them

    @classmethod
    def of(cls, inputs: Sequence[RowInput], device: torch.device) -> "PackedPrompts":
        starts, blocks = [0], list[int]()
        tokens = list[tuple[int, int, int]]()  # id, position, row
        for each in inputs:
            first, count = starts[-1], len(each.token_ids)
            tokens += [(token, each.start + place, each.row) for place, token in enumerate(each.token_ids)]
            for place in range(0, count, BLOCK_TOKENS):
                blocks += [first + place, min(BLOCK_TOKENS, count - place)]
            starts.append(first + count)
        last = [start - 1 for start in starts[1:]]
        ids, positions, rows = zip(*tokens, strict=True)
        token_ids, token_positions, token_rows, ends = upload(
            [ids, positions, rows, last], torch.int64, device
        )
        in_blocks, begins, number = upload([blocks, starts, [len(tokens)]], torch.int32, device)
        return cls(
            inputs, token_ids, token_positions, token_rows, begins, number, ends, in_blocks.view(-1, 2)
        )


def upload(parts: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Tensors of their own, in one copy, behind what is queued: one from ordinary memory could wait for all of it.

    Parts begin at multiples of _ALIGNMENT elements: Triton compiles a kernel anew for an address of another alignment.
    """
    lengths = [_ALIGNMENT * triton.cdiv(len(part), _ALIGNMENT) for part in parts]
    packed = torch.zeros(sum(lengths), dtype=dtype)
    for target, part in zip(packed.split(lengths), parts, strict=True):
        target[: len(part)] = torch.tensor(part, dtype=dtype)
    if device.type == "cuda":
        packed = packed.pin_memory()
    uploaded = packed.to(device, non_blocking=True).split(lengths)
    return [whole[: len(part)] for whole, part in zip(uploaded, parts, strict=True)]


class PromptPass:
    """
    Args:
        after_layer: as `PromptReader.read`.
        guesses: prefetch for a layer what its router says of the hidden states of the layer before.
        paced: let the device keep up with the host.
        routing: on the device; replaces the routers' choice. None lets them decide.
    """

    def __init__(
        self,
        pager: DevicePager,
        num_layers: int,
        prompts: PackedTokens,
        after_layer: Callable[[int], None] = lambda _: None,
        guesses: bool = False,
        paced: bool = False,
        routing: Routing | None = None,
    ) -> None:
        self._routing = routing
        self.prompts, self.guesses = prompts, guesses and not pager.holds_all
        self.num_layers = num_layers
        self._pager, self.after_layer = pager, after_layer
        self._paced = paced and prompts.token_ids.device.type == "cuda"
        self.needed, self.missed = (
            torch.zeros(len(prompts.inputs), dtype=torch.int64, device=prompts.token_ids.device)
            for _ in range(2)
        )
        self.choices: list[Tensor] = []  # per layer [tokens, top_k]
        self._queued: list[torch.cuda.Event] = []  # per layer

    def run_experts(
        self,
        layer: int,
        experts: nn.Module,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        next_ids: Tensor | None = None,
    ) -> Tensor:
        """Queue one layer's experts, paging included.

        Args:
            experts: the library's module, with slots in the place of its expert tensors.
            hidden: [tokens, hidden]. ids, weights: [tokens, top_k].
            next_ids: [tokens, top_k], a guess of the next layer's ids.
        Returns:
            [tokens, hidden].
        """
        if self._routing is not None:
            ids, weights = self._routing.of_layer(layer, like=weights)
        pager, ids = self._pager, ids.contiguous()
        self._count(layer, ids)
        self.choices.append(ids)
        outputs = _PairOutputs(experts, hidden.contiguous(), ids, pager)
        for wave in pager.waves(layer, ids, self.prompts.num_tokens, next_ids=next_ids, of_prompts=True):
            outputs.add(wave)
        output = combine(outputs.of_pairs, weights.contiguous())
        if self._paced:
            self._wait_for_device()
        self.after_layer(layer)
        return output

    def _count(self, layer: int, ids: Tensor) -> None:
        self._pager.join_tables()  # what was prefetched for this layer is no miss
        self._pager.join_ahead(layer)
        count_kernel[(len(self.prompts.inputs),)](
            ids, self.prompts.starts, self._pager.state.slot_of[layer], self.needed, self.missed,
            TOP_K=ids.shape[1], NUM_EXPERTS=self._pager.num_experts,
            EXPERTS_P=triton.next_power_of_2(self._pager.num_experts),
            PAIRS=PAIRS_AT_ONCE,
        )  # fmt: skip

    def _wait_for_device(self) -> None:
        event = torch.cuda.Event()
        event.record()
        self._queued.append(event)
        if len(self._queued) > _LAYERS_AHEAD:
            self._queued[-1 - _LAYERS_AHEAD].synchronize()


class _PairOutputs:
    """The outputs of a layer's (token, choice) pairs, filled in as waves bring their experts."""

    def __init__(self, experts: Any, hidden: Tensor, ids: Tensor, pager: DevicePager) -> None:
        self._hidden = hidden
        self._up, self._down = kernel_weights(experts)
        self._order, self._starts = sort_pairs(ids, pager.num_experts)
        self._activated = hidden.new_empty(ids.numel(), self._down.shape[-1])
        self.of_pairs = hidden.new_empty(ids.numel(), hidden.shape[-1])
        if pager.poisons:  # a pair that no wave computed would show
            self._activated.fill_(float("nan"))
            self.of_pairs.fill_(float("nan"))

    def add(self, wave: Wave) -> None:
        compute_pairs(
            self._hidden, self._order, self._starts, (wave.slots, wave.experts, wave.num), wave.max_experts,
            self._up, self._down, self._activated, self.of_pairs,
        )  # fmt: skip
