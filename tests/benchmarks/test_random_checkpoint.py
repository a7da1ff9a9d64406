"""Checkpoints of random weights, at a toy size: what the library loads is what the expert store reads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu.checkpoint import write_checkpoint
from benchmarks.gpu.shapes import TINY, qwen3_30b
from common.architecture import find_experts_modules
from common.checkpoint import Checkpoint

CPU = torch.device("cpu")
TEXT_TOKENS = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random")
    num_bytes = write_checkpoint(qwen3_30b(2, torch.bfloat16, **TINY), path, CPU, text_tokens=TEXT_TOKENS)
    assert (
        num_bytes == json.loads((path / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    )
    return path


def test_names_and_shards_are_those_of_the_published_checkpoint(folder: Path) -> None:
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for part in ("gate", "up", "down"):
        assert f"model.layers.1.mlp.experts.15.{part}_proj.weight" in weight_map
    assert len(set(weight_map.values())) == 3


def test_the_library_loads_the_experts_that_the_store_reads(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    layout, slab = checkpoint.stored_layout, np.zeros(checkpoint.stored_layout.slab_bytes, np.uint8)
    for layer, module in enumerate(find_experts_modules(model).values()):
        for expert in range(TINY["num_experts"]):
            checkpoint.read_expert(layer, expert, slab)
            for name, view in layout.views(torch.from_numpy(slab)).items():
                assert torch.equal(view, module.get_parameter(name)[expert])


def test_greedy_tokens_have_a_text(folder: Path) -> None:
    head = AutoModelForCausalLM.from_pretrained(folder).get_output_embeddings().weight.detach()
    assert head[TEXT_TOKENS:].count_nonzero() == 0
    assert float(head[:TEXT_TOKENS].std()) == pytest.approx(0.02, rel=0.1)
