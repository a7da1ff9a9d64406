"""Placement: every expert in exactly one chunk, nodes filled in proportion, refusals with numbers that would fit."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.expert_store.placement import (
    MAX_CHUNK_BYTES,
    USABLE_SHARE,
    Chunk,
    NodeOffer,
    find_offers,
    make_chunks,
    place,
    place_by_load,
)
from common.errors import CapacityError

GB = 10**9


def ray_node(
    name: str, store_gb: float, host_memory_gb: float | None = None, alive: bool = True
) -> dict[str, Any]:
    resources = {"CPU": 2.0, "object_store_memory": store_gb * GB}
    if host_memory_gb is not None:
        resources["host_memory_gb"] = host_memory_gb
    return {"NodeID": name, "Alive": alive, "Resources": resources}


def offer(name: str, usable_bytes: int, host_memory: bool = True) -> NodeOffer:
    return NodeOffer(name, usable_bytes, num_cpus=2, offers_host_memory=host_memory)


def test_without_offers_the_stores_own_node_holds_everything() -> None:
    offers = find_offers([ray_node("a", 10), ray_node("b", 20)], own_node_id="b")
    assert [(o.node_id, o.usable_bytes, o.offers_host_memory) for o in offers] == [("b", 16 * GB, False)]


def test_nodes_that_offer_host_memory_come_before_the_stores_own() -> None:
    nodes = [ray_node("head", 100), ray_node("a", 10, host_memory_gb=5), ray_node("b", 10, host_memory_gb=50)]
    offers = find_offers(nodes, own_node_id="head")
    # a: what it offers; b: what its object store can hold of it
    assert [(o.node_id, o.usable_bytes) for o in offers] == [("a", 5 * GB), ("b", 8 * GB)]


def test_dead_nodes_offer_nothing() -> None:
    nodes = [ray_node("head", 10), ray_node("a", 10, host_memory_gb=10, alive=False)]
    assert [o.node_id for o in find_offers(nodes, own_node_id="head")] == ["head"]


@given(
    num_layers=st.integers(1, 40),
    num_experts=st.integers(1, 300),
    slab_bytes=st.integers(1, 2 * MAX_CHUNK_BYTES),
    num_nodes=st.integers(1, 9),
)
def test_chunks_hold_every_expert_once(
    num_layers: int, num_experts: int, slab_bytes: int, num_nodes: int
) -> None:
    chunks = make_chunks(num_layers, num_experts, slab_bytes, num_nodes)
    experts = [(chunk.layer, expert_id) for chunk in chunks for expert_id in chunk.expert_ids]
    assert experts == [(layer, expert_id) for layer in range(num_layers) for expert_id in range(num_experts)]
    assert all(len(c.expert_ids) == 1 or len(c.expert_ids) * slab_bytes <= MAX_CHUNK_BYTES for c in chunks)


def test_a_large_model_loads_in_few_tasks() -> None:
    assert len(make_chunks(num_layers=48, num_experts=128, slab_bytes=9_437_184, num_nodes=4)) == 48 * 3


def bytes_by_node(chunks: list[Chunk], nodes: list[NodeOffer], slab_bytes: int) -> dict[str, int]:
    used: dict[str, int] = {}
    for chunk, node in zip(chunks, nodes, strict=True):
        used[node.node_id] = used.get(node.node_id, 0) + len(chunk.expert_ids) * slab_bytes
    return used


def test_nodes_are_filled_in_proportion_to_their_offers() -> None:
    chunks = make_chunks(num_layers=40, num_experts=8, slab_bytes=1000, num_nodes=2)
    used = bytes_by_node(chunks, place(chunks, 1000, [offer("a", 300_000), offer("b", 100_000)]), 1000)
    assert used == {"a": 240_000, "b": 80_000}


@given(
    st.lists(st.integers(1, 2000), min_size=1, max_size=6),
    st.integers(1, 30),
    st.integers(1, 20),
    st.integers(1, 9),
)
def test_no_node_holds_more_than_it_offers(
    capacities: list[int], layers: int, experts: int, slab_bytes: int
) -> None:
    offers = [offer(f"node{i}", capacity) for i, capacity in enumerate(capacities)]
    chunks = make_chunks(layers, experts, slab_bytes, len(offers))
    used, refusal = {}, None
    try:
        used = bytes_by_node(chunks, place(chunks, slab_bytes, offers), slab_bytes)
    except CapacityError as error:
        refusal = error
    if refusal is None:
        assert sum(used.values()) == layers * experts * slab_bytes
        assert all(used.get(o.node_id, 0) <= o.usable_bytes for o in offers)
    else:  # only when full up to less than one chunk a node
        largest = max(len(chunk.expert_ids) for chunk in chunks) * slab_bytes
        assert refusal.needed_bytes > refusal.available_bytes - largest * len(offers)


@given(
    capacities=st.lists(st.integers(1, 2000), min_size=1, max_size=6),
    layers=st.integers(1, 8),
    experts=st.integers(1, 20),
    slab_bytes=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_by_load_no_node_holds_more_than_it_offers(
    capacities: list[int], layers: int, experts: int, slab_bytes: int, seed: int
) -> None:
    offers = [offer(f"node{i}", capacity) for i, capacity in enumerate(capacities)]
    loads = np.random.default_rng(seed).integers(0, 9, size=(3, layers, experts))
    fits = layers * experts <= sum(capacity // slab_bytes for capacity in capacities)
    try:
        placed = place_by_load(loads, slab_bytes, offers)
    except CapacityError:
        assert not fits
        return
    assert fits
    chunks, nodes = [chunk for chunk, _ in placed], [node for _, node in placed]
    placed_ids = sorted((chunk.layer, expert_id) for chunk in chunks for expert_id in chunk.expert_ids)
    assert placed_ids == [(layer, expert_id) for layer in range(layers) for expert_id in range(experts)]
    used = bytes_by_node(chunks, nodes, slab_bytes)
    assert all(used.get(o.node_id, 0) <= o.usable_bytes for o in offers)


def test_by_load_chunks_stay_as_small_as_without() -> None:
    loads = np.ones((1, 48, 128), np.int64)
    placed = place_by_load(loads, 9_437_184, [offer(f"node{i}", 40 * GB) for i in range(2)])
    largest = max(len(chunk.expert_ids) for chunk in make_chunks(48, 128, 9_437_184, 2))
    assert {len(chunk.expert_ids) for chunk, _ in placed} == {largest, 64 - largest}  # 64 a layer and node


def test_by_load_refusal_names_a_store_that_would_fit() -> None:
    with pytest.raises(CapacityError, match="ray start --head --object-store-memory="):
        place_by_load(np.ones((1, 2, 8), np.int64), GB, [offer("head", 8 * GB, host_memory=False)])


def test_refusal_on_one_node_names_the_store_that_would_fit() -> None:
    chunks = make_chunks(48, 128, 9_437_184, num_nodes=1)  # 58 GB
    with pytest.raises(CapacityError) as caught:
        place(chunks, 9_437_184, [offer("head", 8 * GB, host_memory=False)])
    message = str(caught.value)
    assert "need 57.98 GB but the object store offers 8.00 GB" in message
    needed = re.search(r"ray start --head --object-store-memory=(\d+)", message)
    assert needed
    fitting = find_offers([ray_node("head", int(needed[1]) / GB)], own_node_id="head")
    assert len(place(chunks, 9_437_184, fitting)) == len(chunks)


def test_refusal_among_offering_nodes_names_a_node_that_would_fit() -> None:
    slab_bytes = 9_437_184
    nodes = [ray_node("a", 20, host_memory_gb=16), ray_node("b", 20, host_memory_gb=16)]
    with pytest.raises(CapacityError) as caught:
        place(make_chunks(48, 128, slab_bytes, 2), slab_bytes, find_offers(nodes, "a"))
    command = re.search(
        r"--object-store-memory=(\d+) --resources='\{\"host_memory_gb\": (\d+)\}'", str(caught.value)
    )
    assert command
    nodes.append(ray_node("c", int(command[1]) / GB, host_memory_gb=int(command[2])))
    chunks = make_chunks(48, 128, slab_bytes, 3)
    assert len(place(chunks, slab_bytes, find_offers(nodes, "a"))) == len(chunks)


def test_room_stays_below_the_threshold_at_which_ray_spills() -> None:
    [only] = find_offers([ray_node("head", 1)], own_node_id="head")
    assert only.usable_bytes == GB * USABLE_SHARE
