"""StoreExpertSource without a cluster: which views are current and which live on as it follows a store."""

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors.executor.store_source import StoreExpertSource
from actors.expert_store.directory import ExpertDirectory
from common.expert_layout import ExpertLayout

LAYOUT = ExpertLayout.from_shapes({"down_proj": (4, 4)}, torch.float32)
KEYS = [(layer, expert_id) for layer in range(2) for expert_id in range(3)]
HERE, ELSEWHERE = "this node", "another node"


class Objects:
    """The object store: references are keys of it."""

    def __init__(self) -> None:
        self.arrays: dict[tuple[str, int, int], np.ndarray[Any, np.dtype[np.uint8]]] = {}

    def directory(self, generation: str, fill: int, fingerprint: str = "model") -> ExpertDirectory:
        """Experts of `fill` everywhere; expert 2 of each layer lies elsewhere."""
        for layer, expert_id in KEYS:
            array = np.full(LAYOUT.slab_bytes, fill, np.uint8)
            array.setflags(write=False)
            self.arrays[generation, layer, expert_id] = array
        refs: Any = {key: (generation, *key) for key in KEYS}
        node_ids = {key: ELSEWHERE if key[1] == 2 else HERE for key in KEYS}
        return ExpertDirectory(generation, fingerprint, LAYOUT, refs, node_ids)

    def get(self, refs: Any, timeout: float | None = None) -> Any:
        return [self.arrays[ref] for ref in refs] if isinstance(refs, list) else self.arrays[refs]


@pytest.fixture
def objects(monkeypatch: pytest.MonkeyPatch) -> Objects:
    objects = Objects()
    monkeypatch.setattr(ray, "get", objects.get)
    return objects


def adopt_second(objects: Objects, source: StoreExpertSource) -> "weakref.ref[Any]":
    """Follow the store into generation "b"; a reference to a view of "a"."""
    old = weakref.ref(source.fetch(0, 0))
    source.adopt(objects.directory("b", fill=2))
    gc.collect()
    return old


def test_local_slabs_are_the_views_on_this_node(objects: Objects) -> None:
    source = StoreExpertSource(objects.directory("a", fill=1), HERE)
    slabs = source.local_slabs()
    assert sorted(slabs) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert slabs[1, 1].data_ptr() == objects.arrays["a", 1, 1].ctypes.data, "a view, no copy"
    assert source.fetch(1, 2)[0] == 1, "fetched from elsewhere"


def test_adopting_makes_the_new_views_current_and_drops_the_old(objects: Objects) -> None:
    source = StoreExpertSource(objects.directory("a", fill=1), HERE)
    old = adopt_second(objects, source)
    assert old() is None
    assert source.generation == "b"
    assert source.fetch(0, 0)[0] == source.local_slabs()[0, 0][0] == 2


def test_views_taken_before_stay_what_they_were(objects: Objects) -> None:
    source = StoreExpertSource(objects.directory("a", fill=1), HERE)
    taken = source.local_slabs()
    adopt_second(objects, source)
    assert all((slab == 1).all() for slab in taken.values())


def test_on_adopted_is_called_when_the_new_views_are_current(objects: Objects) -> None:
    source = StoreExpertSource(objects.directory("a", fill=1), HERE)
    seen: list[tuple[str, int]] = []
    source.on_adopted = lambda: seen.append((source.generation, int(source.local_slabs()[0, 0][0])))
    adopt_second(objects, source)
    assert seen == [("b", 2)]


def test_refuses_another_model(objects: Objects) -> None:
    source = StoreExpertSource(objects.directory("a", fill=1), HERE)
    with pytest.raises(ValueError, match="store now holds model other, not model"):
        source.adopt(objects.directory("b", fill=2, fingerprint="other"))
    assert source.generation == "a"
