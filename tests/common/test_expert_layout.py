"""ExpertLayout: what is written through a view is read back through another, and slabs never overlap."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.expert_layout import ALIGNMENT_BYTES, ExpertLayout

SHAPES = st.dictionaries(
    st.sampled_from(["gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"]),
    st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    min_size=1,
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@given(SHAPES, DTYPES, st.integers(1, 4))
def test_views_hold_what_was_written(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, num_slabs: int
) -> None:
    layout = ExpertLayout.from_shapes(shapes, dtype)
    slabs = torch.full((num_slabs, layout.slab_bytes), 0xFF, dtype=torch.uint8)
    written = {name: torch.randn(num_slabs, *shape).to(dtype) for name, shape in shapes.items()}
    for name, view in layout.views(slabs).items():
        view.copy_(written[name])
    for name, view in layout.views(slabs).items():
        assert view.dtype == dtype
        assert torch.equal(view, written[name])


@given(SHAPES, DTYPES)
def test_tensors_are_aligned_in_order_and_inside_the_slab(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> None:
    layout = ExpertLayout.from_shapes(shapes, dtype)
    assert [tensor.name for tensor in layout.tensors] == list(shapes)
    end = 0
    for tensor in layout.tensors:
        assert tensor.offset_bytes % ALIGNMENT_BYTES == 0
        assert 0 <= tensor.offset_bytes - end < ALIGNMENT_BYTES
        end = tensor.offset_bytes + tensor.num_elements * dtype.itemsize
    assert 0 <= layout.slab_bytes - end < ALIGNMENT_BYTES


@given(SHAPES, DTYPES, DTYPES)
def test_copying_a_whole_slab_into_another_dtype_converts_every_tensor(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, other: torch.dtype
) -> None:
    layout = ExpertLayout.from_shapes(shapes, dtype)
    converted = layout.with_dtype(other)
    slab = torch.randint(0, 100, (layout.slab_bytes // dtype.itemsize,)).to(dtype).view(torch.uint8)
    slot = torch.empty(converted.slab_bytes, dtype=torch.uint8)
    slot.view(other).copy_(slab.view(dtype))
    for name, tensor in layout.views(slab).items():
        assert torch.equal(converted.views(slot)[name], tensor.to(other))
    assert all(tensor.offset_bytes % 16 == 0 for tensor in converted.tensors)


@given(SHAPES, DTYPES)
def test_travels_by_pickle(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    layout = ExpertLayout.from_shapes(shapes, dtype)
    assert pickle.loads(pickle.dumps(layout)) == layout


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_views_of_slabs_share_their_memory(leading: tuple[int, ...]) -> None:
    layout = ExpertLayout.from_shapes({"up": (4, 8), "down": (8, 4)}, torch.bfloat16)
    slabs = torch.zeros(*leading, layout.slab_bytes, dtype=torch.uint8)
    layout.views(slabs)["down"].fill_(1.0)
    assert slabs[..., : 4 * 8 * 2].count_nonzero() == 0
    assert slabs.count_nonzero() > 0


def test_the_bytes_of_a_transposed_tensor_are_those_of_the_transposed_matrix() -> None:
    shapes = {"up": (4, 8), "down": (8, 4)}
    layout = ExpertLayout.from_shapes(shapes, torch.float32, transposed=("down",))
    matrices = {name: torch.randn(shape) for name, shape in shapes.items()}
    stored = [matrices["up"], matrices["down"].T.contiguous()]
    slabs = torch.cat([matrix.flatten() for matrix in stored]).view(torch.uint8).unsqueeze(0)
    for converted in (layout, layout.with_dtype(torch.float32)):
        views = converted.views(slabs)
        assert all(torch.equal(views[name][0], matrix) for name, matrix in matrices.items())
    assert layout.slab_bytes == ExpertLayout.from_shapes(shapes, torch.float32).slab_bytes
