"""Model classes for the families whose experts the library does not run through its experts registry.

Each is the library's own model with its MoE blocks exchanged for blocks of ours, whose experts look like those of any
registry family. The library itself is never patched, and the checkpoint format stays its own. The classes train as the
library's do: `own_model_class(config)(config)` is a new model, `save_pretrained` writes what the library reads.
"""

from importlib import import_module
from typing import cast

from transformers import PretrainedConfig

from common.own_experts.model import OwnExpertsModel

# model type -> module of this package, imported when needed
_MODULES = {
    "dbrx": "dbrx",
    "llama4": "llama4",
    "llama4_text": "llama4",
    "nllb-moe": "nllb_moe",
    "switch_transformers": "switch_transformers",
}


def own_model_class(config: PretrainedConfig) -> type[OwnExpertsModel] | None:
    """The class of ours that loads and builds this model, or None where the library's own is right."""
    name = _MODULES.get(config.model_type)
    if name is None:
        return None
    module = import_module(f"{__name__}.{name}")
    return cast(type[OwnExpertsModel], module.model_class(config))
