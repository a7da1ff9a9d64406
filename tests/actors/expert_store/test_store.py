"""ExpertStore on one node: the bytes of the checkpoint, without a copy, or a readable error. One real Ray cluster."""

import asyncio
import gc
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from numpy.typing import NDArray

from actors.expert_store import store as store_module
from actors.expert_store.directory import ExpertDirectory
from actors.expert_store.loads import ExpertLoads
from actors.expert_store.placement import NodeOffer
from actors.expert_store.store import ExpertStore
from common.checkpoint import Checkpoint
from common.errors import CapacityError, CheckpointError, ConfigError, UnavailableError
from tests.tiny_models import make_checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]

TIMEOUT_S = 60


def load(folder: Path) -> ExpertStore:
    store = ExpertStore(folder)
    store.start()
    store.directory(TIMEOUT_S)
    return store


def assert_holds(directory: ExpertDirectory, folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert directory.refs.keys() == checkpoint.expert_ranges.keys() == directory.node_ids.keys()
    assert directory.layout == checkpoint.stored_layout
    assert directory.model_fingerprint == checkpoint.fingerprint
    expected = np.zeros(checkpoint.stored_layout.slab_bytes, np.uint8)
    for (layer, expert_id), ref in directory.refs.items():
        checkpoint.read_expert(layer, expert_id, expected)
        assert np.array_equal(ray.get(ref), expected), (layer, expert_id)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_holds_the_bytes_of_every_expert(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path, max_shard_size="100KB")
    assert_holds(load(tmp_path).directory(), tmp_path)


def address(array: NDArray[np.uint8]) -> int:
    return int(array.__array_interface__["data"][0])


def shared_memory() -> list[range]:
    """Where this process maps the object store."""
    lines = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if "plasma" in line]
    return [range(*(int(end, 16) for end in line.split("-"))) for line in lines]


def test_gives_views_of_shared_memory_without_a_copy(folder: Path) -> None:
    directory = load(folder).directory()
    slabs = ray.get(list(directory.refs.values()))
    again = ray.get(list(directory.refs.values()))
    assert [address(slab) for slab in slabs] == [address(slab) for slab in again]
    assert all(any(address(slab) in region for region in shared_memory()) for slab in slabs)
    assert not any(slab.flags.writeable for slab in slabs)


def test_describes_what_it_holds(folder: Path) -> None:
    store = load(folder)
    directory, description = store.directory(), store.describe()
    total = 24 * directory.layout.slab_bytes
    assert json.loads(json.dumps(description)) == description
    assert description["state"] == "ready"
    assert (description["experts"], description["loaded_experts"], description["total_bytes"]) == (
        24,
        24,
        total,
    )
    assert description["nodes"] == {ray.get_runtime_context().get_node_id(): total}
    assert (description["placement"], description["max_load"]) == ("even", None)
    assert description["generation"] == directory.generation
    assert description["seconds"] > 0
    assert description["gb_per_s"] > 0


