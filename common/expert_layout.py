"""One expert as one contiguous slab of bytes: which tensors lie in it, in which order, at which offsets.

The *stored* layout (in the expert store) and the *slot* layout (in an executor) are separate instances. Today they
differ in dtype at most; packed and low-precision stored forms are decoded by whoever fetches.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

ALIGNMENT_BYTES = (
    64  # of every stored tensor; half of it after a conversion to half the size. Grouped GEMM wants 16
)


@dataclass(frozen=True)
class ExpertTensor:
    """One tensor of an expert, without the leading experts dimension of the module's parameter."""

    name: str  # of the parameter in the experts module: "gate_up_proj"
    shape: tuple[int, ...]
    offset_bytes: int
    is_transposed: bool = False  # the bytes are those of the transposed matrix

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.is_transposed else self.shape

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ExpertLayout:
    """Names, shapes and offsets of one expert; the same for every expert of a model."""

    tensors: tuple[ExpertTensor, ...]
    dtype_name: str  # "bfloat16"; a name, not a torch.dtype, so that it travels as text too
    slab_bytes: int

    @classmethod
    def from_shapes(
        cls, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, transposed: Collection[str] = ()
    ) -> "ExpertLayout":
        """Lay the tensors out in the mapping's order, each aligned to ALIGNMENT_BYTES.

        Args:
            transposed: names of matrices whose bytes are those of the transposed one.
        """
        tensors, offset = [], 0
        for name, shape in shapes.items():
            tensors.append(ExpertTensor(name, tuple(shape), offset, name in transposed))
            offset += _aligned(prod(shape) * dtype.itemsize)
        return cls(tuple(tensors), str(dtype).removeprefix("torch."), offset)

    @property
    def dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype_name)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def with_dtype(self, dtype: torch.dtype) -> "ExpertLayout":
        """The same elements at the same places in another dtype: one copy of a whole slab converts an expert."""
        scale = dtype.itemsize / self.dtype.itemsize
        tensors = tuple(
            replace(tensor, offset_bytes=int(tensor.offset_bytes * scale)) for tensor in self.tensors
        )
        return ExpertLayout(tensors, str(dtype).removeprefix("torch."), int(self.slab_bytes * scale))

    def views(self, slabs: Tensor) -> dict[str, Tensor]:
        """Typed views of slabs, by tensor name; no bytes are copied.

        Args:
            slabs: [..., slab_bytes] uint8, contiguous.
        Returns:
            name -> [..., *shape] of the layout's dtype; strided when slabs has leading dimensions or it is transposed.
        """
        assert slabs.dtype == torch.uint8 and slabs.shape[-1] == self.slab_bytes
        elements = slabs.view(self.dtype)  # [..., slab elements]
        views = {}
        for tensor in self.tensors:
            start = tensor.offset_bytes // self.dtype.itemsize
            stored = elements[..., start : start + tensor.num_elements].unflatten(-1, tensor.stored_shape)
            views[tensor.name] = stored.transpose(-1, -2) if tensor.is_transposed else stored
        return views


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
