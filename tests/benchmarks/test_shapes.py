"""Random models and their experts in host memory, at a toy size."""

import mmap

import pytest
import torch

from actors.executor.expert_source import ExpertSource
from benchmarks.gpu.shapes import (
    TINY,
    RandomExpertSource,
    load_experts_into,
    meta_causal_model,
    qwen3_30b,
    random_dense_model,
    random_model,
    random_model_with_cpu_experts,
)
from common.architecture import find_experts_modules, per_expert_shapes

CPU = torch.device("cpu")
CONFIG = qwen3_30b(2, torch.float32, **TINY)


def test_the_full_shape_has_the_published_number_of_parameters() -> None:
    assert meta_causal_model(qwen3_30b()).num_parameters() == pytest.approx(30.5e9, rel=0.01)


def test_rotary_frequencies_are_computed_not_left_empty() -> None:
    exponents = torch.arange(0, TINY["head_dim"], 2) / TINY["head_dim"]
    frequencies = random_model(CONFIG, CPU, seed=0).get_buffer("model.rotary_emb.inv_freq")
    torch.testing.assert_close(frequencies, 1e6**-exponents)


def test_a_model_computes_with_the_sources_experts() -> None:
    source: ExpertSource = RandomExpertSource(CONFIG, 1, CPU)
    assert isinstance(source, RandomExpertSource)
    model = random_model(CONFIG, CPU, seed=0)
    load_experts_into(model, source)
    for layer, module in enumerate(find_experts_modules(model).values()):
        for expert_id in range(TINY["num_experts"]):
            views = source.layout.views(source.fetch(layer, expert_id))
            assert all(torch.equal(module.get_parameter(name)[expert_id], views[name]) for name in views)


def test_every_slab_starts_a_page_and_differs_from_the_others() -> None:
    slabs = RandomExpertSource(CONFIG, 1, CPU).local_slabs()
    assert len(slabs) == 2 * TINY["num_experts"] == len({bytes(slab.numpy()) for slab in slabs.values()})
    assert all(slab.data_ptr() % mmap.PAGESIZE == 0 for slab in slabs.values())


def test_a_dense_model_has_the_same_weights_but_no_experts() -> None:
    dense, whole = random_dense_model(CONFIG, CPU, 0), random_model_with_cpu_experts(CONFIG, CPU, 0)
    assert all(not list(module.parameters()) for module in find_experts_modules(dense).values())
    assert all(per_expert_shapes(module) for module in find_experts_modules(whole).values())
    parameters = dict(whole.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in dense.named_parameters())