def test_experts_of_mixed_chunks_keep_their_ids(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = ray.get_runtime_context().get_node_id()
    both = [NodeOffer(this, room, 1.0, offers_host_memory=False) for room in (10**8, 2 * 10**8)]
    monkeypatch.setattr(store_module, "find_offers", lambda *_: both)
    counts = np.random.default_rng(0).integers(100, size=(4, 3, 8))
    ExpertLoads(Checkpoint.open(folder).fingerprint, counts).save(tmp_path / "loads")
    store = ExpertStore(folder, placement_trace=str(tmp_path / "loads"))
    store.start()
    assert_holds(store.directory(TIMEOUT_S), folder)
    description = store.describe()
    assert json.loads(json.dumps(description)) == description
    assert (description["placement"], description["max_load"]) == (
        "by load",
        {"average": 1.0, "worst": 1.0},  # it is one node after all
    )


def test_loads_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    ExpertLoads("0123456789abcdef", np.ones((1, 3, 8), np.int64)).save(tmp_path / "loads")
    store = ExpertStore(folder, placement_trace=str(tmp_path / "loads"))
    store.start()
    with pytest.raises(ConfigError, match="its loads are of model 0123456789abcdef"):
        store.directory(TIMEOUT_S)


def test_every_load_is_a_new_generation(folder: Path) -> None:
    assert load(folder).directory().generation != load(folder).directory().generation


def test_memory_is_free_again_when_the_store_is_gone(folder: Path) -> None:
    store = load(folder)
    refs = {ref.hex().encode() for ref in store.directory().refs.values()}
    assert refs <= owned_refs()
    del store
    gc.collect()
    assert not refs & owned_refs()


def owned_refs() -> set[bytes]:
    references: dict[bytes, Any] = ray._private.worker.global_worker.core_worker.get_all_reference_counts()
    return set(references)


def test_loading_again_and_starting_twice_are_harmless(folder: Path) -> None:
    store = load(folder)
    generation = store.directory().generation
    store.start()
    assert store.directory(TIMEOUT_S).generation == generation
    store.stop()
    store.stop()
    assert store.directory().generation == generation


def test_refuses_what_does_not_fit_before_anything_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_run(*_: Any) -> None:
        raise AssertionError("a load task was submitted")

    [node] = ray.nodes()
    node["Resources"]["object_store_memory"] = 1_000_000.0
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    monkeypatch.setattr(store_module, "submit_chunk", must_not_run)
    store = ExpertStore(folder)
    store.start()
    needed = 24 * 3 * 64 * 256 * 4
    with pytest.raises(CapacityError, match=f"--object-store-memory={needed * 10 // 8}"):
        store.directory(TIMEOUT_S)
    assert store.describe()["state"] == "failed"
    assert "need 0.00 GB" in store.describe()["error"]


async def test_everybody_who_waits_hears_of_a_damaged_checkpoint(folder: Path, tmp_path: Path) -> None:
    store = ExpertStore(tmp_path)
    waiting = [asyncio.create_task(store.wait_directory()) for _ in range(3)]
    store.start()
    errors = await asyncio.gather(*waiting, return_exceptions=True)
    assert [str(error) for error in errors] == [
        f"checkpoint {tmp_path}: no config.json there; give the folder of a Hugging Face checkpoint"
    ] * 3
    with pytest.raises(CheckpointError, match="no config.json"):
        store.check_health()
    assert store.describe()["state"] == "failed"


def test_an_error_in_a_load_task_arrives_as_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_checkpoint("qwen3_moe", tmp_path)
    opened = Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    monkeypatch.setattr(Checkpoint, "open", lambda folder: opened)
    store = ExpertStore(tmp_path)
    with caplog.at_level(logging.ERROR):
        store.start()
        with pytest.raises(CheckpointError, match="model.safetensors: cannot be opened on node") as caught:
            store.directory(TIMEOUT_S)
    assert type(caught.value) is CheckpointError
    assert "\n" not in str(caught.value)
    assert "were not loaded: checkpoint" in caplog.text


def test_a_stopped_load_ends(folder: Path) -> None:
    store = ExpertStore(folder)
    store.stop()
    store.start()
    with pytest.raises(UnavailableError, match="stopped while it loaded"):
        store.directory(TIMEOUT_S)


def test_cancelling_one_waiter_leaves_the_load_to_the_others(folder: Path) -> None:
    async def cancel_one(store: ExpertStore) -> ExpertDirectory:
        impatient = asyncio.create_task(store.wait_directory())
        await asyncio.sleep(0)
        impatient.cancel()
        return await asyncio.wait_for(store.wait_directory(), TIMEOUT_S)

    store = ExpertStore(folder)
    store.start()
    assert len(asyncio.run(cancel_one(store)).refs) == 24


def first_byte(directory: ExpertDirectory, layer: int, expert_id: int) -> int:
    return int(ray.get(directory.refs[layer, expert_id])[0])


def test_the_directory_works_in_another_process(folder: Path) -> None:
    directory = load(folder).directory()
    expected = int(ray.get(directory.refs[2, 5])[0])
    assert (
        ray.get(ray.remote(first_byte).options(num_cpus=0).remote(directory, 2, 5), timeout=TIMEOUT_S)
        == expected
    )
