"""CheckpointExpertSource hands out every expert as a slab that stays where it is."""

from pathlib import Path

import numpy as np
import torch

from actors.executor.expert_source import CheckpointExpertSource
from common.checkpoint import Checkpoint
from tests.tiny_models import make_checkpoint


def test_local_slabs_are_all_experts_and_the_ones_that_fetch_returns(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint("qwen3_moe", tmp_path))
    source = CheckpointExpertSource(checkpoint)
    early = source.fetch(1, 2)
    slabs = source.local_slabs()
    assert slabs.keys() == checkpoint.expert_ranges.keys()
    assert torch.equal(slabs[1, 2], early)
    expected = np.zeros(checkpoint.stored_layout.slab_bytes, np.uint8)
    for (layer, expert_id), slab in slabs.items():
        assert source.fetch(layer, expert_id) is slab
        checkpoint.read_expert(layer, expert_id, expected)
        assert np.array_equal(slab, expected), (layer, expert_id)
