"""Which node holds which experts: plain arithmetic over what the nodes offer. Starts nothing, imports no Ray.

`place` fills nodes evenly; `place_by_load` also shares out the recorded load of every layer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.expert_store.balancing import balance_by_correlation, share_out
from common.errors import CapacityError

HOST_MEMORY_RESOURCE = "host_memory_gb"  # what a node offers to the experts, in units of 10^9 bytes
# Ray moves objects to disk once its store is 80 % full (object_spilling_threshold), so the rest is no room for experts.
USABLE_SHARE = 0.8
MAX_CHUNK_BYTES = 512 * 2**20  # what a lost task has to read again
CHUNKS_PER_NODE = 4  # enough of them that nodes fill evenly


@dataclass(frozen=True)
class NodeOffer:
    """The room one node has for experts."""

    node_id: str
    usable_bytes: int
    num_cpus: float
    offers_host_memory: bool


@dataclass(frozen=True)
class Chunk:
    """Experts of one layer that one task loads."""

    layer: int
    expert_ids: tuple[int, ...]


def find_offers(nodes: Iterable[Mapping[str, Any]], own_node_id: str) -> list[NodeOffer]:
    """The nodes that offer HOST_MEMORY_RESOURCE; if none does, the store's own node.

    Args:
        nodes: as `ray.nodes()` returns them.
    """
    alive = [_offer(node) for node in nodes if node["Alive"]]
    offering = [offer for offer in alive if offer.offers_host_memory]
    return offering or [offer for offer in alive if offer.node_id == own_node_id]


def _offer(node: Mapping[str, Any]) -> NodeOffer:
    resources = node["Resources"]
    usable = int(resources.get("object_store_memory", 0) * USABLE_SHARE)
    offered = resources.get(HOST_MEMORY_RESOURCE, 0)
    if offered:
        usable = min(usable, int(offered * 1e9))
    return NodeOffer(node["NodeID"], usable, resources.get("CPU", 0.0), bool(offered))


def make_chunks(num_layers: int, num_experts: int, slab_bytes: int, num_nodes: int) -> list[Chunk]:
    """Cut the model into chunks of one layer at most, small enough to spread over the nodes."""
    size = _chunk_experts(num_layers, num_experts, slab_bytes, num_nodes)
    return [
        Chunk(layer, tuple(range(start, min(start + size, num_experts))))
        for layer in range(num_layers)
        for start in range(0, num_experts, size)
    ]


def _chunk_experts(num_layers: int, num_experts: int, slab_bytes: int, num_nodes: int) -> int:
    total_bytes = num_layers * num_experts * slab_bytes
    chunk_bytes = min(MAX_CHUNK_BYTES, total_bytes // (num_nodes * CHUNKS_PER_NODE))
    return max(1, min(num_experts, chunk_bytes // slab_bytes))


def place(chunks: Sequence[Chunk], slab_bytes: int, offers: Sequence[NodeOffer]) -> list[NodeOffer]:
    """A node for every chunk, so that all nodes are equally full in proportion to what they offer.

    Raises:
        CapacityError: the chunks do not fit.
    """
    needed = sum(len(chunk.expert_ids) for chunk in chunks) * slab_bytes
    if needed > sum(offer.usable_bytes for offer in offers):
        raise _too_small(needed, offers)
    used = dict.fromkeys(offers, 0)
    placed = []
    for chunk in chunks:
        size = len(chunk.expert_ids) * slab_bytes
        fitting = [offer for offer in offers if used[offer] + size <= offer.usable_bytes]
        if not fitting:
            raise _too_small(needed, offers)
        emptiest = min(fitting, key=lambda offer: (used[offer] + size) / offer.usable_bytes)
        used[emptiest] += size
        placed.append(emptiest)
    return placed


def place_by_load(
    loads: NDArray[np.int64], slab_bytes: int, offers: Sequence[NodeOffer]
) -> list[tuple[Chunk, NodeOffer]]:
    """Chunks and their nodes, so that in every layer all nodes are equally full in proportion to what they offer, and
    get as equal shares of the tokens as anti-correlation balancing finds.

    Args:
        loads: [windows, layers, experts], tokens that each expert got.
    Raises:
        CapacityError: the experts do not fit.
    """
    _, num_layers, num_experts = loads.shape
    capacities = [offer.usable_bytes // slab_bytes for offer in offers]
    if num_layers * num_experts > sum(capacities):
        raise _too_small(num_layers * num_experts * slab_bytes, offers)
    plan = balance_by_correlation(loads, share_out(num_layers, num_experts, capacities))
    size = _chunk_experts(num_layers, num_experts, slab_bytes, len(offers))
    placed = []
    for layer, node_of in enumerate(plan):
        for node, offer in enumerate(offers):
            ids = (node_of == node).nonzero()[0].tolist()
            chunks = (Chunk(layer, tuple(ids[start : start + size])) for start in range(0, len(ids), size))
            placed += [(chunk, offer) for chunk in chunks]
    return placed


def _too_small(needed: int, offers: Sequence[NodeOffer]) -> CapacityError:
    return CapacityError(needed, sum(offer.usable_bytes for offer in offers), _remedy(needed, offers))


def _remedy(needed: int, offers: Sequence[NodeOffer]) -> str:
    if any(offer.offers_host_memory for offer in offers):
        lacking = needed - sum(offer.usable_bytes for offer in offers)
        gigabytes = max(1, ceil(lacking / 1e9) + ceil(MAX_CHUNK_BYTES / 1e9))
        return f"add a node: {_join_command(gigabytes)}"
    return (
        f"stop Ray and start it with `ray start --head --object-store-memory={_store_bytes(needed)}` on a host whose "
        f"/dev/shm holds as much, or add nodes: {_join_command(ceil(needed / 1e9))}"
    )


def _join_command(gigabytes: int) -> str:
    resource = f'{{"{HOST_MEMORY_RESOURCE}": {gigabytes}}}'
    store_bytes = _store_bytes(gigabytes * 10**9)
    return f"`ray start --address=<head> --object-store-memory={store_bytes} --resources='{resource}'`"


def _store_bytes(needed: int) -> int:
    """The object store that has `needed` usable bytes."""
    return ceil(needed / USABLE_SHARE)
