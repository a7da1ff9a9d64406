"""The expert store on a simulated cluster of three nodes, one of which is lost. A program of its own, because a process
holds one Ray connection; `test_three_nodes.py` runs it and judges the JSON it prints.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster

from actors.expert_store.directory import ExpertDirectory
from actors.expert_store.loads import ExpertLoads
from actors.expert_store.store import ExpertStore
from common.checkpoint import Checkpoint
from common.errors import CapacityError

TIMEOUT_S = 120
SMALL_BYTES, LARGE_BYTES = 80_000_000, 240_000_000  # object stores; Ray allows no less than 75 MiB


def count_equal(directory: ExpertDirectory, folder: Path) -> int:
    checkpoint = Checkpoint.open(folder)
    expected = np.zeros(checkpoint.stored_layout.slab_bytes, np.uint8)
    equal = 0
    for (layer, expert_id), ref in directory.refs.items():
        checkpoint.read_expert(layer, expert_id, expected)
        equal += bool((ray.get(ref, timeout=TIMEOUT_S) == expected).all())
    return equal


def try_to_load(folder: Path) -> str:
    store = ExpertStore(folder)
    store.start()
    try:
        store.directory(TIMEOUT_S)
    except CapacityError as error:
        return str(error)
    return "it fitted"


def nodes_of_hot_experts(folder: Path) -> tuple[list[set[str]], dict[str, int], dict[str, Any]]:
    """Place by loads that lie on experts 0 and 1 of every layer.

    Returns: the nodes of those two by layer, the experts on each node, and what the store tells.
    """
    checkpoint = Checkpoint.open(folder)
    architecture = checkpoint.architecture
    counts = np.ones((2, architecture.num_layers, architecture.num_experts), np.int64)
    counts[..., :2] = 47
    loads = folder / "loads.safetensors"
    ExpertLoads(checkpoint.fingerprint, counts).save(loads)
    store = ExpertStore(folder, placement_trace=str(loads))
    store.start()
    node_ids = store.directory(TIMEOUT_S).node_ids
    hot = [{node_ids[layer, 0], node_ids[layer, 1]} for layer in range(architecture.num_layers)]
    return hot, dict(Counter(node_ids.values())), store.describe()


def add_node(cluster: Cluster, store_bytes: int) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=store_bytes, resources={"host_memory_gb": 1})


def run(folder: Path) -> dict[str, Any]:
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": LARGE_BYTES}
    )
    small = add_node(cluster, SMALL_BYTES)
    ray.init(address=cluster.address, log_to_driver=False)
    refusal = try_to_load(folder)
    large = add_node(cluster, LARGE_BYTES)
    hot, by_load, told = nodes_of_hot_experts(folder)
    store = ExpertStore(folder)
    store.start()
    directory = store.directory(TIMEOUT_S)
    loaded = Counter(directory.node_ids.values())
    cluster.remove_node(large, allow_graceful=False)
    add_node(cluster, LARGE_BYTES)
    started = time.perf_counter()
    equal = count_equal(directory, folder)
    result = {
        "refusal": refusal,
        "nodes_of_hot_experts": [len(nodes) for nodes in hot],
        "by_load_on_small": by_load[small.node_id],
        "told": told,
        "experts": len(directory.refs),
        "on_small": loaded[small.node_id],
        "on_large": loaded[large.node_id],
        "equal_after_loss": equal,
        "rebuild_s": round(time.perf_counter() - started, 2),
    }
    ray.shutdown()
    cluster.shutdown()
    return result


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]))))
