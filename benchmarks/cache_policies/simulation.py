"""Replays recorded routing through the engine's own `HostPager` and eviction policies, without the experts' weights.

What is counted is what the engine would count.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.executor.eviction import EvictionPolicy
from actors.executor.host_pager import HostPager
from actors.executor.pager import ABSENT, RESIDENT_SET
from actors.executor.slots import SlotPool
from actors.predictor.decoding import DecodingPredictor, NoPredictor, by_proximity, most_wanted
from common.expert_layout import ExpertLayout

Ids = npt.NDArray[np.int64]  # expert ids, [tokens, layers, top_k]
Passes = Sequence[Ids]  # of one request, each routed and read at once

Number = TypeVar("Number", bound=np.generic)

LAYOUT = ExpertLayout.from_shapes({"weight": (1, 1)}, torch.float32)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Counts:
    """Over all layers. Experts are counted once per pass and layer, however many tokens chose them."""

    tokens: int = 0
    needed: int = 0
    misses: int = 0  # needed and not in a slot when the layer began
    prefetched: int = 0  # copied ahead of need
    in_vain: int = 0  # of those, evicted before they were needed
    moved: int = 0  # copies, on demand and ahead

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(
            *(mine - its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    @property
    def miss_rate(self) -> float:
        return self.misses / self.needed


class BeladyPolicy:
    """The expert that is needed last leaves first: Belady's MIN, which reads the future.

    No order misses less on demand, where a pass needs no more experts than there are slots.
    """

    def __init__(self, needed: npt.NDArray[np.bool_]) -> None:
        """Args: needed: [passes, experts], of one layer."""
        self._next_use = next_uses(needed)
        self._now = 0  # the running pass, or the next
        self._resident: set[int] = set()

    def loaded(self, expert_id: int) -> None:
        self._resident.add(expert_id)

    def used(self, expert_ids: Iterable[int]) -> None:
        self._now += 1

    def evicted(self, expert_id: int) -> None:
        self._resident.discard(expert_id)

    def requests_ended(self, share: float) -> None:
        pass

    def victims(self) -> Iterable[int]:
        next_use = self._next_use[self._now]
        return sorted(self._resident, key=lambda e: (-next_use[e], e))


def next_uses(needed: npt.NDArray[np.bool_]) -> list[list[int]]:
    """[passes + 1, experts]: the first pass from this one on that needs the expert; `passes` when none does."""
    passes, num_experts = needed.shape
    following = np.full((passes + 1, num_experts), passes)
    for number in range(passes - 1, -1, -1):
        following[number] = np.where(needed[number], number, following[number + 1])
    rows: list[list[int]] = following.tolist()
    return rows


class _SlotsOfNothing(SlotPool):
    def write(self, slot: int, slab: Tensor, stored: ExpertLayout) -> None:
        pass


class _SmallExperts:
    """A source whose experts are all the same one, of one number."""

    layout = LAYOUT
    model_fingerprint = "simulated"
    on_adopted: Callable[[], None] | None = None

    def __init__(self) -> None:
        self._slab = torch.zeros(LAYOUT.slab_bytes, dtype=torch.uint8)

    def fetch(self, layer: int, expert_id: int) -> Tensor:
        return self._slab

    def local_slabs(self) -> Mapping[tuple[int, int], Tensor]:
        return {}


def split(request: npt.NDArray[Number], prompt_tokens: int = 1) -> list[npt.NDArray[Number]]:
    """A request's passes: its prompt at once, then token by token. Args: request: [tokens, ...]."""
    return [
        request[:prompt_tokens],
        *(request[token : token + 1] for token in range(prompt_tokens, len(request))),
    ]


def belady(requests: Sequence[Passes], num_experts: int) -> Callable[[], EvictionPolicy]:
    """Makes the policies of layer 0, 1, ... one after the other."""
    passes = [ids for request in requests for ids in request]
    needed = np.zeros((len(passes), passes[0].shape[1], num_experts), np.bool_)
    for number, ids in enumerate(passes):
        needed[number, np.arange(ids.shape[1])[:, None], ids.swapaxes(0, 1).reshape(ids.shape[1], -1)] = True
    layers = iter(range(needed.shape[1]))
    return lambda: BeladyPolicy(needed[:, next(layers)])


def simulate(
    requests: Sequence[Passes],
    num_experts: int,
    num_slots: int,
    new_policy: Callable[[], EvictionPolicy],
    predictor: DecodingPredictor,
    copies_ahead: int = 0,
    num_warm_up: int = 0,
    pinned: Sequence[Collection[int]] = (),
    prompts_ahead: bool = True,
    built_with: Ids | None = None,
) -> Counts:
    """Run one request after the other; slots are empty at first, but for pinned experts.

    Args:
        copies_ahead: experts that are copied ahead of need while one layer is computed, at most.
        num_warm_up: requests that are run before counting begins.
        pinned: of each layer the experts that never leave their slots.
        prompts_ahead: copy ahead in each request's first pass, too.
        built_with: a pass before all requests, of none of them.
    """
    num_layers = requests[0][0].shape[1]
    pools = [_SlotsOfNothing(LAYOUT, num_slots, CPU) for _ in range(num_layers)]
    pager = HostPager(_SmallExperts(), pools, num_experts, new_policy, CPU, pinned=pinned)
    for layer, experts in enumerate(pinned):
        for expert_id in experts:
            pager.prefetch(layer, expert_id, experts, RESIDENT_SET)
    if built_with is not None:
        _run_pass(pager, NoPredictor(num_layers, num_experts), "none", built_with, copies_ahead=0)
    before, num_tokens = Counts(), 0
    for number, request in enumerate(requests):
        if number == num_warm_up:
            before = _total(pager, num_layers, num_tokens)
        for place, ids in enumerate(request):
            copies = copies_ahead if place or prompts_ahead else 0
            _run_pass(pager, predictor, f"request {number}", ids, copies)
            num_tokens += len(ids)
        predictor.end_request(f"request {number}")
        pager.requests_ended(1.0)
    return _total(pager, num_layers, num_tokens) - before


def _run_pass(
    pager: HostPager, predictor: DecodingPredictor, request: str, ids: Ids, copies_ahead: int
) -> None:
    predictor.begin_pass([request])
    for layer in range(ids.shape[1]):
        if copies_ahead:
            priority = by_proximity(predictor.predict(layer), ids.shape[1])
            absent = pager.page_table[layer:].numpy() == ABSENT
            for row, expert_id, keep in most_wanted(priority, absent, pager.num_slots, copies_ahead):
                pager.prefetch(layer + row, expert_id, keep, "predictor")
        with pager.streaming(layer, sorted(set(ids[:, layer].ravel().tolist()))) as slots:
            for _ in slots:
                pass
        predictor.observe(layer, [ids[:, layer]], None)


def _total(pager: HostPager, num_layers: int, num_tokens: int) -> Counts:
    layers = [pager.counters(layer) for layer in range(num_layers)]
    return Counts(
        tokens=num_tokens,
        needed=sum(layer.hits + layer.misses for layer in layers),
        misses=sum(layer.misses for layer in layers),
        prefetched=sum(layer.prefetched for layer in layers),
        in_vain=sum(layer.prefetched_wasted for layer in layers),
        moved=sum(layer.moved_bytes for layer in layers) // LAYOUT.slab_bytes,
    )
