"""The hash table of SiDA-MoE (arXiv 2310.18859, section 3.3): the experts each token is predicted to use in every
layer, and its msgpack form on the table bus. Knows neither who predicted nor how it travels.
"""

from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from common.errors import HashTableError

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class HashTable:
    """Predicted experts of T tokens in L MoE layers, k each, most likely first."""

    expert_ids: NDArray[np.uint16]  # [layers, tokens, k]
    weights: NDArray[np.float16]  # [layers, tokens, k], the predicted scaling factors
    model_fingerprint: str  # of the checkpoint the prediction is for
    predictor: str  # "hash_function"
    predictor_version: str

    def __post_init__(self) -> None:
        if self.expert_ids.ndim != 3 or self.expert_ids.shape != self.weights.shape:
            raise HashTableError(
                f"expert_ids {self.expert_ids.shape} and weights {self.weights.shape} must both be [layers, tokens, k]"
            )

    @property
    def num_layers(self) -> int:
        return int(self.expert_ids.shape[0])

    @property
    def num_tokens(self) -> int:
        return int(self.expert_ids.shape[1])

    def to_bytes(self) -> bytes:
        packed: bytes = msgpack.packb(
            {
                "format": FORMAT_VERSION,
                "model": self.model_fingerprint,
                "predictor": self.predictor,
                "predictor_version": self.predictor_version,
                "expert_ids": _pack_array(self.expert_ids, "<u2"),
                "weights": _pack_array(self.weights, "<f2"),
            }
        )
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> "HashTable":
        """
        Raises:
            HashTableError: the bytes are no table, of another format version, or of inconsistent sizes.
        """
        try:
            fields = msgpack.unpackb(data)
        except (ValueError, msgpack.UnpackException) as error:
            raise HashTableError(f"{len(data)} bytes that are not msgpack ({error})") from error
        if not isinstance(fields, dict) or fields.get("format") != FORMAT_VERSION:
            found = fields.get("format") if isinstance(fields, dict) else type(fields).__name__
            raise HashTableError(f"format {found!r}, this version reads format {FORMAT_VERSION}")
        return cls(
            _unpack_array(fields, "expert_ids", "<u2"),
            _unpack_array(fields, "weights", "<f2"),
            _text(fields, "model"),
            _text(fields, "predictor"),
            _text(fields, "predictor_version"),
        )

    def check_fits(self, model_fingerprint: str, num_layers: int, num_experts: int, num_tokens: int) -> None:
        """
        Raises:
            HashTableError: the table is of another model, another prompt, or names experts that do not exist.
        """
        if self.model_fingerprint != model_fingerprint:
            raise HashTableError(f"made for model {self.model_fingerprint!r}, this is {model_fingerprint!r}")
        if (self.num_layers, self.num_tokens) != (num_layers, num_tokens):
            raise HashTableError(
                f"{self.num_layers} layers x {self.num_tokens} tokens, expected {num_layers} x {num_tokens}"
            )
        if self.expert_ids.size and int(self.expert_ids.max()) >= num_experts:
            raise HashTableError(f"expert {int(self.expert_ids.max())} named, the model has {num_experts}")


def _pack_array(array: NDArray[Any], dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(array.shape), "data": array.astype(dtype, copy=False).tobytes()}


def _unpack_array(fields: dict[str, Any], name: str, dtype: str) -> NDArray[Any]:
    packed = fields.get(name)
    if not isinstance(packed, dict) or packed.get("dtype") != dtype:
        raise HashTableError(f"{name} is not an array of {dtype}")
    shape, data = packed.get("shape"), packed.get("data")
    if (
        not isinstance(data, bytes)
        or not isinstance(shape, list)
        or not all(isinstance(n, int) and n >= 0 for n in shape)
    ):
        raise HashTableError(f"{name} has no valid shape and data")
    if len(data) != int(np.prod(shape)) * np.dtype(dtype).itemsize:
        raise HashTableError(f"{name} has {len(data)} bytes, its shape {shape} says otherwise")
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise HashTableError(f"{name} is missing")
    return value
