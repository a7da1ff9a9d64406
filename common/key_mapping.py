"""Which parameter of the library's model each checkpoint key belongs to, and by which conversion.

The one place that calls the loader's internals; it follows `convert_and_load_state_dict_in_model` of transformers
5.17 to 5.23 and reads no tensor.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


@dataclass(frozen=True)
class MappedKey:
    """One checkpoint key. `part` and `num_parts` say which piece of the target's concatenation it is."""

    key: str
    target: str  # name in the model's state dict
    operations: tuple[str, ...] = ()  # "MergeModulelist(0)"; empty: the tensor is the parameter
    part: int = 0
    num_parts: int = 1


def map_keys(model: PreTrainedModel, keys: Iterable[str]) -> list[MappedKey]:
    """The keys that belong to the model, in the order in which the library merges them; others are left out."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, state = model.base_model_prefix, model.state_dict()
    mapped = []
    for key in sorted(keys, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if target not in state and key in state:
            target, pattern = rename_source_key(key, [], [], prefix, state)
        if target in state:
            mapped.append(
                _mapped(key, target, by_pattern[pattern], pattern) if pattern else MappedKey(key, target)
            )
    return mapped


def _mapped(key: str, target: str, converter: WeightConverter, pattern: str) -> MappedKey:
    operations = tuple(_describe(operation) for operation in converter.operations)
    patterns = converter.source_patterns
    return MappedKey(key, target, operations, patterns.index(pattern), len(patterns))


def _describe(operation: object) -> str:
    dim = getattr(operation, "dim", None)
    return type(operation).__name__ + ("" if dim is None else f"({dim})")
