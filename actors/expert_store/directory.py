"""What the expert store hands to an executor once: a reference to every expert. Plain data, crosses processes."""

from dataclasses import dataclass

import numpy as np
import ray
from numpy.typing import NDArray

from common.expert_layout import ExpertLayout


@dataclass(frozen=True, eq=False)
class ExpertDirectory:
    """References to all experts of one load. An expert is one flat, read-only uint8 array of `layout.slab_bytes`.

    On a node that holds it `ray.get` gives a view of shared memory, always the same one; experts under 100 KB are
    the exception, Ray sends those by value. References die with the store that made them: what was fetched stays
    readable, for the rest `ray.get` raises an ObjectLostError.
    """

    generation: str  # new for every load
    model_fingerprint: str
    layout: ExpertLayout  # the stored form
    refs: dict[tuple[int, int], "ray.ObjectRef[NDArray[np.uint8]]"]  # by (layer, expert id)
    node_ids: dict[
        tuple[int, int], str
    ]  # where each was loaded; after the loss of a node it may lie elsewhere
